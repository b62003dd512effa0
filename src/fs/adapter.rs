//! `fuser` on one side, [`Filesystem`] on the other: decodes, calls, replies. The only room that names fuser's reply types.

mod worker;

use std::cell::RefCell;
use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, Errno, FileAttr, FileHandle, FileType, FopenFlags, Generation, INodeNo, InitFlags, KernelConfig,
    LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus,
    ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};

use zeroize::Zeroize as _;

use self::worker::Owing;
use super::attributes::{Attributes, Changes, SetTime, Type};
use super::core::{Caller, Filesystem, Outcome};
use super::errno::Failed;
use super::gate::{InFlight, Phase, Way};
use crate::sys::wiping;
use crate::volume::storage;

/// Nobody else changes the volume while it is mounted (its lock sees to that), so what the kernel knows stays true.
const FOREVER: Duration = Duration::from_secs(365 * 24 * 3600);
/// Largest write and read: what the kernel allows at most (`fs.fuse.max_pages_limit`, 256 pages).
const MAX_REQUEST: u32 = 1 << 20;

/// struct fuse_in_header, and struct fuse_write_in before a write's data (include/uapi/linux/fuse.h).
const IN_HEADER: usize = 40;
const WRITE_IN: usize = 40;

/// Notes how far a request reached that has these parts, the first of them this far behind the header: the size of the struct
/// that the operation has there (fuse_mknod_in, …).
fn saw(offset: usize, parts: &[&[u8]]) {
    parts.iter().for_each(|part| wiping::saw_request(part, parts[0], IN_HEADER + offset));
}

thread_local! {
    /// Plaintext of one read reply.
    static PLAIN: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// The filesystem as fuser wants it.
pub struct Adapter {
    fs: Arc<Filesystem>,
    device: Arc<OwnedFd>,
    no_open: bool,
    no_opendir: bool,
}

impl Adapter {
    /// Around a filesystem. `device`: of the connection.
    pub fn new(fs: Arc<Filesystem>, device: Arc<OwnedFd>) -> Self {
        Self { fs, device, no_open: false, no_opendir: false }
    }

    /// From now on a seal may refuse this.
    fn owe(&self, owing: Owing) {
        worker::place(&self.fs, &self.device).put(owing);
    }

    /// What every operation begins with: counting, and refusing once the mount is being sealed.
    fn enter(&self) -> Outcome<()> {
        self.fs.counters.requests.fetch_add(1, Ordering::Relaxed);
        Ok(self.fs.gate.check()?)
    }

    /// The same for what brings data out of the kernel.
    fn enter_writing(&self) -> Outcome<InFlight<'_>> {
        self.fs.counters.requests.fetch_add(1, Ordering::Relaxed);
        Ok(self.fs.gate.write()?)
    }

    /// Sends what came of a request, unless the mount was sealed meanwhile. Whether it sent the outcome.
    fn answer<R: Refuse, T>(&self, reply: R, outcome: Outcome<T>, send: impl FnOnce(R, T)) -> bool {
        self.answer_by(false, reply, outcome, |reply, value, _| send(reply, value))
    }

    fn answer_by<R: Refuse, T>(
        &self,
        draining: bool,
        reply: R,
        outcome: Outcome<T>,
        send: impl FnOnce(R, T, Duration),
    ) -> bool {
        let mut reply = Some(reply);
        let failed = match outcome {
            Err(failed) => failed,
            Ok(value) => {
                let sent = self.fs.gate.answer(draining, |way| {
                    let keep = if way == Way::Open { FOREVER } else { Duration::ZERO };
                    if let Some(reply) = reply.take() {
                        send(reply, value, keep);
                    }
                });
                match sent {
                    Ok(()) => return true,
                    Err(reason) => reason.into(),
                }
            }
        };
        if let Some(reply) = reply {
            reply.refuse(errno(failed));
        }
        false
    }

    /// An entry is a reference of the kernel's, which it does not have if it is not told.
    fn answer_entry(&self, reply: ReplyEntry, outcome: Outcome<Attributes>) {
        let ino = outcome.as_ref().ok().map(|found| found.ino);
        let sent = self.answer(reply, outcome, |reply, found| {
            reply.entry(&FOREVER, &attr(&found), Generation(found.generation));
        });
        if let (false, Some(ino)) = (sent, ino) {
            self.fs.forget(ino, 1);
        }
    }

    fn answer_empty(&self, reply: ReplyEmpty, outcome: Outcome<()>) {
        self.answer(reply, outcome, |reply, ()| reply.ok());
    }

    /// A value in the two-step manner of getxattr(2): its length for `size` 0, else the value or `ERANGE`.
    fn answer_value(&self, reply: ReplyXattr, size: u32, outcome: Outcome<Vec<u8>>) {
        self.answer(reply, outcome, |reply, value| match value.len() {
            length if size == 0 => reply.size(length as u32),
            length if length > size as usize => reply.error(Errno::ERANGE),
            _ => reply.data(&value),
        });
    }
}

