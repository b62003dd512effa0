//! What a change of a log looks like, what a crash leaves, and many writers of one chain.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::crypto::VolumeId;

const VOLUME: VolumeId = VolumeId([0xab; 16]);

fn event(n: u64) -> Event {
    Event::Renew { slot: 1, outcome: "ok".into(), count: n, request_id: Some("87b9…".into()) }
}

fn file(dir: &Path) -> PathBuf {
    dir.join(file_name(VOLUME))
}

fn filled(dir: &Path, records: u64) -> Vec<u8> {
    let sink = Sink::open(dir, VOLUME);
    for n in 1..=records {
        assert_eq!(sink.record(event(n)), Recorded::As(n));
    }
    std::fs::read(file(dir)).unwrap()
}

fn look(dir: &Path) -> Verdict {
    verify(&files_of(&file(dir)).unwrap(), &Expected::default()).unwrap()
}

fn judge(bytes: &[u8], expected: &Expected) -> Verdict {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(file(dir.path()), bytes).unwrap();
    verify(&[file(dir.path())], expected).unwrap()
}

fn lines(bytes: &[u8]) -> Vec<Vec<u8>> {
    bytes.split_inclusive(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect()
}

#[test]
fn a_record_is_as_documented() {
    use sha2::{Digest as _, Sha256};
    let dir = tempfile::tempdir().unwrap();
    let sink = Sink::open(dir.path(), VOLUME);
    let peer = Peer { uid: 1000, pid: 4711 };
    assert_eq!(sink.record_for(peer, event(1)), Recorded::As(1));
    assert_eq!(sink.record(event(2)), Recorded::As(2));
    assert_eq!(std::fs::metadata(file(dir.path())).unwrap().permissions().mode() & 0o7777, 0o600);
    let text = std::fs::read_to_string(file(dir.path())).unwrap();
    let hash = |text: &str| crate::crypto::ids::hex(&Sha256::digest(text));
    let lines: Vec<&str> = text.split_inclusive('\n').collect();
    let records: Vec<serde_json::Value> = lines.iter().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(records[0]["prev"], hash(&format!("lethefs/1/audit/{VOLUME}\n")));
    assert_eq!(records[1]["prev"], hash(lines[0]));
    assert_eq!(records[1]["sum"], hash(lines[1].split(",\"sum\"").next().unwrap()));
    assert_eq!((&records[0]["peer"]["uid"], &records[0]["event"]), (&1000.into(), &"renew".into()));
    assert!(records[1].get("peer").is_none());
    let time = records[0]["time"].as_str().unwrap();
    assert!(time.ends_with('Z') && time.parse::<jiff::Timestamp>().is_ok(), "{time}");
    let verdict = look(dir.path());
    assert_eq!((verdict.records, verdict.head), (2, Some(hash(lines[1]))));
    assert!(verdict.findings.is_empty());
}

#[test]
fn a_cut_end_is_seen_only_by_who_knows_more() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = filled(dir.path(), 5);
    let head = crate::crypto::ids::unhex(&judge(&bytes, &Expected::default()).head.unwrap());
    let cut = lines(&bytes)[..3].concat();
    assert!(judge(&cut, &Expected::default()).findings.is_empty(), "the file alone does not tell");
    let kinds = |expected| judge(&cut, &expected).findings.iter().map(|found| found.kind).collect::<Vec<_>>();
    assert_eq!(kinds(Expected { head, ..Expected::default() }), [Kind::Missing]);
    assert_eq!(kinds(Expected { at_least: Some(5), ..Expected::default() }), [Kind::Missing]);
    assert!(kinds(Expected { at_least: Some(3), ..Expected::default() }).is_empty());
    // A head that was noted earlier is still in a log that went on.
    assert!(judge(&bytes, &Expected { head, at_least: Some(5), ..Expected::default() }).findings.is_empty());
    assert_eq!(judge(b"", &Expected { at_least: Some(1), ..Expected::default() }).findings[0].kind, Kind::Missing);
}

#[test]
fn every_flipped_bit_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = filled(dir.path(), 3);
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut changed = bytes.clone();
            changed[at] ^= 1 << bit;
            assert!(!judge(&changed, &Expected::default()).findings.is_empty(), "byte {at}, bit {bit}");
        }
    }
}

