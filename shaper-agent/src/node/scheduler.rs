//! Who divides the CPUs: shaper's own scheduler where that is wanted, and what becomes of it.
//!
//! Limits and weights are in the files of the cgroups whoever it is; no limit is written or lifted here.

use std::path::Path;

use shaper_core::scheduler::{CpuBackend, CpuScheduler, Ejection};

use super::{Node, now};
#[cfg(feature = "scx")]
use crate::kernel::scx::Scheduler;
use crate::{
    config,
    kernel::sched_ext::{self, DIRECTORY, SchedExtError},
};

/// What is known of it.
#[derive(Default)]
pub(super) struct Cpus {
    #[cfg(feature = "scx")]
    own: Option<Scheduler>,
    /// As of the last look.
    backend: CpuBackend,
}

impl Cpus {
    #[cfg(feature = "scx")]
    fn has_own(&self) -> bool {
        self.own.is_some()
    }

    #[cfg(not(feature = "scx"))]
    fn has_own(&self) -> bool {
        false
    }
}

impl Node {
    /// Gives the CPUs to shaper's scheduler if that is wanted, and it has not been ejected.
    pub fn take_cpus(&mut self) -> Result<(), SchedExtError> {
        let is_wanted = self.config.cpu_backend == config::CpuBackend::Scx;
        if is_wanted && !self.cpus.has_own() && self.cpus.backend.ejected.is_none() {
            self.load_scheduler()?;
            tracing::info!("shaper's scheduler has the CPUs");
        }
        self.look_at_scheduler();
        Ok(())
    }

    #[cfg(feature = "scx")]
    fn load_scheduler(&mut self) -> Result<(), SchedExtError> {
        let handle = self.handle.clone();
        let ended = move |why: String| handle.try_tell(move |node| node.scheduler_ended(&why));
        self.cpus.own = Some(Scheduler::load(ended)?);
        Ok(())
    }

    #[cfg(not(feature = "scx"))]
    fn load_scheduler(&mut self) -> Result<(), SchedExtError> {
        Err(SchedExtError::NotBuilt)
    }

    /// Leaves the CPUs to the kernel's scheduler. Returns whether shaper's had them.
    pub(super) fn give_cpus_back(&mut self) -> bool {
        let had = self.cpus.has_own();
        #[cfg(feature = "scx")]
        {
            self.cpus.own = None;
        }
        self.look_at_scheduler();
        had
    }

    /// The kernel has ejected shaper's scheduler, and goes on with its own, which holds the same limits.
    fn scheduler_ended(&mut self, why: &str) {
        if !self.cpus.has_own() {
            return;
        }
        tracing::error!(
            why,
            "shaper's scheduler was ejected: the kernel's own goes on, with the same limits; a new agent tries again"
        );
        self.cpus.backend.ejected = Some(Ejection { at: now(), why: why.into() });
        self.give_cpus_back();
    }

    /// Finds out who has the CPUs: once a second, since nothing tells of others' schedulers.
    pub(super) fn look_at_scheduler(&mut self) {
        let scheduler = sched_ext::scheduler(Path::new(DIRECTORY));
        if self.cpus.has_own() && scheduler != CpuScheduler::Shaper {
            return self.scheduler_ended("it is not loaded any more");
        }
        if scheduler == self.cpus.backend.scheduler {
            return;
        }
        match &scheduler {
            CpuScheduler::Foreign { name } => tracing::warn!(
                name,
                "a sched_ext scheduler that is not shaper's is loaded: CPU limits and weights may not be in force"
            ),
            CpuScheduler::Kernel | CpuScheduler::Shaper => {
                tracing::info!("CPU limits are held by {scheduler}")
            }
        }
        self.meter.set_counts_throttling(scheduler.counts_throttling());
        self.cpus.backend.scheduler = scheduler;
    }

    /// Who has them.
    pub(super) fn cpu_backend(&self) -> &CpuBackend {
        &self.cpus.backend
    }
}
