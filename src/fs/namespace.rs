//! Names: lookup, readdir, and everything that makes, moves or removes an entry.
//!
//! The kernel serialises changes within one directory (it holds the directory's lock), so two of these never work on the
//! same name at once; what must not interleave with a rename is reaching an object by its name, which the link's lock
//! prevents.

use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard};

use super::attributes::{Attributes, Type};
use super::core::{Caller, Filesystem, Outcome};
use super::errno::Failed;
use super::inode::{Inode, Kind, Link, Open, ROOT, lock};
use crate::crypto::ObjectId;
use crate::volume::dir::{self, DirKeys};
use crate::volume::file::FileState;
use crate::volume::header::ObjectType;
use crate::volume::link::{self, SealedLink};
use crate::volume::names::{self, CipherName};
use crate::volume::storage::{self, Errno, RenameFlags, Stat};
use crate::volume::{Damage, VolumeError, format, node};

/// One entry for readdir.
pub struct Entry {
    /// Plaintext name.
    pub name: Vec<u8>,
    /// Backing inode number.
    pub ino: u64,
    /// Position after it.
    pub next: u64,
    /// Type.
    pub kind: Type,
    /// Everything, with one reference of the kernel's, for readdirplus.
    pub found: Option<Attributes>,
}

/// The node id for a backing inode number: the root has 1, so nobody else may.
pub(super) fn node_id(backing: u64) -> u64 {
    if backing == ROOT { 1 << 63 | ROOT } else { backing }
}

impl Filesystem {
    /// Looks a name up. `None`: there is none.
    ///
    /// # Errors
    /// `ENAMETOOLONG`; `EIO` for planted objects.
    pub fn lookup(&self, parent: u64, name: &[u8]) -> Outcome<Option<Attributes>> {
        let parent = self.inode(parent)?;
        let (_, open, name) = self.resolve(&parent, name)?;
        match storage::stat(open.fd.as_fd(), name.as_str()) {
            Err(Errno::NOENT) => Ok(None),
            Err(errno) => Err(errno.into()),
            Ok(stat) => self.enter(&parent, name.as_str(), stat).map(Some),
        }
    }

