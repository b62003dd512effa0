//! The key file itself: made whole or not at all, believed only if nobody else could have read or made it, wiped before
//! it is unlinked. Knows nothing of what is wrapped under it.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustix::fs::{Access, AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;
use serde::Deserialize;
use zeroize::Zeroizing;

use crate::crypto::{Key32, VolumeId};
use crate::kms::{Failure, KmsError};

/// A key file is about 170 bytes.
const MAX_SIZE: usize = 4096;

/// What a key file holds.
pub(super) struct Stored {
    pub(super) key_id: VolumeId,
    pub(super) created: String,
    pub(super) key: Key32,
}

/// What became of a wish to wipe.
pub(super) enum Wiped {
    Done,
    WasGone,
    OtherKey(Stored),
}

/// An open key file whose owner and mode are right.
struct Checked {
    file: File,
    text: Zeroizing<Vec<u8>>,
    device_and_inode: (u64, u64),
}

fn refused(path: &Path, fault: &str) -> KmsError {
    KmsError::new(Failure::Config, format!("key file {} {fault}", path.display()))
}

fn failed(path: &Path, did: &str, error: impl Into<io::Error>) -> KmsError {
    let error = error.into();
    let failure = if error.kind() == io::ErrorKind::PermissionDenied { Failure::Denied } else { Failure::Config };
    KmsError::new(failure, format!("cannot {did} key file {}: {error}", path.display())).with_source(error)
}

fn missing(path: &Path) -> KmsError {
    KmsError::new(
        Failure::Missing,
        format!("key file {} is not there: if a copy of it exists, put it back", path.display()),
    )
}

/// Where a suspended key file waits. Renamed, not rewritten: the key's bytes lie on the disk once.
pub(super) fn suspended_place(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".suspended");
    name.into()
}

fn suspended(path: &Path) -> KmsError {
    KmsError::new(
        Failure::Suspended,
        format!("key file {} is suspended: `lethefs restore` brings it back", path.display()),
    )
}

/// The directory that holds the file. The path is absolute, so there is one.
fn directory(path: &Path) -> PathBuf {
    path.parent().unwrap_or(path).to_owned()
}

fn sync_directory(path: &Path) -> Result<(), KmsError> {
    File::open(directory(path))
        .and_then(|directory| directory.sync_all())
        .map_err(|error| failed(path, "flush the directory of", error))
}

/// Opens and reads the file if nobody but its owner could have. `Ok(None)`: it is not there.
fn open(path: &Path, access: OFlags) -> Result<Option<Checked>, KmsError> {
    // NONBLOCK so that a FIFO in its place does not hang us; a regular file ignores it.
    let flags = access | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let mut file = match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(fd) => File::from(fd),
        Err(Errno::NOENT) => return Ok(None),
        Err(Errno::LOOP) => return Err(refused(path, "is a symlink: name the file itself")),
        Err(Errno::ISDIR | Errno::NXIO) => return Err(refused(path, "is not a regular file")),
        Err(error) => return Err(failed(path, "open", error)),
    };
    let meta = file.metadata().map_err(|error| failed(path, "look at", error))?;
    if !meta.is_file() {
        return Err(refused(path, "is not a regular file"));
    }
    if meta.uid() != 0 && meta.uid() != rustix::process::geteuid().as_raw() {
        return Err(refused(path, "belongs to another user: whoever owns it knows or chose the key"));
    }
    if meta.mode() & 0o077 != 0 {
        return Err(refused(path, "can be read or changed by others: chmod 600 it, and consider the key known"));
    }
    if meta.size() > MAX_SIZE as u64 {
        return Err(refused(path, "is too large to be one"));
    }
    // One buffer that never grows, so that no copy is left behind.
    let mut text = Zeroizing::new(Vec::with_capacity(MAX_SIZE + 64));
    (&mut file).take(MAX_SIZE as u64 + 1).read_to_end(&mut text).map_err(|error| failed(path, "read", error))?;
    if text.len() > MAX_SIZE {
        return Err(refused(path, "is too large to be one"));
    }
    Ok(Some(Checked { file, text, device_and_inode: (meta.dev(), meta.ino()) }))
}

