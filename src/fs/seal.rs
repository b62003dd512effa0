//! Sealing a live mount, and opening it again. (DESIGN: the two orders; measured facts in docs/SEMANTICS.md.)
//!
//! - *At once*, when the key was revoked: nobody passes the gate → keys wiped → the kernel drops what it caches. What
//!   programs wrote and the kernel had not passed on is refused, lost, and counted.
//! - *In order*, when the lease ran out: only dirty data passes → the kernel drops what it caches, and by that sends what is
//!   dirty → nobody passes → files flushed and sealed → keys wiped.

use std::os::fd::AsFd as _;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::gate::{Phase, Turn};
use super::inode::lock;
use super::notify;
use super::refuser::Refuser;
use super::session::MountHandle;
use crate::crypto::Key32;
use crate::keyring::SealReason;
use crate::sys::wiping;

/// How long an orderly seal gives the backing filesystem to take what is dirty. Part of the declared bound.
pub const DRAIN: Duration = Duration::from_secs(30);
/// How long a seal waits for the kernel to drop what it caches before it reports what is left; the dropping goes on. Part of
/// the declared bounds.
pub const PURGE: Duration = Duration::from_secs(10);
/// Threads that tell the kernel at first. Each waits where a page is locked by a request that is not answered, so as long as they
/// do not get on more are started: what a hung disk holds must not keep the rest in the cache.
const PURGERS: usize = 4;
const MOST_PURGERS: usize = 512;
/// No progress for so long is none.
const STALLED: Duration = Duration::from_millis(50);
/// A purger needs next to nothing.
const PURGER_STACK: usize = 64 << 10;

/// What a purge does about writes that were let in and hang: the kernel does not drop their pages before they are answered.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Writes {
    /// Waits for them.
    Awaited,
    /// Refuses them after half of its time. What they write may be there all the same.
    Refused,
}

/// What a seal did.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct SealReport {
    /// Whether this call sealed (else it was sealed before).
    pub sealed_now: bool,
    /// Why.
    pub reason: SealReason,
    /// Inodes whose cached contents and attributes the kernel was told to drop.
    pub purged_inodes: usize,
    /// Inodes for which the kernel had not yet done so when the time was up.
    pub left_inodes: usize,
    /// Workers that were busy, so that plaintext of their last requests stays in the daemon's memory.
    pub unscrubbed_workers: usize,
    /// In order only: everything dirty was taken and flushed in time.
    pub drained: bool,
    /// In order only: files that could not be flushed and sealed. What was fsynced of them is safe.
    pub unflushed_files: usize,
    /// Bytes that programs had written and that were refused, or that the backing filesystem did not take.
    pub dropped_bytes: u64,
    /// From the call to the wiped keys, in microseconds.
    pub keys_wiped_us: u64,
    /// From the call to the last purge, in microseconds.
    pub purged_us: u64,
}

impl MountHandle {
    /// Closes the gate and the keyring, then has the kernel drop every page, attribute and entry it caches. From then on
    /// everything but statfs, the root's stat and unmounting fails with `EKEYREVOKED` (or `EKEYEXPIRED`).
    pub fn seal(&self, reason: SealReason) -> SealReport {
        let begun = Instant::now();
        let dropped = self.fs.gate.dropped();
        let sealed_now = self.abandon(reason);
        let keys_wiped_us = micros(begun);
        let free = self.sealing.try_lock();
        if let Ok(Some(done)) = free.as_deref() {
            return SealReport { sealed_now: false, reason, ..*done };
        }
        // Not behind an orderly seal that is under way: its keys are gone, and it may wait for a disk.
        let (purged_inodes, left_inodes) = self.purge(PURGE, Writes::Refused);
        let mut done = free.unwrap_or_else(|_| lock(&self.sealing));
        if let Some(done) = *done {
            return SealReport { sealed_now, reason, purged_inodes, left_inodes, ..done };
        }
        let report = SealReport {
            sealed_now,
            reason,
            purged_inodes,
            left_inodes,
            unscrubbed_workers: self.scrub(),
            drained: false,
            unflushed_files: 0,
            dropped_bytes: self.fs.gate.dropped() - dropped,
            keys_wiped_us,
            purged_us: micros(begun),
        };
        *done = Some(report);
        report
    }

    /// Closes gate and keyring, or changes the reason for which they are closed, and nothing else. Waits for no disk. Whether
    /// this call wiped the keys.
    pub fn abandon(&self, reason: SealReason) -> bool {
        self.fs.gate.close(reason);
        let wiped = self.fs.volume.keys().wipe(reason);
        // The gate would not let their answers pass, and until then the kernel keeps their pages.
        self.fs.owed.refuse(false, reason.into());
        wiped
    }

