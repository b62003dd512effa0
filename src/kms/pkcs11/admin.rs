//! The administrator's side of a token's key: suspend, restore, destroy, prove.
//!
//! A token knows one user, so whoever may unwrap may also do all this (docs/KMS.md says what that means). Nothing is
//! changed before it is shown that the key is the recorded one.

use cryptoki::error::RvError;
use cryptoki::object::Attribute;

use super::classify::{code, failed};
use super::token::{Found, Open, Recorded};
use super::{Pkcs11, called};
use crate::kms::{
    Binding, Destruction, Failure, KeyAdmin, KeyDescription, KeyIdentity, KeySource, KmsError, Proof, Wrapped,
};

/// The recorded key with its copies under the same id. Empty: it is not there. Refuses another key.
fn verified(open: &Open<'_>, recorded: &Recorded) -> Result<Vec<Found>, KmsError> {
    let found = open.with_id(recorded)?;
    if found.iter().any(|found| !found.may_be(recorded)) {
        return Err(untouched(open.recreated(recorded)));
    }
    Ok(found)
}

fn untouched(mut error: KmsError) -> KmsError {
    if error.failure == Failure::Recreated && !error.message.ends_with("nothing was changed") {
        error.message.push_str("; nothing was changed");
    }
    error
}

fn expect(recorded: Option<&Recorded>) -> &Recorded {
    let Some(recorded) = recorded else { unreachable!("with_token was given one") };
    recorded
}

/// Sets the attributes of a key. `false`: this token does not let them be changed.
fn set(open: &Open<'_>, found: &Found, attributes: &[Attribute]) -> Result<bool, KmsError> {
    match open.session.update_attributes(found.handle, attributes) {
        Ok(()) => Ok(true),
        Err(error) => match code(&error) {
            Some(
                RvError::ActionProhibited
                | RvError::AttributeReadOnly
                | RvError::AttributeTypeInvalid
                | RvError::AttributeValueInvalid
                | RvError::TemplateInconsistent
                | RvError::FunctionNotSupported,
            ) => Ok(false),
            _ => Err(failed(&error, &called(open), "change CKA_DECRYPT")),
        },
    }
}

impl KeyAdmin for Pkcs11 {
    fn describe(&self) -> Result<KeyDescription, KmsError> {
        KeySource::describe(self)
    }

    /// `CKA_DECRYPT` and `CKA_UNWRAP` off. `CKA_ENCRYPT` stays: it opens nothing.
    fn suspend(&self, identity: &KeyIdentity) -> Result<Option<Destruction>, KmsError> {
        let done = self.with_token(Some(self.recorded(identity)?), true, |open, _, recorded| {
            let recorded = expect(recorded);
            let found = verified(open, recorded)?;
            if found.is_empty() {
                return Err(KmsError::new(Failure::Missing, format!("no key with id {} is there", recorded.id)));
            }
            if open.token.write_protected || found.iter().any(|found| !found.modifiable) {
                return Ok(None);
            }
            for found in &found {
                if !set(open, found, &[Attribute::Decrypt(false), Attribute::Unwrap(false)])? {
                    return Ok(None);
                }
            }
            if open.with_id(recorded)?.iter().any(|found| found.decrypt) {
                let line = format!("{} was switched off, but is not: try again", called(open));
                return Err(KmsError::new(Failure::Protocol, line));
            }
            Ok(Some(Destruction::Suspended))
        });
        done.map_err(untouched)
    }

    /// `CKA_DECRYPT` on. `CKA_UNWRAP` is not needed and stays off.
    fn restore(&self) -> Result<(), KmsError> {
        self.with_token(None, true, |open, key, _| {
            let found = open.the_one(key)?;
            if !found.decrypt && !set(open, &found, &[Attribute::Decrypt(true)])? {
                let line = format!("{} does not let CKA_DECRYPT be switched on again", called(open));
                return Err(KmsError::new(Failure::Denied, line));
            }
            if open.the_one(key)?.decrypt {
                return Ok(());
            }
            Err(KmsError::new(Failure::Protocol, format!("{} was restored, but is not: try again", called(open))))
        })
    }

    /// A token knows one user, and does not say of an attribute (`CKA_DESTROYABLE`) what it would say of the deed.
    fn may_destroy(&self, identity: &KeyIdentity) -> Result<Option<bool>, KmsError> {
        let done = self.with_token(Some(self.recorded(identity)?), true, |open, _, recorded| {
            let found = verified(open, expect(recorded))?;
            if !found.is_empty() && open.token.write_protected {
                let line = format!("{} is write-protected: nothing on it can be destroyed", open.what);
                return Err(KmsError::new(Failure::Denied, line));
            }
            Ok(found.is_empty().then_some(true))
        });
        done.map_err(untouched)
    }

    fn destroy(&self, identity: &KeyIdentity) -> Result<Destruction, KmsError> {
        let done = self.with_token(Some(self.recorded(identity)?), true, |open, _, recorded| {
            let recorded = expect(recorded);
            for found in verified(open, recorded)? {
                open.session
                    .destroy_object(found.handle)
                    .map_err(|error| failed(&error, &called(open), "destroy the key (CKA_DESTROYABLE)"))?;
            }
            if !open.with_id(recorded)?.is_empty() {
                let line = format!("{} was destroyed, but is still there: try again", called(open));
                return Err(KmsError::new(Failure::Protocol, line));
            }
            tracing::info!(token = %open.what, id = %recorded.id, "the token carried out the destruction");
            Ok(Destruction::CarriedOut)
        });
        done.map_err(untouched)
    }

    /// Needs nothing that the key had wrapped.
    fn prove_destroyed(&self, identity: &KeyIdentity, _: Option<(&Binding, &Wrapped)>) -> Result<Proof, KmsError> {
        let findings = self
            .with_token(Some(self.recorded(identity)?), false, |open, _, recorded| open.evidence(expect(recorded)))
            .map_err(|error| KmsError { failure: Failure::NotDestroyed, ..error })?;
        Ok(Proof { self_asserted: false, at: jiff::Timestamp::now().to_string(), findings })
    }
}
