//! A backing store that fails when told to: a FUSE filesystem that passes everything on to a directory, and asks a rule
//! before each call that changes something. It keeps what it was asked, so that a test can wait for an event instead of for
//! a time, and hold its order against what was promised.

use std::collections::HashMap;
use std::ffi::{CString, OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, Errno, FileAttr, FileHandle, FileType, FopenFlags, Generation, INodeNo, KernelConfig, LockOwner,
    OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen,
    ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use rustix::fs::{self as sys, AtFlags, CWD, Mode, OFlags, Stat, Timespec, Timestamps};
use rustix::mount::{MountFlags, UnmountFlags};

/// What is asked of the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    Create,
    Mkdir,
    Symlink,
    Link,
    Unlink,
    Rmdir,
    Rename,
    Write,
    Truncate,
    Fsync,
    FsyncDir,
    SetAttr,
    SetXattr,
}

/// One call.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) op: Op,
    /// Inode number of the file, or of the directory of a name.
    pub(crate) ino: u64,
    /// The name; of a rename the new one.
    pub(crate) name: OsString,
    /// Of a write; of a truncation the new length.
    pub(crate) offset: u64,
    /// Of a write.
    pub(crate) len: usize,
}

/// What becomes of a call.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Fate {
    /// It is done.
    Pass,
    /// It fails and nothing is done.
    Fail(i32),
    /// A write of only so many bytes.
    Short(usize),
    /// It hangs until the store is healed, and is done then.
    Hang,
}

type Rule = Box<dyn FnMut(&Call) -> Fate + Send>;

#[derive(Default)]
struct State {
    rule: Option<Rule>,
    calls: Vec<Call>,
    /// Of these quiet calls so many pass before all others hang.
    hang: Option<(Quiet, usize)>,
    /// How many hang, or did.
    hung: usize,
}

