//! Static and mutable headers (docs/FORMAT.md sections 5 and 7).
//!
//! Parsed bytes are claims; what authenticated is a [`Dek`](crate::keyring::Dek) or a [`Mutable`].

use super::{Damage, VolumeError};
use crate::crypto::kdf::DekLabel;
use crate::crypto::{NONCE_LEN, ObjectId, TAG_LEN, VolumeId, random};
use crate::keyring::{DEK_AAD_LEN, Dek, Keyring, KeyringError, SEALED_DEK_LEN, UnverifiedDek};

/// Bytes of a static header.
pub const STATIC_LEN: usize = 128;
/// Bytes of a mutable header.
pub const MUTABLE_LEN: usize = 64;
/// Where the mutable headers begin in a regular file.
pub const MUTABLE_AT: u64 = 256;
/// Bytes of a regular file's header.
pub const HEADER_LEN: usize = super::format::HEADER as usize;

const MAGIC: &[u8; 8] = b"LETHEOBJ";
const MUTABLE_PLAIN: usize = 36;

/// Types of objects, as authenticated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum ObjectType {
    Regular = 1,
    Directory = 2,
    Symlink = 3,
    Fifo = 4,
    Socket = 5,
    CharDevice = 6,
    BlockDevice = 7,
}

impl ObjectType {
    fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Self::Regular,
            2 => Self::Directory,
            3 => Self::Symlink,
            4 => Self::Fifo,
            5 => Self::Socket,
            6 => Self::CharDevice,
            7 => Self::BlockDevice,
            _ => return None,
        })
    }
}

/// What an authentic static header says, beside its DEK.
#[derive(Clone)]
pub struct Static {
    /// Proof and wrapped DEK.
    pub dek: Dek,
    /// Type of the object.
    pub object_type: ObjectType,
    /// Device number of types 6 and 7.
    pub device: u64,
}

impl Static {
    /// A new object.
    ///
    /// # Errors
    /// The ring's.
    pub fn make(keys: &Keyring, id: ObjectId, object_type: ObjectType, device: u64) -> Result<Self, KeyringError> {
        let dek = keys.make(id, |scope, version| {
            let mut aad = [0; DEK_AAD_LEN];
            aad[..8].copy_from_slice(MAGIC);
            aad[8..10].copy_from_slice(&(super::format::FORMAT as u16).to_le_bytes());
            aad[10] = object_type as u8;
            aad[12..16].copy_from_slice(&scope.to_le_bytes());
            aad[16..20].copy_from_slice(&version.to_le_bytes());
            aad[24..40].copy_from_slice(&id.0);
            aad[40..48].copy_from_slice(&device.to_le_bytes());
            aad
        })?;
        Ok(Self { dek, object_type, device })
    }

    /// The same, with its DEK wrapped under the KEK that is current now. Reserved fields stay as they are.
    ///
    /// # Errors
    /// The ring's.
    pub fn rewrap(&self, keys: &Keyring) -> Result<Self, KeyringError> {
        let dek = keys.rewrap(&self.dek, |scope, version| {
            let mut aad = *self.dek.aad();
            aad[12..16].copy_from_slice(&scope.to_le_bytes());
            aad[16..20].copy_from_slice(&version.to_le_bytes());
            aad
        })?;
        Ok(Self { dek, ..self.clone() })
    }

    /// Its bytes.
    pub fn bytes(&self) -> [u8; STATIC_LEN] {
        let mut bytes = [0; STATIC_LEN];
        bytes[..DEK_AAD_LEN].copy_from_slice(self.dek.aad());
        bytes[DEK_AAD_LEN..DEK_AAD_LEN + NONCE_LEN].copy_from_slice(self.dek.nonce());
        bytes[DEK_AAD_LEN + NONCE_LEN..].copy_from_slice(self.dek.sealed());
        bytes
    }

