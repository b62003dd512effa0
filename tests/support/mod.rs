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

/// Bytes that compress and repeat nowhere near a block.
pub(crate) fn bytes(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    std::iter::repeat_with(next).take(len).collect()
}
