//! Programs that write and know what was acknowledged to them, so that after any trouble each can say what is wrong.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % limit
    }
}

/// What is wrong after a crash.
#[derive(Debug)]
pub(crate) enum Harm {
    /// It is there and cannot be read.
    Unreadable(String),
    /// What was acknowledged is not there, or something that nobody wrote is.
    Lost(String),
    /// It cannot be removed.
    Undeletable(String),
}

type Found = Result<(), Harm>;

/// What reading a path that should be there gave.
fn read(path: &Path) -> Result<Vec<u8>, Harm> {
    fs::read(path).map_err(|error| {
        let shown = format!("{}: {error}", path.display());
        if error.kind() == io::ErrorKind::NotFound { Harm::Lost(shown) } else { Harm::Unreadable(shown) }
    })
}

pub(crate) trait Writer: Send {
    /// Does a little, up to the next thing that is acknowledged. `false`: it has done enough.
    ///
    /// What is acknowledged after the cut has begun counts as not acknowledged: it may have been said of a medium that is no
    /// more (ext4's fsync can be told of success by a journal that was just shut down).
    fn step(&mut self, cut: &AtomicBool) -> io::Result<bool>;
    /// A step failed and life goes on: what it began may be there or not, now and later.
    fn failed(&mut self);
    /// Whatever it held open is not, any more.
    fn begin_again(&mut self);
    /// How many times something was acknowledged.
    fn syncs(&self) -> u64;
    /// What was acknowledged is there; everything else is old or new.
    fn check(&self) -> Found;
}

/// A writer in a directory of its own.
pub(crate) struct Worker {
    pub(crate) name: &'static str,
    pub(crate) place: PathBuf,
    pub(crate) writer: Box<dyn Writer>,
}

impl Worker {
    /// Until the cut, or until something fails.
    pub(crate) fn run(&mut self, cut: &AtomicBool) {
        while !cut.load(Ordering::SeqCst) && self.writer.step(cut).unwrap_or(false) {}
    }

    /// Everything it made can be read, and is what it may be.
    pub(crate) fn check(&self) -> Found {
        self.writer.check()?;
        match fs::symlink_metadata(&self.place) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            _ => read_all(&self.place),
        }
    }

    /// Everything it made can be removed.
    pub(crate) fn remove(&self) -> Found {
        match fs::remove_dir_all(&self.place) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Harm::Undeletable(format!("{}: {error}", self.place.display())))
            }
            _ => Ok(()),
        }
    }
}

/// Every kind of writer, each in a place of its own.
pub(crate) fn all(root: &Path, seed: u64) -> Vec<Worker> {
    let mut random = Random::new(seed);
    let mut workers: Vec<Worker> = Vec::new();
    for (name, sync, unit, align, limit) in [
        ("sync-each", Sync::Each, 4096, 4096, 1 << 20),
        ("o-sync", Sync::Open, 3000, 1, 200_000),
        ("batched", Sync::Every(20), 5000, 1, 300_000),
        ("large", Sync::Every(5), 128 << 10, 128 << 10, 4 << 20),
        ("unsynced", Sync::Never, 9000, 1, 500_000),
        ("sparse", Sync::Every(3), 3000, 1, 4 << 20),
    ] {
        let path = root.join(name).join("file");
        let random = Random::new(random.below(u64::MAX));
        let writer = Overwriter {
            path,
            sync,
            unit,
            align,
            limit,
            random,
            file: None,
            allowed: Vec::new(),
            len: 0,
            since: Vec::new(),
            pieces: 0,
            count: 0,
        };
        workers.push(Worker { name, place: root.join(name), writer: Box::new(writer) });
    }
    for (name, unit, every) in [("append-each", 100, 1), ("append-batched", 700, 30), ("append-large", 64 << 10, 4)] {
        let path = root.join(name).join("file");
        let writer =
            Appender { path, unit, every, file: None, acknowledged: 0, written: 0, doubtful: Vec::new(), count: 0 };
        workers.push(Worker { name, place: root.join(name), writer: Box::new(writer) });
    }
    for (name, how) in [("rename", How::Rename), ("truncate", How::Truncate)] {
        let path = root.join(name).join("file");
        let writer = Replacer { path, how, acknowledged: None, maybe: Vec::new(), attempted: 0, count: 0 };
        workers.push(Worker { name, place: root.join(name), writer: Box::new(writer) });
    }
    for (name, over) in [("directories", false), ("over-directories", true)] {
        let writer = Directories { root: root.join(name), over, n: 0, acknowledged: Vec::new() };
        workers.push(Worker { name, place: root.join(name), writer: Box::new(writer) });
    }
    let name = "moves";
    let writer = Moves {
        root: root.join(name),
        random: Random::new(random.below(u64::MAX)),
        n: 0,
        names: BTreeMap::new(),
        during: Vec::new(),
        doubtful: BTreeMap::new(),
        count: 0,
    };
    workers.push(Worker { name, place: root.join(name), writer: Box::new(writer) });
    let name = "names";
    let random = Random::new(random.below(u64::MAX));
    let writer = Names { root: root.join(name), random, kept: 0, synced: Vec::new() };
    workers.push(Worker { name, place: root.join(name), writer: Box::new(writer) });
    workers
}

