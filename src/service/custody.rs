//! Custody of a live mount's KEK: asks the key service at intervals whether it still unwraps, and seals or resumes the mount
//! as the [lease](crate::keyring::lease) says.
//!
//! Four kinds of threads, so that nothing that hangs keeps another from doing what is due: one for each slot waits for its key
//! service ([`prover`](super::prover)); *prover* decides which slot is asked and hears the answers; *deadline* waits for the time,
//! and does the seals that wait for a disk; the recorder writes the audit log.

mod alarm;
mod meanwhile;
mod recorder;
mod status;

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;

pub(super) use self::alarm::{Alarm, Bell};
pub use self::alarm::{running, tick};
pub(super) use self::meanwhile::while_renewed;
use self::recorder::Recorder;
pub use self::status::CustodyStatus;
use super::now;
use super::prover::{Heard, Prover};
use crate::audit::{Event, Peer, Renewals, Sink};
use crate::fs::seal::{DRAIN, PURGE, SealReport};
use crate::fs::session::MountHandle;
use crate::keyring::SealReason;
use crate::keyring::lease::{Action, Answer, Lease, State, Terms, Tick};
use crate::kms::Failure;
use crate::sys::shared_list::{Due, SharedList};

/// From one proof to the next, unless `--renew-interval` says otherwise.
pub const RENEW_INTERVAL: Duration = Duration::from_secs(5);
/// How long to work on without an answer, unless `--grace` says otherwise.
pub const GRACE: Duration = Duration::from_secs(600);
/// What `--renew-interval` may be. Shorter ones keep a key service busy, longer ones promise nothing.
pub const INTERVALS: std::ops::RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_secs(24 * 3600);
/// How long a seal takes at most, whatever hangs: what is dirty, what is cached, workers' buffers, and the rest for threads to run.
const SEAL: Duration = DRAIN.saturating_add(PURGE).saturating_add(Duration::from_secs(10));
/// An attempt counts as unanswered after this, or after two intervals if that is less.
const PATIENCE: Duration = Duration::from_secs(10);

/// The terms of a mount.
pub fn terms(interval: Duration, grace: Duration) -> Terms {
    Terms { interval, grace, patience: PATIENCE.min(interval * 2) }
}

struct Inner {
    lease: Lease,
    since: String,
    proofs: u64,
    /// When the newest attempt that has come to its end was begun.
    attempted: Tick,
    failure: Option<Failure>,
    last_seal: Option<SealReport>,
    /// Seals and resumes that are due and not done.
    doing: usize,
    /// A seal in order, which waits for a disk: for the deadline thread.
    drain: bool,
    /// The kernel may have plaintext cached: the mount is open, or its seal is not done.
    exposed: bool,
    renewals: Renewals,
}

/// See the module's text.
pub(super) struct Custody {
    prover: Prover,
    handle: MountHandle,
    /// Where the supervisor looks whether this is alive.
    list: Arc<SharedList>,
    recorder: Recorder,
    inner: Mutex<Inner>,
    /// Held by whoever seals or resumes. A seal at once does not wait for one in order.
    acting: Mutex<()>,
    /// An attempt has come to its end.
    attempted: Condvar,
    wake_prover: Bell,
    wake_deadline: Bell,
}

