//! What `status` says of a lease.

use serde::{Deserialize, Serialize};

/// Where a lease stands, and what its bounds are.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CustodyStatus {
    /// The slot whose key service was asked last.
    pub slot: u32,
    /// `active`, `grace`, `expired`, `revoked`, `held`, `destroyed`; `sealing` or `resuming` on the way.
    pub state: String,
    /// Since when, RFC 3339.
    pub since: String,
    /// Seconds since the newest proof was asked for.
    pub proved_ago_s: f64,
    /// Seconds until the key service is asked again. Null: it will not be.
    pub next_proof_in_s: Option<f64>,
    /// Seconds until the mount is sealed if no answer comes. Null: it is sealed.
    pub seals_in_s: Option<f64>,
    /// `--renew-interval`.
    pub renew_interval_s: f64,
    /// `--grace`.
    pub grace_s: f64,
    /// While the key service answers: from its refusing the key to the last use of old plaintext, at most.
    pub bound_connected_s: f64,
    /// Cut off from the key service: the same, at most.
    pub bound_partitioned_s: f64,
    /// Proofs since the mount.
    pub proofs: u64,
    /// How the newest attempt failed, if it did: a class of docs/KMS.md.
    pub failure: Option<String>,
    /// The newest seal.
    pub last_seal: Option<serde_json::Value>,
}
