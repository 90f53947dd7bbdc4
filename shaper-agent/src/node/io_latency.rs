//! Promised latencies of block IO: `shaper_core::io::protect` decides who is held back, the executor turns `io.max` (on a
//! hybrid host `blkio.throttle`).
//!
//! What is measured is `block_rq_complete`'s histogram, every half second, by device: reads and writes of a task together,
//! from when the device's queue took them to their end. What its own ceiling makes a task wait is not in it.
//!
//! A hold is this agent's alone ([`Hold::Transient`]). It goes when its victim ends or is not promised anything any more,
//! and when the agent ends; what a killed agent left, the next one puts back. Only tasks of this node can be held: what
//! runs in cgroups that shaper does not manage is left alone.

use std::collections::BTreeMap;

use shaper_common::{
    abi::{IO_DISCARD, IO_READ, IoKey, IoStat},
    hist::{Histogram, IO_SHIFT},
};
use shaper_core::{
    id::{BlockDevice, ExecutionId, TaskId},
    io::{
        Direction,
        protect::{self, Aggressor, Broken, Cap, Guard, Use, Verdict, Victim},
    },
    ledger::Cause,
    limits::Limit,
    spec::{DecisionKind, Priority},
    task::{Enforcement, Owner},
    units::{BytesPerSec, Iops, Micros},
};

use super::{Node, NodeError, Task, change::Hold};
use crate::{
    actuate::{self, Knob},
    kernel::{cgroup::block::IoLimits, disks, mapped::monotonic_ns},
    launch,
};

/// Devices are listed again after so many turns: ten seconds.
const LISTED: u64 = 20;
/// The name under which this acts, in the ledger.
const PART: &str = "io latency";
/// The resource of the promise, as it is told.
const RESOURCE: &str = "storage_io_latency";

/// What is remembered of promises and of those that are held back for them.
#[derive(Default)]
pub(super) struct Guards {
    devices: BTreeMap<BlockDevice, Guard<(ExecutionId, Direction)>>,
    /// All whole devices.
    listed: Vec<BlockDevice>,
    turns: u64,
    /// What was counted at the last turn, and when.
    before: Option<(u64, BTreeMap<IoKey, IoStat>)>,
    promises: BTreeMap<(ExecutionId, BlockDevice), Promise>,
    held: BTreeMap<(ExecutionId, BlockDevice), Held>,
}

/// A promise on one device.
struct Promise {
    /// When its latency was last known, and what had been counted then.
    since_ns: u64,
    before: Histogram,
    latency: Option<Micros>,
    /// Operations that the kernel did not time, and whether the last were such.
    untimed: u64,
    is_untimed: bool,
    /// Holding others back did not help.
    is_vain: bool,
}

/// Somebody who is held back on one device.
#[derive(Clone)]
struct Held {
    limits: IoLimits,
    /// For the sake of whom, when last cut.
    broken: Broken<ExecutionId>,
}

/// Whom a promise is made to.
struct Promised {
    execution: ExecutionId,
    slot: u32,
    priority: Priority,
    target: Micros,
}

impl Guards {
    /// What a task is held to on a device.
    pub(super) fn held(&self, execution: &ExecutionId, device: BlockDevice) -> Option<IoLimits> {
        self.held.get(&(execution.clone(), device)).map(|held| held.limits)
    }
}

impl Node {
    /// Refuses a promise that nobody could tell the keeping of.
    pub(super) fn can_promise_latency(&self) -> Result<(), NodeError> {
        if self.bpf.as_ref().is_some_and(|bpf| bpf.counts_io()) {
            return Ok(());
        }
        Err(NodeError::Precondition(format!(
            "{RESOURCE}: the latency of block IO is not measured on this host, so nobody could tell whether the promise \
             is kept; `shaper doctor` says why (block-io-program, or the self-test of block IO)"
        )))
    }

