//! The node's brain: one step of it decides, from what was observed, what each task may use next.
//!
//! [`step`] is a function of what it remembers ([`Brain`]), what was seen ([`Observation`]) and the
//! time. It changes nothing but its memory; what should happen comes back as [`Move`]s, and the next
//! observation tells what has become of them. A move that failed is simply made again.
//!
//! # The loop around it
//!
//! The agent ticks every 100 ms, and at each tick, on the thread that owns the node:
//!
//! 1. **observes**: the counters of every slot (`Bpf::counters`), as rates *since the last tick*; the
//!    throttled time of `cpu.stat`; the CPU time of the whole node; and, as grants, the limits that
//!    it recorded as in force. (Longer averages would still show the time before the last change and
//!    make the brain undo it; smoothing is done here.)
//! 2. calls [`step`] with `CLOCK_MONOTONIC`;
//! 3. **executes** the moves in their order through the one executor, which writes, reads back and
//!    keeps the ledger; and records each as a decision, with its reason.
//!
//! A step may come early (an event from the kernel) or late: every rate in here is one of time.
//!
//! # One step
//!
//! ```text
//! usage, throttling ──▶ estimate ──▶ need of each task          fast up, slow down
//! requests, limits  ──▶ share    ──▶ target of each task        guarantee, need by weight, headroom
//! policies          ──▶ pressure ──▶ who is held at its request, who is evicted
//! in force          ──▶ arrange  ──▶ moves                      takes before gives, none for noise
//! ```
//!
//! - **Estimate** (`estimate.rs`). A ceiling hides what is wanted beyond it, so the need is found by
//!   asking: a task that its grant stops needs a quarter more than it has, and so on until it is stopped no
//!   longer. A task that leaves more than 30 % unused for two seconds is believed to need less, a tenth
//!   every 500 ms.
//! - **Share** ([`crate::share`]). The request is the guarantee and the floor; need is met by weight (priorities weigh 4 : 2 : 1); and a quarter of the need is lent on
//!   top as headroom, where nobody needs it. A task without an explicit limit may grow to the capacity of
//!   the node. What a task could have, but does not need, stays free: that is the room in which
//!   another one grows within a tick, without waiting for anybody.
//! - **Pressure** (`pressure.rs`). What policies with an eviction threshold demand; see there.
//! - **Arrange** (`arrange.rs`). From what is in force towards the targets: never over capacity at any
//!   moment, CPU down by at most a quarter a step, and no move for less than 5 %.
//!
//! Memory is not divided here: it grows by events ([`memory`]), and lowering it is a conversation with the kernel
//! ([`crate::shrink`]), not a number. Nor is the network: the kernel divides it, in less time than a step takes
//! (`shaper_common::pool`).
//!
//! # What it promises
//!
//! After a step, what is granted to the managed tasks never adds up to more than the capacity, provided
//! the requests do not; every one of them has at least its request, and none more than its limit.
//! Steady input leads to no moves. Nobody is evicted but for a policy, and then one task at a time.

mod arrange;
pub mod card;
mod estimate;
pub mod memory;
mod pressure;
mod reason;
#[cfg(test)]
mod tests;

use crate::{
    id::ExecutionId,
    limits::{Limit, Limits, LimitsChange},
    share,
    spec::{DecisionKind, Demand, Policy, Priority},
    task::UnixNanos,
    units::Millicores,
};

use estimate::{Estimates, Sample};
use pressure::Pressure;
use reason::Table;

/// What was seen on the node since the last step.
#[derive(Clone, Copy, Debug)]
pub struct Observation<'a> {
    /// CPU that tasks may share: the node's, less what is reserved.
    pub cpu: Millicores,
    /// CPU that everything on the node used, tasks or not, less what a reserve covers.
    pub cpu_used: Millicores,
    /// Every task that runs here, each once.
    pub tasks: &'a [TaskObservation<'a>],
    /// The policies of this node.
    pub policies: &'a [PolicyInForce<'a>],
}

/// What was seen of one task.
#[derive(Clone, Copy, Debug)]
pub struct TaskObservation<'a> {
    /// Which run of which task.
    pub execution: &'a ExecutionId,
    /// Its namespace.
    pub namespace: &'a str,
    /// Its priority.
    pub priority: Priority,
    /// Its request.
    pub request: Demand,
    /// Its explicit limits, as its owner and the policies gave them: not what is in force.
    pub limits: Limits,
    /// Name of the policy that acts for it ([`crate::policy::Effective::eviction`]).
    pub policy: Option<&'a str>,
    /// When it started: among equals the youngest is evicted first.
    pub started_at: UnixNanos,
    /// Whether its limits may be moved and it may be evicted. Otherwise it is only reckoned with.
    pub managed: bool,
    /// The CPU limit in force, as it was asked for (a kernel that rounds would look like a change).
    pub cpu_grant: Limit<Millicores>,
    /// CPU it used.
    pub cpu_used: Millicores,
    /// How much of the time its CPU limit stopped it, in thousandths; `None` where nobody counts that.
    pub cpu_throttled_permille: Option<u32>,
}

