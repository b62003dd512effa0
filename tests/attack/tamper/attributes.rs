//! Extended attributes: altered, swapped, moved to other files.

use super::*;

#[test]
fn attributes_that_were_altered() {
    let volume = TestVolume::mounted(&[]);
    let get = |path: &Path, name: &str| {
        let mut value = vec![0; 5000];
        rustix::fs::getxattr(path, name, value.as_mut_slice()).map(|len| value[..len].to_vec())
    };
    let list = |path: &Path| {
        let mut names = vec![0; 5000];
        let len = rustix::fs::listxattr(path, names.as_mut_slice()).unwrap();
        let mut names: Vec<String> = names[..len]
            .split(|b| *b == 0)
            .filter(|n| !n.is_empty())
            .map(|n| String::from_utf8_lossy(n).into())
            .collect();
        names.sort();
        names
    };
    fs::create_dir(volume.at("dir")).unwrap();
    let files = ["flip", "swap", "name", "copied", "cut", "dir"];
    for name in files {
        if name != "dir" {
            fs::write(volume.at(name), content(100, name)).unwrap();
        }
        for attribute in ["user.a", "user.b"] {
            let value = format!("{name} {attribute}");
            rustix::fs::setxattr(volume.at(name), attribute, value.as_bytes(), XattrFlags::empty()).unwrap();
        }
    }
    fs::write(volume.at("bare"), content(100, "bare")).unwrap();
    volume.umount();
    let keys = Keys::of(&volume);
    // Backing names, the one of user.a first: the values tell by length nothing, so both are tried.
    let put =
        |path: &Path, name: &str, value: &[u8]| rustix::fs::setxattr(path, name, value, XattrFlags::empty()).unwrap();
    for name in ["flip", "dir"] {
        for attribute in list(&keys.find(name)) {
            let mut value = get(&keys.find(name), &attribute).unwrap();
            *value.last_mut().unwrap() ^= 1;
            put(&keys.find(name), &attribute, &value);
        }
    }
    let path = keys.find("swap");
    let names = list(&path);
    let values: Vec<_> = names.iter().map(|name| get(&path, name).unwrap()).collect();
    put(&path, &names[0], &values[1]);
    put(&path, &names[1], &values[0]);
    let path = keys.find("name");
    for name in list(&path) {
        let value = get(&path, &name).unwrap();
        rustix::fs::removexattr(&path, &*name).unwrap();
        put(&path, &format!("{name}AAAA"), &value);
    }
    let from = keys.find("copied");
    for name in list(&from) {
        put(&keys.find("bare"), &name, &get(&from, &name).unwrap());
        put(&from, &name, &[0; 5]);
    }
    let path = keys.find("cut");
    for name in list(&path) {
        put(&path, &name, b"");
    }
    put(&path, "user.planted", b"x");
    put(&path, "user.lethefs.", b"x");
    put(&path, "user.lethefs.!", &[b'x'; 3000]);

    volume.mount(&[]);
    let failures = counter(&volume, "integrity_failures");
    for name in ["flip", "dir", "swap", "copied", "cut"] {
        assert_eq!(list(&volume.at(name)), ["user.a", "user.b"], "{name}");
        for attribute in ["user.a", "user.b"] {
            assert_eq!(get(&volume.at(name), attribute).unwrap_err().raw_os_error(), EIO, "{name} {attribute}");
        }
        rustix::fs::setxattr(volume.at(name), "user.a", b"new", XattrFlags::empty()).unwrap();
        assert_eq!(get(&volume.at(name), "user.a").unwrap(), b"new");
        rustix::fs::removexattr(volume.at(name), "user.b").unwrap();
    }
    for name in ["name", "bare"] {
        assert!(list(&volume.at(name)).is_empty(), "{name}");
        assert_eq!(get(&volume.at(name), "user.a").unwrap_err().raw_os_error(), 61, "ENODATA");
    }
    assert!(counter(&volume, "integrity_failures") >= failures + 14);
}
