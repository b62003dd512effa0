//! A file against a plain `Vec`, with reloads; and what a holder of the backing file can do to it.

use std::os::fd::AsFd as _;
use std::os::fd::OwnedFd;

use proptest::prelude::*;

use super::*;

struct Fixture {
    volume: Volume,
    dir: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let volume = crate::volume::testing::volume(dir.path());
        Self { volume, dir }
    }

    fn create(&self, name: &str) -> (OwnedFd, FileState) {
        let fd = storage::create_file(self.volume.root().as_fd(), name, 0o600).unwrap();
        let state = FileState::create(&self.volume, fd.as_fd()).unwrap();
        (fd, state)
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.dir.path().join(name)).unwrap()
    }

    /// Reads the file `name` as it would be after a mount, whole.
    fn read(&self, name: &str) -> Result<Vec<u8>, VolumeError> {
        let fd = storage::open_file(self.volume.root().as_fd(), name, false).unwrap();
        let state = FileState::load(&self.volume, fd.as_fd())?;
        let mut out = vec![0; state.size() as usize];
        let n = state.read(&self.volume, fd.as_fd(), 0, &mut out).map_err(|error| error.error)?;
        assert_eq!(n, out.len());
        Ok(out)
    }

    fn write_backing(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.dir.path().join(name), bytes).unwrap();
    }
}

#[derive(Clone, Debug)]
enum Op {
    Write(u64, usize, u8),
    Resize(u64),
    Read(u64, usize),
    Sync,
    Seal,
    Reload,
}

fn op() -> impl Strategy<Value = Op> {
    let near = prop_oneof![0..20_000_u64, (0..5_u64, -3..3_i64).prop_map(|(b, d)| (b * 4096).saturating_add_signed(d))];
    prop_oneof![
        4 => (near.clone(), 1..9000_usize, 1..=255_u8).prop_map(|(at, len, byte)| Op::Write(at, len, byte)),
        2 => near.clone().prop_map(Op::Resize),
        3 => (near, 1..12_000_usize).prop_map(|(at, len)| Op::Read(at, len)),
        1 => Just(Op::Sync),
        1 => Just(Op::Seal),
        1 => Just(Op::Reload),
    ]
}

proptest! {
    #[test]
    fn a_file_is_a_vector(ops in prop::collection::vec(op(), 1..30)) {
        let fixture = Fixture::new();
        let volume = &fixture.volume;
        let (fd, mut state) = fixture.create("f");
        let fd = fd.as_fd();
        let mut model: Vec<u8> = Vec::new();
        for op in ops {
            match op {
                Op::Write(at, len, byte) => {
                    let data: Vec<u8> = (0..len).map(|n| byte.wrapping_add(n as u8)).collect();
                    state.write(volume, fd, at, &data).unwrap();
                    let end = at as usize + len;
                    if model.len() < end {
                        model.resize(end, 0);
                    }
                    model[at as usize..end].copy_from_slice(&data);
                }
                Op::Resize(size) => {
                    state.resize(volume, fd, size).unwrap();
                    model.resize(size as usize, 0);
                }
                Op::Read(at, len) => {
                    let mut out = vec![0xee; len];
                    let n = state.read(volume, fd, at, &mut out).unwrap();
                    let expected = model.get(at as usize..(at as usize + len).min(model.len())).unwrap_or(&[]);
                    prop_assert_eq!(&out[..n], expected);
                }
                Op::Sync => {
                    let mark = state.flushing(volume, fd).unwrap();
                    state.flushed(volume, mark).unwrap();
                }
                Op::Seal => state.mend(volume, fd).and_then(|()| Ok(state.seal(volume, fd)?)).unwrap(),
                Op::Reload => state = FileState::load(volume, fd).unwrap(),
            }
            prop_assert_eq!(state.size(), model.len() as u64);
            prop_assert_eq!(format::plain_size(backing_len_of(fd).unwrap()), Some(state.size()));
        }
        prop_assert_eq!(fixture.read("f").unwrap(), model);
    }
}

const SIZES: [usize; 9] = [0, 1, 100, 4095, 4096, 4097, 8192, 10_000, 20_480];

