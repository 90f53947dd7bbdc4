//! The ceiling of a task's block IO: `shaper_core::io::split` divides it over the devices, the executor turns `io.max`.
//!
//! The division goes with what a task does, so it is made anew every half second and is this agent's alone
//! ([`Hold::Transient`]): another agent that takes the task up divides by itself, from the ceiling.

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
    kernel::{
        cgroup::block::{self, IoLimits},
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
    tasks: HashMap<ExecutionId, Divided>,
    devices: Vec<BlockDevice>,
    divisions: u64,
}

#[derive(Default)]
struct Divided {
    split: Split,
    /// What was asked of the executor.
    limits: BTreeMap<BlockDevice, IoLimits>,
}

/// What all slots have done, if a kernel program counts it.
type Counts = Option<BTreeMap<IoKey, IoStat>>;

impl Node {
    /// Every half second: divides the ceilings by what the tasks have done since.
    pub(super) fn divide_io(&mut self) {
        let limited: Vec<(TaskId, Iops)> = self
            .tasks
            .iter()
            .filter(|(_, task)| task.is_running() && task.target.is_some())
            .filter_map(|(id, task)| Some((id.clone(), task.record.limits.storage_io.at()?)))
            .collect();
        let is_limited = |execution: &ExecutionId| limited.iter().any(|(id, _)| *id == execution.task);
        self.ceilings.tasks.retain(|execution, _| is_limited(execution));
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
        for (id, ceiling) in limited {
            let divided = self.divide_io_of(&id, ceiling, &counts);
            let divided = divided.and_then(|wishes| {
                let reason = format!("{ceiling} operations a second over all devices");
                self.set_knobs(&id, &wishes, Hold::Transient, &Cause::agent("io", reason))
            });
            if let Err(error) = divided {
                // What was there before is there again; all of it is asked for anew, of the devices that are there then.
                self.ceilings.tasks.retain(|execution, _| execution.task != id);
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

    /// One task's division: what has to change for it.
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
        let divided = self.ceilings.tasks.entry(task.record.execution.clone()).or_default();
        let caps = divided.split.step(ceiling, &done, monotonic_ns());
        let mut limits: BTreeMap<BlockDevice, IoLimits> = BTreeMap::new();
        for (lane, cap) in caps {
            let of_device = limits.entry(lane.device).or_default();
            match lane.direction {
                Direction::Read => of_device.read_operations = Limit::At(cap),
                Direction::Write => of_device.write_operations = Limit::At(cap),
            }
        }
        let is_new = |device: &BlockDevice, limits: &IoLimits| divided.limits.get(device) != Some(limits);
        let changed = limits.iter().filter(|(device, limits)| is_new(device, limits));
        let wishes = changed.map(|(device, limits)| Wish::IoMax(*device, *limits)).collect();
        divided.limits = limits;
        Ok(wishes)
    }
}
