//! Writing to the backing store behind the owner's back: whatever is read is what was written, or EIO.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use lethefs::volume::format::{self, DIR_HEADER, LONG_NAME_PREFIX, LONG_PREFIX, OVERFLOW_DIR};
use rustix::fs::{Advice, CWD, FileType, Mode, XattrFlags};
use sha2::{Digest as _, Sha256};

use crate::store::{Keys, Watch, counter, errno, is_special, refuses};
use crate::support::volume::TestVolume;

const EIO: i32 = 5;
const HEADER: usize = format::HEADER as usize;
const SEALED: usize = format::SEALED_BLOCK as usize;
const SIZES: [usize; 8] = [0, 1, 100, 4095, 4096, 4097, 8192, 12288 + 5];
/// In every name and every file: what must never be in a log.
const NAME: &str = "zz-plain-name";
const CONTENT: &[u8] = b"zz-plain-content";

/// Bytes that differ from block to block, and hold no block of zeros.
fn content(size: usize, salt: &str) -> Vec<u8> {
    let salt = Sha256::digest(salt);
    let stream = (0_u64..).flat_map(|n| Sha256::digest([&salt[..], &n.to_le_bytes()].concat()).to_vec());
    CONTENT.iter().copied().chain(stream).take(size).collect()
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Expect {
    /// What was altered does not matter, or is kept twice.
    Same,
    /// Noticed.
    Eio,
}
use Expect::{Eio, Same};

/// What else an attacker finds in the store: a file of the same volume and one of another, of the same size.
struct Spoils {
    ours: Vec<u8>,
    theirs: Vec<u8>,
    dir_header: Vec<u8>,
}

type Alter = Box<dyn Fn(&mut Vec<u8>, &Spoils)>;

struct Case {
    name: String,
    size: usize,
    expect: Expect,
    alter: Alter,
}

fn xor(at: impl Into<Vec<usize>>) -> Alter {
    let at = at.into();
    Box::new(move |bytes, _| at.iter().for_each(|at| bytes[*at] ^= 0x10))
}

fn copy(range: std::ops::Range<usize>, from: impl Fn(&Spoils) -> &Vec<u8> + 'static) -> Alter {
    Box::new(move |bytes, spoils| bytes[range.clone()].copy_from_slice(&from(spoils)[range.clone()]))
}

/// Every alteration of a file with `size` bytes.
fn cases(size: usize) -> Vec<Case> {
    let len = format::backing_len(size as u64) as usize;
    let blocks = size.div_ceil(4096);
    let block = move |n: usize| HEADER + n * SEALED..len.min(HEADER + (n + 1) * SEALED);
    let mut cases = Vec::new();
    let mut add = |name: String, expect, alter| {
        let name = format!("{NAME}-{size}-{name}");
        cases.push(Case { name, size, expect, alter });
    };
    for at in [0, 8, 10, 11, 12, 16, 20, 24, 40, 48, 68, 80, 127] {
        add(format!("static {at}"), Eio, xor([at, 128 + at]));
        add(format!("static A {at}"), Same, xor([at]));
        add(format!("static B {at}"), Same, xor([128 + at]));
    }
    for at in [0, 12, 20, 63] {
        add(format!("mutable {at}"), Eio, xor([256 + at, 320 + at]));
        add(format!("mutable A {at}"), Same, xor([256 + at]));
        add(format!("mutable B {at}"), Same, xor([320 + at]));
    }
    add("reserved".into(), Same, xor([384, 511]));
    add("zero header".into(), Eio, Box::new(|bytes, _| bytes[..HEADER].fill(0)));
    add("all zero".into(), Eio, Box::new(|bytes, _| bytes.fill(0)));
    // An empty file's header says no more than that it is empty: any other does as well.
    let foreign = if size == 0 { Same } else { Eio };
    add("header of another file".into(), foreign, copy(0..HEADER, |spoils| &spoils.ours));
    add("static of another file".into(), Eio, copy(0..256, |spoils| &spoils.ours));
    add("mutable of another file".into(), Eio, copy(256..384, |spoils| &spoils.ours));
    add("header of another volume".into(), Eio, copy(0..HEADER, |spoils| &spoils.theirs));
    add("all of another volume".into(), Eio, copy(0..len, |spoils| &spoils.theirs));
    let dir: Alter = Box::new(|bytes, spoils| {
        bytes[..128].copy_from_slice(&spoils.dir_header);
        bytes[128..256].copy_from_slice(&spoils.dir_header);
    });
    add("header of a directory".into(), Eio, dir);
    for n in (0..blocks).filter(|n| *n == 0 || n + 1 == blocks) {
        let range = block(n);
        for at in [range.start, range.start + 12, range.end - 1] {
            add(format!("block {n} at {at}"), Eio, xor([at]));
        }
        add(format!("block {n} zero"), Eio, Box::new(move |bytes, _| bytes[block(n)].fill(0)));
        let zero_nonce: Alter = Box::new(move |bytes, _| bytes[block(n)][..12].fill(0));
        add(format!("block {n} zero nonce"), Eio, zero_nonce);
        add(format!("block {n} of another file"), Eio, copy(range.clone(), |spoils| &spoils.ours));
        add(format!("block {n} of another volume"), Eio, copy(range, |spoils| &spoils.theirs));
    }
    if size >= 8192 {
        let swap: Alter = Box::new(move |bytes, _| {
            let (first, second) = (bytes[block(0)].to_vec(), bytes[block(1)].to_vec());
            bytes[block(0)].copy_from_slice(&second);
            bytes[block(1)].copy_from_slice(&first);
        });
        add("blocks swapped".into(), Eio, swap);
        add("block twice".into(), Eio, Box::new(move |bytes, _| bytes.copy_within(block(0), block(1).start)));
        add("block left out".into(), Eio, Box::new(move |bytes, _| drop(bytes.drain(block(0)))));
        let inserted: Alter = Box::new(move |bytes, _| {
            let first = bytes[block(0)].to_vec();
            bytes.splice(HEADER..HEADER, first);
        });
        add("block inserted".into(), Eio, inserted);
    }
    let same_size = move |len: usize| if format::plain_size(len as u64) == Some(size as u64) { Same } else { Eio };
    let mut cuts: BTreeSet<usize> = [0, 1, 127, 128, 129, 255, 256, 300, 511, 512, 513, 540, 541].into();
    for n in 0..=blocks {
        cuts.extend([0, 1, 12, 28, 29].map(|more| HEADER + n * SEALED + more));
    }
    cuts.insert(len.saturating_sub(1));
    for cut in cuts.into_iter().filter(|cut| *cut < len) {
        add(format!("cut to {cut}"), same_size(cut), Box::new(move |bytes, _| bytes.truncate(cut)));
    }
    for more in [1, 28, 29, SEALED, 1 << 20] {
        let zeros: Alter = Box::new(move |bytes, _| bytes.resize(len + more, 0));
        add(format!("{more} zeros more"), same_size(len + more), zeros);
        let garbage: Alter = Box::new(move |bytes, _| bytes.resize(len + more, 0xa5));
        add(format!("{more} bytes more"), same_size(len + more), garbage);
    }
    cases
}

/// Reads in every manner: never other bytes than `content`, and EIO where it must be.
#[track_caller]
fn check(path: &Path, content: &[u8], expect: Expect, what: &str) {
    let shown = fs::symlink_metadata(path).unwrap_or_else(|error| panic!("{what}: {error}"));
    assert!(shown.is_file(), "{what}");
    let mut failed = false;
    // In order, as most programs read.
    let mut file = File::open(path).unwrap_or_else(|error| panic!("{what}: {error}"));
    let mut got = Vec::new();
    let mut buffer = [0; 1000];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => got.extend(&buffer[..n]),
            Err(error) => {
                assert_eq!(error.raw_os_error(), Some(EIO), "{what}");
                failed = true;
                break;
            }
        }
    }
    assert!(content.starts_with(&got), "{what}: wrong bytes");
    assert!(failed || got.len() == content.len(), "{what}: ends after {} without an error", got.len());
    // Anywhere, down to the end that stat tells.
    for at in (0..shown.len().min(20_000)).step_by(4096) {
        let mut block = [0; 4096];
        match file.read_at(&mut block, at) {
            Ok(n) => {
                let right = content.get(at as usize..).unwrap_or_default();
                assert!(n > 0 && right.starts_with(&block[..n]), "{what}: wrong bytes at {at}");
            }
            Err(error) => assert_eq!(error.raw_os_error(), Some(EIO), "{what}"),
        }
    }
    let found = if failed { Eio } else { Same };
    assert_eq!(found, expect, "{what}");
}

