//! What must be there after a crash, and whether it is.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::rc::Rc;

use crate::fs::attributes::Type;
use crate::fs::core::Filesystem;
use crate::fs::inode::ROOT;

/// An object, by the number that the filesystem knows it by.
pub(super) type Node = u64;
type Names = BTreeMap<Vec<u8>, Node>;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum What {
    File,
    /// A FIFO, a socket or a device with this number.
    Special(Type, u64),
    Dir(Names),
    Symlink(Rc<[u8]>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Thing {
    pub(super) what: What,
    pub(super) xattrs: BTreeMap<Vec<u8>, Rc<[u8]>>,
}

impl Thing {
    pub(super) fn new(what: What) -> Rc<Self> {
        Rc::new(Self { what, xattrs: BTreeMap::new() })
    }
}

/// Everything that has a name, contents of files aside.
pub(super) type Tree = BTreeMap<Node, Rc<Thing>>;

pub(super) fn names(tree: &Tree, dir: Node) -> Option<&Names> {
    match &tree.get(&dir)?.what {
        What::Dir(names) => Some(names),
        _ => None,
    }
}

/// The tree after one operation.
pub(super) struct Snap {
    pub(super) tree: Tree,
    /// When the operation began and ended, by the record of changes.
    pub(super) begun: usize,
    pub(super) ended: usize,
    /// Directories and objects that it was about.
    pub(super) dirs: Vec<Node>,
    pub(super) objects: Vec<Node>,
}

/// Contents of a file after one operation.
pub(super) struct State {
    pub(super) bytes: Rc<Vec<u8>>,
    pub(super) begun: usize,
    pub(super) ended: usize,
}

/// What is known of a volume that a workload ran over.
#[derive(Default)]
pub(super) struct Model {
    pub(super) snaps: Vec<Snap>,
    pub(super) files: BTreeMap<Node, Vec<State>>,
    /// From this moment on the old KEK version is not needed any more.
    pub(super) rewrapped: Option<usize>,
    /// From this moment on the contents of this file are at least this state.
    contents: Vec<(usize, Node, usize)>,
    /// From this moment on the entries of this directory (or the attributes of this object) are at least as in this snap.
    entries: Vec<(usize, Node, usize)>,
    /// The same of what leads to an object that was flushed: not in a journal, where a directory may be moved meanwhile.
    above: Vec<(usize, Node, usize)>,
}

/// What ended it, in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// A power cut, with the journal in order.
    Power,
    /// A power cut, with every directory for itself.
    Loose,
    /// SIGKILL; `torn`: in the middle of a write.
    Kill { torn: bool },
}

/// What was found after a crash.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) tree: Tree,
    pub(super) files: BTreeMap<Node, Vec<u8>>,
}

impl Model {
    /// Over what was found, which is on the medium.
    pub(super) fn over(found: Found) -> Self {
        let state = |(node, bytes)| (node, vec![State { bytes: Rc::new(bytes), begun: 0, ended: 0 }]);
        let snap = Snap { tree: found.tree, begun: 0, ended: 0, dirs: Vec::new(), objects: Vec::new() };
        Self { snaps: vec![snap], files: found.files.into_iter().map(state).collect(), ..Self::default() }
    }

    pub(super) fn tree(&self) -> &Tree {
        &self.snaps[self.snaps.len() - 1].tree
    }

    pub(super) fn bytes(&self, file: Node) -> &Rc<Vec<u8>> {
        let states = &self.files[&file];
        &states[states.len() - 1].bytes
    }

    /// The contents of a file are on the medium from now on.
    pub(super) fn flushed(&mut self, now: usize, file: Node) {
        self.contents.push((now, file, self.files[&file].len() - 1));
    }

    /// What was done to an object and to the entries of a directory is on the medium from now on. `made`: only the making.
    pub(super) fn settled(&mut self, now: usize, node: Node, made: bool) {
        let about = |snap: &Snap| snap.objects.contains(&node) || snap.dirs.contains(&node);
        let found = if made {
            let new = |pair: &[Snap]| !pair[0].tree.contains_key(&node) && pair[1].tree.contains_key(&node);
            self.snaps.windows(2).position(new).map(|before| before + 1)
        } else {
            self.snaps.iter().rposition(about)
        };
        let bounds = |at: usize| self.snaps[at].dirs.iter().map(move |dir| (now, *dir, at));
        let entries: Vec<_> = found.into_iter().flat_map(|at| bounds(at).chain([(now, node, at)])).collect();
        // What leads to it is there, too.
        let led = |node: &Node| self.snaps.iter().rposition(|snap| snap.objects.contains(node));
        let above: Vec<_> = self.leading_to(node).iter().filter_map(led).flat_map(bounds).collect();
        self.entries.extend(entries);
        self.above.extend(above);
    }

