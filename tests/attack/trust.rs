//! Volume files that somebody else wrote: nobody is asked, nothing is opened, nothing changes; and what heals.

use std::fs;
use std::os::fd::AsFd as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;

use lethefs::crypto::{ObjectId, VolumeId};
use lethefs::keyring::{self, Keyring};
use lethefs::kms::{self, Binding, Purpose};
use lethefs::volume::Volume;
use lethefs::volume::format::{VOLUME_FILE, VOLUME_FILE_COPY};
use lethefs::volume::meta::{self, Body, VolumeFile};
use rustix::fs::{CWD, FileType, Mode};
use serde_json::{Value, json};

use crate::store::{Ear, Keys, body, forge, refuses, refuses_unseen, tree};
use crate::support::openbao::{Server, Storage};
use crate::support::volume::TestVolume;

/// Puts a volume of the attacker's making, whole and authentic under his key, in the place of the owner's: same id, same
/// label.
fn substitute(volume: &TestVolume, source: &dyn kms::KeySource) {
    let id: VolumeId = body(volume)["volume_id"].as_str().unwrap().parse().unwrap();
    let mut body: Body = serde_json::from_value(body(volume)).unwrap();
    let made = |purpose| source.make(&Binding { volume: id, scope: 0, version: 1, purpose }).unwrap();
    let (kek, canary) = (made(Purpose::Kek), made(Purpose::Canary));
    let record = &mut body.scopes[0].keks[0];
    record.commitment = lethefs::crypto::ids::hex(&keyring::commitment(&id, 0, 1, &kek.key));
    let slot = &mut record.slots[0];
    (slot.identity, slot.wrapped, slot.canary) = (kek.identity, kek.wrapped, canary.wrapped);
    slot.canary_check = lethefs::crypto::ids::hex(&keyring::canary_check(&id, 0, 1, &canary.key));
    body.root_id = ObjectId::random().unwrap();
    fs::remove_dir_all(volume.backing()).unwrap();
    fs::create_dir(volume.backing()).unwrap();
    let backing = meta::open_backing(&volume.backing()).unwrap();
    let ring = Keyring::new(id).unwrap();
    ring.admit(0, 1, &kek.key, true).unwrap();
    Volume::create_root(&backing, &ring, body.root_id).unwrap();
    VolumeFile::write(&backing, &body, &ring).unwrap();
}

fn transit(engine: &str, key: &str) -> Value {
    json!({
        "provider": "transit", "engine": engine, "engine_uuid": "u", "key": key, "namespace": "", "key_version": 1,
        "key_version_created": 1, "cluster_id": "c", "key_type": "aes256-gcm96",
    })
}

