//! What every provider must do, whichever server is behind it.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use lethefs::crypto::VolumeId;
#[cfg(feature = "kms-aws")]
use lethefs::kms::aws::Aws;
use lethefs::kms::file::KeyFile;
use lethefs::kms::pkcs11::Pkcs11;
use lethefs::kms::transit::Transit;
use lethefs::kms::uri::{TokenKey, TransitKey};
use lethefs::kms::{Binding, Destruction, Failure, KeyAdmin, KeyIdentity, KeySource, Purpose, Wrapped};
use reqwest::Method;
use serde_json::json;

use super::openbao::{Server, Storage};
use super::softhsm::{LABEL, Token};
use super::{ADMIN_POLICY, BINDING, HOST_POLICY, WRAP_POLICY, config, documented_policy, failure, token};

/// A provider under test, and what it can do.
struct Provider<'a> {
    name: &'a str,
    host: &'a dyn KeySource,
    /// Whoever may wrap a given key.
    wrapper: &'a dyn KeySource,
    admin: &'a dyn KeyAdmin,
    /// Rotates the key at the service, and rewraps there.
    rotate: Option<&'a dyn Fn(&Wrapped) -> Wrapped>,
    /// Whether it has a reversible state.
    suspends: bool,
    /// Whether it tells what one may do with its key.
    tells: bool,
    /// Whether it tells a mount host's rights from an administrator's.
    separates: bool,
    /// Lets the waiting period of a scheduled destruction pass, if there is one.
    wait: Option<&'a dyn Fn()>,
    /// What an unwrap says once the key is destroyed.
    gone: Failure,
    /// Whether a proof is only our own word.
    self_asserted: bool,
}

fn other_identities(identity: &KeyIdentity) -> Vec<(&'static str, KeyIdentity)> {
    let changed = |change: &dyn Fn(&mut KeyIdentity)| {
        let mut other = identity.clone();
        change(&mut other);
        other
    };
    match identity {
        KeyIdentity::Transit { .. } => vec![
            (
                "cluster",
                changed(&|other| {
                    if let KeyIdentity::Transit { cluster_id, .. } = other {
                        *cluster_id = "another".into();
                    }
                }),
            ),
            (
                "age",
                changed(&|other| {
                    if let KeyIdentity::Transit { key_version_created, .. } = other {
                        *key_version_created -= 1;
                    }
                }),
            ),
            (
                "version",
                changed(&|other| {
                    if let KeyIdentity::Transit { key_version, .. } = other {
                        *key_version += 100;
                    }
                }),
            ),
            (
                "engine",
                changed(&|other| {
                    if let KeyIdentity::Transit { engine_uuid, .. } = other {
                        *engine_uuid = "another".into();
                    }
                }),
            ),
        ],
        KeyIdentity::Pkcs11 { .. } => vec![
            (
                "token",
                changed(&|other| {
                    if let KeyIdentity::Pkcs11 { token_serial, .. } = other {
                        *token_serial = "another".into();
                    }
                }),
            ),
            (
                "check value",
                changed(&|other| {
                    if let KeyIdentity::Pkcs11 { check_value, .. } = other {
                        assert_eq!(check_value.len(), 6, "SoftHSM tells it");
                        *check_value = "000000".into();
                    }
                }),
            ),
        ],
        KeyIdentity::Aws { .. } => vec![(
            "age",
            changed(&|other| {
                if let KeyIdentity::Aws { created, .. } = other {
                    *created -= 1;
                }
            }),
        )],
        KeyIdentity::File { .. } => vec![(
            "id",
            changed(&|other| {
                if let KeyIdentity::File { key_id, .. } = other {
                    *key_id = VolumeId([0; 16]);
                }
            }),
        )],
        KeyIdentity::Recovery { .. } | KeyIdentity::Foreign(_) => panic!("a provider that makes keys of another"),
    }
}

