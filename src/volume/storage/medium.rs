//! For tests: the medium under a backing directory. From a [record](super::recorder) of changes it makes states that a
//! power cut or a kill may leave (docs/FORMAT.md section 11), and puts them into real directories.
//!
//! - Contents: of what was written to a file since its last flush any sectors, each as it was after any of those writes.
//!   Growth by writing is there or not, independently of that.
//! - Everything else is metadata, and journalled. A state has all of it up to some moment, which is not before what a flush
//!   covers ([`Order::Journal`]: ext4, xfs); or any part of it that respects the order within each directory
//!   ([`Order::Directories`]: less than these filesystems promise).
//! - A kill leaves everything, but a write may have ended at a page border.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::{CString, OsStr};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use super::recorder::{Numbers, Op};

const SECTOR: u64 = 512;
const PAGE: u64 = 4096;
/// Numbers of the simulation begin here: no filesystem of a test gives out so high ones.
pub(crate) const ROOT: u64 = 1 << 40;

/// A seeded generator: the same seed, the same states.
#[derive(Clone)]
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        let mut dice = Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0xd1b5_4a32_d192_ed03);
        dice.0 |= u64::from(dice.0 == 0);
        for _ in 0..4 {
            dice.next();
        }
        dice
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Less than `limit`.
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 16) % limit.max(1)
    }

    pub(crate) fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// Bytes of a file: those of its sectors that were ever written.
#[derive(Clone, Default, Debug)]
pub(crate) struct Content {
    len: u64,
    sectors: BTreeMap<u64, Rc<[u8; SECTOR as usize]>>,
}

impl Content {
    fn write(&mut self, offset: u64, bytes: &[u8]) {
        let mut done = 0;
        while done < bytes.len() {
            let at = offset + done as u64;
            let from = (at % SECTOR) as usize;
            let n = (SECTOR as usize - from).min(bytes.len() - done);
            let sector = self.sectors.entry(at / SECTOR).or_insert_with(|| Rc::new([0; SECTOR as usize]));
            Rc::make_mut(sector)[from..from + n].copy_from_slice(&bytes[done..done + n]);
            done += n;
        }
        self.len = self.len.max(offset + bytes.len() as u64);
    }

    fn set_len(&mut self, len: u64) {
        self.sectors.split_off(&len.div_ceil(SECTOR));
        if !len.is_multiple_of(SECTOR)
            && let Some(last) = self.sectors.get_mut(&(len / SECTOR))
        {
            Rc::make_mut(last)[(len % SECTOR) as usize..].fill(0);
        }
        self.len = len;
    }
}

#[derive(Clone, Debug)]
enum Body {
    File(Content),
    Dir(BTreeMap<CString, u64>),
    Symlink(Rc<[u8]>),
}

#[derive(Clone, Debug)]
struct Object {
    xattrs: BTreeMap<Vec<u8>, Rc<[u8]>>,
    body: Body,
}

/// All that is on the medium.
#[derive(Clone, Debug)]
pub(crate) struct Image {
    objects: BTreeMap<u64, Object>,
    next: u64,
}

impl Image {
    /// An empty directory.
    pub(crate) fn new() -> Self {
        let root = Object { xattrs: BTreeMap::new(), body: Body::Dir(BTreeMap::new()) };
        Self { objects: BTreeMap::from([(ROOT, root)]), next: ROOT + 1 }
    }

    fn entries(&mut self, dir: u64) -> &mut BTreeMap<CString, u64> {
        // One whose making is not kept is nowhere to be found, with all that is in it.
        let nowhere = || Object { xattrs: BTreeMap::new(), body: Body::Dir(BTreeMap::new()) };
        match &mut self.objects.entry(dir).or_insert_with(nowhere).body {
            Body::Dir(entries) => entries,
            other => panic!("{dir} is no directory: {other:?}"),
        }
    }

    fn named(&self, dir: u64, name: &CString) -> Option<u64> {
        match &self.objects.get(&dir)?.body {
            Body::Dir(entries) => entries.get(name).copied(),
            _ => None,
        }
    }

