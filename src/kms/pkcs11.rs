//! A secret key on a PKCS #11 token: a hardware security module, a smart card, or SoftHSM.
//!
//! The token makes the key-encryption key's bytes (`C_GenerateRandom`) and wraps them with `CKM_AES_GCM` under a
//! sensitive, non-extractable AES-256 key of its own, bound by the associated data. This file holds the mount host's side;
//! [`admin`] the administrator's, [`diagnose`] what failures mean, [`classify`] the table of return codes, [`token`]
//! sessions and keys, [`module`] calls that end, [`config`] the environment.

mod admin;
mod classify;
pub mod config;
mod diagnose;
mod module;
mod token;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use cryptoki::mechanism::Mechanism;
use cryptoki::mechanism::aead::GcmParams;
use cryptoki::object::ObjectHandle;
use cryptoki::session::Session;
use zeroize::Zeroizing;

pub use self::config::Config;
use self::token::{Found, Open, Recorded};
use super::uri::TokenKey;
use super::{
    Binding, Failure, KeyDescription, KeyIdentity, KeySource, KmsError, MadeKey, Permissions, Wrapped, WrappedKey,
};
use crate::crypto::Key32;

/// Before the base64 of nonce ‖ ciphertext ‖ tag.
const PREFIX: &str = "lethefs-pkcs11:v1:";
const NONCE: usize = 12;
const TAG: usize = 16;
const SEALED: usize = NONCE + 32 + TAG;

/// One key on a token: the mount host's side and the administrator's.
pub struct Pkcs11 {
    key: TokenKey,
    config: Config,
}

impl Pkcs11 {
    /// The key, through the module that this process's environment names. Loads nothing.
    ///
    /// # Errors
    /// [`Failure::Config`] with the variable that is missing or wrong.
    pub fn from_env(key: &TokenKey) -> Result<Self, KmsError> {
        Ok(Self::new(key, Config::from_env()?))
    }

    /// The key, through a given module.
    pub fn new(key: &TokenKey, config: Config) -> Self {
        Self { key: key.clone(), config }
    }

    /// Runs a job in a fresh session, logged in. With `recorded`, the token is the recorded one.
    fn with_token<T: Send + 'static>(
        &self,
        recorded: Option<Recorded>,
        writing: bool,
        job: impl FnOnce(&Open<'_>, &TokenKey, Option<&Recorded>) -> Result<T, KmsError> + Send + 'static,
    ) -> Result<T, KmsError> {
        let (key, config) = (self.key.clone(), self.config.clone());
        self.config.run(move |module, library| {
            let open = Open::new((module, library), &config, &key, recorded.as_ref(), writing)?;
            job(&open, &key, recorded.as_ref())
        })
    }

    fn recorded(&self, identity: &KeyIdentity) -> Result<Recorded, KmsError> {
        Recorded::of(identity).ok_or_else(|| {
            KmsError::new(
                Failure::Config,
                format!("{} is not what was recorded, {identity}: check the key URI", self.key),
            )
        })
    }
}

/// What the key is called in messages.
fn called(open: &Open<'_>) -> String {
    format!("the key on {}", open.what)
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    super::identity::bytes_of(text)
}

/// Encrypts; gives the nonce that was used, which some tokens choose themselves, with the rest.
fn seal(session: &Session, key: ObjectHandle, aad: &[u8], text: &[u8]) -> Result<Vec<u8>, cryptoki::error::Error> {
    let mut nonce = [0; NONCE];
    session.generate_random_slice(&mut nonce)?;
    let body = {
        let params = GcmParams::new(&mut nonce, aad, (8 * TAG as u64).into())?;
        session.encrypt(&Mechanism::AesGcm(params), key, text)?
    };
    Ok([&nonce[..], &body].concat())
}

/// Decrypts what [`seal`] gave.
fn unseal(
    session: &Session,
    key: ObjectHandle,
    aad: &[u8],
    sealed: &[u8],
) -> Result<Zeroizing<Vec<u8>>, cryptoki::error::Error> {
    let (nonce, body) = sealed.split_at(NONCE.min(sealed.len()));
    let mut nonce = nonce.to_vec();
    let params = GcmParams::new(&mut nonce, aad, (8 * TAG as u64).into())?;
    Ok(Zeroizing::new(session.decrypt(&Mechanism::AesGcm(params), key, body)?))
}

fn parse(wrapped: &Wrapped) -> Option<Vec<u8>> {
    let sealed = URL_SAFE_NO_PAD.decode(wrapped.0.strip_prefix(PREFIX)?).ok()?;
    (sealed.len() == SEALED).then_some(sealed)
}

