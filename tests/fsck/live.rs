//! A volume in use, after a crash, and what keeps a check from being made.

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::support::volume::TestVolume;
use crate::world::{World, kinds, long, pattern};

/// Everything that changes while it is looked at is as good as what does not.
#[test]
fn a_volume_in_use_is_clean_however_busy_it_is() {
    let v = TestVolume::init();
    v.mount(&[]);
    let stop = AtomicBool::new(false);
    let rounds = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for worker in 0..3_u8 {
            let (v, stop, rounds) = (&v, &stop, &rounds);
            scope.spawn(move || {
                let at = |name: &str| v.at(format!("{worker}{name}"));
                let mut n = 0_usize;
                while !stop.load(Ordering::SeqCst) {
                    n += 1;
                    let file = OpenOptions::new().write(true).create(true).truncate(false).open(at("over")).unwrap();
                    file.write_all_at(&pattern(9000, n as u8), (n * 3001 % 100_000) as u64).unwrap();
                    if n.is_multiple_of(3) {
                        file.set_len((n * 977 % 50_000) as u64).unwrap();
                    }
                    if n.is_multiple_of(5) {
                        file.sync_all().unwrap();
                    }
                    fs::write(at("new"), pattern(n * 37 % 9000, 1)).unwrap();
                    fs::rename(at("new"), at("old")).unwrap();
                    fs::create_dir(at("dir")).unwrap();
                    fs::write(at(&format!("dir/{}", long("y"))), "x").unwrap();
                    fs::rename(at(&format!("dir/{}", long("y"))), at("dir/z")).unwrap();
                    fs::remove_file(at("dir/z")).unwrap();
                    fs::remove_dir(at("dir")).unwrap();
                    rounds.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        let (mut checks, mut files) = (0, 0);
        // As many checks as it takes until much has changed under them.
        while checks < 20 || rounds.load(Ordering::SeqCst) < 300 {
            let run = v.cli(&["fsck", if checks % 2 == 0 { "backing" } else { "mnt" }, "--json"]);
            if run.code != Some(0) {
                stop.store(true, Ordering::SeqCst);
            }
            run.is(0);
            let report = run.json();
            assert_eq!((&report["online"], &report["state"]), (&true.into(), &"clean".into()), "{report}");
            files += report["checked"]["files"].as_u64().unwrap();
            checks += 1;
        }
        stop.store(true, Ordering::SeqCst);
        eprintln!("{checks} checks of {files} files, {} rounds of changes", rounds.load(Ordering::SeqCst));
        assert!(files > checks);
    });
    v.umount();
    v.cli(&["fsck", "backing"]).is(0);
}

#[test]
fn damage_is_found_in_a_volume_in_use_and_repaired_only_out_of_it() {
    let world = World::new();
    let at = world.find("big");
    let file = OpenOptions::new().read(true).write(true).open(at).unwrap();
    file.write_all_at(b"damage", 512 + 4124 * 2 + 500).unwrap();
    world.v.mount(&[]);
    // One that the mount has in hand, and one that it has not.
    let mut held = OpenOptions::new().append(true).open(world.v.at("full")).unwrap();
    held.write_all(b"more").unwrap();
    let full = OpenOptions::new().write(true).open(world.find("full")).unwrap();
    held.sync_all().unwrap();
    full.write_all_at(b"damage", 512 + 100).unwrap();
    let run = world.fsck(&["--names"]);
    run.is_code(21);
    let report = run.json();
    assert_eq!(kinds(&report, "findings"), ["block"]);
    let lines = report["findings"].as_array().unwrap();
    let mut names: Vec<_> =
        lines.iter().map(|line| (line["name"].as_str().unwrap(), line["blocks"].to_string())).collect();
    names.sort();
    let expected = [("/again", "[[2,2]]"), ("/big", "[[2,2]]"), ("/full", "[[0,0]]")];
    assert_eq!(names, expected.map(|(name, blocks)| (name, blocks.to_owned())), "both of its names");
    world.fsck(&["--repair"]).is(11).says("unmount it to repair it");
    drop(held);
    world.v.umount();
}

/// Before a mount has replayed it, a volume with a log is what it will be.
#[test]
fn a_crash_leaves_a_clean_volume_before_and_after_the_replay() {
    for round in 0..6 {
        let v = TestVolume::init();
        v.mount(&[]);
        fs::write(v.at("file"), pattern(100_000, 9)).unwrap();
        v.remount(&[]);
        let file = OpenOptions::new().read(true).write(true).open(v.at("file")).unwrap();
        file.write_all_at(&pattern(5000, 1), 10_000).unwrap();
        file.sync_all().unwrap();
        file.write_all_at(&pattern(5000, 2), 50_000).unwrap();
        file.set_len(70_001).unwrap();
        if round % 2 == 0 {
            file.sync_data().unwrap();
        }
        fs::write(v.at(long("new")), pattern(3000, 3)).unwrap();
        v.crash();
        drop(file);
        let run = v.cli(&["fsck", "backing", "--json"]);
        run.is(0);
        assert_eq!(kinds(&run.json(), "findings"), ["unclean"], "round {round}: {}", run.out);
        let repaired = v.cli(&["fsck", "backing", "--repair", "--json"]);
        repaired.is(0);
        assert_eq!(kinds(&repaired.json(), "left"), Vec::<String>::new(), "{}", repaired.out);
        assert!(!v.backing().join("lethefs.log.0").exists());
        v.mount(&[]);
        let now = fs::read(v.at("file")).unwrap();
        assert_eq!(now[10_000..15_000], pattern(5000, 1));
        v.umount();
        v.cli(&["fsck", "backing"]).is(0);
    }
}

/// A log of which a part is lost: said, kept, and the rest replayed.
#[test]
fn a_damaged_log_is_damage() {
    let v = TestVolume::init();
    v.mount(&[]);
    fs::write(v.at("file"), pattern(100_000, 9)).unwrap();
    v.remount(&[]);
    let file = OpenOptions::new().read(true).write(true).open(v.at("file")).unwrap();
    for n in 0..5_u8 {
        file.write_all_at(&pattern(4096, n), u64::from(n) * 8192).unwrap();
        file.sync_data().unwrap();
    }
    v.crash();
    drop(file);
    let log = OpenOptions::new().read(true).write(true).open(v.backing().join("lethefs.log.0")).unwrap();
    log.write_all_at(&[0; 5000], 2048).unwrap();
    let run = v.cli(&["fsck", "backing", "--json"]);
    run.is_code(21);
    assert_eq!(kinds(&run.json(), "findings"), ["log", "unclean"], "{}", run.out);
    let run = v.cli(&["fsck", "backing", "--repair", "--json"]);
    run.is_code(20);
    assert!(v.backing().join("lethefs.quarantine/1.log").is_file());
    v.mount(&[]);
    let now = fs::read(v.at("file")).unwrap();
    assert_eq!(now[4 * 8192..][..4096], pattern(4096, 4));
    v.umount();
    v.cli(&["fsck", "backing"]).is(0);
}

#[test]
fn what_keeps_it_from_checking() {
    let v = TestVolume::init();
    v.cli(&["fsck", "keys"]).is(10).says("not a lethefs volume");
    v.cli(&["fsck", "nowhere"]).is(2);
    v.cli(&["fsck", "backing", "--kms", "https://x"]).is(2);
    // Nobody's pin: nothing is asked.
    let pins = v.path("trust");
    fs::rename(&pins, v.path("elsewhere")).unwrap();
    fs::create_dir(&pins).unwrap();
    v.cli(&["fsck", "backing"]).is(16);
    let run = v.cli(&["fsck", "backing", "--trust", "--kms", &v.file_uri()]);
    run.is(0);
    assert_eq!(fs::read_dir(&pins).unwrap().count(), 0, "for this one time");
    fs::remove_dir(&pins).unwrap();
    fs::rename(v.path("elsewhere"), &pins).unwrap();
    // No key, no check.
    fs::rename(v.path("keys/key"), v.path("keys/away")).unwrap();
    let run = v.cli(&["fsck", "backing", "--repair"]);
    assert!(run.code != Some(0) && run.out.is_empty(), "{}", run.err);
    fs::rename(v.path("keys/away"), v.path("keys/key")).unwrap();
    // A sealed mount has no keys, either.
    v.mount(&[]);
    let socket = fs::read_dir(v.path("run")).unwrap().map(|entry| entry.unwrap().path());
    let socket = socket.into_iter().find(|path| path.extension().is_some_and(|end| end == "sock")).unwrap();
    let mut stream = std::os::unix::net::UnixStream::connect(socket).unwrap();
    stream.write_all(b"{\"v\":1,\"op\":\"seal\"}\n").unwrap();
    let mut answer = String::new();
    std::io::Read::read_to_string(&mut stream, &mut answer).unwrap();
    assert!(answer.contains("\"ok\""), "{answer}");
    v.cli(&["fsck", "mnt"]).is(1).says("the mount could not check the volume");
    v.umount();
    v.cli(&["fsck", "backing"]).is(0);
}

/// Deeper than any path, wider than there are descriptors.
#[test]
fn deep_and_wide_trees_are_checked_to_the_end() {
    let v = TestVolume::init();
    v.mount(&[]);
    let mut at = rustix::fs::open(v.mnt(), rustix::fs::OFlags::DIRECTORY, rustix::fs::Mode::empty()).unwrap();
    let rwx = rustix::fs::Mode::RWXU;
    for _ in 0..1500 {
        rustix::fs::mkdirat(&at, "deep", rwx).unwrap();
        at = rustix::fs::openat(&at, "deep", rustix::fs::OFlags::DIRECTORY, rwx).unwrap();
    }
    let file = rustix::fs::openat(&at, "end", rustix::fs::OFlags::CREATE | rustix::fs::OFlags::WRONLY, rwx).unwrap();
    rustix::io::write(&file, b"the end").unwrap();
    drop((file, at));
    fs::create_dir(v.at("wide")).unwrap();
    for n in 0..700 {
        fs::create_dir(v.at(format!("wide/{n}"))).unwrap();
    }
    v.umount();
    let mut limited = v.command("sh");
    let script = "ulimit -n 100 && exec \"$@\"";
    let program = env!("CARGO_BIN_EXE_lethefs");
    limited.args(["-c", script, "sh", program, "fsck", "backing", "--json"]);
    let run = crate::support::volume::Output::of(&mut limited);
    run.is(0);
    assert_eq!(run.json()["checked"]["directories"], 1 + 1500 + 1 + 700);
    assert_eq!(run.json()["checked"]["bytes"], 7);
    // The last file of all is mended as well as found.
    let ino = |dir: rustix::fd::BorrowedFd<'_>, name: &str| {
        rustix::fs::statat(dir, name, rustix::fs::AtFlags::SYMLINK_NOFOLLOW).unwrap()
    };
    let mut dir = rustix::fs::open(v.backing(), rustix::fs::OFlags::DIRECTORY, rwx).unwrap();
    loop {
        let entries = rustix::fs::Dir::read_from(&dir).unwrap().map(|entry| entry.unwrap().file_name().to_owned());
        let entries: Vec<_> = entries.map(|name| name.into_string().unwrap()).collect();
        let own = |name: &&String| !name.starts_with('.') && !name.starts_with("lethefs.");
        let is_dir = |name: &str| {
            rustix::fs::FileType::from_raw_mode(ino(std::os::fd::AsFd::as_fd(&dir), name).st_mode).is_dir()
        };
        let deeper = entries.iter().filter(own).find(|name| {
            is_dir(name) && {
                let below = rustix::fs::openat(&dir, name.as_str(), rustix::fs::OFlags::DIRECTORY, rwx).unwrap();
                rustix::fs::Dir::read_from(&below).unwrap().count() < 10
            }
        });
        let Some(deeper) = deeper.cloned() else {
            let name = entries.iter().find(own).unwrap();
            let file = rustix::fs::openat(&dir, name.as_str(), rustix::fs::OFlags::RDWR, rwx).unwrap();
            rustix::io::pwrite(&file, &[0; 60], 0).unwrap();
            break;
        };
        dir = rustix::fs::openat(&dir, deeper.as_str(), rustix::fs::OFlags::DIRECTORY, rwx).unwrap();
    }
    let run = v.cli(&["fsck", "backing", "--repair", "--json"]);
    run.is_code(20);
    assert_eq!(kinds(&run.json(), "findings"), ["header-copy"]);
}

/// Objects under a key that is not held are not damaged: nothing is done about them.
#[test]
fn with_a_key_missing_nothing_is_repaired() {
    use lethefs::crypto::{Key32, VolumeId};
    use lethefs::keyring::{self, Keyring};
    use lethefs::volume::meta::{self, Body, VolumeFile};
    let v = TestVolume::init();
    let text = fs::read_to_string(v.backing().join("lethefs.volume")).unwrap();
    let mut body: Body = serde_json::from_str(text.lines().next().unwrap()).unwrap();
    let id: VolumeId = body.volume_id;
    let ring = Keyring::new(id).unwrap();
    let kek = v.kek();
    let kek = Key32::fill_with(|bytes| {
        bytes.copy_from_slice(&kek);
        Ok::<_, ()>(())
    });
    ring.admit(0, 1, &kek.unwrap(), true).unwrap();
    let mut second = body.scopes[0].keks[0].clone();
    second.version = 2;
    second.commitment = lethefs::crypto::ids::hex(&keyring::commitment(&id, 0, 2, &Key32::random().unwrap()));
    second.slots[0].identity = serde_json::from_value(serde_json::json!({ "provider": "later" })).unwrap();
    body.scopes[0].keks.push(second);
    VolumeFile::write(meta::open_backing(&v.backing()).unwrap(), &body, &ring).unwrap();
    let looked = v.cli(&["fsck", "backing"]);
    looked.is(0).says("KEK version 2 is not held");
    let before = fs::read_dir(v.backing()).unwrap().count();
    v.cli(&["fsck", "backing", "--repair"]).is(1).says("KEK version 2 is not held");
    assert_eq!(fs::read_dir(v.backing()).unwrap().count(), before);
}
