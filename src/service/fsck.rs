//! `fsck`: checks a volume, and repairs what can be repaired.
//!
//! A volume that is mounted here is checked by its own daemon, through the control socket, and nothing is changed; else the
//! volume is locked, unlocked with one request to its key service, and looked at from here.

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Mutex, PoisonError, mpsc};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::control::{Asked, Client};
use super::mount::{replayed, take_lock, unlock};
use super::record::{self, Files, path_text};
use super::{Error, SCHEMA, backing, journal, mountinfo, places, trust, umount};
use crate::audit::Event;
use crate::crypto::{ObjectId, VolumeId};
use crate::fs::session::MountHandle;
use crate::kms::KeyUri;
use crate::sys::process;
use crate::volume::check::{self, Fault, Finding, Place, Progress};
use crate::volume::meta::{KeyState, VolumeFile};
use crate::volume::repair::{self, Outcome};
use crate::volume::{Volume, VolumeError};

/// How often progress is shown.
const TICK: Duration = Duration::from_millis(200);
/// Longest path in a report, in bytes: a tree may be deeper than any path. Two of them, each byte as six (JSON's `u0001`), fit
/// into a line of the control socket with all else.
const PATH_MAX: usize = 4 << 10;
/// Runs of damaged blocks listed for one file.
const RUNS_MAX: usize = 256;

/// What to check, and how.
pub struct Request {
    /// The backing directory, or a mountpoint.
    pub path: PathBuf,
    /// Repair what can be repaired.
    pub repair: bool,
    /// Show plaintext names.
    pub names: bool,
    /// Vouch for a volume that this host does not know.
    pub trust: bool,
    /// The key's URI, where the pin does not say it.
    pub uri: Option<KeyUri>,
}

/// What was looked at so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checked {
    /// Directories, the root among them.
    pub directories: u64,
    /// Regular files.
    pub files: u64,
    /// Symlinks.
    pub links: u64,
    /// FIFOs, sockets and devices.
    pub nodes: u64,
    /// Plaintext bytes that were authenticated.
    pub bytes: u64,
}

impl Checked {
    fn of(progress: &Progress) -> Self {
        Self {
            directories: progress.directories.load(Ordering::Relaxed),
            files: progress.files.load(Ordering::Relaxed),
            links: progress.links.load(Ordering::Relaxed),
            nodes: progress.nodes.load(Ordering::Relaxed),
            bytes: progress.bytes.load(Ordering::Relaxed),
        }
    }

    /// Objects of all kinds.
    pub fn objects(&self) -> u64 {
        self.directories + self.files + self.links + self.nodes
    }
}

/// How the work goes on, for a progress bar.
#[derive(Clone, Copy, Debug)]
pub struct Tick {
    /// What is being done.
    pub doing: &'static str,
    /// So far.
    pub checked: Checked,
    /// In all, as far as can be told without keys.
    pub total: Checked,
}

/// One finding, for people and programs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Line {
    /// Its kind.
    pub fault: Fault,
    /// It costs nothing.
    pub note: bool,
    /// Path of the object in the backing directory.
    pub path: String,
    /// Path of the object in the mount, if it was asked for and is known.
    pub name: Option<String>,
    /// The object.
    pub object: Option<ObjectId>,
    /// Backing inode number, 0 if not known.
    pub backing_ino: u64,
    /// Damaged blocks of 4,096 bytes: first and last of each run.
    pub blocks: Vec<(u64, u64)>,
    /// What it is.
    pub what: String,
    /// What there is to add.
    pub detail: Option<String>,
    /// What it costs.
    pub costs: String,
    /// What `--repair` does about it.
    pub repair: String,
    /// Repaired: how. Null: not, or not tried.
    pub repaired: Option<String>,
    /// Why a repair failed.
    pub problem: Option<String>,
}

impl Line {
    fn of(finding: &Finding, names: bool) -> Self {
        let [what, costs, repair] = finding.fault.texts().map(str::to_owned);
        let runs = finding.blocks.len();
        let more = (runs > RUNS_MAX).then(|| format!("and {} more runs of blocks", runs - RUNS_MAX));
        Self {
            fault: finding.fault,
            note: finding.fault.is_note(),
            path: join(&finding.place.names()),
            name: names.then(|| finding.place.plain_names()).flatten().map(|plain| format!("/{}", join(&plain))),
            object: finding.object,
            backing_ino: finding.ino,
            blocks: finding.blocks.iter().take(RUNS_MAX).copied().collect(),
            what,
            detail: finding.detail.clone().or(more),
            costs,
            repair,
            repaired: None,
            problem: None,
        }
    }
}

