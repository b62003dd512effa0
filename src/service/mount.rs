//! `mount`: from a backing directory to a filesystem that answers, and to its orderly end.
//!
//! [`run`] is the whole life of the process that serves a mount. Order matters: lock, volume file, pin, one unwrap, the
//! commitment, the file's authenticity, the root, the mount, the control socket; only then is anybody told.

pub(super) mod unlock;

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde::Serialize;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::iterator::Signals;

use super::control::{self, Client, Op, Status};
use super::custody::Alarm;
use super::prover::Prover;
use super::record::{self, Files, Record, path_text};
use super::{Error, SCHEMA, backing, custody, fsck, journal, log, mountinfo, places, supervisor, trust, umount};
use crate::crypto::VolumeId;
use crate::fs::session::{MountHandle, MountOptions, Mounted};
use crate::keyring::SealReason;
use crate::keyring::lease::Terms;
use crate::kms::{KeyIdentity, KeyUri};
use crate::sys::process;
use crate::sys::shared_list::Due;
use crate::volume::meta::VolumeFile;
use crate::volume::storage::Errno;
use crate::volume::{Volume, VolumeError, replay};

/// How long a mount tries to get the volume's lock.
const LOCK_PATIENCE: Duration = Duration::from_millis(300);

/// What to mount, where and how.
pub struct Request {
    /// The backing directory.
    pub backing: PathBuf,
    /// The mountpoint.
    pub mountpoint: PathBuf,
    /// Vouch for a volume that this host does not know.
    pub trust: bool,
    /// The key's URI, where the pin does not say it.
    pub uri: Option<KeyUri>,
    /// Where a mount in the background logs to.
    pub log_file: Option<PathBuf>,
    /// How long the key may be used without a new proof.
    pub terms: Terms,
    /// Keeps the terminal.
    pub foreground: bool,
    /// For the filesystem.
    pub options: MountOptions,
}

/// A mount that answers.
#[derive(Debug, Serialize)]
pub struct Report {
    /// 1.
    pub schema: u32,
    /// The volume.
    pub volume_id: VolumeId,
    /// Its label.
    pub label: String,
    /// Backing directory.
    #[serde(with = "path_text")]
    pub backing: PathBuf,
    /// Mountpoint.
    #[serde(with = "path_text")]
    pub mountpoint: PathBuf,
    /// The daemon.
    pub pid: i32,
    /// The process that clears up behind it.
    pub supervisor: Option<i32>,
    /// The key in use.
    pub key: KeyIdentity,
    /// How this host reaches it.
    pub uri: KeyUri,
    /// As `-o` writes them.
    pub options: Vec<String>,
    /// Where a mount in the background logs to.
    #[serde(with = "path_text")]
    pub log: PathBuf,
    /// What a person should know.
    pub warnings: Vec<String>,
}

