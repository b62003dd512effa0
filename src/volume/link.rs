//! Symlinks (docs/FORMAT.md section 8): target and header in the target of a backing symlink, long ones in pieces.

use std::os::fd::BorrowedFd;

use super::format::{LINK_PIECE, OVERFLOW_DIR, TARGET_MAX, b64, un_b64};
use super::header::{ObjectType, STATIC_LEN, Static};
use super::storage::{self, Errno};
use super::{Damage, Volume, VolumeError};
use crate::crypto::kdf::DekLabel;
use crate::crypto::{NONCE_LEN, ObjectId, TAG_LEN, random};

/// Header, nonce and tag: what a backing target holds beside the plaintext.
const OVERHEAD: usize = STATIC_LEN + NONCE_LEN + TAG_LEN;

/// A header, a target of 4,095 bytes and the tag are 5,668 characters: the first piece and five more.
const MAX_TAIL: u32 = 5;

const DAMAGED: VolumeError = VolumeError::Damaged(Damage::Link);

/// A symlink ready to be made.
pub struct SealedLink {
    id: ObjectId,
    pieces: Vec<Vec<u8>>,
}

impl SealedLink {
    /// Encrypts a target under a new object.
    ///
    /// # Errors
    /// [`VolumeError::NameTooLong`], [`VolumeError::InvalidName`] for an empty one, or the ring's.
    pub fn new(volume: &Volume, target: &[u8]) -> Result<Self, VolumeError> {
        if target.len() > TARGET_MAX {
            return Err(VolumeError::NameTooLong);
        }
        if target.is_empty() || target.contains(&0) {
            return Err(VolumeError::InvalidName);
        }
        let id = ObjectId::random().map_err(|_| Errno::IO)?;
        let header = Static::make(volume.keys(), id, ObjectType::Symlink, 0)?;
        let nonce = random::nonce().map_err(|_| Errno::IO)?;
        let aad = aad(volume, id);
        let sealed =
            volume.keys().with_keys(&header.dek, |keys| keys.cipher(DekLabel::Content).seal(&nonce, &aad, target))?;
        let mut payload = header.bytes().to_vec();
        payload.extend(nonce);
        payload.extend(sealed);
        let mut text = b64(&payload).into_bytes();
        if text.len() >= LINK_PIECE {
            text.push(b'.');
        }
        Ok(Self { id, pieces: text.chunks(LINK_PIECE).map(<[u8]>::to_vec).collect() })
    }

    /// Makes the backing symlink. The tail of a long target comes first.
    ///
    /// # Errors
    /// The backing filesystem's; the tail is then removed again.
    pub fn create(&self, root: BorrowedFd<'_>, dir: BorrowedFd<'_>, name: &str) -> Result<(), Errno> {
        let Some((first, tail)) = self.pieces.split_first() else { return Err(Errno::INVAL) };
        let tailed = if tail.is_empty() { Ok(()) } else { make_tail(root, self.id, tail) };
        let made = tailed.and_then(|()| storage::symlink(dir, name, first));
        if made.is_err() && !tail.is_empty() {
            remove_tail(root, self.id);
        }
        made
    }
}

fn make_tail(root: BorrowedFd<'_>, id: ObjectId, tail: &[Vec<u8>]) -> Result<(), Errno> {
    match storage::mkdir(root, OVERFLOW_DIR, 0o700) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(errno) => return Err(errno),
    }
    let overflow = storage::open_dir(root, OVERFLOW_DIR)?;
    for (piece, n) in tail.iter().zip(1..) {
        storage::symlink(storage::fd(&overflow), format!("{id}.{n}"), piece)?;
    }
    // It lies in another directory than the symlink, which somebody may flush alone; and not every filesystem keeps the order
    // between two directories. Targets that long are rare.
    storage::sync_fd(storage::fd(&overflow))
}