fn join(names: &[Vec<u8>]) -> String {
    use std::os::unix::ffi::OsStrExt as _;
    if names.is_empty() {
        return ".".into();
    }
    let text = path_text::encode(Path::new(std::ffi::OsStr::from_bytes(&names.join(&b'/'))));
    if text.len() <= PATH_MAX {
        return text;
    }
    // Its end says more than its beginning.
    let end: String = text.chars().rev().take(PATH_MAX / 4).collect();
    format!("…{}", end.chars().rev().collect::<String>())
}

/// What became of the volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// No damage.
    Clean,
    /// Damage, all of it repaired.
    Repaired,
    /// Damage is left.
    Damaged,
}

/// The result of a check.
#[derive(Debug, Serialize)]
pub struct Report {
    /// 1.
    pub schema: u32,
    /// The volume.
    pub volume_id: VolumeId,
    /// Backing directory.
    #[serde(with = "path_text")]
    pub backing: PathBuf,
    /// It was mounted, and checked by its daemon.
    pub online: bool,
    /// What is to be said in one word.
    pub state: State,
    /// What was looked at.
    pub checked: Checked,
    /// What was found. After a repair: what was found before it.
    pub findings: Vec<Line>,
    /// What is left after a repair; the findings again where none was asked for.
    pub left: Vec<Line>,
    /// What a person should know.
    pub warnings: Vec<String>,
}

impl Report {
    fn new(volume_id: VolumeId, backing: PathBuf, checked: Checked) -> Self {
        let (findings, left, warnings) = (Vec::new(), Vec::new(), Vec::new());
        let state = State::Clean;
        Self { schema: SCHEMA, volume_id, backing, online: false, state, checked, findings, left, warnings }
    }

    fn judged(mut self) -> Self {
        let damage = |lines: &[Line]| lines.iter().any(|line| !line.note);
        self.state = match (damage(&self.findings), damage(&self.left)) {
            (_, true) => State::Damaged,
            (true, false) => State::Repaired,
            (false, false) => State::Clean,
        };
        self
    }
}

/// Checks, and repairs if asked to. `shown` is told how it goes on.
///
/// # Errors
/// What kept it from checking. Damage is no error.
pub fn run(request: &Request, shown: &(dyn Fn(Tick) + Sync)) -> Result<Report, Error> {
    process::harden();
    let mounts = mountinfo::read().map_err(Error::io("cannot read /proc/self/mountinfo"))?;
    let resolved = std::fs::canonicalize(&request.path).unwrap_or_else(|_| request.path.clone());
    if let Some(mount) = mountinfo::at(&mounts, &resolved).filter(|mount| mount.is_lethefs()) {
        let Some((record, files)) = umount::find(&resolved, mount.user) else {
            return Err(Error::Mount(format!(
                "the daemon of the mount at {} cannot be reached from here: unmount it, then check the backing directory",
                resolved.display()
            )));
        };
        return online(request, record.volume_id, &record.backing, &files, shown);
    }
    let path = backing::canonical(&request.path, "backing directory")?;
    let fd = backing::open(&path)?;
    let copies = VolumeFile::read(&fd)?;
    let volume_id = copies.first().map(|copy| copy.body().volume_id);
    if let Some(volume_id) = volume_id
        && record::find(volume_id).is_some_and(|record| record.backing == path)
    {
        let files = Files::new(&places::runtime_dir(), volume_id);
        if Client::connect(&files.socket).is_ok() {
            return online(request, volume_id, &path, &files, shown);
        }
    }
    take_lock(&fd, &path)?;
    offline(request, path, fd, copies, shown)
}

