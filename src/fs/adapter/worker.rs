//! One of fuser's threads: what it owes, and its end.

use std::cell::OnceCell;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use fuser::{ReplyData, ReplyWrite};

use super::super::core::Filesystem;
use super::super::errno::Failed;
use super::super::notify;
use super::super::owed::{Debt, Place};
use super::errno;

thread_local! {
    /// This thread as a worker.
    static WORKER: OnceCell<Worker> = const { OnceCell::new() };
}

/// This worker's place. `device`: of the connection.
pub(super) fn place(fs: &Arc<Filesystem>, device: &Arc<OwnedFd>) -> Arc<Place<Owing>> {
    let new = || Worker { place: fs.owed.place(), fs: fs.clone(), device: device.clone() };
    WORKER.with(|worker| worker.get_or_init(new).place.clone())
}

/// What this worker owes and was not refused.
pub(super) fn owed() -> Option<Owing> {
    WORKER.with(|worker| worker.get().and_then(|worker| worker.place.take()))
}

/// A reply for which the kernel keeps pages locked.
pub(super) enum Owing {
    Data(ReplyData),
    /// With inode and length.
    Write(ReplyWrite, u64, u64),
}

impl Debt for Owing {
    fn write(&self) -> Option<(u64, u64)> {
        match self {
            Self::Data(_) => None,
            Self::Write(_, ino, bytes) => Some((*ino, *bytes)),
        }
    }

    fn refuse(self, why: Failed) {
        match self {
            Self::Data(reply) => reply.error(errno(why)),
            Self::Write(reply, ..) => reply.error(errno(why)),
        }
    }
}

/// One of fuser's threads. Ends with it.
struct Worker {
    place: Arc<Place<Owing>>,
    fs: Arc<Filesystem>,
    device: Arc<OwnedFd>,
}

impl Drop for Worker {
    /// fuser tells of a worker's end only once all have ended.
    fn drop(&mut self) {
        if notify::is_alive(&*self.device) {
            // Told of by the sealer: a thread that ends may have no more of what a line of the log needs, and would end all.
            self.fs.counters.lost_workers.fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::testing::{Vault, directory};

    #[test]
    fn a_worker_that_ends_while_the_mount_is_there_is_noticed() {
        let (vault, dir) = (Vault::new(), directory());
        vault.create(dir.path());
        let fs = Arc::new(Filesystem::new(vault.open(dir.path()).expect("open"), 16, false));
        let (reader, writer) = rustix::pipe::pipe().expect("a pipe");
        let device = Arc::new(writer);
        let worker = || {
            let adapter = (fs.clone(), device.clone());
            std::thread::spawn(move || drop(place(&adapter.0, &adapter.1))).join().expect("ended");
            fs.counters.lost_workers.load(Ordering::Relaxed)
        };
        assert_eq!(worker(), 1);
        // As the device of a connection that has ended, which has an error to be polled.
        drop(reader);
        assert_eq!(worker(), 1);
    }
}