    /// Authenticates 128 bytes.
    ///
    /// # Errors
    /// [`Damage::Header`], or the ring's being sealed.
    pub fn open(keys: &Keyring, bytes: &[u8; STATIC_LEN]) -> Result<Self, VolumeError> {
        const DAMAGED: VolumeError = VolumeError::Damaged(Damage::Header);
        let Some((aad, rest)) = bytes.split_first_chunk::<DEK_AAD_LEN>() else { return Err(DAMAGED) };
        let Some((nonce, rest)) = rest.split_first_chunk::<NONCE_LEN>() else { return Err(DAMAGED) };
        let Some(sealed) = rest.first_chunk::<SEALED_DEK_LEN>() else { return Err(DAMAGED) };
        if aad[..8] != *MAGIC || read_u16(aad, 8) != super::format::FORMAT as u16 || aad[11] != 0 {
            return Err(DAMAGED);
        }
        let object_type = ObjectType::from_byte(aad[10]).ok_or(DAMAGED)?;
        let Some(id) = aad[24..].first_chunk() else { return Err(DAMAGED) };
        let claim = UnverifiedDek {
            object: ObjectId(*id),
            scope: read_u32(aad, 12),
            version: read_u32(aad, 16),
            aad,
            nonce,
            sealed,
        };
        match keys.verify(&claim) {
            Ok(dek) => Ok(Self { dek, object_type, device: read_u64(aad, 40) }),
            Err(KeyringError::Unauthentic | KeyringError::NoSuchKek { .. }) => Err(DAMAGED),
            Err(error) => Err(error.into()),
        }
    }

    /// Authenticates, and insists on a type.
    ///
    /// # Errors
    /// As [`open`](Self::open), or [`Damage::Type`].
    pub fn open_as(keys: &Keyring, bytes: &[u8; STATIC_LEN], wanted: ObjectType) -> Result<Self, VolumeError> {
        let header = Self::open(keys, bytes)?;
        if header.object_type == wanted { Ok(header) } else { Err(VolumeError::Damaged(Damage::Type)) }
    }
}

/// The object that a static header claims to be of. Not authenticated.
pub fn claimed_id(bytes: &[u8; STATIC_LEN]) -> Option<ObjectId> {
    bytes[24..].first_chunk().map(|id| ObjectId(*id))
}

/// The changing part of a regular file's header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mutable {
    /// Rises with each write.
    pub counter: u64,
    /// Size in bytes when it was written.
    pub size: u64,
    /// Every block below authenticates.
    pub floor: u64,
    /// `size` is the true size and equals `floor`.
    pub sealed: bool,
    /// All-zero blocks are holes.
    pub holes: bool,
    /// Counter of the header that was there when the file was last opened for changes: which records of an intent log
    /// are about this state of the file, and not an older or newer one.
    pub opened: u64,
}

impl Mutable {
    fn plain(self) -> [u8; MUTABLE_PLAIN] {
        let mut plain = [0; MUTABLE_PLAIN];
        plain[..8].copy_from_slice(&self.counter.to_le_bytes());
        plain[8..16].copy_from_slice(&self.size.to_le_bytes());
        plain[16..24].copy_from_slice(&self.floor.to_le_bytes());
        let flags = u32::from(self.sealed) | u32::from(self.holes) << 1;
        plain[24..28].copy_from_slice(&flags.to_le_bytes());
        plain[28..36].copy_from_slice(&self.opened.to_le_bytes());
        plain
    }

    /// Both copies, each under a nonce of its own.
    ///
    /// # Errors
    /// The ring's.
    pub fn seal(self, keys: &Keyring, dek: &Dek, volume: &VolumeId) -> Result<[u8; 2 * MUTABLE_LEN], KeyringError> {
        let nonces = [random::nonce()?, random::nonce()?];
        let aad = aad(volume, dek);
        let plain = self.plain();
        keys.with_keys(dek, |keys| {
            let cipher = keys.cipher(DekLabel::Header);
            let mut bytes = [0; 2 * MUTABLE_LEN];
            for (copy, nonce) in bytes.chunks_exact_mut(MUTABLE_LEN).zip(&nonces) {
                let (head, tag) = copy.split_at_mut(NONCE_LEN + MUTABLE_PLAIN);
                head[..NONCE_LEN].copy_from_slice(nonce);
                tag.copy_from_slice(&cipher.seal_into(nonce, &aad, &plain, &mut head[NONCE_LEN..]));
            }
            bytes
        })
    }

