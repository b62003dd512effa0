//! A mount whose key service is a cluster that loses its leader.

use std::fs;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use serde_json::json;

use crate::custody;
use crate::support::at_openbao::host_policy;
use crate::support::cluster::Cluster;
use crate::support::openbao::wait_for;
use crate::support::volume::TestVolume;

#[test]
fn a_lost_leader_fails_no_operation() {
    let mut cluster = Cluster::start();
    cluster.put("sys/mounts/transit", &json!({ "type": "transit" }));
    cluster.put("transit/keys/vol1", &json!({ "type": "aes256-gcm96", "derived": true }));
    cluster.put("sys/policies/acl/host", &json!({ "policy": host_policy("vol1") }));
    let made = cluster.put("auth/token/create", &json!({ "policies": ["host"], "ttl": "1h" }));
    let v = TestVolume::new();
    let addresses: Vec<_> = cluster.nodes.iter().map(|node| node.address()).collect();
    v.env("VAULT_ADDR", addresses.join(","));
    v.env("VAULT_CACERT", cluster.ca());
    v.env("VAULT_TOKEN", made["auth"]["client_token"].as_str().unwrap());
    v.init_with("hashivault://vol1");
    // The smallest interval for which an election (some ten seconds) is within the lease and its grace.
    v.mount(&["--renew-interval=200ms", "--grace=2m"]);

    let (stop, done) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let n = done.fetch_add(1, Ordering::Relaxed);
                let (name, text) = (v.at(format!("f{}", n % 50)), n.to_string());
                fs::write(&name, &text)?;
                if fs::read_to_string(&name)? != text {
                    return Err(std::io::Error::other("wrong contents"));
                }
                fs::rename(&name, v.at(format!("g{}", n % 50)))?;
            }
            Ok(())
        });
        let renewals = |more: u64| {
            let proofs = custody(&v)["proofs"].as_u64().unwrap();
            wait_for("renewals", || (custody(&v)["proofs"].as_u64().unwrap() >= proofs + more).then_some(()));
        };
        renewals(5);
        let leader = cluster.leader();
        cluster.nodes[leader].kill();
        assert_ne!(cluster.leader(), leader);
        renewals(5);
        let custody = custody(&v);
        assert_eq!((custody["state"].as_str(), custody["last_seal"].is_null()), (Some("active"), true), "{custody}");
        stop.store(true, Ordering::Relaxed);
        worker.join().unwrap().expect("no operation fails");
    });
    println!("{} rounds of write, read and rename, none failed", done.load(Ordering::Relaxed));
    v.remount(&[]);
    v.umount();
}
