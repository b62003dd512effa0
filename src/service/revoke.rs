//! `revoke` and `restore`: a volume's keys suspended at their services, and brought back. The reversible sibling of [`erase`](super::erase), which
//! also works out which keys they are.
//!
//! Every key must go: any slot that is left opens the volume. What cannot be suspended is reported, and is no success.

use std::path::Path;

use serde::Serialize;
use serde_json::Value;

use super::control::Client;
use super::erase::{Prepared, Victim};
use super::record::{self, path_text};
use super::{Error, SCHEMA, audit, mountinfo, umount};
use crate::audit::Event;
use crate::crypto::VolumeId;
use crate::kms::{self, Failure, KeyAdmin, KeyIdentity, KeyUri};

/// There or back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Suspend.
    Revoke,
    /// Bring back.
    Restore,
}

/// What was done.
#[derive(Debug, Serialize)]
pub struct Report {
    /// 1.
    pub schema: u32,
    /// The volume.
    pub volume_id: VolumeId,
    /// Each key.
    pub keys: Vec<Done>,
    /// Each mount on this host that was asked.
    pub mounts: Vec<Asked>,
    /// Keys that the volume file names besides (unverified), which were not touched.
    pub left: Vec<KeyIdentity>,
    /// What a person should know.
    pub warnings: Vec<String>,
}

/// What became of a key.
#[derive(Debug, Serialize)]
pub struct Done {
    /// How it was reached.
    pub uri: KeyUri,
    /// Which.
    pub identity: KeyIdentity,
    /// `suspended`, `restored`, `not-there` (nobody can use it), `not-possible` (its service has no such state), `failed`.
    pub outcome: &'static str,
    /// Why it failed.
    pub problem: Option<String>,
}

/// What a mount said.
#[derive(Debug, Serialize)]
pub struct Asked {
    /// Its volume.
    pub volume_id: VolumeId,
    /// Where.
    pub mountpoint: String,
    /// For people.
    pub said: String,
    /// Its answer, if it was one.
    pub answer: Option<Value>,
}

/// The end of a run.
pub struct Outcome {
    /// What to show.
    pub report: Report,
    /// Why it is not complete, if it is not.
    pub incomplete: Option<Error>,
}

/// The volume in a backing directory, or mounted at a mountpoint.
///
/// # Errors
/// A mount whose daemon cannot be found.
pub fn victim(path: &Path) -> Result<Victim, Error> {
    let mounts = mountinfo::read().map_err(Error::io("cannot read /proc/self/mountinfo"))?;
    let resolved = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let Some(mount) = mountinfo::at(&mounts, &resolved).filter(|mount| mount.is_lethefs()) else {
        return Ok(Victim::Backing(path.to_owned()));
    };
    match umount::find(&resolved, mount.user) {
        Some((record, _)) => Ok(Victim::Backing(record.backing)),
        None => Err(Error::Mount(format!(
            "the daemon of the mount at {} cannot be reached from here: name the backing directory",
            resolved.display()
        ))),
    }
}

/// Suspends or restores every key, then asks this host's mounts to seal or to go on.
pub fn run(prepared: &Prepared, way: Way) -> Outcome {
    let plan = &prepared.plan;
    let sink = audit::open(plan.volume_id);
    let mut report = Report {
        schema: SCHEMA,
        volume_id: plan.volume_id,
        keys: Vec::new(),
        mounts: Vec::new(),
        left: plan.left.clone(),
        warnings: Vec::new(),
    };
    let mut first_error = None;
    for target in &prepared.targets {
        let same = |done: &&Done| done.uri == target.uri && done.identity.same_key(&target.identity);
        if report.keys.iter().any(|done| same(&done)) {
            continue;
        }
        let (outcome, error, request_id) = change(&target.uri, &target.identity, way);
        let (uri, key, word) = (target.uri.to_string(), audit::key(&target.identity), outcome.to_owned());
        let event = match way {
            Way::Revoke => Event::Suspend { uri, key, outcome: word, request_id },
            Way::Restore => Event::Restore { uri, key, outcome: word, request_id },
        };
        audit::warn(&sink, event, &mut report.warnings);
        let problem = error.as_ref().map(ToString::to_string);
        report.keys.push(Done { uri: target.uri.clone(), identity: target.identity.clone(), outcome, problem });
        if outcome == "failed" {
            first_error = first_error.or(error);
        }
    }
    let reached = report.keys.iter().filter(|done| !matches!(done.outcome, "failed" | "not-possible")).count();
    // Who may do nothing costs a mount nothing. Its unwritten data is lost only to somebody who can take the key away.
    if reached > 0 {
        let concerned: Vec<VolumeId> =
            std::iter::once(plan.volume_id).chain(plan.shared_with.iter().map(|shared| shared.volume_id)).collect();
        ask_mounts(&concerned, way, &mut report);
    }
    report.warnings.extend(plan.unreached("asked"));
    if way == Way::Revoke {
        report.warnings.extend(
            plan.paper
                .iter()
                .map(|key| format!("{key} is on paper and cannot be suspended: with it, the volume opens")),
        );
    }
    let opens = if way == Way::Revoke { "still opens the volume" } else { "is not back" };
    let missing: Vec<String> = report
        .keys
        .iter()
        .filter(|done| matches!(done.outcome, "failed" | "not-possible"))
        .map(|done| format!("{} ({})", done.uri, done.problem.as_deref().unwrap_or("its service cannot suspend a key")))
        .chain(report.left.iter().map(|key| format!("{} (its --key is not given)", key.to_string().escape_debug())))
        .collect();
    let incomplete = match (first_error, missing.is_empty()) {
        (_, true) => None,
        // Nothing at all was done: the reason is the whole story.
        (Some(error), false) if reached == 0 => Some(Error::Kms(error)),
        (_, false) => Some(Error::NotAllKeys(format!("not every key was reached; {opens}: {}", missing.join("; ")))),
    };
    Outcome { report, incomplete }
}