    /// Lets everything dirty through first. If the backing filesystem does not take it within `drain`, the keys go all the
    /// same, and with them what is dirty. `still`: whether there is time for that, asked once nobody else comes in any more.
    pub fn seal_in_order(&self, reason: SealReason, drain: Duration, still: impl FnOnce() -> bool) -> SealReport {
        let begun = Instant::now();
        let dropped = self.fs.gate.dropped();
        let mut done = lock(&self.sealing);
        if let Some(done) = *done {
            return SealReport { sealed_now: false, ..done };
        }
        let turn = self.fs.gate.drain(reason);
        let drained = match turn {
            Some(turn) if still() => {
                self.fs.owed.refuse(false, reason.into());
                self.drain_until(turn, drain)
            }
            // Revoked meanwhile.
            _ => None,
        };
        // Not over the reason of a revocation that came meanwhile.
        let reason = match self.fs.gate.phase() {
            Phase::Closed(newer) => newer,
            _ => reason,
        };
        // Not if somebody with more haste has done it, who reports it then.
        let sealed_now = self.abandon(reason);
        let keys_wiped_us = micros(begun);
        // What slipped into the kernel's cache between its purge and the closing.
        let (purged_inodes, left_inodes) = self.purge(PURGE, Writes::Refused);
        let dropped_bytes = self.fs.gate.dropped() - dropped;
        let report = SealReport {
            sealed_now,
            reason,
            purged_inodes,
            left_inodes,
            unscrubbed_workers: self.scrub(),
            drained: drained == Some(0) && dropped_bytes == 0,
            unflushed_files: drained.unwrap_or_else(|| self.fs.unsealed()),
            dropped_bytes,
            keys_wiped_us,
            purged_us: micros(begun),
        };
        *done = Some(report);
        report
    }

    /// Whether everybody may pass.
    pub fn is_open(&self) -> bool {
        self.fs.gate.check().is_ok()
    }

    /// Whether a seal in order is writing out.
    pub fn is_draining(&self) -> bool {
        matches!(self.fs.gate.phase(), Phase::Draining(_))
    }

    /// How many files could not be flushed. `None`: the time was up.
    fn drain_until(&self, turn: Turn, patience: Duration) -> Option<usize> {
        let (tell, told) = channel();
        let draining = self.clone();
        // On its own thread: the backing filesystem may never answer.
        let thread = std::thread::Builder::new().name("lethefs-drain".into());
        let spawned = thread.spawn(move || {
            if let Some(left) = draining.drain(turn, patience) {
                let _ = tell.send(left);
            }
        });
        match spawned {
            Ok(_) => told.recv_timeout(patience).ok(),
            // The system is full of processes: better without a limit than without writing out.
            Err(_) => self.drain(turn, patience),
        }
    }

    /// The part of an orderly seal that waits for the backing filesystem. `None`: it is another seal's turn.
    fn drain(&self, turn: Turn, patience: Duration) -> Option<usize> {
        self.push(patience / 10);
        // Twice: a write(2) that had looked at the attributes before may dirty a page behind the first one's back.
        self.purge(patience, Writes::Awaited);
        self.purge(patience, Writes::Awaited);
        // It may have taken so long that the mount was sealed without it, and perhaps opened again.
        if !self.fs.gate.close_after(turn) || !self.fs.gate.writes_done(patience) {
            return None;
        }
        Some(self.fs.seal_all())
    }

    /// Has the kernel begin to send what is dirty, in large requests. It may return before all is answered, and is not waited for
    /// for long: what is cached is to be dropped, whether the disk takes anything or not.
    fn push(&self, patience: Duration) {
        let Ok(root) = self.open_root() else { return };
        let (tell, told) = channel();
        let thread = std::thread::Builder::new().name("lethefs-push".into());
        let spawned = thread.spawn(move || {
            let _ = rustix::fs::syncfs(&root);
            // Before anybody goes on: it keeps the mount in use.
            drop(root);
            let _ = tell.send(());
        });
        if spawned.is_ok() {
            let _ = told.recv_timeout(patience);
        }
    }

    /// Opens a sealed mount again under these KEKs, which the caller has held against their commitments; the last one is
    /// current. Waits for a seal that is under way. Whether it was sealed.
    pub fn reopen(&self, keks: &[(u32, u32, &Key32)]) -> bool {
        let mut done = lock(&self.sealing);
        let was_sealed = done.take().is_some();
        if was_sealed {
            // Held: a purge that is still at it refuses nothing any more once this is open.
            let mut refuser = lock(&self.refuser);
            drop(refuser.take());
            self.fs.volume.keys().reopen(keks);
            self.fs.gate.open();
        }
        was_sealed
    }

    /// Refuses the writes that were let in and hang. Not if the mount was opened again meanwhile: those then are others.
    fn refuse_writes(&self) {
        let _reopen_waits = lock(&self.refuser);
        if let Phase::Closed(why) = self.fs.gate.phase() {
            for (ino, bytes) in self.fs.owed.refuse(true, why.into()) {
                self.fs.dropped(ino, bytes);
            }
        }
    }

