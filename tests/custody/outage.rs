//! The key service says nothing.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::support::at_openbao::{at, volume};
use crate::support::disk::Disk;
use crate::support::faulty::{Fate, Faulty, Op};
use crate::support::openbao::{Server, Storage, wait_for};
use crate::support::volume::TestVolume;
use crate::{EKEYEXPIRED, OFTEN, Program, custody, errno, list, peek, wait_for_state};

const BLOCK: usize = 4096;

/// One block, which says whose and which it is.
fn block(writer: usize, number: usize) -> Vec<u8> {
    format!("{writer} {number} ").into_bytes().into_iter().cycle().take(BLOCK).collect()
}

/// Blocks of a file: appended first, then written over and over.
const ROUND: usize = 2048;

/// Writes blocks, never flushed, until that fails. How many it wrote, and why it ended.
fn write_on(v: &TestVolume, writer: usize, stop: &AtomicBool) -> (usize, Option<i32>) {
    let file = File::options().create(true).truncate(false).write(true).open(v.at(format!("w{writer}"))).unwrap();
    let mut number = 0;
    while !stop.load(Ordering::Relaxed) {
        if let Err(error) = file.write_all_at(&block(writer, number), (number % ROUND * BLOCK) as u64) {
            return (number, error.raw_os_error());
        }
        number += 1;
    }
    (number, None)
}

/// The last block that a write(2) said yes to, in each place.
fn all_there(v: &TestVolume, writer: usize, written: usize) {
    let found = fs::read(v.at(format!("w{writer}"))).unwrap();
    for number in written.saturating_sub(ROUND)..written {
        let at = number % ROUND * BLOCK;
        // The one that failed may have got somewhere.
        if at != written % ROUND * BLOCK || written < ROUND {
            assert!(found[at..at + BLOCK] == block(writer, number), "writer {writer}, block {number} of {written}");
        }
    }
}

/// A network between the mount and the server, which can be cut: then nothing passes any more, and nobody is told.
pub(crate) struct Network {
    pub(crate) address: String,
    cut: Arc<AtomicBool>,
}

impl Network {
    pub(crate) fn cut(&self) {
        self.cut.store(true, Ordering::SeqCst);
    }

    pub(crate) fn mend(&self) {
        self.cut.store(false, Ordering::SeqCst);
    }

    pub(crate) fn before(server: &Server) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("https://{}", listener.local_addr().unwrap());
        let (port, cut) = (server.port(), Arc::new(AtomicBool::new(false)));
        let is_cut = cut.clone();
        std::thread::spawn(move || {
            for near in listener.incoming() {
                let near = near.unwrap();
                let Ok(far) = TcpStream::connect(("127.0.0.1", port)) else { continue };
                for (mut from, mut to) in [(near.try_clone().unwrap(), far.try_clone().unwrap()), (far, near)] {
                    let is_cut = is_cut.clone();
                    std::thread::spawn(move || {
                        let mut bytes = [0; 16384];
                        while let Ok(n @ 1..) = from.read(&mut bytes) {
                            // What is sent into a cut network is lost; the connections stay as they are.
                            if !is_cut.load(Ordering::SeqCst) && to.write_all(&bytes[..n]).is_err() {
                                break;
                            }
                        }
                        let _ = to.shutdown(std::net::Shutdown::Both);
                    });
                }
            }
        });
        Self { address, cut }
    }
}

/// The key service goes away in one of four ways while three programs write, and comes back.
fn outage(away: impl Fn(&mut Server), back: impl Fn(&mut Server)) {
    outage_of(Server::start(Storage::Raft), |_, _| (), away, back);
}

