//! One kind of damage at a time: what it is called, what repair makes of it, and that everything else stays as it was.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt as _, symlink};
use std::path::Path;

use crate::world::{World, census, kinds, long, pattern};

type Contents = BTreeMap<String, Vec<u8>>;

struct Case {
    name: &'static str,
    damage: fn(&World),
    /// What is found.
    found: &'static [&'static str],
    /// What is left after a repair.
    left: &'static [&'static str],
    /// Paths that are not what they were afterwards.
    gone: &'static [&'static str],
    /// What must be there under a new name (`recovered-…`).
    recovered: fn() -> Vec<Vec<u8>>,
}

const NOTES: [&str; 6] = ["unclean", "duplicate", "leftover", "sidecar-orphan", "link-tail-orphan", "foreign"];

fn none() -> Vec<Vec<u8>> {
    Vec::new()
}

fn put(path: &Path, at: u64, bytes: &[u8]) {
    OpenOptions::new().write(true).open(path).unwrap().write_all_at(bytes, at).unwrap();
}

fn flip(path: &Path, at: u64) {
    let mut byte = [0];
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

fn set_len(path: &Path, change: i64) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.set_len(file.metadata().unwrap().len().checked_add_signed(change).unwrap()).unwrap();
}

fn relink(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut target = fs::read_link(path).unwrap().into_os_string().into_encoded_bytes();
    change(&mut target);
    fs::remove_file(path).unwrap();
    symlink(<std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(&target), path).unwrap();
}

/// The one entry of a directory that begins so.
fn own(dir: &Path, prefix: &str) -> std::path::PathBuf {
    let mut found = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    found.find(|path| path.file_name().unwrap().to_str().unwrap().starts_with(prefix)).unwrap()
}