    /// Says no in the place of workers that hang, if it is not done already.
    fn refuse_for_workers(&self) {
        let mut refuser = lock(&self.refuser);
        if !matches!(self.fs.gate.phase(), Phase::Closed(_)) {
            return;
        }
        if refuser.as_ref().is_none_or(Refuser::is_over) {
            match Refuser::start(self.fs.clone(), self.device.as_fd()) {
                Ok(started) => *refuser = Some(started),
                Err(error) => tracing::error!(%error, "while all workers hang, requests hang as well"),
            }
        }
    }

    /// Has every worker overwrite what passed through it. How many did not.
    fn scrub(&self) -> usize {
        // Its requests are for workers.
        drop(lock(&self.refuser).take());
        let mountpoint = self.mountpoint.clone();
        let unscrubbed = self.fs.scrub.run(self.workers, move || {
            let _ = rustix::fs::statvfs(mountpoint.as_path());
        });
        wiping::unused_stack();
        if unscrubbed > 0 {
            self.refuse_for_workers();
        }
        unscrubbed
    }

    /// Has the kernel drop what it caches of every inode. How many it was told of, and how many of them it had not finished
    /// when the time was up.
    fn purge(&self, patience: Duration, writes: Writes) -> (usize, usize) {
        let begun = Instant::now();
        let until = begun + patience;
        let mut refuse_writes = writes == Writes::Refused;
        let _ = notify::inc_epoch(self.device.as_fd());
        let inodes = self.fs.inodes.all();
        let total = inodes.len();
        let inodes = Arc::new(Mutex::new(inodes.into_iter()));
        let (tell, told) = channel();
        let work = move |handle: &Self, tell: &std::sync::mpsc::Sender<bool>| {
            loop {
                let Some(ino) = lock(&inodes).next() else { return };
                // Where nobody waits any more, the work is still to be done.
                let _ = tell.send(notify::inval_inode(handle.device.as_fd(), ino).is_ok());
            }
        };
        let mut purgers = 0;
        let start = |many: usize, purgers: &mut usize| {
            for _ in 0..many {
                let (work, handle, tell) = (work.clone(), self.clone(), tell.clone());
                let thread = std::thread::Builder::new().name("lethefs-purge".into()).stack_size(PURGER_STACK);
                *purgers += usize::from(thread.spawn(move || work(&handle, &tell)).is_ok());
            }
        };
        start(PURGERS, &mut purgers);
        if purgers == 0 {
            work(self, &tell);
        }
        let (mut answered, mut purged) = (0, 0);
        while answered < total {
            let Some(left) = until.checked_duration_since(Instant::now()) else { break };
            match told.recv_timeout(left.min(STALLED)) {
                Ok(known) => {
                    answered += 1;
                    purged += usize::from(known);
                }
                Err(_) => {
                    if purgers < MOST_PURGERS.min(total) {
                        start(purgers.max(1), &mut purgers);
                    }
                    if writes == Writes::Refused {
                        self.refuse_for_workers();
                    }
                }
            }
            if refuse_writes && begun.elapsed() >= patience / 2 {
                refuse_writes = false;
                self.refuse_writes();
            }
        }
        if answered < total {
            tracing::error!(
                left = total - answered,
                "the kernel has not dropped everything in time; it is being waited for"
            );
        }
        (purged, total - answered)
    }
}

fn micros(begun: Instant) -> u64 {
    begun.elapsed().as_micros() as u64
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::sync::mpsc::Sender;

    use super::super::core::Filesystem;
    use super::super::errno::Failed;
    use super::super::owed::Debt;
    use super::*;
    use crate::volume::testing::{Vault, directory};

    struct Write(Sender<i32>);

    impl Debt for Write {
        fn write(&self) -> Option<(u64, u64)> {
            Some((7, 4096))
        }

        fn refuse(self, why: Failed) {
            self.0.send(why.errno()).expect("heard");
        }
    }

    #[test]
    fn a_purge_that_is_late_refuses_nothing_of_a_mount_that_is_open_again() {
        let (vault, dir) = (Vault::new(), directory());
        vault.create(dir.path());
        let fs = Arc::new(Filesystem::new(vault.open(dir.path()).expect("open"), 16, false));
        let (_reader, device) = rustix::pipe::pipe().expect("a pipe");
        let handle = MountHandle {
            fs: fs.clone(),
            device: Arc::new(device),
            sealing: Arc::default(),
            refuser: Arc::default(),
            mountpoint: Arc::new(PathBuf::new()),
            workers: 1,
        };
        let (say, said) = channel();
        let place = fs.owed.place();
        place.put(Write(say));
        handle.refuse_writes();
        assert_eq!((said.try_recv().ok(), fs.gate.dropped()), (None, 0), "it is open");
        fs.gate.close(SealReason::Revoked);
        handle.refuse_writes();
        assert_eq!((said.try_recv().ok(), fs.gate.dropped()), (Some(libc::EKEYREVOKED), 4096));
    }
}
