//! Keys, key derivation and the one cipher. No I/O but the operating system's random numbers.
//!
//! Everything here is fixed by `docs/FORMAT.md` section 2 and argued in `docs/CRYPTOGRAPHY.md`. Key bytes are
//! reachable only inside closures; no type that owns them is `Clone`, `Debug` or serialisable.

pub mod aead;
pub mod arena;
pub mod ids;
pub mod kdf;
pub mod random;
pub mod recovery;
pub mod secret;

pub use aead::{NONCE_LEN, TAG_LEN, Unauthentic};
pub use ids::{ObjectId, VolumeId};
pub use secret::Key32;