fn make_dir(path: &Path) -> io::Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// A name of its own for each number, every other one too long to be encrypted within 255 bytes.
fn name_of(letter: &str, n: u64) -> String {
    if n.is_multiple_of(2) { format!("{}{n}", letter.repeat(220 / letter.len())) } else { format!("{letter}{n}") }
}

#[derive(Clone, Copy)]
enum Sync {
    Each,
    Open,
    Every(u64),
    Never,
}

/// Writes pieces of one byte value over and over.
struct Overwriter {
    path: PathBuf,
    sync: Sync,
    unit: u64,
    align: u64,
    limit: u64,
    random: Random,
    file: Option<File>,
    /// What each byte may be, a bit for each value: one, unless a sync failed.
    allowed: Vec<u128>,
    /// What was acknowledged of the length.
    len: usize,
    /// Pieces since the last sync.
    since: Vec<(u64, u64, u8)>,
    pieces: u64,
    count: u64,
}

impl Overwriter {
    fn settle(&mut self, exactly: bool) {
        for (at, len, value) in self.since.drain(..) {
            let (at, end) = (at as usize, (at + len) as usize);
            if self.allowed.len() < end {
                // A hole.
                self.allowed.resize(end, 1);
            }
            for bits in &mut self.allowed[at..end] {
                *bits = if exactly { 1 << value } else { *bits | 1 << value };
            }
            if exactly {
                self.len = self.len.max(end);
            }
        }
    }

    fn open(&mut self) -> io::Result<&File> {
        if self.file.is_none() {
            make_dir(self.path.parent().unwrap())?;
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false);
            if matches!(self.sync, Sync::Open) {
                options.custom_flags(libc::O_SYNC);
            }
            let file = options.open(&self.path)?;
            if !matches!(self.sync, Sync::Never) {
                file.sync_all()?;
                sync_dir(self.path.parent().unwrap())?;
                sync_dir(self.path.parent().unwrap().parent().unwrap())?;
            }
            self.file = Some(file);
        }
        Ok(self.file.as_ref().unwrap())
    }
}

impl Writer for Overwriter {
    fn step(&mut self, cut: &AtomicBool) -> io::Result<bool> {
        self.open()?;
        if self.since.len() > 3000 {
            return Ok(false); // enough to check
        }
        self.pieces += 1;
        let at = self.random.below(self.limit) / self.align * self.align;
        let len = if self.align > 1 { self.unit } else { 1 + self.random.below(self.unit) };
        let value = 1 + (self.pieces % 120) as u8;
        self.since.push((at, len, value));
        let (sync, pieces) = (self.sync, self.pieces);
        let file = self.open()?;
        file.write_all_at(&vec![value; len as usize], at)?;
        match sync {
            Sync::Each => file.sync_data()?,
            Sync::Every(every) if pieces.is_multiple_of(every) => file.sync_data()?,
            Sync::Open => {}
            Sync::Every(_) | Sync::Never => return Ok(true),
        }
        if cut.load(Ordering::SeqCst) {
            return Ok(false);
        }
        self.settle(true);
        self.count += 1;
        Ok(true)
    }

