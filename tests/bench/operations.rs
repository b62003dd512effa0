//! What is measured, by time (`micro.rs`) and by instructions (`counted.rs`).

use std::path::Path;

use lethefs::crypto::aead::Cipher;
use lethefs::crypto::{Key32, NONCE_LEN, ObjectId, TAG_LEN, VolumeId};
use lethefs::fs::core::{Caller, Filesystem};
use lethefs::fs::inode::ROOT;
use lethefs::keyring::Keyring;
use lethefs::volume::content::{self, BlockAad};
use lethefs::volume::header::{Mutable, ObjectType, Static};
use lethefs::volume::meta::{Body, Extra, KekRecord, KeyState, Scope};
use lethefs::volume::{Volume, names};

const VOLUME: VolumeId = VolumeId([1; 16]);
const ROOT_DIR: ObjectId = ObjectId([2; 16]);
const BLOCK: usize = 4096;
const WHO: Caller = Caller { uid: 0, gid: 0 };

/// One thing that can be done any number of times.
pub(crate) type Operation = (&'static str, Box<dyn FnMut()>);

fn ring() -> Keyring {
    let keys = Keyring::new(VOLUME).expect("locked memory");
    keys.admit(0, 1, &Key32::random().expect("random numbers"), true).expect("an open ring");
    keys
}

/// A new volume in an empty directory, with its log.
fn filesystem(dir: &Path) -> Filesystem {
    let kek = KekRecord {
        version: 1,
        state: KeyState::Active,
        created: String::new(),
        commitment: String::new(),
        slots: Vec::new(),
        extra: Extra::new(),
    };
    let body = Body {
        magic: "lethefs".into(),
        format: 1,
        volume_id: VOLUME,
        label: String::new(),
        created: String::new(),
        generation: 1,
        incompat: Vec::new(),
        compat: Vec::new(),
        root_id: ROOT_DIR,
        scopes: vec![Scope { id: 0, current: 1, keks: vec![kek], extra: Extra::new() }],
        extra: Extra::new(),
    };
    let backing = std::fs::File::open(dir).expect("a directory");
    let keys = ring();
    Volume::create_root(&backing, &keys, ROOT_DIR).expect("a root");
    let mut volume = Volume::open(backing.into(), dir, &body, keys, false).expect("a volume");
    volume.begin_log().expect("a log");
    Filesystem::new(volume, 1024, false)
}

/// All of them. What the filesystem's ones work on lies in `dir`, which is empty.
pub(crate) fn operations(dir: &Path) -> Vec<Operation> {
    let mut all: Vec<Operation> = Vec::new();
    blocks(&mut all);
    names_and_headers(&mut all);
    requests(&mut all, dir);
    all
}

fn blocks(all: &mut Vec<Operation>) {
    let plain = vec![0x5a; BLOCK];
    let mut sealed = vec![0; NONCE_LEN + BLOCK + TAG_LEN];
    let nonce = [3; NONCE_LEN];
    let seal = move |sealed: &mut [u8], index| {
        let cipher = Cipher::new(&[7; 32]);
        let mut aad = BlockAad::new(&VOLUME, &ROOT_DIR);
        content::seal_block(&cipher, &mut aad, index, &nonce, &plain, sealed);
    };
    let mut stored = sealed.clone();
    seal(&mut stored, 9);
    all.push(("block seal, 4 KiB", Box::new(move || seal(&mut sealed, 9))));
    let mut opened = vec![0; BLOCK];
    let cipher = Cipher::new(&[7; 32]);
    all.push((
        "block open, 4 KiB",
        Box::new(move || {
            let mut aad = BlockAad::new(&VOLUME, &ROOT_DIR);
            content::open_block(&cipher, &mut aad, 9, &stored, &mut opened).expect("authentic");
        }),
    ));
}

fn names_and_headers(all: &mut Vec<Operation>) {
    let keys = ring();
    let header = Static::make(&keys, ROOT_DIR, ObjectType::Regular, 0).expect("a header");
    let (bytes, name) = (header.bytes(), b"Cargo-lock-of-average-length.toml");
    let encrypted = names::encrypt(&keys, &header.dek, name).expect("a name");
    let mutable = Mutable { counter: 1, size: 4096, floor: 4096, sealed: true, holes: false, opened: 0 };
    let both = mutable.seal(&keys, &header.dek, &VOLUME).expect("an open ring");
    let keys = std::rc::Rc::new((keys, header));
    let with = |f: Box<dyn Fn(&Keyring, &Static)>| {
        let keys = keys.clone();
        Box::new(move || f(&keys.0, &keys.1))
    };
    all.push((
        "name encrypt",
        with(Box::new(|keys, header| drop(names::encrypt(keys, &header.dek, name).expect("a name")))),
    ));
    all.push((
        "name decrypt",
        with(Box::new(move |keys, header| {
            names::decrypt(keys, &header.dek, encrypted.as_str().as_bytes(), |_| None).expect("a name");
        })),
    ));
    all.push((
        "header wrap",
        with(Box::new(|keys, _| {
            Static::make(keys, ROOT_DIR, ObjectType::Regular, 0).expect("a header");
        })),
    ));
    all.push((
        "header unwrap",
        with(Box::new(move |keys, _| {
            Static::open(keys, &bytes).expect("authentic");
        })),
    ));
    all.push((
        "mutable header seal",
        with(Box::new(move |keys, header| {
            mutable.seal(keys, &header.dek, &VOLUME).expect("an open ring");
        })),
    ));
    all.push((
        "mutable header open",
        with(Box::new(move |keys, header| {
            Mutable::open(keys, &header.dek, &VOLUME, &both).expect("authentic");
        })),
    ));
}

fn requests(all: &mut Vec<Operation>, dir: &Path) {
    let fs = std::rc::Rc::new(filesystem(dir));
    let file = fs.create(WHO, ROOT, b"file", 0o644, 0, true).expect("a file").ino;
    fs.write(file, 0, &[1; 16 * BLOCK], false).expect("space");
    let with = |mut f: Box<dyn FnMut(&Filesystem)>| {
        let fs = fs.clone();
        Box::new(move || f(&fs))
    };
    all.push((
        "inode lookup",
        with(Box::new(move |fs| {
            fs.inode(file).expect("known");
        })),
    ));
    all.push((
        "LOOKUP and FORGET",
        with(Box::new(move |fs| {
            fs.lookup(ROOT, b"file").expect("there");
            fs.forget(file, 1);
        })),
    ));
    all.push((
        "GETATTR",
        with(Box::new(move |fs| {
            fs.getattr(file).expect("there");
        })),
    ));
    let mut out = vec![0; BLOCK];
    all.push((
        "READ, 4 KiB",
        with(Box::new(move |fs| {
            fs.read(file, 4 * BLOCK as u64, &mut out).expect("authentic");
        })),
    ));
    let mut end = 16 * BLOCK as u64;
    all.push((
        "WRITE, 4 KiB at the end",
        with(Box::new(move |fs| {
            fs.write(file, end, &[2; BLOCK], false).expect("space");
            end += BLOCK as u64;
        })),
    ));
    all.push((
        "WRITE, 4 KiB over others",
        with(Box::new(move |fs| fs.write(file, BLOCK as u64, &[3; BLOCK], false).expect("space"))),
    ));
    all.push((
        "CREATE, UNLINK and FORGET",
        with(Box::new(move |fs| {
            let made = fs.create(WHO, ROOT, b"another", 0o644, 0, true).expect("a file");
            fs.unlink(ROOT, b"another").expect("there");
            fs.forget(made.ino, 1);
        })),
    ));
}
