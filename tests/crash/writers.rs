//! Programs that write until they cannot, and know what was acknowledged to them.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
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

type Found = Result<(), String>;

pub(crate) trait Writer: Send {
    /// Until something fails. What is acknowledged after the cut has begun counts as not acknowledged: it may have been said
    /// of a medium that is no more (ext4's fsync can be told of success by a journal that was just shut down).
    fn run(&mut self, cut: &AtomicBool);
    /// How many times something was acknowledged.
    fn syncs(&self) -> u64;
    /// What was acknowledged is there; everything else is old or new.
    fn check(&self) -> Found;
}

/// Every kind of writer, each in a place of its own.
pub(crate) fn all(root: &Path, seed: u64) -> Vec<Box<dyn Writer>> {
    let mut random = Random::new(seed);
    let mut kinds: Vec<Box<dyn Writer>> = Vec::new();
    for (name, sync, unit, align, limit) in [
        ("sync-each", Sync::Each, 4096, 4096, 1 << 20),
        ("o-sync", Sync::Open, 3000, 1, 200_000),
        ("batched", Sync::Every(20), 5000, 1, 300_000),
        ("large", Sync::Every(5), 128 << 10, 128 << 10, 4 << 20),
        ("unsynced", Sync::Never, 9000, 1, 500_000),
    ] {
        kinds.push(Box::new(Overwriter {
            path: root.join(name).join("file"),
            sync,
            unit,
            align,
            limit,
            random: Random::new(random.below(u64::MAX)),
            acknowledged: Vec::new(),
            since: Vec::new(),
            count: 0,
        }));
    }
    for (name, unit, every) in [("append-each", 100, 1), ("append-batched", 700, 30)] {
        let path = root.join(name).join("file");
        kinds.push(Box::new(Appender { path, unit, every, acknowledged: 0, written: 0, count: 0 }));
    }
    for (name, how) in [("rename", How::Rename), ("truncate", How::Truncate)] {
        let path = root.join(name).join("file");
        kinds.push(Box::new(Replacer { path, how, acknowledged: None, attempted: 0 }));
    }
    let random = Random::new(random.below(u64::MAX));
    kinds.push(Box::new(Directories { root: root.join("directories"), acknowledged: Vec::new(), count: 0 }));
    kinds.push(Box::new(Names { root: root.join("names"), random, synced: Vec::new(), count: 0 }));
    kinds
}

fn make_parent(path: &Path) -> io::Result<()> {
    match fs::create_dir(path.parent().unwrap()) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
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
    /// The bytes of the last sync; 0 where there was none.
    acknowledged: Vec<u8>,
    /// Pieces since then.
    since: Vec<(u64, u64, u8)>,
    count: u64,
}

impl Overwriter {
    fn acknowledge(&mut self) {
        for (at, len, value) in self.since.drain(..) {
            let (at, end) = (at as usize, (at + len) as usize);
            if self.acknowledged.len() < end {
                self.acknowledged.resize(end, 0);
            }
            self.acknowledged[at..end].fill(value);
        }
        self.count += 1;
    }

    fn work(&mut self, cut: &AtomicBool) -> io::Result<()> {
        make_parent(&self.path)?;
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        if matches!(self.sync, Sync::Open) {
            options.custom_flags(libc::O_SYNC);
        }
        let file = options.open(&self.path)?;
        if !matches!(self.sync, Sync::Never) {
            file.sync_all()?;
            sync_dir(self.path.parent().unwrap())?;
        }
        for n in 1.. {
            let at = self.random.below(self.limit) / self.align * self.align;
            let len = if self.align > 1 { self.unit } else { 1 + self.random.below(self.unit) };
            let value = 1 + (n % 120) as u8;
            if self.since.len() > 3000 {
                break; // enough to check
            }
            self.since.push((at, len, value));
            file.write_all_at(&vec![value; len as usize], at)?;
            match self.sync {
                Sync::Each => file.sync_data()?,
                Sync::Every(every) if n % every == 0 => file.sync_data()?,
                Sync::Open => {}
                Sync::Every(_) | Sync::Never => continue,
            }
            if cut.load(Ordering::SeqCst) {
                break;
            }
            self.acknowledge();
        }
        Ok(())
    }
}

impl Writer for Overwriter {
    fn run(&mut self, cut: &AtomicBool) {
        let _ = self.work(cut);
    }

    fn syncs(&self) -> u64 {
        self.count
    }

