//! Records of the intent log: bytes in, claims out (docs/FORMAT.md section 12). No files here.

use crate::crypto::aead::Cipher;
use crate::crypto::{NONCE_LEN, ObjectId, TAG_LEN};
use crate::volume::header::MUTABLE_LEN;

/// Records begin at multiples of this: so that one can be found behind one that is damaged.
pub(super) const ALIGN: usize = 512;
/// What a record begins with.
pub(super) const MAGIC: &[u8; 8] = b"LETHEREC";
/// Bytes before the payload.
pub(super) const HEAD: usize = 176;
const META_AT: usize = 48;
const META: usize = 96;
/// From here on everything is associated data: the clear part of the head, then the payload.
const CLEAR_AT: usize = META_AT + META;

/// What a record does to its file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Sealed blocks from index `first` on, all full but perhaps the last.
    Blocks {
        /// Index of the first.
        first: u64,
        /// Their bytes on disk.
        sealed: Vec<u8>,
    },
    /// Both copies of a mutable header.
    Header([u8; 2 * MUTABLE_LEN]),
    /// A smaller size; where that cuts a block, its sealed bytes.
    Cut {
        /// Plaintext size.
        size: u64,
        /// The last block, or nothing.
        tail: Vec<u8>,
    },
    /// At least this plaintext size.
    Grow {
        /// Plaintext size.
        size: u64,
    },
    /// What earlier records say is in the file itself: those up to this one are void.
    Settled {
        /// The last of them.
        until: u64,
    },
}

/// Which file, in which state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Subject {
    /// The object.
    pub object: ObjectId,
    /// Backing inode number.
    pub ino: u64,
    /// When the backing file was made (`storage::born`): a number may be given out again. 0: not known.
    pub born: u64,
    /// The volume's backing root (`storage::identity`): tells a volume that was moved to another place.
    pub root: u64,
    /// Counter of a header that is known to be on the medium.
    pub low: u64,
    /// Counter of the header that the file was opened for changes with (`Mutable::opened`).
    pub opened: u64,
}

/// An authentic record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Rises with each record, over all of a volume's life.
    pub sequence: u64,
    /// Which filling of a log file it belongs to.
    pub generation: u64,
    /// Highest sequence that was known to be on the medium when this was written.
    pub flushed: u64,
    /// The file.
    pub subject: Subject,
    /// What happened to it.
    pub change: Change,
}

impl Change {
    fn parts(&self) -> (u8, u64, &[u8]) {
        match self {
            Self::Blocks { first, sealed } => (1, *first, sealed),
            Self::Header(bytes) => (2, 0, bytes),
            Self::Cut { size, tail } => (3, *size, tail),
            Self::Grow { size } => (4, *size, &[]),
            Self::Settled { until } => (5, *until, &[]),
        }
    }

    fn from_parts(kind: u8, number: u64, payload: &[u8]) -> Option<Self> {
        Some(match kind {
            1 => Self::Blocks { first: number, sealed: payload.to_vec() },
            2 => Self::Header(payload.try_into().ok()?),
            3 => Self::Cut { size: number, tail: payload.to_vec() },
            4 => Self::Grow { size: number },
            5 => Self::Settled { until: number },
            _ => return None,
        })
    }
}

/// Largest payload: a request of 1 MiB that touches one block more than it fills, and a bit.
const PAYLOAD_MAX: usize = 260 * crate::volume::format::SEALED_BLOCK as usize;

/// Bytes that had to be looked at to find that this is no record.
pub(super) fn claimed_len(bytes: &[u8]) -> usize {
    match bytes.get(..8) {
        Some(magic) if magic == MAGIC => {
            let len =
                bytes.get(CLEAR_AT..).and_then(|clear| clear.first_chunk()).map_or(0, |len| u32::from_le_bytes(*len));
            (len as usize).min(PAYLOAD_MAX)
        }
        _ => 0,
    }
}

/// Bytes that a record with this payload takes.
pub(super) fn len(payload: usize) -> usize {
    (HEAD + payload).next_multiple_of(ALIGN)
}

