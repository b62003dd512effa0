//! Custody with the real binary, mounts and a real OpenBao: the audit log, `revoke` and `restore`, slots, recovery shares, saved
//! headers. Needs root, `/dev/fuse` and a `bao`.
#![allow(clippy::unwrap_used, missing_docs)]

mod audit;
mod erase;
mod revoke;
mod servers;
mod slots;
#[path = "../support/mod.rs"]
mod support;
mod world;
