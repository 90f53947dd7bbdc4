//! The nodes as placement sees them: an index by which the node of the seed formula is found without looking at all of
//! them. It is derived, and kept by [`State::enter`](super::State::enter), [`State::leave`](super::State::leave) and by what
//! changes nodes.

use std::collections::{BTreeMap, BTreeSet};

use shaper_core::{
    place::{
        Cluster, Constraint, ConstraintId, GpuRequest, Gpus, NOTHING, NodeId, NodeSpec, Placement,
        Preemption, Readiness, Request, Resident, Residents, Scorer, Scoring, Walk,
    },
    spec::{Capacity, Demand, Priority},
    task::UnixNanos,
    units::{Bytes, Millicores},
};

use super::state::{NodeRow, Task};

/// The index. A node's number in it is its place in the order of registration.
#[derive(Clone, Debug)]
pub(super) struct Places {
    cluster: Cluster,
    /// What every task says about the kind of its node: nothing.
    any: ConstraintId,
    scoring: Scoring,
    /// Nodes that take work.
    pub(super) open: usize,
}

impl Default for Places {
    fn default() -> Places {
        let mut cluster = Cluster::default();
        let any = cluster.constraint(&Constraint::default());
        Places { cluster, any, scoring: Scoring::of(Scorer::Seed), open: 0 }
    }
}

fn number(node: &NodeRow) -> NodeId {
    // Nodes are numbered from 0, and 2^32 of them do not fit into memory.
    NodeId(node.order as u32)
}

impl Places {
    /// A node more, which takes no work yet. They come in the order of registration.
    pub(super) fn add(&mut self, node: &NodeRow) {
        let spec = NodeSpec {
            name: node.name.clone(),
            capacity: node.capacity,
            gpus: Gpus::default(),
            labels: BTreeMap::new(),
            taints: BTreeSet::new(),
        };
        let id =
            self.cluster.add(spec).expect("names are those of a map, and no node says how many GPUs it has");
        debug_assert_eq!(id, number(node), "{} is out of order", node.name);
        self.cluster.set_readiness(id, Readiness::Away);
    }

    /// Nobody, in the place of a node that was removed.
    pub(super) fn add_nobody(&mut self) {
        let name = format!("\0{}", self.cluster.ids().count());
        // With nothing, it would have no score.
        let capacity = Capacity { cpu: Millicores(1), memory: Bytes(1), ..NOTHING };
        let (labels, taints) = (BTreeMap::new(), BTreeSet::new());
        let spec = NodeSpec { name, capacity, gpus: Gpus::default(), labels, taints };
        let id = self.cluster.add(spec).expect("no node has such a name, and it has no GPUs");
        self.cluster.set_readiness(id, Readiness::Away);
    }

    /// Whether a node takes work.
    pub(super) fn open(&mut self, node: &NodeRow, is_open: bool) {
        let readiness = if is_open { Readiness::Ready } else { Readiness::Away };
        let before = self.cluster.readiness(number(node));
        if before == Some(readiness) || before.is_none() {
            return;
        }
        self.open = if is_open { self.open + 1 } else { self.open.saturating_sub(1) };
        self.cluster.set_readiness(number(node), readiness);
    }

    fn request(&self, demand: &Demand) -> Request {
        // The priority orders tasks, not nodes.
        let priority = Priority::Medium;
        Request { demand: *demand, gpu: GpuRequest::None, constraint: self.any, priority }
    }

    /// Where a task is that is on this node. A node has one GPU as far as is known.
    fn at(&self, node: &NodeRow, demand: &Demand) -> Placement {
        let has_gpu =
            node.capacity.gpu_memory.is_some() && demand.gpu_memory.is_some_and(|memory| memory.0 > 0);
        Placement { node: number(node), gpus: u16::from(has_gpu) }
    }

    /// A task on a node, as one that may have to go.
    pub(super) fn resident(&self, number: u64, node: &NodeRow, task: &Task, since: UnixNanos) -> Resident {
        let request = Request { priority: task.priority(), ..self.request(task.request()) };
        Resident { task: number, request, at: self.at(node, task.request()), since }
    }

    /// Who of them is to go so that a task fits.
    pub(super) fn make_room(
        &self,
        residents: &mut Residents,
        task: &Task,
        now: UnixNanos,
    ) -> Option<Preemption> {
        let request = Request { priority: task.priority(), ..self.request(task.demand()) };
        residents.preempt(&self.cluster, &request, now, |_| true)
    }

    /// A task is on a node.
    pub(super) fn take(&mut self, node: &NodeRow, demand: &Demand) {
        let (request, at) = (self.request(demand), self.at(node, demand));
        self.cluster.adopt(&request, at);
    }

    /// A task is on a node no more.
    pub(super) fn give(&mut self, node: &NodeRow, demand: &Demand) {
        let (request, at) = (self.request(demand), self.at(node, demand));
        self.cluster.release(&request, at);
    }

    /// Whether a task fits on a node now, which takes work.
    pub(super) fn fits(&self, node: &NodeRow, demand: &Demand) -> bool {
        self.cluster.fits(number(node), &self.request(demand))
    }

    /// The best node for a task among those that `may`: its number in the order of registration.
    pub(super) fn best(&mut self, demand: &Demand, may: impl Fn(usize) -> bool) -> Option<usize> {
        let request = self.request(demand);
        let mut walk = Walk::default();
        let may = |node: NodeId| may(node.0 as usize);
        let placement = self.cluster.decide_and_tell(&request, &self.scoring, &mut walk, may)?;
        Some(placement.node.0 as usize)
    }
}
