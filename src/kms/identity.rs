//! What identifies a key for ever, whichever service has it. Part of the frozen format (docs/FORMAT.md): variants may be
//! added, and older programs keep those as [`ForeignIdentity`].

use std::fmt;

use serde::{Deserialize, Serialize};

use super::KeyUri;
use super::uri::{TokenKey, TransitKey};
use crate::crypto::VolumeId;
use crate::crypto::ids::hex;

/// The facts that identify a KMS key for ever: a key made later under the same name differs in at least one.
///
/// Stored in the volume file and in the pin. Holds no address, path or credential: those are the host's business.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "provider", rename_all = "lowercase", deny_unknown_fields)]
pub enum KeyIdentity {
    /// A key of an OpenBao or Vault Transit engine.
    Transit {
        /// Path of the Transit engine, `transit` by default.
        engine: String,
        /// The engine's own id, which stays when the engine is moved and differs when another is put in its place.
        engine_uuid: String,
        /// Name of the key in it.
        key: String,
        /// Namespace, empty for the root namespace.
        namespace: String,
        /// Version of the key that wrapped.
        key_version: u32,
        /// When that version was made: Unix time in seconds, by the server's clock.
        key_version_created: i64,
        /// The cluster's id as `sys/health` gives it.
        cluster_id: String,
        /// Transit's name of the key's type, as in `aes256-gcm96`.
        key_type: String,
    },
    /// A secret key on a PKCS #11 token.
    Pkcs11 {
        /// The token's serial number, which its maker gave it.
        token_serial: String,
        /// Who made the token.
        token_manufacturer: String,
        /// Its model.
        token_model: String,
        /// The token's label, for people and to find it: it can be changed.
        token_label: Noted,
        /// The token's firmware when the key was first used here: it may be updated.
        token_firmware: Noted,
        /// The key's `CKA_ID` in hex.
        key_id: String,
        /// The key's `CKA_LABEL`, for people and to find it: it can be changed.
        key_label: Noted,
        /// The key's `CKA_CHECK_VALUE` in hex: three bytes that follow from the key itself, so that a key made later
        /// under the same id shows. Empty if the token does not give it.
        check_value: String,
        /// The key's `CKA_UNIQUE_ID` (PKCS #11 3.0), which no other object ever has. Empty if the token has none.
        unique_id: String,
    },
    /// A key of AWS KMS.
    #[serde(rename = "awskms")]
    Aws {
        /// The key's ARN. Its id is never given twice.
        key_arn: String,
        /// When it was made: Unix time in seconds, by the service's clock.
        created: i64,
        /// Where its material comes from: `AWS_KMS`, `EXTERNAL`, `AWS_CLOUDHSM`, `EXTERNAL_KEY_STORE`.
        origin: String,
        /// `SYMMETRIC_DEFAULT`.
        key_spec: String,
    },
    /// A key file on this machine.
    File {
        /// Random id inside the key file.
        key_id: VolumeId,
        /// When the file was made, RFC 3339.
        created: String,
    },
    /// A recovery key: no service has it, only its shares on paper. Opens by `keys` alone, never at a mount.
    Recovery {
        /// Random id, which the shares carry.
        recovery_id: VolumeId,
        /// When it was made, RFC 3339.
        created: String,
        /// So many shares are needed,
        threshold: u8,
        /// of so many.
        shares: u8,
    },
    /// A key of a service that this program does not know. Kept as it is, and good for nothing.
    #[serde(untagged)]
    Foreign(ForeignIdentity),
}

/// A fact that is written down and shown, but tells no key from another since it may change: all are equal.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Noted(pub String);

impl PartialEq for Noted {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Noted {}

/// An identity with a `provider` that this program does not know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "serde_json::Map<String, serde_json::Value>")]
pub struct ForeignIdentity(serde_json::Map<String, serde_json::Value>);

impl ForeignIdentity {
    /// What it says the service is.
    pub fn provider(&self) -> &str {
        self.0.get("provider").and_then(serde_json::Value::as_str).unwrap_or_default()
    }
}

impl TryFrom<serde_json::Map<String, serde_json::Value>> for ForeignIdentity {
    type Error = &'static str;

    /// Not for services that are known: of those every field must be.
    fn try_from(fields: serde_json::Map<String, serde_json::Value>) -> Result<Self, Self::Error> {
        match fields.get("provider").and_then(serde_json::Value::as_str) {
            None | Some("transit" | "pkcs11" | "awskms" | "file" | "recovery" | "") => Err("not an identity of a key"),
            Some(_) => Ok(Self(fields)),
        }
    }
}

impl KeyIdentity {
    /// What an administrator types to confirm that this very key goes: Transit's key name, a token key's label (else its
    /// `CKA_ID`), the last part of a key's ARN, a key file's id.
    pub fn name(&self) -> String {
        match self {
            Self::Transit { key, .. } => key.clone(),
            Self::Pkcs11 { key_label, key_id, .. } => {
                // Only what can be typed.
                let plain = !key_label.0.is_empty() && key_label.0.bytes().all(|b| b.is_ascii_graphic());
                if plain { key_label.0.clone() } else { key_id.clone() }
            }
            Self::Aws { key_arn, .. } => key_arn.rsplit('/').next().unwrap_or_default().to_owned(),
            Self::File { key_id, .. } => key_id.to_string(),
            Self::Recovery { recovery_id, .. } => recovery_id.to_string(),
            Self::Foreign(foreign) => foreign.provider().to_owned(),
        }
    }

