//! Fragments: what GPUs have free and tasks cannot use.
//!
//! A node's *loss* is what a rule says its free GPUs are not good for, given a mix of tasks. A task goes to the node
//! whose loss it makes grow least; to the first of them in the order of registration on a tie. There are two rules:
//! the published one ([`paper`]), for a mix that is told beforehand, and ours ([`room`]), for the mix of the tasks
//! that have come so far.
//!
//! What a task does to the loss of a node depends on the task's shape and on that node alone. So for each shape there is
//! a *row* of all nodes, and a decision looks again at those nodes only that have changed since the row was last used.

mod paper;
mod recent;
mod room;
#[cfg(test)]
mod tests;

use std::collections::HashMap;

use self::{
    paper::{Paper, STEPS},
    recent::Recent,
    room::Rooms,
};
use super::{
    class::{ClassId, Classes, ConstraintId},
    mix::{Shape, TaskMix},
    node::{MAX_GPUS, Node, NodeId, Placement, WHOLE},
    scorer::POINTS,
    task::{GpuRequest, Request},
};

/// By which rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rule {
    Paper,
    Ours,
}

/// Tasks after which a mix is learnt for the first time. After that it is learnt anew whenever as many have come again,
/// and at the latest after [`LESSON`].
const FIRST_LESSON: u64 = 32;
const LESSON: u64 = 4096;
/// From so many tasks on, each lesson halves what came before, so that a mix that changes is followed.
const MEMORY: u64 = 1 << 16;
/// Places in all rows: with more than that, rows are made anew as they are needed.
const PLACES: usize = 1 << 23;
/// Nodes of which a row keeps the least score together.
const BLOCK: usize = 64;
/// The score of a node that has no room.
const NO_ROOM: i64 = i64::MAX;

/// Of these kinds, which are in the order of what they ask of GPUs, those that suit: a group for each such request.
fn by_gpu<K: Copy, G>(
    kinds: &[K],
    suits: &[bool],
    gpu: impl Fn(&K) -> GpuRequest,
    group: impl Fn(GpuRequest, &[K]) -> G,
) -> Vec<G> {
    let suiting: Vec<K> =
        kinds.iter().zip(suits).filter(|(_, suits)| **suits).map(|(kind, _)| *kind).collect();
    suiting.chunk_by(|one, other| gpu(one) == gpu(other)).map(|kinds| group(gpu(&kinds[0]), kinds)).collect()
}

/// A node's free amounts, as rules see them.
#[derive(Clone, Copy, Debug)]
struct State {
    cpu: u64,
    memory: u64,
    share: [u16; MAX_GPUS],
    gpus: usize,
}

impl State {
    fn of(node: &Node) -> State {
        State { cpu: node.free(0), memory: node.free(1), share: node.shares(), gpus: node.gpus.into() }
    }

    fn shares(&self) -> &[u16] {
        &self.share[..self.gpus]
    }

    /// What is left if the task takes these GPUs, and so much of each.
    fn with(mut self, request: &Request, gpus: u16, share: u16) -> State {
        self.cpu = self.cpu.saturating_sub(request.demand.cpu.0);
        self.memory = self.memory.saturating_sub(request.demand.memory.0);
        for gpu in (0..MAX_GPUS).filter(|gpu| gpus >> gpu & 1 == 1) {
            self.share[gpu] = self.share[gpu].saturating_sub(share);
        }
        self
    }
}

/// Kinds of tasks that a rule expects.
trait Kinds {
    /// Kinds that ask for the same of GPUs.
    type Group;

    /// Of each kind.
    fn constraints(&self) -> impl Iterator<Item = ConstraintId>;

    /// Those that suit.
    fn groups(&self, suits: &[bool]) -> Vec<Self::Group>;

    /// A node's loss, if it is of a class that these suit.
    fn loss(&self, groups: &[Self::Group], node: &State) -> i64;
}

/// Kinds, and which of them suit each class. Classes that the same kinds suit share their groups.
#[derive(Clone, Debug)]
struct Suited<K: Kinds> {
    kinds: K,
    by_class: Vec<Option<usize>>,
    patterns: HashMap<Vec<bool>, usize>,
    groups: Vec<Vec<K::Group>>,
}

impl<K: Kinds> Suited<K> {
    fn new(kinds: K) -> Suited<K> {
        Suited { kinds, by_class: Vec::new(), patterns: HashMap::new(), groups: Vec::new() }
    }