    /// Every half second: measures what was promised, and holds others back or gives back what was held.
    pub(super) fn guard_io(&mut self) {
        let promised = self.promised();
        if promised.is_empty() {
            self.let_all_holds_go("nobody is promised a latency of block IO any more");
            self.guards = Guards::default();
            return;
        }
        let counts = match self.io_counts() {
            Ok(Some(counts)) => counts,
            Ok(None) => return self.let_all_holds_go("the latency of block IO is not measured any more"),
            Err(error) => {
                tracing::warn!(error = %launch::chain(&error), "cannot read the latency of block IO");
                return;
            }
        };
        if self.guards.turns.is_multiple_of(LISTED) {
            self.guards.listed = disks::all();
        }
        self.guards.turns += 1;
        let now_ns = monotonic_ns();
        let is_promised = |execution: &ExecutionId| promised.iter().any(|it| it.execution == *execution);
        self.guards.promises.retain(|(execution, _), _| is_promised(execution));
        self.forget_devices();
        let Some((then_ns, before)) = self.guards.before.replace((now_ns, counts.clone())) else { return };
        let elapsed_ns = now_ns.saturating_sub(then_ns).max(1);
        for device in self.guards.listed.clone() {
            let victims = self.measure(device, &promised, &counts, now_ns);
            let is_used = victims.iter().any(|victim| victim.latency.is_some());
            if !is_used && !self.guards.devices.contains_key(&device) {
                continue;
            }
            let aggressors = self.aggressors(device, &before, &counts, elapsed_ns);
            let guard = self.guards.devices.entry(device).or_default();
            let (verdict, caps) = guard.step(&victims, &aggressors, now_ns);
            self.note_verdict(device, &victims, &verdict);
            self.hold(device, &verdict, &caps);
        }
    }

    /// Lets go what is held on devices on which nobody is promised anything any more.
    fn forget_devices(&mut self) {
        let Guards { devices, promises, held, .. } = &mut self.guards;
        let is_served = |device: &BlockDevice| {
            promises.iter().any(|((_, of), promise)| of == device && promise.latency.is_some())
        };
        devices.retain(|device, _| is_served(device));
        let forgotten: Vec<_> = held.keys().filter(|(_, device)| !is_served(device)).cloned().collect();
        for (execution, device) in forgotten {
            self.let_go_of(
                &execution,
                device,
                "whom it was held back for is not promised a latency any more",
            );
        }
    }

    /// The running tasks that are promised a latency.
    fn promised(&self) -> Vec<Promised> {
        let running = self.tasks.values().filter(|task| task.is_running() && !task.over);
        running
            .filter_map(|task| {
                Some(Promised {
                    execution: task.record.execution.clone(),
                    slot: task.target.as_ref()?.slot,
                    priority: priority(task),
                    target: task.record.limits.storage_io_latency.at()?,
                })
            })
            .collect()
    }

    /// What each promise is worth on a device, as far as it is known anew.
    fn measure(
        &mut self,
        device: BlockDevice,
        promised: &[Promised],
        counts: &BTreeMap<IoKey, IoStat>,
        now_ns: u64,
    ) -> Vec<Victim<ExecutionId>> {
        let mut victims = Vec::new();
        for Promised { execution, slot, priority, target } in promised {
            let mut now = Histogram::default();
            let mut untimed = 0;
            for (_, stat) in of_slot(counts, *slot, device) {
                now.add(&stat.latency);
                untimed += stat.untimed;
            }
            let promise = self.guards.promises.entry((execution.clone(), device)).or_insert(Promise {
                since_ns: now_ns,
                before: now,
                latency: None,
                untimed,
                is_untimed: false,
                is_vain: false,
            });
            let since = now.since(&promise.before);
            let mut latency = None;
            if since.total() > 0 {
                promise.is_untimed = false;
            } else if untimed != promise.untimed {
                // What was known before says nothing of these.
                (promise.is_untimed, promise.latency) = (true, None);
            }
            promise.untimed = untimed;
            if since.total() == 0 {
                promise.since_ns = now_ns;
            } else if protect::is_enough(since.total(), now_ns.saturating_sub(promise.since_ns)) {
                latency = Some(Micros(since.quantile_ns(990, IO_SHIFT) / 1000));
                (promise.since_ns, promise.before, promise.latency) = (now_ns, now, latency);
            }
            victims.push(Victim { key: execution.clone(), priority: *priority, target: *target, latency });
        }
        victims
    }