fn change(uri: &KeyUri, identity: &KeyIdentity, way: Way) -> (&'static str, Option<kms::KmsError>, Option<String>) {
    let admin = match kms::admin(uri) {
        Ok(admin) => admin,
        Err(error) => return ("failed", Some(error), None),
    };
    let done = match way {
        Way::Revoke => admin.suspend(identity).map(|state| if state.is_some() { "suspended" } else { "not-possible" }),
        Way::Restore => restore(&*admin, identity),
    };
    match done {
        Ok(outcome) => (outcome, None, admin.last_request_id()),
        Err(error) if way == Way::Revoke && matches!(error.failure, Failure::Missing | Failure::Destroyed) => {
            // A key file may only lie elsewhere; a service tells of its own.
            let outcome = if matches!(identity, KeyIdentity::File { .. }) { "failed" } else { "not-there" };
            (outcome, Some(error), None)
        }
        Err(error) => ("failed", Some(error), None),
    }
}

/// Brings the recorded key back; says so if it is another one, or if nothing can.
fn restore(admin: &dyn KeyAdmin, identity: &KeyIdentity) -> Result<&'static str, kms::KmsError> {
    if let Err(error) = admin.may_destroy(identity)
        && error.failure == Failure::Recreated
    {
        return Err(error);
    }
    admin.restore().map(|()| "restored").map_err(|error| {
        if error.failure == Failure::Missing && admin.prove_destroyed(identity, None).is_ok_and(|proof| !proof.self_asserted) {
            let line = format!("{identity} is destroyed: nothing brings it back, and a new key of that name opens nothing of what it wrapped");
            return kms::KmsError::new(Failure::Destroyed, line);
        }
        error
    })
}

fn ask_mounts(volumes: &[VolumeId], way: Way, report: &mut Report) {
    let users: Vec<u32> = mountinfo::read().unwrap_or_default().iter().filter_map(|mount| mount.user).collect();
    for (record, files) in record::all(&users) {
        if !volumes.contains(&record.volume_id) {
            continue;
        }
        // Nobody listens: a record that a dead daemon left.
        let Ok(client) = Client::connect(&files.socket) else { continue };
        let mountpoint = path_text::encode(&record.mountpoint);
        let word = if way == Way::Revoke { "seal" } else { "resume" };
        let (said, answer) = match client.ask_word(word) {
            Ok(Ok(answer)) if way == Way::Revoke => ("sealed".to_owned(), Some(answer)),
            Ok(Ok(answer)) => {
                let state = answer.get("state").and_then(serde_json::Value::as_str).unwrap_or("state unknown");
                (format!("asked to go on: {state}"), Some(answer))
            }
            Ok(Err((code, _))) if code == "unknown-op" => {
                ("it cannot go on by itself: unmount it and mount it again".to_owned(), None)
            }
            Ok(Err((_, line))) => (format!("it refused: {line}"), None),
            Err(error) => (format!("it did not answer: {error}"), None),
        };
        if answer.is_none() {
            report.warnings.push(format!("the mount at {mountpoint}: {said}"));
        }
        report.mounts.push(Asked { volume_id: record.volume_id, mountpoint, said, answer });
    }
}