fn contents(size: usize) -> Vec<u8> {
    (0..size).map(|n| (n % 251) as u8 + 1).collect()
}

fn sealed_file(fixture: &Fixture, name: &str, size: usize) -> Vec<u8> {
    let (fd, mut state) = fixture.create(name);
    state.write(&fixture.volume, fd.as_fd(), 0, &contents(size)).unwrap();
    state.seal(&fixture.volume, fd.as_fd()).unwrap();
    fixture.bytes(name)
}

/// Cut, extension, flip, move, swap and zeroing of blocks: an error or the right bytes, never others.
#[test]
fn a_sealed_file_is_right_or_refused() {
    let fixture = Fixture::new();
    for size in SIZES {
        let original = sealed_file(&fixture, &format!("f{size}"), size);
        let mut refused = 0;
        let mut check = |what: &str, bytes: &[u8]| {
            fixture.write_backing("t", bytes);
            match fixture.read("t") {
                Ok(read) => assert_eq!(read, contents(size), "size {size}, {what}"),
                Err(VolumeError::Damaged(_)) => refused += 1,
                Err(other) => panic!("size {size}, {what}: {other}"),
            }
        };
        check("untouched", &original);
        for cut in [0, 128, 511, 512, 540, 541, 4635, 4636, 4637, 4664, 4665, original.len().saturating_sub(1)] {
            if cut < original.len() {
                check(&format!("cut to {cut}"), &original[..cut]);
            }
        }
        for more in [1, 28, 29, 4124, 5000] {
            let mut longer = original.clone();
            longer.resize(original.len() + more, 0);
            check(&format!("{more} zeros longer"), &longer);
        }
        for at in (0..original.len()).step_by(97).chain([original.len() - 1]) {
            let mut flipped = original.clone();
            flipped[at] ^= 0x10;
            check(&format!("flip at {at}"), &flipped);
        }
        let blocks = (original.len() - 512).div_ceil(4124);
        for block in 0..blocks {
            let range = 512 + block * 4124..(512 + (block + 1) * 4124).min(original.len());
            let mut zeroed = original.clone();
            zeroed[range.clone()].fill(0);
            check(&format!("block {block} zeroed"), &zeroed);
            if range.len() == 4124 && blocks > 1 {
                let other = (block + 1) % blocks;
                let start = 512 + other * 4124;
                if start + 4124 <= original.len() {
                    let mut moved = original.clone();
                    moved.copy_within(range, start);
                    check(&format!("block {block} over {other}"), &moved);
                }
            }
        }
        assert!(refused > 0, "size {size}: nothing was refused");
    }
    // The same blocks under the header of another file.
    let a = fixture.bytes("f8192");
    let mut b = sealed_file(&fixture, "other", 8192);
    b[512..].copy_from_slice(&a[512..]);
    fixture.write_backing("t", &b);
    assert!(matches!(fixture.read("t"), Err(VolumeError::Damaged(Damage::Block))));
}

#[test]
fn above_the_floor_only_zeros_are_forgiven() {
    let fixture = Fixture::new();
    let volume = &fixture.volume;
    let (fd, mut state) = fixture.create("f");
    state.write(volume, fd.as_fd(), 0, &contents(8192)).unwrap();
    let mark = state.flushing(volume, fd.as_fd()).unwrap();
    state.flushed(volume, mark).unwrap();
    state.write(volume, fd.as_fd(), 8192, &contents(8192)).unwrap();
    state.flushing(volume, fd.as_fd()).unwrap();
    let original = fixture.bytes("f");
    for (block, forgiven) in [(0, false), (1, false), (2, true), (3, true)] {
        let mut zeroed = original.clone();
        zeroed[512 + block * 4124..512 + (block + 1) * 4124].fill(0);
        fixture.write_backing("t", &zeroed);
        assert_eq!(fixture.read("t").is_ok(), forgiven, "block {block} zeroed");
        let mut flipped = original.clone();
        flipped[512 + block * 4124 + 1000] ^= 1;
        fixture.write_backing("t", &flipped);
        assert!(fixture.read("t").is_err(), "block {block} flipped");
        fixture.write_backing("t", &original[..512 + block * 4124]);
        assert_eq!(fixture.read("t").is_ok(), block >= 2, "cut before block {block}");
    }
}

