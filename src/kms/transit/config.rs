//! Where the Transit server is and how to log in to it: this host's environment, never a URI or a volume.
//!
//! The variables are Vault's own (`VAULT_ADDR`, `VAULT_TOKEN`, …) and `LETHEFS_APPROLE_*` (docs/KMS.md). Nothing is
//! contacted and no file is opened here; [`super::client`] does that at the first call.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use reqwest::header::HeaderValue;
use url::Url;
use zeroize::Zeroizing;

use crate::kms::{Failure, KmsError};

/// A token, role id or secret id: wiped on drop, and not printable.
pub struct Secret(Zeroizing<String>);

impl Secret {
    /// Takes a secret, without the white space that files and shells put around it.
    ///
    /// # Errors
    /// [`Failure::Config`] naming `what` if it is empty or not printable ASCII.
    pub fn new(text: Zeroizing<String>, what: &str) -> Result<Self, KmsError> {
        let trimmed = text.trim();
        if trimmed.is_empty() {
            return Err(config(format!("{what} is empty")));
        }
        if trimmed.len() > MAX_SECRET || !trimmed.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(config(format!("{what} does not hold a token or id: expected one line of printable ASCII")));
        }
        Ok(if trimmed.len() == text.len() { Self(text) } else { Self(Zeroizing::new(trimmed.to_owned())) })
    }

    /// Reads a secret from a file.
    ///
    /// # Errors
    /// [`Failure::Config`] if the file cannot be read or does not hold one.
    pub fn read(path: &Path, what: &str) -> Result<Self, KmsError> {
        let cannot = |error: std::io::Error| {
            config(format!("cannot read {what} from {}: {error}", path.display())).with_source(error)
        };
        let file = File::open(path).map_err(cannot)?;
        let meta = file.metadata().map_err(cannot)?;
        if meta.mode() & 0o077 != 0 {
            tracing::warn!(path = %path.display(), "others can read {what}: chmod 600 the file");
        }
        // One buffer that never grows, so that no copy is left behind.
        let mut text = Zeroizing::new(Vec::with_capacity(MAX_SECRET + 64));
        file.take(MAX_SECRET as u64 + 32).read_to_end(&mut text).map_err(cannot)?;
        let name = format!("{what} in {}", path.display());
        match std::str::from_utf8(&text) {
            Ok(text) => Self::new(Zeroizing::new(text.to_owned()), &name),
            Err(_) => Err(config(format!("{name} is not text"))),
        }
    }

    /// The secret itself, for the one request that needs it.
    pub(super) fn expose(&self) -> &str {
        &self.0
    }

    /// Equality, to see whether a token file has been renewed.
    pub(super) fn same_as(&self, other: &Self) -> bool {
        use subtle::ConstantTimeEq as _;
        self.0.as_bytes().ct_eq(other.0.as_bytes()).into()
    }
}

/// Tokens are below 200 bytes; JWTs, which some set-ups use, reach a few thousand.
const MAX_SECRET: usize = 8192;

/// How to log in.
pub enum Credentials {
    /// `VAULT_TOKEN`.
    Token(Secret),
    /// `VAULT_TOKEN_FILE` or `~/.vault-token`: read again when the token in it stops working.
    TokenFile(PathBuf),
    /// An AppRole, logged in with again when its token stops working.
    AppRole {
        /// Where the auth method is mounted, `approle` by default.
        mount: String,
        /// File with the role id.
        role_id_file: PathBuf,
        /// File with the secret id.
        secret_id_file: PathBuf,
    },
}

/// Everything the client needs to know.
pub struct Config {
    /// `https` addresses, in the order in which they are tried.
    pub addresses: Vec<Url>,
    /// How to log in.
    pub credentials: Credentials,
    /// PEM file with the only roots to trust; `None`: the system's.
    pub ca_file: Option<PathBuf>,
    /// Namespace, empty for the root namespace.
    pub namespace: String,
    /// Limit for a connection with its TLS handshake.
    pub connect_timeout: Duration,
    /// Limit for one call to one address.
    pub timeout: Duration,
    /// With several addresses: how long they are asked in turn while none leads, as in an election.
    pub patience: Duration,
}

