//! The frozen volumes (`tests/volumes`): real volumes of format 1 as they were when it was frozen, one fault each. Today's
//! program must show of each what was put into it, and call each fault by its name. Needs root and `/dev/fuse`.
#![allow(clippy::unwrap_used, missing_docs)]

#[path = "../support/mod.rs"]
mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use sha2::Digest as _;
use support::volume::{Output, TestVolume};

/// What `manifest.json` says of an archive.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Expected {
    /// What it is.
    #[allow(dead_code)]
    about: String,
    /// Kinds of findings, as fsck calls them.
    findings: Vec<String>,
    /// Exit code of the mount that is refused.
    refused: Option<i32>,
    /// What can be reached by name and is not listed.
    unlisted: BTreeSet<String>,
    /// Everything else, by path.
    shows: BTreeMap<String, Shown>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Shown {
    r#type: String,
    error: Option<String>,
    size: Option<u64>,
    sha256: Option<String>,
    target: Option<String>,
    mode: Option<u32>,
    uid: Option<u32>,
    gid: Option<u32>,
    rdev: Option<u64>,
    /// Value by name; none: EIO.
    #[serde(default)]
    xattrs: BTreeMap<String, Option<String>>,
}

const NOTES: [&str; 6] = ["unclean", "duplicate", "leftover", "sidecar-orphan", "link-tail-orphan", "foreign"];
const EIO: Option<i32> = Some(5);

fn volumes() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/volumes")
}

fn manifest() -> BTreeMap<String, Expected> {
    serde_json::from_slice(&fs::read(volumes().join("manifest.json")).unwrap()).unwrap()
}

/// A fresh copy, in a directory of its own.
fn unpack(name: &str) -> TestVolume {
    let v = TestVolume::new();
    let archive = volumes().join(format!("{name}.tar.gz"));
    let mut tar = v.command("tar");
    tar.args(["--extract", "--gzip", "--sparse", "--same-owner", "--same-permissions", "--numeric-owner"]);
    tar.args(["--xattrs", "--xattrs-include=user.*", "--file"]).arg(archive);
    let done = Output::of(&mut tar);
    assert_eq!(done.code, Some(0), "{}", done.err);
    fs::rename(v.path("key"), v.path("keys/key")).unwrap();
    fs::set_permissions(v.path("keys/key"), fs::Permissions::from_mode(0o600)).unwrap();
    v
}

fn sha256(bytes: &[u8]) -> String {
    sha2::Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Every listed path of a mount; a directory that cannot be listed is one without entries.
fn listed(root: &Path) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut todo = vec![root.to_owned()];
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            found.insert(entry.path().strip_prefix(root).unwrap().to_str().unwrap().to_owned());
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                todo.push(entry.path());
            }
        }
    }
    found
}

/// What is wrong with one path, if anything is.
fn compare(path: &Path, shown: &Shown) -> Result<(), String> {
    let failed = shown.error.is_some();
    let meta = match fs::symlink_metadata(path) {
        Err(error) if failed && shown.r#type == "none" && error.raw_os_error() == EIO => return Ok(()),
        other => other.map_err(|error| error.to_string())?,
    };
    let is = |what: &str, found: u64, expected: Option<u64>| match expected {
        Some(expected) if found != expected => Err(format!("{what} is {found}, not {expected}")),
        _ => Ok(()),
    };
    let kind = meta.file_type();
    let kinds = [
        ("file", kind.is_file()),
        ("directory", kind.is_dir()),
        ("link", kind.is_symlink()),
        ("fifo", kind.is_fifo()),
        ("socket", kind.is_socket()),
        ("char", kind.is_char_device()),
    ];
    if !kinds.contains(&(shown.r#type.as_str(), true)) {
        return Err(format!("is {kind:?}"));
    }
    is("mode", (meta.mode() & 0o7777).into(), shown.mode.map(u64::from))?;
    is("owner", meta.uid().into(), shown.uid.map(u64::from))?;
    is("group", meta.gid().into(), shown.gid.map(u64::from))?;
    is("device", meta.rdev(), shown.rdev)?;
    let read = match shown.r#type.as_str() {
        "file" => fs::read(path),
        "link" => fs::read_link(path).map(|target| target.into_os_string().into_encoded_bytes()),
        "directory" => fs::read_dir(path).and_then(|mut entries| entries.next().transpose()).map(|_| Vec::new()),
        _ => Ok(Vec::new()),
    };
    match read {
        Err(error) if failed && error.raw_os_error() == EIO => return Ok(()),
        Err(error) => return Err(error.to_string()),
        Ok(bytes) if failed => return Err(format!("{} bytes were read, not an error", bytes.len())),
        Ok(bytes) => {
            is("size", meta.len(), shown.size)?;
            is("number of bytes", bytes.len() as u64, shown.size)?;
            if shown.sha256.as_ref().is_some_and(|expected| *expected != sha256(&bytes)) {
                return Err("has other contents".into());
            }
            if shown.target.as_ref().is_some_and(|target| target.as_bytes() != bytes) {
                return Err("has another target".into());
            }
        }
    }
    for (name, expected) in &shown.xattrs {
        let mut value = vec![0; 1000];
        let found = rustix::fs::getxattr(path, name.as_str(), value.as_mut_slice());
        let right = match (found, expected) {
            (Ok(len), Some(expected)) => value[..len] == *expected.as_bytes(),
            (Err(errno), None) => Some(errno.raw_os_error()) == EIO,
            _ => false,
        };
        if !right {
            return Err(format!("attribute {name}: {found:?}"));
        }
    }
    Ok(())
}

