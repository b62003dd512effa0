//! Without any crash: whatever a program can ask for, refusals included, does what the model does, through remounts. Here
//! also what the simulated disk says nothing of: modes, owners, times, links, files that are open and have no name.
//!
//! `LETHEFS_TEST_SEED` repeats a run that failed; `LETHEFS_MODEL_CASES` says how many workloads are run.

mod generate;
mod refusals;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::time::{Duration, SystemTime};

use proptest::collection::vec;
use proptest::sample::select;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestRng, TestRunner};

use super::model::{Model, Node, What, look, names};
use super::session::{Do, Session, Setup};
use crate::fs::attributes::{Changes, SetTime, Type};
use crate::fs::core::Caller;
use crate::fs::errno::Failed;
use crate::fs::inode::ROOT;
use crate::volume::testing::{Vault, directory};

/// Seconds and nanoseconds since 1970.
type Time = (i64, u32);
/// The directory, the name, and what is there.
type Place = (Node, Vec<u8>, Option<Node>);

#[derive(Clone, Debug)]
enum Step {
    Do(Do),
    Chmod(String, u32),
    Chown(String, Option<u32>, Option<u32>),
    Times(String, Option<Time>, Option<Time>),
    /// Who makes things from now on.
    Become(u32),
    /// Keeps a file open, so that it may lose its names.
    Hold(String),
    /// Something with one that is kept open.
    WriteHeld(usize, u64, usize),
    ResizeHeld(usize, u64),
    FsyncHeld(usize),
    ChmodHeld(usize, u32),
    SetXattrHeld(usize),
    LinkHeld(usize, String),
    CloseHeld(usize),
    /// Everything is read.
    Look,
}

/// What stat says beside the type, the size and the number of links.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Meta {
    mode: u32,
    uid: u32,
    gid: u32,
    /// Where it was set and nothing changed since.
    mtime: Option<Time>,
}

struct Whole<'a> {
    session: Session<'a>,
    metas: BTreeMap<Node, Meta>,
    held: Vec<Node>,
    /// Attributes of those that have no name any more.
    nameless: BTreeMap<Node, BTreeMap<Vec<u8>, Vec<u8>>>,
    done: u64,
    refused: u64,
}

fn failed(step: &impl std::fmt::Debug) -> impl Fn(Failed) -> String {
    move |failed| format!("{step:?} fails with {}", failed.errno())
}

fn system_time((seconds, nanoseconds): Time) -> SystemTime {
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let at = if seconds < 0 { SystemTime::UNIX_EPOCH - whole } else { SystemTime::UNIX_EPOCH + whole };
    at + Duration::from_nanos(nanoseconds.into())
}

impl<'a> Whole<'a> {
    fn new(vault: &'a Vault, dir: &'a std::path::Path, setup: Setup) -> Result<Self, String> {
        let session = Session::new(vault, dir, setup, 1)?;
        let stat = session.fs.getattr(ROOT).map_err(failed(&"stat"))?.stat;
        let root = Meta { mode: stat.st_mode & 0o7777, uid: stat.st_uid, gid: stat.st_gid, mtime: None };
        let metas = [(ROOT, root)].into();
        Ok(Self { session, metas, held: Vec::new(), nameless: BTreeMap::new(), done: 0, refused: 0 })
    }

    fn model(&self) -> &Model {
        &self.session.model
    }

    fn what(&self, node: Node) -> Option<&What> {
        self.model().tree().get(&node).map(|thing| &thing.what)
    }

    fn entries(&self, node: Node) -> Option<usize> {
        names(self.model().tree(), node).map(BTreeMap::len)
    }

    /// Where a path leads. `None`: the way does not lead there, which is the kernel's to find out.
    fn target(&self, path: &str) -> Result<Option<Place>, String> {
        Ok(self.session.parent(path)?.map(|(dir, name)| (dir, name, self.session.find(path))))
    }

