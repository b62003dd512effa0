//! Keys of AWS KMS, by the official client.
//!
//! A key-encryption key is made by `GenerateDataKey` and bound to its volume by the encryption context, in readable form,
//! so that CloudTrail shows and IAM policies can restrict which volume is opened. Every request names the key by its ARN:
//! `Decrypt` without a key would say the same of a destroyed key as of a missing right. This file holds the mount host's
//! side; [`admin`] the administrator's and the proof, [`key`] what the service tells of a key, [`classify`] the table of
//! its codes, [`client`] requests, [`config`] this host's settings.

mod admin;
mod classify;
mod client;
pub mod config;
mod key;

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use aws_sdk_kms::operation::RequestId;
use aws_sdk_kms::primitives::Blob;
use aws_sdk_kms::types::{DataKeySpec, KeyState};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use zeroize::Zeroizing;

use self::classify::{Meaning, Refused};
use self::client::Aws as Client;
pub use self::config::Config;
use self::key::KeyInfo;
use super::uri::AwsKey;
use super::{
    Binding, Failure, KeyDescription, KeyIdentity, KeySource, KmsError, MadeKey, Permissions, Purpose, Wrapped,
    WrappedKey,
};
use crate::crypto::Key32;

/// Before the base64 of the `CiphertextBlob`.
const PREFIX: &str = "lethefs-awskms:v1:";

/// AWS KMS takes no longer ones.
const MAX_BLOB: usize = 6144;

/// One key of AWS KMS: the mount host's side and the administrator's.
pub struct Aws {
    key: AwsKey,
    client: Client,
    /// Of the last request that made, opened or changed something.
    request_id: Mutex<Option<String>>,
}

/// The encryption context. It stands in CloudTrail in clear.
fn context(binding: &Binding) -> [(&'static str, String); 5] {
    let purpose = match binding.purpose {
        Purpose::Kek => "kek",
        Purpose::Canary => "canary",
    };
    [
        ("lethefs-format", "1".to_owned()),
        ("lethefs-volume", binding.volume.to_string()),
        ("lethefs-scope", binding.scope.to_string()),
        ("lethefs-version", binding.version.to_string()),
        ("lethefs-purpose", purpose.to_owned()),
    ]
}

fn parse(wrapped: &Wrapped) -> Option<Vec<u8>> {
    let blob = STANDARD.decode(wrapped.0.strip_prefix(PREFIX)?).ok()?;
    (1..=MAX_BLOB).contains(&blob.len()).then_some(blob)
}

impl Aws {
    /// The key, with this process's environment. Contacts nothing and opens no file.
    ///
    /// # Errors
    /// [`Failure::Config`] with the variable that is wrong.
    pub fn from_env(key: &AwsKey) -> Result<Self, KmsError> {
        Ok(Self::new(key, Config::from_env()?))
    }

    /// The key, with given limits. Credentials and address are the environment's all the same.
    pub fn new(key: &AwsKey, config: Config) -> Self {
        Self { key: key.clone(), client: Client::new(config, key.region.clone()), request_id: Mutex::default() }
    }

    /// The key's description: of the key that the URI names, or of the recorded one.
    fn info(&self, key: &str) -> Result<KeyInfo, Refused> {
        let reply = self.client.call(async |client| client.describe_key().key_id(key).send().await)?;
        let metadata = reply.key_metadata.ok_or_else(|| {
            Refused::from(KmsError::new(Failure::Protocol, "AWS KMS described the key without a description"))
        })?;
        Ok(KeyInfo::new(metadata)?)
    }

    /// The recorded key's ARN, if the URI can mean it.
    fn recorded<'a>(&self, identity: &'a KeyIdentity) -> Result<&'a str, KmsError> {
        let uri = super::KeyUri::Aws(self.key.clone());
        match identity {
            KeyIdentity::Aws { key_arn, .. } if identity.is_named_by(&uri) => Ok(key_arn),
            other => Err(KmsError::new(
                Failure::Config,
                format!("{uri} is not what was recorded, {other}: check the key URI"),
            )),
        }
    }

    /// Why `Decrypt` under the recorded key was refused.
    fn explain(&self, refused: Refused, arn: &str, wrapped: &[u8], binding: &Binding) -> KmsError {
        match refused.meaning {
            Meaning::Final => refused.error,
            Meaning::NoKey => match self.evidence(arn, Some((binding, wrapped))) {
                Ok(findings) => {
                    let said: Vec<_> = findings.iter().map(|f| format!("{}: {}", f.asked, f.answered)).collect();
                    KmsError::new(
                        Failure::Destroyed,
                        format!("AWS KMS key {arn} is destroyed: what it wrapped cannot be opened again"),
                    )
                    .with_detail(said.join(" | "))
                }
                Err(why) => {
                    let line = format!("AWS KMS has no key {arn}, but that it was destroyed is not shown: {why}");
                    KmsError { message: line, ..refused.error }
                }
            },
            Meaning::State => self.state(refused, arn),
        }
    }

    /// Which state it is that keeps the key from being used.
    fn state(&self, refused: Refused, arn: &str) -> KmsError {
        let told = self.info(arn).ok().map(|info| info.state);
        let says = |words: &str| told.is_none() && refused.said.contains(words);
        let (failure, line) = match &told {
            Some(KeyState::PendingDeletion | KeyState::PendingReplicaDeletion) => (
                Failure::Suspended,
                format!("AWS KMS key {arn} is scheduled for deletion: its administrator can still cancel that"),
            ),
            Some(KeyState::PendingImport) => (
                Failure::Suspended,
                format!(
                    "the material of AWS KMS key {arn} was deleted or has expired: who kept it can import it again"
                ),
            ),
            Some(KeyState::Disabled) => {
                (Failure::Suspended, format!("AWS KMS key {arn} is disabled: its administrator can enable it again"))
            }
            _ if says("pending deletion") || says("pending import") => (
                Failure::Suspended,
                format!("AWS KMS key {arn} is scheduled for deletion or without its material, and can be brought back"),
            ),
            _ => (Failure::Unavailable, format!("AWS KMS key {arn} is in a state that may pass: try again")),
        };
        KmsError { failure, message: line, ..refused.error }
    }
}

