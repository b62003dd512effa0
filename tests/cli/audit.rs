//! `audit` with key files: what the verbs record, what `verify` finds, and a log that cannot be written.

use serde_json::Value;

use crate::world::World;

fn log(world: &World, id: &str) -> std::path::PathBuf {
    world.path("state/audit").join(format!("{id}.jsonl"))
}

fn records(world: &World, id: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(log(world, id)).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn events(world: &World, id: &str) -> Vec<String> {
    records(world, id).iter().map(|record| record["event"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn verbs_are_recorded_and_every_edit_is_found() {
    let world = World::new();
    let id = world.volume("vol", "key");
    world.run(&["fsck", "vol", "--quiet"]).is(0);
    std::fs::rename(world.path("keys/key"), world.path("keys/away")).unwrap();
    world.run(&["fsck", "vol", "--quiet"]).is(14);
    std::fs::rename(world.path("keys/away"), world.path("keys/key")).unwrap();
    world.run(&["fsck", "vol", "--quiet", "--repair"]).is(0);
    assert_eq!(events(&world, &id), ["init", "fetch", "fetch-failed", "fetch", "repair"]);
    let failed = &records(&world, &id)[2];
    assert_eq!((&failed["data"]["class"], &failed["data"]["purpose"]), (&"missing".into(), &"fsck".into()));
    assert_eq!(failed["data"]["key"]["key_id"], world.key_name("key"));

    let whole = world.run(&["audit", "verify", "vol", "--json"]);
    whole.is(0);
    let whole: Value = serde_json::from_str(&whole.out).unwrap();
    assert_eq!((&whole["records"], &whole["volume_id"]), (&5.into(), &id.as_str().into()));
    let head = whole["head"].as_str().unwrap().to_owned();
    let file = log(&world, &id);
    let path = file.to_str().unwrap();
    world.run(&["audit", "verify", path, "--expect-head", &head, "--at-least", "5"]).is(0);
    assert_eq!(world.run(&["audit", "show", "vol"]).out.lines().count(), 5);
    world.refuses(&["audit", "verify", "vol", "--expect-head", "abc"], 2, "64 hex digits");
    world.refuses(&["audit", "verify", "nowhere.jsonl"], 2, "no audit log");
    world.refuses(&["audit", "show", "/etc/passwd"], 2, "is no audit log: no line of it is a record");

    // It goes on: the head of before is still in it.
    world.run(&["fsck", "vol", "--quiet"]).is(0);
    world.run(&["audit", "verify", path, "--expect-head", &head]).is(0);
    let good = std::fs::read_to_string(&file).unwrap();
    let lines: Vec<&str> = good.split_inclusive('\n').collect();
    for (case, bad) in [
        ("removed", [&lines[..2], &lines[3..]].concat().concat()),
        ("edited", good.replacen("\"missing\"", "\"denied\"", 1)),
        ("swapped", [lines[1], lines[0], lines[2]].concat()),
    ] {
        std::fs::write(&file, bad).unwrap();
        let run = world.run(&["audit", "verify", "vol"]);
        assert_eq!(run.code, Some(22), "{case}: {}", run.out);
        assert!(run.out.contains("not as it was written") && run.out.contains("line"), "{}", run.out);
    }
    // A cut end shows only to who knows more.
    std::fs::write(&file, lines[..4].concat()).unwrap();
    let run = world.run(&["audit", "verify", "vol"]);
    assert!(run.code == Some(0) && run.out.contains("shows only to --expect-head"), "{}", run.out);
    assert_eq!(world.run(&["audit", "verify", "vol", "--expect-head", &head]).code, Some(22));
    assert_eq!(world.run(&["audit", "verify", "vol", "--at-least", "5"]).code, Some(22));
}

#[test]
fn an_erase_is_recorded_step_by_step_and_goes_on_without_a_log() {
    let world = World::new();
    let (id, name) = (world.volume("vol", "key"), world.key_name("key"));
    world.run(&["erase", "vol", "--confirm-volume", &id, "--confirm-key", &name]).is(0);
    let all = records(&world, &id);
    let phases: Vec<&str> = all.iter().filter_map(|record| record["data"]["phase"].as_str()).collect();
    assert_eq!(phases, ["begun", "inaccessible", "scheduled", "irrecoverable"]);
    // For people: no JSON, and each key on a line of its own.
    let shown = world.run(&["audit", "show", "vol"]).out;
    assert!(!shown.contains(['{', '"']), "{shown}");
    let keys: Vec<&str> = shown.lines().filter(|line| line.starts_with("        key")).collect();
    assert_eq!(keys.len(), 4, "{shown}");
    assert!(keys.iter().all(|line| line.contains(&format!("key={name}")) && line.contains("slot=1")), "{shown}");
    assert!(keys[3].contains("state=destroyed"), "{shown}");
    // A line that somebody spoiled is not passed over in silence.
    let good = std::fs::read_to_string(log(&world, &id)).unwrap();
    std::fs::write(log(&world, &id), good.replacen("begun", "Begun", 1)).unwrap();
    let run = world.run(&["audit", "show", "vol"]);
    assert!(run.code == Some(0) && run.err.contains("1 lines are no records"), "{}", run.err);
    std::fs::write(log(&world, &id), good).unwrap();
    world.run(&["audit", "verify", "vol"]).is(0);

    let (id, name) = (world.volume("two", "second"), world.key_name("second"));
    // Nobody, root included, writes to a directory.
    std::fs::remove_file(log(&world, &id)).unwrap();
    std::fs::create_dir(log(&world, &id)).unwrap();
    let run = world.run(&["erase", "two", "--confirm-volume", &id, "--confirm-key", &name]);
    run.is(0).says("audit log").says("cannot be written");
    assert!(crate::world::gone(&world.path("keys/second")));
}

#[cfg(debug_assertions)]
#[test]
fn an_erase_that_dies_has_recorded_what_it_did() {
    for (step, phases) in
        [("begun", &["begun"][..]), ("irrecoverable", &["begun", "inaccessible", "scheduled", "irrecoverable"])]
    {
        let world = World::new();
        let (id, name) = (world.volume("vol", "key"), world.key_name("key"));
        let erase = ["erase", "vol", "--confirm-volume", &id, "--confirm-key", &name];
        assert!(!world.command(&erase).env("LETHEFS_TEST_ABORT_AFTER", step).status().unwrap().success());
        let all = records(&world, &id);
        let seen: Vec<&str> = all.iter().filter_map(|record| record["data"]["phase"].as_str()).collect();
        assert_eq!(seen, phases, "{step}");
    }
}
