//! Custody: the KEKs and a bounded cache of object keys, used inside closures and wiped all at once.
//!
//! The contract that everything above relies on:
//! - keys are seen only by the closure given to [`Keyring::with_keys`] and its siblings, which hold a shared guard while
//!   it runs. The closure does cipher work on memory: no I/O, no call back into the keyring;
//! - [`Keyring::wipe`] first closes the ring, then takes each guard exclusively: when it returns no closure runs, no key is
//!   left in the arena, and every later call fails with [`KeyringError::Sealed`];
//! - a [`Dek`] is not a key but a proof: the wrapped DEK of a header that did authenticate. It can be kept for ever.
//!
//! How long keys may be held without a new proof that the key service still gives them is [`lease`]'s to say.

pub mod lease;

use std::io;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;
use subtle::ConstantTimeEq as _;

use crate::crypto::aead::Cipher;
use crate::crypto::arena::{Arena, SLOT_LEN};
use crate::crypto::kdf::{self, DekLabel, KekLabel};
use crate::crypto::{Key32, NONCE_LEN, ObjectId, TAG_LEN, VolumeId, random};

/// Shards of the arena: a wipe or a load waits only for the closures of one.
const SHARDS: usize = 16;
/// Bytes of arena per shard: 8,192 objects' keys in all, 1 MiB.
/// (Unit tests make thousands of rings, and such memory costs the kernel a page at a time.)
const SHARD_BYTES: usize = if cfg!(test) { 4096 } else { 64 << 10 };
/// What is tried when the limit on locked memory is small: with the KEKs' page this stays below 64 KiB, the limit of old systems.
const SMALL: (usize, usize) = (8, 4096);
/// Bytes of a header that the wrapping authenticates (docs/FORMAT.md section 5).
pub const DEK_AAD_LEN: usize = 68;
/// Bytes of a wrapped DEK: ciphertext and tag.
pub const SEALED_DEK_LEN: usize = 32 + TAG_LEN;

/// Why a key was not to be had.
#[derive(Debug, thiserror::Error)]
pub enum KeyringError {
    /// The ring is closed.
    #[error("the keys of this volume have been wiped ({0})")]
    Sealed(SealReason),
    /// The header names a KEK version that this ring does not hold or must not use.
    #[error("wrapped under KEK version {version} of scope {scope}, which is not usable here")]
    NoSuchKek {
        /// Scope.
        scope: u32,
        /// Version.
        version: u32,
    },
    /// The wrapped DEK does not open: damaged, forged, or of another volume.
    #[error("the wrapped data key is not authentic")]
    Unauthentic,
    /// The random number generator failed.
    #[error("no random numbers: {0}")]
    Random(#[from] getrandom::Error),
}

/// Why a ring was closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum SealReason {
    /// Key revoked, suspended or destroyed.
    Revoked,
    /// The lease ran out while the KMS could not be reached.
    Expired,
    /// The mount ended.
    Unmounted,
}

impl std::fmt::Display for SealReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Revoked => "key revoked",
            Self::Expired => "lease expired",
            Self::Unmounted => "unmounted",
        })
    }
}

/// The authenticated claim to an object's keys: identity and wrapped DEK, no secret.
#[derive(Clone)]
pub struct Dek {
    object: ObjectId,
    scope: u32,
    version: u32,
    aad: [u8; DEK_AAD_LEN],
    nonce: [u8; NONCE_LEN],
    sealed: [u8; SEALED_DEK_LEN],
}

impl Dek {
    /// The object.
    pub fn object(&self) -> ObjectId {
        self.object
    }

    /// Scope and version of the KEK that it is wrapped under.
    pub fn kek(&self) -> (u32, u32) {
        (self.scope, self.version)
    }

    /// The authenticated part of the header, as it was given.
    pub fn aad(&self) -> &[u8; DEK_AAD_LEN] {
        &self.aad
    }

    /// The nonce of the wrapping.
    pub fn nonce(&self) -> &[u8; NONCE_LEN] {
        &self.nonce
    }

    /// The wrapped DEK.
    pub fn sealed(&self) -> &[u8; SEALED_DEK_LEN] {
        &self.sealed
    }

    /// Where the arena keeps the keys: the tag is unique to the wrapping.
    fn slot_tag(&self) -> u128 {
        let Some(tag) = self.sealed.last_chunk() else { unreachable!("48 bytes hold 16") };
        u128::from_le_bytes(*tag)
    }
}

