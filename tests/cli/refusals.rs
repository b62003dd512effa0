//! Bad input: each with its code, a line that says what to do, and nothing changed on disk.

use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::world::{World, gone, swap};

#[test]
fn bad_usage() {
    let world = World::new();
    world.refuses(&["fly"], 2, "fly");
    world.refuses(&["mount", "vol"], 2, "MOUNTPOINT");
    world.refuses(&["mount", "vol", "mnt", "--fly"], 2, "--fly");
    world.refuses(&["mount", "vol", "mnt", "-o", "ro,fly"], 2, "\"fly\"");
    world.refuses(&["mount", "vol", "mnt", "--threads", "many"], 2, "1 to 64");
    world.refuses(&["erase", "--volume-id", "xyz"], 2, "32 hex digits");
    world.refuses(&["erase"], 2, "required");
    let choice = world.run(&["init", "vol"]);
    choice.is(2).says("hashivault://").says("file://").says("lost");
    assert!(gone(&world.path("vol")));
}

#[test]
fn bad_uris_and_secrets() {
    let world = World::new();
    world.refuses(&["init", "vol", "--kms", "s3://key"], 2, "unknown key URI scheme");
    world.refuses(&["init", "vol", "--kms", "hashivault://key?colour=red"], 2, "colour");
    for uri in
        ["hashivault://key?token=hunter2", "hashivault://me:hunter2@key", "hashivault://key?engine=e&secret_id=hunter2"]
    {
        for args in [
            &["init", "vol", "--kms", uri][..],
            &["keys", "check", uri],
            &["mount", "v", "m", "--kms", uri],
            &["erase", "v", "--key", uri],
        ] {
            world.refuses(args, 2, "credential");
            assert!(!world.run(args).err.contains("hunter2"));
        }
    }
}

#[test]
fn init_refuses_bad_places() {
    let world = World::new();
    let key = world.uri("key");
    world.refuses(&["init", "no/where", "--kms", &key], 2, "no parent directory");
    std::fs::write(world.path("full"), "x").unwrap();
    world.refuses(&["init", "full", "--kms", &key], 2, "not a directory");
    world.refuses(&["init", "keys/../home/..", "--kms", &key], 2, "not empty");
    std::fs::create_dir(world.path("data")).unwrap();
    let inside = format!("file://{}/key", world.path("data").display());
    world.refuses(&["init", "data", "--kms", &inside], 2, "inside the backing directory");
    std::os::unix::fs::symlink(world.path("data"), world.path("alias")).unwrap();
    let around = format!("file://{}/key", world.path("alias").display());
    world.refuses(&["init", "data", "--kms", &around], 2, "inside the backing directory");
    world.refuses(&["init", "data", "--kms", &key, "--label", &"x".repeat(65)], 2, "at most 64");
    world.refuses(&["init", "data", "--kms", &key, "--label", "a\nb"], 2, "control");
    world.volume("vol", "key");
    world.refuses(&["init", "vol", "--kms", &key], 2, "already is a lethefs volume");
    world.refuses(&["init", "vol/sub", "--kms", &key], 2, "inside a lethefs volume");
}

#[test]
fn init_that_fails_late_leaves_nothing() {
    let world = World::new();
    world.volume("other", "key");
    std::fs::create_dir(world.path("empty")).unwrap();
    // The pin is written last; a directory that others can write is no place for it.
    std::fs::set_permissions(world.path("trust"), std::fs::Permissions::from_mode(0o777)).unwrap();
    let key = world.uri("key");
    world.refuses(&["init", "fresh", "--kms", &key], 1, "nobody else can write");
    world.refuses(&["init", "empty", "--kms", &key], 1, "nobody else can write");
    assert!(gone(&world.path("fresh")));
}

#[test]
fn mount_refuses_bad_places() {
    let world = World::new();
    world.volume("vol", "key");
    std::fs::create_dir(world.path("vol/sub")).unwrap();
    std::fs::create_dir(world.path("plain")).unwrap();
    world.refuses(&["mount", "nowhere", "mnt"], 2, "no backing directory");
    world.refuses(&["mount", "vol", "vol"], 2, "both");
    world.refuses(&["mount", "vol", "vol/sub"], 2, "inside the backing directory");
    world.refuses(&["mount", "vol", "."], 2, "inside the mountpoint");
    world.refuses(&["mount", "vol", "nowhere"], 15, "make the directory first");
    world.refuses(&["mount", "plain", "mnt"], 10, "not a lethefs volume");
    world.refuses(&["status", "plain"], 10, "not a lethefs volume");
    world.refuses(&["umount", "mnt"], 15, "nothing is mounted");
    world.refuses(&["umount", "/proc"], 15, "not lethefs");
}

