//! Checking a log: every line against its own hash, its number, and the line before. Reads only.

use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::record::{Head, Record, decode, genesis, sha256};
use crate::crypto::VolumeId;
use crate::crypto::ids::{hex, unhex};

/// What somebody knows of a log from elsewhere.
#[derive(Clone, Copy, Debug, Default)]
pub struct Expected {
    /// The hash of a record that must be there: a head that was noted earlier.
    pub head: Option<[u8; 32]>,
    /// There are at least so many records.
    pub at_least: Option<u64>,
    /// The hash of the record before the first: earlier files were put away.
    pub after: Option<[u8; 32]>,
}

/// What is wrong in one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A line that is not a record as it was written, and that no `recovered` record after it accounts for.
    Altered,
    /// It does not follow the record before: something was removed, put in, moved or doubled.
    Chain,
    /// The log does not begin with the first record.
    Beginning,
    /// A record of another volume.
    Foreign,
    /// The last line has no end: a write was cut short, or the file was. The next record will mark it.
    TornEnd,
    /// A `recovered` record that does not fit what stands before it, or marks a damaged record.
    Recovery,
    /// Less than what was expected: the end was cut off.
    Missing,
}

/// One finding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What.
    pub kind: Kind,
    /// The file's name.
    pub file: String,
    /// The line, from 1; 0: the log as a whole.
    pub line: u64,
    /// One line for people.
    pub what: String,
}

/// A crash's trace: bytes that a `recovered` record accounts for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Recovered {
    /// Number of the record that says so.
    pub seq: u64,
    /// Bytes kept before it.
    pub bytes: u64,
}

/// The result.
#[derive(Clone, Debug, Serialize)]
pub struct Verdict {
    /// The volume, if any record tells.
    pub volume: Option<VolumeId>,
    /// Records that are as they were written.
    pub records: u64,
    /// Number of the last.
    pub last: u64,
    /// Hash of the last, hex: note it elsewhere to find out later whether the end was cut off.
    pub head: Option<String>,
    /// Time of the last.
    pub last_time: Option<String>,
    /// Events that the log itself says are lost.
    pub lost: u64,
    /// Writes that were cut short.
    pub recovered: Vec<Recovered>,
    /// What is wrong. Empty: nothing that the files can show.
    pub findings: Vec<Finding>,
}

/// The number of a full file named `NAME.N`.
pub(super) fn number_of(entry: &str, name: &str) -> Option<u64> {
    let digits = entry.strip_prefix(name)?.strip_prefix('.')?;
    let plain = !digits.starts_with('0') && digits.bytes().all(|b| b.is_ascii_digit());
    plain.then(|| digits.parse().ok()).flatten()
}

/// A log's files in their order: the full ones that are still there, then the one that records go to.
///
/// # Errors
/// The system's.
pub fn files_of(path: &Path) -> io::Result<Vec<PathBuf>> {
    let name = path.file_name().and_then(|name| name.to_str()).ok_or(io::ErrorKind::InvalidInput)?;
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut numbers = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        numbers.extend(entry?.file_name().to_str().and_then(|entry| number_of(entry, name)));
    }
    numbers.sort_unstable();
    let mut files: Vec<PathBuf> = numbers.iter().map(|number| dir.join(format!("{name}.{number}"))).collect();
    // Between giving a full file its number and the next record there is none.
    if files.is_empty() || std::fs::symlink_metadata(path).is_ok() {
        files.push(path.to_owned());
    }
    Ok(files)
}

/// Every line of these files that is a record as it was written, in order, whatever else is wrong.
///
/// # Errors
/// The system's.
pub fn records(files: &[PathBuf], mut each: impl FnMut(Record)) -> io::Result<u64> {
    let mut other = 0;
    for file in files {
        for line in std::fs::read(file)?.split_inclusive(|byte| *byte == b'\n') {
            match decode(line) {
                Some((record, _)) => each(record),
                None => other += 1,
            }
        }
    }
    Ok(other)
}

/// Checks a log's files, in their order.
///
/// # Errors
/// The system's.
pub fn verify(files: &[PathBuf], expected: &Expected) -> io::Result<Verdict> {
    let mut check = Check::new(expected);
    for file in files {
        let name = file.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let stem = name.split('.').next().and_then(unhex::<16>).map(VolumeId);
        check.file(name, stem, &std::fs::read(file)?);
    }
    Ok(check.end())
}

struct Check<'a> {
    expected: &'a Expected,
    verdict: Verdict,
    head: Option<Head>,
    met: bool,
    file: String,
    line: u64,
}