/// A reply that can say no.
trait Refuse {
    fn refuse(self, errno: Errno);
}

macro_rules! refuse {
    ($($reply:ty),*) => { $(impl Refuse for $reply {
        fn refuse(self, errno: Errno) {
            self.error(errno);
        }
    })* };
}

refuse!(ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyXattr);

fn caller(req: &Request) -> Caller {
    Caller { uid: req.uid(), gid: req.gid() }
}

fn errno(failed: Failed) -> Errno {
    Errno::from_i32(failed.errno())
}

fn time(seconds: i64, nanoseconds: u64) -> SystemTime {
    let nanoseconds = Duration::from_nanos(nanoseconds);
    match u64::try_from(seconds) {
        Ok(after) => SystemTime::UNIX_EPOCH + Duration::from_secs(after) + nanoseconds,
        Err(_) => SystemTime::UNIX_EPOCH - Duration::from_secs(seconds.unsigned_abs()) + nanoseconds,
    }
}

fn file_type(kind: Type) -> FileType {
    match kind {
        Type::Regular => FileType::RegularFile,
        Type::Directory => FileType::Directory,
        Type::Symlink => FileType::Symlink,
        Type::Fifo => FileType::NamedPipe,
        Type::Socket => FileType::Socket,
        Type::CharDevice => FileType::CharDevice,
        Type::BlockDevice => FileType::BlockDevice,
    }
}

fn attr(attributes: &Attributes) -> FileAttr {
    let stat = &attributes.stat;
    FileAttr {
        ino: INodeNo(attributes.ino),
        size: attributes.size,
        blocks: stat.st_blocks as u64,
        atime: time(stat.st_atime, stat.st_atime_nsec),
        mtime: time(stat.st_mtime, stat.st_mtime_nsec),
        ctime: time(stat.st_ctime, stat.st_ctime_nsec),
        crtime: SystemTime::UNIX_EPOCH,
        kind: file_type(attributes.kind),
        perm: (stat.st_mode & 0o7777) as u16,
        nlink: stat.st_nlink as u32,
        uid: stat.st_uid,
        gid: stat.st_gid,
        rdev: attributes.device as u32,
        blksize: 4096,
        flags: 0,
    }
}

fn set_time(time: TimeOrNow) -> SetTime {
    match time {
        // fuser 0.18 (time.rs, system_time_from_time) takes the nanoseconds of a time before 1970 off instead of adding them.
        TimeOrNow::SpecificTime(time) => SetTime::To(match SystemTime::UNIX_EPOCH.duration_since(time) {
            Ok(before) => time + 2 * Duration::from_nanos(before.subsec_nanos().into()),
            Err(_) => time,
        }),
        TimeOrNow::Now => SetTime::Now,
    }
}

