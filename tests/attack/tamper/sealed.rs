//! Every alteration of a sealed file, at every size around the borders of blocks: blocks, headers, lengths. All of them lie in
//! one volume, which is mounted once.

use std::sync::Arc;

use super::*;

const MIB: usize = 1 << 20;
const BLOCK: usize = 4096;

/// Around the borders of blocks, of the backing filesystem's blocks, and of one large request.
#[rustfmt::skip]
const FULL: [usize; 20] = [
    0, 1, 27, 28, 29, 100, 3555, 3556, 3557, 4095, 4096, 4097, 8191, 8192, 8193, 12_288, 12_293, MIB - 1, MIB, MIB + 1,
];

/// A file to alter.
struct Shape {
    name: String,
    content: Arc<Vec<u8>>,
    /// Blocks that are holes.
    holes: Vec<usize>,
}

fn shapes() -> Vec<Shape> {
    let full =
        FULL.map(|size| Shape { name: size.to_string(), content: content(size, NAME).into(), holes: Vec::new() });
    // Holes within, one at the end, data behind them, and a file that is all hole.
    let sparse = [
        ("holes", vec![1, 2, 4], 5 * BLOCK + 77),
        ("hole at the end", vec![2, 3], 3 * BLOCK + 9),
        ("all hole", vec![0, 1], BLOCK + 50),
    ];
    let sparse = sparse.map(|(name, holes, size)| {
        let mut content = content(size, NAME);
        for hole in &holes {
            content[hole * BLOCK..].iter_mut().take(BLOCK).for_each(|byte| *byte = 0);
        }
        Shape { name: name.into(), content: content.into(), holes }
    });
    full.into_iter().chain(sparse).collect()
}

impl Shape {
    fn size(&self) -> usize {
        self.content.len()
    }

    fn len(&self) -> usize {
        format::backing_len(self.size() as u64) as usize
    }

    fn blocks(&self) -> usize {
        self.size().div_ceil(BLOCK)
    }

    /// Where a block lies in the backing file.
    fn block(&self, n: usize) -> std::ops::Range<usize> {
        HEADER + n * SEALED..self.len().min(HEADER + (n + 1) * SEALED)
    }

    /// Through the mount.
    fn write(&self, path: &Path, content: &[u8]) {
        let file = File::options().write(true).create(true).truncate(false).open(path).unwrap();
        file.set_len(if self.holes.is_empty() { 0 } else { content.len() as u64 }).unwrap();
        for (n, block) in content.chunks(BLOCK).enumerate().filter(|(n, _)| !self.holes.contains(n)) {
            file.write_all_at(block, (n * BLOCK) as u64).unwrap();
        }
    }
}

/// What else an attacker finds in the store: files of the same shape, in the same volume and in another one; the same file
/// when it was new, and when it was shorter.
struct Spoils {
    ours: Vec<u8>,
    theirs: Vec<u8>,
    newborn: Vec<u8>,
    dir_header: Vec<u8>,
}

type Alter = Box<dyn Fn(&mut Vec<u8>, &Spoils)>;

/// An alteration that was made.
struct Tried {
    path: String,
    /// The size that stat tells.
    told: u64,
    expect: Expect,
    content: Arc<Vec<u8>>,
}

struct Case {
    name: String,
    expect: Expect,
    /// What is read if it is `Same`.
    content: Arc<Vec<u8>>,
    alter: Alter,
}

fn xor(at: impl Into<Vec<usize>>) -> Alter {
    let at = at.into();
    Box::new(move |bytes, _| at.iter().for_each(|at| bytes[*at] ^= 0x10))
}

fn copy(range: std::ops::Range<usize>, from: impl Fn(&Spoils) -> &Vec<u8> + 'static) -> Alter {
    Box::new(move |bytes, spoils| bytes[range.clone()].copy_from_slice(&from(spoils)[range.clone()]))
}