    fn leading_to(&self, node: Node) -> Vec<Node> {
        let mut above = Vec::new();
        let mut at = node;
        while at != ROOT {
            let holds = |dir: &Node| names(self.tree(), *dir).is_some_and(|names| names.values().any(|n| *n == at));
            let Some(dir) = self.tree().keys().copied().find(holds) else { break };
            above.push(dir);
            at = dir;
        }
        above
    }

    /// Everything is on the medium.
    pub(super) fn all_flushed(&mut self, now: usize) {
        let files: Vec<Node> = self.files.keys().copied().collect();
        files.into_iter().for_each(|file| self.flushed(now, file));
        let last = self.snaps.len() - 1;
        let nodes: BTreeSet<Node> = self.snaps.iter().flat_map(|snap| snap.tree.keys().copied()).collect();
        self.entries.extend(nodes.into_iter().map(|node| (now, node, last)));
    }

    /// Holds what was found against what may be there when it ended after `cut` changes, with `under_way` begun.
    pub(super) fn check(&self, found: &Found, cut: usize, under_way: usize, end: End) -> Result<(), String> {
        let most = self.snaps.iter().rposition(|snap| snap.begun < under_way || snap.ended <= cut).unwrap_or(0);
        let bound = |node: Option<Node>| {
            let above = self.above.iter().filter(|_| node.is_some());
            let all = self.entries.iter().chain(above);
            let acked = all.filter(|(at, of, _)| *at <= cut && node.is_none_or(|node| node == *of));
            acked.map(|(_, _, snap)| *snap).max().unwrap_or(0)
        };
        match end {
            End::Loose => {
                for (node, thing) in &found.tree {
                    let like = |snap: &Snap| snap.tree.get(node).is_some_and(|then| then == thing);
                    if !self.snaps[bound(Some(*node)).min(most)..=most].iter().any(like) {
                        return Err(format!("{node:x} is {thing:?}, which it never was since it was flushed"));
                    }
                }
            }
            End::Power | End::Kill { .. } => {
                let least = match end {
                    End::Kill { .. } => self.snaps.iter().rposition(|snap| snap.ended <= cut).unwrap_or(0),
                    _ => bound(None),
                };
                if !self.snaps[least.min(most)..=most].iter().any(|snap| snap.tree == found.tree) {
                    let wanted: Vec<&Tree> = self.snaps[least.min(most)..=most].iter().map(|snap| &snap.tree).collect();
                    return Err(format!("the tree is {:#x?}, and none of {wanted:#x?}", found.tree));
                }
            }
        }
        for (file, bytes) in &found.files {
            let states = self.files.get(file).ok_or(format!("{file:x} never was a file"))?;
            let least = self.contents.iter().filter(|(at, of, _)| *at <= cut && of == file).map(|(_, _, state)| *state);
            let most = states.iter().rposition(|state| state.begun < under_way || state.ended <= cut).unwrap_or(0);
            let states = &states[least.max().unwrap_or(0).min(most)..=most];
            let zeros = !matches!(end, End::Kill { torn: false });
            possible(states, bytes, zeros).map_err(|what| format!("file {file:x}: {what}"))?;
        }
        Ok(())
    }
}

/// Each block is what it was in one of the states, the size between theirs. With `zeros`, what was never acknowledged may be
/// zeros. (What went in place at once and what was logged may be there one without the other.)
fn possible(states: &[State], now: &[u8], zeros: bool) -> Result<(), String> {
    let sizes: Vec<usize> = states.iter().map(|state| state.bytes.len()).collect();
    let (least, most) = (*sizes.iter().min().unwrap_or(&0), *sizes.iter().max().unwrap_or(&0));
    if !(least..=most).contains(&now.len()) {
        return Err(format!("{} bytes, not as in any of {sizes:?}", now.len()));
    }
    for at in (0..now.len()).step_by(4096) {
        let part = &now[at..(at + 4096).min(now.len())];
        let as_in = |state: &State| {
            let end = (at + part.len()).min(state.bytes.len());
            let held = state.bytes.get(at..end).unwrap_or(&[]);
            part[..held.len()] == *held && is_zero(&part[held.len()..])
        };
        let never_there = zeros && at >= least && is_zero(part);
        if !(never_there || states.iter().any(as_in)) {
            let what = if is_zero(part) { "lost" } else { "never so" };
            return Err(format!("the block at {at} of {} was {what}; sizes were {sizes:?}", now.len()));
        }
    }
    Ok(())
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}

