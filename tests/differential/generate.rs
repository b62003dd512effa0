//! Random calls.

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::{BoxedStrategy, Just, Strategy, any, prop_oneof};
use proptest::sample::select;
use rustix::fs::{AtFlags, FallocateFlags, FileType, OFlags, RenameFlags, SeekFrom, XattrFlags};

use crate::Step;
use crate::calls::{At, Call, Name, On, SLOTS, p};
use crate::world::USERS;

fn component() -> impl Strategy<Value = Vec<u8>> {
    let long = |letter, len| vec![letter; len];
    prop_oneof![
        60 => select(["a", "a", "b", "b", "b", "c", "d", "d", "e"].map(|name| name.as_bytes().to_vec()).to_vec()),
        4 => select(vec![long(b'n', 255), long(b'n', 176), long(b'm', 175), b"\xff\xfe".to_vec()]),
        2 => select(vec![1, 2, 100, 174, 177, 200, 254]).prop_map(move |len| vec![b'y'; len]),
        1 => Just(long(b'x', 256)),
        1 => Just(b".".to_vec()),
        1 => Just(b"..".to_vec()),
    ]
}

/// A path of the sort that programs use, and now and then one of another sort.
pub(crate) fn path() -> BoxedStrategy<Name> {
    let depth = prop_oneof![8 => Just(1..2), 4 => Just(2..3), 1 => Just(3..5)];
    let parts = depth.prop_flat_map(|depth| vec(component(), depth));
    let prefix = select(vec!["", "", "", "", "", "", "", "/", "./"]);
    let suffix = select([[""; 10].as_slice(), &["/", "/", "/.", "/.."]].concat());
    let usual = (prefix, parts, suffix)
        .prop_map(|(prefix, parts, suffix)| [prefix.as_bytes(), &parts.join(&b'/'), suffix.as_bytes()].concat());
    let longest = |len: usize| [b"./".repeat((len - 1) / 2), vec![b'a'; 2 - len % 2]].concat();
    let odd = select(vec![
        b"".to_vec(),
        b".".to_vec(),
        b"..".to_vec(),
        b"/".to_vec(),
        longest(4095),
        longest(4096),
        b"b/../".repeat(900),
    ]);
    // What there is to begin with, and what may come to be beside it.
    let there =
        select(["a", "a", "b", "b/b", "d", "d/c", "e", "b/e", "d/e"].map(|name| name.as_bytes().to_vec()).to_vec());
    prop_oneof![90 => there, 60 => usual, 1 => odd].prop_map(Name).boxed()
}

fn place() -> BoxedStrategy<At> {
    (prop_oneof![12 => Just(None), 1 => (0..SLOTS).prop_map(Some)], path())
        .prop_map(|(dir, path)| At(dir, path))
        .boxed()
}

fn mode() -> BoxedStrategy<u32> {
    // Not setgid without group execution, of which docs/SEMANTICS.md has a row: the two sides would stay different.
    select(vec![0o600, 0o644, 0o666, 0o777, 0o777, 0o755, 0o700, 0o1777, 0o4755, 0o2755, 0o6777, 0o3770, 0, 0o070])
        .boxed()
}

fn user() -> BoxedStrategy<usize> {
    prop_oneof![1 => Just(0), 1 => 1..USERS.len()].boxed()
}

fn uid() -> BoxedStrategy<Option<u32>> {
    let ids: Vec<u32> = USERS.iter().map(|user| user.0).collect();
    prop_oneof![1 => Just(None), 2 => select(ids).prop_map(Some)].boxed()
}

fn gid() -> BoxedStrategy<Option<u32>> {
    prop_oneof![1 => Just(None), 2 => select(vec![0, 54_001, 54_002, 54_003, 54_010]).prop_map(Some)].boxed()
}

fn offset() -> BoxedStrategy<u64> {
    prop_oneof![
        12 => 0..10_000_u64,
        12 => select(vec![0, 1, 4095, 4096, 4097, 8192, 40_000, 100_000]),
        1 => select(vec![3_000_000, 1 << 33]),
    ]
    .boxed()
}

fn len() -> BoxedStrategy<usize> {
    prop_oneof![0..5000_usize, select(vec![0, 1, 4096, 8192, 10_000])].boxed()
}