fn outage_of(
    mut server: Server,
    prepare: impl Fn(&Server, &TestVolume),
    away: impl Fn(&mut Server),
    back: impl Fn(&mut Server),
) {
    let v = volume(&server, "vol");
    prepare(&server, &v);
    v.mount(&[OFTEN, "--grace=1s"]);
    fs::write(v.at("read"), vec![5; 1 << 20]).unwrap();
    let reader = File::open(v.at("read")).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..3)
            .map(|n| {
                scope.spawn({
                    let (v, stop) = (&v, &stop);
                    move || write_on(v, n, stop)
                })
            })
            .collect();
        away(&mut server);
        let sealed = wait_for_state(&v, "expired");
        let ended: Vec<_> = writers.into_iter().map(|writer| writer.join().unwrap()).collect();
        let seal =
            wait_for("the seal's report", || Some(custody(&v)["last_seal"].clone()).filter(|seal| !seal.is_null()));
        assert_eq!((&seal["drained"], &seal["dropped_bytes"]), (&true.into(), &0.into()), "{seal}");
        assert_eq!((&seal["reason"], &seal["left_inodes"]), (&"expired".into(), &0.into()), "{seal}");
        assert!(sealed["next_proof_in_s"].is_number(), "it asks on");
        assert_eq!(errno(peek(&reader, 5000)), EKEYEXPIRED);
        assert_eq!(errno(list(&v.mnt())), EKEYEXPIRED);
        back(&mut server);
        wait_for_state(&v, "active");
        assert_eq!(peek(&reader, 5000).unwrap(), 5);
        for (writer, (written, error)) in ended.iter().enumerate() {
            assert_eq!(*error, Some(EKEYEXPIRED));
            all_there(&v, writer, *written);
        }
        // And it takes writes again.
        fs::write(v.at("after"), "new").unwrap();
        drop(reader);
        v.remount(&[]);
        for (writer, (written, _)) in ended.iter().enumerate() {
            all_there(&v, writer, *written);
        }
        assert_eq!(fs::read(v.at("after")).unwrap(), b"new");
        v.umount();
    });
}

#[test]
fn stopped_for_longer_than_the_grace() {
    outage(Server::kill, Server::restart);
}

#[test]
fn hung_for_longer_than_the_grace() {
    outage(|server| server.stop(), |server| server.cont());
}

#[test]
fn cut_off_for_longer_than_the_grace() {
    let server = Server::start(Storage::Memory);
    let network = Network::before(&server);
    outage_of(server, |_, v| v.env("VAULT_ADDR", network.address.clone()), |_| network.cut(), |_| network.mend());
}

#[test]
fn sealed_for_longer_than_the_grace() {
    outage(|server| server.seal(), Server::restart);
}

#[test]
fn shorter_than_the_grace_nobody_notices() {
    let mut server = Server::start(Storage::Raft);
    let v = volume(&server, "vol");
    v.mount(&[OFTEN]);
    let stop = AtomicBool::new(false);
    let written = std::thread::scope(|scope| {
        let writer = scope.spawn(|| write_on(&v, 0, &stop));
        server.kill();
        let grace = wait_for_state(&v, "grace");
        assert_eq!(grace["failure"], "unreachable");
        assert!(grace["seals_in_s"].as_f64().unwrap() > 500.0);
        server.restart();
        let back = wait_for_state(&v, "active");
        assert!(back["last_seal"].is_null());
        stop.store(true, Ordering::Relaxed);
        let (written, error) = writer.join().unwrap();
        assert_eq!(error, None);
        written
    });
    all_there(&v, 0, written);
    v.umount();
}

#[test]
fn what_a_failing_disk_does_not_take_is_reported() {
    let mut server = Server::start(Storage::Raft);
    let v = TestVolume::new();
    let disk = Disk::new(&v, "ext4");
    at(&v, &server, "vol");
    v.mount(&[OFTEN, "--grace=1s"]);
    fs::write(v.at("safe"), vec![3; 100_000]).unwrap();
    File::open(v.at("safe")).unwrap().sync_all().unwrap();
    let dirty = File::create(v.at("dirty")).unwrap();
    server.kill();
    wait_for_state(&v, "grace");
    disk.shut_down();
    dirty.write_all_at(&vec![4; 1 << 20], 0).unwrap();
    wait_for_state(&v, "expired");
    let seal = custody(&v)["last_seal"].clone();
    assert_eq!(seal["drained"], false, "{seal}");
    assert!(seal["unflushed_files"].as_u64().unwrap() > 0, "{seal}");
    assert_eq!(seal["left_inodes"], 0, "{seal}");
    assert!(dirty.sync_all().is_err(), "the program is told");
    drop(dirty);
    v.crash();
    disk.power_on();
    server.restart();
    v.mount(&[]);
    assert!(fs::read(v.at("safe")).unwrap() == vec![3; 100_000]);
    v.umount();
    v.cli(&["fsck", "backing"]).is(0);
}

