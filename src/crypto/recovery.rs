//! The recovery key: made once, given out as shares of which any k of n make it again, never stored.
//!
//! Shamir's scheme over GF(256) is the `blahaj` crate's, the fork of `sharks` that repaired its biased coefficients (RUSTSEC-2024-0398). A share is
//! text for paper: it says what it belongs to and carries a checksum, so that a slip of the pen is noticed at the share that has it.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use blahaj::{Share, Sharks};
use getrandom::SysRng;
use getrandom::rand_core::UnwrapErr;
use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

use super::aead::Cipher;
use super::ids::hex;
use super::{Key32, NONCE_LEN, TAG_LEN, VolumeId, kdf};

const MARK: &str = "lethefs-share";
const PREFIX: &str = "lethefs-recovery:v1:";
/// Version, threshold, number, id, share, checksum.
const LEN: usize = 3 + 16 + 32 + CHECK;
const CHECK: usize = 4;
/// Hex digits between two hyphens.
const GROUP: usize = 10;

/// Why shares make no key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ShareError {
    /// Text that is not a share, or has a slip in it.
    #[error("recovery share {0} is not one, or has a mistake in it: compare it with the paper")]
    Malformed(usize),
    /// Shares of two keys.
    #[error("recovery share {0} belongs to another recovery key than the first")]
    Foreign(usize),
    /// Too few.
    #[error("{given} different recovery shares were given, and {needed} are needed")]
    TooFew {
        /// So many were.
        given: usize,
        /// So many are.
        needed: u8,
    },
    /// Not a scheme.
    #[error("recovery shares: choose 2 to 255 shares, of which 2 or more are needed to open")]
    Scheme,
    /// The random number generator failed.
    #[error("no random numbers: {0}")]
    Random(getrandom::Error),
}

/// A recovery key and its public id. Wiped on drop.
pub struct RecoveryKey {
    id: VolumeId,
    key: Key32,
}

impl RecoveryKey {
    /// A new one.
    ///
    /// # Errors
    /// [`ShareError::Random`].
    pub fn random() -> Result<Self, ShareError> {
        let id = VolumeId::random().map_err(ShareError::Random)?;
        Ok(Self { id, key: Key32::random().map_err(ShareError::Random)? })
    }

    /// What its slot and its shares are known by.
    pub fn id(&self) -> VolumeId {
        self.id
    }

    /// The key as `count` shares, any `threshold` of which make it again.
    ///
    /// # Errors
    /// [`ShareError::Scheme`], [`ShareError::Random`].
    pub fn split(&self, threshold: u8, count: u8) -> Result<Vec<Zeroizing<String>>, ShareError> {
        if threshold < 2 || count < threshold {
            return Err(ShareError::Scheme);
        }
        // The generator below cannot report a failure: find out before.
        getrandom::fill(&mut [0; 1]).map_err(ShareError::Random)?;
        let dealt = self.key.expose(|key| {
            Sharks(threshold).dealer_rng(key, &mut UnwrapErr(SysRng)).take(usize::from(count)).collect::<Vec<_>>()
        });
        Ok(dealt.iter().map(|share| self.write(threshold, share)).collect())
    }

    fn write(&self, threshold: u8, share: &Share) -> Zeroizing<String> {
        let share = Zeroizing::new(Vec::from(share));
        let mut bytes = Zeroizing::new(Vec::with_capacity(LEN));
        bytes.extend_from_slice(&[1, threshold, share[0]]);
        bytes.extend_from_slice(&self.id.0);
        bytes.extend_from_slice(&share[1..]);
        let check = checksum(&bytes);
        bytes.extend_from_slice(&check);
        let digits = Zeroizing::new(hex(&bytes));
        let mut text = Zeroizing::new(String::with_capacity(MARK.len() + LEN * 3));
        text.push_str(MARK);
        for (n, digit) in digits.chars().enumerate() {
            if n % GROUP == 0 {
                text.push('-');
            }
            text.push(digit);
        }
        text
    }

