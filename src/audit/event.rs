//! What is recorded. One variant for each event; its fields are the record's `data` (docs/AUDIT.md lists them).

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Who asked through a control socket, as the kernel says (SO_PEERCRED).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// User.
    pub uid: u32,
    /// Process, when it connected.
    pub pid: i32,
}

/// An event. `key` is a key's public identity (docs/FORMAT.md section 3), `class` a word for a failure (docs/KMS.md), `request_id` the
/// key service's own number of the request, where it gives one.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "event", content = "data", rename_all = "kebab-case")]
#[allow(missing_docs)]
pub enum Event {
    /// A volume was made.
    Init { backing: String, uri: String, key: Value, request_id: Option<String> },
    /// A filesystem answers.
    Mount { backing: String, mountpoint: String, options: Vec<String>, generation: u64 },
    /// It ended; `problem`: not cleanly.
    Unmount { mountpoint: String, problem: Option<String> },
    /// The KEK was unwrapped. `purpose`: the verb that needed it.
    Fetch { purpose: &'static str, slot: u32, uri: String, key: Value, request_id: Option<String> },
    /// An unwrap of the KEK failed.
    FetchFailed {
        purpose: &'static str,
        slot: u32,
        uri: String,
        key: Value,
        class: String,
        message: String,
        request_id: Option<String>,
    },
    /// Renewals since the last such record: see [`super::Renewals`]. `outcome`: `ok`, or the class of the failure.
    Renew { slot: u32, outcome: String, count: u64, request_id: Option<String> },
    /// The key service took the key away (or says so). What is done about it does not wait for the record.
    Deny { slot: u32, class: String, message: String, request_id: Option<String> },
    /// The lease went from one state to another.
    Lease { from: String, to: String, why: Option<String> },
    /// Keys wiped. `counts`: what it took (what a seal answers).
    Seal { reason: String, by: String, counts: Value },
    /// Keys are back without a new mount.
    Resume { why: String, slot: Option<u32>, request_id: Option<String> },
    /// A resume that was asked for and did not come about.
    ResumeFailed { why: String },
    /// A further key opens the volume.
    SlotAdded { slot: u32, uri: Option<String>, key: Value, generation: u64, request_id: Option<String> },
    /// A key opens it no longer (a copy of the old volume file still does).
    SlotRemoved { slot: u32, key: Value, generation: u64 },
    /// Volume file and root header were saved to a file.
    HeaderSaved { generation: u64 },
    /// They were put back from one.
    HeaderRestored { generation: u64, replaced: Option<u64> },
    /// `revoke`: a key was suspended, or (`outcome` not `suspended`) was not.
    Suspend { uri: String, key: Value, outcome: String, request_id: Option<String> },
    /// `restore`: a key was brought back, or (`outcome` not `restored`) was not.
    Restore { uri: String, key: Value, outcome: String, request_id: Option<String> },
    /// A step of an erase, recorded before it counts as done. `keys`: state of each.
    Erase { phase: String, keys: Vec<Value>, problem: Option<String> },
    /// Something in the backing directory is not authentic. Rate-limited: `held_back` were not recorded since the last one.
    Integrity { kind: String, object: Option<String>, backing_ino: u64, block: Option<u64>, count: u64, held_back: u64 },
    /// `fsck --repair` changed the volume.
    Repair { found: u64, repaired: u64, left: u64 },
    /// Made by the log itself: bytes that are no record stood at its end. `kind`: `torn` (an unfinished write), `damaged`, or
    /// `completed` (a whole record that lacked only its line's end, and now counts).
    Recovered { kind: &'static str, bytes: u64, sha256: String },
    /// Made by the log itself: so many events could not be recorded since then.
    Lost { count: u64, since: String, why: String },
    /// Made by the log itself: the chain goes on from another file.
    Continued { from: String },
}

impl Event {
    /// Whether the record must be on the medium before what it describes counts as done. Not for what comes often and changes
    /// nothing.
    pub fn durable(&self) -> bool {
        !matches!(self, Self::Integrity { .. } | Self::Renew { .. })
    }
}