fn time() -> BoxedStrategy<(i64, i64)> {
    // UTIME_NOW, UTIME_OMIT (linux/stat.h).
    const NOW: i64 = (1 << 30) - 1;
    const OMIT: i64 = (1 << 30) - 2;
    prop_oneof![
        4 => (-1000..1000_i64, select(vec![0, 1, 123_456_789, 999_999_999])),
        1 => Just((7, NOW)),
        2 => Just((7, OMIT)),
        // Those that ext4 does not know are for regressions.rs.
        1 => select(vec![(0, 1_000_000_000), (0, -1), (-(1 << 31), 0), (1 << 33, 1), (-1, 1)]),
    ]
    .boxed()
}

fn flags() -> BoxedStrategy<OFlags> {
    let access = prop_oneof![
        3 => Just(OFlags::RDONLY), 2 => Just(OFlags::WRONLY), 6 => Just(OFlags::RDWR), 2 => Just(OFlags::PATH),
        1 => Just(OFlags::from_bits_retain(libc::O_ACCMODE as u32)),
    ];
    let other = prop_oneof![
        8 => Just(OFlags::CREATE), 2 => Just(OFlags::EXCL), 2 => Just(OFlags::TRUNC), 2 => Just(OFlags::APPEND),
        2 => Just(OFlags::NOFOLLOW), 2 => Just(OFlags::DIRECTORY), 1 => Just(OFlags::SYNC), 1 => Just(OFlags::DSYNC),
        1 => Just(OFlags::NOATIME), 1 => Just(OFlags::TMPFILE),
    ];
    let any = (access, vec(other, 0..4)).prop_map(|(access, other)| other.into_iter().fold(access, OFlags::union));
    let usual = vec![
        OFlags::RDWR,
        OFlags::RDWR,
        OFlags::RDWR | OFlags::CREATE,
        OFlags::RDWR | OFlags::CREATE | OFlags::TRUNC,
        OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL,
        OFlags::WRONLY | OFlags::APPEND,
        OFlags::RDONLY,
        OFlags::RDONLY | OFlags::DIRECTORY,
        OFlags::PATH,
    ];
    prop_oneof![2 => select(usual), 1 => any].boxed()
}

fn attribute() -> BoxedStrategy<Name> {
    let long = |prefix: &str, len: usize| [prefix.as_bytes(), &vec![b'l'; len - prefix.len()]].concat();
    prop_oneof![
        12 => select(vec!["user.a", "user.b", "trusted.a", "security.a", "security.capability"])
            .prop_map(|name| name.as_bytes().to_vec()),
        3 => select(vec!["user.", "user", "", "other.a", "system.a", "trusted.", "lethefs.a", "user.lethefs.a", "os2.a"])
            .prop_map(|name| name.as_bytes().to_vec()),
        2 => select(vec![long("user.", 165), long("trusted.", 166), long("user.", 255), long("user.", 256)]),
        3 => select(vec!["system.posix_acl_access", "system.posix_acl_default"]).prop_map(|name| name.as_bytes().to_vec()),
    ]
    .prop_map(Name)
    .boxed()
}

/// An access control list as xattrs carry it (include/uapi/linux/posix_acl_xattr.h), mostly a sound one.
fn acl() -> BoxedStrategy<Vec<u8>> {
    let rights = || select(vec![0_u16, 4, 5, 6, 7, 7]);
    let named = |ids: Vec<u32>| option::of((rights(), select(ids)));
    let users = named(USERS.iter().map(|user| user.0).collect());
    let groups = named(vec![54_001, 54_010, 54_003]);
    let flaw = prop_oneof![12 => Just(0), 1 => 1..6];
    (rights(), users, rights(), groups, rights(), rights(), flaw)
        .prop_map(|(owner, user, group, named_group, mask, others, flaw)| {
            let none = u32::MAX;
            let mut entries = vec![(0x01_u16, owner, none)];
            entries.extend(user.map(|(rights, id)| (0x02, rights, id)));
            entries.push((0x04, group, none));
            entries.extend(named_group.map(|(rights, id)| (0x08, rights, id)));
            if (user.is_some() || named_group.is_some()) != (flaw == 1) {
                entries.push((0x10, mask, none));
            }
            entries.push((0x20, others, none));
            if flaw == 2 {
                entries.remove(0);
            }
            let version = if flaw == 3 { 1_u32 } else { 2 };
            let mut bytes = version.to_le_bytes().to_vec();
            for (tag, rights, id) in entries {
                bytes.extend(tag.to_le_bytes());
                bytes.extend(rights.to_le_bytes());
                bytes.extend(id.to_le_bytes());
            }
            match flaw {
                4 => bytes.truncate(bytes.len() - 3),
                5 => bytes.truncate(4),
                _ => {}
            }
            bytes
        })
        .boxed()
}

