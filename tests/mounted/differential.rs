//! Random sequences of system calls, on a plain directory of the backing filesystem and on the mount: every result, errno
//! and trace must be the same.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, symlink};
use std::path::{Path, PathBuf};

use proptest::collection::vec;
use proptest::prelude::{Just, Strategy, any, prop_oneof};
use proptest::sample::select;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestRng, TestRunner};
use rustix::fs::{AtFlags, CWD, FallocateFlags, FileType, Mode, OFlags, RenameFlags, Timespec, Timestamps, XattrFlags};

use crate::bytes;
use crate::support::volume::TestVolume;

const SLOTS: usize = 3;

/// A system call, or a few that belong together.
#[derive(Clone, Debug)]
enum Op {
    Open(usize, PathBuf, OFlags),
    Write(usize, u64, usize),
    Append(usize, usize),
    Read(usize, u64, usize),
    SetLen(usize, u64),
    Allocate(usize, FallocateFlags, u64, u64),
    Sync(usize),
    Fstat(usize),
    Close(usize),
    ReadFile(PathBuf),
    Truncate(PathBuf, u64),
    Mkdir(PathBuf, u32),
    Rmdir(PathBuf),
    Unlink(PathBuf),
    Link(PathBuf, PathBuf),
    Symlink(OsString, PathBuf),
    Readlink(PathBuf),
    Rename(PathBuf, PathBuf, RenameFlags),
    Mknod(PathBuf, bool),
    Chmod(PathBuf, u32),
    Chown(PathBuf, u32),
    Times(PathBuf, i64),
    Stat(PathBuf, bool),
    List(PathBuf),
    SetXattr(PathBuf, &'static str, usize, XattrFlags),
    GetXattr(PathBuf, &'static str),
    RemoveXattr(PathBuf, &'static str),
}

/// What a call gave: an errno, or whatever a program can tell.
type Seen = Result<String, i32>;

fn some(text: impl std::fmt::Debug) -> Result<String, std::io::Error> {
    Ok(format!("{text:?}"))
}

fn digest(data: &[u8]) -> String {
    use sha2::Digest as _;
    format!("{} bytes, {:02x?}", data.len(), &sha2::Sha256::digest(data)[..6])
}

/// Everything of a stat that must be the same. Directories have sizes of their own.
fn shown(meta: &fs::Metadata) -> (u32, u32, u32, u64, u64, u64) {
    let size = if meta.is_dir() { 0 } else { meta.len() };
    (meta.mode(), meta.uid(), meta.gid(), meta.nlink(), size, meta.rdev())
}

fn read_all(file: &File) -> std::io::Result<Vec<u8>> {
    let mut data = vec![0; 200_000];
    let mut len = 0;
    loop {
        match file.read_at(&mut data[len..], len as u64)? {
            0 => break,
            n => len += n,
        }
    }
    data.truncate(len);
    Ok(data)
}

/// One of the two sides.
struct World {
    root: PathBuf,
    slots: [Option<File>; SLOTS],
}

impl World {
    fn new(root: PathBuf) -> Self {
        // Something to begin with.
        fs::create_dir_all(root.join("b/b")).unwrap();
        fs::write(root.join("a"), bytes(5000, 0)).unwrap();
        Self { root, slots: Default::default() }
    }

    fn run(&mut self, op: &Op) -> Seen {
        self.try_run(op).map_err(|error| error.raw_os_error().unwrap_or(-1))
    }

    fn try_run(&mut self, op: &Op) -> Result<String, std::io::Error> {
        let at = |path: &PathBuf| self.root.join(path);
        let held = |slot: usize| self.slots[slot].as_ref().ok_or(std::io::Error::from_raw_os_error(libc::EBADF));
        match op {
            Op::Open(slot, path, flags) => {
                // A FIFO must not make us wait.
                let flags = *flags | OFlags::NONBLOCK | OFlags::CLOEXEC;
                let file = File::from(rustix::fs::open(at(path), flags, Mode::from_raw_mode(0o644))?);
                let seen = shown(&file.metadata()?);
                self.slots[*slot] = Some(file);
                some(seen)
            }
            Op::Write(slot, offset, len) => some(held(*slot)?.write_at(&bytes(*len, offset + 1), *offset)?),
            Op::Append(slot, len) => {
                use std::io::{Seek as _, Write as _};
                let mut file = held(*slot)?;
                file.seek(std::io::SeekFrom::End(0))?;
                some(file.write(&bytes(*len, 7))?)
            }
            Op::Read(slot, offset, len) => {
                let mut data = vec![0; *len];
                let n = held(*slot)?.read_at(&mut data, *offset)?;
                some(digest(&data[..n]))
            }
            Op::SetLen(slot, len) => some(rustix::fs::ftruncate(held(*slot)?, *len)?),
            Op::Allocate(slot, mode, offset, len) => some(rustix::fs::fallocate(held(*slot)?, *mode, *offset, *len)?),
            Op::Sync(slot) => some(held(*slot)?.sync_all()?),
            Op::Fstat(slot) => some(shown(&held(*slot)?.metadata()?)),
            Op::Close(slot) => some(self.slots[*slot].take().is_some()),
            Op::ReadFile(path) => {
                let file = File::from(rustix::fs::open(at(path), OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty())?);
                some(digest(&read_all(&file)?))
            }
            Op::Truncate(path, len) => {
                let file = rustix::fs::open(at(path), OFlags::WRONLY | OFlags::NONBLOCK, Mode::empty())?;
                some(rustix::fs::ftruncate(file, *len)?)
            }
            Op::Mkdir(path, mode) => some(rustix::fs::mkdir(at(path), Mode::from_raw_mode(*mode))?),
            Op::Rmdir(path) => some(rustix::fs::rmdir(at(path))?),
            Op::Unlink(path) => some(rustix::fs::unlink(at(path))?),
            Op::Link(old, new) => some(fs::hard_link(at(old), at(new))?),
            Op::Symlink(target, path) => some(symlink(target, at(path))?),
            Op::Readlink(path) => some(fs::read_link(at(path))?),
            Op::Rename(old, new, flags) => some(rustix::fs::renameat_with(CWD, at(old), CWD, at(new), *flags)?),
            Op::Mknod(path, fifo) => {
                let kind = if *fifo { FileType::Fifo } else { FileType::Socket };
                some(rustix::fs::mknodat(CWD, at(path), kind, Mode::from_raw_mode(0o640), 0)?)
            }
            Op::Chmod(path, mode) => some(rustix::fs::chmod(at(path), Mode::from_raw_mode(*mode))?),
            Op::Chown(path, id) => some(std::os::unix::fs::lchown(at(path), Some(*id), Some(id + 1))?),
            Op::Times(path, time) => {
                let time = Timespec { tv_sec: *time, tv_nsec: 123_456_789 };
                let times = Timestamps { last_access: time, last_modification: time };
                rustix::fs::utimensat(CWD, at(path), &times, AtFlags::SYMLINK_NOFOLLOW)?;
                let meta = fs::symlink_metadata(at(path))?;
                some((meta.atime(), meta.atime_nsec(), meta.mtime(), meta.mtime_nsec()))
            }
            Op::Stat(path, true) => some(shown(&fs::metadata(at(path))?)),
            Op::Stat(path, false) => some(shown(&fs::symlink_metadata(at(path))?)),
            Op::List(path) => {
                let mut names =
                    fs::read_dir(at(path))?.map(|entry| entry.map(|e| e.file_name())).collect::<Result<Vec<_>, _>>()?;
                names.sort();
                some(names)
            }
            Op::SetXattr(path, name, len, flags) => {
                some(rustix::fs::setxattr(at(path), *name, &bytes(*len, 9), *flags)?)
            }
            Op::GetXattr(path, name) => {
                let mut value = [0; 1000];
                let n = rustix::fs::getxattr(at(path), *name, &mut value)?;
                some(digest(&value[..n]))
            }
            Op::RemoveXattr(path, name) => some(rustix::fs::removexattr(at(path), *name)?),
        }
    }

    /// All that is there now.
    fn tree(&self) -> BTreeMap<Vec<u8>, String> {
        let mut tree = BTreeMap::new();
        let mut todo = vec![self.root.clone()];
        while let Some(path) = todo.pop() {
            let meta = fs::symlink_metadata(&path).unwrap();
            let mut text = format!("{:?}", shown(&meta));
            // Times that nobody set are the clock's.
            if meta.mtime() < 1_000_000_000 {
                text += &format!(" {}.{}", meta.mtime(), meta.mtime_nsec());
            }
            if meta.is_symlink() {
                text += &format!(" {:?}", fs::read_link(&path).unwrap());
            } else if meta.is_file() {
                text += &digest(&fs::read(&path).unwrap());
            } else if meta.is_dir() {
                todo.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            }
            if meta.is_file() || meta.is_dir() {
                let mut list = [0; 1000];
                let n = rustix::fs::llistxattr(&path, &mut list).unwrap();
                let mut names: Vec<&[u8]> =
                    list[..n].split(|b| *b == 0).filter(|name| name.starts_with(b"user.")).collect();
                names.sort();
                for name in names {
                    let mut value = [0; 1000];
                    let n = rustix::fs::lgetxattr(&path, name, &mut value).unwrap();
                    text += &format!(" {}={}", name.escape_ascii(), digest(&value[..n]));
                }
            }
            tree.insert(path.strip_prefix(&self.root).unwrap().as_os_str().as_bytes().to_vec(), text);
        }
        tree
    }
}

fn paths() -> impl Strategy<Value = PathBuf> {
    let long = |letter, len| OsString::from_vec(vec![letter; len]);
    let part = prop_oneof![
        24 => select(["a", "b", "b", "c"].map(OsString::from).to_vec()),
        3 => select(vec![long(b'n', 255), long(b'n', 176), long(b'm', 175), OsString::from_vec(b"\xff\xfe".to_vec())]),
        1 => Just(long(b'x', 256)),
    ];
    let depth = prop_oneof![6 => Just(1..2), 3 => Just(2..3), 1 => Just(3..5)];
    let part = std::rc::Rc::new(part);
    depth.prop_flat_map(move |depth| vec(part.clone(), depth)).prop_map(|parts| parts.iter().collect())
}

fn ops() -> impl Strategy<Value = Op> {
    let slot = || prop_oneof![2 => Just(0), 1 => 0..SLOTS];
    let offset = || prop_oneof![0..10_000_u64, select(vec![0, 4095, 4096, 4097, 8192, 40_000])];
    let len = || prop_oneof![0..5000_usize, select(vec![1, 4096, 8192, 10_000])];
    let mode = || select(vec![0o600, 0o644, 0o755, 0o700, 0o1777, 0o4711, 0o2755]);
    let attribute = || select(vec!["user.a", "user.b"]);
    let flags = vec(
        prop_oneof![
            4 => Just(OFlags::CREATE), 1 => Just(OFlags::EXCL), 1 => Just(OFlags::TRUNC), 1 => Just(OFlags::APPEND),
            1 => Just(OFlags::NOFOLLOW), 1 => Just(OFlags::DIRECTORY),
        ],
        0..3,
    )
    .prop_map(|flags| flags.into_iter().fold(OFlags::RDWR, |all, flag| all | flag))
    // The kernel refuses this pair before it looks at anything.
    .prop_map(|flags| if flags.contains(OFlags::DIRECTORY) { flags - OFlags::CREATE } else { flags });
    let rename =
        select(vec![RenameFlags::empty(), RenameFlags::empty(), RenameFlags::NOREPLACE, RenameFlags::EXCHANGE]);
    let target = prop_oneof![
        paths().prop_map(PathBuf::into_os_string),
        select(vec![611_usize, 1375, 4095, 4096]).prop_map(|len| OsString::from_vec(vec![b't'; len])),
    ];
    // What is not offered (docs/SEMANTICS.md) the filesystem below does.
    let (keep, zero) = (FallocateFlags::KEEP_SIZE, FallocateFlags::ZERO_RANGE);
    let punch = FallocateFlags::PUNCH_HOLE;
    let space = select(vec![punch | keep, punch | keep, punch, zero, zero | keep, keep, FallocateFlags::empty()]);
    let xattr = select(vec![XattrFlags::empty(), XattrFlags::empty(), XattrFlags::CREATE, XattrFlags::REPLACE]);
    prop_oneof![
        6 => (slot(), paths(), flags).prop_map(|(s, p, f)| Op::Open(s, p, f)),
        6 => (slot(), offset(), len()).prop_map(|(s, o, l)| Op::Write(s, o, l)),
        2 => (slot(), len()).prop_map(|(s, l)| Op::Append(s, l)),
        3 => (slot(), offset(), len()).prop_map(|(s, o, l)| Op::Read(s, o, l)),
        3 => (slot(), offset()).prop_map(|(s, l)| Op::SetLen(s, l)),
        4 => (slot(), space, offset(), len()).prop_map(|(s, m, o, l)| Op::Allocate(s, m, o, l as u64)),
        1 => slot().prop_map(Op::Sync),
        1 => slot().prop_map(Op::Fstat),
        1 => slot().prop_map(Op::Close),
        4 => paths().prop_map(Op::ReadFile),
        2 => (paths(), offset()).prop_map(|(p, l)| Op::Truncate(p, l)),
        6 => (paths(), mode()).prop_map(|(p, m)| Op::Mkdir(p, m)),
        2 => paths().prop_map(Op::Rmdir),
        3 => paths().prop_map(Op::Unlink),
        4 => (paths(), paths()).prop_map(|(a, b)| Op::Link(a, b)),
        3 => (target, paths()).prop_map(|(t, p)| Op::Symlink(t, p)),
        1 => paths().prop_map(Op::Readlink),
        9 => (paths(), paths(), rename).prop_map(|(a, b, f)| Op::Rename(a, b, f)),
        1 => (paths(), any::<bool>()).prop_map(|(p, f)| Op::Mknod(p, f)),
        3 => (paths(), mode()).prop_map(|(p, m)| Op::Chmod(p, m)),
        2 => (paths(), 0..3_u32).prop_map(|(p, i)| Op::Chown(p, i)),
        1 => (paths(), -100..1000_i64).prop_map(|(p, t)| Op::Times(p, t)),
        4 => (paths(), any::<bool>()).prop_map(|(p, f)| Op::Stat(p, f)),
        3 => paths().prop_map(Op::List),
        3 => (paths(), attribute(), 0..300_usize, xattr).prop_map(|(p, n, l, f)| Op::SetXattr(p, n, l, f)),
        2 => (paths(), attribute()).prop_map(|(p, n)| Op::GetXattr(p, n)),
        1 => (paths(), attribute()).prop_map(|(p, n)| Op::RemoveXattr(p, n)),
    ]
}

#[test]
fn the_mount_behaves_like_the_filesystem_below() {
    // LETHEFS_TEST_SEED repeats a run that failed; LETHEFS_TEST_CASES makes a long one.
    let from_env = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let seed = from_env("LETHEFS_TEST_SEED").unwrap_or_else(random_seed);
    println!("LETHEFS_TEST_SEED={seed}");
    let v = TestVolume::mounted(&[]);
    fs::create_dir(v.path("plain")).unwrap();
    let cases = from_env("LETHEFS_TEST_CASES").map_or(48, |cases| cases as u32);
    let config = Config { cases, failure_persistence: None, max_shrink_iters: 3000, ..Config::default() };
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &key));
    let (count, calls, worked) = (std::cell::Cell::new(0), std::cell::Cell::new(0), std::cell::Cell::new(0));
    let outcome = runner.run(&vec(ops(), 1..120), |ops| {
        let name = format!("case{}", count.replace(count.get() + 1));
        calls.set(calls.get() + ops.len());
        compare(&v, &name, &ops, &worked)
    });
    outcome.unwrap_or_else(|failed| panic!("LETHEFS_TEST_SEED={seed}: {failed}"));
    println!("{} of {} calls worked", worked.get(), calls.get());
    assert!(worked.get() > calls.get() / 6, "the sequences test little but refusals");
}

fn random_seed() -> u64 {
    std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), ())
}

