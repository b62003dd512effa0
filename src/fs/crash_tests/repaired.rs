//! A repair is cut off after each of its changes, and done again: nothing is lost that it would have saved.

use std::collections::BTreeSet;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::Mutex;

use super::session::{Setup, kill, mount, unmount};
use super::{Choice, Dice, History, Image, Order, directory, look, recorder};
use crate::fs::core::{Caller, Filesystem};
use crate::fs::inode::ROOT;
use crate::volume::check::{self, Finding, Progress};
use crate::volume::repair::{self, Outcome};
use crate::volume::storage::{self, RenameFlags};
use crate::volume::testing::Vault;
use crate::volume::{Volume, format};

const SETUP: Setup = Setup { logged: true, full: 1 << 20 };

fn bytes(len: usize, tag: u8) -> Vec<u8> {
    (0..len).map(|n| (n % 251) as u8 ^ tag | 1).collect()
}

/// What every repair must have saved.
fn saved() -> BTreeSet<Vec<u8>> {
    let whole =
        [bytes(9000, 1), bytes(100, 2), bytes(5000, 3), bytes(300, 4), bytes(4096, 5), bytes(77, 7), bytes(66, 8)];
    // The one that is cut off: its first block.
    whole.into_iter().chain([bytes(12_000, 6)[..8192].to_vec()]).collect()
}

fn file(fs: &Filesystem, parent: u64, name: &[u8], contents: &[u8]) -> u64 {
    let caller = Caller { uid: fs.owner.uid, gid: fs.owner.gid };
    let made = fs.create(caller, parent, name, 0o600, 0, true).unwrap();
    fs.write(made.ino, 0, contents, false).unwrap();
    made.ino
}

/// A volume with everything wrong at once.
fn damaged(vault: &Vault, dir: &Path) {
    let fs = mount(vault, dir, SETUP).unwrap();
    let caller = Caller { uid: fs.owner.uid, gid: fs.owner.gid };
    let long = [b'l'; 220];
    file(&fs, ROOT, b"copies", &bytes(9000, 1));
    file(&fs, ROOT, b"mutable", &bytes(5000, 3));
    file(&fs, ROOT, b"cut", &bytes(12_000, 6));
    file(&fs, ROOT, &long, &bytes(100, 2));
    let below = fs.mkdir(caller, ROOT, b"dir", 0o700, 0).unwrap().ino;
    file(&fs, below, b"one", &bytes(300, 4));
    file(&fs, below, &long, &bytes(4096, 5));
    let other = fs.mkdir(caller, ROOT, b"other", 0o700, 0).unwrap().ino;
    let moved = file(&fs, other, b"moved", &bytes(77, 7));
    fs.setxattr(moved, "user.x".as_ref(), b"value", 0).unwrap();
    file(&fs, other, b"static", &bytes(50, 9));
    file(&fs, other, b"stays", &bytes(66, 8));
    unmount(&fs).unwrap();
    kill(vault, fs);

    let volume = vault.open(dir).unwrap();
    let root = volume.root().as_fd();
    let keys = volume.root_dir();
    let name = |plain: &[u8]| keys.name(volume.keys(), plain).unwrap();
    let open = |plain: &[u8]| storage::open_file(root, name(plain).as_str(), true).unwrap();
    storage::write_at(open(b"copies").as_fd(), &[0; 128], 128).unwrap();
    storage::write_at(open(b"mutable").as_fd(), &[9; 128], 256).unwrap();
    storage::set_len(open(b"cut").as_fd(), format::backing_len(8192)).unwrap();
    storage::unlink(root, &*name(&long).sidecar().unwrap().0).unwrap();
    let other = storage::open_dir(root, name(b"other").as_str()).unwrap();
    let other_keys = crate::volume::dir::DirKeys::load(other.as_fd(), volume.keys()).unwrap();
    let moved = other_keys.name(volume.keys(), b"moved").unwrap();
    storage::rename(other.as_fd(), moved.as_str(), root, moved.as_str(), RenameFlags::empty()).unwrap();
    let lost = other_keys.name(volume.keys(), b"static").unwrap();
    let lost = storage::open_file(other.as_fd(), lost.as_str(), true).unwrap();
    storage::write_at(lost.as_fd(), &[0; 256], 0).unwrap();
    storage::symlink(root, "lethefs.name.nothing", b"x").unwrap();
    let below = storage::open_dir(root, name(b"dir").as_str()).unwrap();
    storage::unlink(below.as_fd(), format::DIR_HEADER).unwrap();
    drop(storage::create_file(below.as_fd(), "lethefs.tmp.left", 0o600).unwrap());
    storage::unlink(root, format::DIR_HEADER).unwrap();
    storage::sync_filesystem(root).unwrap();
    vault.close(volume);
}

fn findings(volume: &Volume) -> Vec<Finding> {
    let found = Mutex::new(Vec::new());
    let request = check::Request { live: None, threads: 1, progress: &Progress::default() };
    check::check(volume, &request, &|finding| found.lock().unwrap().push(finding)).unwrap();
    found.into_inner().unwrap()
}

/// What `fsck --repair` does (service/fsck.rs).
fn repaired(vault: &Vault, dir: &Path) -> Result<(), String> {
    let volume = vault.open_to_check(dir).unwrap();
    repair::settle_log(&volume).map_err(|error| error.to_string())?;
    let found = findings(&volume);
    let outcomes = repair::repair(&volume, &found).map_err(|error| error.to_string())?;
    for (finding, outcome) in found.iter().zip(&outcomes) {
        if let Outcome::Failed(why) = outcome {
            return Err(format!("{finding:?}: {why}"));
        }
    }
    let left = findings(&volume);
    vault.close(volume);
    if left.is_empty() { Ok(()) } else { Err(format!("left: {left:?}")) }
}

/// Repairs what is in a directory to the end, mounts it, and looks for what must be there.
fn nothing_is_lost(vault: &Vault, dir: &Path) -> Result<(), String> {
    repaired(vault, dir)?;
    let fs = mount(vault, dir, SETUP)?;
    let now: BTreeSet<Vec<u8>> = look(&fs, 0)?.files.into_values().collect();
    unmount(&fs)?;
    kill(vault, fs);
    let lost: Vec<usize> = saved().difference(&now).map(Vec::len).collect();
    if lost.is_empty() { Ok(()) } else { Err(format!("files of these sizes are lost: {lost:?}")) }
}

#[test]
fn a_repair_cut_off_anywhere_is_finished_by_the_next() {
    let vault = Vault::new();
    let dir = directory();
    recorder::simulate(Image::new().put(dir.path(), false));
    recorder::record(true);
    vault.create(dir.path());
    damaged(&vault, dir.path());
    let begun = recorder::position();
    let done = repaired(&vault, dir.path());
    let (_, trace) = recorder::end();
    done.unwrap();
    let history = History::new(Image::new(), trace);
    let mut tried = 0;
    for cut in begun..=history.len() {
        let mut dice = Dice::new(cut as u64);
        let killed = history.kill(cut, 0).map(|left| left.all());
        let power = (0..3).map(|_| history.power_cut(cut, Choice { order: Order::Journal, seed: dice.next() }));
        for (n, image) in killed.into_iter().chain(power).enumerate() {
            let dir = directory();
            recorder::simulate(image.put(dir.path(), false));
            let result = nothing_is_lost(&vault, dir.path());
            recorder::end();
            result.unwrap_or_else(|what| panic!("cut after {} changes, state {n}: {what}", cut - begun));
            tried += 1;
        }
    }
    println!("{} changes, {tried} states", history.len() - begun);
    assert!(tried > 100);
}
