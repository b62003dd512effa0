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
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, Weak};

use rustix::fs::Timespec;

use crate::sys::shared_list::{Entry, SharedList};
use crate::volume::dir::DirKeys;
use crate::volume::file::FileState;
use crate::volume::header::Static;

/// The root's node id (`FUSE_ROOT_ID`, include/uapi/linux/fuse.h).
pub const ROOT: u64 = 1;

/// Of a longer path, only the end is told.
const LONGEST_PATH: usize = 4096;

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
    /// Only while the inode is dropped.
    Gone,
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
    /// A flush failed that was not a program's, with this errno (0: none did): the next fsync has to say so.
    pub sync_failed: AtomicI32,
    /// No name is left: nothing to seal, nothing to keep.
    pub removed: AtomicBool,
    /// A new file whose name no flush has covered yet, as far as is known. It was given after the making, so fdatasync need
    /// not bring it to the medium.
    pub unnamed: AtomicBool,
    /// Rises when data that the kernel held was refused: what it still holds of the object is then not the object any more,
    /// and descriptors that are open get `EIO` (fuse_stale_inode in fs/fuse/fuse_i.h).
    pub generation: AtomicU64,
    /// The time of modification that the kernel set last, where it keeps that itself: a write that comes after it only brings
    /// what a program wrote before it. Set under the content lock.
    pub told_mtime: Mutex<Option<Timespec>>,
    /// Its place in the supervisor's list.
    _listed: Option<Entry>,
}

impl Inode {
    fn new(ino: u64, kind: Kind, link: Link, listed: Option<Entry>) -> Self {
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
            sync_failed: AtomicI32::new(0),
            removed: AtomicBool::new(false),
            unnamed: AtomicBool::new(false),
            generation: AtomicU64::new(0),
            told_mtime: Mutex::new(None),
            _listed: listed,
        }
    }
}

impl Inode {
    /// Whether nobody needs it in the table: not the kernel, not the sealer, and for a directory no inode below it, all
    /// references but `own` being theirs. The caller holds the table's lock.
    fn idle(self: &Arc<Self>, own: usize) -> bool {
        if self.ino == ROOT || self.lookups.load(Ordering::Relaxed) > 0 {
            return false;
        }
        if self.removed.load(Ordering::Relaxed) {
            return true;
        }
        let needed_below = self.kind == Kind::Directory && Arc::strong_count(self) > own;
        !needed_below && !self.retained.load(Ordering::Relaxed)
    }

    /// The directory that it is known to be in.
    fn parent(&self) -> Option<Arc<Self>> {
        match &*lock(&self.link) {
            Link::At { parent, .. } => Some(parent.clone()),
            Link::Root(_) | Link::Held(_) | Link::Gone => None,
        }
    }

    /// Where it lies below the backing root, in backing names, for events. `None`: under no name that is known. Takes one link
    /// at a time; the caller holds none.
    pub fn backing_path(&self) -> Option<String> {
        let mut names: Vec<Box<str>> = Vec::new();
        let mut chars = 0;
        let mut next = None::<Arc<Self>>;
        loop {
            let up = match &*lock(&next.as_deref().unwrap_or(self).link) {
                Link::Root(_) => break,
                Link::Held(_) | Link::Gone => return None,
                Link::At { parent, name } => {
                    chars += name.len() + 1;
                    names.push(name.clone());
                    parent.clone()
                }
            };
            next = Some(up);
            // A tree that a program made deep must not fill the log.
            if chars > LONGEST_PATH {
                names.push("...".into());
                break;
            }
        }
        names.reverse();
        Some(names.join("/"))
    }

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

/// Lets go of the chain of parents link by link: dropped one within the other, a deep tree would overflow the stack.
impl Drop for Inode {
    fn drop(&mut self) {
        fn take(inode: &mut Inode) -> Option<Arc<Inode>> {
            let link = inode.link.get_mut().unwrap_or_else(PoisonError::into_inner);
            match std::mem::replace(link, Link::Gone) {
                Link::At { parent, .. } => Some(parent),
                Link::Root(_) | Link::Held(_) | Link::Gone => None,
            }
        }
        let mut next = take(self);
        while let Some(mut parent) = next.and_then(Arc::into_inner) {
            next = take(&mut parent);
        }
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
    /// What the kernel may cache, for whoever purges it if this process dies.
    list: Option<Arc<SharedList>>,
}

impl InodeTable {
    /// A table with the root.
    pub fn new(root: Arc<OwnedFd>, list: Option<Arc<SharedList>>) -> Self {
        let table = Self { shards: (0..SHARDS).map(|_| Mutex::new(HashMap::new())).collect(), list };
        let inode = Inode::new(ROOT, Kind::Directory, Link::Root(root), table.listed(ROOT));
        inode.lookups.store(1, Ordering::Relaxed);
        lock(table.shard(ROOT)).insert(ROOT, Arc::new(inode));
        table
    }

