//! A cluster of three OpenBao nodes that loses its leader in the middle of the work.

use std::time::{Duration, Instant};

use lethefs::kms::transit::Transit;
use lethefs::kms::{Failure, KeySource};
use serde_json::json;

use super::support_cluster::Cluster;
use super::{BINDING, HOST_POLICY, config, documented_policy, key, token};

#[test]
fn a_cluster_that_loses_its_leader_fails_no_operation() {
    let mut cluster = Cluster::start();
    cluster.put("sys/mounts/transit", &json!({ "type": "transit" }));
    cluster.put("transit/keys/vol1", &json!({ "type": "aes256-gcm96", "derived": true }));
    cluster.put("sys/policies/acl/host", &json!({ "policy": documented_policy(HOST_POLICY, "vol1") }));
    let made = cluster.put("auth/token/create", &json!({ "policies": ["host"], "ttl": "1h" }));
    let host_token = made["auth"]["client_token"].as_str().expect("token").to_owned();

    let leader = cluster.leader();
    let mut settings = config(&cluster.nodes[leader].address(), &cluster.ca(), token(&host_token));
    settings.addresses = cluster.nodes.iter().map(|node| node.address().parse().expect("address")).collect();
    settings.timeout = Duration::from_secs(10);
    settings.patience = Duration::from_secs(60);
    let transit = Transit::new(&key("vol1"), settings);
    let made = transit.make(&BINDING).unwrap_or_else(|e| panic!("{e} {:?}", e.detail));

    let mut took: Vec<Duration> = Vec::new();
    let mut unwrap = |many: usize| {
        for n in 0..many {
            let began = Instant::now();
            let opened = transit.unwrap(&BINDING, &made.wrapped, &made.identity);
            let opened = opened.unwrap_or_else(|e| panic!("unwrap {n}: {e} {:?}", e.detail));
            assert!(opened.same_as(&made.key));
            took.push(began.elapsed());
        }
    };
    unwrap(100);
    cluster.nodes[leader].kill();
    unwrap(200);
    assert_ne!(cluster.leader(), leader);
    let longest = took.iter().max().expect("some");
    let usual = {
        let mut sorted = took.clone();
        sorted.sort();
        sorted[sorted.len() / 2]
    };
    println!("unwraps: {}, failed: 0, median {usual:?}, longest {longest:?}", took.len());

    // One node is no cluster: nobody leads, and that is told within the time that was given.
    let other = cluster.leader();
    cluster.nodes[other].kill();
    let mut settings = config(&cluster.nodes[0].address(), &cluster.ca(), token(&host_token));
    settings.addresses = cluster.nodes.iter().map(|node| node.address().parse().expect("address")).collect();
    settings.patience = Duration::from_secs(2);
    settings.timeout = Duration::from_secs(2);
    let transit = Transit::new(&key("vol1"), settings);
    let alone = super::failure("alone", transit.unwrap(&BINDING, &made.wrapped, &made.identity));
    assert!(matches!(alone, Failure::Unavailable | Failure::Unreachable), "{alone:?}");
}
