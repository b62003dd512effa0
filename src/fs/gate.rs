//! The gate that every request passes twice: when it comes, and when its answer goes.
//!
//! [`Gate::answer`] sends an answer under a shared guard, having looked at the phase once more; a seal changes the phase and
//! then takes the guard exclusively ([`Gate::settle`]). So when it goes on to have the kernel drop what it caches, no answer
//! with plaintext or attributes is on its way that the kernel would cache afterwards.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

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

/// See the module's text.
pub struct Gate {
    phase: AtomicU8,
    answers: RwLock<()>,
    writes: RwLock<()>,
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

impl Gate {
    /// An open one.
    pub fn new() -> Self {
        Self { phase: AtomicU8::new(0), answers: RwLock::new(()), writes: RwLock::new(()), dropped: AtomicU64::new(0) }
    }

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

    /// Whether a request that brings data out of the kernel may pass. While the guard lives no seal takes the keys from it,
    /// unless it has to.
    ///
    /// # Errors
    /// Why not.
    pub fn write(&self) -> Result<RwLockReadGuard<'_, ()>, SealReason> {
        let guard = self.writes.read().unwrap_or_else(PoisonError::into_inner);
        match self.phase() {
            Phase::Open | Phase::Draining(_) => Ok(guard),
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

    /// Changes the phase. No answer of the phase before is on its way when this returns.
    pub fn set(&self, phase: Phase) {
        self.phase.store(
            match phase {
                Phase::Open => 0,
                Phase::Draining(reason) => code(reason),
                Phase::Closed(reason) => code(reason) + 3,
            },
            Ordering::SeqCst,
        );
        self.settle();
    }

    /// Waits for the answers on their way. They wait for nothing but the kernel's copying.
    fn settle(&self) {
        drop(self.answers.write().unwrap_or_else(PoisonError::into_inner));
    }

    /// Waits for the writes that were let in, and with them for the backing filesystem.
    pub fn writes_done(&self) {
        drop(self.writes.write().unwrap_or_else(PoisonError::into_inner));
    }

    /// A write that the kernel had accepted long before was refused.
    pub fn note_dropped(&self, bytes: u64) {
        self.dropped.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes that programs had written and seals refused, since the mount.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }
}

impl Default for Gate {
    fn default() -> Self {
        Self::new()
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

    #[test]
    fn phases() {
        let gate = Gate::new();
        assert!(gate.check().is_ok() && gate.write().is_ok());
        assert_eq!(gate.answer(false, |way| way), Ok(Way::Open));
        for reason in [SealReason::Revoked, SealReason::Expired, SealReason::Unmounted] {
            gate.set(Phase::Draining(reason));
            assert_eq!(gate.phase(), Phase::Draining(reason));
            assert_eq!(gate.check(), Err(reason));
            assert!(gate.write().is_ok());
            assert_eq!(gate.answer(false, |way| way), Err(reason));
            assert_eq!(gate.answer(true, |way| way), Ok(Way::Unkept));
            gate.set(Phase::Closed(reason));
            assert_eq!(gate.phase(), Phase::Closed(reason));
            assert!(gate.write().is_err());
            assert_eq!(gate.answer(true, |way| way), Err(reason));
        }
    }

    #[test]
    fn a_change_of_phase_waits_for_the_answers_on_their_way() {
        let gate = std::sync::Arc::new(Gate::new());
        let (go, told) = (std::sync::Barrier::new(2), std::sync::mpsc::channel());
        let go = std::sync::Arc::new(go);
        let (answering, at) = (gate.clone(), go.clone());
        let sender = told.0.clone();
        let answer = std::thread::spawn(move || {
            answering.answer(false, |_| {
                at.wait();
                // The other one has changed the phase, or is about to, and cannot have returned.
                while answering.phase() == Phase::Open {
                    std::thread::yield_now();
                }
                sender.send("answered").unwrap();
            })
        });
        go.wait();
        gate.set(Phase::Closed(SealReason::Revoked));
        told.0.send("closed").unwrap();
        assert_eq!(answer.join().unwrap(), Ok(()));
        assert_eq!((told.1.recv().unwrap(), told.1.recv().unwrap()), ("answered", "closed"));
    }
}
