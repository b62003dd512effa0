//! What a pin lets pass and what it does not, on bodies in memory.

use super::*;
use crate::crypto::ObjectId;
use crate::kms::Wrapped;
use crate::volume::meta::{Extra, KekRecord, Scope};

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
        extra: Extra::new(),
    };
    let kek = KekRecord {
        version: 1,
        state: KeyState::Active,
        created: "2026-01-01T00:00:00Z".into(),
        commitment: "ab".repeat(32),
        slots: vec![slot],
        extra: Extra::new(),
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
        scopes: vec![Scope { id: 0, current: 1, keks: vec![kek], extra: Extra::new() }],
        extra: Extra::new(),
    }
}

fn found(body: &Body) -> Found {
    Found { pin: Pin::of(body, |slot| slot.identity.uri()), path: "/pin".into() }
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
        transit("vol1", 7).uri().map(|uri| uri.to_string()).as_deref(),
        Some("hashivault://vol1?engine=transit")
    );
    for key in ["../sys/seal", "a/b", "", "x\n", "k?engine=other"] {
        assert!(transit(key, 7).uri().is_none(), "{key:?}");
    }
    assert!(KeyIdentity::File { key_id: VolumeId([9; 16]), created: "x".into() }.uri().is_none());
}

#[test]
fn what_a_file_claims_is_printed_harmlessly() {
    let text = no_pin(&body(transit("a\n\u{1b}[2Jb", 7))).to_string();
    assert!(!text.chars().any(char::is_control), "{text:?}");
    assert!(text.contains("no key service was asked"));
}

/// A slot of a service that comes later is no reason not to open the volume by another one, and is kept.
#[test]
fn a_slot_of_an_unknown_service_is_kept_and_never_used() {
    let mut body = body(transit("k", 5));
    let foreign = serde_json::json!({ "provider": "moonkms", "vault": { "crater": 7 } });
    let mut slot = body.scope().keks[0].slots[0].clone();
    slot.id = 2;
    slot.identity = serde_json::from_value(foreign.clone()).expect("kept");
    slot.extra.insert("since".into(), "later".into());
    body.scope_mut().keks[0].slots.insert(0, slot);
    let text = serde_json::to_string(&body).expect("JSON");
    let read: Body = serde_json::from_str(&text).expect("read");
    assert_eq!(read, body);
    assert_eq!(serde_json::to_value(&read.scope().keks[0].slots[0].identity).expect("JSON"), foreign);
    let found = found(&body);
    assert!(found.pin.slots().all(|(_, _, slot)| matches!(slot.identity, KeyIdentity::Transit { .. })));
    assert_eq!(verify(&found, &read).expect("usable").len(), 1);
    assert!(keys_of(&read).contains("moonkms"), "{}", keys_of(&read));
    // Of a service that is known every field must be.
    for known in [serde_json::json!({ "provider": "file" }), serde_json::json!({ "provider": "transit", "key": "k" })] {
        assert!(serde_json::from_value::<KeyIdentity>(known).is_err());
    }
    assert!(serde_json::from_value::<KeyIdentity>(serde_json::json!({ "key": "k" })).is_err());
}

#[test]
fn pins_of_the_same_file_are_joined() {
    let slot = |id: u32| PinnedSlot {
        id,
        uri: format!("file:///k{id}").parse().unwrap(),
        identity: KeyIdentity::File { key_id: VolumeId([id as u8; 16]), created: String::new() },
    };
    let pin = |slots: Vec<PinnedSlot>| Pin {
        schema: SCHEMA,
        volume_id: VolumeId([1; 16]),
        label: String::new(),
        generation: 2,
        lowest_version: 1,
        keks: vec![PinnedKek { scope: 0, version: 1, commitment: "c".into(), slots }],
    };
    let mut one = pin(vec![slot(3), slot(1)]);
    one.join(&pin(vec![slot(1), slot(2)]));
    assert_eq!(one, pin(vec![slot(1), slot(2), slot(3)]));
    let mut foreign = pin(vec![slot(4)]);
    foreign.keks[0].commitment = "d".into();
    one.join(&foreign);
    assert_eq!(one, pin(vec![slot(1), slot(2), slot(3)]), "of another KEK");
}
