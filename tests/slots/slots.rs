//! Slots at a real server: a mounted volume, rights, what fails over and what does not, and an erase of them all.

use std::fs;
use std::process::Stdio;

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::openbao::{Server, Storage, free_port};
use crate::world::{body, events, id, make_key, run_as, token, volume};

const KMS: &str = include_str!("../../docs/KMS.md");

/// Whoever may add this key as a slot of a volume under `of`.
fn adder(server: &Server, key: &str, of: &str) -> String {
    let section = KMS.split_once("### To add a slot").unwrap().1;
    let policy = section.split_once("```hcl\n").and_then(|(_, rest)| rest.split_once("```")).unwrap().0;
    server.policy(&format!("add-{key}"), &policy.replace("vol1", key));
    token(server, &[&format!("add-{key}"), &format!("host-{of}")])
}

#[test]
fn a_mounted_volume_gets_a_second_key() {
    let server = Server::start(Storage::Memory);
    let v = volume(&server, "one");
    make_key(&server, "two");
    v.mount(&[]);
    fs::write(v.at("file"), b"hello").unwrap();

    // A mount host may not, and nothing changes; nor does it make a key that is not there.
    let two = "hashivault://two?engine=transit";
    v.env("VAULT_TOKEN", token(&server, &["host-one", "host-two"]));
    v.cli(&["keys", "add-slot", "mnt", two]).is(13).says("encrypt");
    server.policy("too-much", r#"path "transit/*" { capabilities = ["create", "read", "update"] }"#);
    let much = token(&server, &["too-much"]);
    run_as(&v, &much, &["keys", "add-slot", "mnt", "hashivault://none"]).is(14);
    assert_eq!(server.ask(&much, Method::GET, "transit/keys/none", &Value::Null).0, 404, "a key was made by wrapping");
    server.put("transit/keys/plain", json!({ "type": "aes256-gcm96" }));
    run_as(&v, &much, &["keys", "add-slot", "mnt", "hashivault://plain"]).is(2).says("derived");
    assert_eq!(body(&v)["generation"], 1);

    let run = run_as(&v, &adder(&server, "two", "one"), &["keys", "add-slot", "mnt", two, "--json"]);
    run.is(0);
    assert_eq!((&run.json()["slot"], &run.json()["generation"]), (&2.into(), &2.into()));
    assert!(run.json()["warnings"].as_array().unwrap().is_empty(), "{}", run.out);
    assert_eq!(fs::read(v.at("file")).unwrap(), b"hello");
    v.umount();
    assert_eq!(
        (&body(&v)["generation"], body(&v)["scopes"][0]["keks"][0]["slots"].as_array().unwrap().len()),
        (&2.into(), 2)
    );
    v.mount(&[]);
    v.umount();
    assert_eq!(
        events(&v),
        [
            "init",
            "fetch",
            "mount",
            "fetch",
            "fetch",
            "fetch",
            "fetch",
            "slot-added",
            "unmount",
            "fetch",
            "mount",
            "unmount"
        ]
    );

    // The first key is taken away: that is a word about the volume. The second opens it if somebody says so.
    server.delete("transit/keys/one/soft-delete");
    v.try_mount(&[]).is(14).says("--kms hashivault://two");
    v.mount(&["--kms", two]);
    assert_eq!(fs::read(v.at("file")).unwrap(), b"hello");
    v.umount();
    let revoked = token(&server, &["host-two"]);
    v.env("VAULT_TOKEN", &revoked);
    v.try_mount(&[]).is(13).says("--kms hashivault://two");

    // Another host, which knows the volume from before, learns of the second key by itself.
    server.put("transit/keys/one/soft-delete-restore", json!({}));
    v.env("VAULT_TOKEN", token(&server, &["host-one", "host-two"]));
    fs::remove_file(v.path("trust").join(id(&v))).unwrap();
    v.try_mount(&[]).is(16);
    v.mount(&["--trust"]);
    v.umount();
    v.mount(&["--kms", two]);
    v.umount();

    // An erase takes both.
    let admin = token(&server, &["admin-one", "admin-two"]);
    let volume_id = id(&v);
    let one_only = ["erase", "backing", "--confirm-volume", &volume_id, "--confirm-key", "one"];
    run_as(&v, &admin, &one_only).is(19).says("not typed: two;");
    run_as(&v, &token(&server, &["admin-one"]), &[&one_only[..], &["--confirm-key", "two"]].concat()).is(23);
    run_as(&v, &admin, &[&one_only[..], &["--confirm-key", "two"]].concat()).is(0);
    for key in ["one", "two"] {
        assert_eq!(server.ask(&much, Method::GET, &format!("transit/keys/{key}"), &Value::Null).0, 404);
    }
    v.try_mount(&[]).is(17);
}

#[test]
fn a_key_file_stands_in_while_the_server_is_away_and_revoke_takes_all() {
    let mut server = Server::start(Storage::Raft);
    let v = volume(&server, "one");
    let file = v.file_uri();
    v.cli(&["keys", "add-slot", "backing", &file]).is(0);
    let admin = token(&server, &["admin-one"]);
    let run = run_as(&v, &admin, &["revoke", "backing", "--yes", "--json"]);
    run.is(0);
    assert_eq!(run.json()["keys"].as_array().unwrap().len(), 2);
    v.try_mount(&[]).is(14);
    v.try_mount(&["--kms", &file]).is(14).says("suspended");
    // Half of it back is not all of it.
    fs::rename(v.path("keys/key.suspended"), v.path("keys/elsewhere")).unwrap();
    run_as(&v, &admin, &["restore", "backing"]).is(23).says("is not back");
    fs::rename(v.path("keys/elsewhere"), v.path("keys/key")).unwrap();
    v.mount(&[]);
    v.umount();

    // No answer says nothing of the key: the other slot is asked.
    server.kill();
    v.mount(&[]);
    fs::write(v.at("file"), b"meanwhile").unwrap();
    v.umount();
    v.env("VAULT_ADDR", format!("https://127.0.0.1:{}", free_port()));
    v.mount(&[]);
    assert_eq!(fs::read(v.at("file")).unwrap(), b"meanwhile");
    v.umount();
}

#[test]
fn a_mount_that_begins_does_not_undo_a_slot() {
    let v = crate::support::volume::TestVolume::init();
    let second = format!("file://{}", v.path("keys/second").display());
    // Damage that a mount mends, while slots come and go.
    for n in 0..6 {
        fs::remove_file(v.backing().join("lethefs.volume")).unwrap();
        let add = ["keys", "add-slot", "backing", &format!("{second}-{n}")].map(str::to_owned);
        let adding = v.lethefs(&add).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let mounted = v.try_mount(&[]);
        mounted.is(0);
        let added = { adding }.wait().unwrap();
        v.umount();
        assert!(added.success());
        let count = body(&v)["scopes"][0]["keks"][0]["slots"].as_array().unwrap().len();
        assert_eq!((count, &body(&v)["generation"]), (n + 2, &(n + 2).into()), "round {n}");
        let pin = fs::read_to_string(v.path("trust").join(id(&v))).unwrap();
        let pin: Value = serde_json::from_str(&pin).unwrap();
        assert_eq!(pin["generation"], n + 2, "round {n}");
        assert_eq!(pin["keks"][0]["slots"].as_array().unwrap().len(), n + 2, "round {n}");
    }
}