    fn file(&mut self, ino: u64) -> Option<&mut Content> {
        match self.objects.get_mut(&ino).map(|object| &mut object.body) {
            Some(Body::File(content)) => Some(content),
            _ => None,
        }
    }

    fn add(&mut self, dir: u64, name: &CString, ino: u64, body: Body) {
        self.objects.insert(ino, Object { xattrs: BTreeMap::new(), body });
        self.next = self.next.max(ino + 1);
        self.entries(dir).insert(name.clone(), ino);
    }

    /// Does one change, contents included.
    fn change(&mut self, op: &Op) {
        match op {
            Op::Write { ino, offset, bytes } => {
                if let Some(file) = self.file(*ino) {
                    file.write(*offset, bytes);
                }
            }
            Op::SetLen { ino, len } => {
                if let Some(file) = self.file(*ino) {
                    file.set_len(*len);
                }
            }
            Op::Allocate { ino, len } => {
                if let Some(file) = self.file(*ino) {
                    file.len = file.len.max(*len);
                }
            }
            other => self.rename_and_so_on(other),
        }
    }

    /// Does a change that is no content's.
    fn rename_and_so_on(&mut self, op: &Op) {
        match op {
            Op::Create { dir, name, ino, .. } => self.add(*dir, name, *ino, Body::File(Content::default())),
            Op::Mkdir { dir, name, ino, .. } => self.add(*dir, name, *ino, Body::Dir(BTreeMap::new())),
            Op::Symlink { dir, name, ino, target } => self.add(*dir, name, *ino, Body::Symlink(target.clone())),
            Op::Link { dir, name, ino } => {
                self.entries(*dir).insert(name.clone(), *ino);
            }
            Op::Unlink { dir, name } | Op::Rmdir { dir, name } => {
                self.entries(*dir).remove(name);
            }
            Op::Rename { from, name, to, new, exchange } => {
                let Some(moved) = self.entries(*from).remove(name) else { return };
                let over = self.entries(*to).insert(new.clone(), moved);
                if *exchange && let Some(over) = over {
                    self.entries(*from).insert(name.clone(), over);
                }
            }
            Op::SetXattr { ino, name, value } => {
                if let Some(object) = self.objects.get_mut(ino) {
                    object.xattrs.insert(name.clone(), value.clone());
                }
            }
            Op::RemoveXattr { ino, name } => {
                if let Some(object) = self.objects.get_mut(ino) {
                    object.xattrs.remove(name);
                }
            }
            _ => {}
        }
    }

    /// Makes it the contents of an empty directory. With `moved` all numbers are others, and so is the identity.
    pub(crate) fn put(&self, into: &Path, moved: bool) -> Numbers {
        let shift = if moved { 1 << 41 } else { 0 };
        let mut numbers = Numbers { of: HashMap::new(), identity: 0x1de + shift, next: self.next + shift };
        let mut paths: HashMap<u64, PathBuf> = HashMap::new();
        let mut todo = vec![(ROOT, into.to_owned())];
        while let Some((ino, path)) = todo.pop() {
            let Some(object) = self.objects.get(&ino) else { continue };
            if let Some(first) = paths.get(&ino) {
                std::fs::hard_link(first, &path).unwrap();
                continue;
            }
            match &object.body {
                Body::Dir(entries) => {
                    if ino != ROOT {
                        std::fs::create_dir(&path).unwrap();
                    }
                    let join = |name: &CString| path.join(OsStr::from_bytes(name.as_bytes()));
                    todo.extend(entries.iter().map(|(name, ino)| (*ino, join(name))));
                }
                Body::Symlink(target) => std::os::unix::fs::symlink(OsStr::from_bytes(target), &path).unwrap(),
                Body::File(content) => {
                    let file = std::fs::File::create_new(&path).unwrap();
                    file.set_len(content.len).unwrap();
                    for (n, sector) in &content.sectors {
                        let len = content.len.saturating_sub(n * SECTOR).min(SECTOR) as usize;
                        file.write_all_at(&sector[..len], n * SECTOR).unwrap();
                    }
                }
            }
            for (name, value) in &object.xattrs {
                let flags = rustix::fs::XattrFlags::empty();
                rustix::fs::lsetxattr(&path, OsStr::from_bytes(name), value, flags).unwrap();
            }
            numbers.of.insert(std::fs::symlink_metadata(&path).unwrap().ino(), ino + shift);
            paths.insert(ino, path);
        }
        numbers
    }
}