fn make_on(open: &Open<'_>, found: &Found, binding: &Binding) -> Result<MadeKey, KmsError> {
    let what = called(open);
    found.check_suitable(&what)?;
    let key = Key32::fill_with(|bytes| open.session.generate_random_slice(bytes))
        .map_err(|error| open.failed(&error, "make random bytes"))?;
    // A module that says CKR_OK and fills nothing.
    if key.expose(|bytes| bytes.iter().all(|b| *b == 0)) {
        return Err(KmsError::new(Failure::Protocol, format!("{} gave no random bytes: do not use it", open.what)));
    }
    let WrappedKey { wrapped, identity } = wrap_on(open, found, binding, &key)?;
    Ok(MadeKey { key, wrapped, identity })
}

fn wrap_on(open: &Open<'_>, found: &Found, binding: &Binding, key: &Key32) -> Result<WrappedKey, KmsError> {
    let what = called(open);
    found.check_suitable(&what)?;
    for warning in found.warnings(&open.token) {
        tracing::warn!(key = %what, "{warning}");
    }
    let aad = binding.bytes();
    let sealed = key
        .expose(|bytes| seal(&open.session, found.handle, &aad, bytes))
        .map_err(|error| classify::failed(&error, &what, "wrap keys"))?;
    // A token may append the nonce, or use another tag length: what cannot be opened again must not be handed out.
    let again = unseal(&open.session, found.handle, &aad, &sealed)
        .map_err(|error| classify::failed(&error, &what, "unwrap what it has just wrapped"))?;
    let same = Key32::from_zeroizing(again).is_some_and(|again| again.same_as(key));
    if sealed.len() != SEALED || !same {
        return Err(KmsError::new(Failure::Unsuitable, format!("{what} does not wrap as CKM_AES_GCM should")));
    }
    let wrapped = Wrapped(format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(&sealed)));
    Ok(WrappedKey { wrapped, identity: found.identity(&open.token) })
}

impl KeySource for Pkcs11 {
    fn make(&self, binding: &Binding) -> Result<MadeKey, KmsError> {
        let binding = *binding;
        self.with_token(None, false, move |open, key, _| make_on(open, &open.the_one(key)?, &binding))
    }

    fn wrap(&self, binding: &Binding, key: &Key32) -> Result<WrappedKey, KmsError> {
        let binding = *binding;
        // The call may be given up while it still runs: it has a copy of its own, which is wiped when it ends.
        let copy: Result<Key32, std::convert::Infallible> = Key32::fill_with(|bytes| {
            key.expose(|key| bytes.copy_from_slice(key));
            Ok(())
        });
        let Ok(copy) = copy;
        self.with_token(None, false, move |open, key, _| wrap_on(open, &open.the_one(key)?, &binding, &copy))
    }

    fn unwrap(&self, binding: &Binding, wrapped: &Wrapped, identity: &KeyIdentity) -> Result<Key32, KmsError> {
        let recorded = self.recorded(identity)?;
        let Some(sealed) = parse(wrapped) else {
            return Err(KmsError::new(
                Failure::BadData,
                "the wrapped key does not have the form that lethefs gives a token's: it is damaged, or another service's",
            ));
        };
        let binding = *binding;
        self.with_token(Some(recorded), false, move |open, _, recorded| {
            let Some(recorded) = recorded else { unreachable!("given above") };
            let found = open.pick(recorded)?;
            match unseal(&open.session, found.handle, &binding.bytes(), &sealed) {
                Ok(key) => Key32::from_zeroizing(key).ok_or_else(|| {
                    let line = format!("{} gave something that is not a 256-bit key", called(open));
                    KmsError::new(Failure::Protocol, line)
                }),
                Err(error) => Err(open.explain(&error, &found)),
            }
        })
    }

    fn describe(&self) -> Result<KeyDescription, KmsError> {
        self.with_token(None, false, |open, key, _| {
            let found = open.the_one(key)?;
            Ok(KeyDescription {
                identity: found.identity(&open.token),
                quantum_durable: found.quantum_durable(),
                warnings: found.warnings(&open.token),
                deletion_allowed: found.destroyable,
            })
        })
    }

    /// From the key's attributes: who has the PIN has them all.
    fn permissions(&self) -> Result<Permissions, KmsError> {
        self.with_token(None, false, |open, key, _| {
            let found = open.the_one(key)?;
            let may_write = !open.token.write_protected;
            Ok(Permissions {
                make: Some(found.encrypt && found.decrypt),
                unwrap: Some(found.decrypt),
                describe: Some(true),
                suspend: Some(may_write && found.modifiable),
                destroy: Some(may_write && found.destroyable),
            })
        })
    }
}
