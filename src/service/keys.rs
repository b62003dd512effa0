//! `keys check`: can this key be reached, used, destroyed by me; what would fail, and why. Stores nothing, creates nothing.

use serde::Serialize;

use super::{Error, SCHEMA};
use crate::crypto::VolumeId;
use crate::keyring::KeyringError;
use crate::kms::{self, Binding, KeyDescription, KeySource, KeyUri, KmsError, Purpose};

/// What the check found.
#[derive(Debug, Serialize)]
pub struct Report {
    /// 1.
    pub schema: u32,
    /// Always null: a key is looked at, not a volume.
    pub volume_id: Option<VolumeId>,
    /// The key.
    pub uri: KeyUri,
    /// What the key is, if that could be found out.
    pub description: Option<KeyDescription>,
    /// One by one.
    pub capabilities: Vec<Capability>,
    /// Everything that a mount host needs is there.
    pub mountable: bool,
}

/// One thing that one may want to do with the key.
#[derive(Debug, Serialize)]
pub struct Capability {
    /// `reach`, `make`, `unwrap`, `describe`, `suspend`, `destroy`.
    pub name: &'static str,
    /// `None`: not known.
    pub works: Option<bool>,
    /// How it is known, or why it fails.
    pub why: String,
}

/// Checks a key.
///
/// # Errors
/// Only what keeps the check itself from running; a key that fails is a report with an error beside it.
pub fn check(uri: &KeyUri) -> Result<(Report, Option<Error>), Error> {
    let source = kms::source(uri)?;
    let mut failure = None;
    let mut capabilities = Vec::new();

    let described = source.describe();
    let permissions = source.permissions();
    let trial = match uri {
        // Making a key under a key file could create the file.
        KeyUri::File(_) => None,
        KeyUri::Transit(_) | KeyUri::Pkcs11(_) | KeyUri::Aws(_) => Some(try_out(&*source)?),
    };

    let reached = described.as_ref().err().map_or(Some(true), reached);
    capabilities.push(Capability {
        name: "reach",
        works: reached,
        why: described.as_ref().err().map_or_else(|| "it answered".into(), ToString::to_string),
    });
    let permitted = permissions.as_ref().ok();
    match &trial {
        Some(trial) => {
            capabilities.push(tried("make", &trial.make));
            match &trial.unwrap {
                Some(unwrap) => capabilities.push(tried("unwrap", unwrap)),
                None => capabilities.push(told("unwrap", permitted.and_then(|known| known.unwrap))),
            }
        }
        None => {
            let here = described.is_ok();
            capabilities.push(told("make", permitted.and_then(|known| known.make).map(|may| may && here)));
            capabilities.push(told("unwrap", permitted.and_then(|known| known.unwrap).map(|may| may && here)));
        }
    }
    capabilities.push(match &described {
        Ok(_) => Capability { name: "describe", works: Some(true), why: "tried".into() },
        Err(error) => Capability { name: "describe", works: Some(false), why: error.to_string() },
    });
    capabilities.push(told("suspend", permitted.and_then(|known| known.suspend)));
    let mut destroy = told("destroy", permitted.and_then(|known| known.destroy));
    if destroy.works == Some(true) && described.as_ref().is_ok_and(|key| !key.deletion_allowed) {
        destroy.why = "may, but the key must first be set to allow deletion".into();
    }
    capabilities.push(destroy);

    // What a mount host needs: to unwrap, and to describe, without which a destroyed key cannot be told from a denied one.
    match trial {
        // A host that may only unwrap is a good mount host; it just cannot make volumes.
        Some(Trial { make: Err(error), .. })
            if error.failure == kms::Failure::Denied && permitted.is_some_and(|known| known.unwrap == Some(true)) => {}
        Some(Trial { make: Err(error), .. }) => failure = Some(error),
        Some(Trial { unwrap: Some(Err(error)), .. }) => failure = Some(error),
        _ => {}
    }
    let description = match described {
        Ok(description) => Some(description),
        Err(error) => {
            failure.get_or_insert(error);
            None
        }
    };
    if let Err(error) = permissions {
        tracing::debug!(%error, "the key service does not tell what these credentials may do");
    }
    let report = Report {
        schema: SCHEMA,
        volume_id: None,
        uri: uri.clone(),
        description,
        capabilities,
        mountable: failure.is_none(),
    };
    Ok((report, failure.map(Error::from)))
}

struct Trial {
    make: Result<(), KmsError>,
    unwrap: Option<Result<(), KmsError>>,
}

/// Makes and unwraps a key for a volume that does not exist. Nothing is stored anywhere.
fn try_out(source: &dyn KeySource) -> Result<Trial, Error> {
    let volume = VolumeId::random().map_err(KeyringError::from)?;
    let binding = Binding { volume, scope: 0, version: 1, purpose: Purpose::Canary };
    Ok(match source.make(&binding) {
        Ok(made) => {
            let unwrap = source.unwrap(&binding, &made.wrapped, &made.identity).and_then(|key| {
                if key.same_as(&made.key) {
                    Ok(())
                } else {
                    Err(KmsError::new(
                        kms::Failure::Protocol,
                        "the key service unwrapped to another key: do not use it",
                    ))
                }
            });
            Trial { make: Ok(()), unwrap: Some(unwrap) }
        }
        Err(error) => Trial { make: Err(error), unwrap: None },
    })
}

/// Whether a failure still shows that the right service answered.
fn reached(error: &KmsError) -> Option<bool> {
    use kms::Failure::{
        BadData, Config, Denied, Destroyed, Missing, NotDestroyed, Protocol, Recreated, Suspended, Unauthenticated,
        Unavailable, Unreachable, Unsuitable, Untrusted,
    };
    match error.failure {
        Unreachable | Untrusted | Config => Some(false),
        Unavailable | Unauthenticated | Denied | Suspended | Missing | Destroyed | Recreated | BadData | Unsuitable
        | NotDestroyed => Some(true),
        Protocol => None,
    }
}

fn tried(name: &'static str, result: &Result<(), KmsError>) -> Capability {
    match result {
        Ok(()) => Capability { name, works: Some(true), why: "tried".into() },
        Err(error) => Capability { name, works: Some(false), why: error.to_string() },
    }
}

fn told(name: &'static str, works: Option<bool>) -> Capability {
    let why = match works {
        Some(true) => "these credentials may",
        Some(false) => "not with these credentials, or not with this kind of key",
        None => "the service does not tell",
    };
    Capability { name, works, why: why.into() }
}
