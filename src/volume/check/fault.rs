//! What can be found, and what to say about it: one table (docs/CLI.md has it for people).

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::Place;
use crate::crypto::ObjectId;

/// A kind of finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)]
pub enum Fault {
    VolumeFile,
    RootHeader,
    DirectoryHeader,
    Header,
    HeaderCopy,
    MutableHeader,
    ObjectType,
    Truncated,
    Extended,
    Block,
    Name,
    Sidecar,
    Planted,
    Link,
    LinkTail,
    Attribute,
    Log,
    OtherFilesystem,
    Unreadable,
    Unclean,
    Duplicate,
    Leftover,
    Displaced,
    SidecarOrphan,
    LinkTailOrphan,
    Foreign,
}

impl Fault {
    /// Each kind.
    pub const ALL: [Self; 26] = [
        Self::VolumeFile,
        Self::RootHeader,
        Self::DirectoryHeader,
        Self::Header,
        Self::HeaderCopy,
        Self::MutableHeader,
        Self::ObjectType,
        Self::Truncated,
        Self::Extended,
        Self::Block,
        Self::Name,
        Self::Sidecar,
        Self::Planted,
        Self::Link,
        Self::LinkTail,
        Self::Attribute,
        Self::Log,
        Self::OtherFilesystem,
        Self::Unreadable,
        Self::Unclean,
        Self::Duplicate,
        Self::Leftover,
        Self::Displaced,
        Self::SidecarOrphan,
        Self::LinkTailOrphan,
        Self::Foreign,
    ];

    /// Whether it costs nothing: a volume with notes alone is clean.
    pub fn is_note(self) -> bool {
        matches!(
            self,
            Self::Unclean
                | Self::Duplicate
                | Self::Leftover
                | Self::SidecarOrphan
                | Self::LinkTailOrphan
                | Self::Foreign
        )
    }

    /// What it is, what it costs, what repair does.
    pub fn texts(self) -> [&'static str; 3] {
        const NONE: &str = "nothing: restore it from a backup";
        const AWAY: &str = "moves it into lethefs.quarantine";
        const ANEW: &str = "gives it a new name, recovered-…, in the same directory";
        const SALVAGE: &str = "copies what authenticates to recovered-… beside it, zeros for the rest; moves the original into \
                               lethefs.quarantine";
        match self {
            Self::VolumeFile => [
                "one copy of the volume file is missing, damaged or older",
                "nothing yet; the volume if the other copy goes, too",
                "writes both copies anew",
            ],
            Self::RootHeader => [
                "the root directory's header (lethefs.dir) is missing, damaged or another's",
                "no mount; the names in the root, for ever; not the contents",
                "makes a new header; what is in the root gets new names, recovered-…",
            ],
            Self::DirectoryHeader => [
                "a directory's header (lethefs.dir) is missing, damaged or another's",
                "the names in it and its extended attributes, for ever; not the contents",
                "makes a new header; what is in the directory gets new names, recovered-…",
            ],
            Self::Header => [
                "no copy of the file's static header opens",
                "the whole file: without its key nobody can read it",
                AWAY,
            ],
            Self::HeaderCopy => [
                "one copy of a header is damaged",
                "nothing yet; the file if the other copy goes, too",
                "writes it anew from the other copy",
            ],
            Self::MutableHeader => [
                "no copy of the file's mutable header opens",
                "the file cannot be read through a mount, and nothing vouches for its length",
                SALVAGE,
            ],
            Self::ObjectType => {
                ["a genuine header, of another type of object", "the object: it is not what it was", AWAY]
            }
            Self::Truncated => ["the file is cut off", "its end is lost, and a mount refuses all of it", SALVAGE],
            Self::Extended => [
                "the file is longer than it was sealed",
                "a mount refuses all of it; the blocks that were sealed may be whole",
                "copies what was sealed to recovered-… beside it; moves the original into lethefs.quarantine",
            ],
            Self::Block => [
                "blocks do not authenticate: damaged, moved or forged",
                "reading them gives EIO; the rest of the file can be read",
                NONE,
            ],
            Self::Name => [
                "a name does not decrypt in its directory: damaged, forged, or moved there",
                "the name; a mount does not show the object, whose contents are whole",
                ANEW,
            ],
            Self::Sidecar => [
                "the sidecar with a long name is missing, damaged or another's",
                "the name; a mount does not list the object, whose contents are whole",
                ANEW,
            ],
            Self::Planted => {
                ["an object of a type that lethefs never makes", "nothing: a mount does not believe it", AWAY]
            }
            Self::Link => ["a symlink's target does not open", "the symlink", AWAY],
            Self::LinkTail => ["a part of a long symlink's target is missing or damaged", "the symlink", AWAY],
            Self::Attribute => [
                "an extended attribute does not open",
                "the attribute",
                "writes it down in lethefs.quarantine and removes it",
            ],
            Self::Log => [
                "the intent log is damaged",
                "perhaps the last changes of some files before the last unclean end",
                "copies it into lethefs.quarantine, then replays what is intact",
            ],
            Self::OtherFilesystem => [
                "another filesystem is mounted in the backing directory",
                "what is below is not looked at",
                "nothing: unmount it",
            ],
            Self::Unreadable => {
                ["the backing filesystem gave an error", "what could not be read was not checked", "nothing"]
            }
            Self::Unclean => [
                "the last mount did not end cleanly",
                "nothing: its intent log is intact, and the next mount replays it",
                "replays it now",
            ],
            Self::Duplicate => [
                "a copy of another object of this volume",
                "nothing; which of the two is the newer nobody can tell",
                "nothing: remove the one that is not wanted",
            ],
            Self::Leftover => ["left by an interrupted operation, and of no use", "space", "removes it"],
            Self::Displaced => [
                "a directory under a temporary name that is not empty",
                "what is in it is not shown by a mount",
                "gives it a new name, recovered-…, in the same directory",
            ],
            Self::SidecarOrphan => ["a sidecar of a long name without its entry", "space", "removes it"],
            Self::LinkTailOrphan => ["a part of a long symlink's target that no symlink needs", "space", AWAY],
            Self::Foreign => {
                ["not one of ours", "nothing: a mount does not show it", "nothing: move it out of the way"]
            }
        }
    }
}

/// One finding.
#[derive(Clone, Debug)]
pub struct Finding {
    /// Its kind.
    pub fault: Fault,
    /// Where it is.
    pub place: Arc<Place>,
    /// The object, if its header opened.
    pub object: Option<ObjectId>,
    /// Backing inode number.
    pub ino: u64,
    /// Damaged blocks, first and last of each run.
    pub blocks: Vec<(u64, u64)>,
    /// What there is to say beside the kind's own text.
    pub detail: Option<String>,
}
