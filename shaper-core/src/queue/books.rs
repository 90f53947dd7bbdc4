//! Who holds what: the books of placement, of those who could be ended or shrunk, of when they end, and of what is lent.

use std::collections::{BTreeSet, HashMap};

use super::{
    Amounts,
    job::{JobSpec, TaskKey},
    reclaim::Reclaimed,
};
use crate::{
    place::{
        Cluster, Considered, GpuRequest, Holder, NodeError, NodeId, NodeSpec, Placement, Preemption,
        Readiness, Request, Reservation, Resident, Residents, Scoring, Walk, Wanted,
    },
    spec::{Demand, Priority},
    task::UnixNanos,
    units::{BitsPerSec, Bytes, Iops, Millicores},
};

/// What a task takes of a node.
#[derive(Clone, Copy, Debug)]
pub(super) struct Claim {
    /// What it reserves.
    pub(super) request: Request,
    /// CPU that is lent to it, millicores.
    pub(super) lent: u64,
}

impl Claim {
    pub(super) fn of(spec: &JobSpec, holds: &Request) -> Claim {
        if !spec.oversubscribes {
            return Claim { request: *holds, lent: 0 };
        }
        let demand = Demand { cpu: Millicores(0), ..holds.demand };
        Claim { request: Request { demand, ..*holds }, lent: holds.demand.cpu.0 }
    }
}

/// What a task would give back if it were shrunk to its floor.
fn slack(holds: &Request, floor: &Demand) -> Option<Request> {
    let Demand { cpu, memory, gpu_memory: _, network, storage_io } = holds.demand;
    let demand = Demand {
        cpu: Millicores(cpu.0.saturating_sub(floor.cpu.0)),
        memory: Bytes(memory.0.saturating_sub(floor.memory.0)),
        gpu_memory: None,
        network: network.map(|it| BitsPerSec(it.0.saturating_sub(floor.network.map_or(it.0, |it| it.0)))),
        storage_io: storage_io.map(|it| Iops(it.0.saturating_sub(floor.storage_io.map_or(it.0, |it| it.0)))),
    };
    let is_some = demand.cpu.0 > 0
        || demand.memory.0 > 0
        || demand.network.is_some_and(|it| it.0 > 0)
        || demand.storage_io.is_some_and(|it| it.0 > 0);
    // Anybody may be shrunk to his floor, so all are below whoever asks.
    is_some.then_some(Request { demand, gpu: GpuRequest::None, priority: Priority::Low, ..*holds })
}

/// How a task makes room for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Yields {
    ByShrinking,
    ByEnding,
}

impl Yields {
    /// For what they are looked through. `None`: nobody makes room for what is lent.
    fn request(self, claim: &Claim) -> Option<Request> {
        let priority = match self {
            // Anybody may be shrunk to his floor.
            Yields::ByShrinking => Priority::High,
            Yields::ByEnding => claim.request.priority,
        };
        (claim.lent == 0).then_some(Request { priority, ..claim.request })
    }
}

/// What was taken out of the books of who could make room, by [`Yields`].
pub(super) type Spared = [Option<Resident>; 2];

#[derive(Clone, Debug, Default)]
pub(super) struct Books {
    pub(super) cluster: Cluster,
    /// By [`Yields`]: of the tasks that have a floor, what is above it; and what each has.
    yielding: [Residents; 2],
    holders: Vec<Vec<Holder>>,
    reclaimed: Vec<Reclaimed>,
    /// The nodes that lend something.
    lenders: BTreeSet<NodeId>,
    /// By label, of each node: which value.
    places: HashMap<String, Vec<Option<u32>>>,
    pub(super) total: Amounts,
    fresh_for: u64,
}

impl Books {
    pub(super) fn new(fresh_for: u64) -> Books {
        Books { fresh_for, ..Books::default() }
    }

    pub(super) fn add(&mut self, spec: NodeSpec) -> Result<NodeId, NodeError> {
        let (cpu, memory) = (spec.capacity.cpu.0, spec.capacity.memory.0);
        let gpus = u64::from(spec.gpus.count) * 1000;
        let id = self.cluster.add(spec)?;
        self.holders.push(Vec::new());
        self.reclaimed.push(Reclaimed::of(cpu));
        self.places.clear();
        for (total, has) in self.total.iter_mut().zip([cpu, memory, gpus]) {
            *total = total.saturating_add(has);
        }
        self.touch(id);
        Ok(id)
    }

    pub(super) fn set_readiness(&mut self, node: NodeId, readiness: Readiness) {
        self.cluster.set_readiness(node, readiness);
        self.touch(node);
    }

    fn touch(&mut self, node: NodeId) {
        for those in &mut self.yielding {
            those.changed(node);
        }
    }

    /// Of each node, its place by a label: nodes of one value have the same.
    pub(super) fn places(&mut self, label: &str) -> &[Option<u32>] {
        let cluster = &self.cluster;
        self.places.entry(label.to_owned()).or_insert_with(|| {
            let mut numbers: HashMap<&str, u32> = HashMap::new();
            let mut number = |id: NodeId| {
                let value = cluster.spec(id)?.labels.get(label)?;
                let next = numbers.len() as u32;
                Some(*numbers.entry(value).or_insert(next))
            };
            cluster.ids().map(&mut number).collect()
        })
    }

