//! The independent reader (`tests/reader`), which knows only docs/FORMAT.md, against the mount, byte for byte.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use lethefs::crypto::Key32;
use lethefs::keyring::{Keyring, commitment};
use lethefs::volume::meta::{VolumeFile, open_backing};
use lethefs::volume::{Volume, rewrap};
use rustix::fs::{CWD, FallocateFlags, FileType, Mode, XattrFlags};
use serde_json::{Value, json};
use sha2::Digest as _;
use zeroize::Zeroizing;

use crate::support::volume::{Output, TestVolume, mounts_below};
use crate::{bytes, name, python};

/// What reader.py says of a backing directory under this volume's KEK.
pub(crate) fn reader(v: &TestVolume, backing: &Path, command: &str) -> Output {
    reader_with(v, backing, &[command], &v.kek())
}

fn reader_with(v: &TestVolume, backing: &Path, command: &[&str], kek: &[u8; 32]) -> Output {
    let key: String = kek.iter().map(|byte| format!("{byte:02x}")).collect();
    let file = v.path("kek.hex");
    fs::write(&file, key).unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reader/reader.py");
    let run = Output::of(v.command(python()).arg(script).arg(backing).arg("--kek-hex-file").arg(&file).args(command));
    fs::remove_file(file).unwrap();
    run
}

/// The volume is without fault, to the last byte.
#[track_caller]
pub(crate) fn verify(v: &TestVolume) {
    let run = reader(v, &v.backing(), "verify");
    let report = run.json();
    assert_eq!((&report["errors"], &report["warnings"]), (&json!([]), &json!([])), "{}", run.err);
    assert_eq!(run.code, Some(0));
}

fn text(bytes: &[u8]) -> Value {
    STANDARD.encode(bytes).into()
}

/// What the mount shows, in the reader's words, by path.
fn mounted(root: &Path) -> BTreeMap<Vec<u8>, Value> {
    let mut found = BTreeMap::new();
    let mut todo = vec![root.to_owned()];
    while let Some(path) = todo.pop() {
        let meta = fs::symlink_metadata(&path).unwrap();
        let kind = meta.file_type();
        let relative = path.strip_prefix(root).unwrap().as_os_str().as_bytes().to_vec();
        let is = |names: &'static str, yes: bool| yes.then_some(names);
        let word = is("regular", kind.is_file())
            .or(is("directory", kind.is_dir()))
            .or(is("symlink", kind.is_symlink()))
            .or(is("fifo", kind.is_fifo()))
            .or(is("socket", kind.is_socket()))
            .or(is("char", kind.is_char_device()))
            .or(is("block", kind.is_block_device()));
        let mut object = json!({
            "path_b64": text(&relative),
            "type": word,
            "size": if kind.is_dir() { 0 } else { meta.len() },
            "mode": meta.mode() & 0o7777,
            "rdev": meta.rdev(),
            "xattrs": xattrs(&path),
        });
        if kind.is_file() {
            let digest = sha2::Sha256::digest(fs::read(&path).unwrap());
            object["sha256"] = digest.iter().map(|byte| format!("{byte:02x}")).collect::<String>().into();
        } else if kind.is_symlink() {
            object["target_b64"] = text(fs::read_link(&path).unwrap().as_os_str().as_bytes());
        } else if kind.is_dir() {
            todo.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
        found.insert(relative, object);
    }
    found
}

fn xattrs(path: &Path) -> Value {
    let mut list = vec![0; 10_000];
    let len = rustix::fs::llistxattr(path, &mut list).unwrap();
    let mut found = serde_json::Map::new();
    for name in list[..len].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let mut value = vec![0; 10_000];
        let len = rustix::fs::lgetxattr(path, name, &mut value).unwrap();
        found.insert(STANDARD.encode(name), text(&value[..len]));
    }
    found.into()
}

#[track_caller]
fn compare(v: &TestVolume, expected: &BTreeMap<Vec<u8>, Value>) {
    compare_with(v, expected, &reader(v, &v.backing(), "list"));
}

