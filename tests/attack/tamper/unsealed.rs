//! Files that a crash left unsealed, altered before the next mount: below the floor as if they were sealed; above it zeros and
//! shorter files pass, and nothing else (docs/FORMAT.md sections 7 and 13, docs/THREAT_MODEL.md).

use std::fmt::Write as _;

use lethefs::volume::header::{Mutable, ObjectType, Static};

use super::*;

const BLOCK: usize = 4096;

/// A file as the killed daemon left it.
struct Left {
    name: &'static str,
    content: Vec<u8>,
    bytes: Vec<u8>,
    floor: usize,
    holes: bool,
    birth: Option<Vec<u8>>,
}

/// What is read of `altered`, by section 7's rules; `None`: EIO.
fn expected(file: &Left, altered: &[u8]) -> Option<Vec<u8>> {
    let size = format::plain_size(altered.len() as u64)? as usize;
    if size < file.floor {
        return None;
    }
    let mut shown = Vec::new();
    for n in 0..size.div_ceil(BLOCK) {
        let (at, len) = (HEADER + n * SEALED, (size - n * BLOCK).min(BLOCK));
        let stored = &altered[at..(at + len + 28).min(altered.len())];
        let sector = |k: usize| (k / 512 * 512).max(at)..((k / 512 + 1) * 512).min(at + stored.len());
        let torn = (at..at + stored.len()).any(|k| altered[sector(k)].iter().all(|byte| *byte == 0));
        // A short last block that ends with a sector may be one whose end never got there.
        let cut_short = len < BLOCK && (at + stored.len()).is_multiple_of(512);
        let all_zero = stored.iter().all(|byte| *byte == 0);
        let above = n * BLOCK >= file.floor;
        if file.bytes.get(at..at + len + 28) == Some(stored)
            && file.content.len().min((n + 1) * BLOCK) == n * BLOCK + len
        {
            shown.extend(&file.content[n * BLOCK..][..len]);
        } else if (all_zero && (above || file.holes)) || (above && (torn || cut_short)) {
            shown.resize(shown.len() + len, 0);
        } else {
            return None;
        }
    }
    Some(shown)
}

/// Makes files at all stages of durability in a mount, and kills it.
fn left_by_a_crash(volume: &TestVolume) -> Vec<Left> {
    let names = ["never flushed", "flushed once", "floored", "floored with more", "short", "with holes", "empty"];
    let mut contents = Vec::new();
    for name in names {
        let file = File::create_new(volume.at(name)).unwrap();
        let bytes = |size| content(size, name);
        // Nothing is flushed by this: the kernel hands its pages over.
        let hand_over = || rustix::fs::syncfs(File::open(volume.mnt()).unwrap()).unwrap();
        let size = match name {
            "never flushed" => 12_293,
            "short" => 100,
            "empty" => 0,
            "floored with more" => 16_389,
            _ => 12_288,
        };
        let mut content = bytes(size);
        match name {
            "flushed once" | "floored" => {
                file.write_all_at(&content, 0).unwrap();
                (0..if name == "floored" { 2 } else { 1 }).for_each(|_| file.sync_all().unwrap());
            }
            "floored with more" => {
                file.write_all_at(&content[..8192], 0).unwrap();
                (0..2).for_each(|_| file.sync_all().unwrap());
                file.write_all_at(&content[8192..], 8192).unwrap();
            }
            "with holes" => {
                file.write_all_at(&content[8192..], 8192).unwrap();
                content[..8192].fill(0);
                (0..2).for_each(|_| file.sync_all().unwrap());
            }
            _ => file.write_all_at(&content, 0).unwrap(),
        }
        hand_over();
        contents.push(content);
    }
    volume.crash();
    let keys = Keys::of(volume);
    names
        .into_iter()
        .zip(contents)
        .map(|(name, content)| {
            let path = keys.find(name);
            let bytes = fs::read(&path).unwrap();
            assert_eq!(bytes.len() as u64, format::backing_len(content.len() as u64), "{name}");
            let header = Static::open_as(&keys.ring, bytes[..].first_chunk().unwrap(), ObjectType::Regular).unwrap();
            let id = crate::store::body(volume)["volume_id"].as_str().unwrap().parse().unwrap();
            let mutable = Mutable::open(&keys.ring, &header.dek, &id, bytes[256..].first_chunk().unwrap()).unwrap();
            assert!(!mutable.sealed, "{name}");
            let mut birth = vec![0; 1000];
            let birth =
                rustix::fs::getxattr(&path, format::BIRTH, birth.as_mut_slice()).ok().map(|len| birth[..len].to_vec());
            Left { name, content, bytes, floor: mutable.floor as usize, holes: mutable.holes, birth }
        })
        .collect()
}

type Alter = Box<dyn Fn(&mut Vec<u8>)>;

