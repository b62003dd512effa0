//! One fresh, logged-in session with the token that a URI or an identity names, and the keys found in it.
//!
//! Every call opens its own session and logs in anew: a cached session or handle would show a state that is over (handles
//! stay "valid" after their token is gone, and "invalid" says nothing about why).

use cryptoki::context::Pkcs11 as Library;
use cryptoki::error::{Error, RvError};
use cryptoki::object::{Attribute, AttributeType, KeyType, ObjectClass, ObjectHandle};
use cryptoki::session::{Session, UserType};
use cryptoki::slot::{Slot, TokenInfo};
use cryptoki::types::AuthPin;

use super::classify::{code, failed};
use super::config::{Config, config};
use super::module::Module;
use crate::crypto::ids::hex;
use crate::kms::uri::TokenKey;
use crate::kms::{Failure, KeyIdentity, KmsError, Noted};

/// What a token says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Token {
    pub(super) label: String,
    pub(super) serial: String,
    pub(super) manufacturer: String,
    pub(super) model: String,
    pub(super) firmware: String,
    pub(super) write_protected: bool,
    /// Whether anything is hidden from who has not logged in.
    pub(super) login_required: bool,
    keypad: bool,
}

impl Token {
    fn new(info: &TokenInfo) -> Self {
        let text = |text: &str| text.trim_end_matches([' ', '\0']).to_owned();
        let firmware = info.firmware_version();
        Self {
            label: text(info.label()),
            serial: text(info.serial_number()),
            manufacturer: text(info.manufacturer_id()),
            model: text(info.model()),
            firmware: format!("{}.{}", firmware.major(), firmware.minor()),
            write_protected: info.write_protected(),
            login_required: info.login_required(),
            keypad: info.protected_authentication_path(),
        }
    }

    fn is_named_by(&self, key: &TokenKey) -> bool {
        let agrees = |given: &Option<String>, has: &str| given.as_ref().is_none_or(|given| given == has);
        agrees(&key.token, &self.label)
            && agrees(&key.serial, &self.serial)
            && agrees(&key.manufacturer, &self.manufacturer)
            && agrees(&key.model, &self.model)
    }

    /// In a proof's words.
    pub(super) fn quote(&self) -> String {
        format!(
            "CKR_OK: label {:?}, serial number {:?}, manufacturer {:?}, model {:?}, firmware {}",
            self.label, self.serial, self.manufacturer, self.model, self.firmware
        )
    }
}

/// What was recorded of a key.
#[derive(Clone)]
pub(super) struct Recorded {
    serial: String,
    manufacturer: String,
    model: String,
    pub(super) id: String,
    check_value: String,
    unique_id: String,
}

impl Recorded {
    /// If it is a token's key at all.
    pub(super) fn of(identity: &KeyIdentity) -> Option<Self> {
        match identity {
            KeyIdentity::Pkcs11 {
                token_serial,
                token_manufacturer,
                token_model,
                key_id,
                check_value,
                unique_id,
                ..
            } => Some(Self {
                serial: token_serial.clone(),
                manufacturer: token_manufacturer.clone(),
                model: token_model.clone(),
                id: key_id.clone(),
                check_value: check_value.clone(),
                unique_id: unique_id.clone(),
            }),
            _ => None,
        }
    }

    fn is_on(&self, token: &Token) -> bool {
        (&self.serial, &self.manufacturer, &self.model) == (&token.serial, &token.manufacturer, &token.model)
    }
}

/// A key as it stands on the token.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) handle: ObjectHandle,
    id: String,
    label: String,
    check_value: String,
    unique_id: String,
    aes_256: bool,
    pub(super) encrypt: bool,
    pub(super) decrypt: bool,
    sensitive: bool,
    extractable: bool,
    was_always_hidden: bool,
    local: bool,
    pub(super) modifiable: bool,
    pub(super) destroyable: bool,
}

impl Found {
    /// Whether it can be the recorded key. Without a check value and a unique id on both sides nothing speaks against it.
    pub(super) fn may_be(&self, recorded: &Recorded) -> bool {
        let differ = |a: &str, b: &str| !a.is_empty() && !b.is_empty() && a != b;
        !differ(&self.check_value, &recorded.check_value) && !differ(&self.unique_id, &recorded.unique_id)
    }