    fn pattern(&mut self, class: ClassId, classes: &Classes) -> usize {
        let place = class as usize;
        if let Some(Some(pattern)) = self.by_class.get(place) {
            return *pattern;
        }
        let suits: Vec<bool> = self.kinds.constraints().map(|it| classes.decided(it).suits(class)).collect();
        let pattern = *self.patterns.entry(suits).or_insert_with_key(|suits| {
            self.groups.push(self.kinds.groups(suits));
            self.groups.len() - 1
        });
        self.by_class.resize(self.by_class.len().max(place + 1), None);
        self.by_class[place] = Some(pattern);
        pattern
    }

    fn loss(&self, pattern: usize, node: &State) -> i64 {
        self.kinds.loss(&self.groups[pattern], node)
    }
}

/// What was learnt last.
#[derive(Clone, Debug)]
enum Lesson {
    Paper(Suited<Paper>),
    Ours(Suited<Rooms>),
}

impl Lesson {
    fn learn(rule: Rule, mix: &TaskMix, nodes: &[Node], classes: &Classes) -> Lesson {
        match rule {
            Rule::Paper => Lesson::Paper(Suited::new(Paper::learn(mix))),
            Rule::Ours => Lesson::Ours(Suited::new(Rooms::learn(mix, nodes, classes))),
        }
    }

    /// Which of the kinds suit a class.
    fn pattern(&mut self, class: ClassId, classes: &Classes) -> usize {
        match self {
            Lesson::Paper(suited) => suited.pattern(class, classes),
            Lesson::Ours(suited) => suited.pattern(class, classes),
        }
    }

    fn loss(&self, pattern: usize, node: &State) -> i64 {
        match self {
            Lesson::Paper(suited) => suited.loss(pattern, node),
            Lesson::Ours(suited) => suited.loss(pattern, node),
        }
    }

    /// Of a growth; the least wins.
    fn score(&self, growth: i64) -> i64 {
        match self {
            Lesson::Paper(suited) => suited.kinds.score(growth),
            Lesson::Ours(_) => growth,
        }
    }

    /// Half of the points for no growth. Ours has none beyond eight GPUs, the paper's curve none beyond five.
    fn points(&self, score: i64) -> u64 {
        let (left, most) = match self {
            Lesson::Paper(_) => (STEPS - score, STEPS),
            Lesson::Ours(_) => (8 * room::GPU - score, 16 * room::GPU),
        };
        (i128::from(left.clamp(0, most)) * i128::from(POINTS) / i128::from(most)) as u64
    }

    /// The least score on a node that has room, and the GPUs for it: the first of those that are equal.
    fn look(&self, node: &Node, state: &State, pattern: usize, before: i64, request: &Request) -> (i64, u16) {
        let score = |gpus: u16, share: u16| {
            self.score(self.loss(pattern, &state.with(request, gpus, share)) - before)
        };
        match request.gpu {
            GpuRequest::Whole(count) => {
                let gpus = node.whole_gpus(count);
                (score(gpus, WHOLE), gpus)
            }
            GpuRequest::None if request.gpu_memory() == 0 || node.gpus == 0 => (score(0, 0), 0),
            GpuRequest::None | GpuRequest::Share(_) => {
                let share = request.gpu.thousandths() as u16;
                let mut best = (NO_ROOM, 0);
                for gpu in node.gpu_numbers().filter(|gpu| node.may_share(*gpu, request)) {
                    // Alike but for their memory, of which losses do not know.
                    let mut others = node.gpu_numbers().take(gpu);
                    if others.any(|it| node.taken[it] == node.taken[gpu] && node.may_share(it, request)) {
                        continue;
                    }
                    let found = score(1 << gpu, share);
                    if found < best.0 {
                        best = (found, 1 << gpu);
                    }
                }
                best
            }
        }
    }
}

/// What tasks that are alike would do to each node.
#[derive(Clone, Debug, Default)]
struct Row {
    /// When it was last brought up to date.
    seen: u64,
    /// Of each node; [`NO_ROOM`].
    scores: Vec<i64>,
    gpus: Vec<u16>,
    /// Of each [`BLOCK`] nodes.
    least: Vec<i64>,
}

impl Row {
    fn set(&mut self, node: usize, (score, gpus): (i64, u16)) {
        let before = std::mem::replace(&mut self.scores[node], score);
        self.gpus[node] = gpus;
        let block = node / BLOCK;
        if score <= self.least[block] {
            self.least[block] = score;
        } else if before == self.least[block] {
            let places = block * BLOCK..self.scores.len().min((block + 1) * BLOCK);
            self.least[block] = self.scores[places].iter().copied().min().unwrap_or(NO_ROOM);
        }
    }