fn no_credentials() -> KmsError {
    config("no credentials for the key service: set VAULT_TOKEN, VAULT_TOKEN_FILE or LETHEFS_APPROLE_*_FILE")
}

pub(super) fn config(message: impl Into<String>) -> KmsError {
    KmsError::new(Failure::Config, message)
}

impl Config {
    /// From this process's environment: of the server that a URI names, else of the one of `VAULT_ADDR`.
    ///
    /// # Errors
    /// [`Failure::Config`] with the variable that is missing or wrong.
    pub fn from_env(server: Option<&str>) -> Result<Self, KmsError> {
        Self::of_server(server, |name| std::env::var_os(name))
    }

    /// From any set of variables. Those of a named server have `__NAME` behind, and no file in the home directory stands in for them:
    /// what is for one server never goes to another.
    ///
    /// # Errors
    /// As [`Config::from_env`].
    pub fn of_server(server: Option<&str>, lookup: impl Fn(&str) -> Option<OsString>) -> Result<Self, KmsError> {
        let Some(server) = server else { return Self::from_lookup(lookup) };
        let behind = server.to_ascii_uppercase();
        let of_it = |name: &str| if name == "HOME" { None } else { lookup(&format!("{name}__{behind}")) };
        Self::from_lookup(of_it).map_err(|mut error| {
            error.message.push_str(&format!(
                "; for server={server} each variable has __{behind} behind, as in VAULT_ADDR__{behind}"
            ));
            error
        })
    }

    /// From any set of variables.
    ///
    /// # Errors
    /// As [`Config::from_env`].
    pub fn from_lookup(lookup: impl Fn(&str) -> Option<OsString>) -> Result<Self, KmsError> {
        let variable = |name: &str| lookup(name).filter(|value| !value.is_empty());
        let text = |name: &str| match variable(name).map(OsString::into_string) {
            None => Ok(None),
            Some(Ok(value)) => Ok(Some(Zeroizing::new(value))),
            Some(Err(_)) => Err(config(format!("{name} is not UTF-8"))),
        };
        let addresses = match text("VAULT_ADDR")? {
            Some(list) => list.split(',').map(|address| parse_address(address.trim())).collect::<Result<_, _>>()?,
            None => {
                return Err(config(
                    "VAULT_ADDR is not set: set it to the server's address, as in https://kms.example:8200",
                ));
            }
        };
        let path = |name: &str| variable(name).map(PathBuf::from);
        let approle = (path("LETHEFS_APPROLE_ROLE_ID_FILE"), path("LETHEFS_APPROLE_SECRET_ID_FILE"));
        // A token that somebody has just exported is meant for what comes next, such as an erase with the
        // administrator's rights in a shell that has the mount's role configured.
        let credentials = match (text("VAULT_TOKEN")?, approle) {
            (Some(token), _) => Credentials::Token(Secret::new(token, "VAULT_TOKEN")?),
            (None, (Some(role_id_file), Some(secret_id_file))) => {
                let mount =
                    text("LETHEFS_APPROLE_PATH")?.map_or_else(|| "approle".to_owned(), |mount| mount.to_string());
                check_path(&mount, "LETHEFS_APPROLE_PATH")?;
                Credentials::AppRole { mount, role_id_file, secret_id_file }
            }
            (None, (Some(_), None)) => {
                return Err(config(
                    "LETHEFS_APPROLE_ROLE_ID_FILE is set, but LETHEFS_APPROLE_SECRET_ID_FILE is \
                     not: set both",
                ));
            }
            (None, (None, Some(_))) => {
                return Err(config(
                    "LETHEFS_APPROLE_SECRET_ID_FILE is set, but LETHEFS_APPROLE_ROLE_ID_FILE is \
                     not: set both",
                ));
            }
            (None, (None, None)) => Credentials::TokenFile(
                path("VAULT_TOKEN_FILE")
                    .or_else(|| path("HOME").map(|home| home.join(".vault-token")))
                    .ok_or_else(no_credentials)?,
            ),
        };
        let namespace = match text("VAULT_NAMESPACE")? {
            Some(namespace) => {
                let namespace = namespace.trim_matches('/').to_owned();
                if !namespace.is_empty() {
                    check_path(&namespace, "VAULT_NAMESPACE")?;
                }
                namespace
            }
            None => String::new(),
        };
        Ok(Self {
            addresses,
            credentials,
            ca_file: path("VAULT_CACERT"),
            namespace,
            connect_timeout: Duration::from_secs(3),
            timeout: Duration::from_secs(10),
            patience: Duration::from_secs(15),
        })
    }

