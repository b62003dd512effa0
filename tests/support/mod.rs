//! What several test binaries share. Each uses a part of it.
#![allow(dead_code)]

pub(crate) mod at_openbao;
#[cfg(feature = "kms-aws")]
pub(crate) mod aws;
pub(crate) mod cluster;
pub(crate) mod disk;
pub(crate) mod faulty;
pub(crate) mod fuse_for_all;
pub(crate) mod openbao;
pub(crate) mod softhsm;
pub(crate) mod volume;
pub(crate) mod writers;
