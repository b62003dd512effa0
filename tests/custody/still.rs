//! A daemon that stands still: it hears of nothing, and its mount would serve on what is cached.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::process::{Child, Stdio};

use rustix::fs::OFlags;
use rustix::process::{Pid, Signal, kill_process};

use crate::revoked::{all_fail, all_work, furnish, programs};
use crate::supervisor::foreground_with;
use crate::support::openbao::wait_for;
use crate::support::volume::{TestVolume, mounts_below};
use crate::{EKEYREVOKED, OFTEN, Program, ask, wait_for_state};

const ENOTCONN: i32 = 107;

#[test]
fn a_daemon_that_was_stopped_is_killed_when_its_lease_is_over() {
    let v = TestVolume::mounted(&[OFTEN, "--grace=1s"]);
    furnish(&v);
    let mut programs = programs(&v);
    all_work(&mut programs);
    kill_process(v.daemon(), Signal::STOP).unwrap();
    assert_eq!(v.daemon_exit(), None, "killed");
    all_fail(&mut programs, ENOTCONN);
    assert!(mounts_below(&v.path("")).is_empty(), "out of the way");
    assert!(v.log().contains("it is killed") && v.log().contains("its plaintext was dropped"), "{}", v.log());
    drop(programs);
    v.mount(&[]);
    v.umount();
}

/// When the supervisor will count the daemon as overdue, as they share it: the second word of the list of inodes.
fn due(v: &TestVolume) -> u64 {
    let pid = v.supervisor().as_raw_nonzero();
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let list = maps.lines().find(|line| line.contains(" rw-s ") && line.contains("/dev/zero")).expect("shared memory");
    let from = u64::from_str_radix(list.split('-').next().unwrap(), 16).unwrap();
    let mut word = [0; 8];
    File::open(format!("/proc/{pid}/mem")).unwrap().read_exact_at(&mut word, from + 8).unwrap();
    u64::from_ne_bytes(word)
}

/// A mount that programs are at work in, with a log that takes nothing: a pipe, full once it is mounted.
fn with_a_full_log(v: &TestVolume) -> (Child, Pid, OwnedFd, Vec<(&'static str, Program)>) {
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let log = Stdio::from(writer.try_clone().unwrap());
    let (child, daemon) = foreground_with(v, &[OFTEN, "--grace=1s"], log);
    let flags = rustix::fs::fcntl_getfl(&writer).unwrap();
    rustix::fs::fcntl_setfl(&writer, flags | OFlags::NONBLOCK).unwrap();
    while rustix::io::write(&writer, b"\n").is_ok() {}
    rustix::fs::fcntl_setfl(&writer, flags).unwrap();
    furnish(v);
    let mut programs = programs(v);
    all_work(&mut programs);
    (child, daemon, reader, programs)
}

#[test]
fn a_log_that_takes_nothing_holds_up_no_seal() {
    let v = TestVolume::init();
    let (mut child, _, log, mut programs) = with_a_full_log(&v);
    let (key, away) = (v.path("keys/key"), v.path("keys/away"));
    fs::rename(&key, &away).unwrap();
    wait_for("a refusal", || fs::metadata(v.at("file")).is_err().then_some(()));
    all_fail(&mut programs, EKEYREVOKED);
    drop((programs, log));
    v.cli(&["umount", "mnt"]).is(0);
    child.wait().unwrap();
}

#[test]
fn a_log_that_takes_nothing_holds_up_no_supervisor() {
    let v = TestVolume::init();
    let (mut child, daemon, log, mut programs) = with_a_full_log(&v);
    kill_process(daemon, Signal::STOP).unwrap();
    child.wait().unwrap();
    all_fail(&mut programs, ENOTCONN);
    assert!(mounts_below(&v.path("")).is_empty(), "out of the way");
    drop((programs, log));
}

#[test]
fn what_is_sealed_is_not_overdue() {
    let v = TestVolume::mounted(&[OFTEN]);
    let first = due(&v);
    wait_for("a renewal to count", || (due(&v) > first && first > 0).then_some(()));
    ask(&v, "seal");
    assert_eq!(due(&v), 0);
    ask(&v, "resume");
    wait_for_state(&v, "active");
    assert!(due(&v) > first);
    v.umount();
    assert!(!v.log().contains("a worker has ended"), "that was no error: {}", v.log());
}
