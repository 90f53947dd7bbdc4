//! What a node offers, as data: the ladder of fallbacks with what was found on this kernel.

use serde::{Deserialize, Serialize};

/// Whether a feature is there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Availability {
    /// It is.
    Available,
    /// The kernel does not have it.
    Missing {
        /// How that was seen.
        evidence: String,
    },
    /// It may be there, but this process may not use it, or the probe failed for another reason.
    Unusable {
        /// Why, and what to do.
        reason: String,
    },
}

/// One rung: a feature, what shaper does with it, and what it does without.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rung {
    /// Stable name.
    pub feature: String,
    /// What it is for.
    pub used_for: String,
    /// Whether it is there.
    pub availability: Availability,
    /// What happens where it is missing.
    pub degrades_to: String,
}

/// The report of `shaper doctor`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// `uname -r`.
    pub kernel: String,
    /// The name this agent has.
    pub node: String,
    /// `unified`, `hybrid` or `none`.
    pub cgroups: String,
    /// Where the agent's cgroups are.
    pub cgroup_root: String,
    /// Where the pins are.
    pub bpffs_dir: String,
    /// Devices whose egress is counted, each with the form of attachment.
    pub uplinks: Vec<String>,
    /// The GPU cards.
    pub gpus: Vec<String>,
    /// The ladder.
    pub rungs: Vec<Rung>,
}