    /// The key out of its shares, as people type them: case, spaces and hyphens do not matter. More shares than needed are
    /// welcome; the same one twice counts once.
    ///
    /// # Errors
    /// Any [`ShareError`] but those of the generator. A wrong share with a right checksum gives a wrong key, which opens nothing.
    pub fn combine(texts: &[Zeroizing<String>]) -> Result<Self, ShareError> {
        let mut first: Option<(VolumeId, u8)> = None;
        let mut shares: Vec<Share> = Vec::new();
        for (n, text) in texts.iter().enumerate().map(|(n, text)| (n + 1, text)) {
            let bytes = read(text).ok_or(ShareError::Malformed(n))?;
            let (threshold, number) = (bytes[1], bytes[2]);
            let mut id = VolumeId([0; 16]);
            id.0.copy_from_slice(&bytes[3..19]);
            if *first.get_or_insert((id, threshold)) != (id, threshold) {
                return Err(ShareError::Foreign(n));
            }
            let mut point = Zeroizing::new(vec![number]);
            point.extend_from_slice(&bytes[19..LEN - CHECK]);
            let share = Share::try_from(point.as_slice()).map_err(|_| ShareError::Malformed(n))?;
            if shares.iter().all(|other| other.x != share.x) {
                shares.push(share);
            }
        }
        let Some((id, threshold)) = first else { return Err(ShareError::TooFew { given: 0, needed: 2 }) };
        let too_few = ShareError::TooFew { given: shares.len(), needed: threshold };
        let secret = Sharks(threshold).recover(&shares).map(Zeroizing::new).map_err(|_| too_few.clone())?;
        Ok(Self { id, key: Key32::from_zeroizing(secret).ok_or(too_few)? })
    }

    /// A key under this one, bound to its place.
    ///
    /// # Errors
    /// The random number generator's.
    pub fn wrap(&self, binding: &[u8], key: &Key32) -> Result<String, getrandom::Error> {
        let mut sealed = vec![0; NONCE_LEN + 32 + TAG_LEN];
        let (nonce, rest) = sealed.split_at_mut(NONCE_LEN);
        getrandom::fill(nonce)?;
        let mut fixed = [0; NONCE_LEN];
        fixed.copy_from_slice(nonce);
        let (text, tag) = rest.split_at_mut(32);
        tag.copy_from_slice(&key.expose(|key| self.cipher().seal_into(&fixed, binding, key, text)));
        Ok(format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(&sealed)))
    }

    /// What [`wrap`](Self::wrap) wrapped. `None`: not under this key, not bound to this place, or damaged.
    pub fn unwrap(&self, binding: &[u8], wrapped: &str) -> Option<Key32> {
        let sealed = URL_SAFE_NO_PAD.decode(wrapped.strip_prefix(PREFIX)?).ok()?;
        let (nonce, rest) = sealed.split_first_chunk::<NONCE_LEN>()?;
        let (text, tag) = rest.split_last_chunk::<TAG_LEN>()?;
        if text.len() != 32 {
            return None;
        }
        Key32::fill_with(|key| self.cipher().open_into(nonce, binding, text, tag, key)).ok()
    }

    fn cipher(&self) -> Cipher {
        let mut key = Zeroizing::new([0; 32]);
        self.key.expose(|bytes| kdf::from_recovery(bytes, &self.id, &mut key));
        Cipher::new(&key)
    }
}

fn checksum(bytes: &[u8]) -> [u8; CHECK] {
    let hash = Sha256::new().chain_update(b"lethefs/1/share").chain_update(bytes).finalize();
    let mut check = [0; CHECK];
    check.copy_from_slice(&hash[..CHECK]);
    check
}

