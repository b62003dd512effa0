//! What is done behind a daemon that is gone: nothing plaintext stays in the kernel, and nothing in the way of the next mount.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::Instant;

use rustix::fs::{Mode, OFlags};
use rustix::mount::{self, FsMountFlags, FsOpenFlags, MountAttrFlags, UnmountFlags};

use super::Told;
use crate::fs::seal::PURGE;
use crate::fs::{notify, session};
use crate::service::mountinfo;
use crate::service::record::Files;
use crate::sys::shared_list::SharedList;

/// Again and again: a dirty page is not dropped by the call that finds that nobody takes it, but by the next one.
const ROUNDS: usize = 3;

/// Clears up. `died`: it did not end by itself.
pub(super) fn clear_up(told: &Told, fuse: &OwnedFd, list: &SharedList, pid: i32, died: bool) {
    let there = is_there(told, fuse);
    cut_off(told, fuse, there);
    let inodes = list.numbers();
    let known = inodes.len();
    let purged = purge(fuse, inodes);
    Files { record: told.record.clone(), socket: told.socket.clone(), log: PathBuf::new() }.remove(pid);
    match purged {
        // One that ended by itself and unmounted has said why.
        Ok(purged) | Err(purged) if !died && !there => tracing::info!(pid, known, purged, "the daemon has ended"),
        Ok(purged) => tracing::error!(
            pid,
            known,
            purged,
            "the daemon is gone: its plaintext was dropped from the kernel's caches, and it is unmounted"
        ),
        Err(purged) => tracing::error!(
            pid,
            known,
            purged,
            "the daemon is gone, and the kernel has not dropped all of its plaintext in time"
        ),
    }
}

/// Whether its mount is where it was. As long as the connection lives, its filesystem does, and no other one has its device
/// number.
fn is_there(told: &Told, fuse: &OwnedFd) -> bool {
    notify::is_alive(fuse) && {
        let mounts = mountinfo::read().unwrap_or_default();
        mountinfo::at(&mounts, &told.mountpoint).is_some_and(|mount| mount.is_lethefs() && mount.device == told.device)
    }
}

/// First of all nobody may wait for the dead: dropping a dirty page would.
fn cut_off(told: &Told, fuse: &OwnedFd, there: bool) {
    if !notify::is_alive(fuse) {
        return;
    }
    if let Err(error) = abort(told, there) {
        // No right to, or no control files: requests are refused one by one instead.
        tracing::info!(%error, "the connection is not aborted");
        let refusing = fuse.try_clone().and_then(|fuse| {
            std::thread::Builder::new().name("lethefs-refuse".into()).spawn(move || notify::refuse_all(&fuse))
        });
        if let Err(error) = refusing {
            tracing::error!(%error, "requests to the dead daemon are not refused");
        }
    }
}

/// Ends the connection, so that every request, waiting or to come, fails; and unmounts what is there.
fn abort(told: &Told, there: bool) -> io::Result<()> {
    if there && rustix::process::geteuid().is_root() {
        // Aborts first (fuse_umount_begin, fs/fuse/inode.c). Detaches at once; what is open stays until it is closed.
        let flags = UnmountFlags::FORCE | UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
        return Ok(rustix::mount::unmount(&told.mountpoint, flags)?);
    }
    // The minor number is the connection's, and the file the mounting user's (Documentation/filesystems/fuse.rst).
    let file = format!("{}/abort", told.device.split(':').nth(1).unwrap_or_default());
    let aborted = std::fs::write(format!("/sys/fs/fuse/connections/{file}"), "1").or_else(|_| abort_unseen(&file));
    if there && let Err(error) = session::unmount_path(&told.mountpoint, true) {
        tracing::error!(%error, "cannot unmount what the daemon left");
    }
    aborted
}

/// The control files where nobody has mounted them, as in a container: mounted for this process's descriptor alone. Root only.
///
/// Without an abort what a dead daemon took with it stays locked, and so does whoever wants to drop it.
fn abort_unseen(file: &str) -> io::Result<()> {
    let control = mount::fsopen("fusectl", FsOpenFlags::FSOPEN_CLOEXEC)?;
    mount::fsconfig_create(&control)?;
    let root = mount::fsmount(&control, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
    let abort = rustix::fs::openat(&root, file, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::io::write(&abort, b"1")?;
    Ok(())
}

/// Has the kernel drop what it caches. How many inodes it knew; an error if it was not done when the time was up. A request that
/// the daemon took with it keeps its page locked, and the thread that wants to drop it, until the connection is aborted.
fn purge(fuse: &OwnedFd, inodes: Vec<u64>) -> Result<usize, usize> {
    let _ = notify::inc_epoch(fuse);
    let inodes = Arc::new(inodes);
    let (tell, counts) = channel();
    let on_thread = fuse.try_clone().and_then(|fuse| {
        let (inodes, tell) = (inodes.clone(), tell.clone());
        std::thread::Builder::new().name("lethefs-purge".into()).spawn(move || rounds(&fuse, &inodes, &tell))
    });
    if on_thread.is_err() {
        // No thread to be had, as when the system is full of processes: then it is done here, however long it takes.
        rounds(fuse, &inodes, &tell);
    }
    // Whoever sends is the thread alone, so that its end is seen.
    drop(tell);
    let until = Instant::now() + PURGE;
    let (mut done, mut purged) = (0, 0);
    while let Ok(count) = counts.recv_timeout(until.saturating_duration_since(Instant::now())) {
        (done, purged) = (done + 1, purged.max(count));
    }
    if done == ROUNDS { Ok(purged) } else { Err(purged) }
}

fn rounds(fuse: &OwnedFd, inodes: &[u64], tell: &Sender<usize>) {
    for _ in 0..ROUNDS {
        let _ = tell.send(inodes.iter().filter(|ino| notify::inval_inode(fuse, **ino).is_ok()).count());
    }
}