    fn failed(&mut self) {
        self.settle(false);
    }

    fn begin_again(&mut self) {
        self.file = None;
        // Written out or not, by an unmount that nobody heard an error from.
        self.settle(false);
    }

    fn syncs(&self) -> u64 {
        self.count
    }

    fn check(&self) -> Found {
        let shown = self.path.display();
        if self.count == 0 && !self.path.exists() {
            return Ok(());
        }
        let now = read(&self.path)?;
        if now.len() < self.len {
            return Err(Harm::Lost(format!("{shown}: {} bytes, {} were acknowledged", now.len(), self.len)));
        }
        let mut allowed = self.allowed.clone();
        allowed.resize(allowed.len().max(now.len()), 1);
        for (at, len, value) in &self.since {
            let end = ((at + len) as usize).min(allowed.len());
            for bits in &mut allowed[(*at as usize).min(end)..end] {
                *bits |= 1 << value;
            }
        }
        for (at, byte) in now.iter().enumerate() {
            let zero_beyond = *byte == 0 && at >= self.len;
            if !zero_beyond && (*byte > 127 || allowed[at] & 1 << byte == 0) {
                return Err(Harm::Lost(format!("{shown}: byte {at} is {byte}, it may be {:#x}", allowed[at])));
            }
        }
        Ok(())
    }
}

/// Appends a known sequence of bytes.
struct Appender {
    path: PathBuf,
    unit: u64,
    every: u64,
    file: Option<File>,
    acknowledged: u64,
    written: u64,
    /// Appended, and then the sync failed: these bytes or zeros.
    doubtful: Vec<Range<u64>>,
    count: u64,
}

fn pattern(at: u64) -> u8 {
    1 + (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 57) as u8
}

impl Writer for Appender {
    fn step(&mut self, cut: &AtomicBool) -> io::Result<bool> {
        if self.file.is_none() {
            make_dir(self.path.parent().unwrap())?;
            let file = OpenOptions::new().append(true).create(true).open(&self.path)?;
            file.sync_all()?;
            sync_dir(self.path.parent().unwrap())?;
            sync_dir(self.path.parent().unwrap().parent().unwrap())?;
            self.written = file.metadata()?.len();
            self.file = Some(file);
        }
        let file = self.file.as_mut().unwrap();
        for _ in 0..self.every {
            let line: Vec<u8> = (self.written..self.written + self.unit).map(pattern).collect();
            self.written += self.unit;
            file.write_all(&line)?;
        }
        file.sync_data()?;
        if cut.load(Ordering::SeqCst) {
            return Ok(false);
        }
        self.acknowledged = self.written;
        self.count += 1;
        Ok(true)
    }

    fn failed(&mut self) {
        let from = self.acknowledged;
        if self.written > from {
            self.doubtful.push(from..self.written);
        }
        // Where the next one goes is the kernel's word.
        if let Some(Ok(meta)) = self.file.as_ref().map(File::metadata) {
            self.written = meta.len();
        }
    }

    fn begin_again(&mut self) {
        self.failed();
        self.file = None;
    }

    fn syncs(&self) -> u64 {
        self.count
    }

    fn check(&self) -> Found {
        let shown = self.path.display();
        if self.acknowledged == 0 && !self.path.exists() {
            return Ok(());
        }
        let now = read(&self.path)?;
        let most = self.doubtful.iter().map(|range| range.end).fold(self.written, u64::max);
        if (now.len() as u64) < self.acknowledged || now.len() as u64 > most {
            return Err(Harm::Lost(format!("{shown}: {} bytes of {} to {most}", now.len(), self.acknowledged)));
        }
        for (at, byte) in (0..).zip(&now) {
            let doubtful = || at >= self.acknowledged || self.doubtful.iter().any(|range| range.contains(&at));
            if *byte != pattern(at) && !(*byte == 0 && doubtful()) {
                let (len, sure) = (now.len(), self.acknowledged);
                return Err(Harm::Lost(format!("{shown}: byte {at} of {len} is wrong ({sure} acknowledged)")));
            }
        }
        Ok(())
    }
}