    /// What the tasks that can be held back did on a device, by direction.
    fn aggressors(
        &self,
        device: BlockDevice,
        before: &BTreeMap<IoKey, IoStat>,
        counts: &BTreeMap<IoKey, IoStat>,
        elapsed_ns: u64,
    ) -> BTreeMap<(ExecutionId, Direction), Aggressor> {
        let mut found = BTreeMap::new();
        for task in self.tasks.values().filter(|task| task.is_running()) {
            let Some(target) = &task.target else { continue };
            let mut of_task = of_slot(counts, target.slot, device).peekable();
            if of_task.peek().is_none() || !actuate::can_turn(target, Knob::IoMax(device)) {
                continue;
            }
            for (key, now) in of_task {
                let before = before.get(key).copied().unwrap_or_default();
                let per_second = |now: u64, before: u64| {
                    let rate =
                        u128::from(now.saturating_sub(before)) * 1_000_000_000 / u128::from(elapsed_ns);
                    u64::try_from(rate).unwrap_or(u64::MAX)
                };
                let aggressor = Aggressor {
                    used: Use {
                        operations: per_second(now.operations, before.operations),
                        bytes: per_second(now.bytes, before.bytes),
                    },
                    priority: priority(task),
                    is_promised: task.record.limits.storage_io_latency != Limit::Unlimited,
                };
                found.insert((task.record.execution.clone(), direction(key)), aggressor);
            }
        }
        found
    }

    fn note_verdict(
        &mut self,
        device: BlockDevice,
        victims: &[Victim<ExecutionId>],
        verdict: &Verdict<ExecutionId>,
    ) {
        for victim in victims {
            let Some(promise) = self.guards.promises.get_mut(&(victim.key.clone(), device)) else { continue };
            match verdict {
                Verdict::Vain(broken) if broken.victim == victim.key => {
                    promise.is_vain = true;
                    let Broken { latency, target, .. } = broken;
                    let device = disks::name(device);
                    tracing::warn!(execution = %victim.key, device, %latency, %target, "holding others back is in vain");
                }
                _ if victim.latency.is_some_and(|latency| latency <= victim.target) => {
                    promise.is_vain = false
                }
                _ => {}
            }
        }
    }

    /// Puts in force what was decided of a device, where it differs from what is.
    fn hold(
        &mut self,
        device: BlockDevice,
        verdict: &Verdict<ExecutionId>,
        caps: &BTreeMap<(ExecutionId, Direction), Cap>,
    ) {
        let mut wanted: BTreeMap<ExecutionId, IoLimits> = BTreeMap::new();
        for ((execution, direction), Cap { operations, bytes }) in caps {
            let limits = wanted.entry(execution.clone()).or_default();
            let (of_operations, of_bytes) = match direction {
                Direction::Read => (&mut limits.read_operations, &mut limits.read),
                Direction::Write => (&mut limits.write_operations, &mut limits.write),
            };
            (*of_operations, *of_bytes) = (Limit::At(Iops(*operations)), Limit::At(BytesPerSec(*bytes)));
        }
        let of_device = self.guards.held.iter().filter(|((_, of), _)| *of == device);
        let known: BTreeMap<ExecutionId, Held> =
            of_device.map(|((execution, _), held)| (execution.clone(), held.clone())).collect();
        for execution in known.keys().filter(|execution| !wanted.contains_key(execution)) {
            self.let_go_of(execution, device, why_let_go(verdict));
        }
        for (execution, limits) in wanted {
            let before = known.get(&execution);
            if before.is_some_and(|before| before.limits == limits) {
                continue;
            }
            let broken = match (verdict, before) {
                (Verdict::Cut(broken), _) => broken.clone(),
                (_, Some(before)) => before.broken.clone(),
                // Only a cut holds somebody who was not.
                (_, None) => continue,
            };
            self.hold_to(&execution, device, Held { limits, broken }, matches!(verdict, Verdict::Cut(_)));
        }
    }