impl fuser::Filesystem for Adapter {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        // One at a time: an older kernel lacks some, and each stands on its own.
        let mut wanted = vec![
            InitFlags::FUSE_WRITEBACK_CACHE,
            InitFlags::FUSE_HANDLE_KILLPRIV_V2,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_CACHE_SYMLINKS,
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_EXPLICIT_INVAL_DATA,
        ];
        if self.fs.acl {
            wanted.extend([InitFlags::FUSE_POSIX_ACL, InitFlags::FUSE_DONT_MASK]);
        }
        for flag in wanted {
            if config.add_capabilities(flag).is_err() {
                tracing::info!(?flag, "the kernel does not offer this");
            } else if flag == InitFlags::FUSE_WRITEBACK_CACHE {
                self.fs.kernel_keeps_times.store(true, Ordering::Relaxed);
            }
        }
        // ENOSYS to OPEN and OPENDIR means "never ask again" only to a kernel that said so.
        self.no_open = config.add_capabilities(InitFlags::FUSE_NO_OPEN_SUPPORT).is_ok();
        self.no_opendir = config.add_capabilities(InitFlags::FUSE_NO_OPENDIR_SUPPORT).is_ok();
        let _ = config.set_max_write(MAX_REQUEST);
        let _ = config.set_max_background(64);
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        saw(0, &[name.as_bytes()]);
        match self.enter().and_then(|()| self.fs.lookup(parent.0, name.as_bytes())) {
            Ok(None) => {
                self.answer(reply, Ok(()), |reply, ()| reply.entry(&FOREVER, &nothing(), Generation(0)));
            }
            Ok(Some(found)) => self.answer_entry(reply, Ok(found)),
            Err(failed) => reply.error(errno(failed)),
        }
    }

    fn forget(&self, _req: &Request, ino: INodeNo, nlookup: u64) {
        self.fs.forget(ino.0, nlookup);
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        if ino.0 == super::inode::ROOT {
            // The root's attributes stay available after a seal, so that the mount can be looked at and unmounted.
            return match self.fs.getattr(ino.0) {
                Ok(found) if self.enter().is_ok() => reply.attr(&FOREVER, &attr(&found)),
                Ok(found) => reply.attr(&Duration::ZERO, &attr(&found)),
                Err(failed) => reply.error(errno(failed)),
            };
        }
        let found = self.enter().and_then(|()| self.fs.getattr(ino.0));
        self.answer(reply, found, |reply, found| reply.attr(&FOREVER, &attr(&found)));
    }

    fn setattr(
        &self,
        req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let changes = Changes {
            mode,
            uid,
            gid,
            size,
            atime: atime.map(set_time),
            mtime: mtime.map(set_time),
            ctime: ctime.is_some(),
        };
        match self.enter_writing() {
            Err(failed) => reply.error(errno(failed)),
            Ok(_in_flight) => {
                let changed = self.fs.setattr(caller(req), ino.0, changes);
                self.answer_by(true, reply, changed, |reply, found, keep| reply.attr(&keep, &attr(&found)));
            }
        }
    }

    fn readlink(&self, _req: &Request, ino: INodeNo, reply: ReplyData) {
        self.owe(Owing::Data(reply));
        let target = self.enter().and_then(|()| self.fs.readlink(ino.0));
        if let Some(Owing::Data(reply)) = worker::owed() {
            self.answer(reply, target, |reply, target| reply.data(&target));
        }
    }

    fn mknod(&self, req: &Request, parent: INodeNo, name: &OsStr, mode: u32, umask: u32, rdev: u32, reply: ReplyEntry) {
        saw(16, &[name.as_bytes()]);
        let made = self.enter().and_then(|()| self.fs.mknod(caller(req), parent.0, name.as_bytes(), mode, umask, rdev));
        self.answer_entry(reply, made);
    }

    fn mkdir(&self, req: &Request, parent: INodeNo, name: &OsStr, mode: u32, umask: u32, reply: ReplyEntry) {
        saw(8, &[name.as_bytes()]);
        let made = self.enter().and_then(|()| self.fs.mkdir(caller(req), parent.0, name.as_bytes(), mode, umask));
        self.answer_entry(reply, made);
    }

    fn unlink(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        saw(0, &[name.as_bytes()]);
        self.answer_empty(reply, self.enter().and_then(|()| self.fs.unlink(parent.0, name.as_bytes())));
    }

    fn rmdir(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        saw(0, &[name.as_bytes()]);
        self.answer_empty(reply, self.enter().and_then(|()| self.fs.rmdir(parent.0, name.as_bytes())));
    }

    fn symlink(&self, req: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        saw(0, &[name.as_bytes(), target.as_os_str().as_bytes()]);
        let target = target.as_os_str().as_bytes();
        let made = self.enter().and_then(|()| self.fs.symlink(caller(req), parent.0, name.as_bytes(), target));
        self.answer_entry(reply, made);
    }

    fn rename(
        &self,
        _req: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        // RENAME, or RENAME2 where there are flags.
        saw(if flags.is_empty() { 8 } else { 16 }, &[name.as_bytes(), newname.as_bytes()]);
        let flags = storage::RenameFlags::from_bits_retain(flags.bits());
        let renamed = self
            .enter()
            .and_then(|()| self.fs.rename(parent.0, name.as_bytes(), newparent.0, newname.as_bytes(), flags));
        self.answer_empty(reply, renamed);
    }

    fn link(&self, _req: &Request, ino: INodeNo, newparent: INodeNo, newname: &OsStr, reply: ReplyEntry) {
        saw(8, &[newname.as_bytes()]);
        self.answer_entry(reply, self.enter().and_then(|()| self.fs.link(ino.0, newparent.0, newname.as_bytes())));
    }

    fn open(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        match self.enter() {
            Err(failed) => reply.error(errno(failed)),
            Ok(()) if self.no_open => reply.error(Errno::ENOSYS),
            Ok(()) => reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE),
        }
    }

    fn opendir(&self, _req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let entered = self.enter();
        // A seal itself opens the root. Nothing is learned from that.
        match if ino.0 == super::inode::ROOT { Ok(()) } else { entered } {
            Err(failed) => reply.error(errno(failed)),
            Ok(()) if self.no_opendir => reply.error(Errno::ENOSYS),
            Ok(()) => reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_CACHE_DIR),
        }
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.owe(Owing::Data(reply));
        PLAIN.with_borrow_mut(|plain| {
            let size = size as usize;
            if plain.len() < size {
                plain.resize(size, 0);
            }
            let read = self.enter().and_then(|()| self.fs.read(ino.0, offset, &mut plain[..size]));
            if let Some(Owing::Data(reply)) = worker::owed() {
                self.answer(reply, read, |reply, n| reply.data(&plain[..n]));
            }
        });
    }

    fn write(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let kill = write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID);
        saw(WRITE_IN, &[data]);
        self.owe(Owing::Write(reply, ino.0, data.len() as u64));
        // The guard goes first and the answer second: whoever waits for writes waits for what they do, not for who asked.
        let written = self.enter_writing().and_then(|_in_flight| self.fs.write(ino.0, offset, data, kill));
        let Some(Owing::Write(reply, ..)) = worker::owed() else { return };
        match written {
            Ok(()) => reply.written(data.len() as u32),
            Err(failed) => {
                // Whoever wrote it was told long ago that all is well, and finds nobody to ask.
                if self.fs.gate.phase() != Phase::Open {
                    self.fs.dropped(ino.0, data.len() as u64);
                }
                reply.error(errno(failed));
            }
        }
    }

    fn fallocate(
        &self,
        req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        // The kernel leaves setuid and setgid bits to us (FUSE_HANDLE_KILLPRIV_V2), and has no flag for it here.
        let kill = req.uid() != 0;
        let allocated = self.enter().and_then(|()| self.fs.allocate(ino.0, offset, length, mode, kill));
        self.answer_empty(reply, allocated);
    }

    fn flush(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _lock_owner: LockOwner, reply: ReplyEmpty) {
        // "Not needed, do not ask again": the kernel writes dirty pages out before.
        reply.error(Errno::ENOSYS);
    }

    fn fsync(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, datasync: bool, reply: ReplyEmpty) {
        let synced = self.enter_writing().and_then(|_in_flight| self.fs.fsync(ino.0, datasync));
        match synced {
            Ok(()) => reply.ok(),
            Err(failed) => reply.error(errno(failed)),
        }
    }

    fn fsyncdir(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, datasync: bool, reply: ReplyEmpty) {
        let synced = self.enter_writing().and_then(|_in_flight| self.fs.fsync(ino.0, datasync));
        match synced {
            Ok(()) => reply.ok(),
            Err(failed) => reply.error(errno(failed)),
        }
    }

    fn readdir(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let read = self.enter().and_then(|()| {
            self.fs.readdir(ino.0, offset, false, |entry| {
                !reply.add(INodeNo(entry.ino), entry.next, file_type(entry.kind), OsStr::from_bytes(&entry.name))
            })
        });
        self.answer(reply, read, |reply, ()| reply.ok());
    }

    fn readdirplus(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, offset: u64, mut reply: ReplyDirectoryPlus) {
        // The kernel's references, which it does not have if it is not told.
        let mut told = Vec::new();
        let read = self.enter().and_then(|()| {
            self.fs.readdir(ino.0, offset, true, |entry| {
                let name = OsStr::from_bytes(&entry.name);
                let attributes = match &entry.found {
                    Some(found) => attr(found),
                    // The kernel takes only number and type of these two (fuse_direntplus_link).
                    None if matches!(entry.name.as_slice(), b"." | b"..") => {
                        FileAttr { ino: INodeNo(entry.ino), kind: FileType::Directory, ..nothing() }
                    }
                    // Not to be believed, and reported: not shown.
                    None => return true,
                };
                let generation = Generation(entry.found.as_ref().map_or(0, |found| found.generation));
                let full = reply.add(attributes.ino, entry.next, name, &FOREVER, &attributes, generation);
                match &entry.found {
                    Some(found) if full => self.fs.forget(found.ino, 1),
                    Some(found) => told.push(found.ino),
                    None => {}
                }
                !full
            })
        });
        if !self.answer(reply, read, |reply, ()| reply.ok()) {
            told.into_iter().for_each(|ino| self.fs.forget(ino, 1));
        }
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        self.fs.scrub.arrive(|| {
            PLAIN.with_borrow_mut(|plain| plain.zeroize());
            wiping::behind_request(IN_HEADER);
            wiping::unused_stack();
        });
        match self.fs.statfs() {
            Ok(fs) => reply.statfs(
                fs.f_blocks,
                fs.f_bfree,
                fs.f_bavail,
                fs.f_files,
                fs.f_ffree,
                fs.f_bsize as u32,
                crate::volume::format::NAME_MAX as u32,
                fs.f_frsize as u32,
            ),
            Err(failed) => reply.error(errno(failed)),
        }
    }

    fn setxattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        saw(8, &[name.as_bytes(), value]);
        self.answer_empty(reply, self.enter().and_then(|()| self.fs.setxattr(ino.0, name, value, flags)));
    }

    fn getxattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        saw(8, &[name.as_bytes()]);
        self.answer_value(reply, size, self.enter().and_then(|()| self.fs.getxattr(ino.0, name)));
    }

    fn listxattr(&self, _req: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        self.answer_value(reply, size, self.enter().and_then(|()| self.fs.listxattr(ino.0)));
    }

    fn removexattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        saw(0, &[name.as_bytes()]);
        self.answer_empty(reply, self.enter().and_then(|()| self.fs.removexattr(ino.0, name)));
    }

    fn create(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        saw(16, &[name.as_bytes()]);
        let exclusive = flags & libc::O_EXCL != 0;
        let made = self
            .enter()
            .and_then(|()| self.fs.create(caller(req), parent.0, name.as_bytes(), mode, umask, exclusive))
            .and_then(|made| match flags & libc::O_TRUNC {
                0 => Ok(made),
                _ if made.size == 0 => Ok(made),
                _ => {
                    let changes = Changes { size: Some(0), ..Changes::default() };
                    self.fs.setattr(caller(req), made.ino, changes).inspect_err(|_| self.fs.forget(made.ino, 1))
                }
            });
        let ino = made.as_ref().ok().map(|made| made.ino);
        let sent = self.answer(reply, made, |reply, made| {
            let generation = Generation(made.generation);
            reply.created(&FOREVER, &attr(&made), generation, FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE);
        });
        if let (false, Some(ino)) = (sent, ino) {
            self.fs.forget(ino, 1);
        }
    }
}

/// A reply that says "there is no such entry, and you may remember that" (node id 0).
fn nothing() -> FileAttr {
    FileAttr {
        ino: INodeNo(0),
        size: 0,
        blocks: 0,
        atime: SystemTime::UNIX_EPOCH,
        mtime: SystemTime::UNIX_EPOCH,
        ctime: SystemTime::UNIX_EPOCH,
        crtime: SystemTime::UNIX_EPOCH,
        kind: FileType::RegularFile,
        perm: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}
