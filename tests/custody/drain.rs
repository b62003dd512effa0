//! What may go wrong while a seal in order writes out: nothing slips into the kernel's caches, nothing that was taken is lost
//! without a word, and what hangs holds up nobody else.

use std::fs;

use reqwest::Method;
use serde_json::{Value, json};

use crate::hung::{lease, on_faulty, wait_for_lease};
use crate::outage::Network;
use crate::support::faulty::{Call, Fate, Faulty, Op, Quiet};
use crate::support::openbao::{Server, Storage, wait_for};
use crate::support::volume::TestVolume;
use crate::{EKEYEXPIRED, EKEYREVOKED, OFTEN, Program, ask, wait_for_state};

const EXPIRED: &str = "--grace=1s";

/// A program with a file of one block on the medium; `look()` appends one, which is dirty then, and goes in place when it is sent.
fn appends(v: &TestVolume, name: &str) -> (Program, u64) {
    let script = format!(
        "f = os.open('{name}', os.O_RDWR | os.O_CREAT)\nos.write(f, b'0' * 4096)\nos.fsync(f)\ndef look(): return os.pwrite(f, b'1' * 4096, 4096)"
    );
    let program = Program::new(v, &script);
    (program, ino(v, name))
}

fn ino(v: &TestVolume, name: &str) -> u64 {
    std::os::unix::fs::MetadataExt::ino(&fs::metadata(v.at(name)).unwrap())
}

/// Writes to these files hang.
fn hang(store: &Faulty, inos: Vec<u64>) {
    store.rule(move |call: &Call| match call.op {
        Op::Write if inos.contains(&call.ino) => Fate::Hang,
        _ => Fate::Pass,
    });
}

fn refused(program: &mut Program) {
    wait_for("a refusal", || (program.look() == format!("errno {EKEYEXPIRED}")).then_some(()));
}

#[test]
fn attributes_told_while_draining_are_not_kept() {
    let server = Server::start(Storage::Memory);
    let (store, v, _heals) = on_faulty(&server);
    v.mount(&[OFTEN, EXPIRED]);
    let (mut dirty, number) = appends(&v, "dirty");
    let script = "f = os.open('other', os.O_RDWR | os.O_CREAT)\ndef look(): return os.fstat(f).st_size";
    let mut stat = Program::new(&v, script);
    let mut chmod = Program::new(&v, "f = os.open('other', os.O_RDWR)\ndef look(): return os.fchmod(f, 0o640)");
    hang(&store, vec![number]);
    assert_eq!((dirty.look(), stat.look()), ("ok 4096".into(), "ok 0".into()));
    server.stop();
    wait_for_lease(&v, "sealing");
    // The first purge has passed it, and waits for the other file.
    refused(&mut stat);
    assert_eq!(chmod.look(), "ok None", "what the kernel needs for times of dirty files passes");
    for _ in 0..3 {
        assert_eq!(stat.look(), format!("errno {EKEYEXPIRED}"), "what it was told of them was for once");
    }
    store.heal();
    let seal = wait_for_lease(&v, "expired")["last_seal"].clone();
    assert_eq!((&seal["drained"], &seal["dropped_bytes"]), (&json!(true), &json!(0)), "{seal}");
    server.cont();
    wait_for_state(&v, "active");
    drop((dirty, stat, chmod));
    v.umount();
}

