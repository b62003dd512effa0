//! lethefs: an encrypting FUSE filesystem whose volumes die with one key in a remote KMS.
//!
//! Layers, each importing only from those below it (`tests/layering.rs` checks it):
//!
//! ```text
//! cli      arguments, exit codes, what people read
//! service  one file per verb: init, mount, umount, status, erase, keys; trust, control socket
//! fs       POSIX operations on node ids, the fuser adapter, errno table
//! volume   format: volume file, headers, names, contents, symlinks, nodes, xattrs, backing storage
//! keyring  custody of KEKs and object keys
//! kms      key services
//! audit    the audit log: records in a chain of hashes
//! crypto   keys, derivation, cipher, arena        sys  the only unsafe
//! ```
//!
//! `docs/ARCHITECTURE.md` is the guide to the rooms.

pub mod audit;
pub mod cli;
pub mod crypto;
pub mod fs;
pub mod keyring;
pub mod kms;
pub mod service;
pub mod sys;
pub mod volume;
