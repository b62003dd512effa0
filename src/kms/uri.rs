//! Key URIs: the gocloud.dev schemes and `file://`, parsed strictly.
//!
//! A URI says which key and nothing else. Addresses and credentials are the host's business and come from the
//! provider's own environment; a URI that seems to carry a credential is refused, and no message quotes it. Read by
//! the command line and by whoever reads a pin; [`super::source`] turns a URI into a provider. Every build knows every
//! scheme, whichever providers are in it, so that a pin or a message means the same everywhere.

mod aws;
mod pkcs11;

use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

pub use aws::AwsKey;
pub use pkcs11::TokenKey;

/// Which key, without address or credentials: those come from the provider's own environment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum KeyUri {
    /// `hashivault://KEY?engine=transit`
    Transit(TransitKey),
    /// `pkcs11:token=…;object=…`
    Pkcs11(Box<TokenKey>),
    /// `awskms:///ARN?region=…`
    Aws(AwsKey),
    /// `file:///path`, an absolute path.
    File(PathBuf),
}

/// A key of a Transit engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TransitKey {
    /// Path of the engine, without slashes at its ends.
    pub engine: String,
    /// Name of the key.
    pub key: String,
    /// Which of this host's servers, if not the one of `VAULT_ADDR`: a name whose address and credentials the environment has
    /// (docs/KMS.md).
    pub server: Option<String>,
}

/// Text that is not a key URI, or not one that this build accepts. The line never holds a credential.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadUri(String);

const DEFAULT_ENGINE: &str = "transit";

/// Schemes of services that the design foresees.
const NOT_YET: &[&str] = &["gcpkms", "azurekeyvault", "kmip"];

/// What there is, for messages.
const SCHEMES: &str = "hashivault://, awskms://, pkcs11: or file://";

/// Parts of a parameter's name that mark its value as a credential. `pin` is RFC 7512's.
const CREDENTIALS: &[&str] =
    &["token", "secret", "passw", "passphrase", "pwd", "pin", "cred", "auth", "apikey", "api-key", "api_key", "bearer"];

fn bad<T>(message: impl Into<String>) -> Result<T, BadUri> {
    Err(BadUri(message.into()))
}

impl FromStr for KeyUri {
    type Err = BadUri;

    fn from_str(text: &str) -> Result<Self, BadUri> {
        let Some((scheme, rest)) = text.split_once(':') else {
            return bad("a key URI begins with its scheme, as in hashivault://KEY or file:///PATH");
        };
        if scheme.is_empty() || scheme.len() > 32 || !scheme.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') {
            return bad("a key URI begins with its scheme, as in hashivault://KEY or file:///PATH");
        }
        // `token=` is the name of a token there, and its own parser knows what a PIN is called.
        if scheme == "pkcs11" {
            return pkcs11::parse(rest).map(|key| Self::Pkcs11(Box::new(key)));
        }
        refuse_credentials(rest)?;
        match scheme {
            "hashivault" => transit(rest).map(Self::Transit),
            "awskms" => aws::parse(rest).map(Self::Aws),
            "file" => file(rest).map(Self::File),
            _ if NOT_YET.contains(&scheme) => {
                bad(format!("`{scheme}:` is a known key service, but it is not built in yet: use {SCHEMES}"))
            }
            _ => bad(format!("unknown key URI scheme `{scheme}`: use {SCHEMES}")),
        }
    }
}

/// Looks at a URI of any scheme, known or not, before anything in it may be quoted.
fn refuse_credentials(rest: &str) -> Result<(), BadUri> {
    if let Some(after) = rest.strip_prefix("//") {
        let authority = after.split(['/', '?', '#']).next().unwrap_or_default();
        if authority.contains('@') || authority.to_ascii_lowercase().contains("%40") {
            return bad("the key URI carries user information before `@` (not shown): credentials come from the \
                 environment, never from a URI");
        }
    }
    // `;` is in use for it, too. In the path of a key file this may refuse too much; such a
    // path can be written with %26 and %3B.
    for parameter in rest.split(['?', '&', ';']).skip(1) {
        let name = parameter.split('=').next().unwrap_or_default();
        // An encoded name is compared decoded, so that encoding hides nothing.
        let name = decode(name).map(|bytes| String::from_utf8_lossy(&bytes).to_ascii_lowercase()).unwrap_or_default();
        if let Some(word) = CREDENTIALS.iter().find(|word| name.contains(**word)) {
            return bad(format!(
                "the key URI carries a credential in a parameter like `{word}` (value not shown): credentials \
                 come from the environment, never from a URI"
            ));
        }
    }
    Ok(())
}

