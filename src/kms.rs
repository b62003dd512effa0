//! Key services: what a mount host may ask of one ([`KeySource`]), what its administrator may ([`KeyAdmin`]), and the
//! providers. Knows nothing of volumes beyond the [`Binding`] bytes, and nothing of files.
//!
//! Every provider answers failures with one [`KmsError`] whose [`Failure`] class is all that callers decide by.
//! How each server's replies map to classes is written down, provider by provider, in `docs/KMS.md`.

#[cfg(feature = "kms-aws")]
pub mod aws;
#[cfg(feature = "kms-file")]
pub mod file;
mod identity;
#[cfg(feature = "kms-pkcs11")]
pub mod pkcs11;
#[cfg(feature = "kms-transit")]
pub mod transit;
pub mod uri;

use serde::{Deserialize, Serialize};

use crate::crypto::{Key32, VolumeId};

pub use identity::{ForeignIdentity, KeyIdentity, Noted};
pub use uri::KeyUri;

/// What a wrapped key is bound to at the KMS, so that it opens nowhere else (docs/FORMAT.md section 3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Binding {
    /// The volume.
    pub volume: VolumeId,
    /// The scope within it; format 1 has only 0.
    pub scope: u32,
    /// The KEK's version, from 1.
    pub version: u32,
    /// What the key is for.
    pub purpose: Purpose,
}

/// What a key made by the KMS is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// The key-encryption key itself.
    Kek,
    /// A throw-away key that only shows whether the KMS still unwraps.
    Canary,
}

impl Binding {
    /// The bytes handed to the KMS as context or associated data.
    pub fn bytes(&self) -> Vec<u8> {
        let purpose: &[u8] = match self.purpose {
            Purpose::Kek => b"kek/",
            Purpose::Canary => b"canary/",
        };
        let mut bytes = b"lethefs/1/".to_vec();
        bytes.extend_from_slice(purpose);
        bytes.extend_from_slice(&self.volume.0);
        bytes.extend_from_slice(&self.scope.to_le_bytes());
        bytes.extend_from_slice(&self.version.to_le_bytes());
        bytes
    }
}

/// A key as the KMS wrapped it: text that only that KMS key opens. Not secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wrapped(pub String);

/// A key that the KMS made: once in clear for us, once wrapped for the volume file.
pub struct MadeKey {
    /// The key.
    pub key: Key32,
    /// The key under the KMS key.
    pub wrapped: Wrapped,
    /// What identifies the KMS key that wrapped it.
    pub identity: KeyIdentity,
}

/// A given key under a KMS key.
pub struct WrappedKey {
    /// It.
    pub wrapped: Wrapped,
    /// What identifies the KMS key that wrapped it.
    pub identity: KeyIdentity,
}

/// What a provider can tell of its key without using it.
#[derive(Clone, Debug, Serialize)]
pub struct KeyDescription {
    /// Identity of the newest version.
    pub identity: KeyIdentity,
    /// Whether an erase through it survives a later break of RSA or elliptic curves.
    pub quantum_durable: bool,
    /// Properties that weaken an erase, each a sentence: exportable, backed up in plaintext, imported, ….
    pub warnings: Vec<String>,
    /// Whether the server would let somebody with the right destroy it now (Transit: `deletion_allowed`).
    pub deletion_allowed: bool,
}

/// What these credentials may do with the key, as far as the service tells (`keys check`).
#[derive(Clone, Debug, Serialize)]
pub struct Permissions {
    /// Make KEKs under it. `None`: the service does not tell.
    pub make: Option<bool>,
    /// Unwrap.
    pub unwrap: Option<bool>,
    /// Read its description, needed to tell a destroyed key from a missing permission.
    pub describe: Option<bool>,
    /// Suspend it reversibly.
    pub suspend: Option<bool>,
    /// Destroy it.
    pub destroy: Option<bool>,
}

/// The mount host's side of a key service.
pub trait KeySource: Send + Sync {
    /// Makes a new 256-bit key, wrapped and bound.
    ///
    /// # Errors
    /// Any [`KmsError`]. Refuses a KMS key that cannot bind (Transit: one that is not `derived`).
    fn make(&self, binding: &Binding) -> Result<MadeKey, KmsError>;

