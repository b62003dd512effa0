//! A daemon that stands still: it hears of nothing, and its mount would serve on what is cached.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;

use rustix::process::{Signal, kill_process};

use crate::revoked::{all_fail, all_work, furnish, programs};
use crate::support::openbao::wait_for;
use crate::support::volume::{TestVolume, mounts_below};
use crate::{OFTEN, ask, custody, wait_for_state};

const ENOTCONN: i32 = 107;

#[test]
fn a_daemon_that_was_stopped_is_killed_when_its_lease_is_over() {
    let v = TestVolume::mounted(&[OFTEN, "--grace=1s"]);
    furnish(&v);
    let mut programs = programs(&v);
    all_work(&mut programs);
    // For so long that it would be overdue if it did not renew.
    for _ in 0..3 {
        assert_eq!(custody(&v)["state"], "active");
        std::thread::sleep(std::time::Duration::from_millis(700));
    }
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

#[test]
fn one_that_is_sealed_may_stand_still() {
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
