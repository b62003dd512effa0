//! fork(2), and what a daemon does to itself before it holds a key.
//!
//! Here: the one fork, process hardening. Not here: pipes, logs, readiness (`service::daemon`), which need no `unsafe`.
#![allow(unsafe_code)]

use std::io;

use rustix::process::{DumpableBehavior, Pid, Resource, Rlimit};

/// Which side of a fork this is.
pub enum Fork {
    /// The old process; the child's id.
    Parent(Pid),
    /// The new one.
    Child,
}

/// Forks a process that has one thread.
///
/// # Errors
/// The system's, or [`io::ErrorKind::Other`] if there is more than one thread: the child of such a fork may find any
/// lock held for ever, the allocator's included.
pub fn fork_single_threaded() -> io::Result<Fork> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::other("cannot go to the background: more than one thread runs already"));
    }
    // SAFETY: this thread is the only one (checked above; nobody but us could start another), so the child holds a
    // consistent copy of everything, locks included, and may go on as an ordinary process.
    let pid = unsafe { libc::fork() };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Fork::Child),
        pid => Pid::from_raw(pid).map(Fork::Parent).ok_or_else(|| io::Error::other("fork gave no process id")),
    }
}

/// Ends this process as this signal does by default.
pub fn end_by(signal: i32) -> ! {
    // SAFETY: no pointers are passed; SIG_DFL is a disposition for any signal that can have one.
    unsafe { libc::signal(signal, libc::SIG_DFL) };
    if let Some(signal) = rustix::process::Signal::from_named_raw(signal) {
        let _ = rustix::process::kill_process(rustix::process::getpid(), signal);
    }
    // A signal that does not end anybody by default.
    std::process::exit(128 + (signal & 0x7f))
}

/// Ends this process now, without what libraries have registered for its end: a PKCS #11 module cleans up under the feet of a thread
/// that is still in a call of it, which then crashes (SoftHSM does) or never comes to an end. Whatever must be written has been.
pub fn end_at_once(code: u8) -> ! {
    // SAFETY: takes an integer and does not come back; nothing of this process is used afterwards.
    unsafe { libc::_exit(i32::from(code)) }
}

/// Keeps keys out of core dumps and debuggers, and raises the limits that a filesystem runs into.
///
/// Not dumpable also makes `/proc/self` belong to root, yet a process still reaches its own `/proc/self/fd`, as root or
/// not: the kernel lets threads of one process look at themselves (checked as an ordinary user on Linux 6.18).
/// Everything here is done as far as the system allows; nothing of it decides whether a mount works.
pub fn harden() {
    let _ = rustix::process::setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) });
    let _ = rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable);
    raise(Resource::Memlock);
    // A program's own RLIMIT_FSIZE is enforced by the kernel before its write comes to us; ours would hit everybody.
    raise(Resource::Fsize);
    raise_open_files();
    // Modes come from the kernel's requests as they are; the caller's umask was applied there.
    rustix::process::umask(rustix::fs::Mode::empty());
    // SIGPIPE is ignored already: Rust's start-up code does it, and a control client that hangs up must not end a mount.
}

/// The most that root asks for: each cached inode may hold a descriptor.
const OPEN_FILES: u64 = 1 << 20;

fn raise_open_files() {
    if rustix::process::geteuid().is_root() {
        let ceiling = std::fs::read_to_string("/proc/sys/fs/nr_open").ok().and_then(|text| text.trim().parse().ok());
        let wanted = OPEN_FILES.min(ceiling.unwrap_or(OPEN_FILES));
        let now = rustix::process::getrlimit(Resource::Nofile);
        if now.maximum.is_some_and(|hard| hard < wanted) {
            let limit = Rlimit { current: Some(wanted), maximum: Some(wanted) };
            let _ = rustix::process::setrlimit(Resource::Nofile, limit);
        }
    }
    raise(Resource::Nofile);
}

/// Raises a limit to its ceiling.
fn raise(resource: Resource) {
    let now = rustix::process::getrlimit(resource);
    let _ = rustix::process::setrlimit(resource, Rlimit { current: now.maximum, maximum: now.maximum });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_with_threads_is_not_forked() {
        // The test harness itself runs threads; this one makes sure.
        let (tell, wait) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || wait.recv());
        assert!(fork_single_threaded().is_err());
        drop(tell);
        let _ = thread.join();
    }
}
