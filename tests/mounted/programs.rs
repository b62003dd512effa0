//! Unmodified programs at work in a volume whose key is in a real OpenBao, before and after a remount; what the disk's
//! holder and the server's log see of it.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::python;
use crate::support::openbao::{Server, Storage};
use crate::support::volume::{Output, TestVolume};

/// What a host that mounts needs (README.md), and nothing else.
const HOST: &str = r#"
path "transit/datakey/plaintext/vol1" { capabilities = ["update"] }
path "transit/decrypt/vol1"           { capabilities = ["update"] }
path "transit/keys/vol1"              { capabilities = ["read"] }
"#;
const URI: &str = "hashivault://vol1?engine=transit";
const FILES: usize = 3000;

/// A server, and a volume under its key `vol1`. Every mount is counted.
struct Remote {
    server: Server,
    v: TestVolume,
    mounts: usize,
}

impl Remote {
    fn new() -> Self {
        let v = TestVolume::new();
        let server = Server::start(Storage::Memory);
        server.create_key("vol1");
        server.policy("host", HOST);
        v.env("VAULT_ADDR", server.address());
        v.env("VAULT_CACERT", server.ca());
        v.env("VAULT_TOKEN", server.token(&["host"], "1h"));
        v.init_with(URI);
        let mut remote = Self { server, v, mounts: 0 };
        assert_eq!(remote.unwrapped(), 0);
        remote.mount();
        remote
    }

    fn mount(&mut self) {
        // No renewal while it is looked at.
        self.v.mount(&["--renew-interval=1h"]);
        self.mounts += 1;
        assert_eq!(self.unwrapped(), self.mounts, "one unwrap for each mount");
    }

    /// Everything again from the disk.
    fn remount(&mut self) {
        let asked = self.asked();
        self.v.umount();
        assert_eq!(self.asked(), asked, "files or the unmount went to the key service");
        self.mount();
    }

    /// Responses to `transit/decrypt/vol1` in the server's audit log.
    fn unwrapped(&self) -> usize {
        let text = self.server.audit_text();
        let entries = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let responses = entries.filter(|entry| entry["type"] == "response" && entry["error"].is_null());
        responses.filter(|entry| entry["request"]["path"] == "transit/decrypt/vol1").count()
    }

    /// Requests of any sort for anything of the Transit engine.
    fn asked(&self) -> usize {
        self.server.audit().iter().filter(|line| line.contains(" transit/")).count()
    }

    /// Runs a program in a directory; it must end with 0.
    #[track_caller]
    fn run(&self, dir: &Path, program: impl AsRef<OsStr>, args: &[&str]) -> Output {
        let mut command = self.v.command(&program);
        command.args(args).current_dir(dir);
        for (name, value) in [
            ("GIT_CONFIG_NOSYSTEM", "1"),
            ("GIT_AUTHOR_NAME", "Ada"),
            ("GIT_AUTHOR_EMAIL", "ada@example.org"),
            ("GIT_COMMITTER_NAME", "Ada"),
            ("GIT_COMMITTER_EMAIL", "ada@example.org"),
            ("LC_ALL", "C"),
        ] {
            command.env(name, value);
        }
        let run = Output::of(&mut command);
        assert_eq!(run.code, Some(0), "{} {args:?}:\n{}{}", program.as_ref().display(), run.out, run.err);
        run
    }

    /// The same, and it says nothing.
    #[track_caller]
    fn quiet(&self, dir: &Path, program: &str, args: &[&str]) {
        assert_eq!(self.run(dir, program, args).out, "", "{program} {args:?}");
    }

