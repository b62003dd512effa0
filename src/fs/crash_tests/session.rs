//! Runs workloads over a volume, and keeps the model of it.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::rc::Rc;
use std::sync::Mutex;

use super::model::{Found, Model, Node, Snap, State, Thing, Tree, What, look, names};
use crate::fs::attributes::Type;
use crate::fs::core::{Caller, Filesystem};
use crate::fs::inode::ROOT;
use crate::volume::dir::DirKeys;
use crate::volume::storage::{self, RenameFlags, recorder};
use crate::volume::testing::{Ring, Vault};
use crate::volume::{Volume, VolumeError, check, replay, rewrap};

/// One step of a workload. Paths are of components `a`, or `A` for a name of 210 bytes, or `a255` for one of so many (three digits).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Do {
    Create(String),
    Mkdir(String),
    Fifo(String),
    Socket(String),
    Device(String),
    /// With a target of so many bytes.
    Symlink(String, usize),
    Link(String, String),
    Unlink(String),
    Rmdir(String),
    Rename(String, String),
    Exchange(String, String),
    /// RENAME_NOREPLACE.
    RenameNew(String, String),
    Write(String, u64, usize),
    Resize(String, u64),
    /// fallocate(2) with this mode.
    Allocate(String, u64, usize, i32),
    SetXattr(String, u8),
    RemoveXattr(String, u8),
    Fsync(String),
    Fdatasync(String),
    /// What the daemon does by itself.
    Commit,
    Checkpoint,
    Seal,
    /// The kernel forgets everything that it does not need.
    Forget,
    /// Unmounted, all keys wrapped under the new KEK version, mounted again.
    Rewrap,
    /// Unmounted and mounted again.
    Remount,
    /// Killed and mounted again.
    Die,
    /// The power goes, now or some changes before; what follows begins with what it left.
    Cut,
}

/// How volumes are mounted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Setup {
    pub(super) logged: bool,
    /// When a log file is full.
    pub(super) full: u64,
}

/// What a mount does (service/mount.rs, fs/session.rs).
pub(super) fn mount(vault: &Vault, dir: &Path, setup: Setup) -> Result<Filesystem, String> {
    let mut volume = vault.open(dir).map_err(|error| format!("no mount: {error}"))?;
    fsck(&volume, "before the mount")?;
    let done = replay::replay(&volume).map_err(|error: VolumeError| format!("no replay: {error}"))?;
    if done.lost > 0 {
        return Err(format!("{} records are taken for lost", done.lost));
    }
    if setup.logged {
        volume.begin_log_for_tests(setup.full).map_err(|error| format!("no log: {error}"))?;
    }
    fsck(&volume, "after the replay")?;
    let fs = Filesystem::new(volume, 64, false);
    fs.clean(ROOT).map_err(|failed| format!("cleaning fails with {}", failed.errno()))?;
    Ok(fs)
}

/// Whatever a crash left is clean, to begin with and after each step of the recovery.
fn fsck(volume: &Volume, when: &str) -> Result<(), String> {
    let found = Mutex::new(Vec::new());
    let request = check::Request { live: None, threads: 1, progress: &check::Progress::default() };
    check::check(volume, &request, &|finding| {
        if !finding.fault.is_note() {
            found.lock().unwrap().push(format!(
                "{:?} at {:?} ({:?})",
                finding.fault,
                finding.place.names(),
                finding.detail
            ));
        }
    })
    .map_err(|error| format!("{when}: no check: {error}"))?;
    let found = found.into_inner().unwrap();
    if found.is_empty() { Ok(()) } else { Err(format!("{when} fsck finds {found:?}")) }
}

/// Drops all that a mount has in memory, but for its keys.
pub(super) fn kill(vault: &Vault, fs: Filesystem) {
    let Filesystem { volume, .. } = fs;
    vault.close(volume);
}

/// What an unmount does (fs/session.rs).
pub(super) fn unmount(fs: &Filesystem) -> Result<(), String> {
    match fs.seal_all() {
        0 => {}
        n => return Err(format!("{n} files cannot be sealed")),
    }
    fs.end_log().map_err(|failed| format!("the log cannot be ended: {}", failed.errno()))
}

/// A workload under way.
pub(super) struct Session<'a> {
    vault: &'a Vault,
    dir: &'a Path,
    setup: Setup,
    pub(super) fs: Filesystem,
    pub(super) model: Model,
    /// Who makes what is made.
    pub(super) caller: Caller,
    /// Makes each write's bytes their own.
    tag: u64,
}

