//! Key bytes on their way between the KMS, the arena and the cipher.

use subtle::ConstantTimeEq;
use zeroize::{Zeroize, Zeroizing};

/// 32 secret bytes on the heap, wiped on drop.
///
/// Short-lived by intent: a key that stays lives in the [`arena`](super::arena). Not `Clone`, `Debug` or serialisable;
/// the bytes are seen only inside [`Key32::expose`].
pub struct Key32(Box<[u8; 32]>);

impl Key32 {
    /// A new key whose bytes `fill` writes in place, so that no copy is left on the stack.
    pub fn fill_with<E>(fill: impl FnOnce(&mut [u8; 32]) -> Result<(), E>) -> Result<Self, E> {
        let mut key = Self(Box::new([0; 32]));
        fill(&mut key.0)?;
        Ok(key)
    }

    /// A new key from the operating system's random number generator.
    ///
    /// # Errors
    /// The generator's, which Linux gives only before its pool is first seeded or under a seccomp filter.
    pub fn random() -> Result<Self, getrandom::Error> {
        Self::fill_with(|bytes| getrandom::fill(bytes))
    }

    /// Takes 32 bytes out of a buffer, which is wiped. `None` if it holds another number of bytes.
    pub fn from_zeroizing(bytes: Zeroizing<Vec<u8>>) -> Option<Self> {
        let fixed: &[u8; 32] = bytes.as_slice().try_into().ok()?;
        let mut key = Self(Box::new([0; 32]));
        key.0.copy_from_slice(fixed);
        Some(key)
    }

    /// Shows the bytes to `f`. `f` must not copy them anywhere that outlives it.
    pub fn expose<T>(&self, f: impl FnOnce(&[u8; 32]) -> T) -> T {
        f(&self.0)
    }

    /// Equality in constant time.
    pub fn same_as(&self, other: &Self) -> bool {
        self.0.ct_eq(other.0.as_ref()).into()
    }
}

impl Drop for Key32 {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}