    fn check(&self) -> Found {
        let shown = self.path.display();
        if self.count == 0 && !self.path.exists() {
            return Ok(());
        }
        let now = fs::read(&self.path).map_err(|error| format!("{shown}: {error}"))?;
        if now.len() < self.acknowledged.len() {
            return Err(format!("{shown}: {} bytes, {} were acknowledged", now.len(), self.acknowledged.len()));
        }
        // What each byte may be: a bit for each value.
        let mut allowed: Vec<u128> = self.acknowledged.iter().map(|value| 1 << value).collect();
        allowed.resize(allowed.len().max(now.len()), 1);
        for (at, len, value) in &self.since {
            let end = ((at + len) as usize).min(allowed.len());
            for bits in &mut allowed[(*at as usize).min(end)..end] {
                *bits |= 1 << value;
            }
        }
        for (at, byte) in now.iter().enumerate() {
            if *byte > 127 || allowed[at] & 1 << byte == 0 {
                let old = self.acknowledged.get(at);
                return Err(format!("{shown}: byte {at} is {byte}, acknowledged was {old:?}"));
            }
        }
        Ok(())
    }
}

/// Appends numbered lines.
struct Appender {
    path: PathBuf,
    unit: u64,
    every: u64,
    acknowledged: u64,
    written: u64,
    count: u64,
}

fn pattern(at: u64) -> u8 {
    1 + (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 57) as u8
}

impl Appender {
    fn work(&mut self, cut: &AtomicBool) -> io::Result<()> {
        make_parent(&self.path)?;
        let mut file = OpenOptions::new().append(true).create(true).open(&self.path)?;
        file.sync_all()?;
        sync_dir(self.path.parent().unwrap())?;
        for n in 1.. {
            let line: Vec<u8> = (self.written..self.written + self.unit).map(pattern).collect();
            self.written += self.unit;
            file.write_all(&line)?;
            if n % self.every == 0 {
                file.sync_data()?;
                if cut.load(Ordering::SeqCst) {
                    break;
                }
                self.acknowledged = self.written;
                self.count += 1;
            }
        }
        Ok(())
    }
}

impl Writer for Appender {
    fn run(&mut self, cut: &AtomicBool) {
        let _ = self.work(cut);
    }

    fn syncs(&self) -> u64 {
        self.count
    }