/// Mounts, calls `ready` once the filesystem answers, and serves until it is unmounted.
///
/// # Errors
/// What kept it from mounting; `ready` was not called, or failed itself. After `ready`, only how it ended.
pub fn run(
    request: &Request,
    link: &supervisor::Link,
    ready: impl FnOnce(&Report) -> Result<(), Error>,
) -> Result<(), Error> {
    process::harden();
    log::on_a_thread();
    let backing_path = backing::canonical(&request.backing, "backing directory")?;
    let mountpoint = check_mountpoint(&request.mountpoint)?;
    check_paths(&backing_path, &mountpoint)?;
    let backing = backing::open(&backing_path)?;
    take_lock(&backing, &backing_path)?;
    // Held to the very end, whatever the filesystem does with its own descriptor.
    let lock = backing.try_clone().map_err(Error::io("cannot duplicate a descriptor"))?;

    let copies = VolumeFile::read(&backing)?;
    let journal = journal::read_backing(&backing);
    let mut warnings = Vec::new();
    let grant = trust::grant(copies, request.trust, request.uri.as_ref())?;
    let asked = custody::tick();
    let mut unlocked = unlock::unlock(&grant, journal.as_ref(), "mount")?;
    let prover = Prover::new(&grant, &mut unlocked);
    let proving = Alarm::new()
        .and_then(|alarm| prover.start(&alarm.bell()).map(|()| alarm))
        .map_err(Error::io("cannot set up renewal"))?;
    let unlock::Unlocked { keys, body, used, repair, audit, .. } = unlocked;
    warnings.extend(super::audit::complaint(&audit));
    if let Some(journal) = &journal {
        warnings.push(format!("{}; yet the key still opens this volume", journal.sentence()));
    }
    let runtime = places::runtime_dir();
    let files = Files::new(&runtime, body.volume_id);
    refuse_second_copy(&files)?;
    let mut pin = grant.pin;
    pin.refresh(&body);
    keys.set_lowest_version(pin.lowest_version);
    let read_only = request.options.read_only;
    let volume = Volume::open(backing, &backing_path, &body, keys, read_only)?.with_audit(Arc::clone(&audit));
    // Only now is it known that the volume file is this directory's: before, nothing may be written.
    if repair && !read_only {
        warnings.push(match VolumeFile::heal(&lock, &body, volume.keys()) {
            Ok(()) => "one copy of the volume file was missing or damaged: both were written anew".into(),
            Err(error) => {
                format!("one copy of the volume file is missing or damaged, and writing it anew failed: {error}")
            }
        });
    }
    remember(&pin, &mut warnings)?;
    // May take minutes, with the keys there.
    let lease = (request.terms, asked);
    let (replayed, renewed) =
        custody::while_renewed(&prover, &proving, lease, volume.keys(), &audit, || after_unclean_end(&volume));
    let asked = renewed?;
    warnings.extend(replayed?);
    if request.options.no_log {
        warnings.push("there is no intent log (unsafe_no_log): a crash can make files unreadable".into());
    }

    places::make_dir(&runtime).map_err(Error::io(format!("cannot use the runtime directory {}", runtime.display())))?;
    let record = Record::of_self(body.volume_id, body.label.clone(), backing_path.clone(), mountpoint.clone());
    let report = Report {
        schema: SCHEMA,
        volume_id: body.volume_id,
        label: body.label.clone(),
        backing: backing_path.clone(),
        mountpoint: mountpoint.clone(),
        pid: record.pid,
        supervisor: link.supervisor().map(|pid| pid.as_raw_nonzero().get()),
        key: used.slot.identity.clone(),
        uri: used.uri.clone(),
        options: option_texts(&request.options),
        log: request.log_file.clone().unwrap_or_else(|| files.log.clone()),
        warnings,
    };

    // From here on a signal means an orderly end; before, it ends a process that has not mounted anything.
    let signals =
        Signals::new([SIGTERM, SIGINT, SIGHUP, supervisor::STOP]).map_err(Error::io("cannot catch signals"))?;
    // Caught and not looked at: a write beyond a hard limit on file sizes then fails instead of ending the mount.
    signal_hook::flag::register(SIGXFSZ, Arc::default()).map_err(Error::io("cannot catch signals"))?;
    let log = (!request.foreground).then_some(report.log.as_path());
    // If this process is stopped before it has begun to renew.
    link.list().set_due(Some(Due::SinceBoot(asked + request.terms.longest())));
    let tell = |fuse: BorrowedFd<'_>| link.mounted(&mountpoint, &files, log, fuse);
    let mounted = Mounted::start(volume, &mountpoint, &request.options, Some(link.list()), tell)
        .map_err(|error| Error::Mount(format!("cannot mount at {}: {error}", mountpoint.display())))?;
    let handle = mounted.handle();
    let keeping =
        custody::Custody::start((prover, proving), (request.terms, asked), handle.clone(), link.list(), audit.clone());
    let kept = keeping.as_ref().ok().cloned();
    let started = keeping
        .and_then(|custody| serve_control(&files, &record, &report, handle.clone(), custody))
        .and_then(|()| watch_signals(signals, handle.clone(), files.clone(), record.pid))
        .map_err(Error::io("cannot set up renewal and the control socket"))
        .and_then(|()| {
            super::audit::mounted(&audit, &report, body.generation);
            ready(&report)
        });
    if started.is_err() {
        let _ = handle.unmount(true);
    }
    let ended = mounted.wait();
    files.remove(record.pid);
    if let Some(custody) = kept {
        custody.end();
    }
    super::audit::unmounted(&audit, &report.mountpoint, started.as_ref().err(), ended.as_ref().err());
    started?;
    ended.map_err(|error| Error::Mount(format!("the mount did not end cleanly: {error}")))
}

