//! What the log says of each failure: which object, where in the backing tree, which block, what kind. Never a plaintext.

use std::collections::BTreeMap;

use super::*;

/// One line of the log.
type Event = BTreeMap<String, String>;

/// The integrity events: the fields of each.
fn events(volume: &TestVolume) -> Vec<Event> {
    let log = volume.log();
    let lines = log.lines().filter(|line| line.contains("integrity failure"));
    lines
        .map(|line| {
            line.split(' ')
                .filter_map(|field| field.split_once('='))
                .map(|(name, value)| (name.to_owned(), value.trim_matches('"').to_owned()))
                .collect()
        })
        .collect()
}

/// The object of a backing file, by its header.
fn object(path: &Path) -> String {
    fs::read(path).unwrap()[24..40].iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn an_event_says_what_where_and_which_and_no_plaintext() {
    let volume = TestVolume::mounted(&[]);
    let dir = format!("{NAME}-dir/{NAME}-below");
    fs::create_dir_all(volume.at(&dir)).unwrap();
    let names = ["block", "cut", "longer", "mutable", "header", "planted", "link", "attribute", "removed"];
    for name in names {
        let path = volume.at(&dir).join(format!("{NAME}-{name}"));
        match name {
            "link" => symlink(NAME, &path).unwrap(),
            _ => fs::write(&path, content(12_293, name)).unwrap(),
        }
        if name == "attribute" {
            rustix::fs::setxattr(&path, "user.zz-plain-name", b"zz-plain-content", XattrFlags::empty()).unwrap();
        }
    }
    volume.umount();
    let keys = Keys::of(&volume);
    let at = |name: &str| keys.find(&format!("{dir}/{NAME}-{name}"));
    let mut expected: Vec<(&str, &str, Option<&str>, bool)> = Vec::new();
    let alter = |name: &str, change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = fs::read(at(name)).unwrap();
        change(&mut bytes);
        fs::write(at(name), bytes).unwrap();
    };
    // Name, kind, block, whether the object is known.
    alter("block", &|bytes| bytes[HEADER + SEALED + 40] ^= 1);
    expected.push(("block", "block", Some("1"), true));
    alter("cut", &|bytes| bytes.truncate(HEADER + SEALED));
    expected.push(("cut", "truncated", None, true));
    alter("longer", &|bytes| bytes.extend([0; 5000]));
    expected.push(("longer", "extended", None, true));
    alter("mutable", &|bytes| bytes[256..384].fill(1));
    expected.push(("mutable", "mutable-header", None, true));
    let objects: BTreeMap<&str, String> =
        names.iter().filter(|name| **name != "link").map(|name| (*name, object(&at(name)))).collect();
    alter("header", &|bytes| bytes[..256].fill(1));
    expected.push(("header", "header", None, false));
    fs::remove_file(at("planted")).unwrap();
    rustix::fs::mknodat(CWD, at("planted"), FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    expected.push(("planted", "planted", None, false));
    let text = fs::read_link(at("link")).unwrap().into_os_string().into_string().unwrap();
    let link_object =
        format::un_b64(&text.as_bytes()[..172]).unwrap()[24..40].iter().map(|b| format!("{b:02x}")).collect::<String>();
    fs::remove_file(at("link")).unwrap();
    symlink(format!("{}AAAA", &text[..text.len() - 4]), at("link")).unwrap();
    expected.push(("link", "link", None, true));
    let mut list = vec![0; 1000];
    let len = rustix::fs::listxattr(at("attribute"), list.as_mut_slice()).unwrap();
    let attribute = std::str::from_utf8(&list[..len - 1]).unwrap();
    rustix::fs::setxattr(at("attribute"), attribute, &[7; 60], XattrFlags::empty()).unwrap();
    expected.push(("attribute", "attribute", None, true));

    volume.mount(&[]);
    for (name, ..) in &expected {
        let path = volume.at(&dir).join(format!("{NAME}-{name}"));
        let failed = match *name {
            "link" => fs::read_link(&path).map(drop),
            "attribute" => {
                let value: &mut [u8] = &mut [0; 100];
                rustix::fs::getxattr(&path, "user.zz-plain-name", value).map(drop).map_err(Into::into)
            }
            _ => fs::read(&path).map(drop),
        };
        assert_eq!(errno(failed), EIO, "{name}");
    }
    // A name that nobody can read, with what an attacker would like to say in the log.
    let forged = "zz\n2026-01-01T00:00:00Z ERROR integrity failure\u{1b}[2J";
    fs::write(keys.find(&dir).join(forged), b"").unwrap();
    // Unlinked while open: there is no path to tell.
    let removed = File::open(volume.at(&dir).join(format!("{NAME}-removed"))).unwrap();
    let backing = File::options().write(true).open(at("removed")).unwrap();
    fs::remove_file(volume.at(&dir).join(format!("{NAME}-removed"))).unwrap();
    backing.write_all_at(&[1; 100], HEADER as u64 + 5).unwrap();
    assert_eq!(errno(removed.read_at(&mut [0; 10], 0)), EIO);
    listed(&volume.at(&dir));

    let found = events(&volume);
    let relative = |path: PathBuf| path.strip_prefix(volume.backing()).unwrap().to_str().unwrap().to_owned();
    for (name, kind, block, known) in expected {
        let path = relative(at(name));
        let of_it: Vec<&Event> = found.iter().filter(|event| event.get("path") == Some(&path)).collect();
        let object = if name == "link" { &link_object } else { &objects[name] };
        let right = |event: &&Event| {
            event["kind"] == kind
                && event.get("block").map(String::as_str) == block
                && event.get("object") == known.then_some(object)
                && event["count"].parse::<u64>().unwrap() > 0
        };
        assert!(!of_it.is_empty() && of_it.iter().all(right), "{name}: {of_it:?}");
    }
    let removed = found.iter().find(|event| event.get("object") == Some(&objects["removed"])).unwrap();
    assert!(removed["kind"] == "block" && removed["block"] == "0" && !removed.contains_key("path"), "{removed:?}");
    // On one line, which says what it was as well as can be.
    let name = found.iter().find(|event| event["kind"] == "name").unwrap();
    assert!(name["path"].starts_with(&format!("{}/zz", relative(keys.find(&dir)))), "{name:?}");
    assert!(!volume.log().contains('\u{1b}') && !volume.log().contains("\n2026-01-01"));
    // Each is counted, and the count is the mount's own.
    let counts: Vec<u64> = found.iter().map(|event| event["count"].parse().unwrap()).collect();
    assert!(counts.is_sorted() && counts.last() == Some(&counter(&volume, "integrity_failures")), "{counts:?}");
    assert_discreet(&volume);
}

/// A scan over a damaged volume: everything is counted, the log stays small.
#[test]
fn many_failures_are_counted_and_not_all_told() {
    let volume = TestVolume::mounted(&[]);
    let size = 1000 * 4096;
    fs::write(volume.at("file"), content(size, NAME)).unwrap();
    volume.umount();
    let path = Keys::of(&volume).find("file");
    let mut bytes = fs::read(&path).unwrap();
    for n in 0..1000 {
        bytes[HEADER + n * SEALED + 100] ^= 1;
    }
    fs::write(&path, bytes).unwrap();
    volume.mount(&[]);
    let file = File::open(volume.at("file")).unwrap();
    rustix::fs::fadvise(&file, 0, None, Advice::Random).unwrap();
    for n in 0..1000 {
        assert_eq!(errno(file.read_at(&mut [0; 4096], n * 4096)), EIO);
    }
    let (found, counted) = (events(&volume), counter(&volume, "integrity_failures"));
    assert!(counted >= 1000, "{counted}");
    // The burst, and what time allows: nothing here asserts how long this took.
    assert!((100..1000).contains(&found.len()), "{}", found.len());
    let blocks: BTreeSet<u64> = found.iter().map(|event| event["block"].parse().unwrap()).collect();
    assert!(blocks.len() >= 50, "{blocks:?}");
}