#[derive(Clone, Copy, PartialEq)]
enum How {
    Rename,
    Truncate,
}

/// Replaces a file's contents as a whole: by a rename of a new file, or by cutting and writing it anew.
struct Replacer {
    path: PathBuf,
    how: How,
    acknowledged: Option<u64>,
    /// Begun since then.
    maybe: Vec<u64>,
    attempted: u64,
    count: u64,
}

fn version(n: u64) -> Vec<u8> {
    let len = 20 + n * 7919 % 40_000;
    [n.to_le_bytes().to_vec(), (0..len).map(|at| pattern(at ^ n << 20)).collect()].concat()
}

impl Writer for Replacer {
    fn step(&mut self, cut: &AtomicBool) -> io::Result<bool> {
        let dir = self.path.parent().unwrap();
        if self.attempted == 0 {
            make_dir(dir)?;
            sync_dir(dir.parent().unwrap())?;
        }
        self.attempted += 1;
        let n = self.attempted;
        let to = if self.how == How::Rename { dir.join("new") } else { self.path.clone() };
        // Before: it may be cut and the answer not heard.
        if self.how == How::Truncate {
            self.maybe.push(n);
        }
        let mut file = File::create(&to)?;
        file.write_all(&version(n))?;
        file.sync_all()?;
        if self.how == How::Rename {
            self.maybe.push(n);
            fs::rename(&to, &self.path)?;
        }
        sync_dir(dir)?;
        if cut.load(Ordering::SeqCst) {
            return Ok(false);
        }
        self.acknowledged = Some(n);
        self.maybe.clear();
        self.count += 1;
        Ok(true)
    }

    fn failed(&mut self) {}

    fn begin_again(&mut self) {}

    fn syncs(&self) -> u64 {
        self.count
    }

    fn check(&self) -> Found {
        let shown = self.path.display();
        let Some(acknowledged) = self.acknowledged else { return Ok(()) };
        let now = read(&self.path)?;
        if now == version(acknowledged) {
            return Ok(());
        }
        let ok = self.maybe.iter().any(|n| {
            let next = version(*n);
            match self.how {
                How::Rename => now == next,
                // Cut, and then some of the next: each byte of it or a zero.
                How::Truncate => {
                    now.len() <= next.len() && now.iter().zip(&next).all(|(now, next)| *now == 0 || now == next)
                }
            }
        });
        if ok {
            Ok(())
        } else {
            let (len, maybe) = (now.len(), &self.maybe);
            Err(Harm::Lost(format!("{shown}: {len} bytes, neither version {acknowledged} nor one of {maybe:?}")))
        }
    }
}

/// Directories with something in them, everything synced: made in place, or moved over an empty one.
struct Directories {
    root: PathBuf,
    over: bool,
    n: u64,
    acknowledged: Vec<(PathBuf, u64)>,
}

impl Directories {
    /// What is moved over `d{n}`: short and long names in all four combinations.
    fn from(&self) -> String {
        name_of("from", 2 * self.n + self.n / 2 % 2)
    }
}

impl Writer for Directories {
    fn step(&mut self, cut: &AtomicBool) -> io::Result<bool> {
        if self.n == 0 {
            make_dir(&self.root)?;
            sync_dir(self.root.parent().unwrap())?;
        }
        self.n += 1;
        let n = self.n;
        if n > 400 {
            return Ok(false);
        }
        let to = self.root.join(name_of("d", n));
        let made = if self.over { self.root.join(self.from()) } else { to.clone() };
        fs::create_dir(&made)?;
        let name = if n.is_multiple_of(3) { "f".repeat(200) } else { "file".into() };
        let mut file = File::create(made.join(&name))?;
        file.write_all(&version(n))?;
        file.sync_all()?;
        sync_dir(&made)?;
        if self.over {
            fs::create_dir(&to)?;
            if n.is_multiple_of(2) {
                sync_dir(&self.root)?;
            }
            fs::rename(&made, &to)?;
        }
        sync_dir(&self.root)?;
        if cut.load(Ordering::SeqCst) {
            return Ok(false);
        }
        self.acknowledged.push((to.join(name), n));
        Ok(true)
    }