/// What the journal promises about metadata that no flush covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// All of it up to some moment.
    Journal,
    /// Each directory for itself, each object's own attributes for themselves. `objects`: what is done with an object is
    /// in order, too (a directory is not renamed before what was made in it is there).
    Directories { objects: bool },
}

/// One change and what it is about.
struct Step {
    op: Op,
    /// Directories whose entries it changes.
    dirs: Vec<u64>,
    /// Objects that it changes or names.
    objects: Vec<u64>,
    /// Journalled.
    metadata: bool,
    /// Writes behind the end.
    grows: bool,
    /// Directories above the object that is flushed, up to the root.
    above: Vec<u64>,
}

/// A state of the medium, and what was done after it.
pub(crate) struct History {
    base: Image,
    steps: Vec<Step>,
}

/// What may be left.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Choice {
    pub(crate) order: Order,
    pub(crate) seed: u64,
}

#[derive(Default)]
struct Bytes {
    cache: Content,
    disk: Content,
    /// A change of the length that is not kept: from here on the length on the medium stays.
    frozen: bool,
    /// The smallest of those lengths.
    cut: u64,
    /// How likely a sector is to be kept, of 8.
    luck: u64,
}

impl History {
    pub(crate) fn new(base: Image, trace: Vec<Op>) -> Self {
        // With all names as programs see them, to know what each change is about.
        let mut seen = base.clone();
        let mut parents: HashMap<u64, u64> = HashMap::new();
        for (ino, object) in &base.objects {
            if let Body::Dir(entries) = &object.body {
                parents.extend(entries.values().map(|child| (*child, *ino)));
            }
        }
        let mut steps = Vec::with_capacity(trace.len());
        for op in trace {
            let (mut dirs, mut objects, mut metadata, mut grows) = (Vec::new(), Vec::new(), true, false);
            match &op {
                Op::Write { ino, offset, bytes } => {
                    metadata = false;
                    grows = seen.file(*ino).is_some_and(|file| offset + bytes.len() as u64 > file.len);
                    objects.push(*ino);
                }
                Op::SyncData { ino } | Op::Sync { ino } => {
                    metadata = false;
                    objects.push(*ino);
                }
                Op::SyncAll => metadata = false,
                Op::SetLen { ino, .. }
                | Op::Allocate { ino, .. }
                | Op::SetXattr { ino, .. }
                | Op::RemoveXattr { ino, .. }
                | Op::Touch { ino } => objects.push(*ino),
                Op::Create { dir, ino, .. }
                | Op::Mkdir { dir, ino, .. }
                | Op::Symlink { dir, ino, .. }
                | Op::Link { dir, ino, .. } => {
                    dirs.push(*dir);
                    objects.push(*ino);
                    parents.insert(*ino, *dir);
                }
                Op::Unlink { dir, name } | Op::Rmdir { dir, name } => {
                    dirs.push(*dir);
                    objects.extend(seen.named(*dir, name));
                }
                Op::Rename { from, name, to, new, exchange } => {
                    dirs.extend([*from, *to]);
                    let (moved, over) = (seen.named(*from, name), seen.named(*to, new));
                    objects.extend(moved);
                    objects.extend(over);
                    parents.extend(moved.map(|ino| (ino, *to)));
                    if *exchange {
                        parents.extend(over.map(|ino| (ino, *from)));
                    }
                }
            }
            let mut above = Vec::new();
            if let Op::Sync { ino } | Op::SyncData { ino } = &op {
                let mut at = *ino;
                while let Some(parent) = parents.get(&at).filter(|parent| !above.contains(*parent)) {
                    above.push(*parent);
                    at = *parent;
                }
            }
            seen.change(&op);
            steps.push(Step { op, dirs, objects, metadata, grows, above });
        }
        Self { base, steps }
    }

    /// How many moments there are between which the power can go.
    pub(crate) fn len(&self) -> usize {
        self.steps.len()
    }

