//! From a volume file that the pin vouches for to an authenticated body and a ring that holds its KEK.

use std::sync::Arc;

use crate::audit::{Event, Sink};
use crate::crypto::Key32;
use crate::keyring::{self, Keyring};
use crate::kms::{self, Binding, Failure, KeySource, KmsError, Purpose};
use crate::service::Error;
use crate::service::audit;
use crate::service::journal::Journal;
use crate::service::trust::{Grant, Usable};
use crate::volume::meta::{Body, MetaError};

/// An open lock.
pub(in crate::service) struct Unlocked {
    /// Holds the KEK.
    pub(in crate::service) keys: Keyring,
    /// Authentic.
    pub(in crate::service) body: Body,
    /// What opened it.
    pub(in crate::service) used: Usable,
    /// The key service's client, with its session: for whoever asks it again.
    pub(in crate::service) source: Option<Box<dyn KeySource>>,
    /// The copies on disk are not both this body.
    pub(in crate::service) repair: bool,
    /// Where it is recorded.
    pub(in crate::service) audit: Arc<Sink>,
}

/// Unwraps the KEK with one request where all is well; damaged copies may take one more. `purpose` is the verb, for the audit log.
///
/// Another slot is asked only where the first one's service could not be reached, never where it said no (docs/decisions/0013-slots.md).
pub(in crate::service) fn unlock(
    grant: &Grant,
    journal: Option<&Journal>,
    purpose: &'static str,
) -> Result<Unlocked, Error> {
    unlock_keeping(grant, journal, purpose, None).map(|(unlocked, _)| unlocked)
}

/// [`unlock`] that also hands out the KEK, for a further slot. `without`: not by this slot.
pub(in crate::service) fn unlock_keeping(
    grant: &Grant,
    journal: Option<&Journal>,
    purpose: &'static str,
    without: Option<u32>,
) -> Result<(Unlocked, Key32), Error> {
    let sink = audit::open(grant.pin.volume_id);
    let mut tried: Vec<&Usable> = Vec::new();
    let mut first_error = None;
    let all = || grant.copies.iter().flat_map(|(_, usable)| usable).filter(|usable| Some(usable.slot.id) != without);
    for usable in all() {
        let seen = |other: &&Usable| other.slot.wrapped == usable.slot.wrapped && other.uri == usable.uri;
        if usable.slot.wrapped.0.is_empty() || tried.iter().any(seen) {
            continue;
        }
        tried.push(usable);
        match open(grant, usable, &sink, purpose) {
            Ok(unlocked) => return Ok(unlocked),
            Err(error) => {
                tracing::debug!(slot = usable.slot.id, %error, "a slot did not open the volume");
                // Damage is a reason to look at another copy of the same slot, no answer one to ask another slot's service.
                let damage = matches!(&error, Error::Meta(_) | Error::Kms(KmsError { failure: Failure::BadData, .. }));
                let no_answer = matches!(&error, Error::Kms(error) if may_fail_over(error.failure));
                let other = all().find(|other| other.uri != usable.uri && !other.slot.wrapped.0.is_empty());
                let go_on = damage || no_answer;
                let error = match (error, other) {
                    (Error::Kms(mut error), Some(other)) if !go_on => {
                        error.message = format!(
                            "{}; slot {} is not asked in its place unless you say so: --kms {}",
                            error.message, other.slot.id, other.uri
                        );
                        Error::Kms(error)
                    }
                    (error, _) => error,
                };
                if !go_on {
                    // A word about the key, and not the silence of another slot before it, is what kept it shut.
                    first_error = Some(error);
                    break;
                }
                first_error.get_or_insert(error);
                if no_answer && other.is_some() {
                    tracing::warn!(
                        slot = usable.slot.id,
                        "the key service of this slot cannot be asked: trying another"
                    );
                }
            }
        }
    }
    Err(match first_error {
        Some(error) => with_journal(error, journal),
        None if without.is_some() => Error::Usage(
            "no other slot opens this volume from here, so that one stays: add another first (keys add-slot)".into(),
        ),
        None => Error::Destroyed(match journal {
            Some(journal) => format!("the wrapped key is no longer in the volume file; {}", journal.sentence()),
            None => "the wrapped key is no longer in the volume file, as after an erase: restore the file from a backup if there was none".into(),
        }),
    })
}