impl<'a> Check<'a> {
    fn new(expected: &'a Expected) -> Self {
        let verdict = Verdict {
            volume: None,
            records: 0,
            last: 0,
            head: None,
            last_time: None,
            lost: 0,
            recovered: Vec::new(),
            findings: Vec::new(),
        };
        Self { expected, verdict, head: None, met: false, file: String::new(), line: 0 }
    }

    fn find(&mut self, kind: Kind, line: u64, what: impl Into<String>) {
        self.verdict.findings.push(Finding { kind, file: self.file.clone(), line, what: what.into() });
    }

    fn file(&mut self, name: String, stem: Option<VolumeId>, bytes: &[u8]) {
        self.file = name;
        self.line = 0;
        self.verdict.volume = self.verdict.volume.or(stem);
        // Lines that are no records, until a record comes: what it says of them decides.
        let mut pending: Vec<u8> = Vec::new();
        let mut pending_from = 0;
        for line in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.line += 1;
            if line.last() != Some(&b'\n') {
                let rest = line.len();
                self.find(
                    Kind::TornEnd,
                    self.line,
                    format!("the last {rest} bytes have no line end: an unfinished or cut record"),
                );
                break;
            }
            match decode(line) {
                Some((record, head)) => {
                    self.record(&record, head, std::mem::take(&mut pending), pending_from);
                }
                None => {
                    if pending.is_empty() {
                        pending_from = self.line;
                    }
                    pending.extend_from_slice(line);
                }
            }
        }
        if !pending.is_empty() {
            self.find(Kind::Altered, pending_from, "not a record as it was written");
        }
    }

    fn record(&mut self, record: &Record, head: Head, pending: Vec<u8>, pending_from: u64) {
        let volume = *self.verdict.volume.get_or_insert(record.volume);
        if record.volume != volume {
            self.find(Kind::Foreign, self.line, format!("a record of volume {}", record.volume));
        }
        let recovery = (record.event == "recovered").then_some(&record.data);
        let completed = recovery.is_some_and(|data| data["kind"] == "completed");
        match recovery.filter(|_| !completed) {
            Some(data) => {
                let bytes = pending.len() as u64;
                if pending.is_empty() || data["bytes"] != bytes || data["sha256"] != hex(&sha256(&pending)) {
                    let line = if pending.is_empty() { self.line } else { pending_from };
                    self.find(Kind::Recovery, line, "what stands before a `recovered` record is not what it describes");
                } else if data["kind"] == "torn" {
                    self.verdict.recovered.push(Recovered { seq: record.seq, bytes });
                } else {
                    self.find(Kind::Recovery, pending_from, "a record was damaged before the next one was written");
                }
            }
            None if !pending.is_empty() => self.find(Kind::Altered, pending_from, "not a record as it was written"),
            None if completed => self.verdict.recovered.push(Recovered { seq: record.seq, bytes: 0 }),
            None => {}
        }
        match self.head {
            None => self.first(record, volume),
            Some(before) if record.seq != before.seq + 1 => {
                let what = format!("record {} follows record {}", record.seq, before.seq);
                self.find(Kind::Chain, self.line, what);
            }
            Some(before) if record.prev != hex(&before.hash) => {
                let what = format!("record {} does not carry the hash of the line before", record.seq);
                self.find(Kind::Chain, self.line, what);
            }
            Some(_) => {}
        }
        if record.event == "lost" {
            self.verdict.lost += record.data["count"].as_u64().unwrap_or(0);
        }
        self.met |= self.expected.head == Some(head.hash);
        self.head = Some(head);
        self.verdict.records += 1;
        self.verdict.last = record.seq;
        self.verdict.head = Some(hex(&head.hash));
        self.verdict.last_time = Some(record.time.clone());
    }

    fn first(&mut self, record: &Record, volume: VolumeId) {
        let good = match self.expected.after {
            Some(after) => record.prev == hex(&after),
            None => record.seq == 1 && record.prev == hex(&genesis(volume).hash),
        };
        if !good {
            let what = format!("the log begins with record {}, and what came before is not here", record.seq);
            self.find(Kind::Beginning, self.line, what);
        }
    }

    fn end(mut self) -> Verdict {
        if self.expected.head.is_some() && !self.met {
            self.find(
                Kind::Missing,
                0,
                "no record has the expected hash: the end was cut off, or all was written anew",
            );
        }
        if let Some(least) = self.expected.at_least.filter(|least| *least > self.verdict.last) {
            let what =
                format!("it ends with record {}, and {least} were expected: the end was cut off", self.verdict.last);
            self.find(Kind::Missing, 0, what);
        }
        self.verdict
    }
}
