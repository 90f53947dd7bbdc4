//! When a task will fit, by what is known of when those that run will end: a promise to whoever is first in the queue.
//!
//! EASY backfill: the first that does not fit gets a [`Reservation`], of the nodes where it will fit first and the time of
//! that. Others may start there before it if they end before that time, or fit beside it. Whoever runs longer than was
//! thought is not ended for it.

use std::collections::BTreeMap;

use super::{
    cluster::Cluster,
    node::{Node, NodeId, Placement},
    scorer::Scorer,
    task::Request,
};

/// Somebody who runs on a node.
#[derive(Clone, Copy, Debug)]
pub struct Holder {
    /// Its number.
    pub task: u64,
    /// What it will give back.
    pub request: Request,
    /// Where.
    pub at: Placement,
    /// When, as far as is known.
    pub until: Option<u64>,
}

/// What was promised.
#[derive(Clone, Debug)]
pub struct Reservation {
    at: u64,
    /// What is left over at that time of the nodes that will be used.
    nodes: BTreeMap<NodeId, Node>,
}

impl Reservation {
    /// When it begins.
    pub fn at(&self) -> u64 {
        self.at
    }

    /// The nodes.
    pub fn nodes(&self) -> impl Iterator<Item = NodeId> {
        self.nodes.keys().copied()
    }

    /// Whether a task that ends at `until` may start on this node: elsewhere, before it, or beside it.
    pub fn admits(&self, node: NodeId, request: &Request, until: Option<u64>) -> bool {
        let Some(left) = self.nodes.get(&node) else { return true };
        until.is_some_and(|until| until <= self.at) || left.has(request)
    }

    /// Such a task has started.
    pub fn started(&mut self, request: &Request, at: Placement, until: Option<u64>) {
        if until.is_some_and(|until| until <= self.at) {
            return;
        }
        if let Some(left) = self.nodes.get_mut(&at.node) {
            left.book(request, at.gpus, false);
        }
    }
}

/// A number of tasks of one shape.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// Each.
    pub request: &'a Request,
    /// How many, which start together.
    pub count: usize,
}

impl Cluster {
    /// The first time at which so many fit, on nodes that `may` have one more when they have so many already. Whoever should
    /// have ended ends now. `None`: not as long as those run of whom nobody knows how long they will.
    pub fn forecast<'a>(
        &self,
        wanted: Wanted<'_>,
        now: u64,
        holders: impl Fn(NodeId) -> &'a [Holder],
        mut may: impl FnMut(NodeId) -> bool,
    ) -> Option<Reservation> {
        let Wanted { request, count } = wanted;
        let suits = self.classes.decided(request.constraint);
        let mut times: Vec<(u64, NodeId)> = Vec::new();
        for (id, node) in self.ids().zip(&self.nodes) {
            if !node.is_open() || !suits.suits(node.class) {
                continue;
            }
            let mut node = node.clone();
            let mut ends: Vec<(u64, &Holder)> =
                holders(id).iter().filter_map(|holder| Some((holder.until?.max(now), holder))).collect();
            ends.sort_by_key(|(until, _)| *until);
            let (mut time, mut found) = (now, 0);
            let mut ends = ends.into_iter();
            while found < count {
                if let Some(at) = node
                    .has(request)
                    .then(|| Cluster::place_on(&node, id, request, Scorer::BestFit))
                    .flatten()
                {
                    node.book(request, at.gpus, false);
                    times.push((time, id));
                    found += 1;
                    continue;
                }
                let Some((until, holder)) = ends.next() else { break };
                time = until;
                node.book(&holder.request, holder.at.gpus, true);
            }
        }
        times.sort_unstable();
        times.retain(|(_, node)| may(*node));
        let at = times.get(count.checked_sub(1)?)?.0;
        let mut members: BTreeMap<NodeId, usize> = BTreeMap::new();
        for (_, node) in &times[..count] {
            *members.entry(*node).or_default() += 1;
        }
        let left = |(id, members): (NodeId, usize)| {
            let mut node = self.nodes[id.0 as usize].clone();
            for holder in holders(id).iter().filter(|it| it.until.is_some_and(|until| until.max(now) <= at)) {
                node.book(&holder.request, holder.at.gpus, true);
            }
            for _ in 0..members {
                if let Some(at) = Cluster::place_on(&node, id, request, Scorer::BestFit) {
                    node.book(request, at.gpus, false);
                }
            }
            (id, node)
        };
        Some(Reservation { at, nodes: members.into_iter().map(left).collect() })
    }
}
