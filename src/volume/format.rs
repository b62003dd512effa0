//! Constants and arithmetic of format 1 (docs/FORMAT.md). Pure.

use std::io;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

/// The format this program reads and writes.
pub const FORMAT: u32 = 1;
/// The volume file.
pub const VOLUME_FILE: &str = "lethefs.volume";
/// Its second copy.
pub const VOLUME_FILE_COPY: &str = "lethefs.volume.bak";
/// A directory's header.
pub const DIR_HEADER: &str = "lethefs.dir";
/// Tails of long symlink targets, in the root.
pub const OVERFLOW_DIR: &str = "lethefs.overflow";
/// The journal of an erase.
pub const ERASE_FILE: &str = "lethefs.erase";
/// What `fsck --repair` took out of the tree, in the root.
pub const QUARANTINE: &str = "lethefs.quarantine";
/// Attribute of a regular file that was not sealed yet: its first header once more. Unlike contents it is journalled with
/// the file's making, so that a power cut does not leave a file without a key.
pub const BIRTH: &str = "user.lethefs-birth";
/// What all names of ours begin with.
pub const OWN_PREFIX: &str = "lethefs.";
/// An entry whose encrypted name is too long.
pub const LONG_PREFIX: &str = "lethefs.long.";
/// The sidecar with that name.
pub const LONG_NAME_PREFIX: &str = "lethefs.name.";
/// Objects under construction or on their way out.
pub const TEMPORARY_PREFIX: &str = "lethefs.tmp.";

/// Plaintext bytes of a full block.
pub const BLOCK: u64 = 4096;
/// Nonce and tag of a block.
pub const BLOCK_OVERHEAD: u64 = 28;
/// Bytes of a full block on disk.
pub const SEALED_BLOCK: u64 = BLOCK + BLOCK_OVERHEAD;
/// Bytes of a regular file's header.
pub const HEADER: u64 = 512;
/// Bytes of a node record.
pub const NODE_RECORD: u64 = 128;
/// Longest name, as in Linux (`NAME_MAX`).
pub const NAME_MAX: usize = 255;
/// Longest symlink target, as in Linux (`PATH_MAX` less its NUL).
pub const TARGET_MAX: usize = 4095;
/// Characters of a full piece of a symlink: below what XFS allows (1,024).
pub const LINK_PIECE: usize = 1020;
/// Largest plaintext size: Linux's own limit for a file (`MAX_LFS_FILESIZE`) less what the blocks add.
pub const MAX_SIZE: u64 = (i64::MAX as u64 / SEALED_BLOCK - 1) * BLOCK;

/// Plaintext size of a regular file from its backing length. `None`: too short to be one.
pub fn plain_size(backing_len: u64) -> Option<u64> {
    let body = backing_len.checked_sub(HEADER)?;
    Some(body / SEALED_BLOCK * BLOCK + (body % SEALED_BLOCK).saturating_sub(BLOCK_OVERHEAD))
}

/// Backing length of a regular file with this plaintext size, at most [`MAX_SIZE`].
pub fn backing_len(plain_size: u64) -> u64 {
    let rest = plain_size % BLOCK;
    HEADER + plain_size / BLOCK * SEALED_BLOCK + if rest == 0 { 0 } else { rest + BLOCK_OVERHEAD }
}

/// Where block `index` begins in the backing file.
pub fn block_offset(index: u64) -> u64 {
    HEADER + index * SEALED_BLOCK
}

/// base64url without padding.
pub fn b64(bytes: &[u8]) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

/// The reverse, strictly.
pub fn un_b64(text: &[u8]) -> Option<Vec<u8>> {
    URL_SAFE_NO_PAD.decode(text).ok()
}

/// A fresh temporary name.
///
/// # Errors
/// The random number generator's.
pub fn temporary_name() -> io::Result<String> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(io::Error::other)?;
    Ok(format!("{TEMPORARY_PREFIX}{}", b64(&bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worked_totals_of_the_document() {
        for (plain, backing) in [(0, 512), (1, 541), (3556, 4096), (4096, 4636), (5000, 5568), (1 << 20, 1_056_256)] {
            assert_eq!(backing_len(plain), backing);
            assert_eq!(plain_size(backing), Some(plain));
        }
        assert_eq!(plain_size(511), None);
        // A block of which less than nonce and tag is there holds nothing.
        for len in 4636..=4636 + 28 {
            assert_eq!(plain_size(len), Some(4096));
        }
        assert!(backing_len(MAX_SIZE) <= i64::MAX as u64);
    }

    proptest::proptest! {
        #[test]
        fn sizes_round_trip(size in 0..MAX_SIZE) {
            proptest::prop_assert_eq!(plain_size(backing_len(size)), Some(size));
        }
    }
}
