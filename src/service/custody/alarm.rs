//! Waiting for a time that goes on during suspend, or for somebody to call.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::time::{ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags};

use crate::keyring::lease::Tick;

/// Now, on the lease's clock.
pub fn tick() -> Tick {
    on(ClockId::Boottime)
}

/// Now, on the clock that stands while the machine is suspended.
pub fn running() -> Duration {
    on(ClockId::Monotonic)
}

fn on(clock: ClockId) -> Duration {
    let now = rustix::time::clock_gettime(clock);
    Duration::new(now.tv_sec.unsigned_abs(), u32::try_from(now.tv_nsec).unwrap_or(0))
}

/// Ends a [`Alarm::wait`] early.
#[derive(Clone)]
pub(in crate::service) struct Bell(Arc<OwnedFd>);

impl Bell {
    /// Whoever waits, or waits next, wakes up.
    pub(in crate::service) fn ring(&self) {
        let _ = rustix::io::write(&*self.0, &1_u64.to_ne_bytes());
    }
}

/// A clock to wait for. Goes on during suspend.
pub(in crate::service) struct Alarm {
    timer: OwnedFd,
    bell: Bell,
}

impl Alarm {
    pub(in crate::service) fn new() -> io::Result<Self> {
        let timer =
            rustix::time::timerfd_create(TimerfdClockId::Boottime, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?;
        let bell = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { timer, bell: Bell(Arc::new(bell)) })
    }

    pub(in crate::service) fn bell(&self) -> Bell {
        self.bell.clone()
    }

    /// Waits until then, or until the bell rings. May return early.
    pub(super) fn wait(&self, until: Option<Tick>) {
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        // A value of zero would disarm the timer.
        let value = until.map(|at| at.max(Duration::from_nanos(1))).map_or(zero, |at| Timespec {
            tv_sec: i64::try_from(at.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(at.subsec_nanos()),
        });
        let timer = Itimerspec { it_interval: zero, it_value: value };
        if let Err(errno) = rustix::time::timerfd_settime(&self.timer, TimerfdTimerFlags::ABSTIME, &timer) {
            // Then the clock is looked at often.
            tracing::error!(%errno, "no timer");
            std::thread::sleep(Duration::from_millis(200));
            return;
        }
        let mut ready = [
            PollFd::from_borrowed_fd(self.timer.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.bell.0.as_fd(), PollFlags::IN),
        ];
        let _ = rustix::event::poll(&mut ready, None);
        let _ = rustix::io::read(&*self.bell.0, &mut [0_u8; 8]);
    }
}
