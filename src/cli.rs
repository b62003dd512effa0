//! The command line: parses, calls one verb of `service`, prints its report, and turns an error into one line and a code.
//!
//! - [`args`] what can be typed; [`options`] mount options; [`output`] what is printed; `progress` a bar while it works; [`exit`] the one table of codes.

pub mod args;
pub mod exit;
pub mod options;
pub mod output;
mod progress;

use std::error::Error as _;
use std::ffi::OsString;
use std::io::{BufRead as _, IsTerminal as _, Read as _};
use std::path::PathBuf;

use clap::{CommandFactory as _, Parser};
use zeroize::Zeroizing;

use crate::audit::Expected;
use crate::crypto::recovery::RecoveryKey;
use crate::service::daemon::{self, Side, Told};
use crate::service::supervisor::Role;
use crate::service::{Error, audit, erase, fsck, init, keys, log, mount, revoke, slots, status, supervisor, umount};
use exit::ExitCode;
use options::{Asked, parse_uri};

/// Text of `init` without `--kms`: a choice that no default should make.
const CHOOSE_A_KEY: &str = "\
lethefs: init needs --kms URI, the key that the volume lives and dies with: choose one
  --kms hashivault://KEY?engine=transit
      A key in OpenBao or Vault (VAULT_ADDR and VAULT_TOKEN or AppRole say where and who). The contents are lost when that
      key, or the server with all its backups, is destroyed, and nobody who steals this machine's disk can read them.
  --kms file:///PATH
      A key file on this machine, made if it is not there. No server is needed. The contents are lost when the file is
      lost; whoever has a copy of it can read them, and an erase is only as good as your knowledge of all its copies.
";

/// The program. Ends the process.
pub fn main() -> ! {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let called = arguments.first().map(|name| std::path::Path::new(name).file_name().unwrap_or(name).to_string_lossy());
    let helper = called.is_some_and(|name| name.starts_with("mount.fuse") || name.starts_with("mount.lethefs"));
    let code = if helper { as_helper(arguments) } else { as_command(arguments) };
    log::settle();
    crate::sys::process::end_at_once(code)
}

fn as_command(arguments: Vec<OsString>) -> u8 {
    let cli = match args::Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => return wrong_usage(&error),
    };
    start_log(cli.verbose);
    let done = match cli.command {
        args::Command::Init(given) => run_init(&given),
        args::Command::Mount(given) => options::of_mount(&given).and_then(|asked| run_mount(&asked, given.json)),
        args::Command::Umount(given) => run_umount(&given),
        args::Command::Status(given) => run_status(&given),
        args::Command::Erase(given) => run_erase(&given),
        args::Command::Fsck(given) => run_fsck(&given),
        args::Command::Keys { command } => run_keys(&command),
        args::Command::Revoke(given) => run_revoke(&given, revoke::Way::Revoke),
        args::Command::Restore(given) => run_revoke(&given, revoke::Way::Restore),
        args::Command::Audit { command } => run_audit(&command),
        args::Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut args::Cli::command(), "lethefs", &mut script);
            output::print(&String::from_utf8_lossy(&script));
            Ok(0)
        }
    };
    done.unwrap_or_else(|error| {
        output::complain(&error_line(&error));
        exit::code(&error).code()
    })
}

fn as_helper(arguments: Vec<OsString>) -> u8 {
    let given = match args::Helper::try_parse_from(arguments) {
        Ok(given) => given,
        Err(error) => return wrong_usage(&error),
    };
    start_log(given.verbose);
    let done = options::of_helper(&given).and_then(|asked| if given.fake { Ok(0) } else { run_mount(&asked, false) });
    done.unwrap_or_else(|error| {
        output::complain(&error_line(&error));
        exit::code(&error).code()
    })
}

/// Help goes where it was asked for; a mistake becomes one line.
fn wrong_usage(error: &clap::Error) -> u8 {
    use clap::error::ErrorKind;
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            output::print(&error.to_string());
            0
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            output::complain(&error.to_string());
            ExitCode::Usage.code()
        }
        _ => {
            let text = error.to_string();
            let first: Vec<&str> = text.lines().take_while(|line| !line.trim().is_empty()).map(str::trim).collect();
            let first = first.join(" ");
            output::complain(&format!(
                "lethefs: {}: see `lethefs help`\n",
                first.strip_prefix("error: ").unwrap_or(&first).trim_end_matches(':')
            ));
            ExitCode::Usage.code()
        }
    }
}

/// The line of an error; its causes go to the log.
fn error_line(error: &Error) -> String {
    let mut cause = error.source();
    while let Some(error) = cause {
        tracing::debug!("because: {error}");
        cause = error.source();
    }
    if let Error::Kms(kms) = error
        && let Some(detail) = &kms.detail
    {
        tracing::debug!("the key service said: {detail}");
    }
    // A message that quotes foreign text must still be one line, and say nothing to the terminal.
    format!("lethefs: {}\n", output::safe(&error.to_string().replace(['\n', '\r'], " ")))
}