    fn step(&mut self, step: &Step) -> Result<(), String> {
        match step {
            Step::Do(step) => self.ordinary(step)?,
            Step::Become(user) => self.session.caller = Caller { uid: *user, gid: *user },
            Step::Look => self.look()?,
            Step::Hold(path) => {
                if let Some(node) = self.session.existing(path)?
                    && self.what(node) == Some(&What::File)
                    && !self.held.contains(&node)
                {
                    self.held.push(node);
                }
            }
            Step::Chmod(..) | Step::Chown(..) | Step::Times(..) => self.attributes(step)?,
            _ => self.held(step)?,
        }
        self.stat_all().map_err(|what| format!("{step:?}: {what}"))
    }

    fn ordinary(&mut self, step: &Do) -> Result<(), String> {
        if Self::is_knotted(step) {
            return Ok(());
        }
        if let Some(errno) = self.refusal(step)? {
            self.refused += 1;
            // The kernel asks for these only where it knows of nothing; we find out when we have made it.
            if let Do::Create(path) | Do::Fifo(path) | Do::Socket(path) | Do::Device(path) = step
                && let Some((dir, ..)) = self.target(path)?
                && let Some(meta) = self.metas.get_mut(&dir)
            {
                meta.mtime = None;
            }
            return match self.raw(step)? {
                Err(refused) if refused.errno() == errno => Ok(()),
                other => Err(format!("{step:?} gives {other:?} instead of {errno}")),
            };
        }
        // Both names of one object: nothing happens.
        if let Do::Rename(path, to) | Do::Exchange(path, to) = step
            && let (Some(node), Some(over)) = (self.session.find(path), self.session.find(to))
            && node == over
        {
            self.session.existing(path)?;
            return self.raw(step)?.map_err(failed(step));
        }
        let before = self.model().snaps.len() + self.model().files.values().map(Vec::len).sum::<usize>();
        let tree = self.model().tree().clone();
        match step {
            // What is open the kernel does not forget.
            Do::Forget => {
                for ino in self.session.fs.inodes.all().into_iter().filter(|ino| !self.held.contains(ino)) {
                    self.session.fs.forget(ino, u64::MAX);
                }
            }
            Do::Remount | Do::Die => {
                self.held.clear();
                self.nameless.clear();
                self.session.step(step)?;
            }
            _ => self.session.step(step)?,
        }
        let after = self.model().snaps.len() + self.model().files.values().map(Vec::len).sum::<usize>();
        self.done += u64::from(after > before);
        self.follow(step, &tree);
        Ok(())
    }

    /// What a step did to attributes.
    fn follow(&mut self, step: &Do, before: &super::model::Tree) {
        let tree = self.model().tree().clone();
        // New objects.
        for (node, thing) in tree.iter().filter(|(node, _)| !before.contains_key(node)) {
            let dir =
                tree.keys().find(|dir| names(&tree, **dir).is_some_and(|names| names.values().any(|n| n == node)));
            let parent = dir.map(|dir| self.metas[dir].clone()).unwrap();
            let inherits = parent.mode & 0o2000 != 0;
            let mode = match &thing.what {
                What::File => 0o644,
                What::Dir(_) if inherits => 0o2755,
                What::Dir(_) => 0o755,
                What::Special(..) => 0o600,
                What::Symlink(_) => 0o777,
            };
            let Caller { uid, gid } = self.session.caller;
            let gid = if inherits { parent.gid } else { gid };
            self.metas.insert(*node, Meta { mode, uid, gid, mtime: None });
        }
        // Names that went while somebody held the file.
        for node in self.held.iter().filter(|node| before.contains_key(node) && !tree.contains_key(node)) {
            let attributes = before[node].xattrs.iter().map(|(name, value)| (name.clone(), value.to_vec()));
            self.nameless.insert(*node, attributes.collect());
        }
        for (node, thing) in before {
            let now = tree.get(node).map(|now| &now.what);
            if matches!(thing.what, What::Dir(_))
                && now != Some(&thing.what)
                && let Some(meta) = self.metas.get_mut(node)
            {
                meta.mtime = None;
            }
        }
        let file = match step {
            Do::Write(path, ..) | Do::Resize(path, _) | Do::Allocate(path, ..) => self.session.find(path),
            _ => None,
        };
        if let Some(meta) = file.and_then(|node| self.metas.get_mut(&node)) {
            meta.mtime = None;
        }
        if *step == Do::Die {
            // What is put in place again is changed again.
            for (_, meta) in
                self.metas.iter_mut().filter(|(node, _)| tree.get(node).is_some_and(|t| t.what == What::File))
            {
                meta.mtime = None;
            }
        }
    }