    /// A URI that names this key and nothing else, for what only an identity is at hand of. `None`: its place cannot be
    /// told from it (a key file), or it is not well-formed: the parts may come from a file that nobody vouches for.
    pub fn uri(&self) -> Option<KeyUri> {
        let uri = match self {
            Self::Transit { engine, key, .. } => {
                KeyUri::Transit(TransitKey { engine: engine.clone(), key: key.clone(), server: None })
            }
            Self::Pkcs11 { token_serial, token_manufacturer, token_model, token_label, key_id, .. } => {
                let given = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
                // The serial numbers of cheap tokens are empty.
                let label = if token_serial.is_empty() { given(&token_label.0) } else { None };
                KeyUri::Pkcs11(Box::new(TokenKey {
                    token: label,
                    serial: given(token_serial),
                    manufacturer: given(token_manufacturer),
                    model: given(token_model),
                    object: None,
                    id: Some(bytes_of(key_id)?),
                }))
            }
            Self::Aws { key_arn, .. } => return format!("awskms:///{key_arn}").parse().ok(),
            Self::File { .. } | Self::Recovery { .. } | Self::Foreign(_) => return None,
        };
        uri.to_string().parse().ok().filter(|parsed| *parsed == uri)
    }

    /// Whether a URI can mean this key, as far as names tell.
    pub fn is_named_by(&self, uri: &KeyUri) -> bool {
        match (uri, self) {
            (KeyUri::Transit(uri), Self::Transit { engine, key, .. }) => uri.engine == *engine && uri.key == *key,
            (
                KeyUri::Pkcs11(uri),
                Self::Pkcs11 { token_serial, token_manufacturer, token_model, token_label, key_id, key_label, .. },
            ) => {
                let agrees = |given: &Option<String>, has: &str| given.as_ref().is_none_or(|given| given == has);
                agrees(&uri.token, &token_label.0)
                    && agrees(&uri.serial, token_serial)
                    && agrees(&uri.manufacturer, token_manufacturer)
                    && agrees(&uri.model, token_model)
                    && agrees(&uri.object, &key_label.0)
                    && uri.id.as_ref().is_none_or(|id| hex(id) == *key_id)
            }
            (KeyUri::Aws(uri), Self::Aws { key_arn, .. }) => {
                // An alias can mean any key of its region.
                let region = key_arn.split(':').nth(3);
                let same_region = uri.region.as_deref().is_none_or(|named| Some(named) == region);
                if uri.is_key_arn() {
                    uri.key == *key_arn
                } else if uri.key.contains("alias/") {
                    same_region
                } else {
                    same_region && key_arn.rsplit('/').next() == Some(&uri.key)
                }
            }
            (KeyUri::File(_), Self::File { .. }) => true,
            (KeyUri::Transit(_) | KeyUri::Pkcs11(_) | KeyUri::Aws(_) | KeyUri::File(_), _) => false,
        }
    }

    /// The same KMS key, whichever of its versions wrapped. (Destroying one destroys the other.)
    pub fn same_key(&self, other: &Self) -> bool {
        match (self, other) {
            (
                Self::Transit { engine_uuid, key, namespace, cluster_id, .. },
                Self::Transit { engine_uuid: u, key: k, namespace: n, cluster_id: c, .. },
            ) => (engine_uuid, key, namespace, cluster_id) == (u, k, n, c),
            (Self::Pkcs11 { .. }, Self::Pkcs11 { .. }) => self == other,
            (Self::Aws { key_arn, .. }, Self::Aws { key_arn: other, .. }) => key_arn == other,
            (Self::File { key_id, .. }, Self::File { key_id: other, .. }) => key_id == other,
            (Self::Recovery { recovery_id, .. }, Self::Recovery { recovery_id: other, .. }) => recovery_id == other,
            (Self::Foreign(this), Self::Foreign(other)) => this == other,
            _ => false,
        }
    }
}

/// One line for people, as in "Transit key vol1 (engine transit, cluster 5e…)".
impl fmt::Display for KeyIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Transit { engine, key, namespace, key_version, cluster_id, .. } => {
                write!(f, "Transit key {key} version {key_version} (engine {engine}, ")?;
                if !namespace.is_empty() {
                    write!(f, "namespace {namespace}, ")?;
                }
                write!(f, "cluster {cluster_id})")
            }
            Self::Pkcs11 { token_serial, token_model, token_label, key_id, key_label, .. } => write!(
                f,
                "token key {} with id {key_id} (token {} {token_serial}, {token_model})",
                key_label.0, token_label.0
            ),
            Self::Aws { key_arn, .. } => write!(f, "AWS KMS key {key_arn}"),
            Self::File { key_id, .. } => write!(f, "key file with id {key_id}"),
            Self::Recovery { recovery_id, threshold, shares, .. } => {
                write!(f, "recovery key {recovery_id}, any {threshold} of {shares} shares")
            }
            Self::Foreign(foreign) => write!(f, "key of a service that is not known here: {}", foreign.provider()),
        }
    }
}

