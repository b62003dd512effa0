//! The supervisor: a process without keys that outlives the daemon.
//!
//! If a daemon dies, the kernel goes on serving what it has cached: open files and mappings stay readable, by whoever has them,
//! revoked key or not. So the process that the user starts forks the daemon before there is any key, keeps a duplicate of the
//! FUSE descriptor and the daemon's list of inodes, and waits. When the daemon is gone and its mount is not, it aborts the
//! connection, has the kernel drop every inode's pages and attributes, and unmounts, so that the next mount works.
//!
//! A daemon that stands still (SIGSTOP, a frozen control group) hears of no revocation, and its mount serves on what is cached. So
//! it says in the shared list by when it will be heard of again, and one that is overdue is killed (`overdue`).
//!
//! It also is what signals are sent to by those who know only the process that they started, and ends as the daemon ended.

mod clear;
mod overdue;
#[cfg(test)]
mod tests;

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType,
};
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions};
use serde::{Deserialize, Serialize};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use self::overdue::{Next, Overdue};
use super::custody::{running, tick};
use super::record::{Files, path_text};
use super::{Error, daemon, log, mountinfo};
use crate::sys::process::{self, Fork};
use crate::sys::shared_list::SharedList;

/// Longest message from the daemon: two paths, escaped.
const MAX_MESSAGE: usize = 64 << 10;
/// Sent for the first signal that the supervisor gets: unmount, and do not take another one for impatience.
pub(super) const STOP: i32 = signal_hook::consts::SIGUSR1;

/// How long a daemon that was killed is waited for before its mount is cleared up all the same.
const DIES: Duration = Duration::from_secs(2);

const FAILED: &str = "cannot start the daemon's process";

/// Which side of the fork this is.
pub enum Role {
    /// The process that was there before.
    Supervisor(Supervisor),
    /// The one that is to mount.
    Daemon(Link),
}

/// The daemon's end.
pub struct Link {
    socket: OwnedFd,
    list: Arc<SharedList>,
    supervisor: Pid,
}

/// The supervisor's end.
pub struct Supervisor {
    socket: OwnedFd,
    list: Arc<SharedList>,
    daemon: Pid,
    signals: OwnedFd,
}

/// How the daemon ended.
#[derive(Debug, PartialEq, Eq)]
enum Ended {
    With(u8),
    By(i32),
}

/// What the daemon tells once there is a mount.
#[derive(Debug, Serialize, Deserialize)]
struct Told {
    #[serde(with = "path_text")]
    mountpoint: PathBuf,
    /// Device number of the mount, as in mountinfo.
    device: String,
    #[serde(with = "path_text")]
    record: PathBuf,
    #[serde(with = "path_text")]
    socket: PathBuf,
    /// The supervisor lets go of its terminal and logs there.
    log: Option<String>,
}

/// Forks the daemon off. There must be one thread. `foreground`: it keeps the terminal.
///
/// # Errors
/// The system's.
pub fn split(foreground: bool) -> Result<Role, Error> {
    let list = SharedList::new().map_err(Error::io("no memory for the list of inodes"))?;
    let (ours, theirs) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .map_err(Error::io(FAILED))?;
    let supervisor = rustix::process::getpid();
    match process::fork_single_threaded().map_err(Error::io(FAILED))? {
        Fork::Child => {
            drop(ours);
            if foreground {
                // A terminal's signals go to the supervisor alone, which passes them on.
                rustix::process::setpgid(None, None).map_err(Error::io(FAILED))?;
            }
            Ok(Role::Daemon(Link { socket: theirs, list, supervisor }))
        }
        Fork::Parent(daemon) => {
            drop(theirs);
            let (read, write) =
                rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC | rustix::pipe::PipeFlags::NONBLOCK)
                    .map_err(Error::io(FAILED))?;
            for signal in [SIGTERM, SIGINT, SIGHUP] {
                let write = write.try_clone().map_err(Error::io(FAILED))?;
                signal_hook::low_level::pipe::register(signal, write).map_err(Error::io(FAILED))?;
            }
            Ok(Role::Supervisor(Supervisor { socket: ours, list, daemon, signals: read }))
        }
    }
}

impl Link {
    /// Where to list what the kernel may cache.
    pub(super) fn list(&self) -> Arc<SharedList> {
        self.list.clone()
    }

    /// The supervisor's process, as long as it lives.
    pub(super) fn supervisor(&self) -> Option<Pid> {
        rustix::process::getppid().filter(|parent| *parent == self.supervisor)
    }

    /// Tells the supervisor of the mount, before the kernel can cache anything of it.
    pub(super) fn mounted(
        &self,
        mountpoint: &Path,
        files: &Files,
        log: Option<&Path>,
        fuse: BorrowedFd<'_>,
    ) -> io::Result<()> {
        let mounts = mountinfo::read()?;
        let device = mountinfo::at(&mounts, mountpoint).map(|mount| mount.device.clone()).unwrap_or_default();
        let told = Told {
            mountpoint: mountpoint.to_owned(),
            device,
            record: files.record.clone(),
            socket: files.socket.clone(),
            log: log.map(path_text::encode),
        };
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let fds = [fuse];
        ancillary.push(SendAncillaryMessage::ScmRights(&fds));
        let text = serde_json::to_vec(&told)?;
        rustix::net::sendmsg(&self.socket, &[IoSlice::new(&text)], &mut ancillary, SendFlags::NOSIGNAL)?;
        Ok(())
    }
}