    fn attributes(&mut self, step: &Step) -> Result<(), String> {
        let (Step::Chmod(path, ..) | Step::Chown(path, ..) | Step::Times(path, ..)) = step else { return Ok(()) };
        let Some(node) = self.session.existing(path)? else { return Ok(()) };
        // The kernel asks for no change at all only where chown(2) was told neither.
        if matches!(step, Step::Times(_, None, None)) {
            return Ok(());
        }
        self.done += 1;
        let symlink = matches!(self.what(node), Some(What::Symlink(_)));
        let mut changes = Changes::default();
        let mut meta = self.metas[&node].clone();
        match step {
            Step::Chmod(_, mode) => {
                changes.mode = Some(*mode);
                meta.mode = *mode;
            }
            Step::Chown(_, uid, gid) => {
                (changes.uid, changes.gid, changes.ctime) = (*uid, *gid, true);
                (meta.uid, meta.gid) = (uid.unwrap_or(meta.uid), gid.unwrap_or(meta.gid));
                if self.entries(node).is_none() && meta.mode & 0o010 != 0 {
                    meta.mode &= !0o2000;
                }
            }
            Step::Times(_, atime, mtime) => {
                let set = |time: &Time| SetTime::To(system_time(*time));
                (changes.atime, changes.mtime) = (atime.as_ref().map(set), mtime.as_ref().map(set));
                meta.mtime = mtime.or(meta.mtime);
            }
            _ => {}
        }
        let done = self.session.fs.setattr(self.session.fs.owner, node, changes);
        if symlink && changes.mode.is_some() {
            return match done {
                Err(refused) if refused.errno() == libc::EOPNOTSUPP => Ok(()),
                other => Err(format!("{step:?} gives {:?}", other.map(|found| found.stat))),
            };
        }
        let stat = done.map_err(failed(step))?.stat;
        if let Step::Times(_, Some(atime), _) = step
            && (stat.st_atime, stat.st_atime_nsec as u32) != *atime
        {
            return Err(format!("{step:?} gives an atime of {}.{}", stat.st_atime, stat.st_atime_nsec));
        }
        self.metas.insert(node, meta);
        Ok(())
    }