    /// Neither these texts, nor any name of the tree, are anywhere below the backing directory: names, link targets,
    /// contents.
    fn backing_hides(&self, texts: &[&str], names: &BTreeSet<Vec<u8>>) {
        let patterns = self.v.path("patterns");
        // Fields of every volume file, and directories in some of the crates.
        let own: [&[u8]; 2] = [b"identity", b"provider"];
        let long = names.iter().filter(|name| name.len() >= 8 && !own.contains(&name.as_slice()));
        let lines: Vec<&[u8]> = texts.iter().map(|text| text.as_bytes()).chain(long.map(Vec::as_slice)).collect();
        fs::write(&patterns, lines.join(&b'\n')).unwrap();
        let backing = self.v.backing();
        let grep =
            |dir: &Path| Output::of(self.v.command("grep").env("LC_ALL", "C").args(["-raFlf"]).arg(&patterns).arg(dir));
        let contents = grep(&backing);
        assert_eq!((contents.code, contents.out.as_str()), (Some(1), ""), "{}", contents.err);
        let listing = self.v.path("listing");
        fs::create_dir_all(&listing).unwrap();
        let found = self.run(&backing, "find", &[".", "-printf", "%P %l\n"]).out;
        assert!(found.lines().count() > 5);
        fs::write(listing.join("names"), found).unwrap();
        fs::write(listing.join("log"), self.v.log()).unwrap();
        assert_eq!(grep(&listing).code, Some(1), "{}", grep(&listing).out);
        // The search itself finds what is there.
        fs::write(listing.join("control"), texts[0]).unwrap();
        assert_eq!(grep(&listing).code, Some(0));
        fs::remove_dir_all(listing).unwrap();
    }
}

/// A real source tree of at least [`FILES`] files: crates that this project is built from, those of the smallest files first.
fn sources() -> (PathBuf, Vec<String>) {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo"))).unwrap();
    let lock = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.lock")).unwrap();
    let value = |line: &str| line.split('"').nth(1).map(str::to_owned);
    let lines: Vec<&str> = lock.lines().collect();
    let crates: Vec<String> = lines
        .windows(2)
        .filter(|pair| pair[0].starts_with("name = ") && pair[1].starts_with("version = "))
        .filter_map(|pair| Some(format!("{}-{}", value(pair[0])?, value(pair[1])?)))
        .collect();
    let registries = fs::read_dir(home.join("registry/src")).map(|dirs| dirs.map(|dir| dir.unwrap().path()).collect());
    let registries: Vec<PathBuf> = registries.unwrap_or_default();
    let measured = |dir: &Path| {
        let (mut files, mut bytes, mut todo) = (0_usize, 0, vec![dir.to_owned()]);
        while let Some(dir) = todo.pop() {
            for entry in fs::read_dir(dir).unwrap().flatten() {
                let meta = entry.metadata().unwrap();
                if meta.is_dir() {
                    todo.push(entry.path());
                } else {
                    (files, bytes) = (files + 1, bytes + meta.len());
                }
            }
        }
        (files, bytes)
    };
    for registry in &registries {
        let there = crates.iter().filter(|name| registry.join(name).is_dir());
        let mut there: Vec<_> = there.map(|name| (measured(&registry.join(name)), name.clone())).collect();
        there.sort_by_key(|((files, bytes), _)| bytes / (*files as u64).max(1));
        let mut taken = (0, Vec::new());
        for ((files, _), name) in there {
            if taken.0 < FILES + FILES / 10 {
                taken.0 += files;
                taken.1.push(name);
            }
        }
        if taken.0 >= FILES {
            return (registry.clone(), taken.1);
        }
    }
    panic!("the sources of this project's dependencies are not below {}: run scripts/test", home.display());
}

fn all_names(dir: &Path) -> BTreeSet<Vec<u8>> {
    let mut names = BTreeSet::new();
    let mut todo = vec![dir.to_owned()];
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let entry = entry.unwrap();
            names.insert(entry.file_name().as_bytes().to_vec());
            if entry.file_type().unwrap().is_dir() {
                todo.push(entry.path());
            }
        }
    }
    names
}

