//! The real binary against somebody who can write the backing store, names keys of his own, or whose key service fails:
//! never wrong bytes, never a request to him, never a hang. Needs root, `/dev/fuse`, and for some a real OpenBao.
#![allow(clippy::unwrap_used, missing_docs)]

mod erase;
mod kms_trouble;
mod store;
#[path = "../support/mod.rs"]
mod support;
mod tamper;
mod trust;
