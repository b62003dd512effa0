//! A volume under a key of a real server, and whose credentials do what.

use std::process::Command;

use serde_json::Value;

use crate::support::openbao::Server;
use crate::support::volume::{Output, TestVolume};

const KMS: &str = include_str!("../../docs/KMS.md");

/// A policy as docs/KMS.md has it under this heading, for this key.
fn documented(heading: &str, key: &str) -> String {
    let section = KMS.split_once(heading).unwrap().1;
    section.split_once("```hcl\n").and_then(|(_, rest)| rest.split_once("```")).unwrap().0.replace("vol1", key)
}

/// Makes a key with the documented policies `host-KEY` and `admin-KEY`.
pub(crate) fn make_key(server: &Server, key: &str) {
    server.create_key(key);
    server.policy(&format!("host-{key}"), &documented("### The mount host's policy", key));
    server.policy(&format!("admin-{key}"), &documented("### The administrator's policy", key));
}

/// A token with these policies.
pub(crate) fn token(server: &Server, policies: &[&str]) -> String {
    server.token(policies, "1h")
}

/// A volume under this key, with the mount host's token.
pub(crate) fn volume(server: &Server, key: &str) -> TestVolume {
    make_key(server, key);
    let volume = TestVolume::new();
    volume.env("VAULT_ADDR", server.address());
    volume.env("VAULT_CACERT", server.ca());
    volume.env("VAULT_TOKEN", token(server, &[&format!("host-{key}")]));
    volume.init_with(&format!("hashivault://{key}"));
    volume
}

/// Runs with other credentials than the mount host's.
#[track_caller]
pub(crate) fn run_as(volume: &TestVolume, token: &str, args: &[&str]) -> Output {
    Output::of(volume.lethefs(args).env("VAULT_TOKEN", token))
}

/// The body of the volume file.
pub(crate) fn body(volume: &TestVolume) -> Value {
    let text = std::fs::read_to_string(volume.backing().join("lethefs.volume")).unwrap();
    serde_json::from_str(text.lines().next().unwrap()).unwrap()
}

pub(crate) fn id(volume: &TestVolume) -> String {
    body(volume)["volume_id"].as_str().unwrap().to_owned()
}

/// The audit log's records; it must be whole.
#[track_caller]
pub(crate) fn records(volume: &TestVolume) -> Vec<Value> {
    let file = volume.path("state/audit").join(format!("{}.jsonl", id(volume)));
    Output::of(Command::new(env!("CARGO_BIN_EXE_lethefs")).arg("audit").arg("verify").arg(&file)).is(0);
    // What a write that was cut short left stays in it, and is no record.
    std::fs::read_to_string(file).unwrap().lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// Names of the events recorded.
#[track_caller]
pub(crate) fn events(volume: &TestVolume) -> Vec<String> {
    records(volume).iter().map(|record| record["event"].as_str().unwrap().to_owned()).collect()
}