#[test]
fn a_volume_in_use_is_left_alone() {
    let world = World::new();
    world.volume("vol", "key");
    let held = std::fs::File::open(world.path("vol")).unwrap();
    held.try_lock().unwrap();
    world.refuses(&["mount", "vol", "mnt"], 11, "already mounted");
    world.refuses(&["mount", "-f", "vol", "mnt"], 11, "already mounted");
}

#[test]
fn volume_files_that_are_not_right() {
    let world = World::new();
    world.volume("vol", "key");
    let read = |name: &str| std::fs::read_to_string(world.path("vol").join(name)).unwrap();
    let (good, copy) = (read("lethefs.volume"), read("lethefs.volume.bak"));
    let half = |text: &str| text[..text.len() / 2].to_owned();
    type Change<'a> = Box<dyn Fn(&str) -> String + 'a>;
    let cases: Vec<(Change<'_>, i32, &str)> = vec![
        (Box::new(half), 10, "damaged"),
        (Box::new(|_| String::new()), 10, "damaged"),
        (Box::new(|_| "\u{0}".repeat(2 << 20)), 10, "larger than 1 MiB"),
        (Box::new(swap("\"format\":1", "\"format\":2")), 10, "format 2"),
        (Box::new(swap("\"incompat\":[]", "\"incompat\":[\"wings\"]")), 10, "wings"),
        (Box::new(swap("\"label\":", "\"uri\":\"file:///x\",\"label\":")), 10, "damaged"),
        (Box::new(swap("\"generation\":1", "\"generation\":0")), 10, "older"),
        (Box::new(swap("\"label\":\"\"", "\"label\":\"forged\"")), 10, "not authentic"),
        (Box::new(swap("\"commitment\":\"", "\"commitment\":\"0000")), 10, "damaged"),
    ];
    for (change, code, part) in cases {
        world.edit("vol", change);
        world.refuses(&["mount", "vol", "mnt"], code, part);
        std::fs::write(world.path("vol/lethefs.volume"), &good).unwrap();
        std::fs::write(world.path("vol/lethefs.volume.bak"), &copy).unwrap();
    }
    // A genuine volume file in the wrong directory.
    world.volume("other", "key");
    for name in ["lethefs.volume", "lethefs.volume.bak"] {
        std::fs::copy(world.path("other").join(name), world.path("vol").join(name)).unwrap();
    }
    world.refuses(&["mount", "vol", "mnt"], 10, "root directory");
    // A symlink is not followed.
    for name in ["lethefs.volume", "lethefs.volume.bak"] {
        std::fs::remove_file(world.path("vol").join(name)).unwrap();
        std::os::unix::fs::symlink(world.path("other").join(name), world.path("vol").join(name)).unwrap();
    }
    world.refuses(&["mount", "vol", "mnt"], 10, "symlink");
}

#[test]
fn keys_that_are_not_there() {
    let world = World::new();
    world.volume("vol", "key");
    world.volume("other", "second");
    let key = world.path("keys/key");
    let keep = std::fs::read(&key).unwrap();
    std::fs::remove_file(&key).unwrap();
    world.refuses(&["mount", "vol", "mnt"], 14, "not there");
    std::fs::copy(world.path("keys/second"), &key).unwrap();
    world.refuses(&["mount", "vol", "mnt"], 14, "another key");
    std::fs::write(&key, keep).unwrap();
    world.refuses(&["mount", "vol", "mnt", "--kms", &world.uri("moved")], 16, "--trust");
    world.refuses(&["mount", "vol", "mnt", "--kms", "hashivault://k"], 16, "pin says");
    // Checking a key file never makes one.
    let before = world.snapshot();
    let check = world.run(&["keys", "check", &world.uri("none")]);
    check.is(14);
    assert!(check.out.contains("unwrap    no"), "{}", check.out);
    assert!(before == world.snapshot());
    let check = world.run(&["keys", "check", &world.uri("key"), "--json"]);
    check.is(0);
    assert!(check.out.starts_with("{\n  \"schema\": 1,\n  \"volume_id\": null"), "{}", check.out);
}