    /// Wraps a given key, as [`make`](Self::make) does with a new one: a KEK gets a further slot. Makes no key at a
    /// service that is not there.
    /// An administrator's right, not a mount host's, where the service tells them apart.
    ///
    /// # Errors
    /// Any [`KmsError`]; [`Failure::Unsuitable`] if the provider cannot.
    fn wrap(&self, binding: &Binding, key: &Key32) -> Result<WrappedKey, KmsError> {
        let _ = (binding, key);
        Err(KmsError::new(
            Failure::Unsuitable,
            "this key service cannot wrap a given key: use another for a further slot",
        ))
    }

    /// Unwraps with one request (besides a login). `identity` is what the slot recorded; on failure it serves to tell
    /// why, with as many further requests as that needs.
    ///
    /// # Errors
    /// Any [`KmsError`].
    fn unwrap(&self, binding: &Binding, wrapped: &Wrapped, identity: &KeyIdentity) -> Result<Key32, KmsError>;

    /// Describes the key as it is now.
    ///
    /// # Errors
    /// Any [`KmsError`].
    fn describe(&self) -> Result<KeyDescription, KmsError>;

    /// What these credentials may do.
    ///
    /// # Errors
    /// Any [`KmsError`].
    fn permissions(&self) -> Result<Permissions, KmsError>;

    /// The service's own number of the last [`make`](Self::make) or [`unwrap`](Self::unwrap) that succeeded, for the audit log.
    /// `None`: it gives none.
    fn last_request_id(&self) -> Option<String> {
        None
    }
}

/// What the service says of the way to destruction after a step of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum Destruction {
    /// Unusable now, but whoever has the right can bring it back.
    Suspended,
    /// Will be destroyed at this time (RFC 3339), and can be brought back until then.
    Scheduled {
        /// Not before.
        at: String,
    },
    /// The service carried the destruction out; the proof is another call.
    CarriedOut,
}

/// Evidence that a key no longer exists, each finding as the service worded it.
#[derive(Clone, Debug, Serialize)]
pub struct Proof {
    /// Whether this is a key service's word or only our own (`file://`).
    pub self_asserted: bool,
    /// When, RFC 3339, by this machine's clock.
    pub at: String,
    /// The parts of the rule, in order.
    pub findings: Vec<Finding>,
}

/// One part of a [`Proof`].
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// What was asked, as in `POST transit/decrypt/vol1`.
    pub asked: String,
    /// HTTP status or the like, and the body, verbatim.
    pub answered: String,
    /// What it shows.
    pub shows: String,
}

/// The administrator's side of a key service. Needs other credentials than the mount's.
pub trait KeyAdmin: Send + Sync {
    /// Describes the key as it is now.
    ///
    /// # Errors
    /// Any [`KmsError`].
    fn describe(&self) -> Result<KeyDescription, KmsError>;

    /// Makes the key unusable but restorable, where the service can. `Ok(None)`: it has no such state.
    /// A key that is already suspended is a success. Refuses, having changed nothing, a key that is not `identity`, as
    /// [`destroy`](Self::destroy) does.
    ///
    /// # Errors
    /// Any [`KmsError`].
    fn suspend(&self, identity: &KeyIdentity) -> Result<Option<Destruction>, KmsError>;

    /// Undoes [`suspend`](Self::suspend).
    ///
    /// # Errors
    /// Any [`KmsError`].
    fn restore(&self) -> Result<(), KmsError>;

    /// Whether [`destroy`](Self::destroy) would be let, found out without changing anything. `Some(true)`: the service says so, or
    /// the key is gone already. `None`: nothing speaks against it, but the service does not tell what these credentials may.
    ///
    /// # Errors
    /// What would keep it from being destroyed: a missing right, another key, no answer.
    fn may_destroy(&self, identity: &KeyIdentity) -> Result<Option<bool>, KmsError>;

    /// Destroys the key or schedules it. Refuses, having changed nothing, a key that is not `identity`
    /// (another cluster, or re-created under the same name). A key that is already gone is [`Destruction::CarriedOut`].
    ///
    /// # Errors
    /// Any [`KmsError`].
    fn destroy(&self, identity: &KeyIdentity) -> Result<Destruction, KmsError>;