fn transit(rest: &str) -> Result<TransitKey, BadUri> {
    let Some(rest) = rest.strip_prefix("//") else {
        return bad("a Transit key is written hashivault://KEY?engine=transit");
    };
    if rest.contains('#') {
        return bad("a hashivault:// URI has no `#` part");
    }
    let (key, query) = match rest.split_once('?') {
        Some((key, query)) => (key, Some(query)),
        None => (rest, None),
    };
    let key = decode_text(key, "the key's name")?;
    check_component(&key, "the key's name")?;
    let (mut engine, mut server) = (None, None);
    for parameter in query.into_iter().flat_map(|query| query.split('&')) {
        let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        if name == "server" && server.is_none() {
            server = Some(server_name(value)?);
            continue;
        }
        if name != "engine" && name != "server" {
            return bad(format!(
                "unknown parameter {} in a hashivault:// URI: only `engine` and `server` are known",
                shown(name)
            ));
        }
        if engine.is_some() || name == "server" {
            return bad(format!("the parameter `{name}` is given twice"));
        }
        let value = decode_text(value, "the engine's path")?;
        for component in value.split('/') {
            check_component(component, "the engine's path")?;
        }
        engine = Some(value);
    }
    Ok(TransitKey { engine: engine.unwrap_or_else(|| DEFAULT_ENGINE.to_owned()), key, server })
}

/// A server's name on this host: part of names of variables, so nothing that two of them could be told apart by case.
fn server_name(text: &str) -> Result<String, BadUri> {
    let good = (1..=32).contains(&text.len())
        && text.starts_with(|c: char| c.is_ascii_lowercase())
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    if good {
        Ok(text.to_owned())
    } else {
        bad("`server` is a name of small letters and digits, as in server=dr: never an address")
    }
}

fn file(rest: &str) -> Result<PathBuf, BadUri> {
    let Some(rest) = rest.strip_prefix("//") else {
        return bad("a key file is written file:///PATH, with three slashes");
    };
    if !rest.starts_with('/') {
        return bad("a file:// URI names no host, and its path is absolute: file:///PATH");
    }
    if rest.contains(['?', '#']) {
        return bad("a file:// URI has no parameters: write `?` as %3F and `#` as %23 if the path holds them");
    }
    let Some(bytes) = decode(rest) else {
        return bad("a `%` in a key URI is followed by two hex digits");
    };
    if bytes.iter().any(|b| b.is_ascii_control()) {
        return bad("the key file's path holds a control character");
    }
    if bytes[1..].split(|b| *b == b'/').any(|name| matches!(name, b"" | b"." | b"..")) {
        return bad("the key file's path has an empty, `.` or `..` component");
    }
    Ok(PathBuf::from(OsString::from_vec(bytes)))
}

/// One name of a path at the server. Vault's own rule: letters, digits, `_`, and inside also `-` and `.`.
fn check_component(name: &str, what: &str) -> Result<(), BadUri> {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let bytes = name.as_bytes();
    let (Some(first), Some(last)) = (bytes.first(), bytes.last()) else {
        return bad(format!("{what} has an empty part"));
    };
    if bytes.len() > 128 {
        return bad(format!("{what} has a part of more than 128 characters"));
    }
    if !bytes.iter().all(|b| word(*b) || matches!(b, b'-' | b'.')) {
        return bad(format!("{what} may hold only letters, digits, `.`, `_` and `-`"));
    }
    if !word(*first) || !word(*last) {
        return bad(format!("{what} must begin and end with a letter, a digit or `_`"));
    }
    if name.contains("..") {
        return bad(format!("{what} holds `..`"));
    }
    Ok(())
}

fn decode(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte == b'%' {
            let (high, low) = (rest.next()?, rest.next()?);
            let digit = |b: u8| char::from(b).to_digit(16);
            bytes.push((digit(high)? * 16 + digit(low)?) as u8);
        } else {
            bytes.push(byte);
        }
    }
    Some(bytes)
}

fn decode_text(text: &str, what: &str) -> Result<String, BadUri> {
    let Some(bytes) = decode(text) else {
        return bad("a `%` in a key URI is followed by two hex digits");
    };
    String::from_utf8(bytes).or_else(|_| bad(format!("{what} is not UTF-8 once decoded")))
}

/// A parameter's name for a message, if it looks like a name at all.
fn shown(name: &str) -> String {
    let plain = !name.is_empty()
        && name.len() <= 32
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'));
    if plain { format!("`{name}`") } else { "(not shown)".to_owned() }
}