/// The damaged file can be had back: cut to nothing and written again, or deleted.
fn renew(path: &Path, fresh: &[u8], delete: bool, what: &str) {
    if delete {
        fs::remove_file(path).unwrap_or_else(|error| panic!("{what}: cannot be deleted: {error}"));
    }
    fs::write(path, fresh).unwrap_or_else(|error| panic!("{what}: cannot be written anew: {error}"));
    assert_eq!(fs::read(path).unwrap(), fresh, "{what}");
}

fn assert_discreet(volume: &TestVolume) {
    let log = volume.log();
    assert!(!log.contains(NAME) && !log.contains(std::str::from_utf8(CONTENT).unwrap()), "{log}");
    assert!(!log.contains("panicked"), "{log}");
}

#[test]
fn no_alteration_of_a_file_gives_wrong_bytes() {
    let (volume, other) = (TestVolume::mounted(&[]), TestVolume::mounted(&[]));
    let cases: Vec<Case> = SIZES.into_iter().flat_map(cases).collect();
    for size in SIZES {
        fs::write(volume.at(format!("donor {size}")), content(size, "donor")).unwrap();
        fs::write(other.at(format!("donor {size}")), content(size, "other")).unwrap();
    }
    for case in &cases {
        fs::write(volume.at(&case.name), content(case.size, &case.name)).unwrap();
    }
    volume.umount();
    other.umount();

    let (keys, other_keys) = (Keys::of(&volume), Keys::of(&other));
    let root = fs::read_link(volume.backing().join(DIR_HEADER)).unwrap();
    let dir_header = format::un_b64(root.as_os_str().as_encoded_bytes()).unwrap();
    for case in &cases {
        let donor = format!("donor {}", case.size);
        let spoils = Spoils {
            ours: fs::read(keys.find(&donor)).unwrap(),
            theirs: fs::read(other_keys.find(&donor)).unwrap(),
            dir_header: dir_header.clone(),
        };
        let path = keys.find(&case.name);
        let mut bytes = fs::read(&path).unwrap();
        assert_eq!(bytes.len() as u64, format::backing_len(case.size as u64));
        (case.alter)(&mut bytes, &spoils);
        fs::write(&path, bytes).unwrap();
    }

    volume.mount(&[]);
    for case in &cases {
        check(&volume.at(&case.name), &content(case.size, &case.name), case.expect, &case.name);
    }
    let noticed = cases.iter().filter(|case| case.expect == Eio).count() as u64;
    assert!(counter(&volume, "integrity_failures") >= noticed);
    for (n, case) in cases.iter().enumerate().filter(|(_, case)| case.expect == Eio) {
        renew(&volume.at(&case.name), &content(5000, &case.name), n % 2 == 0, &case.name);
    }
    volume.remount(&[]);
    for case in &cases {
        let size = if case.expect == Eio { 5000 } else { case.size };
        check(&volume.at(&case.name), &content(size, &case.name), Same, &case.name);
    }
    assert_eq!(counter(&volume, "integrity_failures"), 0);
    assert_discreet(&volume);
}

/// The same while mounted: what the kernel knows stays, what it asks for is checked.
#[test]
fn alterations_under_a_live_mount() {
    let volume = TestVolume::mounted(&[]);
    let names: Vec<String> = (0..12).map(|n| format!("{NAME}-{n}")).collect();
    for name in &names {
        fs::write(volume.at(name), content(12293, name)).unwrap();
    }
    volume.remount(&[]);
    let keys = Keys::of(&volume);
    // Half of them only looked at, half of them read before.
    for (n, name) in names.iter().enumerate() {
        let file = File::open(volume.at(name)).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 12293);
        if n % 2 == 1 {
            file.read_exact_at(&mut [0; 100], 0).unwrap();
            rustix::fs::fadvise(&file, 0, None, Advice::DontNeed).unwrap();
        }
    }
    let watch = Watch::new();
    let file = |name: &str| fs::File::options().write(true).open(keys.find(name)).unwrap();
    for (n, name) in names.iter().enumerate() {
        let path = keys.find(name);
        match n / 2 {
            0 => file(name).write_all_at(b"x", 512 + 20).unwrap(),
            1 => file(name).set_len(512 + 4124).unwrap(),
            2 => file(name).set_len(0).unwrap(),
            3 => file(name).write_all_at(&[0; 4124], 512).unwrap(),
            4 => {
                fs::remove_file(&path).unwrap();
                rustix::fs::mknodat(CWD, &path, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
                watch.add(&path);
            }
            _ => {
                fs::remove_file(&path).unwrap();
                let null = rustix::fs::makedev(1, 3);
                rustix::fs::mknodat(CWD, &path, FileType::CharacterDevice, Mode::from_raw_mode(0o600), null).unwrap();
                watch.add(&path);
            }
        }
    }
    for (n, name) in names.iter().enumerate() {
        // Replaced behind an open descriptor: what was written is still what is read.
        let may_read = n == 9 || n == 11;
        match fs::read(volume.at(name)) {
            Ok(bytes) => assert!(may_read && bytes == content(12293, name), "{n}"),
            Err(error) => assert!(!may_read && matches!(error.raw_os_error(), Some(EIO | 6)), "{n}: {error}"),
        }
    }
    assert!(!watch.opened(), "the daemon opened a device or FIFO that was planted");
    assert!(counter(&volume, "integrity_failures") >= 8);
    volume.remount(&[]);
    for name in &names[8..] {
        assert_eq!(errno(fs::symlink_metadata(volume.at(name))), EIO);
    }
    assert!(!watch.opened(), "the daemon opened a device or FIFO that was planted");
    assert_discreet(&volume);
}

