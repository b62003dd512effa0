//! A real OpenBao in every kind of trouble: one line that says what to do, the documented code, nothing changed, no mount.

use reqwest::Method;
use serde_json::{Value, json};

use crate::store::{refuses, tree};
use crate::support::openbao::{Server, Storage, free_port, make_certificates, wait_for};
use crate::support::volume::TestVolume;

pub(crate) use crate::support::at_openbao::volume;

const MOUNT: [&str; 3] = ["mount", "backing", "mnt"];

#[test]
fn a_mount_while_the_key_service_is_in_trouble() {
    let mut server = Server::start(Storage::Memory);
    let one = volume(&server, "one");
    one.mount(&[]);
    std::fs::write(one.at("file"), b"hello").unwrap();
    one.umount();

    // Who answers is not who we know.
    let strangers = tempfile::tempdir().unwrap();
    make_certificates(strangers.path());
    one.env("VAULT_CACERT", strangers.path().join("ca.pem"));
    refuses(&one, &MOUNT, 12, "VAULT_CACERT");
    one.env("VAULT_CACERT", strangers.path().join("none.pem"));
    refuses(&one, &MOUNT, 2, "none.pem");
    one.env("VAULT_CACERT", server.ca());
    for address in ["http://127.0.0.1:1", "https://u:hunter2@127.0.0.1:1", "ftp://x", "hunter2"] {
        one.env("VAULT_ADDR", address);
        refuses(&one, &MOUNT, 2, "VAULT_ADDR");
        assert!(!one.cli(&MOUNT).err.contains("hunter2"));
    }
    one.env("VAULT_ADDR", format!("https://127.0.0.1:{}", free_port()));
    refuses(&one, &MOUNT, 12, "cannot be reached");
    // The second of two serves.
    one.env("VAULT_ADDR", format!("https://127.0.0.1:{},{}", free_port(), server.address()));
    one.mount(&[]);
    one.umount();
    one.env("VAULT_ADDR", server.address());

    // Tokens.
    let revoked = server.token(&["host-one"], "1h");
    server.revoke(&revoked);
    one.env("VAULT_TOKEN", &revoked);
    refuses(&one, &MOUNT, 13, "VAULT_TOKEN");
    assert!(!one.cli(&MOUNT).err.contains(&revoked));
    let short = server.token(&["host-one"], "1s");
    wait_for("the token's end", || {
        (server.ask(&short, Method::GET, "auth/token/lookup-self", &Value::Null).0 == 403).then_some(())
    });
    one.env("VAULT_TOKEN", &short);
    refuses(&one, &MOUNT, 13, "VAULT_TOKEN");
    one.env("VAULT_TOKEN", server.token(&["default"], "1h"));
    refuses(&one, &MOUNT, 13, "policy");
    one.env("VAULT_TOKEN", "");
    one.env("LETHEFS_APPROLE_SECRET_ID_FILE", server.file("bad.secret_id", "00000000-0000-0000-0000-000000000000"));
    refuses(&one, &MOUNT, 13, "secret id");
    one.env("LETHEFS_APPROLE_SECRET_ID_FILE", "/nonexistent/secret");
    refuses(&one, &MOUNT, 2, "/nonexistent/secret");

    // Keys.
    let soft = volume(&server, "soft");
    server.delete("transit/keys/soft/soft-delete");
    refuses(&soft, &MOUNT, 14, "restore");
    server.put("transit/keys/soft/soft-delete-restore", json!({}));
    soft.mount(&[]);
    soft.umount();
    let gone = volume(&server, "gone");
    server.delete_key("gone");
    refuses(&gone, &MOUNT, 17, "destroyed");
    let again = volume(&server, "again");
    server.let_a_second_pass("again");
    server.delete_key("again");
    server.create_key("again");
    refuses(&again, &MOUNT, 14, "again");
    let engine = volume(&server, "engine");
    engine.env("VAULT_NAMESPACE", "nowhere");
    let run = engine.cli(&MOUNT);
    assert!(matches!(run.code, Some(2 | 12 | 13 | 14)) && run.err.lines().count() == 1, "{run:?}");
    engine.env("VAULT_NAMESPACE", "");
    server.delete("sys/mounts/transit");
    refuses(&engine, &MOUNT, 14, "Transit engine");
    server.put("sys/mounts/transit", json!({ "type": "transit" }));
    // Another engine in its place, even with a key of the same name: not what was recorded, not proof of destruction.
    refuses(&engine, &MOUNT, 14, "engine");
    server.create_key("engine");
    refuses(&engine, &MOUNT, 14, "engine");

    // The server.
    let last = volume(&server, "last");
    server.stop();
    refuses(&last, &MOUNT, 12, "in time");
    server.cont();
    last.mount(&[]);
    last.umount();
    server.seal();
    refuses(&last, &MOUNT, 12, "unsealed");
    server.kill();
    refuses(&last, &MOUNT, 12, "cannot be reached");
}

