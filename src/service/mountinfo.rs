//! What is mounted where, from `/proc/self/mountinfo` (proc_pid_mountinfo(5)). Read-only; asks no filesystem anything.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

use crate::fs::session::FS_TYPE;

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Where.
    pub mountpoint: PathBuf,
    /// `major:minor` of its device.
    pub device: String,
    /// As in `fuse.lethefs`.
    pub fs_type: String,
    /// What the filesystem calls its source.
    pub source: PathBuf,
    /// Who mounted it, where the filesystem says so (FUSE).
    pub user: Option<u32>,
}

impl Mount {
    /// One of ours.
    pub fn is_lethefs(&self) -> bool {
        self.fs_type == FS_TYPE
    }
}

/// Every mount of this mount namespace, in the order they were made.
///
/// # Errors
/// No `/proc`.
pub fn read() -> io::Result<Vec<Mount>> {
    Ok(parse(&fs::read("/proc/self/mountinfo")?))
}

/// The mount on top at exactly this (canonical) path.
pub fn at<'a>(mounts: &'a [Mount], path: &Path) -> Option<&'a Mount> {
    mounts.iter().rev().find(|mount| mount.mountpoint == path)
}

/// The mount that holds this (canonical) path.
pub fn holding<'a>(mounts: &'a [Mount], path: &Path) -> Option<&'a Mount> {
    mounts
        .iter()
        .enumerate()
        .filter(|(_, mount)| path.starts_with(&mount.mountpoint))
        .max_by_key(|(n, mount)| (mount.mountpoint.as_os_str().len(), *n))
        .map(|(_, mount)| mount)
}

/// Mounts strictly below this (canonical) path.
pub fn below<'a>(mounts: &'a [Mount], path: &'a Path) -> impl Iterator<Item = &'a Mount> {
    mounts.iter().filter(move |mount| mount.mountpoint != path && mount.mountpoint.starts_with(path))
}

fn parse(text: &[u8]) -> Vec<Mount> {
    text.split(|byte| *byte == b'\n').filter_map(parse_line).collect()
}

/// `36 35 98:0 /root /mnt rw,noatime master:1 - ext3 /dev/root rw,errors=continue`
fn parse_line(line: &[u8]) -> Option<Mount> {
    let fields: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
    let dash = fields.iter().position(|field| *field == b"-")?;
    let [fs_type, source, options] = fields.get(dash + 1..dash + 4)? else { return None };
    let options = String::from_utf8_lossy(options);
    Some(Mount {
        mountpoint: unescape(fields.get(4)?),
        device: String::from_utf8_lossy(fields.get(2)?).into_owned(),
        fs_type: String::from_utf8_lossy(fs_type).into_owned(),
        source: unescape(source),
        user: options.split(',').find_map(|option| option.strip_prefix("user_id=")?.parse().ok()),
    })
}

/// Undoes the kernel's `\040` for space, tab, newline, backslash (and `#`).
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, after)) = rest.split_first() {
        let octal = after.get(..3).filter(|digits| digits.iter().all(|digit| matches!(digit, b'0'..=b'7')));
        if let (b'\\', Some(digits)) = (byte, octal) {
            bytes.push(digits.iter().fold(0u8, |value, digit| value.wrapping_mul(8).wrapping_add(digit - b'0')));
            rest = &after[3..];
        } else {
            bytes.push(byte);
            rest = after;
        }
    }
    OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &[u8] = b"22 27 0:21 / /proc rw,nosuid shared:5 - proc proc rw\n\
        27 1 8:1 / / rw - ext4 /dev/root rw\n\
        36 27 0:44 / /mnt/a\\040b\\134c rw,nosuid,nodev master:1 shared:2 - fuse.lethefs /data rw,user_id=1000,group_id=0\n\
        37 27 0:45 / /mnt rw - tmpfs tmpfs rw\nnonsense\n";

    #[test]
    fn lines_are_understood() {
        let mounts = parse(TEXT);
        assert_eq!(mounts.len(), 4);
        let ours = &mounts[2];
        assert_eq!(ours.mountpoint, Path::new("/mnt/a b\\c"));
        assert_eq!((ours.is_lethefs(), ours.user, ours.source.as_path()), (true, Some(1000), Path::new("/data")));
        assert_eq!(at(&mounts, Path::new("/mnt")).map(|mount| mount.fs_type.as_str()), Some("tmpfs"));
        assert_eq!(holding(&mounts, Path::new("/mnt/a b\\c/d")), Some(ours));
        assert_eq!(holding(&mounts, Path::new("/mntx")).map(|mount| mount.fs_type.as_str()), Some("ext4"));
        assert_eq!(below(&mounts, Path::new("/mnt")).collect::<Vec<_>>(), [ours]);
    }
}