#[test]
fn keys_servers_modules_and_paths_of_an_attacker_are_not_used() {
    let volume = TestVolume::init();
    let ear = Ear::new();
    volume.env("VAULT_ADDR", &ear.address);
    volume.env("VAULT_TOKEN", "t");
    let theirs = volume.path("keys/theirs");
    let uri = format!("file://{}", theirs.display());
    volume.cli(&["init", "attacker", "--kms", &uri]).is(0);
    let key_id = serde_json::from_slice::<Value>(&fs::read(&theirs).unwrap()).unwrap()["key_id"].clone();
    let module = volume.path("keys/module.so");
    fs::write(&module, b"\x7fELF").unwrap();
    let key = volume.path("keys/key");
    let unopened = [theirs.as_path(), &module, &key];
    let good = [VOLUME_FILE, VOLUME_FILE_COPY].map(|name| fs::read(volume.backing().join(name)).unwrap());

    let identity =
        |value: Value| move |body: &mut Value| body["scopes"][0]["keks"][0]["slots"][0]["identity"] = value.clone();
    let field = |name: &'static str, value: String| {
        move |body: &mut Value| {
            let slot = &mut body["scopes"][0]["keks"][0]["slots"][0];
            match name.strip_prefix("identity.") {
                Some(name) => slot["identity"][name] = value.clone().into(),
                None => slot[name] = value.clone().into(),
            }
        }
    };
    type Forgery = Box<dyn Fn(&mut Value)>;
    let module_path = module.display().to_string();
    let token_key = json!({
        "provider": "pkcs11", "token_serial": "1", "token_manufacturer": "m", "token_model": module_path,
        "token_label": "t", "token_firmware": "1.0", "key_id": "01", "key_label": "k", "check_value": "", "unique_id": "",
    });
    let forgeries: Vec<(Forgery, i32, &str)> = vec![
        (Box::new(identity(transit("transit", "theirs"))), 16, "theirs"),
        (Box::new(identity(transit("../sys", "../../evil"))), 16, "names another key"),
        (Box::new(identity(transit("transit", "k\u{1b}[2J\nlethefs: all is well"))), 16, "names another key"),
        (
            Box::new(identity(json!({ "provider": "file", "key_id": key_id, "created": "2026-01-01T00:00:00Z" }))),
            16,
            "names another key",
        ),
        (Box::new(identity(json!({ "provider": "kmip", "module": module_path, "label": "k" }))), 16, "not known here"),
        (Box::new(identity(json!({ "provider": "pkcs11", "module": module_path, "label": "k" }))), 10, "damaged"),
        (Box::new(identity(token_key.clone())), 16, "names another key"),
        (Box::new(identity(json!({ "provider": "file", "path": theirs.display().to_string() }))), 10, "damaged"),
        (Box::new(field("uri", uri.clone())), 10, "damaged"),
        (Box::new(field("identity.address", ear.address.clone())), 10, "damaged"),
        (Box::new(field("identity.path", theirs.display().to_string())), 10, "damaged"),
        (Box::new(|body| body["scopes"][0]["keks"][0]["commitment"] = "00".repeat(32).into()), 16, "commitment"),
        (Box::new(|body| body["scopes"][0]["current"] = 2.into()), 10, "damaged"),
        (Box::new(|body| body["scopes"][0]["keks"][0]["slots"] = json!([])), 16, "no key"),
    ];
    for (change, code, part) in forgeries {
        forge(&volume, change);
        refuses_unseen(&volume, &["mount", "backing", "mnt"], code, part, &unopened);
        refuses_unseen(&volume, &["mount", "backing", "mnt", "--trust"], code, part, &unopened);
        let before = tree(&volume);
        for command in ["status", "erase"] {
            let more: &[&str] = if command == "erase" { &["--plan"] } else { &[] };
            let run = volume.cli(&[&[command, "backing"], more].concat());
            let text = [run.out, run.err].concat();
            assert!(!text.chars().any(|c| c.is_control() && c != '\n'), "{text:?}");
            assert!(!text.contains("\nlethefs: all is well"), "{text}");
        }
        assert!(before == tree(&volume));
        for (name, bytes) in [VOLUME_FILE, VOLUME_FILE_COPY].iter().zip(&good) {
            fs::write(volume.backing().join(name), bytes).unwrap();
        }
    }
    let refuses = |args: &[&str], part: &str| refuses_unseen(&volume, args, 16, part, &unopened);
    forge(&volume, identity(transit("transit", "theirs")));
    refuses(&["mount", "backing", "mnt"], "no key service was asked");
    refuses(&["mount", "backing", "mnt", "--kms", &uri], "is not the key of this volume");
    refuses(&["mount", "backing", "mnt", "--kms", "hashivault://theirs"], "is not the key of this volume");
    // On a host that does not know the volume: only a person's word counts, and never the file's paths and addresses.
    fs::remove_dir_all(volume.path("trust")).unwrap();
    refuses(&["mount", "backing", "mnt"], "--trust");
    refuses(&["mount", "backing", "mnt", "--trust", "--kms", "hashivault://vol1"], "unverified");
    forge(&volume, identity(transit("../../v1/sys", "seal")));
    refuses(&["mount", "backing", "mnt", "--trust"], "unverified");
    assert_eq!(ear.calls(), 0);
}

