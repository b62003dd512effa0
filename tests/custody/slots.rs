//! Two slots: where no answer comes the other is asked, and a no is a no (decision 13).

use std::fs;

use crate::support::at_openbao::volume;
use crate::support::openbao::{Server, Storage, wait_for};
use crate::support::volume::TestVolume;
use crate::{EKEYREVOKED, OFTEN, custody, errno, wait_for_state};

/// Under a key of the server's, and then under a key file as well.
fn with_two(server: &Server) -> TestVolume {
    let v = volume(server, "vol");
    v.cli(&["keys", "add-slot", "backing", &v.file_uri()]).is(0);
    v
}

fn renews_by(v: &TestVolume, slot: u64) {
    let proofs = custody(v)["proofs"].as_u64().unwrap();
    wait_for("renewals", || {
        let now = custody(v);
        (now["slot"] == slot && now["proofs"].as_u64().unwrap() > proofs + 2).then_some(())
    });
}

#[test]
fn an_outage_of_the_first_is_bridged_by_the_second() {
    let mut server = Server::start(Storage::Raft);
    let v = with_two(&server);
    v.mount(&[OFTEN, "--grace=1s"]);
    fs::write(v.at("file"), "x").unwrap();
    renews_by(&v, 1);
    server.kill();
    renews_by(&v, 2);
    assert_eq!(custody(&v)["state"], "active");
    assert!(custody(&v)["last_seal"].is_null());
    // And the first one is asked again.
    server.restart();
    renews_by(&v, 1);
    // A mount while it is away.
    server.kill();
    v.umount();
    v.mount(&[OFTEN]);
    assert_eq!(fs::read(v.at("file")).unwrap(), b"x");
    v.umount();
}

#[test]
fn a_no_of_either_seals_also_when_it_comes_back_to_say_it() {
    let mut server = Server::start(Storage::Raft);
    let v = with_two(&server);
    v.mount(&[OFTEN]);
    fs::write(v.at("file"), "x").unwrap();
    server.kill();
    renews_by(&v, 2);
    server.restart();
    server.delete_key("vol");
    wait_for_state(&v, "destroyed");
    assert_eq!(errno(fs::read(v.at("file"))), EKEYREVOKED);
    v.umount();
}

#[test]
fn a_no_of_the_one_that_stands_in() {
    let mut server = Server::start(Storage::Raft);
    let v = with_two(&server);
    v.mount(&[OFTEN]);
    fs::write(v.at("file"), "x").unwrap();
    server.kill();
    renews_by(&v, 2);
    fs::rename(v.path("keys/key"), v.path("keys/away")).unwrap();
    wait_for_state(&v, "revoked");
    assert_eq!(errno(fs::read(v.at("file"))), EKEYREVOKED);
    fs::rename(v.path("keys/away"), v.path("keys/key")).unwrap();
    wait_for_state(&v, "active");
    assert_eq!(fs::read(v.at("file")).unwrap(), b"x");
    v.umount();
}
