//! Directory headers: `lethefs.dir`, a symlink whose target is the static header (docs/FORMAT.md section 5).

use std::os::fd::{BorrowedFd, OwnedFd};

use super::format::{DIR_HEADER, b64, un_b64};
use super::header::{ObjectType, STATIC_LEN, Static};
use super::names::{self, CipherName};
use super::storage::{self, Errno, RenameFlags};
use super::{Damage, VolumeError, format, header};
use crate::crypto::ObjectId;
use crate::keyring::{Dek, Keyring};

/// The key claim of a directory: what names in it are encrypted with.
#[derive(Clone)]
pub struct DirKeys(Static);

impl DirKeys {
    /// Keys for a new directory.
    ///
    /// # Errors
    /// The ring's.
    pub fn make(keys: &Keyring, id: ObjectId) -> Result<Self, VolumeError> {
        Ok(Self(Static::make(keys, id, ObjectType::Directory, 0)?))
    }

    /// The same keys, wrapped under the KEK that is current now.
    ///
    /// # Errors
    /// The ring's.
    pub fn rewrap(&self, keys: &Keyring) -> Result<Self, VolumeError> {
        Ok(Self(self.0.rewrap(keys)?))
    }

    /// Reads and authenticates the header of an open directory.
    ///
    /// # Errors
    /// [`Damage::Header`], also where there is none; the ring's; the backing filesystem's.
    pub fn load(dir: BorrowedFd<'_>, keys: &Keyring) -> Result<Self, VolumeError> {
        const DAMAGED: VolumeError = VolumeError::Damaged(Damage::Header);
        let text = match storage::readlink(dir, DIR_HEADER) {
            // Not there, or no symlink.
            Err(Errno::NOENT | Errno::INVAL) => return Err(DAMAGED),
            other => other?,
        };
        Self::parse(&text, keys)
    }

    /// Authenticates a header that is the target of a `lethefs.dir`.
    ///
    /// # Errors
    /// As [`load`](Self::load), but the backing filesystem's.
    pub fn parse(text: &[u8], keys: &Keyring) -> Result<Self, VolumeError> {
        const DAMAGED: VolumeError = VolumeError::Damaged(Damage::Header);
        let bytes: [u8; STATIC_LEN] = un_b64(text).and_then(|bytes| bytes.try_into().ok()).ok_or(DAMAGED)?;
        Ok(Self(Static::open_as(keys, &bytes, ObjectType::Directory)?))
    }

    /// The object that the header of an open directory claims to be of: not authenticated, good only for a guess.
    pub fn claimed_id(dir: BorrowedFd<'_>) -> Option<ObjectId> {
        let bytes = un_b64(&storage::readlink(dir, DIR_HEADER).ok()?)?;
        header::claimed_id(bytes.first_chunk()?)
    }

    /// The directory's object.
    pub fn id(&self) -> ObjectId {
        self.0.dek.object()
    }

    /// Its DEK.
    pub fn dek(&self) -> &Dek {
        &self.0.dek
    }

    /// The target of `lethefs.dir`.
    pub fn header_text(&self) -> String {
        b64(&self.0.bytes())
    }

    /// Encrypts a name of this directory.
    ///
    /// # Errors
    /// [`names::check`]'s, or the ring's.
    pub fn name(&self, keys: &Keyring, name: &[u8]) -> Result<CipherName, VolumeError> {
        names::encrypt(keys, &self.0.dek, name)
    }

    /// Decrypts the name of an entry of this directory, open as `dir`.
    ///
    /// # Errors
    /// [`Damage::Name`], or the ring's.
    pub fn plain_name(&self, keys: &Keyring, dir: BorrowedFd<'_>, name: &[u8]) -> Result<Vec<u8>, VolumeError> {
        names::decrypt(keys, &self.0.dek, name, |sidecar| storage::readlink(dir, sidecar).ok())
    }
}