#[track_caller]
fn compare_with(v: &TestVolume, expected: &BTreeMap<Vec<u8>, Value>, run: &Output) {
    // A log is there while the volume is mounted.
    let said: Vec<&str> = run.err.lines().filter(|line| !line.contains("lethefs.log.")).collect();
    assert_eq!((run.code, said), (Some(0), vec![]));
    assert!(run.err.is_empty() || !mounts_below(&v.path("")).is_empty(), "{}", run.err);
    let read: BTreeMap<Vec<u8>, Value> = run
        .out
        .lines()
        .map(|line| {
            let object: Value = serde_json::from_str(line).unwrap();
            (STANDARD.decode(object["path_b64"].as_str().unwrap()).unwrap(), object)
        })
        .collect();
    for (path, object) in expected {
        assert_eq!(read.get(path), Some(object), "{}", path.escape_ascii());
    }
    assert_eq!(read.len(), expected.len());
}

fn make_everything(root: &Path) {
    let (plain, awkward) = (root.join("plain"), root.join(name(&[b'D'; 255])));
    fs::create_dir(&plain).unwrap();
    fs::create_dir(&awkward).unwrap();
    for size in [0, 1, 27, 28, 29, 3555, 3556, 3557, 4095, 4096, 4097, 8191, 8192, 8193, 12_288, 100_000, 1 << 20] {
        fs::write(plain.join(format!("size{size}")), bytes(size, size as u64)).unwrap();
    }
    // Holes: at the start, in the middle, at the end, cut inside a block, all of it.
    let sparse = |file: &str, data: &[(u64, usize)], size| {
        let file = File::create(plain.join(file)).unwrap();
        for (at, len) in data {
            file.write_all_at(&bytes(*len, *at), *at).unwrap();
        }
        file.set_len(size).unwrap();
    };
    sparse("hole-first", &[(8192, 100)], 8292);
    sparse("hole-middle", &[(0, 4096), (40_960, 4096)], 45_056);
    sparse("hole-last", &[(0, 5000)], 1 << 20);
    sparse("hole-cut", &[(0, 5000)], 4097);
    sparse("hole-only", &[], 100_000);
    sparse("hole-odd", &[(4095, 2), (20_000, 1)], 30_001);
    // Cut and grown again: nothing of the old contents may come back.
    fs::write(plain.join("regrown"), bytes(20_000, 3)).unwrap();
    for size in [9000, 50_000] {
        File::options().write(true).open(plain.join("regrown")).unwrap().set_len(size).unwrap();
    }
    for len in [1, 174, 175, 176, 177, 254, 255] {
        fs::write(awkward.join(name(&vec![b'n'; len])), [len as u8]).unwrap();
    }
    for odd in
        [b"\xff\x80\xfe".as_slice(), &[0xfe; 200], b"new\nline", "\u{e4}\u{1f600}".as_bytes(), b"-rf", b"lethefs.dir"]
    {
        fs::write(awkward.join(name(odd)), odd).unwrap();
    }
    for len in [1, 607, 608, 609, 610, 611, 612, 1500, 4095] {
        symlink(
            name(&bytes(len, len as u64).iter().map(|byte| byte | 1).collect::<Vec<_>>()),
            root.join(format!("link{len}")),
        )
        .unwrap();
    }
    let nodes = [
        ("fifo", FileType::Fifo, 0),
        ("socket", FileType::Socket, 0),
        ("char", FileType::CharacterDevice, rustix::fs::makedev(1, 3)),
        ("block", FileType::BlockDevice, rustix::fs::makedev(4095, 0xf_ffff)),
    ];
    for (node, kind, device) in nodes {
        rustix::fs::mknodat(CWD, root.join(node), kind, Mode::from_raw_mode(0o640), device).unwrap();
    }
    for path in [plain.join("size4096"), awkward.clone(), root.to_owned()] {
        for (name, value) in
            [("user.text", b"value".to_vec()), ("trusted.empty", vec![]), ("security.binary", bytes(300, 8))]
        {
            rustix::fs::setxattr(&path, name, &value, XattrFlags::empty()).unwrap();
        }
    }
    rustix::fs::setxattr(root.join("fifo"), "trusted.node", b"x", XattrFlags::empty()).unwrap();
    fs::hard_link(plain.join("size4097"), awkward.join("hard")).unwrap();
    fs::hard_link(plain.join("size4097"), awkward.join(name(&[b'h'; 255]))).unwrap();
    fs::hard_link(root.join("link4095"), awkward.join("hard-link")).unwrap();
    for (file, mode) in [("size1", 0), ("size27", 0o7777), ("size28", 0o400)] {
        fs::set_permissions(plain.join(file), fs::Permissions::from_mode(mode)).unwrap();
    }
    fs::create_dir_all(root.join("deep/er/and").join(name(&[b'd'; 200]))).unwrap();
    // And some that have been elsewhere.
    fs::rename(plain.join("size8193"), root.join("deep").join(name(&[b'm'; 180]))).unwrap();
    fs::rename(awkward.join("hard"), root.join("deep/hard")).unwrap();
    fs::remove_file(plain.join("size3557")).unwrap();
}

