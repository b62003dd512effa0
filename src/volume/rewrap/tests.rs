//! A volume with one of everything, wrapped anew.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use super::*;
use crate::volume::check;
use crate::volume::file::{BIRTH_LEN, FileState};
use crate::volume::header::HEADER_LEN;
use crate::volume::link::SealedLink;
use crate::volume::storage::recorder::{self, Op};
use crate::volume::testing::{Ring, Vault, directory as scratch};
use crate::volume::{dir, link as links, node as nodes, xattr};

/// Names in `dir` as the volume has them, made ready by `place`.
fn name(volume: &Volume, keys: &DirKeys, plain: &[u8]) -> names::CipherName {
    keys.name(volume.keys(), plain).unwrap()
}

fn make_file(volume: &Volume, dir: BorrowedFd<'_>, keys: &DirKeys, plain: &[u8], data: &[u8], seals: bool) -> OwnedFd {
    let name = name(volume, keys, plain);
    let fd = dir::place(dir, &name, || storage::create_file(dir, name.as_str(), 0o600)).unwrap();
    let mut state = FileState::create(volume, fd.as_fd()).unwrap();
    state.write(volume, fd.as_fd(), 0, data).unwrap();
    xattr::set(volume, fd.as_fd(), state.dek(), "user.x".as_ref(), b"value", 0).unwrap();
    if seals {
        state.seal(volume, fd.as_fd()).unwrap();
    }
    fd
}

fn make_directory(volume: &Volume, parent: BorrowedFd<'_>, keys: &DirKeys, plain: &[u8]) -> (OwnedFd, DirKeys) {
    let new = DirKeys::make(volume.keys(), crate::crypto::ObjectId::random().unwrap()).unwrap();
    let (temporary, fd) = dir::build(parent, &new, 0o755, |_| Ok(())).unwrap();
    let name = name(volume, keys, plain);
    dir::place(parent, &name, || storage::rename(parent, &*temporary, parent, name.as_str(), RenameFlags::empty()))
        .unwrap();
    (fd, new)
}

/// One of everything; 13 objects with the root, two of them with two names.
fn make(volume: &Volume) {
    let root = volume.root().as_fd();
    let keys = volume.root_dir();
    for (plain, len) in [(b"empty".as_slice(), 0), (b"small", 100), (b"large", 100_000), (&[b'l'; 220], 5000)] {
        drop(make_file(volume, root, keys, plain, &vec![7; len], true));
    }
    drop(make_file(volume, root, keys, b"unsealed", &[8; 9000], false));
    let newborn = make_file(volume, root, keys, b"newborn", b"", false);
    storage::write_at(newborn.as_fd(), &[0; HEADER_LEN], 0).unwrap();
    let (below, below_keys) = make_directory(volume, root, keys, b"dir");
    let (deep, deep_keys) = make_directory(volume, below.as_fd(), &below_keys, &[b'd'; 200]);
    drop(make_file(volume, deep.as_fd(), &deep_keys, b"deep", &[9; 4096], true));
    for (plain, len) in [(b"short link".as_slice(), 10), (b"long link", 3000)] {
        let link = SealedLink::new(volume, &vec![b't'; len]).unwrap();
        link.create(root, root, name(volume, keys, plain).as_str()).unwrap();
    }
    let short = name(volume, keys, b"short link");
    storage::link(root, short.as_str(), deep.as_fd(), name(volume, &deep_keys, b"other name").as_str()).unwrap();
    let small = name(volume, keys, b"small");
    storage::link(root, small.as_str(), below.as_fd(), name(volume, &below_keys, b"other name").as_str()).unwrap();
    let fifo = nodes::build(volume, root, ObjectType::Fifo, 0, 0o600, |_| Ok(())).unwrap();
    storage::rename(root, &*fifo, root, name(volume, keys, b"fifo").as_str(), RenameFlags::empty()).unwrap();
    storage::mkdir(root, format::QUARANTINE, 0o700).unwrap();
    let aside = storage::open_dir(root, format::QUARANTINE).unwrap();
    let large = name(volume, keys, b"large");
    std::fs::copy(
        format!("{}/{}", storage::proc_path(root), large.as_str()),
        format!("{}/1.duplicate", storage::proc_path(aside.as_fd())),
    )
    .unwrap();
}