fn write_path(path: &Path, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    for byte in path.as_os_str().as_bytes() {
        match byte {
            b'/' | b'-' | b'.' | b'_' | b'~' => write!(f, "{}", char::from(*byte))?,
            b if b.is_ascii_alphanumeric() => write!(f, "{}", char::from(*b))?,
            b => write!(f, "%{b:02X}")?,
        }
    }
    Ok(())
}

impl fmt::Display for KeyUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Transit(TransitKey { engine, key, server }) => {
                write!(f, "hashivault://{key}?engine={engine}")?;
                server.as_ref().map_or(Ok(()), |server| write!(f, "&server={server}"))
            }
            Self::Pkcs11(key) => key.fmt(f),
            Self::Aws(key) => key.fmt(f),
            Self::File(path) => {
                f.write_str("file://")?;
                write_path(path, f)
            }
        }
    }
}

impl TryFrom<String> for KeyUri {
    type Error = BadUri;
    fn try_from(text: String) -> Result<Self, BadUri> {
        text.parse()
    }
}

impl From<KeyUri> for String {
    fn from(uri: KeyUri) -> Self {
        uri.to_string()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn line(text: &str) -> String {
        text.parse::<KeyUri>().expect_err(text).to_string()
    }

    #[test]
    fn good_uris_parse_and_print() {
        for (text, engine, key) in [
            ("hashivault://vol1", "transit", "vol1"),
            ("hashivault://vol1?engine=transit", "transit", "vol1"),
            ("hashivault://vol1?server=dr2", "transit", "vol1"),
            ("hashivault://vol1?server=dr2&engine=a/b", "a/b", "vol1"),
            ("hashivault://Vol_1.a-b?engine=team-a/transit.2", "team-a/transit.2", "Vol_1.a-b"),
            ("hashivault://vol%31?engine=team%2Ftransit", "team/transit", "vol1"),
        ] {
            let server = text.contains("server").then(|| "dr2".to_owned());
            let more = if server.is_some() { "&server=dr2" } else { "" };
            let uri: KeyUri = text.parse().expect(text);
            assert_eq!(uri, KeyUri::Transit(TransitKey { engine: engine.into(), key: key.into(), server }), "{text}");
            assert_eq!(uri.to_string(), format!("hashivault://{key}?engine={engine}{more}"));
        }
        let paths = [("file:///etc/k", "/etc/k"), ("file:///a%20b/%C3%A9@x", "/a b/é@x"), ("file:///é", "/é")];
        for (text, path) in paths {
            assert_eq!(text.parse::<KeyUri>().expect(text), KeyUri::File(path.into()), "{text}");
        }
        assert_eq!(KeyUri::File("/a b?#%".into()).to_string(), "file:///a%20b%3F%23%25");
    }

    #[test]
    fn serde_goes_through_the_text() {
        let uri: KeyUri = serde_json::from_str(r#""hashivault://vol1""#).expect("valid");
        assert_eq!(serde_json::to_string(&uri).expect("text"), r#""hashivault://vol1?engine=transit""#);
        assert!(serde_json::from_str::<KeyUri>(r#""https://vol1""#).is_err());
    }

    #[test]
    fn bad_uris_are_refused_with_a_reason() {
        for (text, reason) in [
            ("hashivault://k?server=", "never an address"),
            ("hashivault://k?server=Dr", "never an address"),
            ("hashivault://k?server=bao.example", "never an address"),
            ("hashivault://k?server=a_b", "never an address"),
            ("hashivault://k?server=a&server=b", "`server` is given twice"),
            ("", "begins with its scheme"),
            ("vol1", "begins with its scheme"),
            ("://vol1", "begins with its scheme"),
            ("https://kms.example/vol1", "unknown key URI scheme `https`"),
            ("openbao://vol1", "unknown key URI scheme `openbao`"),
            ("HASHIVAULT://vol1", "unknown key URI scheme `HASHIVAULT`"),
            ("vault://vol1", "unknown key URI scheme `vault`"),
            ("gcpkms://projects/p", "`gcpkms:` is a known key service, but it is not built in yet"),
            ("azurekeyvault://v/keys/k", "`azurekeyvault:` is a known"),
            ("kmip://h/1", "`kmip:` is a known"),
            ("hashivault:vol1", "written hashivault://KEY"),
            ("hashivault://", "empty part"),
            ("hashivault:///vol1", "only letters"),
            ("hashivault://a/b", "only letters"),
            ("hashivault://vol1/", "only letters"),
            ("hashivault://a%2Fb", "only letters"),
            ("hashivault://a b", "only letters"),
            ("hashivault://kms.example:8200", "only letters"),
            ("hashivault://é", "only letters"),
            ("hashivault://a%00b", "only letters"),
            ("hashivault://..", "begin and end"),
            ("hashivault://.", "begin and end"),
            ("hashivault://-a", "begin and end"),
            ("hashivault://a..b", "`..`"),
            ("hashivault://%", "two hex digits"),
            ("hashivault://a%2", "two hex digits"),
            ("hashivault://a%zz", "two hex digits"),
            ("hashivault://a%ff", "not UTF-8"),
            ("hashivault://vol1#x", "no `#` part"),
            ("hashivault://vol1?", "unknown parameter (not shown)"),
            ("hashivault://vol1?engine", "empty part"),
            ("hashivault://vol1?engine=", "empty part"),
            ("hashivault://vol1?engine=/transit", "empty part"),
            ("hashivault://vol1?engine=transit/", "empty part"),
            ("hashivault://vol1?engine=a//b", "empty part"),
            ("hashivault://vol1?engine=a/../b", "begin and end"),
            ("hashivault://vol1?engine=a%2F..%2Fsys", "begin and end"),
            ("hashivault://vol1?engine=a?b", "only letters"),
            ("hashivault://vol1?engine=a&engine=b", "twice"),
            ("hashivault://vol1?engine=a&", "unknown parameter (not shown)"),
            ("hashivault://vol1?Engine=a", "unknown parameter `Engine`"),
            ("hashivault://vol1?key_version=1", "unknown parameter `key_version`"),
            ("file:/etc/k", "three slashes"),
            ("file:etc/k", "three slashes"),
            ("file://etc/k", "names no host"),
            ("file://localhost/etc/k", "names no host"),
            ("file://", "names no host"),
            ("file:///", "empty, `.` or `..`"),
            ("file:///etc/", "empty, `.` or `..`"),
            ("file:///etc//k", "empty, `.` or `..`"),
            ("file:///etc/../k", "empty, `.` or `..`"),
            ("file:///etc/%2e%2e/k", "empty, `.` or `..`"),
            ("file:///etc/k?x=1", "no parameters"),
            ("file:///etc/k#x", "no parameters"),
            ("file:///a%00b", "control character"),
            ("file:///a%0Ab", "control character"),
            ("file:///a%", "two hex digits"),
        ] {
            let line = line(text);
            assert!(line.contains(reason), "{text}: {line}");
            assert!(!line.contains('\n'), "{text}");
        }
        let long = format!("hashivault://{}", "a".repeat(129));
        assert!(line(&long).contains("more than 128"));
    }

    #[test]
    fn credentials_are_refused_and_not_shown() {
        for text in [
            "hashivault://hvs.S3CRET@vol1",
            "hashivault://user:S3CRET@vol1",
            "hashivault://user%3AS3CRET%40vol1",
            "hashivault://vol1?token=S3CRET",
            "hashivault://vol1?Token=S3CRET",
            "hashivault://vol1?%74oken=S3CRET",
            "hashivault://vol1?vault_token=S3CRET",
            "hashivault://vol1?engine=transit&secret_id=S3CRET",
            "hashivault://vol1?password=S3CRET",
            "file:///etc/k?passphrase=S3CRET",
            "awskms:///k?aws_secret_access_key=S3CRET",
            "pkcs11:object=k;pin-value=S3CRET",
            "pkcs11:object=k?pin-value=S3CRET",
            "https://user:S3CRET@kms.example/",
            "kmip://u:S3CRET@h/1",
        ] {
            let line = line(text);
            assert!(!line.contains("S3CRET"), "{line}");
            assert!(line.contains("not shown"), "{text}: {line}");
        }
        // Without a sign of what it is, it is at least not quoted.
        for text in
            ["S3CRET", "hashivault://S3CRET:x", "hashivault://vol1?engine=S3CRET%", "hashivault://vol1?S3CRET/=1"]
        {
            assert!(!line(text).contains("S3CRET"), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_path_survives_the_round_trip(names in proptest::collection::vec("[^/\\x00-\\x1f\\x7f]{1,8}", 1..4)) {
            prop_assume!(names.iter().all(|name| name != "." && name != ".."));
            let uri = KeyUri::File(PathBuf::from(format!("/{}", names.join("/"))));
            prop_assert_eq!(uri.to_string().parse::<KeyUri>(), Ok(uri));
        }

        #[test]
        fn no_text_panics(text in "(hashivault|file|pkcs11|awskms)?(:|://|:///)?[ -~é%]{0,40}") {
            if let Ok(uri) = text.parse::<KeyUri>() {
                prop_assert_eq!(uri.to_string().parse::<KeyUri>(), Ok(uri));
            }
        }
    }
}