/// A header's claim that has not been checked yet.
pub struct UnverifiedDek<'a> {
    /// The object it says it is.
    pub object: ObjectId,
    /// The scope of the KEK.
    pub scope: u32,
    /// The version of the KEK.
    pub version: u32,
    /// The authenticated part of the header.
    pub aad: &'a [u8; DEK_AAD_LEN],
    /// Nonce of the wrapping.
    pub nonce: &'a [u8; NONCE_LEN],
    /// The wrapped DEK.
    pub sealed: &'a [u8; SEALED_DEK_LEN],
}

/// An object's keys, for the time of a closure.
pub struct ObjectKeys<'a>(&'a [u8; SLOT_LEN]);

impl ObjectKeys<'_> {
    /// The cipher for this purpose.
    pub fn cipher(&self, label: DekLabel) -> Cipher {
        let at = offset(label);
        let Some(key) = self.0[at..].first_chunk() else { unreachable!("four keys a slot") };
        Cipher::new(key)
    }
}

fn offset(label: DekLabel) -> usize {
    32 * match label {
        DekLabel::Content => 0,
        DekLabel::Header => 1,
        DekLabel::Name => 2,
        DekLabel::Xattr => 3,
    }
}

/// Keys of one KEK version: the KEK, its wrapping key, its volume file key, its log key.
struct KekSlot {
    scope: u32,
    version: u32,
}

struct Keks {
    arena: Arena,
    held: Vec<KekSlot>,
    current: (u32, u32),
    lowest: u32,
}

impl Keks {
    fn take_in(&mut self, volume: &VolumeId, scope: u32, version: u32, kek: &Key32) {
        let filled = self.arena.insert(kek_tag(scope, version), |slot| {
            kek.expose(|bytes| {
                slot[..32].copy_from_slice(bytes);
                derive(bytes, KekLabel::Wrap, volume, scope, version, &mut slot[32..64]);
                derive(bytes, KekLabel::Volume, volume, scope, version, &mut slot[64..96]);
                derive(bytes, KekLabel::Log, volume, scope, version, &mut slot[96..128]);
            });
            Ok::<_, std::convert::Infallible>(())
        });
        let Ok(()) = filled;
        self.held.retain(|held| (held.scope, held.version) != (scope, version));
        self.held.push(KekSlot { scope, version });
    }
}

/// The keys of one volume. See the module's text.
pub struct Keyring {
    volume: VolumeId,
    closed: AtomicU8,
    keks: RwLock<Keks>,
    shards: Vec<RwLock<Arena>>,
}

impl Keyring {
    /// A ring without keys.
    ///
    /// # Errors
    /// No locked memory to be had.
    pub fn new(volume: VolumeId) -> io::Result<Self> {
        let build = |(shards, bytes): (usize, usize)| -> io::Result<Vec<_>> {
            (0..shards).map(|_| Arena::new(bytes).map(RwLock::new)).collect()
        };
        let shards = build((SHARDS, SHARD_BYTES)).or_else(|_| build(SMALL))?;
        let keks = Keks { arena: Arena::new(4096)?, held: Vec::new(), current: (0, 0), lowest: 1 };
        Ok(Self { volume, closed: AtomicU8::new(0), keks: RwLock::new(keks), shards })
    }

    /// Takes a KEK in. The last one admitted as `current` wraps new DEKs.
    ///
    /// # Errors
    /// [`KeyringError::Sealed`].
    pub fn admit(&self, scope: u32, version: u32, kek: &Key32, current: bool) -> Result<(), KeyringError> {
        let mut keks = self.keks_mut()?;
        keks.take_in(&self.volume, scope, version, kek);
        if current {
            keks.current = (scope, version);
        }
        Ok(())
    }

    /// Opens a wiped ring again with these KEKs, the last of which is current. An open ring stays as it is.
    pub fn reopen(&self, keks: &[(u32, u32, &Key32)]) {
        let mut held = write(&self.keks);
        if self.sealed().is_none() {
            return;
        }
        held.held.clear();
        for (scope, version, kek) in keks {
            held.take_in(&self.volume, *scope, *version, kek);
            held.current = (*scope, *version);
        }
        // Under the guard: a wipe that comes now waits for it, and finds what was taken in.
        self.closed.store(0, Ordering::SeqCst);
    }

    /// Refuses objects wrapped under lower KEK versions from now on.
    pub fn set_lowest_version(&self, version: u32) {
        write(&self.keks).lowest = version;
    }

    /// A new object's DEK, wrapped under the current KEK. `aad` builds the authenticated part of its header from scope
    /// and version.
    ///
    /// # Errors
    /// Any [`KeyringError`].
    pub fn make(&self, object: ObjectId, aad: impl FnOnce(u32, u32) -> [u8; DEK_AAD_LEN]) -> Result<Dek, KeyringError> {
        self.wrap(object, &Key32::random()?, aad)
    }

