//! After a seal: every worker overwrites what passed through it.
//!
//! A worker's buffers are its own: fuser's for requests, ours for plaintext, its stack. So each has to come by itself: as many
//! statfs(2) as there are workers are made at once, and each request's handler keeps its worker until all are there.

use std::collections::HashSet;
use std::sync::mpsc::channel;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use super::inode::lock;

/// How long workers are waited for. One that waits for a disk does not come, and is counted.
const PATIENCE: Duration = Duration::from_secs(2);

/// See the module's text.
#[derive(Default)]
pub struct Scrub {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Workers that are to come; 0: nobody is waited for.
    expected: usize,
    came: HashSet<ThreadId>,
    /// Changes with each scrub, so that a worker that is late does not wait for the next.
    round: u64,
}

impl Scrub {
    /// Has `workers` workers come by; `call` makes one request that ends up in [`arrive`](Self::arrive), and may never return.
    /// How many did not come.
    pub fn run(&self, workers: usize, call: impl Fn() + Send + Sync + 'static) -> usize {
        {
            let mut state = lock(&self.state);
            state.expected = workers;
            state.came.clear();
            state.round += 1;
        }
        let call = Arc::new(call);
        let (tell, ended) = channel();
        for _ in 0..workers {
            let (call, tell) = (call.clone(), tell.clone());
            // Without a thread one worker less comes, and is counted.
            let _ = std::thread::Builder::new().name("lethefs-scrub".into()).spawn(move || {
                call();
                let _ = tell.send(());
            });
        }
        drop(tell);
        let until = Instant::now() + PATIENCE;
        let mut state = lock(&self.state);
        while state.came.len() < workers {
            let Some(left) = until.checked_duration_since(Instant::now()) else { break };
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        let missing = workers - state.came.len();
        state.expected = 0;
        drop(state);
        self.changed.notify_all();
        // A call that is not over keeps the mount in use: an unmount right after a seal would find it so.
        let over = Instant::now() + PATIENCE;
        while missing == 0 && ended.recv_timeout(over.saturating_duration_since(Instant::now())).is_ok() {}
        missing
    }

    /// In a handler: if this worker is waited for, does `wipe`, and keeps it until all others have come or nobody waits any more.
    pub fn arrive(&self, wipe: impl FnOnce()) {
        let mut state = lock(&self.state);
        let me = std::thread::current().id();
        if state.expected == 0 || state.came.contains(&me) {
            return;
        }
        wipe();
        state.came.insert(me);
        self.changed.notify_all();
        let round = state.round;
        while state.expected > state.came.len() && state.round == round {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    /// Workers that take calls from a queue, as fuser's do, and how often each wiped.
    fn pool(workers: usize, stuck: usize) -> (Arc<Scrub>, mpsc::Sender<()>, Arc<Mutex<Vec<ThreadId>>>) {
        let scrub = Arc::new(Scrub::default());
        let (call, calls) = mpsc::channel();
        let calls = Arc::new(Mutex::new(calls));
        let wiped = Arc::new(Mutex::new(Vec::new()));
        for _ in stuck..workers {
            let (scrub, calls, wiped) = (scrub.clone(), calls.clone(), wiped.clone());
            std::thread::spawn(move || {
                loop {
                    let Ok(()) = lock(&calls).recv() else { return };
                    scrub.arrive(|| lock(&wiped).push(std::thread::current().id()));
                }
            });
        }
        (scrub, call, wiped)
    }

    #[test]
    fn every_worker_comes_once() {
        let (scrub, call, wiped) = pool(5, 0);
        for round in 1..4 {
            let call = Mutex::new(call.clone());
            assert_eq!(scrub.run(5, move || lock(&call).send(()).unwrap()), 0);
            let mut threads = lock(&wiped).clone();
            assert_eq!(threads.len(), 5 * round);
            threads.sort_by_key(|id| format!("{id:?}"));
            threads.dedup();
            assert_eq!(threads.len(), 5);
        }
        scrub.arrive(|| panic!("nobody is waited for"));
    }

    #[test]
    fn a_worker_that_is_stuck_is_counted_and_keeps_nobody() {
        let (scrub, call, wiped) = pool(3, 1);
        let call = Mutex::new(call);
        assert_eq!(scrub.run(3, move || lock(&call).send(()).unwrap()), 1);
        assert_eq!(lock(&wiped).len(), 2, "nobody twice");
        // All of them.
        assert_eq!(Scrub::default().run(2, || std::thread::sleep(Duration::from_secs(3600))), 2);
    }
}
