//! A daemon that stands still: it hears of nothing, and its mount would serve on what is cached.

use rustix::process::{Signal, kill_process};

use crate::revoked::{all_fail, all_work, furnish, programs};
use crate::support::volume::{TestVolume, mounts_below};
use crate::{OFTEN, custody};

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

#[test]
fn one_that_is_sealed_may_stand_still() {
    let v = TestVolume::mounted(&[OFTEN, "--grace=1s"]);
    crate::ask(&v, "seal");
    kill_process(v.daemon(), Signal::STOP).unwrap();
    // Longer than it takes to kill one that is not.
    std::thread::sleep(std::time::Duration::from_secs(25));
    kill_process(v.daemon(), Signal::CONT).unwrap();
    assert_eq!(custody(&v)["state"], "held");
    v.umount();
}
