//! Keys that are deleted, suspended, trimmed, re-created, unsuitable, or moved with their engine.

use lethefs::kms::transit::Transit;
use lethefs::kms::uri::TransitKey;
use lethefs::kms::{Binding, Failure, KeyAdmin, KeyIdentity, KeySource, Wrapped};
use reqwest::Method;
use serde_json::{Value, json};

use super::{Case, expect};
use crate::openbao::{Server, Storage, wait_for};
use crate::{BINDING, config, error, failure, key, token, transit};

const NOT_FOUND: &str = r#"400 {"errors":["encryption key not found"]}"#;
const NOTHING: &str = r#"404 {"errors":[]}"#;

#[test]
fn each_state_of_a_key_has_its_class() {
    let server = &Server::start(Storage::Memory);

    // One request for an unwrap, and what it showed in clear is in no log.
    let case = Case::new(server, "fine");
    let before = server.audit().len();
    case.unwrap_as(&case.host).expect("unwrapped");
    assert_eq!(server.audit()[before..], ["update transit/decrypt/fine"]);
    case.made.key.expose(|bytes| {
        use base64::Engine as _;
        let text = base64::engine::general_purpose::STANDARD.encode(bytes);
        assert!(!server.audit_text().contains(&text));
    });
    let KeyIdentity::Transit { key_version_created, cluster_id, .. } = &case.made.identity else {
        panic!("not Transit")
    };
    let info = server.get("transit/keys/fine");
    assert_eq!(info["keys"]["1"], *key_version_created, "creation time of a derived key");
    assert_eq!(server.must(Method::GET, "sys/health", Value::Null)["cluster_id"], *cluster_id.as_str());

    // Deleted: every part of the rule, verbatim.
    let case = Case::new(server, "deleted");
    server.delete_key("deleted");
    expect(&case, Failure::Destroyed, &["is destroyed", NOT_FOUND, NOTHING, "GET sys/health: 200 {"]);
    let proof = case.prove().expect("proof");
    let asked: Vec<_> = proof.findings.iter().map(|f| f.asked.split(' ').next().expect("verb")).collect();
    assert_eq!(asked, ["TLS", "GET", "GET", "POST", "GET"]);
    // The administrator may not decrypt, so the proof comes by way of rewrap.
    assert_eq!(
        (proof.findings[3].asked.as_str(), proof.findings[3].answered.as_str()),
        ("POST transit/rewrap/deleted", NOT_FOUND)
    );
    assert_eq!(
        (proof.findings[4].asked.as_str(), proof.findings[4].answered.as_str()),
        ("GET transit/keys/deleted", NOTHING)
    );
    let by_host = case.host.prove_destroyed(&case.made.identity, None).expect("proof without a probe");
    assert_eq!(by_host.findings[3].asked, "POST transit/decrypt/deleted");
    assert_eq!(failure("make under a deleted key", case.host.make(&BINDING)), Failure::Missing);
    assert_eq!(failure("suspend a deleted key", case.admin.suspend(&case.made.identity)), Failure::Missing);
    assert_eq!(failure("restore a deleted key", case.admin.restore()), Failure::Missing);

    // … and each part that is missing makes it Missing.
    for (name, other, words) in [
        ("cluster", case.changed(|cluster, _| *cluster = "another".into()), "is another cluster"),
        ("engine", case.changed(|_, uuid| *uuid = "another".into()), "the recorded one was moved or removed"),
    ] {
        let error = error(name, case.host.unwrap(&BINDING, &case.made.wrapped, &other));
        assert_eq!(error.failure, Failure::Missing, "{name}");
        assert!(error.message.contains(words), "{name}: {error}");
        assert_eq!(failure(name, case.admin.prove_destroyed(&other, None)), Failure::NotDestroyed, "{name}");
        assert_eq!(failure(name, case.admin.destroy(&other)), Failure::Recreated, "{name}");
    }
    server.policy("no-read", r#"path "transit/decrypt/deleted" { capabilities = ["update"] }"#);
    let no_read = transit(server, "deleted", token(&server.token(&["no-read"], "1h")));
    let said = error("no read", case.unwrap_as(&no_read));
    assert_eq!(said.failure, Failure::Missing, "{said}");
    assert!(said.message.contains("no policy lets these credentials"), "{said}");
    server.policy("only-read", r#"path "transit/keys/deleted" { capabilities = ["read"] }"#);
    let only_read = transit(server, "deleted", token(&server.token(&["only-read"], "1h")));
    let said = error("proof", only_read.prove_destroyed(&case.made.identity, None));
    assert_eq!(said.failure, Failure::NotDestroyed, "{said}");
    assert!(said.message.contains("neither decrypt nor rewrap"), "{said}");

    // Suspended: soft-deleted, or below the minimum version.
    let case = Case::new(server, "soft");
    server.delete("transit/keys/soft/soft-delete");
    expect(&case, Failure::Suspended, &["restore", "refusing to use soft-deleted key"]);
    assert_eq!(failure("make", case.host.make(&BINDING)), Failure::Suspended);
    let said = error("proof", case.prove());
    assert!(said.message.contains("only soft-deleted"), "{said}");

    let case = Case::new(server, "minimum");
    server.rotate_key("minimum");
    server.configure_key("minimum", json!({ "min_decryption_version": 2, "min_encryption_version": 2 }));
    expect(&case, Failure::Suspended, &["min_decryption_version", "too old"]);
    // The age of version 1 is hidden now, so nobody can say which key this is.
    let said = error("destroy", case.admin.destroy(&case.made.identity));
    assert_eq!(said.failure, Failure::Suspended, "{said}");
    assert!(said.message.contains("min_decryption_version=1`; nothing was changed"), "{said}");
    assert_eq!(server.get("transit/keys/minimum")["deletion_allowed"], false);
    server.configure_key("minimum", json!({ "min_decryption_version": 1 }));
    case.unwrap_as(&case.host).expect("lowered again");
    // Trimmed: the same words, for good.
    server.configure_key("minimum", json!({ "min_decryption_version": 2 }));
    server.put("transit/keys/minimum/trim", json!({ "min_available_version": 2 }));
    expect(&case, Failure::Destroyed, &["trimmed away", "\"min_available_version\":2"]);
    let other = case.changed(|cluster, _| *cluster = "another".into());
    assert_eq!(failure("trimmed", case.host.unwrap(&BINDING, &case.made.wrapped, &other)), Failure::Missing);
    // A version number that somebody put into a wrapped key of version 2 must not look like that.
    let second = case.host.make(&BINDING).expect("version 2");
    assert!(second.wrapped.0.starts_with("vault:v2:"), "{:?}", second.wrapped);
    let forged = Wrapped(second.wrapped.0.replacen("v2", "v1", 1));
    assert_eq!(failure("forged version", case.host.unwrap(&BINDING, &forged, &second.identity)), Failure::BadData);
    assert_eq!(failure("destroy, trimmed", case.admin.destroy(&case.made.identity)), Failure::Unsuitable);

    // Re-created under the same name.
    let case = Case::new(server, "again");
    server.rotate_key("again");
    let second = case.host.make(&BINDING).expect("version 2");
    server.let_a_second_pass("again");
    server.delete_key("again");
    server.create_key("again");
    expect(&case, Failure::Recreated, &["another was made under its name"]);
    let too_new = error("too new", case.host.unwrap(&BINDING, &second.wrapped, &second.identity));
    assert_eq!(too_new.failure, Failure::Recreated, "{too_new}");
    for identity in [&case.made.identity, &second.identity] {
        let said = error("destroy", case.admin.destroy(identity));
        assert_eq!(said.failure, Failure::Recreated, "{said}");
        assert!(said.message.contains("nothing was changed"), "{said}");
        assert_eq!(server.get("transit/keys/again")["deletion_allowed"], false);
    }
    let said = error("proof", case.prove());
    assert_eq!(said.failure, Failure::NotDestroyed, "{said}");
    assert!(said.message.contains("another key was made under the name"), "{said}");
    server.delete_key("again");
    case.prove().expect("proof once the second is gone too");
    expect(&case, Failure::Destroyed, &[]);

    // Bad data, with the key as it was.
    let case = Case::new(server, "bad");
    let elsewhere = Binding { version: 2, ..BINDING };
    for (words, wrapped) in [
        ("", case.made.wrapped.0.replacen("v1", "v7", 1)),
        ("", format!("{}AAAA", case.made.wrapped.0)),
        ("", "vault:v1:%%%%".to_owned()),
        ("", "vault:v1:AAAA".to_owned()),
        ("does not have the form", "vault:v0:AAAA".to_owned()),
        ("does not have the form", "sealed".to_owned()),
    ] {
        let said = error(&wrapped, case.host.unwrap(&BINDING, &Wrapped(wrapped.clone()), &case.made.identity));
        assert_eq!(said.failure, Failure::BadData, "{wrapped}: {said} {:?}", said.detail);
        assert!(said.message.contains(words), "{wrapped}: {said}");
    }
    assert_eq!(
        failure("place", case.host.unwrap(&elsewhere, &case.made.wrapped, &case.made.identity)),
        Failure::BadData
    );
    // … or recorded for another name or service.
    let wrong = transit(server, "wrong", token(&server.token(&["everything"], "1h")));
    assert_eq!(failure("name", wrong.unwrap(&BINDING, &case.made.wrapped, &case.made.identity)), Failure::Config);
    assert_eq!(failure("name", wrong.destroy(&case.made.identity)), Failure::Config);

    // Keys that must not be used, and what they are warned of.
    for (name, settings) in [
        ("underived", json!({ "type": "aes256-gcm96" })),
        ("convergent", json!({ "type": "aes256-gcm96", "derived": true, "convergent_encryption": true })),
        ("short", json!({ "type": "aes128-gcm96", "derived": true })),
        ("rsa", json!({ "type": "rsa-2048" })),
    ] {
        server.put(&format!("transit/keys/{name}"), settings);
        let client = transit(server, name, token(&server.token(&["everything"], "1h")));
        let said = error(name, client.make(&BINDING));
        assert_eq!(said.failure, Failure::Unsuitable, "{name}: {said}");
        let remedy = format!("`bao write -f transit/keys/{name} type=aes256-gcm96 derived=true`");
        assert!(said.message.contains(&remedy), "{said}");
        KeySource::describe(&client).unwrap_or_else(|e| panic!("{name}: {e}"));
    }
    let settings = json!({ "derived": true, "exportable": true, "allow_plaintext_backup": true });
    server.put("transit/keys/loose", settings);
    let loose = Case::new(server, "loose");
    assert_eq!(KeySource::describe(&loose.host).expect("described").warnings.len(), 2);
    let absent = transit(server, "absent", token(&server.token(&["everything"], "1h")));
    assert!(error("absent", absent.make(&BINDING)).message.contains("bao write -f transit/keys/absent"));
    assert!(!server.get("transit/keys?list=true")["keys"].to_string().contains("absent"), "made a key by asking");

    // Destroying sets what is needed, also on a soft-deleted key.
    for soft in [false, true] {
        let case = Case::new(server, &format!("destroy-{soft}"));
        if soft {
            case.admin.suspend(&case.made.identity).expect("suspended");
        }
        case.admin.destroy(&case.made.identity).expect("destroyed");
        expect(&case, Failure::Destroyed, &[]);
    }

    // The engine is another: moved with its keys alive, made anew, unmounted.
    server.put("sys/mounts/old", json!({ "type": "transit" }));
    server.put("old/keys/moved", json!({ "type": "aes256-gcm96", "derived": true }));
    let everything = server.token(&["everything"], "1h");
    let at = |engine: &str| {
        let key = TransitKey { engine: engine.into(), key: "moved".into(), server: None };
        Transit::new(&key, config(&server.address(), &server.ca(), token(&everything)))
    };
    let made = at("old").make(&BINDING).expect("made");
    server.put("sys/remount", json!({ "from": "old", "to": "new" }));
    wait_for("the move", || {
        let (status, _) = server.ask(&everything, Method::GET, "new/keys/moved", &Value::Null);
        (status == 200).then_some(())
    });
    let said = error("moved", at("old").unwrap(&BINDING, &made.wrapped, &made.identity));
    assert_eq!(said.failure, Failure::Missing, "{said}");
    assert!(said.message.contains("no Transit engine is mounted"), "{said}");
    server.put("sys/mounts/old", json!({ "type": "transit" }));
    let said = error("moved, and made anew", at("old").unwrap(&BINDING, &made.wrapped, &made.identity));
    assert_eq!(said.failure, Failure::Missing, "{said}");
    assert!(said.message.contains("the recorded one was moved or removed"), "{said}");
    assert_eq!(failure("moved", at("old").prove_destroyed(&made.identity, None)), Failure::NotDestroyed);
    assert!(at("new").unwrap(&BINDING, &made.wrapped, &made.identity).expect("alive").same_as(&made.key));
    // At its new place it is still the recorded key.
    at("new").destroy(&made.identity).expect("destroyed");
    at("new").prove_destroyed(&made.identity, None).expect("proved");

    // A rate limit.
    let case = Case::new(server, "limited");
    server.put("sys/quotas/rate-limit/q", json!({ "path": "transit/decrypt/limited", "rate": 1, "interval": "1h" }));
    case.unwrap_as(&case.host).expect("the first");
    expect(&case, Failure::Unavailable, &["429", "rate limit quota exceeded"]);
    server.delete("sys/quotas/rate-limit/q");
    case.unwrap_as(&case.host).expect("without the limit");

    // Words that our own requests meet only in a race with somebody else's.
    server.create_key("words");
    for (method, path, body, status, words) in [
        (Method::DELETE, "transit/keys/words", Value::Null, 400, "deletion is not allowed for this key"),
        (Method::DELETE, "transit/keys/none", Value::Null, 400, "could not delete key; not found"),
        (
            Method::POST,
            "transit/keys/none/config",
            json!({ "deletion_allowed": true }),
            400,
            "no existing key named none ",
        ),
        (Method::DELETE, "transit/keys/words/nonsense", Value::Null, 404, "unsupported path"),
    ] {
        let (got, reply) = server.ask(&everything, method, path, &body);
        let said = reply["errors"][0].as_str().unwrap_or_default().to_owned();
        assert!(got == status && said.contains(words), "{path}: {got} {reply}");
    }

    // A namespace that is not there.
    let mut lost = config(&server.address(), &server.ca(), token(&everything));
    lost.namespace = "lost".to_owned();
    let said = error("namespace", Transit::new(&key("limited"), lost).make(&BINDING));
    assert_eq!(said.failure, Failure::Config, "{said} {:?}", said.detail);
}
