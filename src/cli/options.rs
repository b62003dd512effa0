//! Mount options: `-o` words and flags become one [`mount::Request`] through one table.
//!
//! Words are applied in order, then the flags, so that the later and the more explicit one wins.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use super::args;
use crate::fs::session::MountOptions;
use crate::kms::KeyUri;
use crate::service::{Error, custody, mount};

/// A mount as asked for.
pub struct Asked {
    /// For the service.
    pub request: mount::Request,
}

/// Words of fstab(5) and mount(8) that concern others.
const IGNORED: &[&str] =
    &["defaults", "auto", "noauto", "user", "nouser", "users", "owner", "group", "nofail", "_netdev", "async"];

/// From the `mount` command.
///
/// # Errors
/// An unknown option, a bad value.
pub fn of_mount(given: &args::Mount) -> Result<Asked, Error> {
    let mut asked = start(given.backing.clone(), given.mountpoint.clone());
    apply_lists(&mut asked, &given.options, false)?;
    let flags = [
        (given.foreground, "foreground"),
        (given.trust, "trust"),
        (given.allow_other, "allow_other"),
        (given.default_permissions, "default_permissions"),
        (given.ro, "ro"),
        (given.rw, "rw"),
        (given.suid, "suid"),
        (given.nosuid, "nosuid"),
        (given.dev, "dev"),
        (given.nodev, "nodev"),
        (given.exec, "exec"),
        (given.noexec, "noexec"),
        (given.noatime, "noatime"),
        (given.atime, "atime"),
        (given.relatime, "relatime"),
        (given.acl, "acl"),
    ];
    for (_, word) in flags.iter().filter(|(on, _)| *on) {
        apply(&mut asked, word, None)?;
    }
    let values = [
        ("kms", &given.kms),
        ("fsname", &given.fsname),
        ("threads", &given.threads),
        ("renew_interval", &given.renew_interval),
        ("grace", &given.grace),
    ];
    for (word, value) in values {
        if let Some(value) = value {
            apply(&mut asked, word, Some(value))?;
        }
    }
    if let Some(path) = &given.log_file {
        asked.request.log_file = Some(absolute(path)?);
    }
    Ok(asked)
}

/// From mount(8).
///
/// # Errors
/// As [`of_mount`]; with `-s` unknown options are ignored.
pub fn of_helper(given: &args::Helper) -> Result<Asked, Error> {
    let mut asked = start(given.backing.clone(), given.mountpoint.clone());
    apply_lists(&mut asked, &given.options, given.sloppy)?;
    Ok(asked)
}

fn start(backing: PathBuf, mountpoint: PathBuf) -> Asked {
    // suid and dev are off unless asked for: the backing store's modes are not authenticated.
    let options = MountOptions { suid: false, dev: false, ..MountOptions::default() };
    let terms = custody::terms(custody::RENEW_INTERVAL, custody::GRACE);
    let request = mount::Request {
        backing,
        mountpoint,
        trust: false,
        uri: None,
        log_file: None,
        terms,
        foreground: false,
        options,
    };
    Asked { request }
}

fn apply_lists(asked: &mut Asked, lists: &[String], sloppy: bool) -> Result<(), Error> {
    for option in lists.iter().flat_map(|list| split(list)) {
        let (word, value) = match option.split_once('=') {
            Some((word, value)) => (word, Some(value)),
            None => (option.as_str(), None),
        };
        let known = apply(asked, word, value)?;
        if !known && !sloppy {
            return Err(Error::Usage(format!("unknown mount option {word:?}: see `lethefs help mount`")));
        }
    }
    Ok(())
}

/// At commas; `\,` is a comma within a value, as in fuse(8).
fn split(list: &str) -> Vec<String> {
    let mut options = vec![String::new()];
    let mut chars = list.chars();
    while let Some(char) = chars.next() {
        match (char, options.last_mut()) {
            (',', _) => options.push(String::new()),
            ('\\', Some(option)) => option.extend(chars.next()),
            (char, Some(option)) => option.push(char),
            (_, None) => {}
        }
    }
    options.retain(|option| !option.is_empty());
    options
}