/// Every alteration of a file of this shape.
fn cases(shape: &Shape) -> Vec<Case> {
    let (size, len, blocks) = (shape.size(), shape.len(), shape.blocks());
    let mut cases = Vec::new();
    let mut add_as = |name: String, expect, content: Arc<Vec<u8>>, alter| {
        cases.push(Case { name: format!("{NAME}-{}-{name}", shape.name), expect, content, alter });
    };
    let mut add = |name: String, expect, alter| add_as(name, expect, shape.content.clone(), alter);

    // Headers.
    for at in [0, 8, 10, 11, 12, 16, 20, 24, 40, 48, 68, 80, 127] {
        add(format!("static {at}"), Eio, xor([at, 128 + at]));
        add(format!("static A {at}"), Same, xor([at]));
        add(format!("static B {at}"), Same, xor([128 + at]));
    }
    for at in [0, 12, 20, 63] {
        add(format!("mutable {at}"), Eio, xor([256 + at, 320 + at]));
        add(format!("mutable A {at}"), Same, xor([256 + at]));
        add(format!("mutable B {at}"), Same, xor([320 + at]));
    }
    add("reserved".into(), Same, xor([384, 511]));
    add("zero header".into(), Eio, Box::new(|bytes, _| bytes[..HEADER].fill(0)));
    add("all zero".into(), Eio, Box::new(|bytes, _| bytes.fill(0)));
    // An empty file's header says no more than that it is empty, and where all is hole, no more than that: any other does as well.
    let nothing = shape.holes.len() == blocks;
    let foreign = if nothing { Same } else { Eio };
    add("header of another file".into(), foreign, copy(0..HEADER, |spoils| &spoils.ours));
    add("static of another file".into(), Eio, copy(0..256, |spoils| &spoils.ours));
    add("static A of another file".into(), Eio, copy(0..128, |spoils| &spoils.ours));
    add("mutable of another file".into(), Eio, copy(256..384, |spoils| &spoils.ours));
    add("mutable A of another file".into(), Same, copy(256..320, |spoils| &spoils.ours));
    add("mutable A of its birth".into(), Same, copy(256..320, |spoils| &spoils.newborn));
    add("mutable B of its birth".into(), Same, copy(320..384, |spoils| &spoils.newborn));
    // An older state of the whole header passes: it has no floor and no seal (docs/THREAT_MODEL.md).
    add("mutable of its birth".into(), Same, copy(256..384, |spoils| &spoils.newborn));
    add("header of another volume".into(), Eio, copy(0..HEADER, |spoils| &spoils.theirs));
    add("mutable of another volume".into(), Eio, copy(256..384, |spoils| &spoils.theirs));
    add("all of another volume".into(), Eio, copy(0..len, |spoils| &spoils.theirs));
    let dir: Alter = Box::new(|bytes, spoils| {
        bytes[..128].copy_from_slice(&spoils.dir_header);
        bytes[128..256].copy_from_slice(&spoils.dir_header);
    });
    add("header of a directory".into(), Eio, dir);

    // Blocks: the first, the last, and where there are holes, all.
    let zeros_pass = !shape.holes.is_empty();
    for n in (0..blocks).filter(|n| *n == 0 || n + 1 == blocks || zeros_pass || *n == blocks / 2) {
        let range = shape.block(n);
        if shape.holes.contains(&n) {
            // Only zeros are a hole.
            add(format!("hole {n} with a bit"), Eio, xor([range.end - 1]));
            add(format!("hole {n} with a nonce"), Eio, xor([range.start]));
        } else {
            let (start, end) = (range.start, range.end);
            for at in BTreeSet::from([start, start + 11, start + 12, end - 17, end - 16, end - 1]) {
                add(format!("block {n} at {at}"), Eio, xor([at]));
            }
            let zero_nonce = range.clone();
            add(
                format!("block {n} zero nonce"),
                Eio,
                Box::new(move |bytes, _| bytes[zero_nonce.clone()][..12].fill(0)),
            );
        }
        for (whose, theirs) in [("file", false), ("volume", true)] {
            if !shape.holes.contains(&n) {
                let range = range.clone();
                let alter: Alter = Box::new(move |bytes, spoils| {
                    let from = if theirs { &spoils.theirs } else { &spoils.ours };
                    bytes[range.clone()].copy_from_slice(&from[range.clone()]);
                });
                add(format!("block {n} of another {whose}"), Eio, alter);
            }
        }
        // One sector of it: what a crash may do to a file that is not sealed.
        let sector = range.start.next_multiple_of(512);
        if !shape.holes.contains(&n) && sector + 512 <= range.end {
            add(format!("block {n} sector zero"), Eio, Box::new(move |bytes, _| bytes[sector..sector + 512].fill(0)));
        }
    }
    // Two blocks that are full and no holes: each other's.
    let data: Vec<usize> = (0..size / BLOCK).filter(|n| !shape.holes.contains(n)).collect();
    if let [first, .., last] = data[..] {
        let (a, b) = (shape.block(first), shape.block(last));
        let (x, y) = (a.clone(), b.clone());
        let swap: Alter = Box::new(move |bytes, _| {
            let (first, second) = (bytes[x.clone()].to_vec(), bytes[y.clone()].to_vec());
            bytes[x.clone()].copy_from_slice(&second);
            bytes[y.clone()].copy_from_slice(&first);
        });
        add("blocks swapped".into(), Eio, swap);
        let (x, y) = (a.clone(), b.clone());
        add("block twice".into(), Eio, Box::new(move |bytes, _| bytes.copy_within(x.clone(), y.start)));
        let x = a.clone();
        add("block left out".into(), Eio, Box::new(move |bytes, _| drop(bytes.drain(x.clone()))));
        let x = a.clone();
        let inserted: Alter = Box::new(move |bytes, _| {
            let first = bytes[x.clone()].to_vec();
            bytes.splice(HEADER..HEADER, first);
        });
        add("block inserted".into(), Eio, inserted);
    }
    if let (Some(from), Some(hole)) = (data.first(), shape.holes.iter().find(|n| **n < size / BLOCK)) {
        let (from, to) = (shape.block(*from), shape.block(*hole));
        add(
            "block copied into a hole".into(),
            Eio,
            Box::new(move |bytes, _| bytes.copy_within(from.clone(), to.start)),
        );
    }

    // Lengths.
    let same_size = |len: usize| if format::plain_size(len as u64) == Some(size as u64) { Same } else { Eio };
    let mut cuts: BTreeSet<usize> = [0, 1, 127, 128, 129, 255, 256, 257, 300, 384, 511, 512, 513, 540, 541].into();
    for n in 0..=blocks {
        let border = HEADER + n * SEALED;
        // All borders of one large file, some of the others.
        if n < 4 || n % 16 == 0 || size == MIB + 1 || n + 2 > blocks {
            cuts.insert(border);
        }
        // Between the borders of a large file nothing is new.
        if n < 4 || n + 2 > blocks {
            cuts.extend([border.saturating_sub(29), border.saturating_sub(28), border.saturating_sub(1)]);
            cuts.extend([1, 12, 27, 28, 29, 512, 2000, 4095, 4096, 4097].map(|more| border + more));
        }
    }
    cuts.extend([1, 16, 28].map(|less| len.saturating_sub(less)));
    for cut in cuts.into_iter().filter(|cut| *cut < len) {
        add(format!("cut to {cut}"), same_size(cut), Box::new(move |bytes, _| bytes.truncate(cut)));
    }
    for more in [1, 27, 28, 29, 512, SEALED - 1, SEALED, SEALED + 1, 1 << 20] {
        let zeros: Alter = Box::new(move |bytes, _| bytes.resize(len + more, 0));
        add(format!("{more} zeros more"), same_size(len + more), zeros);
        let garbage: Alter = Box::new(move |bytes, _| bytes.resize(len + more, 0xa5));
        add(format!("{more} bytes more"), same_size(len + more), garbage);
    }
    if let Some(n) = data.first() {
        let range = shape.block(*n);
        add("a block of its own more".into(), Eio, Box::new(move |bytes, _| bytes.extend_from_within(range.clone())));
        let range = shape.block(*n);
        let foreign: Alter = Box::new(move |bytes, spoils| bytes.extend_from_slice(&spoils.ours[range.clone()]));
        add("a block of another file more".into(), Eio, foreign);
    }

    // A zeroed block: noticed in a file without holes. In one with holes it passes, and is zeros (docs/THREAT_MODEL.md).
    for n in (0..blocks).filter(|n| !shape.holes.contains(n) && (*n < 2 || n + 2 > blocks)) {
        let range = shape.block(n);
        let zero: Alter = Box::new(move |bytes, _| bytes[range.clone()].fill(0));
        let mut shown = shape.content.to_vec();
        let expect = if zeros_pass {
            shown[n * BLOCK..].iter_mut().take(BLOCK).for_each(|byte| *byte = 0);
            Same
        } else {
            Eio
        };
        add_as(format!("block {n} zero"), expect, shown.into(), zero);
    }
    if !zeros_pass && blocks > 1 {
        let cut: Alter = Box::new(|bytes, spoils| {
            bytes[256..384].copy_from_slice(&spoils.newborn[256..384]);
            bytes.truncate(HEADER + SEALED);
        });
        // One copy of it does not do: the other is the later one.
        for copy in [256, 320] {
            let cut: Alter = Box::new(move |bytes, spoils| {
                bytes[copy..copy + 64].copy_from_slice(&spoils.newborn[copy..copy + 64]);
                bytes.truncate(HEADER + SEALED);
            });
            add_as(format!("mutable at {copy} of its birth, and cut"), Eio, shape.content.clone(), cut);
        }
        add_as("mutable of its birth, and cut".into(), Same, shape.content[..BLOCK].to_vec().into(), cut);
    }
    cases
}