/// Borrowed from a buffer that is wiped. The JSON library's errors may quote it, so they are dropped.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Text<'a> {
    lethefs_key_file: u32,
    key_id: &'a str,
    created: &'a str,
    key: &'a str,
}

fn parse(path: &Path, text: &[u8]) -> Result<Stored, KmsError> {
    let malformed = || refused(path, "is damaged or not a key file: put a good copy back");
    let text: Text<'_> = serde_json::from_slice(text).map_err(|_| malformed())?;
    if text.lethefs_key_file != 1 {
        return Err(refused(path, "has a newer format than this lethefs knows"));
    }
    let key_id = text.key_id.parse().map_err(|_| malformed())?;
    let created = text.created.parse::<jiff::Timestamp>().map(|_| text.created.to_owned()).map_err(|_| malformed())?;
    let key = Key32::fill_with(|bytes| match STANDARD.decode_slice(text.key, bytes) {
        Ok(32) => Ok(()),
        _ => Err(malformed()),
    })?;
    Ok(Stored { key_id, created, key })
}

/// What a [`wipe`] leaves that did not come to unlink the file.
fn is_wiped(text: &[u8]) -> bool {
    !text.is_empty() && text.iter().all(|byte| *byte == 0)
}

/// Reads the key file.
pub(super) fn load(path: &Path) -> Result<Stored, KmsError> {
    match open(path, OFlags::RDONLY)? {
        None if open(&suspended_place(path), OFlags::RDONLY)?.is_some() => Err(suspended(path)),
        None => Err(missing(path)),
        Some(checked) if is_wiped(&checked.text) => Err(KmsError::new(
            Failure::Missing,
            format!("key file {} has been wiped: if a copy of it exists, put it back", path.display()),
        )),
        Some(checked) => parse(path, &checked.text),
    }
}

/// Reads the key file where it lies, suspended or not: to tell what it is, not to use it.
pub(super) fn look(path: &Path) -> Result<(Stored, bool), KmsError> {
    match load(path) {
        Err(error) if error.failure == Failure::Suspended => Ok((load(&suspended_place(path))?, true)),
        loaded => Ok((loaded?, false)),
    }
}

/// Puts the key file aside, if it holds the key with this id. `Ok(Some)`: it holds another, and nothing was done.
pub(super) fn suspend(path: &Path, key_id: &VolumeId) -> Result<Option<Stored>, KmsError> {
    let (stored, aside) = look(path)?;
    if stored.key_id != *key_id {
        return Ok(Some(stored));
    }
    if !aside {
        rename(path, &suspended_place(path), "suspend", path)?;
    }
    Ok(None)
}

/// Puts a suspended key file back. One that is in its place is a success.
pub(super) fn restore(path: &Path) -> Result<(), KmsError> {
    let (_, aside) = look(path)?;
    if aside { rename(&suspended_place(path), path, "restore", path) } else { Ok(()) }
}

fn rename(from: &Path, to: &Path, did: &str, path: &Path) -> Result<(), KmsError> {
    rustix::fs::renameat_with(CWD, from, CWD, to, rustix::fs::RenameFlags::NOREPLACE)
        .map_err(|error| failed(path, did, error))?;
    sync_directory(path)
}

/// Reads the key file, or makes it if there is none.
pub(super) fn load_or_create(path: &Path) -> Result<Stored, KmsError> {
    match open(path, OFlags::RDONLY)? {
        Some(checked) => return parse(path, &checked.text),
        // Not a second key under the name of the first.
        None if open(&suspended_place(path), OFlags::RDONLY)?.is_some() => return Err(suspended(path)),
        None => create(path)?,
    }
    // Whoever came first made it.
    load(path)
}

