//! `revoke` and `restore` at a real server, with a live mount.

use std::fs;

use crate::support::openbao::{Server, Storage};
use crate::world::{events, records, run_as, token, volume};

const EKEYREVOKED: i32 = 128;

#[test]
fn a_key_is_suspended_mounts_are_sealed_and_it_comes_back() {
    let server = Server::start(Storage::Memory);
    let v = volume(&server, "vol");
    v.mount(&[]);
    fs::write(v.at("file"), b"hello").unwrap();
    let file = fs::File::open(v.at("file")).unwrap();
    file.sync_all().unwrap();

    // The mount's own rights do not suspend, and that costs the mount nothing.
    v.cli(&["revoke", "backing", "--yes"]).is(13).says("policy");
    assert_eq!(fs::read(v.at("file")).unwrap(), b"hello");

    let admin = token(&server, &["admin-vol"]);
    let run = run_as(&v, &admin, &["revoke", "mnt", "--yes", "--json"]);
    run.is(0);
    assert_eq!(run.json()["keys"][0]["outcome"], "suspended");
    assert_eq!(run.json()["mounts"][0]["said"], "sealed");
    assert_eq!(fs::read(v.at("file")).unwrap_err().raw_os_error(), Some(EKEYREVOKED));
    assert_eq!(server.get("transit/keys/vol")["soft_deleted"], true);
    drop(file);
    v.umount();
    v.try_mount(&[]).is(14).says("soft-deleted");

    run_as(&v, "", &["restore", "backing"]).is(2);
    v.cli(&["restore", "backing"]).is(13);
    let run = run_as(&v, &admin, &["restore", "backing", "--json"]);
    run.is(0);
    assert_eq!(run.json()["keys"][0]["outcome"], "restored");
    v.mount(&[]);
    assert_eq!(fs::read(v.at("file")).unwrap(), b"hello");
    v.umount();
    // What a live mount's renewals say in between is another matter (tests/custody).
    let live = ["lease", "seal", "renew", "deny", "resume"];
    let wanted =
        ["init", "fetch", "mount", "suspend", "suspend", "unmount", "fetch-failed", "restore", "restore", "restore"];
    let told: Vec<_> = events(&v).into_iter().filter(|event| !live.contains(&event.as_str())).collect();
    assert_eq!(told[..wanted.len()], wanted);
    assert!(events(&v).iter().any(|event| event == "seal"));
    let all: Vec<_> =
        records(&v).into_iter().filter(|record| !live.iter().any(|event| record["event"] == *event)).collect();
    assert_eq!((&all[3]["data"]["outcome"], &all[4]["data"]["outcome"]), (&"failed".into(), &"suspended".into()));
    assert!(server.audit_text().contains(all[4]["data"]["request_id"].as_str().unwrap()));

    // A stolen disk's key, without the disk.
    fs::rename(v.backing(), v.path("stolen")).unwrap();
    let id = v.cli(&["status", "stolen", "--json"]).json()["volume_id"].as_str().unwrap().to_owned();
    run_as(&v, &admin, &["revoke", "--volume-id", &id, "--yes"]).is(0);
    assert_eq!(server.get("transit/keys/vol")["soft_deleted"], true);
    run_as(&v, &admin, &["restore", "--volume-id", &id]).is(0);
}

#[test]
fn a_live_mount_is_asked_to_go_on() {
    let server = Server::start(Storage::Memory);
    let v = volume(&server, "vol");
    v.mount(&[]);
    let admin = token(&server, &["admin-vol"]);
    run_as(&v, &admin, &["revoke", "backing", "--yes"]).is(0);
    let run = run_as(&v, &admin, &["restore", "mnt", "--json"]);
    run.is(0);
    let said = run.json()["mounts"][0].clone();
    assert!(said["said"].as_str().unwrap().contains("asked to go on"), "{said}");
    assert_eq!(said["answer"]["state"], "active", "{said}");
    assert_eq!(fs::read_dir(v.mnt()).unwrap().count(), 0);
    v.umount();
}