#[test]
fn a_write_cut_short_at_any_byte_is_kept_marked_and_gone_on_from() {
    let dir = tempfile::tempdir().unwrap();
    let whole = filled(dir.path(), 2);
    let first = lines(&whole)[0].len();
    for end in first + 1..whole.len() {
        std::fs::write(file(dir.path()), &whole[..end]).unwrap();
        assert_eq!(look(dir.path()).findings[0].kind, Kind::TornEnd, "{end}");
        let sink = Sink::open(dir.path(), VOLUME);
        assert!(matches!(sink.record(event(9)), Recorded::As(_)), "{end}");
        let bytes = std::fs::read(file(dir.path())).unwrap();
        assert_eq!(bytes[..end], whole[..end], "{end}: something was taken away");
        let verdict = look(dir.path());
        assert!(verdict.findings.is_empty(), "{end}: {:?}", verdict.findings);
        assert_eq!(verdict.recovered.len(), 1, "{end}");
        // A whole record that lacked only its end counts.
        assert_eq!(verdict.records, if end == whole.len() - 1 { 4 } else { 3 }, "{end}");
        // The write that recovers, cut short in its turn. All ends near its begin, then some.
        for again in (end + 1..bytes.len()).step_by(if end % 50 == 0 { 1 } else { 97 }) {
            std::fs::write(file(dir.path()), &bytes[..again]).unwrap();
            assert!(matches!(Sink::open(dir.path(), VOLUME).record(event(9)), Recorded::As(_)));
            let verdict = look(dir.path());
            assert!(verdict.findings.is_empty(), "{end}, {again}: {:?}", verdict.findings);
            assert!(std::fs::read(file(dir.path())).unwrap().starts_with(&bytes[..again]), "{end}, {again}");
        }
    }
    // Nothing but a torn first record.
    std::fs::write(file(dir.path()), &whole[..30]).unwrap();
    assert_eq!(Sink::open(dir.path(), VOLUME).record(event(1)), Recorded::As(2));
    assert!(look(dir.path()).findings.is_empty());
}

#[test]
fn a_damaged_record_does_not_become_a_crash() {
    let dir = tempfile::tempdir().unwrap();
    let mut bytes = filled(dir.path(), 3);
    let last = lines(&bytes)[..2].concat().len() + 10;
    bytes[last] ^= 1;
    std::fs::write(file(dir.path()), &bytes).unwrap();
    assert!(matches!(Sink::open(dir.path(), VOLUME).record(event(4)), Recorded::As(4)));
    assert_eq!(look(dir.path()).findings[0].kind, Kind::Recovery);
    // What a recovery marks cannot be taken away or changed afterwards.
    let torn = tempfile::tempdir().unwrap();
    let whole = filled(torn.path(), 2);
    std::fs::write(file(torn.path()), &whole[..whole.len() - 40]).unwrap();
    assert!(matches!(Sink::open(torn.path(), VOLUME).record(event(3)), Recorded::As(3)));
    let marked = lines(&std::fs::read(file(torn.path())).unwrap());
    assert!(judge(&marked.concat(), &Expected::default()).findings.is_empty());
    let without = [&marked[..1], &marked[2..]].concat().concat();
    assert_eq!(judge(&without, &Expected::default()).findings[0].kind, Kind::Recovery);
    let mut changed = marked.clone();
    changed[1][5] ^= 1;
    assert_eq!(judge(&changed.concat(), &Expected::default()).findings[0].kind, Kind::Recovery);
}

#[test]
fn what_could_not_be_written_is_counted_and_recorded_later() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("audit");
    std::fs::create_dir(&path).unwrap();
    let sink = Sink::open(&path, VOLUME);
    assert_eq!(sink.record(event(1)), Recorded::As(1));
    // What no process may write to, root included.
    std::fs::rename(file(&path), path.join("aside")).unwrap();
    std::fs::create_dir(file(&path)).unwrap();
    for n in 0..3 {
        assert_eq!(sink.record(event(n)), Recorded::Lost);
    }
    assert_eq!(sink.lost(), 3);
    std::fs::remove_dir(file(&path)).unwrap();
    std::fs::rename(path.join("aside"), file(&path)).unwrap();
    assert_eq!(sink.record(event(2)), Recorded::As(3));
    assert_eq!((sink.lost(), look(&path).lost, look(&path).records), (0, 3, 3));
    assert!(look(&path).findings.is_empty());
    // Another process holds the lock and does not let go.
    let holder = std::fs::File::open(file(&path)).unwrap();
    rustix::fs::flock(&holder, rustix::fs::FlockOperation::LockExclusive).unwrap();
    assert_eq!(sink.record(event(3)), Recorded::Lost);
    drop(holder);
    assert_eq!(sink.record(event(4)), Recorded::As(5));
    // A directory that others can write is not used.
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o777)).unwrap();
    assert_eq!(Sink::open(&path, VOLUME).record(event(5)), Recorded::Lost);
}

