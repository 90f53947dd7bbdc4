//! The ceiling of a task's block IO: `shaper_core::io::split` divides it over the devices, the executor turns `io.max`.
//!
//! The division goes with what a task does, so it is made anew every half second and is this agent's alone
//! ([`Hold::Transient`]): another agent that takes the task up leaves it in force until it has divided by itself.

use std::collections::{BTreeMap, HashMap};

use shaper_common::abi::{IO_READ, IoKey, IoStat};
use shaper_core::{
    id::{BlockDevice, ExecutionId, TaskId},
    io::{Direction, Lane, split::Split},
    ledger::Cause,
    limits::Limit,
    units::Iops,
};

use super::{Node, NodeError, change::Hold, not_established};
use crate::{
    actuate::{Knob, Wish},
    kernel::{cgroup::block, disks, mapped::monotonic_ns},
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
type Counts = Option<BTreeMap<IoKey, IoStat>>;

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
            let before = record.baseline.iter().filter(|(knob, _)| matches!(knob, Knob::IoMax(_)));
            let wishes = before.map(|(knob, value)| Wish::Exactly(*knob, *value)).collect();
            let execution = record.execution.clone();
            self.ceilings.tasks.remove(&execution);
            return Ok(wishes);
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

    fn io_counts(&self) -> Result<Counts, NodeError> {
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
        let devices = self.ceilings.devices.iter();
        Ok(devices.map(|device| Wish::IoOperations(*device, both(*device))).collect())
    }
}
