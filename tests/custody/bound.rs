//! How long old plaintext can still be read after the key service took the key away, seen from outside: several programs read
//! all the time and note when they last could. Prints figures; what it insists on is that everybody is refused in the end, within
//! the bound that `status` declares. `LETHEFS_REVOKE_ROUNDS` (1) and `LETHEFS_SEAL_INODES` (2000) make it long.

use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{Mode, OFlags};
use rustix::process::{Resource, Rlimit};
use serde_json::Value;

use crate::outage::Network;
use crate::support::at_openbao::volume;
use crate::support::openbao::{Server, Storage, wait_for};
use crate::support::volume::TestVolume;
use crate::{OFTEN, ask, custody, wait_for_state};

/// Programs that have something in use, each with what it does over and over; `s` is a step's number.
const PROGRAMS: [(&str, &str); 6] = [
    (
        "pread",
        "f = os.open('mnt/file', os.O_RDONLY)\ndef step(s): assert os.pread(f, 4096, s * 4096 % (1 << 20)) == b'7' * 4096",
    ),
    (
        "mmap",
        "f = open('mnt/file', 'rb')\nm = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)\ndef step(s): assert m[s * 4096 % (1 << 20)] == 55",
    ),
    (
        "tail",
        "w = open('mnt/log', 'ab', 0)\nr = open('mnt/log', 'rb', 0)\ndef step(s):\n  w.write(b'line\\n')\n  assert r.read()",
    ),
    ("cwd", "os.chdir('mnt/dir')\ndef step(s): assert len(os.listdir('.')) == 3 and os.stat('a')"),
    (
        "sqlite",
        "import sqlite3\ndb = sqlite3.connect('mnt/db')\nimport random\ndef step(s): assert db.execute('select v from t where k = ?', (s % 100,)).fetchone()",
    ),
    ("fresh open", "def step(s): assert open('mnt/dir/b').read() == 'b'"),
];

/// Notes the time after each step, in a file outside, and ends with the first step that fails.
const FRAME: &str = "
import os, sys, time, struct, mmap
note = mmap.mmap(os.open(sys.argv[1], os.O_RDWR), 8)
SCRIPT
print('ready', flush=True)
s = 0
while True:
  step(s)
  note[:] = struct.pack('d', time.time())
  s += 1
";

struct Observer {
    name: &'static str,
    child: Child,
    note: std::path::PathBuf,
}

fn observe(v: &TestVolume) -> Vec<Observer> {
    PROGRAMS
        .into_iter()
        .map(|(name, script)| {
            let note = v.path(format!("note-{}", name.replace(' ', "-")));
            fs::write(&note, [0; 8]).unwrap();
            let mut command = v.command("python3");
            command.args(["-c", &FRAME.replace("SCRIPT", script)]).arg(&note);
            let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
            let mut line = [0; 6];
            std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut line).unwrap();
            Observer { name, child, note }
        })
        .collect()
}

/// When each last succeeded, in seconds since 1970. Waits until all have ended.
fn last_successes(observers: Vec<Observer>) -> Vec<(&'static str, f64)> {
    observers
        .into_iter()
        .map(|mut observer| {
            let status = observer.child.wait().unwrap();
            // A failed step ends Python with 1; a mapping that is gone with SIGBUS.
            assert!(status.code() == Some(1) || status.signal() == Some(7), "{}: {status:?}", observer.name);
            let bytes: [u8; 8] = fs::read(&observer.note).unwrap().try_into().unwrap();
            (observer.name, f64::from_ne_bytes(bytes))
        })
        .collect()
}

fn furnish(v: &TestVolume) {
    fs::write(v.at("file"), vec![b'7'; 1 << 20]).unwrap();
    fs::create_dir(v.at("dir")).unwrap();
    for name in ["a", "b", "c"] {
        fs::write(v.at(format!("dir/{name}")), name).unwrap();
    }
    let sql = "create table t (k integer primary key, v text);
        insert into t with recursive n(i) as (select 0 union all select i + 1 from n where i < 99) select i, 'value' from n;";
    assert!(v.command("sqlite3").arg(v.at("db")).arg(sql).status().unwrap().success());
}

/// Random reads and writes by fio all the while, where `LETHEFS_REVOKE_FIO` asks for it (scripts/test-long).
fn load(v: &TestVolume) -> Option<Child> {
    std::env::var_os("LETHEFS_REVOKE_FIO")?;
    let mut fio = v.command("fio");
    fio.args(["--name=load", "--rw=randrw", "--bs=4k", "--size=32m", "--numjobs=2", "--time_based", "--runtime=600"]);
    fio.arg(format!("--directory={}", v.mnt().display())).stdout(Stdio::null()).stderr(Stdio::null());
    Some(fio.spawn().expect("fio runs: scripts/test-long installs it"))
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64()
}

fn number(name: &str, otherwise: usize) -> usize {
    std::env::var(name).map_or(otherwise, |text| text.parse().expect(name))
}

/// Ascending, of one figure over all rounds.
fn figures(name: &str, mut values: Vec<f64>) {
    values.sort_by(f64::total_cmp);
    let at = |part: usize| values[(values.len() - 1) * part / 100] * 1000.0;
    println!("{name}: {} rounds, median {:.0} ms, worst {:.0} ms", values.len(), at(50), at(100));
}

