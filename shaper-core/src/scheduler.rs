//! Who divides the CPUs, and so whether what is in the files of a cgroup is in force.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::task::UnixNanos;

/// The scheduler that has the CPUs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CpuScheduler {
    /// The kernel's own: it holds `cpu.max` and `cpu.weight`.
    #[default]
    Kernel,
    /// shaper's, by sched_ext: it holds the same files.
    Shaper,
    /// Somebody else's, by sched_ext: the files may mean nothing to it.
    Foreign {
        /// What it calls itself.
        name: String,
    },
}

impl CpuScheduler {
    /// Whether the files are known to be in force.
    pub fn heeds_limits(&self) -> bool {
        !matches!(self, CpuScheduler::Foreign { .. })
    }

    /// Whether `cpu.stat` tells how long a limit has stopped a task. Only the kernel's own scheduler counts that.
    pub fn counts_throttling(&self) -> bool {
        matches!(self, CpuScheduler::Kernel)
    }
}

impl fmt::Display for CpuScheduler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CpuScheduler::Kernel => f.write_str("the kernel's scheduler"),
            CpuScheduler::Shaper => f.write_str("shaper's scheduler (sched_ext)"),
            CpuScheduler::Foreign { name } => {
                write!(f, "the sched_ext scheduler `{name}`, which may ignore CPU limits and weights")
            }
        }
    }
}

/// That shaper's scheduler ended before it was told to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ejection {
    /// When that was noticed.
    pub at: UnixNanos,
    /// The kernel's words.
    pub why: String,
}

/// The backend for CPU limits and weights.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuBackend {
    /// Who has the CPUs.
    pub scheduler: CpuScheduler,
    /// shaper's own scheduler had them, and lost them.
    pub ejected: Option<Ejection>,
}

impl fmt::Display for CpuBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.scheduler)?;
        match &self.ejected {
            Some(Ejection { why, .. }) => write!(f, "; shaper's was ejected: {why}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_force_is_said_with_what_was_lost() {
        let mut backend = CpuBackend::default();
        assert_eq!(backend.to_string(), "the kernel's scheduler");
        backend.ejected = Some(Ejection { at: 1, why: "disabled by sysrq-S".into() });
        let text = "the kernel's scheduler; shaper's was ejected: disabled by sysrq-S";
        assert_eq!(backend.to_string(), text);
    }

    #[test]
    fn limits_are_in_force_with_all_but_foreign_schedulers() {
        let foreign = CpuScheduler::Foreign { name: "rusty".into() };
        assert!(CpuScheduler::Kernel.heeds_limits() && CpuScheduler::Shaper.heeds_limits());
        assert!(!foreign.heeds_limits());
        assert!(CpuScheduler::Kernel.counts_throttling());
        assert!(!CpuScheduler::Shaper.counts_throttling() && !foreign.counts_throttling());
    }
}