/// The name that a component stands for.
pub(super) fn name(component: &str) -> Vec<u8> {
    let (letter, length) = component.split_at(1);
    match length.parse() {
        Ok(length) if length >= 100 => letter.repeat(length).into_bytes(),
        _ if letter.starts_with(|c: char| c.is_ascii_uppercase()) => component.repeat(210).into_bytes(),
        _ => component.as_bytes().to_vec(),
    }
}

impl<'a> Session<'a> {
    pub(super) fn new(vault: &'a Vault, dir: &'a Path, setup: Setup, tag: u64) -> Result<Self, String> {
        let fs = mount(vault, dir, setup)?;
        let model = Model::over(look(&fs, 0)?);
        Ok(Self { vault, dir, setup, caller: fs.owner, fs, model, tag })
    }

    /// By names that the model has.
    pub(super) fn find(&self, path: &str) -> Option<Node> {
        path.split('/')
            .filter(|component| !component.is_empty())
            .try_fold(ROOT, |at, component| names(self.model.tree(), at)?.get(&name(component)).copied())
    }

    /// As the kernel does: names are looked up on the way.
    fn lookup(&self, node: Node, path: &str) -> Result<Node, String> {
        let mut at = ROOT;
        for component in path.split('/').filter(|component| !component.is_empty()) {
            let found = self.fs.lookup(at, &name(component)).map_err(|failed| format!("{path}: {failed:?}"))?;
            at = found.ok_or(format!("{path} is not there"))?.ino;
        }
        if at == node { Ok(node) } else { Err(format!("{path} is {at:x} and should be {node:x}")) }
    }

    pub(super) fn existing(&self, path: &str) -> Result<Option<Node>, String> {
        self.find(path).map(|node| self.lookup(node, path)).transpose()
    }

    pub(super) fn parent(&self, path: &str) -> Result<Option<(Node, Vec<u8>)>, String> {
        let (above, last) = path.rsplit_once('/').unwrap_or(("", path));
        Ok(self.existing(above)?.filter(|dir| names(self.model.tree(), *dir).is_some()).map(|dir| (dir, name(last))))
    }

    pub(super) fn mount_again(&mut self) -> Result<(), String> {
        let fs = mount(self.vault, self.dir, self.setup)?;
        kill(self.vault, std::mem::replace(&mut self.fs, fs));
        Ok(())
    }

    /// Gives up all but the model.
    pub(super) fn end(self) -> Model {
        kill(self.vault, self.fs);
        self.model
    }

    fn is_file(&self, node: Node) -> bool {
        self.model.tree().get(&node).is_some_and(|thing| thing.what == What::File)
    }

