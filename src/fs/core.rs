//! What the operations share: the filesystem's state, reaching objects, and sealing files that have gone quiet.

use std::collections::HashMap;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use rustix::fs::{Timespec, Timestamps, UTIME_OMIT};

use super::errno::Failed;
use super::gate::Gate;
use super::inode::{FdCache, Inode, InodeTable, Kind, Link, Open, lock};
use super::owed::Owed;
use super::scrub::Scrub;
use crate::keyring::Dek;
use crate::sys::shared_list::SharedList;
use crate::volume::dir::DirKeys;
use crate::volume::events::Limiter;
use crate::volume::file::FileState;
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
/// How long a logged change waits at most before it is brought to the medium and put in place.
const COMMIT: Duration = Duration::from_secs(1);
/// Levels of directories between the root and an object: far beyond what path names of programs reach, and a bound on
/// what a tree that somebody tied into a knot in the backing store costs.
const DEEPEST: usize = 100_000;
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
    /// Workers that ended while the mount was there.
    pub lost_workers: AtomicU64,
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
    /// The kernel keeps times of files itself (its writeback cache is on) and tells us.
    pub kernel_keeps_times: AtomicBool,
    /// Counters.
    pub counters: Counters,
    /// Who may pass.
    pub gate: Gate,
    /// Replies that a seal may refuse.
    pub owed: Owed,
    /// Workers overwrite what passed through them.
    pub scrub: Scrub,
    /// Who we are: files made by others are handed over to them.
    pub owner: Caller,
    pub(super) started: Instant,
    /// Limits what the sealer says of files that it comes back to every few seconds.
    pub(super) grumbles: Limiter,
    unsealed: Mutex<HashMap<u64, Arc<Inode>>>,
    /// Files with changes that are logged and not yet in place.
    pending: Mutex<HashMap<u64, Arc<Inode>>>,
    /// Held by whoever puts logged changes in place.
    committing: Mutex<()>,
    /// Held by whoever makes room in the log.
    checkpointing: Mutex<()>,
    stop: Mutex<bool>,
    stopped: Condvar,
}

impl Filesystem {
    /// Over an open volume, with at most about `fds` descriptors cached.
    pub fn new(volume: Volume, fds: usize, acl: bool) -> Self {
        Self::listing(volume, fds, acl, None)
    }

    /// The same, with a list of what the kernel may cache.
    pub fn listing(volume: Volume, fds: usize, acl: bool, list: Option<Arc<SharedList>>) -> Self {
        let inodes = InodeTable::new(volume.root().clone(), list);
        if let Some(root) = inodes.get(super::inode::ROOT) {
            let _ = root.dir.set(Box::new(volume.root_dir().clone()));
        }
        Self {
            volume,
            inodes,
            fds: FdCache::new(fds),
            acl,
            kernel_keeps_times: AtomicBool::new(false),
            counters: Counters::default(),
            gate: Gate::default(),
            owed: Owed::default(),
            scrub: Scrub::default(),
            owner: Caller { uid: rustix::process::geteuid().as_raw(), gid: rustix::process::getegid().as_raw() },
            started: Instant::now(),
            grumbles: Limiter::default(),
            unsealed: Mutex::new(HashMap::new()),
            pending: Mutex::new(HashMap::new()),
            committing: Mutex::new(()),
            checkpointing: Mutex::new(()),
            stop: Mutex::new(false),
            stopped: Condvar::new(),
        }
    }

    /// The inode with this node id.
    ///
    /// # Errors
    /// `ESTALE` for one that the kernel should have forgotten.
    pub fn inode(&self, ino: u64) -> Outcome<Arc<Inode>> {
        self.inodes.get(ino).ok_or(Failed::raw(libc::ESTALE))
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
        // Ancestors first, from the top: a recursion would need stack for each level of a tree that a program made deep.
        let mut chain = Vec::new();
        let mut at = inode.clone();
        loop {
            let up = match &*lock(&at.link) {
                Link::At { parent, .. } => parent.clone(),
                Link::Root(_) | Link::Held(_) | Link::Gone => break,
            };
            if lock(&up.open).is_some() {
                break;
            }
            if chain.len() >= DEEPEST {
                return Err(Failed::raw(libc::ELOOP));
            }
            chain.push(up.clone());
            at = up;
        }
        // Each keeps the next one's parent open whatever the cache evicts meanwhile.
        let mut kept = None;
        for ancestor in chain.into_iter().rev() {
            kept = Some(self.open_below_open(&ancestor)?);
        }
        let opened = self.open_below_open(inode);
        drop(kept);
        opened
    }