    fn failed(&mut self) {
        // Out of the next one's way.
        if self.over {
            let _ = fs::remove_dir_all(self.root.join(self.from()));
        }
        // Not there, which is another thing than not to be had at the moment.
        if matches!(self.root.try_exists(), Ok(false)) {
            self.n = 0;
        }
    }

    fn begin_again(&mut self) {}

    fn syncs(&self) -> u64 {
        self.acknowledged.len() as u64
    }

    fn check(&self) -> Found {
        for (path, n) in &self.acknowledged {
            if read(path)? != version(*n) {
                return Err(Harm::Lost(format!("{}: not what was synced", path.display())));
            }
        }
        Ok(())
    }
}

/// What a name may stand for.
#[derive(Clone, Debug)]
enum Meaning {
    /// One of these versions, or nothing.
    OneOf(Vec<Option<u64>>),
    /// Anything that can be read.
    Anything,
}

/// Makes, renames, replaces and removes names short and long; the directory is synced after each.
struct Moves {
    root: PathBuf,
    random: Random,
    n: u64,
    /// What was acknowledged: a version, or that it is gone.
    names: BTreeMap<String, Option<u64>>,
    /// While something is under way, instead.
    during: Vec<(String, Meaning)>,
    doubtful: BTreeMap<String, Meaning>,
    count: u64,
}

impl Moves {
    fn present(&mut self) -> Option<(String, u64)> {
        let present: Vec<_> =
            self.names.iter().filter_map(|(name, version)| Some((name.clone(), (*version)?))).collect();
        let len = present.len() as u64;
        if len == 0 { None } else { Some(present[self.random.below(len) as usize].clone()) }
    }
}

impl Writer for Moves {
    fn step(&mut self, cut: &AtomicBool) -> io::Result<bool> {
        if self.n == 0 {
            make_dir(&self.root)?;
            sync_dir(self.root.parent().unwrap())?;
        }
        self.n += 1;
        let n = self.n;
        let either = |a, b| Meaning::OneOf(vec![a, b]);
        let full = self.names.values().filter(|version| version.is_some()).count() > 30;
        let one = self.present();
        let mut then: Vec<(String, Option<u64>)> = Vec::new();
        match (self.random.below(if full { 3 } else { 6 }), one) {
            (0, Some((name, version))) => {
                self.during = vec![(name.clone(), either(Some(version), None))];
                fs::remove_file(self.root.join(&name))?;
                then.push((name, None));
            }
            (1 | 2, Some((from, version))) => {
                // To a new name, or over another.
                let (to, before) = match self.present() {
                    Some((to, before)) if to != from && n.is_multiple_of(3) => (to, Some(before)),
                    _ => (name_of("m", n), None),
                };
                self.during =
                    vec![(from.clone(), either(Some(version), None)), (to.clone(), either(before, Some(version)))];
                fs::rename(self.root.join(&from), self.root.join(&to))?;
                then.extend([(from, None), (to, Some(version))]);
            }
            _ => {
                let name = name_of("m", n);
                self.during = vec![(name.clone(), Meaning::Anything)];
                let mut file = File::options().write(true).create_new(true).open(self.root.join(&name))?;
                file.write_all(&version(n))?;
                file.sync_all()?;
                then.push((name, Some(n)));
            }
        }
        sync_dir(&self.root)?;
        if cut.load(Ordering::SeqCst) {
            return Ok(false);
        }
        self.names.extend(then);
        self.during.clear();
        self.count += 1;
        Ok(true)
    }