#[test]
fn a_page_that_is_dirtied_behind_the_first_purge_is_written() {
    let server = Server::start(Storage::Memory);
    let (store, v, _heals) = on_faulty(&server);
    fs::create_dir(v.path("sources")).unwrap();
    fs::create_dir(v.path("slow")).unwrap();
    fs::write(v.path("sources/source"), [b'S'; 4096]).unwrap();
    let source = Faulty::mount(&v.path("sources"), &v.path("slow"));
    let _source_heals = source.healer();
    v.mount(&[OFTEN, EXPIRED]);
    let (mut dirty, number) = appends(&v, "dirty");
    // A write(2) that has looked at the attributes and now waits for what it is to write.
    let script = "s = os.open('../slow/source', os.O_RDONLY)
m = mmap.mmap(s, 4096, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
f = os.open('late', os.O_RDWR | os.O_CREAT)
os.write(f, b'0' * 4096)
os.fsync(f)
def look(): return os.pwrite(f, m, 4096)";
    let mut late = Program::new(&v, script);
    let mut stat = Program::new(&v, "f = os.open('late', os.O_RDONLY)\ndef look(): return os.fstat(f).st_size");
    assert_eq!(stat.look(), "ok 4096");
    source.hang_after(0, Quiet::Read);
    std::thread::scope(|scope| {
        let writing = scope.spawn(|| late.look());
        source.wait_for_hung(1);
        hang(&store, vec![number]);
        assert_eq!(dirty.look(), "ok 4096");
        server.stop();
        wait_for_lease(&v, "sealing");
        refused(&mut stat);
        source.heal();
        assert_eq!(writing.join().unwrap(), "ok 4096");
        store.heal();
    });
    let seal = wait_for_lease(&v, "expired")["last_seal"].clone();
    assert_eq!((&seal["drained"], &seal["dropped_bytes"]), (&json!(true), &json!(0)), "{seal}");
    server.cont();
    wait_for_state(&v, "active");
    let found = fs::read(v.at("late")).unwrap();
    assert!(found[..4096] == [b'0'; 4096] && found[4096..] == [b'S'; 4096]);
    drop((dirty, late, stat));
    v.umount();
}

#[test]
fn many_files_that_hang_keep_no_other_in_the_cache() {
    let server = Server::start(Storage::Memory);
    let (store, v, _heals) = on_faulty(&server);
    v.mount(&[OFTEN, EXPIRED, "-o", "threads=24"]);
    // In turn, so that in whatever order they are told of, some that hang come before some that do not.
    let (mut clean, mut dirty, mut numbers) = (Vec::new(), Vec::new(), Vec::new());
    for n in 0..12 {
        let (program, number) = appends(&v, &format!("d{n}"));
        dirty.push(program);
        numbers.push(number);
        let script = format!(
            "f = os.open('c{n}', os.O_RDWR | os.O_CREAT)\nos.write(f, b'3' * 8192)\nos.fsync(f)\ndef look(): return os.pread(f, 1, 5000)"
        );
        clean.push(Program::new(&v, &script));
    }
    hang(&store, numbers);
    assert!(dirty.iter_mut().all(|program| program.look() == "ok 4096"));
    server.stop();
    wait_for_lease(&v, "sealing");
    // All of them while the disk hangs, long before the drain is given up, so that nothing is lost.
    clean.iter_mut().for_each(refused);
    store.heal();
    let seal = wait_for_lease(&v, "expired")["last_seal"].clone();
    assert_eq!((&seal["drained"], &seal["dropped_bytes"]), (&json!(true), &json!(0)), "{seal}");
    server.cont();
    wait_for_state(&v, "active");
    for n in 0..12 {
        assert!(fs::read(v.at(format!("d{n}"))).unwrap()[4096..] == [b'1'; 4096]);
    }
    drop((clean, dirty));
    v.umount();
}

#[test]
fn a_read_that_hangs_holds_up_no_drain() {
    let server = Server::start(Storage::Memory);
    let (store, v, _heals) = on_faulty(&server);
    v.mount(&[OFTEN, EXPIRED]);
    fs::write(v.at("file"), vec![b'7'; 1 << 20]).unwrap();
    v.remount(&[OFTEN, EXPIRED]);
    let script =
        "f = os.open('file', os.O_RDONLY)\nos.posix_fadvise(f, 0, 0, os.POSIX_FADV_RANDOM)\nos.pread(f, 8192, 0)\n";
    let mut cached = Program::new(&v, &format!("{script}def look(): return os.pread(f, 1, 5000)"));
    let mut reads = Program::new(&v, &format!("{script}def look(): return os.pread(f, 1, 3 << 18)"));
    store.hang_after(0, Quiet::Read);
    std::thread::scope(|scope| {
        let reading = scope.spawn(|| reads.look());
        store.wait_for_hung(1);
        assert_eq!(cached.look(), "ok b'7'");
        server.stop();
        wait_for_lease(&v, "sealing");
        refused(&mut cached);
        assert_eq!(reading.join().unwrap(), format!("errno {EKEYEXPIRED}"));
    });
    store.heal();
    let seal = wait_for_lease(&v, "expired")["last_seal"].clone();
    assert_eq!((&seal["drained"], &seal["left_inodes"]), (&json!(true), &json!(0)), "{seal}");
    server.cont();
    wait_for_state(&v, "active");
    assert_eq!(cached.look(), "ok b'7'");
    drop((cached, reads));
    v.umount();
}

#[test]
fn a_write_over_a_sealed_file_that_fails_is_counted() {
    // Whoever calls sync(2) on this machine just then has the page written before the drain: nothing is lost, and nothing shown.
    assert!((0..4).any(|_| a_write_over_a_sealed_file_fails()), "never was anything counted");
}

fn a_write_over_a_sealed_file_fails() -> bool {
    let server = Server::start(Storage::Memory);
    let (store, v, _heals) = on_faulty(&server);
    v.mount(&[OFTEN, EXPIRED]);
    fs::write(v.at("file"), [b'0'; 8192]).unwrap();
    v.remount(&[OFTEN, EXPIRED]);
    let script =
        "f = os.open('file', os.O_RDWR)\nos.pread(f, 8192, 0)\ndef look(): return os.pwrite(f, b'1' * 4096, 0)";
    let mut dirty = Program::new(&v, script);
    let unsealed = || ask(&v, "status")["ok"]["counters"]["unsealed_files"].clone();
    server.stop();
    wait_for_lease(&v, "grace");
    assert_eq!(dirty.look(), "ok 4096");
    store.rule(|call| if call.op == Op::Write { Fate::Fail(libc::EIO) } else { Fate::Pass });
    let early = unsealed() != json!(0);
    let seal = wait_for_lease(&v, "expired")["last_seal"].clone();
    if early || seal["drained"] == json!(true) {
        return false;
    }
    assert_eq!((&seal["drained"], &seal["dropped_bytes"]), (&json!(false), &json!(4096)), "{seal}");
    store.heal();
    server.cont();
    wait_for_state(&v, "active");
    assert!(fs::read(v.at("file")).unwrap() == [b'0'; 8192]);
    assert_eq!(dirty.look(), format!("errno {}", libc::EIO), "it is told that it lost something");
    drop(dirty);
    v.umount();
    true
}

#[test]
fn a_revocation_in_the_middle_of_a_drain_is_one_seal() {
    let server = Server::start(Storage::Memory);
    let network = Network::before(&server);
    let (store, v, _heals) = on_faulty(&server);
    v.env("VAULT_ADDR", network.address.clone());
    v.mount(&[OFTEN, EXPIRED]);
    let (mut dirty, number) = appends(&v, "dirty");
    let mut clean = Program::new(
        &v,
        "f = os.open('clean', os.O_RDWR | os.O_CREAT)\nos.write(f, b'3' * 8192)\nos.fsync(f)\ndef look(): return os.pread(f, 1, 5000)",
    );
    hang(&store, vec![number]);
    assert_eq!((dirty.look().as_str(), clean.look().as_str()), ("ok 4096", "ok b'3'"));
    network.cut();
    wait_for_lease(&v, "sealing");
    refused(&mut clean);
    server.must(Method::DELETE, "transit/keys/vol/soft-delete", Value::Null);
    network.mend();
    // At once, though the disk hangs.
    wait_for("the newer reason", || (clean.look() == format!("errno {EKEYREVOKED}")).then_some(()));
    assert_eq!(ask(&v, "status")["ok"]["sealed"], "revoked");
    store.heal();
    let seal = wait_for_lease(&v, "revoked")["last_seal"].clone();
    assert_eq!(seal["reason"], "revoked", "{seal}");
    drop((dirty, clean));
    v.umount();
    let log = fs::read_dir(v.path("state/audit")).unwrap().flatten().map(|file| fs::read_to_string(file.path()));
    let log: String = log.filter_map(Result::ok).collect();
    let seals: Vec<_> = log.lines().filter(|line| line.contains("\"event\":\"seal\"")).collect();
    assert!(seals.len() == 1 && seals[0].contains("\"reason\":\"revoked\""), "{seals:#?}");
}

#[test]
fn who_was_told_of_an_outage_is_told_of_a_revocation() {
    let server = Server::start(Storage::Memory);
    let network = Network::before(&server);
    let (_store, v, _heals) = on_faulty(&server);
    v.env("VAULT_ADDR", network.address.clone());
    v.mount(&[OFTEN, EXPIRED]);
    let mut program =
        Program::new(&v, "f = os.open('f', os.O_RDWR | os.O_CREAT)\ndef look(): return os.fstat(f).st_size");
    network.cut();
    wait_for_lease(&v, "expired");
    assert_eq!(program.look(), format!("errno {EKEYEXPIRED}"));
    server.must(Method::DELETE, "transit/keys/vol/soft-delete", Value::Null);
    network.mend();
    wait_for_lease(&v, "revoked");
    assert_eq!(program.look(), format!("errno {EKEYREVOKED}"));
    assert_eq!(
        (&lease(&v)["last_seal"]["reason"], &ask(&v, "status")["ok"]["sealed"]),
        (&json!("expired"), &json!("revoked"))
    );
    drop(program);
    v.umount();
}