fn cases() -> Vec<Case> {
    vec![
        Case { name: "nothing at all", damage: |_| {}, found: &[], left: &[], gone: &[], recovered: none },
        Case {
            name: "a copy of the volume file is missing",
            damage: |w| fs::remove_file(w.v.backing().join("lethefs.volume")).unwrap(),
            found: &["volume-file"],
            left: &[],
            gone: &[],
            recovered: none,
        },
        Case {
            name: "the root's header is missing",
            damage: |w| fs::remove_file(w.v.backing().join("lethefs.dir")).unwrap(),
            found: &["root-header"],
            left: &[],
            gone: &["*"],
            recovered: none,
        },
        Case {
            name: "a directory's header is missing",
            damage: |w| fs::remove_file(w.find("dir").join("lethefs.dir")).unwrap(),
            // Its attribute is under the lost key, and seen only once it has a new one.
            found: &["directory-header"],
            left: &[],
            gone: &["dir/*"],
            recovered: || vec![pattern(5000, 4), pattern(4097, 6)],
        },
        Case {
            name: "a directory's header is damaged",
            damage: |w| relink(&w.find("dir").join("lethefs.dir"), |target| target[100] ^= 1),
            found: &["directory-header"],
            left: &[],
            gone: &["dir/*"],
            recovered: || vec![pattern(5000, 4), pattern(4097, 6)],
        },
        Case {
            name: "a directory's header is another's",
            damage: |w| {
                let other = fs::read_link(w.find("dir/sub").join("lethefs.dir")).unwrap();
                let at = w.find("dir").join("lethefs.dir");
                fs::remove_file(&at).unwrap();
                symlink(other, at).unwrap();
            },
            found: &["attribute", "duplicate", "name", "sidecar"],
            left: &["duplicate"],
            gone: &["dir/*"],
            recovered: || vec![pattern(5000, 4), pattern(4097, 6)],
        },
        Case {
            name: "both static headers are gone",
            damage: |w| put(&w.find("full"), 0, &[0; 256]),
            found: &["header"],
            left: &[],
            gone: &["full"],
            recovered: none,
        },
        Case {
            name: "one static header is damaged",
            damage: |w| flip(&w.find("full"), 60),
            found: &["header-copy"],
            left: &[],
            gone: &[],
            recovered: none,
        },
        Case {
            name: "one static header is another file's",
            damage: |w| {
                let mut other = [0; 128];
                fs::File::open(w.find("small")).unwrap().read_exact_at(&mut other, 0).unwrap();
                put(&w.find("full"), 128, &other);
            },
            found: &["header-copy"],
            left: &[],
            gone: &[],
            recovered: none,
        },
        Case {
            name: "the first static header is another file's",
            damage: |w| {
                let mut other = [0; 128];
                fs::File::open(w.find("small")).unwrap().read_exact_at(&mut other, 0).unwrap();
                put(&w.find("full"), 0, &other);
            },
            found: &["header-copy"],
            left: &[],
            gone: &[],
            recovered: none,
        },
        Case {
            name: "one mutable header is damaged",
            damage: |w| flip(&w.find("full"), 330),
            found: &["header-copy"],
            left: &[],
            gone: &[],
            recovered: none,
        },
        Case {
            name: "both mutable headers are gone",
            damage: |w| put(&w.find("big"), 256, &[7; 128]),
            found: &["mutable-header"],
            left: &[],
            gone: &["big", "again"],
            recovered: || vec![pattern(50_000, 2)],
        },
        Case {
            name: "cut off by a block",
            damage: |w| set_len(&w.find("full"), -4124),
            found: &["truncated"],
            left: &[],
            gone: &["full"],
            recovered: || vec![pattern(4096, 3)],
        },
        Case {
            name: "cut off in its header",
            damage: |w| {
                let path = w.find("full");
                OpenOptions::new().write(true).open(path).unwrap().set_len(300).unwrap();
            },
            found: &["truncated"],
            left: &[],
            gone: &["full"],
            recovered: || vec![Vec::new()],
        },
        Case {
            name: "longer than it was sealed",
            damage: |w| set_len(&w.find("small"), 5000),
            found: &["extended"],
            left: &[],
            gone: &["small"],
            recovered: || vec![pattern(100, 1)],
        },
        Case {
            name: "cut off, and a block damaged as well",
            damage: |w| {
                flip(&w.find("dir/one"), 512 + 100);
                set_len(&w.find("dir/one"), -10);
            },
            found: &["truncated"],
            left: &[],
            gone: &["dir/one"],
            recovered: || vec![vec![0; 4990]],
        },
        Case {
            name: "a damaged block",
            damage: |w| flip(&w.find("big"), 512 + 4124 * 3 + 2000),
            found: &["block"],
            left: &["block"],
            gone: &["big", "again"],
            recovered: none,
        },
        Case {
            name: "moved to another directory",
            damage: |w| {
                let from = w.find("dir/one");
                fs::rename(&from, w.find("dir/sub").join(from.file_name().unwrap())).unwrap();
            },
            found: &["name"],
            left: &[],
            gone: &["dir/one"],
            recovered: || vec![pattern(5000, 4)],
        },
        Case {
            name: "a directory moved to another",
            damage: |w| {
                let from = w.find("dir/sub");
                fs::rename(&from, w.v.backing().join(from.file_name().unwrap())).unwrap();
            },
            found: &["name"],
            left: &[],
            gone: &["dir/sub/*"],
            recovered: || vec![pattern(300, 5)],
        },
        Case {
            name: "a sidecar is missing",
            damage: |w| {
                let long = own(&w.find("dir"), "lethefs.name.");
                fs::remove_file(long).unwrap();
            },
            found: &["sidecar"],
            left: &[],
            gone: &["dir/nnn*"],
            recovered: || vec![pattern(4097, 6)],
        },
        Case {
            name: "a sidecar of another name",
            damage: |w| {
                let other = fs::read_link(own(&w.v.backing(), "lethefs.name.")).unwrap();
                let at = own(&w.find("dir"), "lethefs.name.");
                fs::remove_file(&at).unwrap();
                symlink(other, at).unwrap();
            },
            found: &["sidecar"],
            left: &[],
            gone: &["dir/nnn*"],
            recovered: || vec![pattern(4097, 6)],
        },
        Case {
            name: "a sidecar without an entry",
            damage: |w| symlink("abc", w.find("dir").join("lethefs.name.abc")).unwrap(),
            found: &["sidecar-orphan"],
            left: &[],
            gone: &[],
            recovered: none,
        },
        Case {
            name: "a file under a sidecar's name",
            damage: |w| fs::write(w.find("dir").join("lethefs.name.abc"), "somebody's").unwrap(),
            found: &["foreign"],
            left: &["foreign"],
            gone: &[],
            recovered: none,
        },
        Case {
            name: "planted: a FIFO",
            damage: |w| {
                let at = w.find("small");
                fs::remove_file(&at).unwrap();
                let mode = rustix::fs::Mode::from_raw_mode(0o644);
                rustix::fs::mknodat(rustix::fs::CWD, at, rustix::fs::FileType::Fifo, mode, 0).unwrap();
            },
            found: &["planted"],
            left: &[],
            gone: &["small"],
            recovered: none,
        },
        Case {
            name: "planted: a file in place of the overflow directory",
            damage: |w| {
                let at = w.v.backing().join("lethefs.overflow");
                fs::remove_dir_all(&at).unwrap();
                fs::write(at, "x").unwrap();
            },
            found: &["link-tail", "planted"],
            left: &[],
            gone: &["far"],
            recovered: none,
        },
        Case {
            name: "a damaged symlink",
            damage: |w| relink(&w.find("link"), |target| *target.last_mut().unwrap() ^= 1),
            found: &["link"],
            left: &[],
            gone: &["link"],
            recovered: none,
        },
        Case {
            name: "a piece of a long symlink is missing",
            damage: |w| {
                let at = fs::read_dir(w.v.backing().join("lethefs.overflow")).unwrap();
                let piece = at.map(|entry| entry.unwrap().path()).find(|path| path.to_str().unwrap().ends_with(".2"));
                fs::remove_file(piece.unwrap()).unwrap();
            },
            found: &["link-tail"],
            // The other pieces: seen only now that no symlink needs them.
            left: &["link-tail-orphan"],
            gone: &["far"],
            recovered: none,
        },
        Case {
            name: "a piece that no symlink needs",
            damage: |w| {
                let name = format!("{}.1", "ab".repeat(16));
                symlink("x", w.v.backing().join("lethefs.overflow").join(name)).unwrap();
            },
            found: &["link-tail-orphan"],
            left: &[],
            gone: &[],
            recovered: none,
        },
        Case {
            name: "a damaged attribute",
            damage: |w| {
                let path = w.find("big");
                let mut list = vec![0; 4096];
                let len = rustix::fs::listxattr(&path, &mut list[..]).unwrap();
                let name =
                    list[..len].split(|byte| *byte == 0).find(|name| name.starts_with(b"user.lethefs.")).unwrap();
                let name = std::str::from_utf8(name).unwrap();
                rustix::fs::setxattr(&path, name, &[3; 60], rustix::fs::XattrFlags::REPLACE).unwrap();
            },
            found: &["attribute"],
            left: &[],
            gone: &[],
            recovered: none,
        },
        Case {
            name: "left over: a file, an empty directory",
            damage: |w| {
                fs::write(w.find("dir").join("lethefs.tmp.a"), "x").unwrap();
                fs::create_dir(w.v.backing().join("lethefs.tmp.b")).unwrap();
                symlink("x", w.v.backing().join("lethefs.tmp.b/lethefs.dir")).unwrap();
            },
            found: &["leftover"],
            left: &[],
            gone: &[],
            recovered: none,
        },
        Case {
            name: "displaced: a directory with something in it",
            damage: |w| fs::rename(w.find("dir/sub"), w.find("dir").join("lethefs.tmp.c")).unwrap(),
            found: &["displaced"],
            left: &[],
            gone: &["dir/sub/*"],
            recovered: || vec![pattern(300, 5)],
        },
        Case {
            name: "a copy of another file",
            damage: |w| {
                fs::copy(w.find("full"), w.find("small")).unwrap();
            },
            found: &["duplicate"],
            left: &["duplicate"],
            gone: &["small"],
            recovered: none,
        },
        Case {
            name: "foreign",
            damage: |w| {
                fs::write(w.v.backing().join("read.me"), "x").unwrap();
                fs::write(w.find("dir").join("lethefs.volume"), "x").unwrap();
                fs::create_dir(w.v.backing().join("lost+found")).unwrap();
            },
            found: &["foreign"],
            left: &["foreign"],
            gone: &[],
            recovered: none,
        },
        Case {
            name: "a damaged node record",
            damage: |w| flip(&w.find("pipe"), 100),
            found: &["header"],
            left: &[],
            gone: &["pipe"],
            recovered: none,
        },
        Case {
            name: "a header of another type",
            damage: |w| {
                let node = fs::read(w.find("pipe")).unwrap();
                put(&w.find("full"), 0, &node);
                put(&w.find("full"), 128, &node);
            },
            found: &["object-type"],
            left: &[],
            gone: &["full"],
            recovered: none,
        },
    ]
}