    /// [`open`](Self::open) of an inode whose parent has a cached descriptor (or it opens that, too).
    fn open_below_open(&self, inode: &Arc<Inode>) -> Outcome<Open> {
        if let Link::Root(fd) = &*lock(&inode.link) {
            return Ok(Open { fd: fd.clone(), writable: false });
        }
        let opened = {
            let mut slot = lock(&inode.open);
            if let Some(open) = &*slot {
                return Ok(open.clone());
            }
            let open = self.reach(inode)?;
            if inode.kind == Kind::Regular && !open.writable && !self.volume.read_only() {
                // Not kept: the backing filesystem may be writable again the next time.
                return Ok(open);
            }
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
            Link::Gone => Err(Errno::STALE),
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
        let wanted = inode.kind == Kind::Regular && !self.volume.read_only();
        match try_open(wanted) {
            Ok(fd) => Ok(Open { fd, writable: wanted }),
            Err(Errno::ROFS | Errno::PERM | Errno::TXTBSY) if wanted => {
                Ok(Open { fd: try_open(false)?, writable: false })
            }
            // An ordinary user's own object without the permission that our upkeep needs. The kernel has checked the caller's
            // rights against the mode already.
            Err(Errno::ACCESS) if inode.kind == Kind::Directory => {
                // Enough for everything but listing, for which the kernel wants the read permission that is not there.
                Ok(Open { fd: self.hold_link(&link)?, writable: false })
            }
            Err(Errno::ACCESS) => {
                let held = self.hold_link(&link)?;
                let mode = storage::stat_fd(held.as_fd())?.st_mode;
                storage::chmod_held(held.as_fd(), mode | 0o600)?;
                let fd = storage::reopen(held.as_fd(), wanted);
                storage::chmod_held(held.as_fd(), mode)?;
                Ok(Open { fd: Arc::new(fd?), writable: wanted })
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
            Link::Gone => Err(Failed::raw(libc::ESTALE)),
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
            // Left unsealed by an unclean end: sealed again once it is quiet, so that it is vouched for.
            let unsealed = state.unsealed() && open.writable;
            *guard = Some(Box::new(state));
            if unsealed {
                // Nor is it known whether its name was flushed.
                inode.unnamed.store(true, Ordering::SeqCst);
                self.changed(inode, false);
            }
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

    /// The kernel gave back references. A removed file that it forgot is nothing to seal: its descriptor and its blocks are
    /// free at once, not when the sealer comes by.
    pub fn forget(&self, ino: u64, count: u64) {
        let Some(inode) = self.inodes.forget(ino, count) else { return };
        if inode.removed.load(Ordering::Relaxed) {
            let mut unsealed = lock(&self.unsealed);
            if unsealed.get(&ino).is_some_and(|held| Arc::ptr_eq(held, &inode)) {
                unsealed.remove(&ino);
            }
            drop(unsealed);
            self.not_pending(&inode);
        }
        self.inodes.let_go(inode);
    }

    /// Before a change of a file whose content lock the caller holds: it may have something pending from now on. Before,
    /// so that whoever empties the log waits for the lock and then finds it.
    pub(super) fn note_pending(&self, inode: &Arc<Inode>) {
        if self.volume.log().is_some() {
            lock(&self.pending).insert(inode.ino, inode.clone());
        }
    }

    /// Nothing of this inode is pending any more.
    fn not_pending(&self, inode: &Arc<Inode>) {
        let mut pending = lock(&self.pending);
        if pending.get(&inode.ino).is_some_and(|held| Arc::ptr_eq(held, inode)) {
            pending.remove(&inode.ino);
        }
    }

    /// A flush of the backing filesystem or of a file in it. After a failure the log gives nothing up any more.
    pub(super) fn flushed_in_place(&self, result: Result<(), Errno>) -> Result<(), Errno> {
        if let (Err(_), Some(log)) = (&result, self.volume.log()) {
            log.keep();
        }
        result
    }

    /// Brings the log to the medium and puts everything in place whose record is there.
    ///
    /// # Errors
    /// The backing filesystem's. What could not be put in place stays pending and is tried again; the file's next fsync
    /// says so.
    pub fn commit(&self) -> Outcome<()> {
        let Some(log) = self.volume.log() else { return Ok(()) };
        let _alone = lock(&self.committing);
        let batch: Vec<Arc<Inode>> = lock(&self.pending).values().cloned().collect();
        if batch.is_empty() {
            return Ok(());
        }
        log.flush(log.end())?;
        let flushed = log.flushed();
        let mut result = Ok(());
        for inode in batch {
            let applied = self.open(&inode).and_then(|open| {
                let mut guard = inode.file.write().unwrap_or_else(PoisonError::into_inner);
                let done = guard.as_mut().map_or(Ok(true), |state| state.apply(open.fd.as_fd(), flushed));
                if done == Ok(true) {
                    // Under the content lock: a writer notes the file anew before it changes anything.
                    self.not_pending(&inode);
                }
                Ok(done.map(drop)?)
            });
            match applied {
                Ok(()) => self.inodes.let_go(inode),
                // Nothing of it is left to put anywhere.
                Err(failed) if failed.errno() == libc::ESTALE && inode.removed.load(Ordering::Relaxed) => {
                    self.not_pending(&inode);
                }
                // Taken away or swapped in the backing store under us: one file's loss, not everybody's.
                Err(failed)
                    if matches!(
                        failed.errno(),
                        libc::ENOENT | libc::ELOOP | libc::ENXIO | libc::ENOTDIR | libc::ESTALE
                    ) =>
                {
                    inode.sync_failed.store(libc::EIO, Ordering::SeqCst);
                    self.failed(&inode, VolumeError::Damaged(Damage::Planted));
                    self.not_pending(&inode);
                }
                Err(failed) => {
                    inode.sync_failed.store(failed.errno(), Ordering::SeqCst);
                    self.grumble(inode.ino, failed, "logged changes are not in place yet");
                    result = Err(failed);
                }
            }
        }
        result
    }

    /// Makes sure that the log has room for a request. The caller holds no lock.
    ///
    /// # Errors
    /// The backing filesystem's: what is logged cannot be put in place, so nothing more can be logged.
    pub(super) fn room(&self) -> Outcome<()> {
        match self.volume.log() {
            Some(log) if log.is_full() => self.checkpoint(),
            _ => Ok(()),
        }
    }

    /// Empties the log: everything in it is put in place and flushed there.
    ///
    /// # Errors
    /// As [`room`](Self::room).
    pub fn checkpoint(&self) -> Outcome<()> {
        let Some(log) = self.volume.log() else { return Ok(()) };
        let _alone = lock(&self.checkpointing);
        if !log.is_full() && !log.is_short() {
            return Ok(()); // somebody else did it while we waited
        }
        self.commit()?;
        // A checkpoint that failed before may have got this far.
        if log.oldest() == log.generation() {
            log.switch()?;
        }
        // What was logged between the two is in the old file, too.
        self.commit()?;
        self.flushed_in_place(storage::sync_filesystem(self.volume.root().as_fd()))?;
        Ok(log.retire()?)
    }

    /// The clean end: everything logged is in place and on the medium, and the log is gone.
    ///
    /// # Errors
    /// The backing filesystem's. The log is then still there, for the next mount.
    pub fn end_log(&self) -> Outcome<()> {
        if self.volume.log().is_none() {
            return Ok(());
        }
        self.commit()?;
        self.flushed_in_place(storage::sync_filesystem(self.volume.root().as_fd()))?;
        if self.volume.log().is_some_and(crate::volume::log::Log::is_kept) {
            return Err(Failed::raw(libc::EIO));
        }
        Ok(crate::volume::log::remove(self.volume.root().as_fd())?)
    }

    /// Files whose headers await sealing.
    pub fn unsealed(&self) -> usize {
        lock(&self.unsealed).len()
    }

    /// Seals quiet files now and then, until [`stop_sealer`](Self::stop_sealer). Runs on a thread of its own.
    pub fn run_sealer(&self) {
        let mut stop = lock(&self.stop);
        let (mut ticks, mut lost) = (0, 0);
        while !*stop {
            stop = self.stopped.wait_timeout(stop, COMMIT).unwrap_or_else(PoisonError::into_inner).0;
            if *stop {
                continue;
            }
            drop(stop);
            let workers = self.counters.lost_workers.load(Ordering::Relaxed);
            if workers > lost {
                tracing::error!(
                    workers,
                    "a worker has ended with an error: the mount goes on with fewer; unmount it and mount it again"
                );
                lost = workers;
            }
            ticks += 1;
            if ticks % (QUIET.as_secs() / COMMIT.as_secs()) == 0 && self.volume.keys().sealed().is_none() {
                let horizon = self.now().saturating_sub(QUIET.as_secs());
                self.seal_files(|inode| inode.changed.load(Ordering::Relaxed) <= horizon);
            } else {
                // Needs no key. What fails is tried again, and told to whoever flushes.
                let _ = self.commit();
            }
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
        // Files of which something stays pending are left out below; the others are sealed.
        let committed = self.commit();
        let mut left = 0;
        let mut mended = Vec::with_capacity(batch.len());
        for inode in batch {
            if inode.removed.load(Ordering::Relaxed) {
                self.sealed(inode);
            } else if let Err(failed) = self.mend(&inode) {
                left += 1;
                self.grumble(inode.ino, failed, "a file cannot be sealed");
            } else {
                mended.push(inode);
            }
        }
        // What was mended.
        if let Err(failed) = committed.and(self.commit()) {
            tracing::warn!(
                errno = failed.errno(),
                "some of the log cannot be put in place: those files are not sealed"
            );
        }
        for inode in mended {
            let state = inode.file.read().unwrap_or_else(PoisonError::into_inner);
            // Only what is all in place is covered by the flush that comes now.
            let changes = state.as_ref().map(|state| (state.changes(), state.pending().is_some()));
            drop(state);
            match changes {
                Some((changes, false)) => ready.push((inode, changes)),
                Some((_, true)) => left += 1,
                None => self.sealed(inode),
            }
        }
        let by_syncfs = ready.len() >= SYNCFS_FROM;
        if by_syncfs && let Err(errno) = self.flushed_in_place(storage::sync_filesystem(self.volume.root().as_fd())) {
            // The kernel reports a lost write once: whoever asks for these files next must hear of it.
            for (inode, _) in &ready {
                inode.sync_failed.store(errno.raw_os_error(), Ordering::SeqCst);
            }
            return left + ready.len();
        }
        // One descriptor at a time: the batch may be larger than the process's limit.
        for (inode, changes) in ready {
            let ino = inode.ino;
            if let Err(failed) = self.seal_file(inode, changes, by_syncfs) {
                left += 1;
                self.grumble(ino, failed, "a header could not be sealed yet");
            }
        }
        // What sealing logged: that earlier cuts are settled.
        if let Some(log) = self.volume.log()
            && let Err(errno) = log.flush(log.end())
        {
            tracing::warn!(%errno, "the log cannot be flushed");
        }
        left
    }

    /// A file that a crash left unsealed: what it tore becomes what it reads as, before that is flushed and vouched for.
    fn mend(&self, inode: &Arc<Inode>) -> Outcome<()> {
        let recovered = |state: &Option<Box<FileState>>| state.as_ref().is_some_and(|state| state.recovered());
        if !recovered(&inode.file.read().unwrap_or_else(PoisonError::into_inner)) {
            return Ok(());
        }
        self.with_room(|| {
            let open = self.open(inode)?;
            let mut guard = inode.file.write().unwrap_or_else(PoisonError::into_inner);
            self.note_pending(inode);
            match guard.as_mut() {
                Some(state) => state.mend(&self.volume, open.fd.as_fd()).map_err(|error| self.failed(inode, error)),
                None => Ok(()),
            }
        })
    }

    /// Seals one file if it has not changed since `changes` was read, before the flush.
    fn seal_file(&self, inode: Arc<Inode>, changes: u64, flushed: bool) -> Outcome<()> {
        let open = self.open(&inode)?;
        if !flushed {
            let unnamed = inode.unnamed.load(Ordering::SeqCst);
            let flush = if unnamed { storage::sync_fd } else { storage::sync_data };
            self.flushed_in_place(flush(open.fd.as_fd()))
                .inspect_err(|errno| inode.sync_failed.store(errno.raw_os_error(), Ordering::SeqCst))?;
        }
        inode.unnamed.store(false, Ordering::SeqCst);
        let mut guard = inode.file.write().unwrap_or_else(PoisonError::into_inner);
        let Some(state) = guard.as_mut() else { return Ok(()) };
        if state.changes() != changes {
            return Err(Failed::raw(libc::EBUSY));
        }
        state.seal(&self.volume, open.fd.as_fd())?;
        if let Some(last_modification) = *lock(&inode.told_mtime) {
            let last_access = Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT };
            let _ = storage::set_times_fd(open.fd.as_fd(), &Timestamps { last_access, last_modification });
        }
        drop(guard);
        self.sealed(inode);
        Ok(())
    }

    /// Ends the sealer's interest in an inode, if there is nothing left to seal.
    fn sealed(&self, inode: Arc<Inode>) {
        // Under the content lock's shared side: a writer adds it again only after we are done.
        let guard = inode.file.read().unwrap_or_else(PoisonError::into_inner);
        if guard.as_ref().is_none_or(|state| !state.unsealed()) || inode.removed.load(Ordering::Relaxed) {
            lock(&self.unsealed).remove(&inode.ino);
            // Before the guard goes: a writer that waits for it would retain the inode anew, and we would undo that.
            self.inodes.release(&inode);
        }
        drop(guard);
        self.inodes.let_go(inode);
    }
}

#[cfg(test)]
mod tests;
