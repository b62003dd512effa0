//! Slots, recovery shares and saved headers with key files: what opens, what is refused, dying half-way, and what an erase says.

use serde_json::Value;

use crate::world::{World, gone};

fn body(world: &World, volume: &str) -> Value {
    let text = std::fs::read_to_string(world.path(volume).join("lethefs.volume")).unwrap();
    serde_json::from_str(text.lines().next().unwrap()).unwrap()
}

fn list(world: &World, volume: &str) -> Value {
    let run = world.run(&["keys", "list", volume, "--json"]);
    run.is(0);
    serde_json::from_str(&run.out).unwrap()
}

/// Opens, by whatever slot it may be, or says why not.
fn opens(world: &World, volume: &str) -> Option<i32> {
    world.run(&["fsck", volume, "--quiet"]).code
}

fn hide(world: &World, key: &str) {
    std::fs::rename(world.path("keys").join(key), world.path("keys").join(format!("{key}.hidden"))).unwrap();
}

fn show(world: &World, key: &str) {
    std::fs::rename(world.path("keys").join(format!("{key}.hidden")), world.path("keys").join(key)).unwrap();
}

#[test]
fn a_second_key_opens_and_the_first_can_go() {
    let world = World::new();
    let id = world.volume("vol", "one");
    let two = world.uri("two");
    world.run(&["keys", "add-slot", "vol", &two]).is(0);
    let after = list(&world, "vol");
    assert_eq!((&after["generation"], &after["pinned"]), (&2.into(), &true.into()));
    assert_eq!((&after["slots"][1]["id"], &after["slots"][1]["uri"]), (&2.into(), &two.as_str().into()));
    // Once more is no second slot.
    let again = world.run(&["keys", "add-slot", "vol", &two, "--json"]);
    again.is(0);
    assert_eq!(serde_json::from_str::<Value>(&again.out).unwrap()["done"], "there-already");
    assert_eq!(body(&world, "vol")["generation"], 2);
    assert_eq!(opens(&world, "vol"), Some(0));

    // A key that is not there is a word about the volume, and the other is asked only by its name.
    hide(&world, "one");
    world.refuses(&["fsck", "vol", "--quiet"], 14, &format!("--kms {two}"));
    world.run(&["fsck", "vol", "--quiet", "--kms", &two]).is(0);
    // Only what opens by another slot is removed: not the one that opens, as long as the other does not.
    world.refuses(&["keys", "remove-slot", "vol", "2"], 14, "one");
    world.refuses(&["keys", "remove-slot", "vol", "7", "--kms", &two], 2, "no slot 7");
    let run = world.run(&["keys", "remove-slot", "vol", "1"]);
    run.is(0).says("copies of the volume file from before");
    assert_eq!(opens(&world, "vol"), Some(0));
    world.refuses(&["keys", "remove-slot", "vol", "2"], 2, "no other slot");
    show(&world, "one");
    let after = list(&world, "vol");
    assert_eq!((after["slots"].as_array().unwrap().len(), &after["removed"][0]["id"]), (1, &1.into()));
    // Its number is not given again.
    world.run(&["keys", "add-slot", "vol", &world.uri("three")]).is(0);
    assert_eq!(list(&world, "vol")["slots"][1]["id"], 3);

    let log = world.run(&["audit", "show", "vol"]).out;
    assert!(log.contains("slot-added") && log.contains("slot-removed"), "{log}");
    world.run(&["audit", "verify", "vol"]).is(0);

    // The erase names every key, and the removed one as what is left.
    let plan = world.run(&["erase", "vol", "--plan"]).out;
    assert!(plan.contains("slot 1 was removed") && plan.contains(&world.key_name("one")), "{plan}");
    let names = ["two", "three"].map(|key| world.key_name(key));
    let one_only = ["erase", "vol", "--confirm-volume", &id, "--confirm-key", &names[0]];
    world.refuses(&one_only, 19, "not typed: ");
    let both = [&one_only[..], &["--confirm-key", &names[1]]].concat();
    world.run(&both).is(0);
    assert!(gone(&world.path("keys/two")) && gone(&world.path("keys/three")) && !gone(&world.path("keys/one")));
    world.refuses(&["fsck", "vol", "--quiet"], 17, "erase");
}

