//! `umount`: ends a mount and returns once its daemon has ended, so that everything is on disk by then.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::PidfdFlags;
use serde::Serialize;

use super::control::Client;
use super::record::{self, Files, Record, path_text};
use super::{Error, SCHEMA, mountinfo};
use crate::crypto::VolumeId;
use crate::fs::session;

/// How long the daemon may take to write everything out.
const PATIENCE: Duration = Duration::from_secs(60);

/// What was unmounted.
#[derive(Debug, Serialize)]
pub struct Report {
    /// 1.
    pub schema: u32,
    /// The volume, if its daemon could be found.
    pub volume_id: Option<VolumeId>,
    /// Where it was.
    #[serde(with = "path_text")]
    pub mountpoint: PathBuf,
    /// The daemon has ended: everything is on disk.
    pub ended: bool,
}

/// Unmounts.
///
/// # Errors
/// Not a lethefs mount; in use; the daemon does not end.
pub fn run(mountpoint: &Path, lazy: bool) -> Result<Report, Error> {
    let mounts = mountinfo::read().map_err(Error::io("cannot read /proc/self/mountinfo"))?;
    let path = resolve(mountpoint);
    let Some(mount) = mountinfo::at(&mounts, &path) else {
        return Err(Error::Mount(format!("nothing is mounted at {}: see `lethefs status`", path.display())));
    };
    if !mount.is_lethefs() {
        return Err(Error::Mount(format!(
            "{} is a mount of type {}, not lethefs: use umount",
            path.display(),
            mount.fs_type
        )));
    }
    let live = find(&path, mount.user);
    // Before the unmount: afterwards the number may belong to somebody else.
    let daemon = live.as_ref().map_or(Daemon::Unknown, |(_, files)| Daemon::of(files));
    session::unmount_path(&path, lazy).map_err(|error| failed(&path, error))?;
    let ended = match &daemon {
        // A lazy unmount ends when the last user lets go, which nobody can promise.
        Daemon::Live(daemon) => wait(daemon, if lazy { Duration::from_secs(1) } else { PATIENCE }),
        Daemon::Gone => true,
        Daemon::Unknown => false,
    };
    if let (Daemon::Gone, Some((record, files))) = (&daemon, &live) {
        files.remove(record.pid);
    }
    if !ended && !lazy && matches!(daemon, Daemon::Live(_)) {
        return Err(Error::Mount(format!(
            "{} is unmounted, but its daemon has not ended after {} s: it still writes, or another mount namespace (a container) holds the mount; see its log before you rely on the data",
            path.display(),
            PATIENCE.as_secs()
        )));
    }
    Ok(Report { schema: SCHEMA, volume_id: live.map(|(record, _)| record.volume_id), mountpoint: path, ended })
}

/// The path as mountinfo writes it. A dead mount cannot be looked into: then its parent's path serves.
fn resolve(mountpoint: &Path) -> PathBuf {
    std::fs::canonicalize(mountpoint).unwrap_or_else(|_| {
        let absolute = std::path::absolute(mountpoint).unwrap_or_else(|_| mountpoint.to_owned());
        match (absolute.parent().map(std::fs::canonicalize), absolute.file_name()) {
            (Some(Ok(parent)), Some(name)) => parent.join(name),
            _ => absolute,
        }
    })
}

/// The record of the mount at `mountpoint`.
pub(crate) fn find(mountpoint: &Path, user: Option<u32>) -> Option<(Record, Files)> {
    let users: Vec<u32> = user.into_iter().collect();
    record::all(&users).into_iter().find(|(record, _)| record.mountpoint == mountpoint)
}

/// The process behind a mount.
enum Daemon {
    /// Can be waited for.
    Live(OwnedFd),
    /// It left its socket behind: nobody listens there.
    Gone,
    /// Another user's, or it does not answer.
    Unknown,
}

impl Daemon {
    fn of(files: &Files) -> Self {
        match Client::connect(&files.socket) {
            Ok(client) => client
                .pid()
                .and_then(|pid| rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok())
                .map_or(Self::Unknown, Self::Live),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Self::Gone,
            Err(_) => Self::Unknown,
        }
    }
}

/// Whether the mount at this path has lost its daemon.
pub(crate) fn is_dead(mountpoint: &Path, user: Option<u32>) -> bool {
    find(mountpoint, user).is_some_and(|(_, files)| matches!(Daemon::of(&files), Daemon::Gone))
}

fn wait(daemon: &OwnedFd, patience: Duration) -> bool {
    let until = Instant::now() + patience;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
        match rustix::event::poll(&mut [PollFd::new(daemon, PollFlags::IN)], Some(&timeout)) {
            Ok(ready) => return ready > 0,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}

fn failed(path: &Path, error: io::Error) -> Error {
    let busy = error.kind() == io::ErrorKind::ResourceBusy;
    let path = path.display();
    Error::Mount(if busy {
        format!("{path} is in use: close what is open there (fuser -vm {path} lists it), or use --lazy")
    } else {
        format!("cannot unmount {path}: {error}")
    })
}
