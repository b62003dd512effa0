//! Encrypted names (docs/FORMAT.md section 6).

use sha2::{Digest as _, Sha256};

use super::format::{LONG_NAME_PREFIX, LONG_PREFIX, NAME_MAX, OWN_PREFIX, b64, un_b64};
use super::{Damage, VolumeError};
use crate::crypto::kdf::DekLabel;
use crate::crypto::{NONCE_LEN, ObjectId};
use crate::keyring::{Dek, Keyring};

/// Names are encrypted deterministically, so that a lookup need not read the directory; the key is the directory's own.
const NONCE: [u8; NONCE_LEN] = [0; NONCE_LEN];

/// A name in the backing directory.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct CipherName {
    name: Box<str>,
    full: Option<Box<str>>,
}

impl CipherName {
    /// The entry's name.
    pub fn as_str(&self) -> &str {
        &self.name
    }

    /// For a long name: its sidecar's name and contents.
    pub fn sidecar(&self) -> Option<(String, &str)> {
        let full = self.full.as_deref()?;
        let hash = self.name.strip_prefix(LONG_PREFIX)?;
        Some((format!("{LONG_NAME_PREFIX}{hash}"), full))
    }
}

/// Checks a plaintext name: 1 to 255 bytes, no `/`, no NUL, not `.` or `..`.
///
/// # Errors
/// [`VolumeError::NameTooLong`] or [`VolumeError::InvalidName`].
pub fn check(name: &[u8]) -> Result<(), VolumeError> {
    if name.len() > NAME_MAX {
        return Err(VolumeError::NameTooLong);
    }
    if name.is_empty() || name == b"." || name == b".." || name.iter().any(|byte| matches!(byte, 0 | b'/')) {
        return Err(VolumeError::InvalidName);
    }
    Ok(())
}

/// Encrypts a name.
///
/// # Errors
/// As [`check`], or the ring's.
pub fn encrypt(keys: &Keyring, dir: &Dek, name: &[u8]) -> Result<CipherName, VolumeError> {
    check(name)?;
    let aad = aad(&dir.object());
    let sealed = keys.with_keys(dir, |keys| keys.cipher(DekLabel::Name).seal(&NONCE, &aad, name))?;
    let full = b64(&sealed).into_boxed_str();
    if full.len() <= NAME_MAX {
        return Ok(CipherName { name: full, full: None });
    }
    Ok(CipherName { name: format!("{LONG_PREFIX}{}", hash(&sealed)).into(), full: Some(full) })
}

/// Whether a name in the backing directory is an entry, rather than something of ours.
pub fn is_entry(name: &[u8]) -> bool {
    name.starts_with(LONG_PREFIX.as_bytes())
        || !(name.starts_with(OWN_PREFIX.as_bytes()) || name == b"." || name == b"..")
}

/// Decrypts an entry's name. `sidecar` reads the target of the symlink with the given name.
///
/// # Errors
/// [`Damage::Name`] for whatever we did not write, or the ring's.
pub fn decrypt(
    keys: &Keyring,
    dir: &Dek,
    name: &[u8],
    sidecar: impl FnOnce(&str) -> Option<Vec<u8>>,
) -> Result<Vec<u8>, VolumeError> {
    const DAMAGED: VolumeError = VolumeError::Damaged(Damage::Name);
    let sealed = match name.strip_prefix(LONG_PREFIX.as_bytes()) {
        None => un_b64(name).ok_or(DAMAGED)?,
        Some(suffix) => {
            let suffix = std::str::from_utf8(suffix).map_err(|_| DAMAGED)?;
            let full = sidecar(&format!("{LONG_NAME_PREFIX}{suffix}")).ok_or(DAMAGED)?;
            let sealed = un_b64(&full).ok_or(DAMAGED)?;
            // Another entry's sidecar under this name would open too.
            if hash(&sealed) != suffix || full.len() <= NAME_MAX {
                return Err(DAMAGED);
            }
            sealed
        }
    };
    let aad = aad(&dir.object());
    let plain =
        keys.with_keys(dir, |keys| keys.cipher(DekLabel::Name).open(&NONCE, &aad, &sealed))?.map_err(|_| DAMAGED)?;
    check(&plain).map_err(|_| DAMAGED)?;
    Ok(plain.to_vec())
}

fn hash(sealed: &[u8]) -> String {
    b64(&Sha256::digest(sealed))
}

fn aad(dir: &ObjectId) -> Vec<u8> {
    [b"lethefs/1/name".as_slice(), &dir.0].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::{Key32, VolumeId};
    use crate::keyring::DEK_AAD_LEN;

    fn ring() -> (Keyring, Dek) {
        let ring = Keyring::new(VolumeId([1; 16])).unwrap();
        ring.admit(0, 1, &Key32::random().unwrap(), true).unwrap();
        let dek = ring.make(ObjectId([4; 16]), |_, _| [0; DEK_AAD_LEN]).unwrap();
        (ring, dek)
    }

    #[test]
    fn every_length_round_trips() {
        let (ring, dir) = ring();
        for len in 1..=NAME_MAX {
            let name = vec![b'\xff'; len];
            let cipher = encrypt(&ring, &dir, &name).unwrap();
            assert!(cipher.as_str().len() <= NAME_MAX);
            assert_eq!(cipher.sidecar().is_some(), len > 175, "length {len}");
            assert!(is_entry(cipher.as_str().as_bytes()));
            let sidecar = cipher.sidecar();
            let back = decrypt(&ring, &dir, cipher.as_str().as_bytes(), |wanted| {
                let (name, full) = sidecar.as_ref()?;
                (name == wanted).then(|| full.as_bytes().to_vec())
            });
            assert_eq!(back.unwrap(), name);
        }
        assert!(matches!(encrypt(&ring, &dir, &[b'a'; 256]), Err(VolumeError::NameTooLong)));
    }

    /// What an attacker who has the key of a directory's names could plant, and whoever else can only guess at.
    #[test]
    fn names_that_are_none_are_refused() {
        let (ring, dir) = ring();
        for bad in [b"".as_slice(), b".", b"..", b"a/b", b"nul\0"] {
            let sealed = ring
                .with_keys(&dir, |keys| keys.cipher(DekLabel::Name).seal(&NONCE, &aad(&dir.object()), bad))
                .unwrap();
            let name = b64(&sealed);
            assert!(matches!(decrypt(&ring, &dir, name.as_bytes(), |_| None), Err(VolumeError::Damaged(Damage::Name))));
            assert!(encrypt(&ring, &dir, bad).is_err());
        }
        assert!(!is_entry(b"lethefs.dir") && !is_entry(b"lethefs.tmp.x") && !is_entry(b".."));
    }
}
