//! What can be told of a tree of files.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;

use rustix::fs::FileType;
use sha2::Digest as _;

/// Files are looked at so far from their beginning and their end.
const LOOKED_AT: u64 = 1 << 20;

pub(crate) fn digest(data: &[u8]) -> String {
    format!("{} bytes, {:02x?}", data.len(), &sha2::Sha256::digest(data)[..6])
}

/// Everything of a stat that must be the same. Directories have sizes of their own.
pub(crate) fn shown(stat: &rustix::fs::Stat) -> String {
    let size = if FileType::from_raw_mode(stat.st_mode).is_dir() { 0 } else { stat.st_size };
    let rdev = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
    format!("{:o} {}:{} links {} size {size} device {rdev:?}", stat.st_mode, stat.st_uid, stat.st_gid, stat.st_nlink)
}

/// A time that a program set: sequences keep away from the present.
pub(crate) fn is_set(seconds: i64) -> bool {
    !(1_000_000_000..4_000_000_000).contains(&seconds)
}

type Time = (i64, i64);

/// All that is in a directory, by path.
pub(crate) type Tree = BTreeMap<Vec<u8>, String>;

fn walk(root: &Path) -> BTreeMap<Vec<u8>, fs::Metadata> {
    let mut found = BTreeMap::new();
    let mut todo = vec![root.to_owned()];
    while let Some(path) = todo.pop() {
        let meta = fs::symlink_metadata(&path).unwrap();
        if meta.is_dir() {
            todo.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
        found.insert(path.strip_prefix(root).unwrap().as_os_str().as_bytes().to_vec(), meta);
    }
    found
}

pub(crate) fn tree(root: &Path) -> Tree {
    let mut numbers = HashMap::new();
    let one = |(name, meta): (Vec<u8>, fs::Metadata)| {
        let path = root.join(OsStr::from_bytes(&name));
        let path = if name.is_empty() { root } else { &path };
        let mut text = shown(&rustix::fs::lstat(path).unwrap());
        // Which names are of one object.
        let next = numbers.len();
        text += &format!(" object {}", numbers.entry(meta.ino()).or_insert(next));
        if is_set(meta.mtime()) {
            text += &format!(" mtime {}.{}", meta.mtime(), meta.mtime_nsec());
        }
        if meta.is_symlink() {
            text += &format!(" to {}", digest(fs::read_link(path).unwrap().as_os_str().as_bytes()));
        } else if meta.is_file() {
            text += &format!(" {}", contents(path, meta.len()));
        }
        text += &xattrs(path);
        (name, text)
    };
    walk(root).into_iter().map(one).collect()
}

fn contents(path: &Path, size: u64) -> String {
    let file = File::open(path).unwrap();
    let part = |from: u64, len: u64| {
        let mut data = vec![0; len as usize];
        file.read_exact_at(&mut data, from).unwrap();
        digest(&data)
    };
    match size.checked_sub(2 * LOOKED_AT) {
        None | Some(0) => part(0, size),
        Some(_) => format!("{} … {}", part(0, LOOKED_AT), part(size - LOOKED_AT, LOOKED_AT)),
    }
}

fn xattrs(path: &Path) -> String {
    let mut list = [0; 10_000];
    let n = rustix::fs::llistxattr(path, &mut list).unwrap();
    let names: BTreeSet<&[u8]> = list[..n].split(|b| *b == 0).filter(|name| !name.is_empty()).collect();
    let one = |name: &[u8]| {
        let mut value = vec![0; 70_000];
        let n = rustix::fs::lgetxattr(path, name, &mut value[..]).unwrap();
        format!(" {}={}", name.escape_ascii(), digest(&value[..n]))
    };
    names.into_iter().map(one).collect()
}

/// The number of each object and when it was changed: contents, and anything.
pub(crate) type Times = BTreeMap<Vec<u8>, (u64, [Time; 2])>;

pub(crate) fn times(root: &Path) -> Times {
    let of = |meta: fs::Metadata| (meta.ino(), [(meta.mtime(), meta.mtime_nsec()), (meta.ctime(), meta.ctime_nsec())]);
    walk(root).into_iter().map(|(name, meta)| (name, of(meta))).collect()
}

/// Which times have moved of the objects that were there before, whatever they were called then.
pub(crate) fn moved(before: &Times, after: &Times) -> BTreeMap<Vec<u8>, [bool; 2]> {
    let then: HashMap<u64, [Time; 2]> = before.values().copied().collect();
    let one = |(name, (number, now)): (&Vec<u8>, &(u64, [Time; 2]))| {
        let then = then.get(number)?;
        Some((name.clone(), [then[0] != now[0], then[1] != now[1]]))
    };
    after.iter().filter_map(one).collect()
}

/// What differs between two trees; `None`: nothing.
pub(crate) fn differences<T: PartialEq + std::fmt::Debug>(
    expected: &BTreeMap<Vec<u8>, T>,
    seen: &BTreeMap<Vec<u8>, T>,
) -> Option<String> {
    let names: BTreeSet<_> = expected.keys().chain(seen.keys()).collect();
    let differing = names.into_iter().filter(|name| expected.get(*name) != seen.get(*name));
    let lines: Vec<String> = differing
        .map(|name| format!("/{}: {:?} instead of {:?}", name.escape_ascii(), seen.get(name), expected.get(name)))
        .collect();
    (!lines.is_empty()).then(|| lines.join("; "))
}