fn run(p: &Provider<'_>) {
    let name = p.name;
    let made = p.host.make(&BINDING).unwrap_or_else(|e| panic!("{name}: make: {e} {:?}", e.detail));
    let unwrap = |case: &str, wrapped: &Wrapped| {
        let key = p.host.unwrap(&BINDING, wrapped, &made.identity);
        let key = key.unwrap_or_else(|e| panic!("{name}: {case}: {e} {:?}", e.detail));
        assert!(key.same_as(&made.key), "{name}: {case}: another key");
    };
    unwrap("made", &made.wrapped);
    let second = p.host.make(&BINDING).expect("make again");
    assert!(!second.key.same_as(&made.key) && second.wrapped != made.wrapped, "{name}: the same key twice");
    assert!(second.identity.same_key(&made.identity), "{name}");

    // A given key: not by a mount host where rights are apart, the same key out again, bound like a made one.
    if p.separates {
        assert_eq!(failure("wrap", p.host.wrap(&BINDING, &made.key)), Failure::Denied, "{name}");
    }
    let given = p.wrapper.wrap(&BINDING, &made.key).unwrap_or_else(|e| panic!("{name}: wrap: {e} {:?}", e.detail));
    assert!(given.identity.same_key(&made.identity) && given.wrapped != made.wrapped, "{name}");
    unwrap("wrapped", &given.wrapped);
    let elsewhere = Binding { purpose: Purpose::Canary, ..BINDING };
    assert_eq!(failure("wrap", p.host.unwrap(&elsewhere, &given.wrapped, &made.identity)), Failure::BadData, "{name}");

    // Bound to its place.
    for (case, binding) in [
        ("volume", Binding { volume: VolumeId([8; 16]), ..BINDING }),
        ("scope", Binding { scope: 1, ..BINDING }),
        ("version", Binding { version: 2, ..BINDING }),
        ("purpose", Binding { purpose: Purpose::Canary, ..BINDING }),
    ] {
        let opened = p.host.unwrap(&binding, &made.wrapped, &made.identity);
        assert_eq!(failure(case, opened), Failure::BadData, "{name}: bound to another {case}");
    }

    // Damaged in any place.
    let text = &made.wrapped.0;
    let mut damaged: Vec<String> = (0..text.len())
        .step_by(7)
        .map(|at| {
            let mut bytes = text.clone().into_bytes();
            bytes[at] = if bytes[at] == b'A' { b'B' } else { b'A' };
            String::from_utf8(bytes).expect("ASCII")
        })
        .collect();
    damaged.extend([String::new(), "x".into(), text[1..].into(), text[..text.len() - 4].into(), format!("{text}AAAA")]);
    damaged.extend(["0", "2", "-1", "99", "99999999999"].map(|version| text.replacen("v1", &format!("v{version}"), 1)));
    for wrapped in damaged {
        let opened = p.host.unwrap(&BINDING, &Wrapped(wrapped.clone()), &made.identity);
        assert_eq!(failure(&wrapped, opened), Failure::BadData, "{name}: damaged {wrapped}");
    }

    // Described alike to both sides.
    for (side, told) in [("host", p.host.describe()), ("admin", p.admin.describe())] {
        let told = told.unwrap_or_else(|e| panic!("{name}: describe as {side}: {e} {:?}", e.detail));
        assert_eq!(told.identity, made.identity, "{name}: {side}");
        assert!(told.quantum_durable, "{name}: {side}");
    }
    let may = p.host.permissions().expect("permissions");
    let yes = p.tells.then_some(true);
    assert_eq!((may.make, may.unwrap, may.describe), (yes, yes, Some(true)), "{name}");
    assert_eq!(may.suspend, p.tells.then_some(p.suspends && !p.separates), "{name}");
    assert_eq!(may.destroy, p.tells.then_some(!p.separates), "{name}");

    if let Some(rotate) = p.rotate {
        let rewrapped = rotate(&made.wrapped);
        assert_ne!(rewrapped, made.wrapped, "{name}: not rewrapped");
        unwrap("rotated", &made.wrapped);
        unwrap("rewrapped at the service", &rewrapped);
    }

    // Not suspended by mistake.
    let before = serde_json::to_value(p.admin.describe().expect("described")).expect("JSON");
    for (case, other) in other_identities(&made.identity) {
        assert_eq!(failure(case, p.admin.suspend(&other)), Failure::Recreated, "{name}: suspend, wrong {case}");
        let after = serde_json::to_value(p.admin.describe().expect("described")).expect("JSON");
        assert_eq!(before, after, "{name}: suspend, wrong {case}: changed");
        unwrap(case, &made.wrapped);
    }

    // Suspended and back.
    for round in ["first", "second"] {
        let suspended =
            p.admin.suspend(&made.identity).unwrap_or_else(|e| panic!("{name}: suspend: {e} {:?}", e.detail));
        assert_eq!(suspended, p.suspends.then_some(Destruction::Suspended), "{name}: {round}");
    }
    if p.suspends {
        let opened = p.host.unwrap(&BINDING, &made.wrapped, &made.identity);
        assert_eq!(failure("suspended", opened), Failure::Suspended, "{name}");
        assert_eq!(failure("make, suspended", p.host.make(&BINDING)), Failure::Suspended, "{name}");
        let proof = p.admin.prove_destroyed(&made.identity, Some((&BINDING, &made.wrapped)));
        assert_eq!(failure("proof, suspended", proof), Failure::NotDestroyed, "{name}");
        p.admin.restore().expect("restored");
        p.admin.restore().expect("restored again");
    } else {
        assert_eq!(failure("restore", p.admin.restore()), Failure::Config, "{name}");
    }
    unwrap("restored", &made.wrapped);

    // Not destroyed, and not destroyable by mistake.
    let probes = [("with probe", Some((&BINDING, &made.wrapped))), ("without probe", None)];
    for (case, probe) in probes {
        assert_eq!(failure(case, p.admin.prove_destroyed(&made.identity, probe)), Failure::NotDestroyed, "{name}");
    }
    let before = serde_json::to_value(p.admin.describe().expect("described")).expect("JSON");
    for (case, other) in other_identities(&made.identity) {
        assert_eq!(failure(case, p.admin.destroy(&other)), Failure::Recreated, "{name}: wrong {case}");
        let after = serde_json::to_value(p.admin.describe().expect("described")).expect("JSON");
        assert_eq!(before, after, "{name}: wrong {case}: changed");
        unwrap(case, &made.wrapped);
    }

    // Suspended when it is destroyed, as an orderly erase has it.
    p.admin.suspend(&made.identity).expect("suspended");
    if let Some(wait) = p.wait {
        for round in ["first", "again"] {
            let done =
                p.admin.destroy(&made.identity).unwrap_or_else(|e| panic!("{name}: {round}: {e} {:?}", e.detail));
            let Destruction::Scheduled { at } = done else { panic!("{name}: {round}: {done:?}") };
            assert!(at.parse::<jiff::Timestamp>().expect(&at) > jiff::Timestamp::now(), "{name}: {at}");
        }
        let opened = p.host.unwrap(&BINDING, &made.wrapped, &made.identity);
        assert_eq!(failure("scheduled", opened), Failure::Suspended, "{name}");
        for (case, probe) in probes {
            assert_eq!(failure(case, p.admin.prove_destroyed(&made.identity, probe)), Failure::NotDestroyed, "{name}");
        }
        p.admin.restore().expect("restored");
        unwrap("cancelled", &made.wrapped);
        p.admin.destroy(&made.identity).expect("scheduled again");
        wait();
    }
    for round in ["first", "again", "and again"] {
        let done =
            p.admin.destroy(&made.identity).unwrap_or_else(|e| panic!("{name}: destroy, {round}: {e} {:?}", e.detail));
        assert_eq!(done, Destruction::CarriedOut, "{name}: {round}");
    }
    for wrapped in [&made.wrapped, &second.wrapped] {
        let error = super::error("destroyed", p.host.unwrap(&BINDING, wrapped, &made.identity));
        assert_eq!(error.failure, p.gone, "{name}: {error} {:?}", error.detail);
    }
    assert_eq!(failure("describe", p.admin.describe()), Failure::Missing, "{name}");
    if p.separates {
        // Not made by wrapping under it.
        assert_eq!(failure("wrap", p.wrapper.wrap(&BINDING, &made.key)), Failure::Missing, "{name}");
    }
    for (case, probe) in probes {
        let proof = p.admin.prove_destroyed(&made.identity, probe);
        let proof = proof.unwrap_or_else(|e| panic!("{name}: proof {case}: {e} {:?}", e.detail));
        assert_eq!(proof.self_asserted, p.self_asserted, "{name}");
        assert!(proof.at.parse::<jiff::Timestamp>().is_ok(), "{name}: {}", proof.at);
        for finding in &proof.findings {
            let parts = [&finding.asked, &finding.answered, &finding.shows];
            assert!(parts.iter().all(|part| !part.is_empty()), "{name}: {finding:?}");
        }
    }
}

