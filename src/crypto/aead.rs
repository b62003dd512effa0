//! AES-256-GCM-SIV (RFC 8452), the only cipher, with separate input and output buffers.

use aes_gcm_siv::aead::inout::InOutBuf;
use aes_gcm_siv::{AeadInOut, Aes256GcmSiv, KeyInit};

/// Bytes of a nonce (RFC 8452 section 6).
pub const NONCE_LEN: usize = 12;
/// Bytes of an authentication tag (RFC 8452 section 6).
pub const TAG_LEN: usize = 16;

/// What was opened is not what was sealed: other key, other place, or altered bytes. Says no more on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not authentic")]
pub struct Unauthentic;

/// The cipher under one key. Its round keys are wiped on drop.
pub struct Cipher(Aes256GcmSiv);

impl Cipher {
    /// Expands the key.
    pub fn new(key: &[u8; 32]) -> Self {
        Self(Aes256GcmSiv::new(key.into()))
    }

    /// Encrypts `plain` into `out`, which has the same length, and returns the tag.
    pub fn seal_into(&self, nonce: &[u8; NONCE_LEN], aad: &[u8], plain: &[u8], out: &mut [u8]) -> [u8; TAG_LEN] {
        // Fails only for unequal buffers or messages beyond 64 GiB (RFC 8452 section 6): no caller has either.
        let Ok(buffer) = InOutBuf::new(plain, out) else { unreachable!("equal lengths") };
        match self.0.encrypt_inout_detached(nonce.into(), aad, buffer) {
            Ok(tag) => tag.into(),
            Err(_) => unreachable!("below the length limit of RFC 8452"),
        }
    }

    /// Decrypts `sealed` into `out`, which has the same length. On failure `out` holds nothing of use.
    ///
    /// # Errors
    /// [`Unauthentic`].
    pub fn open_into(
        &self,
        nonce: &[u8; NONCE_LEN],
        aad: &[u8],
        sealed: &[u8],
        tag: &[u8; TAG_LEN],
        out: &mut [u8],
    ) -> Result<(), Unauthentic> {
        let Ok(buffer) = InOutBuf::new(sealed, out) else { unreachable!("equal lengths") };
        self.0.decrypt_inout_detached(nonce.into(), aad, buffer, tag.into()).map_err(|_| Unauthentic)
    }

    /// `plain` as ciphertext ‖ tag.
    pub fn seal(&self, nonce: &[u8; NONCE_LEN], aad: &[u8], plain: &[u8]) -> Vec<u8> {
        let mut sealed = vec![0; plain.len() + TAG_LEN];
        let (body, tag) = sealed.split_at_mut(plain.len());
        tag.copy_from_slice(&self.seal_into(nonce, aad, plain, body));
        sealed
    }

    /// Opens ciphertext ‖ tag.
    ///
    /// # Errors
    /// [`Unauthentic`], also for anything too short to hold a tag.
    pub fn open(
        &self,
        nonce: &[u8; NONCE_LEN],
        aad: &[u8],
        sealed: &[u8],
    ) -> Result<zeroize::Zeroizing<Vec<u8>>, Unauthentic> {
        let (body, tag) = sealed.split_last_chunk::<TAG_LEN>().ok_or(Unauthentic)?;
        let mut plain = zeroize::Zeroizing::new(vec![0; body.len()]);
        self.open_into(nonce, aad, body, tag, &mut plain)?;
        Ok(plain)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::ids::unhex;

    /// RFC 8452 appendix C.2, "Plaintext (8 bytes)": key 01 00…, nonce 03 00….
    #[test]
    fn vector_of_rfc_8452() {
        let mut key = [0; 32];
        key[0] = 1;
        let mut nonce = [0; 12];
        nonce[0] = 3;
        let plain: [u8; 8] = unhex("0100000000000000").unwrap();
        let expected: [u8; 24] = unhex("c2ef328e5c71c83b843122130f7364b761e0b97427e3df28").unwrap();
        let sealed = Cipher::new(&key).seal(&nonce, b"", &plain);
        assert_eq!(sealed, expected);
        assert_eq!(*Cipher::new(&key).open(&nonce, b"", &sealed).unwrap(), plain);
    }

    #[test]
    fn any_flipped_bit_is_refused() {
        let cipher = Cipher::new(&[7; 32]);
        let sealed = cipher.seal(&[1; 12], b"here", b"forget me");
        for bit in 0..sealed.len() * 8 {
            let mut altered = sealed.clone();
            altered[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(cipher.open(&[1; 12], b"here", &altered), Err(Unauthentic));
        }
        assert_eq!(cipher.open(&[1; 12], b"there", &sealed), Err(Unauthentic));
        assert_eq!(cipher.open(&[2; 12], b"here", &sealed), Err(Unauthentic));
        assert_eq!(cipher.open(&[1; 12], b"here", &sealed[..8]), Err(Unauthentic));
    }
}
