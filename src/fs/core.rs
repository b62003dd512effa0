//! What the operations share: the filesystem's state, reaching objects, and sealing files that have gone quiet.

use std::collections::HashMap;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use super::errno::Failed;
use super::inode::{FdCache, Inode, InodeTable, Kind, Link, Open, lock};
use crate::keyring::Dek;
use crate::volume::dir::DirKeys;
use crate::volume::file::{FileState, ReadError};
use crate::volume::storage::{self, Errno, FileType, Stat};
use crate::volume::{Damage, Volume, VolumeError, format, node};

/// Who asks.
#[derive(Clone, Copy, Debug)]
pub struct Caller {
    /// Effective user id.
    pub uid: u32,
    /// Effective group id.
    pub gid: u32,
}

/// An operation's result.
pub type Outcome<T> = Result<T, Failed>;

/// How long a file must be quiet before its header is sealed.
pub const QUIET: Duration = Duration::from_secs(5);
/// More files than this are flushed with one syncfs rather than one by one.
const SYNCFS_FROM: usize = 8;

/// Counters for `status`.
#[derive(Default)]
pub struct Counters {
    /// Bytes of plaintext handed out.
    pub read: AtomicU64,
    /// Bytes of plaintext taken in.
    pub written: AtomicU64,
    /// Requests answered.
    pub requests: AtomicU64,
}

/// The filesystem over one volume. All methods may be called from any thread.
pub struct Filesystem {
    /// The volume.
    pub volume: Volume,
    /// Inodes the kernel knows.
    pub inodes: InodeTable,
    /// Open descriptors.
    pub fds: FdCache,
    /// POSIX ACLs are on.
    pub acl: bool,
    /// Counters.
    pub counters: Counters,
    /// Who we are: files made by others are handed over to them.
    pub owner: Caller,
    started: Instant,
    unsealed: Mutex<HashMap<u64, Arc<Inode>>>,
    stop: Mutex<bool>,
    stopped: Condvar,
    purging: AtomicBool,
}

impl Filesystem {
    /// Over an open volume, with at most about `fds` descriptors cached.
    pub fn new(volume: Volume, fds: usize, acl: bool) -> Self {
        let inodes = InodeTable::new(volume.root().clone());
        if let Some(root) = inodes.get(super::inode::ROOT) {
            let _ = root.dir.set(Box::new(volume.root_dir().clone()));
        }
        Self {
            volume,
            inodes,
            fds: FdCache::new(fds),
            acl,
            counters: Counters::default(),
            owner: Caller { uid: rustix::process::geteuid().as_raw(), gid: rustix::process::getegid().as_raw() },
            started: Instant::now(),
            unsealed: Mutex::new(HashMap::new()),
            stop: Mutex::new(false),
            stopped: Condvar::new(),
            purging: AtomicBool::new(false),
        }
    }

    /// The inode with this node id.
    ///
    /// # Errors
    /// `ESTALE` for one that the kernel should have forgotten.
    pub fn inode(&self, ino: u64) -> Outcome<Arc<Inode>> {
        self.inodes.get(ino).ok_or(Failed::raw(libc::ESTALE))
    }

    /// Refuses everything once the keys are gone.
    ///
    /// # Errors
    /// `EKEYREVOKED` or `EKEYEXPIRED`.
    pub fn check_open(&self) -> Outcome<()> {
        self.volume.keys().sealed().map_or(Ok(()), |reason| Err(reason.into()))
    }

    /// Classifies a backing entry. Damage is the caller's to report.
    pub fn kind(&self, stat: &Stat) -> Result<Kind, VolumeError> {
        if stat.st_dev != self.volume.device() {
            return Err(VolumeError::CrossesDevices);
        }
        match storage::file_type(stat) {
            FileType::Directory => Ok(Kind::Directory),
            FileType::Symlink => Ok(Kind::Symlink),
            FileType::RegularFile if stat.st_size as u64 == format::NODE_RECORD => Ok(Kind::Node),
            FileType::RegularFile => Ok(Kind::Regular),
            _ => Err(VolumeError::Damaged(Damage::Planted)),
        }
    }