#[test]
fn key_file() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let file = KeyFile::new(&dir.path().join("key"));
    run(&Provider {
        name: "key file",
        host: &file,
        wrapper: &file,
        admin: &file,
        rotate: None,
        suspends: true,
        tells: true,
        separates: false,
        wait: None,
        gone: Failure::Missing,
        self_asserted: true,
    });
    assert_eq!(std::fs::read_dir(dir.path()).expect("listed").count(), 0, "leftovers");
}

#[test]
fn pkcs11() {
    let token = Token::new();
    for (name, options) in [
        ("as documented", "--label vol1 --id 0102 --sensitive"),
        ("another key beside it", "--label vol2 --id 01 --sensitive"),
    ] {
        let label = options.split(' ').nth(1).expect("label");
        token.create_with(&format!("--key-type AES:32 {options}"));
        let key = TokenKey { token: Some(LABEL.into()), object: Some(label.into()), ..TokenKey::default() };
        let host = Pkcs11::new(&key, super::pkcs11::config(&token));
        let admin = Pkcs11::new(&key, super::pkcs11::config(&token));
        run(&Provider {
            name,
            host: &host,
            admin: &admin,
            wrapper: &host,
            rotate: None,
            suspends: true,
            tells: true,
            separates: false,
            wait: None,
            gone: Failure::Destroyed,
            self_asserted: false,
        });
    }
}

