//! Where the log's lines go: to descriptor 2, by a thread of their own once a process has one.
//!
//! A log that takes nothing, a full pipe or a disk that hangs, may not keep a key or hold up a supervisor. So nobody waits for it:
//! lines wait in a bounded queue, and what finds no room there is dropped and counted in the log.

use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::Duration;

/// Lines that wait.
const WAITING: usize = 1024;
/// For how long the end of a process waits for what is still to be written.
const SETTLES: Duration = Duration::from_secs(1);

static QUEUE: OnceLock<Arc<Queue>> = OnceLock::new();

struct Queue {
    sender: SyncSender<Vec<u8>>,
    taken: AtomicU64,
    dropped: AtomicU64,
    written: Mutex<u64>,
    wrote: Condvar,
}

impl Queue {
    fn new(sender: SyncSender<Vec<u8>>) -> Self {
        Self {
            sender,
            taken: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
            written: Mutex::new(0),
            wrote: Condvar::new(),
        }
    }

    /// Never waits.
    fn take(&self, line: Vec<u8>) {
        // Counted first, so that whoever settles waits for it.
        self.taken.fetch_add(1, Ordering::SeqCst);
        if self.sender.try_send(line).is_err() {
            self.taken.fetch_sub(1, Ordering::SeqCst);
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn write(&self, lines: &Receiver<Vec<u8>>, mut to: impl Write) {
        for line in lines {
            let _ = to.write_all(&line);
            let dropped = self.dropped.swap(0, Ordering::Relaxed);
            if dropped > 0 {
                let _ = writeln!(to, "the log took nothing for a while: {dropped} lines were dropped");
            }
            *self.written.lock().unwrap_or_else(PoisonError::into_inner) += 1;
            self.wrote.notify_all();
        }
    }

    fn settle(&self, time: Duration) {
        let written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = self.wrote.wait_timeout_while(written, time, |written| *written < self.taken.load(Ordering::SeqCst));
    }
}

/// From now on nobody of this process waits for its log. To be called behind its last fork. Without a thread to be had it stays as
/// it was.
pub fn on_a_thread() {
    let (sender, lines) = sync_channel(WAITING);
    let queue = Arc::new(Queue::new(sender));
    let writes = queue.clone();
    let thread = std::thread::Builder::new().name("lethefs-log".into());
    if thread.spawn(move || writes.write(&lines, io::stderr())).is_ok() {
        let _ = QUEUE.set(queue);
    }
}

/// Waits until what was logged is written; not for ever.
pub fn settle() {
    if let Some(queue) = QUEUE.get() {
        queue.settle(SETTLES);
    }
}

/// One event of the log.
#[derive(Default)]
pub struct Line(Vec<u8>);

impl Write for Line {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let line = std::mem::take(&mut self.0);
        match QUEUE.get() {
            Some(queue) => queue.take(line),
            None => {
                let _ = io::stderr().write_all(&line);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_that_takes_nothing_holds_nobody_up_and_says_how_much_it_lacks() {
        let (sender, lines) = sync_channel(2);
        let queue = Queue::new(sender);
        for n in 0..5 {
            queue.take(format!("{n}\n").into_bytes());
        }
        // Nobody writes yet.
        queue.settle(Duration::ZERO);
        let mut written = Vec::new();
        let first: Vec<_> = lines.try_iter().collect();
        let (again, rest) = sync_channel(8);
        first.into_iter().for_each(|line| again.send(line).expect("room"));
        drop(again);
        queue.write(&rest, &mut written);
        queue.settle(Duration::MAX);
        assert_eq!(
            String::from_utf8(written).expect("text"),
            "0\nthe log took nothing for a while: 3 lines were dropped\n1\n"
        );
    }
}