/// A policy, and what is known of it beyond this node.
#[derive(Clone, Copy, Debug)]
pub struct PolicyInForce<'a> {
    /// The policy.
    pub policy: &'a Policy,
    /// Whether a task that it covers waits for room on this node.
    pub waiting: bool,
}

/// Something to be done. The order matters: room is made before it is given away.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Move {
    /// Move one limit of a task.
    Grant {
        /// Whose.
        execution: ExecutionId,
        /// To what. It names one resource.
        change: LimitsChange,
        /// In which direction.
        kind: GrantKind,
        /// Why, for people.
        reason: String,
    },
    /// End a task to make room. It is asked for again, window after window, while the task stays.
    Evict {
        /// Which.
        execution: ExecutionId,
        /// Why, for people.
        reason: String,
    },
    /// Nothing that this policy allows can help those whom it covers. Said once.
    Stuck {
        /// The policy.
        policy: String,
        /// Why, for people.
        reason: String,
    },
}

/// The direction of a grant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GrantKind {
    /// More than before.
    Grew,
    /// Less than before.
    Shrunk,
}

impl From<GrantKind> for DecisionKind {
    fn from(kind: GrantKind) -> DecisionKind {
        match kind {
            GrantKind::Grew => DecisionKind::Grew,
            GrantKind::Shrunk => DecisionKind::Shrunk,
        }
    }
}

/// What is remembered from step to step. A new one knows nothing, and takes what is in force for right.
#[derive(Clone, Debug, Default)]
pub struct Brain {
    cpu: Estimates,
    pressure: Pressure,
    stepped_at: Option<u64>,
}

/// A resource that is moved, and what is a change worth making.
#[derive(Clone, Copy, Debug)]
struct Resource {
    /// The least that the kernel can enforce.
    minimum: u64,
    /// A smaller change is noise.
    least_change: u64,
    /// Whether a lowering comes in steps: a CPU quota that drops at once below what was used in the
    /// running period freezes the task until the debt is paid (90 → 10 % of a core: 85 ms).
    gentle: bool,
    /// An amount in words; the second form is without a unit, where the unit follows.
    show: fn(u64) -> (String, String),
}

const CPU: Resource = Resource {
    minimum: Millicores::MIN.0,
    least_change: 10,
    gentle: true,
    show: |amount| {
        let bare = Millicores(amount).to_string();
        (format!("{bare} core{}", if amount == 1000 { "" } else { "s" }), bare)
    },
};
impl Resource {
    /// Whether a change is more than noise: over 5 % of what is there, and the least amount.
    fn is_worth(&self, from: u64, to: u64) -> bool {
        let change = from.abs_diff(to);
        change >= self.least_change && change > from / 20
    }
}

/// A task at the table where one resource is divided.
#[derive(Clone, Copy, Debug)]
struct Seat<'a> {
    task: &'a TaskObservation<'a>,
    /// What it gets whatever happens: its request, within its ceiling.
    floor: u64,
    /// What it can get at most: its explicit limit, within the capacity.
    ceiling: u64,
    /// What it may use now; the largest number if nothing limits it.
    current: u64,
    /// What it uses, smoothed.
    used: u64,
    /// What it is believed to need.
    need: u64,
    /// Whether what it has is too little, now or a moment ago.
    is_short: bool,
    /// How much of the time its limit stopped it, if anybody counts that.
    throttled_permille: Option<u32>,
}

impl Seat<'_> {
    /// What it should get if there is enough: its need, and a quarter more as headroom.
    fn desired(&self) -> u64 {
        self.need.saturating_add(self.need / 4).clamp(self.floor, self.ceiling)
    }

    fn claim(&self) -> share::Claim {
        share::Claim {
            request: self.floor,
            limit: Limit::At(self.desired()),
            weight: weight(self.task.priority),
            demand: self.need,
            priority: self.task.priority,
        }
    }
}

/// How much of what is divided beyond the requests goes to a priority.
const fn weight(priority: Priority) -> u32 {
    match priority {
        Priority::High => 4,
        Priority::Medium => 2,
        Priority::Low => 1,
    }
}

