//! The supervisor: a process without keys that outlives the daemon.
//!
//! If a daemon dies, the kernel goes on serving what it has cached: open files and mappings stay readable, by whoever has them,
//! revoked key or not. So the process that the user starts forks the daemon before there is any key, keeps a duplicate of the
//! FUSE descriptor and the daemon's list of inodes, and waits. When the daemon is gone and its mount is not, it aborts the
//! connection, has the kernel drop every inode's pages and attributes, and unmounts, so that the next mount works.
//!
//! It also is what signals are sent to by those who know only the process that they started, and ends as the daemon ended.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags};
use rustix::mount::UnmountFlags;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType,
};
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions};
use serde::{Deserialize, Serialize};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::record::{Files, path_text};
use super::{Error, daemon, mountinfo};
use crate::fs::seal::PURGE;
use crate::fs::{notify, session};
use crate::sys::process::{self, Fork};
use crate::sys::shared_list::SharedList;

/// Longest message from the daemon: two paths, escaped.
const MAX_MESSAGE: usize = 64 << 10;
/// Sent for the first signal that the supervisor gets: unmount, and do not take another one for impatience.
pub(super) const STOP: i32 = signal_hook::consts::SIGUSR1;

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
        // It may see plaintext that nobody takes any more ([`notify::refuse_all`]).
        process::harden();
        let pidfd = match rustix::process::pidfd_open(self.daemon, PidfdFlags::empty()) {
            Ok(pidfd) => pidfd,
            Err(errno) => {
                tracing::error!(%errno, "the daemon cannot be watched: if it dies, nobody clears up behind it");
                return self.ended(None);
            }
        };
        let mut mount: Option<(Told, OwnedFd)> = None;
        let mut asked = false;
        loop {
            let mut ready = [
                PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(self.signals.as_fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(self.socket.as_fd(), PollFlags::IN),
            ];
            let polled = if mount.is_some() { &mut ready[..2] } else { &mut ready[..] };
            if rustix::event::poll(polled, None).is_err() {
                continue; // EINTR: a signal, which is in the pipe now
            }
            let [ended, signals, told] = ready.map(|fd| !fd.revents().is_empty());
            if mount.is_none() && told {
                mount = self.receive();
                if let Some(log) = mount.as_ref().and_then(|(told, _)| told.log.as_deref()).and_then(path_text::decode)
                {
                    let _ = daemon::detach(&log);
                }
            }
            if signals {
                let _ = rustix::io::read(&self.signals, &mut [0_u8; 64]);
                self.pass_on(mount.is_some() && !asked);
                asked = true;
            }
            if ended {
                return self.ended(mount);
            }
            if mount.is_none() && told {
                // The daemon closed its end without a mount: it is ending.
                let _ = rustix::event::poll(&mut [PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN)], None);
            }
        }
    }

    fn pass_on(&self, gently: bool) {
        let signal = if gently { Signal::USR1 } else { Signal::TERM };
        let _ = rustix::process::kill_process(self.daemon, signal);
    }

    fn receive(&self) -> Option<(Told, OwnedFd)> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut text = vec![0; MAX_MESSAGE];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let message =
            rustix::net::recvmsg(&self.socket, &mut [IoSliceMut::new(&mut text)], &mut ancillary, flags).ok()?;
        let told = serde_json::from_slice(&text[..message.bytes]).ok()?;
        let fd = ancillary.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        })?;
        Some((told, fd))
    }

    fn ended(self, mount: Option<(Told, OwnedFd)>) -> u8 {
        let status = loop {
            match rustix::process::waitpid(Some(self.daemon), WaitOptions::empty()) {
                Err(rustix::io::Errno::INTR) => {}
                other => break other.ok().flatten().map(|(_, status)| status),
            }
        };
        let code = status.and_then(|status| status.exit_status());
        // (A daemon that ended by itself without an error has unmounted.)
        if let Some((told, fuse)) = mount.filter(|_| code != Some(0)) {
            let pid = self.daemon.as_raw_nonzero().get();
            clear_up(&told, &fuse, &self.list, pid, code.is_none());
        }
        if let Some(signal) = status.and_then(|status| status.terminating_signal()) {
            // As the daemon, so its supervisor: whoever waits for us learns how it ended.
            process::end_by(signal);
        }
        code.map_or(1, |code| code as u8)
    }
}