    /// Asks for proof that `identity` no longer exists. `probe` is something the key had wrapped, if at hand.
    ///
    /// # Errors
    /// [`Failure::NotDestroyed`] with what is still there, or what kept us from finding out.
    fn prove_destroyed(&self, identity: &KeyIdentity, probe: Option<(&Binding, &Wrapped)>) -> Result<Proof, KmsError>;

    /// The service's own number of the last change that succeeded, for the audit log. `None`: it gives none.
    fn last_request_id(&self) -> Option<String> {
        None
    }
}

impl Failure {
    /// The class as one word, as JSON and the audit log write it.
    pub fn word(self) -> String {
        let word = serde_json::to_value(self).ok();
        word.and_then(|word| word.as_str().map(str::to_owned)).unwrap_or_default()
    }
}

/// Why a key service did not do what was asked. Callers decide by this alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Failure {
    /// No answer: refused, timed out, name not resolved, TLS not established. May pass.
    Unreachable,
    /// The server answers but cannot serve now: sealed, standby, rate-limited, 5xx. May pass.
    Unavailable,
    /// Who answers cannot be shown to be the right server: wrong CA or name. Does not pass by itself.
    Untrusted,
    /// The credentials are not accepted, and logging in again did not help.
    Unauthenticated,
    /// The credentials are good but do not allow this.
    Denied,
    /// The key exists and has been switched off reversibly: soft-deleted, disabled, version below the minimum.
    Suspended,
    /// The key is not there, and nothing more than that is shown.
    Missing,
    /// The key is destroyed: every part of the proof is there.
    Destroyed,
    /// Another key stands under the same name.
    Recreated,
    /// The KMS rejects the wrapped key as not authentic: damaged, or bound to another volume.
    BadData,
    /// The key service's answer is not understood, or larger than allowed.
    Protocol,
    /// The local configuration is missing or wrong: address, token, CA file, URI.
    Config,
    /// A KMS key that must not be used for this: cannot bind, wrong type.
    Unsuitable,
    /// A destruction that was asked for is not (yet) proved.
    NotDestroyed,
}

/// What a failed renewal tells a live mount about its key. The only thing that a lease decides by.
///
/// Two rules, both for what somebody on the way could do who can cut, delay and redirect but cannot forge the key service's
/// TLS: he must not be able to seal a mount ([`Standing::Revoked`] needs the service's own, authenticated word), and he must
/// not be able to keep one open beyond the grace (everything that is not such a word is [`Standing::Uncertain`], which the
/// grace bounds).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Standing {
    /// The key service refuses. Seal now; it may change its mind, so keep asking.
    Revoked,
    /// The key is proved gone. Seal now and for ever.
    Destroyed,
    /// Nobody who counts has said anything. Keep the state until the grace ends, then seal; keep asking.
    Uncertain,
}

impl Failure {
    /// What this failure means to a mount whose key was good a moment ago. Without a catch-all, so that a new class needs a
    /// decision here; docs/KMS.md ("Revoked or unreachable") gives the reason for each.
    pub fn standing(self) -> Standing {
        match self {
            Self::Destroyed => Standing::Destroyed,
            // The service answered, and its answer is no.
            Self::Denied | Self::Suspended | Self::Unauthenticated => Standing::Revoked,
            // No proof of a destruction, but a refusal all the same: the right server says that this key does not open.
            Self::Missing | Self::Recreated => Standing::Revoked,
            // The wrapped key in hand opened a moment ago and has not changed since: what changed is the service's key.
            Self::BadData => Standing::Revoked,
            // May pass, or may be somebody on the way.
            Self::Unreachable | Self::Unavailable | Self::Untrusted | Self::Protocol => Standing::Uncertain,
            // This host's own trouble, of which the service knows nothing.
            Self::Config => Standing::Uncertain,
            // Answers to other questions than an unwrap.
            Self::Unsuitable | Self::NotDestroyed => Standing::Uncertain,
        }
    }
}

