//! A node as placement sees it, and what of it is taken.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::{
    class::{ClassId, Taint},
    lanes::{self, LANES},
    task::{GpuRequest, Request},
};
use crate::{spec::Capacity, units::Bytes};

/// Its place in the order of registration, which decides ties.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct NodeId(pub u32);

/// GPUs that a node can have.
pub const MAX_GPUS: usize = 16;
/// A whole GPU, in thousandths.
pub const WHOLE: u16 = 1000;

/// The GPUs of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gpus {
    /// How many.
    pub count: u8,
    /// Their model, by which tasks may choose.
    pub model: Option<String>,
}

/// A node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeSpec {
    /// Its name.
    pub name: String,
    /// What it has. The memory of GPUs is that of each. A node that names memory but no GPU has one.
    pub capacity: Capacity,
    /// Its GPUs.
    pub gpus: Gpus,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its taints.
    pub taints: BTreeSet<Taint>,
}

/// Whether a node takes tasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Readiness {
    /// It does.
    Ready,
    /// It keeps what it has, and takes nothing.
    Cordoned,
    /// It takes nothing, and what it has is to go elsewhere.
    Draining,
    /// Its tasks stall now for want of CPU, memory or IO.
    UnderPressure,
    /// Its agent is not there.
    Away,
}

/// Amounts of what every node has, in the order of the lanes before GPUs: CPU, memory, network, block IO.
pub(super) const PLAIN: usize = 4;

/// What a node has and what of it is taken: two lines of a cache, without the memory of GPUs.
#[derive(Clone, Debug)]
#[repr(align(64))]
pub(super) struct Node {
    /// A resource that the node does not know is `u64::MAX`: it never runs out.
    pub(super) total: [u64; PLAIN],
    pub(super) used: [u64; PLAIN],
    pub(super) class: ClassId,
    /// By what its seed score is divided: a number of the cluster's.
    pub(super) divisor: u32,
    pub(super) readiness: Readiness,
    pub(super) gpus: u8,
    /// The GPUs that have memory taken, one bit for each.
    with_memory_taken: u16,
    /// Of each GPU, thousandths that are taken: all of those that are not there.
    pub(super) taken: [u16; MAX_GPUS],
    /// Of each GPU, memory: likewise `u64::MAX` if not known.
    pub(super) gpu_memory: u64,
    /// Of each GPU, once there is any.
    gpu_memory_used: Option<Box<[u64; MAX_GPUS]>>,
}

/// Where a task is, or is to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Placement {
    /// The node.
    pub node: NodeId,
    /// Its GPUs there, one bit for each.
    pub gpus: u16,
}

impl Node {
    pub(super) fn new(spec: &NodeSpec, class: ClassId, divisor: u32) -> Node {
        let Capacity { cpu, memory, gpu_memory, network, storage_io } = spec.capacity;
        let known = |amount: Option<u64>| amount.unwrap_or(u64::MAX);
        let gpus = if gpu_memory.is_some() { spec.gpus.count.max(1) } else { spec.gpus.count };
        let mut taken = [WHOLE; MAX_GPUS];
        taken[..usize::from(gpus)].fill(0);
        Node {
            total: [cpu.0, memory.0, known(network.map(|it| it.0)), known(storage_io.map(|it| it.0))],
            used: [0; PLAIN],
            class,
            divisor,
            readiness: Readiness::Ready,
            gpus,
            with_memory_taken: 0,
            taken,
            gpu_memory: known(gpu_memory.map(|it: Bytes| it.0)),
            gpu_memory_used: None,
        }
    }

    /// Whether it takes tasks at all. Of no CPU or memory there is no share: such a node has no score.
    pub(super) fn is_open(&self) -> bool {
        self.readiness == Readiness::Ready && self.total[0] > 0 && self.total[1] > 0
    }

    pub(super) fn free(&self, resource: usize) -> u64 {
        match self.total[resource] {
            u64::MAX => u64::MAX,
            total => total.saturating_sub(self.used[resource]),
        }
    }

    pub(super) fn gpu_memory_free(&self, gpu: usize) -> u64 {
        match self.gpu_memory {
            u64::MAX => u64::MAX,
            total => total.saturating_sub(self.gpu_memory_used.as_ref().map_or(0, |used| used[gpu])),
        }
    }

    pub(super) fn gpu_numbers(&self) -> std::ops::Range<usize> {
        0..usize::from(self.gpus)
    }

    pub(super) fn is_whole(&self, gpu: usize) -> bool {
        self.wholes() >> gpu & 1 == 1
    }

    /// The GPUs that nobody uses, one bit for each.
    fn wholes(&self) -> u16 {
        let mut wholes = 0;
        for (gpu, taken) in self.taken.iter().enumerate() {
            wholes |= u16::from(*taken == 0) << gpu;
        }
        wholes & !self.with_memory_taken
    }

    /// Thousandths that are free of all its GPUs.
    pub(super) fn share_free(&self) -> u64 {
        self.shares().iter().map(|share| u64::from(*share)).sum()
    }