/// What is wrong with a mount of an archive.
fn look_over(v: &TestVolume, expected: &Expected) -> Vec<String> {
    let mut wrong = Vec::new();
    let wanted: BTreeSet<String> =
        expected.shows.keys().filter(|path| !expected.unlisted.contains(*path)).cloned().collect();
    let found = listed(&v.mnt());
    if found != wanted {
        let [missing, more] = [wanted.difference(&found), found.difference(&wanted)].map(|d| d.collect::<Vec<_>>());
        wrong.push(format!("not listed: {missing:?}, listed: {more:?}"));
    }
    for (path, shown) in &expected.shows {
        wrong.extend(compare(&v.at(path), shown).err().map(|what| format!("{path} {what}")));
    }
    wrong
}

/// What fsck says of a fresh copy.
fn diagnose(v: &TestVolume, expected: &Expected) -> Vec<String> {
    let run = v.cli(&["fsck", "backing", "--json", "--trust", "--kms", &v.file_uri()]);
    let damage = expected.findings.iter().any(|kind| !NOTES.contains(&kind.as_str()));
    if expected.refused.is_some() && expected.findings.is_empty() {
        // Without a volume file there is nothing to check by.
        return if run.code == expected.refused {
            Vec::new()
        } else {
            vec![format!("fsck: {:?} {}", run.code, run.err)]
        };
    }
    if run.code != Some(if damage { 21 } else { 0 }) {
        return vec![format!("fsck: {:?} {}{}", run.code, run.err, run.out)];
    }
    let found = run.json()["findings"].as_array().unwrap().clone();
    let found: BTreeSet<&str> = found.iter().map(|finding| finding["fault"].as_str().unwrap()).collect();
    let wanted: BTreeSet<&str> = expected.findings.iter().map(String::as_str).collect();
    if found == wanted { Vec::new() } else { vec![format!("fsck finds {found:?}, not {wanted:?}")] }
}

/// What is wrong with an archive today.
fn check(name: &str, expected: &Expected) -> Vec<String> {
    check_volume(&unpack(name), expected)
}

fn check_volume(v: &TestVolume, expected: &Expected) -> Vec<String> {
    let mut wrong = diagnose(v, expected);
    let uri = v.file_uri();
    let run = v.try_mount(&["--trust", "--kms", &uri]);
    if let Some(code) = expected.refused {
        if run.code != Some(code) {
            wrong.push(format!("mount: {:?} {}", run.code, run.err));
        }
        return wrong;
    }
    if run.code != Some(0) {
        wrong.push(format!("mount: {:?} {}", run.code, run.err));
        return wrong;
    }
    wrong.extend(look_over(v, expected));
    // Once more as it is after a mount: replayed, sealed, healed.
    v.cli(&["umount", "mnt"]).is(0);
    // What is damaged above its floor cannot be sealed, and the end of the mount says so.
    let ended = v.daemon_exit();
    if !matches!(ended, Some(0 | 15)) || (ended == Some(15) && expected.findings.is_empty()) {
        wrong.push(format!("ended with {ended:?}, {}", v.log()));
    }
    v.mount(&[]);
    wrong.extend(look_over(v, expected).into_iter().map(|what| format!("mounted again: {what}")));
    wrong
}