    /// The daemon is killed after the first `cut` changes, and `torn`: with so many pages of the next one done.
    pub(crate) fn kill(&self, cut: usize, torn: u64) -> Option<Self> {
        let mut trace: Vec<Op> = self.steps[..cut].iter().map(|step| step.op.clone()).collect();
        if torn > 0 {
            let Op::Write { ino, offset, bytes } = &self.steps.get(cut)?.op else { return None };
            let done = (offset / PAGE + torn) * PAGE - offset;
            if done >= bytes.len() as u64 {
                return None;
            }
            trace.push(Op::Write { ino: *ino, offset: *offset, bytes: bytes[..done as usize].into() });
        }
        Some(Self::new(self.base.clone(), trace))
    }

    /// The same, and what was done after it.
    pub(crate) fn then(&self, after: Vec<Op>) -> Self {
        let trace = self.steps.iter().map(|step| step.op.clone()).chain(after).collect();
        Self::new(self.base.clone(), trace)
    }

    /// Everything, as the page cache has it.
    pub(crate) fn all(&self) -> Image {
        let mut image = self.base.clone();
        self.steps.iter().for_each(|step| image.change(&step.op));
        image
    }

    /// Something that may be left when the power goes after the first `cut` changes.
    pub(crate) fn power_cut(&self, cut: usize, choice: Choice) -> Image {
        let mut dice = Dice::new(choice.seed);
        let kept = self.kept(cut, choice.order, &mut dice);
        let mut files: BTreeMap<u64, Bytes> = BTreeMap::new();
        // All files alike, or each for itself.
        let common = [None, Some(0), Some(1), Some(4), Some(7), Some(8)][dice.below(6) as usize];
        // Whether what is written after a cut may get into the blocks that the cut frees, should the cut not be kept.
        let over_cut = dice.one_in(2);
        let mut image = self.base.clone();
        for (ino, object) in &self.base.objects {
            if let Body::File(content) = &object.body {
                let luck = common.unwrap_or_else(|| dice.below(9));
                let bytes = Bytes { cache: content.clone(), disk: content.clone(), luck, ..Bytes::default() };
                files.insert(*ino, bytes);
            }
        }
        for (step, kept) in self.steps[..cut].iter().zip(&kept) {
            match &step.op {
                Op::Write { ino, offset, bytes } => {
                    if let Some(file) = files.get_mut(ino) {
                        file.write(*offset, bytes, over_cut, &mut dice);
                    }
                }
                Op::SetLen { ino, len } => {
                    if let Some(file) = files.get_mut(ino) {
                        file.set_len(*len, *kept);
                    }
                }
                Op::Allocate { ino, len } => {
                    if let Some(file) = files.get_mut(ino).filter(|file| file.cache.len < *len) {
                        file.set_len(*len, *kept);
                    }
                }
                Op::Sync { ino } | Op::SyncData { ino } => {
                    if let Some(file) = files.get_mut(ino) {
                        file.flush();
                    }
                }
                Op::SyncAll => files.values_mut().for_each(Bytes::flush),
                other => {
                    if let Op::Create { ino, .. } = other {
                        let luck = common.unwrap_or_else(|| dice.below(9));
                        files.insert(*ino, Bytes { luck, ..Bytes::default() });
                    }
                    if *kept {
                        image.rename_and_so_on(other);
                    }
                }
            }
        }
        for (ino, mut bytes) in files {
            if let Some(file) = image.file(ino) {
                let len = bytes.disk.len;
                bytes.disk.set_len(len);
                *file = bytes.disk;
            }
        }
        image
    }

