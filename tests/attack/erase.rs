//! Erase on a live system with a real OpenBao: who may, what is asked first, dying half-way, and what is left to read.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::fs::Advice;
use serde_json::{Value, json};

use crate::kms_trouble::volume;
use crate::store::{errno, refuses, tree};
use crate::support::openbao::{Server, Storage};
use crate::support::volume::{Output, TestVolume, mounts_below};

const EKEYREVOKED: i32 = 128;
const MOUNT: [&str; 3] = ["mount", "backing", "mnt"];

/// docs/KMS.md's policy of the administrator: no `decrypt`.
fn admin_token(server: &Server, key: &str) -> String {
    let policy = format!(
        r#"path "transit/keys/{key}" {{ capabilities = ["create", "read", "update", "delete"] }}
path "transit/keys/{key}/config" {{ capabilities = ["update"] }}
path "transit/keys/{key}/rotate" {{ capabilities = ["update"] }}
path "transit/keys/{key}/soft-delete" {{ capabilities = ["delete"] }}
path "transit/keys/{key}/soft-delete-restore" {{ capabilities = ["update"] }}
path "transit/rewrap/{key}" {{ capabilities = ["update"] }}"#
    );
    server.policy(&format!("admin-{key}"), &policy);
    server.token(&[&format!("admin-{key}")], "1h")
}

fn id(volume: &TestVolume) -> String {
    crate::store::body(volume)["volume_id"].as_str().unwrap().to_owned()
}

/// Runs with other credentials than the mount's.
fn run_as(volume: &TestVolume, token: &str, args: &[&str]) -> Output {
    Output::of(volume.lethefs(args).env("VAULT_TOKEN", token))
}

fn erase(volume: &TestVolume, token: &str, key: &str) -> Output {
    run_as(volume, token, &["erase", "backing", "--confirm-volume", &id(volume), "--confirm-key", key, "--json"])
}

fn journal(volume: &TestVolume) -> Value {
    serde_json::from_slice(&fs::read(volume.backing().join("lethefs.erase")).unwrap()).unwrap()
}

