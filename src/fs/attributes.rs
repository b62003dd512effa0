//! stat, setattr, extended attributes, statfs.

use std::ffi::OsStr;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use rustix::fs::{StatVfs, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT};

use super::core::{Caller, Filesystem, Outcome};
use super::errno::Failed;
use super::inode::{Inode, Kind, Link, ROOT, lock};
use crate::volume::header::ObjectType;
use crate::volume::storage::{self, Errno, Stat};
use crate::volume::{Damage, VolumeError, file, format, link, xattr};

/// The type a program sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Type {
    Regular,
    Directory,
    Symlink,
    Fifo,
    Socket,
    CharDevice,
    BlockDevice,
}

/// What stat reports: the backing object's, but for these.
#[derive(Clone, Copy)]
pub struct Attributes {
    /// The backing object's stat: mode, owner, times, links, blocks.
    pub stat: Stat,
    /// Node id.
    pub ino: u64,
    /// Plaintext type.
    pub kind: Type,
    /// Plaintext size in bytes.
    pub size: u64,
    /// Device number of a device.
    pub device: u64,
    /// What the kernel holds of an object under another generation is not this one's.
    pub generation: u64,
}

/// A time to set.
#[derive(Clone, Copy, Debug)]
pub enum SetTime {
    /// This one.
    To(SystemTime),
    /// The clock's.
    Now,
}

/// What setattr changes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Changes {
    /// Permission bits.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Size.
    pub size: Option<u64>,
    /// Time of last access.
    pub atime: Option<SetTime>,
    /// Time of last modification.
    pub mtime: Option<SetTime>,
    /// The kernel says that the time of change moves, which it does with each change.
    pub ctime: bool,
}

const SUID: u32 = 0o4000;
const SGID: u32 = 0o2000;
const GROUP_EXEC: u32 = 0o010;

impl Filesystem {
    /// stat.
    ///
    /// # Errors
    /// The backing filesystem's; `EIO` for a damaged node record.
    pub fn getattr(&self, ino: u64) -> Outcome<Attributes> {
        let inode = self.inode(ino)?;
        self.stat_inode(&inode)
    }

    fn stat_inode(&self, inode: &Arc<Inode>) -> Outcome<Attributes> {
        let held = lock(&inode.open).as_ref().map(|open| open.fd.clone());
        let stat = match held {
            Some(fd) => storage::stat_fd(fd.as_fd())?,
            None => {
                let link = lock(&inode.link);
                match &*link {
                    Link::Root(fd) | Link::Held(fd) => storage::stat_fd(fd.as_fd())?,
                    Link::Gone => return Err(Failed::raw(libc::ESTALE)),
                    Link::At { parent, name } => storage::stat(self.open(parent)?.fd.as_fd(), &**name)?,
                }
            }
        };
        self.attributes(inode, stat)
    }

    /// Plaintext attributes from a backing stat.
    pub(super) fn attributes(&self, inode: &Arc<Inode>, stat: Stat) -> Outcome<Attributes> {
        let mut attributes = Attributes {
            stat,
            ino: inode.ino,
            kind: Type::Regular,
            size: stat.st_size as u64,
            device: 0,
            generation: inode.generation.load(Ordering::Relaxed),
        };
        match inode.kind {
            Kind::Directory => attributes.kind = Type::Directory,
            Kind::Regular => {
                attributes.size = match inode.told_size() {
                    Some(told) => told,
                    None => inode.tell_size(self.regular_size(inode, &stat)?),
                };
                if let Some(told) = *lock(&inode.told_mtime) {
                    attributes.stat.st_mtime = told.tv_sec;
                    attributes.stat.st_mtime_nsec = told.tv_nsec as _;
                }
            }
            Kind::Symlink => {
                attributes.kind = Type::Symlink;
                let len = stat.st_size as u64;
                attributes.size = match link::target_len(&self.volume, len, || self.read_backing_link(inode)) {
                    // A tail that is not ours: readlink fails, the entry itself can be looked at and removed.
                    Err(error @ VolumeError::Damaged(_)) => {
                        self.link_failed(inode, error);
                        link::plain_len(len)
                    }
                    other => other.map_err(|error| self.failed(inode, error))?,
                };
            }
            Kind::Node => {
                let header = self.node(inode)?;
                attributes.kind = match header.object_type {
                    ObjectType::Fifo => Type::Fifo,
                    ObjectType::Socket => Type::Socket,
                    ObjectType::CharDevice => Type::CharDevice,
                    ObjectType::BlockDevice => Type::BlockDevice,
                    ObjectType::Regular | ObjectType::Directory | ObjectType::Symlink => {
                        return Err(self.failed(inode, VolumeError::Damaged(Damage::Type)));
                    }
                };
                attributes.size = 0;
                attributes.device = header.device;
            }
        }
        if inode.ino == ROOT && storage::stat(self.volume.root().as_fd(), format::OVERFLOW_DIR).is_ok() {
            attributes.stat.st_nlink = attributes.stat.st_nlink.saturating_sub(1);
        }
        Ok(attributes)
    }

