//! When a daemon that is not heard of is dead in all but name.
//!
//! It must never be one that only had no chance to run: a machine that was suspended wakes up long after what was due, and a
//! frozen group of processes may have us in it as well. So time counts here only as far as it is seen to pass: so many times we
//! were awake, a second apart, and found the same promise broken. Whoever can run has kept it by then; it needs no disk for that
//! and no network.

use std::time::Duration;

use crate::sys::shared_list::Due;

/// From one look at a broken promise to the next.
const TICK: Duration = Duration::from_secs(1);
/// Looks until it is believed.
const TICKS: u32 = 15;
/// From one look to the next while nothing is due. What is due may also come to be due earlier.
const IDLE: Duration = Duration::from_secs(5);

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Look again after this.
    Wait(Duration),
    /// It does not run.
    Kill,
}

/// See the module's text.
#[derive(Debug, Default)]
pub(super) struct Overdue {
    broken: Option<Due>,
    looks: u32,
    /// When, on the clock that stands during suspend.
    looked: Duration,
}

impl Overdue {
    /// What the daemon has promised, and the time on both clocks.
    pub(super) fn look(&mut self, due: Option<Due>, since_boot: Duration, running: Duration) -> Next {
        let left = match due {
            None => Some(IDLE),
            Some(Due::SinceBoot(at)) => at.checked_sub(since_boot),
            Some(Due::Running(at)) => at.checked_sub(running),
        };
        if let Some(left) = left.filter(|left| !left.is_zero()) {
            self.broken = None;
            return Next::Wait(left.min(IDLE));
        }
        if self.broken != due {
            *self = Self { broken: due, looks: 0, looked: running };
            return Next::Wait(TICK);
        }
        match (self.looked + TICK).checked_sub(running).filter(|left| !left.is_zero()) {
            Some(left) => Next::Wait(left),
            None => {
                (self.looks, self.looked) = (self.looks + 1, running);
                if self.looks < TICKS { Next::Wait(TICK) } else { Next::Kill }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn s(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    /// Looks whenever it wants to, with both clocks going, until it wants to kill. When that was.
    fn killed(overdue: &mut Overdue, due: impl Fn(Duration) -> Option<Due>, until: Duration) -> Option<Duration> {
        let mut now = s(0.0);
        while now < until {
            match overdue.look(due(now), now, now) {
                Next::Kill => return Some(now),
                Next::Wait(wait) => now += wait,
            }
        }
        None
    }

    #[test]
    fn who_keeps_a_promise_or_gave_none_lives() {
        assert_eq!(killed(&mut Overdue::default(), |_| None, s(1e6)), None);
        // Renewed every 5 seconds for 600 more; every 0.2 for 0.6; now and then 10 s too late.
        let renewed = |every: f64, holds: f64| {
            move |now: Duration| {
                let at = (now.as_secs_f64() / every).floor() * every;
                Some(Due::SinceBoot(s(at + holds)))
            }
        };
        assert_eq!(killed(&mut Overdue::default(), renewed(5.0, 600.0), s(1e5)), None);
        assert_eq!(killed(&mut Overdue::default(), renewed(0.2, 0.6), s(1e4)), None);
        assert_eq!(killed(&mut Overdue::default(), renewed(20.0, 10.0), s(1e5)), None);
    }

    #[test]
    fn who_stands_still_is_killed_soon_after() {
        for due in [Due::SinceBoot(s(601.6)), Due::Running(s(601.6))] {
            let at = killed(&mut Overdue::default(), |_| Some(due), s(1e6)).expect("killed");
            assert!(at >= s(601.6 + 15.0) && at < s(601.6 + 21.0), "{at:?}");
        }
        // What is due came to be due while nobody looked.
        let at = killed(&mut Overdue::default(), |now| (now > s(101.0)).then_some(Due::SinceBoot(s(102.0))), s(1e6));
        assert!(at.expect("killed") < s(102.0 + 21.0), "{at:?}");
    }

    #[test]
    fn time_that_nobody_ran_in_does_not_count() {
        // Suspended for a day: one clock went on.
        let (day, mut overdue) = (s(86400.0), Overdue::default());
        let due = Some(Due::SinceBoot(s(600.0)));
        assert_eq!(overdue.look(due, s(10.0), s(10.0)), Next::Wait(IDLE));
        assert_eq!(overdue.look(due, day, s(15.0)), Next::Wait(TICK));
        for n in 1..TICKS {
            let n = f64::from(n);
            assert_eq!(overdue.look(due, day + s(n), s(15.0 + n)), Next::Wait(TICK));
        }
        // It says at last that it seals now, which takes a while: as measured by the clock that stands during suspend.
        let seals = Some(Due::Running(s(90.0)));
        assert_eq!(overdue.look(seals, day * 2, s(31.0)), Next::Wait(IDLE));
        // Frozen together with the daemon: the clocks went on, we did not. One look is one look.
        let mut overdue = Overdue::default();
        assert_eq!(overdue.look(due, day, day), Next::Wait(TICK));
        for n in 1..TICKS {
            assert_eq!(overdue.look(due, day * (n + 1), day * (n + 1)), Next::Wait(TICK));
            // Nor are many signals many looks.
            assert_eq!(overdue.look(due, day * (n + 1), day * (n + 1) + s(0.5)), Next::Wait(s(0.5)));
        }
        assert_eq!(overdue.look(due, day * 99, day * 99), Next::Kill);
    }
}
