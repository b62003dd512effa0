//! `pkcs11:` URIs (RFC 7512), as far as they name a key on a token.
//!
//! What belongs to this host (the module, the PIN, the slot) is refused here with the place where it belongs, so that a
//! volume or a pin never carries it.

use std::fmt;

use super::{BadUri, bad, decode, shown};

/// A secret key on a PKCS #11 token. At least one of the token's attributes and one of the key's is given; all that are
/// given must agree.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenKey {
    /// `token`: the token's label.
    pub token: Option<String>,
    /// `serial`: the token's serial number.
    pub serial: Option<String>,
    /// `manufacturer` of the token.
    pub manufacturer: Option<String>,
    /// `model` of the token.
    pub model: Option<String>,
    /// `object`: the key's label (`CKA_LABEL`).
    pub object: Option<String>,
    /// `id`: the key's `CKA_ID`.
    pub id: Option<Vec<u8>>,
}

/// Longest values: `CK_TOKEN_INFO`'s fields are of fixed size, labels and ids of keys are not.
const LONGEST: usize = 255;

/// What comes after `pkcs11:`.
pub(super) fn parse(rest: &str) -> Result<TokenKey, BadUri> {
    if rest.contains('#') {
        return bad("a pkcs11: URI has no `#` part");
    }
    let (path, query) = match rest.split_once('?') {
        Some((path, query)) => (path, Some(query)),
        None => (rest, None),
    };
    // No attribute of a query says which key.
    if let Some(query) = query {
        return misplaced(query.split(['=', '&']).next().unwrap_or_default());
    }
    let mut key = TokenKey::default();
    let mut secret_key = false;
    for attribute in path.split(';') {
        let (name, value) = attribute.split_once('=').unwrap_or((attribute, ""));
        let again = match name {
            "token" => key.token.replace(text(name, value)?).is_some(),
            "serial" => key.serial.replace(text(name, value)?).is_some(),
            "manufacturer" => key.manufacturer.replace(text(name, value)?).is_some(),
            "model" => key.model.replace(text(name, value)?).is_some(),
            "object" => key.object.replace(text(name, value)?).is_some(),
            "id" => key.id.replace(bytes(name, value)?).is_some(),
            "type" if value == "secret-key" => std::mem::replace(&mut secret_key, true),
            "type" => {
                return bad("the key in a pkcs11: URI is a secret key: leave `type` out or write type=secret-key");
            }
            _ => return misplaced(name),
        };
        if again {
            return bad(format!("the attribute `{name}` is given twice"));
        }
    }
    if key.token.is_none() && key.serial.is_none() {
        return bad("a pkcs11: URI says which token: add token=LABEL or serial=NUMBER");
    }
    if key.object.is_none() && key.id.is_none() {
        return bad("a pkcs11: URI says which key on the token: add object=LABEL or id=%01%02…");
    }
    Ok(key)
}

/// An attribute that is no part of a key's name. Its value is never quoted.
fn misplaced(name: &str) -> Result<TokenKey, BadUri> {
    match name {
        "pin-value" | "pin-source" => bad(format!(
            "the pkcs11: URI carries `{name}` (value not shown): the PIN belongs into a file on this host that \
             LETHEFS_PKCS11_PIN_FILE names, never into a URI"
        )),
        "module-path" | "module-name" => bad(format!(
            "the pkcs11: URI carries `{name}` (value not shown): the module belongs into this host's environment, as in \
             LETHEFS_PKCS11_MODULE=/usr/lib/softhsm/libsofthsm2.so"
        )),
        _ => bad(format!(
            "unknown attribute {} in a pkcs11: URI: known are token, serial, manufacturer, model, object, id and \
             type=secret-key",
            shown(name)
        )),
    }
}

fn bytes(name: &str, value: &str) -> Result<Vec<u8>, BadUri> {
    let Some(bytes) = decode(value) else {
        return bad("a `%` in a key URI is followed by two hex digits");
    };
    match bytes.len() {
        0 => bad(format!("the attribute `{name}` of a pkcs11: URI is empty")),
        1..=LONGEST => Ok(bytes),
        _ => bad(format!("the attribute `{name}` of a pkcs11: URI is longer than {LONGEST} bytes")),
    }
}

fn text(name: &str, value: &str) -> Result<String, BadUri> {
    let Ok(text) = String::from_utf8(bytes(name, value)?) else {
        return bad(format!("the attribute `{name}` of a pkcs11: URI is not UTF-8 once decoded"));
    };
    if text.chars().any(char::is_control) {
        return bad(format!("the attribute `{name}` of a pkcs11: URI holds a control character"));
    }
    // Tokens pad their fields with blanks, which are not told apart from such.
    if text.ends_with(' ') {
        return bad(format!("the attribute `{name}` of a pkcs11: URI ends with a blank"));
    }
    Ok(text)
}

