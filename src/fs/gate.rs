//! The gate that every request passes twice: when it comes, and when its answer goes.
//!
//! [`Gate::answer`] sends an answer under a shared guard, having looked at the phase once more; a seal changes the phase and
//! then takes the guard exclusively. So when it goes on to have the kernel drop what it caches, no answer with plaintext or
//! attributes is on its way that the kernel would cache afterwards.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use super::inode::lock;
use crate::keyring::SealReason;

/// Who may pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Everybody.
    Open,
    /// Only what brings dirty data out of the kernel: WRITE, FSYNC, SETATTR.
    Draining(SealReason),
    /// Nobody.
    Closed(SealReason),
}

/// One time of draining: what belongs to an earlier one must not act on a later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turn(u64);

/// See the module's text.
#[derive(Default)]
pub struct Gate {
    phase: AtomicU8,
    /// Held by whoever changes the phase. Counts the changes that begin or end a seal.
    turn: Mutex<u64>,
    answers: RwLock<()>,
    writes: Mutex<usize>,
    written: Condvar,
    dropped: AtomicU64,
}

/// A request's way out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// As always.
    Open,
    /// The kernel must not keep what it is told.
    Unkept,
}

/// A write that was let in and is not done.
pub struct InFlight<'a>(&'a Gate);

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        let mut writes = lock(&self.0.writes);
        *writes -= 1;
        if *writes == 0 {
            self.0.written.notify_all();
        }
    }
}

impl Gate {
    /// The phase.
    pub fn phase(&self) -> Phase {
        match self.phase.load(Ordering::SeqCst) {
            0 => Phase::Open,
            code @ 1..4 => Phase::Draining(reason(code)),
            code => Phase::Closed(reason(code - 3)),
        }
    }

    /// Whether an ordinary request may pass.
    ///
    /// # Errors
    /// Why not.
    pub fn check(&self) -> Result<(), SealReason> {
        match self.phase() {
            Phase::Open => Ok(()),
            Phase::Draining(reason) | Phase::Closed(reason) => Err(reason),
        }
    }

