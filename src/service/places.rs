//! Directories outside the volume: pins, runtime files, state. Which they are, and whether they are safe to believe.
//!
//! | what | environment | root | others |
//! |---|---|---|---|
//! | pins | `LETHEFS_TRUST_DIR` | `/etc/lethefs/trust.d` | `$XDG_CONFIG_HOME/lethefs/trust.d`, read also root's |
//! | runtime | `LETHEFS_RUNTIME_DIR` | `/run/lethefs` | `$XDG_RUNTIME_DIR/lethefs`, else `/tmp/lethefs-UID` |
//! | state: erase journals, audit logs | `LETHEFS_STATE_DIR` | `/var/lib/lethefs` | `$XDG_STATE_HOME/lethefs` |

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};

/// Root's pins, which every user of the host may rely on.
const SYSTEM_TRUST: &str = "/etc/lethefs/trust.d";

/// The effective user.
pub(crate) fn euid() -> u32 {
    rustix::process::geteuid().as_raw()
}

fn from_env(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from).filter(|path| path.is_absolute())
}

fn home(xdg: &str, below_home: &str) -> io::Result<PathBuf> {
    from_env(xdg)
        .or_else(|| from_env("HOME").map(|home| home.join(below_home)))
        .ok_or_else(|| io::Error::other(format!("neither {xdg} nor HOME is set to an absolute path")))
}

/// Where pins are written.
///
/// # Errors
/// An ordinary user without a home.
pub fn trust_dir() -> io::Result<PathBuf> {
    if let Some(dir) = from_env("LETHEFS_TRUST_DIR") {
        return Ok(dir);
    }
    if euid() == 0 {
        return Ok(SYSTEM_TRUST.into());
    }
    Ok(home("XDG_CONFIG_HOME", ".config")?.join("lethefs/trust.d"))
}

/// Where pins are looked for, the first place first.
pub fn trust_dirs() -> Vec<PathBuf> {
    let mut dirs: Vec<_> = trust_dir().into_iter().collect();
    if from_env("LETHEFS_TRUST_DIR").is_none() && euid() != 0 {
        dirs.push(SYSTEM_TRUST.into());
    }
    dirs
}

/// Where live mounts leave their socket, record and log.
pub fn runtime_dir() -> PathBuf {
    if let Some(dir) = from_env("LETHEFS_RUNTIME_DIR") {
        return dir;
    }
    match (euid(), from_env("XDG_RUNTIME_DIR")) {
        (0, _) => "/run/lethefs".into(),
        (_, Some(dir)) => dir.join("lethefs"),
        (uid, None) => format!("/tmp/lethefs-{uid}").into(),
    }
}

/// Where to look for live mounts: root sees those of the users named, too. Only directories that nobody else can write.
pub fn runtime_dirs(users: &[u32]) -> Vec<PathBuf> {
    let mut dirs = vec![(euid(), runtime_dir())];
    if euid() == 0 && from_env("LETHEFS_RUNTIME_DIR").is_none() {
        for uid in users.iter().filter(|uid| **uid != 0) {
            dirs.push((*uid, format!("/run/user/{uid}/lethefs").into()));
            dirs.push((*uid, format!("/tmp/lethefs-{uid}").into()));
        }
    }
    let safe = |owner: u32, dir: &Path| {
        fs::symlink_metadata(dir)
            .is_ok_and(|meta| meta.is_dir() && meta.mode() & 0o022 == 0 && (meta.uid() == 0 || meta.uid() == owner))
    };
    let mut found: Vec<PathBuf> =
        dirs.into_iter().filter(|(owner, dir)| safe(*owner, dir)).map(|(_, dir)| dir).collect();
    found.dedup();
    found
}

/// Where an erase without the backing directory keeps its journal.
///
/// # Errors
/// An ordinary user without a home.
pub fn erase_dir() -> io::Result<PathBuf> {
    Ok(state_dir()?.join("erase"))
}

/// Where the audit logs of this user's doings are. Root's and a user's are two.
///
/// # Errors
/// An ordinary user without a home.
pub fn audit_dir() -> io::Result<PathBuf> {
    Ok(state_dir()?.join("audit"))
}

