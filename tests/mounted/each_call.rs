//! One workload, and each of its calls to the backing store made to fail in turn: who asked hears of it or it does not
//! matter, what was acknowledged is there at once and after the next mount, and the mount goes on.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::bytes;
use crate::faults::OnFaulty;
use crate::support::faulty::{Fate, Op};

/// What is at a path; of a directory only that it is there.
#[derive(Clone, Debug, PartialEq)]
enum State {
    Nothing,
    File(Vec<u8>),
    Directory,
    Link(PathBuf),
}

/// The files of one run, and what each may be.
struct Model {
    dir: PathBuf,
    /// One state: acknowledged. More: something failed, and each byte may be as in any of them.
    may_be: BTreeMap<String, Vec<State>>,
    failed: Vec<(&'static str, i32)>,
    /// A flush has just failed, of this run's mount, which began then.
    flush_failed: Arc<AtomicBool>,
    mounted: Instant,
    heard_at_once: u64,
}

fn long(letter: &str) -> String {
    letter.repeat(220)
}

fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

impl Model {
    /// Everything that the workload changes, as it is before.
    fn prepare(dir: &Path) -> Self {
        fs::create_dir(dir).unwrap();
        let mut model = Self {
            dir: dir.to_owned(),
            may_be: BTreeMap::new(),
            failed: Vec::new(),
            flush_failed: Arc::default(),
            mounted: Instant::now(),
            heard_at_once: 0,
        };
        let mut files: Vec<(String, usize)> = ["a", "b", "c", "d", "g", "h", "o", "p"]
            .into_iter()
            .zip([10_000, 9000, 12_000, 20_000, 3000, 10, 400_000, 10_000])
            .map(|(name, len)| (name.to_owned(), len))
            .collect();
        files.extend([(long("i"), 100), (long("r"), 5000)]);
        for (name, len) in files {
            let data = bytes(len, len as u64);
            fs::write(dir.join(&name), &data).unwrap();
            model.may_be.insert(name, vec![State::File(data)]);
        }
        for name in ["j", "m", "n"] {
            fs::create_dir(dir.join(name)).unwrap();
            model.may_be.insert(name.into(), vec![State::Directory]);
        }
        fs::write(dir.join("m/file"), b"in it").unwrap();
        model.may_be.insert("m/file".into(), vec![State::File(b"in it".to_vec())]);
        model
    }

    fn file(&self, name: &str) -> Vec<u8> {
        match &self.may_be[name][..] {
            [State::File(data)] => data.clone(),
            other => panic!("{name}: {other:?}"),
        }
    }

    /// Does something that ends with an acknowledgement, after which these paths are so.
    fn step(&mut self, what: &'static str, then: &[(&str, State)], step: impl FnOnce(&Path) -> io::Result<()>) {
        let done = step(&self.dir);
        // What is acknowledged has been flushed: whoever waited for that flush hears of it, and not only the next one. (In
        // its first second a mount flushes nothing of its own accord.)
        if self.flush_failed.swap(false, Ordering::SeqCst) && self.mounted.elapsed() < Duration::from_secs(1) {
            assert!(done.is_err(), "{what}: a flush failed, and nobody was told");
            self.heard_at_once += 1;
        }
        for (name, state) in then {
            let may_be = self.may_be.entry((*name).to_owned()).or_insert_with(|| vec![State::Nothing]);
            if done.is_ok() {
                may_be.clear();
            }
            may_be.push(state.clone());
        }
        if let Err(error) = done {
            let errno = error.raw_os_error().unwrap_or_else(|| panic!("{what}: {error}"));
            self.failed.push((what, errno));
        }
    }

