//! Workloads that were thought of, and random ones that found something, cut down to what it takes.

use super::session::Do::{self, *};

fn at(path: &str) -> String {
    path.to_owned()
}

/// Each with its name.
pub(super) fn workloads() -> Vec<(&'static str, Vec<Do>)> {
    let a = || at("a");
    let long = || at("A");
    vec![
        // Found by the simulation.
        ("the name of a new file, flushed with fdatasync alone", vec![Create(a()), Fdatasync(a())]),
        ("the same after the sealer's flush", vec![Create(a()), Seal, Fdatasync(a()), Write(a(), 0, 100)]),
        (
            "the same after a kill, of which nobody knows what was flushed",
            vec![Create(a()), Write(a(), 0, 5000), Die, Fdatasync(a())],
        ),
        (
            "growth in place that ends at a page's border",
            vec![Create(a()), Write(a(), 0, 20_000), Write(a(), 20_480, 9000)],
        ),
        (
            "a replay after a kill, and the power goes while it is under way",
            vec![Create(a()), Write(a(), 0, 8480), Fsync(a()), Resize(a(), 12_288), Write(a(), 100, 9000), Die],
        ),
        // Thought of.
        (
            "all keys wrapped anew, and then everything goes on",
            vec![
                Create(a()),
                Write(a(), 0, 9000),
                Mkdir(at("d")),
                Create(at("d/A")),
                Write(at("d/A"), 0, 100),
                SetXattr(at("d/A"), 1),
                Fifo(at("d/f")),
                Symlink(at("l"), 1500),
                Link(at("l"), at("d/l")),
                Link(a(), at("d/a")),
                Rewrap,
                Write(a(), 4000, 200),
                Create(at("d/new")),
                Fsync(a()),
                Rename(at("d/l"), at("l")),
                Rewrap,
            ],
        ),
        (
            "the same over what a crash left unsealed",
            vec![Create(a()), Write(a(), 0, 9000), Mkdir(at("d")), Die, Rewrap, Cut, Write(a(), 0, 5000), Rewrap],
        ),
        (
            "replaced by rename, flushed before",
            vec![
                Create(a()),
                Write(a(), 0, 5000),
                Fsync(a()),
                Create(at("b")),
                Write(at("b"), 0, 9000),
                Fsync(at("b")),
                Rename(at("b"), a()),
                Fsync(at("")),
            ],
        ),
        (
            "replaced by rename, not flushed",
            vec![
                Create(a()),
                Write(a(), 0, 5000),
                Fsync(a()),
                Create(at("b")),
                Write(at("b"), 0, 9000),
                Rename(at("b"), a()),
                Write(a(), 9000, 9000),
            ],
        ),
        (
            "a file by a long name, through all that happens to it",
            vec![
                Create(long()),
                Write(long(), 0, 5000),
                Fsync(long()),
                Rename(long(), at("B")),
                Fsync(at("")),
                Link(at("B"), long()),
                Unlink(at("B")),
                Create(at("B")),
                Rename(at("B"), long()),
                Unlink(long()),
            ],
        ),
        (
            "directories over directories",
            vec![
                Mkdir(a()),
                Create(at("a/f")),
                Write(at("a/f"), 0, 5000),
                Fsync(at("a/f")),
                Mkdir(at("b")),
                Fsync(at("")),
                Rename(a(), at("b")),
                Mkdir(long()),
                Rename(at("b"), long()),
                Exchange(long(), long()),
                Fsync(at("")),
            ],
        ),
        (
            "a directory into another, and back under a long name",
            vec![
                Mkdir(a()),
                Mkdir(at("b")),
                Create(at("b/f")),
                Fsync(at("b/f")),
                Rename(at("b"), at("a/b")),
                Fsync(a()),
                Rename(at("a/b"), at("B")),
                Fsync(at("")),
                Rmdir(a()),
            ],
        ),
        (
            "exchanged, of two kinds",
            vec![
                Create(a()),
                Write(a(), 0, 100),
                Fsync(a()),
                Mkdir(at("b")),
                Fsync(at("b")),
                Exchange(a(), at("b")),
                Create(at("a/c")),
                Fsync(at("a/c")),
            ],
        ),
        (
            "long symlinks",
            vec![
                Symlink(a(), 4095),
                Fsync(at("")),
                Symlink(long(), 1500),
                Rename(a(), long()),
                Fsync(at("")),
                Create(a()),
                Rename(a(), long()),
                Symlink(a(), 700),
                Unlink(a()),
            ],
        ),
        (
            "attributes, and the file sealed",
            vec![
                Create(a()),
                SetXattr(a(), 0),
                Fsync(a()),
                SetXattr(a(), 0),
                RemoveXattr(a(), 0),
                SetXattr(a(), 1),
                Seal,
                Fsync(a()),
            ],
        ),
        ("nodes", vec![Fifo(a()), Fsync(at("")), Rename(a(), long()), Fifo(a()), Unlink(long())]),
        (
            "a log that is full all the time",
            vec![
                Create(a()),
                Write(a(), 0, 12_288),
                Fsync(a()),
                Write(a(), 100, 9000),
                Write(a(), 5000, 3000),
                Write(a(), 0, 12_288),
                Resize(a(), 7000),
                Write(a(), 6000, 9000),
                Fdatasync(a()),
                Write(a(), 1, 1),
            ],
        ),
        (
            "the end of the log",
            vec![
                Create(a()),
                Write(a(), 0, 12_000),
                Create(at("b")),
                Write(at("b"), 0, 5000),
                Fsync(a()),
                Write(a(), 0, 5000),
                Write(at("b"), 0, 5000),
                Remount,
                Write(a(), 100, 300),
                Remount,
            ],
        ),
        (
            "an unmount flushes names and attributes, too",
            vec![Create(a()), Fsync(a()), Mkdir(at("b")), SetXattr(at("b"), 0), Symlink(at("b/c"), 10), Remount],
        ),
        ("more files than are flushed one by one", {
            let files: Vec<String> = (0..9).map(|n| format!("f{n}")).collect();
            let making = files.iter().flat_map(|file| [Create(file.clone()), Write(file.clone(), 0, 600)]);
            let mut steps: Vec<Do> = making.collect();
            steps.extend([Seal, Write(at("f3"), 100, 200), Fdatasync(at("f3"))]);
            steps
        }),
        (
            "written to after its last name went",
            vec![
                Create(a()),
                Write(a(), 0, 5000),
                Fsync(a()),
                Write(a(), 0, 5000),
                Unlink(a()),
                Commit,
                Create(a()),
                Write(a(), 0, 300),
                Fsync(a()),
                Seal,
            ],
        ),
        // As in volume/file/crash_tests.rs, by way of the whole filesystem.
        (
            "a replayed cut over what was flushed in place after it",
            vec![Create(a()), Write(a(), 0, 9000), Seal, Resize(a(), 0), Commit, Write(a(), 0, 8192), Fsync(a())],
        ),
        (
            "the same, sealed in between",
            vec![
                Create(a()),
                Write(a(), 0, 9000),
                Resize(a(), 0),
                Commit,
                Write(a(), 0, 8192),
                Seal,
                Write(a(), 0, 100),
                Fsync(a()),
            ],
        ),
        (
            "power cut after power cut",
            vec![
                Create(a()),
                Write(a(), 0, 9000),
                Fsync(a()),
                Write(a(), 100, 9000),
                Fsync(a()),
                Cut,
                Write(a(), 50, 9000),
                Fsync(a()),
                Cut,
                Resize(a(), 10),
                Fsync(a()),
            ],
        ),
        (
            "sparse, far behind the end",
            vec![
                Create(a()),
                Write(a(), 100_000, 50),
                Fsync(a()),
                Write(a(), 40_000, 5000),
                Resize(a(), 60_000),
                Fdatasync(a()),
                Write(a(), 60_000, 10),
            ],
        ),
    ]
}