/// A large file comes in parts, in any order. Once all are there, zeros are no holes any more.
#[test]
fn holes_that_were_filled_are_none() {
    let fixture = Fixture::new();
    let (fd, mut state) = fixture.create("f");
    let all = contents(5 * 4096 + 100);
    for block in [3_usize, 1, 5, 0, 2, 4] {
        let part = &all[block * 4096..all.len().min((block + 1) * 4096)];
        state.write(&fixture.volume, fd.as_fd(), block as u64 * 4096, part).unwrap();
    }
    state.seal(&fixture.volume, fd.as_fd()).unwrap();
    let sealed = fixture.bytes("f");
    for block in 0..5 {
        let mut zeroed = sealed.clone();
        zeroed[512 + block * 4124..512 + (block + 1) * 4124].fill(0);
        fixture.write_backing("t", &zeroed);
        assert!(fixture.read("t").is_err(), "block {block} zeroed");
    }
    // One that is left is a hole; cut off, it is none again.
    state.resize(&fixture.volume, fd.as_fd(), 10 * 4096).unwrap();
    state.seal(&fixture.volume, fd.as_fd()).unwrap();
    assert_eq!(fixture.read("f").unwrap()[6 * 4096..], [0; 4 * 4096]);
    state.resize(&fixture.volume, fd.as_fd(), 5 * 4096 + 100).unwrap();
    state.seal(&fixture.volume, fd.as_fd()).unwrap();
    let mut zeroed = fixture.bytes("f");
    zeroed[512..512 + 4124].fill(0);
    fixture.write_backing("t", &zeroed);
    assert!(fixture.read("t").is_err());
}

/// What somebody zeroed below the floor before the next mount does not become a hole when the file is sealed, be there zeros
/// of a crash above it or not.
#[test]
fn a_seal_after_a_crash_excuses_nothing_below_the_floor() {
    let fixture = Fixture::new();
    let volume = &fixture.volume;
    let (fd, mut state) = fixture.create("f");
    state.write(volume, fd.as_fd(), 0, &contents(8192)).unwrap();
    let mark = state.flushing(volume, fd.as_fd()).unwrap();
    state.flushed(volume, mark).unwrap();
    state.flushing(volume, fd.as_fd()).unwrap();
    state.write(volume, fd.as_fd(), 8192, &contents(8192)).unwrap();
    let left = fixture.bytes("f");
    for (zeroed, lost) in [(&[0][..], true), (&[0, 2], true), (&[2], false), (&[], false)] {
        let mut bytes = left.clone();
        zeroed.iter().for_each(|block| bytes[512 + block * 4124..512 + (block + 1) * 4124].fill(0));
        fixture.write_backing("t", &bytes);
        let fd = storage::open_file(volume.root().as_fd(), "t", true).unwrap();
        let mut state = FileState::load(volume, fd.as_fd()).unwrap();
        assert!(state.seal(volume, fd.as_fd()).is_err(), "sealed without having been mended");
        // Programs work with it meanwhile, and flush.
        state.write(volume, fd.as_fd(), 16384, &contents(4096)).unwrap();
        for _ in 0..2 {
            let mark = state.flushing(volume, fd.as_fd()).unwrap();
            state.flushed(volume, mark).unwrap();
        }
        state.mend(volume, fd.as_fd()).unwrap();
        state.seal(volume, fd.as_fd()).unwrap();
        assert_eq!(fixture.read("t").is_err(), lost, "{zeroed:?}");
        // And there are no holes in it from now on.
        let mut bytes = fixture.bytes("t");
        bytes[512 + 3 * 4124..512 + 4 * 4124].fill(0);
        fixture.write_backing("t", &bytes);
        assert!(fixture.read("t").is_err(), "{zeroed:?}");
    }
}

