//! What people read: lines for each report, or its JSON. Nothing is decided here.

use std::fmt::Write as _;
use std::io::{self, Write as _};

use serde::{Deserialize as _, Serialize};
use serde_json::Value;
use zeroize::Zeroizing;

use crate::audit::Record;
use crate::kms::KeyIdentity;
use crate::service::custody::CustodyStatus;
use crate::service::erase::{Plan, Report as EraseReport};
use crate::service::status::{PinState, Report as StatusReport};
use crate::service::{audit, fsck, init, keys, mount, revoke, slots, umount};

/// Writes to stdout. A reader that went away is its own business.
pub fn print(text: &str) {
    let mut out = io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

/// Writes to stderr.
pub fn complain(text: &str) {
    let _ = io::stderr().lock().write_all(text.as_bytes());
}

/// One report as JSON on lines of its own.
pub fn json(report: &impl Serialize) -> String {
    let mut text = serde_json::to_string_pretty(report).unwrap_or_else(|error| format!("{{\"error\":\"{error}\"}}"));
    text.push('\n');
    text
}

/// Warnings as lines for stderr.
pub fn warnings(warnings: &[String]) -> String {
    warnings.iter().map(|warning| format!("lethefs: warning: {warning}\n")).collect()
}

/// Text from outside, on one line and without control characters.
pub(super) fn safe(text: &str) -> String {
    text.chars().flat_map(|c| if c.is_control() { c.escape_default().collect::<Vec<_>>() } else { vec![c] }).collect()
}

fn key(identity: &KeyIdentity) -> String {
    safe(&identity.to_string())
}

/// `init`
pub fn init(report: &init::Report) -> String {
    let mut text = String::new();
    let _ = writeln!(text, "volume   {}", report.volume_id);
    if !report.label.is_empty() {
        let _ = writeln!(text, "label    {}", report.label);
    }
    let _ = writeln!(text, "backing  {}", report.backing.display());
    let _ = writeln!(text, "key      {} ({})", report.uri, key(&report.key));
    let _ = writeln!(text, "pin      {}", report.pin.display());
    if report.embedded {
        text.push_str(
            "The key is embedded, a file on this machine: whoever has the file can read the volume, who loses it has lost\n\
             the volume, and any copy of it defeats an erase.\n",
        );
    }
    text
}

/// `mount`
pub fn mount(report: &mount::Report) -> String {
    format!("volume {} is mounted at {}\n", report.volume_id, report.mountpoint.display())
}

/// `umount`
pub fn umount(report: &umount::Report) -> String {
    let at = report.mountpoint.display();
    if report.ended {
        format!("{at} is unmounted, everything is on disk\n")
    } else {
        format!("{at} is unmounted or detached; its daemon ends when its last user lets go\n")
    }
}

/// `status`, one volume
pub fn status(report: &StatusReport) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: &str| {
        let _ = writeln!(text, "{name:<12}{}", safe(value));
    };
    let verified = matches!(report.pin, PinState::Matches | PinState::NotChecked);
    let mark = if verified { "" } else { "  (unverified)" };
    line("volume", &report.volume_id.map_or("unknown".into(), |id| format!("{id}{mark}")));
    if let Some(label) = report.label.as_ref().filter(|label| !label.is_empty()) {
        line("label", &format!("{label}{mark}"));
    }
    if let Some(backing) = &report.backing {
        line("backing", backing);
    }
    line("mounted", report.mountpoint.as_deref().map_or("no", |at| at));
    for identity in &report.keys {
        line("key", &format!("{identity}{mark}"));
        if matches!(identity, KeyIdentity::File { .. }) {
            line("", "embedded: a file on this machine; a copy of it defeats an erase");
        }
    }
    match &report.pin {
        PinState::Matches => line("pin", "matches"),
        PinState::None => line("pin", "none on this host: mount needs --trust"),
        PinState::Refused { why } => line("pin", why),
        PinState::NotChecked => {}
    }
    if let Some(live) = &report.live {
        line("process", &format!("{} since {}", live.pid, live.started));
        line("options", &live.options.join(","));
        line("keys", live.sealed.as_deref().map_or("in use", |why| why));
        if let Some(custody) = &live.custody {
            line("lease", &lease(custody));
            line(
                "bounds",
                &format!(
                    "sealed within {} of a refusal, within {} of the last proof if the key service cannot be reached",
                    seconds(custody.bound_connected_s),
                    seconds(custody.bound_partitioned_s)
                ),
            );
        }
        if let Some(counters) = live.counters.as_object() {
            line("counters", "since it was mounted");
            for (name, value) in counters.iter().filter(|(name, value)| *name != "sealed" && !value.is_null()) {
                let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
                line(&format!("  {name}"), &format!(" {value}"));
            }
        }
    }
    if let Some(journal) = &report.erase {
        line("erase", &journal.sentence());
    }
    for warning in &report.warnings {
        line("warning", warning);
    }
    text
}