#[test]
fn a_server_that_cannot_be_reached() {
    let world = World::new();
    let run = World::finish(
        world
            .command(&["init", "vol", "--kms", "hashivault://k"])
            .env("VAULT_ADDR", "https://127.0.0.1:1")
            .env("VAULT_TOKEN", "t"),
    );
    run.is(12);
    assert!(gone(&world.path("vol")));
    world.refuses(&["init", "vol", "--kms", "hashivault://k"], 2, "VAULT_ADDR");
}

/// A server that counts who calls, and hangs up.
fn listener() -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("https://{}", listener.local_addr().unwrap());
    let calls = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&calls);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            count.fetch_add(1, Ordering::SeqCst);
            drop(stream);
        }
    });
    (address, calls)
}

/// The identity of a Transit key that an attacker might name.
const ATTACKER: &str = r#"{"provider":"transit","engine":"transit","engine_uuid":"u","key":"attacker","namespace":"","key_version":1,"key_version_created":1,"cluster_id":"c","key_type":"aes256-gcm96"}"#;

/// Puts the attacker's key in the place of the volume's.
fn plant(text: &str) -> String {
    let (line, auth) = text.split_once('\n').unwrap();
    let mut body: serde_json::Value = serde_json::from_str(line).unwrap();
    let slot = &mut body["scopes"][0]["keks"][0]["slots"][0];
    slot["identity"] = serde_json::from_str(ATTACKER).unwrap();
    slot["wrapped"] = format!("vault:v1:{}", "QUJD".repeat(20)).into();
    format!("{body}\n{auth}")
}

#[test]
fn an_attackers_volume_file_makes_no_request() {
    let world = World::new();
    let id = world.volume("vol", "key");
    world.edit("vol", plant);
    let (address, calls) = listener();
    let mount = |more: &[&str]| {
        let mut command = world.command(&["mount", "vol", "mnt"]);
        World::finish(command.args(more).env("VAULT_ADDR", &address).env("VAULT_TOKEN", "t"))
    };
    let before = world.snapshot();
    mount(&[]).is(16).says("does not match this host's pin").says("attacker");
    mount(&["--trust"]).is(16).says("remove that file");
    assert!(before == world.snapshot());
    // An id that this host does not know, or a host without the pin: still nobody is asked.
    std::fs::remove_file(world.path("trust").join(&id)).unwrap();
    let before = world.snapshot();
    mount(&[]).is(16).says("no pin").says("unverified").says("--trust");
    assert!(before == world.snapshot());
    let status = world.run(&["status", "vol"]);
    status.is(0);
    assert!(status.out.contains("unverified"));
    assert_eq!(calls.load(Ordering::SeqCst), 0);
    // The control: once somebody vouches for the file, the request does leave, to the address of this host's choice.
    mount(&["--trust"]).is(12);
    assert!(calls.load(Ordering::SeqCst) > 0);
    assert!(gone(&world.path("trust").join(&id)), "a pin is written only once the volume proved authentic");
}

#[test]
fn a_volume_file_never_names_a_path() {
    let world = World::new();
    let id = world.volume("vol", "key");
    std::fs::remove_file(world.path("trust").join(&id)).unwrap();
    world.refuses(&["mount", "vol", "mnt"], 16, "--trust --kms file:///");
    world.refuses(&["mount", "vol", "mnt", "--trust"], 16, "--trust --kms file:///");
    // A pin that others could have written is no pin.
    let pin = world.path("trust").join(world.volume("two", "key"));
    std::fs::set_permissions(&pin, std::fs::Permissions::from_mode(0o666)).unwrap();
    world.refuses(&["mount", "two", "mnt"], 16, "nobody else can write");
}

#[test]
fn a_volume_vouched_for_is_remembered_or_not_mounted() {
    let world = World::new();
    world.volume("vol", "key");
    let uri = world.uri("key");
    let mut mount = world.command(&["mount", "vol", "mnt", "--foreground", "--trust", "--kms", &uri]);
    // No pin is there, and none can be.
    World::finish(mount.env("LETHEFS_TRUST_DIR", "/proc/lethefs-has-no-place-here")).is(1).says("pin");
}
