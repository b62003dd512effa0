//! Damage met while serving: what an event says of it, and where in the backing tree it is.

use std::os::fd::AsFd as _;

use super::core::Filesystem;
use super::errno::Failed;
use super::inode::{Inode, Kind, lock};
use crate::crypto::ObjectId;
use crate::volume::events::Victim;
use crate::volume::file::{self, ReadError};
use crate::volume::{Damage, VolumeError, link, storage};

impl Filesystem {
    /// Reports damage and gives the errno.
    pub fn failed(&self, inode: &Inode, error: impl Into<ReadError>) -> Failed {
        let error = error.into();
        if let VolumeError::Damaged(damage) = error.error {
            let victim = || Victim { object: self.identify(inode), path: inode.backing_path() };
            self.volume.report(damage, inode.ino, error.block, victim);
        }
        error.into()
    }

    /// Reports an entry of a directory that is not to be believed, or that is none.
    pub(super) fn entry_failed(&self, directory: &Inode, name: &[u8], damage: Damage) {
        self.volume.report(damage, 0, None, || {
            let name = name.escape_ascii();
            let path = directory
                .backing_path()
                .map(|path| if path.is_empty() { name.to_string() } else { format!("{path}/{name}") });
            Victim { object: None, path }
        });
    }

    /// Logs what will be tried again, and will fail again: not each time.
    pub(super) fn grumble(&self, backing_ino: u64, failed: Failed, what: &str) {
        if let Some(held_back) = self.grumbles.admit(self.started.elapsed()) {
            tracing::warn!(backing_ino, errno = failed.errno(), held_back, "{what}");
        }
    }

    /// Which object an inode is, as far as that is authentic. The caller may hold its content lock, and nothing else.
    fn identify(&self, inode: &Inode) -> Option<ObjectId> {
        match inode.kind {
            Kind::Directory => inode.dir.get().map(|dir| dir.id()),
            Kind::Node => inode.node.get().map(|node| node.dek.object()),
            Kind::Symlink => {
                let held = self.hold_link(&lock(&inode.link)).ok()?;
                link::object(&self.volume, &storage::readlink_held(held.as_fd()).ok()?)
            }
            Kind::Regular => {
                let loaded = inode.file.try_read().ok().and_then(|state| Some(state.as_ref()?.dek().object()));
                let open = lock(&inode.open).clone();
                loaded.or_else(|| file::identify(&self.volume, open?.fd.as_fd()))
            }
        }
    }
}