    /// The size follows from the backing length, but for files that look empty or damaged: those are reported with a byte
    /// that is not there, so that a read comes to us and fails, instead of ending quietly in the kernel.
    fn regular_size(&self, inode: &Arc<Inode>, stat: &Stat) -> Outcome<u64> {
        match format::plain_size(stat.st_size as u64) {
            None | Some(0) => {
                let known = inode.file.try_read().map(|state| state.is_some()).unwrap_or(true);
                if known {
                    return Ok(0);
                }
                let open = self.open(inode)?;
                match file::check_empty(&self.volume, open.fd.as_fd()) {
                    Ok(()) => Ok(0),
                    Err(VolumeError::Damaged(_)) => Ok(1),
                    Err(error) => Err(error.into()),
                }
            }
            Some(size) => Ok(size),
        }
    }

    fn read_backing_link(&self, inode: &Arc<Inode>) -> Result<Vec<u8>, Errno> {
        let held = self.hold(inode).map_err(|failed| Errno::from_raw_os_error(failed.errno()))?;
        storage::readlink_held(held.as_fd())
    }

    /// readlink.
    ///
    /// # Errors
    /// `EIO` for a damaged or planted one.
    pub fn readlink(&self, ino: u64) -> Outcome<Vec<u8>> {
        let inode = self.inode(ino)?;
        if inode.kind != Kind::Symlink {
            return Err(Failed::raw(libc::EINVAL));
        }
        let text = self.read_backing_link(&inode)?;
        link::open(&self.volume, text).map_err(|error| self.link_failed(&inode, error))
    }

    /// The tail of a long symlink goes after its last name: whoever reads it just then meets a removal, not damage.
    fn link_failed(&self, inode: &Arc<Inode>, error: VolumeError) -> Failed {
        match self.hold(inode).and_then(|held| Ok(storage::stat_fd(held.as_fd())?.st_nlink)) {
            Ok(0) => Failed::raw(libc::ENOENT),
            Ok(_) => self.failed(inode, error),
            Err(failed) => failed,
        }
    }

    /// chmod, chown, truncate, utimens. Rights were checked by the kernel.
    ///
    /// # Errors
    /// The backing filesystem's; for a size whatever [`resize`](Self::resize) gives.
    pub fn setattr(&self, caller: Caller, ino: u64, changes: Changes) -> Outcome<Attributes> {
        let inode = self.inode(ino)?;
        if let Some(size) = changes.size {
            self.resize(&inode, size)?;
            // fuser does not pass FATTR_KILL_SUIDGID on: root keeps the bits (CAP_FSETID), others lose them.
            if caller.uid != 0 {
                self.kill_privileges(&inode)?;
            }
        }
        // A chown that changes neither moves the time of change all the same. Of a regular file, where it keeps times, the kernel
        // also asks for nothing at all: that setuid and setgid bits go, which it says again with the write (or allocation) itself.
        let neither =
            changes.size.is_none() && changes.mode.is_none() && changes.uid.is_none() && changes.gid.is_none();
        let touches = neither && changes.atime.is_none() && changes.mtime.is_none();
        let touches = touches && (changes.ctime || inode.kind != Kind::Regular);
        if changes.mode.is_some() || changes.uid.is_some() || changes.gid.is_some() || touches {
            let held = self.hold(&inode)?;
            if touches {
                // It takes these bits away, which only the owner may do. The kernel has left the question to us.
                let stat = storage::stat_fd(held.as_fd())?;
                let bits = SUID | if stat.st_mode & GROUP_EXEC != 0 { SGID } else { 0 };
                let strips = inode.kind != Kind::Directory && stat.st_mode & bits != 0;
                if strips && caller.uid != 0 && caller.uid != stat.st_uid {
                    return Err(Failed::raw(libc::EPERM));
                }
            }
            if touches || changes.uid.is_some() || changes.gid.is_some() {
                // The backing kernel drops setuid and setgid bits, as chown does.
                storage::chown_held(held.as_fd(), changes.uid, changes.gid)?;
            }
            if let Some(mode) = changes.mode {
                if inode.kind == Kind::Symlink {
                    return Err(Failed::raw(libc::EOPNOTSUPP));
                }
                storage::chmod_held(held.as_fd(), mode)?;
            }
        }
        if changes.atime.is_some() || changes.mtime.is_some() {
            // Whoever writes a header puts the times back that it found: not those from before this.
            let _alone = (inode.kind == Kind::Regular)
                .then(|| inode.file.write().unwrap_or_else(std::sync::PoisonError::into_inner));
            let times = Timestamps { last_access: timespec(changes.atime), last_modification: timespec(changes.mtime) };
            let open = lock(&inode.open).as_ref().map(|open| open.fd.clone());
            match open {
                Some(fd) => storage::set_times_fd(fd.as_fd(), &times)?,
                None => storage::set_times_held(self.hold(&inode)?.as_fd(), &times)?,
            }
            if changes.mtime.is_some() && inode.kind == Kind::Regular {
                let told = self.kernel_keeps_times.load(Ordering::Relaxed).then(|| self.hold(&inode)).transpose()?;
                // As the backing filesystem has it, which may not know so early or late a time.
                let stat = told.map(|held| storage::stat_fd(held.as_fd())).transpose()?;
                *lock(&inode.told_mtime) =
                    stat.map(|stat| Timespec { tv_sec: stat.st_mtime, tv_nsec: stat.st_mtime_nsec as _ });
            }
        }
        self.stat_inode(&inode)
    }

