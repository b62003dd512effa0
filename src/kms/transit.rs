//! Keys of an OpenBao or Vault Transit engine, over its HTTP API.
//!
//! A key-encryption key is made by `datakey` and bound to its volume by the derivation `context` of a `derived` key:
//! unlike associated data, the context survives the server's own `rewrap`. This file holds the mount host's side;
//! [`admin`] the administrator's, [`diagnose`] what failures mean, [`classify`] the table of the server's words,
//! [`client`] logins and addresses, [`http`] one request, [`config`] the environment.

mod admin;
mod classify;
mod client;
pub mod config;
mod diagnose;
mod http;
mod key;

use std::sync::{Mutex, PoisonError};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use reqwest::Method;
use serde::Deserialize;
use serde_json::json;
use zeroize::{Zeroize as _, Zeroizing};

use self::classify::{Meaning, classify};
use self::client::Client;
pub use self::config::{Config, Credentials, Secret};
use self::diagnose::wrapped_version;
use self::http::Reply;
use self::key::{KeyInfo, create_command};
use super::uri::TransitKey;
use super::{
    Binding, Failure, KeyDescription, KeyIdentity, KeySource, KmsError, MadeKey, Permissions, Wrapped, WrappedKey,
};
use crate::crypto::Key32;

/// One Transit key at one server: the mount host's side and the administrator's.
pub struct Transit {
    key: TransitKey,
    client: Client,
    /// Of the last request that made, opened or changed something.
    request_id: Mutex<Option<String>>,
}

/// A reply with a key in clear: borrowed from the reply's buffer, which is wiped.
#[derive(Deserialize)]
struct Plaintext<'a> {
    plaintext: &'a str,
    #[serde(default)]
    ciphertext: Option<&'a str>,
}

#[derive(Deserialize)]
struct Ciphertext<'a> {
    ciphertext: &'a str,
}

impl Transit {
    /// The key, at the server that this process's environment names. Contacts nothing and opens no file.
    ///
    /// # Errors
    /// [`Failure::Config`] with the variable that is missing or wrong.
    pub fn from_env(key: &TransitKey) -> Result<Self, KmsError> {
        Ok(Self::new(key, Config::from_env(key.server.as_deref())?))
    }

    /// The key, at a given server.
    pub fn new(key: &TransitKey, config: Config) -> Self {
        Self { key: key.clone(), client: Client::new(config), request_id: Mutex::default() }
    }

    /// The key, for messages.
    fn what(&self) -> String {
        let server = self.key.server.as_ref().map_or_else(String::new, |server| format!(", server {server}"));
        format!("Transit key {} (engine {}{server})", self.key.key, self.key.engine)
    }

    /// Keeps the server's number of a request that did something.
    fn note(&self, reply: &Reply) {
        *self.request_id.lock().unwrap_or_else(PoisonError::into_inner) = reply.request_id();
    }

    fn noted(&self) -> Option<String> {
        self.request_id.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The path of something that the key does.
    fn path(&self, verb: &str) -> String {
        format!("{}/{verb}/{}", self.key.engine, self.key.key)
    }

    fn key_path(&self) -> String {
        self.path("keys")
    }

    /// Reads the key's description.
    fn read_key(&self, server: Option<usize>) -> Result<(KeyInfo, Reply), KmsError> {
        let reply = self.client.call(&Method::GET, &self.key_path(), None, server)?;
        match classify(&reply).0 {
            Meaning::Done => Ok((reply.data()?, reply)),
            Meaning::Nothing => Err(KmsError::new(
                Failure::Missing,
                format!(
                    "{} is not there: check the name. For a new volume it is made with `{}`; if it was deleted, a new one opens nothing of what it wrapped",
                    self.what(),
                    create_command(&self.key.engine, &self.key.key)
                ),
            )
            .with_detail(reply.quote())),
            _ => Err(reply.refuse(&self.what(), "read the key")),
        }
    }

    fn identity(&self, info: &KeyInfo, version: u32) -> Result<KeyIdentity, KmsError> {
        let Some(key_version_created) = info.created(version) else {
            return Err(KmsError::new(
                Failure::Protocol,
                format!("{} does not tell when its version {version} was made: try again", self.what()),
            ));
        };
        Ok(KeyIdentity::Transit {
            engine: self.key.engine.clone(),
            engine_uuid: self.read_engine(None)?.0.uuid,
            key: self.key.key.clone(),
            namespace: self.client.namespace().to_owned(),
            key_version: version,
            key_version_created,
            cluster_id: self.read_health()?.0.cluster_id,
            key_type: info.key_type.clone(),
        })
    }

    /// Takes the key out of a reply, straight into its own buffer.
    fn take_key(&self, text: &str) -> Result<Key32, KmsError> {
        Key32::fill_with(|bytes| match STANDARD.decode_slice(text, bytes) {
            Ok(32) => Ok(()),
            _ => Err(()),
        })
        .map_err(|()| {
            KmsError::new(Failure::Protocol, format!("{} gave something that is not a 256-bit key", self.what()))
        })
    }
}

impl Transit {
    /// Whether these credentials have each right, if the server tells.
    fn granted(&self, paths: &[(String, &str)]) -> Result<Vec<Option<bool>>, KmsError> {
        let body = json!({ "paths": paths.iter().map(|(path, _)| path).collect::<Vec<_>>() });
        let reply = self.client.call(&Method::POST, "sys/capabilities-self", Some(&body), None)?;
        let granted: Option<std::collections::BTreeMap<String, serde_json::Value>> = match classify(&reply).0 {
            Meaning::Done => Some(reply.data()?),
            // A token without the default policy may not even ask.
            Meaning::NotGranted => None,
            _ => return Err(reply.refuse(&self.what(), "tell what is allowed")),
        };
        let has = |(path, needed): &(String, &str)| {
            let list = granted.as_ref()?.get(path)?.as_array()?;
            Some(list.iter().any(|granted| granted == needed || granted == "root"))
        };
        Ok(paths.iter().map(has).collect())
    }
}

impl KeySource for Transit {
    fn make(&self, binding: &Binding) -> Result<MadeKey, KmsError> {
        let (mut info, _) = self.read_key(None)?;
        info.check_suitable(&self.what(), &self.key.engine, &self.key.key)?;
        for warning in info.warnings() {
            tracing::warn!(key = %self.what(), "{warning}");
        }
        let body = json!({ "bits": 256, "context": STANDARD.encode(binding.bytes()) });
        let reply = self.client.call(&Method::POST, &self.path("datakey/plaintext"), Some(&body), None)?;
        if classify(&reply).0 != Meaning::Done {
            return Err(reply.refuse(&self.what(), "make keys"));
        }
        self.note(&reply);
        let made: Plaintext<'_> = reply.data()?;
        let key = self.take_key(made.plaintext)?;
        let wrapped = Wrapped(made.ciphertext.unwrap_or_default().to_owned());
        let Some(version) = wrapped_version(&wrapped) else {
            return Err(KmsError::new(
                Failure::Protocol,
                format!("{} gave a wrapped key without its version", self.what()),
            ));
        };
        if info.created(version).is_none() {
            // The key was rotated between the two requests.
            info = self.read_key(None)?.0;
        }
        let identity = self.identity(&info, version)?;
        Ok(MadeKey { key, wrapped, identity })
    }

