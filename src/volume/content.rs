//! Blocks of a file (docs/FORMAT.md section 7). Pure: buffers in, buffers out.

use super::format::{BLOCK, SEALED_BLOCK};
use crate::crypto::aead::{Cipher, Unauthentic};
use crate::crypto::{NONCE_LEN, ObjectId, TAG_LEN, VolumeId};

const PREFIX: &[u8] = b"lethefs/1/block";
const AAD_LEN: usize = PREFIX.len() + 16 + 16 + 8;

/// The associated data of one file's blocks, with room for the index.
pub struct BlockAad([u8; AAD_LEN]);

impl BlockAad {
    /// For this file.
    pub fn new(volume: &VolumeId, object: &ObjectId) -> Self {
        let mut aad = [0; AAD_LEN];
        aad[..PREFIX.len()].copy_from_slice(PREFIX);
        aad[PREFIX.len()..PREFIX.len() + 16].copy_from_slice(&volume.0);
        aad[PREFIX.len() + 16..PREFIX.len() + 32].copy_from_slice(&object.0);
        Self(aad)
    }

    fn at(&mut self, index: u64) -> &[u8] {
        self.0[AAD_LEN - 8..].copy_from_slice(&index.to_le_bytes());
        &self.0
    }
}

/// Encrypts `plain` (1 to 4,096 bytes) into `sealed`, which is 28 bytes longer.
pub fn seal_block(
    cipher: &Cipher,
    aad: &mut BlockAad,
    index: u64,
    nonce: &[u8; NONCE_LEN],
    plain: &[u8],
    sealed: &mut [u8],
) {
    let (head, rest) = sealed.split_at_mut(NONCE_LEN);
    let (body, tag) = rest.split_at_mut(plain.len());
    head.copy_from_slice(nonce);
    tag.copy_from_slice(&cipher.seal_into(nonce, aad.at(index), plain, body));
}

/// Decrypts a block of more than 28 bytes into `plain`, which is 28 bytes shorter.
///
/// # Errors
/// [`Unauthentic`]; `plain` is then zeros.
pub fn open_block(
    cipher: &Cipher,
    aad: &mut BlockAad,
    index: u64,
    sealed: &[u8],
    plain: &mut [u8],
) -> Result<(), Unauthentic> {
    let opened = sealed
        .split_first_chunk::<NONCE_LEN>()
        .and_then(|(nonce, rest)| rest.split_last_chunk::<TAG_LEN>().map(|(body, tag)| (nonce, body, tag)))
        .ok_or(Unauthentic)
        .and_then(|(nonce, body, tag)| cipher.open_into(nonce, aad.at(index), body, tag, plain));
    if opened.is_err() {
        plain.fill(0);
    }
    opened
}

/// Whether a stored block is a hole or was never written.
pub fn is_zero(sealed: &[u8]) -> bool {
    sealed.iter().all(|byte| *byte == 0)
}

/// The blocks that a range of plaintext touches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockRange {
    /// First block.
    pub first: u64,
    /// One past the last.
    pub end: u64,
}

impl BlockRange {
    /// Blocks that hold bytes `offset..offset + len`.
    pub fn covering(offset: u64, len: u64) -> Self {
        Self { first: offset / BLOCK, end: (offset + len).div_ceil(BLOCK) }
    }

    /// Plaintext offset of the first block.
    pub fn start(self) -> u64 {
        self.first * BLOCK
    }

    /// Bytes on disk if all blocks were full.
    pub fn sealed_len(self) -> usize {
        ((self.end - self.first) * SEALED_BLOCK) as usize
    }
}
