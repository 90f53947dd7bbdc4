//! The nodes as placement sees them: an index by which the node of the seed formula is found without looking at all of
//! them. It is derived, and kept by [`State::enter`](super::State::enter), [`State::leave`](super::State::leave) and by what
//! changes nodes.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use shaper_core::{
    gpu::CardSet,
    place::{
        Cluster, Constraint, ConstraintId, GpuRequest, Gpus, MAX_GPUS, NOTHING, Needs, NodeId, NodeSpec,
        Placement, Preemption, Readiness, Request, Resident, Residents, Scorer, Scoring, Walk, suits_model,
    },
    spec::{Capacity, Demand, Priority},
    task::UnixNanos,
    units::{Bytes, Millicores},
};

use super::state::{NodeRow, Task};

/// Wishes for models that are kept: they are made up by those who submit tasks.
const WISHES: usize = 1024;
/// The name of no model: whoever wants it finds none.
const NO_MODEL: &str = "\0";

/// The label of nodes that run containers.
const CONTAINERS: &str = "containers";

/// The cards that placement knows: those with the first numbers.
pub(super) const KNOWN_CARDS: CardSet = CardSet::from_bits((1 << MAX_GPUS) - 1);

/// The index. A node's number in it is its place in the order of registration, and a card's number is its bit there.
#[derive(Clone, Debug)]
pub(super) struct Places {
    cluster: Cluster,
    /// What a task says about the kind of its node, unless it wants a model of GPU: nothing.
    any: ConstraintId,
    /// Models of GPU cards that nodes have.
    models: BTreeSet<String>,
    /// What wishes for a model, and to run containers, come down to among those.
    by_wish: HashMap<(String, bool), ConstraintId>,
    scoring: Scoring,
    /// Nodes that take work.
    pub(super) open: usize,
}

impl Default for Places {
    fn default() -> Places {
        let mut cluster = Cluster::default();
        let any = cluster.constraint(&Constraint::default());
        Places {
            cluster,
            any,
            models: BTreeSet::new(),
            by_wish: HashMap::new(),
            scoring: Scoring::of(Scorer::Seed),
            open: 0,
        }
    }
}

fn number(node: &NodeRow) -> NodeId {
    // Nodes are numbered from 0, and 2^32 of them do not fit into memory.
    NodeId(node.order as u32)
}

/// As placement has them: those that it knows.
fn bits(cards: CardSet) -> u16 {
    (cards.bits() & KNOWN_CARDS.bits()) as u16
}

/// Whether a node is one for such tasks, however much of it is taken.
pub(super) fn suits(needs: Needs<'_>, node: &NodeRow) -> bool {
    needs.suits(&node.gpus) && (node.containers || !needs.container)
}

fn labels(runs_containers: bool) -> BTreeMap<String, String> {
    runs_containers.then(|| (CONTAINERS.to_owned(), String::new())).into_iter().collect()
}

