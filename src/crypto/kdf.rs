//! The key schedule: every key derived from another, with its label (docs/FORMAT.md section 2).

use hkdf::Hkdf;
use sha2::Sha256;

use super::VolumeId;

/// Labels of keys derived from a KEK; scope and version follow the label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KekLabel {
    /// The public commitment to the KEK.
    Commit,
    /// The key that wraps DEKs.
    Wrap,
    /// The key that authenticates the volume file.
    Volume,
    /// The public check value of a canary.
    Canary,
    /// The key of the intent log.
    Log,
}

impl KekLabel {
    fn bytes(self) -> &'static [u8] {
        match self {
            Self::Commit => b"lethefs/1/kek/commit",
            Self::Wrap => b"lethefs/1/kek/wrap",
            Self::Volume => b"lethefs/1/kek/volume",
            Self::Canary => b"lethefs/1/kek/canary",
            Self::Log => b"lethefs/1/kek/log",
        }
    }
}

/// Labels of keys derived from a DEK.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DekLabel {
    /// File contents and symlink targets.
    Content,
    /// Mutable headers.
    Header,
    /// Names in a directory.
    Name,
    /// Extended attributes.
    Xattr,
}

impl DekLabel {
    fn bytes(self) -> &'static [u8] {
        match self {
            Self::Content => b"lethefs/1/dek/content",
            Self::Header => b"lethefs/1/dek/header",
            Self::Name => b"lethefs/1/dek/name",
            Self::Xattr => b"lethefs/1/dek/xattr",
        }
    }
}

fn hkdf(salt: &[u8; 16], ikm: &[u8; 32], info: &[&[u8]], out: &mut [u8; 32]) {
    // 32 bytes is one block of SHA-256: never too long for RFC 5869.
    if Hkdf::<Sha256>::new(Some(salt), ikm).expand_multi_info(info, out).is_err() {
        unreachable!("32 bytes is a valid HKDF-SHA-256 length")
    }
}

/// Derives from a KEK (or a canary) into `out`.
pub fn from_kek(kek: &[u8; 32], label: KekLabel, volume: &VolumeId, scope: u32, version: u32, out: &mut [u8; 32]) {
    hkdf(&volume.0, kek, &[label.bytes(), &scope.to_le_bytes(), &version.to_le_bytes()], out);
}

/// Derives the key that wraps under a recovery key into `out`.
pub fn from_recovery(recovery: &[u8; 32], id: &VolumeId, out: &mut [u8; 32]) {
    hkdf(&id.0, recovery, &[b"lethefs/1/recovery"], out);
}

/// Derives from a DEK into `out`.
pub fn from_dek(dek: &[u8; 32], label: DekLabel, object: &super::ObjectId, out: &mut [u8; 32]) {
    hkdf(&object.0, dek, &[label.bytes()], out);
}
