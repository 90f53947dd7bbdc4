//! Room for a task that fits nowhere, by reserving less for those that run
//! ([decision 0036](../../../docs/decisions/0036-what-is-reserved-comes-down-before-anybody-ends.md)).
//!
//! A policy with `floors` says how far down what is reserved for the tasks that it covers may come. It comes down for a task of
//! their priority or of a higher one, on one node, and only as far as is needed: for their own priority not below what they
//! have used lately; for a higher one their CPU, but not their memory, also below that. Their node has to say that it has
//! done it. Until then the waiting task is nominated, as if its place was cleared (`preempt`), and nothing is booked that the
//! node has not confirmed. What was taken is given back as soon as there is room for it and nobody in line fits into that.

use std::{cmp::Reverse, collections::HashMap};

use shaper_core::{
    id::TaskId,
    limits::Limit,
    place::{self, Amount, Candidate, Lowered, Needs, Spare},
    policy::{self, Subject},
    spec::{DecisionKind, Demand, Priority},
    task::UnixNanos,
    units::{Bytes, Millicores},
};

use super::{
    Directive, DirectiveKind, Effect, Phase, State, Turn,
    state::{Asked, Node, Resized, Task, TaskRow},
};

const SECOND: UnixNanos = 1_000_000_000;
/// While tasks wait for room, it is looked at this often whether others use less than before.
const LOOK_EVERY: UnixNanos = 5 * SECOND;
/// A task whose node would not change what is reserved for it is left alone for so long.
const REST: UnixNanos = 60 * SECOND;
const MIB: u64 = 1 << 20;
/// What is kept above the memory that is in use: an eighth, and this much at least.
const MEMORY_ROOM: u64 = 16 * MIB;

/// When it is due to look whether running tasks could do with less. The shell sends a Tick then.
pub(super) fn next_look(state: &State) -> Option<UnixNanos> {
    let may_find_some = has_floors(state) && state.waiting.may_lack_room();
    may_find_some.then(|| state.slack_looked_at.saturating_add(LOOK_EVERY))
}

pub(super) fn has_floors(state: &State) -> bool {
    state.policies.values().any(|row| row.policy.floors != Default::default())
}

/// What a task could do with, and the policy that says so.
struct Least<'a> {
    cpu: Millicores,
    memory: Bytes,
    policy: &'a str,
}

/// Of a running task, if room is needed for one of priority `wanting`.
fn least<'a>(state: &'a State, task: &Task, wanting: Priority, now: UnixNanos) -> Option<Least<'a>> {
    let ends = task.cancel.is_some() || task.preempted.is_some();
    let rests = task.resized.as_ref().is_some_and(|it| it.asked.is_some() || it.rests_until > now);
    if task.priority() > wanting || !matches!(task.phase, Phase::Running { .. }) || ends || rests {
        return None;
    }
    let policies = state.policies.values().map(|row| &row.policy);
    let policy = policy::floors(policies, &Subject::of(task.spec()))?;
    let (cpu_used, memory_used) = state.watches.get(task.id())?.recent.most()?;
    let request = task.request();
    let cpu = policy.floors.cpu.map_or(request.cpu, |floor| {
        // A seventh of room, in hundredths of a core.
        let used = Millicores((cpu_used.0 + cpu_used.0 / 7).next_multiple_of(10));
        let used = if task.priority() < wanting { Millicores(0) } else { used };
        floor.max(used).min(request.cpu)
    });
    // Where the owner has set a limit, the agent keeps to that, and not to what is reserved.
    let is_by_request = task.spec().limits.memory == Limit::Unlimited;
    let memory = policy.floors.memory.zip(memory_used).filter(|_| is_by_request);
    let memory = memory.map_or(request.memory, |(floor, used)| {
        let used = used.0.saturating_add((used.0 / 8).max(MEMORY_ROOM));
        floor.max(Bytes(used.checked_next_multiple_of(MIB).unwrap_or(used))).min(request.memory)
    });
    Some(Least { cpu, memory, policy: &policy.policy_name })
}