/// All that a mount shows. Numbers are given with `shift` taken off.
pub(super) fn look(fs: &Filesystem, shift: u64) -> Result<Found, String> {
    let mut found = Found { tree: Tree::new(), files: BTreeMap::new() };
    let mut todo = vec![(ROOT, Type::Directory, String::from("/"))];
    while let Some((ino, kind, path)) = todo.pop() {
        let node = if ino == ROOT { ROOT } else { ino - shift };
        let wrong = |what: &str, errno: i32| format!("{path}: {what} fails with {errno}");
        let what = match kind {
            Type::Directory => {
                let mut entries = Vec::new();
                fs.readdir(ino, 0, false, |entry| {
                    entries.push((entry.name, entry.ino));
                    true
                })
                .map_err(|failed| wrong("readdir", failed.errno()))?;
                let mut names = Names::new();
                for (name, number) in entries.into_iter().filter(|(name, _)| name != b"." && name != b"..") {
                    let below = format!("{path}{}/", name.escape_ascii().take(20).map(char::from).collect::<String>());
                    let entry = fs.lookup(ino, &name).map_err(|failed| format!("{below}: {failed:?}"))?;
                    let entry = entry.ok_or(format!("{below} is listed and not there"))?;
                    if entry.ino != number {
                        return Err(format!("{below} is listed as {number:x} and is {:x}", entry.ino));
                    }
                    if names.insert(name, entry.ino - shift).is_some() {
                        return Err(format!("{below} is listed twice"));
                    }
                    todo.push((entry.ino, entry.kind, below));
                }
                What::Dir(names)
            }
            Type::Symlink => {
                What::Symlink(fs.readlink(ino).map_err(|failed| wrong("readlink", failed.errno()))?.into())
            }
            Type::Regular => {
                let size = fs.getattr(ino).map_err(|failed| wrong("stat", failed.errno()))?.size;
                let mut bytes = vec![0; size as usize + 10];
                let n = fs.read(ino, 0, &mut bytes).map_err(|failed| wrong("read", failed.errno()))?;
                bytes.truncate(n);
                if n as u64 != size {
                    return Err(format!("{path}: {n} bytes of {size}"));
                }
                found.files.insert(node, bytes);
                What::File
            }
            Type::Fifo | Type::Socket | Type::CharDevice | Type::BlockDevice => {
                What::Special(kind, fs.getattr(ino).map_err(|failed| wrong("stat", failed.errno()))?.device)
            }
        };
        let mut xattrs = BTreeMap::new();
        if kind != Type::Symlink {
            let list = fs.listxattr(ino).map_err(|failed| wrong("listxattr", failed.errno()))?;
            for name in list.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
                let value = fs.getxattr(ino, OsStr::from_bytes(name));
                xattrs.insert(name.to_vec(), value.map_err(|failed| wrong("getxattr", failed.errno()))?.into());
            }
        }
        found.tree.insert(node, Rc::new(Thing { what, xattrs }));
    }
    match fs.volume.integrity_failures() {
        0 => Ok(found),
        n => Err(format!("{n} integrity failures")),
    }
}

/// Removes everything that a mount shows.
pub(super) fn empty(fs: &Filesystem) -> Result<(), String> {
    let list = |ino| {
        let mut names = Vec::new();
        fs.readdir(ino, 0, false, |entry| {
            names.push((entry.name, entry.kind));
            true
        })
        .map(|()| names)
        .map_err(|failed| format!("readdir fails with {}", failed.errno()))
    };
    // Directories from the top; removed from the bottom.
    let (mut todo, mut directories) = (vec![ROOT], Vec::new());
    while let Some(dir) = todo.pop() {
        for (name, kind) in list(dir)?.into_iter().filter(|(name, _)| name != b"." && name != b"..") {
            if kind == Type::Directory {
                let entry = fs.lookup(dir, &name).map_err(|failed| format!("{failed:?}"))?.ok_or("gone")?;
                todo.push(entry.ino);
                directories.push((dir, name));
            } else {
                fs.unlink(dir, &name).map_err(|failed| format!("unlink fails with {}", failed.errno()))?;
            }
        }
    }
    for (dir, name) in directories.iter().rev() {
        fs.rmdir(*dir, name).map_err(|failed| format!("rmdir fails with {}", failed.errno()))?;
    }
    if list(ROOT)?.len() > 2 {
        return Err("the root is not empty after everything was removed".into());
    }
    Ok(())
}