    /// The copy with the higher counter that opens.
    ///
    /// # Errors
    /// [`Damage::MutableHeader`], or the ring's.
    pub fn open(
        keys: &Keyring,
        dek: &Dek,
        volume: &VolumeId,
        bytes: &[u8; 2 * MUTABLE_LEN],
    ) -> Result<Self, VolumeError> {
        let aad = aad(volume, dek);
        let copies = keys.with_keys(dek, |keys| {
            let cipher = keys.cipher(DekLabel::Header);
            let open = |copy: &[u8]| {
                let (nonce, rest) = copy.split_first_chunk::<NONCE_LEN>()?;
                let (body, tag) = rest.split_last_chunk::<TAG_LEN>()?;
                let mut plain = [0; MUTABLE_PLAIN];
                cipher.open_into(nonce, &aad, body, tag, &mut plain).ok()?;
                Self::parse(&plain)
            };
            [open(&bytes[..MUTABLE_LEN]), open(&bytes[MUTABLE_LEN..])]
        })?;
        match copies {
            // One write makes both: the same counter with other contents is nothing we wrote.
            [Some(a), Some(b)] if a.counter == b.counter && a != b => Err(VolumeError::Damaged(Damage::MutableHeader)),
            [a, b] => a
                .into_iter()
                .chain(b)
                .max_by_key(|copy| copy.counter)
                .ok_or(VolumeError::Damaged(Damage::MutableHeader)),
        }
    }

    /// `None`: a flag of the future, which only a newer program would understand.
    fn parse(plain: &[u8; MUTABLE_PLAIN]) -> Option<Self> {
        let flags = read_u32(plain, 24);
        (flags & !3 == 0).then(|| Self {
            counter: read_u64(plain, 0),
            size: read_u64(plain, 8),
            floor: read_u64(plain, 16),
            sealed: flags & 1 != 0,
            holes: flags & 2 != 0,
            opened: read_u64(plain, 28),
        })
    }
}

fn aad(volume: &VolumeId, dek: &Dek) -> Vec<u8> {
    [b"lethefs/1/mutable".as_slice(), &volume.0, &dek.object().0].concat()
}

fn read_u16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn read_u32(bytes: &[u8], at: usize) -> u32 {
    bytes[at..].first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

fn read_u64(bytes: &[u8], at: usize) -> u64 {
    bytes[at..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::Key32;

    fn ring() -> Keyring {
        let ring = Keyring::new(VolumeId([1; 16])).unwrap();
        ring.admit(0, 1, &Key32::random().unwrap(), true).unwrap();
        ring
    }

    #[test]
    fn every_bit_of_a_static_header_counts() {
        let ring = ring();
        let header = Static::make(&ring, ObjectId([9; 16]), ObjectType::BlockDevice, 0x801).unwrap();
        let bytes = header.bytes();
        let read = Static::open_as(&ring, &bytes, ObjectType::BlockDevice).unwrap();
        assert_eq!(read.device, 0x801);
        for bit in 0..bytes.len() * 8 {
            let mut altered = bytes;
            altered[bit / 8] ^= 1 << (bit % 8);
            assert!(matches!(Static::open(&ring, &altered), Err(VolumeError::Damaged(_))), "bit {bit}");
        }
        assert!(matches!(Static::open_as(&ring, &bytes, ObjectType::Regular), Err(VolumeError::Damaged(Damage::Type))));
    }

    #[test]
    fn one_mutable_copy_is_enough_and_both_say_the_same() {
        let ring = ring();
        let header = Static::make(&ring, ObjectId([9; 16]), ObjectType::Regular, 0).unwrap();
        let volume = VolumeId([1; 16]);
        let state = Mutable { counter: 7, size: 5000, floor: 4096, sealed: false, holes: true, opened: 3 };
        let bytes = state.seal(&ring, &header.dek, &volume).unwrap();
        for bit in 0..bytes.len() * 8 {
            let mut altered = bytes;
            altered[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Mutable::open(&ring, &header.dek, &volume, &altered).unwrap(), state);
        }
        assert!(Mutable::open(&ring, &header.dek, &VolumeId([2; 16]), &bytes).is_err());
        assert!(Mutable::open(&ring, &header.dek, &volume, &[0; 128]).is_err());
        // Of two that open, the later one; of two that contradict each other, none.
        for (counter, found) in [(6, Some(7)), (8, Some(8)), (7, None)] {
            let other = Mutable { counter, floor: 0, ..state }.seal(&ring, &header.dek, &volume).unwrap();
            for (a, b) in [(&bytes, &other), (&other, &bytes)] {
                let both = [&a[..MUTABLE_LEN], &b[MUTABLE_LEN..]].concat();
                let read = Mutable::open(&ring, &header.dek, &volume, both.first_chunk().unwrap());
                assert_eq!(read.ok().map(|read| read.counter), found);
            }
        }
    }
}