/// What a node lacks for a task, if that is only CPU and memory, of which tasks can give some back.
fn lack(node: &Node, needs: Needs<'_>) -> Option<Amount> {
    let demand = needs.demand;
    let rest = Demand { cpu: Millicores(0), memory: Bytes(0), ..*demand };
    let candidate: Candidate<'_> = node.candidate();
    // Where a place is being cleared, more is reserved than there is.
    if !node.nominees.is_empty()
        || !place::fits(Needs { demand: &rest, ..needs }, &candidate)
        || !place::could_ever_hold(needs, &candidate)
    {
        return None;
    }
    let over = |has: u64, reserved: u64, wanted: u64| reserved.saturating_add(wanted).saturating_sub(has);
    let (has, reserved) = (candidate.capacity, candidate.reserved);
    Some(Amount {
        cpu: Millicores(over(has.cpu.0, reserved.cpu.0, demand.cpu.0)),
        memory: Bytes(over(has.memory.0, reserved.memory.0, demand.memory.0)),
    })
}

/// What all tasks of a node together can give for one of a priority, by the node's place in the order of registration. It is
/// summed once in a turn: a node of which something was asked has a nominee, and is not looked at again.
pub(super) type Spares = HashMap<(Priority, u64), Amount>;

/// On which node what is reserved comes down, and of whom to what, by which policy.
struct Plan {
    node: String,
    lowered: Vec<(TaskId, Demand, String)>,
}

/// Where the fewest tasks are touched, on those of the connected nodes that `may`; of equals the first.
fn plan(
    state: &State,
    known: &mut Spares,
    id: &TaskId,
    now: UnixNanos,
    may: impl Fn(&Node) -> bool,
) -> Option<Plan> {
    let task = &state.tasks.get(id)?.task;
    let shuns = |node: &Node| task.avoid.iter().any(|avoid| avoid.node == node.row.name && avoid.holds(now));
    let mut best: Option<Plan> = None;
    for node in state.connected().filter(|node| !shuns(node) && may(node)) {
        // Nowhere are fewer touched than one.
        if best.as_ref().is_some_and(|best| best.lowered.len() == 1) {
            break;
        }
        let Some(lack) = lack(node, task.needs()) else { continue };
        let key = (task.priority(), node.row.order);
        if known.get(&key).is_some_and(|all| !all.covers_all(lack)) {
            continue;
        }
        let rows = node.tasks.iter().filter_map(|id| state.tasks.get(id)).map(Box::as_ref);
        let leasts = rows.filter_map(|TaskRow { task: other, .. }| {
            let least = least(state, other, task.priority(), now)?;
            let (cpu, memory) =
                (other.request().cpu.0 - least.cpu.0, other.request().memory.0 - least.memory.0);
            let most = Amount { cpu: Millicores(cpu), memory: Bytes(memory) };
            let spare = Spare { task: other.sequence(), priority: other.priority(), most };
            Some((spare, other, least.policy))
        });
        let leasts: Vec<_> = leasts.collect();
        let spares: Vec<Spare> = leasts.iter().map(|(spare, ..)| *spare).collect();
        known.insert(key, spares.iter().fold(Amount::NONE, |sum, spare| sum.and(spare.most)));
        let Some(lowered) = place::lower(lack, &spares).filter(|lowered| !lowered.is_empty()) else {
            continue;
        };
        if best.as_ref().is_some_and(|best| best.lowered.len() <= lowered.len()) {
            continue;
        }
        let of = |Lowered { task, by }: Lowered| {
            let (_, other, policy) = leasts.iter().find(|(spare, ..)| spare.task == task)?;
            let request = *other.request();
            let (cpu, memory) = (request.cpu.0 - by.cpu.0, request.memory.0 - by.memory.0);
            let request = Demand { cpu: Millicores(cpu), memory: Bytes(memory), ..request };
            Some((other.id().clone(), request, (*policy).to_owned()))
        };
        let lowered = lowered.into_iter().filter_map(of).collect();
        best = Some(Plan { node: node.row.name.clone(), lowered });
    }
    best
}

/// A change in words: `2 → 1 cores and 4 GiB → 1 GiB of memory`.
fn change(from: &Demand, to: &Demand) -> String {
    let cpu = (from.cpu != to.cpu).then(|| format!("{} → {} cores", from.cpu, to.cpu));
    let memory = (from.memory != to.memory).then(|| format!("{} → {} of memory", from.memory, to.memory));
    let changes: Vec<String> = cpu.into_iter().chain(memory).collect();
    if changes.is_empty() { "nothing".to_owned() } else { changes.join(" and ") }
}