impl fmt::Display for TokenKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("pkcs11:")?;
        let mut first = true;
        for (name, value) in [
            ("token", &self.token),
            ("serial", &self.serial),
            ("manufacturer", &self.manufacturer),
            ("model", &self.model),
            ("object", &self.object),
        ] {
            let Some(value) = value else { continue };
            write!(f, "{}{name}=", if first { "" } else { ";" })?;
            first = false;
            for byte in value.bytes() {
                match byte {
                    b'-' | b'.' | b'_' | b'~' => write!(f, "{}", char::from(byte))?,
                    b if b.is_ascii_alphanumeric() => write!(f, "{}", char::from(b))?,
                    b => write!(f, "%{b:02X}")?,
                }
            }
        }
        if let Some(id) = &self.id {
            write!(f, "{}id=", if first { "" } else { ";" })?;
            // As RFC 7512 wants it: every byte of it encoded.
            for byte in id {
                write!(f, "%{byte:02X}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::KeyUri;
    use super::*;

    #[test]
    fn good_uris_parse_and_print() {
        for (text, printed) in [
            ("pkcs11:token=fs;object=vol1", "pkcs11:token=fs;object=vol1"),
            ("pkcs11:object=vol1;type=secret-key;token=fs", "pkcs11:token=fs;object=vol1"),
            ("pkcs11:token=My%20Token%3B;id=%01a%ff", "pkcs11:token=My%20Token%3B;id=%01%61%FF"),
            (
                "pkcs11:model=SoftHSM%20v2;manufacturer=SoftHSM%20project;serial=0123;object=k;id=%01",
                "pkcs11:serial=0123;manufacturer=SoftHSM%20project;model=SoftHSM%20v2;object=k;id=%01",
            ),
        ] {
            let uri: KeyUri = text.parse().expect(text);
            assert_eq!(uri.to_string(), printed);
            assert_eq!(printed.parse::<KeyUri>(), Ok(uri));
        }
    }

    #[test]
    fn bad_uris_are_refused_and_no_value_is_shown() {
        for (text, reason) in [
            ("pkcs11:", "unknown attribute"),
            ("pkcs11:object=k", "which token"),
            ("pkcs11:token=t", "which key"),
            ("pkcs11:token=t;object=", "is empty"),
            ("pkcs11:token=t;object=k;", "unknown attribute (not shown)"),
            ("pkcs11:token=t;object=k;object=j", "twice"),
            ("pkcs11:token=t;object=k;type=secret-key;type=secret-key", "twice"),
            ("pkcs11:token=t;object=k;type=private", "type=secret-key"),
            ("pkcs11:token=t;object=k;slot-id=1", "unknown attribute `slot-id`"),
            ("pkcs11:token=t;object=k;library-version=3", "unknown attribute `library-version`"),
            ("pkcs11:token=t;object=k;x-vendor=S3CRET", "unknown attribute `x-vendor`"),
            ("pkcs11:token=t;object=k?max-sessions=S3CRET", "unknown attribute `max-sessions`"),
            ("pkcs11:token=t;object=k#S3CRET", "no `#` part"),
            ("pkcs11:token=t;object=%", "two hex digits"),
            ("pkcs11:token=t;object=%ff", "not UTF-8"),
            ("pkcs11:token=t;object=a%0a", "control character"),
            ("pkcs11:token=t%20;object=a", "ends with a blank"),
            ("pkcs11:token=t;object=k?pin-value=S3CRET", "LETHEFS_PKCS11_PIN_FILE"),
            ("pkcs11:token=t;object=k;pin-value=S3CRET", "LETHEFS_PKCS11_PIN_FILE"),
            ("pkcs11:token=t;object=k?pin-source=file:S3CRET", "LETHEFS_PKCS11_PIN_FILE"),
            ("pkcs11:token=t;object=k?%70in-value=S3CRET", "unknown attribute (not shown)"),
            ("pkcs11:token=t;object=k?module-path=/S3CRET.so", "LETHEFS_PKCS11_MODULE"),
            ("pkcs11:token=t;object=k?module-name=S3CRET", "LETHEFS_PKCS11_MODULE"),
        ] {
            let line = text.parse::<KeyUri>().expect_err(text).to_string();
            assert!(line.contains(reason), "{text}: {line}");
            assert!(!line.contains("S3CRET") && !line.contains('\n'), "{line}");
        }
        assert!(format!("pkcs11:token=t;object={}", "a".repeat(256)).parse::<KeyUri>().is_err());
    }

    proptest! {
        #[test]
        fn any_id_and_label_survive_the_round_trip(
            label in "[^\\x00-\\x1f\\x7f-\\u{9f}]{0,10}[^\\x00-\\x20\\x7f-\\u{9f}]", id in proptest::collection::vec(any::<u8>(), 1..20)
        ) {
            let key = TokenKey { token: Some(label.clone()), object: Some(label), id: Some(id), ..TokenKey::default() };
            prop_assert_eq!(key.to_string().parse::<KeyUri>(), Ok(KeyUri::Pkcs11(Box::new(key))));
        }
    }
}
