//! An erase of several keys: all, or none as far as that can be known beforehand.

use std::fs;

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::openbao::{Server, Storage};
use crate::support::volume::{Output, TestVolume};
use crate::world::{id, make_key, run_as, token, volume};

const TWO: &str = "hashivault://two?engine=transit";

/// A volume that the keys `one` and `two` open.
fn with_two_keys(server: &Server) -> TestVolume {
    let v = volume(server, "one");
    make_key(server, "two");
    run_as(&v, &token(server, &["everything"]), &["keys", "add-slot", "backing", TWO]).is(0);
    v
}

fn erase(v: &TestVolume, token: &str, more: &[&str]) -> Output {
    let id = id(v);
    let mut args = vec!["erase", "backing", "--confirm-volume", &id, "--confirm-key", "one", "--confirm-key", "two"];
    args.extend(more);
    run_as(v, token, &args)
}

/// Whether a key is there, and usable.
fn state(server: &Server, key: &str) -> &'static str {
    let (status, reply) =
        server.ask(&server.token(&["everything"], "1h"), Method::GET, &format!("transit/keys/{key}"), &Value::Null);
    match (status, reply["data"]["soft_deleted"].as_bool()) {
        (404, _) => "gone",
        (200, Some(true)) => "suspended",
        (200, _) => "usable",
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_key_that_may_not_be_destroyed_keeps_the_others() {
    let server = Server::start(Storage::Memory);
    let v = with_two_keys(&server);
    v.mount(&[]);
    fs::write(v.at("file"), b"hello").unwrap();
    // The administrator of one key, whichever it is; the other may be read, so that only the right is missing.
    for (mine, other) in [("one", "two"), ("two", "one")] {
        let admin = token(&server, &[&format!("admin-{mine}"), &format!("host-{other}")]);
        let plan = run_as(&v, &admin, &["erase", "backing", "--plan", "--json"]);
        plan.is(0);
        for key in plan.json()["keys"].as_array().unwrap() {
            assert_eq!(key["erasable"], key["name"] == mine, "{key}");
            assert_eq!(key["obstacle"].is_null(), key["name"] == mine, "{key}");
        }
        let text = run_as(&v, &admin, &["erase", "backing", "--plan"]).out;
        assert_eq!(text.matches("cannot be destroyed from here").count(), 1, "{text}");

        let left = format!("nothing was destroyed or changed: {other} (denied: these credentials may not destroy");
        erase(&v, &admin, &[]).is(23).says(&left).says(&format!("so {mine} was left alone")).says("--partial");
        assert_eq!((state(&server, "one"), state(&server, "two")), ("usable", "usable"), "{mine}");
        assert!(!v.backing().join("lethefs.erase").exists());
        assert_eq!(fs::read(v.at("file")).unwrap(), b"hello", "the mount was sealed for nothing");
    }

    // A server that does not tell what is allowed (a token without the default policy): then the refusal comes with the
    // suspension, which can be undone.
    let policies = json!({ "policies": ["admin-one", "host-two"], "no_default_policy": true });
    let made = server.put("auth/token/create", policies);
    let silent = made["auth"]["client_token"].as_str().unwrap();
    let text = run_as(&v, silent, &["erase", "backing", "--plan"]).out;
    assert_eq!(text.matches("does not tell whether").count(), 2, "{text}");
    erase(&v, silent, &[])
        .is(18)
        .says("no key was destroyed")
        .says("two (denied")
        .says("one is suspended (`lethefs restore`");
    assert_eq!((state(&server, "one"), state(&server, "two")), ("suspended", "usable"));
    assert_eq!(fs::read(v.at("file")).unwrap(), b"hello", "the second key still opens the volume");
    let both = token(&server, &["admin-one", "admin-two"]);
    run_as(&v, &both, &["restore", "backing"]).is(0);
    assert_eq!((state(&server, "one"), state(&server, "two")), ("usable", "usable"));
    v.umount();

    // Asked for, it takes what it can, and says what is left.
    let admin = token(&server, &["admin-one", "host-two"]);
    erase(&v, &admin, &["--partial"]).is(18).says("still restorable: two (denied");
    assert_eq!((state(&server, "one"), state(&server, "two")), ("gone", "usable"));
    // The rest, by whoever may: the key that is gone by now is no obstacle.
    erase(&v, &both, &[]).is(0);
    assert_eq!((state(&server, "one"), state(&server, "two")), ("gone", "gone"));
    v.try_mount(&[]).is(17);

    // What is gone does not come back, and nobody is told to make it anew.
    let run = run_as(&v, &both, &["restore", "backing"]);
    run.is(17).says("is destroyed: nothing brings it back");
    let run = run_as(&v, &both, &["keys", "check", TWO]);
    assert!(run.code == Some(14) && run.err.contains("a new one opens nothing of what it wrapped"), "{}", run.err);
}

#[test]
fn another_key_under_the_name_keeps_the_others_too() {
    let server = Server::start(Storage::Memory);
    let v = with_two_keys(&server);
    server.let_a_second_pass("two");
    server.delete_key("two");
    server.create_key("two");
    let both = token(&server, &["admin-one", "admin-two"]);
    erase(&v, &both, &[]).is(23).says("two (recreated");
    assert_eq!(state(&server, "one"), "usable");
    // Nor is it brought back as if it were the volume's.
    run_as(&v, &both, &["restore", "backing"]).is(23).says("two");
}