    fn held(&mut self, step: &Step) -> Result<(), String> {
        let (Step::WriteHeld(n, ..)
        | Step::ResizeHeld(n, _)
        | Step::FsyncHeld(n)
        | Step::ChmodHeld(n, _)
        | Step::SetXattrHeld(n)
        | Step::LinkHeld(n, _)
        | Step::CloseHeld(n)) = step
        else {
            return Ok(());
        };
        let Some(node) = self.held.get(n % self.held.len().max(1)).copied() else { return Ok(()) };
        self.done += 1;
        let nameless = self.nameless.contains_key(&node);
        let fs = &self.session.fs;
        let mut bytes = (**self.model().bytes(node)).clone();
        match step {
            Step::WriteHeld(_, offset, len) => {
                let data: Vec<u8> = (0..*len).map(|n| (n % 249) as u8 + 2).collect();
                fs.write(node, *offset, &data, false).map_err(failed(step))?;
                let end = *offset as usize + len;
                bytes.resize(bytes.len().max(end), 0);
                bytes[*offset as usize..end].copy_from_slice(&data);
            }
            Step::ResizeHeld(_, size) => {
                let changes = Changes { size: Some(*size), ..Changes::default() };
                fs.setattr(fs.owner, node, changes).map_err(failed(step))?;
                bytes.resize(*size as usize, 0);
            }
            Step::FsyncHeld(_) => fs.fsync(node, false).map_err(failed(step))?,
            Step::ChmodHeld(_, mode) => {
                let changes = Changes { mode: Some(*mode), ..Changes::default() };
                fs.setattr(fs.owner, node, changes).map_err(failed(step))?;
                self.metas.get_mut(&node).unwrap().mode = *mode;
                return Ok(());
            }
            Step::SetXattrHeld(_) if nameless => {
                fs.setxattr(node, OsStr::new("user.held"), b"value", 0).map_err(failed(step))?;
                self.nameless.get_mut(&node).unwrap().insert(b"user.held".to_vec(), b"value".to_vec());
                return Ok(());
            }
            Step::LinkHeld(_, path) if nameless => {
                let Some((dir, name, None)) = self.target(path)? else { return Ok(()) };
                let errno = if name.len() > 255 { libc::ENAMETOOLONG } else { libc::ENOENT };
                return match fs.link(node, dir, &name) {
                    Err(refused) if refused.errno() == errno => Ok(()),
                    other => Err(format!("{step:?} gives {:?} instead of {errno}", other.map(|found| found.ino))),
                };
            }
            Step::CloseHeld(_) => {
                self.held.retain(|held| *held != node);
                if self.nameless.remove(&node).is_some() {
                    fs.forget(node, u64::MAX);
                    self.session.model.files.remove(&node);
                }
                return Ok(());
            }
            _ => return Ok(()),
        }
        if bytes != **self.model().bytes(node) || matches!(step, Step::WriteHeld(..) | Step::ResizeHeld(..)) {
            self.session.state(0, node, bytes);
            self.metas.get_mut(&node).unwrap().mtime = None;
        }
        Ok(())
    }

    /// stat of everything that there is.
    fn stat_all(&self) -> Result<(), String> {
        let tree = self.model().tree();
        let mut links: BTreeMap<Node, u32> = BTreeMap::new();
        for dir in tree.keys().filter_map(|node| names(tree, *node)) {
            dir.values().for_each(|node| *links.entry(*node).or_default() += 1);
        }
        let todo: BTreeSet<Node> = tree.keys().chain(self.nameless.keys()).copied().collect();
        for node in todo {
            // What the kernel forgot it cannot ask about.
            if self.session.fs.inodes.get(node).is_none() {
                continue;
            }
            let found = self.session.fs.getattr(node).map_err(failed(&format!("stat of {node:x}")))?;
            let meta = &self.metas[&node];
            let file = |node: Node| self.model().bytes(node).len() as u64;
            let named = links.get(&node).copied().unwrap_or(0);
            let (kind, size, nlink, device) = match tree.get(&node).map(|thing| &thing.what) {
                None | Some(What::File) => (Type::Regular, file(node), named, 0),
                Some(What::Dir(below)) => {
                    let dirs = below.values().filter(|node| matches!(self.what(**node), Some(What::Dir(_)))).count();
                    (Type::Directory, found.size, 2 + dirs as u32, 0)
                }
                Some(What::Symlink(target)) => (Type::Symlink, target.len() as u64, named, 0),
                Some(What::Special(kind, device)) => (*kind, 0, named, *device),
            };
            let stat = &found.stat;
            let seen = (found.kind, found.size, stat.st_nlink as u32, found.device);
            if seen != (kind, size, nlink, device) {
                return Err(format!("{node:x} is {seen:?} instead of {:?}", (kind, size, nlink, device)));
            }
            let mtime = meta.mtime.map(|_| (stat.st_mtime, stat.st_mtime_nsec as u32));
            let seen = Meta { mode: stat.st_mode & 0o7777, uid: stat.st_uid, gid: stat.st_gid, mtime };
            if seen != *meta {
                return Err(format!("{node:x} is {seen:?} instead of {meta:?}"));
            }
        }
        Ok(())
    }