impl Custody {
    /// Starts it. `asked`: when the newest proof was asked for; `proving`: what the prover's slots ring.
    ///
    /// # Errors
    /// The system's.
    pub(super) fn start(
        (prover, proving): (Prover, Alarm),
        (terms, asked): (Terms, Tick),
        handle: MountHandle,
        list: Arc<SharedList>,
        audit: Arc<Sink>,
    ) -> io::Result<Arc<Self>> {
        let deadline = Alarm::new()?;
        let custody = Arc::new(Self {
            prover,
            handle,
            list,
            recorder: Recorder::start(audit)?,
            inner: Mutex::new(Inner {
                lease: Lease::new(terms, asked),
                since: now(),
                proofs: 1,
                attempted: asked,
                failure: None,
                last_seal: None,
                doing: 0,
                drain: false,
                exposed: true,
                renewals: Renewals::default(),
            }),
            acting: Mutex::new(()),
            attempted: Condvar::new(),
            wake_prover: proving.bell(),
            wake_deadline: deadline.bell(),
        });
        let (this, that) = (custody.clone(), custody.clone());
        std::thread::Builder::new().name("lethefs-prover".into()).spawn(move || this.run_prover(&proving))?;
        std::thread::Builder::new().name("lethefs-lease".into()).spawn(move || that.run_deadline(&deadline))?;
        Ok(custody)
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run_prover(&self, alarm: &Alarm) {
        loop {
            // A key service that was given up on may still have come to say something.
            while let Some(late) = self.prover.late() {
                self.heard(late);
            }
            let next = self.inner().lease.next();
            if next.is_none_or(|next| next > tick()) {
                alarm.wait(next);
                continue;
            }
            let begun = tick();
            let patience = self.inner().lease.terms().patience;
            self.heard(self.prover.attempt(patience));
            self.inner().attempted = begun;
            self.attempted.notify_all();
        }
    }

    fn run_deadline(&self, alarm: &Alarm) {
        loop {
            let (deadline, drain) = {
                let mut inner = self.inner();
                (inner.lease.deadline(), std::mem::take(&mut inner.drain))
            };
            if drain {
                self.act(Action::Drain);
                continue;
            }
            alarm.wait(deadline);
            self.step(|lease| lease.passed(tick()));
        }
    }

    /// Does what follows from what a key service said.
    fn heard(&self, heard: Heard) {
        let answer = heard.answer();
        let Heard { slot, asked, proved, request_id } = heard;
        let failure = proved.err();
        if let Some(error) = &failure {
            tracing::warn!(class = ?error.failure, detail = error.detail.as_deref(), "the key service: {error}");
        }
        let denied = {
            let mut inner = self.inner();
            inner.failure = failure.as_ref().map(|error| error.failure);
            inner.proofs += u64::from(answer == Answer::Proved);
            let outcome = failure.as_ref().map_or_else(|| "ok".into(), |error| error.failure.word());
            for event in inner.renewals.note(asked, slot, &outcome, request_id.clone()) {
                self.recorder.record(None, event);
            }
            inner.lease.state().serves() && matches!(answer, Answer::Refused | Answer::Destroyed)
        };
        if let (true, Some(error)) = (denied, failure) {
            let (class, message) = (error.failure.word(), error.message);
            self.recorder.record(None, Event::Deny { slot, class, message, request_id });
        }
        self.step(|lease| lease.heard(asked, tick(), answer, early()));
        if matches!(answer, Answer::Refused | Answer::Destroyed) {
            if self.handle.is_draining() {
                // A seal in order that is still writing out serves an expired lease, not a revoked key.
                self.sealed(self.handle.seal(SealReason::Revoked), "lease", None);
            } else if !self.handle.is_open() {
                // Programs are told the newer reason.
                self.handle.abandon(SealReason::Revoked);
            }
        }
    }

    /// Moves the lease on and does what it says, or has it done.
    fn step(&self, change: impl FnOnce(&mut Lease) -> Option<Action>) {
        match self.change(change) {
            None => {}
            // Waits for a disk: not for who asks key services.
            Some(Action::Drain) => {
                self.inner().drain = true;
                self.wake_deadline.ring();
            }
            Some(action) => self.act(action),
        }
    }

    fn act(&self, action: Action) {
        let alone = self.acting();
        match action {
            // The lease may have moved on while this waited for its turn: what it says now is what counts.
            Action::Wipe if !self.serves() => {
                self.sealed(self.handle.seal(SealReason::Revoked), "lease", None);
            }
            Action::Drain if !self.serves() => {
                let expired = || self.inner().lease.state() == State::Expired;
                self.sealed(self.handle.seal_in_order(SealReason::Expired, DRAIN, expired), "lease", None);
            }
            Action::Resume if self.serves() => self.resume(),
            _ => {}
        }
        drop(alone);
        self.inner().doing -= 1;
    }

    fn acting(&self) -> MutexGuard<'_, ()> {
        self.acting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serves(&self) -> bool {
        self.inner().lease.state().serves()
    }

    fn change(&self, change: impl FnOnce(&mut Lease) -> Option<Action>) -> Option<Action> {
        let mut inner = self.inner();
        let before = inner.lease.state();
        let action = change(&mut inner.lease);
        let after = inner.lease.state();
        inner.doing += usize::from(action.is_some());
        if inner.exposed && after.serves() {
            self.list.set_due(Some(Due::SinceBoot(inner.lease.proved() + inner.lease.terms().longest())));
        } else if inner.exposed && action.is_some() {
            self.list.set_due(Some(Due::Running(running() + SEAL)));
        }
        if before != after {
            inner.since = now();
            let why = inner.failure.map(Failure::word);
            self.recorder.record(None, Event::Lease { from: word(&before), to: word(&after), why });
            tracing::warn!(?before, ?after, failure = ?inner.failure, "the lease on the key");
            // Its deadline is another one now.
            self.wake_deadline.ring();
        }
        action
    }

    fn sealed(&self, report: SealReport, by: &str, peer: Option<Peer>) {
        {
            let mut inner = self.inner();
            if !self.handle.is_open() {
                inner.exposed = false;
                self.list.set_due(None);
            }
            if !report.sealed_now {
                return;
            }
            inner.last_seal = Some(report);
        }
        tracing::warn!(?report, "sealed");
        let counts = serde_json::to_value(report).unwrap_or_default();
        self.recorder.record(peer, Event::Seal { reason: word(&report.reason), by: by.into(), counts });
    }

    fn resume(&self) {
        match self.prover.fetch() {
            Ok(fetched) => {
                self.recorder.record(None, fetched.event);
                // Who asks for a seal meanwhile has changed the lease already, or seals after this.
                if self.serves() {
                    {
                        let mut inner = self.inner();
                        inner.exposed = true;
                        let seals = inner.lease.proved() + inner.lease.terms().longest();
                        self.list.set_due(Some(Due::SinceBoot(seals)));
                    }
                    // A proof that overtook a drain has kept the mount from being sealed at all.
                    if self.handle.reopen(&[(fetched.scope, fetched.version, &fetched.kek)]) {
                        tracing::warn!("resumed");
                        let resumed = Event::Resume {
                            why: "proved".into(),
                            slot: Some(fetched.slot),
                            request_id: fetched.request_id,
                        };
                        self.recorder.record(None, resumed);
                    }
                }
            }
            Err(failed) => {
                let (error, event) = *failed;
                tracing::warn!(class = ?error.failure, detail = error.detail.as_deref(), "cannot resume: {error}");
                self.recorder.record(None, event);
                self.recorder.record(None, Event::ResumeFailed { why: error.failure.word() });
                self.inner().failure = Some(error.failure);
                self.change(|lease| {
                    lease.not_resumed(tick());
                    None
                });
            }
        }
    }

    /// Seals at once, until somebody asks to resume.
    pub(super) fn hold(&self, peer: Peer) -> SealReport {
        let held = self.change(Lease::hold);
        let _alone = if self.handle.is_draining() { None } else { Some(self.acting()) };
        let report = self.handle.seal(SealReason::Revoked);
        self.sealed(report, "request", Some(peer));
        self.inner().doing -= usize::from(held.is_some());
        report
    }

    /// Asks the key service now, whatever was asked for before, and tells where the lease stands then.
    pub(super) fn release(&self, patience: Duration) -> CustodyStatus {
        let mut inner = self.inner();
        let released = tick();
        inner.lease.release(released);
        self.wake_prover.ring();
        let until = Instant::now() + patience;
        // (Destroyed: there will be no attempt.)
        while inner.lease.next().is_some() && inner.attempted < released {
            let Some(left) = until.checked_duration_since(Instant::now()) else { break };
            inner = self.attempted.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(inner);
        self.status()
    }

    /// Records what is counted and not recorded yet, and waits for the log.
    pub(super) fn end(&self) {
        let rest = self.inner().renewals.rest(self.prover.slot());
        rest.into_iter().for_each(|event| self.recorder.record(None, event));
        self.recorder.end();
    }

    /// For `status`.
    pub(super) fn status(&self) -> CustodyStatus {
        let inner = self.inner();
        let (lease, now) = (&inner.lease, tick());
        let terms = lease.terms();
        let left = |at: Tick| at.saturating_sub(now).as_secs_f64();
        CustodyStatus {
            slot: self.prover.slot(),
            state: match (inner.doing, lease.state().serves()) {
                (0, _) => word(&lease.state()),
                (_, true) => "resuming".into(),
                (_, false) => "sealing".into(),
            },
            since: inner.since.clone(),
            proved_ago_s: now.saturating_sub(lease.proved()).as_secs_f64(),
            next_proof_in_s: lease.next().map(left),
            seals_in_s: lease.deadline().map(|_| left(lease.proved() + terms.longest())),
            renew_interval_s: terms.interval.as_secs_f64(),
            grace_s: terms.grace.as_secs_f64(),
            bound_connected_s: (terms.lease() + PURGE).as_secs_f64(),
            bound_partitioned_s: (terms.longest() + DRAIN + PURGE).as_secs_f64(),
            proofs: inner.proofs,
            failure: inner.failure.map(Failure::word),
            last_seal: inner.last_seal.and_then(|report| serde_json::to_value(report).ok()),
        }
    }
}

/// An enum's name, as JSON has it.
fn word(value: &impl Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

/// How much of its fifth of the interval an attempt comes early.
fn early() -> f64 {
    let mut bytes = [0; 4];
    // Without random numbers everybody asks at the full interval, which is allowed.
    let _ = getrandom::fill(&mut bytes);
    f64::from(u32::from_ne_bytes(bytes)) / f64::from(u32::MAX)
}