/// The encryption context, as the client takes it.
fn sent(binding: &Binding) -> Option<HashMap<String, String>> {
    Some(context(binding).map(|(name, value)| (name.to_owned(), value)).into())
}

/// What a reply that wraps says, if it is about the key that was asked.
fn wrapped_by(info: &KeyInfo, key_id: Option<&str>, blob: Option<Blob>, did: &str) -> Result<Wrapped, KmsError> {
    let odd = |what: &str| KmsError::new(Failure::Protocol, format!("AWS KMS {did} a key {what}"));
    if key_id != Some(&info.arn) {
        return Err(odd("under another key than was asked"));
    }
    let blob = blob.map(Blob::into_inner).unwrap_or_default();
    if !(1..=MAX_BLOB).contains(&blob.len()) {
        return Err(odd("without its wrapped form"));
    }
    Ok(Wrapped(format!("{PREFIX}{}", STANDARD.encode(blob))))
}

impl Aws {
    /// Keeps the service's number of a request that did something.
    fn note(&self, reply: &impl RequestId) {
        let id = reply.request_id().map(str::to_owned);
        *self.request_id.lock().unwrap_or_else(PoisonError::into_inner) = id;
    }

    fn noted(&self) -> Option<String> {
        self.request_id.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The key, if KEKs may be wrapped under it.
    fn suitable(&self) -> Result<KeyInfo, KmsError> {
        let info = self.info(&self.key.key).map_err(|refused| refused.error)?;
        info.check_suitable()?;
        for warning in info.warnings() {
            tracing::warn!(key = %info.arn, "{warning}");
        }
        Ok(info)
    }

    /// Why the key does not wrap.
    fn no_wrap(&self, refused: Refused, arn: &str) -> KmsError {
        if refused.meaning == Meaning::State { self.state(refused, arn) } else { refused.error }
    }
}

impl KeySource for Aws {
    fn make(&self, binding: &Binding) -> Result<MadeKey, KmsError> {
        let info = self.suitable()?;
        let reply = self.client.call(async |client| {
            let request = client.generate_data_key().key_id(&info.arn).key_spec(DataKeySpec::Aes256);
            request.set_encryption_context(sent(binding)).send().await
        });
        let reply = reply.map_err(|refused| self.no_wrap(refused, &info.arn))?;
        self.note(&reply);
        let key = reply.plaintext.map(|blob| Zeroizing::new(blob.into_inner())).and_then(Key32::from_zeroizing);
        let key = key.ok_or_else(|| KmsError::new(Failure::Protocol, "AWS KMS made a key that is not of 256 bits"))?;
        let wrapped = wrapped_by(&info, reply.key_id.as_deref(), reply.ciphertext_blob, "made")?;
        Ok(MadeKey { key, wrapped, identity: info.identity() })
    }

