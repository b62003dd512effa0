//! The real binary, with key files and without mounting anything: exit codes, one-line errors, and that a refusal changes
//! nothing on disk. What needs FUSE or a key server is tested elsewhere.
#![allow(clippy::unwrap_used, missing_docs)]

mod audit;
mod erase;
mod refusals;
mod revoke;
mod slots;
mod terminal;
mod world;

use world::World;

#[test]
fn help_names_every_command_and_is_not_an_error() {
    let world = World::new();
    let run = world.run(&["--help"]);
    run.is(0);
    let commands: Vec<&str> = run
        .out
        .lines()
        .skip_while(|line| !line.starts_with("Commands:"))
        .skip(1)
        .take_while(|line| !line.is_empty())
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    assert_eq!(
        commands,
        [
            "init",
            "mount",
            "umount",
            "status",
            "fsck",
            "erase",
            "revoke",
            "restore",
            "keys",
            "audit",
            "completions",
            "help"
        ]
    );
    world.run(&["--version"]).is(0);
    let bash = world.run(&["completions", "bash"]);
    bash.is(0);
    assert!(bash.out.contains("complete -F _lethefs"));
}

#[test]
fn the_table_of_exit_codes_is_the_documents() {
    let document = include_str!("../../docs/CLI.md");
    let codes: Vec<u8> =
        document.lines().filter_map(|line| line.strip_prefix("| ")?.split(' ').next()?.parse().ok()).collect();
    use lethefs::cli::exit::ExitCode as Code;
    let table = [
        Code::Done,
        Code::Failed,
        Code::Usage,
        Code::BadVolume,
        Code::InUse,
        Code::KmsAway,
        Code::KmsRefuses,
        Code::KeyUnusable,
        Code::Mount,
        Code::NotTrusted,
        Code::Destroyed,
        Code::StillRestorable,
        Code::NotConfirmed,
        Code::Repaired,
        Code::Damaged,
        Code::AuditBroken,
        Code::NotAllKeys,
    ];
    assert_eq!(codes, table.map(Code::code));
}

#[test]
fn the_table_of_findings_is_the_documents() {
    let document = include_str!("../../docs/CLI.md");
    let table = document.split("| `fault` | is |").nth(1).unwrap().split("\n\n").next().unwrap();
    let mut told: Vec<&str> = table
        .lines()
        .skip(2)
        .flat_map(|line| line.split('|').nth(1).unwrap_or_default().split('`').skip(1).step_by(2))
        .collect();
    let words = lethefs::volume::check::Fault::ALL.map(|fault| serde_json::to_value(fault).unwrap());
    let mut known: Vec<&str> = words.iter().map(|word| word.as_str().unwrap()).collect();
    told.sort_unstable();
    known.sort_unstable();
    assert_eq!(told, known);
}

#[test]
fn every_mount_option_is_in_the_document() {
    let document = include_str!("../../docs/CLI.md");
    let world = World::new();
    let help = world.run(&["mount", "--help"]).out;
    for flag in help.split_whitespace().filter_map(|word| word.trim_end_matches('.').strip_prefix("--")) {
        assert!(document.contains(&format!("--{flag}")), "--{flag}");
    }
}

#[test]
fn init_reports_in_json_with_the_promised_fields() {
    let world = World::new();
    let key = world.uri("key");
    let run = world.run(&["init", "vol", "--kms", &key, "--label", "my files", "--json"]);
    run.is(0);
    assert!(run.out.starts_with("{\n  \"schema\": 1,\n  \"volume_id\": \""), "{}", run.out);
    let report: serde_json::Value = serde_json::from_str(&run.out).unwrap();
    assert_eq!((&report["label"], &report["embedded"]), (&"my files".into(), &true.into()));
    let id = report["volume_id"].as_str().unwrap();
    assert!(world.path("trust").join(id).is_file());
    let status: serde_json::Value = serde_json::from_str(&world.run(&["status", "vol", "--json"]).out).unwrap();
    assert_eq!((&status["pin"]["state"], &status["volume_id"]), (&"matches".into(), &report["volume_id"]));
    assert!(status["live"].is_null());
    let all = world.run(&["status", "--json"]);
    assert!(all.out.starts_with("{\n  \"schema\": 1,\n  \"volume_id\": null,\n  \"mounts\": ["), "{}", all.out);
}

#[test]
fn a_reader_that_went_away_is_not_a_panic() {
    let world = World::new();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let status = world.command(&["--help"]).stdout(writer).status().unwrap();
    assert_eq!(status.code(), Some(0));
}

#[test]
fn mount_as_a_helper_of_mount8() {
    let world = World::new();
    let helper = world.path("mount.fuse.lethefs");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_lethefs"), &helper).unwrap();
    let run = |args: &[&str]| World::finish(world.prepare(std::process::Command::new(&helper)).args(args));
    run(&["nowhere", "mnt", "-o", "rw,defaults,x-systemd.automount", "-f"]).is(0);
    run(&["nowhere", "mnt", "-o", "rw"]).is(2).says("no backing directory");
    run(&["nowhere", "mnt", "-o", "fly"]).is(2).says("\"fly\"");
    run(&["nowhere", "mnt", "-s", "-f", "-o", "fly"]).is(0);
}