/// Whether a failure says nothing of the key. All else is a word about it, which is obeyed: whoever takes one key away means the
/// volume, however many slots it has.
fn may_fail_over(failure: Failure) -> bool {
    match failure {
        Failure::Unreachable | Failure::Unavailable | Failure::Untrusted | Failure::Protocol | Failure::Config => true,
        Failure::Unauthenticated
        | Failure::Denied
        | Failure::Suspended
        | Failure::Missing
        | Failure::Destroyed
        | Failure::Recreated
        | Failure::BadData
        | Failure::Unsuitable
        | Failure::NotDestroyed => false,
    }
}

fn open(grant: &Grant, usable: &Usable, sink: &Arc<Sink>, purpose: &'static str) -> Result<(Unlocked, Key32), Error> {
    let (scope, version) = (usable.scope, usable.version);
    let binding = Binding { volume: grant.pin.volume_id, scope, version, purpose: Purpose::Kek };
    let (slot, uri) = (usable.slot.id, usable.uri.to_string());
    let source = kms::source(&usable.uri)?;
    let unwrapped = source.unwrap(&binding, &usable.slot.wrapped, &usable.slot.identity);
    // Recorded before the key is used for anything.
    let _ = sink.record(match &unwrapped {
        Ok(_) => {
            let (key, request_id) = (audit::key(&usable.slot.identity), source.last_request_id());
            Event::Fetch { purpose, slot, uri, key, request_id }
        }
        Err(error) => audit::fetch_failed(purpose, slot, uri, &usable.slot.identity, error),
    });
    let kek = unwrapped?;
    let Proved { keys, body, repair } = prove(grant, usable.scope, usable.version, &usable.commitment, &kek)?;
    let source = Some(source);
    Ok((Unlocked { body, keys, used: usable.clone(), source, repair, audit: Arc::clone(sink) }, kek))
}

/// A KEK that is the volume's, and what it vouches for.
pub(in crate::service) struct Proved {
    /// Holds it.
    pub(in crate::service) keys: Keyring,
    /// Authentic.
    pub(in crate::service) body: Body,
    /// The copies on disk are not both this body.
    pub(in crate::service) repair: bool,
}

/// Holds a KEK against its commitment and the copies of the volume file against the KEK.
pub(in crate::service) fn prove(
    grant: &Grant,
    scope: u32,
    version: u32,
    commitment: &[u8; 32],
    kek: &Key32,
) -> Result<Proved, Error> {
    let volume = grant.pin.volume_id;
    if !keyring::same(&keyring::commitment(&volume, scope, version, kek), commitment) {
        return Err(MetaError::Unauthentic.into());
    }
    let keys = Keyring::new(volume).map_err(Error::io("no locked memory for keys: raise the limit (ulimit -l)"))?;
    keys.admit(scope, version, kek, true)?;
    let authentic: Vec<Option<&Body>> = grant.copies.iter().map(|(copy, _)| copy.authenticate(&keys).ok()).collect();
    let Some(body) = authentic.iter().flatten().max_by_key(|body| body.generation) else {
        return Err(MetaError::Unauthentic.into());
    };
    let both = authentic.len() == 2 && authentic.iter().all(|copy| *copy == Some(*body));
    Ok(Proved { body: (*body).clone(), keys, repair: !both })
}

/// Adds what the journal of an erase says to a failure that an erase would explain.
fn with_journal(error: Error, journal: Option<&Journal>) -> Error {
    match (error, journal) {
        (Error::Kms(mut error), Some(journal)) => {
            error.message = format!("{}; {}", error.message, journal.sentence());
            Error::Kms(error)
        }
        (error, _) => error,
    }
}