    /// An open descriptor of a directory or regular file, cached. For a file the descriptor can write if anything allows it.
    ///
    /// # Errors
    /// The backing filesystem's.
    pub fn open(&self, inode: &Arc<Inode>) -> Outcome<Open> {
        if let Link::Root(fd) = &*lock(&inode.link) {
            return Ok(Open { fd: fd.clone(), writable: false });
        }
        let opened = {
            let mut slot = lock(&inode.open);
            if let Some(open) = &*slot {
                return Ok(open.clone());
            }
            let open = self.reach(inode)?;
            *slot = Some(open.clone());
            open
        };
        self.fds.opened(inode);
        Ok(opened)
    }

    fn reach(&self, inode: &Arc<Inode>) -> Outcome<Open> {
        let link = lock(&inode.link);
        let try_open = |write| match &*link {
            Link::Root(fd) => Ok(fd.clone()),
            Link::Held(held) => storage::reopen(held.as_fd(), write).map(Arc::new),
            Link::At { parent, name } => {
                let dir = self.open(parent).map_err(|failed| Errno::from_raw_os_error(failed.errno()))?;
                if inode.kind == Kind::Directory {
                    storage::open_dir(dir.fd.as_fd(), &**name).map(Arc::new)
                } else {
                    storage::open_file(dir.fd.as_fd(), &**name, write).map(Arc::new)
                }
            }
        };
        if inode.kind != Kind::Regular || self.volume.read_only() {
            return Ok(Open { fd: try_open(false)?, writable: false });
        }
        match try_open(true) {
            Ok(fd) => Ok(Open { fd, writable: true }),
            Err(Errno::ROFS | Errno::PERM | Errno::TXTBSY) => Ok(Open { fd: try_open(false)?, writable: false }),
            // An ordinary user's own file without the permission that the header's upkeep needs. The kernel has checked
            // the caller's rights against the mode already.
            Err(Errno::ACCESS) => {
                let held = self.hold_link(&link)?;
                let mode = storage::stat_fd(held.as_fd())?.st_mode;
                storage::chmod_held(held.as_fd(), mode | 0o600)?;
                let fd = storage::reopen(held.as_fd(), true);
                storage::chmod_held(held.as_fd(), mode)?;
                Ok(Open { fd: Arc::new(fd?), writable: true })
            }
            Err(errno) => Err(errno.into()),
        }
    }

    /// A descriptor that at least holds the object, whatever it is: for stat, mode, owner, times, attributes.
    ///
    /// # Errors
    /// The backing filesystem's.
    pub fn hold(&self, inode: &Arc<Inode>) -> Outcome<Arc<OwnedFd>> {
        if let Some(open) = &*lock(&inode.open) {
            return Ok(open.fd.clone());
        }
        self.hold_link(&lock(&inode.link))
    }

    /// The same for a link that the caller has locked.
    pub(super) fn hold_link(&self, link: &Link) -> Outcome<Arc<OwnedFd>> {
        match link {
            Link::Root(fd) | Link::Held(fd) => Ok(fd.clone()),
            Link::At { parent, name } => {
                let dir = self.open(parent)?;
                Ok(Arc::new(storage::open_path(dir.fd.as_fd(), &**name)?))
            }
        }
    }