/// So many blocks missing that they become holes: only if nothing else becomes one with them.
#[test]
fn very_many_zeros_of_a_crash_become_holes() {
    let fixture = Fixture::new();
    let volume = &fixture.volume;
    let (fd, mut state) = fixture.create("f");
    state.write(volume, fd.as_fd(), 0, &contents(8192)).unwrap();
    let mark = state.flushing(volume, fd.as_fd()).unwrap();
    state.flushed(volume, mark).unwrap();
    state.flushing(volume, fd.as_fd()).unwrap();
    // The length got there, and nothing else: not even the header that says that there are holes.
    let blocks = FILLED + 10;
    let len = format::backing_len(blocks * 4096 + 50);
    for zeroed in [false, true] {
        let mut bytes = fixture.bytes("f");
        if zeroed {
            bytes[512 + 4124..512 + 2 * 4124].fill(0);
        }
        fixture.write_backing("t", &bytes);
        let fd = storage::open_file(volume.root().as_fd(), "t", true).unwrap();
        storage::set_len(fd.as_fd(), len).unwrap();
        let mut state = FileState::load(volume, fd.as_fd()).unwrap();
        assert_eq!(state.mend(volume, fd.as_fd()).is_err(), zeroed);
        assert_eq!(state.seal(volume, fd.as_fd()).is_err(), zeroed);
        if !zeroed {
            let read = fixture.read("t").unwrap();
            assert_eq!((&read[..8192], read.len() as u64), (&contents(8192)[..], blocks * 4096 + 50));
            assert!(read[8192..].iter().all(|byte| *byte == 0));
        }
    }
}

/// A killed daemon leaves a length between two blocks' ends, at the end of a page: what is there of the last block is nothing
/// yet. Anywhere else it is damage.
#[test]
fn a_last_block_without_its_end_is_zeros_above_the_floor() {
    let fixture = Fixture::new();
    let (fd, mut state) = fixture.create("f");
    state.write(&fixture.volume, fd.as_fd(), 0, &contents(16384)).unwrap();
    let left = fixture.bytes("f");
    for len in [512 + 3 * 4124 + 29, left.len() - 1, 8191, 8193] {
        fixture.write_backing("t", &left[..len]);
        assert!(fixture.read("t").is_err(), "{len}");
    }
    for len in [4096_usize, 8192, 8192 + 512, 12_288] {
        fixture.write_backing("t", &left[..len]);
        let (read, whole) = (fixture.read("t").unwrap(), (len - 512) / 4124 * 4096);
        assert_eq!(read[..whole], contents(16384)[..whole], "{len}");
        assert!(read[whole..].iter().all(|byte| *byte == 0), "{len}");
        assert_eq!(read.len() as u64, format::plain_size(len as u64).unwrap());
    }
}

#[test]
fn sealing_keeps_times() {
    let fixture = Fixture::new();
    let (fd, mut state) = fixture.create("f");
    state.write(&fixture.volume, fd.as_fd(), 0, b"forget me").unwrap();
    let past = rustix::fs::Timespec { tv_sec: 1_000_000_000, tv_nsec: 5 };
    storage::set_times_fd(fd.as_fd(), &Timestamps { last_access: past, last_modification: past }).unwrap();
    state.seal(&fixture.volume, fd.as_fd()).unwrap();
    let stat = storage::stat_fd(fd.as_fd()).unwrap();
    assert_eq!((stat.st_mtime, stat.st_mtime_nsec), (1_000_000_000, 5));
}

/// A full disk in the middle of a write: what was there before is still there.
#[test]
fn a_write_that_fails_leaves_the_old_contents() {
    let fixture = Fixture::new();
    // Beyond the limit the kernel sends this; caught, the write fails with EFBIG instead.
    signal_hook::flag::register(libc::SIGXFSZ, std::sync::Arc::default()).unwrap();
    for (size, offset, len) in [
        (5000, 5000, 20_000),
        (5000, 0, 20_000),
        (4096, 4096, 9000),
        (100, 50, 6000),
        (5000, 4096, 20_000),
        (100, 0, 9000),
    ] {
        let name = format!("f{size}-{offset}");
        let (fd, mut state) = fixture.create(&name);
        state.write(&fixture.volume, fd.as_fd(), 0, &contents(size)).unwrap();
        let limit = format::backing_len(size as u64) + 700;
        // RLIMIT_FSIZE fails a write half-way as a full disk does; the test's process has it to itself under nextest.
        let old = rustix::process::getrlimit(rustix::process::Resource::Fsize);
        rustix::process::setrlimit(
            rustix::process::Resource::Fsize,
            rustix::process::Rlimit { current: Some(limit), ..old },
        )
        .unwrap();
        let failed = state.write(&fixture.volume, fd.as_fd(), offset as u64, &vec![0xaa; len]);
        rustix::process::setrlimit(rustix::process::Resource::Fsize, old).unwrap();
        assert!(failed.is_err());
        let read = fixture.read(&name).unwrap();
        assert_eq!(read.len(), size);
        assert_eq!(state.size(), size as u64);
        // Up to the write, and from the file's last whole block on, which the write covered but did not get to keep.
        let kept = offset.min(size);
        assert_eq!(read[..kept], contents(size)[..kept], "size {size}, offset {offset}");
        let tail = size / 4096 * 4096;
        assert_eq!(read[tail..], contents(size)[tail..], "size {size}, offset {offset}: the old tail");
    }
}