/// When the server said no to the mount: its own audit log's time of the reply.
fn refused_at(server: &Server, since: f64) -> f64 {
    wait_for("the server's no", || {
        server.audit_text().lines().rev().find_map(|line| {
            let entry: Value = serde_json::from_str(line).ok()?;
            let denied = entry["type"] == "response"
                && entry["request"]["path"] == "transit/decrypt/vol"
                && !entry["error"].is_null();
            let time: jiff::Timestamp = entry["time"].as_str()?.parse().ok()?;
            let at = time.as_microsecond() as f64 / 1e6;
            (denied && at >= since).then_some(at)
        })
    })
}

#[test]
fn from_a_refusal_to_the_last_read() {
    let rounds = number("LETHEFS_REVOKE_ROUNDS", 1);
    let (mut by_refusal, mut by_deletion): (Vec<f64>, Vec<f64>) = (Vec::new(), Vec::new());
    let mut worst = std::collections::BTreeMap::<&str, f64>::new();
    for _ in 0..rounds {
        let server = Server::start(Storage::Memory);
        let v = volume(&server, "vol");
        // With the default interval in the long run.
        v.mount(if rounds > 1 { &[] } else { &[OFTEN] });
        furnish(&v);
        let fio = load(&v);
        let observers = observe(&v);
        let bound = custody(&v)["bound_connected_s"].as_f64().unwrap();
        server.delete_key("vol");
        let deleted = now();
        let ends = last_successes(observers);
        if let Some(mut fio) = fio {
            assert!(!fio.wait().unwrap().success(), "fio went on");
        }
        let refused = refused_at(&server, deleted - 5.0);
        let last = ends.iter().map(|(_, at)| *at).fold(0.0, f64::max);
        for (name, at) in ends {
            let worst = worst.entry(name).or_default();
            *worst = worst.max(at - refused);
        }
        by_refusal.push(last - refused);
        by_deletion.push(last - deleted);
        assert!(last - deleted <= bound, "{} s after the deletion; declared: {bound} s", last - deleted);
        v.umount();
    }
    figures("from the server's no to the last read", by_refusal);
    figures("from the deletion to the last read", by_deletion);
    println!("worst of each program, seconds after the no: {worst:.4?}");
}

#[test]
fn from_the_last_proof_to_the_last_read_when_cut_off() {
    let rounds = number("LETHEFS_REVOKE_ROUNDS", 1);
    let mut measured = Vec::new();
    for _ in 0..rounds {
        let server = Server::start(Storage::Memory);
        let network = Network::before(&server);
        let v = volume(&server, "vol");
        v.env("VAULT_ADDR", network.address.clone());
        v.mount(&[OFTEN, "--grace=1s"]);
        furnish(&v);
        let fio = load(&v);
        let observers = observe(&v);
        let bound = custody(&v)["bound_partitioned_s"].as_f64().unwrap();
        // Cut off first, then revoked: nobody here can know.
        network.cut();
        let cut = now();
        server.delete_key("vol");
        let ends = last_successes(observers);
        if let Some(mut fio) = fio {
            assert!(!fio.wait().unwrap().success(), "fio went on");
        }
        let last = ends.iter().map(|(_, at)| *at).fold(0.0, f64::max);
        measured.push(last - cut);
        assert!(last - cut <= bound, "{} s after the cut; declared: {bound} s", last - cut);
        // A seal that is under way has the mount in use for a moment.
        wait_for_state(&v, "expired");
        network.mend();
        wait_for_state(&v, "destroyed");
        v.umount();
    }
    figures("from the cut to the last read, grace 1 s", measured);
}

#[test]
fn a_seal_with_many_cached_inodes() {
    let v = TestVolume::mounted(&[]);
    let many = number("LETHEFS_SEAL_INODES", 2000);
    // Held, or whoever drops the machine's caches just then takes them out.
    let limit = Some(many as u64 + 4096);
    rustix::process::setrlimit(Resource::Nofile, Rlimit { current: limit, maximum: limit }).unwrap();
    let mut held = Vec::new();
    for dir in 0..many.div_ceil(1000) {
        fs::create_dir(v.at(format!("{dir}"))).unwrap();
        for file in 0..many.min(1000) {
            let path = v.at(format!("{dir}/{file}"));
            fs::write(&path, "x").unwrap();
            held.push(rustix::fs::open(&path, OFlags::PATH, Mode::empty()).unwrap());
        }
    }
    let counters = v.cli(&["status", "mnt", "--json"]).json()["live"]["counters"].clone();
    assert!(counters["cached_inodes"].as_u64().unwrap() as usize >= many, "{counters}");
    let seal = ask(&v, "seal")["ok"].clone();
    assert!(seal["purged_inodes"].as_u64().unwrap() as usize >= many && seal["left_inodes"] == 0, "{seal}");
    println!(
        "seal of {} cached inodes: keys wiped after {} us, all purged after {} us",
        seal["purged_inodes"], seal["keys_wiped_us"], seal["purged_us"]
    );
    drop(held);
    // Sealed files go on being flushed; the unmount waits for that.
    v.umount();
}