/// What changes nothing, and is not told of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Quiet {
    Read,
    Lookup,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    moved: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ask(&self, op: Op, ino: u64, name: &OsStr, offset: u64, len: usize) -> Fate {
        let mut state = self.lock();
        let call = Call { op, ino, name: name.to_owned(), offset, len };
        state.calls.push(call.clone());
        let fate = state.rule.as_mut().map_or(Fate::Pass, |rule| rule(&call));
        self.moved.notify_all();
        if matches!(fate, Fate::Hang) {
            while state.rule.is_some() {
                state = self.moved.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            return Fate::Pass;
        }
        fate
    }

    fn heal(&self) {
        {
            let mut state = self.lock();
            (state.rule, state.hang) = (None, None);
        }
        self.moved.notify_all();
    }

    fn quiet(&self, quiet: Quiet) {
        let mut state = self.lock();
        match &mut state.hang {
            Some((which, 0)) if *which == quiet => state.hung += 1,
            Some((which, left)) if *which == quiet => {
                *left -= 1;
                return;
            }
            _ => return,
        }
        self.moved.notify_all();
        while state.hang.is_some() {
            state = self.moved.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// The mounted store.
pub(crate) struct Faulty {
    shared: Arc<Shared>,
    mountpoint: PathBuf,
    session: Option<JoinHandle<io::Result<()>>>,
}

/// How long a test waits for an event before it fails.
const PATIENCE: Duration = Duration::from_secs(60);

impl Faulty {
    /// Passes `mountpoint` on to `store`, both directories that are there.
    pub(crate) fn mount(store: &Path, mountpoint: &Path) -> Self {
        let shared = Arc::new(Shared::default());
        let root = sys::open(store, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let fuse = sys::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let data = format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other", fuse.as_raw_fd());
        let data = CString::new(data).unwrap();
        rustix::mount::mount("faulty", mountpoint, "fuse", MountFlags::empty(), Some(data.as_c_str())).unwrap();
        let store = Store { shared: shared.clone(), inodes: Mutex::new(HashMap::from([(1, Arc::new(root))])) };
        let mut config = fuser::Config::default();
        config.n_threads = Some(4);
        let session = fuser::Session::from_fd(store, fuse, fuser::SessionACL::All, config).unwrap();
        let session = std::thread::spawn(move || session.run());
        Self { shared, mountpoint: mountpoint.to_owned(), session: Some(session) }
    }

    /// From now on this decides.
    pub(crate) fn rule(&self, rule: impl FnMut(&Call) -> Fate + Send + 'static) {
        self.shared.lock().rule = Some(Box::new(rule));
    }

    /// After so many more of these, all hang until the store is healed.
    pub(crate) fn hang_after(&self, pass: usize, quiet: Quiet) {
        let mut state = self.shared.lock();
        (state.hang, state.hung) = (Some((quiet, pass)), 0);
    }

    /// Waits until so many hang.
    #[track_caller]
    pub(crate) fn wait_for_hung(&self, many: usize) {
        let state = self.shared.lock();
        let (_state, timeout) = self
            .shared
            .moved
            .wait_timeout_while(state, PATIENCE, |state| state.hung < many)
            .unwrap_or_else(PoisonError::into_inner);
        assert!(!timeout.timed_out(), "the store was not asked for it");
    }

    /// Everything passes again.
    pub(crate) fn heal(&self) {
        self.shared.heal();
    }

    /// Heals it when dropped: whoever is stuck in the store cannot even be killed.
    pub(crate) fn healer(&self) -> Healer {
        Healer(self.shared.clone())
    }

    /// What was asked since the last call of this.
    pub(crate) fn calls(&self) -> Vec<Call> {
        std::mem::take(&mut self.shared.lock().calls)
    }

    /// Waits for a call. What was asked up to then stays for [`calls`](Self::calls).
    #[track_caller]
    pub(crate) fn wait_for(&self, wanted: impl Fn(&Call) -> bool) {
        let state = self.shared.lock();
        let (_state, timeout) = self
            .shared
            .moved
            .wait_timeout_while(state, PATIENCE, |state| !state.calls.iter().any(&wanted))
            .unwrap_or_else(PoisonError::into_inner);
        assert!(!timeout.timed_out(), "the store was not asked for it");
    }
}

impl Drop for Faulty {
    fn drop(&mut self) {
        self.heal();
        let _ = rustix::mount::unmount(&self.mountpoint, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
        if let Some(session) = self.session.take() {
            let _ = session.join();
        }
    }
}

/// See [`Faulty::healer`].
pub(crate) struct Healer(Arc<Shared>);

impl Drop for Healer {
    fn drop(&mut self) {
        self.0.heal();
    }
}

struct Store {
    shared: Arc<Shared>,
    /// Everything that was ever looked up, held.
    inodes: Mutex<HashMap<u64, Arc<OwnedFd>>>,
}

type Answer<T> = Result<T, rustix::io::Errno>;

fn errno(errno: rustix::io::Errno) -> Errno {
    Errno::from_i32(errno.raw_os_error())
}

fn time(seconds: i64, nanoseconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds.unsigned_abs()) + Duration::from_nanos(nanoseconds)
}

fn attr(ino: u64, stat: &Stat) -> FileAttr {
    FileAttr {
        ino: INodeNo(ino),
        size: stat.st_size as u64,
        blocks: stat.st_blocks as u64,
        atime: time(stat.st_atime, stat.st_atime_nsec),
        mtime: time(stat.st_mtime, stat.st_mtime_nsec),
        ctime: time(stat.st_ctime, stat.st_ctime_nsec),
        crtime: SystemTime::UNIX_EPOCH,
        kind: kind(sys::FileType::from_raw_mode(stat.st_mode)),
        perm: (stat.st_mode & 0o7777) as u16,
        nlink: stat.st_nlink as u32,
        uid: stat.st_uid,
        gid: stat.st_gid,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

fn kind(kind: sys::FileType) -> FileType {
    match kind {
        sys::FileType::Directory => FileType::Directory,
        sys::FileType::Symlink => FileType::Symlink,
        sys::FileType::Fifo => FileType::NamedPipe,
        _ => FileType::RegularFile,
    }
}

fn timespec(time: Option<TimeOrNow>) -> Timespec {
    match time {
        None => Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_OMIT },
        Some(TimeOrNow::Now) => Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_NOW },
        Some(TimeOrNow::SpecificTime(time)) => {
            let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
            Timespec { tv_sec: since.as_secs() as i64, tv_nsec: since.subsec_nanos().into() }
        }
    }
}

impl Store {
    fn fd(&self, ino: INodeNo) -> Arc<OwnedFd> {
        self.inodes.lock().unwrap_or_else(PoisonError::into_inner)[&ino.0].clone()
    }

    fn path(&self, ino: INodeNo) -> String {
        format!("/proc/self/fd/{}", self.fd(ino).as_raw_fd())
    }

    fn file(&self, ino: INodeNo, flags: OFlags) -> Answer<File> {
        // The held descriptor must outlive the opening through its number.
        let held = self.fd(ino);
        sys::open(format!("/proc/self/fd/{}", held.as_raw_fd()), flags | OFlags::CLOEXEC, Mode::empty()).map(File::from)
    }

    fn find(&self, parent: INodeNo, name: &OsStr) -> Answer<FileAttr> {
        let held =
            sys::openat(self.fd(parent), name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
        let stat = sys::fstat(&held)?;
        self.inodes.lock().unwrap_or_else(PoisonError::into_inner).entry(stat.st_ino).or_insert_with(|| Arc::new(held));
        Ok(attr(stat.st_ino, &stat))
    }

    fn ask(&self, op: Op, ino: INodeNo, name: &OsStr) -> Answer<()> {
        match self.shared.ask(op, ino.0, name, 0, 0) {
            Fate::Fail(errno) => Err(rustix::io::Errno::from_raw_os_error(errno)),
            Fate::Pass | Fate::Short(_) | Fate::Hang => Ok(()),
        }
    }

    fn made(&self, reply: ReplyEntry, req: &Request, parent: INodeNo, name: &OsStr, made: Answer<()>) {
        let own = |()| {
            let (uid, gid) = (sys::Uid::from_raw(req.uid()), sys::Gid::from_raw(req.gid()));
            sys::chownat(self.fd(parent), name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
        };
        entry(reply, made.and_then(own).and_then(|()| self.find(parent, name)));
    }
}

fn entry(reply: ReplyEntry, found: Answer<FileAttr>) {
    match found {
        Ok(attr) => reply.entry(&Duration::ZERO, &attr, Generation(0)),
        Err(error) => reply.error(errno(error)),
    }
}

fn empty(reply: ReplyEmpty, done: Answer<()>) {
    match done {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(errno(error)),
    }
}

fn value(reply: ReplyXattr, size: u32, value: Answer<Vec<u8>>) {
    match value {
        Ok(value) if size == 0 => reply.size(value.len() as u32),
        Ok(value) if value.len() > size as usize => reply.error(Errno::ERANGE),
        Ok(value) => reply.data(&value),
        Err(error) => reply.error(errno(error)),
    }
}

impl fuser::Filesystem for Store {
    fn init(&mut self, _req: &Request, _config: &mut KernelConfig) -> io::Result<()> {
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        self.shared.quiet(Quiet::Lookup);
        entry(reply, self.find(parent, name));
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        match sys::fstat(self.fd(ino)) {
            Ok(stat) => reply.attr(&Duration::ZERO, &attr(ino.0, &stat)),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn setattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let set = || -> Answer<Stat> {
            let fd = self.fd(ino);
            if let Some(size) = size {
                if let Fate::Fail(errno) = self.shared.ask(Op::Truncate, ino.0, OsStr::new(""), size, 0) {
                    return Err(rustix::io::Errno::from_raw_os_error(errno));
                }
                sys::ftruncate(self.file(ino, OFlags::WRONLY)?, size)?;
            } else {
                self.ask(Op::SetAttr, ino, OsStr::new(""))?;
            }
            if uid.is_some() || gid.is_some() {
                let (uid, gid) = (uid.map(sys::Uid::from_raw), gid.map(sys::Gid::from_raw));
                sys::chownat(&fd, "", uid, gid, AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW)?;
            }
            if let Some(mode) = mode {
                sys::chmod(self.path(ino), Mode::from_raw_mode(mode & 0o7777))?;
            }
            if atime.is_some() || mtime.is_some() {
                let times = Timestamps { last_access: timespec(atime), last_modification: timespec(mtime) };
                sys::utimensat(&fd, "", &times, AtFlags::EMPTY_PATH)?;
            }
            sys::fstat(fd)
        };
        match set() {
            Ok(stat) => reply.attr(&Duration::ZERO, &attr(ino.0, &stat)),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn readlink(&self, _req: &Request, ino: INodeNo, reply: ReplyData) {
        match sys::readlinkat(self.fd(ino), "", Vec::new()) {
            Ok(target) => reply.data(target.as_bytes()),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn mkdir(&self, req: &Request, parent: INodeNo, name: &OsStr, mode: u32, _umask: u32, reply: ReplyEntry) {
        let made = self.ask(Op::Mkdir, parent, name).and_then(|()| {
            sys::mkdirat(self.fd(parent), name, Mode::RWXU)?;
            sys::chmodat(self.fd(parent), name, Mode::from_raw_mode(mode & 0o7777), AtFlags::empty())
        });
        self.made(reply, req, parent, name, made);
    }

    fn symlink(&self, req: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        let made = self.ask(Op::Symlink, parent, name).and_then(|()| sys::symlinkat(target, self.fd(parent), name));
        self.made(reply, req, parent, name, made);
    }

    fn link(&self, _req: &Request, ino: INodeNo, newparent: INodeNo, newname: &OsStr, reply: ReplyEntry) {
        let made = self
            .ask(Op::Link, newparent, newname)
            .and_then(|()| sys::linkat(CWD, self.path(ino), self.fd(newparent), newname, AtFlags::SYMLINK_FOLLOW));
        entry(reply, made.and_then(|()| self.find(newparent, newname)));
    }

    fn unlink(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let done = self.ask(Op::Unlink, parent, name);
        empty(reply, done.and_then(|()| sys::unlinkat(self.fd(parent), name, AtFlags::empty())));
    }

    fn rmdir(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let done = self.ask(Op::Rmdir, parent, name);
        empty(reply, done.and_then(|()| sys::unlinkat(self.fd(parent), name, AtFlags::REMOVEDIR)));
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
        let flags = sys::RenameFlags::from_bits_retain(flags.bits());
        let done = self.ask(Op::Rename, newparent, newname);
        let rename = || sys::renameat_with(self.fd(parent), name, self.fd(newparent), newname, flags);
        empty(reply, done.and_then(|()| rename()));
    }

    fn open(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
    }

    fn create(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let made = self.ask(Op::Create, parent, name).and_then(|()| {
            let exclusive = OFlags::from_bits_retain(flags as u32) & OFlags::EXCL;
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | exclusive;
            let file = sys::openat(self.fd(parent), name, flags, Mode::from_raw_mode(mode & 0o7777))?;
            sys::fchown(&file, Some(sys::Uid::from_raw(req.uid())), Some(sys::Gid::from_raw(req.gid())))?;
            self.find(parent, name)
        });
        match made {
            Ok(attr) => {
                reply.created(&Duration::ZERO, &attr, Generation(0), FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
            }
            Err(error) => reply.error(errno(error)),
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
        self.shared.quiet(Quiet::Read);
        let mut buffer = vec![0; size as usize];
        let read = self.file(ino, OFlags::RDONLY).and_then(|file| rustix::io::pread(file, &mut buffer[..], offset));
        match read {
            Ok(n) => reply.data(&buffer[..n]),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn write(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let data = match self.shared.ask(Op::Write, ino.0, OsStr::new(""), offset, data.len()) {
            Fate::Fail(errno) => return reply.error(Errno::from_i32(errno)),
            Fate::Short(n) => &data[..n.min(data.len())],
            Fate::Pass | Fate::Hang => data,
        };
        let written = self.file(ino, OFlags::WRONLY).map_err(io::Error::from);
        match written.and_then(|file| file.write_all_at(data, offset)) {
            Ok(()) => reply.written(data.len() as u32),
            Err(error) => reply.error(Errno::from_i32(error.raw_os_error().unwrap_or(libc::EIO))),
        }
    }

    fn fsync(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        let done = self.ask(Op::Fsync, ino, OsStr::new(""));
        empty(reply, done.and_then(|()| sys::fsync(self.file(ino, OFlags::RDONLY)?)));
    }

    fn fsyncdir(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        empty(reply, self.ask(Op::FsyncDir, ino, OsStr::new("")));
    }

    fn readdir(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let list = || -> io::Result<Vec<(u64, FileType, OsString)>> {
            let mut all = Vec::new();
            for found in sys::Dir::read_from(self.file(ino, OFlags::RDONLY | OFlags::DIRECTORY)?.as_fd())? {
                let found = found?;
                let name = OsString::from_vec(found.file_name().to_bytes().to_vec());
                all.push((found.ino(), kind(found.file_type()), name));
            }
            Ok(all)
        };
        match list() {
            Ok(all) => {
                for (n, (ino, kind, name)) in all.into_iter().enumerate().skip(offset as usize) {
                    if reply.add(INodeNo(ino), n as u64 + 1, kind, name) {
                        break;
                    }
                }
                reply.ok();
            }
            Err(error) => reply.error(Errno::from_i32(error.raw_os_error().unwrap_or(libc::EIO))),
        }
    }

    fn statfs(&self, _req: &Request, ino: INodeNo, reply: ReplyStatfs) {
        match sys::statvfs(self.path(ino)) {
            Ok(fs) => reply.statfs(
                fs.f_blocks,
                fs.f_bfree,
                fs.f_bavail,
                fs.f_files,
                fs.f_ffree,
                fs.f_bsize as u32,
                fs.f_namemax as u32,
                fs.f_frsize as u32,
            ),
            Err(error) => reply.error(errno(error)),
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
        let done = self.ask(Op::SetXattr, ino, name);
        let flags = sys::XattrFlags::from_bits_retain(flags as u32);
        empty(reply, done.and_then(|()| sys::setxattr(self.path(ino), name, value, flags)));
    }

    fn getxattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let mut buffer = vec![0; 64 << 10];
        let got = sys::getxattr(self.path(ino), name, &mut buffer[..]);
        value(reply, size, got.map(|n| buffer[..n].to_vec()));
    }

    fn listxattr(&self, _req: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        let mut buffer = vec![0; 64 << 10];
        let got = sys::listxattr(self.path(ino), &mut buffer[..]);
        value(reply, size, got.map(|n| buffer[..n].to_vec()));
    }

    fn removexattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let done = self.ask(Op::SetXattr, ino, name);
        empty(reply, done.and_then(|()| sys::removexattr(self.path(ino), name)));
    }
}