#[test]
fn an_old_copy_with_a_removed_slot_is_refused_by_its_generation_and_dies_if_named() {
    let world = World::new();
    let id = world.volume("vol", "one");
    let old = std::fs::read(world.path("vol/lethefs.volume")).unwrap();
    world.run(&["keys", "add-slot", "vol", &world.uri("two")]).is(0);
    world.run(&["keys", "remove-slot", "vol", "1"]).is(0);
    let new = std::fs::read(world.path("vol/lethefs.volume")).unwrap();
    for name in ["lethefs.volume", "lethefs.volume.bak"] {
        std::fs::write(world.path("vol").join(name), &old).unwrap();
    }
    // The pin does not know the removed key any more, nor that generation.
    assert!(matches!(opens(&world, "vol"), Some(10 | 16)));
    for name in ["lethefs.volume", "lethefs.volume.bak"] {
        std::fs::write(world.path("vol").join(name), &new).unwrap();
    }
    let (one, two) = (world.key_name("one"), world.key_name("two"));
    let uri = world.uri("one");
    let erase = ["erase", "vol", "--key", &uri, "--confirm-volume", &id, "--confirm-key", &one, "--confirm-key", &two];
    world.run(&erase).is(0);
    assert!(gone(&world.path("keys/one")) && gone(&world.path("keys/two")));
}

