//! The real binary, mounted: what programs see, who may do what, what stays. Needs root, `/dev/fuse` and `fuse3`.
#![allow(clippy::unwrap_used, missing_docs)]

mod each_call;
mod faults;
mod flushes;
mod full;
mod parallel;
mod persistence;
mod posix;
mod programs;
mod providers;
mod reader;
mod space;
#[path = "../support/mod.rs"]
mod support;
mod users;

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt as _;

use rustix::fs::{Gid, Uid};

use support::bytes;

/// The errno of what must have failed.
#[track_caller]
pub(crate) fn errno<T, E: Into<io::Error>>(result: Result<T, E>) -> i32 {
    match result {
        Ok(_) => panic!("it worked"),
        Err(error) => error.into().raw_os_error().unwrap(),
    }
}

/// A file name of any bytes.
pub(crate) fn name(bytes: &[u8]) -> &OsStr {
    OsStr::from_bytes(bytes)
}

/// Runs `f` on a thread that is this user, with no capability and no further group.
pub(crate) fn as_user<T: Send>(uid: u32, gid: u32, f: impl FnOnce() -> T + Send) -> T {
    let run = || {
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        // Linux keeps credentials for each thread; only libc's wrappers change all of them.
        rustix::thread::set_thread_groups(&[]).unwrap();
        rustix::thread::set_thread_res_gid(gid, gid, gid).unwrap();
        rustix::thread::set_thread_res_uid(uid, uid, uid).unwrap();
        f()
    };
    std::thread::scope(|scope| scope.spawn(run).join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// The names in a directory, sorted.
pub(crate) fn names(dir: impl AsRef<std::path::Path>) -> Vec<Vec<u8>> {
    let entries = std::fs::read_dir(dir).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().as_bytes().to_vec()).collect();
    names.sort();
    names
}

/// A Python 3 with the standard library and `cryptography`.
pub(crate) fn python() -> std::ffi::OsString {
    std::env::var_os("LETHEFS_TEST_PYTHON").expect("LETHEFS_TEST_PYTHON is not set: run scripts/test")
}
