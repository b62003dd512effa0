//! Random steps.

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::{BoxedStrategy, Just, Strategy, any, prop_oneof};
use proptest::sample::select;

use super::Step;
use crate::fs::crash_tests::session::Do;

fn path() -> BoxedStrategy<String> {
    let component = prop_oneof![
        12 => select(vec!["a", "b", "c"]), 3 => select(vec!["A", "x255", "x176", "x175"]), 1 => Just("x256")
    ];
    let depth = prop_oneof![4 => Just(1..2), 2 => Just(2..3), 1 => Just(3..4)];
    let usual = select(["a", "a", "b", "a/b", "c/A", "x176"].map(String::from).to_vec());
    let any = depth.prop_flat_map(move |depth| vec(component.clone(), depth)).prop_map(|parts| parts.join("/"));
    prop_oneof![2 => usual, 1 => any].boxed()
}

fn place() -> BoxedStrategy<u64> {
    prop_oneof![0..20_000_u64, select(vec![0, 1, 4095, 4096, 4097, 8192, 70_000])].boxed()
}

fn len() -> BoxedStrategy<usize> {
    prop_oneof![1..9000_usize, select(vec![1, 4096, 8192])].boxed()
}

fn changes() -> BoxedStrategy<Do> {
    use libc::{FALLOC_FL_KEEP_SIZE as KEEP, FALLOC_FL_PUNCH_HOLE as PUNCH, FALLOC_FL_ZERO_RANGE as ZERO};
    let space = select(vec![PUNCH | KEEP, PUNCH | KEEP, ZERO, ZERO | KEEP, KEEP, 0]);
    let target = select(vec![1, 10, 611, 1500, 4095, 4096]);
    prop_oneof![
        6 => path().prop_map(Do::Create),
        5 => path().prop_map(Do::Mkdir),
        1 => path().prop_map(Do::Fifo),
        1 => path().prop_map(Do::Socket),
        1 => path().prop_map(Do::Device),
        2 => (path(), target).prop_map(|(path, len)| Do::Symlink(path, len)),
        3 => (path(), path()).prop_map(|(path, to)| Do::Link(path, to)),
        3 => path().prop_map(Do::Unlink),
        2 => path().prop_map(Do::Rmdir),
        6 => (path(), path()).prop_map(|(path, to)| Do::Rename(path, to)),
        3 => (path(), path()).prop_map(|(path, to)| Do::Exchange(path, to)),
        2 => (path(), path()).prop_map(|(path, to)| Do::RenameNew(path, to)),
        6 => (path(), place(), len()).prop_map(|(path, at, len)| Do::Write(path, at, len)),
        3 => (path(), place()).prop_map(|(path, size)| Do::Resize(path, size)),
        4 => (path(), place(), len(), space).prop_map(|(path, at, len, mode)| Do::Allocate(path, at, len, mode)),
        3 => (path(), 0..2_u8).prop_map(|(path, n)| Do::SetXattr(path, n)),
        1 => (path(), 0..2_u8).prop_map(|(path, n)| Do::RemoveXattr(path, n)),
    ]
    .boxed()
}

pub(super) fn steps(root: bool) -> BoxedStrategy<Step> {
    let mode = || select(vec![0o600, 0o644, 0o755, 0o000, 0o1777, 0o400]);
    let modes =
        if root { prop_oneof![6 => mode(), 1 => Just(0o2770)].boxed() } else { mode().prop_map(|m| m | 0o700).boxed() };
    let ids = if root { vec![0, 54_001, 54_002] } else { vec![rustix::process::geteuid().as_raw()] };
    let id = || option::of(select(ids.clone()));
    let time = || option::of((-1000..1000_i64, 0..1_000_000_000_u32));
    let upkeep = select(vec![Do::Commit, Do::Checkpoint, Do::Seal, Do::Forget, Do::Remount, Do::Die]);
    let held = prop_oneof![
        4 => path().prop_map(Step::Hold),
        2 => (any::<usize>(), place(), len()).prop_map(|(n, at, len)| Step::WriteHeld(n, at, len)),
        1 => (any::<usize>(), place()).prop_map(|(n, size)| Step::ResizeHeld(n, size)),
        1 => any::<usize>().prop_map(Step::FsyncHeld),
        1 => (any::<usize>(), mode()).prop_map(|(n, mode)| Step::ChmodHeld(n, mode | 0o600)),
        1 => any::<usize>().prop_map(Step::SetXattrHeld),
        1 => (any::<usize>(), path()).prop_map(|(n, path)| Step::LinkHeld(n, path)),
        1 => any::<usize>().prop_map(Step::CloseHeld),
    ];
    prop_oneof![
        50 => changes().prop_map(Step::Do),
        3 => (path(), any::<bool>()).prop_map(|(path, data)| Step::Do(if data { Do::Fdatasync(path) } else { Do::Fsync(path) })),
        6 => upkeep.prop_map(Step::Do),
        8 => held,
        3 => (path(), modes).prop_map(|(path, mode)| Step::Chmod(path, mode)),
        2 => (path(), id(), id()).prop_map(|(path, uid, gid)| Step::Chown(path, uid, gid)),
        3 => (path(), time(), time()).prop_map(|(path, atime, mtime)| Step::Times(path, atime, mtime)),
        1 => select(ids.clone()).prop_map(Step::Become),
        3 => Just(Step::Look),
    ]
    .boxed()
}