/// The daemon is gone: nothing plaintext stays in the kernel, and nothing in the way of the next mount.
fn clear_up(told: &Told, fuse: &OwnedFd, list: &SharedList, pid: i32, died: bool) {
    // As long as the connection lives, its filesystem does, and no other one has its device number.
    let was_there = is_alive(fuse) && {
        let mounts = mountinfo::read().unwrap_or_default();
        mountinfo::at(&mounts, &told.mountpoint).is_some_and(|mount| mount.is_lethefs() && mount.device == told.device)
    };
    // First of all nobody may wait for the dead: dropping a dirty page would.
    if is_alive(fuse)
        && let Err(error) = abort(told, was_there)
    {
        // No right to, or no control files: requests are refused one by one instead.
        tracing::info!(%error, "the connection is not aborted");
        let refusing = fuse.try_clone().and_then(|fuse| {
            std::thread::Builder::new().name("lethefs-refuse".into()).spawn(move || notify::refuse_all(&fuse))
        });
        if let Err(error) = refusing {
            tracing::error!(%error, "requests to the dead daemon are not refused");
        }
    }
    let _ = notify::inc_epoch(fuse);
    let inodes = Arc::new(list.numbers());
    let known = inodes.len();
    let (tell, counts) = std::sync::mpsc::channel();
    // Again and again: a dirty page is not dropped by the call that finds that nobody takes it, but by the next one.
    let purge = {
        let inodes = inodes.clone();
        move |fuse: &OwnedFd| {
            for _ in 0..3 {
                let _ = tell.send(inodes.iter().filter(|ino| notify::inval_inode(fuse, **ino).is_ok()).count());
            }
        }
    };
    let (on_thread, here) = (purge.clone(), purge);
    let purging = fuse.try_clone().and_then(|fuse| {
        std::thread::Builder::new().name("lethefs-purge".into()).spawn(move || on_thread(&fuse)).map(drop)
    });
    match purging {
        // Whoever sends is the thread alone, so that its end is seen.
        Ok(()) => drop(here),
        // No thread to be had, as when the system is full of processes: then it is done here, however long it takes.
        Err(_) => {
            here(fuse);
            drop(here);
        }
    }
    // A request that the daemon took with it keeps its page locked until the connection ends, which it does with this process.
    let until = std::time::Instant::now() + PURGE;
    let mut purges = 0;
    let mut purged = 0;
    while let Ok(count) = counts.recv_timeout(until.saturating_duration_since(std::time::Instant::now())) {
        (purges, purged) = (purges + 1, purged.max(count));
    }
    Files { record: told.record.clone(), socket: told.socket.clone(), log: PathBuf::new() }.remove(pid);
    // One that ended by itself and unmounted has said why.
    if !died && !was_there {
        tracing::info!(pid, known, purged, "the daemon has ended");
    } else if purges == 3 {
        tracing::error!(
            pid,
            known,
            purged,
            "the daemon is gone: its plaintext was dropped from the kernel's caches, and it is unmounted"
        );
    } else {
        tracing::error!(
            pid,
            known,
            purged,
            "the daemon is gone, and the kernel has not dropped all of its plaintext in time"
        );
    }
}

/// Whether the connection still has a filesystem and was not aborted (fuse_dev_poll, fs/fuse/dev.c).
fn is_alive(fuse: &OwnedFd) -> bool {
    let mut ready = [PollFd::from_borrowed_fd(fuse.as_fd(), PollFlags::empty())];
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    let polled = rustix::event::poll(&mut ready, Some(&now));
    polled.is_ok() && !ready[0].revents().contains(PollFlags::ERR)
}

/// Ends the connection, so that every request, waiting or to come, fails; and unmounts what is there.
fn abort(told: &Told, there: bool) -> io::Result<()> {
    if there && rustix::process::geteuid().is_root() {
        // Aborts first (fuse_umount_begin, fs/fuse/inode.c). Detaches at once; what is open stays until it is closed.
        let flags = UnmountFlags::FORCE | UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
        return Ok(rustix::mount::unmount(&told.mountpoint, flags)?);
    }
    // The minor number is the connection's, and the file the mounting user's (Documentation/filesystems/fuse.rst).
    let minor = told.device.split(':').nth(1).unwrap_or_default();
    let aborted = std::fs::write(format!("/sys/fs/fuse/connections/{minor}/abort"), "1");
    if there && let Err(error) = session::unmount_path(&told.mountpoint, true) {
        tracing::error!(%error, "cannot unmount what the daemon left");
    }
    aborted
}