impl Places {
    /// A node more, which takes no work yet. They come in the order of registration.
    pub(super) fn add(&mut self, node: &NodeRow) {
        let offered = bits(node.gpus.cards);
        let count = u16::BITS - offered.leading_zeros();
        // A node that offers no card has no memory of one; and of those that it offers, none that it does not name.
        let gpu_memory = (offered != 0).then(|| node.capacity.gpu_memory.unwrap_or(Bytes(0)));
        let model = (offered != 0).then(|| node.gpus.model.clone());
        if let Some(model) = model.as_ref().filter(|model| !self.models.contains(*model)) {
            self.models.insert(model.clone());
            self.by_wish.clear();
        }
        let spec = NodeSpec {
            name: node.name.clone(),
            capacity: Capacity { gpu_memory, ..node.capacity },
            gpus: Gpus { count: count as u8, model },
            labels: labels(node.containers),
            taints: BTreeSet::new(),
        };
        let id =
            self.cluster.add(spec).expect("names are those of a map, and there are no more cards than bits");
        debug_assert_eq!(id, number(node), "{} is out of order", node.name);
        // A card that is not offered, between those that are, is nobody's: it was lost, or is of another model.
        let gaps = !offered & ((1u32 << count) - 1) as u16;
        if gaps != 0 {
            let nothing = Demand {
                cpu: Millicores(0),
                memory: Bytes(0),
                gpu_memory: None,
                network: None,
                storage_io: None,
            };
            let request = Request {
                gpu: GpuRequest::Whole(gaps.count_ones() as u8),
                ..self.request(Needs::of(&nothing))
            };
            self.cluster.adopt(&request, Placement { node: id, gpus: gaps });
        }
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

    /// What is booked for a task, and what it takes of a node whose model suits it.
    fn request(&self, needs: Needs<'_>) -> Request {
        // The priority orders tasks, not nodes.
        let priority = Priority::Medium;
        Request { demand: *needs.demand, gpu: needs.gpu(), constraint: self.any, priority }
    }

    /// What a task says about the kind of its node: the models that a wish names, and containers.
    fn constraint(&mut self, needs: Needs<'_>) -> ConstraintId {
        // Who asks for no card minds no model.
        let wish = if needs.gpu() == GpuRequest::None { "" } else { &needs.gpus.model };
        let key = (wish.to_owned(), needs.container);
        if let Some(known) = self.by_wish.get(&key) {
            return *known;
        }
        let wanted = needs.container.then(|| (CONTAINERS.to_owned(), BTreeSet::from([String::new()])));
        let labels = wanted.into_iter().collect();
        let mut gpu_models = BTreeSet::new();
        if !wish.is_empty() {
            gpu_models.extend(self.models.iter().filter(|model| suits_model(wish, model)).cloned());
            if gpu_models.is_empty() {
                gpu_models.insert(NO_MODEL.to_owned());
            }
        }
        let constraint = Constraint { gpu_models, labels, ..Constraint::default() };
        let constraint = self.cluster.constraint(&constraint);
        if self.by_wish.len() == WISHES {
            self.by_wish.clear();
        }
        self.by_wish.insert(key, constraint);
        constraint
    }

    /// A task on a node, as one that may have to go.
    pub(super) fn resident(
        &self,
        task_number: u64,
        node: &NodeRow,
        task: &Task,
        since: UnixNanos,
    ) -> Resident {
        let request = Request { priority: task.priority(), ..self.request(task.booked()) };
        let at = Placement { node: number(node), gpus: bits(task.cards) };
        Resident { task: task_number, request, at, since }
    }

    /// Who of them is to go so that a task fits, all of them being on nodes whose model suits it; and which cards it has then.
    pub(super) fn make_room(
        &self,
        residents: &mut Residents,
        task: &Task,
        now: UnixNanos,
    ) -> Option<Preemption> {
        let request = Request { priority: task.priority(), ..self.request(task.needs()) };
        residents.preempt(&self.cluster, &request, now, |_| true)
    }

    /// A task is on a node, with these cards.
    pub(super) fn take(&mut self, node: &NodeRow, needs: Needs<'_>, cards: CardSet) {
        let request = self.request(needs);
        self.cluster.adopt(&request, Placement { node: number(node), gpus: bits(cards) });
    }

    /// A task is on a node no more.
    pub(super) fn give(&mut self, node: &NodeRow, needs: Needs<'_>, cards: CardSet) {
        let request = self.request(needs);
        self.cluster.release(&request, Placement { node: number(node), gpus: bits(cards) });
    }

    /// Whether a task fits on a node now, which takes work.
    pub(super) fn fits(&self, node: &NodeRow, needs: Needs<'_>) -> bool {
        let request = self.request(needs);
        self.cluster.fits(number(node), &request) && suits(needs, node)
    }

    /// The best node for a task among those that `may`: its number in the order of registration, and its cards there.
    pub(super) fn best(&mut self, needs: Needs<'_>, may: impl Fn(usize) -> bool) -> Option<(usize, CardSet)> {
        let mut request = self.request(needs);
        if needs.container || (request.gpu != GpuRequest::None && !needs.gpus.model.is_empty()) {
            request.constraint = self.constraint(needs);
        }
        let mut walk = Walk::default();
        let may = |node: NodeId| may(node.0 as usize);
        let at = self.cluster.decide_and_tell(&request, &self.scoring, &mut walk, may)?;
        let gpus = match request.gpu {
            GpuRequest::None => 0,
            // The seed's order is one of nodes; on a node, what is whole is to stay so.
            GpuRequest::Share(_) | GpuRequest::Whole(_) => self.cluster.pack(at.node, &request)?.gpus,
        };
        Some((at.node.0 as usize, CardSet::from_bits(gpus.into())))
    }
}