    /// A directory's keys and descriptor, and a name in it.
    fn resolve<'a>(&self, parent: &'a Arc<Inode>, name: &[u8]) -> Outcome<(&'a DirKeys, Open, CipherName)> {
        let keys = self.dir(parent)?;
        let name = keys.name(self.volume.keys(), name)?;
        Ok((keys, self.open(parent)?, name))
    }

    /// Makes an entry known to the kernel, with one reference.
    fn enter(&self, parent: &Arc<Inode>, name: &str, stat: Stat) -> Outcome<Attributes> {
        let mut kind = self.kind(&stat).map_err(|error| {
            if let VolumeError::Damaged(damage) = error {
                self.entry_failed(parent, name.as_bytes(), damage);
            }
            Failed::from(error)
        })?;
        // What has the length of a record but is none is a file that was cut off: unreadable, and there to be removed.
        // (One that may not be read is looked at again, with the right lent, when it is asked about.)
        if kind == Kind::Node && matches!(self.node_type(self.open(parent)?.fd.as_fd(), name), Ok(None)) {
            kind = Kind::Regular;
        }
        let Some(inode) = self.inodes.enter(node_id(stat.st_ino), kind, parent, name) else {
            self.entry_failed(parent, name.as_bytes(), Damage::Planted);
            return Err(Failed::raw(libc::EIO));
        };
        self.attributes(&inode, stat).inspect_err(|_| self.forget(inode.ino, 1))
    }

    /// Calls `each` for the entries from position `from` on, until it says `false`. With `plus`, entries (but `.` and `..`)
    /// come with attributes and a reference, which `each` must give back by [`forget`](Self::forget) if it refuses one.
    ///
    /// # Errors
    /// The backing filesystem's.
    pub fn readdir(&self, ino: u64, from: u64, plus: bool, mut each: impl FnMut(Entry) -> bool) -> Outcome<()> {
        let inode = self.inode(ino)?;
        let keys = self.dir(&inode)?;
        let open = self.open(&inode)?;
        let fd = open.fd.as_fd();
        let mut failed = None;
        let mut given = 0;
        let read = storage::read_dir(fd, from, |raw| {
            if raw.name == b"." || raw.name == b".." {
                let number = if raw.name == b"." { inode.ino } else { node_id(raw.ino) };
                let name = raw.name.to_vec();
                return each(Entry { name, ino: number, next: raw.next, kind: Type::Directory, found: None });
            }
            if !names::is_entry(raw.name) {
                return true;
            }
            let name = match keys.plain_name(self.volume.keys(), fd, raw.name) {
                Ok(name) => name,
                Err(VolumeError::Damaged(_)) => {
                    self.entry_failed(&inode, raw.name, Damage::Name);
                    return true;
                }
                Err(error) => {
                    failed = Some(Failed::from(error));
                    return false;
                }
            };
            let Ok(backing) = std::str::from_utf8(raw.name) else { return true };
            let stat = match storage::stat(fd, backing) {
                Ok(stat) => stat,
                // Gone meanwhile: not an error, just not there.
                Err(Errno::NOENT) => return true,
                // A listing that leaves out what it could not look at would be believed.
                Err(errno) => {
                    failed = Some(errno.into());
                    return false;
                }
            };
            let found = if plus {
                match self.enter(&inode, backing, stat) {
                    Ok(found) => Some(found),
                    // Damaged or planted, and reported.
                    Err(error) if error.errno() == libc::EIO || error.errno() == libc::EXDEV => None,
                    Err(error) => {
                        failed = Some(error);
                        return false;
                    }
                }
            } else {
                None
            };
            let kind = match (&found, self.kind(&stat)) {
                (Some(found), _) => found.kind,
                (None, Ok(Kind::Directory)) => Type::Directory,
                (None, Ok(Kind::Symlink)) => Type::Symlink,
                (None, Ok(Kind::Node)) => self.node_type(fd, backing).ok().flatten().unwrap_or(Type::Regular),
                (None, _) => Type::Regular,
            };
            // In a listing with attributes, what has none is left out: only what really goes out counts.
            given += usize::from(!plus || found.is_some());
            each(Entry { name, ino: node_id(raw.ino), next: raw.next, kind, found })
        });
        match (failed, read) {
            // What was given out already counts; the next call begins at the entry that failed.
            (Some(_), _) if given > 0 => Ok(()),
            (Some(failed), _) => Err(failed),
            // A directory that was removed while open reads as empty.
            (None, Err(Errno::NOENT)) => Ok(()),
            (None, read) => Ok(read?),
        }
    }

    /// What a node record says; `None` for what has only the length of one.
    fn node_type(&self, dir: BorrowedFd<'_>, name: &str) -> Result<Option<Type>, VolumeError> {
        let fd = storage::open_file(dir, name, false)?;
        let header = match node::read(&self.volume, fd.as_fd()) {
            Err(VolumeError::Damaged(_)) => return Ok(None),
            other => other?,
        };
        Ok(match header.object_type {
            ObjectType::Fifo => Some(Type::Fifo),
            ObjectType::Socket => Some(Type::Socket),
            ObjectType::CharDevice => Some(Type::CharDevice),
            ObjectType::BlockDevice => Some(Type::BlockDevice),
            ObjectType::Regular | ObjectType::Directory | ObjectType::Symlink => None,
        })
    }

    /// The mode of a new object: with ACLs on the kernel leaves the umask to us, since a default ACL overrides it.
    fn mode(&self, parent: BorrowedFd<'_>, mode: u32, umask: u32) -> u32 {
        let has_default = || storage::get_xattr(parent, std::ffi::OsStr::new("system.posix_acl_default")).is_ok();
        if self.acl && !has_default() { mode & !umask } else { mode }
    }

    /// open(O_CREAT): makes a regular file, or finds the one there if not `exclusive`.
    ///
    /// # Errors
    /// `EEXIST`; the backing filesystem's.
    pub fn create(
        &self,
        caller: Caller,
        parent: u64,
        name: &[u8],
        mode: u32,
        umask: u32,
        exclusive: bool,
    ) -> Outcome<Attributes> {
        let parent = self.inode(parent)?;
        let (_, dir, cipher) = self.resolve(&parent, name)?;
        let dir = dir.fd.as_fd();
        let mode = self.mode(dir, mode & 0o7777, umask);
        // Under a temporary name until it has its header, owner and birth attribute: a power cut leaves a file or none.
        let temporary = format::temporary_name().map_err(|_| Failed::raw(libc::EIO))?;
        let fd = storage::create_file(dir, &*temporary, mode)?;
        let special = (mode & 0o6000 != 0).then_some(mode);
        let placed = self
            .hand_over(caller, dir, fd.as_fd(), special)
            .map_err(VolumeError::from)
            .and_then(|()| FileState::create(&self.volume, fd.as_fd()))
            .and_then(|state| Ok((state, self.check_new(storage::stat_fd(fd.as_fd())?)?)))
            .and_then(|made| {
                dir::place(dir, &cipher, || rename_new(dir, &temporary, dir, cipher.as_str()))?;
                Ok(made)
            });
        let (state, stat) = match placed {
            Ok(made) => made,
            Err(error) => {
                let _ = storage::unlink(dir, &*temporary);
                if matches!(error, VolumeError::Backing(Errno::EXIST)) && !exclusive {
                    return self.enter(&parent, cipher.as_str(), storage::stat(dir, cipher.as_str())?);
                }
                return Err(error.into());
            }
        };
        let Some(inode) = self.inodes.enter(node_id(stat.st_ino), Kind::Regular, &parent, cipher.as_str()) else {
            let _ = storage::unlink(dir, cipher.as_str());
            dir::unplace(dir, &cipher);
            return Err(Failed::raw(libc::EIO));
        };
        *inode.file.write().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(Box::new(state));
        inode.set_size(0);
        inode.unnamed.store(true, Ordering::SeqCst);
        *lock(&inode.open) = Some(Open { fd: Arc::new(fd), writable: true });
        self.fds.opened(&inode);
        self.changed(&inode, false);
        self.attributes(&inode, stat)
    }

    /// mknod of anything but a directory or symlink.
    ///
    /// # Errors
    /// `EEXIST`, `EINVAL` for other types; the backing filesystem's.
    pub fn mknod(
        &self,
        caller: Caller,
        parent: u64,
        name: &[u8],
        mode: u32,
        umask: u32,
        device: u32,
    ) -> Outcome<Attributes> {
        let object_type = match mode & libc::S_IFMT {
            0 | libc::S_IFREG => return self.create(caller, parent, name, mode, umask, true),
            libc::S_IFIFO => ObjectType::Fifo,
            libc::S_IFSOCK => ObjectType::Socket,
            libc::S_IFCHR => ObjectType::CharDevice,
            libc::S_IFBLK => ObjectType::BlockDevice,
            _ => return Err(Failed::raw(libc::EINVAL)),
        };
        let device = match object_type {
            ObjectType::CharDevice | ObjectType::BlockDevice => u64::from(device),
            _ => 0,
        };
        let parent = self.inode(parent)?;
        let (_, open, cipher) = self.resolve(&parent, name)?;
        let dir = open.fd.as_fd();
        let mode = self.mode(dir, mode & 0o7777, umask);
        let finish = |fd: BorrowedFd<'_>| self.hand_over(caller, dir, fd, Some(mode));
        let temporary = node::build(&self.volume, dir, object_type, device, mode, finish)?;
        self.settle(&parent, dir, &temporary, &cipher)
    }

    /// Renames a finished temporary object to its name, where nothing may be.
    fn settle(
        &self,
        parent: &Arc<Inode>,
        dir: BorrowedFd<'_>,
        temporary: &str,
        name: &CipherName,
    ) -> Outcome<Attributes> {
        let placed = storage::stat(dir, temporary)
            .and_then(|stat| self.check_new(stat))
            .and_then(|_| dir::place(dir, name, || rename_new(dir, temporary, dir, name.as_str())));
        if let Err(errno) = placed {
            if storage::unlink(dir, temporary).is_err() {
                dir::discard(dir, temporary);
            }
            return Err(errno.into());
        }
        self.enter(parent, name.as_str(), storage::stat(dir, name.as_str())?)
    }

    /// mkdir.
    ///
    /// # Errors
    /// `EEXIST`; the backing filesystem's.
    pub fn mkdir(&self, caller: Caller, parent: u64, name: &[u8], mode: u32, umask: u32) -> Outcome<Attributes> {
        let parent = self.inode(parent)?;
        let (_, open, cipher) = self.resolve(&parent, name)?;
        let dir = open.fd.as_fd();
        // Cheaper to find out before making one, and the usual case of `mkdir -p`.
        if storage::stat(dir, cipher.as_str()).is_ok() {
            return Err(Failed::raw(libc::EEXIST));
        }
        let id = ObjectId::random().map_err(|_| Failed::raw(libc::EIO))?;
        let keys = DirKeys::make(self.volume.keys(), id)?;
        let mode = self.mode(dir, mode & 0o1777, umask);
        let (temporary, _fd) = dir::build(dir, &keys, mode, |fd| {
            self.hand_over(caller, dir, fd, None)?;
            // What the backing kernel made of the mode (ACLs, set-group-ID) stays, but for the rights lent for the making.
            let made = storage::stat_fd(fd)?.st_mode;
            let wanted = made & (mode | !0o700);
            if wanted != made { storage::chmod_fd(fd, wanted) } else { Ok(()) }
        })?;
        let made = self.settle(&parent, dir, &temporary, &cipher)?;
        if let Some(inode) = self.inodes.get(made.ino) {
            let _ = inode.dir.set(Box::new(keys));
        }
        Ok(made)
    }

    /// symlink.
    ///
    /// # Errors
    /// `ENAMETOOLONG` over 4,095 bytes; `EEXIST`; the backing filesystem's.
    pub fn symlink(&self, caller: Caller, parent: u64, name: &[u8], target: &[u8]) -> Outcome<Attributes> {
        let parent = self.inode(parent)?;
        let (_, open, cipher) = self.resolve(&parent, name)?;
        let dir = open.fd.as_fd();
        if storage::stat(dir, cipher.as_str()).is_ok() {
            return Err(Failed::raw(libc::EEXIST));
        }
        let sealed = SealedLink::new(&self.volume, target)?;
        dir::place(dir, &cipher, || sealed.create(self.volume.root().as_fd(), dir, cipher.as_str()))?;
        let owned = storage::stat(dir, cipher.as_str())
            .and_then(|stat| self.check_new(stat))
            .and_then(|_| storage::open_path(dir, cipher.as_str()))
            .and_then(|held| self.hand_over(caller, dir, held.as_fd(), None));
        if let Err(errno) = owned {
            let _ = storage::unlink(dir, cipher.as_str());
            dir::unplace(dir, &cipher);
            return Err(errno.into());
        }
        self.enter(&parent, cipher.as_str(), storage::stat(dir, cipher.as_str())?)
    }

    /// link.
    ///
    /// # Errors
    /// `EPERM` for directories; `EEXIST`, `EMLINK`; `ENOENT` for an object without a name.
    pub fn link(&self, ino: u64, parent: u64, name: &[u8]) -> Outcome<Attributes> {
        let inode = self.inode(ino)?;
        if inode.kind == Kind::Directory {
            return Err(Failed::raw(libc::EPERM));
        }
        let parent = self.inode(parent)?;
        let (_, open, cipher) = self.resolve(&parent, name)?;
        let dir = open.fd.as_fd();
        {
            let link = lock(&inode.link);
            match &*link {
                Link::At { parent: from, name: old } => {
                    let from = self.open(from)?;
                    dir::place(dir, &cipher, || storage::link(from.fd.as_fd(), &**old, dir, cipher.as_str()))?;
                }
                Link::Held(held) => {
                    dir::place(dir, &cipher, || storage::link_held(held.as_fd(), dir, cipher.as_str()))?
                }
                Link::Root(_) | Link::Gone => return Err(Failed::raw(libc::EPERM)),
            }
        }
        self.enter(&parent, cipher.as_str(), storage::stat(dir, cipher.as_str())?)
    }

    /// The inode of an entry, if the kernel knows it: the one that a removal concerns.
    fn known(&self, stat: &Stat) -> Option<Arc<Inode>> {
        self.inodes.get(node_id(stat.st_ino))
    }

    /// The stat of an object that we have just made, if its number is new, too. The kernel would take it for the old one that
    /// it knows by that number, with what it has cached of that; and the old one was removed behind our back, since we would
    /// hold it.
    fn check_new(&self, stat: Stat) -> Result<Stat, Errno> {
        match self.known(&stat) {
            None => Ok(stat),
            Some(old) => {
                self.failed(&old, VolumeError::Damaged(Damage::Planted));
                Err(Errno::IO)
            }
        }
    }

    /// Before an entry goes: its inode is held by a descriptor instead of by this name.
    fn unname(&self, inode: &Arc<Inode>, link: &mut Link, parent: &Arc<Inode>, name: &str) -> Outcome<()> {
        if matches!(link, Link::At { parent: p, name: n } if p.ino == parent.ino && **n == *name) {
            let held = lock_open(inode).map_or_else(|| self.hold_link(link), Ok)?;
            *link = Link::Held(held);
        }
        Ok(())
    }

    /// unlink.
    ///
    /// # Errors
    /// `ENOENT`, `EISDIR`; the backing filesystem's.
    pub fn unlink(&self, parent: u64, name: &[u8]) -> Outcome<()> {
        let parent = self.inode(parent)?;
        let (_, open, cipher) = self.resolve(&parent, name)?;
        let dir = open.fd.as_fd();
        let stat = storage::stat(dir, cipher.as_str())?;
        let tail = self.tail(dir, cipher.as_str(), &stat);
        let inode = self.known(&stat);
        let mut link = inode.as_ref().map(|inode| lock(&inode.link));
        if let (Some(inode), Some(link)) = (&inode, &mut link) {
            self.unname(inode, link, &parent, cipher.as_str())?;
        }
        if let Err(errno) = storage::unlink(dir, cipher.as_str()) {
            if let Some(link) = &mut link {
                **link = Link::At { parent: parent.clone(), name: cipher.as_str().into() };
            }
            return Err(errno.into());
        }
        if let Some(inode) = inode.as_ref().filter(|_| stat.st_nlink == 1) {
            inode.removed.store(true, Ordering::Relaxed);
        }
        drop(link);
        dir::unplace(dir, &cipher);
        if let Some(id) = tail {
            link::drop_tail(self.volume.root().as_fd(), dir, id);
        }
        Ok(())
    }

    /// The tail of a long symlink whose last name is about to go.
    fn tail(&self, dir: BorrowedFd<'_>, name: &str, stat: &Stat) -> Option<ObjectId> {
        let last = self.kind(stat).ok()? == Kind::Symlink && stat.st_nlink == 1;
        let first = last.then(|| storage::readlink(dir, name).ok())??;
        link::has_tail(&first).then(|| link::object(&self.volume, &first))?
    }

    /// rmdir.
    ///
    /// # Errors
    /// `ENOENT`, `ENOTEMPTY`, `ENOTDIR`; the backing filesystem's.
    pub fn rmdir(&self, parent: u64, name: &[u8]) -> Outcome<()> {
        let parent = self.inode(parent)?;
        let (_, open, cipher) = self.resolve(&parent, name)?;
        let dir = open.fd.as_fd();
        let stat = storage::stat(dir, cipher.as_str())?;
        let inode = self.known(&stat);
        let mut link = inode.as_ref().map(|inode| lock(&inode.link));
        if let (Some(inode), Some(link)) = (&inode, &mut link) {
            self.unname(inode, link, &parent, cipher.as_str())?;
        }
        if let Err(errno) = dir::remove(dir, cipher.as_str()) {
            if let Some(link) = &mut link {
                **link = Link::At { parent: parent.clone(), name: cipher.as_str().into() };
            }
            return Err(errno.into());
        }
        if let Some(inode) = &inode {
            inode.removed.store(true, Ordering::Relaxed);
        }
        drop(link);
        dir::unplace(dir, &cipher);
        Ok(())
    }

    /// rename, with `RENAME_NOREPLACE` or `RENAME_EXCHANGE`.
    ///
    /// # Errors
    /// As renameat2(2).
    pub fn rename(
        &self,
        parent: u64,
        name: &[u8],
        new_parent: u64,
        new_name: &[u8],
        flags: RenameFlags,
    ) -> Outcome<()> {
        if flags.intersects(!(RenameFlags::NOREPLACE | RenameFlags::EXCHANGE)) {
            return Err(Failed::raw(libc::EINVAL));
        }
        let parents = [self.inode(parent)?, self.inode(new_parent)?];
        let (_, from_dir, from) = self.resolve(&parents[0], name)?;
        let (_, to_dir, to) = self.resolve(&parents[1], new_name)?;
        let (from_fd, to_fd) = (from_dir.fd.as_fd(), to_dir.fd.as_fd());
        let source = storage::stat(from_fd, from.as_str())?;
        let target = match storage::stat(to_fd, to.as_str()) {
            Err(Errno::NOENT) => None,
            other => Some(other?),
        };
        if let Some(target) = &target {
            if flags.contains(RenameFlags::NOREPLACE) {
                return Err(Failed::raw(libc::EEXIST));
            }
            // Two names of one object: POSIX wants nothing done.
            if target.st_ino == source.st_ino {
                return Ok(());
            }
        }
        let moved = self.known(&source);
        let other = target.as_ref().and_then(|stat| self.known(stat));
        let [mut moved_link, mut other_link] = lock_links([&moved, &other]);

        if flags.contains(RenameFlags::EXCHANGE) {
            if target.is_none() {
                return Err(Failed::raw(libc::ENOENT));
            }
            storage::rename(from_fd, from.as_str(), to_fd, to.as_str(), RenameFlags::EXCHANGE)?;
            relink(&mut other_link, &parents[0], from.as_str());
            relink(&mut moved_link, &parents[1], to.as_str());
            return Ok(());
        }

        let mut tail = None;
        if let Some(stat) = &target {
            tail = self.tail(to_fd, to.as_str(), stat);
            if let (Some(other), Some(link)) = (&other, &mut other_link) {
                self.unname(other, link, &parents[1], to.as_str())?;
            }
        }
        let done = match &target {
            Some(stat) => self.rename_over((from_fd, from.as_str(), &source), (to_fd, to.as_str(), stat)),
            None => dir::place(to_fd, &to, || rename_new(from_fd, from.as_str(), to_fd, to.as_str())),
        };
        if let Err(errno) = done {
            if target.is_some() {
                relink(&mut other_link, &parents[1], to.as_str());
            }
            return Err(errno.into());
        }
        relink(&mut moved_link, &parents[1], to.as_str());
        if let (Some(other), Some(stat)) = (&other, &target)
            && (stat.st_nlink == 1 || other.kind == Kind::Directory)
        {
            other.removed.store(true, Ordering::Relaxed);
        }
        drop((moved_link, other_link));
        dir::unplace(from_fd, &from);
        if let Some(id) = tail {
            link::drop_tail(self.volume.root().as_fd(), to_fd, id);
        }
        Ok(())
    }

    /// Renames over something that is there.
    fn rename_over(
        &self,
        (from_fd, from, source): (BorrowedFd<'_>, &str, &Stat),
        (to_fd, to, target): (BorrowedFd<'_>, &str, &Stat),
    ) -> Result<(), Errno> {
        let is_dir = |stat: &Stat| storage::file_type(stat) == storage::FileType::Directory;
        match (is_dir(source), is_dir(target)) {
            (false, false) => storage::rename(from_fd, from, to_fd, to, RenameFlags::empty()),
            (true, false) => Err(Errno::NOTDIR),
            (false, true) => Err(Errno::ISDIR),
            (true, true) => {
                let old = storage::open_dir(to_fd, to)?;
                if !dir::is_empty(old.as_fd())? {
                    return Err(Errno::NOTEMPTY);
                }
                // The backing target is never empty: it holds its header. Exchanged, both names lead to whole directories
                // at every instant; then the old one goes.
                storage::rename(from_fd, from, to_fd, to, RenameFlags::EXCHANGE)?;
                // A failure must be one: everything back in its place.
                dir::remove(from_fd, from).inspect_err(|_| {
                    let _ = storage::rename(from_fd, from, to_fd, to, RenameFlags::EXCHANGE);
                })
            }
        }
    }

    /// Removes what interrupted operations left in a directory.
    pub fn clean(&self, ino: u64) -> Outcome<()> {
        let inode = self.inode(ino)?;
        if !self.volume.read_only() {
            dir::clean(self.open(&inode)?.fd.as_fd());
        }
        Ok(())
    }
}

/// A rename that must not replace anything. Filesystems without RENAME_NOREPLACE get a check before it: nobody else works in
/// the backing directory.
fn rename_new(from_dir: BorrowedFd<'_>, from: &str, to_dir: BorrowedFd<'_>, to: &str) -> Result<(), Errno> {
    match storage::rename(from_dir, from, to_dir, to, RenameFlags::NOREPLACE) {
        Err(Errno::INVAL | Errno::NOSYS) => match storage::stat(to_dir, to) {
            Err(Errno::NOENT) => storage::rename(from_dir, from, to_dir, to, RenameFlags::empty()),
            Err(errno) => Err(errno),
            Ok(_) => Err(Errno::EXIST),
        },
        other => other,
    }
}

fn lock_open(inode: &Inode) -> Option<Arc<std::os::fd::OwnedFd>> {
    // try: whoever holds the slot may be waiting for the link that our caller holds.
    inode.open.try_lock().ok()?.as_ref().map(|open| open.fd.clone())
}

/// The links of two inodes, locked in order of number.
fn lock_links<'a>(inodes: [&'a Option<Arc<Inode>>; 2]) -> [Option<MutexGuard<'a, Link>>; 2] {
    let guard = |inode: &'a Option<Arc<Inode>>| inode.as_ref().map(|inode| lock(&inode.link));
    match inodes {
        [Some(a), Some(b)] if b.ino < a.ino => {
            let second = guard(inodes[1]);
            [guard(inodes[0]), second]
        }
        _ => {
            let first = guard(inodes[0]);
            [first, guard(inodes[1])]
        }
    }
}

fn relink(link: &mut Option<MutexGuard<'_, Link>>, parent: &Arc<Inode>, name: &str) {
    if let Some(link) = link {
        **link = Link::At { parent: parent.clone(), name: name.into() };
    }
}