/// Between stat and the first read another genuine file comes in a file's place, of another size than the kernel was told:
/// neither cut to that size nor filled up with zeros.
#[test]
fn a_swap_between_stat_and_read() {
    let volume = TestVolume::mounted(&[]);
    let sizes = [(100, 5000), (100, 12293), (5000, 100), (5000, 12293), (12293, 100), (12293, 5000)];
    let named = |how| sizes.map(|(a, b)| (format!("{how} {a} {b}"), a, b));
    let pairs = ["in place", "by name"].map(named).concat();
    for (name, a, b) in &pairs {
        fs::write(volume.at(name), content(*a, name)).unwrap();
        fs::write(volume.at(format!("other {name}")), content(*b, "other")).unwrap();
    }
    volume.remount(&[]);
    let keys = Keys::of(&volume);
    for (name, a, _) in &pairs {
        assert_eq!(fs::metadata(volume.at(name)).unwrap().len(), *a as u64);
        let (here, other) = (keys.find(name), keys.find(&format!("other {name}")));
        if name.starts_with("in place") {
            fs::write(here, fs::read(other).unwrap()).unwrap();
        } else {
            rustix::fs::renameat_with(CWD, here, CWD, other, rustix::fs::RenameFlags::EXCHANGE).unwrap();
        }
    }
    for (name, ..) in &pairs {
        assert_eq!(errno(fs::read(volume.at(name))), EIO, "{name}");
    }
    // Looked up anew they are what they are: whole files, put in another's place (docs/FORMAT.md section 12).
    volume.remount(&[]);
    for (name, _, b) in &pairs {
        assert_eq!(fs::read(volume.at(name)).unwrap(), content(*b, "other"), "{name}");
    }
}

/// Backing filesystems give the number of a deleted object to the next new one. The kernel must not take what we make for
/// what it knew by that number.
#[test]
fn numbers_of_deleted_objects_used_again() {
    let volume = TestVolume::mounted(&[]);
    let names: Vec<String> = (0..30).map(|n| n.to_string()).collect();
    for name in &names {
        fs::write(volume.at(format!("file {name}")), content(5000, name)).unwrap();
        symlink(format!("old {name}"), volume.at(format!("link {name}"))).unwrap();
        fs::create_dir(volume.at(format!("dir {name}"))).unwrap();
    }
    volume.remount(&[]);
    let keys = Keys::of(&volume);
    for name in &names {
        fs::symlink_metadata(volume.at(format!("file {name}"))).unwrap();
        fs::read_link(volume.at(format!("link {name}"))).unwrap();
        assert!(fs::read_dir(volume.at(format!("dir {name}"))).unwrap().next().is_none());
    }
    // One kind after the other, so that each gets the numbers of its own.
    for name in &names {
        fs::remove_file(keys.find(&format!("file {name}"))).unwrap();
    }
    for name in &names {
        let path = volume.at(format!("new file {name}"));
        match fs::write(&path, content(100, name)) {
            Ok(()) => assert_eq!(fs::read(&path).unwrap(), content(100, name)),
            Err(error) => assert_eq!(error.raw_os_error(), Some(EIO)),
        }
    }
    for name in &names {
        fs::remove_file(keys.find(&format!("link {name}"))).unwrap();
    }
    for name in &names {
        let path = volume.at(format!("new link {name}"));
        match symlink(name, &path) {
            Ok(()) => assert_eq!(fs::read_link(&path).unwrap(), Path::new(name)),
            Err(error) => assert_eq!(error.raw_os_error(), Some(EIO)),
        }
    }
    for name in &names {
        let dir = keys.find(&format!("dir {name}"));
        fs::remove_file(dir.join(DIR_HEADER)).unwrap();
        fs::remove_dir(dir).unwrap();
    }
    let mut whole = BTreeSet::new();
    for name in &names {
        let path = volume.at(format!("new dir {name}"));
        match fs::create_dir(&path).and_then(|()| fs::write(path.join("x"), b"x")) {
            Ok(()) => {
                assert_eq!(listed(&path), ["x"]);
                whole.insert(name.as_str());
            }
            Err(error) => assert_eq!(error.raw_os_error(), Some(EIO)),
        }
    }
    // What was made is there, and is what it was made as.
    volume.remount(&[]);
    assert!(whole.iter().all(|name| listed(&volume.at(format!("new dir {name}"))) == ["x"]));
    for name in listed(&volume.mnt()) {
        let (kind, number) = name.rsplit_once(' ').unwrap();
        match kind {
            "new file" => assert_eq!(fs::read(volume.at(&name)).unwrap(), content(100, number)),
            "new link" => assert_eq!(fs::read_link(volume.at(&name)).unwrap(), Path::new(number)),
            _ => assert!(listed(&volume.at(&name)).is_empty() || whole.contains(number), "{name}"),
        }
    }
}

