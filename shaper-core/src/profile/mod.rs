//! What tasks need, learnt from what they did.
//!
//! A request is a guess, and nobody guesses well: what is asked for and not used is lost to others, and what is not asked
//! for is missed. Here each guess is replaced by a figure that was measured, and by a rule that says what a mistake costs.
//!
//! # The rule
//!
//! A limit `L` above use `x` wastes the share `1 − x/L` of itself; below demand it leaves `x − L` unserved. Both have a
//! price ([`Prices`]), in one currency: an hour of a limit of which nothing is used. What `L` costs an hour, if the use of
//! the next sample is distributed as `P`, is
//!
//! ```text
//! cost(L) = Σ P(x) · ( waste · max(0, 1 − x/L)  +  unserved · max(0, x − L)/mean  +  touched · [x > L] )
//! ```
//!
//! and the best limit is the one that costs least. A percentile is the same thing for one shape of distribution: with
//! prices, a task whose use is even gets a tight limit and a high percentile, and one that is idle and then bursts
//! gets whatever of the two is worth it. That is the cost that Google's Autopilot minimises (Rzadca et al., EuroSys '20,
//! §3.2.2), over a distribution that knows more:
//!
//! # The distribution
//!
//! `P` is not what the task uses at any time, but what it uses *next*, given what it uses *now*. A [`Model`] counts, for each
//! **level** (the most of the last [`RECENT`] samples, in steps of about a fifth), how often each use followed it; counts
//! fade with a half-life, by the time that was seen or the time that has passed, whichever is less: what is run once a week is not
//! forgotten between, and what is run a hundred times at once does not fade a hundred times as fast. Beside what was seen at this level weighs, as if it had been seen for half an hour, a guess for
//! what was never seen: half of it that use goes up by a fifth, half that it does what it does at any time.
//!
//! # When a limit changes
//!
//! A change costs something, too: writes, a place in a log, somebody who wonders. What is lost in each hour by not changing,
//! `cost(in force) − cost(best)`, adds up; once it has reached the price of a change, the limit changes. (That is
//! how long one rents skis before one buys them, and for the same reason it is never more than twice as dear as knowing
//! the future.) A limit that does harm is left within a sample or two; one that is a little too high within hours.
//!
//! # What is not seen
//!
//! Use is cut off by the limit: a task that is throttled does not show what it wants. The kernel says that it was cut off
//! ([`Unmet`]), and then more is booked than was seen: [`Sample::demand`].
//!
//! [`vpa`] is the rule of Kubernetes' Vertical Pod Autoscaler, exactly, for comparison. `cargo xtask bench rightsize`
//! compares them on recorded use (docs/benchmarks.md).

mod model;
mod tracker;
pub mod vpa;

#[cfg(test)]
mod tests;

pub use model::{Expected, Model};
pub use tracker::{Advice, Reason, Tracker};

use serde::{Deserialize, Serialize};

use crate::{spec::Priority, task::UnixNanos, units::Micros};

/// How many samples make a level: the most that was used in them.
pub const RECENT: usize = 3;

/// What is learnt about. Each has its own unit, in which all figures of it are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Resource {
    /// Millicores, a mean over the sample.
    Cpu,
    /// Bytes, the most in the sample.
    Memory,
    /// Bit/s received, on the wire.
    NetworkIn,
    /// Bit/s sent, on the wire.
    NetworkOut,
    /// Reads and writes a second.
    StorageIo,
    /// Bytes on one device, the most in the sample.
    GpuMemory,
}

impl Resource {
    /// All of them.
    pub const ALL: [Resource; 6] =
        [Self::Cpu, Self::Memory, Self::NetworkIn, Self::NetworkOut, Self::StorageIo, Self::GpuMemory];

    /// The least limit that is ever advised: what can be enforced, or the least that is worth telling from nothing.
    pub const fn least(self) -> u64 {
        match self {
            // A quota is at least 1 ms of 100 ms.
            Self::Cpu => 10,
            Self::Memory | Self::GpuMemory => 1 << 20,
            Self::NetworkIn | Self::NetworkOut => 10_000,
            Self::StorageIo => 1,
        }
    }

    /// The field's name in profiles, without its unit.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Memory => "memory",
            Self::NetworkIn => "network_in",
            Self::NetworkOut => "network_out",
            Self::StorageIo => "storage_io",
            Self::GpuMemory => "gpu_memory",
        }
    }
}

/// How a task was kept from what it wanted, during a sample.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Unmet {
    /// It was not.
    #[default]
    Nothing,
    /// It was made to wait for this share of the time, 0 to 1: throttled, or stalled for memory.
    Waited(f64),
    /// It was killed for want of memory.
    Killed,
}

/// What a task used in a stretch of time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    /// In the unit of the resource.
    pub used: u64,
    /// How long the stretch was. About a minute is meant.
    pub over: Micros,
    /// When it ended.
    pub at: UnixNanos,
    /// Whether it wanted more.
    pub unmet: Unmet,
}

impl Sample {
    /// After a kill, at least so much more was wanted. The figures are VPA's (`oom-bump-up-ratio`, `oom-min-bump-up-bytes`).
    const KILLED_RATIO: f64 = 1.2;
    const KILLED_BYTES: f64 = 100.0 * 1024.0 * 1024.0;

    /// What it would have used: what it used, and as much more as it waited; at least a fifth or 100 MiB more
    /// where it was killed.
    #[expect(clippy::cast_precision_loss, reason = "a figure of five per cent's precision")]
    pub fn demand(&self) -> f64 {
        let used = self.used as f64;
        match self.unmet {
            Unmet::Nothing => used,
            Unmet::Waited(share) => used * (1.0 + share.clamp(0.0, 1.0)),
            Unmet::Killed => (used * Self::KILLED_RATIO).max(used + Self::KILLED_BYTES),
        }
    }

    #[expect(clippy::cast_precision_loss, reason = "a stretch of time is far below 2^53 µs")]
    fn hours(&self) -> f64 {
        self.over.0 as f64 / 3.6e9
    }
}

/// What mistakes cost, in hours of a limit of which nothing is used.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Prices {
    /// To leave as much unserved as the task uses on average, for an hour.
    pub unserved: f64,
    /// To be at the limit, whatever is missed there, for an hour.
    pub touched: f64,
    /// A change.
    pub change: f64,
    /// How much of a limit is worth a change at all.
    pub dead_band: f64,
    /// After how many hours something seen counts half.
    pub half_life: f64,
}

impl Prices {
    /// What a limit costs an hour, of which `expected` is to be expected.
    pub fn cost(&self, expected: &Expected) -> f64 {
        expected.unused + self.unserved * expected.unserved + self.touched * expected.touched
    }

    /// What is usual for a task of `priority`: the higher, the more room it is worth.
    pub const fn of(resource: Resource, priority: Priority) -> Prices {
        let (unserved, touched, half_life) = match (resource, priority) {
            // What is short here is not served later: the task grows, or is killed.
            (Resource::Memory | Resource::GpuMemory, Priority::High) => (50.0, 50.0, 48.0),
            (Resource::Memory | Resource::GpuMemory, Priority::Medium) => (5.0, 5.0, 48.0),
            (Resource::Memory | Resource::GpuMemory, Priority::Low) => (0.5, 0.5, 48.0),
            (_, Priority::High) => (30.0, 5.0, 24.0),
            (_, Priority::Medium) => (15.0, 2.0, 24.0),
            (_, Priority::Low) => (6.0, 0.5, 24.0),
        };
        Prices { unserved, touched, change: 0.5, dead_band: 0.05, half_life }
    }
}