/// Every fourth of them: four tests, so that they run side by side.
fn quarter(n: usize) {
    let manifest = manifest();
    let mut wrong = Vec::new();
    for (name, expected) in manifest.iter().skip(n).step_by(4) {
        wrong.extend(check(name, expected).into_iter().map(|what| format!("{name}: {what}")));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_frozen_volume_is_what_it_was_1() {
    quarter(0);
}

#[test]
fn every_frozen_volume_is_what_it_was_2() {
    quarter(1);
}

#[test]
fn every_frozen_volume_is_what_it_was_3() {
    quarter(2);
}

#[test]
fn every_frozen_volume_is_what_it_was_4() {
    quarter(3);
}

/// tar holds no sockets (GNU tar 1.34: "socket ignored"), so there is no archive with a planted one: it is made here, in the
/// place of the planted FIFO of another, and everything else must be the same.
#[test]
fn a_planted_socket_is_what_a_planted_fifo_is() {
    let v = unpack("planted-fifo");
    let mut replaced = 0;
    for entry in fs::read_dir(v.backing()).unwrap().map(Result::unwrap) {
        if entry.file_type().unwrap().is_fifo() {
            fs::remove_file(entry.path()).unwrap();
            let (socket, mode) = (rustix::fs::FileType::Socket, rustix::fs::Mode::from_raw_mode(0o666));
            rustix::fs::mknodat(rustix::fs::CWD, entry.path(), socket, mode, 0).unwrap();
            replaced += 1;
        }
    }
    assert_eq!(replaced, 1);
    let wrong = check_volume(&v, &manifest()["planted-fifo"]);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The archives themselves: a volume that was made anew is not the one that was frozen.
#[test]
fn nobody_has_made_them_anew() {
    let frozen = fs::read_to_string(volumes().join("SHA256SUMS")).unwrap();
    let mut sums = BTreeMap::new();
    for line in frozen.lines() {
        let (sum, name) = line.split_once("  ").unwrap();
        sums.insert(name.strip_suffix(".tar.gz").unwrap(), sum);
    }
    assert!(sums.keys().eq(manifest().keys()), "manifest.json");
    let mut total = 0;
    for entry in fs::read_dir(volumes()).unwrap().map(Result::unwrap) {
        let name = entry.file_name().into_string().unwrap();
        if let Some(name) = name.strip_suffix(".tar.gz") {
            let bytes = fs::read(entry.path()).unwrap();
            total += bytes.len();
            assert_eq!(sums.remove(name), Some(sha256(&bytes).as_str()), "{name}");
        }
    }
    assert!(sums.is_empty(), "not there any more: {sums:?}");
    assert!(total < 3_000_000, "{total} bytes");
}

/// The independent reader on those that nothing is wrong with.
#[test]
fn the_independent_reader_reads_the_sound_ones() {
    let python = std::env::var_os("LETHEFS_TEST_PYTHON").expect("run scripts/test, which makes it");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reader/reader.py");
    let manifest = manifest();
    let mut sound = manifest.iter().filter(|(_, expected)| expected.findings.is_empty() && expected.refused.is_none());
    assert!(sound.clone().count() >= 8);
    sound
        .try_for_each(|(name, expected)| {
            let v = unpack(name);
            let kek = v.path("kek.hex");
            fs::write(&kek, v.kek().iter().map(|byte| format!("{byte:02x}")).collect::<String>()).unwrap();
            let read = |command: &str| {
                Output::of(
                    v.command(&python).arg(&script).arg(v.backing()).arg("--kek-hex-file").arg(&kek).arg(command),
                )
            };
            let run = read("list");
            assert_eq!(run.code, Some(0), "{name}: {}", run.err);
            let mut found = BTreeMap::new();
            for line in run.out.lines() {
                use base64::Engine as _;
                let object: serde_json::Value = serde_json::from_str(line).unwrap();
                let path =
                    base64::engine::general_purpose::STANDARD.decode(object["path_b64"].as_str().unwrap()).unwrap();
                found.insert(String::from_utf8(path).unwrap(), object["sha256"].as_str().map(str::to_owned));
            }
            for (path, shown) in &expected.shows {
                let sum = found.get(path).ok_or_else(|| format!("{name}: {path} is not listed"))?;
                assert_eq!(*sum, shown.sha256, "{name}: {path}");
            }
            assert_eq!(found.len(), expected.shows.len() + 1, "{name}: the root, and nothing more");
            Ok::<_, String>(())
        })
        .unwrap();
}