    /// The keys of a directory.
    ///
    /// # Errors
    /// `ENOTDIR`, `EIO` for a damaged header.
    pub fn dir<'a>(&self, inode: &'a Arc<Inode>) -> Outcome<&'a DirKeys> {
        if inode.kind != Kind::Directory {
            return Err(Failed::raw(libc::ENOTDIR));
        }
        if let Some(keys) = inode.dir.get() {
            return Ok(keys);
        }
        let open = self.open(inode)?;
        let keys = DirKeys::load(open.fd.as_fd(), self.volume.keys()).map_err(|error| self.failed(inode, error))?;
        Ok(inode.dir.get_or_init(|| Box::new(keys)))
    }

    /// Shared use of a regular file's state, loaded if need be.
    ///
    /// # Errors
    /// `EISDIR`, `EINVAL`, `EIO` for a damaged header.
    pub fn file<'a>(&self, inode: &'a Arc<Inode>) -> Outcome<(RwLockReadGuard<'a, Option<Box<FileState>>>, Open)> {
        let open = self.open_regular(inode)?;
        loop {
            let guard = inode.file.read().unwrap_or_else(PoisonError::into_inner);
            if guard.is_some() {
                return Ok((guard, open));
            }
            drop(guard);
            drop(self.file_mut(inode)?);
        }
    }

    /// Exclusive use of a regular file's state, loaded if need be.
    ///
    /// # Errors
    /// As [`file`](Self::file).
    pub fn file_mut<'a>(&self, inode: &'a Arc<Inode>) -> Outcome<(RwLockWriteGuard<'a, Option<Box<FileState>>>, Open)> {
        let open = self.open_regular(inode)?;
        let mut guard = inode.file.write().unwrap_or_else(PoisonError::into_inner);
        if guard.is_none() {
            let state = FileState::load(&self.volume, open.fd.as_fd()).map_err(|error| self.failed(inode, error))?;
            // The kernel would cut another file, put in this one's place meanwhile, to the size that it knows, or fill it up.
            if let Some(told) = inode.told_size().filter(|told| *told != state.size()) {
                let damage = if state.size() < told { Damage::Truncated } else { Damage::Extended };
                return Err(self.failed(inode, VolumeError::Damaged(damage)));
            }
            *guard = Some(Box::new(state));
        }
        Ok((guard, open))
    }

    /// An open descriptor of a regular file.
    pub(super) fn open_regular(&self, inode: &Arc<Inode>) -> Outcome<Open> {
        match inode.kind {
            Kind::Regular => self.open(inode),
            Kind::Directory => Err(Failed::raw(libc::EISDIR)),
            Kind::Symlink | Kind::Node => Err(Failed::raw(libc::EINVAL)),
        }
    }

    /// The key claim of any object that can have extended attributes.
    ///
    /// # Errors
    /// `EOPNOTSUPP` for symlinks; `EIO` for a damaged header.
    pub fn dek(&self, inode: &Arc<Inode>) -> Outcome<Dek> {
        match inode.kind {
            Kind::Directory => Ok(self.dir(inode)?.dek().clone()),
            Kind::Regular => {
                let (state, _) = self.file(inode)?;
                state.as_ref().map(|state| state.dek().clone()).ok_or(Failed::raw(libc::EIO))
            }
            Kind::Node => Ok(self.node(inode)?.dek.clone()),
            Kind::Symlink => Err(Failed::raw(libc::EOPNOTSUPP)),
        }
    }

    /// What a node record says.
    ///
    /// # Errors
    /// `EIO` for a damaged one.
    pub fn node<'a>(&self, inode: &'a Arc<Inode>) -> Outcome<&'a crate::volume::header::Static> {
        if let Some(header) = inode.node.get() {
            return Ok(header);
        }
        let open = self.open(inode)?;
        let header = node::read(&self.volume, open.fd.as_fd()).map_err(|error| self.failed(inode, error))?;
        Ok(inode.node.get_or_init(|| Box::new(header)))
    }

    /// Reports damage and gives the errno.
    pub fn failed(&self, inode: &Inode, error: impl Into<ReadError>) -> Failed {
        let error = error.into();
        if let VolumeError::Damaged(damage) = error.error {
            let object = inode.dir.get().map(|dir| dir.id());
            self.volume.report(damage, object, inode.ino, error.block);
        }
        error.into()
    }

    fn now(&self) -> u64 {
        self.started.elapsed().as_secs()
    }

    /// Contents of `inode` changed: the sealer will come by.
    pub(super) fn changed(&self, inode: &Arc<Inode>, was_unsealed: bool) {
        inode.changed.store(self.now(), Ordering::Relaxed);
        if !was_unsealed {
            self.inodes.retain(inode);
            lock(&self.unsealed).insert(inode.ino, inode.clone());
        }
    }

    /// Files whose headers await sealing.
    pub fn unsealed(&self) -> usize {
        lock(&self.unsealed).len()
    }

    /// Seals quiet files now and then, until [`stop_sealer`](Self::stop_sealer). Runs on a thread of its own.
    pub fn run_sealer(&self) {
        let mut stop = lock(&self.stop);
        while !*stop {
            stop = self.stopped.wait_timeout(stop, QUIET).unwrap_or_else(PoisonError::into_inner).0;
            if *stop || self.volume.keys().sealed().is_some() {
                continue;
            }
            drop(stop);
            let horizon = self.now().saturating_sub(QUIET.as_secs());
            self.seal_files(|inode| inode.changed.load(Ordering::Relaxed) <= horizon);
            stop = lock(&self.stop);
        }
    }

    /// Ends [`run_sealer`](Self::run_sealer).
    pub fn stop_sealer(&self) {
        *lock(&self.stop) = true;
        self.stopped.notify_all();
    }

    /// Flushes and seals every file with changes. Nobody may be writing any more.
    pub fn seal_all(&self) -> usize {
        self.seal_files(|_| true)
    }

    /// Flushes the wanted files, then seals those that did not change meanwhile. Returns how many could not be sealed.
    fn seal_files(&self, wanted: impl Fn(&Inode) -> bool) -> usize {
        let batch: Vec<Arc<Inode>> = lock(&self.unsealed).values().filter(|inode| wanted(inode)).cloned().collect();
        let mut ready = Vec::new();
        for inode in batch {
            if inode.removed.load(Ordering::Relaxed) {
                self.sealed(&inode);
                continue;
            }
            let changes =
                inode.file.read().unwrap_or_else(PoisonError::into_inner).as_ref().map(|state| state.changes());
            match (changes, self.open(&inode)) {
                (Some(changes), Ok(open)) => ready.push((inode, open, changes)),
                _ => self.sealed(&inode),
            }
        }
        let by_syncfs = ready.len() >= SYNCFS_FROM;
        if by_syncfs && storage::sync_filesystem(self.volume.root().as_fd()).is_err() {
            return ready.len();
        }
        let mut left = 0;
        for (inode, open, changes) in ready {
            if !by_syncfs && storage::sync_data(open.fd.as_fd()).is_err() {
                left += 1;
                continue;
            }
            let mut guard = inode.file.write().unwrap_or_else(PoisonError::into_inner);
            let Some(state) = guard.as_mut() else { continue };
            if state.changes() != changes {
                left += 1;
            } else if let Err(error) = state.seal(&self.volume, open.fd.as_fd()) {
                left += 1;
                tracing::warn!(backing_ino = inode.ino, %error, "a header could not be sealed");
            } else {
                drop(guard);
                self.sealed(&inode);
            }
        }
        left
    }

    fn sealed(&self, inode: &Arc<Inode>) {
        // Under the content lock's shared side: a writer adds it again only after we are done.
        let guard = inode.file.read().unwrap_or_else(PoisonError::into_inner);
        if guard.as_ref().is_none_or(|state| !state.unsealed()) || inode.removed.load(Ordering::Relaxed) {
            lock(&self.unsealed).remove(&inode.ino);
            drop(guard);
            self.inodes.release(inode);
        }
    }

    /// One purge at a time. Returns whether this caller may begin.
    pub fn begin_purge(&self) -> bool {
        !self.purging.swap(true, Ordering::SeqCst)
    }
}
