//! Exit codes: one table, one mapping. docs/CLI.md says the same to people; `tests/cli` compares the two.

use crate::kms::Failure;
use crate::service::Error;
use crate::service::fsck::State;
use crate::service::trust::TrustError;
use crate::volume::VolumeError;
use crate::volume::meta::MetaError;

/// What the program ends with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ExitCode {
    /// Done.
    Done = 0,
    /// The operation failed for a reason of its own line.
    Failed = 1,
    /// Wrong usage, or wrong local configuration.
    Usage = 2,
    /// Not a volume, or one that is damaged, foreign, older than this host has seen, or newer than this program.
    BadVolume = 10,
    /// In use.
    InUse = 11,
    /// The key service cannot be reached, or cannot serve now.
    KmsAway = 12,
    /// The key service refuses these credentials.
    KmsRefuses = 13,
    /// The key is switched off, not there, or another one stands in its place: not shown to be destroyed.
    KeyUnusable = 14,
    /// Mounting or unmounting failed.
    Mount = 15,
    /// This host does not trust what the volume file says.
    NotTrusted = 16,
    /// The key is destroyed.
    Destroyed = 17,
    /// An erase is begun, but something is or may be restorable.
    StillRestorable = 18,
    /// An erase was not confirmed.
    NotConfirmed = 19,
    /// A check found damage, and a repair mended all of it.
    Repaired = 20,
    /// A check found damage that is still there.
    Damaged = 21,
    /// `revoke` or `restore` did not reach every key, or an `erase` would not and therefore changed nothing.
    NotAllKeys = 23,
    /// An audit log is not as it was written.
    AuditBroken = 22,
}

impl ExitCode {
    /// As the number.
    pub fn code(self) -> u8 {
        self as u8
    }
}

/// The code of an error. Without a catch-all, so that a new kind of error needs a decision here.
pub fn code(error: &Error) -> ExitCode {
    match error {
        Error::Usage(_) | Error::BadUri(_) => ExitCode::Usage,
        Error::Meta(error) => match error {
            MetaError::NotAVolume
            | MetaError::Lost
            | MetaError::Damaged(_)
            | MetaError::NewerFormat(_)
            | MetaError::UnknownFeature(_)
            | MetaError::Unauthentic => ExitCode::BadVolume,
            MetaError::Keyring(_) | MetaError::Io(_) => ExitCode::Failed,
        },
        Error::Trust(error) => match error {
            TrustError::Older { .. } | TrustError::OlderHeader { .. } => ExitCode::BadVolume,
            TrustError::NoPin { .. }
            | TrustError::Differs { .. }
            | TrustError::OtherKey { .. }
            | TrustError::Unusable { .. } => ExitCode::NotTrusted,
            TrustError::NoPlace(_) => ExitCode::Failed,
        },
        Error::InUse(_) => ExitCode::InUse,
        Error::Kms(error) => failure(error.failure),
        Error::Mount(_) => ExitCode::Mount,
        Error::Volume(error) => match error {
            VolumeError::Damaged(_) => ExitCode::BadVolume,
            VolumeError::CrossesDevices => ExitCode::Mount,
            VolumeError::Backing(_)
            | VolumeError::Keyring(_)
            | VolumeError::NameTooLong
            | VolumeError::InvalidName
            | VolumeError::AttributeTooLarge
            | VolumeError::TooLarge => ExitCode::Failed,
        },
        Error::Keyring(_) | Error::Io { .. } => ExitCode::Failed,
        Error::Destroyed(_) => ExitCode::Destroyed,
        Error::StillRestorable(_) => ExitCode::StillRestorable,
        Error::NotConfirmed(_) => ExitCode::NotConfirmed,
        Error::NotAllKeys(_) => ExitCode::NotAllKeys,
    }
}

/// The code of a check that ran to its end.
pub fn of_fsck(state: State) -> ExitCode {
    match state {
        State::Clean => ExitCode::Done,
        State::Repaired => ExitCode::Repaired,
        State::Damaged => ExitCode::Damaged,
    }
}

/// The code of a check of an audit log.
pub fn of_audit(verdict: &crate::audit::Verdict) -> ExitCode {
    if verdict.findings.is_empty() { ExitCode::Done } else { ExitCode::AuditBroken }
}

/// The code of a key service's failure.
fn failure(failure: Failure) -> ExitCode {
    match failure {
        Failure::Unreachable | Failure::Unavailable | Failure::Untrusted | Failure::Protocol => ExitCode::KmsAway,
        Failure::Unauthenticated | Failure::Denied => ExitCode::KmsRefuses,
        // Without the whole proof nothing is called destroyed, a key re-created under the old name included.
        Failure::Suspended | Failure::Missing | Failure::Recreated => ExitCode::KeyUnusable,
        Failure::Destroyed => ExitCode::Destroyed,
        Failure::BadData => ExitCode::BadVolume,
        Failure::Config | Failure::Unsuitable => ExitCode::Usage,
        Failure::NotDestroyed => ExitCode::StillRestorable,
    }
}