    /// In the same order, whatever fails.
    fn workload(&mut self) {
        let patched = |mut data: Vec<u8>, at: usize, new: &[u8]| {
            data.resize(data.len().max(at + new.len()), 0);
            data[at..at + new.len()].copy_from_slice(new);
            data
        };
        let open = |dir: &Path, name: &str| File::options().read(true).write(true).open(dir.join(name));

        let (b, h, o) = (self.file("b"), self.file("h"), self.file("o"));
        let a = patched(self.file("a"), 3000, &bytes(5000, 91));
        self.step("overwrite", &[("a", State::File(a))], |dir| {
            let file = open(dir, "a")?;
            file.write_all_at(&bytes(5000, 91), 3000)?;
            file.sync_all()
        });
        let appended = patched(self.file("p"), 10_000, &bytes(6000, 92));
        self.step("append", &[("p", State::File(appended))], |dir| {
            let file = open(dir, "p")?;
            file.write_all_at(&bytes(6000, 92), 10_000)?;
            file.sync_data()
        });
        self.step("O_SYNC", &[("b", State::File(patched(b, 0, &bytes(4096, 93))))], |dir| {
            let file = File::options().write(true).custom_flags(libc::O_SYNC).open(dir.join("b"))?;
            file.write_all_at(&bytes(4096, 93), 0)
        });
        self.step("O_TRUNC", &[("c", State::File(Vec::new())), ("c", State::File(bytes(7000, 94)))], |dir| {
            let mut file = File::create(dir.join("c"))?;
            file.write_all(&bytes(7000, 94))?;
            file.sync_all()
        });
        let mut d = self.file("d");
        d.truncate(5001);
        self.step("cut", &[("d", State::File(d))], |dir| {
            let file = open(dir, "d")?;
            file.set_len(5001)?;
            file.sync_all()
        });
        self.step("new", &[("e", State::File(Vec::new())), ("e", State::File(bytes(9000, 95)))], |dir| {
            let mut file = File::create(dir.join("e"))?;
            file.write_all(&bytes(9000, 95))?;
            file.sync_all()?;
            sync_dir(dir)
        });
        let name = long("l");
        self.step("new long", &[(&name, State::File(Vec::new())), (&name, State::File(bytes(10, 96)))], |dir| {
            let mut file = File::create(dir.join(&name))?;
            file.write_all(&bytes(10, 96))?;
            file.sync_data()?;
            sync_dir(dir)
        });
        let content = State::File(bytes(5000, 97));
        self.step(
            "mkdir",
            &[("f", State::Directory), ("f/file", State::File(Vec::new())), ("f/file", content)],
            |dir| {
                fs::create_dir(dir.join("f"))?;
                let mut file = File::create(dir.join("f/file"))?;
                file.write_all(&bytes(5000, 97))?;
                file.sync_all()?;
                sync_dir(&dir.join("f"))?;
                sync_dir(dir)
            },
        );
        self.step("replace", &[("g", State::File(bytes(6000, 98)))], |dir| {
            let mut file = File::create(dir.join("g.new"))?;
            file.write_all(&bytes(6000, 98))?;
            file.sync_all()?;
            fs::rename(dir.join("g.new"), dir.join("g"))?;
            sync_dir(dir)
        });
        let (from, to) = (long("r"), long("s"));
        let moved = State::File(self.file(&from));
        self.step("rename long", &[(&from, State::Nothing), (&to, moved)], |dir| {
            fs::rename(dir.join(&from), dir.join(&to))?;
            sync_dir(dir)
        });
        self.step("sparse", &[("h", State::File(patched(h, 100_000, &bytes(3000, 99))))], |dir| {
            let file = open(dir, "h")?;
            file.write_all_at(&bytes(3000, 99), 100_000)?;
            file.sync_all()
        });
        let name = long("i");
        self.step("unlink", &[(&name, State::Nothing)], |dir| {
            fs::remove_file(dir.join(&name))?;
            sync_dir(dir)
        });
        self.step("rmdir", &[("j", State::Nothing)], |dir| {
            fs::remove_dir(dir.join("j"))?;
            sync_dir(dir)
        });
        let target = PathBuf::from("t".repeat(2000));
        self.step("symlink", &[("k", State::Link(target.clone()))], |dir| {
            std::os::unix::fs::symlink(&target, dir.join("k"))?;
            sync_dir(dir)
        });
        let inside = State::File(b"in it".to_vec());
        self.step("over", &[("m", State::Nothing), ("m/file", State::Nothing), ("n/file", inside)], |dir| {
            fs::rename(dir.join("m"), dir.join("n"))?;
            sync_dir(dir)
        });
        self.step("large", &[("o", State::File(patched(o, 20_000, &bytes(300_000, 100))))], |dir| {
            let file = open(dir, "o")?;
            file.write_all_at(&bytes(300_000, 100), 20_000)?;
            file.sync_data()
        });
    }