/// Where a lease stands, and what comes next.
fn lease(custody: &CustodyStatus) -> String {
    let mut text = format!("{} since {}", custody.state, custody.since);
    if let Some(failure) = &custody.failure {
        let _ = write!(text, " (key service: {failure})");
    }
    if let Some(next) = custody.next_proof_in_s {
        let _ = write!(text, ", asks again in {}", seconds(next));
    }
    if let Some(deadline) = custody.seals_in_s {
        let _ = write!(text, ", seals in {} without an answer", seconds(deadline));
    }
    if custody.state == "held" {
        text.push_str(": sealed on request; `lethefs restore` on its mountpoint or a new mount opens it again");
    }
    text
}

fn seconds(seconds: f64) -> String {
    format!("{seconds:.1} s")
}

/// `status` without argument
pub fn status_all(reports: &[StatusReport]) -> String {
    if reports.is_empty() {
        return "no lethefs volume is mounted here\n".into();
    }
    reports.iter().map(status).collect::<Vec<_>>().join("\n")
}

/// `erase --plan`
pub fn plan(plan: &Plan) -> String {
    let mut text = String::new();
    let _ = writeln!(text, "volume      {}", plan.volume_id);
    if let Some(label) = plan.label.as_ref().filter(|label| !label.is_empty()) {
        let _ = writeln!(text, "label       {}", safe(label));
    }
    if let Some(backing) = &plan.backing {
        let _ = writeln!(text, "backing     {}", safe(backing));
    }
    for planned in &plan.keys {
        let _ = writeln!(text, "key         {}: {} ({})", safe(&planned.name), planned.uri, key(&planned.identity));
        if let Some(problem) = &planned.problem {
            let _ = writeln!(text, "            could not be described now: {}", safe(problem));
        }
        match (planned.erasable, &planned.obstacle) {
            (_, Some(why)) => {
                let _ = writeln!(text, "            cannot be destroyed from here: {}", safe(why));
            }
            (None, None) => {
                text.push_str("            its service does not tell whether these credentials may destroy it\n")
            }
            (Some(_), None) => {}
        }
        for warning in planned.description.iter().flat_map(|description| &description.warnings) {
            let _ = writeln!(text, "            {}", safe(warning));
        }
        if planned.description.as_ref().is_some_and(|description| !description.quantum_durable) {
            let _ = writeln!(text, "            an erase would not outlast a later break of RSA or elliptic curves");
        }
    }
    if !plan.pinned {
        text.push_str("            this host has no pin: keys are as the volume file (unverified) and --key say\n");
    }
    for identity in &plan.left {
        let _ = writeln!(text, "not erased  {} (named by the volume file, unverified): give its --key", key(identity));
    }
    for shared in &plan.shared_with {
        let _ = writeln!(text, "also dies   volume {} {}", shared.volume_id, safe(&shared.label));
    }
    if let Some(contents) = &plan.contents {
        let _ = writeln!(
            text,
            "contents    {} files with {} bytes, {} directories, {} links, {} nodes",
            contents.files, contents.bytes, contents.directories, contents.links, contents.nodes
        );
        if contents.unreadable > 0 {
            let _ = writeln!(text, "            and {} entries that could not be looked at", contents.unreadable);
        }
    }
    for mount in plan.live_mounts.iter().filter(|mount| mount.volume_id.is_some()) {
        let state = if mount.reachable { "will be sealed" } else { "does not answer, cannot be sealed" };
        let _ = writeln!(text, "mounted     {} ({state})", safe(&mount.mountpoint));
    }
    foreign_mounts(&mut text, plan);
    if let Some(journal) = &plan.begun {
        let _ = writeln!(text, "begun       {}", journal.sentence());
    }
    text.push_str("What would remain possible:\n");
    for line in &plan.remains {
        let _ = writeln!(text, "  - {line}");
    }
    text
}

