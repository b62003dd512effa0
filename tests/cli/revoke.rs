//! `revoke` and `restore` with key files.

use crate::world::{World, gone};

#[test]
fn a_key_file_is_put_aside_and_back() {
    let world = World::new();
    world.volume("vol", "key");
    let other = world.volume("two", "key");
    world.refuses(&["revoke", "vol"], 19, "--yes");
    let run = world.run(&["revoke", "vol", "--yes", "--json"]);
    run.is(0);
    let report: serde_json::Value = serde_json::from_str(&run.out).unwrap();
    assert_eq!((&report["keys"][0]["outcome"], &report["schema"]), (&"suspended".into(), &1.into()));
    assert!(gone(&world.path("keys/key")) && !gone(&world.path("keys/key.suspended")));
    for volume in ["vol", "two"] {
        world.refuses(&["mount", volume, "mnt"], 14, "suspended");
        world.refuses(&["fsck", volume, "--quiet"], 14, "lethefs restore");
    }
    // Not a new key under the old name.
    world.refuses(&["init", "three", "--kms", &world.uri("key")], 14, "suspended");
    world.run(&["revoke", "vol", "--yes"]).is(0);
    world.run(&["restore", "two"]).is(0);
    world.run(&["restore", "two"]).is(0);
    assert!(gone(&world.path("keys/key.suspended")));
    world.run(&["fsck", "vol", "--quiet"]).is(0);
    let events = std::fs::read_to_string(world.path("state/audit").join(format!("{other}.jsonl"))).unwrap();
    assert!(events.contains(r#""event":"restore""#) && events.contains(r#""outcome":"restored""#));
}

#[test]
fn a_suspended_key_file_can_be_erased_and_another_is_not_touched() {
    let world = World::new();
    let id = world.volume("vol", "key");
    world.volume("two", "second");
    let name = world.key_name("key");
    world.run(&["revoke", "vol", "--yes"]).is(0);
    // Somebody puts another key in its place: neither is lost.
    std::fs::copy(world.path("keys/second"), world.path("keys/key")).unwrap();
    world.refuses(&["revoke", "vol", "--yes"], 14, "another key");
    std::fs::remove_file(world.path("keys/key")).unwrap();
    world.run(&["erase", "vol", "--confirm-volume", &id, "--confirm-key", &name]).is(0);
    assert!(gone(&world.path("keys/key.suspended")) && gone(&world.path("keys/key")));
    // What is not there is no success.
    std::fs::rename(world.path("keys/second"), world.path("keys/moved")).unwrap();
    world.refuses(&["revoke", "two", "--yes"], 14, "not there");
    world.refuses(&["restore", "two"], 14, "not there");
}

#[test]
fn a_key_that_only_the_volume_file_names_is_not_called_suspended() {
    let world = World::new();
    world.volume("vol", "key");
    let name = world.key_name("key");
    world.edit("vol", |text| text.replace(&name, &"ab".repeat(16)));
    world.run(&["revoke", "vol", "--yes"]).is(23).says(&"ab".repeat(16)).says("still opens");
}
