//! Sequences that found something.

use rustix::fs::{FallocateFlags, FileType, OFlags};

use crate::calls::{Call, at, p};
use crate::world::World;
use crate::{Ground, Step, seen};

const ROOT: usize = 0;

fn root(call: Call) -> Step {
    Step::Call(ROOT, call, true)
}

fn holds(steps: &[Step]) {
    for acl in [false, true] {
        let ground = Ground::new(acl);
        ground.compare(steps).unwrap();
        ground.end();
    }
}

/// It could be logged and never be put in place: no file was sealed any more, and the next mount would have failed.
#[test]
fn a_size_that_the_backing_filesystem_has_not_is_refused() {
    holds(&[
        Step::Remount,
        root(Call::Open(0, at("a"), OFlags::RDWR, 0)),
        root(Call::Pwrite(0, 0, 100)),
        root(Call::Sync(0, false)),
        root(Call::Ftruncate(0, 50)),
        root(Call::Ftruncate(0, (1 << 44) - 4096)),
        root(Call::Ftruncate(0, 1 << 45)),
        root(Call::Ftruncate(0, 1 << 43)),
        root(Call::Stat(at("a"), true)),
        Step::Remount,
    ]);
}

/// The last block was filled up before it was.
#[test]
fn a_refused_size_changes_nothing() {
    holds(&[
        root(Call::Open(0, at("d/c"), OFlags::WRONLY, 0)),
        root(Call::Ftruncate(0, (1 << 44) - 4096)),
        root(Call::Fstat(0)),
        Step::Remount,
    ]);
}

/// The kernel's word of the time was overtaken by what was written before it.
#[test]
fn the_time_of_a_write_is_the_same_after_a_remount() {
    let one = [
        root(Call::Open(0, at("d/b"), OFlags::CREATE | OFlags::RDWR, 0o640)),
        root(Call::Write(0, 4096)),
        root(Call::Allocate(0, FallocateFlags::KEEP_SIZE, 6378, 713)),
        Step::Remount,
    ];
    holds(&[&one[..], &one, &one].concat());
}

#[test]
fn a_chown_that_changes_nothing_moves_the_time_of_change() {
    holds(&[
        root(Call::Chown(at("b"), None, None, true)),
        root(Call::Chown(at("a"), None, None, true)),
        root(Call::Symlink(p("a"), at("e"))),
        root(Call::Chown(at("e"), None, None, false)),
    ]);
}

/// New directories and special files took the owner's rights, and special files the mask, from the mode alone.
#[test]
fn a_default_list_bounds_what_a_new_object_allows() {
    let entries =
        [(0x01_u16, 5_u16, u32::MAX), (0x02, 7, 54_001), (0x04, 7, u32::MAX), (0x10, 5, u32::MAX), (0x20, 4, u32::MAX)];
    let mut list = 2_u32.to_le_bytes().to_vec();
    for (tag, rights, id) in entries {
        list.extend([&tag.to_le_bytes()[..], &rights.to_le_bytes(), &id.to_le_bytes()].concat());
    }
    let default = || p("system.posix_acl_default");
    let on = || crate::calls::On::Path(p("b"), true);
    let mut steps = vec![root(Call::SetXattr(on(), default(), crate::calls::Name(list), 0))];
    for (n, mode) in [0o666, 0o777, 0o6777, 0o640, 0o1777, 0].into_iter().enumerate() {
        for user in [ROOT, 1, 2] {
            let new = |kind: &str| at(&format!("b/{kind}{n}{user}"));
            steps.extend([
                Step::Call(user, Call::Mkdir(new("d"), mode), true),
                Step::Call(user, Call::Mknod(new("p"), FileType::Fifo, mode, 0), true),
                Step::Call(user, Call::Mknod(new("f"), FileType::RegularFile, mode, 0), true),
                Step::Call(user, Call::Open(0, new("o"), OFlags::CREATE | OFlags::RDWR, mode), true),
            ]);
        }
    }
    holds(&steps);
}

/// Who is not the owner could take setuid and setgid bits away, with a chown that changes neither.
#[test]
fn only_the_owner_takes_privileges_away_without_writing() {
    let mut steps = vec![root(Call::Chmod(at("a"), 0o6777)), root(Call::Mknod(at("p"), FileType::Fifo, 0o6777, 0))];
    steps.push(root(Call::Chmod(at("p"), 0o6777)));
    for path in ["a", "p"] {
        steps.push(Step::Call(1, Call::Chown(at(path), None, None, true), true));
    }
    // Writing does.
    steps.push(Step::Call(1, Call::Open(0, at("a"), OFlags::RDWR, 0), true));
    steps.push(Step::Call(1, Call::Write(0, 100), true));
    for change in
        [Call::Ftruncate(0, 50), Call::Allocate(0, FallocateFlags::empty(), 0, 9000), Call::Fchown(0, None, None)]
    {
        steps.push(root(Call::Chmod(at("a"), 0o6777)));
        steps.push(Step::Call(1, change, true));
    }
    holds(&steps);
}

#[test]
fn a_namespace_is_no_attribute_name() {
    let name = || p("user.");
    let on = || crate::calls::On::Path(p("a"), true);
    holds(&[
        root(Call::SetXattr(on(), name(), p("x"), 0)),
        root(Call::GetXattr(on(), name())),
        root(Call::RemoveXattr(on(), name())),
        root(Call::ListXattr(on(), 100)),
    ]);
}

/// The kernel believes the time that was set until it has dropped the inode; then it is the nearest that ext4 knows.
#[test]
fn times_that_the_backing_filesystem_does_not_know_are_cut_to_what_it_knows() {
    let ground = Ground::new(false);
    let mut plain = World::new(ground.plain().join("case"));
    let mut mounted = World::new(ground.v.at("case"));
    for (path, time) in
        [("a", (1 << 40, 7)), ("b", (i64::MIN, 5)), ("d", (i64::MAX, 999_999_999)), ("d/c", (-(1 << 32), 1))]
    {
        for world in [&plain, &mounted] {
            world.run(ROOT, &Call::Times(at(path), [time; 2], true)).unwrap();
        }
    }
    plain.stop();
    mounted.stop();
    ground.v.remount(&["-o", ground.options]);
    assert_eq!(seen::tree(&mounted.root), seen::tree(&plain.root));
    ground.end();
}
