//! Extended attributes (docs/FORMAT.md section 9): encrypted names and values in the backing object's `user.` namespace.

use std::ffi::OsStr;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt as _;

use super::format::{b64, un_b64};
use super::storage::{self, Errno};
use super::{Damage, Volume, VolumeError};
use crate::crypto::kdf::DekLabel;
use crate::crypto::{NONCE_LEN, ObjectId, random};
use crate::keyring::Dek;

const PREFIX: &str = "user.lethefs.";
/// Longest attribute name on Linux (`XATTR_NAME_MAX`).
const BACKING_NAME_MAX: usize = 255;
/// Names are deterministic, so that one can be looked up.
const NAME_NONCE: [u8; NONCE_LEN] = [0; NONCE_LEN];

const DAMAGED: VolumeError = VolumeError::Damaged(Damage::Attribute);

fn backing_name(volume: &Volume, dek: &Dek, name: &[u8]) -> Result<String, VolumeError> {
    let aad = name_aad(dek.object());
    let sealed = volume.keys().with_keys(dek, |keys| keys.cipher(DekLabel::Xattr).seal(&NAME_NONCE, &aad, name))?;
    let backing = format!("{PREFIX}{}", b64(&sealed));
    if backing.len() > BACKING_NAME_MAX { Err(VolumeError::AttributeTooLarge) } else { Ok(backing) }
}

/// Sets an attribute of what `held` holds. `flags` as in setxattr(2).
///
/// # Errors
/// [`VolumeError::AttributeTooLarge`] for a name over 165 bytes, the ring's, the backing filesystem's.
pub fn set(
    volume: &Volume,
    held: BorrowedFd<'_>,
    dek: &Dek,
    name: &OsStr,
    value: &[u8],
    flags: i32,
) -> Result<(), VolumeError> {
    let backing = backing_name(volume, dek, name.as_bytes())?;
    let nonce = random::nonce().map_err(|_| Errno::IO)?;
    let aad = value_aad(dek.object(), name.as_bytes());
    let sealed = volume.keys().with_keys(dek, |keys| keys.cipher(DekLabel::Xattr).seal(&nonce, &aad, value))?;
    let stored = [nonce.as_slice(), &sealed].concat();
    Ok(storage::set_xattr(held, OsStr::new(&backing), &stored, flags)?)
}

/// An attribute's value.
///
/// # Errors
/// [`Errno::NODATA`], [`Damage::Attribute`], the ring's.
pub fn get(volume: &Volume, held: BorrowedFd<'_>, dek: &Dek, name: &OsStr) -> Result<Vec<u8>, VolumeError> {
    let backing = match backing_name(volume, dek, name.as_bytes()) {
        // What could not be set is not there.
        Err(VolumeError::AttributeTooLarge) => return Err(Errno::NODATA.into()),
        other => other?,
    };
    let stored = storage::get_xattr(held, OsStr::new(&backing))?;
    let Some((nonce, sealed)) = stored.split_first_chunk::<NONCE_LEN>() else { return Err(DAMAGED) };
    let aad = value_aad(dek.object(), name.as_bytes());
    let value = volume
        .keys()
        .with_keys(dek, |keys| keys.cipher(DekLabel::Xattr).open(nonce, &aad, sealed))?
        .map_err(|_| DAMAGED)?;
    Ok(value.to_vec())
}

/// Removes an attribute.
///
/// # Errors
/// [`Errno::NODATA`], the ring's, the backing filesystem's.
pub fn remove(volume: &Volume, held: BorrowedFd<'_>, dek: &Dek, name: &OsStr) -> Result<(), VolumeError> {
    let backing = match backing_name(volume, dek, name.as_bytes()) {
        Err(VolumeError::AttributeTooLarge) => return Err(Errno::NODATA.into()),
        other => other?,
    };
    Ok(storage::remove_xattr(held, OsStr::new(&backing))?)
}

/// The names of all attributes of ours that open. The others are left out, and `damaged` is called for each.
///
/// # Errors
/// The ring's, the backing filesystem's.
pub fn list(
    volume: &Volume,
    held: BorrowedFd<'_>,
    dek: &Dek,
    mut damaged: impl FnMut(Damage),
) -> Result<Vec<Vec<u8>>, VolumeError> {
    let aad = name_aad(dek.object());
    let mut names = Vec::new();
    for backing in storage::list_xattr(held)? {
        let Some(text) = backing.strip_prefix(PREFIX.as_bytes()) else { continue };
        let opened = match un_b64(text) {
            None => None,
            Some(sealed) => {
                volume.keys().with_keys(dek, |keys| keys.cipher(DekLabel::Xattr).open(&NAME_NONCE, &aad, &sealed))?.ok()
            }
        };
        match opened {
            Some(name) => names.push(name.to_vec()),
            None => damaged(Damage::Attribute),
        }
    }
    Ok(names)
}

/// The backing names of those attributes of ours of which the name or the value does not open.
///
/// # Errors
/// The ring's, the backing filesystem's.
pub fn damaged(volume: &Volume, held: BorrowedFd<'_>, dek: &Dek) -> Result<Vec<Vec<u8>>, VolumeError> {
    let aad = name_aad(dek.object());
    let mut damaged = Vec::new();
    for backing in storage::list_xattr(held)? {
        let Some(text) = backing.strip_prefix(PREFIX.as_bytes()) else { continue };
        let name = match un_b64(text) {
            None => None,
            Some(sealed) => {
                volume.keys().with_keys(dek, |keys| keys.cipher(DekLabel::Xattr).open(&NAME_NONCE, &aad, &sealed))?.ok()
            }
        };
        let opens = match name {
            None => false,
            Some(name) => match get(volume, held, dek, OsStr::from_bytes(&name)) {
                // Removed meanwhile.
                Ok(_) | Err(VolumeError::Backing(Errno::NODATA)) => true,
                Err(VolumeError::Damaged(_)) => false,
                Err(error) => return Err(error),
            },
        };
        if !opens {
            damaged.push(backing);
        }
    }
    Ok(damaged)
}

/// Removes every attribute of ours, readable or not.
///
/// # Errors
/// The backing filesystem's.
pub fn remove_all(held: BorrowedFd<'_>) -> Result<(), Errno> {
    for name in storage::list_xattr(held)? {
        if name.starts_with(PREFIX.as_bytes()) {
            storage::remove_xattr(held, OsStr::from_bytes(&name))?;
        }
    }
    Ok(())
}

fn name_aad(object: ObjectId) -> Vec<u8> {
    [b"lethefs/1/xattr-name".as_slice(), &object.0].concat()
}

fn value_aad(object: ObjectId, name: &[u8]) -> Vec<u8> {
    [b"lethefs/1/xattr-value".as_slice(), &object.0, name].concat()
}