#[test]
fn making_a_volume_under_a_bad_key() {
    let server = Server::start(Storage::Memory);
    for (name, settings) in [
        ("plain", json!({ "type": "aes256-gcm96" })),
        ("convergent", json!({ "type": "aes256-gcm96", "derived": true, "convergent_encryption": true })),
        ("rsa", json!({ "type": "rsa-2048" })),
        ("short", json!({ "type": "aes128-gcm96", "derived": true })),
    ] {
        server.put(&format!("transit/keys/{name}"), settings);
    }
    server.create_key("soft");
    server.delete("transit/keys/soft/soft-delete");
    server.policy("all", r#"path "transit/*" { capabilities = ["create", "read", "update"] }"#);
    let volume = TestVolume::new();
    volume.env("VAULT_ADDR", server.address());
    volume.env("VAULT_CACERT", server.ca());
    volume.env("VAULT_TOKEN", server.token(&["all"], "1h"));
    let init = |uri: &str, code: i32, part: &str| refuses(&volume, &["init", "backing", "--kms", uri], code, part);
    init("hashivault://plain", 2, "type=aes256-gcm96 derived=true");
    init("hashivault://convergent", 2, "convergently");
    init("hashivault://rsa", 2, "rsa-2048");
    init("hashivault://short", 2, "aes128-gcm96");
    init("hashivault://soft", 14, "restored");
    init("hashivault://none", 14, "bao write -f transit/keys/none");
    init("hashivault://none?engine=nowhere", 13, "policy");
    assert!(!volume.backing().exists());

    // URIs: refused before anybody is asked, and never repeated.
    let before = server.audit().len();
    for (uri, part) in [
        ("hashivault://hvs.hunter2@plain", "credentials come from the environment"),
        ("hashivault://plain?token=hunter2", "credentials come from the environment"),
        ("hashivault://plain?%74oken=hunter2", "credentials come from the environment"),
        ("https://u:hunter2@127.0.0.1/", "credentials come from the environment"),
        ("pkcs11:object=k;pin-value=hunter2", "LETHEFS_PKCS11_PIN_FILE"),
        ("hashivault://plain?colour=red", "colour"),
        ("hashivault://plain?address=https://127.0.0.1:1", "address"),
        ("hashivault://../../sys/seal", "may hold only"),
        ("openbao://plain", "unknown key URI scheme"),
        ("pkcs11:object=k?module-path=/evil.so", "LETHEFS_PKCS11_MODULE"),
        ("file://relative", "absolute"),
        ("vol1", "scheme"),
    ] {
        for args in [
            &["init", "backing", "--kms", uri][..],
            &["mount", "backing", "mnt", "--trust", "--kms", uri],
            &["mount", "backing", "mnt", "-o", &format!("kms={uri}")],
            &["keys", "check", uri],
            &["erase", "backing", "--key", uri],
        ] {
            refuses(&volume, args, 2, part);
            assert!(!volume.cli(args).err.contains("hunter2"), "{args:?}");
        }
    }
    assert_eq!(server.audit().len(), before, "the server was asked");
}

/// The slots of a volume file are claims: a thousand of them under the pinned key are not a thousand requests.
#[test]
fn a_volume_file_cannot_make_us_flood_the_key_service() {
    let server = Server::start(Storage::Memory);
    let flood = volume(&server, "flood");
    let good = std::fs::read(flood.backing().join("lethefs.volume")).unwrap();
    let unwraps = || server.audit().iter().filter(|request| *request == "update transit/decrypt/flood").count();
    let garbage = |body: &mut Value| {
        let slots = body["scopes"][0]["keks"][0]["slots"].as_array_mut().unwrap();
        let genuine = slots.pop().unwrap();
        for n in 0..200 {
            let mut slot = genuine.clone();
            slot["id"] = (n + 1).into();
            slot["wrapped"] = format!("vault:v1:{}", "A".repeat(4 * (20 + n))).into();
            slots.push(slot);
        }
    };
    crate::store::forge(&flood, garbage);
    refuses(&flood, &MOUNT, 10, "rejects the wrapped key");
    assert!(unwraps() <= 2, "{} requests", unwraps());
    // The other copy still opens it.
    std::fs::write(flood.backing().join("lethefs.volume.bak"), good).unwrap();
    let before = unwraps();
    flood.mount(&[]);
    flood.umount();
    assert!(unwraps() - before <= 2, "{} requests", unwraps() - before);
}

/// Answers that no honest server gives: nothing is believed, nothing hangs, memory is bounded.
#[test]
fn a_server_that_talks_nonsense_in_clear() {
    let volume = TestVolume::new();
    let ear = crate::store::Ear::new();
    volume.env("VAULT_ADDR", &ear.address);
    volume.env("VAULT_TOKEN", "t");
    let before = tree(&volume);
    volume.cli(&["init", "backing", "--kms", "hashivault://k"]).is(12);
    assert!(ear.calls() > 0 && before == tree(&volume));
}