    /// Reads everything.
    fn look(&self) -> Result<(), String> {
        let fs = &self.session.fs;
        self.session.same_as_model(&look(fs, 0)?)?;
        for (node, attributes) in &self.nameless {
            let bytes = self.model().bytes(*node);
            let mut read = vec![0; bytes.len() + 10];
            let n = fs.read(*node, 0, &mut read).map_err(failed(&"read"))?;
            if read[..n] != bytes[..] {
                return Err(format!("{node:x}, which has no name, reads otherwise than it should"));
            }
            let list = fs.listxattr(*node).map_err(failed(&"listxattr"))?;
            let found: BTreeSet<&[u8]> = list.split(|byte| *byte == 0).filter(|name| !name.is_empty()).collect();
            if found != attributes.keys().map(Vec::as_slice).collect() {
                return Err(format!("{node:x}, which has no name, has other attributes"));
            }
        }
        self.listings()
    }

    /// Directories, read a few entries at a time from where the last ones ended.
    fn listings(&self) -> Result<(), String> {
        let tree = self.model().tree();
        for (node, expected) in tree.keys().filter_map(|node| Some((*node, names(tree, *node)?))) {
            let (mut next, mut seen) = (0, Vec::new());
            loop {
                let (from, mut some) = (next, 0);
                let each = |entry: crate::fs::namespace::Entry| {
                    if some == 2 {
                        if let Some(found) = &entry.found {
                            self.session.fs.forget(found.ino, 1);
                        }
                        return false;
                    }
                    some += 1;
                    next = entry.next;
                    seen.push(entry.name);
                    true
                };
                self.session.fs.readdir(node, from, true, each).map_err(failed(&"readdir"))?;
                if some == 0 {
                    break;
                }
            }
            seen.retain(|name| name != b"." && name != b"..");
            seen.sort();
            if !seen.iter().eq(expected.keys()) {
                return Err(format!("{node:x} read in parts lists {seen:?}"));
            }
        }
        Ok(())
    }
}

/// Steps done and refused.
fn run(steps: &[Step], full: u64) -> Result<(u64, u64), String> {
    let (vault, dir) = (Vault::new(), directory());
    vault.create(dir.path());
    let mut whole = Whole::new(&vault, dir.path(), Setup { logged: true, full })?;
    for (n, step) in steps.iter().enumerate() {
        whole.step(step).map_err(|what| format!("step {n}: {what}"))?;
    }
    whole.look().map_err(|what| format!("at the end: {what}"))?;
    whole.step(&Step::Do(Do::Remount)).map_err(|what| format!("at the end: {what}"))?;
    whole.look().map_err(|what| format!("remounted: {what}"))?;
    let counted = (whole.done, whole.refused);
    whole.session.end();
    Ok(counted)
}

#[test]
fn every_operation_does_what_the_model_does() {
    let seed = super::number("LETHEFS_TEST_SEED")
        .unwrap_or_else(|| std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), ()));
    println!("LETHEFS_TEST_SEED={seed}");
    let cases = super::number("LETHEFS_MODEL_CASES").map_or(150, |cases| u32::try_from(cases).unwrap());
    let config = Config { cases, failure_persistence: None, max_shrink_iters: 5000, ..Config::default() };
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &key));
    let totals = std::cell::Cell::new((0, 0, 0));
    let workloads =
        (vec(generate::steps(rustix::process::geteuid().is_root()), 1..120), select(vec![2048, 64 << 10, 32 << 20]));
    let outcome = runner.run(&workloads, |(steps, full)| {
        let (done, refused) = run(&steps, full).map_err(TestCaseError::fail)?;
        let (all, d, r) = totals.get();
        totals.set((all + steps.len() as u64, d + done, r + refused));
        Ok(())
    });
    let (all, done, refused) = totals.get();
    println!("{all} steps: {done} done, {refused} refused");
    outcome.unwrap_or_else(|failed| panic!("LETHEFS_TEST_SEED={seed}: {failed}"));
    assert!(done > all / 8 && refused > all / 20, "of {all} steps {done} did something and {refused} were refused");
}