fn online(
    request: &Request,
    volume_id: VolumeId,
    path: &Path,
    files: &Files,
    shown: &(dyn Fn(Tick) + Sync),
) -> Result<Report, Error> {
    if request.repair {
        return Err(Error::InUse(format!(
            "{} is mounted: unmount it to repair it (without --repair it is checked as it is)",
            path.display()
        )));
    }
    let total = total(path);
    let (mut found, mut not_understood) = (Vec::new(), None);
    let client = Client::connect(&files.socket).map_err(Error::io("cannot reach the mount"))?;
    let done = client.check(request.names, &mut |line| {
        if let Some(line) = line.get("finding") {
            match serde_json::from_value(line.clone()) {
                Ok(line) => found.push(line),
                Err(error) => not_understood = Some(error),
            }
        } else if let Some(checked) = line.get("progress").and_then(|now| serde_json::from_value(now.clone()).ok()) {
            shown(Tick { doing: "checking", checked, total });
        }
    });
    let done = done.map_err(Error::io("the mount could not check the volume"))?;
    // The daemon may be of another version than this program: what it found must not be passed over.
    let checked = match not_understood {
        Some(error) => Err(error),
        None => serde_json::from_value(done),
    };
    let checked = checked.map_err(Error::io("the mount's answer is not understood (another version of lethefs?)"))?;
    sort(&mut found);
    let mut report = Report::new(volume_id, path.to_owned(), checked);
    report.online = true;
    report.left = found.clone();
    report.findings = found;
    Ok(report.judged())
}