#[cfg(feature = "kms-aws")]
#[test]
fn aws() {
    let server = super::aws_server::Server::start();
    let id = server.create_key(&json!({}));
    server.owner("create_alias", &json!({ "AliasName": "alias/vol1", "TargetKeyId": id }));
    let key = lethefs::kms::uri::AwsKey { key: super::aws_server::Server::arn(&id), region: None };
    let host = Aws::new(&key, super::aws::config(&server, "host"));
    let admin = Aws::new(&key, super::aws::config(&server, "admin"));
    let wrapper = Aws::new(&key, super::aws::config(&server, "wrapper"));
    let wait = || server.expire();
    run(&Provider {
        name: "AWS KMS",
        host: &host,
        admin: &admin,
        wrapper: &wrapper,
        rotate: None,
        suspends: true,
        tells: false,
        separates: true,
        wait: Some(&wait),
        gone: Failure::Destroyed,
        self_asserted: false,
    });
}

#[test]
fn transit() {
    let server = Server::start(Storage::Memory);
    server.put("sys/namespaces/team", json!({}));
    server.put("team:sys/mounts/a/transit-2", json!({ "type": "transit" }));
    for (name, namespace, engine, kind) in [
        ("root namespace", "", "transit", "aes256-gcm96"),
        ("ChaCha20", "", "transit", "chacha20-poly1305"),
        ("namespace", "team", "a/transit-2", "xchacha20-poly1305"),
    ] {
        let key = TransitKey { engine: engine.into(), key: format!("k-{kind}"), server: None };
        let at = |path: String| if namespace.is_empty() { path } else { format!("{namespace}:{path}") };
        let key_path = at(format!("{engine}/keys/{}", key.key));
        server.put(&key_path, json!({ "type": kind, "derived": true }));
        // The policies as documented, for this engine.
        let login = |heading: &str| {
            let policy = documented_policy(heading, &key.key).replace("\"transit/", &format!("\"{engine}/"));
            let policy_name = format!("p{}", heading.len());
            server.put(&at(format!("sys/policies/acl/{policy_name}")), json!({ "policy": policy }));
            let made =
                server.put(&at("auth/token/create-orphan".into()), json!({ "policies": [policy_name], "ttl": "1h" }));
            let mut config =
                config(&server.address(), &server.ca(), token(made["auth"]["client_token"].as_str().expect("token")));
            config.namespace = namespace.to_owned();
            Transit::new(&key, config)
        };
        let (host, admin, wrapper) = (login(HOST_POLICY), login(ADMIN_POLICY), login(WRAP_POLICY));
        let rotate = |wrapped: &Wrapped| {
            server.put(&format!("{key_path}/rotate"), json!({}));
            let body = json!({ "ciphertext": wrapped.0, "context": STANDARD.encode(BINDING.bytes()) });
            let reply = server.must(Method::POST, &at(format!("{engine}/rewrap/{}", key.key)), body);
            Wrapped(reply["data"]["ciphertext"].as_str().expect("ciphertext").to_owned())
        };
        run(&Provider {
            name,
            host: &host,
            wrapper: &wrapper,
            admin: &admin,
            rotate: Some(&rotate),
            suspends: true,
            tells: true,
            separates: true,
            wait: None,
            gone: Failure::Destroyed,
            self_asserted: false,
        });
    }
}