    fn hold_to(&mut self, execution: &ExecutionId, device: BlockDevice, held: Held, is_cut: bool) {
        let reason = self.reason(execution, device, &held, is_cut);
        let before = self.guards.held.insert((execution.clone(), device), held);
        let turned = self.turn_io(&execution.task, device, &reason);
        match turned {
            Ok(()) if is_cut => self.decide(execution, DecisionKind::Shrunk, reason),
            Ok(()) => {}
            Err(error) => {
                match before {
                    Some(before) => self.guards.held.insert((execution.clone(), device), before),
                    None => self.guards.held.remove(&(execution.clone(), device)),
                };
                tracing::warn!(%execution, error = %launch::chain(&error), "cannot hold back the block IO of a task");
            }
        }
    }

    fn let_go_of(&mut self, execution: &ExecutionId, device: BlockDevice, why: &str) {
        if self.guards.held.remove(&(execution.clone(), device)).is_none() {
            return;
        }
        let is_there = self.task(&execution.task).is_ok_and(|task| {
            task.record.execution == *execution && task.is_running() && task.target.is_some()
        });
        if !is_there {
            return;
        }
        let reason = format!("not held back on {} any more: {why}", shown(device));
        match self.turn_io(&execution.task, device, &reason) {
            Ok(()) => self.decide(execution, DecisionKind::Grew, reason),
            Err(error) => {
                tracing::warn!(%execution, error = %launch::chain(&error), "cannot let the block IO of a task go");
            }
        }
    }

    /// Gives back everything that is held.
    pub(super) fn let_all_holds_go(&mut self, why: &str) {
        for (execution, device) in self.guards.held.keys().cloned().collect::<Vec<_>>() {
            self.let_go_of(&execution, device, why);
        }
    }

    fn turn_io(&mut self, id: &TaskId, device: BlockDevice, reason: &str) -> Result<(), NodeError> {
        let wish = self.io_wish(id, device)?;
        self.set_knobs(id, &[wish], Hold::Transient, &Cause::agent(PART, reason))
    }

    /// Tells the broker, of its own tasks. (Everybody else has the ledger.)
    fn decide(&mut self, execution: &ExecutionId, kind: DecisionKind, reason: String) {
        if self.task(&execution.task).is_ok_and(|task| task.record.assignment.is_some()) {
            self.tell_decision(execution, kind, reason);
        } else {
            self.counts.decided(kind);
            tracing::info!(%execution, %kind, reason, "decided");
        }
    }

    /// Why a task is held back, for its owner: who else is on the node is nobody's business.
    fn reason(&self, execution: &ExecutionId, device: BlockDevice, held: &Held, is_cut: bool) -> String {
        let owner = self.task(&execution.task).ok().map(|task| task.record.owner);
        let victim = self.named(&held.broken.victim, owner.as_ref());
        let (Broken { latency, target, .. }, limits) = (&held.broken, rates(&held.limits));
        let device = shown(device);
        if is_cut {
            format!("held to {limits} on {device} because {victim} waits p99 {latency}, promised {target}")
        } else {
            format!(
                "given back: held to {limits} on {device}, for {victim} is served within the promised {target}"
            )
        }
    }

    fn named(&self, execution: &ExecutionId, to: Option<&Owner>) -> String {
        match self.task(&execution.task) {
            Ok(task) if Some(&task.record.owner) == to => format!("task `{}`", execution.task),
            _ => "a task of another user".into(),
        }
    }