fn is(pattern: &str, path: &str) -> bool {
    pattern.strip_suffix('*').map_or(pattern == path, |prefix| path.starts_with(prefix))
}

fn check(world: &World, whole: &Contents, case: &Case) {
    world.reset();
    (case.damage)(world);
    let damaged = |kinds: &[&str]| kinds.iter().any(|kind| !NOTES.contains(kind));
    // Looked at twice: looking changes nothing.
    for _ in 0..2 {
        let found = world.fsck(&[]);
        found.is_code(if damaged(case.found) { 21 } else { 0 });
        assert_eq!(kinds(&found.json(), "findings"), case.found, "{}: {}", case.name, found.out);
        assert_eq!(found.json()["state"], if damaged(case.found) { "damaged" } else { "clean" }, "{}", case.name);
    }
    let repaired = world.fsck(&["--repair"]);
    let state = match (damaged(case.found), damaged(case.left)) {
        (_, true) => (21, "damaged"),
        (true, false) => (20, "repaired"),
        (false, false) => (0, "clean"),
    };
    repaired.is_code(state.0);
    assert_eq!(repaired.json()["state"], state.1, "{}", case.name);
    assert_eq!(kinds(&repaired.json(), "left"), case.left, "{}: {}", case.name, repaired.out);
    for line in repaired.json()["findings"].as_array().unwrap() {
        assert!(line["problem"].is_null(), "{}: {line}", case.name);
        assert_ne!(line["repaired"].is_null(), !case.left.contains(&line["fault"].as_str().unwrap()), "{}", case.name);
    }
    // What a mount shows afterwards.
    world.v.mount(&[]);
    let now = world.contents();
    let expected = |path: &str| !case.gone.iter().any(|gone| is(gone, path));
    for (path, bytes) in whole.iter().filter(|(path, _)| expected(path)) {
        // A file with two names lives on under the other one.
        assert!(now.get(path) == Some(bytes), "{}: {path} is not what it was", case.name);
    }
    let recovered: Vec<&Vec<u8>> =
        now.iter().filter(|(path, _)| path.contains("recovered-")).map(|(_, bytes)| bytes).collect();
    for mut bytes in (case.recovered)() {
        if bytes.iter().all(|byte| *byte == 0) && !bytes.is_empty() {
            // All that is left of it is the second block.
            bytes[4096..].copy_from_slice(&pattern(5000, 4)[4096..4990]);
            assert!(!recovered.contains(&&bytes), "a cut block cannot be saved");
            bytes[4096..].fill(0);
        }
        assert!(
            recovered.contains(&&bytes),
            "{}: {} bytes were not recovered: {:?}",
            case.name,
            bytes.len(),
            now.keys()
        );
    }
    if case.gone == ["*"] {
        assert_eq!(census(&now), census(whole), "{}", case.name);
    }
    world.v.umount();
    let again = world.fsck(&[]);
    assert_eq!(kinds(&again.json(), "findings"), case.left, "{}: {}", case.name, again.out);
}