    fn listed(&self, ino: u64) -> Option<Entry> {
        let entry = self.list.as_ref()?.add(ino);
        if entry.is_none() {
            tracing::error!("the supervisor's list of inodes is full: it would not purge all of them");
        }
        entry
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
                Arc::new(Inode::new(
                    ino,
                    kind,
                    Link::At { parent: parent.clone(), name: name.into() },
                    self.listed(ino),
                ))
            });
            if inode.kind != kind {
                if inode.lookups.load(Ordering::Relaxed) > 0 {
                    return None;
                }
                let link = Link::At { parent: parent.clone(), name: name.into() };
                *inode = Arc::new(Inode::new(ino, kind, link, self.listed(ino)));
            }
            inode.lookups.fetch_add(1, Ordering::Relaxed);
            inode.clone()
        };
        // Where it was found just now is where it is: an object that was only held has a name again, and one that somebody
        // moved behind our back is not looked for in its old place.
        let mut link = lock(&inode.link);
        let old = match &*link {
            Link::At { parent: p, name: n } if Arc::ptr_eq(p, parent) && **n == *name => None,
            Link::Root(_) => None,
            Link::At { .. } | Link::Held(_) | Link::Gone => {
                Some(std::mem::replace(&mut *link, Link::At { parent: parent.clone(), name: name.into() }))
            }
        };
        drop(link);
        if matches!(old, Some(Link::Held(_))) {
            inode.removed.store(false, Ordering::Relaxed);
        }
        Some(inode)
    }

    /// The kernel gave back `count` references.
    ///
    /// Returns the inode if it left the table, for [`let_go`](Self::let_go). A directory stays while an inode below it does:
    /// were it found anew meanwhile, there would be two of it, and a rename would reach only one.
    pub fn forget(&self, ino: u64, count: u64) -> Option<Arc<Inode>> {
        if ino == ROOT {
            return None;
        }
        let mut shard = lock(self.shard(ino));
        let inode = shard.get(&ino)?;
        let left = inode.lookups.load(Ordering::Relaxed).saturating_sub(count);
        inode.lookups.store(left, Ordering::Relaxed);
        if inode.idle(1) { shard.remove(&ino) } else { None }
    }

    /// Drops an inode that left the table or a list, and takes directories above it out of the table that only it kept there.
    /// The caller holds no lock.
    pub fn let_go(&self, inode: Arc<Inode>) {
        let mut next = inode.parent();
        drop(inode);
        while let Some(directory) = next {
            let left = {
                let mut shard = lock(self.shard(directory.ino));
                let ours = shard.get(&directory.ino).is_some_and(|held| Arc::ptr_eq(held, &directory));
                // The table's reference and this one.
                if ours && directory.idle(2) { shard.remove(&directory.ino) } else { None }
            };
            next = left.and_then(|gone| gone.parent());
        }
    }

    /// Keeps an inode in the table even if the kernel forgets it, until [`release`](Self::release).
    pub fn retain(&self, inode: &Arc<Inode>) {
        inode.retained.store(true, Ordering::Relaxed);
    }

    /// Ends [`retain`](Self::retain).
    pub fn release(&self, inode: &Arc<Inode>) {
        let mut shard = lock(self.shard(inode.ino));
        inode.retained.store(false, Ordering::Relaxed);
        // Regular files only: they are what the sealer works with.
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
            match old.open.try_lock() {
                Ok(mut slot) => *slot = None,
                // Busy: it stays counted.
                Err(_) => lock(&self.open).push_back(Arc::downgrade(&old)),
            }
        }
    }

    /// Descriptors cached, at most.
    pub fn len(&self) -> usize {
        lock(&self.open).iter().filter(|inode| inode.strong_count() > 0).count()
    }

    /// Whether none is cached.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root() -> Arc<Inode> {
        let fd = std::fs::File::open("/").unwrap();
        Arc::new(Inode::new(ROOT, Kind::Directory, Link::Root(Arc::new(fd.into())), None))
    }

    fn below(parent: &Arc<Inode>, name: &str) -> Arc<Inode> {
        Arc::new(Inode::new(2, Kind::Directory, Link::At { parent: parent.clone(), name: name.into() }, None))
    }

    #[test]
    fn a_path_is_told_from_the_root_down_and_of_what_has_no_name_none() {
        let root = root();
        let (a, b) = (below(&root, "AbC"), below(&below(&root, "AbC"), "XyZ"));
        assert_eq!(root.backing_path().unwrap(), "");
        assert_eq!(a.backing_path().unwrap(), "AbC");
        assert_eq!(b.backing_path().unwrap(), "AbC/XyZ");
        *lock(&a.link) = Link::Gone;
        assert_eq!(below(&a, "XyZ").backing_path(), None);
    }

    #[test]
    fn a_number_means_one_kind_for_as_long_as_the_kernel_knows_it() {
        let Link::Root(fd) = std::mem::replace(&mut *lock(&root().link), Link::Gone) else { unreachable!() };
        let table = InodeTable::new(fd, None);
        let root = table.get(ROOT).unwrap();
        assert!(table.enter(7, Kind::Regular, &root, "a").is_some());
        assert!(table.enter(7, Kind::Directory, &root, "b").is_none());
        assert!(table.enter(7, Kind::Regular, &root, "b").is_some());
        table.forget(7, 2);
        assert_eq!(table.enter(7, Kind::Directory, &root, "b").unwrap().kind, Kind::Directory);
    }

    #[test]
    fn of_a_path_without_end_the_end_is_told() {
        let mut at = root();
        for _ in 0..50_000 {
            at = below(&at, "0123456789");
        }
        let path = at.backing_path().unwrap();
        assert!(path.starts_with(".../0123456789/") && path.ends_with("/0123456789"), "{path}");
        assert!(path.len() < LONGEST_PATH + 300, "{}", path.len());
        // And one that bites its own tail ends, too.
        *lock(&at.link) = Link::At { parent: at.clone(), name: "x".into() };
        assert!(at.backing_path().unwrap().starts_with(".../x/x"));
        *lock(&at.link) = Link::Gone;
    }
}
