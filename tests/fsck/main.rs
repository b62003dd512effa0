//! `lethefs fsck` on real volumes: every kind of damage is told by its name, what can be repaired is, nothing that could be
//! read is lost, and a live volume is checked as it is.
#![allow(clippy::unwrap_used, missing_docs)]

mod deputy;
mod live;
mod repair;
#[path = "../support/mod.rs"]
mod support;
mod world;