/// The store is served by this process: everything that may wait for it is done by others.
#[test]
fn a_disk_that_hangs_keeps_neither_the_keys_nor_the_mount() {
    let server = Server::start(Storage::Memory);
    let v = TestVolume::new();
    fs::create_dir(v.path("store")).unwrap();
    fs::create_dir(v.backing()).unwrap();
    let store = Faulty::mount(&v.path("store"), &v.backing());
    at(&v, &server, "vol");
    v.mount(&[OFTEN, "--grace=1s"]);
    let mut clean = Program::new(
        &v,
        "f = os.open('clean', os.O_RDWR | os.O_CREAT)\nos.write(f, b'3' * (1 << 20))\nos.fsync(f)\ndef look(): return os.pread(f, 1, 5000)",
    );
    let mut dirty = Program::new(
        &v,
        "f = os.open('dirty', os.O_RDWR | os.O_CREAT)\nos.write(f, b'3' * 4096)\nos.fsync(f)\ndef look(): return os.pwrite(f, b'4' * 4096, 0)",
    );
    assert_eq!(clean.look(), "ok b'3'");
    store.rule(|call| if matches!(call.op, Op::Write | Op::Fsync) { Fate::Hang } else { Fate::Pass });
    assert_eq!(dirty.look(), "ok 4096");
    server.stop();
    wait_for_state(&v, "sealing");
    let refused = format!("errno {EKEYEXPIRED}");
    wait_for_state(&v, "expired");
    let seal = custody(&v)["last_seal"].clone();
    assert_eq!((&seal["drained"], &seal["reason"]), (&false.into(), &"expired".into()), "{seal}");
    assert!(seal["unscrubbed_workers"].as_u64().unwrap() >= 1, "who hangs is counted: {seal}");
    assert_eq!(seal["left_inodes"], 0, "its writes are refused in the end: {seal}");
    assert_eq!(clean.look(), refused);
    // The key service is back before the disk is.
    server.cont();
    wait_for_state(&v, "active");
    assert_eq!(clean.look(), "ok b'3'");
    // What the old seal still had to do is not done to the mount that was opened again.
    store.heal();
    let mut after =
        Program::new(&v, "def look():\n  f = open('after', 'w')\n  f.write('x')\n  f.flush()\n  os.fsync(f.fileno())");
    for _ in 0..50 {
        assert_eq!(after.look(), "ok None");
        assert_eq!((clean.look().as_str(), &custody(&v)["state"]), ("ok b'3'", &"active".into()));
    }
    drop((clean, dirty, after));
    v.umount();
}

#[test]
fn a_key_that_is_revoked_while_nobody_could_be_asked() {
    let mut server = Server::start(Storage::Raft);
    let v = volume(&server, "vol");
    v.mount(&[OFTEN, "--grace=1s"]);
    fs::write(v.at("file"), "x").unwrap();
    server.delete_key("vol");
    server.kill();
    wait_for("the seal", || {
        let state = custody(&v)["state"].clone();
        (state == "expired" || state == "revoked" || state == "destroyed").then_some(())
    });
    server.restart();
    wait_for_state(&v, "destroyed");
    let sealed = fs::read(v.at("file")).unwrap_err().raw_os_error();
    assert!(matches!(sealed, Some(EKEYEXPIRED | crate::EKEYREVOKED)), "{sealed:?}");
    v.umount();
}