#[test]
fn the_independent_reader_sees_what_the_mount_shows() {
    let v = TestVolume::mounted(&["-o", "dev"]);
    make_everything(&v.mnt());
    let expected = mounted(&v.mnt());
    assert!(expected.len() > 50);
    // While mounted: what was synced is in the files, sealed or not.
    for path in expected.keys() {
        let path = v.at(name(path));
        if fs::symlink_metadata(&path).unwrap().is_file() {
            File::open(path).unwrap().sync_all().unwrap();
        }
    }
    compare(&v, &expected);
    v.umount();
    compare(&v, &expected);
    verify(&v);
    // Files that were open and dirty at the end, and changes to sealed ones.
    v.mount(&[]);
    assert!(mounted(&v.mnt()) == expected);
    let file = File::options().write(true).open(v.at("plain/size100000")).unwrap();
    file.write_all_at(&bytes(5000, 77), 50_001).unwrap();
    file.set_len(150_001).unwrap();
    File::options().write(true).open(v.at("plain/size4096")).unwrap().set_len(100).unwrap();
    let expected = mounted(&v.mnt());
    drop(file);
    v.umount();
    compare(&v, &expected);
    verify(&v);
}

/// Makes a second KEK version the current one, as a rotation will, without a KMS that would wrap it. Gives it.
fn rotate(v: &TestVolume) -> ([u8; 32], rewrap::Totals) {
    let key = |bytes: [u8; 32]| Key32::from_zeroizing(Zeroizing::new(bytes.to_vec())).unwrap();
    let new: [u8; 32] = bytes(32, 5).try_into().unwrap();
    let backing = open_backing(&v.backing()).unwrap();
    let found = VolumeFile::read(&backing).unwrap();
    let mut body = found[0].body().clone();
    let keys = Keyring::new(body.volume_id).unwrap();
    keys.admit(0, 1, &key(v.kek()), true).unwrap();
    found[0].authenticate(&keys).unwrap();
    keys.admit(0, 2, &key(new), true).unwrap();
    let commitment = commitment(&body.volume_id, 0, 2, &key(new));
    let mut record = body.scopes[0].keks[0].clone();
    record.version = 2;
    record.commitment = commitment.iter().map(|byte| format!("{byte:02x}")).collect();
    (body.scopes[0].current, body.generation) = (2, body.generation + 1);
    body.scopes[0].keks.push(record);
    VolumeFile::write(&backing, &body, &keys).unwrap();
    let volume = Volume::open(backing, &v.backing(), &body, keys, false).unwrap();
    (new, rewrap::all(&volume).unwrap())
}

#[test]
fn the_independent_reader_needs_only_the_new_kek_after_a_rewrap() {
    let v = TestVolume::mounted(&["-o", "dev"]);
    make_everything(&v.mnt());
    let punched = File::create_new(v.at("punched")).unwrap();
    punched.write_all_at(&bytes(50_000, 6), 0).unwrap();
    rustix::fs::fallocate(&punched, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 5000, 20_000).unwrap();
    drop(punched);
    let expected = mounted(&v.mnt());
    v.umount();
    compare(&v, &expected);
    let (new, totals) = rotate(&v);
    assert!(totals.failed.is_empty() && totals.anew > 50, "{totals:?}");
    let read = |command, kek, version| reader_with(&v, &v.backing(), &["--version", version, command], kek);
    compare_with(&v, &expected, &read("list", &new, "2"));
    let report = read("verify", &new, "2");
    assert_eq!((&report.json()["errors"], &report.json()["warnings"]), (&json!([]), &json!([])), "{}", report.err);
    // The old one is of no more use, but to read the volume file.
    assert_eq!(read("list", &v.kek(), "1").code, Some(1));
}