fn on() -> BoxedStrategy<On> {
    prop_oneof![
        1 => (0..SLOTS).prop_map(On::Slot),
        4 => (path(), prop_oneof![3 => Just(true), 1 => Just(false)]).prop_map(|(path, follow)| On::Path(path, follow)),
    ]
    .boxed()
}

fn attributes() -> BoxedStrategy<Call> {
    let value = prop_oneof![
        12 => (0..300_usize).prop_map(|len| crate::bytes(len, 9)),
        1 => select(vec![5000, 65_537]).prop_map(|len| crate::bytes(len, 9)),
    ];
    let how = prop_oneof![4 => Just(0), 1 => Just(XattrFlags::CREATE.bits()), 1 => Just(XattrFlags::REPLACE.bits()), 1 => 3..5_u32];
    let list = select(vec!["system.posix_acl_access", "system.posix_acl_default"]);
    prop_oneof![
        4 => (on(), attribute(), value, how).prop_map(|(on, name, value, how)| Call::SetXattr(on, name, Name(value), how)),
        4 => (on(), list, acl()).prop_map(|(on, name, value)| Call::SetXattr(on, p(name), Name(value), 0)),
        3 => (on(), attribute()).prop_map(|(on, name)| Call::GetXattr(on, name)),
        2 => (on(), select(vec![0, 1, 20, 10_000])).prop_map(|(on, len)| Call::ListXattr(on, len)),
        2 => (on(), attribute()).prop_map(|(on, name)| Call::RemoveXattr(on, name)),
    ]
    .boxed()
}

fn descriptors() -> BoxedStrategy<Call> {
    let slot = || prop_oneof![4 => Just(0), 1 => 0..SLOTS];
    let (keep, zero, punch) = (FallocateFlags::KEEP_SIZE, FallocateFlags::ZERO_RANGE, FallocateFlags::PUNCH_HOLE);
    let space = select(vec![
        punch | keep,
        punch | keep,
        punch,
        zero,
        zero | keep,
        keep,
        FallocateFlags::empty(),
        FallocateFlags::COLLAPSE_RANGE,
        FallocateFlags::INSERT_RANGE,
        FallocateFlags::from_bits_retain(0x100),
        zero | punch,
    ]);
    let seek = prop_oneof![
        offset().prop_map(SeekFrom::Start),
        (-5000..5000_i64).prop_map(SeekFrom::End),
        (-5000..5000_i64).prop_map(SeekFrom::Current),
        offset().prop_map(SeekFrom::Hole),
        offset().prop_map(SeekFrom::Data),
    ];
    let short =
        || prop_oneof![9 => offset(), 1 => select(vec![1 << 40, (1 << 44) - 4096, 1 << 44, 1 << 45, u64::MAX >> 1])];
    prop_oneof![
        1 => (slot(), slot()).prop_map(|(a, b)| Call::Dup(a, b)),
        1 => slot().prop_map(Call::Close),
        2 => (slot(), len()).prop_map(|(s, l)| Call::Read(s, l)),
        3 => (slot(), offset(), len()).prop_map(|(s, o, l)| Call::Pread(s, o, l)),
        4 => (slot(), len()).prop_map(|(s, l)| Call::Write(s, l)),
        6 => (slot(), offset(), len()).prop_map(|(s, o, l)| Call::Pwrite(s, o, l)),
        3 => (slot(), seek).prop_map(|(s, to)| Call::Seek(s, to)),
        4 => (slot(), short()).prop_map(|(s, l)| Call::Ftruncate(s, l)),
        5 => (slot(), space, offset(), len()).prop_map(|(s, m, o, l)| Call::Allocate(s, m, o, l as u64)),
        3 => (slot(), option::of(offset()), slot(), option::of(offset()), len())
            .prop_map(|(from, f, to, t, len)| Call::Copy(from, f, to, t, len)),
        2 => (slot(), any::<bool>()).prop_map(|(s, data)| Call::Sync(s, data)),
        2 => slot().prop_map(Call::Fstat),
        2 => (slot(), mode()).prop_map(|(s, m)| Call::Fchmod(s, m)),
        2 => (slot(), uid(), gid()).prop_map(|(s, u, g)| Call::Fchown(s, u, g)),
        1 => (slot(), time(), time()).prop_map(|(s, a, m)| Call::Ftimes(s, [a, m])),
        1 => slot().prop_map(Call::Fchdir),
    ]
    .boxed()
}