/// What a message quotes of an attacker's file must not be able to draw on the terminal or fake a second line.
#[test]
fn a_hostile_volume_file_cannot_speak_to_the_terminal() {
    let volume = TestVolume::init();
    let evil = "\u{1b}]0;owned\u{7}\u{1b}[2J\nlethefs: all is well\r\u{9b}31m";
    let forgeries: [fn(&mut Value, &str); 5] = [
        |body, evil| body[evil] = 1.into(),
        |body, evil| body["incompat"] = json!([evil]),
        |body, evil| body["scopes"][0]["keks"][0]["state"] = evil.into(),
        |body, evil| body["scopes"][0]["keks"][0]["slots"][0]["identity"]["provider"] = evil.into(),
        |body, evil| body["label"] = evil.into(),
    ];
    let good = [VOLUME_FILE, VOLUME_FILE_COPY].map(|name| fs::read(volume.backing().join(name)).unwrap());
    for change in forgeries {
        forge(&volume, |body| change(body, evil));
        let journal = json!({ "schema": 1, evil: 1, "state": evil });
        fs::write(volume.backing().join("lethefs.erase"), journal.to_string()).unwrap();
        for args in [&["mount", "backing", "mnt"][..], &["status", "backing"], &["erase", "backing", "--plan"]] {
            let run = volume.cli(args);
            // A slot of a service that nobody here knows is passed over, and then none is left.
            let unknown = body(&volume)["scopes"][0]["keks"][0]["slots"][0]["identity"]["provider"] == evil;
            let expected = match (unknown, args[0]) {
                (true, "mount") => 16,
                (true, _) => 0,
                (false, _) => 10,
            };
            assert_eq!(run.code, Some(expected), "{}", run.err);
            assert!(!run.out.trim_end().chars().any(|c| c.is_control() && c != '\n'), "{:?}", run.out);
            // What is logged beside the message is a line of its own.
            assert!(!run.err.chars().any(|c| c.is_control() && c != '\n'), "{:?}", run.err);
            assert!(!run.err.contains("\nlethefs: all is well"), "{:?}", run.err);
        }
        for (name, bytes) in [VOLUME_FILE, VOLUME_FILE_COPY].iter().zip(&good) {
            fs::write(volume.backing().join(name), bytes).unwrap();
        }
        let run = volume.cli(&["status", "backing"]);
        run.is(0);
        let text = [run.out, run.err].concat();
        assert!(!text.chars().any(|c| c.is_control() && c != '\n'), "{text:?}");
    }
}

