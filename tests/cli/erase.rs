//! `erase` with key files: plan, confirmation, death after each step, the run after it, and what is said afterwards.

use crate::world::{World, gone};

fn journal(world: &World, volume: &str) -> serde_json::Value {
    serde_json::from_slice(&std::fs::read(world.path(volume).join("lethefs.erase")).unwrap()).unwrap()
}

#[test]
fn a_plan_shows_what_dies_and_changes_nothing() {
    let world = World::new();
    let id = world.volume("vol", "key");
    let shared = world.volume("two", "key");
    let other = world.volume("three", "second");
    let before = world.snapshot();
    let plan = world.run(&["erase", "vol", "--plan", "--json"]);
    plan.is(0);
    assert!(before == world.snapshot());
    assert!(plan.out.starts_with("{\n  \"schema\": 1,\n  \"volume_id\": \""), "{}", plan.out);
    let plan: serde_json::Value = serde_json::from_str(&plan.out).unwrap();
    assert_eq!((&plan["volume_id"], &plan["pinned"]), (&id.as_str().into(), &true.into()));
    assert_eq!(plan["shared_with"][0]["volume_id"], shared.as_str());
    assert_eq!(plan["shared_with"].as_array().unwrap().len(), 1, "{other} has a key of its own");
    assert_eq!((&plan["contents"]["files"], &plan["keys"][0]["name"]), (&0.into(), &world.key_name("key").into()));
    let text = world.run(&["erase", "vol", "--plan"]).out;
    assert!(text.contains("also dies") && text.contains("any copy of the key file"), "{text}");
}

#[test]
fn without_the_right_words_nothing_happens() {
    let world = World::new();
    let id = world.volume("vol", "key");
    let name = world.key_name("key");
    let wrong = "0".repeat(32);
    world.refuses(&["erase", "vol"], 19, "no terminal");
    world.refuses(&["erase", "vol", "--confirm-volume", &id], 19, "no terminal");
    world.refuses(&["erase", "vol", "--confirm-volume", &wrong, "--confirm-key", &name], 19, "volume id");
    world.refuses(&["erase", "vol", "--confirm-volume", &id, "--confirm-key", "key"], 19, "key names");
    let shared = world.volume("two", "key");
    world.refuses(&["erase", "vol", "--confirm-volume", &id, "--confirm-key", &name], 19, &shared);
    world.run(&["erase", "vol", "--confirm-volume", &id, "--confirm-key", &name, "--also-erases", &shared]).is(0);
    assert!(gone(&world.path("keys/key")));
}