    /// Refuses a key that cannot bind, or under which an erase may be undone.
    pub(super) fn check_suitable(&self, what: &str) -> Result<(), KmsError> {
        let fault = if !self.aes_256 {
            "is not an AES key of 256 bits"
        } else if !self.sensitive || self.extractable {
            "can be read out of the token, so that copies may survive its destruction"
        } else if self.id.is_empty() {
            "has no CKA_ID, by which alone it can be shown to be gone"
        } else if !self.decrypt {
            return Err(KmsError::new(
                Failure::Suspended,
                format!("{what} is switched off (CKA_DECRYPT is false): have it restored, or use another key"),
            ));
        } else if !self.encrypt {
            "may not encrypt (CKA_ENCRYPT is false)"
        } else {
            return Ok(());
        };
        Err(KmsError::new(Failure::Unsuitable, format!("{what} {fault}: make another, as docs/KMS.md shows")))
    }

    /// Properties that weaken an erase.
    pub(super) fn warnings(&self, token: &Token) -> Vec<String> {
        let mut warnings = Vec::new();
        let mut warn = |applies: bool, text: &str| {
            if applies {
                warnings.push(text.to_owned());
            }
        };
        warn(!self.aes_256, "The key is not an AES key of 256 bits, under which alone lethefs makes keys.");
        warn(
            !self.sensitive || self.extractable,
            "The key can be read out of the token: copies of it may exist that survive its destruction.",
        );
        warn(!self.local, "The key was not made on the token: whoever made it may still hold it.");
        warn(
            self.local && !self.was_always_hidden && self.sensitive && !self.extractable,
            "The key could once be read out of the token: copies of it may exist that survive its destruction.",
        );
        warn(self.id.is_empty(), "The key has no CKA_ID: its destruction could not be shown.");
        warn(!self.decrypt, "The key is switched off (CKA_DECRYPT is false): nothing opens until it is restored.");
        warn(
            self.check_value.is_empty() && self.unique_id.is_empty(),
            "The token tells neither CKA_CHECK_VALUE nor CKA_UNIQUE_ID: a key made later under the same CKA_ID would not \
             be told from this one.",
        );
        warn(!token.login_required, "The token asks for no PIN: whoever reaches it may use and destroy the key.");
        warnings
    }

    pub(super) fn quantum_durable(&self) -> bool {
        self.aes_256
    }

    pub(super) fn identity(&self, token: &Token) -> KeyIdentity {
        KeyIdentity::Pkcs11 {
            token_serial: token.serial.clone(),
            token_manufacturer: token.manufacturer.clone(),
            token_model: token.model.clone(),
            token_label: Noted(token.label.clone()),
            token_firmware: Noted(token.firmware.clone()),
            key_id: self.id.clone(),
            key_label: Noted(self.label.clone()),
            check_value: self.check_value.clone(),
            unique_id: self.unique_id.clone(),
        }
    }
}

/// A fresh session, logged in if the token asks for it.
pub(super) struct Open<'a> {
    library: &'a Library,
    slot: Slot,
    pub(super) session: Session,
    pub(super) token: Token,
    /// For messages.
    pub(super) what: String,
}

/// The tokens that are there and named so.
fn candidates(library: &Library, key: &TokenKey) -> Result<Vec<(Slot, Token)>, KmsError> {
    let what = "the token's module";
    let slots = library.get_slots_with_token().map_err(|error| failed(&error, what, "list its tokens"))?;
    let mut found = Vec::new();
    let mut broken = None;
    for slot in slots {
        match library.get_token_info(slot) {
            Ok(info) if info.token_initialized() => {
                let token = Token::new(&info);
                if token.is_named_by(key) {
                    found.push((slot, token));
                }
            }
            Ok(_) => {}
            Err(error) => broken = Some(failed(&error, "a token", "tell what it is")),
        }
    }
    match broken {
        // The one that was meant may be the one that does not tell.
        Some(error) if found.is_empty() => Err(error),
        _ => Ok(found),
    }
}