/// The pin test. The attacker has a key of his own at the same server, the host's token may use any key there, and the
/// volume that he puts in the place of the owner's is whole and authentic under it. Only the pin tells.
///
/// With the comparison in `service::trust::verify` taken out (every slot counts as known, under the URI that its identity
/// makes), the mount succeeds, and this test fails: tried by hand.
#[test]
fn without_the_pin_an_attackers_volume_would_be_used() {
    let server = Server::start(Storage::Memory);
    server.create_key("ours");
    server.create_key("theirs");
    server.policy("all", r#"path "transit/*" { capabilities = ["create", "read", "update"] }"#);
    let volume = TestVolume::new();
    let environment = [
        ("VAULT_ADDR", server.address()),
        ("VAULT_CACERT", server.ca().display().to_string()),
        ("VAULT_TOKEN", server.token(&["all"], "1h")),
    ];
    for (name, value) in &environment {
        volume.env(name, value);
    }
    let id = volume.init_with("hashivault://ours");
    volume.mount(&[]);
    volume.umount();

    // The attacker's own machine, so to say: this process.
    let config = kms::transit::Config::from_lookup(|wanted| {
        environment.iter().find(|(name, _)| *name == wanted).map(|(_, value)| value.into())
    });
    let key = lethefs::kms::uri::TransitKey { engine: "transit".into(), key: "theirs".into(), server: None };
    let source = kms::transit::Transit::new(&key, config.unwrap());
    substitute(&volume, &source);

    let before = server.audit().len();
    refuses(&volume, &["mount", "backing", "mnt"], 16, "does not match this host's pin");
    refuses(&volume, &["mount", "backing", "mnt", "--trust"], 16, "no key service was asked");
    refuses(&volume, &["mount", "backing", "mnt", "--trust", "--kms", "hashivault://theirs"], 16, "is not the key");
    assert_eq!(server.audit().len(), before, "the server was asked");
    // It is as good as any volume: a host that knows nothing, and trusts, mounts it.
    fs::remove_file(volume.path("trust").join(&id)).unwrap();
    refuses(&volume, &["mount", "backing", "mnt"], 16, "theirs");
    assert_eq!(server.audit().len(), before, "the server was asked");
    volume.mount(&["--trust"]);
    volume.umount();
    assert!(server.audit().iter().any(|request| request == "update transit/decrypt/theirs"));
}

/// The same with the attacker's key file: he can name it, but not put it where the pin's URI points.
#[test]
fn an_attackers_volume_under_his_own_key_file_is_refused() {
    let volume = TestVolume::init();
    let id = body(&volume)["volume_id"].as_str().unwrap().to_owned();
    let theirs = volume.path("state/theirs");
    let uri = format!("file://{}", theirs.display());
    substitute(&volume, &*kms::source(&uri.parse().unwrap()).unwrap());
    let key = volume.path("keys/key");
    let refuses = |args: &[&str], part: &str| refuses_unseen(&volume, args, 16, part, &[&theirs, &key]);
    refuses(&["mount", "backing", "mnt"], "does not match this host's pin");
    refuses(&["mount", "backing", "mnt", "--trust"], "does not match this host's pin");
    refuses(&["mount", "backing", "mnt", "--kms", &uri], "is not the key of this volume");
    // Not even a person who is fooled into all of it: the commitment is another one.
    refuses(&["mount", "backing", "mnt", "--kms", &uri, "--trust"], "does not match this host's pin");
    fs::remove_file(volume.path("trust").join(id)).unwrap();
    volume.mount(&["--kms", &uri, "--trust"]);
}

#[test]
fn what_trust_allows_and_what_not() {
    let volume = TestVolume::init();
    let (uri, moved) = (volume.file_uri(), format!("file://{}", volume.path("state/moved").display()));
    let id = body(&volume)["volume_id"].as_str().unwrap().to_owned();
    let pin = volume.path("trust").join(&id);
    let good = fs::read(&pin).unwrap();
    // A pin that others could have written, or that is no pin, is none: and it is not replaced.
    for (bytes, mode) in [
        (good.clone(), 0o666),
        (b"{}".to_vec(), 0o644),
        (Vec::new(), 0o644),
        (good[..good.len() / 2].to_vec(), 0o644),
        (String::from_utf8(good.clone()).unwrap().replace(&id, &"0".repeat(32)).into_bytes(), 0o644),
        (String::from_utf8(good.clone()).unwrap().replace("\"schema\": 1", "\"schema\": 2").into_bytes(), 0o644),
    ] {
        fs::write(&pin, bytes).unwrap();
        fs::set_permissions(&pin, fs::Permissions::from_mode(mode)).unwrap();
        refuses(&volume, &["mount", "backing", "mnt"], 16, "cannot use the pin");
        refuses(&volume, &["mount", "backing", "mnt", "--trust", "--kms", &uri], 16, "cannot use the pin");
    }
    fs::remove_file(&pin).unwrap();
    symlink(volume.path("state/pin"), &pin).unwrap();
    fs::write(volume.path("state/pin"), &good).unwrap();
    refuses(&volume, &["mount", "backing", "mnt"], 16, "cannot use the pin");
    fs::remove_file(&pin).unwrap();

    // No pin.
    refuses(&volume, &["mount", "backing", "mnt"], 16, "--trust --kms file:///PATH");
    refuses(&volume, &["mount", "backing", "mnt", "--kms", &uri], 16, "--trust");
    refuses(&volume, &["mount", "backing", "mnt", "--trust"], 16, "--kms");
    refuses(&volume, &["mount", "backing", "mnt", "--trust", "--kms", &moved], 14, "not there");
    assert!(!pin.exists(), "nothing is remembered of a volume that did not open");
    volume.mount(&["--trust", "--kms", &uri]);
    volume.umount();
    assert_eq!(fs::read(&pin).unwrap(), good);
    // The key file moves.
    fs::rename(volume.path("keys/key"), volume.path("state/moved")).unwrap();
    refuses(&volume, &["mount", "backing", "mnt"], 14, "not there");
    refuses(&volume, &["mount", "backing", "mnt", "--kms", &moved], 16, "add --trust");
    volume.mount(&["--kms", &moved, "--trust"]);
    volume.remount(&[]);
}

/// Two genuine volume files of generations 1 and 2, and the keys.
fn two_generations(volume: &TestVolume) -> (Vec<u8>, Vec<u8>) {
    let path = volume.backing().join(VOLUME_FILE);
    let old = fs::read(&path).unwrap();
    let mut next: Body = serde_json::from_value(body(volume)).unwrap();
    next.generation = 2;
    VolumeFile::write(meta::open_backing(&volume.backing()).unwrap().as_fd(), &next, &Keys::of(volume).ring).unwrap();
    (old, fs::read(&path).unwrap())
}

fn clear(path: &Path) {
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir(path).unwrap(),
        Ok(_) => fs::remove_file(path).unwrap(),
        Err(_) => {}
    }
}