fn start_log(verbose: u8) {
    let default = match verbose {
        0 => "warn",
        1 => "lethefs=info,warn",
        2 => "lethefs=debug,info",
        _ => "trace",
    };
    let filter = tracing_subscriber::EnvFilter::builder()
        .with_env_var("LETHEFS_LOG")
        .try_from_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(default));
    // Always to descriptor 2, which a mount in the background points at its log file.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(log::Line::default)
        .with_ansi(false)
        .with_target(false)
        .try_init();
}

fn run_init(given: &args::Init) -> Result<u8, Error> {
    let Some(uri) = &given.kms else {
        output::complain(CHOOSE_A_KEY);
        return Ok(ExitCode::Usage.code());
    };
    let request = init::Request { backing: given.backing.clone(), uri: parse_uri(uri)?, label: given.label.clone() };
    let report = init::run(&request)?;
    output::complain(&output::warnings(&report.warnings));
    output::print(&if given.json { output::json(&report) } else { output::init(&report) });
    Ok(0)
}

fn run_mount(asked: &Asked, json: bool) -> Result<u8, Error> {
    let shown = |report: &mount::Report| if json { output::json(report) } else { output::mount(report) };
    if asked.request.foreground {
        let link = match supervisor::split(true)? {
            Role::Supervisor(supervisor) => return Ok(supervisor.watch()),
            Role::Daemon(link) => link,
        };
        mount::run(&asked.request, &link, |report| {
            output::complain(&output::warnings(&report.warnings));
            output::print(&shown(report));
            Ok(())
        })?;
        return Ok(0);
    }
    let reporter = match daemon::split()? {
        Side::Parent(waiting) => {
            let told = waiting.wait()?;
            output::complain(&told.err);
            output::print(&told.out);
            return Ok(told.exit);
        }
        Side::Child(reporter) => reporter,
    };
    let link = match supervisor::split(false) {
        Ok(Role::Supervisor(supervisor)) => {
            // The parent waits for the last one to let go of this.
            drop(reporter);
            return Ok(supervisor.watch());
        }
        Ok(Role::Daemon(link)) => link,
        Err(error) => {
            reporter.tell(&Told { exit: exit::code(&error).code(), out: String::new(), err: error_line(&error) });
            return Ok(exit::code(&error).code());
        }
    };
    let mut reporter = Some(reporter);
    let served = mount::run(&asked.request, &link, |report| {
        daemon::detach(&report.log)?;
        if let Some(reporter) = reporter.take() {
            // Like mount(8), a mount that works says nothing unless it is asked to.
            let out = if json { output::json(report) } else { String::new() };
            reporter.tell(&Told { exit: 0, out, err: output::warnings(&report.warnings) });
        }
        Ok(())
    });
    match (served, reporter) {
        (Ok(()), _) => Ok(0),
        (Err(error), Some(reporter)) => {
            let exit = exit::code(&error).code();
            reporter.tell(&Told { exit, out: String::new(), err: error_line(&error) });
            Ok(exit)
        }
        // The parent is long gone: the line goes to the log, like every other.
        (Err(error), None) => Err(error),
    }
}

fn run_umount(given: &args::Umount) -> Result<u8, Error> {
    let report = umount::run(&given.mountpoint, given.lazy)?;
    if given.json {
        output::print(&output::json(&report));
    } else if !report.ended {
        output::complain(&output::umount(&report));
    }
    Ok(0)
}

fn run_status(given: &args::Status) -> Result<u8, Error> {
    let text = match (&given.path, given.json) {
        (Some(path), true) => output::json(&status::of(path)?),
        (Some(path), false) => output::status(&status::of(path)?),
        (None, true) => output::json(&status::all()?),
        (None, false) => output::status_all(&status::all()?.mounts),
    };
    output::print(&text);
    Ok(0)
}

