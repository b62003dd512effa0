//! Custody of a live mount's KEK: asks the key service at intervals whether it still unwraps, and seals or resumes the mount
//! as the [lease](crate::keyring::lease) says.
//!
//! Two threads: *prover* asks, and is the only one that waits for the key service; *deadline* waits for the time. So neither
//! a key service that hangs nor a disk that hangs keeps the other from doing what is due.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::time::{ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags};
use serde::{Deserialize, Serialize};

use super::now;
use super::prover::Prover;
use crate::audit::{Event, Peer, Renewals, Sink};
use crate::fs::seal::{DRAIN, PURGE, SealReport};
use crate::fs::session::MountHandle;
use crate::keyring::SealReason;
use crate::keyring::lease::{Action, Answer, Lease, Terms, Tick};
use crate::kms::{Failure, KmsError, Standing};

/// From one proof to the next, unless `--renew-interval` says otherwise.
pub const RENEW_INTERVAL: Duration = Duration::from_secs(5);
/// How long to work on without an answer, unless `--grace` says otherwise.
pub const GRACE: Duration = Duration::from_secs(600);
/// What `--renew-interval` may be. Shorter ones keep a key service busy, longer ones promise nothing.
pub const INTERVALS: std::ops::RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_secs(24 * 3600);
/// An attempt counts as unanswered after this, or after two intervals if that is less. Key services' time limit for a request.
const PATIENCE: Duration = Duration::from_secs(10);

/// The terms of a mount.
pub fn terms(interval: Duration, grace: Duration) -> Terms {
    Terms { interval, grace, patience: PATIENCE.min(interval * 2) }
}

/// Now, on the lease's clock.
pub fn tick() -> Tick {
    let now = rustix::time::clock_gettime(ClockId::Boottime);
    Duration::new(now.tv_sec.unsigned_abs(), u32::try_from(now.tv_nsec).unwrap_or(0))
}

/// What `status` says of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CustodyStatus {
    /// The slot whose key service was asked last.
    pub slot: u32,
    /// `active`, `grace`, `expired`, `revoked`, `held`, `destroyed`; `sealing` or `resuming` on the way.
    pub state: String,
    /// Since when, RFC 3339.
    pub since: String,
    /// Seconds since the newest proof was asked for.
    pub proved_ago_s: f64,
    /// Seconds until the key service is asked again. Null: it will not be.
    pub next_proof_in_s: Option<f64>,
    /// Seconds until the mount is sealed if no answer comes. Null: it is sealed.
    pub seals_in_s: Option<f64>,
    /// `--renew-interval`.
    pub renew_interval_s: f64,
    /// `--grace`.
    pub grace_s: f64,
    /// While the key service answers: from its refusing the key to the last use of old plaintext, at most.
    pub bound_connected_s: f64,
    /// Cut off from the key service: the same, at most.
    pub bound_partitioned_s: f64,
    /// Proofs since the mount.
    pub proofs: u64,
    /// How the newest attempt failed, if it did: a class of docs/KMS.md.
    pub failure: Option<String>,
    /// The newest seal.
    pub last_seal: Option<serde_json::Value>,
}

struct Inner {
    lease: Lease,
    since: String,
    proofs: u64,
    attempts: u64,
    failure: Option<Failure>,
    last_seal: Option<SealReport>,
    /// Seals and resumes that are due and not done.
    doing: usize,
    renewals: Renewals,
    /// What is to be recorded once what is due is done: a log on a disk that hangs must not keep a seal from happening.
    untold: Vec<Event>,
}

/// See the module's text.
pub(super) struct Custody {
    prover: Prover,
    handle: MountHandle,
    audit: Arc<Sink>,
    inner: Mutex<Inner>,
    /// Held by whoever seals or resumes. A seal at once does not wait for one in order.
    acting: Mutex<()>,
    /// An attempt has come to its end.
    attempted: Condvar,
    wake_prover: OwnedFd,
    wake_deadline: OwnedFd,
}