/// Replays what the intent log of a mount that did not end cleanly holds. What to tell about it.
fn after_unclean_end(volume: &Volume) -> Result<Vec<String>, Error> {
    replayed(replay::replay(volume))
}

/// What to tell about a replay.
pub(super) fn replayed(done: Result<replay::Replayed, VolumeError>) -> Result<Vec<String>, Error> {
    let done = done.map_err(|error| {
        let why = match &error {
            VolumeError::Backing(errno) if *errno == Errno::NOSPC || *errno == Errno::DQUOT => {
                "free some space in the backing filesystem".to_owned()
            }
            VolumeError::Backing(errno) if *errno == Errno::ROFS => {
                "it needs one mount with a writable backing filesystem".to_owned()
            }
            _ => format!("{error}"),
        };
        Error::Mount(format!("the intent log of the last mount, which did not end cleanly, cannot be replayed: {why}"))
    })?;
    if done.unclean {
        tracing::warn!(?done, "the last mount did not end cleanly: its intent log was replayed");
    }
    let lost = (done.lost > 0).then(|| {
        format!(
            "the intent log of the last mount is damaged: {} of its records are lost, and with them perhaps the last \
             changes of some files",
            done.lost
        )
    });
    let passed_over = (done.passed_over > 0).then(|| {
        format!(
            "the last mount did not end cleanly, and its intent log names {} files that are not there or not as they were \
             then (removed, put back, or sealed since): they were left as they are",
            done.passed_over
        )
    });
    Ok(lost.into_iter().chain(passed_over).collect())
}

/// Canonical path of a mountpoint that is not ours already.
fn check_mountpoint(given: &Path) -> Result<PathBuf, Error> {
    let mounts = mountinfo::read().map_err(Error::io("cannot read /proc/self/mountinfo"))?;
    let path = std::fs::canonicalize(given).map_err(|error| {
        let shown = given.display();
        Error::Mount(match (error.kind(), rustix::io::Errno::from_io_error(&error)) {
            (_, Some(rustix::io::Errno::NOTCONN)) => dead(given),
            (io::ErrorKind::NotFound, _) => format!("there is no mountpoint {shown}: make the directory first"),
            _ => format!("cannot reach the mountpoint {shown}: {error}"),
        })
    })?;
    if let Some(mount) = mountinfo::at(&mounts, &path).filter(|mount| mount.is_lethefs()) {
        // The kernel may still answer for the root of a dead mount, out of its cache.
        if umount::is_dead(&path, mount.user) {
            return Err(Error::Mount(dead(&path)));
        }
        return Err(Error::InUse(format!(
            "a lethefs volume is already mounted at {}: see `lethefs status`",
            path.display()
        )));
    }
    if !path.is_dir() {
        return Err(Error::Mount(format!("the mountpoint {} is not a directory", path.display())));
    }
    Ok(path)
}

fn dead(mountpoint: &Path) -> String {
    let shown = mountpoint.display();
    format!("a mount whose daemon is gone is in the way at {shown}: unmount it first (lethefs umount --lazy {shown})")
}

/// Refuses a mount that would cover its own backing directory or lie in it, and a tree that spans filesystems.
fn check_paths(backing: &Path, mountpoint: &Path) -> Result<(), Error> {
    let (shown, at) = (backing.display(), mountpoint.display());
    if backing == mountpoint {
        return Err(Error::Usage(format!("backing directory and mountpoint are both {shown}: use two directories")));
    }
    if mountpoint.starts_with(backing) {
        return Err(Error::Usage(format!("the mountpoint {at} is inside the backing directory {shown}: move it out")));
    }
    if backing.starts_with(mountpoint) {
        return Err(Error::Usage(format!(
            "the backing directory {shown} is inside the mountpoint {at}, which would hide it"
        )));
    }
    let mounts = mountinfo::read().map_err(Error::io("cannot read /proc/self/mountinfo"))?;
    if let Some(mount) = mountinfo::below(&mounts, backing).next() {
        return Err(Error::Mount(format!(
            "another filesystem is mounted below the backing directory, at {}: unmount it first",
            mount.mountpoint.display()
        )));
    }
    Ok(())
}