    /// Where a task fits now.
    pub(super) fn fit(
        &mut self,
        claim: &Claim,
        scoring: &Scoring,
        now: UnixNanos,
        may: impl Fn(NodeId) -> bool,
    ) -> Option<Placement> {
        let (reclaimed, fresh_for) = (&self.reclaimed, self.fresh_for);
        let lends = |node: NodeId| {
            let it = &reclaimed[node.0 as usize];
            claim.lent == 0 || it.used + claim.lent <= it.lendable(now, fresh_for)
        };
        self.cluster
            .decide_and_tell(&claim.request, scoring, &mut Walk::default(), |node| lends(node) && may(node))
    }

    /// Who is to give something up so that it fits.
    pub(super) fn make_room(
        &mut self,
        yields: Yields,
        claim: &Claim,
        now: UnixNanos,
        may: impl Fn(NodeId) -> bool,
    ) -> Option<Preemption> {
        let request = yields.request(claim)?;
        self.yielding[yields as usize].preempt(&self.cluster, &request, now, may)
    }

    /// Who could give something up for it at all.
    pub(super) fn considered(&self, yields: Yields, claim: &Claim) -> Considered<u64> {
        let considered = |request| self.yielding[yields as usize].considered(&self.cluster, &request);
        yields.request(claim).map(considered).unwrap_or_default()
    }

    /// When so many will fit together.
    pub(super) fn forecast(
        &self,
        wanted: Wanted<'_>,
        now: UnixNanos,
        may: impl FnMut(NodeId) -> bool,
    ) -> Option<Reservation> {
        let holders = |node: NodeId| self.holders[node.0 as usize].as_slice();
        self.cluster.forecast(wanted, now, holders, may)
    }

    /// Takes what was found to fit. False if it is not there.
    #[must_use]
    pub(super) fn take(&mut self, claim: &Claim, at: Placement) -> bool {
        let is_there = self.cluster.allocate(&claim.request, at);
        if is_there {
            self.book(claim, at);
        }
        is_there
    }

    /// Takes what will be there once others have gone.
    pub(super) fn take_ahead(&mut self, claim: &Claim, at: Placement) {
        self.cluster.adopt(&claim.request, at);
        self.book(claim, at);
    }

    fn book(&mut self, claim: &Claim, at: Placement) {
        let it = &mut self.reclaimed[at.node.0 as usize];
        it.reserve(claim.request.demand.cpu.0);
        it.used += claim.lent;
        if claim.lent > 0 {
            self.lenders.insert(at.node);
        }
        self.touch(at.node);
    }

    pub(super) fn give_back(&mut self, claim: &Claim, at: Placement) {
        self.cluster.release(&claim.request, at);
        let it = &mut self.reclaimed[at.node.0 as usize];
        it.give_back(claim.request.demand.cpu.0);
        it.used = it.used.saturating_sub(claim.lent);
        if it.used == 0 {
            self.lenders.remove(&at.node);
        }
        self.touch(at.node);
    }

    /// A task runs: it may be ended or shrunk for others, and will end.
    pub(super) fn start(
        &mut self,
        task: TaskKey,
        spec: &JobSpec,
        holds: &Request,
        at: Placement,
        since: UnixNanos,
    ) {
        let (claim, task) = (Claim::of(spec, holds), task.number());
        let [above_floor, all] = &mut self.yielding;
        all.start(Resident { task, request: claim.request, at, since });
        let until = spec.runs_for.map(|it| since.saturating_add(it));
        self.holders[at.node.0 as usize].push(Holder { task, request: claim.request, at, until });
        let slack = spec.floor.and_then(|floor| slack(&claim.request, &floor));
        if let Some(request) = slack.filter(|_| claim.lent == 0) {
            above_floor.start(Resident { task, request, at: Placement { gpus: 0, ..at }, since });
        }
    }

    /// It runs no more.
    pub(super) fn stop(&mut self, task: TaskKey, at: Placement) {
        let task = task.number();
        self.spare(Yields::ByEnding, task);
        self.holders[at.node.0 as usize].retain(|holder| holder.task != task);
    }

    /// It is to shrink, or to end: nobody else counts on that, nor that who is to end shrinks. What [`Books::spare_again`] undoes.
    pub(super) fn spare(&mut self, yields: Yields, task: u64) -> Spared {
        let mut spared = Spared::default();
        for (those, spared) in self.yielding.iter_mut().zip(&mut spared).take(yields as usize + 1) {
            *spared = those.stop(task);
        }
        spared
    }

    pub(super) fn spare_again(&mut self, spared: Spared) {
        for (those, resident) in self.yielding.iter_mut().zip(spared) {
            if let Some(resident) = resident {
                those.start(resident);
            }
        }
    }

    /// The peak of those who reserve CPU on a node is predicted anew. Whether that changes anything.
    pub(super) fn predict(&mut self, node: NodeId, peak: u64, now: UnixNanos) -> bool {
        self.reclaimed.get_mut(node.0 as usize).is_some_and(|it| it.predict(peak, now, self.fresh_for))
    }

    /// Nodes that lend more than they may, and by how much.
    pub(super) fn overdrawn(&self, now: UnixNanos) -> Vec<(NodeId, u64)> {
        let excess = |node: &NodeId| (*node, self.reclaimed[node.0 as usize].excess(now, self.fresh_for));
        self.lenders.iter().map(excess).filter(|(_, excess)| *excess > 0).collect()
    }

    /// Who is on a node.
    pub(super) fn on(&self, node: NodeId) -> impl Iterator<Item = TaskKey> {
        self.holders.get(node.0 as usize).into_iter().flatten().map(|holder| TaskKey::of(holder.task))
    }

    pub(super) fn reclaimed(&self) -> &[Reclaimed] {
        &self.reclaimed
    }
}
