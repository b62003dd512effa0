//! A lease before there is a mount: what has to be done first may take long, with the keys in memory.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use super::alarm::{Alarm, tick};
use super::early;
use crate::audit::{Event, Renewals, Sink};
use crate::keyring::lease::{Action, Answer, Lease, Terms, Tick};
use crate::keyring::{Keyring, SealReason};
use crate::kms::{Failure, KmsError};
use crate::service::prover::{Heard, Prover};

struct Renewing<'a> {
    prover: &'a Prover,
    keys: &'a Keyring,
    audit: &'a Sink,
    lease: Lease,
    renewals: Renewals,
}

/// Does some work with keys, and renews their lease meanwhile. If that ends, the keys are wiped, on which the work fails. What the
/// work gave, and when the newest proof was asked for.
///
/// # Errors
/// In the second place: what the key service said, or that it was silent for too long.
pub(in crate::service) fn while_renewed<T>(
    prover: &Prover,
    alarm: &Alarm,
    (terms, asked): (Terms, Tick),
    keys: &Keyring,
    audit: &Sink,
    work: impl FnOnce() -> T,
) -> (T, Result<Tick, KmsError>) {
    let done = AtomicBool::new(false);
    let outcome = Mutex::new(Ok(asked));
    let worked = std::thread::scope(|scope| {
        let lease = Lease::new(terms, asked);
        let renewing = Renewing { prover, keys, audit, lease, renewals: Renewals::default() };
        let renew = || *outcome.lock().unwrap_or_else(PoisonError::into_inner) = renewing.run(alarm, &done);
        let thread = std::thread::Builder::new().name("lethefs-renew".into()).spawn_scoped(scope, renew);
        if let Err(error) = thread {
            tracing::error!(%error, "the lease on the key is not renewed before the mount");
        }
        let worked = work();
        done.store(true, Ordering::SeqCst);
        alarm.bell().ring();
        worked
    });
    (worked, outcome.into_inner().unwrap_or_else(PoisonError::into_inner))
}

impl Renewing<'_> {
    fn run(mut self, alarm: &Alarm, done: &AtomicBool) -> Result<Tick, KmsError> {
        let ended = loop {
            if done.load(Ordering::SeqCst) {
                break Ok(self.lease.proved());
            }
            let (now, next) = (tick(), self.lease.next());
            let due = self.lease.deadline().unwrap_or(now);
            let heard = match self.prover.late() {
                Some(late) => late,
                None if next.is_none_or(|next| next > now) && due > now => {
                    alarm.wait(Some(next.unwrap_or(due).min(due)));
                    continue;
                }
                None if due <= now => {
                    if self.lease.passed(now).is_some() {
                        break Err(self.lost(SealReason::Expired, None));
                    }
                    continue;
                }
                None => self.prover.attempt(self.lease.terms().patience.min(due - now)),
            };
            if let Err(error) = self.hear(heard) {
                break Err(error);
            }
        };
        if let Some(event) = self.renewals.rest(self.prover.slot()) {
            let _ = self.audit.record(event);
        }
        ended
    }

    fn hear(&mut self, heard: Heard) -> Result<(), KmsError> {
        let answer = heard.answer();
        let Heard { slot, asked, proved, request_id } = heard;
        let outcome = proved.as_ref().map_or_else(|error| error.failure.word(), |()| "ok".into());
        for event in self.renewals.note(asked, slot, &outcome, request_id.clone()) {
            let _ = self.audit.record(event);
        }
        let action = self.lease.heard(asked, tick(), answer, early());
        let Some(Action::Wipe | Action::Drain) = action else { return Ok(()) };
        let denied = matches!(answer, Answer::Refused | Answer::Destroyed);
        let reason = if denied { SealReason::Revoked } else { SealReason::Expired };
        let error = self.lost(reason, proved.err());
        if denied {
            let (class, message) = (error.failure.word(), error.message.clone());
            let _ = self.audit.record(Event::Deny { slot, class, message, request_id });
        }
        Err(error)
    }

    fn lost(&self, reason: SealReason, error: Option<KmsError>) -> KmsError {
        self.keys.wipe(reason);
        error.unwrap_or_else(|| {
            KmsError::new(Failure::Unreachable, "the key service has not answered for longer than the grace".to_owned())
        })
    }
}
