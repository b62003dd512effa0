//! Symlink targets: altered, swapped, without their tails.

use super::*;

#[test]
fn symlinks_that_were_altered() {
    let volume = TestVolume::mounted(&[]);
    let target = |name: &str| format!("/{name}/").repeat(4095 / (name.len() + 2));
    let short =
        ["flip head", "flip nonce", "flip text", "cut", "more", "of file", "dotted", "empty piece", "text of another"];
    let long =
        ["no tail", "no piece", "pieces swapped", "tails swapped", "other tail", "flipped", "endless", "genuine"];
    for name in short {
        symlink(NAME, volume.at(name)).unwrap();
    }
    for name in long {
        symlink(target(name), volume.at(name)).unwrap();
    }
    fs::write(volume.at("file"), b"1").unwrap();
    volume.umount();
    let keys = Keys::of(&volume);
    let text = |path: &Path| fs::read_link(path).unwrap().into_os_string().into_string().unwrap();
    let put = |path: &Path, text: &str| {
        fs::remove_file(path).unwrap();
        symlink(text, path).unwrap();
    };
    let flip = |text: &str, at: usize| {
        let other = if &text[at..=at] == "A" { "B" } else { "A" };
        format!("{}{other}{}", &text[..at], &text[at + 1..])
    };
    let alter = |name: &str, change: &dyn Fn(&str) -> String| {
        let path = keys.find(name);
        put(&path, &change(&text(&path)));
    };
    alter("flip head", &|text| flip(text, 40));
    alter("flip nonce", &|text| flip(text, 175));
    alter("flip text", &|text| flip(text, text.len() - 10));
    alter("cut", &|text| text[..text.len() - 4].to_owned());
    alter("more", &|text| format!("{text}AAAA"));
    alter("dotted", &|text| format!("{text}."));
    alter("empty piece", &|text| format!("{text:A<1020}"));
    let header = fs::read(keys.find("file")).unwrap()[..128].to_vec();
    alter("of file", &|text| format!("{}{}", &format::b64(&header)[..170], &text[170..]));
    // Two links with targets of one length, each with the other's text under its own header.
    let (one, other) = (text(&keys.find("text of another")), text(&keys.find("flip head")));
    put(&keys.find("text of another"), &format!("{}{}", &one[..172], &other[172..]));
    let piece = |name: &str, n: usize| {
        let first = text(&keys.find(name));
        let id: String = format::un_b64(&first.as_bytes()[..172]).unwrap()[24..40]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        volume.backing().join(OVERFLOW_DIR).join(format!("{id}.{n}"))
    };
    for n in 1..=5 {
        fs::remove_file(piece("no tail", n)).unwrap();
    }
    fs::remove_file(piece("no piece", 3)).unwrap();
    let exchange = |a: &Path, b: &Path| {
        rustix::fs::renameat_with(CWD, a, CWD, b, rustix::fs::RenameFlags::EXCHANGE).unwrap();
    };
    exchange(&piece("pieces swapped", 1), &piece("pieces swapped", 2));
    exchange(&piece("tails swapped", 4), &piece("other tail", 4));
    put(&piece("flipped", 2), &flip(&text(&piece("flipped", 2)), 7));
    put(&piece("endless", 5), &"A".repeat(1020));
    symlink("A".repeat(1020), piece("endless", 6)).unwrap();

    volume.mount(&[]);
    assert_eq!(text(&volume.at("genuine")), target("genuine"));
    assert_eq!(fs::symlink_metadata(volume.at("genuine")).unwrap().len(), target("genuine").len() as u64);
    for name in short.iter().chain(&long).filter(|name| **name != "genuine") {
        let meta = fs::symlink_metadata(volume.at(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(meta.is_symlink(), "{name}");
        assert_eq!(errno(fs::read_link(volume.at(name))), EIO, "{name}");
    }
    assert_eq!(listed(&volume.mnt()).len(), 18);
    assert!(counter(&volume, "integrity_failures") >= 16);
    for name in short.iter().chain(&long) {
        fs::remove_file(volume.at(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
    assert_eq!(listed(&volume.mnt()), ["file"]);
    assert_discreet(&volume);
}
