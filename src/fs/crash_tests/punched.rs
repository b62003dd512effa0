//! Holes punched and ranges zeroed, cut everywhere: what was acknowledged does not come back, what was not is old or zeros.

use super::session::Do::{self, *};
use super::{Figures, OFTEN, Order, Plan, Setup, asked, cut_everywhere};

const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE;
const KEEP: i32 = libc::FALLOC_FL_KEEP_SIZE;

fn workloads() -> Vec<(&'static str, Vec<Do>)> {
    let a = || "a".to_owned();
    let sealed = |steps: Vec<Do>| [vec![Create(a()), Write(a(), 0, 20_000), Seal], steps].concat();
    vec![
        ("a sealed file", sealed(vec![Allocate(a(), 4096, 8192, PUNCH), Fdatasync(a())])),
        ("with edges", sealed(vec![Allocate(a(), 4000, 9000, PUNCH), Fdatasync(a()), Write(a(), 0, 50)])),
        ("nothing but edges", sealed(vec![Allocate(a(), 4000, 200, PUNCH), Allocate(a(), 100, 7, ZERO), Fsync(a())])),
        ("all of it", sealed(vec![Allocate(a(), 0, 20_000, PUNCH), Fdatasync(a()), Write(a(), 5000, 100), Seal])),
        (
            "what a record before it wrote does not come back",
            sealed(vec![
                Write(a(), 4096, 8192),
                Fdatasync(a()),
                Allocate(a(), 4096, 8192, PUNCH),
                Fdatasync(a()),
                Write(a(), 0, 10),
            ]),
        ),
        (
            "the same, put in place between",
            sealed(vec![Write(a(), 4096, 8192), Commit, Allocate(a(), 4096, 8192, PUNCH), Commit, Fdatasync(a())]),
        ),
        (
            "written again",
            sealed(vec![
                Allocate(a(), 0, 12_288, PUNCH),
                Write(a(), 4096, 5000),
                Fdatasync(a()),
                Allocate(a(), 4096, 4096, PUNCH),
                Write(a(), 4200, 10),
                Fdatasync(a()),
                Seal,
            ]),
        ),
        (
            "filled again, and sealed without holes",
            sealed(vec![Allocate(a(), 4096, 8192, PUNCH), Seal, Write(a(), 4096, 8192), Seal, Write(a(), 0, 5)]),
        ),
        (
            "after the floor was raised without a seal",
            vec![
                Create(a()),
                Write(a(), 0, 20_000),
                Fsync(a()),
                Fsync(a()),
                Allocate(a(), 0, 8192, PUNCH),
                Fsync(a()),
                Fsync(a()),
                Allocate(a(), 8192, 4096, PUNCH),
                Fdatasync(a()),
            ],
        ),
        (
            "of a new file, nothing of it logged",
            vec![Create(a()), Write(a(), 0, 16_384), Allocate(a(), 4096, 4096, PUNCH), Fdatasync(a()), Seal],
        ),
        (
            "of a file whose name is known, nothing of it logged",
            vec![Create(a()), Write(a(), 0, 16_384), Fsync(a()), Allocate(a(), 4096, 4096, PUNCH), Fdatasync(a())],
        ),
        (
            "and cut, and grown again",
            sealed(vec![Allocate(a(), 4096, 8192, PUNCH), Resize(a(), 9000), Resize(a(), 18_000), Fdatasync(a())]),
        ),
        (
            "a short last block, and growth over it",
            sealed(vec![Allocate(a(), 16_384, 9000, PUNCH), Write(a(), 19_990, 3000), Fdatasync(a()), Seal]),
        ),
        (
            "beyond the end",
            sealed(vec![Allocate(a(), 30_000, 9000, PUNCH), Allocate(a(), 19_000, 9000, KEEP), Fsync(a())]),
        ),
        (
            "zeroed and grown",
            sealed(vec![Allocate(a(), 10_000, 20_000, ZERO), Fdatasync(a()), Write(a(), 15_000, 9000)]),
        ),
        ("zeroed and not grown", sealed(vec![Allocate(a(), 10_000, 20_000, ZERO | KEEP), Fdatasync(a()), Seal])),
        (
            "reserved and grown",
            sealed(vec![Allocate(a(), 10_000, 20_000, 0), Fdatasync(a()), Write(a(), 22_000, 9000)]),
        ),
        (
            "a killed daemon",
            sealed(vec![Write(a(), 4096, 4096), Allocate(a(), 4096, 8192, PUNCH), Die, Fdatasync(a()), Seal]),
        ),
        (
            "after a power cut",
            sealed(vec![
                Allocate(a(), 4096, 8192, PUNCH),
                Fdatasync(a()),
                Cut,
                Allocate(a(), 0, 5000, PUNCH),
                Write(a(), 8192, 9000),
                Seal,
            ]),
        ),
        (
            "a log emptied between the header and the hole",
            sealed(vec![
                Write(a(), 4096, 4096),
                Allocate(a(), 4096, 4096, PUNCH),
                Checkpoint,
                Allocate(a(), 8192, 4096, PUNCH),
                Checkpoint,
                Fdatasync(a()),
            ]),
        ),
    ]
}

fn punched(full: u64) {
    let mut all = Figures::default();
    let mut violations = Vec::new();
    let (states, second) = asked(6, OFTEN);
    for (name, steps) in workloads() {
        let setup = Setup { logged: true, full };
        match cut_everywhere(&steps, Plan { setup, seed: 12, states, second, order: Order::Journal }) {
            Ok(figures) => all += figures,
            Err(what) => violations.push(format!("{name}: {what}\n{steps:?}")),
        }
    }
    println!("{all:?}, {} violations", violations.len());
    super::none(&violations);
}

#[test]
fn holes_and_zeroed_ranges_survive_every_cut() {
    punched(32 << 20);
}

#[test]
fn holes_and_zeroed_ranges_survive_every_cut_with_a_log_that_is_soon_full() {
    punched(2048);
}