    fn wrap(&self, binding: &Binding, key: &Key32) -> Result<WrappedKey, KmsError> {
        // First, since the server makes a key that is not there for whoever may create one.
        let (before, _) = self.read_key(None)?;
        before.check_suitable(&self.what(), &self.key.engine, &self.key.key)?;
        let mut text = Zeroizing::new(String::with_capacity(48));
        key.expose(|bytes| STANDARD.encode_string(bytes, &mut text));
        let mut body = json!({ "plaintext": *text, "context": STANDARD.encode(binding.bytes()) });
        let reply = self.client.call(&Method::POST, &self.path("encrypt"), Some(&body), None);
        if let Some(serde_json::Value::String(text)) = body.get_mut("plaintext") {
            text.zeroize();
        }
        let reply = reply?;
        if classify(&reply).0 != Meaning::Done {
            return Err(reply.refuse(&self.what(), "wrap a given key (encrypt)"));
        }
        self.note(&reply);
        let wrapped = Wrapped(reply.data::<Ciphertext<'_>>()?.ciphertext.to_owned());
        let (after, _) = self.read_key(None)?;
        let version = wrapped_version(&wrapped).filter(|version| after.created(*version).is_some());
        let Some(version) = version else {
            return Err(KmsError::new(
                Failure::Protocol,
                format!("{} gave a wrapped key without its version", self.what()),
            ));
        };
        // Deleted and made anew between the two: then what was wrapped is under a key that nobody checked.
        if after.created(before.latest_version) != before.created(before.latest_version) {
            return Err(KmsError::new(
                Failure::Recreated,
                format!("{} was made anew meanwhile: look at it, and try again", self.what()),
            ));
        }
        Ok(WrappedKey { wrapped, identity: self.identity(&after, version)? })
    }

    fn unwrap(&self, binding: &Binding, wrapped: &Wrapped, identity: &KeyIdentity) -> Result<Key32, KmsError> {
        if wrapped_version(wrapped).is_none() {
            return Err(KmsError::new(
                Failure::BadData,
                "the wrapped key does not have the form that Transit gives it: it is damaged, or another service's",
            ));
        }
        let body = json!({ "ciphertext": wrapped.0, "context": STANDARD.encode(binding.bytes()) });
        let reply = self.client.call(&Method::POST, &self.path("decrypt"), Some(&body), None)?;
        if classify(&reply).0 != Meaning::Done {
            return Err(self.explain(&reply, binding, wrapped, identity));
        }
        self.note(&reply);
        self.take_key(reply.data::<Plaintext<'_>>()?.plaintext)
    }

    fn describe(&self) -> Result<KeyDescription, KmsError> {
        let (info, _) = self.read_key(None)?;
        Ok(KeyDescription {
            identity: self.identity(&info, info.latest_version)?,
            quantum_durable: info.quantum_durable(),
            warnings: info.warnings(),
            deletion_allowed: info.deletion_allowed,
        })
    }

    fn permissions(&self) -> Result<Permissions, KmsError> {
        let paths = [
            (self.path("datakey/plaintext"), "update"),
            (self.path("decrypt"), "update"),
            (self.key_path(), "read"),
            (format!("{}/soft-delete", self.key_path()), "delete"),
            (self.key_path(), "delete"),
        ];
        let granted = self.granted(&paths)?;
        let [make, unwrap, describe, suspend, destroy] = std::array::from_fn(|n| granted[n]);
        Ok(Permissions { make, unwrap, describe, suspend, destroy })
    }

    fn last_request_id(&self) -> Option<String> {
        self.noted()
    }
}
