use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;

fn ring() -> Keyring {
    let ring = Keyring::new(VolumeId([1; 16])).unwrap();
    ring.admit(0, 1, &Key32::random().unwrap(), true).unwrap();
    ring
}

fn seal(ring: &Keyring, dek: &Dek) -> Result<Vec<u8>, KeyringError> {
    ring.with_keys(dek, |keys| keys.cipher(DekLabel::Content).seal(&[0; 12], b"", b"forget me"))
}

#[test]
fn keys_survive_eviction() {
    let ring = ring();
    let dek = ring.make(ObjectId([2; 16]), |_, _| [0; DEK_AAD_LEN]).unwrap();
    let before = seal(&ring, &dek).unwrap();
    for n in 0..20_000_u32 {
        let mut id = [0; 16];
        id[..4].copy_from_slice(&n.to_le_bytes());
        ring.make(ObjectId(id), |_, _| [0; DEK_AAD_LEN]).unwrap();
    }
    assert!(ring.memory().1 <= SHARDS * SHARD_BYTES / SLOT_LEN);
    assert_eq!(seal(&ring, &dek).unwrap(), before);
}

#[test]
fn a_claim_is_believed_only_as_it_was_sealed() {
    let ring = ring();
    let dek = ring.make(ObjectId([2; 16]), |_, _| [5; DEK_AAD_LEN]).unwrap();
    let claim =
        |aad, sealed| UnverifiedDek { object: dek.object, scope: 0, version: 1, aad, nonce: &dek.nonce, sealed };
    assert!(ring.verify(&claim(&dek.aad, &dek.sealed)).is_ok());
    let mut aad = dek.aad;
    aad[10] ^= 1;
    // The keys are in the arena under this very tag: only the check itself can refuse.
    assert!(matches!(ring.verify(&claim(&aad, &dek.sealed)), Err(KeyringError::Unauthentic)));
    let mut sealed = dek.sealed;
    sealed[3] ^= 1;
    assert!(matches!(ring.verify(&claim(&dek.aad, &sealed)), Err(KeyringError::Unauthentic)));
}

#[test]
fn lower_versions_are_refused() {
    let ring = ring();
    let old = ring.make(ObjectId([2; 16]), |_, _| [0; DEK_AAD_LEN]).unwrap();
    ring.admit(0, 2, &Key32::random().unwrap(), true).unwrap();
    ring.set_lowest_version(2);
    let claim = UnverifiedDek {
        object: old.object,
        scope: 0,
        version: 1,
        aad: &old.aad,
        nonce: &old.nonce,
        sealed: &old.sealed,
    };
    assert!(matches!(ring.verify(&claim), Err(KeyringError::NoSuchKek { version: 1, .. })));
}

#[test]
fn a_wipe_waits_for_closures_and_ends_them_all() {
    let ring = ring();
    let dek = ring.make(ObjectId([2; 16]), |_, _| [0; DEK_AAD_LEN]).unwrap();
    let inside = Barrier::new(2);
    let leave = Barrier::new(2);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            ring.with_keys(&dek, |_| {
                inside.wait();
                leave.wait();
                done.store(true, Ordering::SeqCst);
            })
            .unwrap();
        });
        inside.wait();
        let wiper = scope.spawn(|| {
            ring.wipe(SealReason::Revoked);
            assert!(done.load(Ordering::SeqCst), "wipe returned while a closure still ran");
        });
        leave.wait();
        wiper.join().unwrap();
    });
    assert!(matches!(seal(&ring, &dek), Err(KeyringError::Sealed(SealReason::Revoked))));
    assert!(ring.make(ObjectId([3; 16]), |_, _| [0; DEK_AAD_LEN]).is_err());
    assert_eq!(ring.memory().1, 0);
}