#[test]
fn every_kind_of_damage_has_its_name_and_its_repair() {
    let world = World::new();
    world.v.mount(&[]);
    let whole = world.contents();
    world.v.umount();
    assert_eq!(whole.len(), 12, "{:?}", whole.keys());
    let cases = cases();
    for case in &cases {
        check(&world, &whole, case);
    }
    eprintln!("{} kinds of damage", cases.len());
}

/// Several at once, some of them of one object: deepest first, and nothing stands in another's way.
#[test]
fn many_things_at_once() {
    let world = World::new();
    let dir = world.find("dir");
    put(&world.find("dir/one"), 256, &[0; 128]);
    fs::remove_file(own(&dir, "lethefs.name.")).unwrap();
    fs::remove_file(world.find("dir/sub").join("lethefs.dir")).unwrap();
    fs::remove_file(dir.join("lethefs.dir")).unwrap();
    fs::remove_file(world.v.backing().join("lethefs.dir")).unwrap();
    let found = world.fsck(&[]);
    found.is_code(21);
    assert_eq!(kinds(&found.json(), "findings"), ["directory-header", "mutable-header", "root-header"]);
    let repaired = world.fsck(&["--repair"]);
    repaired.is_code(20);
    world.v.mount(&[]);
    let now = census(&world.contents());
    for bytes in [pattern(100, 1), pattern(5000, 4), pattern(300, 5), pattern(4097, 6), pattern(10, 7)] {
        assert!(now.contains_key(&bytes), "{} bytes are lost", bytes.len());
    }
    world.v.umount();
    world.fsck(&[]).is(0);
    // Where things were before, and as what they are kept.
    let index = fs::read_to_string(world.v.backing().join("lethefs.quarantine/index")).unwrap();
    for line in index.lines() {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        assert!(line["fault"].is_string() && line["was"].is_string(), "{line}");
    }
    assert!(index.contains("mutable-header"), "{index}");
    assert!(world.v.backing().join("lethefs.quarantine/1.mutable-header").is_file());
}