/// Bytes from lower-case hex.
pub(super) fn bytes_of(hex: &str) -> Option<Vec<u8>> {
    let digit = |b: u8| char::from(b).to_digit(16).filter(|_| !b.is_ascii_uppercase());
    hex.as_bytes()
        .chunks(2)
        .map(|pair| match pair {
            [high, low] => u8::try_from(digit(*high)? * 16 + digit(*low)?).ok(),
            _ => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token_key(firmware: &str, label: &str, check: &str) -> KeyIdentity {
        KeyIdentity::Pkcs11 {
            token_serial: "0123".into(),
            token_manufacturer: "Maker".into(),
            token_model: "M 1".into(),
            token_label: Noted("fs".into()),
            token_firmware: Noted(firmware.into()),
            key_id: "01ff".into(),
            key_label: Noted(label.into()),
            check_value: check.into(),
            unique_id: String::new(),
        }
    }

    #[test]
    fn what_may_change_tells_no_key_from_another() {
        let key = token_key("2.6", "vol1", "aabbcc");
        assert_eq!(key, token_key("2.7", "renamed", "aabbcc"));
        assert!(key.same_key(&token_key("2.7", "renamed", "aabbcc")));
        assert!(!key.same_key(&token_key("2.6", "vol1", "aabbcd")));
        // But it is written down.
        let text = serde_json::to_string(&key).expect("text");
        assert!(text.contains(r#""provider":"pkcs11""#) && text.contains(r#""token_firmware":"2.6""#), "{text}");
        assert_eq!((key.name(), token_key("", "a b", "").name()), ("vol1".into(), "01ff".into()));
    }

    #[test]
    fn identities_name_their_key() {
        let token = token_key("2.6", "vol1", "aabbcc");
        let uri = token.uri().expect("a URI");
        assert_eq!(uri.to_string(), "pkcs11:serial=0123;manufacturer=Maker;model=M%201;id=%01%FF");
        for (text, means) in [
            ("pkcs11:token=fs;object=vol1", true),
            ("pkcs11:token=fs;id=%01%ff", true),
            ("pkcs11:token=fs;id=%01", false),
            ("pkcs11:token=other;object=vol1", false),
            ("pkcs11:serial=0123;object=vol2", false),
            ("hashivault://vol1", false),
        ] {
            assert_eq!(token.is_named_by(&text.parse().expect(text)), means, "{text}");
        }
        let arn = "arn:aws:kms:us-east-1:111122223333:key/12ab";
        let aws = KeyIdentity::Aws {
            key_arn: arn.into(),
            created: 1,
            origin: "AWS_KMS".into(),
            key_spec: "SYMMETRIC_DEFAULT".into(),
        };
        assert_eq!(aws.uri().expect("a URI").to_string(), format!("awskms:///{arn}?region=us-east-1"));
        assert_eq!(aws.name(), "12ab");
        for (text, means) in [
            ("awskms://12ab", true),
            ("awskms://12ac", false),
            ("awskms://12ab?region=eu-west-1", false),
            ("awskms://alias/any?region=us-east-1", true),
            ("awskms:///arn:aws:kms:us-east-1:111122223333:key/12ac", false),
        ] {
            assert_eq!(aws.is_named_by(&text.parse().expect(text)), means, "{text}");
        }
        // Not well-formed: no URI rather than another one.
        let KeyIdentity::Aws { created, origin, key_spec, .. } = aws else { unreachable!() };
        let odd = KeyIdentity::Aws { key_arn: "arn:aws:kms:x:1:key/../..?region=y".into(), created, origin, key_spec };
        assert!(odd.uri().is_none());
    }

    #[test]
    fn known_services_are_not_taken_for_foreign_ones() {
        for text in [
            r#"{"provider":"pkcs11","key_id":"01"}"#,
            r#"{"provider":"awskms","key_arn":"x","created":1,"origin":"AWS_KMS","key_spec":"S","more":1}"#,
        ] {
            assert!(serde_json::from_str::<KeyIdentity>(text).is_err(), "{text}");
        }
        let foreign: KeyIdentity = serde_json::from_str(r#"{"provider":"kmip","id":"1"}"#).expect("kept");
        assert!(matches!(&foreign, KeyIdentity::Foreign(foreign) if foreign.provider() == "kmip"));
    }
}