/// Most of the time goes into waiting for the other side.
fn side_by_side(tried: &[Tried], each: impl Fn(&Tried) + Sync) {
    std::thread::scope(|scope| {
        for part in tried.chunks(tried.len().div_ceil(4)) {
            let each = &each;
            scope.spawn(move || part.iter().for_each(each));
        }
    });
}

#[test]
fn no_alteration_of_a_file_gives_wrong_bytes() {
    let (volume, other) = (TestVolume::mounted(&[]), TestVolume::mounted(&[]));
    let shapes = shapes();
    let keys = Keys::of(&volume);
    let mut newborn = Vec::new();
    for shape in &shapes {
        fs::create_dir(volume.at(&shape.name)).unwrap();
        let base = volume.at(&shape.name).join("base");
        fs::write(&base, b"").unwrap();
        // Whoever watches the store has every older state, too.
        newborn.push(fs::read(keys.find(&format!("{}/base", shape.name))).unwrap());
        assert_eq!(newborn.last().unwrap().len(), HEADER);
        shape.write(&base, &shape.content);
        shape.write(&volume.at(&shape.name).join("donor"), &content(shape.size(), "donor"));
        shape.write(&other.at(&shape.name), &content(shape.size(), "other"));
    }
    volume.umount();
    other.umount();

    let other_keys = Keys::of(&other);
    let root = fs::read_link(volume.backing().join(DIR_HEADER)).unwrap();
    let dir_header = format::un_b64(root.as_os_str().as_encoded_bytes()).unwrap();
    let mut tried: Vec<Tried> = Vec::new();
    for (shape, newborn) in shapes.iter().zip(newborn) {
        let dir = keys.find(&shape.name);
        let names = keys.dir(&dir);
        let spoils = Spoils {
            ours: fs::read(keys.find(&format!("{}/donor", shape.name))).unwrap(),
            theirs: fs::read(other_keys.find(&shape.name)).unwrap(),
            newborn,
            dir_header: dir_header.clone(),
        };
        let base = keys.find(&format!("{}/base", shape.name));
        let genuine = fs::read(&base).unwrap();
        assert_eq!(genuine.len(), shape.len());
        for case in cases(shape) {
            let mut bytes = genuine.clone();
            (case.alter)(&mut bytes, &spoils);
            // A copy of a file is that file (docs/FORMAT.md section 13).
            fs::write(dir.join(names.name(&keys.ring, case.name.as_bytes()).unwrap().as_str()), &bytes).unwrap();
            let told = match format::plain_size(bytes.len() as u64) {
                // Else a program would believe that it is empty.
                None | Some(0) if case.expect == Eio => 1,
                size => size.unwrap_or(0),
            };
            let path = format!("{}/{}", shape.name, case.name);
            tried.push(Tried { path, told, expect: case.expect, content: case.content });
        }
    }

    let names: BTreeSet<&str> = tried.iter().map(|tried| tried.path.as_str()).collect();
    assert_eq!(names.len(), tried.len(), "two alterations of one name");
    volume.mount(&[]);
    side_by_side(&tried, |Tried { path, told, expect, content }| {
        assert_eq!(fs::symlink_metadata(volume.at(path)).unwrap().len(), *told, "{path}");
        check(&volume.at(path), content, *expect, path);
    });
    let noticed: Vec<&Tried> = tried.iter().filter(|tried| tried.expect == Eio).collect();
    println!("{} alterations of {} files: {} noticed, the others do no harm", tried.len(), shapes.len(), noticed.len());
    assert!(counter(&volume, "integrity_failures") >= noticed.len() as u64);
    let small = |tried: &Tried| tried.content.len() < 20_000;
    for (n, lost) in noticed.iter().enumerate() {
        match small(lost) {
            true => renew(&volume.at(&lost.path), &content(5000, &lost.path), n % 2 == 0, &lost.path),
            false => fs::remove_file(volume.at(&lost.path)).unwrap_or_else(|error| panic!("{}: {error}", lost.path)),
        }
    }
    volume.remount(&[]);
    side_by_side(&tried, |tried| {
        let path = volume.at(&tried.path);
        match tried.expect {
            Same => check(&path, &tried.content, Same, &tried.path),
            Eio if small(tried) => check(&path, &content(5000, &tried.path), Same, &tried.path),
            Eio => assert!(!path.exists()),
        }
    });
    assert_eq!(counter(&volume, "integrity_failures"), 0);
    assert_discreet(&volume);
}