    /// Thousandths that are free of each GPU.
    pub(super) fn shares(&self) -> [u16; MAX_GPUS] {
        self.taken.map(|taken| WHOLE.saturating_sub(taken))
    }

    /// What is free, as the lanes have it.
    pub(super) fn lanes(&self) -> [u64; LANES] {
        // A node without a GPU whose memory it knows is not asked for that.
        let memory = if self.gpu_memory == u64::MAX || (self.with_memory_taken == 0 && self.gpus > 0) {
            self.gpu_memory
        } else {
            self.gpu_numbers().map(|gpu| self.gpu_memory_free(gpu)).max().unwrap_or(0)
        };
        let share = WHOLE.saturating_sub(self.taken.iter().fold(WHOLE, |least, taken| least.min(*taken)));
        let whole = self.wholes().count_ones();
        let [cpu, bytes, network, io] = [0, 1, 2, 3].map(|resource| self.free(resource));
        [cpu, bytes, network, io, memory, u64::from(share), u64::from(whole)]
    }

    /// Whether every resource of the request is free here, and on GPUs that are there.
    pub(super) fn has(&self, request: &Request) -> bool {
        request.plain().iter().enumerate().all(|(resource, wanted)| *wanted <= self.free(resource))
            && self.has_gpus(request)
    }

    fn has_gpus(&self, request: &Request) -> bool {
        let memory = request.gpu_memory();
        match request.gpu {
            GpuRequest::None => {
                memory == 0
                    || (self.gpus == 0 && self.gpu_memory == u64::MAX)
                    || self.gpu_numbers().any(|gpu| memory <= self.gpu_memory_free(gpu))
            }
            GpuRequest::Share(_) => self.gpu_numbers().any(|gpu| self.may_share(gpu, request)),
            GpuRequest::Whole(count) => {
                memory <= self.gpu_memory && self.wholes().count_ones() >= u32::from(count)
            }
        }
    }

    /// Whether a task that takes one GPU, or a part of it, could have this one.
    pub(super) fn may_share(&self, gpu: usize, request: &Request) -> bool {
        let share = match request.gpu {
            GpuRequest::None => 0,
            GpuRequest::Share(share) => share,
            GpuRequest::Whole(_) => WHOLE,
        };
        share <= WHOLE.saturating_sub(self.taken[gpu]) && request.gpu_memory() <= self.gpu_memory_free(gpu)
    }

    /// Whether the request fits on just these GPUs.
    pub(super) fn has_here(&self, request: &Request, gpus: u16) -> bool {
        let plain = request.plain();
        if plain.iter().enumerate().any(|(resource, wanted)| *wanted > self.free(resource)) {
            return false;
        }
        let mut given = lanes::each(gpus.into());
        let is_there = |gpu: usize| gpu < usize::from(self.gpus);
        match request.gpu {
            GpuRequest::Whole(count) => {
                gpus.count_ones() == u32::from(count)
                    && request.gpu_memory() <= self.gpu_memory
                    && gpus & !self.wholes() == 0
            }
            GpuRequest::None if gpus == 0 => {
                request.gpu_memory() == 0 || self.gpus == 0 && self.has_gpus(request)
            }
            GpuRequest::None | GpuRequest::Share(_) => {
                gpus.count_ones() == 1 && given.all(|gpu| is_there(gpu) && self.may_share(gpu, request))
            }
        }
    }

    /// The first whole GPUs, so many.
    pub(super) fn whole_gpus(&self, count: u8) -> u16 {
        let (mut left, mut gpus) = (self.wholes(), 0);
        for _ in 0..count {
            gpus |= left & left.wrapping_neg();
            left &= left.wrapping_sub(1);
        }
        gpus
    }

    /// Books a task, or with `give_back` takes it off the books.
    pub(super) fn book(&mut self, request: &Request, gpus: u16, give_back: bool) {
        let change = |value: &mut u64, by: u64| {
            *value = if give_back { value.saturating_sub(by) } else { value.saturating_add(by) };
        };
        for (used, wanted) in self.used.iter_mut().zip(request.plain()) {
            change(used, wanted);
        }
        let (share, memory) = match request.gpu {
            GpuRequest::None => (0, request.gpu_memory()),
            GpuRequest::Share(share) => (share, request.gpu_memory()),
            GpuRequest::Whole(_) => (WHOLE, request.gpu_memory()),
        };
        for gpu in lanes::each(gpus.into()) {
            let taken = self.taken[gpu];
            self.taken[gpu] =
                if give_back { taken.saturating_sub(share) } else { taken.saturating_add(share) };
            if memory > 0 {
                let used = &mut self.gpu_memory_used.get_or_insert_default()[gpu];
                change(used, memory);
                self.with_memory_taken &= !(1 << gpu);
                self.with_memory_taken |= u16::from(*used > 0) << gpu;
            }
        }
    }
}