    /// `Encrypt`, which a mount host has no right to.
    fn wrap(&self, binding: &Binding, key: &Key32) -> Result<WrappedKey, KmsError> {
        let info = self.suitable()?;
        let reply = self.client.call(async |client| {
            // The client's own copy; freed memory is wiped by the allocator.
            let plaintext = key.expose(|bytes| Blob::new(bytes.as_slice()));
            let request = client.encrypt().key_id(&info.arn).plaintext(plaintext);
            request.set_encryption_context(sent(binding)).send().await
        });
        let reply = reply.map_err(|refused| self.no_wrap(refused, &info.arn))?;
        self.note(&reply);
        let wrapped = wrapped_by(&info, reply.key_id.as_deref(), reply.ciphertext_blob, "wrapped")?;
        Ok(WrappedKey { wrapped, identity: info.identity() })
    }

    fn unwrap(&self, binding: &Binding, wrapped: &Wrapped, identity: &KeyIdentity) -> Result<Key32, KmsError> {
        let arn = self.recorded(identity)?;
        let Some(blob) = parse(wrapped) else {
            return Err(KmsError::new(
                Failure::BadData,
                "the wrapped key does not have the form that lethefs gives AWS KMS's: it is damaged, or another service's",
            ));
        };
        let reply = match self.decrypt(arn, binding, &blob) {
            Ok(reply) => reply,
            Err(refused) => return Err(self.explain(refused, arn, &blob, binding)),
        };
        if reply.key_id.as_deref() != Some(arn) {
            return Err(KmsError::new(Failure::Protocol, "AWS KMS unwrapped with another key than was asked"));
        }
        self.note(&reply);
        let key = reply.plaintext.map(|blob| Zeroizing::new(blob.into_inner())).and_then(Key32::from_zeroizing);
        key.ok_or_else(|| KmsError::new(Failure::Protocol, "AWS KMS gave something that is not a 256-bit key"))
    }

    fn describe(&self) -> Result<KeyDescription, KmsError> {
        let info = self.info(&self.key.key).map_err(|refused| refused.error)?;
        Ok(KeyDescription {
            identity: info.identity(),
            quantum_durable: info.quantum_durable(),
            warnings: info.warnings(),
            deletion_allowed: true,
        })
    }

    /// AWS tells nobody what he may do; that the key could be described shows that much.
    fn permissions(&self) -> Result<Permissions, KmsError> {
        let describe = match self.info(&self.key.key) {
            Ok(_) => true,
            Err(refused) if refused.error.failure == Failure::Denied => false,
            Err(refused) => return Err(refused.error),
        };
        Ok(Permissions { make: None, unwrap: None, describe: Some(describe), suspend: None, destroy: None })
    }

    fn last_request_id(&self) -> Option<String> {
        self.noted()
    }
}

impl Aws {
    fn decrypt(
        &self,
        arn: &str,
        binding: &Binding,
        blob: &[u8],
    ) -> Result<aws_sdk_kms::operation::decrypt::DecryptOutput, Refused> {
        self.client.call(async |client| {
            let request = client.decrypt().key_id(arn).ciphertext_blob(Blob::new(blob));
            request.set_encryption_context(sent(binding)).send().await
        })
    }
}