#[test]
fn a_source_tree_with_tar_git_and_rsync() {
    let mut remote = Remote::new();
    let (here, plain, mnt) = (remote.v.path(""), remote.v.path("plain"), remote.v.mnt());
    let (registry, crates) = sources();
    // Line endings are git's to change where a tree asks for it.
    let mut tar =
        vec!["-cf", "tree.tar", "--exclude=.gitattributes", "--exclude=.gitmodules", "-C", registry.to_str().unwrap()];
    tar.extend(crates.iter().map(String::as_str));
    remote.run(&here, "tar", &tar);
    for dir in [plain.join("tree"), mnt.join("tree")] {
        fs::create_dir_all(&dir).unwrap();
        remote.run(&here, "tar", &["-xf", "tree.tar", "-C", dir.to_str().unwrap()]);
    }
    let files = remote.run(&mnt, "find", &["tree", "-type", "f"]).out.lines().count();
    assert!(files >= FILES, "{files} files");
    println!("{files} files of {} crates", crates.len());

    // What rsync -H has to keep beyond files: links of both sorts.
    let links = plain.join("tree/links");
    fs::create_dir(&links).unwrap();
    fs::write(links.join("one"), "one of three names").unwrap();
    fs::hard_link(links.join("one"), links.join("two")).unwrap();
    fs::hard_link(links.join("one"), links.join("n".repeat(255))).unwrap();
    symlink("../links/one", links.join("symlink")).unwrap();
    symlink("nowhere/".repeat(200), links.join("long-symlink")).unwrap();
    remote.run(&here, "rsync", &["-aH", "plain/tree/", "mnt/synced/"]);
    remote.run(&here, "rsync", &["-aH", "mnt/synced/", "back/"]);

    let git = |dir: &Path, args: &[&str]| remote.run(dir, "git", args);
    git(&mnt, &["init", "-q", "tree"]);
    git(&mnt.join("tree"), &["add", "-A", "-f"]);
    git(&mnt.join("tree"), &["commit", "-q", "-m", "a message nobody else reads"]);
    git(&mnt, &["clone", "-q", "--local", "tree", "clone"]);

    let check = |remote: &Remote| {
        remote.quiet(
            &here,
            "diff",
            &["-r", "--no-dereference", "--exclude=.git", "--exclude=links", "plain/tree", "mnt/tree"],
        );
        remote.quiet(&here, "diff", &["-r", "--no-dereference", "--exclude=.git", "mnt/tree", "mnt/clone"]);
        for dir in ["tree", "clone"] {
            remote.quiet(&mnt.join(dir), "git", &["fsck", "--full", "--strict"]);
            remote.quiet(&mnt.join(dir), "git", &["status", "--porcelain"]);
        }
        for (from, to) in [("plain/tree/", "mnt/synced/"), ("mnt/synced/", "back/"), ("plain/tree/", "back/")] {
            remote.quiet(&here, "rsync", &["-aHn", "--itemize-changes", "--delete", from, to]);
        }
        remote.quiet(&here, "diff", &["-r", "--no-dereference", "plain/tree", "mnt/synced"]);
        remote.quiet(&here, "diff", &["-r", "--no-dereference", "plain/tree", "back"]);
    };
    check(&remote);
    remote.remount();
    check(&remote);
    // The tree is also one to remove, and the clone stands on its own then.
    fs::remove_dir_all(mnt.join("tree")).unwrap();
    remote.quiet(&mnt.join("clone"), "git", &["fsck", "--full"]);
    let mut names = all_names(&plain);
    names.extend(crates.iter().map(|name| name.as_bytes().to_vec()));
    remote.v.umount();
    let texts = [
        "fn main()",
        "Permission is hereby granted",
        "[dependencies]",
        "a message nobody else reads",
        "ada@example.org",
    ];
    remote.backing_hides(&texts, &names);
}