/// `erase`
pub fn erase(report: &EraseReport, complete: bool) -> String {
    let mut text = String::new();
    let journal = &report.journal;
    for (name, at) in [
        ("begun", Some(&journal.begun_at)),
        ("inaccessible", journal.inaccessible_at.as_ref()),
        ("destruction", journal.scheduled_at.as_ref()),
        ("irrecoverable", journal.irrecoverable_at.as_ref()),
    ] {
        let _ = writeln!(text, "{name:<14}{}", at.map_or("not yet".into(), |at| safe(at)));
    }
    for receipt in &journal.receipts {
        let _ = writeln!(text, "sealed        {} at {}", safe(&receipt.mountpoint), safe(&receipt.at));
    }
    for slot in &journal.slots {
        let _ = writeln!(text, "key           {}", key(&slot.identity));
        let findings = slot.proof.as_ref().and_then(|proof| proof["findings"].as_array());
        for finding in findings.into_iter().flatten() {
            let part = |name: &str| safe(finding[name].as_str().unwrap_or_default());
            let _ = writeln!(text, "  asked       {}", part("asked"));
            let _ = writeln!(text, "  answered    {}", part("answered"));
            let _ = writeln!(text, "  shows       {}", part("shows"));
        }
    }
    if complete {
        text.push_str(if report.self_asserted {
            "The key file is gone. That is only lethefs's own word: whether a copy of it exists nobody can show.\n"
        } else {
            "The volume is erased: its keys no longer exist at the key service.\n"
        });
        for line in &report.remains {
            let _ = writeln!(text, "  - {line}");
        }
    }
    text
}

/// `fsck`
pub fn fsck(report: &fsck::Report) -> String {
    let mut text = String::new();
    for line in &report.findings {
        let word = if line.note { "note" } else { "damage" };
        let _ = writeln!(text, "{word:<8}{}  {}", fault(line.fault), safe(line.name.as_ref().unwrap_or(&line.path)));
        if line.name.is_some() {
            let _ = writeln!(text, "        backing  {}", safe(&line.path));
        }
        let detail = line.detail.as_ref().map_or(String::new(), |detail| format!(" ({})", safe(detail)));
        let _ = writeln!(text, "        is       {}{detail}", line.what);
        for (first, last) in line.blocks.iter().take(8) {
            let _ =
                writeln!(text, "        blocks   {first} to {last}: bytes {} to {}", first * 4096, last * 4096 + 4095);
        }
        if line.blocks.len() > 8 {
            let _ = writeln!(text, "        blocks   and {} more runs: --json lists them", line.blocks.len() - 8);
        }
        let _ = writeln!(text, "        costs    {}", line.costs);
        match (&line.repaired, &line.problem) {
            (Some(how), _) => {
                let _ = writeln!(text, "        repaired {}", safe(how));
            }
            (None, Some(why)) => {
                let _ = writeln!(text, "        repair   failed: {}", safe(why));
            }
            (None, None) => {
                let _ = writeln!(text, "        repair   {}", line.repair);
            }
        }
    }
    let checked = &report.checked;
    let _ = writeln!(
        text,
        "checked {} files with {} bytes, {} directories, {} links, {} nodes",
        checked.files, checked.bytes, checked.directories, checked.links, checked.nodes
    );
    let left = report.left.iter().filter(|line| !line.note).count();
    let _ = match report.state {
        fsck::State::Clean => writeln!(text, "clean"),
        fsck::State::Repaired => writeln!(text, "repaired: nothing is left"),
        fsck::State::Damaged => writeln!(text, "damaged: {left} findings are left"),
    };
    text
}

/// The word for a kind of finding, as in JSON.
fn fault(fault: crate::volume::check::Fault) -> String {
    serde_json::to_value(fault).ok().and_then(|word| word.as_str().map(str::to_owned)).unwrap_or_default()
}

