//! The disk hangs, and then comes the seal.

use std::fs;

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::at_openbao::at;
use crate::support::faulty::{Fate, Faulty, Healer, Op, Quiet};
use crate::support::openbao::{Server, Storage, wait_for};
use crate::support::volume::TestVolume;
use crate::{EKEYREVOKED, OFTEN, Program, ask, errno, peek, wait_for_state};

/// A volume on a store that can hang, with its key at the server.
/// (In this order, so that a test that fails leaves nobody stuck: what is bound last goes first.)
pub(crate) fn on_faulty(server: &Server) -> (Faulty, TestVolume, Healer) {
    let v = TestVolume::new();
    fs::create_dir(v.path("store")).unwrap();
    fs::create_dir(v.backing()).unwrap();
    let store = Faulty::mount(&v.path("store"), &v.backing());
    at(&v, server, "vol");
    let healer = store.healer();
    (store, v, healer)
}

/// The lease, by way of the control socket: nothing of the mount is touched.
pub(crate) fn lease(v: &TestVolume) -> Value {
    ask(v, "status")["ok"]["custody"].clone()
}

pub(crate) fn wait_for_lease(v: &TestVolume, state: &str) -> Value {
    wait_for(state, || Some(lease(v)).filter(|lease| lease["state"] == state))
}

/// Files of a megabyte, of which a program knows the first half: `look()` touches that, through a descriptor and a mapping.
const HALF_CACHED: &str = "
f = [os.open('f%d' % n, os.O_RDWR) for n in range(12)]
for fd in f:
  os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
  for at in range(0, 1 << 19, 4096): os.pread(fd, 4096, at)
def look(): return [os.pread(fd, 1, 5000) for fd in f] == [b'7'] * 12";

/// Reads the other half of all, each on a thread of its own, and tells how they ended.
const READ_THE_REST: &str = "
import threading
f = [os.open('f%d' % n, os.O_RDONLY) for n in range(12)]
ends = []
def read(fd):
  try: os.pread(fd, 4096, 3 << 18); ends.append('read')
  except OSError as e: ends.append(e.errno)
threads = [threading.Thread(target=read, args=(fd,)) for fd in f]
def look():
  if threads[0].ident is None: [t.start() for t in threads]; return None
  [t.join() for t in threads]
  return sorted(set(map(str, ends)))";

#[test]
fn reads_that_hang_in_every_worker_keep_nothing_in_the_cache() {
    let server = Server::start(Storage::Memory);
    let (store, v, _heals) = on_faulty(&server);
    v.mount(&[OFTEN]);
    for n in 0..12 {
        fs::write(v.at(format!("f{n}")), vec![b'7'; 1 << 20]).unwrap();
    }
    v.remount(&[OFTEN]);
    let mut cached = Program::new(&v, HALF_CACHED);
    let mapped = "f = open('f3', 'rb')\nm = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)\nm.madvise(mmap.MADV_RANDOM)\ndef look(): return m[9000]";
    let mut mapped = Program::new(&v, mapped);
    let mut hangs = Program::new(&v, READ_THE_REST);
    assert_eq!((cached.look().as_str(), mapped.look().as_str()), ("ok True", "ok 55"));
    store.hang_after(0, Quiet::Read);
    assert_eq!(hangs.look(), "ok None");
    // All of the workers, and requests that nobody has taken.
    store.wait_for_hung(4);
    assert_eq!((cached.look().as_str(), mapped.look().as_str()), ("ok True", "ok 55"), "still served");

    server.must(Method::DELETE, "transit/keys/vol/soft-delete", Value::Null);
    let sealed = wait_for_lease(&v, "revoked");
    let seal = &sealed["last_seal"];
    assert_eq!((&seal["left_inodes"], &seal["unscrubbed_workers"]), (&json!(0), &json!(4)), "{seal}");
    assert_eq!((cached.look(), mapped.look()), (format!("errno {EKEYREVOKED}"), "signal 7".to_owned()));
    // Nobody hangs any more, though the disk does.
    assert_eq!(hangs.look(), format!("ok ['{EKEYREVOKED}']"));
    assert_eq!(errno(fs::metadata(v.at("f1"))), EKEYREVOKED);
    let status = v.cli(&["status"]);
    status.is(0);
    assert!(status.out.contains("revoked since"), "{}", status.out);

    // And the same mount comes back.
    store.heal();
    server.put("transit/keys/vol/soft-delete-restore", json!({}));
    wait_for_state(&v, "active");
    assert_eq!(cached.look(), "ok True");
    let whole = Program::new(&v, "def look(): return open('f5', 'rb').read() == b'7' * (1 << 20)").look();
    assert_eq!(whole, "ok True");
    drop((cached, mapped, hangs));
    v.umount();
}