#[test]
fn an_erased_volume_says_so() {
    let world = World::new();
    let id = world.volume("vol", "key");
    let name = world.key_name("key");
    let erase = ["erase", "vol", "--confirm-volume", &id, "--confirm-key", &name];
    let run = world.run(&erase);
    run.is(0);
    assert!(run.out.contains("only lethefs's own word") && run.out.contains("asked"), "{}", run.out);
    let written = journal(&world, "vol");
    assert_eq!((&written["state"], &written["slots"][0]["state"]), (&"irrecoverable".into(), &"destroyed".into()));
    assert!(written["slots"][0]["proof"]["self_asserted"].as_bool().unwrap());
    for copy in ["lethefs.volume", "lethefs.volume.bak"] {
        let text = std::fs::read_to_string(world.path("vol").join(copy)).unwrap();
        assert!(text.contains(r#""wrapped":"","canary":"""#) && text.contains(r#""state":"destroyed""#), "{text}");
    }
    world.refuses(&["mount", "vol", "mnt"], 17, "which is not authenticated, an erase destroyed the key for good at");
    assert!(world.run(&["status", "vol"]).out.contains("not authenticated"));
    // Again: proves again, keeps the times.
    world.run(&erase).is(0);
    assert_eq!(journal(&world, "vol")["irrecoverable_at"], written["irrecoverable_at"]);
}

#[cfg(debug_assertions)]
#[test]
fn death_after_any_step_is_made_good_by_running_again() {
    use std::os::unix::process::ExitStatusExt as _;
    for step in ["begun", "sealed", "inaccessible", "scheduled", "irrecoverable", "tombstone"] {
        let world = World::new();
        let id = world.volume("vol", "key");
        let name = world.key_name("key");
        let erase = ["erase", "vol", "--confirm-volume", &id, "--confirm-key", &name];
        let status = world.command(&erase).env("LETHEFS_TEST_ABORT_AFTER", step).status().unwrap();
        assert_eq!(status.signal(), Some(9), "{step}");
        let begun = journal(&world, "vol")["begun_at"].clone();
        if !gone(&world.path("keys/key")) {
            let plan = world.run(&["erase", "vol", "--plan"]);
            assert!(plan.out.contains("an erase was begun at"), "{step}: {}", plan.out);
        }
        world.run(&erase).is(0);
        let after = journal(&world, "vol");
        assert_eq!((&after["state"], &after["begun_at"]), (&"irrecoverable".into(), &begun), "{step}");
        world.refuses(&["mount", "vol", "mnt"], 17, "erase");
    }
}

#[test]
fn a_key_that_cannot_be_destroyed_is_still_restorable() {
    let world = World::new();
    let id = world.volume("vol", "key");
    world.volume("two", "second");
    let name = world.key_name("key");
    std::fs::copy(world.path("keys/second"), world.path("keys/key")).unwrap();
    let before = std::fs::read_to_string(world.path("vol/lethefs.volume")).unwrap();
    let run = world.run(&["erase", "vol", "--confirm-volume", &id, "--confirm-key", &name]);
    run.is(18).says("still restorable").says("recreated");
    assert_eq!(journal(&world, "vol")["state"], "begun");
    assert_eq!(
        std::fs::read_to_string(world.path("vol/lethefs.volume")).unwrap(),
        before,
        "wrapped keys stay until T3"
    );
    assert!(!gone(&world.path("keys/second")) && !gone(&world.path("keys/key")));
}

#[test]
fn a_volume_file_that_names_more_keys_is_not_called_erased() {
    let world = World::new();
    let id = world.volume("vol", "key");
    let name = world.key_name("key");
    world.edit("vol", |text| text.replace(&name, &"ab".repeat(16)));
    // The key that dies is the pin's, not the one the file names.
    let run = world.run(&["erase", "vol", "--confirm-volume", &id, "--confirm-key", &name]);
    run.is(18).says(&"ab".repeat(16)).says("was not touched");
    assert!(gone(&world.path("keys/key")));
}

#[test]
fn a_stolen_disk_is_erased_without_it() {
    let world = World::new();
    let id = world.volume("vol", "key");
    let name = world.key_name("key");
    std::fs::remove_dir_all(world.path("vol")).unwrap();
    world.refuses(&["erase", "--volume-id", &id], 19, "no terminal");
    let key = world.uri("key");
    world.refuses(&["erase", "--volume-id", &id, "--key", &key, "--confirm-key", "x"], 19, "key names");
    world.run(&["erase", "--volume-id", &id, "--key", &key, "--confirm-key", &name]).is(0);
    assert!(gone(&world.path("keys/key")));
    let journal = std::fs::read(world.path("state/erase").join(format!("{id}.json"))).unwrap();
    let journal: serde_json::Value = serde_json::from_slice(&journal).unwrap();
    assert_eq!(journal["state"], "irrecoverable");
}

#[test]
fn without_a_pin_the_key_must_be_named() {
    let world = World::new();
    let id = world.volume("vol", "key");
    let name = world.key_name("key");
    std::fs::remove_file(world.path("trust").join(&id)).unwrap();
    let confirm = ["erase", "vol", "--confirm-volume", &id, "--confirm-key", &name];
    world.refuses(&confirm, 2, "--key URI");
    let key = world.uri("key");
    let named: Vec<&str> = confirm.iter().copied().chain(["--key", &key]).collect();
    assert!(world.run(&["erase", "vol", "--plan", "--key", &key]).out.contains("no pin"));
    world.run(&named).is(0);
    assert!(gone(&world.path("keys/key")));
}

#[test]
fn a_wrong_path_of_the_key_file_is_no_proof() {
    let world = World::new();
    let id = world.volume("vol", "key");
    let name = world.key_name("key");
    let typo = world.uri("kye");
    let erase = ["erase", "vol", "--confirm-volume", &id, "--confirm-key", &name, "--key", &typo];
    let untouched = || ["lethefs.volume", "lethefs.volume.bak"].map(|copy| std::fs::read(world.path("vol").join(copy)));
    let before = untouched().map(Result::unwrap);
    let key = std::fs::read(world.path("keys/key")).unwrap();
    let pin = std::fs::read(world.path("trust").join(&id)).unwrap();

    // Nobody vouches for the place, and nothing is there. Again, with the journal of the first time.
    std::fs::remove_file(world.path("trust").join(&id)).unwrap();
    for _ in 0..2 {
        world.run(&erase).is(18).says("the key file was not found where expected").says("keys/kye");
        assert_eq!(untouched().map(Result::unwrap), before);
        assert_eq!(journal(&world, "vol")["slots"][0]["state"], "pending");
        assert_eq!(std::fs::read(world.path("keys/key")).unwrap(), key);
    }
    // It lies neither where the pin says nor where the command does.
    std::fs::write(world.path("trust").join(&id), &pin).unwrap();
    std::fs::rename(world.path("keys/key"), world.path("keys/moved")).unwrap();
    world.run(&erase).is(18).says("keys/key").says("keys/kye");
    world.run(&erase[..6]).is(18).says("the key file was not found where expected");
    assert_eq!(untouched().map(Result::unwrap), before);
    assert_eq!(std::fs::read(world.path("keys/moved")).unwrap(), key, "the volume still opens");
    // Both places count: where the pin says, and where it is.
    let moved = world.uri("moved");
    let plan = world.run(&["erase", "vol", "--plan", "--json", "--key", &moved]).out;
    let plan: serde_json::Value = serde_json::from_str(&plan).unwrap();
    assert_eq!(plan["keys"].as_array().unwrap().len(), 2, "{plan}");
    world.run(&["erase", "vol", "--confirm-volume", &id, "--confirm-key", &name, "--key", &moved]).is(0);
    assert!(gone(&world.path("keys/moved")));
    // Afterwards absence is what the journal leads to expect.
    world.run(&erase).is(0);
}

#[test]
fn a_given_key_file_does_not_stand_in_for_the_pinned_one() {
    let world = World::new();
    let id = world.volume("vol", "key");
    world.volume("two", "second");
    let name = world.key_name("key");
    let (typo, second) = (world.uri("kye"), world.uri("second"));
    let erase = ["erase", "vol", "--confirm-volume", &id, "--confirm-key", &name, "--key"];
    let with = |uri| [&erase[..], &[uri]].concat();
    world.refuses(&with(&second), 2, "not among the keys");
    world.refuses(&["erase", "--volume-id", &id, "--key", &second, "--confirm-key", &name], 2, "not among the keys");
    world.run(&with(&typo)).is(0);
    assert!(gone(&world.path("keys/key")) && !gone(&world.path("keys/second")));
}