#[test]
fn a_full_file_is_gone_on_from_in_another() {
    let dir = tempfile::tempdir().unwrap();
    let sinks: Vec<Sink> = (0..2).map(|_| Sink::with_limit(dir.path(), VOLUME, 3000)).collect();
    for n in 0..60 {
        assert!(matches!(sinks[n as usize % 2].record(event(n)), Recorded::As(_)));
    }
    let files = files_of(&file(dir.path())).unwrap();
    assert!(files.len() > 5, "{files:?}");
    let verdict = look(dir.path());
    assert!(verdict.findings.is_empty(), "{:?}", verdict.findings);
    assert_eq!(verdict.records, 60 + files.len() as u64 - 1);
    let one_missing: Vec<PathBuf> = files.iter().enumerate().filter(|(n, _)| *n != 2).map(|(_, f)| f.clone()).collect();
    assert_eq!(verify(&one_missing, &Expected::default()).unwrap().findings[0].kind, Kind::Chain);
    let put_away = verify(&files[..2], &Expected::default()).unwrap();
    assert_eq!(verify(&files[2..], &Expected::default()).unwrap().findings[0].kind, Kind::Beginning);
    let after = crate::crypto::ids::unhex(&put_away.head.unwrap());
    assert!(verify(&files[2..], &Expected { after, ..Expected::default() }).unwrap().findings.is_empty());
    // Killed between giving it a number and the next record.
    let last = files.last().unwrap();
    std::fs::rename(last, dir.path().join(format!("{}.{}", file_name(VOLUME), files.len()))).unwrap();
    assert!(look(dir.path()).findings.is_empty());
    assert!(matches!(sinks[0].record(event(61)), Recorded::As(_)));
    assert!(look(dir.path()).findings.is_empty());
}

#[test]
fn threads_with_sinks_of_their_own_make_one_chain() {
    let dir = tempfile::tempdir().unwrap();
    let shared = Arc::new(Sink::with_limit(dir.path(), VOLUME, 40_000));
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let (dir, shared) = (dir.path(), Arc::clone(&shared));
            scope.spawn(move || {
                let own = Sink::with_limit(dir, VOLUME, 40_000);
                let sink = if thread % 2 == 0 { &own } else { &*shared };
                for n in 0..50 {
                    let quick = Event::Renew { slot: 1, outcome: "ok".into(), count: n, request_id: None };
                    assert!(matches!(sink.record(quick), Recorded::As(_)));
                }
            });
        }
    });
    let verdict = look(dir.path());
    assert!(verdict.findings.is_empty() && verdict.recovered.is_empty(), "{:?}", verdict.findings);
    assert_eq!(verdict.records, 400 + files_of(&file(dir.path())).unwrap().len() as u64 - 1);
}

/// Appends without an end if it is told where, as the child of the next test; else a little of the same by itself.
#[test]
fn a_process_that_appends() {
    let told = std::env::var_os("LETHEFS_TEST_APPEND_TO");
    let own = tempfile::tempdir().unwrap();
    let dir = told.as_ref().map_or(own.path(), Path::new);
    let sink = Sink::with_limit(dir, VOLUME, 200_000);
    for n in 0..if told.is_some() { u64::MAX } else { 20 } {
        let data = serde_json::json!({ "filler": "x".repeat(n as usize % 3000) });
        let seal = Event::Seal { reason: "r".into(), by: "child".into(), counts: data };
        assert!(matches!(sink.record(seal), Recorded::As(_)));
    }
    assert!(look(dir).findings.is_empty());
}

