//! The lease on a KEK: a pure state machine. It is told what a key service said and what time it is, and says what to do.
//!
//! The clock is the caller's, as a time since boot that goes on during suspend (CLOCK_BOOTTIME): a laptop that slept through
//! its grace wakes up to an expired lease.
//!
//! ```text
//!   Active ──no answer, or an answer that decides nothing──▶ Grace ──time──▶ Expired
//!     ▲                                                        │               │
//!     └──────────────── the canary was unwrapped ◀─────────────┴───────────────┤
//!                                                                              │
//!   any ──refused──▶ Revoked ──the canary was unwrapped──▶ Active              │
//!   any ──sealed on request──▶ Held ──released, then as Revoked──▶ …           │
//!   any ──proved destroyed──▶ Destroyed (final) ◀──────────────────────────────┘
//! ```

use std::time::Duration;

use serde::Serialize;

/// A time since boot.
pub type Tick = Duration;

/// What was agreed when the volume was mounted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// From one proof to the next attempt, at most.
    pub interval: Duration,
    /// How long an attempt may take before it counts as unanswered.
    pub patience: Duration,
    /// How long to work on while no answer comes. Zero: fail closed.
    pub grace: Duration,
}

impl Terms {
    /// From asking for a proof to when the next one is due.
    pub fn lease(&self) -> Duration {
        self.interval + self.patience
    }

    /// From the last proof to the seal if nobody answers.
    pub fn longest(&self) -> Duration {
        self.lease() + self.grace
    }
}

/// Where a lease stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// The last proof is fresh.
    Active,
    /// The key service does not answer; work goes on for a limited time.
    Grace,
    /// It did not answer for too long. Sealed.
    Expired,
    /// It refused the key. Sealed.
    Revoked,
    /// Sealed on request, until somebody asks to resume.
    Held,
    /// The key is proved to be destroyed. Sealed for ever.
    Destroyed,
}

impl State {
    /// Whether keys may be used.
    pub fn serves(self) -> bool {
        matches!(self, Self::Active | Self::Grace)
    }
}

/// What an attempt to prove that the key service still unwraps came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The canary came back, and was the right one.
    Proved,
    /// The key service refuses this key, or refuses it to us.
    Refused,
    /// The key is proved to be destroyed.
    Destroyed,
    /// No answer, or one that says nothing about the key.
    Nothing,
}

/// What to do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Wipe at once; what is not written out is lost.
    Wipe,
    /// Write everything out, then wipe.
    Drain,
    /// Fetch the KEK and go on. [`Lease::not_resumed`] if that fails.
    Resume,
}

/// A lease. See the module's text.
#[derive(Debug)]
pub struct Lease {
    terms: Terms,
    state: State,
    /// When the newest proof was asked for.
    proved: Tick,
    /// When the next attempt is due.
    next: Tick,
    /// Somebody asked for an attempt then; one that was begun before does not count.
    requested: Option<Tick>,
}

impl Lease {
    /// A lease whose first proof was asked for at `asked`.
    pub fn new(terms: Terms, asked: Tick) -> Self {
        Self { terms, state: State::Active, proved: asked, next: asked + terms.interval, requested: None }
    }

    /// Where it stands.
    pub fn state(&self) -> State {
        self.state
    }

    /// The terms.
    pub fn terms(&self) -> Terms {
        self.terms
    }

    /// When the newest proof was asked for.
    pub fn proved(&self) -> Tick {
        self.proved
    }

    /// When to try next. `None`: never again without a request.
    pub fn next(&self) -> Option<Tick> {
        (!matches!(self.state, State::Held | State::Destroyed)).then_some(self.requested.unwrap_or(self.next))
    }

    /// When [`passed`](Self::passed) has something to say: the end of the lease, then that of the grace.
    pub fn deadline(&self) -> Option<Tick> {
        match self.state {
            State::Active => Some(self.proved + self.terms.lease()),
            State::Grace => Some(self.proved + self.terms.longest()),
            _ => None,
        }
    }

    /// An attempt that was begun at `asked` has come to this at `now`. `early` in 0..=1: how much of up to a fifth of the
    /// interval to leave out before the next one, so that many mounts do not ask at the same instant.
    pub fn heard(&mut self, asked: Tick, now: Tick, answer: Answer, early: f64) -> Option<Action> {
        let interval = self.terms.interval.mul_f64(1.0 - early.clamp(0.0, 1.0) / 5.0);
        self.next = now + interval;
        self.requested = self.requested.filter(|requested| asked < *requested);
        if self.state == State::Destroyed {
            return None;
        }
        match answer {
            Answer::Destroyed => self.close(State::Destroyed, Action::Wipe),
            Answer::Refused => {
                // A seal on request stays one: that the key is refused meanwhile is what is expected.
                if self.state == State::Held { None } else { self.close(State::Revoked, Action::Wipe) }
            }
            Answer::Nothing => {
                if self.state == State::Active {
                    self.state = State::Grace;
                }
                self.passed(now)
            }
            Answer::Proved => {
                // It counts from when it was asked for: an answer may have been on its way for long.
                let fresh = asked + self.terms.lease() > now;
                self.next = (asked + interval).max(now);
                match self.state {
                    State::Active | State::Grace => {
                        self.proved = self.proved.max(asked);
                        self.state = if fresh { State::Active } else { State::Grace };
                        self.passed(now)
                    }
                    State::Expired | State::Revoked if fresh => {
                        self.state = State::Active;
                        self.proved = asked;
                        Some(Action::Resume)
                    }
                    _ => None,
                }
            }
        }
    }

    /// It is `now`.
    pub fn passed(&mut self, now: Tick) -> Option<Action> {
        if self.state == State::Active && now >= self.proved + self.terms.lease() {
            self.state = State::Grace;
        }
        if self.state == State::Grace && now >= self.proved + self.terms.longest() {
            return self.close(State::Expired, Action::Drain);
        }
        None
    }

    /// Somebody with the right to asks for a seal. It lasts until [`release`](Self::release).
    pub fn hold(&mut self) -> Option<Action> {
        if self.state == State::Destroyed { None } else { self.close(State::Held, Action::Wipe) }
    }

    /// Somebody asks to resume: an attempt is due now. The key service decides.
    pub fn release(&mut self, now: Tick) {
        if self.state == State::Held {
            self.state = State::Revoked;
        }
        self.requested = Some(now);
    }

    /// [`Action::Resume`] could not be carried out; sealed as before.
    pub fn not_resumed(&mut self, now: Tick) {
        if self.state.serves() {
            self.state = State::Revoked;
            self.next = now + self.terms.interval;
        }
    }

    fn close(&mut self, state: State, action: Action) -> Option<Action> {
        let served = self.state.serves();
        self.state = state;
        served.then_some(action)
    }
}

#[cfg(test)]
mod tests;