#[test]
fn plan_confirmation_and_rights() {
    let server = Server::start(Storage::Memory);
    let v = volume(&server, "vol");
    let admin = admin_token(&server, "vol");
    v.mount(&[]);
    fs::write(v.at("file"), vec![1; 5000]).unwrap();
    v.umount();
    let state = || server.get("transit/keys/vol");
    let key_before = state();
    let before = tree(&v);

    // A plan, with either's rights.
    for token in [admin.as_str(), ""] {
        let plan = run_as(&v, token, &["erase", "backing", "--plan", "--json"]);
        plan.is(0);
        let plan = plan.json();
        assert_eq!((&plan["volume_id"], &plan["pinned"]), (&id(&v).into(), &true.into()));
        assert_eq!((&plan["contents"]["files"], &plan["contents"]["bytes"]), (&1.into(), &5000.into()));
        assert_eq!(
            (&plan["keys"][0]["name"], &plan["keys"][0]["uri"]),
            (&"vol".into(), &"hashivault://vol?engine=transit".into())
        );
        // Mounts of other tests are listed, as those whose volume cannot be told from here.
        assert!(plan["live_mounts"].as_array().unwrap().iter().all(|mount| mount["volume_id"].is_null()));
        assert!(plan["begun"].is_null());
        assert!(plan["remains"].to_string().contains("snapshot or backup of the key service"));
    }
    // The wrong words.
    let (id, zeros) = (id(&v), "0".repeat(32));
    for words in [
        &["--confirm-volume", &zeros, "--confirm-key", "vol"][..],
        &["--confirm-volume", &id, "--confirm-key", "other"],
        &["--confirm-volume", &id, "--confirm-key", "vol", "--confirm-key", "other"],
        &["--confirm-volume", &id],
        &["--confirm-key", "vol"],
        &[],
    ] {
        run_as(&v, &admin, &[&["erase", "backing"], words].concat()).is(19).says("nothing was changed");
    }
    run_as(&v, &admin, &["erase", "--volume-id", &zeros]).is(2).says("--key URI");
    assert!(before == tree(&v) && state() == key_before);

    // The mount's own rights do not destroy, and an erase that may do nothing costs a live mount nothing.
    v.mount(&[]);
    let open = File::open(v.at("file")).unwrap();
    let run = erase(&v, "", "vol");
    run.is(18).says("still restorable").says("denied");
    assert_eq!(state(), key_before);
    assert_eq!(journal(&v)["state"], "begun");
    assert!(journal(&v)["receipts"].as_array().unwrap().is_empty());
    open.read_exact_at(&mut [0; 4096], 0).unwrap();
    fs::write(v.at("more"), b"more").unwrap();
    fs::remove_file(v.at("more")).unwrap();
    drop(open);
    v.umount();
    let run = v.try_mount(&[]);
    assert!(run.is(0).err.contains("was begun") && run.err.contains("yet the key still opens"), "{}", run.err);
    assert_eq!(fs::read(v.at("file")).unwrap(), vec![1; 5000]);
    v.umount();

    // Somebody who may only switch it off.
    server.policy(
        "half",
        r#"path "transit/keys/vol" { capabilities = ["read"] }
path "transit/keys/vol/config" { capabilities = ["update"] }
path "transit/keys/vol/soft-delete" { capabilities = ["delete"] }
path "transit/rewrap/vol" { capabilities = ["update"] }"#,
    );
    let half = server.token(&["half"], "1h");
    let volume_files = ["lethefs.volume", "lethefs.volume.bak"].map(|name| fs::read(v.backing().join(name)).unwrap());
    erase(&v, &half, "vol").is(18).says("still restorable");
    assert_eq!(journal(&v)["state"], "inaccessible");
    assert!(journal(&v)["irrecoverable_at"].is_null());
    for (name, bytes) in ["lethefs.volume", "lethefs.volume.bak"].iter().zip(volume_files) {
        assert_eq!(fs::read(v.backing().join(name)).unwrap(), bytes, "the wrapped key stays until it is waste");
    }
    refuses(&v, &MOUNT, 14, "restore");
    server.put("transit/keys/vol/soft-delete-restore", json!({}));
    v.mount(&[]);
    assert_eq!(fs::read(v.at("file")).unwrap(), vec![1; 5000]);
    v.umount();

    // The administrator.
    let copy = v.path("copy");
    assert!(Command::new("cp").arg("-a").arg(v.backing()).arg(&copy).status().unwrap().success());
    let run = erase(&v, &admin, "vol");
    run.is(0);
    let report = run.json();
    assert_eq!((&report["state"], &report["self_asserted"]), (&"irrecoverable".into(), &false.into()));
    let findings = report["journal"]["slots"][0]["proof"]["findings"].as_array().unwrap();
    assert!(findings.len() >= 4 && findings.iter().all(|finding| finding["answered"].is_string()));
    refuses(&v, &MOUNT, 17, "not authenticated");
    refuses(&v, &["mount", "copy", "mnt"], 17, "destroyed");
    // A copy made before, without a word of an erase in it.
    fs::remove_file(copy.join("lethefs.erase")).unwrap();
    refuses(&v, &["mount", "copy", "mnt"], 17, "destroyed");
    // The tombstone is no reason to ask anybody: not even with the server gone.
    drop(server);
    v.env("VAULT_TOKEN", "t");
    v.env("VAULT_CACERT", "");
    refuses(&v, &MOUNT, 17, "no longer in the volume file");
    refuses(&v, &["mount", "copy", "mnt"], 12, "cannot be reached");
}

#[cfg(debug_assertions)]
#[test]
fn dying_after_each_step() {
    let server = Server::start(Storage::Memory);
    for step in ["begun", "sealed", "inaccessible", "scheduled", "irrecoverable", "tombstone"] {
        let v = volume(&server, step);
        let admin = admin_token(&server, step);
        let copy = v.path("copy");
        assert!(Command::new("cp").arg("-a").arg(v.backing()).arg(&copy).status().unwrap().success());
        let args = ["erase", "backing", "--confirm-volume", &id(&v), "--confirm-key", step];
        let mut command = v.lethefs(&args);
        command.env("VAULT_TOKEN", &admin).env("LETHEFS_TEST_ABORT_AFTER", step).stdin(Stdio::null());
        assert_eq!(command.status().unwrap().signal(), Some(9), "{step}");
        let begun = journal(&v)["begun_at"].clone();
        // Half-way it is what the key service says it is.
        let code = match step {
            "begun" => 0,
            "inaccessible" | "sealed" => 14,
            _ => 17,
        };
        let run = v.try_mount(&[]);
        assert_eq!(run.code, Some(code), "{step}: {}", run.err);
        if code == 0 {
            v.umount();
        }
        run_as(&v, &admin, &args).is(0);
        let after = journal(&v);
        assert_eq!((&after["state"], &after["begun_at"]), (&"irrecoverable".into(), &begun), "{step}");
        assert!(after["slots"][0]["proof"]["findings"].as_array().unwrap().len() >= 4, "{step}");
        refuses(&v, &MOUNT, 17, "an erase destroyed the key for good");
        refuses(&v, &["mount", "copy", "mnt"], 17, "destroyed");
        run_as(&v, &admin, &args).is(0);
        assert_eq!(journal(&v)["irrecoverable_at"], after["irrecoverable_at"], "{step}");
    }
}