/// Applies one option. `false`: not known.
fn apply(asked: &mut Asked, word: &str, value: Option<&str>) -> Result<bool, Error> {
    let Asked { request } = asked;
    let options = &mut request.options;
    let needs = || {
        value
            .filter(|v| !v.is_empty())
            .ok_or_else(|| Error::Usage(format!("the mount option {word} needs a value: {word}=…")))
    };
    match word {
        "kms" => request.uri = Some(parse_uri(needs()?)?),
        "log_file" => request.log_file = Some(absolute(&needs()?.into())?),
        "fsname" => options.fsname = Some(needs()?.to_owned()),
        "renew_interval" => {
            let interval = duration(needs()?).filter(|interval| custody::INTERVALS.contains(interval));
            let wrong = || Error::Usage("renew_interval is a time from 100ms to 24h, as in 5s".into());
            request.terms = custody::terms(interval.ok_or_else(wrong)?, request.terms.grace);
        }
        "grace" => {
            let wrong = || Error::Usage("grace is a time, as in 10m, or 0 for none".into());
            request.terms = custody::terms(request.terms.interval, duration(needs()?).ok_or_else(wrong)?);
        }
        "threads" => {
            let threads = needs()?.parse().ok().filter(|n| (1..=64).contains(n));
            options.threads = Some(threads.ok_or_else(|| Error::Usage("threads is a number from 1 to 64".into()))?);
        }
        _ if IGNORED.contains(&word) || word.starts_with("x-") => {}
        _ => {
            let (field, on) = match word {
                "foreground" => (&mut request.foreground, true),
                "trust" => (&mut request.trust, true),
                "allow_other" => (&mut options.allow_other, true),
                "default_permissions" => (&mut options.default_permissions, true),
                "ro" => (&mut options.read_only, true),
                "rw" => (&mut options.read_only, false),
                "suid" => (&mut options.suid, true),
                "nosuid" => (&mut options.suid, false),
                "dev" => (&mut options.dev, true),
                "nodev" => (&mut options.dev, false),
                "exec" => (&mut options.exec, true),
                "noexec" => (&mut options.exec, false),
                "noatime" => (&mut options.noatime, true),
                "atime" | "relatime" => (&mut options.noatime, false),
                "acl" => (&mut options.acl, true),
                "unsafe_no_log" => (&mut options.no_log, true),
                _ => return Ok(false),
            };
            if value.is_some() {
                return Err(Error::Usage(format!("the mount option {word} takes no value")));
            }
            *field = on;
        }
    }
    Ok(true)
}

/// A key URI out of an argument.
///
/// # Errors
/// [`Error::BadUri`], which quotes no secret.
pub fn parse_uri(text: &str) -> Result<KeyUri, Error> {
    Ok(text.parse()?)
}

/// A time: `5s`, `1m 30s`, `500ms`, or plain seconds. At most a hundred years: nobody's clock overflows.
fn duration(text: &str) -> Option<Duration> {
    let text = if text.bytes().all(|byte| byte.is_ascii_digit()) { format!("{text}s") } else { text.to_owned() };
    let given: jiff::SignedDuration = text.parse().ok()?;
    Duration::try_from(given).ok().filter(|given| *given <= Duration::from_secs(100 * 365 * 24 * 3600))
}

/// The daemon changes its directory.
fn absolute(path: &OsString) -> Result<PathBuf, Error> {
    std::path::absolute(path).map_err(|source| Error::Io { what: "no working directory".into(), source })
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    fn asked(words: &[&str]) -> Result<Asked, Error> {
        let cli = args::Cli::parse_from([&["lethefs", "mount", "b", "m"], words].concat());
        let args::Command::Mount(mount) = cli.command else { panic!("mount") };
        of_mount(&mount)
    }

    #[test]
    fn every_flag_has_its_twin() {
        let command = <args::Cli as clap::CommandFactory>::command();
        let mount = command.find_subcommand("mount").expect("mount");
        for flag in mount.get_arguments().filter_map(clap::Arg::get_long) {
            if flag == "json" || flag == "verbose" || flag == "help" {
                continue;
            }
            let word = flag.replace('-', "_");
            let value = match word.as_str() {
                "kms" => Some("file:///k"),
                "threads" | "grace" => Some("2"),
                "renew_interval" => Some("1m 30s"),
                "log_file" | "fsname" => Some("x"),
                _ => None,
            };
            let mut asked = start("b".into(), "m".into());
            assert!(apply(&mut asked, &word, value).expect("good value"), "{word}");
        }
    }

    #[test]
    fn later_and_more_explicit_wins() {
        let options = asked(&["-o", "ro,noexec,rw", "-o", "fsname=a\\,b,defaults,x-systemd.automount"])
            .expect("good")
            .request
            .options;
        assert_eq!((options.read_only, options.exec, options.fsname.as_deref()), (false, false, Some("a,b")));
        assert!(asked(&["-o", "rw", "--ro"]).expect("good").request.options.read_only);
        let defaults = asked(&[]).expect("good").request.options;
        assert_eq!((defaults.suid, defaults.dev, defaults.exec), (false, false, true));
    }

    #[test]
    fn what_is_not_known_is_named() {
        for (words, part) in [
            ("fly", "\"fly\""),
            ("ro=1", "takes no value"),
            ("threads=0", "1 to 64"),
            ("kms", "needs a value"),
            ("renew_interval=1ms", "100ms to 24h"),
            ("renew_interval=-5s", "100ms"),
            ("grace=soon", "10m"),
            ("grace=9999y", "10m"),
        ] {
            let error = asked(&["-o", words]).err().expect(words).to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