    /// The namespace as a header, if there is one.
    pub(super) fn namespace_header(&self) -> Option<HeaderValue> {
        Some(&self.namespace).filter(|n| !n.is_empty()).and_then(|n| HeaderValue::from_str(n).ok())
    }
}

/// One address of `VAULT_ADDR`. Messages show it only once it is known to hold no credential.
fn parse_address(text: &str) -> Result<Url, KmsError> {
    let Ok(mut url) = Url::parse(text) else {
        return Err(config(
            "VAULT_ADDR holds something that is not a URL (not shown): write it as in https://kms.example:8200",
        ));
    };
    if !url.username().is_empty() || url.password().is_some() || url.query().is_some() || url.fragment().is_some() {
        return Err(config(
            "VAULT_ADDR carries more than an address (not shown): write it as in https://kms.example:8200",
        ));
    }
    if url.scheme() != "https" {
        return Err(config(format!(
            "VAULT_ADDR names {url}, but keys travel over https only: give the server a certificate and write https://"
        )));
    }
    if url.host_str().is_none_or(str::is_empty) {
        return Err(config("VAULT_ADDR names no host: write it as in https://kms.example:8200"));
    }
    let path = url.path().trim_end_matches('/').to_owned();
    url.set_path(&path);
    Ok(url)
}

