//! The filesystem: POSIX operations by node id on our own types ([`Filesystem`](core::Filesystem)), and the thin adapter that
//! speaks `fuser` ([`adapter`]). Nothing but the adapter and the session knows that FUSE exists.
//!
//! - [`inode`] node ids, where each object is in the backing tree, its open descriptor and state;
//! - [`core`] the shared part; [`namespace`] names; [`data`] contents; [`attributes`] stat and xattrs;
//! - `check` what a check of a live volume needs; `damage` what is told of damage;
//! - [`errno`] the one table from failures to errno; [`adapter`] fuser; [`session`] mounting, threads;
//! - [`gate`] who may pass, and [`seal`] how a live mount is sealed, purged, scrubbed ([`scrub`]) and opened again; [`owed`] and
//!   [`refuser`] what a disk that hangs would hold up.

pub mod adapter;
pub mod attributes;
mod check;
pub mod core;
#[cfg(test)]
mod crash_tests;
mod damage;
pub mod data;
pub mod errno;
pub mod gate;
pub mod inode;
pub mod namespace;
pub mod notify;
pub mod owed;
pub mod refuser;
pub mod scrub;
pub mod seal;
pub mod session;