/// Decides what to do now. `now_ns` is monotonic; its origin does not matter.
pub fn step(brain: &mut Brain, observation: &Observation<'_>, now_ns: u64) -> Vec<Move> {
    let elapsed = now_ns.saturating_sub(brain.stepped_at.unwrap_or(now_ns));
    let now = brain.stepped_at.map_or(now_ns, |before| before.max(now_ns));
    brain.stepped_at = Some(now);

    let seats = seats(&mut brain.cpu, CPU, observation, now, elapsed, cpu_sample);
    let capacity = observation.cpu.0;
    let plain = divide(capacity, &seats, |_| false);
    brain.pressure.observe(observation, now, elapsed);
    let acting = brain.pressure.press(observation, &seats, &plain, now);
    let is_pressed = |index: usize| acting.iter().any(|policy| policy.below.contains(&index));
    let targets = if acting.is_empty() { plain } else { divide(capacity, &seats, is_pressed) };
    let verdicts = brain.pressure.judge(&acting, &seats, &targets, now);

    let next = arrange::arrange(CPU, capacity, &seats, &targets);
    let table = Table { resource: CPU, capacity, seats: &seats, next: &next, acting: &acting };
    let mut moves = table.moves(|to| LimitsChange { cpu: Some(Limit::At(Millicores(to))), ..NO_CHANGE });

    // A stable sort: among the takes, and among the gives, the order stays.
    moves.sort_by_key(|a_move| matches!(a_move, Move::Grant { kind: GrantKind::Grew, .. }));
    moves.extend(verdicts);
    moves
}

const NO_CHANGE: LimitsChange = LimitsChange {
    cpu: None,
    cpu_weight: None,
    memory: None,
    net_egress: None,
    storage_io: None,
    storage_io_weight: None,
    storage_io_latency: None,
    reclaim_idle: None,
    net_egress_guarantee: None,
    net_egress_weight: None,
    net_ingress: None,
    gpu_cards: None,
    gpu_memory: None,
    gpu_power: None,
};

fn cpu_sample(task: &TaskObservation<'_>, Observation { cpu, .. }: &Observation<'_>) -> Option<Sample> {
    Some(Sample {
        capacity: cpu.0,
        request: task.request.cpu.0,
        limit: task.limits.cpu.at().map(|limit| limit.0),
        grant: task.cpu_grant.at().map(|grant| grant.0),
        used: task.cpu_used.0,
        throttled_permille: task.cpu_throttled_permille,
    })
}

/// Those that have a part in a resource, with what is believed of each; the others are forgotten.
fn seats<'a>(
    estimates: &mut Estimates,
    resource: Resource,
    observation: &Observation<'a>,
    now: u64,
    elapsed: u64,
    sample: impl Fn(&TaskObservation<'_>, &Observation<'_>) -> Option<Sample>,
) -> Vec<Seat<'a>> {
    let mut seats = Vec::with_capacity(observation.tasks.len());
    let mut before = std::mem::take(estimates);
    for task in observation.tasks {
        let Some(sample) = sample(task, observation) else { continue };
        // An unmanaged task is a fact: it gets what it uses, up to what it may.
        let limit = if task.managed { sample.limit } else { sample.grant };
        let ceiling = limit.unwrap_or(sample.capacity).min(sample.capacity).max(resource.minimum);
        let floor = sample.request.clamp(resource.minimum, ceiling);
        let (execution, mut estimate) = before
            .remove_entry(task.execution)
            .unwrap_or_else(|| (task.execution.clone(), estimate::Estimate::new(&sample, ceiling)));
        estimate.update(resource, &sample, ceiling, now, elapsed);
        seats.push(Seat {
            task,
            floor,
            ceiling,
            current: sample.grant.unwrap_or(u64::MAX),
            used: estimate.used(),
            need: if task.managed { estimate.need() } else { estimate.used().min(ceiling) },
            is_short: estimate.is_short(now),
            throttled_permille: sample.throttled_permille,
        });
        estimates.insert(execution, estimate);
    }
    seats
}

/// Divides a resource. Those that are pressed get no more than their floor until all others have what
/// they should; then what is left is theirs, so that no pressure leaves the node idle.
fn divide(capacity: u64, seats: &[Seat<'_>], is_pressed: impl Fn(usize) -> bool) -> Vec<u64> {
    let claims: Vec<share::Claim> = seats.iter().map(Seat::claim).collect();
    let pressed: Vec<bool> = (0..seats.len()).map(is_pressed).collect();
    if !pressed.contains(&true) {
        return share::divide(capacity, &claims);
    }
    let hold = |claim: &share::Claim, at: u64| share::Claim { request: at, limit: Limit::At(at), ..*claim };
    let held: Vec<share::Claim> = (claims.iter().zip(seats).zip(&pressed))
        .map(|((claim, seat), pressed)| if *pressed { hold(claim, seat.floor) } else { *claim })
        .collect();
    let first = share::divide(capacity, &held);
    let rest: Vec<share::Claim> = (claims.iter().zip(&first).zip(&pressed))
        .map(|((claim, got), pressed)| match pressed {
            true => share::Claim { request: *got, ..*claim },
            false => hold(claim, *got),
        })
        .collect();
    share::divide(capacity, &rest)
}