impl Supervisor {
    /// Waits for the daemon's end, and clears up behind it if need be. The exit code; a daemon that a signal ended takes this
    /// process with it in the same way.
    pub fn watch(self) -> u8 {
        // It may see plaintext that nobody takes any more ([`notify::refuse_all`](crate::fs::notify::refuse_all)).
        process::harden();
        log::on_a_thread();
        match self.wait() {
            Ended::With(code) => code,
            // As the daemon, so its supervisor: whoever waits for us learns how it ended.
            Ended::By(signal) => {
                log::settle();
                process::end_by(signal)
            }
        }
    }

    fn wait(self) -> Ended {
        let pidfd = match rustix::process::pidfd_open(self.daemon, PidfdFlags::empty()) {
            Ok(pidfd) => pidfd,
            Err(errno) => {
                tracing::error!(%errno, "the daemon cannot be watched: if it dies, nobody clears up behind it");
                return self.ended(None);
            }
        };
        let mut mount: Option<(Told, OwnedFd)> = None;
        let (mut listening, mut asked) = (true, false);
        let mut overdue = Overdue::default();
        loop {
            let wait = match overdue.look(mount.as_ref().and_then(|_| self.list.due()), tick(), running()) {
                Next::Wait(wait) => wait,
                Next::Kill => {
                    self.kill(&pidfd);
                    return self.ended(mount);
                }
            };
            let mut ready = [
                PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(self.signals.as_fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(self.socket.as_fd(), PollFlags::IN),
            ];
            let polled = if listening { &mut ready[..] } else { &mut ready[..2] };
            if rustix::event::poll(polled, Some(&timespec(wait))).is_err() {
                continue; // EINTR: a signal, which is in the pipe now
            }
            let [ended, signals, told] = ready.map(|fd| !fd.revents().is_empty());
            if told {
                // Once: what comes after the message, or in its place, is the daemon's end of the socket being closed.
                listening = false;
                mount = self.receive();
                if let Some(log) = mount.as_ref().and_then(|(told, _)| told.log.as_deref()).and_then(path_text::decode)
                {
                    let _ = daemon::detach(&log);
                }
            }
            if signals {
                let _ = rustix::io::read(&self.signals, &mut [0_u8; 64]);
                // Without a word from the daemon nobody knows whether it has mounted: an orderly end is right for both.
                self.pass_on(!listening && !asked);
                asked = true;
            }
            if ended {
                return self.ended(mount);
            }
        }
    }

    /// Ends a daemon that stands still. One that is frozen, too, ends only once it is thawed, and is not waited for.
    fn kill(&self, pidfd: &OwnedFd) {
        let _ = rustix::process::kill_process(self.daemon, Signal::KILL);
        tracing::error!(
            pid = self.daemon.as_raw_nonzero().get(),
            "the daemon stands still and has not renewed its lease on the key in time: it is killed"
        );
        let mut ends = [PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN)];
        let _ = rustix::event::poll(&mut ends, Some(&timespec(DIES)));
    }

    fn pass_on(&self, gently: bool) {
        let signal = if gently { Signal::USR1 } else { Signal::TERM };
        let _ = rustix::process::kill_process(self.daemon, signal);
    }

    /// The daemon's message. `None`: it has closed its end without a mount; or, which is told, cannot be understood.
    fn receive(&self) -> Option<(Told, OwnedFd)> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut text = vec![0; MAX_MESSAGE];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let message = rustix::net::recvmsg(&self.socket, &mut [IoSliceMut::new(&mut text)], &mut ancillary, flags);
        let length = message.map_or(1, |message| message.bytes);
        let told = serde_json::from_slice(&text[..length.min(MAX_MESSAGE)]).ok();
        let fd = ancillary.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        if length > 0 && (told.is_none() || fd.is_none()) {
            tracing::error!("the daemon's mount is not known here: if it dies, nobody clears up behind it");
        }
        told.zip(fd)
    }

    /// The daemon has ended, or was killed.
    fn ended(self, mount: Option<(Told, OwnedFd)>) -> Ended {
        let wait = |options| loop {
            match rustix::process::waitpid(Some(self.daemon), options) {
                Err(rustix::io::Errno::INTR) => {}
                other => break other.ok().flatten().map(|(_, status)| status),
            }
        };
        let status = wait(WaitOptions::NOHANG);
        let code = status.and_then(|status| status.exit_status());
        // (A daemon that ended by itself without an error has unmounted.)
        if let Some((told, fuse)) = mount.filter(|_| code != Some(0)) {
            let pid = self.daemon.as_raw_nonzero().get();
            clear::clear_up(&told, &fuse, &self.list, pid, code.is_none());
        }
        let status = status.or_else(|| wait(WaitOptions::empty()));
        match status.and_then(|status| status.terminating_signal()) {
            Some(signal) => Ended::By(signal),
            None => Ended::With(status.and_then(|status| status.exit_status()).map_or(1, |code| code as u8)),
        }
    }
}

fn timespec(time: Duration) -> Timespec {
    Timespec { tv_sec: i64::try_from(time.as_secs()).unwrap_or(i64::MAX), tv_nsec: i64::from(time.subsec_nanos()) }
}