fn compare(v: &TestVolume, name: &str, ops: &[Op], worked: &std::cell::Cell<usize>) -> Result<(), TestCaseError> {
    let (mut plain, mut mounted) = (World::new(v.path("plain").join(name)), World::new(v.at(name)));
    for (at, op) in ops.iter().enumerate() {
        let (expected, seen) = (plain.run(op), mounted.run(op));
        worked.set(worked.get() + usize::from(expected.is_ok()));
        if expected != seen {
            return Err(TestCaseError::fail(format!("{at}: {op:?} gives {seen:?} instead of {expected:?}")));
        }
    }
    same(&plain.tree(), &mounted.tree(), "at the end")?;
    for world in [&mut plain, &mut mounted] {
        world.slots = Default::default();
    }
    v.remount(&[]);
    same(&plain.tree(), &mounted.tree(), "after a remount")?;
    fs::remove_dir_all(Path::new(&mounted.root)).map_err(|error| TestCaseError::fail(error.to_string()))
}

fn same(
    expected: &BTreeMap<Vec<u8>, String>,
    seen: &BTreeMap<Vec<u8>, String>,
    when: &str,
) -> Result<(), TestCaseError> {
    if expected == seen {
        return Ok(());
    }
    let names: std::collections::BTreeSet<_> = expected.keys().chain(seen.keys()).collect();
    let differing = names.into_iter().filter(|name| expected.get(*name) != seen.get(*name));
    let lines: Vec<String> = differing
        .map(|name| format!("{}: {:?} instead of {:?}", name.escape_ascii(), seen.get(name), expected.get(name)))
        .collect();
    Err(TestCaseError::fail(format!("{when}: {}", lines.join("; "))))
}
