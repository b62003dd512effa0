//! What a mount records, and that the key service's log knows the same requests.

use std::fs;
use std::os::unix::fs::FileExt as _;

use crate::support::openbao::{Server, Storage};
use crate::support::volume::TestVolume;
use crate::world::{events, id, records, volume};

#[test]
fn a_mount_is_recorded_with_the_key_services_own_numbers() {
    let server = Server::start(Storage::Memory);
    let v = volume(&server, "vol");
    let daemon = v.mount(&[]);
    fs::write(v.at("a very private name"), b"private contents").unwrap();
    v.umount();
    assert_eq!(events(&v), ["init", "fetch", "mount", "unmount"]);
    let all = records(&v);
    assert_eq!(all[1]["data"]["uri"], "hashivault://vol?engine=transit");
    assert_eq!(all[2]["pid"], daemon.as_raw_nonzero().get());
    assert!(all[3]["data"]["problem"].is_null());
    let theirs = server.audit_text();
    for record in &all[..2] {
        let request = record["data"]["request_id"].as_str().unwrap();
        assert!(request.len() > 10 && theirs.contains(request), "{record}");
    }
    let text = serde_json::to_string(&all).unwrap();
    assert!(!text.contains("private") && !text.contains("hvs.") && !text.contains("vault:v1:"), "{text}");
}

#[test]
fn damage_is_recorded_and_a_log_that_cannot_be_written_costs_no_mount() {
    let v = TestVolume::mounted(&[]);
    fs::write(v.at("file"), vec![7; 20_000]).unwrap();
    v.umount();
    let backing = fs::read_dir(v.backing()).unwrap().flatten().map(|entry| entry.path());
    let file = backing.filter(|path| fs::symlink_metadata(path).unwrap().len() > 20_000).last().unwrap();
    fs::File::options().write(true).open(&file).unwrap().write_all_at(b"damage", 9000).unwrap();
    v.mount(&[]);
    fs::read(v.at("file")).unwrap_err();
    let all = records(&v);
    let damage = all.iter().find(|record| record["event"] == "integrity").unwrap();
    assert_eq!((&damage["data"]["kind"], &damage["data"]["count"]), (&"block".into(), &1.into()));
    v.umount();

    // Where the log should be is a directory: the mount works, says so, and goes.
    let log = v.path("state/audit").join(format!("{}.jsonl", id(&v)));
    fs::rename(&log, v.path("aside")).unwrap();
    fs::create_dir(&log).unwrap();
    let run = v.try_mount(&[]);
    run.is(0).says("audit log").says("cannot be written");
    // Once it can be written again, it says how much is missing: fetch and mount.
    fs::remove_dir(&log).unwrap();
    fs::rename(v.path("aside"), &log).unwrap();
    v.umount();
    let all = records(&v);
    let lost = all.iter().find(|record| record["event"] == "lost").unwrap();
    assert_eq!((&lost["data"]["count"], &all.last().unwrap()["event"]), (&2.into(), &"unmount".into()));
}

/// Fills a filesystem to its last byte, all but `left` of them.
fn fill(dir: &std::path::Path, left: usize) -> std::path::PathBuf {
    use std::io::Write as _;
    let path = dir.join("filler");
    let mut file = fs::File::create(&path).unwrap();
    let block = [1; 512];
    while file.write_all(&block).is_ok() {}
    let length = file.metadata().unwrap().len();
    file.set_len(length - left as u64).unwrap();
    path
}

#[test]
fn a_full_disk_stops_neither_a_mount_nor_an_erase_and_the_gap_is_recorded() {
    let v = TestVolume::new();
    rustix::mount::mount("tmpfs", v.path("state"), "tmpfs", rustix::mount::MountFlags::empty(), c"size=64k,mode=700")
        .unwrap();
    v.init_with(&v.file_uri());
    assert_eq!(events(&v), ["init"]);
    // What is left of the log's own page: a record goes in by halves before there is no space.
    let filler = fill(&v.path("state"), 0);
    let mut before = 0;
    loop {
        let run = v.try_mount(&[]);
        run.is(0);
        if run.err.contains("cannot be written") {
            break;
        }
        v.umount();
        let records = records(&v).len();
        assert!(records > before && records < 100, "the disk does not fill");
        before = records;
    }
    fs::write(v.at("file"), b"hello").unwrap();
    fs::remove_file(&filler).unwrap();
    v.umount();
    let all = records(&v);
    let lost: u64 = all.iter().filter_map(|record| record["data"]["count"].as_u64()).sum();
    assert!(lost > 0 && all.iter().any(|record| record["event"] == "lost"), "{all:?}");
    assert!(all.iter().any(|record| record["event"] == "recovered"), "a record was cut short: {all:?}");
    assert_eq!(all.last().unwrap()["event"], "unmount");

    fill(&v.path("state"), 0);
    let log =
        fs::OpenOptions::new().append(true).open(v.path("state/audit").join(format!("{}.jsonl", id(&v)))).unwrap();
    while std::io::Write::write(&mut &log, &[0]).is_ok() {}
    let name = {
        let key: serde_json::Value = serde_json::from_slice(&fs::read(v.path("keys/key")).unwrap()).unwrap();
        key["key_id"].as_str().unwrap().to_owned()
    };
    v.cli(&["erase", "backing", "--confirm-volume", &id(&v), "--confirm-key", &name]).is(0).says("audit log");
    assert!(!v.path("keys/key").exists());
}
