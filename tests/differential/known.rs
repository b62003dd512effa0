//! The differences that are known, each with the words of docs/SEMANTICS.md that give its reason. No other is tolerated.

use std::path::Path;

use rustix::fs::{FallocateFlags, OFlags, RenameFlags, SeekFrom};

use crate::calls::{Call, On, Seen};

/// What is tolerated.
pub(crate) struct Difference {
    /// These words are in docs/SEMANTICS.md.
    pub(crate) words: &'static str,
    /// Only without `-o acl`.
    pub(crate) without_acl: bool,
    /// Whether this answer of the mount's is that. The other side, which would do more, is then not asked.
    pub(crate) refuses: fn(&Call, &Seen) -> bool,
    /// Whether these two answers, the other side's and the mount's, may stand beside each other.
    pub(crate) differs: fn(&Call, &Seen, &Seen) -> bool,
    /// Whether the time of change of this object may move here that does not move there.
    pub(crate) moves: fn(&Call, &Path) -> bool,
}

fn never(_: &Call, _: &Seen) -> bool {
    false
}

fn still(_: &Call, _: &Path) -> bool {
    false
}

fn no(_: &Call, _: &Seen, _: &Seen) -> bool {
    false
}

pub(crate) const DIFFERENCES: &[Difference] = &[
    Difference {
        words: "POSIX ACLs | with `-o acl`",
        without_acl: true,
        refuses: |call, seen| match call {
            Call::SetXattr(_, name, ..) | Call::GetXattr(_, name) | Call::RemoveXattr(_, name) => {
                name.0.starts_with(b"system.posix_acl_") && *seen == Err(libc::EOPNOTSUPP)
            }
            _ => false,
        },
        differs: no,
        moves: still,
    },
    Difference {
        words: "at most 165 bytes with their namespace",
        without_acl: false,
        refuses: |call, seen| match call {
            Call::SetXattr(_, name, ..) => name.0.len() > 165 && *seen == Err(libc::ERANGE),
            _ => false,
        },
        differs: no,
        moves: still,
    },
    Difference {
        words: "attributes of symlinks | EOPNOTSUPP",
        without_acl: false,
        refuses: |call, seen| match call {
            Call::SetXattr(On::Path(_, false), ..) | Call::RemoveXattr(On::Path(_, false), ..) => {
                *seen == Err(libc::EOPNOTSUPP)
            }
            _ => false,
        },
        differs: no,
        moves: still,
    },
    Difference {
        words: "O_TMPFILE, birth time | EOPNOTSUPP",
        without_acl: false,
        refuses: |call, seen| match call {
            Call::Open(_, _, flags, _) => flags.contains(OFlags::TMPFILE) && *seen == Err(libc::EOPNOTSUPP),
            _ => false,
        },
        differs: no,
        moves: still,
    },
    Difference {
        words: "mode 0, KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE with and without KEEP_SIZE; else",
        without_acl: false,
        refuses: |call, seen| match call {
            Call::Allocate(_, mode, ..) => {
                mode.intersects(FallocateFlags::COLLAPSE_RANGE | FallocateFlags::INSERT_RANGE)
                    && *seen == Err(libc::EOPNOTSUPP)
            }
            _ => false,
        },
        differs: no,
        moves: still,
    },
    Difference {
        words: "RENAME_WHITEOUT | EINVAL",
        without_acl: false,
        refuses: |call, seen| match call {
            Call::Rename(_, _, flags) => flags.contains(RenameFlags::WHITEOUT) && *seen == Err(libc::EINVAL),
            _ => false,
        },
        differs: no,
        moves: still,
    },
    Difference {
        words: "largest file | 0.7 % less",
        without_acl: false,
        refuses: |call, seen| match call {
            Call::Ftruncate(_, size) | Call::Truncate(_, size) => {
                (1 << 44) / 4124 * 4096 - 4096 < *size && *seen == Err(libc::EFBIG)
            }
            _ => false,
        },
        differs: no,
        moves: still,
    },
    Difference {
        words: "SEEK_HOLE/SEEK_DATA | all of a file is data",
        without_acl: false,
        refuses: never,
        differs: |call, expected, seen| {
            matches!(call, Call::Seek(_, SeekFrom::Hole(_) | SeekFrom::Data(_))) && expected.is_ok() | seen.is_ok()
        },
        moves: still,
    },
    Difference {
        words: "names of trusted attributes | listed for everybody",
        without_acl: false,
        refuses: never,
        differs: |call, _, _| matches!(call, Call::ListXattr(..)),
        moves: still,
    },
    Difference {
        words: "also moves when a header is sealed",
        without_acl: false,
        refuses: never,
        differs: no,
        // Some seconds after a write; and then somebody makes the kernel drop what it has cached.
        moves: |_, object| object.symlink_metadata().is_ok_and(|meta| meta.is_file()),
    },
    Difference {
        words: "by removing an ACL that is not there",
        without_acl: false,
        refuses: never,
        differs: no,
        moves: |call, _| matches!(call, Call::RemoveXattr(_, name) if name.0.starts_with(b"system.posix_acl_")),
    },
];

/// Which difference this is, of those the mount refuses by itself.
pub(crate) fn refused(acl: bool, call: &Call, seen: &Seen) -> Option<usize> {
    DIFFERENCES.iter().position(|known| !(acl && known.without_acl) && (known.refuses)(call, seen))
}

/// Which difference this is.
pub(crate) fn differs(call: &Call, expected: &Seen, seen: &Seen) -> Option<usize> {
    DIFFERENCES.iter().position(|known| (known.differs)(call, expected, seen))
}

/// Which difference this is, where a time of change moves that ought not to.
pub(crate) fn moves(call: &Call, object: &Path) -> Option<usize> {
    DIFFERENCES.iter().position(|known| (known.moves)(call, object))
}