/// Makes the key file under a temporary name and puts it in place whole, unless another is there by then.
fn create(path: &Path) -> Result<(), KmsError> {
    let no_random = |_| KmsError::new(Failure::Config, "the system's random number generator failed");
    let cannot = |error: io::Error| failed(path, "make", error);
    let key_id = VolumeId::random().map_err(no_random)?;
    let key = Key32::random().map_err(no_random)?;
    let created = jiff::Timestamp::now();
    let mut encoded = Zeroizing::new([0; 44]);
    let length = key
        .expose(|bytes| STANDARD.encode_slice(bytes, &mut *encoded))
        .map_err(|_| cannot(io::Error::other("base64")))?;
    // Made by the `tempfile` crate with O_EXCL and mode 0600, and removed if we fail.
    let mut file = tempfile::Builder::new().prefix("lethefs.tmp.").tempfile_in(directory(path)).map_err(cannot)?;
    write!(file, r#"{{"lethefs_key_file":1,"key_id":"{key_id}","created":"{created}","key":""#).map_err(cannot)?;
    file.write_all(&encoded[..length]).and_then(|()| file.write_all(b"\"}\n")).map_err(cannot)?;
    file.as_file().sync_all().map_err(cannot)?;
    match file.persist_noclobber(path) {
        Ok(_) => {}
        Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
        Err(error) => return Err(cannot(error.error)),
    }
    sync_directory(path)
}

/// Overwrites the key file with zeros and unlinks it, suspended or not, if it holds the key with this id. What was wiped but
/// not unlinked is unlinked.
pub(super) fn wipe(path: &Path, key_id: &VolumeId) -> Result<Wiped, KmsError> {
    let there = wipe_one(path, key_id)?;
    if let Wiped::OtherKey(_) = there {
        return Ok(there);
    }
    let aside = wipe_one(&suspended_place(path), key_id)?;
    Ok(if matches!(there, Wiped::Done) { there } else { aside })
}

fn wipe_one(path: &Path, key_id: &VolumeId) -> Result<Wiped, KmsError> {
    let cannot = |error: io::Error| failed(path, "wipe", error);
    let Some(Checked { mut file, text, device_and_inode }) = open(path, OFlags::RDWR)? else {
        return Ok(Wiped::WasGone);
    };
    if !is_wiped(&text) {
        let stored = parse(path, &text)?;
        if stored.key_id != *key_id {
            return Ok(Wiped::OtherKey(stored));
        }
        file.rewind().map_err(cannot)?;
        file.write_all(&vec![0; text.len()]).map_err(cannot)?;
        file.sync_all().map_err(cannot)?;
    }
    // Not another file that has come to its place meanwhile.
    let there = std::fs::symlink_metadata(path).map_err(cannot)?;
    if (there.dev(), there.ino()) != device_and_inode {
        return Err(refused(path, "was replaced while it was being wiped: look at it and run this again"));
    }
    std::fs::remove_file(path).map_err(cannot)?;
    sync_directory(path)?;
    Ok(Wiped::Done)
}

/// What the system says of a file that is not there, or why that cannot be said.
pub(super) fn absence(path: &Path) -> Result<String, String> {
    let directory = directory(path);
    if !directory.is_dir() {
        return Err(format!("its directory {} is not there either, which shows nothing", directory.display()));
    }
    if std::fs::symlink_metadata(suspended_place(path)).is_ok() {
        return Err("it is suspended, and there".to_owned());
    }
    match std::fs::symlink_metadata(path) {
        Ok(_) => Err("something is there".to_owned()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(error.to_string()),
        Err(error) => Err(error.to_string()),
    }
}

/// Whether a file can be made and removed there.
pub(super) fn may_change_directory(path: &Path) -> bool {
    rustix::fs::accessat(CWD, directory(path), Access::WRITE_OK | Access::EXEC_OK, AtFlags::EACCESS).is_ok()
}