#[test]
fn writes_that_hang_keep_nothing_in_the_cache_of_a_revoked_mount() {
    let server = Server::start(Storage::Memory);
    let (store, v, _heals) = on_faulty(&server);
    v.mount(&[OFTEN]);
    let mut programs: Vec<_> = (0..6)
        .map(|n| {
            let script = format!(
                "f = os.open('f{n}', os.O_RDWR | os.O_CREAT)\nos.write(f, b'3' * (1 << 20))\nos.fsync(f)\ndef look(): return os.pread(f, 1, 5000)"
            );
            Program::new(&v, &script)
        })
        .collect();
    let script = "import threading
f = [os.open('f%d' % n, os.O_RDWR) for n in range(6)]
def write(f): os.pwrite(f, b'4' * 4096, 0); os.fsync(f)
threads = [threading.Thread(target=write, args=(fd,), daemon=True) for fd in f]
def look(): [t.start() for t in threads]";
    let mut writer = Program::new(&v, script);
    store.rule(|call| if call.op == Op::Write { Fate::Hang } else { Fate::Pass });
    assert_eq!(writer.look(), "ok None");
    store.wait_for(|call| call.op == Op::Write && call.len > 4000);
    server.must(Method::DELETE, "transit/keys/vol/soft-delete", Value::Null);
    let sealed = wait_for_lease(&v, "revoked");
    let seal = &sealed["last_seal"];
    assert_eq!(seal["left_inodes"], 0, "{seal}");
    assert!(seal["dropped_bytes"].as_u64().unwrap() >= 4096, "{seal}");
    for program in &mut programs {
        assert_eq!(program.look(), format!("errno {EKEYREVOKED}"));
    }
    store.heal();
    server.put("transit/keys/vol/soft-delete-restore", json!({}));
    wait_for_state(&v, "active");
    // What was refused may be there, or not; what was there before is.
    for n in 0..6 {
        let script = format!("def look(): return set(open('f{n}', 'rb').read()[4096:]), os.stat('f{n}').st_size");
        assert_eq!(Program::new(&v, &script).look(), "ok ({51}, 1048576)");
    }
    drop((programs, writer));
    v.umount();
}

#[test]
fn a_listing_that_was_not_told_keeps_no_inode() {
    let server = Server::start(Storage::Memory);
    let (store, v, _heals) = on_faulty(&server);
    v.mount(&[OFTEN]);
    fs::create_dir(v.at("dir")).unwrap();
    for n in 0..8 {
        fs::write(v.at(format!("dir/{n}")), "x").unwrap();
    }
    v.remount(&[OFTEN]);
    let inodes = || ask(&v, "status")["ok"]["counters"]["cached_inodes"].clone();
    let mut list = Program::new(&v, "os.stat('dir/3')\ndef look(): return sorted(e.name for e in os.scandir('dir'))");
    let before = inodes();
    // In the middle of the listing, with some of its entries found.
    store.hang_after(4, Quiet::Lookup);
    std::thread::scope(|scope| {
        let listing = scope.spawn(|| list.look());
        store.wait_for_hung(1);
        assert!(inodes().as_u64() > before.as_u64(), "it has found some");
        assert_eq!(ask(&v, "seal")["ok"]["left_inodes"], 0);
        store.heal();
        assert_eq!(listing.join().unwrap(), format!("errno {EKEYREVOKED}"));
    });
    assert_eq!(ask(&v, "resume")["ok"]["state"], "active");
    wait_for_state(&v, "active");
    assert_eq!(list.look(), "ok ['0', '1', '2', '3', '4', '5', '6', '7']");
    // The kernel forgets what is removed; nobody else has it.
    drop(list);
    fs::remove_dir_all(v.at("dir")).unwrap();
    wait_for("every inode but the root's to go", || (inodes() == 1).then_some(()));
    v.umount();
}

