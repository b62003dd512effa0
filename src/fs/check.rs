//! What a check of the volume needs of a live mount (`volume/check.rs`): files as they are, not as the backing files are yet.

use std::sync::PoisonError;

use super::core::Filesystem;
use super::inode::Kind;
use super::namespace::node_id;
use crate::volume::check::Live;
use crate::volume::file::FileState;

impl Live for Filesystem {
    fn with_file(&self, ino: u64, look: &mut dyn FnMut(&FileState)) -> bool {
        let Some(inode) = self.inodes.get(node_id(ino)).filter(|inode| inode.kind == Kind::Regular) else {
            return false;
        };
        // Nobody writes to it meanwhile. What is not loaded nobody has written to.
        let guard = inode.file.read().unwrap_or_else(PoisonError::into_inner);
        guard.as_ref().is_some_and(|state| {
            look(state);
            true
        })
    }
}
