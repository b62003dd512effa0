//! Nonces from the operating system's generator, fetched in batches so that a block costs no system call of its own.

use std::cell::RefCell;

use super::NONCE_LEN;

/// Nonces per fetch: one system call for 1 MiB of blocks.
const BATCH: usize = 256;

struct Pool {
    bytes: [u8; BATCH * NONCE_LEN],
    used: usize,
}

thread_local! {
    static POOL: RefCell<Pool> = const { RefCell::new(Pool { bytes: [0; BATCH * NONCE_LEN], used: BATCH * NONCE_LEN }) };
}

/// A random 96-bit nonce.
///
/// A fork would share the batch with the child: the daemon forks before its first nonce. Even a repeated nonce would only
/// show that two equal blocks at one place are equal (RFC 8452 is resistant to misuse).
///
/// # Errors
/// The generator's.
pub fn nonce() -> Result<[u8; NONCE_LEN], getrandom::Error> {
    POOL.with_borrow_mut(|pool| {
        if pool.used == pool.bytes.len() {
            getrandom::fill(&mut pool.bytes)?;
            pool.used = 0;
        }
        let mut nonce = [0; NONCE_LEN];
        nonce.copy_from_slice(&pool.bytes[pool.used..pool.used + NONCE_LEN]);
        pool.used += NONCE_LEN;
        Ok(nonce)
    })
}
