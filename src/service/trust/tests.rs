//! What a pin lets pass and what it does not, on bodies in memory.

use super::*;
use crate::crypto::ObjectId;
use crate::kms::Wrapped;
use crate::volume::meta::{KekRecord, Scope};

fn transit(key: &str, created: i64) -> KeyIdentity {
    KeyIdentity::Transit {
        engine: "transit".into(),
        engine_uuid: "u".into(),
        key: key.into(),
        namespace: String::new(),
        key_version: 1,
        key_version_created: created,
        cluster_id: "c".into(),
        key_type: "aes256-gcm96".into(),
    }
}

fn body(identity: KeyIdentity) -> Body {
    let slot = Slot {
        id: 1,
        created: "2026-01-01T00:00:00Z".into(),
        identity,
        wrapped: Wrapped("w".into()),
        canary: Wrapped("c".into()),
        canary_check: "0".repeat(64),
    };
    let kek = KekRecord {
        version: 1,
        state: KeyState::Active,
        created: "2026-01-01T00:00:00Z".into(),
        commitment: "ab".repeat(32),
        slots: vec![slot],
    };
    Body {
        magic: "lethefs".into(),
        format: 1,
        volume_id: VolumeId([1; 16]),
        label: "vol\u{e9}".into(),
        created: "2026-01-01T00:00:00Z".into(),
        generation: 3,
        incompat: vec![],
        compat: vec![],
        root_id: ObjectId([2; 16]),
        scopes: vec![Scope { id: 0, current: 1, keks: vec![kek] }],
    }
}

fn found(body: &Body) -> Found {
    Found { pin: Pin::of(body, |slot| rebuilt_uri(&slot.identity)), path: "/pin".into() }
}

#[test]
fn the_pins_own_volume_passes_with_the_pins_uri() {
    let body = body(transit("vol1", 7));
    let mut found = found(&body);
    found.pin.keks[0].slots[0].uri = "file:///elsewhere".parse().expect("uri");
    let usable = verify(&found, &body).expect("agrees");
    assert_eq!(usable[0].uri.to_string(), "file:///elsewhere");
}

#[test]
fn whatever_names_another_key_is_refused() {
    let genuine = body(transit("vol1", 7));
    let pin = found(&genuine);
    let mut forged = vec![body(transit("attacker", 7)), body(transit("vol1", 8))];
    forged.push(body(KeyIdentity::File { key_id: VolumeId([9; 16]), created: "x".into() }));
    let mut commitment = genuine.clone();
    commitment.scope_mut().keks[0].commitment = "cd".repeat(32);
    let mut volume = genuine.clone();
    volume.volume_id = VolumeId([7; 16]);
    let mut version = genuine.clone();
    version.scope_mut().current = 2;
    version.scope_mut().keks[0].version = 2;
    forged.extend([commitment, volume, version]);
    for body in forged {
        assert!(matches!(verify(&pin, &body), Err(TrustError::Differs { .. })), "{body:?}");
    }
}

#[test]
fn generations_and_versions_only_rise() {
    let mut body = body(transit("vol1", 7));
    let mut pin = found(&body);
    body.generation = 2;
    assert!(matches!(verify(&pin, &body), Err(TrustError::Older { found: 2, pinned: 3, .. })));
    body.generation = 9;
    pin.pin.refresh(&body);
    assert_eq!((pin.pin.generation, pin.pin.keks.len(), pin.pin.slots().count()), (9, 1, 1));
    pin.pin.lowest_version = 2;
    assert!(matches!(verify(&pin, &body), Err(TrustError::Differs { .. })));
}

#[test]
fn a_uri_is_rebuilt_only_from_names_that_parse() {
    assert_eq!(
        rebuilt_uri(&transit("vol1", 7)).map(|uri| uri.to_string()).as_deref(),
        Some("hashivault://vol1?engine=transit")
    );
    for key in ["../sys/seal", "a/b", "", "x\n", "k?engine=other"] {
        assert!(rebuilt_uri(&transit(key, 7)).is_none(), "{key:?}");
    }
    assert!(rebuilt_uri(&KeyIdentity::File { key_id: VolumeId([9; 16]), created: "x".into() }).is_none());
}

#[test]
fn what_a_file_claims_is_printed_harmlessly() {
    let text = no_pin(&body(transit("a\n\u{1b}[2Jb", 7))).to_string();
    assert!(!text.chars().any(char::is_control), "{text:?}");
    assert!(text.contains("no key service was asked"));
}
