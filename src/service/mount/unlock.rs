//! From a volume file that the pin vouches for to an authenticated body and a ring that holds its KEK.

use std::sync::Arc;

use crate::audit::{Event, Sink};
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
pub(in crate::service) fn unlock(
    grant: &Grant,
    journal: Option<&Journal>,
    purpose: &'static str,
) -> Result<Unlocked, Error> {
    let sink = audit::open(grant.pin.volume_id);
    let mut tried: Vec<&Usable> = Vec::new();
    let mut first_error = None;
    for usable in grant.copies.iter().flat_map(|(_, usable)| usable) {
        let seen = |other: &&Usable| other.slot.wrapped == usable.slot.wrapped && other.uri == usable.uri;
        if usable.slot.wrapped.0.is_empty() || tried.iter().any(seen) {
            continue;
        }
        tried.push(usable);
        match open(grant, usable, &sink, purpose) {
            Ok(unlocked) => return Ok(unlocked),
            Err(error) => {
                tracing::debug!(slot = usable.slot.id, %error, "a slot did not open the volume");
                // Only damage is a reason to look at another copy of the same slot; a key that is gone is gone for it, too.
                let damage = matches!(&error, Error::Meta(_) | Error::Kms(KmsError { failure: Failure::BadData, .. }));
                first_error.get_or_insert(error);
                let others = grant.copies.iter().flat_map(|(_, usable)| usable).any(|other| other.uri != usable.uri);
                if !damage && !others {
                    break;
                }
            }
        }
    }
    Err(match first_error {
        Some(error) => with_journal(error, journal),
        None => Error::Destroyed(match journal {
            Some(journal) => format!("the wrapped key is no longer in the volume file; {}", journal.sentence()),
            None => "the wrapped key is no longer in the volume file, as after an erase: restore the file from a backup if there was none".into(),
        }),
    })
}

fn open(grant: &Grant, usable: &Usable, sink: &Arc<Sink>, purpose: &'static str) -> Result<Unlocked, Error> {
    let volume = grant.pin.volume_id;
    let (scope, version) = (usable.scope, usable.version);
    let binding = Binding { volume, scope, version, purpose: Purpose::Kek };
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
    if !keyring::same(&keyring::commitment(&volume, scope, version, &kek), &usable.commitment) {
        return Err(MetaError::Unauthentic.into());
    }
    let keys = Keyring::new(volume).map_err(Error::io("no locked memory for keys: raise the limit (ulimit -l)"))?;
    keys.admit(scope, version, &kek, true)?;
    drop(kek);
    let authentic: Vec<Option<&Body>> = grant.copies.iter().map(|(copy, _)| copy.authenticate(&keys).ok()).collect();
    let Some(body) = authentic.iter().flatten().next() else { return Err(MetaError::Unauthentic.into()) };
    let both = authentic.len() == 2 && authentic.iter().all(|copy| *copy == Some(*body));
    Ok(Unlocked {
        body: (*body).clone(),
        keys,
        used: usable.clone(),
        source: Some(source),
        repair: !both,
        audit: Arc::clone(sink),
    })
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