/// What `revoke` shows before it asks.
pub fn revoke_plan(plan: &Plan) -> String {
    let mut text = String::new();
    let _ = writeln!(text, "volume      {}", plan.volume_id);
    for planned in &plan.keys {
        let _ = writeln!(text, "key         {}: {} ({})", safe(&planned.name), planned.uri, key(&planned.identity));
    }
    for shared in &plan.shared_with {
        let _ = writeln!(text, "as well     volume {} {} has the same key", shared.volume_id, safe(&shared.label));
    }
    for mount in plan.live_mounts.iter().filter(|mount| mount.volume_id.is_some()) {
        let state = if mount.reachable { "will be sealed" } else { "cannot be asked from here" };
        let _ = writeln!(text, "mounted     {} ({state})", safe(&mount.mountpoint));
    }
    foreign_mounts(&mut text, plan);
    text
}

/// Mounts that nobody here can ask, on one line: they may be of any volume.
fn foreign_mounts(text: &mut String, plan: &Plan) {
    const SHOWN: usize = 3;
    let all: Vec<String> = plan.foreign_mounts().map(safe).collect();
    if !all.is_empty() {
        let more = if all.len() > SHOWN { format!(" and {} more", all.len() - SHOWN) } else { String::new() };
        let shown = all[..all.len().min(SHOWN)].join(", ");
        let _ = writeln!(text, "not told    {shown}{more}: other lethefs mounts, which may be of this volume or not");
    }
}

/// `revoke`, `restore`
pub fn revoke(report: &revoke::Report) -> String {
    let mut text = String::new();
    for done in &report.keys {
        let why = done.problem.as_ref().map_or_else(String::new, |why| format!(" ({})", safe(why)));
        let _ = writeln!(text, "{:<14}{} ({}){why}", done.outcome, done.uri, key(&done.identity));
    }
    for mount in &report.mounts {
        let _ = writeln!(text, "{:<14}{}", "mount", format_args!("{}: {}", safe(&mount.mountpoint), safe(&mount.said)));
    }
    for identity in &report.left {
        let _ = writeln!(
            text,
            "{:<14}{} (named by the volume file, unverified): give its --key",
            "not reached",
            key(identity)
        );
    }
    text
}

/// `keys list`
pub fn slots(list: &slots::List) -> String {
    let mark = if list.pinned { "" } else { "  (unverified)" };
    let mut text = format!("volume   {}{mark}\nbacking  {}\n", list.volume_id, list.backing.display());
    for slot in &list.slots {
        let how = match (&slot.uri, &slot.key, slot.empty) {
            (_, _, true) => "empty, as after an erase".into(),
            (Some(uri), ..) => uri.to_string(),
            (None, KeyIdentity::Recovery { .. }, _) => "on paper".into(),
            (None, ..) => "this host does not know how to reach it".into(),
        };
        let _ = writeln!(text, "slot {:<3} {} ({how}), since {}", slot.id, key(&slot.key), safe(&slot.created));
    }
    for slot in &list.removed {
        let _ = writeln!(
            text,
            "removed  slot {}: {}; still opens copies of the volume file from before",
            slot.id,
            key(&slot.key)
        );
    }
    text
}

/// `keys add-slot`, `keys remove-slot`
pub fn slot(report: &slots::Report) -> Zeroizing<String> {
    let mut text = Zeroizing::new(String::with_capacity(64 << 10));
    let _ = match report.done {
        "removed" => writeln!(text, "slot {} is removed: {}", report.slot, key(&report.key)),
        "added" => writeln!(text, "slot {} is added: {} opens the volume", report.slot, key(&report.key)),
        _ => writeln!(text, "slot {} has that key already: {}", report.slot, key(&report.key)),
    };
    if !report.recovery_shares.is_empty() {
        text.push_str("These shares are shown once and stored nowhere. Write each down for another person; each has a checksum.\n");
        for (n, share) in report.recovery_shares.iter().enumerate() {
            let _ = writeln!(
                text,
                "\nshare {} of {}, volume {}\n{}",
                n + 1,
                report.recovery_shares.len(),
                report.volume_id,
                share.as_str()
            );
        }
    }
    text
}