    /// Does one step. What cannot be done is left out, so that workloads can be shortened.
    pub(super) fn step(&mut self, step: &Do) -> Result<(), String> {
        let failed = |failed: crate::fs::errno::Failed| format!("{step:?} fails with {}", failed.errno());
        let caller = self.caller;
        let begun = recorder::position();
        match step {
            Do::Create(path)
            | Do::Mkdir(path)
            | Do::Fifo(path)
            | Do::Socket(path)
            | Do::Device(path)
            | Do::Symlink(path, _) => {
                let Some((dir, new)) = self.parent(path)? else { return Ok(()) };
                if self.find(path).is_some() {
                    return Ok(());
                }
                let (made, what) = match step {
                    Do::Create(_) => (self.fs.create(caller, dir, &new, 0o644, 0, true), What::File),
                    Do::Mkdir(_) => (self.fs.mkdir(caller, dir, &new, 0o755, 0), What::Dir(BTreeMap::new())),
                    Do::Symlink(_, len) => {
                        self.tag += 1;
                        let target = vec![b'a' + (self.tag % 26) as u8; *len];
                        (self.fs.symlink(caller, dir, &new, &target), What::Symlink(target.into()))
                    }
                    Do::Socket(_) => {
                        (self.fs.mknod(caller, dir, &new, libc::S_IFSOCK | 0o600, 0, 0), What::Special(Type::Socket, 0))
                    }
                    Do::Device(_) => {
                        let made = self.fs.mknod(caller, dir, &new, libc::S_IFCHR | 0o600, 0, 0x103);
                        (made, What::Special(Type::CharDevice, 0x103))
                    }
                    _ => (self.fs.mknod(caller, dir, &new, libc::S_IFIFO | 0o600, 0, 0), What::Special(Type::Fifo, 0)),
                };
                let node = made.map_err(failed)?.ino;
                if what == What::File {
                    let state = State { bytes: Rc::default(), begun, ended: recorder::position() };
                    self.model.files.insert(node, vec![state]);
                }
                self.snap(begun, &[dir], &[node], |tree| {
                    tree.insert(node, Thing::new(what));
                    entries(tree, dir).insert(new, node);
                });
            }
            Do::Link(path, to) => {
                let (Some(node), Some((dir, new))) = (self.existing(path)?, self.parent(to)?) else { return Ok(()) };
                if self.find(to).is_some() || names(self.model.tree(), node).is_some() {
                    return Ok(());
                }
                self.fs.link(node, dir, &new).map_err(failed)?;
                self.snap(begun, &[dir], &[node], |tree| {
                    entries(tree, dir).insert(new, node);
                });
            }
            Do::Unlink(path) | Do::Rmdir(path) => {
                let (Some(node), Some((dir, old))) = (self.existing(path)?, self.parent(path)?) else { return Ok(()) };
                let below = names(self.model.tree(), node);
                if node == ROOT || below.is_some() != matches!(step, Do::Rmdir(_)) {
                    return Ok(());
                }
                if below.is_some_and(|below| !below.is_empty()) {
                    return Ok(());
                }
                let is_dir = below.is_some();
                let done = if is_dir { self.fs.rmdir(dir, &old) } else { self.fs.unlink(dir, &old) };
                done.map_err(failed)?;
                self.snap(begun, &[dir], &[node], |tree| {
                    entries(tree, dir).remove(&old);
                });
            }
            Do::Rename(path, to) | Do::Exchange(path, to) | Do::RenameNew(path, to) => self.rename(path, to, step)?,
            Do::Write(path, at, len) => {
                let Some(node) = self.existing(path)?.filter(|node| self.is_file(*node)) else { return Ok(()) };
                self.tag += 1;
                let data: Vec<u8> = (0..*len as u64).map(|n| ((n * 7 + self.tag * 37) % 251) as u8 + 1).collect();
                let mut bytes = (**self.model.bytes(node)).clone();
                let end = *at as usize + len;
                bytes.resize(bytes.len().max(end), 0);
                bytes[*at as usize..end].copy_from_slice(&data);
                self.fs.write(node, *at, &data, false).map_err(failed)?;
                self.state(begun, node, bytes);
            }
            Do::Resize(path, size) => {
                let Some(node) = self.existing(path)?.filter(|node| self.is_file(*node)) else { return Ok(()) };
                let mut bytes = (**self.model.bytes(node)).clone();
                bytes.resize(*size as usize, 0);
                let inode = self.fs.inode(node).map_err(failed)?;
                self.fs.resize(&inode, *size).map_err(failed)?;
                self.state(begun, node, bytes);
            }
            Do::Allocate(path, at, len, mode) => {
                let Some(node) = self.existing(path)?.filter(|node| self.is_file(*node)) else { return Ok(()) };
                let mut bytes = (**self.model.bytes(node)).clone();
                let (at, end) = (*at as usize, *at as usize + len);
                if mode & libc::FALLOC_FL_KEEP_SIZE == 0 {
                    bytes.resize(bytes.len().max(end), 0);
                }
                if mode & (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE) != 0 && at < bytes.len() {
                    let end = end.min(bytes.len());
                    bytes[at..end].fill(0);
                }
                self.fs.allocate(node, at as u64, *len as u64, *mode, false).map_err(failed)?;
                self.state(begun, node, bytes);
            }
            Do::SetXattr(path, n) | Do::RemoveXattr(path, n) => {
                let Some(node) = self.existing(path)? else { return Ok(()) };
                let Some(thing) = self.model.tree().get(&node).cloned() else { return Ok(()) };
                let attribute = format!("user.attribute{n}");
                let has = thing.xattrs.contains_key(attribute.as_bytes());
                let sets = matches!(step, Do::SetXattr(..));
                if matches!(thing.what, What::Symlink(_)) || (!sets && !has) {
                    return Ok(());
                }
                let mut changed = (*thing).clone();
                if sets {
                    self.tag += 1;
                    let value = format!("value {}", self.tag).into_bytes();
                    self.fs.setxattr(node, OsStr::new(&attribute), &value, 0).map_err(failed)?;
                    changed.xattrs.insert(attribute.into_bytes(), value.into());
                } else {
                    self.fs.removexattr(node, OsStr::new(&attribute)).map_err(failed)?;
                    changed.xattrs.remove(attribute.as_bytes());
                }
                self.snap(begun, &[], &[node], |tree| {
                    tree.insert(node, Rc::new(changed));
                });
            }
            Do::Fsync(path) | Do::Fdatasync(path) => {
                let Some(node) = self.existing(path)? else { return Ok(()) };
                let data_only = matches!(step, Do::Fdatasync(_));
                let is_dir = names(self.model.tree(), node).is_some();
                if !is_dir && !self.is_file(node) {
                    return Ok(());
                }
                self.fs.fsync(node, data_only).map_err(failed)?;
                let now = recorder::position();
                if !is_dir {
                    self.model.flushed(now, node);
                }
                self.model.settled(now, node, data_only && !is_dir);
            }
            Do::Cut => return Err("a cut ends a part".into()),
            Do::Commit => self.fs.commit().map_err(failed)?,
            Do::Checkpoint => self.fs.checkpoint().map_err(failed)?,
            Do::Seal => match self.fs.seal_all() {
                0 => {}
                n => return Err(format!("{n} files cannot be sealed")),
            },
            Do::Forget => {
                for ino in self.fs.inodes.all() {
                    self.fs.forget(ino, u64::MAX);
                }
            }
            Do::Rewrap => {
                unmount(&self.fs)?;
                self.model.all_flushed(recorder::position());
                self.vault.hold(Ring::Both);
                let volume = self.vault.open(self.dir).map_err(|error| format!("no rewrap: {error}"))?;
                self.rewrap(&volume).map_err(|error| format!("no rewrap: {error}"))?;
                self.vault.close(volume);
                self.model.all_flushed(recorder::position());
                self.model.rewrapped.get_or_insert(recorder::position());
                self.mount_again()?;
                self.same_as_model(&look(&self.fs, 0)?)?;
            }
            Do::Remount => {
                unmount(&self.fs)?;
                self.model.all_flushed(recorder::position());
                self.mount_again()?;
                self.same_as_model(&look(&self.fs, 0)?)?;
            }
            Do::Die => {
                self.mount_again()?;
                let found = look(&self.fs, 0)?;
                let end = super::model::End::Kill { torn: false };
                self.model.check(&found, begun, begun, end).map_err(|what| format!("after a kill: {what}"))?;
                for (node, bytes) in found.files {
                    self.state(begun, node, bytes);
                }
            }
        }
        Ok(())
    }