/// The daemon's side of it.
pub(super) fn answer(handle: &MountHandle, asked: &mut Asked<'_>) -> Result<Value, String> {
    let progress = Progress::default();
    // Bounded: whoever listens slowly keeps the check waiting, rather than memory filling up.
    let (sender, findings) = mpsc::sync_channel::<Line>(1024);
    let names = asked.names;
    let result = std::thread::scope(|scope| {
        let checking = scope.spawn(|| {
            let sender = Mutex::new(sender);
            handle.check(&progress, &|finding| {
                let line = Line::of(&finding, names);
                let _ = sender.lock().unwrap_or_else(PoisonError::into_inner).send(line);
            })
        });
        loop {
            let told = match findings.recv_timeout(TICK) {
                Ok(finding) => asked.tell("finding", &serde_json::to_value(&finding).unwrap_or_default()),
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    asked.tell("progress", &serde_json::to_value(Checked::of(&progress)).unwrap_or_default())
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
            };
            if told.is_err() {
                // Nobody listens any more.
                progress.stop.store(true, Ordering::Relaxed);
            }
        }
        checking.join()
    });
    match result {
        Ok(Ok(())) => Ok(serde_json::to_value(Checked::of(&progress)).unwrap_or_default()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("the check ended early".into()),
    }
}

fn offline(
    request: &Request,
    path: PathBuf,
    fd: std::os::fd::OwnedFd,
    copies: Vec<VolumeFile>,
    shown: &(dyn Fn(Tick) + Sync),
) -> Result<Report, Error> {
    let journal = journal::read_backing(&fd);
    // Held to the very end.
    let lock = fd.try_clone().map_err(Error::io("cannot duplicate a descriptor"))?;
    let grant = trust::grant(copies, request.trust, request.uri.as_ref())?;
    let unlock::Unlocked { keys, body, repair: volume_file, audit, .. } =
        unlock::unlock(&grant, journal.as_ref(), "fsck")?;
    let mut pin = grant.pin;
    pin.refresh(&body);
    keys.set_lowest_version(pin.lowest_version);
    let volume = Volume::open_to_check(fd, &path, &body, keys)?;
    let mut report = Report::new(body.volume_id, path.clone(), Checked::default());
    report
        .warnings
        .extend(journal.map(|journal| format!("{}; yet the key still opens this volume", journal.sentence())));

    // What is under a key that is not here is not damaged.
    let held = volume.keys().held();
    let needed = body.scope().keks.iter().filter(|kek| kek.state != KeyState::Destroyed);
    for kek in needed.filter(|kek| !held.contains(&(body.scope().id, kek.version))) {
        let what = format!("KEK version {} is not held: what is under it cannot be told from damage", kek.version);
        if request.repair {
            let source = std::io::Error::other("nothing was changed");
            return Err(Error::Io { what: format!("{what}, so nothing can be repaired"), source });
        }
        report.warnings.push(what);
    }

    let mut early = Vec::new();
    if volume_file {
        let place = Place::root().below(crate::volume::format::VOLUME_FILE.as_bytes(), None);
        early.push(Finding { fault: Fault::VolumeFile, place, ..check::nothing() });
    }
    if !request.repair {
        let (checked, mut found) = look(&volume, "checking", shown)?;
        early.append(&mut found);
        report.checked = checked;
        report.findings = lines(&early, request.names);
        report.left = report.findings.clone();
        return Ok(report.judged());
    }

    // What the log says comes first: until then nothing is as it should be.
    let (_, of_the_log) = check::read_log(&volume)?;
    report.warnings.extend(replayed(repair::settle_log(&volume))?);
    early.extend(of_the_log);
    let mut settled = lines(&early, request.names);
    for line in &mut settled {
        let done = match line.fault {
            Fault::VolumeFile => match VolumeFile::heal(&lock, &body, volume.keys()) {
                Ok(()) => Ok("both written anew"),
                Err(error) => Err(error.to_string()),
            },
            Fault::Log => Ok("copied into lethefs.quarantine, and what is intact replayed"),
            _ => Ok("replayed"),
        };
        match done {
            Ok(text) => line.repaired = Some(text.into()),
            Err(why) => line.problem = Some(why),
        }
    }
    let (checked, findings) = look(&volume, "checking", shown)?;
    let outcomes = repair::repair(&volume, &findings)?;
    // In the findings' order, which is the outcomes' as well.
    let mut found: Vec<Line> = findings.iter().map(|finding| Line::of(finding, request.names)).collect();
    for (line, outcome) in found.iter_mut().zip(outcomes) {
        match outcome {
            Outcome::Done(text) => line.repaired = Some(text),
            Outcome::Left => {}
            Outcome::Failed(why) => line.problem = Some(why),
        }
    }
    report.checked = checked;
    report.left = if found.iter().any(|line| line.repaired.is_some()) {
        lines(&look(&volume, "checking again", shown)?.1, request.names)
    } else {
        lines(&findings, request.names)
    };
    report.left.extend(settled.iter().filter(|line| line.problem.is_some()).cloned());
    settled.append(&mut found);
    report.findings = settled;
    sort(&mut report.findings);
    let count = |lines: &[Line]| lines.iter().filter(|line| !line.note).count() as u64;
    let repaired = report.findings.iter().filter(|line| line.repaired.is_some()).count() as u64;
    let event = Event::Repair { found: count(&report.findings), repaired, left: count(&report.left) };
    super::audit::warn(&audit, event, &mut report.warnings);
    Ok(report.judged())
}

/// One pass over everything.
fn look(
    volume: &Volume,
    doing: &'static str,
    shown: &(dyn Fn(Tick) + Sync),
) -> Result<(Checked, Vec<Finding>), VolumeError> {
    let progress = Progress::default();
    let found = Mutex::new(Vec::new());
    let total = total(volume.path());
    let threads = std::thread::available_parallelism().map_or(2, usize::from);
    let request = check::Request { live: None, threads, progress: &progress };
    let (done, ended) = mpsc::channel::<()>();
    let show = || shown(Tick { doing, checked: Checked::of(&progress), total });
    // At once, and once more at the end: a short check is one that was seen, too.
    show();
    std::thread::scope(|scope| {
        let show = &show;
        scope.spawn(move || {
            while ended.recv_timeout(TICK) == Err(mpsc::RecvTimeoutError::Timeout) {
                show();
            }
        });
        let result = check::check(volume, &request, &|finding| {
            found.lock().unwrap_or_else(PoisonError::into_inner).push(finding);
        });
        drop(done);
        result
    })?;
    show();
    Ok((Checked::of(&progress), found.into_inner().unwrap_or_else(PoisonError::into_inner)))
}

/// What there is to check, as far as it shows without keys.
fn total(path: &Path) -> Checked {
    let backing::Contents { files, bytes, directories, links, nodes, .. } = backing::count(path);
    Checked { directories: directories + 1, files, links, nodes, bytes }
}

fn lines(findings: &[Finding], names: bool) -> Vec<Line> {
    let mut lines: Vec<Line> = findings.iter().map(|finding| Line::of(finding, names)).collect();
    sort(&mut lines);
    lines
}

/// Found by many threads; said in an order that does not depend on them.
fn sort(lines: &mut [Line]) {
    lines.sort_by(|a, b| (a.note, &a.path, a.fault as u32).cmp(&(b.note, &b.path, b.fault as u32)));
}