fn state_dir() -> io::Result<PathBuf> {
    if let Some(dir) = from_env("LETHEFS_STATE_DIR") {
        return Ok(dir);
    }
    if euid() == 0 {
        return Ok("/var/lib/lethefs".into());
    }
    Ok(home("XDG_STATE_HOME", ".local/state")?.join("lethefs"))
}

/// Makes a directory of ours, with its parents, unless it is there; then checks it.
///
/// # Errors
/// The system's, or what makes the directory unsafe.
pub(crate) fn make_dir(dir: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(if euid() == 0 { 0o755 } else { 0o700 }).create(dir)?;
    check_dir(dir)
}

/// Whether only this user and root can put files into a directory.
///
/// # Errors
/// The system's, or what makes it unsafe.
pub(crate) fn check_dir(dir: &Path) -> io::Result<()> {
    let meta = fs::symlink_metadata(dir)?;
    let safe = meta.is_dir() && owner_is_us_or_root(meta.uid()) && meta.mode() & 0o022 == 0;
    if safe { Ok(()) } else { Err(unsafe_place(dir, "directory")) }
}

fn owner_is_us_or_root(owner: u32) -> bool {
    owner == 0 || owner == euid()
}

fn unsafe_place(path: &Path, what: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::PermissionDenied,
        format!("{} must be a {what} of yours or root's that nobody else can write", path.display()),
    )
}

/// Reads a small file that only this user or root can have written.
///
/// # Errors
/// The system's, or what makes the file unsafe: a symlink, another owner, writable by others, larger than `limit`.
pub(crate) fn read_own(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let (meta, bytes) = read_regular(path, limit)?;
    if !owner_is_us_or_root(meta.uid()) || meta.mode() & 0o022 != 0 {
        return Err(unsafe_place(path, "regular file"));
    }
    Ok(bytes)
}

/// Reads a small regular file, whoever wrote it. Follows no symlink, and waits for no FIFO.
///
/// # Errors
/// The system's; not a regular file; larger than `limit`.
pub(crate) fn read_regular(path: &Path, limit: u64) -> io::Result<(fs::Metadata, Vec<u8>)> {
    use io::Read as _;
    let file = fs::OpenOptions::new()
        .read(true)
        .custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits() as i32)
        .open(path)
        .map_err(|error| match rustix::io::Errno::from_io_error(&error) {
            Some(rustix::io::Errno::LOOP) => unsafe_place(path, "regular file"),
            _ => error,
        })?;
    let meta = file.metadata()?;
    if !meta.is_file() {
        return Err(unsafe_place(path, "regular file"));
    }
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        return Err(io::Error::other(format!("{} is larger than {limit} bytes", path.display())));
    }
    Ok((meta, bytes))
}

/// Replaces a small file atomically and durably.
///
/// # Errors
/// The system's; the old file is then still whole.
pub(crate) fn write_own(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    use io::Write as _;
    let dir = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    let mut file = tempfile::Builder::new()
        .prefix(".new-")
        .permissions(<fs::Permissions as std::os::unix::fs::PermissionsExt>::from_mode(mode))
        .tempfile_in(dir)?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    fs::File::open(dir)?.sync_all()
}

/// Opens a log for appending; only this user may read it.
///
/// # Errors
/// The system's.
pub(crate) fn open_log(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    #[test]
    fn only_safe_files_are_read() {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("pin");
        write_own(&path, b"x", 0o600).expect("written");
        assert_eq!(read_own(&path, 10).expect("read"), b"x");
        assert!(read_own(&path, 0).is_err(), "larger than allowed");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o620)).expect("mode");
        assert!(read_own(&path, 10).is_err(), "the group could have written it");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("mode");
        symlink(&path, dir.path().join("link")).expect("link");
        assert!(read_own(&dir.path().join("link"), 10).is_err(), "a symlink");
        assert!(read_own(dir.path(), 10).is_err(), "a directory");
        check_dir(dir.path()).expect("safe");
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).expect("mode");
        assert!(check_dir(dir.path()).is_err());
    }
}