/// A file that this mount has just written is not one that a crash left: whatever the header on disk promises so far, it has
/// no holes, and none of it is missing.
#[test]
fn what_was_just_written_cannot_be_zeroed_or_cut() {
    let volume = TestVolume::mounted(&[]);
    let keys = Keys::of(&volume);
    for syncs in [1, 2] {
        for alteration in ["zero", "cut", "punch"] {
            let name = format!("{syncs} {alteration}");
            let mut file = File::create_new(volume.at(&name)).unwrap();
            file.write_all(&content(12293, &name)).unwrap();
            // The first makes it durable, the second makes the header say so.
            (0..syncs).for_each(|_| file.sync_all().unwrap());
            rustix::fs::fadvise(&file, 0, None, Advice::DontNeed).unwrap();
            let backing = File::options().write(true).open(keys.find(&name)).unwrap();
            let second = (HEADER + SEALED) as u64;
            match alteration {
                "zero" => backing.write_all_at(&[0; SEALED], second).unwrap(),
                "cut" => backing.set_len(second).unwrap(),
                _ => {
                    let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
                    rustix::fs::fallocate(&backing, flags, second, SEALED as u64).unwrap();
                }
            }
            let read = File::open(volume.at(&name)).unwrap().read_at(&mut [0; 4096], 4096);
            assert_eq!(errno(read), EIO, "{name}");
        }
    }
}