    /// Says in a task's status what its promise is worth, and for whose it is held back.
    pub(super) fn explain_latency(&self, task: &Task, enforcement: &mut Vec<Enforcement>) {
        let execution = &task.record.execution;
        for ((_, device), held) in self.guards.held.iter().filter(|((of, _), _)| of == execution) {
            let Broken { victim, latency, target } = &held.broken;
            let knob = Knob::IoMax(*device).to_string();
            let for_whom = self.named(victim, Some(&task.record.owner));
            if let Some(found) = enforcement.iter_mut().find(|found| found.resource == knob) {
                found.in_force +=
                    &format!(", held back for {for_whom}, which waited p99 {latency}, promised {target}");
            }
        }
        if task.record.limits.storage_io_latency == Limit::Unlimited || !task.is_running() {
            return;
        }
        let mut devices: Vec<String> = Vec::new();
        for ((_, device), promise) in self.guards.promises.iter().filter(|((of, _), _)| of == execution) {
            if promise.is_untimed {
                let name = disks::name(*device);
                devices.push(format!(
                    "not measured on {name}: this kernel times nothing there while /sys/block/{name}/queue/iostats is 0"
                ));
            }
            let Some(latency) = promise.latency else { continue };
            let for_it = |held: &&Held| held.broken.victim == *execution;
            let held = self.guards.held.iter().filter(|((_, of), _)| of == device);
            let held = held.map(|(_, held)| held).filter(for_it).count();
            let is_broken = task.record.limits.storage_io_latency.at().is_some_and(|target| latency > target);
            let who = match (held, is_broken, promise.is_vain) {
                (1.., ..) => format!("{held} held back"),
                (0, true, true) => {
                    "broken: holding others back did not help; what makes it wait is its own load, or in cgroups \
                     that shaper does not manage"
                        .into()
                }
                (0, true, false) => {
                    "broken: nobody here can be held back for it; cgroups that shaper does not manage cannot be"
                        .into()
                }
                (0, false, _) => "nobody held back".into(),
            };
            devices.push(format!("p99 {latency} on {} ({who})", disks::name(*device)));
        }
        let in_force = if devices.is_empty() { "no block IO so far".into() } else { devices.join(", ") };
        enforcement.push(Enforcement {
            resource: RESOURCE.into(),
            mechanism: "limits of others".into(),
            in_force,
        });
    }
}

/// The counts of reads and writes of a slot on a device.
fn of_slot(
    counts: &BTreeMap<IoKey, IoStat>,
    slot: u32,
    device: BlockDevice,
) -> impl Iterator<Item = (&IoKey, &IoStat)> {
    let range = IoKey { slot, ..IoKey::default() }..IoKey { slot: slot + 1, ..IoKey::default() };
    let of_device = move |key: &IoKey| BlockDevice::from_kernel(key.device) == device;
    counts.range(range).filter(move |(key, _)| key.direction != IO_DISCARD && of_device(key))
}

fn direction(key: &IoKey) -> Direction {
    if key.direction == IO_READ { Direction::Read } else { Direction::Write }
}

/// What is the node's own has none.
fn priority(task: &Task) -> Priority {
    task.record.assignment.as_ref().map_or(Priority::Medium, |assignment| assignment.spec.profile.priority)
}

fn why_let_go(verdict: &Verdict<ExecutionId>) -> &'static str {
    match verdict {
        Verdict::Vain(_) => "it did not help who is promised a latency there",
        _ => "the promise of a latency that it was held back for is kept",
    }
}

/// `100 reads and 20 writes a second`.
fn rates(limits: &IoLimits) -> String {
    let of = |limit: Limit<Iops>, what: &str| limit.at().map(|iops| format!("{} of {what}", iops));
    let parts = [of(limits.read_operations, "reads"), of(limits.write_operations, "writes")];
    parts.into_iter().flatten().collect::<Vec<_>>().join(" and ")
}

/// `sda (8:0)`.
fn shown(device: BlockDevice) -> String {
    format!("{device} ({})", disks::name(device))
}
