//! The administrator's side of a Transit key: suspend, restore, destroy, prove.
//!
//! Needs other rights than a mount's, and never `decrypt` (docs/KMS.md has the policy). Nothing is changed before it is
//! shown that the key is the recorded one.

use reqwest::Method;
use serde::Deserialize;
use serde_json::json;

use super::Transit;
use super::classify::{Meaning, classify};
use super::diagnose::Recorded;
use super::http::Reply;
use super::key::{KeyInfo, SameVersion};
use crate::kms::{
    Binding, Destruction, Failure, KeyAdmin, KeyDescription, KeyIdentity, KeySource, KmsError, Proof, Wrapped,
};

#[derive(Deserialize)]
struct SoftDeleted {
    soft_deleted: bool,
}

impl Transit {
    /// The state after a change of it. The server answers 204 to both changes if there is no such key.
    fn state_after(&self, reply: &Reply, did: &str) -> Result<bool, KmsError> {
        self.note(reply);
        match classify(reply).0 {
            Meaning::Done if reply.status == 204 => self.read_key(None).map(|(info, _)| info.soft_deleted),
            Meaning::Done => reply.data::<SoftDeleted>().map(|state| state.soft_deleted),
            _ => Err(reply.refuse(&self.what(), did)),
        }
    }

    /// Refuses a key that is not the recorded one. `Ok(None)`: there is none.
    fn verified(&self, recorded: &Recorded<'_>) -> Result<Option<KeyInfo>, KmsError> {
        let untouched = |mut error: KmsError| {
            error.message.push_str("; nothing was changed");
            error
        };
        let server = self.same_place(recorded).map_err(untouched)?.server;
        let reply = self.client.call(&Method::GET, &self.key_path(), None, Some(server))?;
        match classify(&reply).0 {
            Meaning::Nothing => return Ok(None),
            Meaning::Done => {}
            _ => return Err(reply.refuse(&self.what(), "read the key")),
        }
        let info: KeyInfo = reply.data()?;
        match info.is_same(recorded.key_version, recorded.key_version_created) {
            SameVersion::Yes => Ok(Some(info)),
            SameVersion::No => Err(untouched(self.recreated(&reply))),
            SameVersion::Hidden if info.min_available_version > recorded.key_version => Err(KmsError::new(
                Failure::Unsuitable,
                format!(
                    "version {} of {} has been trimmed away, so that it is the recorded key cannot be checked: \
                     delete it by hand; nothing was changed",
                    recorded.key_version,
                    self.what()
                ),
            )),
            SameVersion::Hidden => Err(KmsError::new(
                Failure::Suspended,
                format!(
                    "version {} of {} is switched off (min_decryption_version is {}), so that it is the recorded \
                     key cannot be checked: lower it with `bao write {}/config min_decryption_version={}`; \
                     nothing was changed",
                    recorded.key_version,
                    self.what(),
                    info.min_decryption_version,
                    self.key_path(),
                    recorded.key_version
                ),
            )),
        }
    }
}

impl KeyAdmin for Transit {
    fn describe(&self) -> Result<KeyDescription, KmsError> {
        KeySource::describe(self)
    }

    fn suspend(&self, identity: &KeyIdentity) -> Result<Option<Destruction>, KmsError> {
        if self.verified(&self.recorded(identity)?)?.is_none() {
            return Err(KmsError::new(Failure::Missing, format!("{} is not there", self.what())));
        }
        let path = format!("{}/soft-delete", self.key_path());
        let reply = self.client.call(&Method::DELETE, &path, None, None)?;
        if classify(&reply).0 == Meaning::NoSuchRequest {
            return Ok(None);
        }
        if self.state_after(&reply, "soft-delete the key")? {
            return Ok(Some(Destruction::Suspended));
        }
        Err(KmsError::new(Failure::Protocol, format!("{} was soft-deleted, but is not: try again", self.what())))
    }

    fn restore(&self) -> Result<(), KmsError> {
        let path = format!("{}/soft-delete-restore", self.key_path());
        let reply = self.client.call(&Method::POST, &path, None, None)?;
        if self.state_after(&reply, "restore a soft-deleted key")? {
            return Err(KmsError::new(
                Failure::Protocol,
                format!("{} was restored, but is not: try again", self.what()),
            ));
        }
        Ok(())
    }

    fn may_destroy(&self, identity: &KeyIdentity) -> Result<Option<bool>, KmsError> {
        let Some(info) = self.verified(&self.recorded(identity)?)? else { return Ok(Some(true)) };
        let mut needed = vec![(self.key_path(), "delete")];
        if !info.deletion_allowed {
            needed.push((format!("{}/config", self.key_path()), "update"));
        }
        let granted = self.granted(&needed)?;
        for ((path, right), granted) in needed.iter().zip(&granted) {
            if *granted == Some(false) {
                let line = format!(
                    "these credentials may not destroy {}: no policy gives them {right} on {path} (docs/KMS.md has one)",
                    self.what()
                );
                return Err(KmsError::new(Failure::Denied, line));
            }
        }
        Ok(granted.into_iter().collect::<Option<Vec<bool>>>().map(|_| true))
    }

    fn destroy(&self, identity: &KeyIdentity) -> Result<Destruction, KmsError> {
        let recorded = self.recorded(identity)?;
        let Some(info) = self.verified(&recorded)? else { return Ok(Destruction::CarriedOut) };
        // Neither request minds that the key is soft-deleted.
        if !info.deletion_allowed {
            let path = format!("{}/config", self.key_path());
            let reply = self.client.call(&Method::POST, &path, Some(&json!({ "deletion_allowed": true })), None)?;
            match classify(&reply).0 {
                Meaning::Done => {}
                Meaning::NoKey => return Ok(Destruction::CarriedOut),
                _ => return Err(reply.refuse(&self.what(), "set deletion_allowed on the key")),
            }
        }
        let reply = self.client.call(&Method::DELETE, &self.key_path(), None, None)?;
        match classify(&reply).0 {
            Meaning::Done | Meaning::NoKey => {
                tracing::info!(key = %self.what(), "the key service carried out the destruction");
                Ok(Destruction::CarriedOut)
            }
            _ => Err(reply.refuse(&self.what(), "delete the key")),
        }
    }

    fn prove_destroyed(&self, identity: &KeyIdentity, probe: Option<(&Binding, &Wrapped)>) -> Result<Proof, KmsError> {
        let recorded = self.recorded(identity)?;
        let findings = self.evidence(&recorded, probe)?;
        Ok(Proof { self_asserted: false, at: jiff::Timestamp::now().to_string(), findings })
    }

    fn last_request_id(&self) -> Option<String> {
        self.noted()
    }
}
