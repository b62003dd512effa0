//! Inodes: what the kernel knows by a node id, and how to reach it in the backing tree.
//!
//! An object is reached through its parent and cipher name, not through a descriptor kept for each: a volume may have more
//! objects than a process may have files. Descriptors in use are cached ([`FdCache`]). An object whose last known name goes
//! away is held by a descriptor until the kernel forgets it, so that its inode number is not reused meanwhile.
//!
//! Lock order: an inode's descriptor slot, its link, then the same of its parent, upwards. A rename takes the links of the
//! two inodes it moves in order of number, having got the directories' descriptors before.

use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, Weak};

use crate::volume::dir::DirKeys;
use crate::volume::file::FileState;
use crate::volume::header::Static;

/// The root's node id (`FUSE_ROOT_ID`, include/uapi/linux/fuse.h).
pub const ROOT: u64 = 1;

/// What the plaintext object is, as far as the backing entry tells without keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    Regular,
    /// A directory.
    Directory,
    /// A symlink.
    Symlink,
    /// A node record: FIFO, socket or device.
    Node,
}

/// Where an object is.
pub enum Link {
    /// The root.
    Root(Arc<OwnedFd>),
    /// Under this cipher name in this directory. (It may have other names.)
    At {
        /// The directory.
        parent: Arc<Inode>,
        /// The name in it.
        name: Box<str>,
    },
    /// No name is known; this descriptor holds it.
    Held(Arc<OwnedFd>),
}

/// An open descriptor and whether it can write.
#[derive(Clone)]
pub struct Open {
    /// The descriptor.
    pub fd: Arc<OwnedFd>,
    /// Whether it can write.
    pub writable: bool,
}

/// An object that the kernel knows.
pub struct Inode {
    /// Node id, which is the backing inode number (but for the root).
    pub ino: u64,
    /// Kind.
    pub kind: Kind,
    /// Where it is.
    pub link: Mutex<Link>,
    /// Cached open descriptor.
    pub open: Mutex<Option<Open>>,
    /// State of a regular file, once loaded. Its lock is the file's content lock.
    pub file: RwLock<Option<Box<FileState>>>,
    /// Keys of a directory, once loaded.
    pub dir: OnceLock<Box<DirKeys>>,
    /// Header of a node record, once loaded.
    pub node: OnceLock<Box<Static>>,
    /// When contents last changed, in seconds of the mount's clock: the sealer leaves busy files alone.
    pub changed: AtomicU64,
    /// Size of a regular file as the kernel knows it, and one more; 0: it was not told yet. The kernel believes the first
    /// one it hears and then its own count, so every reply must say the same until we change the file.
    size: AtomicU64,
    /// References the kernel holds. Changed only under the table's lock.
    lookups: AtomicU64,
    /// Kept in the table although the kernel forgot it: the sealer has work with it.
    retained: AtomicBool,
    /// No name is left: nothing to seal, nothing to keep.
    pub removed: AtomicBool,
}

impl Inode {
    fn new(ino: u64, kind: Kind, link: Link) -> Self {
        Self {
            ino,
            kind,
            link: Mutex::new(link),
            open: Mutex::new(None),
            file: RwLock::new(None),
            dir: OnceLock::new(),
            node: OnceLock::new(),
            changed: AtomicU64::new(0),
            size: AtomicU64::new(0),
            lookups: AtomicU64::new(0),
            retained: AtomicBool::new(false),
            removed: AtomicBool::new(false),
        }
    }
}

impl Inode {
    /// The size that the kernel knows.
    pub fn told_size(&self) -> Option<u64> {
        self.size.load(Ordering::Relaxed).checked_sub(1)
    }

    /// What to tell the kernel: this size, unless it was told one already.
    pub fn tell_size(&self, size: u64) -> u64 {
        match self.size.compare_exchange(0, size + 1, Ordering::Relaxed, Ordering::Relaxed) {
            Ok(_) => size,
            Err(told) => told - 1,
        }
    }

    /// We made this its size. The caller holds the content lock.
    pub fn set_size(&self, size: u64) {
        self.size.store(size + 1, Ordering::Relaxed);
    }
}

/// Locks without minding a poisoner: a panic aborts the program.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

const SHARDS: usize = 16;

/// All inodes that the kernel knows.
pub struct InodeTable {
    shards: Vec<Mutex<HashMap<u64, Arc<Inode>>>>,
}

impl InodeTable {
    /// A table with the root.
    pub fn new(root: Arc<OwnedFd>) -> Self {
        let table = Self { shards: (0..SHARDS).map(|_| Mutex::new(HashMap::new())).collect() };
        let inode = Inode::new(ROOT, Kind::Directory, Link::Root(root));
        inode.lookups.store(1, Ordering::Relaxed);
        lock(table.shard(ROOT)).insert(ROOT, Arc::new(inode));
        table
    }

