//! Which node a task goes to. Pure and exact: a float is made for display only.
//!
//! [`Cluster`] knows all nodes and what of them is taken. A task's [`Request`] is *filtered* against each node:
//! every resource, the share or number of GPUs and the memory of one of them, labels, taints, the GPUs' model,
//! whether the node takes tasks at all. Of the nodes that are left a [`Scorer`] takes the best. The seed's order of nodes
//! depends on the nodes alone, so the best one is found by walking an [`index`] of exact keys; where it ends is
//! always the node that [`judge`] finds, which is the formula written down plainly.

mod cards;
mod class;
mod cluster;
mod exact;
mod explain;
mod forecast;
mod fragment;
mod index;
mod judge;
mod lanes;
mod lower;
mod mix;
mod node;
mod preempt;
mod scorer;
mod task;
#[cfg(test)]
mod tests;

pub use self::{
    cards::{CardBooks, CardTaken, NO_BOOKS, NO_CARDS, NO_OFFER, Needs, suits_model},
    class::{Constraint, ConstraintId, Mismatch, Taint, Toleration},
    cluster::{Cluster, NodeError, Taken},
    explain::{Explanation, Filter, Obstacle, Ranked, Rejections},
    forecast::{Holder, Reservation, Wanted},
    index::Walk,
    judge::{Candidate, Choice, NOTHING, best, choose, could_ever_hold, fits, fits_with, judge},
    lower::{Amount, Lowered, Spare, lower},
    mix::{Shape, TaskMix},
    node::{Gpus, MAX_GPUS, NodeId, NodeSpec, Placement, Readiness, WHOLE},
    preempt::{Considered, Cost, NAMED, Preemption, Resident, Residents, Victim, WAYS},
    scorer::{POINTS, ParseScoringError, Scorer, Scoring},
    task::{GpuRequest, Request},
};