/// A failure of a key service: its class, one line for people, and what the service said.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct KmsError {
    /// The class.
    pub failure: Failure,
    /// What happened and what to do, on one line, without secrets.
    pub message: String,
    /// The service's own words, for the log; free of secrets.
    pub detail: Option<String>,
    /// The underlying error.
    #[source]
    pub source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl KmsError {
    /// An error of this class with this line.
    pub fn new(failure: Failure, message: impl Into<String>) -> Self {
        Self { failure, message: message.into(), detail: None, source: None }
    }

    /// Adds the service's own words.
    #[must_use]
    pub fn with_detail(mut self, detail: impl Into<String>) -> Self {
        self.detail = Some(detail.into());
        self
    }

    /// Adds the underlying error.
    #[must_use]
    pub fn with_source(mut self, source: impl std::error::Error + Send + Sync + 'static) -> Self {
        self.source = Some(Box::new(source));
        self
    }
}

/// The mount host's side of the key that `uri` names, configured from this host's environment.
/// Nothing is contacted and no file opened before the first call.
///
/// # Errors
/// [`Failure::Config`] if this build lacks the provider or the environment lacks what it needs.
pub fn source(uri: &KeyUri) -> Result<Box<dyn KeySource>, KmsError> {
    match uri {
        #[cfg(feature = "kms-transit")]
        KeyUri::Transit(key) => Ok(Box::new(transit::Transit::from_env(key)?)),
        #[cfg(feature = "kms-pkcs11")]
        KeyUri::Pkcs11(key) => Ok(Box::new(pkcs11::Pkcs11::from_env(key)?)),
        #[cfg(feature = "kms-aws")]
        KeyUri::Aws(key) => Ok(Box::new(aws::Aws::from_env(key)?)),
        #[cfg(feature = "kms-file")]
        KeyUri::File(path) => Ok(Box::new(file::KeyFile::new(path))),
        #[allow(unreachable_patterns)]
        _ => Err(not_built(uri)),
    }
}

/// The administrator's side of the key that `uri` names.
///
/// # Errors
/// As [`source`].
pub fn admin(uri: &KeyUri) -> Result<Box<dyn KeyAdmin>, KmsError> {
    match uri {
        #[cfg(feature = "kms-transit")]
        KeyUri::Transit(key) => Ok(Box::new(transit::Transit::from_env(key)?)),
        #[cfg(feature = "kms-pkcs11")]
        KeyUri::Pkcs11(key) => Ok(Box::new(pkcs11::Pkcs11::from_env(key)?)),
        #[cfg(feature = "kms-aws")]
        KeyUri::Aws(key) => Ok(Box::new(aws::Aws::from_env(key)?)),
        #[cfg(feature = "kms-file")]
        KeyUri::File(path) => Ok(Box::new(file::KeyFile::new(path))),
        #[allow(unreachable_patterns)]
        _ => Err(not_built(uri)),
    }
}

#[allow(dead_code)]
fn not_built(uri: &KeyUri) -> KmsError {
    let feature = match uri {
        KeyUri::Transit(_) => "kms-transit",
        KeyUri::Pkcs11(_) => "kms-pkcs11",
        KeyUri::Aws(_) => "kms-aws",
        KeyUri::File(_) => "kms-file",
    };
    KmsError::new(
        Failure::Config,
        format!(
            "this build of lethefs cannot talk to {uri}: build it with `cargo build --release --features {feature}`"
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_service_s_own_word_seals_a_mount_at_once() {
        use Failure::{
            BadData, Config, Denied, Destroyed, Missing, NotDestroyed, Protocol, Recreated, Suspended, Unauthenticated,
            Unavailable, Unreachable, Unsuitable, Untrusted,
        };
        for refusal in [Denied, Suspended, Unauthenticated, Missing, Recreated, BadData] {
            assert_eq!(refusal.standing(), Standing::Revoked, "{refusal:?}");
        }
        assert_eq!(Destroyed.standing(), Standing::Destroyed);
        // What somebody on the way can bring about, and what is this host's own trouble.
        for uncertain in [Unreachable, Unavailable, Untrusted, Protocol, Config, Unsuitable, NotDestroyed] {
            assert_eq!(uncertain.standing(), Standing::Uncertain, "{uncertain:?}");
        }
    }
}