    /// Which metadata is kept.
    fn kept(&self, cut: usize, order: Order, dice: &mut Dice) -> Vec<bool> {
        let steps = &self.steps[..cut];
        let mut required = vec![false; cut];
        let loose = order != Order::Journal;
        // In a journal: everything before this.
        let mut least = 0;
        for (at, step) in steps.iter().enumerate() {
            let wanted = |needs: &dyn Fn(&Step) -> bool, until: usize, required: &mut [bool]| {
                let mut last = 0;
                for (n, earlier) in steps[..until].iter().enumerate() {
                    if earlier.metadata && needs(earlier) {
                        required[n] = true;
                        last = n + 1;
                    }
                }
                last
            };
            let covered = match &step.op {
                Op::SyncAll => wanted(&|_| true, at, &mut required),
                Op::Sync { ino } => {
                    let about = |earlier: &Step| {
                        earlier.objects.contains(ino)
                            || earlier.dirs.contains(ino)
                            || (loose && earlier.objects.iter().any(|object| step.above.contains(object)))
                    };
                    wanted(&about, at, &mut required)
                }
                Op::SyncData { ino } => {
                    let found = |earlier: &Step| match &earlier.op {
                        Op::Create { ino: made, .. } => made == ino,
                        Op::SetLen { ino: of, .. } | Op::Allocate { ino: of, .. } => of == ino,
                        _ => loose && earlier.objects.iter().any(|object| step.above.contains(object)),
                    };
                    let own = wanted(&found, at, &mut required);
                    // A size that a write made is journalled after that write, and with it what was done before.
                    let grown = steps[..at].iter().rposition(|step| step.grows && step.objects.contains(ino));
                    let grown = grown.map_or(0, |grown| {
                        wanted(&|earlier| earlier.objects.contains(ino), grown, &mut required);
                        grown
                    });
                    own.max(grown)
                }
                _ => 0,
            };
            least = least.max(covered);
        }
        match order {
            Order::Journal => {
                let end = match dice.below(4) {
                    0 => least,
                    1 => cut,
                    _ => least + dice.below((cut - least) as u64 + 1) as usize,
                };
                (0..cut).map(|at| at < end).collect()
            }
            Order::Directories { objects } => {
                let groups = |step: &Step| -> Vec<u64> {
                    let own = objects || step.dirs.is_empty();
                    step.dirs.iter().copied().chain(step.objects.iter().copied().filter(|_| own)).collect()
                };
                let mut needed: HashSet<u64> = HashSet::new();
                for at in (0..cut).rev().filter(|at| steps[*at].metadata) {
                    let of = groups(&steps[at]);
                    if required[at] || of.iter().any(|group| needed.contains(group)) {
                        required[at] = true;
                        needed.extend(of);
                    }
                }
                let luck = dice.below(9);
                let mut ended: HashSet<u64> = HashSet::new();
                let keep = |at: usize| {
                    let of = groups(&steps[at]);
                    let may = !of.iter().any(|group| ended.contains(group));
                    let kept = required[at] || (may && dice.below(8) < luck);
                    if !kept && steps[at].metadata {
                        ended.extend(of);
                    }
                    kept
                };
                (0..cut).map(keep).collect()
            }
        }
    }
}

impl Bytes {
    fn write(&mut self, offset: u64, bytes: &[u8], over_cut: bool, dice: &mut Dice) {
        if bytes.is_empty() {
            return;
        }
        let before = self.cache.len;
        self.cache.write(offset, bytes);
        for n in offset / SECTOR..(offset + bytes.len() as u64).div_ceil(SECTOR) {
            let freed = self.frozen && n * SECTOR >= self.cut.next_multiple_of(PAGE);
            if dice.below(8) < self.luck
                && (over_cut || !freed)
                && let Some(sector) = self.cache.sectors.get(&n)
            {
                self.disk.sectors.insert(n, sector.clone());
            }
        }
        if self.cache.len > before && !self.frozen && dice.below(8) < self.luck.clamp(2, 6) {
            // The length follows the pages that were written out.
            let pages = self.cache.len.div_ceil(PAGE) - before / PAGE;
            let len = if dice.one_in(4) { (before / PAGE + dice.below(pages) + 1) * PAGE } else { self.cache.len };
            self.disk.len = self.disk.len.max(len.min(self.cache.len));
        }
    }

    fn set_len(&mut self, len: u64, kept: bool) {
        let before = self.cache.len;
        self.cache.set_len(len);
        if kept {
            self.disk.set_len(len);
        } else {
            self.cut = if self.frozen { self.cut.min(len) } else { len.min(before) };
            self.frozen = true;
        }
    }

    fn flush(&mut self) {
        self.disk = self.cache.clone();
        self.frozen = false;
    }
}