/// Those where what counts is an order between two directories.
pub(super) fn two_directories() -> Vec<Do> {
    let (a, b) = (|| at("d/a"), || at("d/b"));
    vec![
        Mkdir(at("d")),
        Symlink(a(), 4095),
        Fsync(at("d")),
        Symlink(b(), 1500),
        Rename(a(), b()),
        Unlink(b()),
        Symlink(a(), 1500),
        Fsync(at("d")),
        Create(b()),
        Rename(b(), at("c")),
        Rename(at("c"), a()),
    ]
}

/// Those where what counts is what the recovery does.
pub(super) fn recoveries() -> Vec<(&'static str, Vec<Do>)> {
    let a = || at("a");
    vec![
        ("the name of a new file after a kill, flushed with fdatasync alone", vec![Create(a()), Die, Fdatasync(a())]),
        (
            "records from before a seal that never got there, replayed twice",
            vec![
                Create(a()),
                Write(a(), 16_384, 8192),
                Write(a(), 0, 117),
                Write(a(), 4095, 4096),
                Seal,
                Resize(a(), 4099),
                Write(a(), 15_890, 8192),
                Write(a(), 12_417, 4657),
                Fdatasync(a()),
            ],
        ),
        (
            "a replay that grows and cuts what it grew",
            vec![
                Create(a()),
                Write(a(), 0, 9000),
                Fsync(a()),
                Write(a(), 5000, 9000),
                Resize(a(), 6000),
                Write(a(), 5000, 3000),
                Fdatasync(a()),
            ],
        ),
    ]
}