/// The other process of the next test: maps a file, says so, and touches it again when told.
#[allow(unsafe_code)]
fn touch_a_mapping(path: &str) {
    use rustix::mm::{MapFlags, ProtFlags, mmap};
    let file = File::open(path).unwrap();
    // SAFETY: a new mapping at an address of the kernel's choice, read below within its length.
    let at = unsafe { mmap(std::ptr::null_mut(), 8192, ProtFlags::READ, MapFlags::SHARED, &file, 0) }.unwrap();
    let touch = |offset: usize| {
        // SAFETY: within the mapping, which is never unmapped; volatile, since its contents are another process's.
        unsafe { at.cast::<u8>().add(offset).read_volatile() }
    };
    assert_eq!((touch(0), touch(4096)), (7, 7));
    println!("mapped");
    std::io::stdin().read_line(&mut String::new()).unwrap();
    println!("read {}", touch(0));
}

#[test]
fn an_erase_seals_the_live_mount() {
    const CHILD: &str = "LETHEFS_TEST_MAP";
    if let Ok(path) = std::env::var(CHILD) {
        return touch_a_mapping(&path);
    }
    let server = Server::start(Storage::Memory);
    let v = volume(&server, "live");
    let admin = admin_token(&server, "live");
    v.mount(&[]);
    fs::create_dir(v.at("dir")).unwrap();
    for name in ["cached", "open", "mapped", "dir/file", "stat"] {
        fs::write(v.at(name), [7; 20_000]).unwrap();
    }
    std::os::unix::fs::symlink("cached", v.at("link")).unwrap();
    v.remount(&[]);
    // All of it in the kernel's caches.
    let cached = File::open(v.at("cached")).unwrap();
    (&cached).read_to_end(&mut Vec::new()).unwrap();
    let open = File::options().read(true).write(true).open(v.at("open")).unwrap();
    fs::symlink_metadata(v.at("stat")).unwrap();
    fs::read_link(v.at("link")).unwrap();
    let dir = File::open(v.at("dir")).unwrap();
    assert_eq!(fs::read_dir(v.at("dir")).unwrap().count(), 1);
    open.write_all_at(&[8; 4096], 0).unwrap();

    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "erase::an_erase_seals_the_live_mount", "--nocapture"])
        .env(CHILD, v.at("mapped"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(said.any(|line| line.unwrap().contains("mapped")));

    let plan = run_as(&v, &admin, &["erase", "backing", "--plan", "--json"]).json();
    assert_eq!(
        (&plan["live_mounts"][0]["reachable"], &plan["live_mounts"][0]["volume_id"]),
        (&true.into(), &id(&v).into())
    );
    assert_eq!(fs::read(v.at("dir/file")).unwrap(), [7; 20_000], "a plan changes nothing");
    let run = erase(&v, &admin, "live");
    run.is(0);
    assert_eq!(run.json()["journal"]["receipts"][0]["answer"]["sealed_now"], true);

    let mut byte = [0];
    assert_eq!(errno(cached.read_at(&mut byte, 0)), EKEYREVOKED, "cached pages");
    assert_eq!(errno(open.read_at(&mut byte, 8192)), EKEYREVOKED, "an open file");
    assert_eq!(errno(open.read_at(&mut byte, 0)), EKEYREVOKED, "what was just written");
    assert_eq!(errno(fs::read(v.at("dir/file"))), EKEYREVOKED, "by path");
    assert_eq!(errno(fs::symlink_metadata(v.at("stat"))), EKEYREVOKED, "stat");
    assert_eq!(errno(open.metadata()), EKEYREVOKED, "fstat");
    assert_eq!(errno(fs::read_link(v.at("link"))), EKEYREVOKED, "readlink");
    assert_eq!(errno(fs::read_dir(v.mnt()).and_then(|mut dir| dir.next().transpose())), EKEYREVOKED, "readdir");
    assert_eq!(
        rustix::fs::Dir::read_from(&dir).and_then(|mut dir| dir.next().transpose()).unwrap_err().raw_os_error(),
        EKEYREVOKED
    );
    assert_eq!(errno(fs::write(v.at("new"), b"x")), EKEYREVOKED, "create");
    assert_eq!(errno(fs::remove_file(v.at("cached"))), EKEYREVOKED, "unlink");
    let written = open.write_all_at(b"x", 0).and_then(|()| open.sync_all());
    assert_eq!(errno(written), EKEYREVOKED, "write");
    let _ = rustix::fs::fadvise(&open, 0, None, Advice::DontNeed);
    writeln!(child.stdin.take().unwrap(), "go").unwrap();
    assert_eq!(said.map_while(Result::ok).find(|line| line.starts_with("read")), None, "a mapping is still there");
    assert_eq!(child.wait().unwrap().signal(), Some(7), "SIGBUS");

    // It still answers, says why, and unmounts.
    let status = v.cli(&["status", "mnt", "--json"]);
    status.is(0);
    assert_eq!(status.json()["live"]["sealed"], "revoked");
    assert!(fs::metadata(v.mnt()).unwrap().is_dir());
    assert!(rustix::fs::statvfs(v.mnt()).is_ok());
    drop((cached, open, dir));
    v.cli(&["umount", "mnt"]).is(0);
    v.daemon_exit();
    assert!(mounts_below(&v.path("")).is_empty());
    refuses(&v, &MOUNT, 17, "erase");
}

#[test]
fn shared_keys_and_stolen_disks() {
    let server = Server::start(Storage::Memory);
    let v = volume(&server, "shared");
    let admin = admin_token(&server, "shared");
    let second = v.cli(&["init", "second", "--kms", "hashivault://shared", "--label", "second", "--json"]);
    let second_id = second.is(0).json()["volume_id"].as_str().unwrap().to_owned();
    fs::create_dir(v.path("mnt2")).unwrap();
    let mounted = v.cli(&["mount", "second", "mnt2", "--json"]);
    let daemon = mounted.is(0).json()["pid"].as_i64().unwrap();
    fs::write(v.path("mnt2/file"), b"hello").unwrap();

    let before = (fs::read_dir(v.backing()).unwrap().count(), server.get("transit/keys/shared"));
    erase(&v, &admin, "shared").is(19).says(&second_id).says("--also-erases");
    let wrong = ["erase", "backing", "--confirm-volume", &id(&v), "--confirm-key", "shared", "--also-erases", &id(&v)];
    run_as(&v, &admin, &wrong).is(19).says(&second_id);
    assert_eq!((fs::read_dir(v.backing()).unwrap().count(), server.get("transit/keys/shared")), before);
    assert_eq!(fs::read(v.path("mnt2/file")).unwrap(), b"hello");

    // The disk is stolen: only the id, the key and this host's pins are left.
    let first = id(&v);
    let stolen = v.path("stolen");
    fs::rename(v.backing(), &stolen).unwrap();
    let key = "hashivault://shared";
    run_as(&v, &admin, &["erase", "--key", key, "--volume-id", &first, "--confirm-key", "shared"])
        .is(19)
        .says(&second_id);
    run_as(&v, &admin, &["erase", "--key", key, "--volume-id", &first, "--also-erases", &second_id]).is(19);
    let all = [
        "erase",
        "--key",
        key,
        "--volume-id",
        &first,
        "--confirm-key",
        "shared",
        "--also-erases",
        &second_id,
        "--json",
    ];
    let run = run_as(&v, &admin, &all);
    run.is(0);
    assert_eq!(run.json()["journal"]["receipts"][0]["volume_id"], second_id.as_str(), "the other's mount was sealed");
    assert_eq!(errno(fs::read(v.path("mnt2/file"))), EKEYREVOKED);
    assert!(v.path("state/erase").join(format!("{first}.json")).is_file());
    v.cli(&["umount", "mnt2"]).is(0);
    let daemon = rustix::process::Pid::from_raw(i32::try_from(daemon).unwrap()).unwrap();
    let _ = rustix::process::waitpid(Some(daemon), rustix::process::WaitOptions::empty());
    refuses(&v, &["mount", "second", "mnt"], 17, "destroyed");
    refuses(&v, &["mount", "stolen", "mnt"], 17, "destroyed");

    // A host that never knew the volume: its id and the key are enough.
    let w = volume(&server, "unknown");
    let admin = admin_token(&server, "unknown");
    let unknown = id(&w);
    fs::remove_file(w.path("trust").join(&unknown)).unwrap();
    run_as(&w, &admin, &["erase", "--volume-id", &unknown, "--confirm-key", "unknown"]).is(2).says("--key URI");
    run_as(
        &w,
        &admin,
        &["erase", "--key", "hashivault://unknown", "--volume-id", &unknown, "--confirm-key", "unknown"],
    )
    .is(0);
    w.cli(&[&MOUNT[..], &["--trust"]].concat()).is(17);
}

/// Whoever can write the backing directory writes the journal: nothing is concluded from it.
#[test]
fn a_forged_journal_decides_nothing() {
    let server = Server::start(Storage::Memory);
    let v = volume(&server, "forged");
    let admin = admin_token(&server, "forged");
    let identity = crate::store::body(&v)["scopes"][0]["keks"][0]["slots"][0]["identity"].clone();
    let forged = json!({
        "schema": 1, "volume_id": id(&v), "state": "irrecoverable", "begun_at": "2001-01-01T00:00:00Z",
        "inaccessible_at": "2001-01-01T00:00:00Z", "scheduled_at": "2001-01-01T00:00:00Z",
        "irrecoverable_at": "2001-01-01T00:00:00Z",
        "slots": [{ "scope": 0, "version": 1, "id": 1, "identity": identity, "uri": "hashivault://evil", "state": "destroyed",
                    "restorable_until": null, "problem": null, "proof": { "findings": [] } }],
        "receipts": [], "by": { "uid": 0, "host": "h\u{1b}[2J" },
    });
    let path = v.backing().join("lethefs.erase");
    fs::write(&path, forged.to_string()).unwrap();
    let run = v.try_mount(&[]);
    assert!(run.is(0).err.contains("not authenticated") && run.err.contains("still opens"), "{}", run.err);
    v.umount();
    // The key is still there, and what cannot destroy it says so.
    erase(&v, "", "forged").is(18).says("still restorable");
    assert_eq!(server.get("transit/keys/forged")["name"], "forged");
    assert_ne!(journal(&v)["state"], "irrecoverable");
    assert!(journal(&v)["irrecoverable_at"].is_null());
    for bytes in [vec![b'['; 200_000], vec![0xff; 2 << 20], Vec::new(), b"{\"schema\":1}".to_vec()] {
        fs::write(&path, bytes).unwrap();
        v.mount(&[]);
        v.umount();
        v.cli(&["status", "backing"]).is(0);
    }
    erase(&v, &admin, "forged").is(0);
    refuses(&v, &MOUNT, 17, "erase");
}

#[test]
fn a_key_file_is_honest_about_itself() {
    let v = TestVolume::init();
    let key = v.path("keys/key");
    let name =
        serde_json::from_slice::<Value>(&fs::read(&key).unwrap()).unwrap()["key_id"].as_str().unwrap().to_owned();
    let kept = v.path("keys/copy");
    fs::copy(&key, &kept).unwrap();
    v.mount(&[]);
    fs::write(v.at("file"), b"hello").unwrap();
    let status = v.cli(&["status", "mnt"]);
    assert!(status.out.contains("a copy of it defeats an erase"), "{}", status.out);
    let plan = v.cli(&["erase", "backing", "--plan"]);
    assert!(plan.is(0).out.contains("any copy of the key file"), "{}", plan.out);
    let run = v.cli(&["erase", "backing", "--confirm-volume", &id(&v), "--confirm-key", &name]);
    assert!(run.is(0).out.contains("only lethefs's own word"), "{}", run.out);
    assert_eq!(errno(fs::read(v.at("file"))), EKEYREVOKED);
    v.cli(&["umount", "mnt"]).is(0);
    v.daemon_exit();
    assert!(!key.exists());
    refuses(&v, &MOUNT, 17, "erase");
    // As honest as it says: with a copy of key and volume file everything is back. Here the volume file is waste already.
    fs::rename(kept, &key).unwrap();
    refuses(&v, &MOUNT, 17, "erase");
    assert!(Path::new(&v.backing()).join("lethefs.erase").is_file());
}