/// Removes the tail of a long target after the last name in `dir` that led to it. Best effort.
pub fn drop_tail(root: BorrowedFd<'_>, dir: BorrowedFd<'_>, id: ObjectId) {
    // As above, the other way round: a tail that stays too long does no harm.
    if storage::sync_fd(dir).is_ok() {
        remove_tail(root, id);
    }
}

fn remove_tail(root: BorrowedFd<'_>, id: ObjectId) {
    let Ok(overflow) = storage::open_dir(root, OVERFLOW_DIR) else { return };
    for n in 1..=MAX_TAIL {
        let _ = storage::unlink(storage::fd(&overflow), format!("{id}.{n}"));
    }
}

/// Whether a backing target has a tail.
pub fn has_tail(first: &[u8]) -> bool {
    first.len() == LINK_PIECE
}

/// The object of a symlink, for its tail, if its header is genuine.
pub fn object(volume: &Volume, first: &[u8]) -> Option<ObjectId> {
    // 171 characters hold the header; 172 decode on their own.
    let bytes = un_b64(first.get(..172)?)?;
    Some(Static::open_as(volume.keys(), bytes.first_chunk()?, ObjectType::Symlink).ok()?.dek.object())
}

fn whole(root: BorrowedFd<'_>, volume: &Volume, mut text: Vec<u8>) -> Result<Vec<u8>, VolumeError> {
    if !has_tail(&text) {
        return Ok(text);
    }
    let id = object(volume, &text).ok_or(DAMAGED)?;
    let overflow = storage::open_dir(root, OVERFLOW_DIR).map_err(|_| DAMAGED)?;
    for n in 1..=MAX_TAIL {
        let piece = storage::readlink(storage::fd(&overflow), format!("{id}.{n}")).map_err(|_| DAMAGED)?;
        text.extend(&piece);
        if text.pop_if(|byte| *byte == b'.').is_some() {
            return Ok(text);
        }
        if piece.len() != LINK_PIECE {
            break;
        }
    }
    Err(DAMAGED)
}

/// The length of the plaintext target, as `lstat` reports it, without the keys.
///
/// # Errors
/// [`Damage::Link`] for a tail that is not there.
pub fn target_len(
    volume: &Volume,
    backing_len: u64,
    read: impl FnOnce() -> Result<Vec<u8>, Errno>,
) -> Result<u64, VolumeError> {
    let chars = if backing_len == LINK_PIECE as u64 {
        whole(storage::fd(volume.root()), volume, read()?)?.len() as u64
    } else {
        backing_len
    };
    Ok(plain_len(chars))
}

/// Length of the plaintext in this many characters.
pub fn plain_len(chars: u64) -> u64 {
    (chars * 3 / 4).saturating_sub(OVERHEAD as u64)
}

/// Decrypts a target from the backing symlink's own.
///
/// # Errors
/// [`Damage::Link`], or the ring's.
pub fn open(volume: &Volume, first: Vec<u8>) -> Result<Vec<u8>, VolumeError> {
    let payload = un_b64(&whole(storage::fd(volume.root()), volume, first)?).ok_or(DAMAGED)?;
    let Some((header, rest)) = payload.split_first_chunk::<STATIC_LEN>() else { return Err(DAMAGED) };
    let Some((nonce, sealed)) = rest.split_first_chunk::<NONCE_LEN>() else { return Err(DAMAGED) };
    let header = Static::open_as(volume.keys(), header, ObjectType::Symlink)?;
    let aad = aad(volume, header.dek.object());
    let target = volume
        .keys()
        .with_keys(&header.dek, |keys| keys.cipher(DekLabel::Content).open(nonce, &aad, sealed))?
        .map_err(|_| DAMAGED)?;
    Ok(target.to_vec())
}

fn aad(volume: &Volume, id: ObjectId) -> Vec<u8> {
    [b"lethefs/1/symlink".as_slice(), &volume.id().0, &id.0].concat()
}
