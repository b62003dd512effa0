//! The verbs: what `lethefs` does, one file each, without arguments, exit codes or text layout (those are `cli`'s).
//!
//! - [`init`], [`mount`], [`umount`], [`status`], [`erase`], [`revoke`], [`fsck`], [`keys`], [`slots`]: the verbs. Each returns a report that serialises to the
//!   JSON of docs/CLI.md;
//! - [`audit`]: where a volume's audit log is, checking it and showing it;
//! - [`trust`]: the pin, which decides what a volume file is believed (docs/FORMAT.md section 4);
//! - [`control`]: the socket of a live mount, both ends; [`record`]: what a live mount leaves in the runtime directory;
//! - [`log`]: where lines of the log go;
//! - `prover`: what a live mount asks the key services;
//! - [`supervisor`]: the process without keys that clears up behind a dead daemon;
//! - [`custody`]: renewal of the lease on a live mount's key, seal and resume;
//! - [`daemon`]: going to the background; [`places`]: directories outside the volume; [`mountinfo`]: what is mounted where;
//! - [`journal`]: the journal of an erase; [`backing`]: locking and walking a backing directory without keys.
//!
//! Called by `cli` alone. Calls `fs`, `volume`, `keyring`, `kms`, `audit`, `crypto`, `sys`.

pub mod audit;
pub mod backing;
pub mod control;
pub mod custody;
pub mod daemon;
pub mod erase;
pub mod fsck;
pub mod init;
pub mod journal;
pub mod keys;
pub mod log;
pub mod mount;
pub mod mountinfo;
pub mod places;
mod prover;
pub mod record;
pub mod revoke;
pub mod slots;
pub mod status;
pub mod supervisor;
pub mod trust;
pub mod umount;

use std::io;

use crate::keyring::KeyringError;
use crate::kms::KmsError;
use crate::kms::uri::BadUri;
use crate::volume::VolumeError;
use crate::volume::meta::MetaError;

/// The version of every JSON object that people's programs read.
pub const SCHEMA: u32 = 1;

/// Why a verb did not do its work. Displays as one line: what happened, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// What was asked makes no sense, whatever the state of the volume.
    #[error("{0}")]
    Usage(String),
    /// Not a key URI.
    #[error(transparent)]
    BadUri(#[from] BadUri),
    /// The volume file.
    #[error(transparent)]
    Meta(#[from] MetaError),
    /// The pin.
    #[error(transparent)]
    Trust(#[from] trust::TrustError),
    /// Something else uses the volume or the mountpoint.
    #[error("{0}")]
    InUse(String),
    /// The key service.
    #[error(transparent)]
    Kms(#[from] KmsError),
    /// Mounting or unmounting.
    #[error("{0}")]
    Mount(String),
    /// The volume's tree or keys.
    #[error("the volume cannot be opened: {0}")]
    Volume(#[from] VolumeError),
    /// The ring.
    #[error(transparent)]
    Keyring(#[from] KeyringError),
    /// The volume's key is gone.
    #[error("{0}")]
    Destroyed(String),
    /// An erase that is not complete.
    #[error("{0}")]
    StillRestorable(String),
    /// A revoke or restore that did not reach every key.
    #[error("{0}")]
    NotAllKeys(String),
    /// An erase or revoke that was not confirmed.
    #[error("{0}")]
    NotConfirmed(String),
    /// The system.
    #[error("{what}: {source}")]
    Io {
        /// What was being done, as in "cannot open /data".
        what: String,
        /// Why not.
        source: io::Error,
    },
}

impl Error {
    /// For `map_err`: an I/O error with what was being done.
    pub(crate) fn io<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source: source.into() }
    }
}

/// The time, RFC 3339, UTC, whole seconds.
pub fn now() -> String {
    jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// Debug builds only: dies here as by `kill -9` if `LETHEFS_TEST_ABORT_AFTER` names this step. The tests run every step's
/// death and the run after it.
fn checkpoint(step: &str) {
    #[cfg(debug_assertions)]
    if std::env::var("LETHEFS_TEST_ABORT_AFTER").is_ok_and(|wanted| wanted == step) {
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    }
    #[cfg(not(debug_assertions))]
    let _ = step;
}