impl<'a> Open<'a> {
    /// Finds the token, opens a session and logs in. With `recorded`, the token is the recorded one.
    ///
    /// [`Failure::Unreachable`]: no such token is there. [`Failure::Recreated`]: another token has its name.
    pub(super) fn new(
        (module, library): (&Module, &'a Library),
        settings: &Config,
        key: &TokenKey,
        recorded: Option<&Recorded>,
        writing: bool,
    ) -> Result<Self, KmsError> {
        let mut tokens = candidates(library, key)?;
        if let Some(recorded) = recorded {
            if let Some(at) = tokens.iter().position(|(_, token)| recorded.is_on(token)) {
                tokens = vec![tokens.swap_remove(at)];
            } else if let Some((_, other)) = tokens.first() {
                return Err(KmsError::new(
                    Failure::Recreated,
                    format!(
                        "the token {:?} (serial number {}) is another one than the recorded one (serial number {})",
                        other.label, other.serial, recorded.serial
                    ),
                )
                .with_detail(other.quote()));
            }
        }
        let (slot, token) = match tokens.len() {
            1 => tokens.swap_remove(0),
            0 => {
                return Err(KmsError::new(
                    Failure::Unreachable,
                    "no token of that name is in a slot of the module: insert it, or check the key URI and \
                     LETHEFS_PKCS11_MODULE",
                ));
            }
            _ => return Err(config("several tokens have that name: add serial=NUMBER to the key URI")),
        };
        let what = format!("the token {:?} (serial number {})", token.label, token.serial);
        let session = if writing && !token.write_protected {
            library.open_rw_session(slot)
        } else {
            library.open_ro_session(slot)
        };
        let session = session.map_err(|error| failed(&error, &what, "open a session"))?;
        let open = Self { library, slot, session, token, what };
        open.log_in(module, settings)?;
        Ok(open)
    }

    fn log_in(&self, module: &Module, settings: &Config) -> Result<(), KmsError> {
        if !self.token.login_required {
            return Ok(());
        }
        let pin = match settings.read_pin()? {
            Some(pin) if module.is_refused(&pin) => {
                return Err(KmsError::new(
                    Failure::Unauthenticated,
                    format!(
                        "{} has refused the PIN in LETHEFS_PKCS11_PIN_FILE, and it is not tried again, since a token \
                         locks itself after a few wrong ones: put the right one there",
                        self.what
                    ),
                ));
            }
            None if !self.token.keypad => {
                return Err(config(format!(
                    "{} asks for a PIN: name its file with LETHEFS_PKCS11_PIN_FILE",
                    self.what
                )));
            }
            pin => pin,
        };
        let given = pin.as_ref().map(|pin| AuthPin::new(Box::from(pin.expose())));
        let mut result = self.session.login(UserType::User, given.as_ref());
        if result.as_ref().err().and_then(code) == Some(RvError::UserAlreadyLoggedIn) {
            // Left by a call that hung. What follows is to rest on a login of its own.
            let _ = self.session.logout();
            result = self.session.login(UserType::User, given.as_ref());
        }
        match result {
            Ok(()) => {
                module.remember(None);
                Ok(())
            }
            Err(error) => {
                if code(&error) == Some(RvError::PinIncorrect) {
                    module.remember(pin);
                }
                Err(self.failed(&error, "log in"))
            }
        }
    }

    pub(super) fn failed(&self, error: &Error, did: &str) -> KmsError {
        failed(error, &self.what, did)
    }

    /// Asks the token again who it is.
    pub(super) fn still_there(&self) -> Result<Token, KmsError> {
        let info = self.library.get_token_info(self.slot).map_err(|error| self.failed(&error, "tell what it is"))?;
        let token = Token::new(&info);
        if token == self.token {
            return Ok(token);
        }
        Err(KmsError::new(Failure::Unavailable, format!("{} was exchanged just now: try again", self.what)))
    }

    /// The secret keys that a URI names.
    pub(super) fn named(&self, key: &TokenKey) -> Result<Vec<Found>, KmsError> {
        let mut template = vec![Attribute::Class(ObjectClass::SECRET_KEY), Attribute::Token(true)];
        template.extend(key.object.as_ref().map(|label| Attribute::Label(label.clone().into_bytes())));
        template.extend(key.id.as_ref().map(|id| Attribute::Id(id.clone())));
        self.find(&template)
    }

    /// The secret keys with a recorded `CKA_ID`.
    pub(super) fn with_id(&self, recorded: &Recorded) -> Result<Vec<Found>, KmsError> {
        let Some(id) = super::from_hex(&recorded.id).filter(|id| !id.is_empty()) else {
            return Err(config("what was recorded has no CKA_ID: the volume file is damaged"));
        };
        self.find(&[Attribute::Class(ObjectClass::SECRET_KEY), Attribute::Token(true), Attribute::Id(id)])
    }

    fn find(&self, template: &[Attribute]) -> Result<Vec<Found>, KmsError> {
        let handles = self.session.find_objects(template).map_err(|error| self.failed(&error, "look for the key"))?;
        handles.into_iter().map(|handle| self.look_at(handle)).collect()
    }

    fn look_at(&self, handle: ObjectHandle) -> Result<Found, KmsError> {
        // One by one: some tokens refuse a whole request for an attribute that they do not know.
        let text = |kind: AttributeType| -> Option<Vec<u8>> {
            match self.session.get_attributes(handle, &[kind]).ok()?.pop()? {
                Attribute::Id(bytes)
                | Attribute::Label(bytes)
                | Attribute::CheckValue(bytes)
                | Attribute::UniqueId(bytes) => Some(bytes),
                _ => None,
            }
        };
        let kinds = [
            AttributeType::KeyType,
            AttributeType::ValueLen,
            AttributeType::Encrypt,
            AttributeType::Decrypt,
            AttributeType::Sensitive,
            AttributeType::Extractable,
            AttributeType::AlwaysSensitive,
            AttributeType::NeverExtractable,
            AttributeType::Local,
        ];
        let facts = self
            .session
            .get_attributes(handle, &kinds)
            .map_err(|error| failed(&error, &format!("the key on {}", self.what), "tell what it is"))?;
        let is = |wanted: &Attribute| facts.contains(wanted);
        let flag = |kind: AttributeType, wanted: &Attribute, default: bool| {
            let found = self.session.get_attributes(handle, &[kind]).ok().and_then(|mut found| found.pop());
            found.map_or(default, |found| found == *wanted)
        };
        Ok(Found {
            handle,
            id: hex(&text(AttributeType::Id).unwrap_or_default()),
            label: String::from_utf8_lossy(&text(AttributeType::Label).unwrap_or_default()).into_owned(),
            check_value: hex(&text(AttributeType::CheckValue).unwrap_or_default()),
            unique_id: hex(&text(AttributeType::UniqueId).unwrap_or_default()),
            aes_256: is(&Attribute::KeyType(KeyType::AES)) && is(&Attribute::ValueLen(32.into())),
            encrypt: is(&Attribute::Encrypt(true)),
            decrypt: is(&Attribute::Decrypt(true)),
            sensitive: is(&Attribute::Sensitive(true)),
            extractable: !is(&Attribute::Extractable(false)),
            was_always_hidden: is(&Attribute::AlwaysSensitive(true)) && is(&Attribute::NeverExtractable(true)),
            local: is(&Attribute::Local(true)),
            // The standard's defaults, for tokens of versions that do not have them.
            modifiable: flag(AttributeType::Modifiable, &Attribute::Modifiable(true), true),
            destroyable: flag(AttributeType::Destroyable, &Attribute::Destroyable(true), true),
        })
    }

    /// The one key that a URI names. [`Failure::Missing`]: there is none.
    pub(super) fn the_one(&self, key: &TokenKey) -> Result<Found, KmsError> {
        let mut found = self.named(key)?;
        match found.len() {
            1 => Ok(found.swap_remove(0)),
            0 => Err(KmsError::new(
                Failure::Missing,
                format!("no key {key} is there: check the name, or make it as docs/KMS.md shows"),
            )),
            n => Err(config(format!("{n} keys are named {key}: add id=%01%02… to the key URI"))),
        }
    }
}