/// The attribute of a file's birth speaks only for a file that has no header yet, and only as it was written then.
#[test]
fn a_birth_cannot_be_made_for_a_sealed_file() {
    let fixture = Fixture::new();
    let original = sealed_file(&fixture, "f", 4 * 4096);
    let fd = storage::open_file(fixture.volume.root().as_fd(), "f", true).unwrap();
    assert!(storage::get_xattr_fd::<{ BIRTH_LEN }>(fd.as_fd(), format::BIRTH).is_none(), "it goes with the seal");
    // What anybody can copy out of the file: its static header, and the mutable one of now.
    let forged: Vec<u8> = [&original[..STATIC_LEN], &original[MUTABLE_AT as usize..][..2 * MUTABLE_LEN]].concat();
    let mut zeroed = original.clone();
    zeroed[..HEADER_LEN].fill(0);
    zeroed[512 + 4124..512 + 2 * 4124].fill(0);
    for birth in [&original[..STATIC_LEN], &[&original[..STATIC_LEN], &[0; 128]].concat(), &forged] {
        fixture.write_backing("f", &zeroed);
        storage::set_xattr_fd(fd.as_fd(), format::BIRTH, birth).unwrap();
        assert!(fixture.read("f").is_err(), "{} bytes", birth.len());
    }
    // A newborn one whose contents a power cut took.
    let (fd, _) = fixture.create("new");
    storage::set_len(fd.as_fd(), 0).unwrap();
    assert_eq!(fixture.read("new").unwrap(), b"");
}

/// A cut that fails leaves the holes what they are.
#[test]
fn a_failed_cut_forgets_no_holes() {
    let fixture = Fixture::new();
    let volume = &fixture.volume;
    let (fd, mut state) = fixture.create("f");
    state.resize(volume, fd.as_fd(), 10 * 4096).unwrap();
    state.write(volume, fd.as_fd(), 10 * 4096, &contents(100)).unwrap();
    let readable = storage::open_file(volume.root().as_fd(), "f", false).unwrap();
    assert!(state.resize(volume, readable.as_fd(), 0).is_err(), "cut by way of a descriptor that cannot write");
    state.seal(volume, fd.as_fd()).unwrap();
    let read = fixture.read("f").unwrap();
    assert_eq!((&read[..10 * 4096], &read[10 * 4096..]), (&[0; 10 * 4096][..], &contents(100)[..]));
}

/// What mending writes is a change like any other: a flush from before it vouches for nothing.
#[test]
fn mending_is_a_change() {
    let fixture = Fixture::new();
    let volume = &fixture.volume;
    let (fd, mut state) = fixture.create("f");
    state.write(volume, fd.as_fd(), 0, &contents(8192)).unwrap();
    let mut left = fixture.bytes("f");
    left[1024..1536].fill(0);
    fixture.write_backing("t", &left);
    let fd = storage::open_file(volume.root().as_fd(), "t", true).unwrap();
    let mut state = FileState::load(volume, fd.as_fd()).unwrap();
    let before = state.changes();
    state.mend(volume, fd.as_fd()).unwrap();
    assert_ne!(state.changes(), before);
    let after = state.changes();
    state.mend(volume, fd.as_fd()).unwrap();
    assert_eq!(state.changes(), after, "there was nothing left to do");
}