pub(super) fn take_lock(backing: &OwnedFd, path: &Path) -> Result<(), Error> {
    let until = Instant::now() + LOCK_PATIENCE;
    loop {
        if backing::lock(backing, path)? {
            return Ok(());
        }
        // Who only asks whether the volume is in use (`status`) has the lock for an instant. Waiting for it in flock(2)
        // would wait for a mount as well, without an end.
        if Instant::now() >= until {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let volume = VolumeFile::read(backing).ok().and_then(|copies| copies.first().map(|copy| copy.body().volume_id));
    let who = match volume.and_then(record::find) {
        Some(record) => format!("at {} by process {}", record.mountpoint.display(), record.pid),
        None => "by a process of another user or host namespace".into(),
    };
    Err(Error::InUse(format!("{} is already mounted {who}: unmount it there first", path.display())))
}

/// Refuses a copy of a volume that is mounted from elsewhere: socket and record have the volume's name, and each of the
/// two would take itself for the only writer. The lock does not tell, since it is the directory's.
fn refuse_second_copy(files: &Files) -> Result<(), Error> {
    let in_use = |place: Option<PathBuf>| {
        let place = place.or_else(|| record::of(files).map(|record| record.mountpoint));
        let place = place.map_or_else(|| "a place unknown".into(), |place| place.display().to_string());
        Err(Error::InUse(format!("another copy of this volume is mounted at {place}: unmount it there first")))
    };
    // A daemon that was killed lets go of its lock before its socket: it gets a moment to go.
    for _ in 0..5 {
        match Client::connect(&files.socket).map(Client::status) {
            Ok(Ok(status)) => return in_use(Some(status.mountpoint)),
            Ok(Err(error)) if matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock) => {
                return in_use(None);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return in_use(None),
            Err(_) => return Ok(()),
            Ok(Err(_)) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
    in_use(None)
}

/// Keeps the pin that the authenticated file raised. Not being able to is no reason not to mount, except at first sight:
/// whoever vouched for the volume believes that from now on nobody can put another in its place.
fn remember(pin: &trust::Pin, warnings: &mut Vec<String>) -> Result<(), Error> {
    let on_disk = trust::find(pin.volume_id).ok().flatten();
    let first_sight = on_disk.is_none();
    if on_disk.is_none_or(|found| found.pin != *pin) {
        match pin.save() {
            Ok(path) => tracing::info!(pin = %path.display(), "pin written"),
            Err(error) if first_sight => return Err(error.into()),
            Err(error) => warnings.push(format!("{error}; this host will not remember what it saw")),
        }
    }
    Ok(())
}

fn serve_control(
    files: &Files,
    record: &Record,
    report: &Report,
    handle: MountHandle,
    custody: Arc<custody::Custody>,
) -> io::Result<()> {
    let status = Status {
        schema: SCHEMA,
        volume_id: record.volume_id,
        label: record.label.clone(),
        backing: record.backing.clone(),
        mountpoint: record.mountpoint.clone(),
        pid: record.pid,
        supervisor: report.supervisor,
        started: record.started.clone(),
        key: report.key.clone(),
        uri: report.uri.to_string(),
        options: report.options.clone(),
        sealed: None,
        custody: None,
        counters: serde_json::Value::Null,
    };
    let checking = AtomicBool::new(false);
    control::serve(&files.socket, move |asked| {
        let value = match asked.op {
            Op::Status => {
                let counters = serde_json::to_value(handle.status()).unwrap_or_default();
                let sealed = counters.get("sealed").and_then(|reason| reason.as_str()).map(str::to_owned);
                let parent = rustix::process::getppid().map(|pid| pid.as_raw_nonzero().get());
                let supervisor = status.supervisor.filter(|pid| parent == Some(*pid));
                let custody = Some(custody.status());
                serde_json::to_value(Status { sealed, supervisor, custody, counters, ..status.clone() })
            }
            Op::Metrics => serde_json::to_value(handle.status()),
            Op::Seal => {
                tracing::warn!("sealed on request");
                serde_json::to_value(custody.hold(asked.peer))
            }
            Op::Resume => serde_json::to_value(custody.release(control::RESUME_PATIENCE)),
            Op::Fsck => {
                if checking.swap(true, Ordering::SeqCst) {
                    return Err("a check is under way already".into());
                }
                let checked = fsck::answer(&handle, asked);
                checking.store(false, Ordering::SeqCst);
                Ok(checked?)
            }
        };
        Ok(value.unwrap_or_default())
    })?;
    record::write(files, record)
}

/// The first signal unmounts, lazily if the mount is in use; a second one wipes the keys and ends at once.
fn watch_signals(mut signals: Signals, handle: MountHandle, files: Files, pid: i32) -> io::Result<()> {
    let watch = move || {
        let (mut asked, mut ending) = (false, false);
        for signal in signals.forever() {
            // The supervisor passes on what was sent to it; both may be sent the same at once.
            let passed_on = signal == supervisor::STOP;
            if asked && !passed_on {
                // No more than that: the supervisor has the kernel drop what it caches.
                handle.abandon(SealReason::Unmounted);
                files.remove(pid);
                log::settle();
                process::end_at_once(1);
            }
            asked |= !passed_on;
            if std::mem::replace(&mut ending, true) {
                continue;
            }
            tracing::info!(signal, "unmounting");
            // On its own thread: pushing data out may take long, and the next signal must be heard meanwhile.
            let ending = handle.clone();
            let thread = std::thread::Builder::new().name("lethefs-unmount".into());
            if thread.spawn(move || unmount(&ending)).is_err() {
                // The system is full of processes: then the next signal has to wait.
                unmount(&handle);
            }
        }
    };
    std::thread::Builder::new().name("signals".into()).spawn(watch).map(drop)
}

fn unmount(handle: &MountHandle) {
    let unmounted = handle.unmount(false).or_else(|error| {
        tracing::warn!(%error, "in use: detached, and served until its last user is gone");
        handle.unmount(true)
    });
    if let Err(error) = unmounted {
        tracing::error!(%error, "cannot unmount");
    }
}

/// The options in effect, as `-o` writes them.
fn option_texts(options: &MountOptions) -> Vec<String> {
    let word =
        |on: bool, yes: &str, no: &str| Some(if on { yes } else { no }.to_owned()).filter(|text| !text.is_empty());
    let texts = [
        word(options.read_only, "ro", "rw"),
        word(options.suid, "suid", "nosuid"),
        word(options.dev, "dev", "nodev"),
        word(options.exec, "", "noexec"),
        word(options.noatime, "noatime", ""),
        word(options.allow_other, "allow_other", ""),
        word(options.default_permissions, "default_permissions", ""),
        word(options.acl, "acl", ""),
        options.fsname.as_ref().map(|name| format!("fsname={name}")),
        options.threads.map(|threads| format!("threads={threads}")),
        word(options.no_log, "unsafe_no_log", ""),
    ];
    texts.into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_copy_is_refused_while_the_first_answers() {
        let dir = tempfile::tempdir().expect("directory");
        let record = Record::of_self(VolumeId([4; 16]), "l".into(), "/b".into(), "/m".into());
        let files = Files::new(dir.path(), record.volume_id);
        refuse_second_copy(&files).expect("nobody there");
        drop(std::os::unix::net::UnixListener::bind(&files.socket).expect("bound"));
        record::write(&files, &record).expect("written");
        refuse_second_copy(&files).expect("a dead daemon's");
        let status = Status {
            schema: SCHEMA,
            volume_id: record.volume_id,
            label: String::new(),
            backing: "/b".into(),
            mountpoint: "/there".into(),
            pid: record.pid,
            supervisor: None,
            started: String::new(),
            key: KeyIdentity::File { key_id: VolumeId([1; 16]), created: String::new() },
            uri: String::new(),
            options: Vec::new(),
            sealed: None,
            custody: None,
            counters: serde_json::Value::Null,
        };
        control::serve(&files.socket, move |_| Ok(serde_json::to_value(&status).expect("JSON"))).expect("served");
        let error = refuse_second_copy(&files).expect_err("refused");
        assert!(matches!(&error, Error::InUse(line) if line.contains("mounted at /there")), "{error}");
    }

    #[test]
    fn a_lock_held_for_an_instant_is_waited_for() {
        let dir = tempfile::tempdir().expect("directory");
        let (asking, mounting) = (backing::open(dir.path()).expect("open"), backing::open(dir.path()).expect("open"));
        assert!(backing::lock(&asking, dir.path()).expect("lock"));
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            drop(asking);
        });
        take_lock(&mounting, dir.path()).expect("taken");
        let third = backing::open(dir.path()).expect("open");
        assert!(matches!(take_lock(&third, dir.path()), Err(Error::InUse(_))));
    }
}