#[test]
fn a_resume_whose_fetch_hangs_opens_nothing_on_an_old_proof() {
    // The key's directory hangs, the volume does not.
    let dir = tempfile::tempdir().unwrap();
    let slow = |name: &str| dir.path().join(name);
    fs::create_dir(slow("keys")).unwrap();
    fs::create_dir(slow("slow")).unwrap();
    let keys = Faulty::mount(&slow("keys"), &slow("slow"));
    let v = TestVolume::new();
    let _heals = keys.healer();
    v.init_with(&format!("file://{}", slow("slow/key").display()));
    v.mount(&[OFTEN, "--grace=1s"]);
    fs::write(v.at("file"), "x").unwrap();
    let open = fs::File::open(v.at("file")).unwrap();
    let (there, away) = (slow("slow/key"), slow("slow/away"));
    let mut reads = 0;
    loop {
        fs::rename(&there, &away).unwrap();
        wait_for_lease(&v, "revoked");
        keys.hang_after(reads, Quiet::Read);
        fs::rename(&away, &there).unwrap();
        keys.wait_for_hung(1);
        // The proof came, and what hangs is the fetch; or else the proof hangs.
        if lease(&v)["state"] != "revoked" {
            break;
        }
        reads += 1;
        keys.heal();
        wait_for_lease(&v, "active");
    }
    let resumed = || v.log().matches("resumed").count();
    let before = resumed();
    wait_for("the lease to run out", || (!matches!(lease(&v)["state"].as_str(), Some("resuming"))).then_some(()));
    // Whoever has the file open may read on in it; whoever comes later finds none.
    fs::rename(&there, &away).unwrap();
    keys.heal();
    wait_for_lease(&v, "revoked");
    assert_eq!(resumed(), before, "{}", v.log());
    assert_eq!(errno(peek(&open, 0)), EKEYREVOKED);
    fs::rename(&away, &there).unwrap();
    wait_for_lease(&v, "active");
    assert_eq!(peek(&open, 0).unwrap(), b'x');
    drop(open);
    v.umount();
}

#[test]
fn a_key_revoked_during_a_replay_keeps_the_volume_shut() {
    let server = Server::start(Storage::Memory);
    let (store, v, _heals) = on_faulty(&server);
    v.mount(&[OFTEN]);
    let logged = "f = os.open('file', os.O_RDWR | os.O_CREAT)
for n in range(2): os.pwrite(f, b'%d' % n * 8192, 0); os.fdatasync(f)
def look(): return os.pwrite(f, b'2' * 4096, 0), os.fdatasync(f)";
    let mut program = Program::new(&v, logged);
    assert_eq!(program.look(), "ok (4096, None)");
    v.crash();
    drop(program);
    let revoke = |how: &dyn Fn(), until: &str| {
        store.calls();
        store.rule(|call| if matches!(call.op, Op::Write | Op::Truncate) { Fate::Hang } else { Fate::Pass });
        std::thread::scope(|scope| {
            let mount = scope.spawn(|| v.try_mount(&[OFTEN, "--grace=1s"]));
            store.wait_for(|call| call.op == Op::Write);
            how();
            let log = || fs::read_dir(v.path("state/audit")).unwrap().flatten().map(|file| file.path());
            wait_for(until, || {
                log().any(|file| fs::read_to_string(file).is_ok_and(|t| t.contains(until))).then_some(())
            });
            store.heal();
            let run = mount.join().unwrap();
            assert!(run.code != Some(0) && run.err.lines().count() == 1, "{run:?}");
            run
        })
    };
    revoke(&|| drop(server.must(Method::DELETE, "transit/keys/vol/soft-delete", Value::Null)), "\"deny\"");
    server.put("transit/keys/vol/soft-delete-restore", json!({}));
    // What was in the log is still there.
    v.mount(&[]);
    let found = fs::read(v.at("file")).unwrap();
    assert!(found[..4096] == [b'2'; 4096] && found[4096..] == [b'1'; 4096]);
    v.umount();
}

/// Nothing to unmount by force then, and on this machine perhaps no control files either.
#[test]
fn a_detached_mount_whose_daemon_dies_with_reads_under_way() {
    let server = Server::start(Storage::Memory);
    let (store, v, _heals) = on_faulty(&server);
    v.mount(&[]);
    for n in 0..12 {
        fs::write(v.at(format!("f{n}")), vec![b'7'; 1 << 20]).unwrap();
    }
    v.remount(&[]);
    let mut cached = Program::new(&v, HALF_CACHED);
    let mut hangs = Program::new(&v, READ_THE_REST);
    assert_eq!(cached.look(), "ok True");
    store.hang_after(0, Quiet::Read);
    assert_eq!(hangs.look(), "ok None");
    store.wait_for_hung(4);
    let daemon = v.daemon();
    rustix::mount::unmount(v.mnt(), rustix::mount::UnmountFlags::DETACH).unwrap();
    rustix::process::kill_process(daemon, rustix::process::Signal::KILL).unwrap();
    // It ends once the disk lets go of it, and takes with it what it was asked.
    store.heal();
    assert_eq!(v.daemon_exit(), None);
    assert_eq!(cached.look(), "errno 107");
    // Nobody is left waiting: what had been asked is ECONNABORTED, what is asked now ENOTCONN.
    let ends = hangs.look();
    assert!(["ok ['103']", "ok ['107']", "ok ['103', '107']"].contains(&ends.as_str()), "{ends}");
    assert!(v.log().contains("its plaintext was dropped"), "{}", v.log());
}
