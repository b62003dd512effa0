//! The volume: format 1 on a backing directory. Knows objects, names and blocks; knows no inode numbers of FUSE, no kernel.
//!
//! - [`meta`] the volume file; [`format`](mod@format) constants and arithmetic;
//! - [`header`] static and mutable headers; [`names`] encrypted names; [`content`] blocks;
//! - [`file`] a regular file: reading, writing, floor and seal; [`dir`] directories; [`link`] symlinks; [`node`] FIFOs and
//!   devices; [`xattr`] extended attributes;
//! - [`log`] the intent log, [`replay`] what is done with it after a crash;
//! - [`rewrap`] wraps DEKs anew under another KEK version;
//! - [`check`](mod@check) looks everything over, [`repair`](mod@repair) does what can be done about what was found;
//! - [`events`] what is told of damage; [`storage`] every system call on the backing directory.

pub mod check;
pub mod content;
pub mod dir;
pub mod events;
pub mod file;
pub mod format;
pub mod header;
pub mod link;
pub mod log;
pub mod meta;
pub mod names;
pub mod node;
mod overlay;
pub mod repair;
pub mod replay;
pub mod rewrap;
pub mod storage;
#[cfg(test)]
pub(crate) mod testing;
pub mod xattr;

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::audit::Sink;
use crate::crypto::{ObjectId, VolumeId};
use crate::keyring::{Keyring, KeyringError};
use storage::Errno;