/// A name of one's own choosing, and what is in the way of it.
#[test]
fn what_is_recovered_overwrites_nothing() {
    let world = World::new();
    // The same object twice, both without a name that decrypts.
    let (from, sub) = (world.find("dir/one"), world.find("dir/sub"));
    let name = from.file_name().unwrap().to_str().unwrap().to_owned();
    fs::copy(&from, sub.join(&name)).unwrap();
    fs::copy(&from, sub.join(format!("{}AA", &name[..name.len() - 2]))).unwrap();
    world.fsck(&["--repair"]).is_code(20);
    world.v.mount(&[]);
    let now = world.contents();
    let recovered: Vec<&String> = now.keys().filter(|path| path.contains("recovered-")).collect();
    assert_eq!(recovered.len(), 2, "{recovered:?}");
    assert!(recovered.iter().all(|path| now[*path] == pattern(5000, 4)));
    world.v.umount();
}

#[test]
fn a_long_name_in_the_report_is_plain_only_when_asked_for() {
    let world = World::new();
    flip(&world.find(&long("x")), 520);
    let line = |args: &[&str]| world.fsck(args).json()["findings"][0].clone();
    assert!(line(&[])["name"].is_null());
    assert_eq!(line(&["--names"])["name"], format!("/{}", long("x")));
    let cipher = line(&[])["path"].as_str().unwrap().to_owned();
    assert_eq!(world.v.backing().join(cipher), world.find(&long("x")));
    let text = world.v.cli(&["fsck", "backing"]);
    text.is_code(21);
    assert!(!text.out.contains("nnnn"), "{}", text.out);
    assert!(
        text.out.contains("blocks   0 to 0: bytes 0 to 4095") && text.out.ends_with("damaged: 1 findings are left\n")
    );
}

/// What somebody put in the quarantine's place is not followed and not written to.
#[test]
fn a_planted_quarantine_is_not_written_to() {
    let world = World::new();
    let (quarantine, outside) = (world.v.backing().join("lethefs.quarantine"), world.v.path("outside"));
    fs::write(&outside, "precious").unwrap();
    let plants: [(&str, &dyn Fn()); 3] = [
        ("a symlink to a directory", &|| symlink(world.v.path("home"), &quarantine).unwrap()),
        ("an index that is a symlink", &|| {
            fs::create_dir(&quarantine).unwrap();
            symlink(&outside, quarantine.join("index")).unwrap();
        }),
        ("an index that is a hard link", &|| {
            fs::create_dir(&quarantine).unwrap();
            fs::hard_link(&outside, quarantine.join("index")).unwrap();
        }),
    ];
    for (what, plant) in plants {
        world.reset();
        plant();
        put(&world.find("full"), 0, &[0; 256]);
        let run = world.fsck(&["--repair"]);
        run.is_code(21);
        let report = run.json();
        let mut lines = report["findings"].as_array().unwrap().iter();
        let line = lines.find(|line| line["fault"] == "header").unwrap();
        assert!(line["problem"].is_string(), "{what}: {line}");
        assert_eq!(
            kinds(&report, "left").contains(&"planted".to_owned()),
            what == "a symlink to a directory",
            "{what}"
        );
        assert_eq!(fs::read_to_string(&outside).unwrap(), "precious", "{what}");
        assert_eq!(fs::read_dir(world.v.path("home")).unwrap().count(), 0, "{what}");
        assert!(world.find("full").exists(), "{what}");
    }
}

