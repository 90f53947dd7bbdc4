//! What the kernel programs tell at once, rather than be found at the next look.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use aya::maps::{MapData, RingBuf};
use rustix::event::{PollFd, PollFlags, poll};
use shaper_common::abi::{EVENT_BUDGET, EVENT_GONE, Event};
use shaper_core::{
    id::TaskId,
    limits::Limit,
    task::{ExitStatus, Origin, Phase},
    units::Millicores,
};

use super::{Node, NodeError, burst::Lending, not_established, now};
use crate::{
    actor::Handle,
    kernel::{bpf, cgroup::cpu::CpuMax, mapped::monotonic_ns},
    launch,
    meter::{Alarms, Ring},
    waiter::{self, Waiter},
};

const PERIOD_NS: u64 = CpuMax::PERIOD.0 * 1000;
/// The kernel charges CPU time at ticks, and a tick is 4 ms on most kernels: the warning comes two of them before
/// the quota is used up, where that leaves half of it.
const TICKS_NS: u64 = 8_000_000;
/// Turns that events ask for come no closer than this: a rate of less time says nothing.
const TURN_NS: u64 = 20_000_000;

/// Of what use of a quota on the kernel warns.
pub(super) fn warn_ns(quota_ns: u64) -> u64 {
    quota_ns.saturating_sub(TICKS_NS).max(quota_ns / 2)
}

/// Follows the ring of events for as long as the node has this.
pub(super) fn start(ring: RingBuf<MapData>, handle: Handle, lending: Option<Lending>) -> io::Result<Waiter> {
    Waiter::start("bpf-events", move |stop| {
        if let Err(error) = follow(ring, stop, &handle, lending.as_ref()) {
            tracing::error!(%error, "cannot wait for the kernel programs' events: what they tell is found by looking");
        }
    })
}

fn follow(
    mut ring: RingBuf<MapData>,
    stop: &OwnedFd,
    handle: &Handle,
    lending: Option<&Lending>,
) -> io::Result<()> {
    let fd = ring.as_fd().try_clone_to_owned()?;
    if lending.is_some()
        && let Err(error) = waiter::run_first()
    {
        // Not privileged for that, or in a group without real time (CONFIG_RT_GROUP_SCHED).
        tracing::info!(%error, "loans of CPU time may come a tick late");
    }
    loop {
        let mut ready = [PollFd::new(&fd, PollFlags::IN), PollFd::new(stop, PollFlags::IN)];
        match poll(&mut ready, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        if !ready[1].revents().is_empty() {
            return Ok(());
        }
        let mut events = Vec::new();
        while let Some(item) = ring.next() {
            events.extend(bpf::event(&item));
        }
        if let Some(lending) = lending {
            events.iter().filter(|event| event.kind == EVENT_BUDGET).for_each(|event| lending.warned(event));
        }
        if !events.is_empty() {
            // A node with a full queue finds by looking what it is not told.
            handle.try_tell(move |node| node.told(&events));
        }
    }
}

impl Node {
    fn told(&mut self, events: &[Event]) {
        let mut turn = false;
        for event in events {
            match event.kind {
                EVENT_BUDGET => {
                    self.meter.quota_warning(event.slot);
                    turn = true;
                }
                EVENT_GONE => self.cgroup_gone(event.slot, event.value),
                kind => tracing::debug!(kind, "a kernel program tells what this agent does not know"),
            }
        }
        if turn {
            self.turn();
        }
    }

    /// Has the kernel tell when a task waits too long for memory or block IO.
    pub(super) fn set_alarms(&mut self) {
        let handle = self.handle.clone();
        let ring = move |slot, ring| {
            handle.try_tell(move |node| match ring {
                Ring::Pressure => node.pressed(slot),
                Ring::MemoryEvents => node.memory_told(slot),
            })
        };
        match Alarms::start(ring) {
            Ok(alarms) => self.meter.tell_by(Some(alarms)),
            Err(error) => tracing::error!(%error, "no alarms of pressure: it is read once a second"),
        }
    }

    fn pressed(&mut self, slot: u32) {
        self.meter.alarm(slot);
        if let Some(id) = self.task_of_slot(slot) {
            self.look_at_shrink(&id);
            self.grow_if_near(&id);
        }
        self.turn();
    }

    /// Adjusts at once, unless that was done just now.
    fn turn(&mut self) {
        if self.adjustment.last_turn_ns() + TURN_NS <= monotonic_ns() {
            self.adjust();
        }
    }

    /// A managed cgroup was removed by somebody else.
    fn cgroup_gone(&mut self, slot: u32, cgroup_id: u64) {
        let of_event = self.tasks.iter().find(|(_, task)| {
            task.target.as_ref().is_some_and(|target| target.slot == slot && target.cgroup.id() == cgroup_id)
        });
        if let Some(id) = of_event.map(|(id, _)| id.clone()) {
            self.end_if_gone(&id);
        }
    }

    /// Ends an adopted task whose cgroup is not there any more. (Others end with their main process.)
    pub(super) fn end_if_gone(&mut self, id: &TaskId) {
        let Some(task) = self.tasks.get(id) else { return };
        let Some(target) = &task.target else { return };
        if !task.is_running() || task.record.origin != Origin::Adopted {
            return;
        }
        let is_gone = target.cgroup.is_populated().is_err_and(|error| error.is_gone());
        if is_gone && let Err(error) = self.end(id, Phase::Ended { status: ExitStatus::Unknown, at: now() }) {
            tracing::warn!(task = %id, error = %launch::chain(&error), "cannot end a task whose cgroup is gone");
        }
    }

    /// Asks the kernel to warn before the CPU quota that a task has now is used up.
    pub(super) fn watch_quota(&mut self, id: &TaskId) -> Result<(), NodeError> {
        let task = self.tasks.get(id).ok_or_else(|| NodeError::NoSuchTask(id.clone()))?;
        let target = task.target.as_ref().ok_or_else(not_established)?;
        let bpf = self.bpf.as_mut().ok_or_else(not_established)?;
        let budget = match task.record.limits.cpu {
            Limit::At(Millicores(milli)) => Some((warn_ns(PERIOD_NS / 1000 * milli), PERIOD_NS)),
            Limit::Unlimited => None,
        };
        Ok(bpf.watch_budget(target.slot, budget)?)
    }
}
