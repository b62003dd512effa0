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
