//! The key service says no.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::at_openbao::volume;
use crate::support::openbao::{Server, Storage, wait_for};
use crate::support::volume::{Output, TestVolume};
use crate::{EKEYREVOKED, OFTEN, Program, ask, custody, errno, list, peek, wait_for_state};

/// A file, a directory, a symlink, all cached by the kernel.
pub(crate) fn furnish(v: &TestVolume) {
    let script = "import os
os.chdir('mnt')
f = os.open('file', os.O_RDWR | os.O_CREAT)
os.write(f, b'\\7' * (1 << 20))
os.fsync(f)
os.makedirs('dir', exist_ok=True)
for name in 'abc':
  open('dir/' + name, 'w').write(name)
os.path.lexists('link') or os.symlink('file', 'link')";
    let run = Output::of(v.command("python3").args(["-c", script]));
    run.is(0);
}

/// Whoever has something open or mapped, or stands in a directory.
pub(crate) fn programs(v: &TestVolume) -> Vec<(&'static str, Program)> {
    let script = |text: &str| Program::new(v, text);
    vec![
        ("read", script("f = os.open('file', os.O_RDONLY)\ndef look(): return os.pread(f, 1, 5000)[0]")),
        ("fstat", script("f = os.open('file', os.O_RDONLY)\ndef look(): return os.fstat(f).st_size")),
        ("mmap", script("f = open('file', 'r+b')\nm = mmap.mmap(f.fileno(), 0)\ndef look(): return m[9000]")),
        ("readdir", script("d = os.open('dir', os.O_RDONLY)\ndef look(): return len(os.listdir(d))")),
        ("readlink", script("d = os.open('.', os.O_RDONLY)\ndef look(): return os.readlink('link', dir_fd=d)")),
        ("cwd", script("os.chdir('dir')\ndef look(): return os.stat('a').st_size")),
        ("write", script("f = os.open('dir/c', os.O_WRONLY)\ndef look(): return os.pwrite(f, b'x', 0)")),
    ]
}

/// Whoever has just written four megabytes, which the kernel has not passed on.
pub(crate) fn dirty(v: &TestVolume) -> Program {
    let script =
        "f = open('dirty', 'w+b', 0)\nf.write(b'1' * (4 << 20))\ndef look(): return os.pread(f.fileno(), 1, 5000)";
    Program::new(v, script)
}

