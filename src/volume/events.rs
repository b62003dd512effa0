//! Integrity events: one structured line for each failure, and never more lines than a disk can hold.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::Damage;
use crate::audit::{Event, Sink};
use crate::crypto::ObjectId;

/// So many at once: a person who damages a file sees each of its blocks.
const BURST: u32 = 100;
/// Then one in this time: a scan over a damaged volume writes some two megabytes a day.
const EVERY: Duration = Duration::from_secs(10);

/// What a failure is about. Worked out only for events that go out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Victim {
    /// The object, if its header tells.
    pub object: Option<ObjectId>,
    /// Its path below the backing root, in backing names. Never a plaintext name.
    pub path: Option<String>,
}

/// Holds back what comes too fast. The time is the caller's.
pub struct Limiter(Mutex<State>);

struct State {
    left: u32,
    /// When `left` was last counted up.
    at: Duration,
    held_back: u64,
}

impl Default for Limiter {
    fn default() -> Self {
        Self(Mutex::new(State { left: BURST, at: Duration::ZERO, held_back: 0 }))
    }
}

impl Limiter {
    /// Whether an event goes out at `now`, a time since any fixed moment, and how many were held back before it.
    pub fn admit(&self, now: Duration) -> Option<u64> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Threads read the clock before they come here: one may be late.
        let earned = now.saturating_sub(state.at).as_nanos() / EVERY.as_nanos();
        let earned = u32::try_from(earned).unwrap_or(u32::MAX);
        state.left = state.left.saturating_add(earned).min(BURST);
        state.at += EVERY.saturating_mul(earned);
        if state.left == 0 {
            state.held_back += 1;
            return None;
        }
        state.left -= 1;
        Some(std::mem::take(&mut state.held_back))
    }
}

/// Writes one event.
pub(super) fn write(damage: Damage, ino: u64, block: Option<u64>, victim: &Victim, count: u64, held_back: u64) {
    let kind = serde_json::to_value(damage).unwrap_or_default();
    let object = victim.object.map(|id| id.to_string());
    tracing::error!(
        kind = kind.as_str(),
        object,
        path = victim.path,
        backing_ino = (ino > 0).then_some(ino),
        block,
        count,
        held_back,
        "integrity failure: {damage}"
    );
}

/// Records one event in the audit log: without a path, which tells of the tree, and never by name.
pub(super) fn record(
    sink: &Sink,
    damage: Damage,
    backing_ino: u64,
    block: Option<u64>,
    victim: &Victim,
    count: u64,
    held_back: u64,
) {
    let kind = serde_json::to_value(damage).ok().and_then(|kind| kind.as_str().map(str::to_owned)).unwrap_or_default();
    let object = victim.object.map(|id| id.to_string());
    let _ = sink.record(Event::Integrity { kind, object, backing_ino, block, count, held_back });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_goes_out_then_one_in_a_while_and_the_rest_is_counted() {
        let limiter = Limiter::default();
        let start = Duration::from_secs(1_000_000);
        let out = (0..10_000).filter(|_| limiter.admit(start).is_some()).count();
        assert_eq!(out, BURST as usize);
        // A second scan in the same moment, and one just before the time is up.
        assert_eq!(limiter.admit(start + Duration::from_millis(1)), None);
        assert_eq!(limiter.admit(start + EVERY - Duration::from_millis(1)), None);
        assert_eq!(limiter.admit(start + EVERY), Some(10_000 - u64::from(BURST) + 2), "all that was held back is told");
        assert_eq!(limiter.admit(start + EVERY), None);
        assert_eq!(limiter.admit(start + 2 * EVERY), Some(1));
        // A clock that was read before another thread's.
        assert_eq!(limiter.admit(start), None);
        assert_eq!(limiter.admit(Duration::ZERO), None);
    }

    #[test]
    fn a_day_of_failures_is_bounded_and_never_silent() {
        let limiter = Limiter::default();
        let (mut out, mut told, mut failures) = (0_u64, 0, 0_u64);
        let mut longest_silence = Duration::ZERO;
        let mut last = Duration::ZERO;
        let day = Duration::from_secs(86_400);
        let mut now = Duration::ZERO;
        while now < day {
            failures += 1;
            if let Some(held_back) = limiter.admit(now) {
                (out, told) = (out + 1, told + held_back);
                longest_silence = longest_silence.max(now - last);
                last = now;
            }
            now += Duration::from_millis(70);
        }
        assert!(out <= u64::from(BURST) + 8640, "{out} lines");
        assert!(longest_silence <= EVERY + Duration::from_millis(70), "{longest_silence:?}");
        // What is not told yet is what came after the last that went out.
        let open = ((day - last).as_millis() / 70) as u64 + 1;
        assert!(out + told <= failures && out + told + open >= failures, "{out} + {told} of {failures}");
        // Quiet for long, it is as at the beginning; no longer quiet earns no more than that.
        let later = (0..1000).filter(|_| limiter.admit(100 * day).is_some()).count();
        assert_eq!(later, BURST as usize);
    }

    #[test]
    fn the_kind_is_one_word() {
        assert_eq!(serde_json::to_value(Damage::MutableHeader).unwrap(), "mutable-header");
    }
}
