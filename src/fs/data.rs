//! Contents: read, write, resize, fsync.

use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::core::{Filesystem, Outcome};
use super::errno::Failed;
use super::inode::{Inode, Kind, Open};
use crate::volume::file::space::Space;
use crate::volume::file::{FileState, ReadError};
use crate::volume::log::Log;
use crate::volume::storage;
use crate::volume::{VolumeError, xattr};

/// How often a change that the log has no space for is tried again: others may take what was made.
const MAKE_ROOM: usize = 16;

impl Filesystem {
    /// Reads into `out`; fewer bytes only at the end of the file.
    ///
    /// # Errors
    /// `EIO` for anything not authentic; the backing filesystem's.
    pub fn read(&self, ino: u64, offset: u64, out: &mut [u8]) -> Outcome<usize> {
        let inode = self.inode(ino)?;
        let (state, open) = self.file(&inode)?;
        let Some(state) = state.as_ref() else { return Err(Failed::raw(libc::EIO)) };
        let n = state.read(&self.volume, open.fd.as_fd(), offset, out).map_err(|error| self.failed(&inode, error))?;
        self.counters.read.fetch_add(n as u64, Ordering::Relaxed);
        Ok(n)
    }

    /// Writes all of `data`. `kill_privileges`: the writer lacks CAP_FSETID.
    ///
    /// # Errors
    /// The backing filesystem's; `EIO` where part of a damaged block would have to be kept.
    pub fn write(&self, ino: u64, offset: u64, data: &[u8], kill_privileges: bool) -> Outcome<()> {
        let inode = self.inode(ino)?;
        self.change(&inode, |state, open| state.write(&self.volume, open.fd.as_fd(), offset, data))?;
        if kill_privileges {
            self.kill_privileges(&inode)?;
        }
        self.counters.written.fetch_add(data.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// A write was refused because the mount is sealed: the program was told long ago that all is well.
    pub fn dropped(&self, ino: u64, bytes: u64) {
        self.gate.note_dropped(bytes);
        if let Some(inode) = self.inodes.get(ino) {
            inode.generation.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// truncate. A file whose header is lost can be cut to nothing, and is then a new file.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn resize(&self, inode: &Arc<Inode>, size: u64) -> Outcome<()> {
        if size == 0 && self.start_over_if_damaged(inode)? {
            return Ok(());
        }
        self.change(inode, |state, open| state.resize(&self.volume, open.fd.as_fd(), size))
    }

    /// fallocate(2). `mode` as there; `kill_privileges` as for [`write`](Self::write).
    ///
    /// # Errors
    /// `EOPNOTSUPP` for other modes than zero, `KEEP_SIZE`, `PUNCH_HOLE` with it and `ZERO_RANGE`, and where the backing
    /// filesystem cannot reserve; else as [`write`](Self::write).
    pub fn allocate(&self, ino: u64, offset: u64, len: u64, mode: i32, kill_privileges: bool) -> Outcome<()> {
        const KEEP: i32 = libc::FALLOC_FL_KEEP_SIZE;
        const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | KEEP;
        let space = match mode & !KEEP {
            0 => Space::Reserved,
            libc::FALLOC_FL_ZERO_RANGE => Space::Zeros,
            _ if mode == PUNCH => Space::Hole,
            _ => return Err(Failed::raw(libc::EOPNOTSUPP)),
        };
        let inode = self.inode(ino)?;
        let waits = self.file(&inode)?.0.as_ref().is_some_and(|state| match space {
            // A pending cut would give the space back.
            Space::Reserved | Space::Zeros => state.pending().is_some(),
            Space::Hole => state.is_crowded(),
        });
        if waits {
            self.commit()?;
        }
        let keep_size = mode & KEEP != 0;
        self.change(&inode, |state, open| {
            state.allocate(&self.volume, open.fd.as_fd(), space, keep_size, (offset, len))
        })?;
        if kill_privileges { self.kill_privileges(&inode) } else { Ok(()) }
    }

    /// Does something to a file that may have to be logged.
    fn change(
        &self,
        inode: &Arc<Inode>,
        change: impl Fn(&mut FileState, &Open) -> Result<(), ReadError>,
    ) -> Outcome<()> {
        self.with_room(|| self.change_once(inode, &change))
    }

    /// Does something that may have to be logged; again, if the log found no space and could make some. The caller holds no lock.
    pub(super) fn with_room(&self, once: impl Fn() -> Outcome<()>) -> Outcome<()> {
        self.room()?;
        let mut tries = MAKE_ROOM;
        loop {
            let generation = self.volume.log().map(Log::generation);
            match once() {
                Err(failed)
                    if tries > 0
                        && matches!(failed.errno(), libc::ENOSPC | libc::EDQUOT)
                        && self.makes_room(generation) =>
                {
                    tries -= 1;
                }
                other => return other,
            }
        }
    }

    /// After a change found no space, with this generation of the log: whether the log has some again. What is in it is put
    /// in place, which needs none: it replaces what is there, or its place was reserved.
    fn makes_room(&self, generation: Option<u64>) -> bool {
        self.volume.log().is_some_and(|log| {
            (log.is_short() && self.checkpoint().is_ok()) || generation.is_some_and(|then| log.generation() != then)
        })
    }

    fn change_once(
        &self,
        inode: &Arc<Inode>,
        change: impl Fn(&mut FileState, &Open) -> Result<(), ReadError>,
    ) -> Outcome<()> {
        let (mut guard, open) = self.file_mut(inode)?;
        let Some(state) = guard.as_mut() else { return Err(Failed::raw(libc::EIO)) };
        if !open.writable {
            return Err(Failed::raw(libc::EROFS));
        }
        let was_unsealed = state.unsealed();
        self.note_pending(inode);
        let changed = change(state, &open);
        inode.set_size(state.size());
        if state.unsealed() {
            self.changed(inode, was_unsealed);
        }
        changed.map_err(|error| self.failed(inode, error))
    }

    /// Replaces a file whose header is damaged, and of which the caller wants nothing, by an empty one. Says whether it did.
    fn start_over_if_damaged(&self, inode: &Arc<Inode>) -> Outcome<bool> {
        let open = self.open_regular(inode)?;
        let mut guard = inode.file.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        if guard.is_some() {
            return Ok(false);
        }
        match FileState::load(&self.volume, open.fd.as_fd()) {
            // Loaded for good where everything that goes with it is done, too.
            Ok(_) => return Ok(false),
            // Only what we know to be damaged: a backing error may pass.
            Err(VolumeError::Damaged(_)) => {}
            Err(error) => return Err(self.failed(inode, error)),
        }
        if !open.writable {
            return Err(Failed::raw(libc::EROFS));
        }
        storage::set_len(open.fd.as_fd(), 0)?;
        // Its attributes were under the old header's keys: nobody can read them any more.
        xattr::remove_all(open.fd.as_fd())?;
        let state = FileState::create(&self.volume, open.fd.as_fd()).map_err(|error| self.failed(inode, error))?;
        *guard = Some(Box::new(state));
        inode.set_size(0);
        self.changed(inode, false);
        Ok(true)
    }

    /// fsync or fdatasync of a file or directory. The flush itself holds no lock.
    ///
    /// # Errors
    /// The backing filesystem's: then nothing is promised for what was written since the last success.
    pub fn fsync(&self, ino: u64, data_only: bool) -> Outcome<()> {
        let inode = self.inode(ino)?;
        match inode.kind {
            Kind::Directory => Ok(storage::sync_fd(self.open(&inode)?.fd.as_fd())?),
            Kind::Regular => self.fsync_file(&inode, data_only),
            Kind::Symlink | Kind::Node => Err(Failed::raw(libc::EINVAL)),
        }
    }

    /// What is logged is on the medium once the log is; what is not logged once the file itself is.
    fn fsync_file(&self, inode: &Arc<Inode>, data_only: bool) -> Outcome<()> {
        // The name of a new file is part of what is asked for.
        let data_only = data_only && !inode.unnamed.load(Ordering::SeqCst);
        let mark = {
            let (mut guard, open) = self.file_mut(inode)?;
            let Some(state) = guard.as_mut() else { return Err(Failed::raw(libc::EIO)) };
            if open.writable {
                Some(state.flushing(&self.volume, open.fd.as_fd()).map_err(|error| self.failed(inode, error))?)
            } else {
                None
            }
        };
        let open = self.open(inode)?;
        if let (Some(log), Some(mark)) = (self.volume.log(), &mark) {
            log.flush(mark.log)?;
            if (mark.applies || !data_only)
                && let Some(state) = self.file_mut(inode)?.0.as_mut()
            {
                state.apply(open.fd.as_fd(), log.flushed())?;
            }
        }
        let flushed = match mark {
            Some(mark) if data_only && !mark.in_place => Ok(()),
            _ if data_only => self.flushed_in_place(storage::sync_data(open.fd.as_fd())),
            _ => self.flushed_in_place(storage::sync_fd(open.fd.as_fd())),
        };
        // The kernel reports a lost write once to each descriptor; the sealer may have been the one to hear of it.
        match inode.sync_failed.swap(0, Ordering::SeqCst) {
            0 => {}
            errno => return Err(Failed::raw(errno)),
        }
        flushed?;
        if !data_only {
            inode.unnamed.store(false, Ordering::SeqCst);
        }
        if let Some(mark) = mark {
            let settled = match self.file_mut(inode)?.0.as_mut() {
                Some(state) => state.flushed(&self.volume, mark).map_err(|error| self.failed(inode, error))?,
                None => None,
            };
            if let (Some(log), Some(record)) = (self.volume.log(), settled) {
                log.flush(record)?;
            }
        }
        Ok(())
    }
}