impl Turn<'_> {
    /// A Tick: it may be due to look whether running tasks could do with less.
    pub(super) fn notice_slack(&mut self) {
        let looked_at = self.state.slack_looked_at;
        if !(looked_at..looked_at.saturating_add(LOOK_EVERY)).contains(&self.now) && has_floors(self.state) {
            self.state.slack_looked_at = self.now;
            self.look_for_slack = true;
        }
    }

    /// Has less reserved for others, so that a task that fits nowhere has room, if policies let it. Where that was not enough
    /// before, only those nodes are looked at where something was given back since, until use is looked at anew.
    pub(super) fn lower_others(&mut self, id: &TaskId) -> bool {
        let Some(row) = self.state.tasks.get(id) else { return false };
        if !has_floors(self.state) {
            return false;
        }
        let priority = row.task.priority();
        let (everywhere, freed) = (self.looks_everywhere(id), &self.freed);
        let may = |node: &Node| everywhere || freed.contains(&node.row.name);
        let planned = plan(self.state, &mut self.spares, id, self.now, may);
        let Some(Plan { node, lowered }) = planned else { return false };
        let before = |id: &TaskId| self.state.tasks.get(id).map(|row| *row.task.request());
        let tell = |(id, to, policy): &(TaskId, Demand, String)| {
            let from = before(id)?;
            Some(format!("`{id}` ({}, by policy `{policy}`)", change(&from, to)))
        };
        let names = lowered.iter().filter_map(tell).collect::<Vec<_>>().join(", ");
        let at = self.state.nodes.get(&node).map(Node::candidate);
        let cards = at.zip(self.state.tasks.get(id)).map(|(at, row)| at.cards_for(row.task.needs()));
        self.move_with(id, Phase::Nominated { node: node.clone() }, cards.unwrap_or_default());
        let reason = format!("{node} was asked to reserve less for {names}");
        self.decide(id, DecisionKind::Pending, reason, Vec::new());
        for (other, request, policy) in lowered {
            let reason = format!("to make room for `{id}` of priority {priority}, by policy `{policy}`");
            self.resize(&other, request, reason, Some(id.clone()));
        }
        true
    }

    /// Asks the node of a task to reserve another amount for it. What is more is booked at once, what is less when it is done.
    fn resize(&mut self, id: &TaskId, request: Demand, reason: String, whom: Option<TaskId>) {
        let Some(TaskRow { task, .. }) = self.change(id) else { return };
        task.generation += 1;
        let asked = Some(Asked { request, generation: task.generation, reason, whom });
        let before = *task.request();
        let more =
            Demand { cpu: before.cpu.max(request.cpu), memory: before.memory.max(request.memory), ..request };
        self.state.rebook(id, Some(Resized { request: more, asked, rests_until: 0 }));
        self.direct_resize(id);
    }

    /// Asks again, with the same numbers.
    pub(super) fn direct_resize(&mut self, id: &TaskId) {
        let Some(TaskRow { task, .. }) = self.state.tasks.get(id).map(Box::as_ref) else { return };
        let node = task.phase.node().and_then(|node| self.state.nodes.get(node));
        let asked = task.resized.as_ref().and_then(|resized| resized.asked.as_ref());
        let (Some(session), Some(Asked { request, generation, reason, whom: _ })) =
            (node.and_then(|node| node.session), asked)
        else {
            return;
        };
        let kind = DirectiveKind::Resize { request: *request, reason: reason.clone() };
        let (execution, generation, epoch) = (task.execution(), *generation, self.state.epoch);
        self.effects
            .push(Effect::Direct(session, Box::new(Directive { execution, generation, epoch, kind })));
    }

    /// A node says what it guarantees a task that it has.
    pub(super) fn guarantees(&mut self, id: &TaskId, request: &Demand, generation: u64) {
        let Some(TaskRow { task, .. }) = self.state.tasks.get(id).map(Box::as_ref) else { return };
        let Some(node) = task.phase.node().map(str::to_owned) else { return };
        let ends = task.cancel.is_some() || task.preempted.is_some();
        let (booked, whole) = (*task.request(), *task.demand());
        // What was said before the latest directive was carried out may come after it.
        let differs = *request != booked && !ends && generation >= task.generation;
        let Some(Resized { asked, rests_until, .. }) = task.resized.clone() else {
            if differs {
                self.resize(id, booked, "the node has another amount in its books".to_owned(), None);
            }
            return;
        };
        match asked {
            Some(Asked { request: wanted, reason, generation: asked_at, .. })
                if *request == wanted && generation >= asked_at =>
            {
                let resized = Resized { request: wanted, asked: None, rests_until: 0 };
                self.change(id);
                self.state.rebook(id, Some(resized).filter(|resized| resized.request != whole));
                self.freed.insert(node);
                if wanted == whole {
                    let reason = format!("all that it asks for is reserved for it: {reason}");
                    self.decide(id, DecisionKind::Grew, reason, Vec::new());
                } else if wanted != booked {
                    let reason = format!("less is reserved for it ({}) {reason}", change(&booked, &wanted));
                    self.decide(id, DecisionKind::Shrunk, reason, Vec::new());
                }
            }
            // After a rest nothing is under way any more that was said before.
            None if rests_until <= self.now
                && (differs || rests_until > 0 && *request != booked && !ends) =>
            {
                self.resize(id, booked, "the node has another amount in its books".to_owned(), None);
            }
            _ => {}
        }
    }

    /// A node will not change what is reserved for a task.
    pub(super) fn stays_as_it_is(&mut self, id: &TaskId, node: &str, generation: u64, why: &str) {
        let rests_until = self.now.saturating_add(REST);
        let Some(TaskRow { task, .. }) = self.state.tasks.get(id).map(Box::as_ref) else { return };
        let Some(resized) = task.resized.clone() else { return };
        if resized.asked.as_ref().is_none_or(|asked| asked.generation != generation) {
            return;
        }
        let whom = resized.asked.as_ref().and_then(|asked| asked.whom.clone());
        self.change(id);
        // What is booked stays booked: of less nothing was, and of more the node is asked again.
        self.state.rebook(id, Some(Resized { asked: None, rests_until, ..resized }));
        let is_promised = |whom: &TaskId| {
            let phase = self.state.tasks.get(whom).map(|row| &row.task.phase);
            matches!(phase, Some(Phase::Nominated { node: at }) if at == node)
        };
        if let Some(whom) = whom.filter(is_promised) {
            self.break_promise(
                &whom,
                node,
                &format!("{node} did not change what is reserved for `{id}`: {why}"),
            );
        }
    }

    /// Gives back what was taken from tasks on nodes that have room for it again.
    pub(super) fn restore_requests(&mut self) {
        let State { nodes, tasks, .. } = &*self.state;
        let looked_at: Vec<&Node> = match self.look_at_all {
            true => nodes.values().collect(),
            false => self.freed.iter().filter_map(|name| nodes.get(name)).collect(),
        };
        let mut lowered = Vec::new();
        let may = |node: &&Node| node.lowered > 0 && node.session.is_some() && node.nominees.is_empty();
        for node in looked_at.into_iter().filter(may) {
            for TaskRow { task, .. } in node.tasks.iter().filter_map(|id| tasks.get(id)).map(Box::as_ref) {
                let ends = task.cancel.is_some() || task.preempted.is_some();
                let is_settled = task.resized.as_ref().is_some_and(|resized| resized.asked.is_none());
                if is_settled && !ends && task.request() != task.demand() {
                    let place = (Reverse(task.priority()), task.sequence(), task.id().clone());
                    lowered.push((place, node.row.name.clone()));
                }
            }
        }
        lowered.sort_unstable();
        for ((.., id), node) in lowered {
            let (Some(row), Some(node)) = (self.state.tasks.get(&id), self.state.nodes.get(&node)) else {
                continue;
            };
            let (now, whole) = (row.task.request(), *row.task.demand());
            let missing = Demand {
                cpu: Millicores(whole.cpu.0.saturating_sub(now.cpu.0)),
                memory: Bytes(whole.memory.0.saturating_sub(now.memory.0)),
                gpu_memory: None,
                network: None,
                storage_io: None,
            };
            // Also on one that is cordoned.
            if place::fits(Needs::of(&missing), &node.candidate()) {
                let reason = format!(
                    "{} has room for what was taken from it ({})",
                    node.row.name,
                    change(&whole, now)
                );
                self.resize(&id, whole, reason, None);
            }
        }
    }
}