    /// Whether a request that brings data out of the kernel may pass. [`writes_done`](Self::writes_done) waits for it.
    ///
    /// # Errors
    /// Why not. Never waits, whatever others wait for.
    pub fn write(&self) -> Result<InFlight<'_>, SealReason> {
        // Counted before it is let in: whoever closes the gate and then counts sees it, or it sees the gate closed.
        *lock(&self.writes) += 1;
        let in_flight = InFlight(self);
        match self.phase() {
            Phase::Open | Phase::Draining(_) => Ok(in_flight),
            Phase::Closed(reason) => Err(reason),
        }
    }

    /// Sends an answer, if the phase still lets it. `draining`: also an answer to what [`write`](Self::write) let in.
    ///
    /// # Errors
    /// Why not; nothing was sent then.
    pub fn answer<T>(&self, draining: bool, send: impl FnOnce(Way) -> T) -> Result<T, SealReason> {
        let _on_its_way = self.answers.read().unwrap_or_else(PoisonError::into_inner);
        match self.phase() {
            Phase::Open => Ok(send(Way::Open)),
            Phase::Draining(_) if draining => Ok(send(Way::Unkept)),
            Phase::Draining(reason) | Phase::Closed(reason) => Err(reason),
        }
    }

    /// Lets only dirty data through. `None`: it is closed already, or draining. No ordinary answer is on its way when this
    /// returns.
    pub fn drain(&self, reason: SealReason) -> Option<Turn> {
        let mut turn = lock(&self.turn);
        if self.phase() != Phase::Open {
            return None;
        }
        *turn += 1;
        self.set(Phase::Draining(reason));
        Some(Turn(*turn))
    }

    /// Closes it, if it still drains in this turn. Whether it did.
    pub fn close_after(&self, turn: Turn) -> bool {
        let now = lock(&self.turn);
        let Phase::Draining(reason) = self.phase() else { return false };
        if *now != turn.0 {
            return false;
        }
        self.set(Phase::Closed(reason));
        true
    }

    /// Closes it, whatever it was, and changes the reason if it is closed. No answer is on its way when this returns.
    pub fn close(&self, reason: SealReason) {
        let _turn = lock(&self.turn);
        self.set(Phase::Closed(reason));
    }

    /// Opens it.
    pub fn open(&self) {
        *lock(&self.turn) += 1;
        self.phase.store(0, Ordering::SeqCst);
    }

    fn set(&self, phase: Phase) {
        let code = match phase {
            Phase::Open => 0,
            Phase::Draining(reason) => code(reason),
            Phase::Closed(reason) => code(reason) + 3,
        };
        self.phase.store(code, Ordering::SeqCst);
        // Answers on their way wait for nothing but the kernel's copying.
        drop(self.answers.write().unwrap_or_else(PoisonError::into_inner));
    }

    /// Waits for the writes that were let in, and with them for the backing filesystem. Whether all were done in time.
    pub fn writes_done(&self, patience: Duration) -> bool {
        let until = Instant::now() + patience;
        let mut writes = lock(&self.writes);
        while *writes > 0 {
            let Some(left) = until.checked_duration_since(Instant::now()) else { return false };
            writes = self.written.wait_timeout(writes, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// A write that the kernel had accepted long before was refused, or failed while nobody was there any more to be told.
    pub fn note_dropped(&self, bytes: u64) {
        self.dropped.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes that programs had written and seals did not take, since the mount.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }
}

fn code(reason: SealReason) -> u8 {
    match reason {
        SealReason::Revoked => 1,
        SealReason::Expired => 2,
        SealReason::Unmounted => 3,
    }
}

fn reason(code: u8) -> SealReason {
    match code {
        1 => SealReason::Revoked,
        2 => SealReason::Expired,
        _ => SealReason::Unmounted,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Barrier, mpsc};

    #[test]
    fn phases() {
        for reason in [SealReason::Revoked, SealReason::Expired, SealReason::Unmounted] {
            let gate = Gate::default();
            assert!(gate.check().is_ok() && gate.write().is_ok());
            assert_eq!(gate.answer(false, |way| way), Ok(Way::Open));
            let turn = gate.drain(reason).unwrap();
            assert_eq!(gate.phase(), Phase::Draining(reason));
            assert_eq!(gate.drain(reason), None);
            assert_eq!(gate.check(), Err(reason));
            assert!(gate.write().is_ok());
            assert_eq!(gate.answer(false, |way| way), Err(reason));
            assert_eq!(gate.answer(true, |way| way), Ok(Way::Unkept));
            assert!(gate.close_after(turn));
            assert_eq!(gate.phase(), Phase::Closed(reason));
            assert!(gate.write().is_err());
            assert_eq!(gate.answer(true, |way| way), Err(reason));
            assert_eq!(gate.drain(reason), None);
            gate.close(SealReason::Revoked);
            assert_eq!(gate.check(), Err(SealReason::Revoked), "the newer reason");
            gate.open();
            assert!(gate.check().is_ok());
        }
    }

    #[test]
    fn an_old_drain_does_not_close_what_was_opened_again() {
        let gate = Gate::default();
        let old = gate.drain(SealReason::Expired).unwrap();
        gate.close(SealReason::Expired);
        gate.open();
        assert!(!gate.close_after(old));
        assert!(gate.check().is_ok());
        // Nor a later seal's.
        let new = gate.drain(SealReason::Expired).unwrap();
        assert!(!gate.close_after(old) && gate.write().is_ok());
        assert!(gate.close_after(new));
    }

    #[test]
    fn a_write_that_hangs_keeps_none_from_being_refused() {
        let gate = Gate::default();
        let hangs = gate.write().unwrap();
        let turn = gate.drain(SealReason::Expired).unwrap();
        assert!(gate.close_after(turn));
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| gate.writes_done(Duration::from_secs(60)));
            // While somebody waits for it.
            assert!(gate.write().is_err());
            drop(hangs);
            assert!(waits.join().unwrap());
        });
        let _hangs = gate.write().err();
        assert!(gate.writes_done(Duration::ZERO));
    }

    #[test]
    fn a_change_of_phase_waits_for_the_answers_on_their_way() {
        let gate = Arc::new(Gate::default());
        let (sender, told) = mpsc::channel();
        let go = Arc::new(Barrier::new(2));
        let (answering, at, answered) = (gate.clone(), go.clone(), sender.clone());
        let answer = std::thread::spawn(move || {
            answering.answer(false, |_| {
                at.wait();
                // The other one has changed the phase, or is about to, and cannot have returned.
                while answering.phase() == Phase::Open {
                    std::thread::yield_now();
                }
                answered.send("answered").unwrap();
            })
        });
        go.wait();
        gate.close(SealReason::Revoked);
        sender.send("closed").unwrap();
        assert_eq!(answer.join().unwrap(), Ok(()));
        assert_eq!((told.recv().unwrap(), told.recv().unwrap()), ("answered", "closed"));
    }
}
