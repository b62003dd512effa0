//! What of AWS KMS is this host's: limits, roots, and the waiting period of a deletion. Credentials, region and address
//! are read by the client itself, as every AWS tool reads them.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use super::classify::config;
use crate::kms::KmsError;

/// Everything that is not in the URI and not the client's own.
#[derive(Clone, Debug)]
pub struct Config {
    /// PEM file with the only roots to trust; `None`: the system's.
    pub ca_file: Option<PathBuf>,
    /// Read in place of `~/.aws/config` and `~/.aws/credentials`; `None`: what the environment says.
    pub profile_file: Option<PathBuf>,
    /// The waiting period of a deletion in days, 7 to 30.
    pub deletion_days: i32,
    /// Limit for a connection with its TLS handshake.
    pub connect_timeout: Duration,
    /// Limit for one attempt.
    pub attempt_timeout: Duration,
    /// Attempts.
    pub attempts: u32,
    /// Limit for a call, all its attempts together.
    pub timeout: Duration,
}

/// The longest that AWS KMS has, and its default: the key is of no use from the first day on, and whoever finds that it
/// was the wrong one has the most time to say so.
const DELETION_DAYS: i32 = 30;

impl Config {
    /// From this process's environment. Opens nothing.
    ///
    /// # Errors
    /// [`Failure::Config`](crate::kms::Failure::Config) with the variable that is wrong.
    pub fn from_env() -> Result<Self, KmsError> {
        Self::from_lookup(|name| std::env::var_os(name))
    }

    /// From any set of variables.
    ///
    /// # Errors
    /// As [`Config::from_env`].
    pub fn from_lookup(lookup: impl Fn(&str) -> Option<OsString>) -> Result<Self, KmsError> {
        let variable = |name: &str| lookup(name).filter(|value| !value.is_empty());
        let deletion_days = match variable("LETHEFS_AWS_DELETION_DAYS") {
            None => DELETION_DAYS,
            Some(text) => text
                .to_str()
                .and_then(|text| text.parse().ok())
                .filter(|days| (7..=30).contains(days))
                .ok_or_else(|| config("LETHEFS_AWS_DELETION_DAYS is a number of days from 7 to 30"))?,
        };
        Ok(Self {
            ca_file: variable("AWS_CA_BUNDLE").map(PathBuf::from),
            profile_file: None,
            deletion_days,
            connect_timeout: Duration::from_secs(3),
            attempt_timeout: Duration::from_secs(4),
            attempts: 2,
            timeout: Duration::from_secs(10),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_waiting_period_is_as_aws_has_it() {
        let from = |days: &str| {
            Config::from_lookup(|name| (name == "LETHEFS_AWS_DELETION_DAYS").then(|| days.into()))
                .map(|config| config.deletion_days)
        };
        assert_eq!(from("").expect("default"), 30);
        assert_eq!((from("7").expect("shortest"), from("30").expect("longest")), (7, 30));
        for days in ["6", "31", "0", "-7", "x", "7 "] {
            assert!(from(days).is_err(), "{days}");
        }
    }
}
