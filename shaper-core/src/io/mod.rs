//! Block IO, where the kernel's own means say less than people want to.
//!
//! - [`split`]: one ceiling of operations a second over all devices, reads and writes together, where `io.max` has a
//!   knob for each device and direction.
//! - [`protect`]: tasks that are promised a latency, against those that make the device slow.
//!
//! Nothing here knows a cgroup file: what comes in are counts, what goes out are rates.

pub mod protect;
pub mod split;

use serde::{Deserialize, Serialize};

use crate::id::BlockDevice;

/// Which way data goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// From the device.
    Read,
    /// To it.
    Write,
}

/// What has a knob of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Lane {
    /// The device, a whole one.
    pub device: BlockDevice,
    /// The direction.
    pub direction: Direction,
}
