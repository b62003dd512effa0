//! Which PKCS #11 module this host uses and where its PIN is: this host's environment, never a URI or a volume.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use subtle::ConstantTimeEq as _;
use zeroize::Zeroizing;

use crate::kms::{Failure, KmsError};

/// Everything that is not in the URI.
#[derive(Clone, Debug)]
pub struct Config {
    /// The module's shared object, an absolute path. Its code runs in this process, so it is trusted like this program.
    pub module: PathBuf,
    /// A file with the user's PIN. `None`: the token needs none, or has a keypad of its own.
    pub pin_file: Option<PathBuf>,
    /// How long a call may wait for the module, all its steps together.
    pub timeout: Duration,
}

/// A PIN: wiped on drop, and not printable.
pub(super) struct Pin(Zeroizing<Vec<u8>>);

/// PINs are short; Cryptoki's own limit is what the token says.
const LONGEST_PIN: usize = 255;

pub(super) fn config(message: impl Into<String>) -> KmsError {
    KmsError::new(Failure::Config, message)
}

impl Config {
    /// From this process's environment. Opens nothing.
    ///
    /// # Errors
    /// [`Failure::Config`] with the variable that is missing or wrong.
    pub fn from_env() -> Result<Self, KmsError> {
        Self::from_lookup(|name| std::env::var_os(name))
    }

    /// From any set of variables.
    ///
    /// # Errors
    /// As [`Config::from_env`].
    pub fn from_lookup(lookup: impl Fn(&str) -> Option<OsString>) -> Result<Self, KmsError> {
        let path = |name: &str| lookup(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let module = path("LETHEFS_PKCS11_MODULE").ok_or_else(|| {
            config(
                "LETHEFS_PKCS11_MODULE is not set: set it to the token's module, as in \
                 /usr/lib/softhsm/libsofthsm2.so",
            )
        })?;
        if !module.is_absolute() {
            return Err(config(format!(
                "LETHEFS_PKCS11_MODULE is {}, but it must be an absolute path: what is loaded must not depend on where \
                 one stands",
                module.display()
            )));
        }
        Ok(Self { module, pin_file: path("LETHEFS_PKCS11_PIN_FILE"), timeout: Duration::from_secs(10) })
    }

    /// Refuses a module that others could have put there: its code sees the keys.
    pub(super) fn check_module(&self) -> Result<(), KmsError> {
        let shown = self.module.display();
        let meta = std::fs::metadata(&self.module).map_err(|error| {
            config(format!("cannot open LETHEFS_PKCS11_MODULE {shown}: {error}")).with_source(error)
        })?;
        let own = rustix::process::geteuid().as_raw();
        if !meta.is_file() || (meta.uid() != 0 && meta.uid() != own) || meta.mode() & 0o022 != 0 {
            return Err(config(format!(
                "LETHEFS_PKCS11_MODULE {shown} is not a file of root's or yours that nobody else may write: its code \
                 would run with the keys"
            )));
        }
        Ok(())
    }

    /// Reads the PIN, anew at each login.
    pub(super) fn read_pin(&self) -> Result<Option<Pin>, KmsError> {
        self.pin_file.as_deref().map(Pin::read).transpose()
    }
}

impl Pin {
    fn read(path: &Path) -> Result<Self, KmsError> {
        let shown = path.display();
        let cannot =
            |error: std::io::Error| config(format!("cannot read the PIN from {shown}: {error}")).with_source(error);
        let file = File::open(path).map_err(cannot)?;
        let meta = file.metadata().map_err(cannot)?;
        if meta.mode() & 0o077 != 0 {
            tracing::warn!(path = %shown, "others can read the PIN: chmod 600 the file");
        }
        // One buffer that never grows, so that no copy is left behind.
        let mut text = Zeroizing::new(Vec::with_capacity(LONGEST_PIN + 64));
        file.take(LONGEST_PIN as u64 + 32).read_to_end(&mut text).map_err(cannot)?;
        for end in [b'\n', b'\r'] {
            if text.last() == Some(&end) {
                text.pop();
            }
        }
        let odd = |b: &u8| b.is_ascii_control();
        if text.is_empty() || text.len() > LONGEST_PIN || text.iter().any(odd) || std::str::from_utf8(&text).is_err() {
            return Err(config(format!("{shown} does not hold a PIN: expected one line of text")));
        }
        Ok(Self(text))
    }

    /// For the one call that needs it.
    pub(super) fn expose(&self) -> &str {
        // Checked when it was read.
        std::str::from_utf8(&self.0).unwrap_or_default()
    }

    pub(super) fn same_as(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(variables: &[(&str, &str)]) -> Result<Config, KmsError> {
        Config::from_lookup(|name| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| value.into()))
    }

    #[test]
    fn the_module_is_named_by_this_host() {
        let made = from(&[("LETHEFS_PKCS11_MODULE", "/m.so"), ("LETHEFS_PKCS11_PIN_FILE", "/p")]).expect("valid");
        assert_eq!((made.module, made.pin_file), ("/m.so".into(), Some("/p".into())));
        for (variables, reason) in [
            (vec![], "LETHEFS_PKCS11_MODULE is not set"),
            (vec![("LETHEFS_PKCS11_MODULE", "")], "LETHEFS_PKCS11_MODULE is not set"),
            (vec![("LETHEFS_PKCS11_MODULE", "m.so")], "absolute path"),
        ] {
            let error = from(&variables).expect_err(reason);
            assert!(error.failure == Failure::Config && error.message.contains(reason), "{error}");
        }
    }

    #[test]
    fn a_module_that_others_can_change_is_refused() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().expect("temporary directory");
        let module = dir.path().join("m.so");
        let config = Config { module: module.clone(), pin_file: None, timeout: Duration::ZERO };
        assert!(config.check_module().is_err(), "not there");
        std::fs::write(&module, "x").expect("written");
        for (mode, fine) in [(0o644, true), (0o755, true), (0o664, false), (0o646, false)] {
            std::fs::set_permissions(&module, std::fs::Permissions::from_mode(mode)).expect("chmod");
            assert_eq!(config.check_module().is_ok(), fine, "{mode:o}");
        }
    }

    #[test]
    fn a_pin_is_one_line() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("pin");
        for (text, pin) in [("1234", "1234"), ("12 34\n", "12 34"), ("é\r\n", "é")] {
            std::fs::write(&path, text).expect("written");
            assert_eq!(Pin::read(&path).map(|pin| pin.expose().to_owned()).ok().as_deref(), Some(pin), "{text:?}");
        }
        let long = "1".repeat(256);
        for text in ["", "\n", "S3CRET\n\n", "S3CRET\nx", "S3CRET\0", long.as_str()] {
            std::fs::write(&path, text).expect("written");
            let Err(error) = Pin::read(&path) else { panic!("{text:?}") };
            assert!(error.failure == Failure::Config && !error.message.contains("S3CRET"), "{error}");
        }
    }
}