    fn check(&self, when: &str) {
        for (name, may_be) in &self.may_be {
            let path = self.dir.join(name);
            let now = match fs::symlink_metadata(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => State::Nothing,
                Err(error) => panic!("{when}, {name}: {error}"),
                Ok(meta) if meta.is_dir() => State::Directory,
                Ok(meta) if meta.is_symlink() => State::Link(fs::read_link(&path).unwrap()),
                Ok(_) => State::File(fs::read(&path).unwrap_or_else(|error| panic!("{when}, {name}: {error}"))),
            };
            assert!(allowed(&now, may_be), "{when}, {name}: {}", shown(&now, may_be));
        }
    }
}

/// Where something failed, each byte as in one of the states, or a zero in what was new.
fn allowed(now: &State, may_be: &[State]) -> bool {
    if may_be.contains(now) {
        return true;
    }
    let State::File(now) = now else { return false };
    let files: Vec<&Vec<u8>> =
        may_be.iter().filter_map(|state| if let State::File(data) = state { Some(data) } else { None }).collect();
    let (least, most) = (files.iter().map(|f| f.len()).min(), files.iter().map(|f| f.len()).max());
    let (Some(least), Some(most), true) = (least, most, may_be.len() > 1) else { return false };
    (least..=most).contains(&now.len())
        && now
            .iter()
            .enumerate()
            .all(|(at, byte)| files.iter().any(|file| file.get(at) == Some(byte)) || (*byte == 0 && at >= least))
}

fn shown(now: &State, may_be: &[State]) -> String {
    let short = |state: &State| match state {
        State::File(data) => format!("{} bytes", data.len()),
        other => format!("{other:?}"),
    };
    format!("{}, may be {:?}", short(now), may_be.iter().map(short).collect::<Vec<_>>())
}

/// The fault that a call gets; none if it is not one that can.
fn every_call(what: &str, fault: impl Fn(Op, usize) -> Option<Fate> + Copy + Send + 'static, told: &[i32]) {
    let on = OnFaulty::new();
    let v = &on.v;
    let counted = Arc::new(AtomicU64::new(0));
    let fail = |n: u64, flush_failed: &Arc<AtomicBool>| {
        counted.store(0, Ordering::SeqCst);
        let (counted, flush_failed) = (counted.clone(), flush_failed.clone());
        on.store.rule(move |call| match fault(call.op, call.len) {
            Some(fate) if counted.fetch_add(1, Ordering::SeqCst) + 1 == n => {
                flush_failed.store(matches!(call.op, Op::Fsync | Op::FsyncDir), Ordering::SeqCst);
                fate
            }
            _ => Fate::Pass,
        });
    };
    // Without a fault: how many calls there are. The log's own flush each second may be one more.
    let mut dry = Model::prepare(&v.at("dry"));
    v.remount(&[]);
    fail(u64::MAX, &dry.flush_failed);
    dry.workload();
    let calls = counted.load(Ordering::SeqCst);
    assert!(dry.failed.is_empty() && calls > 20, "{calls}: {:?}", dry.failed);
    on.store.heal();
    let mut models: Vec<Model> = (0..calls).map(|n| Model::prepare(&v.at(format!("run{n}")))).collect();
    let mut mounted = Instant::now();
    v.remount(&[]);

    let (mut heard, mut at_once, mut unclean) = (0, 0, 0);
    for (n, model) in (1..).zip(&mut models) {
        fail(n, &model.flush_failed);
        model.mounted = mounted;
        model.workload();
        let when = format!("{what} at call {n} of {calls}, told {:?}", model.failed);
        assert!(model.failed.iter().all(|(_, errno)| told.contains(errno)), "{when}");
        heard += u64::from(!model.failed.is_empty());
        at_once += model.heard_at_once;
        model.check(&when);
        // Another file, whatever happened to these.
        on.store.heal();
        assert_eq!(fs::read(v.at("dry/e")).unwrap(), bytes(9000, 95), "{when}");
        if n % 3 == 0 {
            v.crash();
        } else {
            v.cli(&["umount", "mnt"]).is(0);
            unclean += u64::from(v.daemon_exit() != Some(0));
        }
        mounted = Instant::now();
        v.mount(&[]);
        model.check(&format!("mounted again: {when}"));
        fs::write(v.at("dry/after"), bytes(100, n)).unwrap();
    }
    // Everything once more, after all of it.
    v.remount(&[]);
    models.iter().for_each(|model| model.check("at the end"));
    v.umount();
    eprintln!(
        "{what}: {calls} calls, each failed once: {heard} heard by a program, {at_once} of them failed flushes, {unclean} unclean ends"
    );
    assert_eq!(heard > 0, !told.is_empty());
}

#[test]
fn no_space_at_every_call() {
    every_call("ENOSPC", |_, _| Some(Fate::Fail(libc::ENOSPC)), &[libc::ENOSPC]);
}

#[test]
fn over_quota_at_every_call() {
    every_call("EDQUOT", |_, _| Some(Fate::Fail(libc::EDQUOT)), &[libc::EDQUOT]);
}

#[test]
fn io_error_at_every_call() {
    every_call("EIO", |_, _| Some(Fate::Fail(libc::EIO)), &[libc::EIO]);
}

/// A short write is not an error: nobody hears of it, and all is there.
#[test]
fn short_at_every_write() {
    every_call("short", |op, len| (op == Op::Write).then_some(Fate::Short(len / 2)), &[]);
}
