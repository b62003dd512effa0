//! The audit log: who did what with a volume's keys, as lines of JSON of which each carries the hash of the one before.
//!
//! - [`Event`]: what is recorded; [`Renewals`]: which renewals are; [`Sink`]: appends, from any thread and several processes at once;
//! - [`verify`]: finds what was changed afterwards. docs/AUDIT.md has the records' bytes, and what no file can show by itself.
//!
//! Knows nothing of volumes, keys or services: callers hand in words, numbers and public identities. Never a name of a file,
//! contents, or a key. Calls `crypto` for ids alone.

mod event;
mod record;
mod renewals;
mod sink;
mod verify;

pub use event::{Event, Peer};
pub use record::{Head, Record, genesis};
pub use renewals::Renewals;
pub use sink::{Recorded, Sink, file_name};
pub use verify::{Expected, Finding, Kind, Recovered, Verdict, files_of, records, verify};

#[cfg(test)]
mod tests;
