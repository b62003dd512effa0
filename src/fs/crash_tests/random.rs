//! Random workloads, from a seed.

use super::session::{Do, Setup};
use crate::volume::storage::medium::Dice;

/// The steps of the workload with this seed.
pub(super) fn workload(seed: u64) -> (Vec<Do>, Setup) {
    let mut dice = Dice::new(seed);
    let full = [2048, 16 << 10, 64 << 10, 32 << 20][dice.below(4) as usize];
    let mut steps = Vec::new();
    let mut world = World { paths: Vec::new(), dice };
    // Every other one is mostly about names, the rest mostly about contents.
    let contents = world.dice.one_in(2);
    let len = 6 + world.dice.below(16);
    while (steps.len() as u64) < len {
        if contents && !world.dice.one_in(8) {
            world.contents(&mut steps);
        } else {
            world.step(&mut steps);
        }
    }
    (steps, Setup { logged: true, full })
}

/// What there probably is: a step that cannot be done is left out when it is its turn.
struct World {
    /// And whether it is a directory.
    paths: Vec<(String, Kind)>,
    dice: Dice,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    File,
    Dir,
    Other,
}

impl World {
    fn fresh(&mut self) -> String {
        let dirs: Vec<String> =
            self.paths.iter().filter(|(_, kind)| *kind == Kind::Dir).map(|(path, _)| path.clone()).collect();
        let component = ["a", "b", "c", "d", "A", "B"][self.dice.below(6) as usize];
        match self.dice.below(dirs.len() as u64 + 1) as usize {
            0 => component.to_owned(),
            n => format!("{}/{component}", dirs[n - 1]),
        }
    }

    fn any(&mut self, kinds: &[Kind]) -> Option<String> {
        let of: Vec<&String> =
            self.paths.iter().filter(|(_, kind)| kinds.contains(kind)).map(|(path, _)| path).collect();
        if of.is_empty() { None } else { Some(of[self.dice.below(of.len() as u64) as usize].clone()) }
    }

    fn place(&mut self) -> u64 {
        match self.dice.below(4) {
            0 => 0,
            1 => self.dice.below(5) * 4096,
            2 => self.dice.below(20_000),
            _ => (self.dice.below(5) * 4096 + self.dice.below(7)).saturating_sub(3),
        }
    }

    fn len(&mut self) -> usize {
        match self.dice.below(4) {
            0 => 1 + self.dice.below(200) as usize,
            1 => 4096,
            2 => 8192,
            _ => 1 + self.dice.below(9000) as usize,
        }
    }

    fn forget(&mut self, path: &str) {
        let below = format!("{path}/");
        self.paths.retain(|(other, _)| other != path && !other.starts_with(&below));
    }

    fn step(&mut self, steps: &mut Vec<Do>) {
        use Kind::{Dir, File, Other};
        if self.paths.is_empty() {
            self.make(steps);
            return;
        }
        match self.dice.below(44) {
            0..=5 => self.make(steps),
            6..=14 => {
                if let Some(file) = self.any(&[File]) {
                    steps.push(Do::Write(file, self.place(), self.len()));
                }
            }
            15..=17 => {
                if let Some(file) = self.any(&[File]) {
                    steps.push(Do::Resize(file, self.place()));
                }
            }
            18..=22 => {
                if let Some(path) = self.any(&[File, File, Dir]) {
                    steps.push(if self.dice.one_in(2) { Do::Fsync(path) } else { Do::Fdatasync(path) });
                }
            }
            23 => steps.push(Do::Fsync("".into())),
            24..=26 => {
                if let Some(path) = self.any(&[File, Dir, Other]) {
                    let kind = self.paths.iter().find(|(other, _)| *other == path).map(|(_, kind)| *kind);
                    steps.push(if kind == Some(Dir) { Do::Rmdir(path.clone()) } else { Do::Unlink(path.clone()) });
                    if kind != Some(Dir) || self.dice.one_in(2) {
                        self.forget(&path);
                    }
                }
            }
            27..=30 => {
                if let Some(path) = self.any(&[File, Dir, Other]) {
                    let to = if self.dice.one_in(2) {
                        self.fresh()
                    } else {
                        self.any(&[File, Dir, Other]).unwrap_or_default()
                    };
                    let kind = self.paths.iter().find(|(other, _)| *other == path).map_or(Other, |(_, kind)| *kind);
                    if self.dice.one_in(5) {
                        steps.push(Do::Exchange(path, to));
                    } else if path != to && !to.is_empty() && !to.starts_with(&format!("{path}/")) {
                        steps.push(Do::Rename(path.clone(), to.clone()));
                        self.forget(&path);
                        self.forget(&to);
                        self.paths.push((to, kind));
                    }
                }
            }
            31 => {
                if let Some(path) = self.any(&[File, Other]) {
                    let to = self.fresh();
                    steps.push(Do::Link(path, to.clone()));
                    self.paths.push((to, File));
                }
            }
            32 | 33 => {
                if let Some(path) = self.any(&[File, Dir]) {
                    let n = self.dice.below(2) as u8;
                    steps.push(if self.dice.one_in(3) { Do::RemoveXattr(path, n) } else { Do::SetXattr(path, n) });
                }
            }
            34 => steps.push(Do::Commit),
            35 => steps.push(Do::Checkpoint),
            36 => steps.push(Do::Seal),
            37 => steps.push(Do::Forget),
            38 => steps.push(Do::Remount),
            39 => steps.push(Do::Cut),
            42 => steps.push(Do::Rewrap),
            40 | 41 => {
                if let Some(file) = self.any(&[File]) {
                    let space = self.space(file);
                    steps.push(space);
                }
            }
            _ => steps.push(Do::Die),
        }
    }

    /// A step with a file's contents.
    fn contents(&mut self, steps: &mut Vec<Do>) {
        let Some(file) = self.any(&[Kind::File]) else { return self.make(steps) };
        steps.push(match self.dice.below(24) {
            20..=23 => self.space(file),
            0..=8 => Do::Write(file, self.place(), self.len()),
            9 | 10 => Do::Resize(file, self.place()),
            11..=13 => Do::Fsync(file),
            14 | 15 => Do::Fdatasync(file),
            16 => Do::Commit,
            17 => Do::Checkpoint,
            18 => Do::Seal,
            _ => [Do::Forget, Do::Remount, Do::Die, Do::Cut, Do::Rewrap][self.dice.below(5) as usize].clone(),
        });
    }

    fn space(&mut self, file: String) -> Do {
        use libc::{FALLOC_FL_KEEP_SIZE as KEEP, FALLOC_FL_PUNCH_HOLE as PUNCH, FALLOC_FL_ZERO_RANGE as ZERO};
        let mode = [PUNCH | KEEP, PUNCH | KEEP, PUNCH | KEEP, ZERO, ZERO | KEEP, 0][self.dice.below(6) as usize];
        let len = if self.dice.one_in(3) { 20_000 } else { self.len() };
        Do::Allocate(file, self.place(), len, mode)
    }

    fn make(&mut self, steps: &mut Vec<Do>) {
        let path = self.fresh();
        let (step, kind) = match self.dice.below(10) {
            0..=4 => (Do::Create(path.clone()), Kind::File),
            5..=7 => (Do::Mkdir(path.clone()), Kind::Dir),
            8 => (Do::Fifo(path.clone()), Kind::Other),
            _ => (Do::Symlink(path.clone(), [10, 1500, 4095][self.dice.below(3) as usize]), Kind::Other),
        };
        steps.push(step);
        self.paths.push((path, kind));
    }
}
