//! The ceiling of a task's block IO: `shaper_core::io::split` divides it over the devices, the executor turns `io.max`.
//!
//! The division goes with what a task does, so it is made anew every half second and is this agent's alone
//! ([`Hold::Transient`]): another agent that takes the task up leaves it in force until it has divided by itself.

use std::collections::{BTreeMap, HashMap};

use shaper_common::abi::{IO_READ, IoKey, IoStat};
use shaper_core::{
    id::{BlockDevice, ExecutionId, TaskId},
    io::{Direction, Lane, protect::lowest, split::Split},
    ledger::Cause,
    limits::Limit,
    units::{Iops, Weight},
};

use super::{Node, NodeError, change::Hold, not_established};
use crate::{
    actuate::{self, Knob, Value, Wish},
    kernel::{
        cgroup::{
            Cgroup,
            block::{self, IoLimits},
        },
        disks,
        mapped::monotonic_ns,
    },
    launch,
};

/// Devices are listed again after so many divisions: ten seconds.
const LISTED: u64 = 20;

/// What is remembered of the tasks with a ceiling.
#[derive(Default)]
pub(super) struct Ceilings {
    tasks: HashMap<ExecutionId, Split>,
    devices: Vec<BlockDevice>,
    divisions: u64,
}

/// What all slots have done, if a kernel program counts it.
pub(super) type Counts = Option<BTreeMap<IoKey, IoStat>>;

impl Node {
    /// Every half second: divides the ceilings by what the tasks have done since.
    pub(super) fn divide_io(&mut self) {
        let limited: Vec<(ExecutionId, Iops)> = self
            .tasks
            .iter()
            .filter(|(_, task)| task.is_running() && task.target.is_some())
            .filter_map(|(_, task)| {
                Some((task.record.execution.clone(), task.record.limits.storage_io.at()?))
            })
            .collect();
        self.ceilings.tasks.retain(|known, _| limited.iter().any(|(execution, _)| execution == known));
        if limited.is_empty() {
            return;
        }
        if self.ceilings.divisions.is_multiple_of(LISTED) {
            self.ceilings.devices = disks::all();
        }
        self.ceilings.divisions += 1;
        let counts = match self.io_counts() {
            Ok(counts) => counts,
            Err(error) => {
                tracing::warn!(error = %launch::chain(&error), "cannot read what block IO was done");
                return;
            }
        };
        for (execution, ceiling) in limited {
            let id = &execution.task;
            let divided = self.divide_io_of(id, ceiling, &counts);
            let divided = divided.and_then(|wishes| {
                let reason = format!("{ceiling} operations a second over all devices");
                self.set_knobs(id, &wishes, Hold::Transient, &Cause::agent("io", reason))
            });
            if let Err(error) = divided {
                // A device may be gone: it is asked for those that are there then.
                self.ceilings.divisions = 0;
                tracing::warn!(task = %id, error = %launch::chain(&error), "cannot divide a ceiling of block IO");
            }
        }
    }

    /// What a change of the ceiling asks of `io.max`.
    pub(super) fn io_wishes(&mut self, id: &TaskId, ceiling: Limit<Iops>) -> Result<Vec<Wish>, NodeError> {
        let record = &self.task(id)?.record;
        let Limit::At(ceiling) = ceiling else {
            let execution = record.execution.clone();
            let of_device = |knob: &Knob| if let Knob::IoMax(device) = knob { Some(*device) } else { None };
            let devices: Vec<BlockDevice> = record.baseline.keys().filter_map(of_device).collect();
            self.ceilings.tasks.remove(&execution);
            return devices.into_iter().map(|device| self.io_wish(id, device)).collect();
        };
        self.ceilings.devices = disks::all();
        if self.ceilings.devices.is_empty() {
            return Err(NodeError::Precondition(
                "storage_io: this machine has no block device whose operations can be limited".into(),
            ));
        }
        let counts = self.io_counts()?;
        self.divide_io_of(id, ceiling, &counts)
    }

    /// What a task may do on a device now: what it has by whoever made it, its part of its ceiling, and what it is held to
    /// for others. The lowest holds.
    pub(super) fn io_wish(&self, id: &TaskId, device: BlockDevice) -> Result<Wish, NodeError> {
        let task = self.task(id)?;
        let target = task.target.as_ref().ok_or_else(not_established)?;
        let bpf = self.bpf.as_ref().ok_or_else(not_established)?;
        let record = &task.record;
        let knob = Knob::IoMax(device);
        let known = record.standing.get(&knob).or_else(|| record.baseline.get(&knob)).copied();
        let own = match known {
            Some(value) => value,
            None => actuate::read(target, bpf, knob)?,
        };
        let Value::Io(mut limits) = own else { return Ok(Wish::Exactly(knob, own)) };
        if let Some(split) = self.ceilings.tasks.get(&record.execution) {
            let caps = split.caps();
            let of = |direction| {
                caps.get(&Lane { device, direction }).copied().map_or(Limit::Unlimited, Limit::At)
            };
            limits.read_operations = of(Direction::Read);
            limits.write_operations = of(Direction::Write);
        }
        if let Some(held) = self.guards.held(&record.execution, device) {
            limits = lower(limits, held);
        }
        Ok(Wish::IoMax(device, limits))
    }