    /// What `volume::rewrap::all` does, one by one: so that the model has each symlink's new number.
    fn rewrap(&mut self, volume: &Volume) -> Result<(), VolumeError> {
        let mut twins: BTreeMap<Node, OwnedFd> = BTreeMap::new();
        let mut todo = vec![(ROOT, storage::reopen(volume.root().as_fd(), false)?)];
        while let Some((dir, fd)) = todo.pop() {
            rewrap::directory(volume, fd.as_fd())?;
            let keys = DirKeys::load(fd.as_fd(), volume.keys())?;
            for (plain, node) in names(self.model.tree(), dir).cloned().unwrap_or_default() {
                let cipher = keys.name(volume.keys(), &plain)?;
                let name = cipher.as_str();
                let open = || storage::open_file(fd.as_fd(), name, true);
                match &self.model.tree()[&node].what {
                    What::File => _ = rewrap::file(volume, open()?.as_fd())?,
                    What::Special(..) => _ = rewrap::node_record(volume, open()?.as_fd())?,
                    What::Dir(_) => todo.push((node, storage::open_dir(fd.as_fd(), name)?)),
                    What::Symlink(_) => {
                        let begun = recorder::position();
                        if !rewrap::link(volume, fd.as_fd(), name, twins.get(&node).map(OwnedFd::as_fd))? {
                            continue;
                        }
                        let made = storage::open_path(fd.as_fd(), name)?;
                        let new = storage::stat_fd(made.as_fd())?.st_ino;
                        twins.entry(node).or_insert(made);
                        self.snap(begun, &[dir], &[node, new], |tree| {
                            tree.insert(new, tree[&node].clone());
                            entries(tree, dir).insert(plain, new);
                        });
                    }
                }
            }
        }
        Ok(storage::sync_filesystem(volume.root().as_fd())?)
    }