/// What must not change, by path: everything of a file but its static headers, of all but symlinks number and times.
fn rest(at: &Path) -> BTreeMap<PathBuf, (Option<u64>, i64, i64, Vec<u8>)> {
    let mut all = BTreeMap::new();
    let mut todo = vec![at.to_owned()];
    while let Some(path) = todo.pop() {
        let meta = std::fs::symlink_metadata(&path).unwrap();
        let bytes = if meta.is_file() {
            let bytes = std::fs::read(&path).unwrap();
            bytes.get(2 * STATIC_LEN..).unwrap_or_default().to_vec()
        } else if meta.is_symlink() {
            let text = std::fs::read_link(&path).unwrap().into_os_string().into_encoded_bytes();
            text.get(172..).unwrap_or_default().to_vec()
        } else {
            todo.extend(std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            Vec::new()
        };
        let header = path.ends_with(format::DIR_HEADER);
        let ino = (!meta.is_symlink()).then(|| meta.ino());
        let times = if header { (0, 0) } else { (meta.mtime(), meta.mtime_nsec()) };
        all.insert(path, (ino, times.0, times.1, bytes));
    }
    all
}

fn findings(volume: &Volume) -> Vec<String> {
    let found = Mutex::new(Vec::new());
    let request = check::Request { live: None, threads: 1, progress: &check::Progress::default() };
    check::check(volume, &request, &|finding| found.lock().unwrap().push(format!("{:?}", finding.fault))).unwrap();
    found.into_inner().unwrap()
}

#[test]
fn afterwards_the_new_version_opens_everything_alone_and_nothing_else_has_changed() {
    let (vault, at) = (Vault::new(), scratch());
    vault.create(at.path());
    let volume = vault.open(at.path()).unwrap();
    make(&volume);
    // The header that only the birth attribute has is written first.
    let newborn = name(&volume, volume.root_dir(), b"newborn");
    let newborn = storage::open_file(volume.root().as_fd(), newborn.as_str(), true).unwrap();
    let Header { header, mutable, newborn: true } = read_header(&volume, newborn.as_fd()).unwrap() else { panic!() };
    write_header_anew(&volume, newborn.as_fd(), &header, mutable).unwrap();
    let before = rest(at.path());
    let sound = findings(&volume);
    storage::write_at(newborn.as_fd(), &[0; HEADER_LEN], 0).unwrap();
    vault.close(volume);

    vault.hold(Ring::Both);
    let volume = vault.open(at.path()).unwrap();
    let totals = all(&volume).unwrap();
    assert!(totals.failed.is_empty(), "{:?}", totals.failed);
    // The second names of a file and a symlink are found done, or not yet flushed: counted either way.
    assert_eq!(totals.anew + totals.already, 16, "{totals:?}");
    let again = all(&volume).unwrap();
    assert_eq!((again.anew, again.already, again.failed.len()), (0, 16, 0));
    vault.close(volume);

    vault.hold(Ring::New);
    let volume = vault.open(at.path()).unwrap();
    assert_eq!(findings(&volume), sound);
    let (after, newborn_bytes) = (rest(at.path()), before.len());
    assert_eq!(after.len(), newborn_bytes);
    for (path, was) in &before {
        let now = &after[path];
        // Its mutable header was made anew.
        if now.3.len() == was.3.len() && was.3.len() == HEADER_LEN - 2 * STATIC_LEN {
            assert_eq!((now.0, now.1), (was.0, was.1), "{}", path.display());
        } else {
            assert_eq!(now, was, "{}", path.display());
        }
    }
    let root = volume.root().as_fd();
    let read = |plain: &[u8]| {
        let name = name(&volume, volume.root_dir(), plain);
        let fd = storage::open_file(root, name.as_str(), false).unwrap();
        let state = FileState::load(&volume, fd.as_fd()).unwrap();
        let mut data = vec![0; state.size() as usize];
        state.read(&volume, fd.as_fd(), 0, &mut data).unwrap();
        assert!(storage::get_xattr_fd::<BIRTH_LEN>(fd.as_fd(), format::BIRTH).is_none());
        (data, xattr::get(&volume, fd.as_fd(), state.dek(), "user.x".as_ref()).unwrap())
    };
    assert_eq!(read(b"large"), (vec![7; 100_000], b"value".to_vec()));
    assert_eq!(read(b"unsealed"), (vec![8; 9000], b"value".to_vec()));
    assert_eq!(read(b"newborn"), (vec![], b"value".to_vec()));
    let link = name(&volume, volume.root_dir(), b"long link");
    assert_eq!(links::open(&volume, storage::readlink(root, link.as_str()).unwrap()).unwrap(), vec![b't'; 3000]);
    // Two names of one symlink are still that.
    let short = name(&volume, volume.root_dir(), b"short link");
    assert_eq!(storage::stat(root, short.as_str()).unwrap().st_nlink, 2);
    // What was put aside, too.
    let aside = storage::open_dir(root, format::QUARANTINE).unwrap();
    let aside = storage::open_file(aside.as_fd(), "1.duplicate", false).unwrap();
    assert!(FileState::load(&volume, aside.as_fd()).is_ok());
    vault.close(volume);

    vault.hold(Ring::Old);
    assert!(matches!(vault.open(at.path()), Err(VolumeError::Damaged(Damage::Root))));
}

/// The headers' bytes of a file.
fn copies(fd: BorrowedFd<'_>) -> [Vec<u8>; 2] {
    let mut both = [0; 2 * STATIC_LEN];
    storage::read_at(fd, &mut both, 0).unwrap();
    [both[..STATIC_LEN].to_vec(), both[STATIC_LEN..].to_vec()]
}

/// One copy at a time, the one that is relied on last, and only after a flush of the other.
#[test]
fn a_file_always_has_a_copy_that_nobody_is_writing() {
    let (vault, at) = (Vault::new(), scratch());
    vault.create(at.path());
    let volume = vault.open(at.path()).unwrap();
    let fds = [b"whole", b"hurt1", b"hurt2"]
        .map(|plain| make_file(&volume, volume.root().as_fd(), volume.root_dir(), plain, b"text", true));
    // Only the second copy opens; only the first.
    storage::write_at(fds[1].as_fd(), &[1; STATIC_LEN], 0).unwrap();
    storage::write_at(fds[2].as_fd(), &[1; STATIC_LEN], STATIC_LEN as u64).unwrap();
    vault.close(volume);
    vault.hold(Ring::Both);
    let volume = vault.open(at.path()).unwrap();
    for (fd, first) in fds.iter().zip([1_usize, 0, 1]) {
        let fd = fd.as_fd();
        let before = copies(fd);
        let half = begin(&volume, fd).unwrap().unwrap();
        let middle = copies(fd);
        assert_eq!(middle[1 - first], before[1 - first]);
        assert_ne!(middle[first], before[first]);
        half.finish(fd).unwrap();
        let after = copies(fd);
        assert_eq!(after, [middle[first].clone(), middle[first].clone()]);
        assert!(begin(&volume, fd).unwrap().is_none());
    }
}

#[test]
fn the_two_copies_are_written_with_a_flush_between_and_one_after() {
    let (vault, at) = (Vault::new(), scratch());
    recorder::simulate(crate::volume::storage::medium::Image::new().put(at.path(), false));
    vault.create(at.path());
    let volume = vault.open(at.path()).unwrap();
    let fd = make_file(&volume, volume.root().as_fd(), volume.root_dir(), b"file", b"text", false);
    vault.close(volume);
    vault.hold(Ring::Both);
    let volume = vault.open(at.path()).unwrap();
    recorder::record(true);
    assert!(file(&volume, fd.as_fd()).unwrap());
    let (_, trace) = recorder::end();
    let did: Vec<String> = trace
        .iter()
        .filter_map(|op| match op {
            Op::Write { offset, .. } => Some(format!("write at {offset}")),
            Op::SyncData { .. } => Some("flush".to_owned()),
            Op::RemoveXattr { .. } => Some("birth goes".to_owned()),
            _ => None,
        })
        .collect();
    assert_eq!(did, ["write at 128", "flush", "birth goes", "write at 0", "flush"]);
}

/// Of a file that is in use, also one whose header was only in its birth attribute: what is written next is under the new keys'
/// header.
#[test]
fn a_file_in_use_goes_on_under_the_new_version() {
    let (vault, at) = (Vault::new(), scratch());
    vault.create(at.path());
    let volume = vault.open(at.path()).unwrap();
    let root = volume.root().as_fd();
    let fds = [b"newborn".as_slice(), b"unsealed"]
        .map(|plain| make_file(&volume, root, volume.root_dir(), plain, b"text", false));
    storage::write_at(fds[0].as_fd(), &[0; HEADER_LEN], 0).unwrap();
    vault.close(volume);
    vault.hold(Ring::Both);
    let volume = vault.open(at.path()).unwrap();
    for fd in &fds {
        let mut state = FileState::load(&volume, fd.as_fd()).unwrap();
        let half = state.rewrap(&volume, fd.as_fd()).unwrap().unwrap();
        assert_eq!(state.dek().kek(), (0, 2));
        half.finish(fd.as_fd()).unwrap();
        state.write(&volume, fd.as_fd(), 2, b"st of it").unwrap();
        state.mend(&volume, fd.as_fd()).unwrap();
        state.seal(&volume, fd.as_fd()).unwrap();
    }
    directory(&volume, volume.root().as_fd()).unwrap();
    vault.close(volume);
    vault.hold(Ring::New);
    let volume = vault.open(at.path()).unwrap();
    for fd in &fds {
        let state = FileState::load(&volume, fd.as_fd()).unwrap();
        let mut data = [0; 10];
        assert_eq!(state.read(&volume, fd.as_fd(), 0, &mut data).unwrap(), 10);
        assert_eq!(&data, b"test of it");
    }
    vault.close(volume);
}
