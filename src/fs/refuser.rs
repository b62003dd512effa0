//! Says no in the place of workers that all hang.
//!
//! A worker that waits for a disk takes no request, and the kernel waits for an answer to what nobody takes: pages stay locked,
//! programs hang. While a mount is sealed the answer is known. So as long as workers hang, a thread takes what they leave lying
//! on a descriptor of its own, whose reads do not wait, so that it can be stopped before the mount opens again.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};

use super::core::Filesystem;
use super::errno::Failed;
use super::gate::Phase;
use super::notify::{Refused, Room};
use crate::sys::fuse_device;

/// A request that lies for so long is not taken by any worker. (One that waits takes it at once; it knows more, such as how to
/// tell a filesystem's size.)
const LIES: Duration = Duration::from_millis(100);
/// For so long after that, whatever comes is not taken by any worker either.
const HUNG: Duration = Duration::from_secs(1);

/// See the module's text. Stops when dropped, and waits for that.
pub struct Refuser {
    stop: OwnedFd,
    thread: Option<JoinHandle<()>>,
}

impl Refuser {
    /// Starts it. The mount must be sealed, and stay so while this lives.
    ///
    /// # Errors
    /// No further descriptor of the connection, or no thread.
    pub fn start(fs: Arc<Filesystem>, device: BorrowedFd<'_>) -> io::Result<Self> {
        let device = fuse_device::another(device)?;
        let stop = rustix::event::eventfd(0, EventfdFlags::CLOEXEC)?;
        let stopped = stop.try_clone()?;
        let (forget, forgotten) = channel::<Vec<(u64, u64)>>();
        let forgetting = fs.clone();
        // What is forgotten is closed, which may wait for the disk.
        std::thread::Builder::new().name("lethefs-forget".into()).spawn(move || {
            forgotten.into_iter().flatten().for_each(|(ino, count)| forgetting.forget(ino, count));
        })?;
        let thread = std::thread::Builder::new().name("lethefs-refuse".into()).spawn(move || {
            let mut room = Room::default();
            let mut hung_until = Instant::now();
            while lies(&device, &stopped, &mut hung_until) {
                let Phase::Closed(reason) = fs.gate.phase() else { return };
                loop {
                    match room.refuse_next(&device, Failed::from(reason).errno()) {
                        Ok(Some(Refused::Forget(all))) => drop(forget.send(all)),
                        Ok(Some(Refused::Write(ino, bytes))) => fs.dropped(ino, bytes),
                        Ok(Some(Refused::Other)) => {}
                        Ok(None) => break,
                        Err(_) => return,
                    }
                }
            }
        })?;
        Ok(Self { stop, thread: Some(thread) })
    }

    /// It has nothing to do any more.
    pub fn is_over(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

impl Drop for Refuser {
    fn drop(&mut self) {
        let _ = rustix::io::write(&self.stop, &1_u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Waits for a request that nobody takes. `false`: stopped.
fn lies(device: &OwnedFd, stop: &OwnedFd, hung_until: &mut Instant) -> bool {
    loop {
        let mut ready = [
            PollFd::from_borrowed_fd(stop.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(device.as_fd(), PollFlags::IN),
        ];
        let _ = rustix::event::poll(&mut ready, None);
        if !ready[0].revents().is_empty() {
            return false;
        }
        if Instant::now() < *hung_until {
            return true;
        }
        let moment = Timespec { tv_sec: 0, tv_nsec: LIES.as_nanos() as i64 };
        let mut stopped = [PollFd::from_borrowed_fd(stop.as_fd(), PollFlags::IN)];
        if !matches!(rustix::event::poll(&mut stopped, Some(&moment)), Ok(0) | Err(_)) {
            return false;
        }
        let mut still = [PollFd::from_borrowed_fd(device.as_fd(), PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        if matches!(rustix::event::poll(&mut still, Some(&now)), Ok(1..)) {
            *hung_until = Instant::now() + HUNG;
            return true;
        }
    }
}