fn paths() -> BoxedStrategy<Call> {
    let rename = prop_oneof![
        4 => Just(RenameFlags::empty()), 2 => Just(RenameFlags::NOREPLACE), 3 => Just(RenameFlags::EXCHANGE),
        1 => Just(RenameFlags::WHITEOUT), 1 => Just(RenameFlags::NOREPLACE | RenameFlags::EXCHANGE),
        1 => Just(RenameFlags::from_bits_retain(8)),
    ];
    let target = prop_oneof![
        6 => path(),
        1 => select(vec![611_usize, 1375, 4095, 4096]).prop_map(|len| Name(vec![b't'; len])),
        1 => Just(Name(b"c".to_vec())),
    ];
    let links = prop_oneof![
        4 => Just(AtFlags::empty()), 1 => Just(AtFlags::SYMLINK_FOLLOW), 1 => Just(AtFlags::EMPTY_PATH),
        1 => Just(AtFlags::from_bits_retain(1)),
    ];
    let kind = prop_oneof![
        2 => Just(FileType::Fifo), 2 => Just(FileType::Socket), 2 => Just(FileType::RegularFile),
        2 => Just(FileType::CharacterDevice), 1 => Just(FileType::BlockDevice), 1 => Just(FileType::Directory),
        1 => Just(FileType::Symlink), 1 => Just(FileType::Unknown),
    ];
    // /dev/null, a driver that is not there, and what no driver has.
    let device = select(vec![(1, 3), (240, 9), (0, 0)]).prop_map(|(major, minor)| rustix::fs::makedev(major, minor));
    let rights = prop_oneof![6 => 0..8_u32, 1 => Just(8)];
    let held = option::weighted(0.2, 0..SLOTS).prop_map(|slot| slot.map(|slot| At(Some(slot), Name(Vec::new()))));
    prop_oneof![
        16 => (prop_oneof![2 => Just(0), 1 => 0..SLOTS], place(), flags(), mode()).prop_map(|(s, p, f, m)| Call::Open(s, p, f, m)),
        4 => place().prop_map(Call::ReadFile),
        2 => (path(), offset()).prop_map(|(p, l)| Call::Truncate(p, l)),
        6 => (place(), mode()).prop_map(|(p, m)| Call::Mkdir(p, m)),
        2 => place().prop_map(Call::Rmdir),
        4 => place().prop_map(Call::Unlink),
        5 => (held, place(), place(), links).prop_map(|(held, old, new, flags)| Call::Link(held.unwrap_or(old), new, flags)),
        4 => (target, place()).prop_map(|(t, p)| Call::Symlink(t, p)),
        2 => (place(), select(vec![1, 5, 5000])).prop_map(|(p, len)| Call::Readlink(p, len)),
        10 => (place(), place(), rename).prop_map(|(a, b, f)| Call::Rename(a, b, f)),
        3 => (place(), kind, mode(), device).prop_map(|(p, kind, m, d)| Call::Mknod(p, kind, m, d)),
        4 => (place(), mode()).prop_map(|(p, m)| Call::Chmod(p, m)),
        4 => (place(), uid(), gid(), any::<bool>()).prop_map(|(p, u, g, f)| Call::Chown(p, u, g, f)),
        3 => (place(), time(), time(), any::<bool>()).prop_map(|(p, a, m, f)| Call::Times(p, [a, m], f)),
        4 => (place(), any::<bool>()).prop_map(|(p, f)| Call::Stat(p, f)),
        3 => (place(), rights, any::<bool>()).prop_map(|(p, r, e)| Call::Access(p, r, e)),
        3 => place().prop_map(Call::List),
        1 => place().prop_map(Call::Statfs),
        1 => path().prop_map(Call::Chdir),
        1 => select(vec![0, 0, 0o22, 0o22, 0o27, 0o77, 0o777]).prop_map(Call::Umask),
    ]
    .boxed()
}

pub(crate) fn steps() -> BoxedStrategy<Step> {
    let call = prop_oneof![9 => paths(), 6 => descriptors(), 2 => attributes()];
    prop_oneof![
        150 => (user(), call, select(vec![true, false, false, false])).prop_map(|(u, call, timed)| Step::Call(u, call, timed)),
        1 => Just(Step::DropCaches),
        1 => Just(Step::Remount),
    ]
    .boxed()
}