    /// What a weight of block IO asks for; refused where no device would heed it.
    pub(super) fn io_weight_wishes(&self, weight: Weight) -> Result<Vec<Wish>, NodeError> {
        let weighing = self.weighing()?;
        let any = |by| weighing.iter().any(|(_, found)| *found == by);
        let mut wishes = Vec::new();
        if any(Weighing::IoCost) {
            wishes.push(Wish::IoWeight(weight));
        }
        if any(Weighing::Bfq) {
            wishes.push(Wish::BfqWeight(weight));
        }
        if wishes.is_empty() {
            return Err(NodeError::Precondition(format!("storage_io_weight: {}", no_weights(&weighing))));
        }
        Ok(wishes)
    }

    /// How each device divides itself by weight.
    pub(super) fn weighing(&self) -> Result<Vec<(BlockDevice, Weighing)>, NodeError> {
        let mount = &self.config.hierarchies.v2;
        let root = Cgroup::open(mount, mount)?;
        let qos = root.find(block::COST_QOS)?.unwrap_or_default();
        let of = |device: BlockDevice| {
            if qos.get(&device).is_some_and(|qos| qos.enable) {
                return Weighing::IoCost;
            }
            match disks::scheduler(device) {
                Some(scheduler) if scheduler == "bfq" => Weighing::Bfq,
                scheduler => Weighing::None { scheduler: scheduler.unwrap_or_else(|| "none".into()) },
            }
        };
        Ok(disks::all().into_iter().map(|device| (device, of(device))).collect())
    }

    pub(super) fn io_counts(&self) -> Result<Counts, NodeError> {
        let bpf = self.bpf.as_ref().ok_or_else(not_established)?;
        Ok(if bpf.counts_io() { Some(bpf.block_io()?) } else { None })
    }

    /// One task's division. What is in force already the executor leaves alone.
    fn divide_io_of(&mut self, id: &TaskId, ceiling: Iops, counts: &Counts) -> Result<Vec<Wish>, NodeError> {
        let task = self.tasks.get(id).ok_or_else(|| NodeError::NoSuchTask(id.clone()))?;
        let target = task.target.as_ref().ok_or_else(not_established)?;
        let mut done: BTreeMap<Lane, u64> = BTreeMap::new();
        for device in &self.ceilings.devices {
            for direction in [Direction::Read, Direction::Write] {
                done.insert(Lane { device: *device, direction }, 0);
            }
        }
        let mut add = |device, direction, operations| {
            if let Some(count) = done.get_mut(&Lane { device, direction }) {
                *count += operations;
            }
        };
        match counts {
            Some(counts) => {
                for (key, stat) in counts.iter().filter(|(key, _)| key.slot == target.slot) {
                    // To the kernel's limits a discard is a write.
                    let direction = if key.direction == IO_READ { Direction::Read } else { Direction::Write };
                    add(BlockDevice::from_kernel(key.device), direction, stat.operations);
                }
            }
            None => {
                for (device, stat) in target.cgroup.find(block::STAT)?.unwrap_or_default() {
                    add(device, Direction::Read, stat.reads);
                    add(device, Direction::Write, stat.writes);
                }
            }
        }
        let split = self.ceilings.tasks.entry(task.record.execution.clone()).or_default();
        let caps = split.step(ceiling, &done, monotonic_ns());
        let of = |device, direction| {
            caps.get(&Lane { device, direction }).copied().map_or(Limit::Unlimited, Limit::At)
        };
        let both = |device| [of(device, Direction::Read), of(device, Direction::Write)];
        let wish = |device: &BlockDevice| {
            if self.guards.held(&task.record.execution, *device).is_some() {
                self.io_wish(id, *device)
            } else {
                Ok(Wish::IoOperations(*device, both(*device)))
            }
        };
        self.ceilings.devices.iter().map(wish).collect()
    }
}

/// Both hold.
fn lower(a: IoLimits, b: IoLimits) -> IoLimits {
    IoLimits {
        read: lowest(a.read, b.read),
        write: lowest(a.write, b.write),
        read_operations: lowest(a.read_operations, b.read_operations),
        write_operations: lowest(a.write_operations, b.write_operations),
    }
}

/// What makes a device heed weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Weighing {
    /// io.cost, by its model of the device.
    IoCost,
    /// Its scheduler is BFQ.
    Bfq,
    /// Nothing.
    None {
        /// Its scheduler.
        scheduler: String,
    },
}

/// Why weights mean nothing here, and what to do.
pub(super) fn no_weights(weighing: &[(BlockDevice, Weighing)]) -> String {
    let without = weighing.iter().filter_map(|(device, found)| match found {
        Weighing::None { scheduler } => Some(format!("{} (scheduler {scheduler})", disks::name(*device))),
        _ => None,
    });
    let without: Vec<String> = without.collect();
    format!(
        "weights have no effect on {}: io.cost is not in force, and the scheduler is not bfq. Measure the device with \
         `shaper-agent calibrate`, which puts io.cost in force, or choose bfq in /sys/block/DEVICE/queue/scheduler",
        if without.is_empty() {
            "this machine, which has no block device".into()
        } else {
            without.join(", ")
        }
    )
}