    fn shard(&self, ino: u64) -> &Mutex<HashMap<u64, Arc<Inode>>> {
        &self.shards[(ino % SHARDS as u64) as usize]
    }

    /// The inode with this node id, if the kernel may use it.
    pub fn get(&self, ino: u64) -> Option<Arc<Inode>> {
        lock(self.shard(ino)).get(&ino).cloned()
    }

    /// The inode found at `parent`/`name`, made if new, with one more reference of the kernel's. `None`: the kernel still
    /// knows another kind of object by that number. That cannot come from us (a number is not reused while we hold its
    /// object), and requests about the one must never be answered with the other.
    pub fn enter(&self, ino: u64, kind: Kind, parent: &Arc<Inode>, name: &str) -> Option<Arc<Inode>> {
        let inode = {
            let mut shard = lock(self.shard(ino));
            let inode = shard.entry(ino).or_insert_with(|| {
                Arc::new(Inode::new(ino, kind, Link::At { parent: parent.clone(), name: name.into() }))
            });
            if inode.kind != kind {
                if inode.lookups.load(Ordering::Relaxed) > 0 {
                    return None;
                }
                *inode = Arc::new(Inode::new(ino, kind, Link::At { parent: parent.clone(), name: name.into() }));
            }
            inode.lookups.fetch_add(1, Ordering::Relaxed);
            inode.clone()
        };
        // An object that was only held has a name again.
        let mut link = lock(&inode.link);
        if matches!(*link, Link::Held(_)) {
            *link = Link::At { parent: parent.clone(), name: name.into() };
            inode.removed.store(false, Ordering::Relaxed);
        }
        drop(link);
        Some(inode)
    }

    /// The kernel gave back `count` references.
    pub fn forget(&self, ino: u64, count: u64) {
        if ino == ROOT {
            return;
        }
        let dropped = {
            let mut shard = lock(self.shard(ino));
            let Some(inode) = shard.get(&ino) else { return };
            let left = inode.lookups.load(Ordering::Relaxed).saturating_sub(count);
            inode.lookups.store(left, Ordering::Relaxed);
            let keep = left > 0 || (inode.retained.load(Ordering::Relaxed) && !inode.removed.load(Ordering::Relaxed));
            if keep { None } else { shard.remove(&ino) }
        };
        // Outside the lock: the last reference to a parent may go with it, and so on upwards.
        drop(dropped);
    }

    /// Keeps an inode in the table even if the kernel forgets it, until [`release`](Self::release).
    pub fn retain(&self, inode: &Arc<Inode>) {
        inode.retained.store(true, Ordering::Relaxed);
    }

    /// Ends [`retain`](Self::retain).
    pub fn release(&self, inode: &Arc<Inode>) {
        let mut shard = lock(self.shard(inode.ino));
        inode.retained.store(false, Ordering::Relaxed);
        if inode.lookups.load(Ordering::Relaxed) == 0
            && shard.get(&inode.ino).is_some_and(|held| Arc::ptr_eq(held, inode))
        {
            shard.remove(&inode.ino);
        }
    }

    /// Every node id the kernel may have cached something for.
    pub fn all(&self) -> Vec<u64> {
        self.shards.iter().flat_map(|shard| lock(shard).keys().copied().collect::<Vec<_>>()).collect()
    }

    /// How many inodes there are.
    pub fn len(&self) -> usize {
        self.shards.iter().map(|shard| lock(shard).len()).sum()
    }

    /// Whether only the root is known.
    pub fn is_empty(&self) -> bool {
        self.len() <= 1
    }
}

/// Bounds the number of cached descriptors: first opened, first closed.
pub struct FdCache {
    open: Mutex<VecDeque<Weak<Inode>>>,
    limit: usize,
}

impl FdCache {
    /// For at most about `limit` descriptors.
    pub fn new(limit: usize) -> Self {
        Self { open: Mutex::new(VecDeque::new()), limit: limit.max(16) }
    }

    /// An inode has just opened one. The caller holds no descriptor slot.
    pub fn opened(&self, inode: &Arc<Inode>) {
        let mut evicted = Vec::new();
        {
            let mut open = lock(&self.open);
            open.push_back(Arc::downgrade(inode));
            while open.len() > self.limit {
                evicted.extend(open.pop_front().and_then(|weak| weak.upgrade()));
            }
        }
        for old in evicted {
            // Busy: it will come round again with its next opening.
            if let Ok(mut slot) = old.open.try_lock() {
                *slot = None;
            }
        }
    }

    /// Descriptors cached, at most.
    pub fn len(&self) -> usize {
        lock(&self.open).len()
    }

    /// Whether none is cached.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