#[test]
fn compilers_and_databases() {
    let mut remote = Remote::new();
    let mnt = remote.v.mnt();
    let c = mnt.join("project-c");
    fs::create_dir_all(c.join("include")).unwrap();
    fs::write(c.join("include/secret.h"), "int secret_sum(int upto);\n").unwrap();
    fs::write(
        c.join("sum.c"),
        "#include \"secret.h\"\nint secret_sum(int n) { int s = 0; while (n) s += n--; return s; }\n",
    )
    .unwrap();
    fs::write(
        c.join("main.c"),
        "#include <stdio.h>\n#include \"secret.h\"\nint main(void) { printf(\"%d\\n\", secret_sum(100)); return 0; }\n",
    )
    .unwrap();
    remote.run(&c, "gcc", &["-g", "-Iinclude", "-c", "sum.c", "main.c"]);
    remote.run(&c, "ar", &["rcs", "libsum.a", "sum.o"]);
    remote.run(&c, "gcc", &["main.o", "-L.", "-lsum", "-o", "program"]);

    // Past rustup's stand-in, which looks for its toolchains at home.
    let sysroot = Output::of(Command::new("rustc").args(["--print", "sysroot"]));
    let rustc = Path::new(sysroot.out.trim()).join("bin/rustc");
    let rust = mnt.join("project-rust");
    fs::create_dir(&rust).unwrap();
    fs::write(rust.join("hello.rs"), "fn main() { println!(\"{}\", (1..=100).sum::<u32>()); }\n").unwrap();
    remote.run(&rust, &rustc, &["-C", "incremental=incremental", "-g", "hello.rs"]);

    let script = r#"
import sqlite3, sys
made = []
for mode in ("WAL", "DELETE"):
    db = sqlite3.connect(f"{mode}.database", isolation_level=None)
    assert db.execute(f"PRAGMA journal_mode={mode}").fetchone()[0].upper() == mode
    if sys.argv[1] == "make":
        db.execute("CREATE TABLE secrets (id INTEGER PRIMARY KEY, text TEXT, more BLOB)")
        db.execute("CREATE INDEX by_text ON secrets (text)")
        for batch in range(10):
            db.execute("BEGIN")
            rows = ((f"a secret row {batch} {n * 7919 % 1000}", bytes(n % 3000)) for n in range(1000))
            db.executemany("INSERT INTO secrets (text, more) VALUES (?, ?)", rows)
            db.execute("ROLLBACK" if batch == 5 else "COMMIT")
        db.execute("DELETE FROM secrets WHERE id % 3 = 0")
        db.execute("UPDATE secrets SET more = zeroblob(5000) WHERE id % 100 = 1")
        db.execute("VACUUM")
    assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    print(mode, db.execute("SELECT count(*), sum(length(more)), max(text) FROM secrets").fetchone())
    if sys.argv[1] == "make" and mode == "WAL":
        other = sqlite3.connect("WAL.database")       # through the shared memory of the log
        assert other.execute("SELECT count(*) FROM secrets").fetchone() == (6000,)
    db.close()
"#;
    let databases = mnt.join("databases");
    fs::create_dir(&databases).unwrap();
    let made = remote.run(&databases, python(), &["-c", script, "make"]).out;
    assert!(made.contains("WAL (6000, "), "{made}");
    let check = |remote: &Remote| {
        assert_eq!(remote.run(&c, c.join("program"), &[]).out, "5050\n");
        assert_eq!(remote.run(&rust, rust.join("hello"), &[]).out, "5050\n");
        assert_eq!(remote.run(&databases, python(), &["-c", script, "check"]).out, made);
        remote.run(&databases, "sqlite3", &["WAL.database", "PRAGMA integrity_check"]);
    };
    check(&remote);
    remote.remount();
    check(&remote);
    let names = all_names(&mnt);
    remote.v.umount();
    remote.backing_hides(&["a secret row", "secret_sum", "SQLite format 3", "\x7fELF", "CREATE TABLE"], &names);
}