/// `keys backup-header`, `keys restore-header`
pub fn header(report: &slots::header::Report) -> String {
    let what = if report.restored.is_empty() { "nothing had to be changed".into() } else { report.restored.join(", ") };
    format!(
        "volume      {}\ngeneration  {}\nfile        {}\nput back    {what}\n",
        report.volume_id,
        report.generation,
        report.file.display()
    )
}

/// `audit verify`
pub fn audit(report: &audit::Report) -> String {
    let mut text = String::new();
    let verdict = &report.verdict;
    for finding in &verdict.findings {
        let place =
            if finding.line > 0 { format!("{} line {}", safe(&finding.file), finding.line) } else { "log".into() };
        let _ = writeln!(text, "broken   {place}: {}", safe(&finding.what));
    }
    for recovered in &verdict.recovered {
        let _ = writeln!(
            text,
            "note     record {}: a write before it was cut short ({} bytes are kept)",
            recovered.seq, recovered.bytes
        );
    }
    if verdict.lost > 0 {
        let _ = writeln!(text, "note     {} events could not be recorded, says the log", verdict.lost);
    }
    if let Some(volume) = &verdict.volume {
        let _ = writeln!(text, "volume   {volume}");
    }
    let at = verdict.last_time.as_deref().map_or_else(String::new, |at| format!(", at {}", safe(at)));
    let _ = writeln!(
        text,
        "records  {} in {} files, the last is number {}{at}",
        verdict.records,
        report.files.len(),
        verdict.last
    );
    if let Some(head) = &verdict.head {
        let _ = writeln!(text, "head     {head}");
    }
    text.push_str(if verdict.findings.is_empty() {
        "whole, up to here: whether more records followed shows only to --expect-head or --at-least\n"
    } else {
        "the log is not as it was written\n"
    });
    text
}

/// One record of `audit show`
pub fn record(record: &Record) -> String {
    let mut text = format!("{:>6}  {}  {:<14}", record.seq, safe(&record.time), safe(&record.event));
    fields(&mut text, &record.data);
    let login = record.login.map_or_else(String::new, |uid| format!(" (logged in as {uid})"));
    let peer =
        record.peer.map_or_else(String::new, |peer| format!(", asked by user {} process {}", peer.uid, peer.pid));
    let _ = writeln!(text, "  [user {}{login} process {} on {}{peer}]", record.uid, record.pid, safe(&record.host));
    // Each key of an erase on a line of its own.
    for key in record.data["keys"].as_array().into_iter().flatten() {
        text.push_str("       ");
        fields(&mut text, key);
        text.push('\n');
    }
    text
}

/// Fields of a record as `name=value`; what is nested, without its braces.
fn fields(text: &mut String, data: &Value) {
    let mut nested = Vec::new();
    for (name, value) in data.as_object().into_iter().flatten() {
        let value = match value {
            Value::Null => continue,
            Value::Array(_) if name == "keys" => continue,
            // Every key that this program knows; what a newer one records is shown like anything else.
            Value::Object(_) if name == "key" && KeyIdentity::deserialize(value).is_ok() => {
                KeyIdentity::deserialize(value).map(|key| key.name()).unwrap_or_default()
            }
            Value::Object(_) => {
                nested.push((name, value));
                continue;
            }
            Value::Array(items) => items.iter().map(plain).collect::<Vec<_>>().join(","),
            other => plain(other),
        };
        let _ = write!(text, " {}={}", safe(name), safe(&value));
    }
    for (name, value) in nested {
        let _ = write!(text, " {}:", safe(name));
        fields(text, value);
    }
}

/// A value without the quotes of JSON.
fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// `keys check`
pub fn keys(report: &keys::Report) -> String {
    let mut text = format!("{}\n", report.uri);
    if let Some(description) = &report.description {
        let _ = writeln!(text, "{}", key(&description.identity));
    }
    for capability in &report.capabilities {
        let works = match capability.works {
            Some(true) => "yes",
            Some(false) => "no",
            None => "?",
        };
        let _ = writeln!(text, "{:<9} {works:<4} {}", capability.name, safe(&capability.why));
    }
    for warning in report.description.iter().flat_map(|description| &description.warnings) {
        let _ = writeln!(text, "warning   {}", safe(warning));
    }
    text
}