fn check_path(path: &str, variable: &str) -> Result<(), KmsError> {
    let good = |name: &str| {
        !name.is_empty()
            && !name.starts_with('.')
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
    };
    if path.split('/').all(good) {
        return Ok(());
    }
    Err(config(format!("{variable} is not a path of letters, digits, `.`, `_`, `-` and `/`")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(variables: &[(&str, &str)]) -> Result<Config, KmsError> {
        Config::from_lookup(|name| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| value.into()))
    }

    fn line(variables: &[(&str, &str)]) -> String {
        let Err(error) = from(variables) else { panic!("{variables:?} accepted") };
        assert_eq!(error.failure, Failure::Config);
        assert!(!error.message.contains("S3CRET") && !error.message.contains('\n'), "{error}");
        error.message
    }

    const ADDR: (&str, &str) = ("VAULT_ADDR", "https://kms.example:8200");

    #[test]
    fn credentials_are_taken_in_order() {
        let both = [
            ADDR,
            ("LETHEFS_APPROLE_ROLE_ID_FILE", "/r"),
            ("LETHEFS_APPROLE_SECRET_ID_FILE", "/s"),
            ("VAULT_TOKEN", "t"),
        ];
        let made = from(&both).expect("valid");
        assert!(matches!(made.credentials, Credentials::Token(token) if token.expose() == "t"));
        let made = from(&both[..3]).expect("valid");
        assert!(matches!(made.credentials, Credentials::AppRole { mount, .. } if mount == "approle"));
        let made = from(&[ADDR, ("VAULT_TOKEN", " t\n"), ("VAULT_TOKEN_FILE", "/f")]).expect("valid");
        assert!(matches!(made.credentials, Credentials::Token(token) if token.expose() == "t"));
        let made = from(&[ADDR, ("VAULT_TOKEN", ""), ("VAULT_TOKEN_FILE", "/f"), ("HOME", "/h")]).expect("valid");
        assert!(matches!(made.credentials, Credentials::TokenFile(path) if path == Path::new("/f")));
        let made = from(&[ADDR, ("HOME", "/h"), ("VAULT_NAMESPACE", "a/b/")]).expect("valid");
        assert!(matches!(made.credentials, Credentials::TokenFile(path) if path == Path::new("/h/.vault-token")));
        assert_eq!(made.namespace, "a/b");
        assert!(line(&[ADDR]).contains("no credentials"));
        assert!(line(&both[..2]).contains("set both"));
        assert!(line(&[both[0], both[2]]).contains("set both"));
    }

    #[test]
    fn what_is_for_one_server_goes_to_no_other() {
        let all = [
            ADDR,
            ("VAULT_TOKEN", "S3CRET"),
            ("VAULT_NAMESPACE", "first"),
            ("VAULT_CACERT", "/first.pem"),
            ("HOME", "/h"),
            ("VAULT_ADDR__DR", "https://dr.example:8200"),
            ("VAULT_TOKEN_FILE__DR", "/dr"),
        ];
        let of = |count: usize| {
            Config::of_server(Some("dr"), |name| {
                all[..count].iter().find(|(n, _)| *n == name).map(|(_, value)| value.into())
            })
        };
        let made = of(7).expect("valid");
        assert_eq!(made.addresses[0].as_str(), "https://dr.example:8200/");
        assert!(matches!(made.credentials, Credentials::TokenFile(path) if path == Path::new("/dr")));
        assert_eq!((made.ca_file, made.namespace.as_str()), (None, ""));
        for (count, words) in [(6, "no credentials"), (5, "VAULT_ADDR is not set")] {
            let Err(error) = of(count) else { panic!("{words}") };
            assert!(error.message.contains(words) && error.message.contains("VAULT_ADDR__DR"), "{error}");
            assert!(!error.message.contains("S3CRET"));
        }
    }

    #[test]
    fn addresses_are_https_and_nothing_more() {
        let made = from(&[("VAULT_ADDR", "https://a:1, https://b/base/"), ("VAULT_TOKEN", "t")]).expect("valid");
        let list: Vec<_> = made.addresses.iter().map(Url::as_str).collect();
        assert_eq!(list, ["https://a:1/", "https://b/base"]);
        for (address, reason) in [
            ("", "VAULT_ADDR is not set"),
            ("http://127.0.0.1:8200", "https only"),
            ("https://a,http://b", "https only"),
            ("kms.example", "not a URL"),
            ("https://a,", "not a URL"),
            ("https://u:S3CRET@a", "more than an address"),
            ("https://S3CRET@a", "more than an address"),
            ("https://a?token=S3CRET", "more than an address"),
            ("S3CRET", "not a URL"),
        ] {
            assert!(line(&[("VAULT_ADDR", address), ("VAULT_TOKEN", "t")]).contains(reason), "{address}");
        }
    }

    #[test]
    fn odd_values_are_refused() {
        assert!(line(&[ADDR, ("VAULT_TOKEN", "S3CRET two")]).contains("VAULT_TOKEN does not hold"));
        assert!(line(&[ADDR, ("VAULT_TOKEN", " ")]).contains("VAULT_TOKEN is empty"));
        assert!(line(&[ADDR, ("VAULT_TOKEN", "t"), ("VAULT_NAMESPACE", "a\nb")]).contains("VAULT_NAMESPACE"));
        let approle = [
            ADDR,
            ("LETHEFS_APPROLE_ROLE_ID_FILE", "/r"),
            ("LETHEFS_APPROLE_SECRET_ID_FILE", "/s"),
            ("LETHEFS_APPROLE_PATH", "../sys"),
        ];
        assert!(line(&approle).contains("LETHEFS_APPROLE_PATH"));
    }
}
