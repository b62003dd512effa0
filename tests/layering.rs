//! The house: layers import downward only, and what has one room stays in it.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

/// Top to bottom. `crypto` may use `sys` (the arena's memory); `sys` uses nothing of ours.
const LAYERS: [&str; 9] = ["cli", "service", "fs", "volume", "keyring", "kms", "audit", "crypto", "sys"];

fn sources() -> Vec<(PathBuf, String)> {
    fn walk(dir: &Path, found: &mut Vec<(PathBuf, String)>) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                found.push((path, text));
            }
        }
    }
    let mut found = Vec::new();
    walk(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut found);
    assert!(found.len() > 30, "the sources were not found");
    found
}

/// The layer a file belongs to: its first path component below `src`.
fn layer(path: &Path) -> String {
    let below = path.strip_prefix(Path::new(env!("CARGO_MANIFEST_DIR")).join("src")).unwrap();
    let first = below.components().next().unwrap().as_os_str().to_str().unwrap();
    first.trim_end_matches(".rs").to_owned()
}

/// Code without comments and string contents that would only look like code.
fn code(text: &str) -> String {
    text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n")
}

fn imports_upward(own: &str, text: &str) -> Vec<String> {
    let Some(rank) = LAYERS.iter().position(|layer| *layer == own) else { return Vec::new() };
    LAYERS[..rank]
        .iter()
        .filter(|above| code(text).contains(&format!("crate::{above}")))
        .map(|above| (*above).to_owned())
        .collect()
}

#[test]
fn layers_import_downward_only() {
    for (path, text) in sources() {
        let own = layer(&path);
        let upward = imports_upward(&own, &text);
        assert!(upward.is_empty(), "{} is in {own} and imports {upward:?}", path.display());
    }
    // The check itself: a seeded violation is seen.
    assert_eq!(imports_upward("crypto", "use crate::fs::core;"), ["fs"]);
}

#[test]
fn what_has_one_room_stays_in_it() {
    let rooms: [(&str, &[&str]); 8] = [
        ("fuser::", &["fs"]),
        ("reqwest::", &["kms"]),
        ("cryptoki::", &["kms"]),
        ("aws_sdk_kms::", &["kms"]),
        ("tokio::", &["kms"]),
        ("unsafe ", &["sys"]),
        ("clap::", &["cli"]),
        ("aes_gcm_siv::", &["crypto", "kms"]),
    ];
    for (path, text) in sources() {
        let own = layer(&path);
        for (what, allowed) in rooms {
            assert!(
                allowed.contains(&own.as_str()) || !code(&text).contains(what),
                "{} uses {what} outside of {allowed:?}",
                path.display()
            );
        }
    }
}

#[test]
fn files_can_be_held_in_the_head() {
    for (path, text) in sources() {
        assert!(text.lines().count() <= 700, "{} is too long", path.display());
        assert!(
            text.starts_with("//!") || path.to_string_lossy().ends_with("tests.rs"),
            "{} does not say what is in it",
            path.display()
        );
    }
}
