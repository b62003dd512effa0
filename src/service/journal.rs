//! The journal of an erase (docs/CLI.md): what was done, when, and what the key service said. In the backing directory as
//! `lethefs.erase`, or, when that is out of reach, in this host's state directory. It tells people; all it
//! decides is whether the absence of a key file is the erase's doing ([`super::erase`]).

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{SCHEMA, backing, now, places};
use crate::crypto::VolumeId;
use crate::kms::KeyIdentity;
use crate::volume::format::ERASE_FILE;
use crate::volume::meta;

/// Longest journal read, in bytes.
const MAX_JOURNAL: u64 = 1 << 20;

/// An erase, as far as it got.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Journal {
    /// 1.
    pub schema: u32,
    /// The volume.
    pub volume_id: VolumeId,
    /// The last step that is complete.
    pub state: State,
    /// RFC 3339, UTC, as all times here.
    pub begun_at: String,
    /// When no key of the volume could be used any more.
    pub inaccessible_at: Option<String>,
    /// When destruction was carried out or scheduled for all of them.
    pub scheduled_at: Option<String>,
    /// When it was proved for all of them.
    pub irrecoverable_at: Option<String>,
    /// Each KMS key.
    pub slots: Vec<SlotJournal>,
    /// Live mounts that were sealed on the way.
    pub receipts: Vec<Receipt>,
    /// Who.
    pub by: By,
}

/// How far an erase is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Confirmed; nothing done to any key yet.
    Begun,
    /// T1: no key can be used now.
    Inaccessible,
    /// T2: destruction carried out or scheduled.
    Scheduled,
    /// T3: destruction proved.
    Irrecoverable,
}

/// One KMS key of an erase.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SlotJournal {
    /// Scope of the KEK that it wraps.
    pub scope: u32,
    /// Version of that KEK.
    pub version: u32,
    /// Number of the slot.
    pub id: u32,
    /// Which key.
    pub identity: KeyIdentity,
    /// How it was reached.
    pub uri: String,
    /// Its own state.
    pub state: SlotState,
    /// Until when it can be brought back, if the service says so.
    pub restorable_until: Option<String>,
    /// What went wrong last.
    pub problem: Option<String>,
    /// The proof, as the service gave it.
    pub proof: Option<Value>,
}

/// How far one KMS key is. The `-ing` states are written before the request, the others after the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)]
pub enum SlotState {
    Pending,
    Suspending,
    Suspended,
    Destroying,
    Scheduled,
    CarriedOut,
    Destroyed,
}

/// A live mount that was sealed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Receipt {
    /// The volume.
    pub volume_id: VolumeId,
    /// Where.
    pub mountpoint: String,
    /// When.
    pub at: String,
    /// What the mount answered.
    pub answer: Value,
}

/// Who ran the erase.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct By {
    /// User.
    pub uid: u32,
    /// Host name.
    pub host: String,
}

impl Journal {
    /// A new one.
    pub fn new(volume_id: VolumeId) -> Self {
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        Self {
            schema: SCHEMA,
            volume_id,
            state: State::Begun,
            begun_at: now(),
            inaccessible_at: None,
            scheduled_at: None,
            irrecoverable_at: None,
            slots: Vec::new(),
            receipts: Vec::new(),
            by: By { uid: rustix::process::getuid().as_raw(), host },
        }
    }

    /// One sentence, labelled for what it is worth. Times are foreign text: made safe to print.
    pub fn sentence(&self) -> String {
        let (what, at) = match self.state {
            State::Begun => ("was begun", Some(&self.begun_at)),
            State::Inaccessible => ("made the key inaccessible", self.inaccessible_at.as_ref()),
            State::Scheduled => ("had the key's destruction carried out or scheduled", self.scheduled_at.as_ref()),
            State::Irrecoverable => ("destroyed the key for good", self.irrecoverable_at.as_ref()),
        };
        let at = at.map_or_else(|| "an unknown time".into(), |at| at.escape_debug().to_string());
        format!("according to {ERASE_FILE}, which is not authenticated, an erase {what} at {at}")
    }
}

/// Where a journal is kept.
pub enum Place {
    /// In the volume.
    Backing(OwnedFd),
    /// On this host.
    Host(PathBuf),
}

impl Place {
    /// The place on this host.
    ///
    /// # Errors
    /// No such place, or an unsafe one.
    pub fn on_host(volume: VolumeId) -> io::Result<Self> {
        let dir = places::erase_dir()?;
        places::make_dir(&dir)?;
        Ok(Self::Host(dir.join(format!("{volume}.json"))))
    }

    /// The journal, if there is one that can be read and is of this volume.
    pub fn read(&self, volume: VolumeId) -> Option<Journal> {
        let journal: Journal = match self {
            Self::Backing(fd) => read_backing(fd)?,
            Self::Host(path) => serde_json::from_slice(&places::read_own(path, MAX_JOURNAL).ok()?).ok()?,
        };
        (journal.volume_id == volume && journal.schema == SCHEMA).then_some(journal)
    }

    /// Writes it atomically and durably.
    ///
    /// # Errors
    /// The system's.
    pub fn write(&self, journal: &Journal) -> io::Result<()> {
        let mut text = serde_json::to_vec_pretty(journal)?;
        text.push(b'\n');
        match self {
            Self::Backing(fd) => meta::replace_file(fd, ERASE_FILE, &text),
            Self::Host(path) => places::write_own(path, &text, 0o600),
        }
    }
}

/// The journal in a backing directory, if there is a readable one.
pub fn read_backing(backing: impl AsFd) -> Option<Journal> {
    match backing::read_small(backing, ERASE_FILE, MAX_JOURNAL) {
        Ok(bytes) => serde_json::from_slice(&bytes?).inspect_err(|error| unreadable(error)).ok(),
        Err(error) => {
            unreadable(&error);
            None
        }
    }
}

/// The error may quote the file: made safe to print.
fn unreadable(error: &dyn std::error::Error) {
    tracing::warn!(error = ?error.to_string(), "{ERASE_FILE} is there, but cannot be read");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_journal_survives_writing_and_is_harmless_to_print() {
        let dir = tempfile::tempdir().expect("directory");
        let place = Place::Backing(backing::open(dir.path()).expect("open"));
        let volume = VolumeId([1; 16]);
        assert!(place.read(volume).is_none());
        let mut journal = Journal::new(volume);
        journal.begun_at = "now\u{1b}[31m".into();
        place.write(&journal).expect("written");
        let back = place.read(volume).expect("there");
        assert_eq!(back.state, State::Begun);
        assert!(!back.sentence().chars().any(char::is_control));
        assert!(place.read(VolumeId([2; 16])).is_none(), "of another volume");
    }
}