    /// An object's DEK once more, wrapped under the current KEK. `aad` as for [`make`](Self::make).
    ///
    /// # Errors
    /// Any [`KeyringError`].
    pub fn rewrap(&self, dek: &Dek, aad: impl FnOnce(u32, u32) -> [u8; DEK_AAD_LEN]) -> Result<Dek, KeyringError> {
        self.wrap(dek.object, &self.unwrap(dek)?, aad)
    }

    fn wrap(
        &self,
        object: ObjectId,
        dek: &Key32,
        aad: impl FnOnce(u32, u32) -> [u8; DEK_AAD_LEN],
    ) -> Result<Dek, KeyringError> {
        let nonce = random::nonce()?;
        let sealed = {
            let keks = self.keks()?;
            let (scope, version) = keks.current;
            let aad = aad(scope, version);
            let cipher = wrap_cipher(&keks, scope, version)?;
            let mut sealed = [0; SEALED_DEK_LEN];
            let (body, tag) = sealed.split_at_mut(32);
            let full = full_aad(&self.volume, &aad);
            tag.copy_from_slice(&dek.expose(|bytes| cipher.seal_into(&nonce, &full, bytes, body)));
            Dek { object, scope, version, aad, nonce, sealed }
        };
        self.store(&sealed, dek)?;
        Ok(sealed)
    }

    /// Checks a header's claim by unwrapping its DEK.
    ///
    /// # Errors
    /// Any [`KeyringError`]; nothing is believed then.
    pub fn verify(&self, claim: &UnverifiedDek<'_>) -> Result<Dek, KeyringError> {
        let dek = Dek {
            object: claim.object,
            scope: claim.scope,
            version: claim.version,
            aad: *claim.aad,
            nonce: *claim.nonce,
            sealed: *claim.sealed,
        };
        let key = self.unwrap(&dek)?;
        self.store(&dek, &key)?;
        Ok(dek)
    }

    /// Runs `f` with the object's keys. See the module's text for what `f` may do.
    ///
    /// # Errors
    /// Any [`KeyringError`].
    pub fn with_keys<T>(&self, dek: &Dek, f: impl FnOnce(&ObjectKeys<'_>) -> T) -> Result<T, KeyringError> {
        let tag = dek.slot_tag();
        loop {
            {
                let shard = read(self.shard(tag));
                // Inside the guard: a wipe closes first and then takes every guard.
                self.check_open()?;
                if let Some(slot) = shard.find(tag) {
                    return Ok(f(&ObjectKeys(slot)));
                }
            }
            let key = self.unwrap(dek)?;
            self.store(dek, &key)?;
        }
    }

    /// HMAC-SHA-256 under the volume file key of a KEK version.
    ///
    /// # Errors
    /// Any [`KeyringError`].
    pub fn volume_mac(&self, scope: u32, version: u32, message: &[&[u8]]) -> Result<[u8; 32], KeyringError> {
        let keks = self.keks()?;
        let slot = keks.arena.find(kek_tag(scope, version)).ok_or(KeyringError::NoSuchKek { scope, version })?;
        let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(&slot[64..96]) else { unreachable!("HMAC takes any key") };
        for part in message {
            mac.update(part);
        }
        Ok(mac.finalize().into_bytes().into())
    }

    /// Runs `f` with the cipher of the intent log under a KEK version. See the module's text for what `f` may do.
    ///
    /// # Errors
    /// Any [`KeyringError`].
    pub fn with_log_key<T>(&self, scope: u32, version: u32, f: impl FnOnce(&Cipher) -> T) -> Result<T, KeyringError> {
        let keks = self.keks()?;
        let slot = keks.arena.find(kek_tag(scope, version)).ok_or(KeyringError::NoSuchKek { scope, version })?;
        let Some(key) = slot[96..].first_chunk() else { unreachable!("four keys a slot") };
        Ok(f(&Cipher::new(key)))
    }

    /// Scope and version of the KEK that wraps new DEKs.
    pub fn current(&self) -> (u32, u32) {
        read(&self.keks).current
    }

    /// The KEK versions held.
    pub fn held(&self) -> Vec<(u32, u32)> {
        read(&self.keks).held.iter().map(|held| (held.scope, held.version)).collect()
    }

    /// Closes the ring and wipes every key. When this returns no closure runs and none will, until somebody opens the ring
    /// [again](Self::reopen). Whether it was open.
    pub fn wipe(&self, reason: SealReason) -> bool {
        let code = match reason {
            SealReason::Revoked => 1,
            SealReason::Expired => 2,
            SealReason::Unmounted => 3,
        };
        // The newer reason counts: an expired lease may turn out to be a revoked key.
        let was_open = self.closed.swap(code, Ordering::SeqCst) == 0;
        write(&self.keks).arena.wipe();
        for shard in &self.shards {
            write(shard).wipe();
        }
        was_open
    }

    /// Why the ring is closed, if it is.
    pub fn sealed(&self) -> Option<SealReason> {
        match self.closed.load(Ordering::SeqCst) {
            0 => None,
            1 => Some(SealReason::Revoked),
            2 => Some(SealReason::Expired),
            _ => Some(SealReason::Unmounted),
        }
    }

    /// How key memory is protected, and how many objects' keys it holds.
    pub fn memory(&self) -> (&'static str, usize) {
        let protection = read(&self.keks).arena.protection();
        (protection, self.shards.iter().map(|shard| read(shard).len()).sum())
    }

    fn unwrap(&self, dek: &Dek) -> Result<Key32, KeyringError> {
        let keks = self.keks()?;
        if dek.version < keks.lowest {
            return Err(KeyringError::NoSuchKek { scope: dek.scope, version: dek.version });
        }
        let cipher = wrap_cipher(&keks, dek.scope, dek.version)?;
        let Some((body, tag)) = dek.sealed.split_last_chunk() else { unreachable!("48 bytes hold 16") };
        let aad = full_aad(&self.volume, &dek.aad);
        Key32::fill_with(|key| cipher.open_into(&dek.nonce, &aad, body, tag, key))
            .map_err(|_| KeyringError::Unauthentic)
    }

    fn store(&self, dek: &Dek, key: &Key32) -> Result<(), KeyringError> {
        let tag = dek.slot_tag();
        let mut shard = write(self.shard(tag));
        self.check_open()?;
        shard.insert(tag, |slot| {
            key.expose(|bytes| {
                for label in [DekLabel::Content, DekLabel::Header, DekLabel::Name, DekLabel::Xattr] {
                    let Some(out) = slot[offset(label)..].first_chunk_mut() else { unreachable!("four keys a slot") };
                    kdf::from_dek(bytes, label, &dek.object, out);
                }
            });
            Ok(())
        })
    }

    fn shard(&self, tag: u128) -> &RwLock<Arena> {
        &self.shards[(tag % self.shards.len() as u128) as usize]
    }

    fn check_open(&self) -> Result<(), KeyringError> {
        self.sealed().map_or(Ok(()), |reason| Err(KeyringError::Sealed(reason)))
    }

    fn keks(&self) -> Result<RwLockReadGuard<'_, Keks>, KeyringError> {
        let keks = read(&self.keks);
        self.check_open()?;
        Ok(keks)
    }