/// Looked at by each: all work, or all refuse.
pub(crate) fn all_work(programs: &mut [(&'static str, Program)]) {
    for (what, program) in programs {
        let said = program.look();
        assert!(said.starts_with("ok "), "{what}: {said}");
    }
}

fn all_refuse(programs: &mut [(&'static str, Program)]) {
    all_fail(programs, EKEYREVOKED);
}

/// Each gets this errno, but for the one that has the file mapped, which gets SIGBUS.
pub(crate) fn all_fail(programs: &mut [(&'static str, Program)], errno: i32) {
    for (what, program) in programs {
        let expected = if *what == "mmap" { "signal 7".to_owned() } else { format!("errno {errno}") };
        assert_eq!(program.look(), expected, "{what}");
    }
}

#[test]
fn a_deleted_key_takes_everything_away_for_ever() {
    let server = Server::start(Storage::Memory);
    let v = volume(&server, "vol");
    v.mount(&[OFTEN]);
    furnish(&v);
    let mut programs = programs(&v);
    programs.push(("dirty", dirty(&v)));
    all_work(&mut programs);
    let before = custody(&v);
    assert_eq!(before["state"], "active");
    assert!(before["seals_in_s"].as_f64().unwrap() > 500.0, "{before}");
    assert!(before["bound_connected_s"].as_f64().unwrap() < before["bound_partitioned_s"].as_f64().unwrap());

    server.delete_key("vol");
    let sealed = wait_for_state(&v, "destroyed");
    assert_eq!((&sealed["failure"], &sealed["next_proof_in_s"]), (&json!("destroyed"), &Value::Null));
    all_refuse(&mut programs);
    assert_eq!(errno(list(&v.mnt())), EKEYREVOKED);
    assert_eq!(errno(fs::metadata(v.at("file"))), EKEYREVOKED);
    assert_eq!(errno(File::create(v.at("new"))), EKEYREVOKED);
    // What is left: the mount can be looked at and unmounted.
    assert!(fs::metadata(v.mnt()).unwrap().is_dir());
    let run = v.cli(&["status", "mnt"]);
    run.is(0);
    assert!(run.out.contains("destroyed since"), "{}", run.out);

    // Another key under the name is not the key, and nobody is asked any more.
    server.let_a_second_pass_since_now();
    server.create_key("vol");
    let asked = server.audit().len();
    assert_eq!(ask(&v, "resume")["ok"]["state"], "destroyed");
    assert_eq!(server.audit().len(), asked);
    drop(programs);
    v.umount();
    assert_ne!(v.try_mount(&[]).code, Some(0));
}

#[test]
fn a_suspended_key_that_is_restored_brings_the_same_mount_back() {
    let server = Server::start(Storage::Memory);
    let v = volume(&server, "vol");
    v.mount(&[OFTEN]);
    furnish(&v);
    let open = File::options().read(true).write(true).open(v.at("file")).unwrap();
    let lost = File::options().read(true).append(true).open(v.at("dir/a")).unwrap();
    // A directory of a thousand names, all of which the kernel knows.
    for n in 0..1000 {
        fs::write(v.at(format!("dir/{n}")), "x").unwrap();
    }
    for round in 0..3 {
        assert_eq!(peek(&open, 5000).unwrap(), 7);
        server.must(Method::DELETE, "transit/keys/vol/soft-delete", Value::Null);
        wait_for_state(&v, "revoked");
        assert_eq!(errno(peek(&open, 5000)), EKEYREVOKED, "round {round}");
        assert_eq!(errno(fs::read(v.at("file"))), EKEYREVOKED);
        server.put("transit/keys/vol/soft-delete-restore", json!({}));
        wait_for_state(&v, "active");
        assert_eq!(peek(&open, 5000).unwrap(), 7, "the descriptor from before");
        assert_eq!(fs::read(v.at("file")).unwrap(), vec![7; 1 << 20]);
        assert_eq!(fs::read_dir(v.at("dir")).unwrap().count(), 1003);
        open.write_all_at(&[7], 5000).unwrap();
        fs::write(v.at(format!("after{round}")), "new").unwrap();
    }
    // What was not written out when the key was revoked is lost, and everybody is told.
    let before = v.cli(&["status", "mnt", "--json"]).json()["live"]["counters"]["dropped_bytes"].as_u64().unwrap();
    let mut lost = lost;
    server.must(Method::DELETE, "transit/keys/vol/soft-delete", Value::Null);
    let mut written = 0;
    // As much as can be written until nothing can.
    let refused = wait_for("a refusal", || match lost.write(&[9; 4096]) {
        Ok(n) => {
            written += n;
            None
        }
        Err(error) => Some(error),
    });
    assert_eq!(refused.raw_os_error(), Some(EKEYREVOKED));
    wait_for_state(&v, "revoked");
    let counted = wait_for("what was dropped", || {
        let now = v.cli(&["status", "mnt", "--json"]).json()["live"]["counters"]["dropped_bytes"].as_u64().unwrap();
        (now > before).then_some(now)
    });
    server.put("transit/keys/vol/soft-delete-restore", json!({}));
    wait_for_state(&v, "active");
    let kept = fs::read(v.at("dir/a")).unwrap();
    assert!(kept.starts_with(b"a") && kept[1..].iter().all(|byte| *byte == 9), "only what was written, and no holes");
    assert!(kept.len() <= 1 + written && kept.len() as u64 + (counted - before) >= 1 + written as u64 - 4096);
    assert_eq!(errno(lost.read_at(&mut [0], 0)), libc_eio(), "its descriptor says that it lost something");
    drop((open, lost));
    v.remount(&[]);
    assert_eq!(fs::read(v.at("dir/a")).unwrap(), kept);
    v.umount();
}

fn libc_eio() -> i32 {
    rustix::io::Errno::IO.raw_os_error()
}

#[test]
fn a_policy_taken_away_and_credentials_that_are_revoked() {
    let server = Server::start(Storage::Memory);
    let v = volume(&server, "vol");
    v.mount(&[OFTEN]);
    fs::write(v.at("file"), "x").unwrap();
    let policy = crate::support::at_openbao::host_policy("vol");
    server.policy("host-vol", "path \"none\" { capabilities = [\"read\"] }");
    assert_eq!(wait_for_state(&v, "revoked")["failure"], "denied");
    server.policy("host-vol", &policy);
    wait_for_state(&v, "active");
    // A token that ends is no revocation: the mount logs in again.
    server.revoke_logins("approle");
    let proofs = custody(&v)["proofs"].as_u64().unwrap();
    wait_for("renewals with a new token", || (custody(&v)["proofs"].as_u64().unwrap() > proofs + 2).then_some(()));
    assert!(custody(&v)["last_seal"]["reason"] == "revoked" && custody(&v)["state"] == "active");
    // A role that is gone is one.
    server.delete("auth/approle/role/role-vol");
    server.revoke_logins("approle");
    assert_eq!(wait_for_state(&v, "revoked")["failure"], "unauthenticated");
    v.umount();
}

#[test]
fn a_seal_on_request_lasts_until_a_resume_is_asked_for() {
    let server = Server::start(Storage::Memory);
    let v = volume(&server, "vol");
    v.mount(&[OFTEN]);
    fs::write(v.at("file"), "x").unwrap();
    assert_eq!(ask(&v, "seal")["ok"]["sealed_now"], true);
    assert_eq!(ask(&v, "seal")["ok"]["sealed_now"], false);
    let asked = server.audit().len();
    assert_eq!(errno(fs::read(v.at("file"))), EKEYREVOKED);
    let held = custody(&v);
    assert_eq!((&held["state"], &held["next_proof_in_s"]), (&json!("held"), &Value::Null));
    assert!(server.audit().len() <= asked + 2, "nobody asks");
    // The key service has the last word.
    server.must(Method::DELETE, "transit/keys/vol/soft-delete", Value::Null);
    assert_eq!(ask(&v, "resume")["ok"]["state"], "revoked");
    assert_eq!(errno(fs::read(v.at("file"))), EKEYREVOKED);
    server.put("transit/keys/vol/soft-delete-restore", json!({}));
    assert_eq!(ask(&v, "resume")["ok"]["state"], "active");
    assert_eq!(fs::read(v.at("file")).unwrap(), b"x");
    assert_eq!(ask(&v, "resume")["ok"]["state"], "active", "again");
    v.umount();
}

#[test]
fn a_key_file_that_is_taken_away() {
    let v = TestVolume::mounted(&[OFTEN]);
    fs::write(v.at("file"), "x").unwrap();
    let open = File::open(v.at("file")).unwrap();
    assert_eq!(peek(&open, 0).unwrap(), b'x');
    fs::rename(v.path("keys/key"), v.path("keys/away")).unwrap();
    wait_for_state(&v, "revoked");
    assert_eq!(errno(peek(&open, 0)), EKEYREVOKED);
    fs::rename(v.path("keys/away"), v.path("keys/key")).unwrap();
    wait_for_state(&v, "active");
    assert_eq!(peek(&open, 0).unwrap(), b'x');
    drop(open);
    v.umount();
}

#[test]
fn a_canary_that_the_backing_store_made_up_is_not_asked_about() {
    let v = TestVolume::init();
    // One of two copies, in the part that authenticates it, and that a mount mends.
    let path = v.backing().join("lethefs.volume");
    let genuine = fs::read_to_string(&path).unwrap();
    let at = genuine.find("\"canary\":\"").unwrap() + 60;
    let mut forged = genuine.clone().into_bytes();
    forged[at] = if forged[at] == b'A' { b'B' } else { b'A' };
    fs::write(&path, forged).unwrap();
    v.mount(&[OFTEN]);
    assert_eq!(fs::read_to_string(&path).unwrap(), genuine, "mended");
    fs::write(v.at("file"), "x").unwrap();
    wait_for("renewals", || (custody(&v)["proofs"].as_u64().unwrap() > 3).then_some(()));
    let custody = custody(&v);
    assert_eq!((&custody["state"], &custody["last_seal"]), (&json!("active"), &Value::Null));
    assert_eq!(fs::read(v.at("file")).unwrap(), b"x");
    v.umount();
}
