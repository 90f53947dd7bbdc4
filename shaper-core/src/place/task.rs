//! A task as placement sees it.

use serde::{Deserialize, Serialize};

use super::{
    class::ConstraintId,
    index::Tier,
    lanes::{Amounts, LANES, Units},
    node::PLAIN,
};
use crate::spec::{Demand, Priority};

/// Which GPUs a task asks for. Memory of a GPU is in its [`Demand`], and is of each of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GpuRequest {
    /// None, but for memory of one.
    #[default]
    None,
    /// Thousandths of one, up to 1000.
    Share(u16),
    /// So many that nobody else uses.
    Whole(u8),
}

impl GpuRequest {
    /// Thousandths, of all of them.
    pub fn thousandths(self) -> u64 {
        match self {
            GpuRequest::None => 0,
            GpuRequest::Share(share) => u64::from(share),
            GpuRequest::Whole(count) => u64::from(count) * 1000,
        }
    }
}

/// What is to be placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Request {
    /// What it reserves.
    pub demand: Demand,
    /// Its GPUs.
    pub gpu: GpuRequest,
    /// What it says about the node.
    pub constraint: ConstraintId,
    /// Its priority: the same for every node, so it orders tasks, not nodes.
    pub priority: Priority,
}

impl Request {
    /// CPU, memory, network, block IO. What is not asked for is 0.
    pub(super) fn plain(&self) -> [u64; PLAIN] {
        let Demand { cpu, memory, gpu_memory: _, network, storage_io } = self.demand;
        [cpu.0, memory.0, network.map_or(0, |it| it.0), storage_io.map_or(0, |it| it.0)]
    }

    pub(super) fn gpu_memory(&self) -> u64 {
        self.demand.gpu_memory.map_or(0, |it| it.0)
    }

    /// What it wants of GPUs, roughly.
    pub(super) fn tier(&self) -> Tier {
        match self.gpu {
            GpuRequest::None => Tier::of(0, 0),
            GpuRequest::Share(share) => Tier::of(u64::from(share), 0),
            GpuRequest::Whole(count) => Tier::of(0, u64::from(count)),
        }
    }

    /// As the lanes have it.
    pub(super) fn lanes(&self, units: &Units) -> Amounts {
        let [cpu, memory, network, io] = self.plain();
        let (share, whole) = match self.gpu {
            GpuRequest::None => (0, 0),
            GpuRequest::Share(share) => (u64::from(share), 0),
            GpuRequest::Whole(count) => (0, u64::from(count)),
        };
        let amounts: [u64; LANES] = [cpu, memory, network, io, self.gpu_memory(), share, whole];
        units.round(&amounts)
    }
}