/// Appends the record to `out`.
pub(super) fn encode(
    cipher: &Cipher,
    nonce: &[u8; NONCE_LEN],
    (sequence, generation, flushed): (u64, u64, u64),
    subject: &Subject,
    change: &Change,
    out: &mut Vec<u8>,
) {
    let (kind, number, payload) = change.parts();
    let at = out.len();
    out.resize(at + HEAD, 0);
    out.extend_from_slice(payload);
    let record = &mut out[at..];
    record[..8].copy_from_slice(MAGIC);
    record[8..8 + NONCE_LEN].copy_from_slice(nonce);
    let clear = &mut record[CLEAR_AT..];
    clear[..4].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    clear[8..16].copy_from_slice(&generation.to_le_bytes());
    clear[16..24].copy_from_slice(&sequence.to_le_bytes());
    clear[24..32].copy_from_slice(&flushed.to_le_bytes());
    let mut meta = [0; META];
    meta[..16].copy_from_slice(&subject.object.0);
    for (n, word) in [subject.ino, subject.root, subject.low, subject.opened, number].iter().enumerate() {
        meta[16 + 8 * n..24 + 8 * n].copy_from_slice(&word.to_le_bytes());
    }
    meta[56] = kind;
    meta[64..72].copy_from_slice(&subject.born.to_le_bytes());
    let (head, clear) = record.split_at_mut(CLEAR_AT);
    let tag = cipher.seal_into(nonce, clear, &meta, &mut head[META_AT..]);
    head[32..32 + TAG_LEN].copy_from_slice(&tag);
    out.resize(at + len(payload.len()), 0);
}

/// The record at the head of `bytes`, if there is an authentic one, and its length.
pub(super) fn decode(cipher: &Cipher, bytes: &[u8]) -> Option<(Record, usize)> {
    if bytes.get(..8)? != MAGIC || bytes.len() < HEAD {
        return None;
    }
    let payload_len = u32::from_le_bytes(*bytes[CLEAR_AT..].first_chunk()?) as usize;
    if payload_len > PAYLOAD_MAX {
        return None;
    }
    let clear = bytes.get(CLEAR_AT..HEAD.checked_add(payload_len)?)?;
    let nonce = bytes[8..].first_chunk()?;
    let tag = bytes[32..].first_chunk()?;
    let mut meta = [0; META];
    cipher.open_into(nonce, clear, &bytes[META_AT..CLEAR_AT], tag, &mut meta).ok()?;
    let word = |bytes: &[u8], at: usize| bytes[at..].first_chunk().map_or(0, |word| u64::from_le_bytes(*word));
    let record = Record {
        generation: word(clear, 8),
        sequence: word(clear, 16),
        flushed: word(clear, 24),
        subject: Subject {
            object: ObjectId(*meta.first_chunk()?),
            ino: word(&meta, 16),
            born: word(&meta, 64),
            root: word(&meta, 24),
            low: word(&meta, 32),
            opened: word(&meta, 40),
        },
        change: Change::from_parts(meta[56], word(&meta, 48), &clear[HEAD - CLEAR_AT..])?,
    };
    Some((record, len(payload_len)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subject() -> Subject {
        Subject { object: ObjectId([7; 16]), ino: 11, born: 15, root: 12, low: 13, opened: 14 }
    }

    #[test]
    fn every_kind_round_trips_and_every_bit_counts() {
        let cipher = Cipher::new(&[3; 32]);
        let changes = [
            Change::Blocks { first: 9, sealed: vec![5; 4124 + 40] },
            Change::Header([6; 128]),
            Change::Cut { size: 10_000, tail: vec![1; 1836] },
            Change::Cut { size: 0, tail: Vec::new() },
            Change::Grow { size: 7 },
            Change::Settled { until: 19 },
        ];
        let mut bytes = Vec::new();
        for change in &changes {
            encode(&cipher, &[1; 12], (20, 21, 22), &subject(), change, &mut bytes);
            assert_eq!(bytes.len() % ALIGN, 0);
        }
        let mut at = 0;
        for change in &changes {
            let (record, len) = decode(&cipher, &bytes[at..]).unwrap();
            let expected =
                Record { sequence: 20, generation: 21, flushed: 22, subject: subject(), change: change.clone() };
            assert_eq!(record, expected);
            at += len;
        }
        assert_eq!(at, bytes.len());
        let used = HEAD + 4164;
        for bit in (0..used * 8).step_by(7) {
            let byte = bit / 8;
            // Reserved and without meaning.
            if (20..32).contains(&byte) {
                continue;
            }
            let mut altered = bytes[..5120].to_vec();
            altered[byte] ^= 1 << (bit % 8);
            assert!(decode(&cipher, &altered).is_none(), "byte {byte}");
        }
        for cut in 0..used {
            assert!(decode(&cipher, &bytes[..cut]).is_none());
        }
    }
}