#[test]
fn processes_killed_while_appending_leave_a_chain() {
    let dir = tempfile::tempdir().unwrap();
    for round in 0..6 {
        let mut children: Vec<_> = (0..3)
            .map(|_| {
                std::process::Command::new(std::env::current_exe().unwrap())
                    .args(["--exact", "audit::tests::a_process_that_appends", "--nocapture"])
                    .env("LETHEFS_TEST_APPEND_TO", dir.path())
                    .stdout(std::process::Stdio::null())
                    .stderr(std::process::Stdio::null())
                    .spawn()
                    .unwrap()
            })
            .collect();
        let enough = |seen: u64| files_of(&file(dir.path())).is_ok_and(|_| look_if_there(dir.path()) >= seen);
        let before = look_if_there(dir.path());
        let began = std::time::Instant::now();
        while !enough(before + 40) {
            assert!(began.elapsed().as_secs() < 60, "the children do not append");
            std::thread::yield_now();
        }
        for child in &mut children {
            child.kill().unwrap();
        }
        for child in &mut children {
            child.wait().unwrap();
        }
        assert!(matches!(Sink::open(dir.path(), VOLUME).record(event(round)), Recorded::As(_)));
        let verdict = look(dir.path());
        assert!(verdict.findings.is_empty(), "{:?}", verdict.findings);
    }
}

/// Records so far, also while others write.
fn look_if_there(dir: &Path) -> u64 {
    let mut count = 0;
    let _ = files_of(&file(dir)).and_then(|files| records(&files, |_| count += 1));
    count
}

#[derive(Clone, Debug)]
enum Change {
    Flip(prop::sample::Index, u8),
    Remove(prop::sample::Index),
    Double(prop::sample::Index, prop::sample::Index),
    Swap(prop::sample::Index, prop::sample::Index),
    Insert(prop::sample::Index, Vec<u8>),
    CutOut(prop::sample::Index, prop::sample::Index),
    Empty(prop::sample::Index),
}

fn change() -> impl Strategy<Value = Change> {
    let at = any::<prop::sample::Index>;
    prop_oneof![
        (at(), 1u8..=255).prop_map(|(at, bits)| Change::Flip(at, bits)),
        at().prop_map(Change::Remove),
        (at(), at()).prop_map(|(from, to)| Change::Double(from, to)),
        (at(), at()).prop_map(|(one, other)| Change::Swap(one, other)),
        (at(), prop::collection::vec(any::<u8>(), 1..80)).prop_map(|(at, bytes)| Change::Insert(at, bytes)),
        (at(), at()).prop_map(|(from, to)| Change::CutOut(from, to)),
        at().prop_map(Change::Empty),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]
    #[test]
    fn any_change_is_found(records in 2u64..12, torn in any::<bool>(), change in change()) {
        let dir = tempfile::tempdir().unwrap();
        let mut bytes = filled(dir.path(), records);
        if torn {
            // A log in whose middle a write was cut short.
            bytes.truncate(bytes.len() - 20);
            std::fs::write(file(dir.path()), &bytes).unwrap();
            bytes = { let _ = Sink::open(dir.path(), VOLUME).record(event(0)); std::fs::read(file(dir.path())).unwrap() };
        }
        let head = crate::crypto::ids::unhex(&judge(&bytes, &Expected::default()).head.unwrap());
        let mut all = lines(&bytes);
        let mut changed = bytes.clone();
        let count = all.len();
        match change {
            Change::Flip(at, bits) => changed[at.index(bytes.len())] ^= bits,
            Change::Remove(at) => { all.remove(at.index(count)); changed = all.concat(); }
            Change::Double(from, to) => { let line = all[from.index(count)].clone(); all.insert(to.index(count + 1), line); changed = all.concat(); }
            Change::Swap(one, other) => { all.swap(one.index(count), other.index(count)); changed = all.concat(); }
            Change::Insert(at, new) => { let at = at.index(bytes.len() + 1); changed.splice(at..at, new); }
            Change::CutOut(from, to) => {
                let (a, b) = (from.index(bytes.len()), to.index(bytes.len()));
                changed.drain(a.min(b)..a.max(b));
            }
            Change::Empty(at) => { all.insert(at.index(count + 1), b"\n".to_vec()); changed = all.concat(); }
        }
        prop_assume!(changed != bytes);
        // A cut that ends at the end needs the head; every other change shows by itself.
        let expected = if bytes.starts_with(&changed) { Expected { head, ..Expected::default() } } else { Expected::default() };
        prop_assert!(!judge(&changed, &expected).findings.is_empty());
    }
}