#[test]
fn what_cannot_be_a_slot_changes_nothing() {
    let world = World::new();
    world.volume("vol", "one");
    let inside = format!("file://{}", world.path("vol/key").display());
    world.refuses(&["keys", "add-slot", "vol", &inside], 2, "inside the backing directory");
    world.refuses(&["keys", "add-slot", "vol", "file:///nonexistent/dir/key"], 2, "nonexistent");
    world.refuses(&["keys", "add-slot", "vol", "s3://bucket"], 2, "scheme");
    world.refuses(&["keys", "add-slot", "vol", "recovery:", "--threshold", "1"], 2, "2 or more");
    world.refuses(&["keys", "add-slot", "vol", "recovery:", "--threshold", "6"], 2, "2 to 255");
    world.refuses(&["keys", "add-slot", "nowhere", &world.uri("two")], 2, "no backing directory");
    world.refuses(&["keys", "remove-slot", "vol", "1"], 2, "no other slot");
    hide(&world, "one");
    world.refuses(&["keys", "add-slot", "vol", &world.uri("two")], 14, "one");
    show(&world, "one");
    // A volume file that somebody altered.
    world.edit("vol", |text| text.replace(r#""label":"""#, r#""label":"x""#));
    world.refuses(&["keys", "add-slot", "vol", &world.uri("two")], 10, "not authentic");
}

#[cfg(debug_assertions)]
#[test]
fn death_at_any_step_leaves_a_volume_that_opens_and_is_made_good_by_running_again() {
    for step in ["slot-recorded", "slot-written", "slot-pinned"] {
        let world = World::new();
        world.volume("vol", "one");
        let two = world.uri("two");
        let add = ["keys", "add-slot", "vol", &two];
        assert!(!world.command(&add).env("LETHEFS_TEST_ABORT_AFTER", step).status().unwrap().success());
        assert_eq!(opens(&world, "vol"), Some(0), "{step}");
        world.run(&add).is(0);
        let slots = list(&world, "vol");
        assert_eq!(slots["slots"].as_array().unwrap().len(), 2, "{step}");
        hide(&world, "one");
        world.run(&["fsck", "vol", "--quiet", "--kms", &two]).is(0);
        show(&world, "one");
        // And out again.
        let remove = ["keys", "remove-slot", "vol", "1"];
        assert!(!world.command(&remove).env("LETHEFS_TEST_ABORT_AFTER", step).status().unwrap().success());
        assert_eq!(opens(&world, "vol"), Some(0), "{step}");
        if list(&world, "vol")["slots"].as_array().unwrap().len() == 2 {
            world.run(&remove).is(0);
        }
        hide(&world, "one");
        assert_eq!(opens(&world, "vol"), Some(0), "{step}");
        world.run(&["audit", "verify", "vol"]).is(0);
    }
    // Between the two copies: one is new, the other old. Whatever runs next takes the newer, and makes both so.
    let world = World::new();
    world.volume("vol", "one");
    let old = std::fs::read(world.path("vol/lethefs.volume")).unwrap();
    world.run(&["keys", "add-slot", "vol", &world.uri("two")]).is(0);
    std::fs::write(world.path("vol/lethefs.volume.bak"), old).unwrap();
    let run = world.run(&["keys", "add-slot", "vol", &world.uri("three")]);
    run.is(0).says("both are written anew");
    let copies =
        ["lethefs.volume", "lethefs.volume.bak"].map(|name| std::fs::read(world.path("vol").join(name)).unwrap());
    assert_eq!(copies[0], copies[1]);
    assert_eq!(list(&world, "vol")["slots"].as_array().unwrap().len(), 3);
}

#[test]
fn many_at_once_each_get_their_slot() {
    let world = World::new();
    world.volume("vol", "one");
    std::thread::scope(|scope| {
        for n in 0..6 {
            let world = &world;
            scope.spawn(move || world.run(&["keys", "add-slot", "vol", &world.uri(&format!("k{n}"))]).is(0).code);
        }
    });
    let slots = list(&world, "vol");
    let mut ids: Vec<u64> =
        slots["slots"].as_array().unwrap().iter().map(|slot| slot["id"].as_u64().unwrap()).collect();
    ids.sort_unstable();
    assert_eq!(ids, [1, 2, 3, 4, 5, 6, 7]);
    assert_eq!((&slots["generation"], opens(&world, "vol")), (&7.into(), Some(0)));
}

#[test]
fn shares_on_paper_bring_a_volume_back_whose_key_is_lost() {
    let world = World::new();
    let id = world.volume("vol", "one");
    let run = world.run(&["keys", "add-slot", "vol", "recovery:", "--shares", "4", "--threshold", "2", "--json"]);
    run.is(0);
    let report: Value = serde_json::from_str(&run.out).unwrap();
    let shares: Vec<&str> =
        report["recovery_shares"].as_array().unwrap().iter().map(|share| share.as_str().unwrap()).collect();
    assert_eq!(shares.len(), 4);
    // Nothing of them is anywhere on disk: not in the volume, the pin, the audit log.
    for (path, (_, contents)) in world.snapshot() {
        let text = String::from_utf8_lossy(&contents).to_lowercase();
        for share in &shares {
            assert!(!text.contains(&share[60..80]), "{}", path.display());
        }
    }
    let text = world.run(&["keys", "list", "vol"]).out;
    assert!(text.contains("any 2 of 4 shares (on paper)"), "{text}");
    std::fs::write(world.path("a"), format!("# from the safe\n{}\n", shares[3])).unwrap();
    std::fs::write(world.path("b"), shares[1].to_uppercase().replace('-', " ")).unwrap();
    let mut slip = shares[0].to_owned();
    let last = slip.pop().unwrap();
    slip.push(if last == '0' { '1' } else { '0' });
    std::fs::write(world.path("c"), slip).unwrap();

    // The key is lost, and so is this host with its pin.
    std::fs::remove_file(world.path("keys/one")).unwrap();
    std::fs::remove_file(world.path("trust").join(&id)).unwrap();
    assert_eq!(opens(&world, "vol"), Some(16));
    let two = world.uri("two");
    let add = |more: &[&str]| [&["keys", "add-slot", "vol", &two, "--recovery-shares"][..], more].concat().join("\n");
    let refuse = |more: &[&str], code, part: &str| {
        let line = add(more);
        world.refuses(&line.split('\n').collect::<Vec<_>>(), code, part);
    };
    refuse(&["a", "b"], 16, "--trust");
    refuse(&["a", "--trust"], 2, "1 different recovery shares were given, and 2 are needed");
    refuse(&["a", "c", "--trust"], 2, "recovery share 2");
    refuse(&["a", "nowhere", "--trust"], 1, "nowhere");
    let line = add(&["a", "b", "--trust"]);
    world.run(&line.split('\n').collect::<Vec<_>>()).is(0);
    assert_eq!(opens(&world, "vol"), Some(0));
    world.run(&["audit", "verify", "vol"]).is(0);
    // The dead slot goes; the paper is enough to take another's place.
    world.run(&["keys", "remove-slot", "vol", "1"]).is(0);
    // Of another volume.
    world.volume("other", "three");
    let foreign = ["keys", "add-slot", "other", &two, "--recovery-shares", "a", "b"];
    world.refuses(&foreign, 2, "no (other) slot of this volume");

    // An erase empties the slot here and says what it cannot reach.
    let kept = std::fs::read(world.path("vol/lethefs.volume")).unwrap();
    let plan = world.run(&["erase", "vol", "--plan"]).out;
    assert!(plan.contains("shares on paper of slot 2") && plan.contains("reaches neither paper nor copies"), "{plan}");
    let revoked = world.run(&["revoke", "vol", "--yes"]);
    revoked.is(0).says("on paper and cannot be suspended");
    let run = world.run(&["erase", "vol", "--confirm-volume", &id, "--confirm-key", &world.key_name("two.suspended")]);
    run.is(0);
    assert!(run.out.contains("shares on paper"), "{}", run.out);
    assert!(!std::fs::read_to_string(world.path("vol/lethefs.volume")).unwrap().contains("lethefs-recovery:"));
    let again = ["keys", "add-slot", "vol", &world.uri("four"), "--recovery-shares", "a", "b"].map(str::to_owned);
    let again: Vec<&str> = again.iter().map(String::as_str).collect();
    world.refuses(&again, 2, "do not open this volume");
    // And it is true: with a copy of the volume file, paper still opens.
    for name in ["lethefs.volume", "lethefs.volume.bak"] {
        std::fs::write(world.path("vol").join(name), &kept).unwrap();
    }
    world.run(&again).is(0);
}

#[test]
fn a_saved_header_is_put_back_if_it_is_genuine_and_not_older() {
    let world = World::new();
    world.volume("vol", "one");
    world.run(&["keys", "backup-header", "vol", "saved"]).is(0).says("an erase does not reach it");
    world.refuses(&["keys", "backup-header", "vol", "saved"], 2, "is there already");
    world.refuses(&["keys", "backup-header", "vol", "nowhere/saved"], 2, "its directory is not there");
    let before = world.snapshot();
    let run = world.run(&["keys", "restore-header", "vol", "saved"]);
    run.is(0);
    assert!(run.out.contains("nothing had to be changed"));
    assert!(before == world.snapshot());

    // All that it holds is gone.
    for name in ["lethefs.volume", "lethefs.volume.bak", "lethefs.dir"] {
        std::fs::remove_file(world.path("vol").join(name)).unwrap();
    }
    assert_eq!(opens(&world, "vol"), Some(10));
    // With the root's header still there it was a volume, and what to do is said.
    std::os::unix::fs::symlink("x", world.path("vol/lethefs.dir")).unwrap();
    for verb in
        [&["mount", "vol", "mnt"][..], &["status", "vol"], &["fsck", "vol", "--quiet"], &["keys", "list", "vol"]]
    {
        world.refuses(verb, 10, "are both gone from what was a volume");
    }
    std::fs::remove_file(world.path("vol/lethefs.dir")).unwrap();
    let run = world.run(&["keys", "restore-header", "vol", "saved"]);
    run.is(0);
    assert!(run.out.contains("volume-file, root-header"), "{}", run.out);
    assert_eq!(opens(&world, "vol"), Some(0));

    // Damage at any byte, and other volumes' places.
    let good = std::fs::read(world.path("saved")).unwrap();
    for at in (0..good.len()).step_by(41) {
        let mut bad = good.clone();
        bad[at] ^= 2;
        std::fs::write(world.path("bad"), bad).unwrap();
        let before = world.snapshot();
        let run = world.run(&["keys", "restore-header", "vol", "bad"]);
        assert!(matches!(run.code, Some(2)), "byte {at}: {}", run.err);
        assert!(before == world.snapshot(), "byte {at}");
    }
    world.volume("other", "three");
    world.refuses(&["keys", "restore-header", "other", "saved"], 2, "root");

    // Not over something newer, and never below the pin.
    world.run(&["keys", "add-slot", "vol", &world.uri("two")]).is(0);
    world.refuses(&["keys", "restore-header", "vol", "saved"], 10, "the saved header saved is older (generation");
    world.refuses(&["keys", "restore-header", "vol", "saved", "--older"], 10, "older");
    let id = body(&world, "vol")["volume_id"].as_str().unwrap().to_owned();
    std::fs::remove_file(world.path("trust").join(id)).unwrap();
    let trust = ["keys", "restore-header", "vol", "saved", "--trust", "--kms", &world.uri("one")].map(str::to_owned);
    let trust: Vec<&str> = trust.iter().map(String::as_str).collect();
    world.refuses(&trust, 2, "--older");
    world.run(&[&trust[..], &["--older"]].concat()).is(0);
    assert_eq!((body(&world, "vol")["generation"].clone(), opens(&world, "vol")), (1.into(), Some(0)));
}
