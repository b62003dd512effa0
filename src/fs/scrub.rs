//! After a seal: every worker overwrites what passed through it.
//!
//! A worker's buffers are its own: fuser's for requests, ours for plaintext, its stack. So each has to come by itself: as many
//! statfs(2) as there are workers are made at once, and each request's handler keeps its worker until all are there.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long workers wait for each other. One that waits for a disk does not come, and is counted.
const PATIENCE: Duration = Duration::from_secs(2);

/// See the module's text.
#[derive(Default)]
pub struct Scrub {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Workers that are still to come.
    expected: usize,
    /// Changes with each scrub, so that a worker that is late does not wait for the next.
    round: u64,
}

impl Scrub {
    /// Has `workers` workers come by; `call` makes one request that ends up in [`arrive`](Self::arrive). How many did not.
    pub fn run(&self, workers: usize, call: impl Fn() + Send + Sync) -> usize {
        {
            let mut state = self.lock();
            state.expected = workers;
            state.round += 1;
        }
        std::thread::scope(|scope| {
            for _ in 0..workers {
                // Without a thread one worker less comes, and is counted.
                let _ = std::thread::Builder::new().name("lethefs-scrub".into()).spawn_scoped(scope, &call);
            }
        });
        let mut state = self.lock();
        std::mem::take(&mut state.expected)
    }

    /// In a handler: if workers are expected, does `wipe` on this one, and keeps it until all others have come or the time is up.
    pub fn arrive(&self, wipe: impl FnOnce()) {
        let mut state = self.lock();
        if state.expected == 0 {
            return;
        }
        wipe();
        state.expected -= 1;
        self.changed.notify_all();
        let (round, until) = (state.round, Instant::now() + PATIENCE);
        while state.expected > 0 && state.round == round {
            let Some(left) = until.checked_duration_since(Instant::now()) else { break };
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn every_worker_comes_once() {
        let scrub = Scrub::default();
        let came = Mutex::new(HashSet::new());
        assert_eq!(
            scrub.run(5, || scrub.arrive(|| assert!(came.lock().unwrap().insert(std::thread::current().id())))),
            0
        );
        assert_eq!(came.lock().unwrap().len(), 5);
        scrub.arrive(|| panic!("nobody is expected"));
        // One worker is busy elsewhere.
        let first = Mutex::new(true);
        let missing = scrub.run(3, || {
            if !std::mem::take(&mut *first.lock().unwrap()) {
                scrub.arrive(|| ());
            }
        });
        assert_eq!(missing, 1);
    }
}