fn listed(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Plants an object of each kind at the paths that `path` makes of its name.
fn plant(path: impl Fn(&str) -> PathBuf) {
    let node = |name: &str, kind, device| {
        rustix::fs::mknodat(CWD, path(name), kind, Mode::from_raw_mode(0o666), device).unwrap();
    };
    node("fifo", FileType::Fifo, 0);
    node("socket", FileType::Socket, 0);
    node("char", FileType::CharacterDevice, rustix::fs::makedev(1, 3));
    node("block", FileType::BlockDevice, rustix::fs::makedev(7, 250));
    symlink("/etc/passwd", path("link")).unwrap();
    symlink("a".repeat(1020), path("long-link")).unwrap();
    for len in [0, 10, 128, 600] {
        fs::write(path(&format!("file{len}")), vec![b'a'; len]).unwrap();
    }
    fs::create_dir(path("dir")).unwrap();
    fs::create_dir(path("dir-link")).unwrap();
    symlink("/etc/passwd", path("dir-link").join(DIR_HEADER)).unwrap();
    fs::create_dir(path("dir-fifo")).unwrap();
    let header = path("dir-fifo").join(DIR_HEADER);
    rustix::fs::mknodat(CWD, header, FileType::Fifo, Mode::from_raw_mode(0o666), 0).unwrap();
}

const PLANTED: [&str; 13] = [
    "fifo",
    "socket",
    "char",
    "block",
    "link",
    "long-link",
    "file0",
    "file10",
    "file128",
    "file600",
    "dir",
    "dir-link",
    "dir-fifo",
];

#[test]
fn planted_objects_are_not_believed_and_not_opened() {
    let volume = TestVolume::mounted(&[]);
    fs::create_dir(volume.at("d")).unwrap();
    for name in PLANTED {
        fs::write(volume.at("d").join(name), content(100, name)).unwrap();
    }
    volume.umount();
    let keys = Keys::of(&volume);
    let dir = keys.find("d");
    let watch = Watch::new();
    // In the place of genuine entries, and under names of no meaning.
    for name in PLANTED {
        fs::remove_file(keys.find(&format!("d/{name}"))).unwrap();
    }
    plant(|name| keys.find(&format!("d/{name}")));
    plant(|name| dir.join(format::b64(&Sha256::digest(name))));
    plant(|name| dir.join(format!("no base64 {name}")));
    plant(|name| dir.join(format!("lethefs.own.{name}")));
    for entry in fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path()) {
        if is_special(&entry) {
            watch.add(&entry);
        }
    }
    watch.add(&keys.find("d/dir-fifo").join(DIR_HEADER));

    volume.mount(&[]);
    let shown = listed(&volume.at("d"));
    let expected: BTreeSet<&str> = PLANTED[4..].iter().copied().collect();
    assert_eq!(shown.iter().map(String::as_str).collect::<BTreeSet<_>>(), expected);
    let at = |name: &str| volume.at("d").join(name);
    for name in ["fifo", "socket", "char", "block"] {
        assert_eq!(errno(fs::symlink_metadata(at(name))), EIO, "{name}");
        assert_eq!(errno(File::open(at(name))), EIO, "{name}");
    }
    for name in ["link", "long-link"] {
        assert!(fs::symlink_metadata(at(name)).unwrap().is_symlink(), "{name}");
        assert_eq!(errno(fs::read_link(at(name))), EIO, "{name}");
        assert_eq!(errno(File::open(at(name))), EIO, "{name}");
    }
    for name in ["file0", "file10", "file128", "file600"] {
        assert_eq!(errno(fs::read(at(name))), EIO, "{name}");
        let attribute: &mut [u8] = &mut [0; 10];
        assert_eq!(rustix::fs::getxattr(at(name), "user.x", attribute).unwrap_err().raw_os_error(), EIO, "{name}");
    }
    for name in ["dir", "dir-link", "dir-fifo"] {
        let read = fs::read_dir(at(name)).and_then(|mut entries| entries.next().transpose());
        assert_eq!(errno(read), EIO, "{name}");
        assert_eq!(errno(File::create(at(name).join("x"))), EIO, "{name}");
    }
    assert!(counter(&volume, "integrity_failures") >= 30);
    // All but the four that are nothing can be thrown away.
    for name in ["dir", "dir-link", "dir-fifo"] {
        fs::remove_dir(at(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
    for name in &PLANTED[4..10] {
        fs::remove_file(at(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
    assert!(listed(&volume.at("d")).is_empty());
    assert!(!watch.opened(), "the daemon opened a device or FIFO that was planted");
    volume.umount();
    assert_discreet(&volume);

    // In the place of our own files: the mount says so, or heals what there are two of.
    for name in ["lethefs.volume", "lethefs.erase", "lethefs.overflow", "lethefs.tmp.x"] {
        let path = volume.backing().join(name);
        let _ = fs::remove_file(&path);
        rustix::fs::mknodat(CWD, &path, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        watch.add(&path);
    }
    volume.mount(&[]);
    assert_eq!(errno(symlink("x".repeat(2000), volume.at("long"))), 20, "ENOTDIR: the tails have no place");
    assert!(volume.cli(&["erase", "backing", "--plan"]).code == Some(0));
    volume.umount();
    assert!(!watch.opened(), "the daemon opened a FIFO that was planted");
}

#[test]
fn names_that_are_none_are_not_shown() {
    let volume = TestVolume::mounted(&[]);
    fs::create_dir(volume.at("d")).unwrap();
    fs::create_dir(volume.at("e")).unwrap();
    fs::write(volume.at("d/one"), content(100, "one")).unwrap();
    fs::write(volume.at("e/else"), content(100, "else")).unwrap();
    volume.umount();
    let keys = Keys::of(&volume);
    let (dir, one) = (keys.find("d"), keys.find("d/one"));
    let mut planted = 0;
    let mut add = |name: &str| {
        fs::copy(&one, dir.join(name)).unwrap();
        planted += 1;
    };
    for bad in [b"".as_slice(), b".", b"..", b"a/b", b"/", b"../../etc/passwd", b"nul\0"] {
        add(&format::b64(&keys.seal_name(&dir, bad)));
    }
    // Of 256 bytes, with its sidecar.
    let sealed = keys.seal_name(&dir, &[b'x'; 256]);
    let hash = format::b64(&Sha256::digest(&sealed));
    symlink(format::b64(&sealed), dir.join(format!("{LONG_NAME_PREFIX}{hash}"))).unwrap();
    add(&format!("{LONG_PREFIX}{hash}"));
    // A short name in the form of a long one would be a second name of the same entry.
    let sealed = keys.seal_name(&dir, b"two");
    let hash = format::b64(&Sha256::digest(&sealed));
    symlink(format::b64(&sealed), dir.join(format!("{LONG_NAME_PREFIX}{hash}"))).unwrap();
    add(&format!("{LONG_PREFIX}{hash}"));
    // The same bytes written otherwise: 19 bytes are 26 characters, the last with four bits to spare.
    let genuine = one.file_name().unwrap().to_str().unwrap();
    let (rest, last) = genuine.split_at(genuine.len() - 1);
    let other = char::from(if last == "A" { b'B' } else { last.as_bytes()[0] + 1 });
    add(&format!("{rest}{other}"));
    add(&format!("{genuine}=="));
    add(&format!("{genuine}AAAA"));
    add(&genuine[..genuine.len() - 1]);
    // An entry of another directory, under its name there.
    add(keys.find("e/else").file_name().unwrap().to_str().unwrap());
    add("not-base64!");

    volume.mount(&[]);
    assert_eq!(listed(&volume.at("d")), ["one"]);
    assert!(counter(&volume, "integrity_failures") >= planted);
    assert_eq!(listed(&volume.at("e")), ["else"]);
    for name in ["two", "else", &"x".repeat(255)] {
        assert_eq!(errno(fs::symlink_metadata(volume.at("d").join(name))), 2, "{name}");
    }
    assert_eq!(errno(File::create(volume.at("d").join("x".repeat(256)))), 36, "ENAMETOOLONG");
    // The mount works on.
    fs::write(volume.at("d/two"), b"2").unwrap();
    assert_eq!(listed(&volume.at("d")), ["one", "two"]);
}

#[test]
fn long_names_and_their_sidecars() {
    let volume = TestVolume::mounted(&[]);
    let name = |letter: &str| letter.repeat(255);
    for letter in ["a", "b", "c", "d", "e", "f", "g"] {
        fs::write(volume.at(name(letter)), content(100, letter)).unwrap();
    }
    volume.umount();
    let keys = Keys::of(&volume);
    let entry = |letter: &str| keys.find(&name(letter));
    let sidecar = |letter: &str| {
        let entry = entry(letter).file_name().unwrap().to_str().unwrap().to_owned();
        volume.backing().join(entry.replace(LONG_PREFIX, LONG_NAME_PREFIX))
    };
    fs::remove_file(sidecar("a")).unwrap();
    let exchange = rustix::fs::RenameFlags::EXCHANGE;
    rustix::fs::renameat_with(CWD, sidecar("b"), CWD, sidecar("c"), exchange).unwrap();
    fs::remove_file(sidecar("d")).unwrap();
    symlink("x".repeat(300), sidecar("d")).unwrap();
    fs::remove_file(sidecar("e")).unwrap();
    rustix::fs::mknodat(CWD, sidecar("e"), FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    rustix::fs::renameat_with(CWD, entry("f"), CWD, entry("g"), exchange).unwrap();

    volume.mount(&[]);
    // Two whole files swapped for each other are two genuine files (docs/FORMAT.md section 12).
    assert_eq!(listed(&volume.mnt()), [name("f"), name("g")]);
    assert_eq!(fs::read(volume.at(name("f"))).unwrap(), content(100, "g"));
    assert!(counter(&volume, "integrity_failures") >= 5);
    for letter in ["a", "b", "c", "d", "e"] {
        assert_eq!(fs::read(volume.at(name(letter))).unwrap(), content(100, letter), "a lookup does not need it");
        fs::remove_file(volume.at(name(letter))).unwrap();
    }
    assert!(!entry("a").exists());
}

#[test]
fn directories_with_headers_of_others() {
    let (volume, other) = (TestVolume::mounted(&[]), TestVolume::mounted(&[]));
    let dirs = ["swap1", "swap2", "foreign", "none", "file", "flipped", "cut", "regular", "empty"];
    for name in dirs {
        fs::create_dir(volume.at(name)).unwrap();
        if name != "empty" {
            fs::write(volume.at(name).join(NAME), content(5000, name)).unwrap();
        }
    }
    fs::create_dir(other.at("dir")).unwrap();
    fs::write(volume.at("regular file"), b"1").unwrap();
    volume.umount();
    other.umount();
    let keys = Keys::of(&volume);
    let header = |name: &str| keys.find(name).join(DIR_HEADER);
    let mut found: Vec<_> = dirs.iter().map(|name| keys.find(name)).collect();
    let text = |name: &str| fs::read_link(header(name)).unwrap().into_os_string().into_string().unwrap();
    let put = |name: &str, text: &str| {
        fs::remove_file(header(name)).unwrap();
        symlink(text, header(name)).unwrap();
    };
    let genuine = text("flipped");
    let regular = format::b64(&fs::read(keys.find("regular file")).unwrap()[..128]);
    let (first, second) = (text("swap1"), text("swap2"));
    put("swap1", &second);
    put("swap2", &first);
    let theirs = fs::read_link(Keys::of(&other).find("dir").join(DIR_HEADER)).unwrap();
    put("foreign", theirs.to_str().unwrap());
    fs::remove_file(header("none")).unwrap();
    fs::remove_file(header("file")).unwrap();
    fs::write(header("file"), &genuine).unwrap();
    put("flipped", &genuine.replacen('A', "B", 1));
    put("cut", &genuine[..170]);
    put("regular", &regular);
    fs::remove_file(header("empty")).unwrap();
    found.sort();

    volume.mount(&[]);
    for name in ["swap1", "swap2"] {
        assert!(listed(&volume.at(name)).is_empty());
        assert_eq!(errno(fs::read(volume.at(name).join(NAME))), 2);
    }
    for name in ["foreign", "none", "file", "flipped", "cut", "regular", "empty"] {
        assert!(fs::symlink_metadata(volume.at(name)).unwrap().is_dir());
        let read = fs::read_dir(volume.at(name)).and_then(|mut entries| entries.next().transpose());
        assert_eq!(errno(read), EIO, "{name}");
        assert_eq!(errno(fs::read(volume.at(name).join(NAME))), EIO, "{name}");
        assert_eq!(errno(fs::write(volume.at(name).join("new"), b"x")), EIO, "{name}");
    }
    assert!(counter(&volume, "integrity_failures") >= 9);
    // An empty one can go, one with entries that nobody can name cannot.
    fs::remove_dir(volume.at("empty")).unwrap();
    assert_eq!(errno(fs::remove_dir(volume.at("cut"))), 39, "ENOTEMPTY");
    volume.umount();
    assert_discreet(&volume);

    // The root's own.
    let root = volume.backing().join(DIR_HEADER);
    let genuine = fs::read_link(&root).unwrap();
    let foreign = fs::read_link(other.backing().join(DIR_HEADER)).unwrap();
    for text in [first.as_str(), foreign.to_str().unwrap(), &regular, "/etc/passwd", "x"] {
        fs::remove_file(&root).unwrap();
        symlink(text, &root).unwrap();
        refuses(&volume, &["mount", "backing", "mnt"], 10, "root directory's header");
    }
    fs::remove_file(&root).unwrap();
    refuses(&volume, &["mount", "backing", "mnt"], 10, "root directory's header");
    rustix::fs::mknodat(CWD, &root, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    refuses(&volume, &["mount", "backing", "mnt"], 10, "root directory's header");
    fs::remove_file(&root).unwrap();
    symlink(genuine, &root).unwrap();
    volume.mount(&[]);
}

#[test]
fn node_records_that_were_altered() {
    let volume = TestVolume::mounted(&["-o", "dev"]);
    let null = rustix::fs::makedev(1, 3);
    let cuts = [0_usize, 1, 127, 129, 511, 512, 600];
    let flips = [0_usize, 8, 10, 11, 12, 16, 24, 40, 41, 47, 50, 68, 80, 127];
    let names: Vec<String> =
        cuts.iter().map(|n| format!("cut {n}")).chain(flips.iter().map(|n| format!("flip {n}"))).collect();
    for name in names.iter().map(String::as_str).chain(["device", "typed", "regular", "dir"]) {
        rustix::fs::mknodat(CWD, volume.at(name), FileType::CharacterDevice, Mode::from_raw_mode(0o644), null).unwrap();
    }
    rustix::fs::mknodat(CWD, volume.at("fifo"), FileType::Fifo, Mode::from_raw_mode(0o644), 0).unwrap();
    fs::write(volume.at("file"), content(3000, "file")).unwrap();
    volume.umount();
    let keys = Keys::of(&volume);
    let alter = |name: &str, change: &dyn Fn(&mut Vec<u8>)| {
        let path = keys.find(name);
        let mut bytes = fs::read(&path).unwrap();
        assert_eq!(bytes.len(), 128);
        change(&mut bytes);
        fs::write(path, bytes).unwrap();
    };
    for len in cuts {
        alter(&format!("cut {len}"), &|bytes| bytes.resize(len, 0));
    }
    for at in flips {
        alter(&format!("flip {at}"), &|bytes| bytes[at] ^= 4);
    }
    // /dev/null becomes a disk, with /dev/vda's number.
    alter("typed", &|bytes| {
        bytes[10] = 7;
        bytes[40..48].copy_from_slice(&rustix::fs::makedev(254, 0).to_le_bytes());
    });
    let header = fs::read(keys.find("file")).unwrap()[..128].to_vec();
    alter("regular", &|bytes| bytes.copy_from_slice(&header));
    let root = fs::read_link(volume.backing().join(DIR_HEADER)).unwrap();
    let root = format::un_b64(root.as_os_str().as_encoded_bytes()).unwrap();
    alter("dir", &|bytes| bytes.copy_from_slice(&root));
    // A file that looks like a record.
    let file = fs::read(keys.find("fifo")).unwrap();
    fs::write(keys.find("file"), file).unwrap();

    volume.mount(&["-o", "dev"]);
    let device = fs::symlink_metadata(volume.at("device")).unwrap();
    assert!(device.file_type().is_char_device() && device.rdev() == null);
    assert!(fs::symlink_metadata(volume.at("fifo")).unwrap().file_type().is_fifo());
    // A genuine record under another name of the same volume (docs/FORMAT.md section 12).
    assert!(fs::symlink_metadata(volume.at("file")).unwrap().file_type().is_fifo());
    let damaged: Vec<&str> = names.iter().map(String::as_str).chain(["typed", "regular", "dir"]).collect();
    for name in &damaged {
        let meta = fs::symlink_metadata(volume.at(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(meta.is_file() && meta.rdev() == 0, "{name}");
        assert_eq!(errno(fs::read(volume.at(name))), EIO, "{name}");
    }
    assert_eq!(listed(&volume.mnt()).len(), names.len() + 6);
    assert!(counter(&volume, "integrity_failures") >= damaged.len() as u64);
    for (n, name) in damaged.iter().enumerate() {
        renew(&volume.at(name), b"new", n % 2 == 0, name);
    }
    volume.remount(&[]);
    assert_eq!(fs::read(volume.at("typed")).unwrap(), b"new");
}

#[test]
fn symlinks_that_were_altered() {
    let volume = TestVolume::mounted(&[]);
    let target = |name: &str| format!("/{name}/").repeat(4095 / (name.len() + 2));
    let short = ["flip head", "flip nonce", "flip text", "cut", "more", "of file", "dotted", "empty piece"];
    let long =
        ["no tail", "no piece", "pieces swapped", "tails swapped", "other tail", "flipped", "endless", "genuine"];
    for name in short {
        symlink(NAME, volume.at(name)).unwrap();
    }
    for name in long {
        symlink(target(name), volume.at(name)).unwrap();
    }
    fs::write(volume.at("file"), b"1").unwrap();
    volume.umount();
    let keys = Keys::of(&volume);
    let text = |path: &Path| fs::read_link(path).unwrap().into_os_string().into_string().unwrap();
    let put = |path: &Path, text: &str| {
        fs::remove_file(path).unwrap();
        symlink(text, path).unwrap();
    };
    let flip = |text: &str, at: usize| {
        let other = if &text[at..=at] == "A" { "B" } else { "A" };
        format!("{}{other}{}", &text[..at], &text[at + 1..])
    };
    let alter = |name: &str, change: &dyn Fn(&str) -> String| {
        let path = keys.find(name);
        put(&path, &change(&text(&path)));
    };
    alter("flip head", &|text| flip(text, 40));
    alter("flip nonce", &|text| flip(text, 175));
    alter("flip text", &|text| flip(text, text.len() - 10));
    alter("cut", &|text| text[..text.len() - 4].to_owned());
    alter("more", &|text| format!("{text}AAAA"));
    alter("dotted", &|text| format!("{text}."));
    alter("empty piece", &|text| format!("{text:A<1020}"));
    let header = fs::read(keys.find("file")).unwrap()[..128].to_vec();
    alter("of file", &|text| format!("{}{}", &format::b64(&header)[..170], &text[170..]));
    let piece = |name: &str, n: usize| {
        let first = text(&keys.find(name));
        let id: String = format::un_b64(&first.as_bytes()[..172]).unwrap()[24..40]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        volume.backing().join(OVERFLOW_DIR).join(format!("{id}.{n}"))
    };
    for n in 1..=5 {
        fs::remove_file(piece("no tail", n)).unwrap();
    }
    fs::remove_file(piece("no piece", 3)).unwrap();
    let exchange = |a: &Path, b: &Path| {
        rustix::fs::renameat_with(CWD, a, CWD, b, rustix::fs::RenameFlags::EXCHANGE).unwrap();
    };
    exchange(&piece("pieces swapped", 1), &piece("pieces swapped", 2));
    exchange(&piece("tails swapped", 4), &piece("other tail", 4));
    put(&piece("flipped", 2), &flip(&text(&piece("flipped", 2)), 7));
    put(&piece("endless", 5), &"A".repeat(1020));
    symlink("A".repeat(1020), piece("endless", 6)).unwrap();

    volume.mount(&[]);
    assert_eq!(text(&volume.at("genuine")), target("genuine"));
    assert_eq!(fs::symlink_metadata(volume.at("genuine")).unwrap().len(), target("genuine").len() as u64);
    for name in short.iter().chain(&long).filter(|name| **name != "genuine") {
        let meta = fs::symlink_metadata(volume.at(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(meta.is_symlink(), "{name}");
        assert_eq!(errno(fs::read_link(volume.at(name))), EIO, "{name}");
    }
    assert_eq!(listed(&volume.mnt()).len(), 17);
    assert!(counter(&volume, "integrity_failures") >= 15);
    for name in short.iter().chain(&long) {
        fs::remove_file(volume.at(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
    assert_eq!(listed(&volume.mnt()), ["file"]);
    assert_discreet(&volume);
}

#[test]
fn attributes_that_were_altered() {
    let volume = TestVolume::mounted(&[]);
    let get = |path: &Path, name: &str| {
        let mut value = vec![0; 5000];
        rustix::fs::getxattr(path, name, value.as_mut_slice()).map(|len| value[..len].to_vec())
    };
    let list = |path: &Path| {
        let mut names = vec![0; 5000];
        let len = rustix::fs::listxattr(path, names.as_mut_slice()).unwrap();
        let mut names: Vec<String> = names[..len]
            .split(|b| *b == 0)
            .filter(|n| !n.is_empty())
            .map(|n| String::from_utf8_lossy(n).into())
            .collect();
        names.sort();
        names
    };
    fs::create_dir(volume.at("dir")).unwrap();
    let files = ["flip", "swap", "name", "copied", "cut", "dir"];
    for name in files {
        if name != "dir" {
            fs::write(volume.at(name), content(100, name)).unwrap();
        }
        for attribute in ["user.a", "user.b"] {
            let value = format!("{name} {attribute}");
            rustix::fs::setxattr(volume.at(name), attribute, value.as_bytes(), XattrFlags::empty()).unwrap();
        }
    }
    fs::write(volume.at("bare"), content(100, "bare")).unwrap();
    volume.umount();
    let keys = Keys::of(&volume);
    // Backing names, the one of user.a first: the values tell by length nothing, so both are tried.
    let put =
        |path: &Path, name: &str, value: &[u8]| rustix::fs::setxattr(path, name, value, XattrFlags::empty()).unwrap();
    for name in ["flip", "dir"] {
        for attribute in list(&keys.find(name)) {
            let mut value = get(&keys.find(name), &attribute).unwrap();
            *value.last_mut().unwrap() ^= 1;
            put(&keys.find(name), &attribute, &value);
        }
    }
    let path = keys.find("swap");
    let names = list(&path);
    let values: Vec<_> = names.iter().map(|name| get(&path, name).unwrap()).collect();
    put(&path, &names[0], &values[1]);
    put(&path, &names[1], &values[0]);
    let path = keys.find("name");
    for name in list(&path) {
        let value = get(&path, &name).unwrap();
        rustix::fs::removexattr(&path, &*name).unwrap();
        put(&path, &format!("{name}AAAA"), &value);
    }
    let from = keys.find("copied");
    for name in list(&from) {
        put(&keys.find("bare"), &name, &get(&from, &name).unwrap());
        put(&from, &name, &[0; 5]);
    }
    let path = keys.find("cut");
    for name in list(&path) {
        put(&path, &name, b"");
    }
    put(&path, "user.planted", b"x");
    put(&path, "user.lethefs.", b"x");
    put(&path, "user.lethefs.!", &[b'x'; 3000]);

    volume.mount(&[]);
    let failures = counter(&volume, "integrity_failures");
    for name in ["flip", "dir", "swap", "copied", "cut"] {
        assert_eq!(list(&volume.at(name)), ["user.a", "user.b"], "{name}");
        for attribute in ["user.a", "user.b"] {
            assert_eq!(get(&volume.at(name), attribute).unwrap_err().raw_os_error(), EIO, "{name} {attribute}");
        }
        rustix::fs::setxattr(volume.at(name), "user.a", b"new", XattrFlags::empty()).unwrap();
        assert_eq!(get(&volume.at(name), "user.a").unwrap(), b"new");
        rustix::fs::removexattr(volume.at(name), "user.b").unwrap();
    }
    for name in ["name", "bare"] {
        assert!(list(&volume.at(name)).is_empty(), "{name}");
        assert_eq!(get(&volume.at(name), "user.a").unwrap_err().raw_os_error(), 61, "ENODATA");
    }
    assert!(counter(&volume, "integrity_failures") >= failures + 14);
}

/// What the kernel may make of absurd numbers in the backing tree.
#[test]
fn absurd_sizes_and_times() {
    let volume = TestVolume::mounted(&[]);
    for name in ["huge", "old", "future", "open"] {
        fs::write(volume.at(name), content(5000, name)).unwrap();
    }
    volume.umount();
    let keys = Keys::of(&volume);
    let file = |name: &str| File::options().write(true).open(keys.find(name)).unwrap();
    // As large as the backing filesystem allows.
    let largest = (32..63).rev().find(|bits| file("huge").set_len((1 << bits) - 1).is_ok()).unwrap();
    for (name, seconds) in [("old", i64::MIN), ("future", i64::MAX)] {
        let time = rustix::fs::Timespec { tv_sec: seconds, tv_nsec: 999_999_999 };
        let times = rustix::fs::Timestamps { last_access: time, last_modification: time };
        rustix::fs::futimens(file(name), &times).unwrap();
    }
    volume.mount(&[]);
    assert!(fs::symlink_metadata(volume.at("huge")).unwrap().len() > 1 << (largest - 1));
    let huge = File::open(volume.at("huge")).unwrap();
    for at in [0, 4096, 1 << 30, (1 << (largest - 1)) - 5] {
        assert_eq!(errno(huge.read_at(&mut [0; 4096], at)), EIO);
    }
    for name in ["old", "future"] {
        fs::symlink_metadata(volume.at(name)).unwrap();
        assert_eq!(fs::read(volume.at(name)).unwrap(), content(5000, name));
    }
    renew(&volume.at("huge"), b"new", false, "huge");
    assert!(volume.cli(&["erase", "backing", "--plan"]).code == Some(0));
}

/// Small and the same in every run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % sides
    }
}

/// One thing that an attacker does to entries of the backing tree. What is not there any more he cannot do it to.
fn attack(dice: &mut Dice, entries: &[PathBuf], originals: &[Vec<u8>], dirs: &[PathBuf]) {
    let (a, b) = (dice.roll(entries.len()), dice.roll(entries.len()));
    let entry = &entries[a];
    let writable =
        || File::options().read(true).write(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(entry);
    let replace = |make: &dyn Fn() -> std::io::Result<()>| {
        let _ = fs::remove_file(entry).or_else(|_| fs::remove_dir(entry));
        let _ = make();
    };
    let exchange = |a: &Path, b: &Path| {
        let _ = rustix::fs::renameat_with(CWD, a, CWD, b, rustix::fs::RenameFlags::EXCHANGE);
    };
    let node = |kind, device| Ok(rustix::fs::mknodat(CWD, entry, kind, Mode::from_raw_mode(0o600), device)?);
    match dice.roll(12) {
        0 | 1 => exchange(entry, &entries[b]),
        2 => {
            if let Ok(file) = writable() {
                let at = dice.roll(originals[a].len()) as u64;
                let _ = file.write_all_at(&[dice.roll(256) as u8], at);
            }
        }
        3 => drop(writable().and_then(|file| file.set_len(dice.roll(20_000) as u64))),
        4 => drop(writable().and_then(|file| {
            file.write_all_at(&originals[b], 0)?;
            file.set_len(originals[b].len() as u64)
        })),
        5 => drop(writable().and_then(|file| {
            let at = HEADER + dice.roll(4) * SEALED;
            let end = originals[b].len().min(at + SEALED);
            file.write_all_at(originals[b].get(at..end).unwrap_or_default(), at as u64)
        })),
        6 => replace(&|| node(FileType::Fifo, 0)),
        7 => replace(&|| symlink("/etc/passwd", entry)),
        8 => replace(&|| fs::create_dir(entry)),
        9 => exchange(&dirs[0], &dirs[1]),
        10 => exchange(&dirs[0].join(DIR_HEADER), &dirs[1].join(DIR_HEADER)),
        _ => replace(&|| fs::write(entry, &originals[a])),
    }
}

/// All at once, without pause, while programs look and read: whole contents of some file or an error, and no end of the daemon.
#[test]
fn an_attacker_at_work_while_programs_read() {
    let volume = TestVolume::mounted(&[]);
    let names: Vec<String> =
        ["d", "e"].iter().flat_map(|dir| SIZES.iter().map(move |size| format!("{dir}/{NAME}-{size}"))).collect();
    let contents: Vec<Vec<u8>> =
        names.iter().zip(SIZES.iter().cycle()).map(|(name, size)| content(*size, name)).collect();
    for dir in ["d", "e"] {
        fs::create_dir(volume.at(dir)).unwrap();
    }
    for (name, content) in names.iter().zip(&contents) {
        fs::write(volume.at(name), content).unwrap();
    }
    volume.umount();
    let keys = Keys::of(&volume);
    let entries: Vec<PathBuf> = names.iter().map(|name| keys.find(name)).collect();
    let originals: Vec<Vec<u8>> = entries.iter().map(|path| fs::read(path).unwrap()).collect();
    let dirs = [keys.find("d"), keys.find("e")];

    let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
    for round in 0..6 {
        volume.mount(&[]);
        let done = AtomicBool::new(false);
        let read = |salt: u64| {
            let mut dice = Dice(0xd1b5_4a32 + salt);
            while !done.load(Ordering::Relaxed) {
                let path = volume.at(&names[dice.roll(names.len())]);
                let _ = fs::symlink_metadata(&path);
                let _ = fs::read_dir(volume.at(["d", "e"][dice.roll(2)])).map(Iterator::count);
                let _ = fs::read_link(&path);
                let Ok(mut file) = File::open(&path) else { continue };
                let mut bytes = Vec::new();
                if file.read_to_end(&mut bytes).is_ok() {
                    assert!(contents.contains(&bytes), "{}: {} wrong bytes", path.display(), bytes.len());
                }
                let _ = rustix::fs::fadvise(&file, 0, None, Advice::DontNeed);
            }
        };
        std::thread::scope(|scope| {
            scope.spawn(|| read(round));
            scope.spawn(|| read(round + 100));
            for _ in 0..1500 {
                attack(&mut dice, &entries, &originals, &dirs);
            }
            done.store(true, Ordering::Relaxed);
        });
        // Still there, and ends as it should.
        counter(&volume, "integrity_failures");
        volume.umount();
    }
    assert_discreet(&volume);
}