    fn check(&self) -> Found {
        let shown = self.path.display();
        if self.acknowledged == 0 && !self.path.exists() {
            return Ok(());
        }
        let now = fs::read(&self.path).map_err(|error| format!("{shown}: {error}"))?;
        if (now.len() as u64) < self.acknowledged || now.len() as u64 > self.written {
            return Err(format!("{shown}: {} bytes of {} to {}", now.len(), self.acknowledged, self.written));
        }
        for (at, byte) in now.iter().enumerate() {
            if *byte != pattern(at as u64) && (*byte != 0 || (at as u64) < self.acknowledged) {
                return Err(format!(
                    "{shown}: byte {at} of {} is wrong ({} acknowledged)",
                    now.len(),
                    self.acknowledged
                ));
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
    attempted: u64,
}

fn version(n: u64) -> Vec<u8> {
    let len = 20 + n * 7919 % 40_000;
    [n.to_le_bytes().to_vec(), (0..len).map(|at| pattern(at ^ n << 20)).collect()].concat()
}

impl Replacer {
    fn work(&mut self, cut: &AtomicBool) -> io::Result<()> {
        make_parent(&self.path)?;
        let dir = self.path.parent().unwrap().to_owned();
        sync_dir(dir.parent().unwrap())?;
        loop {
            let n = self.attempted + 1;
            let to = if self.how == How::Rename { dir.join("new") } else { self.path.clone() };
            let mut file = File::create(&to)?;
            self.attempted = n;
            file.write_all(&version(n))?;
            file.sync_all()?;
            if self.how == How::Rename {
                fs::rename(&to, &self.path)?;
            }
            sync_dir(&dir)?;
            if cut.load(Ordering::SeqCst) {
                return Ok(());
            }
            self.acknowledged = Some(n);
        }
    }
}

impl Writer for Replacer {
    fn run(&mut self, cut: &AtomicBool) {
        let _ = self.work(cut);
    }

    fn syncs(&self) -> u64 {
        self.acknowledged.unwrap_or(0)
    }

    fn check(&self) -> Found {
        let shown = self.path.display();
        let Some(acknowledged) = self.acknowledged else { return Ok(()) };
        let now = fs::read(&self.path).map_err(|error| format!("{shown}: {error}"))?;
        if now == version(acknowledged) {
            return Ok(());
        }
        let next = version(acknowledged + 1);
        let ok = match self.how {
            How::Rename => now == next,
            // Cut, and then some of the next: each byte of it or a zero.
            How::Truncate => {
                now.len() <= next.len() && now.iter().zip(&next).all(|(now, next)| *now == 0 || now == next)
            }
        };
        if ok {
            Ok(())
        } else {
            Err(format!("{shown}: {} bytes, neither version {acknowledged} nor the next", now.len()))
        }
    }
}

/// Directories with something in them, everything synced.
struct Directories {
    root: PathBuf,
    acknowledged: Vec<(PathBuf, u64)>,
    count: u64,
}

impl Directories {
    fn work(&mut self, cut: &AtomicBool) -> io::Result<()> {
        fs::create_dir(&self.root)?;
        sync_dir(self.root.parent().unwrap())?;
        for n in 1..=400_u64 {
            let name = if n.is_multiple_of(3) { format!("{}{n}", "d".repeat(220)) } else { format!("d{n}") };
            let dir = self.root.join(name);
            fs::create_dir(&dir)?;
            let path = dir.join(if n.is_multiple_of(2) { "f".repeat(200) } else { "file".into() });
            let mut file = File::create(&path)?;
            file.write_all(&version(n))?;
            file.sync_all()?;
            sync_dir(&dir)?;
            sync_dir(&self.root)?;
            if cut.load(Ordering::SeqCst) {
                break;
            }
            self.acknowledged.push((path, n));
            self.count += 1;
        }
        Ok(())
    }
}

impl Writer for Directories {
    fn run(&mut self, cut: &AtomicBool) {
        let _ = self.work(cut);
    }

    fn syncs(&self) -> u64 {
        self.count
    }

    fn check(&self) -> Found {
        for (path, n) in &self.acknowledged {
            let now = fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
            if now != version(*n) {
                return Err(format!("{}: not what was synced", path.display()));
            }
        }
        Ok(())
    }
}

/// Creates, renames and removes names short and long, and directories over directories; now and then syncs the directory.
struct Names {
    root: PathBuf,
    random: Random,
    synced: Vec<String>,
    count: u64,
}

impl Names {
    fn name(&mut self) -> String {
        let n = self.random.below(30);
        if n.is_multiple_of(2) { format!("{}{n}", "n".repeat(210)) } else { format!("n{n}") }
    }

    fn work(&mut self, cut: &AtomicBool) -> io::Result<()> {
        fs::create_dir(&self.root)?;
        for n in 1..=10_u64 {
            // These stay.
            let name = if n.is_multiple_of(2) { format!("{}{n}", "k".repeat(230)) } else { format!("keep{n}") };
            fs::write(self.root.join(&name), b"")?;
            File::open(self.root.join(&name))?.sync_all()?;
            sync_dir(&self.root)?;
            sync_dir(self.root.parent().unwrap())?;
            if cut.load(Ordering::SeqCst) {
                return Ok(());
            }
            self.synced.push(name);
        }
        while !cut.load(Ordering::SeqCst) {
            let (from, to) = (self.name(), self.name());
            let (from, to) = (self.root.join(from), self.root.join(to));
            let done = match self.random.below(7) {
                0 | 1 => fs::write(&from, b"contents"),
                2 => fs::rename(&from, &to),
                3 => fs::remove_file(&from),
                4 => fs::create_dir(&from),
                5 => fs::remove_dir(&from),
                _ => sync_dir(&self.root),
            };
            match done {
                Ok(()) => self.count += 1,
                Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTCONN | libc::ECONNABORTED)) => break,
                Err(_) => {}
            }
        }
        Ok(())
    }
}

impl Writer for Names {
    fn run(&mut self, cut: &AtomicBool) {
        let _ = self.work(cut);
    }

    fn syncs(&self) -> u64 {
        self.synced.len() as u64
    }

    fn check(&self) -> Found {
        for name in &self.synced {
            fs::read(self.root.join(name)).map_err(|error| format!("names/{name}: {error}"))?;
        }
        Ok(())
    }
}

/// Everything can be read, whatever it is.
pub(crate) fn read_all(root: &Path) -> Found {
    let mut todo = vec![root.to_owned()];
    while let Some(dir) = todo.pop() {
        let entries = fs::read_dir(&dir).map_err(|error| format!("{}: {error}", dir.display()))?;
        for entry in entries {
            let path = entry.map_err(|error| format!("{}: {error}", dir.display()))?.path();
            let kind = fs::symlink_metadata(&path).map_err(|error| format!("{}: {error}", path.display()))?;
            if kind.is_dir() {
                todo.push(path);
            } else {
                fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
            }
        }
    }
    Ok(())
}