fn run_erase(given: &args::Erase) -> Result<u8, Error> {
    let victim = match (&given.backing, &given.volume_id) {
        (Some(backing), _) => erase::Victim::Backing(backing.clone()),
        (None, Some(id)) => erase::Victim::OutOfReach(parse_id(id)?),
        (None, None) => return Err(Error::Usage("erase needs a backing directory, or --key and --volume-id".into())),
    };
    let keys = given.key.iter().map(|uri| parse_uri(uri)).collect::<Result<Vec<_>, _>>()?;
    let also = given.also_erases.iter().map(|id| parse_id(id)).collect::<Result<Vec<_>, _>>()?;
    let prepared = erase::prepare(&victim, &keys)?;
    if given.plan {
        output::print(&if given.json { output::json(&prepared.plan) } else { output::plan(&prepared.plan) });
        return Ok(0);
    }
    // The volume id that names a stolen disk's volume on the command line confirms it as well.
    let volume = given.confirm_volume.clone().or_else(|| given.volume_id.clone());
    let confirmation = match (volume, given.confirm_key.is_empty()) {
        (Some(volume), false) => {
            erase::Confirmation { volume, keys: given.confirm_key.clone(), also, partial: given.partial }
        }
        (volume, _) => {
            let mut typed = ask(&prepared, volume, &given.confirm_key, also)?;
            typed.partial = given.partial;
            typed
        }
    };
    let outcome = prepared.confirm(&confirmation)?.run()?;
    output::complain(&output::warnings(&outcome.report.warnings));
    let complete = outcome.incomplete.is_none();
    output::print(&if given.json { output::json(&outcome.report) } else { output::erase(&outcome.report, complete) });
    outcome.incomplete.map_or(Ok(0), Err)
}

/// Shows the plan and has a person type what is not given by flags.
fn ask(
    prepared: &erase::Prepared,
    volume: Option<String>,
    keys: &[String],
    also: Vec<crate::crypto::VolumeId>,
) -> Result<erase::Confirmation, Error> {
    if !std::io::stdin().is_terminal() {
        return Err(Error::NotConfirmed(
            "there is no terminal to confirm at: give --confirm-volume ID and --confirm-key NAME; nothing was changed"
                .into(),
        ));
    }
    output::complain(&output::plan(&prepared.plan));
    let mut input = std::io::stdin().lock();
    let mut read = |what: &str| {
        output::complain(&format!("Type {what} to destroy it for ever: "));
        let mut line = String::new();
        input.read_line(&mut line).map(|_| line.trim().to_owned()).unwrap_or_default()
    };
    let volume = volume.unwrap_or_else(|| read("the volume id"));
    let mut typed = keys.to_vec();
    if typed.is_empty() {
        let count = prepared.key_names().len();
        typed = (1..=count)
            .map(|n| if count == 1 { read("the key's name") } else { read(&format!("the name of key {n} of {count}")) })
            .collect();
    }
    Ok(erase::Confirmation { volume, keys: typed, also, partial: false })
}

fn run_fsck(given: &args::Fsck) -> Result<u8, Error> {
    let request = fsck::Request {
        path: given.path.clone(),
        repair: given.repair,
        names: given.names,
        trust: given.trust,
        uri: given.kms.as_deref().map(parse_uri).transpose()?,
    };
    // Draws only at a terminal.
    let bar = progress::Bar::new(given.quiet);
    let report = fsck::run(&request, &|tick| bar.show(&tick));
    bar.end();
    let report = report?;
    output::complain(&output::warnings(&report.warnings));
    output::print(&if given.json { output::json(&report) } else { output::fsck(&report) });
    Ok(exit::of_fsck(report.state).code())
}

fn run_revoke(given: &args::Revoke, way: revoke::Way) -> Result<u8, Error> {
    let victim = match (&given.path, &given.volume_id) {
        (Some(path), _) => revoke::victim(path)?,
        (None, Some(id)) => erase::Victim::OutOfReach(parse_id(id)?),
        (None, None) => return Err(Error::Usage("a backing directory, or --volume-id and --key, is needed".into())),
    };
    let keys = given.key.iter().map(|uri| parse_uri(uri)).collect::<Result<Vec<_>, _>>()?;
    let prepared = erase::prepare(&victim, &keys)?;
    // Bringing a key back takes nothing from anybody.
    if way == revoke::Way::Revoke && !given.yes {
        if !std::io::stdin().is_terminal() {
            let line = "there is no terminal to confirm at: add --yes; nothing was changed";
            return Err(Error::NotConfirmed(line.into()));
        }
        output::complain(&output::revoke_plan(&prepared.plan));
        output::complain("Suspend these keys? `lethefs restore` brings them back. Type yes: ");
        let mut line = String::new();
        let _ = std::io::stdin().lock().read_line(&mut line);
        if line.trim() != "yes" {
            return Err(Error::NotConfirmed("not confirmed; nothing was changed".into()));
        }
    }
    let outcome = revoke::run(&prepared, way);
    output::complain(&output::warnings(&outcome.report.warnings));
    output::print(&if given.json { output::json(&outcome.report) } else { output::revoke(&outcome.report) });
    outcome.incomplete.map_or(Ok(0), Err)
}

