//! `/dev/fuse` and the connections' control files, as distributions have them.

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};

use rustix::fs::FlockOperation;

/// Lets every user open `/dev/fuse`, as distributions have it, until this is dropped or this process ends in whatever way.
pub(crate) struct FuseForAll {
    guard: Option<Child>,
    _lock: File,
}

impl FuseForAll {
    pub(crate) fn new() -> Self {
        // One at a time, in whichever process: the directory of the device is a lock file that all agree on.
        let lock = File::open("/dev").unwrap();
        rustix::fs::flock(&lock, FlockOperation::LockExclusive).unwrap();
        let mode = fs::metadata("/dev/fuse").unwrap().mode() & 0o7777;
        let guard = (mode & 0o006 != 0o006).then(|| {
            // Puts the mode back when its input ends, and has the lock until then. Of a group of its own: a signal that
            // ends the tests shall not reach it.
            let guard = Command::new("sh")
                .args(["-c", "read -r _; exec chmod \"$0\" /dev/fuse", &format!("{mode:o}")])
                .stdin(Stdio::piped())
                .stdout(lock.try_clone().unwrap())
                .stderr(Stdio::null())
                .process_group(0)
                .spawn()
                .unwrap();
            fs::set_permissions("/dev/fuse", fs::Permissions::from_mode(0o666)).unwrap();
            guard
        });
        Self { guard, _lock: lock }
    }
}

impl Drop for FuseForAll {
    fn drop(&mut self) {
        if let Some(mut guard) = self.guard.take() {
            drop(guard.stdin.take());
            let _ = guard.wait();
        }
    }
}

/// The filesystem through which a user aborts a connection, mounted until this is dropped unless it is there already.
pub(crate) struct ConnectionControl(bool);

const CONNECTIONS: &str = "/sys/fs/fuse/connections";

impl ConnectionControl {
    pub(crate) fn new() -> Self {
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let there = table.lines().any(|line| line.contains(" - fusectl "));
        if !there {
            let none = rustix::mount::MountFlags::empty();
            rustix::mount::mount("fusectl", CONNECTIONS, "fusectl", none, None).unwrap();
        }
        Self(!there)
    }
}

impl Drop for ConnectionControl {
    fn drop(&mut self) {
        if self.0 {
            let _ = rustix::mount::unmount(CONNECTIONS, rustix::mount::UnmountFlags::DETACH);
        }
    }
}