#[test]
fn one_bad_copy_is_healed_from_the_other() {
    let (volume, other) = (TestVolume::init(), TestVolume::init());
    let (old, new) = two_generations(&volume);
    // This host knows the other volume too: its file is foreign here, not unknown.
    let id = body(&other)["volume_id"].as_str().unwrap().to_owned();
    fs::copy(other.path("trust").join(&id), volume.path("trust").join(&id)).unwrap();
    let foreign = fs::read(other.backing().join(VOLUME_FILE)).unwrap();
    let mut newer: Body = serde_json::from_value(body(&other)).unwrap();
    newer.generation = 9;
    VolumeFile::write(meta::open_backing(&other.backing()).unwrap().as_fd(), &newer, &Keys::of(&other).ring).unwrap();
    let foreign_newer = fs::read(other.backing().join(VOLUME_FILE)).unwrap();
    volume.mount(&[]);
    volume.umount();

    let text = String::from_utf8(new.clone()).unwrap();
    let changed = |from: &str, to: &str| {
        let changed = text.replacen(from, to, 1);
        assert_ne!(changed, text);
        Some(changed.into_bytes())
    };
    let bad: Vec<(&str, Option<Vec<u8>>)> = vec![
        ("missing", None),
        ("empty", Some(Vec::new())),
        ("cut", Some(new[..new.len() / 2].to_vec())),
        ("cut by one", Some(new[..new.len() - 1].to_vec())),
        ("one line", Some(new.split(|b| *b == b'\n').next().unwrap().to_vec())),
        ("large", Some(vec![b' '; 2 << 20])),
        ("noise", Some(vec![0xff; 700])),
        ("older", Some(old.clone())),
        ("foreign", Some(foreign)),
        ("foreign and newer", Some(foreign_newer)),
        ("label", changed("\"label\":\"test\"", "\"label\":\"evil\"")),
        ("generation", changed("\"generation\":2", "\"generation\":3")),
        (
            "mac",
            changed("\"mac\":\"", "\"mac\":\"0").map(|mut text| {
                text.truncate(text.len() - 5);
                text.extend(b"\"}]}\n");
                text
            }),
        ),
        (
            "no mac",
            changed("\"label\":\"test\"", "\"label\":\"evil\"").map(|text| {
                let line = text.split(|b| *b == b'\n').next().unwrap();
                [line, b"\n{\"auth\":[]}\n"].concat()
            }),
        ),
        ("state", changed("\"state\":\"active\"", "\"state\":\"destroyed\"")),
        ("wrapped", changed("\"wrapped\":\"", "\"wrapped\":\"x")),
        (
            "no wrapped key",
            Some({
                let mut body: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
                body["scopes"][0]["keks"][0]["slots"][0]["wrapped"] = "".into();
                body["generation"] = 3.into();
                format!("{body}\n{}\n", text.lines().nth(1).unwrap()).into_bytes()
            }),
        ),
    ];
    for (name, copy) in
        [VOLUME_FILE, VOLUME_FILE_COPY].into_iter().flat_map(|name| bad.iter().map(move |copy| (name, copy)))
    {
        let path = volume.backing().join(name);
        clear(&path);
        if let Some(bytes) = &copy.1 {
            fs::write(&path, bytes).unwrap();
        }
        let before = fs::read(&path).ok();
        let run = volume.try_mount(&["-o", "ro"]);
        assert_eq!(run.code, Some(0), "{name} {}, read-only: {}", copy.0, run.err);
        volume.umount();
        assert_eq!(fs::read(&path).ok(), before, "a read-only mount writes nothing");
        let run = volume.try_mount(&[]);
        assert_eq!(run.code, Some(0), "{name} {}: {}", copy.0, run.err);
        assert!(run.err.contains("missing or damaged"), "{name} {}: {}", copy.0, run.err);
        volume.umount();
        for name in [VOLUME_FILE, VOLUME_FILE_COPY] {
            assert_eq!(fs::read(volume.backing().join(name)).unwrap(), new, "{name} {}", copy.0);
        }
    }
    for (name, kind) in [VOLUME_FILE, VOLUME_FILE_COPY]
        .into_iter()
        .flat_map(|name| ["symlink", "fifo", "directory"].into_iter().map(move |kind| (name, kind)))
    {
        let path = volume.backing().join(name);
        clear(&path);
        match kind {
            "symlink" => symlink(volume.path("keys/key"), &path).unwrap(),
            "fifo" => rustix::fs::mknodat(CWD, &path, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap(),
            _ => fs::create_dir(&path).unwrap(),
        }
        let key = fs::read(volume.path("keys/key")).unwrap();
        let run = volume.try_mount(&[]);
        assert_eq!(run.code, Some(0), "{name} {kind}: {}", run.err);
        volume.umount();
        assert_eq!(fs::read(volume.path("keys/key")).unwrap(), key);
        // A directory is not replaced by a file: the mount says so, and works with the other copy.
        if kind == "directory" {
            assert!(run.err.contains("writing it anew failed"), "{}", run.err);
            fs::remove_dir(&path).unwrap();
            volume.mount(&[]);
            volume.umount();
        }
        assert_eq!(fs::read(&path).unwrap(), new, "{name} {kind}");
    }
    // Both.
    for (what, copy) in bad.iter().filter_map(|(what, copy)| Some((what, copy.as_ref()?))) {
        for name in [VOLUME_FILE, VOLUME_FILE_COPY] {
            fs::write(volume.backing().join(name), copy).unwrap();
        }
        let part = match *what {
            "older" => "older (generation 1) than this host has seen (2)",
            "foreign" | "foreign and newer" => "not this volume's",
            "label" | "generation" | "state" | "no mac" => "not authentic",
            "no wrapped key" => "no longer in the volume file",
            "wrapped" => "rejects the wrapped key",
            _ => "damaged",
        };
        let code = if *what == "no wrapped key" { 17 } else { 10 };
        refuses(&volume, &["mount", "backing", "mnt"], code, part);
    }
    for name in [VOLUME_FILE, VOLUME_FILE_COPY] {
        fs::write(volume.backing().join(name), &new).unwrap();
    }
    volume.mount(&[]);
}