    fn best(&self, may: impl Fn(NodeId) -> bool) -> Option<Placement> {
        let (mut least, mut best) = (NO_ROOM, None);
        for (block, scores) in self.scores.chunks(BLOCK).enumerate() {
            if self.least[block] >= least {
                continue;
            }
            for (place, score) in scores.iter().enumerate() {
                let number = block * BLOCK + place;
                let node = NodeId(number as u32);
                if *score < least && may(node) {
                    (least, best) = (*score, Some(Placement { node, gpus: self.gpus[number] }));
                }
            }
        }
        best
    }
}

/// What of a request a row is for: all that decides where there is room, and what it does there.
type Alike = (Shape, u64, u64);

/// Losses of all nodes for a mix.
#[derive(Clone, Debug)]
pub(super) struct Fragments {
    rule: Rule,
    mix: TaskMix,
    /// Tasks since the last lesson, and after how many there is the next.
    came: u64,
    due: u64,
    lesson: Option<Lesson>,
    recent: Recent,
    /// Of each node, and of when.
    losses: Vec<(u64, i64)>,
    numbers: HashMap<Alike, usize>,
    rows: Vec<Row>,
}

impl Fragments {
    pub(super) fn new(rule: Rule) -> Fragments {
        Fragments {
            rule,
            mix: TaskMix::default(),
            came: 0,
            due: FIRST_LESSON,
            lesson: None,
            recent: Recent::default(),
            losses: Vec::new(),
            numbers: HashMap::new(),
            rows: Vec::new(),
        }
    }

    /// Packs for this mix from now on.
    pub(super) fn expect(&mut self, mix: &TaskMix) {
        self.mix = mix.clone();
        self.lesson = None;
    }

    /// Counts a task that has come. The lesson is when it is needed.
    pub(super) fn learn(&mut self, request: &Request) {
        self.mix.add(Shape::of(request));
        self.came += 1;
        if self.came >= self.due {
            self.came = 0;
            self.due = self.mix.tasks().min(LESSON);
            self.lesson = None;
        }
    }

    /// A node changed.
    pub(super) fn touch(&mut self, node: usize) {
        self.recent.touch(node);
    }

    /// The node that loses least, of those that have room, and the GPUs there.
    pub(super) fn best(
        &mut self,
        nodes: &[Node],
        classes: &Classes,
        request: &Request,
        may: impl Fn(NodeId) -> bool,
    ) -> Option<Placement> {
        let row = self.row(nodes, classes, request);
        self.rows[row].best(may)
    }

    /// Points of a node that has room, and the GPUs there.
    pub(super) fn points(
        &mut self,
        nodes: &[Node],
        classes: &Classes,
        request: &Request,
        number: usize,
    ) -> Option<(u64, u16)> {
        let row = self.row(nodes, classes, request);
        let Row { scores, gpus, .. } = &self.rows[row];
        let score = scores.get(number).copied().filter(|score| *score != NO_ROOM)?;
        let points = self.lesson.as_ref()?.points(score);
        Some((points, gpus[number]))
    }

    /// The row of such tasks, up to date.
    fn row(&mut self, nodes: &[Node], classes: &Classes, request: &Request) -> usize {
        self.recent.grow(nodes.len());
        let Fragments { rule, mix, lesson, recent, losses, numbers, rows, .. } = self;
        if lesson.is_none() || rows.len() * nodes.len() > PLACES {
            numbers.clear();
            rows.clear();
        }
        let lesson = lesson.get_or_insert_with(|| {
            losses.clear();
            let lesson = Lesson::learn(*rule, mix, nodes, classes);
            if mix.tasks() >= MEMORY && *rule == Rule::Ours {
                mix.halve();
            }
            lesson
        });
        losses.resize(nodes.len(), (0, 0));
        let [_, _, network, io] = request.plain();
        let number = *numbers.entry((Shape::of(request), network, io)).or_insert_with(|| {
            rows.push(Row::default());
            rows.len() - 1
        });
        let row = &mut rows[number];
        row.scores.resize(nodes.len(), NO_ROOM);
        row.gpus.resize(nodes.len(), 0);
        row.least.resize(nodes.len().div_ceil(BLOCK), NO_ROOM);
        let decided = classes.decided(request.constraint);
        for number in recent.since(row.seen) {
            let node = &nodes[number];
            let found = if node.is_open() && decided.suits(node.class) && node.has(request) {
                let (state, pattern) = (State::of(node), lesson.pattern(node.class, classes));
                let loss = &mut losses[number];
                if loss.0 != recent.changed(number) {
                    *loss = (recent.changed(number), lesson.loss(pattern, &state));
                }
                lesson.look(node, &state, pattern, loss.1, request)
            } else {
                (NO_ROOM, 0)
            };
            row.set(number, found);
        }
        row.seen = recent.now();
        number
    }
}