    fn keks_mut(&self) -> Result<RwLockWriteGuard<'_, Keks>, KeyringError> {
        let keks = write(&self.keks);
        self.check_open()?;
        Ok(keks)
    }
}

/// The public commitment to a KEK, checked before it is admitted.
pub fn commitment(volume: &VolumeId, scope: u32, version: u32, kek: &Key32) -> [u8; 32] {
    public(volume, KekLabel::Commit, scope, version, kek)
}

/// The public check value of a canary.
pub fn canary_check(volume: &VolumeId, scope: u32, version: u32, canary: &Key32) -> [u8; 32] {
    public(volume, KekLabel::Canary, scope, version, canary)
}

/// Equality in constant time.
pub fn same(a: &[u8; 32], b: &[u8; 32]) -> bool {
    a.ct_eq(b).into()
}

fn public(volume: &VolumeId, label: KekLabel, scope: u32, version: u32, key: &Key32) -> [u8; 32] {
    let mut out = [0; 32];
    key.expose(|bytes| kdf::from_kek(bytes, label, volume, scope, version, &mut out));
    out
}

fn derive(kek: &[u8; 32], label: KekLabel, volume: &VolumeId, scope: u32, version: u32, out: &mut [u8]) {
    let Some(out) = out.first_chunk_mut() else { unreachable!("32 bytes") };
    kdf::from_kek(kek, label, volume, scope, version, out);
}

fn kek_tag(scope: u32, version: u32) -> u128 {
    u128::from(scope) << 32 | u128::from(version)
}

fn wrap_cipher(keks: &Keks, scope: u32, version: u32) -> Result<Cipher, KeyringError> {
    let slot = keks.arena.find(kek_tag(scope, version)).ok_or(KeyringError::NoSuchKek { scope, version })?;
    let Some(key) = slot[32..].first_chunk() else { unreachable!("four keys a slot") };
    Ok(Cipher::new(key))
}

fn full_aad(volume: &VolumeId, header: &[u8; DEK_AAD_LEN]) -> Vec<u8> {
    [b"lethefs/1/dek".as_slice(), &volume.0, header].concat()
}

// A poisoned lock means that a closure panicked; with panic=abort in every profile that runs, nobody sees one.
fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
