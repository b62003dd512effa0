//! A volume with one of everything, and the ways from a plaintext path to its place in the backing directory.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use crate::support::volume::{Output, TestVolume};

pub(crate) struct World {
    pub(crate) v: TestVolume,
    inos: BTreeMap<String, u64>,
}

pub(crate) fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|n| (n.wrapping_mul(31) as u8 ^ (n >> 8) as u8).wrapping_add(seed) | 1).collect()
}

pub(crate) fn long(tail: &str) -> String {
    format!("{}{tail}", "n".repeat(210))
}

impl World {
    /// Everything is sealed, and nothing is mounted; the backing directory is kept as `base`.
    pub(crate) fn new() -> Self {
        let v = TestVolume::init();
        v.mount(&[]);
        let at = |name: &str| v.at(name);
        fs::write(at("small"), pattern(100, 1)).unwrap();
        fs::write(at("big"), pattern(50_000, 2)).unwrap();
        fs::write(at("full"), pattern(8192, 3)).unwrap();
        fs::write(at("empty"), "").unwrap();
        fs::create_dir(at("dir")).unwrap();
        fs::create_dir(at("dir/sub")).unwrap();
        fs::write(at("dir/one"), pattern(5000, 4)).unwrap();
        fs::write(at("dir/sub/two"), pattern(300, 5)).unwrap();
        fs::write(at(&format!("dir/{}", long("f"))), pattern(4097, 6)).unwrap();
        fs::create_dir(at(&long("d"))).unwrap();
        fs::write(at(&format!("{}/in", long("d"))), pattern(10, 7)).unwrap();
        fs::write(at(&long("x")), pattern(20, 8)).unwrap();
        std::os::unix::fs::symlink("target", at("link")).unwrap();
        std::os::unix::fs::symlink("dir/".repeat(700), at("far")).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            at("pipe"),
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        fs::hard_link(at("big"), at("again")).unwrap();
        for (name, value) in [("big", "value of big"), ("dir", "value of dir")] {
            rustix::fs::setxattr(at(name), "user.note", value.as_bytes(), rustix::fs::XattrFlags::empty()).unwrap();
        }
        let mut inos = BTreeMap::new();
        walk(&v.mnt(), &mut |path, meta| {
            inos.insert(path.strip_prefix(v.mnt()).unwrap().to_str().unwrap().to_owned(), meta.ino());
        });
        v.umount();
        fs::rename(v.backing(), v.path("base")).unwrap();
        let world = Self { v, inos };
        world.reset();
        world
    }

    /// The backing directory as it was, at the same inode numbers' places.
    pub(crate) fn reset(&self) {
        let _ = fs::remove_dir_all(self.v.backing());
        let (base, backing) = (self.v.path("base"), self.v.backing());
        let done = self.v.command("cp").args(["-a", "--"]).args([&base, &backing]).status().unwrap();
        assert!(done.success());
    }

    /// Where a plaintext path is in the backing directory.
    pub(crate) fn find(&self, plain: &str) -> PathBuf {
        if plain.is_empty() {
            return self.v.backing();
        }
        let wanted = self.inos[plain];
        // A file with two names has two places.
        let parent = Path::new(plain).parent().map_or(self.v.path("base"), |parent| {
            self.v.path("base").join(self.find(parent.to_str().unwrap()).strip_prefix(self.v.backing()).unwrap())
        });
        let mut found = None;
        for entry in fs::read_dir(parent).unwrap() {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            let own = name.starts_with("lethefs.") && !name.starts_with("lethefs.long.");
            if !own && fs::symlink_metadata(entry.path()).unwrap().ino() == wanted {
                found = Some(entry.path());
            }
        }
        self.v.backing().join(found.unwrap().strip_prefix(self.v.path("base")).unwrap())
    }

    pub(crate) fn fsck(&self, args: &[&str]) -> Output {
        self.v.cli(&[&["fsck", "backing", "--json"], args].concat())
    }

    /// Contents of every file in the mount, by path; symlinks by their targets.
    pub(crate) fn contents(&self) -> BTreeMap<String, Vec<u8>> {
        let mut found = BTreeMap::new();
        walk(&self.v.mnt(), &mut |path, meta| {
            let name = path.strip_prefix(self.v.mnt()).unwrap().to_str().unwrap().to_owned();
            if meta.is_file() {
                if let Ok(bytes) = fs::read(path) {
                    found.insert(name, bytes);
                }
            } else if meta.is_symlink()
                && let Ok(target) = fs::read_link(path)
            {
                found.insert(name, target.into_os_string().into_encoded_bytes());
            }
        });
        found
    }
}

fn walk(dir: &Path, each: &mut impl FnMut(&Path, &fs::Metadata)) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let Ok(meta) = fs::symlink_metadata(&path) else { continue };
        each(&path, &meta);
        if meta.is_dir() {
            walk(&path, each);
        }
    }
}

/// The words for what was found (or is left), each once.
pub(crate) fn kinds(report: &serde_json::Value, list: &str) -> Vec<String> {
    let mut kinds: Vec<String> =
        report[list].as_array().unwrap().iter().map(|line| line["fault"].as_str().unwrap().to_owned()).collect();
    kinds.sort();
    kinds.dedup();
    kinds
}

/// How often each content occurs.
pub(crate) fn census(contents: &BTreeMap<String, Vec<u8>>) -> HashMap<Vec<u8>, usize> {
    let mut census = HashMap::new();
    for bytes in contents.values() {
        *census.entry(bytes.clone()).or_default() += 1;
    }
    census
}