fn run_audit(command: &args::Audit) -> Result<u8, Error> {
    match command {
        args::Audit::Verify { path, expect_head, at_least, after, json } => {
            let expected = Expected {
                head: expect_head.as_deref().map(parse_hash).transpose()?,
                at_least: *at_least,
                after: after.as_deref().map(parse_hash).transpose()?,
            };
            let report = audit::verify(path, &expected)?;
            output::print(&if *json { output::json(&report) } else { output::audit(&report) });
            Ok(exit::of_audit(&report.verdict).code())
        }
        args::Audit::Show { path } => {
            let shown = audit::show(path, |record| output::print(&output::record(&record)))?;
            if shown.other > 0 {
                let line =
                    format!("{} lines are no records and are not shown: see `lethefs audit verify`", shown.other);
                output::complain(&output::warnings(&[line]));
            }
            Ok(0)
        }
    }
}

fn parse_hash(text: &str) -> Result<[u8; 32], Error> {
    crate::crypto::ids::unhex(text.trim()).ok_or_else(|| Error::Usage("a head is 64 hex digits".into()))
}

fn run_keys(command: &args::Keys) -> Result<u8, Error> {
    let slot = |report: &slots::Report, json| {
        output::complain(&output::warnings(&report.warnings));
        output::print(&if json { Zeroizing::new(output::json(report)) } else { output::slot(report) });
        Ok(0)
    };
    let header = |report: &slots::header::Report, json| {
        output::complain(&output::warnings(&report.warnings));
        output::print(&if json { output::json(report) } else { output::header(report) });
        Ok(0)
    };
    match command {
        args::Keys::Check { uri, json } => run_keys_check(uri, *json),
        args::Keys::List { path, json } => {
            let list = slots::list(path)?;
            output::print(&if *json { output::json(&list) } else { output::slots(&list) });
            Ok(0)
        }
        args::Keys::AddSlot { path, uri, shares, threshold, open } => {
            let new = match uri.as_str() {
                "recovery:" => slots::New::Recovery { threshold: *threshold, shares: *shares },
                uri => slots::New::Key(parse_uri(uri)?),
            };
            slot(&slots::add(path, &new, &with(open)?)?, open.json)
        }
        args::Keys::RemoveSlot { path, slot: id, open } => slot(&slots::remove(path, *id, &with(open)?)?, open.json),
        args::Keys::BackupHeader { path, file, json } => header(&slots::header::backup(path, file)?, *json),
        args::Keys::RestoreHeader { path, file, older, open } => {
            if !open.recovery_shares.is_empty() {
                return Err(Error::Usage(
                    "a saved header is put back with a key: if only shares are left, copy the volume file out of it by hand".into(),
                ));
            }
            header(&slots::header::restore(path, file, &with(open)?, *older)?, open.json)
        }
    }
}

/// What opens a volume for `keys`.
fn with(open: &args::Open) -> Result<slots::With, Error> {
    let uri = open.kms.as_deref().map(parse_uri).transpose()?;
    let recovery = match open.recovery_shares.as_slice() {
        [] => None,
        files => Some(RecoveryKey::combine(&shares(files)?).map_err(slots::of_shares)?),
    };
    Ok(slots::With { trust: open.trust, uri, recovery })
}

/// Recovery shares, one a line, from files; `-` is a terminal, at which they are asked for until an empty line.
fn shares(files: &[PathBuf]) -> Result<Vec<Zeroizing<String>>, Error> {
    const LONGEST: u64 = 64 << 10;
    let mut shares = Vec::new();
    for file in files {
        if file.as_os_str() == "-" {
            let mut input = std::io::stdin().lock();
            loop {
                if std::io::stdin().is_terminal() {
                    output::complain(&format!("Recovery share {} (an empty line ends): ", shares.len() + 1));
                }
                let mut line = Zeroizing::new(String::with_capacity(256));
                let read = (&mut input).take(LONGEST).read_line(&mut line);
                let read = read.map_err(|source| Error::Io { what: "cannot read shares".into(), source })?;
                if read == 0 || line.trim().is_empty() {
                    break;
                }
                shares.push(line);
            }
            continue;
        }
        let shown = file.display();
        let cannot = |source| Error::Io { what: format!("cannot read recovery shares from {shown}"), source };
        let mut text = Zeroizing::new(String::with_capacity(1 << 10));
        std::fs::File::open(file).map_err(cannot)?.take(LONGEST).read_to_string(&mut text).map_err(cannot)?;
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        shares.extend(lines.map(|line| Zeroizing::new(line.to_owned())));
    }
    Ok(shares)
}

fn run_keys_check(uri: &str, json: bool) -> Result<u8, Error> {
    let (report, failure) = keys::check(&parse_uri(uri)?)?;
    output::print(&if json { output::json(&report) } else { output::keys(&report) });
    failure.map_or(Ok(0), Err)
}

fn parse_id(text: &str) -> Result<crate::crypto::VolumeId, Error> {
    text.trim().parse().map_err(|_| Error::Usage("a volume id is 32 hex digits".into()))
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_declaration_is_sound() {
        <super::args::Cli as clap::CommandFactory>::command().debug_assert();
        <super::args::Helper as clap::CommandFactory>::command().debug_assert();
    }
}
