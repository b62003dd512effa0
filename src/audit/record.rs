//! A record's bytes: one line, whose SHA-256 the next one carries, and which ends with one of its own (docs/AUDIT.md).

use std::sync::OnceLock;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use super::event::{Event, Peer};
use crate::crypto::VolumeId;
use crate::crypto::ids::hex;

/// The longest line, in bytes. Events are smaller by far; what is not is recorded without its data.
pub(super) const MAX_LINE: usize = 32 << 10;
/// What stands before the line's own hash, and after it.
const SUM: &[u8] = b",\"sum\":\"";
const END: &[u8] = b"\"}\n";
/// Hex digits of a SHA-256.
const DIGITS: usize = 64;

/// The end of a chain: what the next record builds on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// Number of the last record; 0 before the first.
    pub seq: u64,
    /// SHA-256 of its line, line end included.
    pub hash: [u8; 32],
}

/// What the first record of a volume's log carries as the hash of the one before.
pub fn genesis(volume: VolumeId) -> Head {
    Head { seq: 0, hash: sha256(format!("lethefs/1/audit/{volume}\n").as_bytes()) }
}

pub(super) fn sha256(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

#[derive(Serialize)]
struct Form<'a> {
    seq: u64,
    time: &'a str,
    boot: &'a str,
    host: &'a str,
    uid: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    login: Option<u32>,
    pid: i32,
    #[serde(skip_serializing_if = "Option::is_none")]
    peer: Option<Peer>,
    program: &'a str,
    volume: VolumeId,
    #[serde(flatten)]
    event: &'a Event,
    prev: String,
}

/// A record as read back: its line is as it was written. Nothing is said of its place in the chain.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Its number, from 1.
    pub seq: u64,
    /// RFC 3339, UTC.
    pub time: String,
    /// The kernel's boot id.
    pub boot: String,
    /// Host name.
    pub host: String,
    /// Effective user of the process that wrote it.
    pub uid: u32,
    /// The user who logged in (audit login uid), where the system keeps track.
    #[serde(default)]
    pub login: Option<u32>,
    /// That process.
    pub pid: i32,
    /// Who asked for it through a control socket.
    #[serde(default)]
    pub peer: Option<Peer>,
    /// Program and version.
    pub program: String,
    /// The volume.
    pub volume: VolumeId,
    /// The event's name.
    pub event: String,
    /// The event's fields; whatever a newer program records, too.
    #[serde(default)]
    pub data: Value,
    /// SHA-256 of the line before, hex.
    pub prev: String,
    /// SHA-256 of the bytes before `,"sum"`, hex.
    pub sum: String,
}

/// What a record says of this process and host.
struct Origin {
    boot: String,
    host: String,
    program: &'static str,
}

fn origin() -> &'static Origin {
    static ORIGIN: OnceLock<Origin> = OnceLock::new();
    ORIGIN.get_or_init(|| Origin {
        boot: std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
            .map(|id| id.trim().to_owned())
            .unwrap_or_default(),
        host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        program: concat!("lethefs ", env!("CARGO_PKG_VERSION")),
    })
}

/// The user who logged in, if the kernel's audit tracks that. A shell with root's rights still tells whose it is.
fn login() -> Option<u32> {
    let text = std::fs::read_to_string("/proc/self/loginuid").ok()?;
    text.trim().parse().ok().filter(|uid| *uid != u32::MAX)
}

/// Now, RFC 3339 in UTC.
pub(super) fn now() -> String {
    jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%S%.6fZ").to_string()
}

/// The line of the record that follows `head`, and the new head.
pub(super) fn encode(head: Head, volume: VolumeId, peer: Option<Peer>, event: &Event) -> (Vec<u8>, Head) {
    let (origin, now) = (origin(), now());
    let write = |event: &Event| {
        let form = Form {
            seq: head.seq + 1,
            time: &now,
            boot: &origin.boot,
            host: &origin.host,
            uid: rustix::process::geteuid().as_raw(),
            login: login(),
            pid: rustix::process::getpid().as_raw_nonzero().get(),
            peer,
            program: origin.program,
            volume,
            event,
            prev: hex(&head.hash),
        };
        serde_json::to_vec(&form).ok().filter(|line| line.len() < MAX_LINE)
    };
    let mut line = write(event).unwrap_or_else(|| {
        // Rather a record that says too little than none.
        let why = "the event's record would have been too long".to_owned();
        write(&Event::Lost { count: 1, since: now.clone(), why }).unwrap_or_default()
    });
    line.pop();
    let sum = hex(&sha256(&line));
    line.extend_from_slice(SUM);
    line.extend_from_slice(sum.as_bytes());
    line.extend_from_slice(END);
    let head = Head { seq: head.seq + 1, hash: sha256(&line) };
    (line, head)
}

/// Whether a line, with its end, has a record's outer form: only a whole record (or a changed one) has.
pub(super) fn is_shaped(line: &[u8]) -> bool {
    split(line).is_some()
}

/// What the line's own hash covers, and that hash's text.
fn split(line: &[u8]) -> Option<(&[u8], &[u8])> {
    let line = line.strip_suffix(END)?;
    let (line, sum) = line.split_at_checked(line.len().checked_sub(DIGITS)?)?;
    Some((line.strip_suffix(SUM)?, sum))
}

/// Reads a line with its end. `None`: it is not what somebody wrote as a record.
pub(super) fn decode(line: &[u8]) -> Option<(Record, Head)> {
    let (covered, sum) = split(line)?;
    if hex(&sha256(covered)).as_bytes() != sum {
        return None;
    }
    let record: Record = serde_json::from_slice(line).ok()?;
    let head = Head { seq: record.seq, hash: sha256(line) };
    Some((record, head))
}