/// Everything that is done to one of them.
fn alterations(file: &Left) -> Vec<(String, Alter)> {
    let len = file.bytes.len();
    let blocks = file.content.len().div_ceil(BLOCK);
    let block = move |n: usize| HEADER + n * SEALED..len.min(HEADER + (n + 1) * SEALED);
    let mut all: Vec<(String, Alter)> = vec![("nothing".into(), Box::new(|_| {}))];
    for n in 0..blocks {
        let range = block(n);
        for at in [range.start, range.start + 12, range.end - 1] {
            all.push((format!("block {n} at {at}"), Box::new(move |bytes| bytes[at] ^= 1)));
        }
        let (zero, nonce) = (range.clone(), range.start..range.start + 12);
        all.push((format!("block {n} zero"), Box::new(move |bytes| bytes[zero.clone()].fill(0))));
        all.push((format!("block {n} zero nonce"), Box::new(move |bytes| bytes[nonce.clone()].fill(0))));
        for sector in (range.start.next_multiple_of(512)..range.end.saturating_sub(511)).step_by(1024) {
            let torn: Alter = Box::new(move |bytes| bytes[sector..sector + 512].fill(0));
            all.push((format!("block {n} without the sector at {sector}"), torn));
        }
        let most = range.start + 1..range.end;
        if most.len() > 600 {
            // All but a few bytes at each end: no sector is all zero but those within.
            let noise: Alter = Box::new(move |bytes| bytes[most.start + 300..most.start + 400].fill(0xaa));
            all.push((format!("block {n} with noise"), noise));
        }
        for m in (0..blocks).filter(|m| *m != n && block(*m).len() == block(n).len()) {
            all.push((
                format!("block {n} over block {m}"),
                Box::new(move |bytes| bytes.copy_within(block(n), block(m).start)),
            ));
        }
    }
    let mut cuts = BTreeSet::new();
    for n in 0..=blocks {
        let border = HEADER + n * SEALED;
        cuts.extend([0, 1, 27, 28].map(|more| border + more));
        cuts.extend([1, 28].map(|less| border - less));
    }
    // Within the header there is nothing to hold a length against: that is a file without one.
    for cut in cuts.into_iter().filter(|cut| (HEADER..len).contains(cut)) {
        all.push((format!("cut to {cut}"), Box::new(move |bytes| bytes.truncate(cut))));
    }
    for more in [1, 28, 29, SEALED, 3 * SEALED + 100] {
        all.push((format!("{more} zeros more"), Box::new(move |bytes| bytes.resize(len + more, 0))));
        all.push((format!("{more} bytes more"), Box::new(move |bytes| bytes.resize(len + more, 0x5a))));
    }
    all
}

#[test]
fn after_a_crash_the_floor_decides() {
    let volume = TestVolume::mounted(&[]);
    let files = left_by_a_crash(&volume);
    let floor = |name| files.iter().find(|file| file.name == name).unwrap().floor;
    assert_eq!([floor("never flushed"), floor("short"), floor("empty")], [0; 3]);
    assert_eq!([floor("floored"), floor("floored with more")], [12_288, 8192]);
    let keys = Keys::of(&volume);
    let names = keys.dir(&volume.backing());
    let mut tried = Vec::new();
    let mut table = String::new();
    for file in &files {
        let [mut same, mut less, mut eio] = [0; 3];
        for (what, alter) in alterations(file) {
            let name = format!("{}: {what}", file.name);
            let mut bytes = file.bytes.clone();
            alter(&mut bytes);
            let path = volume.backing().join(names.name(&keys.ring, name.as_bytes()).unwrap().as_str());
            fs::write(&path, &bytes).unwrap();
            if let Some(birth) = &file.birth {
                rustix::fs::setxattr(&path, format::BIRTH, birth, XattrFlags::empty()).unwrap();
            }
            let expected = expected(file, &bytes);
            match &expected {
                Some(content) if *content == file.content => same += 1,
                Some(_) => less += 1,
                None => eio += 1,
            }
            tried.push((name, file, expected));
        }
        let _ = writeln!(
            table,
            "{:>18}: floor {:>6}: {same} as written, {less} shorter or zeros, {eio} EIO",
            file.name, file.floor
        );
    }
    println!("{} alterations of files that a crash left\n{table}", tried.len());

    // Read at once, before the sealer vouches for anything; then as it was sealed.
    volume.mount(&[]);
    for round in 0..2 {
        for (name, file, expected) in &tried {
            let what = format!("{name} (floor {}, round {round})", file.floor);
            match expected {
                Some(content) => check(&volume.at(name), content, Same, &what),
                // Not even zeros are read before the damage.
                None => {
                    let read = fs::read(volume.at(name));
                    assert_eq!(read.err().and_then(|error| error.raw_os_error()), Some(EIO), "{what}");
                }
            }
        }
        if round == 0 {
            // What is damaged above the floor cannot be vouched for, and the daemon's end says so.
            volume.cli(&["umount", "mnt"]).is(0);
            assert_eq!(volume.daemon_exit(), Some(15), "{}", volume.log());
            volume.mount(&[]);
        }
    }
    let lost = tried.iter().filter(|(.., expected)| expected.is_none()).count() as u64;
    assert!(counter(&volume, "integrity_failures") >= lost);
}