    /// What a write or truncate by somebody without CAP_FSETID does to setuid and setgid bits (file_remove_privs).
    pub(super) fn kill_privileges(&self, inode: &Arc<Inode>) -> Outcome<()> {
        let held = self.hold(inode)?;
        let mode = storage::stat_fd(held.as_fd())?.st_mode;
        let mut kept = mode & !SUID;
        if mode & GROUP_EXEC != 0 {
            kept &= !SGID;
        }
        if kept != mode {
            storage::chmod_held(held.as_fd(), kept)?;
        }
        Ok(())
    }

    /// Sets an extended attribute.
    ///
    /// # Errors
    /// `EOPNOTSUPP` for other namespaces than user, trusted and security (and POSIX ACLs with `-o acl`); `ERANGE` for a
    /// name over 165 bytes; the backing filesystem's.
    pub fn setxattr(&self, ino: u64, name: &OsStr, value: &[u8], flags: i32) -> Outcome<()> {
        let inode = self.inode(ino)?;
        match self.namespace(&inode, name)? {
            Namespace::Ours => {
                let (dek, held) = (self.dek(&inode)?, self.hold(&inode)?);
                xattr::set(&self.volume, held.as_fd(), &dek, name, value, flags)
                    .map_err(|error| self.failed(&inode, error))
            }
            Namespace::Backing => Ok(storage::set_xattr(self.hold(&inode)?.as_fd(), name, value, flags)?),
            Namespace::None => Err(Failed::raw(libc::EOPNOTSUPP)),
        }
    }

    /// An extended attribute's value.
    ///
    /// # Errors
    /// `ENODATA`; `EIO` for a damaged one.
    pub fn getxattr(&self, ino: u64, name: &OsStr) -> Outcome<Vec<u8>> {
        let inode = self.inode(ino)?;
        match self.namespace(&inode, name)? {
            Namespace::Ours => {
                let held = self.hold(&inode)?;
                let dek = self.dek(&inode)?;
                xattr::get(&self.volume, held.as_fd(), &dek, name).map_err(|error| self.failed(&inode, error))
            }
            Namespace::Backing => Ok(storage::get_xattr(self.hold(&inode)?.as_fd(), name)?),
            Namespace::None if inode.kind == Kind::Symlink => Err(Failed::raw(libc::ENODATA)),
            Namespace::None => Err(Failed::raw(libc::EOPNOTSUPP)),
        }
    }

