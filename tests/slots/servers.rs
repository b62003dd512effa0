//! A volume whose two keys are at two servers that know nothing of each other.

use std::fs;

use reqwest::Method;
use serde_json::Value;

use crate::support::openbao::{Server, Storage};
use crate::world::{id, make_key, run_as, token, volume};

const HERE: &str = "hashivault://one?engine=transit";
const THERE: &str = "hashivault://two?engine=transit&server=dr";

#[test]
fn a_second_server_opens_the_volume_when_the_first_is_away() {
    let (mut here, there) = (Server::start(Storage::Memory), Server::start(Storage::Memory));
    let v = volume(&here, "one");
    make_key(&there, "two");
    let adder = token(&there, &["everything"]);

    // What is for one server goes to no other: without its own address and token the second is not asked.
    v.cli(&["keys", "add-slot", "backing", THERE]).is(2).says("VAULT_ADDR__DR");
    v.env("VAULT_ADDR__DR", there.address());
    v.env("VAULT_CACERT__DR", there.ca());
    v.cli(&["keys", "add-slot", "backing", THERE]).is(2).says("no credentials").says("__DR");
    v.env("VAULT_TOKEN__DR", &adder);
    v.cli(&["keys", "add-slot", "backing", THERE]).is(0);
    v.env("VAULT_TOKEN__DR", token(&there, &["host-two"]));
    let listed = v.cli(&["keys", "list", "backing"]).out;
    assert!(listed.contains(HERE) && listed.contains(THERE), "{listed}");
    for uri in [HERE, THERE] {
        v.cli(&["keys", "check", uri]).is(0);
    }
    assert!(!here.audit_text().contains("transit/decrypt/two") && !there.audit_text().contains("transit/decrypt/one"));

    v.mount(&[]);
    fs::write(v.at("file"), b"hello").unwrap();
    v.umount();
    v.mount(&["--kms", THERE]);
    v.umount();
    // A host that learned of the second key from the volume file takes its server for the first: told once, it knows.
    let pin = v.path("trust").join(id(&v));
    let text = fs::read_to_string(&pin).unwrap();
    assert!(text.contains(THERE));
    fs::write(&pin, text.replace("&server=dr", "")).unwrap();
    v.try_mount(&["--kms", "hashivault://two?engine=transit"]).is(13);
    v.mount(&["--kms", THERE]);
    v.umount();
    assert!(fs::read_to_string(&pin).unwrap().contains(THERE), "not remembered");
    // A host that has no access to the second server works as before.
    let run = crate::support::volume::Output::of(
        v.lethefs(&["fsck", "backing", "--quiet"]).env_remove("VAULT_ADDR__DR").env_remove("VAULT_TOKEN__DR"),
    );
    run.is(0);

    // The erase reaches both, each with its own administrator's token.
    let volume_id = id(&v);
    let erase = ["erase", "backing", "--confirm-volume", &volume_id, "--confirm-key", "one", "--confirm-key", "two"];
    let admin = token(&here, &["admin-one"]);
    run_as(&v, &admin, &erase).is(23).says("two (denied");

    // The first one away: the second opens.
    here.kill();
    v.mount(&[]);
    assert_eq!(fs::read(v.at("file")).unwrap(), b"hello");
    v.umount();
}

#[test]
fn an_erase_reaches_both_servers() {
    let (here, there) = (Server::start(Storage::Memory), Server::start(Storage::Memory));
    let v = volume(&here, "one");
    make_key(&there, "two");
    v.env("VAULT_ADDR__DR", there.address());
    v.env("VAULT_CACERT__DR", there.ca());
    v.env("VAULT_TOKEN__DR", token(&there, &["everything"]));
    v.cli(&["keys", "add-slot", "backing", THERE]).is(0);
    v.env("VAULT_TOKEN__DR", token(&there, &["admin-two"]));
    let volume_id = id(&v);
    let erase = ["erase", "backing", "--confirm-volume", &volume_id, "--confirm-key", "one", "--confirm-key", "two"];
    run_as(&v, &token(&here, &["admin-one"]), &erase).is(0);
    for (server, key) in [(&here, "one"), (&there, "two")] {
        let all = token(server, &["everything"]);
        assert_eq!(server.ask(&all, Method::GET, &format!("transit/keys/{key}"), &Value::Null).0, 404, "{key}");
    }
}