    fn rename(&mut self, path: &str, to: &str, step: &Do) -> Result<(), String> {
        let begun = recorder::position();
        let (Some(node), Some((dir, old))) = (self.existing(path)?, self.parent(path)?) else { return Ok(()) };
        let Some((new_dir, new)) = self.parent(to)? else { return Ok(()) };
        let over = self.existing(to)?;
        let tree = self.model.tree();
        let exchanges = matches!(step, Do::Exchange(..));
        let dirs = [Some(node), over].map(|node| node.and_then(|node| names(tree, node)));
        // Not into itself, and over what it can be renamed over.
        let inside = |outer: &str, inner: &str| outer.is_empty() || inner.starts_with(&format!("{outer}/"));
        if inside(path, to) || inside(to, path) || over == Some(node) || (exchanges && over.is_none()) {
            return Ok(());
        }
        if !exchanges && over.is_some() && dirs[0].is_some() != dirs[1].is_some() {
            return Ok(());
        }
        if !exchanges && dirs[1].is_some_and(|below| !below.is_empty()) {
            return Ok(());
        }
        let both_dirs = dirs[0].is_some() && dirs[1].is_some();
        let flags = match step {
            Do::RenameNew(..) if over.is_some() => return Ok(()),
            Do::RenameNew(..) => RenameFlags::NOREPLACE,
            Do::Exchange(..) => RenameFlags::EXCHANGE,
            _ => RenameFlags::empty(),
        };
        let done = self.fs.rename(dir, &old, new_dir, &new, flags);
        done.map_err(|failed| format!("{step:?} fails with {}", failed.errno()))?;
        let objects: Vec<Node> = [Some(node), over].into_iter().flatten().collect();
        if let Some(over) = over.filter(|_| exchanges || both_dirs) {
            // One directory over another: first they change places, then the old one goes.
            self.snap(begun, &[dir, new_dir], &objects, |tree| {
                entries(tree, dir).insert(old.clone(), over);
                entries(tree, new_dir).insert(new.clone(), node);
            });
        }
        if !exchanges {
            // That the old one goes is not about the one that came: a flush of this alone need not cover it.
            let objects = if both_dirs { over.into_iter().collect() } else { objects };
            self.snap(begun, &[dir, new_dir], &objects, |tree| {
                entries(tree, dir).remove(&old);
                entries(tree, new_dir).insert(new, node);
            });
        }
        Ok(())
    }

    pub(super) fn same_as_model(&self, found: &Found) -> Result<(), String> {
        if found.tree != *self.model.tree() {
            return Err(format!("the tree is {:#x?} and should be {:#x?}", found.tree, self.model.tree()));
        }
        match found.files.iter().find(|(node, bytes)| **bytes != **self.model.bytes(**node)) {
            None => Ok(()),
            Some((node, _)) => Err(format!("file {node:x} reads otherwise than it should")),
        }
    }

    /// Without any crash.
    pub(super) fn look(&self) -> Result<Found, String> {
        look(&self.fs, 0)
    }

    fn snap(&mut self, begun: usize, dirs: &[Node], objects: &[Node], change: impl FnOnce(&mut Tree)) {
        let mut tree = self.model.tree().clone();
        change(&mut tree);
        // What has no name any more is gone.
        let named: Vec<Node> =
            tree.keys().filter_map(|dir| names(&tree, *dir)).flat_map(|n| n.values().copied()).collect();
        tree.retain(|node, _| *node == ROOT || named.contains(node));
        let ended = recorder::position();
        self.model.snaps.push(Snap { tree, begun, ended, dirs: dirs.to_vec(), objects: objects.to_vec() });
    }

    pub(super) fn state(&mut self, begun: usize, node: Node, bytes: Vec<u8>) {
        let state = State { bytes: Rc::new(bytes), begun, ended: recorder::position() };
        self.model.files.entry(node).or_default().push(state);
    }
}

fn entries(tree: &mut Tree, dir: Node) -> &mut BTreeMap<Vec<u8>, Node> {
    let thing = tree.get_mut(&dir).map(Rc::make_mut);
    match thing.map(|thing| &mut thing.what) {
        Some(What::Dir(names)) => names,
        other => panic!("{dir:x} is no directory: {other:?}"),
    }
}