    /// All attribute names, each ended by NUL.
    ///
    /// # Errors
    /// The backing filesystem's.
    pub fn listxattr(&self, ino: u64) -> Outcome<Vec<u8>> {
        let inode = self.inode(ino)?;
        if inode.kind == Kind::Symlink {
            return Ok(Vec::new());
        }
        let (dek, held) = (self.dek(&inode)?, self.hold(&inode)?);
        let damaged = |damage| _ = self.failed(&inode, VolumeError::Damaged(damage));
        let mut names =
            xattr::list(&self.volume, held.as_fd(), &dek, damaged).map_err(|error| self.failed(&inode, error))?;
        if self.acl {
            let backing = storage::list_xattr(held.as_fd())?;
            names.extend(backing.into_iter().filter(|name| name.starts_with(b"system.posix_acl_")));
        }
        Ok(names.into_iter().flat_map(|name| name.into_iter().chain([0])).collect())
    }

    /// Removes an extended attribute.
    ///
    /// # Errors
    /// As [`setxattr`](Self::setxattr).
    pub fn removexattr(&self, ino: u64, name: &OsStr) -> Outcome<()> {
        let inode = self.inode(ino)?;
        match self.namespace(&inode, name)? {
            Namespace::Ours => {
                let (dek, held) = (self.dek(&inode)?, self.hold(&inode)?);
                xattr::remove(&self.volume, held.as_fd(), &dek, name).map_err(|error| self.failed(&inode, error))
            }
            Namespace::Backing => Ok(storage::remove_xattr(self.hold(&inode)?.as_fd(), name)?),
            Namespace::None => Err(Failed::raw(libc::EOPNOTSUPP)),
        }
    }

    fn namespace(&self, inode: &Inode, name: &OsStr) -> Outcome<Namespace> {
        let name = name.as_bytes();
        if name.starts_with(b"system.posix_acl_") {
            return Ok(if self.acl && inode.kind != Kind::Symlink { Namespace::Backing } else { Namespace::None });
        }
        let namespaces = [b"user.".as_slice(), b"trusted.", b"security."];
        // A namespace is no name (xattr_resolve_name).
        if namespaces.contains(&name) {
            return Err(Failed::raw(libc::EINVAL));
        }
        let ours = namespaces.iter().any(|prefix| name.starts_with(prefix));
        Ok(if ours && inode.kind != Kind::Symlink { Namespace::Ours } else { Namespace::None })
    }

    /// statfs of the backing filesystem.
    ///
    /// # Errors
    /// Its own.
    pub fn statfs(&self) -> Outcome<StatVfs> {
        Ok(storage::filesystem(self.volume.root().as_fd())?)
    }

    /// Gives a new backing object the owner, group and mode that its maker expects of `parent`.
    pub(super) fn hand_over(
        &self,
        caller: Caller,
        parent: BorrowedFd<'_>,
        object: BorrowedFd<'_>,
        mode: Option<u32>,
    ) -> Result<(), Errno> {
        if (caller.uid, caller.gid) != (self.owner.uid, self.owner.gid) {
            // In a set-group-ID directory the backing kernel has chosen the group already (inode_init_owner).
            let inherits = storage::stat_fd(parent)?.st_mode & SGID != 0;
            storage::chown_held(object, Some(caller.uid), (!inherits).then_some(caller.gid))?;
        }
        if let Some(mode) = mode {
            // The rights are what a default ACL left of them.
            let made = storage::stat_fd(object)?.st_mode & 0o7777;
            let wanted = (made & 0o777) | (mode & 0o7000);
            if wanted != made {
                storage::chmod_held(object, wanted)?;
            }
        }
        Ok(())
    }
}

enum Namespace {
    /// Encrypted, in the backing object's `user.` namespace.
    Ours,
    /// Passed through.
    Backing,
    /// Not supported.
    None,
}

fn timespec(time: Option<SetTime>) -> Timespec {
    match time {
        None => Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        Some(SetTime::Now) => Timespec { tv_sec: 0, tv_nsec: UTIME_NOW },
        Some(SetTime::To(time)) => match time.duration_since(SystemTime::UNIX_EPOCH) {
            Ok(after) => Timespec { tv_sec: after.as_secs() as i64, tv_nsec: after.subsec_nanos().into() },
            Err(before) => {
                let before: Duration = before.duration();
                let carry = i64::from(before.subsec_nanos() > 0);
                Timespec {
                    // 2^63 seconds are its own negative; nothing is before that.
                    tv_sec: (before.as_secs() as i64).wrapping_neg().saturating_sub(carry),
                    tv_nsec: i64::from((1_000_000_000 - before.subsec_nanos()) % 1_000_000_000),
                }
            }
        },
    }
}