    fn failed(&mut self) {
        for (name, meaning) in std::mem::take(&mut self.during) {
            self.names.remove(&name);
            self.doubtful.insert(name, meaning);
        }
        // Not there, which is another thing than not to be had at the moment.
        if matches!(self.root.try_exists(), Ok(false)) {
            self.n = 0;
        }
    }

    fn begin_again(&mut self) {
        self.failed();
    }

    fn syncs(&self) -> u64 {
        self.count
    }

    fn check(&self) -> Found {
        let mut meanings: BTreeMap<&String, Meaning> =
            self.names.iter().map(|(name, version)| (name, Meaning::OneOf(vec![*version]))).collect();
        meanings.extend(self.doubtful.iter().map(|(name, meaning)| (name, meaning.clone())));
        meanings.extend(self.during.iter().map(|(name, meaning)| (name, meaning.clone())));
        for (name, meaning) in meanings {
            let path = self.root.join(name);
            let there = fs::symlink_metadata(&path).is_ok();
            let now = if there { Some(read(&path)?) } else { None };
            let ok = match &meaning {
                Meaning::Anything => true,
                Meaning::OneOf(versions) => versions.iter().any(|n| now == n.map(version)),
            };
            if !ok {
                return Err(Harm::Lost(format!("{}: {:?}, not {meaning:?}", path.display(), now.map(|now| now.len()))));
            }
        }
        Ok(())
    }
}

/// Creates, renames and removes names short and long, and directories over directories, as fast as it can; now and then
/// syncs the directory.
struct Names {
    root: PathBuf,
    random: Random,
    kept: u64,
    synced: Vec<String>,
}

impl Names {
    fn path(&mut self) -> PathBuf {
        let n = self.random.below(30);
        self.root.join(name_of("n", n))
    }
}

impl Writer for Names {
    fn step(&mut self, cut: &AtomicBool) -> io::Result<bool> {
        if self.kept < 10 {
            // These stay.
            make_dir(&self.root)?;
            self.kept += 1;
            let name = name_of("keep", self.kept);
            fs::write(self.root.join(&name), b"")?;
            File::open(self.root.join(&name))?.sync_all()?;
            sync_dir(&self.root)?;
            sync_dir(self.root.parent().unwrap())?;
            if cut.load(Ordering::SeqCst) {
                return Ok(false);
            }
            self.synced.push(name);
            return Ok(true);
        }
        let (from, to) = (self.path(), self.path());
        let done = match self.random.below(7) {
            0 | 1 => fs::write(&from, b"contents"),
            2 => fs::rename(&from, &to),
            3 => fs::remove_file(&from),
            4 => fs::create_dir(&from),
            5 => fs::remove_dir(&from),
            _ => sync_dir(&self.root),
        };
        use io::ErrorKind::{AlreadyExists, DirectoryNotEmpty, IsADirectory, NotADirectory, NotFound};
        match done {
            // What it asks for at random need not make sense.
            Err(error)
                if matches!(
                    error.kind(),
                    AlreadyExists | DirectoryNotEmpty | IsADirectory | NotADirectory | NotFound
                ) =>
            {
                Ok(true)
            }
            Err(error) => Err(error),
            Ok(()) => Ok(true),
        }
    }

    fn failed(&mut self) {}

    fn begin_again(&mut self) {}

    fn syncs(&self) -> u64 {
        self.synced.len() as u64
    }

    fn check(&self) -> Found {
        self.synced.iter().try_for_each(|name| read(&self.root.join(name)).map(drop))
    }
}

/// Everything can be read, whatever it is.
pub(crate) fn read_all(root: &Path) -> Found {
    let told = |path: &Path| {
        let shown = path.display().to_string();
        move |error: io::Error| Harm::Unreadable(format!("{shown}: {error}"))
    };
    let mut todo = vec![root.to_owned()];
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(&dir).map_err(told(&dir))? {
            let path = entry.map_err(told(&dir))?.path();
            let kind = fs::symlink_metadata(&path).map_err(told(&path))?;
            if kind.is_dir() {
                todo.push(path);
            } else {
                fs::read(&path).map_err(told(&path))?;
            }
        }
    }
    Ok(())
}