/// Makes a directory with its header under a temporary name in `parent`; `finish` sets owner and mode on it.
/// Returns the temporary name, ready to be renamed.
///
/// # Errors
/// As the steps; what was made is removed again.
pub fn build(
    parent: BorrowedFd<'_>,
    keys: &DirKeys,
    mode: u32,
    finish: impl FnOnce(BorrowedFd<'_>) -> Result<(), Errno>,
) -> Result<(String, OwnedFd), VolumeError> {
    let temporary = format::temporary_name().map_err(|_| Errno::IO)?;
    // Owner rights for the time of making; the real mode comes last.
    storage::mkdir(parent, &*temporary, mode | 0o700)?;
    let made = storage::open_dir(parent, &*temporary).and_then(|fd| {
        storage::symlink(storage::fd(&fd), DIR_HEADER, keys.header_text().as_bytes())?;
        finish(storage::fd(&fd))?;
        Ok(fd)
    });
    made.map(|fd| (temporary.clone(), fd)).map_err(|errno| {
        discard(parent, &temporary);
        errno.into()
    })
}

/// Removes a directory that holds nothing but its header, whatever becomes of the header. Best effort: what stays has a
/// temporary name.
pub fn discard(parent: BorrowedFd<'_>, temporary: &str) {
    if let Ok(fd) = storage::open_dir(parent, temporary) {
        // The owner may have taken his own right to write away.
        if storage::unlink(storage::fd(&fd), DIR_HEADER) == Err(Errno::ACCESS) {
            let _ = storage::chmod_fd(storage::fd(&fd), 0o700);
            let _ = storage::unlink(storage::fd(&fd), DIR_HEADER);
        }
    }
    if storage::rmdir(parent, temporary) == Err(Errno::NOTEMPTY) {
        // Leftovers of interrupted operations inside.
        if let Ok(fd) = storage::open_dir(parent, temporary) {
            clean(storage::fd(&fd));
        }
        let _ = storage::rmdir(parent, temporary);
    }
}

/// Whether an open directory holds no entries, ours aside.
///
/// # Errors
/// The backing filesystem's.
pub fn is_empty(dir: BorrowedFd<'_>) -> Result<bool, Errno> {
    let mut empty = true;
    storage::read_dir(dir, 0, |entry| {
        empty &= !names::is_entry(entry.name);
        empty
    })?;
    Ok(empty)
}

/// Removes what interrupted operations left in an open directory: objects under temporary names, and sidecars of long
/// names without an entry.
pub fn clean(dir: BorrowedFd<'_>) {
    let mut leftovers = Vec::new();
    let mut sidecars = Vec::new();
    let _ = storage::read_dir(dir, 0, |entry| {
        if let Ok(name) = std::str::from_utf8(entry.name) {
            if name.starts_with(format::TEMPORARY_PREFIX) {
                leftovers.push(name.to_owned());
            } else if let Some(hash) = name.strip_prefix(format::LONG_NAME_PREFIX) {
                sidecars.push(hash.to_owned());
            }
        }
        true
    });
    for name in leftovers {
        if let Err(Errno::ISDIR | Errno::PERM) = storage::unlink(dir, &*name) {
            clean_directory(dir, &name);
        }
    }
    for hash in sidecars {
        let entry = format!("{}{hash}", format::LONG_PREFIX);
        if storage::stat(dir, &*entry).is_err_and(|errno| errno == Errno::NOENT) {
            let _ = storage::unlink(dir, format!("{}{hash}", format::LONG_NAME_PREFIX));
        }
    }
}

/// Only an *empty* temporary directory is ours to remove: anything in it would be somebody's data.
fn clean_directory(dir: BorrowedFd<'_>, name: &str) {
    if storage::open_dir(dir, name).is_ok_and(|fd| is_empty(storage::fd(&fd)).unwrap_or(false)) {
        discard(dir, name);
    }
}

/// Puts a new entry of type "not a directory" in place: the sidecar of a long name first, then `place`.
///
/// # Errors
/// `place`'s or the sidecar's; a sidecar made for nothing is removed.
pub fn place<T>(dir: BorrowedFd<'_>, name: &CipherName, place: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
    let Some((sidecar, full)) = name.sidecar() else { return place() };
    let existed = match storage::symlink(dir, &*sidecar, full.as_bytes()) {
        Ok(()) => false,
        Err(Errno::EXIST) => true,
        Err(errno) => return Err(errno),
    };
    place().inspect_err(|_| {
        if !existed {
            let _ = storage::unlink(dir, &*sidecar);
        }
    })
}

/// After an entry is gone: its sidecar.
pub fn unplace(dir: BorrowedFd<'_>, name: &CipherName) {
    if let Some((sidecar, _)) = name.sidecar() {
        let _ = storage::unlink(dir, &*sidecar);
    }
}

/// Removes an empty directory atomically: away under a temporary name, then in peace.
///
/// # Errors
/// [`Errno::NOTEMPTY`], or the backing filesystem's.
pub fn remove(parent: BorrowedFd<'_>, name: &str) -> Result<(), Errno> {
    let fd = match storage::open_dir(parent, name) {
        Err(Errno::LOOP) => return Err(Errno::NOTDIR),
        other => other?,
    };
    if !is_empty(storage::fd(&fd))? {
        return Err(Errno::NOTEMPTY);
    }
    let temporary = format::temporary_name().map_err(|_| Errno::IO)?;
    storage::rename(parent, name, parent, &*temporary, RenameFlags::empty())?;
    discard(parent, &temporary);
    Ok(())
}