impl Custody {
    /// Starts it. `asked`: when the KEK was asked for that the mount runs on.
    ///
    /// # Errors
    /// The system's.
    pub(super) fn start(
        prover: Prover,
        terms: Terms,
        asked: Tick,
        handle: MountHandle,
        audit: Arc<Sink>,
    ) -> io::Result<Arc<Self>> {
        let eventfd = || rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let custody = Arc::new(Self {
            prover,
            handle,
            audit,
            inner: Mutex::new(Inner {
                lease: Lease::new(terms, asked),
                since: now(),
                proofs: 1,
                attempts: 0,
                failure: None,
                last_seal: None,
                doing: 0,
                renewals: Renewals::default(),
                untold: Vec::new(),
            }),
            acting: Mutex::new(()),
            attempted: Condvar::new(),
            wake_prover: eventfd()?,
            wake_deadline: eventfd()?,
        });
        let (prover, deadline) = (Alarm::new()?, Alarm::new()?);
        let (this, that) = (custody.clone(), custody.clone());
        std::thread::Builder::new().name("lethefs-prover".into()).spawn(move || this.run_prover(&prover))?;
        std::thread::Builder::new().name("lethefs-lease".into()).spawn(move || that.run_deadline(&deadline))?;
        Ok(custody)
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run_prover(&self, alarm: &Alarm) {
        loop {
            let next = self.inner().lease.next();
            if next.is_none_or(|next| next > tick()) {
                alarm.wait(next, &self.wake_prover);
                continue;
            }
            self.attempt();
        }
    }

    fn run_deadline(&self, alarm: &Alarm) {
        loop {
            let deadline = self.inner().lease.deadline();
            alarm.wait(deadline, &self.wake_deadline);
            self.step(|lease| lease.passed(tick()));
        }
    }

    /// Asks the key service, and does what follows from what it says.
    fn attempt(&self) {
        let asked = tick();
        let proved = self.prover.prove();
        let good = proved.is_ok();
        self.heard(asked, proved);
        if good {
            let asked = tick();
            // Silence is no news here: another slot has just proved the right.
            if let Err(no) = self.prover.recheck() {
                self.heard(asked, Err(no));
            }
        }
        self.inner().attempts += 1;
        self.attempted.notify_all();
    }

    fn heard(&self, asked: Tick, proved: Result<(), KmsError>) {
        let answer = match &proved {
            Ok(()) => Answer::Proved,
            Err(error) => match error.failure.standing() {
                Standing::Revoked => Answer::Refused,
                Standing::Destroyed => Answer::Destroyed,
                Standing::Uncertain => Answer::Nothing,
            },
        };
        let failure = proved.err();
        if let Some(error) = &failure {
            tracing::warn!(class = ?error.failure, detail = error.detail.as_deref(), "the key service: {error}");
        }
        let (slot, request_id) = self.prover.last();
        {
            let mut inner = self.inner();
            inner.failure = failure.as_ref().map(|error| error.failure);
            inner.proofs += u64::from(answer == Answer::Proved);
            let outcome = failure.as_ref().map_or_else(|| "ok".into(), |error| error.failure.word());
            let renewed = inner.renewals.note(asked, slot, &outcome, request_id.clone());
            inner.untold.extend(renewed);
            if let (Some(error), Answer::Refused | Answer::Destroyed, true) =
                (failure, answer, inner.lease.state().serves())
            {
                let (class, message) = (error.failure.word(), error.message);
                inner.untold.push(Event::Deny { slot, class, message, request_id });
            }
        }
        self.step(|lease| lease.heard(asked, tick(), answer, early()));
        // A seal in order that is still writing out serves an expired lease, not a revoked key.
        if matches!(answer, Answer::Refused | Answer::Destroyed) && self.handle.is_draining() {
            self.sealed(self.handle.seal(SealReason::Revoked), "lease");
        }
        self.tell(None);
    }

    /// Moves the lease on and does what it says.
    fn step(&self, change: impl FnOnce(&mut Lease) -> Option<Action>) {
        let action = self.change(change);
        if action.is_some() {
            self.act(action);
            self.inner().doing -= 1;
        }
        self.tell(None);
    }

    /// Records what there is to record.
    fn tell(&self, peer: Option<Peer>) {
        let events = std::mem::take(&mut self.inner().untold);
        for event in events {
            let _ = match peer {
                Some(peer) => self.audit.record_for(peer, event),
                None => self.audit.record(event),
            };
        }
    }

    fn act(&self, action: Option<Action>) {
        let _alone = self.acting();
        match action {
            // The lease may have moved on while this waited for its turn: what it says now is what counts.
            Some(Action::Wipe) if !self.serves() => {
                self.sealed(self.handle.seal(SealReason::Revoked), "lease");
            }
            Some(Action::Drain) if !self.serves() => {
                self.sealed(self.handle.seal_in_order(SealReason::Expired, DRAIN), "lease");
            }
            Some(Action::Resume) if self.serves() => self.resume(),
            _ => {}
        }
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
        if before != after {
            inner.since = now();
            let why = inner.failure.map(Failure::word);
            inner.untold.push(Event::Lease { from: word(&before), to: word(&after), why });
            tracing::warn!(?before, ?after, failure = ?inner.failure, "the lease on the key");
            // Its deadline is another one now.
            let _ = rustix::io::write(&self.wake_deadline, &1_u64.to_ne_bytes());
        }
        action
    }

    fn sealed(&self, report: SealReport, by: &str) {
        tracing::warn!(?report, "sealed");
        let mut inner = self.inner();
        inner.last_seal = Some(report);
        let counts = serde_json::to_value(report).unwrap_or_default();
        inner.untold.push(Event::Seal { reason: word(&report.reason), by: by.into(), counts });
    }

    fn resume(&self) {
        match self.prover.fetch() {
            Ok((scope, version, kek)) => {
                // Who asks for a seal meanwhile has changed the lease already, or seals after this.
                if self.serves() {
                    self.handle.reopen(&[(scope, version, &kek)]);
                    tracing::warn!("resumed");
                    let (slot, request_id) = self.prover.last();
                    self.inner().untold.push(Event::Resume { why: "proved".into(), slot: Some(slot), request_id });
                }
            }
            Err(error) => {
                tracing::warn!(class = ?error.failure, detail = error.detail.as_deref(), "cannot resume: {error}");
                {
                    let mut inner = self.inner();
                    inner.failure = Some(error.failure);
                    inner.untold.push(Event::ResumeFailed { why: error.failure.word() });
                }
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
        if report.sealed_now {
            self.sealed(report, "request");
        }
        self.tell(Some(peer));
        self.inner().doing -= usize::from(held.is_some());
        report
    }

    /// Asks the key service now, whatever was asked for before, and tells where the lease stands then.
    pub(super) fn release(&self, patience: Duration) -> CustodyStatus {
        let mut inner = self.inner();
        let before = inner.attempts;
        // One attempt may be under way already, begun before the release.
        inner.lease.release(tick());
        let _ = rustix::io::write(&self.wake_prover, &1_u64.to_ne_bytes());
        let until = std::time::Instant::now() + patience;
        // (Destroyed: there will be no attempt.)
        while inner.lease.next().is_some()
            && (inner.attempts == before || !(inner.lease.state().serves() || inner.attempts > before + 1))
        {
            let Some(left) = until.checked_duration_since(std::time::Instant::now()) else { break };
            inner = self.attempted.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(inner);
        self.status()
    }

    /// Records what is counted and not recorded yet.
    pub(super) fn end(&self) {
        let rest = self.inner().renewals.rest(self.prover.last().0);
        self.inner().untold.extend(rest);
        self.tell(None);
    }

    /// For `status`.
    pub(super) fn status(&self) -> CustodyStatus {
        let inner = self.inner();
        let (lease, now) = (&inner.lease, tick());
        let terms = lease.terms();
        CustodyStatus {
            slot: self.prover.last().0,
            state: match (inner.doing, lease.state().serves()) {
                (0, _) => word(&lease.state()),
                (_, true) => "resuming".into(),
                (_, false) => "sealing".into(),
            },
            since: inner.since.clone(),
            proved_ago_s: now.saturating_sub(lease.proved()).as_secs_f64(),
            next_proof_in_s: lease.next().map(|next| next.saturating_sub(now).as_secs_f64()),
            seals_in_s: lease.deadline().map(|_| (lease.proved() + terms.longest()).saturating_sub(now).as_secs_f64()),
            renew_interval_s: terms.interval.as_secs_f64(),
            grace_s: terms.grace.as_secs_f64(),
            bound_connected_s: (terms.lease() + PURGE).as_secs_f64(),
            bound_partitioned_s: (terms.longest() + DRAIN + PURGE).as_secs_f64(),
            proofs: inner.proofs,
            failure: inner.failure.map(|failure| word(&failure)),
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

/// Waits for a time that goes on during suspend.
struct Alarm(OwnedFd);

impl Alarm {
    fn new() -> io::Result<Self> {
        Ok(Self(rustix::time::timerfd_create(
            TimerfdClockId::Boottime,
            TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK,
        )?))
    }

    /// Until then, or until somebody writes to `wake`. May return early.
    fn wait(&self, until: Option<Tick>, wake: &OwnedFd) {
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        // A value of zero would disarm the timer.
        let at = until.map(|at| at.max(Duration::from_nanos(1)));
        let value = at.map_or(zero, |at| Timespec {
            tv_sec: i64::try_from(at.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(at.subsec_nanos()),
        });
        let timer = Itimerspec { it_interval: zero, it_value: value };
        if let Err(errno) = rustix::time::timerfd_settime(&self.0, TimerfdTimerFlags::ABSTIME, &timer) {
            // Then the clock is looked at often.
            tracing::error!(%errno, "no timer");
            std::thread::sleep(Duration::from_millis(200));
            return;
        }
        let mut ready = [
            PollFd::from_borrowed_fd(self.0.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(wake.as_fd(), PollFlags::IN),
        ];
        let _ = rustix::event::poll(&mut ready, None);
        let _ = rustix::io::read(wake, &mut [0_u8; 8]);
    }
}
