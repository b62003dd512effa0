//! The attacker's hands: the backing tree by plaintext path, everything on disk to compare, and who opened what.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::net::TcpListener;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use lethefs::crypto::kdf::DekLabel;
use lethefs::crypto::{Key32, NONCE_LEN};
use lethefs::keyring::Keyring;
use lethefs::volume::dir::DirKeys;
use lethefs::volume::format;
use lethefs::volume::meta;
use rustix::fs::inotify;

use crate::support::volume::{TestVolume, mounts_below};

/// The keys of a volume under a key file, as its owner has them.
pub(crate) struct Keys {
    pub(crate) ring: Keyring,
    root: PathBuf,
}

impl Keys {
    pub(crate) fn of(volume: &TestVolume) -> Self {
        let id = body(volume)["volume_id"].as_str().unwrap().parse().unwrap();
        let ring = Keyring::new(id).unwrap();
        let kek = volume.kek();
        let key = Key32::fill_with(|bytes| {
            bytes.copy_from_slice(&kek);
            Ok::<_, ()>(())
        });
        ring.admit(0, 1, &key.unwrap(), true).unwrap();
        Self { ring, root: volume.backing() }
    }

    /// The keys of a directory, by its backing path.
    pub(crate) fn dir(&self, backing: &Path) -> DirKeys {
        DirKeys::load(meta::open_backing(backing).unwrap().as_fd(), &self.ring).unwrap()
    }

    /// Where a plaintext path lies in the backing tree.
    pub(crate) fn find(&self, plain: &str) -> PathBuf {
        plain.split('/').filter(|name| !name.is_empty()).fold(self.root.clone(), |dir, name| {
            let cipher = self.dir(&dir).name(&self.ring, name.as_bytes()).unwrap();
            dir.join(cipher.as_str())
        })
    }

    /// Encrypts whatever bytes as a name of a directory: what the program itself refuses to do.
    pub(crate) fn seal_name(&self, dir: &Path, name: &[u8]) -> Vec<u8> {
        let keys = self.dir(dir);
        let aad = [b"lethefs/1/name".as_slice(), &keys.id().0].concat();
        let seal =
            |keys: &lethefs::keyring::ObjectKeys<'_>| keys.cipher(DekLabel::Name).seal(&[0; NONCE_LEN], &aad, name);
        self.ring.with_keys(keys.dek(), seal).unwrap()
    }
}

/// The first line of the volume file.
pub(crate) fn body(volume: &TestVolume) -> serde_json::Value {
    let text = fs::read_to_string(volume.backing().join(format::VOLUME_FILE)).unwrap();
    serde_json::from_str(text.lines().next().unwrap()).unwrap()
}

/// Rewrites both copies of a volume file without a valid MAC, which an attacker has not got.
pub(crate) fn forge(volume: &TestVolume, change: impl Fn(&mut serde_json::Value)) {
    for name in [format::VOLUME_FILE, format::VOLUME_FILE_COPY] {
        let path = volume.backing().join(name);
        let text = fs::read_to_string(&path).unwrap();
        let (line, auth) = text.split_once('\n').unwrap();
        let mut body = serde_json::from_str(line).unwrap();
        change(&mut body);
        fs::write(&path, format!("{body}\n{auth}")).unwrap();
    }
}

/// Every object under the volume's directories but the runtime directory: mode, owner, time, contents.
pub(crate) fn tree(volume: &TestVolume) -> BTreeMap<PathBuf, (u32, u32, i64, i64, Vec<u8>)> {
    let mut found = BTreeMap::new();
    let mut todo = vec![volume.path("")];
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let meta = fs::symlink_metadata(&path).unwrap();
            // A refusal leaves its trace in the audit log.
            if path == volume.path("run") || path == volume.path("state/audit") {
                continue;
            }
            let contents = if meta.is_symlink() {
                fs::read_link(&path).unwrap().as_os_str().as_bytes().to_vec()
            } else if meta.is_file() {
                fs::read(&path).unwrap()
            } else {
                Vec::new()
            };
            if meta.is_dir() {
                todo.push(path.clone());
            }
            found.insert(path, (meta.mode(), meta.uid(), meta.mtime(), meta.mtime_nsec(), contents));
        }
    }
    found
}

/// Runs, and makes sure that it ends so, says so on one line, changes nothing on disk and leaves no mount.
#[track_caller]
pub(crate) fn refuses(volume: &TestVolume, args: &[&str], code: i32, part: &str) {
    refuses_unseen(volume, args, code, part, &[]);
}

/// The same, without opening any of these files.
#[track_caller]
pub(crate) fn refuses_unseen(volume: &TestVolume, args: &[&str], code: i32, part: &str, unopened: &[&Path]) {
    let before = tree(volume);
    let watch = Watch::new();
    unopened.iter().for_each(|path| watch.add(path));
    volume.cli(args).is(code).says(part);
    assert!(!watch.opened(), "{args:?} opened what it must not");
    assert!(before == tree(volume), "{args:?} changed something on disk");
    assert!(mounts_below(&volume.path("")).is_empty(), "{args:?} left a mount");
}

/// A counter of the live mount.
pub(crate) fn counter(volume: &TestVolume, name: &str) -> u64 {
    let status = volume.cli(&["status", "mnt", "--json"]);
    status.is(0);
    status.json()["live"]["counters"][name].as_u64().unwrap()
}

/// The errno of a failure.
#[track_caller]
pub(crate) fn errno<T>(result: io::Result<T>) -> i32 {
    result.err().expect("should have failed").raw_os_error().unwrap()
}

/// Sees who opens a file without opening it.
pub(crate) struct Watch(OwnedFd);

impl Watch {
    pub(crate) fn new() -> Self {
        Self(inotify::init(inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC).unwrap())
    }

    pub(crate) fn add(&self, path: &Path) {
        inotify::add_watch(&self.0, path, inotify::WatchFlags::OPEN | inotify::WatchFlags::DONT_FOLLOW).unwrap();
    }

    /// Whether any was opened since.
    pub(crate) fn opened(&self) -> bool {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut events = inotify::Reader::new(&self.0, &mut buffer);
        // Whatever else is told, such as that one was removed, is no opening.
        std::iter::from_fn(|| events.next().ok().map(|event| event.events().contains(inotify::ReadFlags::OPEN)))
            .any(|opened| opened)
    }
}

/// A server that counts who calls, and hangs up. The attacker's.
pub(crate) struct Ear {
    pub(crate) address: String,
    calls: Arc<AtomicUsize>,
}

impl Ear {
    pub(crate) fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("https://{}", listener.local_addr().unwrap());
        let calls = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&calls);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                count.fetch_add(1, Ordering::SeqCst);
                drop(stream);
            }
        });
        Self { address, calls }
    }

    pub(crate) fn calls(&self) -> usize {
        self.calls.load(Ordering::SeqCst)
    }
}

/// Whether something is what an attacker plants rather than what we make.
pub(crate) fn is_special(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|meta| {
        let kind = meta.file_type();
        kind.is_fifo() || kind.is_socket() || kind.is_char_device() || kind.is_block_device()
    })
}