/// Why an operation on the volume failed.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// The backing filesystem's own answer.
    #[error("backing filesystem: {0}")]
    Backing(#[from] Errno),
    /// Something on disk is not what we wrote there.
    #[error("{0}")]
    Damaged(Damage),
    /// The keys are not to be had.
    #[error(transparent)]
    Keyring(#[from] KeyringError),
    /// A name longer than 255 bytes, a symlink target longer than 4,095, a label too long for its place.
    #[error("name too long")]
    NameTooLong,
    /// A name or target that cannot be.
    #[error("invalid name")]
    InvalidName,
    /// An attribute name or value that does not fit.
    #[error("extended attribute too large")]
    AttributeTooLarge,
    /// A file beyond the largest size.
    #[error("file too large")]
    TooLarge,
    /// An object on another filesystem than the backing root.
    #[error("the backing tree crosses into another filesystem")]
    CrossesDevices,
}

/// What is wrong on disk, in one word for events and counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, thiserror::Error)]
#[serde(rename_all = "kebab-case")]
pub enum Damage {
    /// No static header opens.
    #[error("the header is damaged, forged, or from another volume")]
    Header,
    /// No mutable header opens.
    #[error("the mutable header is damaged")]
    MutableHeader,
    /// A genuine header of another type of object.
    #[error("the header belongs to another type of object")]
    Type,
    /// A block does not authenticate.
    #[error("a block is damaged, moved or forged")]
    Block,
    /// Shorter than its floor or its sealed size.
    #[error("the file is cut off")]
    Truncated,
    /// Longer than its sealed size.
    #[error("the file is longer than it was sealed")]
    Extended,
    /// A name that does not decrypt, or to something that is no name.
    #[error("a name is damaged or forged")]
    Name,
    /// A symlink target that does not open.
    #[error("the symlink is damaged or forged")]
    Link,
    /// An extended attribute that does not open.
    #[error("an extended attribute is damaged or forged")]
    Attribute,
    /// A backing object of a type that we never make.
    #[error("an object was planted in the backing directory")]
    Planted,
    /// Records of the intent log that were on the medium are not there any more, or do not open.
    #[error("the intent log is damaged")]
    Log,
    /// The root directory is not this volume's.
    #[error("the root directory's header is not this volume's")]
    Root,
}

/// An open volume.
pub struct Volume {
    id: VolumeId,
    keys: Keyring,
    root: Arc<OwnedFd>,
    root_dir: dir::DirKeys,
    path: PathBuf,
    device: u64,
    read_only: bool,
    log: Option<log::Log>,
    integrity_failures: AtomicU64,
    events: events::Limiter,
    opened: Instant,
    audit: Option<Arc<Sink>>,
}

impl Volume {
    /// Makes the root directory's header in a new, empty backing directory.
    ///
    /// # Errors
    /// The ring's or the backing filesystem's.
    pub fn create_root(backing: impl AsFd, keys: &Keyring, root: ObjectId) -> Result<(), VolumeError> {
        let keys = dir::DirKeys::make(keys, root)?;
        storage::symlink(backing.as_fd(), format::DIR_HEADER, keys.header_text().as_bytes())?;
        Ok(storage::sync_fd(backing.as_fd())?)
    }

    /// Opens an authenticated volume: checks the root's header against `body.root_id`.
    ///
    /// # Errors
    /// [`Damage::Root`], the ring's, or the backing filesystem's.
    pub fn open(
        backing: OwnedFd,
        backing_path: &Path,
        body: &meta::Body,
        keys: Keyring,
        read_only: bool,
    ) -> Result<Self, VolumeError> {
        let root_dir = dir::DirKeys::load(backing.as_fd(), &keys).map_err(|error| match error {
            VolumeError::Damaged(_) => VolumeError::Damaged(Damage::Root),
            VolumeError::Backing(errno) if errno == Errno::NOENT => VolumeError::Damaged(Damage::Root),
            other => other,
        })?;
        if root_dir.id() != body.root_id {
            return Err(VolumeError::Damaged(Damage::Root));
        }
        Self::with_root(backing, backing_path, body, keys, read_only, root_dir)
    }

    /// [`open`](Self::open) for [`check`](mod@check), also where the root's header is lost. Nothing is written.
    ///
    /// # Errors
    /// The ring's, or the backing filesystem's.
    pub fn open_to_check(
        backing: OwnedFd,
        backing_path: &Path,
        body: &meta::Body,
        keys: Keyring,
    ) -> Result<Self, VolumeError> {
        // Where there is none, any will do: no name will decrypt.
        let root_dir = match dir::DirKeys::load(backing.as_fd(), &keys) {
            Ok(root_dir) if root_dir.id() == body.root_id => root_dir,
            Ok(_) | Err(VolumeError::Damaged(_)) => dir::DirKeys::make(&keys, body.root_id)?,
            Err(error) => return Err(error),
        };
        Self::with_root(backing, backing_path, body, keys, true, root_dir)
    }

    fn with_root(
        backing: OwnedFd,
        backing_path: &Path,
        body: &meta::Body,
        keys: Keyring,
        read_only: bool,
        root_dir: dir::DirKeys,
    ) -> Result<Self, VolumeError> {
        let device = storage::stat_fd(backing.as_fd())?.st_dev;
        Ok(Self {
            id: body.volume_id,
            keys,
            root: Arc::new(backing),
            root_dir,
            path: backing_path.to_owned(),
            device,
            read_only,
            log: None,
            integrity_failures: AtomicU64::new(0),
            events: events::Limiter::default(),
            opened: Instant::now(),
            audit: None,
        })
    }

    /// Records integrity failures in an audit log, too.
    #[must_use]
    pub fn with_audit(mut self, sink: Arc<Sink>) -> Self {
        self.audit = Some(sink);
        self
    }

    /// The volume's id.
    pub fn id(&self) -> VolumeId {
        self.id
    }

    /// Its keys.
    pub fn keys(&self) -> &Keyring {
        &self.keys
    }

    /// The backing root.
    pub fn root(&self) -> &Arc<OwnedFd> {
        &self.root
    }

    /// The root directory's keys.
    pub fn root_dir(&self) -> &dir::DirKeys {
        &self.root_dir
    }

    /// Where the backing directory was found, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The backing filesystem's device: everything must be on it.
    pub fn device(&self) -> u64 {
        self.device
    }

    /// The intent log, if one was begun.
    pub fn log(&self) -> Option<&log::Log> {
        self.log.as_ref()
    }

    /// Begins an intent log: from now on files change by way of it. What a crash left in an old one must have been
    /// [replayed](replay::replay).
    ///
    /// # Errors
    /// The backing filesystem's.
    pub fn begin_log(&mut self) -> Result<(), VolumeError> {
        self.log = Some(log::Log::new(&self.root, &self.keys)?);
        Ok(())
    }

    /// The same with a log whose files are full at `full` bytes.
    #[cfg(test)]
    pub(crate) fn begin_log_for_tests(&mut self, full: u64) -> Result<(), VolumeError> {
        self.log = Some(log::Log::with_limit(&self.root, &self.keys, full)?);
        Ok(())
    }

    /// Ends a volume, but not its keys.
    #[cfg(test)]
    pub(crate) fn into_keys_for_tests(self) -> Keyring {
        self.keys
    }

    /// The log as a crash leaves it.
    #[cfg(test)]
    pub(crate) fn end_of_log_for_tests(&mut self) {
        self.log = None;
    }

    /// Whether nothing may be written.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Counts one integrity failure, and reports it if not too many came before. `backing_ino` is 0 where it is not known;
    /// `victim` is asked only for what goes out, and never names a plaintext.
    pub fn report(
        &self,
        damage: Damage,
        backing_ino: u64,
        block: Option<u64>,
        victim: impl FnOnce() -> events::Victim,
    ) {
        let count = self.integrity_failures.fetch_add(1, Ordering::Relaxed) + 1;
        if let Some(held_back) = self.events.admit(self.opened.elapsed()) {
            let victim = victim();
            events::write(damage, backing_ino, block, &victim, count, held_back);
            if let Some(sink) = &self.audit {
                events::record(sink, damage, backing_ino, block, &victim, count, held_back);
            }
        }
    }

    /// Integrity failures since mount.
    pub fn integrity_failures(&self) -> u64 {
        self.integrity_failures.load(Ordering::Relaxed)
    }
}