/// The bytes of a share. `None`: not one.
fn read(text: &str) -> Option<Zeroizing<Vec<u8>>> {
    let mut plain = Zeroizing::new(String::with_capacity(text.len()));
    plain.extend(text.chars().filter(|c| !c.is_whitespace() && *c != '-').map(|c| c.to_ascii_lowercase()));
    let digits = plain.strip_prefix(MARK.replace('-', "").as_str())?.as_bytes();
    if digits.len() != 2 * LEN {
        return None;
    }
    let mut bytes = Zeroizing::new(Vec::with_capacity(LEN));
    for pair in digits.chunks_exact(2) {
        let (high, low) = (char::from(pair[0]).to_digit(16)?, char::from(pair[1]).to_digit(16)?);
        bytes.push((high * 16 + low) as u8);
    }
    let (body, check) = bytes.split_at(LEN - CHECK);
    let sound = check == checksum(body) && body[0] == 1 && body[1] >= 2 && body[2] != 0;
    sound.then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(shares: &[Zeroizing<String>], which: &[usize]) -> Vec<Zeroizing<String>> {
        which.iter().map(|n| shares[*n].clone()).collect()
    }

    #[test]
    fn any_k_of_n_open_and_fewer_do_not() {
        let key = RecoveryKey::random().unwrap();
        let kek = Key32::random().unwrap();
        let wrapped = key.wrap(b"here", &kek).unwrap();
        let shares = key.split(3, 5).unwrap();
        assert_eq!(shares.len(), 5);
        for a in 0..5 {
            for b in 0..5 {
                for c in 0..5 {
                    let made = RecoveryKey::combine(&texts(&shares, &[a, b, c]));
                    if a == b || b == c || a == c {
                        assert!(matches!(made, Err(ShareError::TooFew { needed: 3, .. })));
                        continue;
                    }
                    let made = made.unwrap();
                    assert_eq!(made.id(), key.id());
                    assert!(made.unwrap(b"here", &wrapped).unwrap().same_as(&kek), "{a} {b} {c}");
                    assert!(made.unwrap(b"there", &wrapped).is_none());
                }
            }
        }
        assert!(RecoveryKey::combine(&texts(&shares, &[4, 0, 2, 2, 1, 3])).is_ok(), "more than needed, one twice");
        // Two shares of a (2, n) scheme with the same text but for the threshold: fewer than k give another key.
        let two = RecoveryKey::combine(&texts(&key.split(2, 3).unwrap(), &[0, 1])).unwrap();
        assert!(two.unwrap(b"here", &wrapped).is_some());
        let other = RecoveryKey::random().unwrap();
        assert!(other.unwrap(b"here", &wrapped).is_none());
        for bad in [(1, 3), (3, 2), (0, 0)] {
            assert_eq!(key.split(bad.0, bad.1).err(), Some(ShareError::Scheme));
        }
    }

    #[test]
    fn a_slip_of_the_pen_is_noticed_at_its_share() {
        let key = RecoveryKey::random().unwrap();
        let shares = key.split(2, 3).unwrap();
        let combine = |second: String| RecoveryKey::combine(&[shares[0].clone(), Zeroizing::new(second)]).err();
        for at in MARK.len() + 1..shares[1].len() {
            let mut changed = shares[1].to_string();
            let old = &changed[at..=at];
            if old == "-" {
                continue;
            }
            let new = if old == "7" { "8" } else { "7" };
            changed.replace_range(at..=at, new);
            assert_eq!(combine(changed), Some(ShareError::Malformed(2)), "digit {at}");
        }
        assert_eq!(combine(shares[1][1..].to_owned()), Some(ShareError::Malformed(2)));
        assert_eq!(combine(String::new()), Some(ShareError::Malformed(2)));
        assert_eq!(combine(shares[1].to_uppercase().replace('-', " ")), None, "as people type");
        let stranger = RecoveryKey::random().unwrap().split(2, 2).unwrap();
        assert_eq!(combine(stranger[0].to_string()), Some(ShareError::Foreign(2)));
        for cut in ["", "lethefs-recovery:v1:", "lethefs-recovery:v1:AAAA", "vault:v1:x"] {
            assert!(key.unwrap(b"", cut).is_none());
        }
    }
}
