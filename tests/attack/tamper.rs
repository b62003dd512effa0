//! Writing to the backing store behind the owner's back: whatever is read is what was written, or EIO. One room for each kind
//! of attack; the volume file's is `trust`, the intent log's are here (`unsealed`) and in `src/volume/log/tests.rs`.

mod attributes;
mod directories;
mod eras;
mod events;
mod links;
mod live;
mod names;
mod nodes;
mod planted;
mod sealed;
mod unsealed;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use lethefs::volume::format::{self, DIR_HEADER, LONG_NAME_PREFIX, LONG_PREFIX, OVERFLOW_DIR};
use rustix::fs::{Advice, CWD, FileType, Mode, XattrFlags};
use sha2::{Digest as _, Sha256};

use crate::store::{Keys, Watch, counter, errno, is_special, refuses};
use crate::support::volume::TestVolume;

const EIO: i32 = 5;
const HEADER: usize = format::HEADER as usize;
const SEALED: usize = format::SEALED_BLOCK as usize;
/// A few sizes, for what is not about blocks.
const SIZES: [usize; 8] = [0, 1, 100, 4095, 4096, 4097, 8192, 12288 + 5];
/// In every name and every file: what must never be in a log.
const NAME: &str = "zz-plain-name";
const CONTENT: &[u8] = b"zz-plain-content";

/// Bytes that differ from block to block, and hold no block of zeros.
fn content(size: usize, salt: &str) -> Vec<u8> {
    let salt = Sha256::digest(salt);
    let stream = (0_u64..).flat_map(|n| Sha256::digest([&salt[..], &n.to_le_bytes()].concat()).to_vec());
    CONTENT.iter().copied().chain(stream).take(size).collect()
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Expect {
    /// What was altered does not matter, or is kept twice.
    Same,
    /// Noticed.
    Eio,
}
use Expect::{Eio, Same};

/// Reads in every manner: never other bytes than `content`, and EIO where it must be.
#[track_caller]
fn check(path: &Path, content: &[u8], expect: Expect, what: &str) {
    let shown = fs::symlink_metadata(path).unwrap_or_else(|error| panic!("{what}: {error}"));
    assert!(shown.is_file(), "{what}");
    let mut failed = false;
    // In order, as most programs read.
    let mut file = File::open(path).unwrap_or_else(|error| panic!("{what}: {error}"));
    let mut got = Vec::new();
    let mut buffer = vec![0; if content.len() > 20_000 { 50_000 } else { 1000 }];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => got.extend(&buffer[..n]),
            Err(error) => {
                assert_eq!(error.raw_os_error(), Some(EIO), "{what}");
                failed = true;
                break;
            }
        }
    }
    assert!(content.starts_with(&got), "{what}: wrong bytes");
    assert!(failed || got.len() == content.len(), "{what}: ends after {} without an error", got.len());
    // Anywhere, down to the end that stat tells.
    for at in (0..shown.len().min(20_000)).step_by(4096) {
        let mut block = [0; 4096];
        match file.read_at(&mut block, at) {
            Ok(n) => {
                let right = content.get(at as usize..).unwrap_or_default();
                assert!(n > 0 && right.starts_with(&block[..n]), "{what}: wrong bytes at {at}");
            }
            Err(error) => assert_eq!(error.raw_os_error(), Some(EIO), "{what}"),
        }
    }
    let found = if failed { Eio } else { Same };
    assert_eq!(found, expect, "{what}");
}

/// The damaged file can be had back: cut to nothing and written again, or deleted.
fn renew(path: &Path, fresh: &[u8], delete: bool, what: &str) {
    if delete {
        fs::remove_file(path).unwrap_or_else(|error| panic!("{what}: cannot be deleted: {error}"));
    }
    fs::write(path, fresh).unwrap_or_else(|error| panic!("{what}: cannot be written anew: {error}"));
    assert_eq!(fs::read(path).unwrap(), fresh, "{what}");
}

fn assert_discreet(volume: &TestVolume) {
    let log = volume.log();
    assert!(!log.contains(NAME) && !log.contains(std::str::from_utf8(CONTENT).unwrap()), "{log}");
    assert!(!log.contains("panicked"), "{log}");
}

fn listed(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