/// Everything that an old name can be told from is written down before it goes: the text of a long name's sidecar, the
/// backing name, and under which header it decrypts.
#[test]
fn old_names_are_written_down() {
    let world = World::new();
    let index = || {
        let text = fs::read_to_string(world.v.backing().join("lethefs.quarantine/index")).unwrap();
        text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()).collect::<Vec<_>>()
    };
    let path = |path: &Path| path.strip_prefix(world.v.backing()).unwrap().to_str().unwrap().to_owned();

    // A file that is taken away with its sidecar, which was whole.
    let long_name = format!("dir/{}", long("f"));
    let sidecar = fs::read_link(own(&world.find("dir"), "lethefs.name.")).unwrap();
    put(&world.find(&long_name), 0, &[0; 256]);
    let was = path(&world.find(&long_name));
    world.fsck(&["--repair"]).is_code(20);
    let line = index().into_iter().find(|line| line["fault"] == "header").unwrap();
    assert_eq!((&line["was"], &line["sidecar"]), (&was.into(), &sidecar.to_str().unwrap().into()), "{line}");

    // A directory whose header was only away for a while: put back, its old names can be given again.
    world.reset();
    let header = fs::read_link(world.find("dir").join("lethefs.dir")).unwrap();
    fs::remove_file(world.find("dir").join("lethefs.dir")).unwrap();
    let was = [path(&world.find("dir/one")), path(&world.find("dir/sub")), path(&world.find(&long_name))];
    world.fsck(&["--repair"]).is_code(20);
    let lines = index();
    for was in &was {
        let line = lines.iter().find(|line| line["was"] == **was).unwrap();
        assert!(line["now"].as_str().unwrap().starts_with("recovered-"), "{line}");
        let backing = line["backing"].as_str().unwrap();
        let now = world.find("dir").join(backing);
        assert!(now.exists(), "{line}");
        fs::rename(now, world.v.backing().join(was)).unwrap();
        if let Some(text) = line["sidecar"].as_str() {
            let hash = was.rsplit_once("lethefs.long.").unwrap().1;
            symlink(text, world.find("dir").join(format!("lethefs.name.{hash}"))).unwrap();
        }
    }
    fs::remove_file(world.find("dir").join("lethefs.dir")).unwrap();
    symlink(header, world.find("dir").join("lethefs.dir")).unwrap();
    world.v.mount(&[]);
    let now = world.contents();
    assert_eq!(now["dir/one"], pattern(5000, 4));
    assert_eq!(now["dir/sub/two"], pattern(300, 5));
    assert_eq!(now[&long_name], pattern(4097, 6));
    world.v.umount();
}

/// A block of zeros in a file that has no holes is lost, not saved.
#[test]
fn what_is_lost_is_not_called_saved() {
    let world = World::new();
    let at = world.find("big");
    put(&at, 512 + 4124 * 2, &[0; 4124]);
    put(&at, 512 + 4124 * 4 + 1000, &[0; 512]);
    set_len(&at, -5000);
    let run = world.fsck(&["--repair"]);
    let told = run.json()["findings"][0]["repaired"].as_str().unwrap().to_owned();
    assert!(told.contains("2 blocks in it are zeros"), "{told}");
}

/// A recovered file is open to nobody who could not read the original, and runs as nobody.
#[test]
fn what_is_recovered_is_no_wider_open() {
    let world = World::new();
    let at = world.find("full");
    let acl = world.v.command("setfacl").args(["-m", "u:12345:rw,g::-,m::rw"]).arg(&at).status().unwrap();
    assert!(acl.success());
    let mode = fs::metadata(&at).unwrap().permissions();
    fs::set_permissions(
        &at,
        std::os::unix::fs::PermissionsExt::from_mode(std::os::unix::fs::PermissionsExt::mode(&mode) | 0o4000),
    )
    .unwrap();
    let list = |path: &Path| {
        let out = world.v.command("getfacl").args(["-cpn"]).arg(path).output().unwrap();
        String::from_utf8(out.stdout).unwrap()
    };
    let before = list(&at);
    assert!(before.contains("user:12345:rw-"), "{before}");
    set_len(&at, -100);
    let run = world.fsck(&["--repair"]);
    run.is_code(20);
    let id = run.json()["findings"][0]["object"].as_str().unwrap().to_owned();
    world.v.mount(&[]);
    let ino = std::os::unix::fs::MetadataExt::ino(&fs::metadata(world.v.at(format!("recovered-{id}"))).unwrap());
    world.v.umount();
    let mut all = fs::read_dir(world.v.backing()).unwrap().map(|entry| entry.unwrap().path());
    let new =
        all.find(|path| std::os::unix::fs::MetadataExt::ino(&fs::symlink_metadata(path).unwrap()) == ino).unwrap();
    assert_eq!(list(&new), before.replace("# flags: s--\n", ""));
    assert_eq!(std::os::unix::fs::MetadataExt::mode(&fs::metadata(&new).unwrap()) & 0o7000, 0);
}
