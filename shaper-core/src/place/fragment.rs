//! Fragments: what GPUs have free and tasks cannot use.
//!
//! For a task of the mix, a fragment of a node is everything that its GPUs have free if the task does not fit
//! there, else what is free of those GPUs that have less than it wants. A node's *loss* is the mean of that over
//! the mix. A decision goes to the node whose loss grows least ("Beware of Fragmentation", ATC '23).
//!
//! The paper's rule knows CPU, GPUs and their model, and does not distinguish growths within one of a hundred
//! steps of a logistic curve. All is counted in integers: a loss is the sum over tasks, not their mean.

use std::collections::HashMap;

use super::{
    class::{ClassId, Classes},
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

/// Thousandths of all tasks that typical shapes make up.
const TYPICAL: u64 = 950;
/// Tasks after which a mix is learnt for the first time, and again whenever there are a quarter more.
const FIRST_LESSON: u64 = 32;

/// A typical shape.
#[derive(Clone, Copy, Debug)]
struct Kind {
    shape: Shape,
    weight: i64,
}

/// What a task would do to a node's loss.
#[derive(Clone, Copy, Debug)]
struct Growth {
    /// Of the node, when this was found out. 0: never.
    version: u32,
    /// `None`: it does not fit.
    found: Option<(i64, u16)>,
}

/// Losses of all nodes for a mix.
#[derive(Clone, Debug)]
pub(super) struct Fragments {
    rule: Rule,
    mix: TaskMix,
    /// Tasks when the mix was learnt last.
    learnt_at: u64,
    kinds: Vec<Kind>,
    weight: i64,
    /// Which kinds suit a class.
    suits: HashMap<ClassId, Vec<bool>>,
    versions: Vec<u32>,
    losses: Vec<(u32, i64)>,
    rows: HashMap<Shape, usize>,
    growths: Vec<Vec<Growth>>,
}

/// A node's GPUs, as losses see it.
#[derive(Clone, Copy)]
struct State<'a> {
    cpu: u64,
    memory: u64,
    share: [u16; MAX_GPUS],
    gpus: usize,
    suits: &'a [bool],
}

impl State<'_> {
    fn with(mut self, request: &Request, gpus: u16, share: u16) -> Self {
        self.cpu = self.cpu.saturating_sub(request.demand.cpu.0);
        self.memory = self.memory.saturating_sub(request.demand.memory.0);
        for gpu in (0..MAX_GPUS).filter(|gpu| gpus >> gpu & 1 == 1) {
            self.share[gpu] = self.share[gpu].saturating_sub(share);
        }
        self
    }
}

impl Fragments {
    pub(super) fn new(rule: Rule) -> Fragments {
        Fragments {
            rule,
            mix: TaskMix::default(),
            learnt_at: 0,
            kinds: Vec::new(),
            weight: 1,
            suits: HashMap::new(),
            versions: Vec::new(),
            losses: Vec::new(),
            rows: HashMap::new(),
            growths: Vec::new(),
        }
    }

    /// Packs for this mix from now on.
    pub(super) fn expect(&mut self, mix: &TaskMix) {
        self.mix = mix.clone();
        self.settle();
    }

    /// Counts a task that has come.
    pub(super) fn learn(&mut self, request: &Request) {
        self.mix.add(Shape::of(request));
        let tasks = self.mix.tasks();
        if tasks >= FIRST_LESSON && tasks >= self.learnt_at + self.learnt_at / 4 {
            self.settle();
        }
    }

    fn settle(&mut self) {
        self.learnt_at = self.mix.tasks();
        let kind = |(shape, count): (Shape, u64)| Kind { shape, weight: count as i64 };
        self.kinds = self.mix.typical(TYPICAL).into_iter().map(kind).collect();
        self.weight = self.kinds.iter().map(|kind| kind.weight).sum::<i64>().max(1);
        self.suits.clear();
        self.rows.clear();
        self.growths.clear();
        self.losses.clear();
    }

    /// A node changed.
    pub(super) fn touch(&mut self, node: usize) {
        if let Some(version) = self.versions.get_mut(node) {
            *version += 1;
        }
    }

    /// The node that loses least, of those that have room, and the GPUs there.
    pub(super) fn best(
        &mut self,
        nodes: &[Node],
        classes: &Classes,
        request: &Request,
        may: impl Fn(NodeId) -> bool,
    ) -> Option<Placement> {
        let row = self.row(nodes, request);
        let mut best: Option<(i64, Placement)> = None;
        for (number, node) in nodes.iter().enumerate() {
            let Some((score, gpus)) = self.growth(row, number, node, classes, request) else { continue };
            let id = NodeId(number as u32);
            if best.is_none_or(|(least, _)| score < least) && may(id) {
                best = Some((score, Placement { node: id, gpus }));
            }
        }
        best.map(|(_, placement)| placement)
    }

    /// Points of a node that has room, and the GPUs there.
    pub(super) fn points(
        &mut self,
        nodes: &[Node],
        classes: &Classes,
        request: &Request,
        number: usize,
    ) -> Option<(u64, u16)> {
        let row = self.row(nodes, request);
        let (score, gpus) = self.growth(row, number, &nodes[number], classes, request)?;
        // Half of the points for no growth. Ours has none beyond eight GPUs, the paper's curve none beyond five.
        let share = match self.rule {
            Rule::Paper => (STEPS - score).clamp(0, STEPS) as u64 * POINTS / STEPS as u64,
            Rule::Ours => (8_000_000 - score).clamp(0, 16_000_000) as u64 * POINTS / 16_000_000,
        };
        Some((share, gpus))
    }

    fn row(&mut self, nodes: &[Node], request: &Request) -> usize {
        self.versions.resize(nodes.len(), 1);
        self.losses.resize(nodes.len(), (0, 0));
        let row = *self.rows.entry(Shape::of(request)).or_insert_with(|| {
            self.growths.push(Vec::new());
            self.growths.len() - 1
        });
        self.growths[row].resize(nodes.len(), Growth { version: 0, found: None });
        row
    }

    fn growth(
        &mut self,
        row: usize,
        number: usize,
        node: &Node,
        classes: &Classes,
        request: &Request,
    ) -> Option<(i64, u16)> {
        let version = self.versions[number];
        let known = self.growths[row][number];
        if known.version == version {
            let is_whole_shape = request.demand.network.is_none() && request.demand.storage_io.is_none();
            return known.found.filter(|_| is_whole_shape || node.has(request));
        }
        // Network or block IO may be lacking for one task and not for another of the same shape: so that is not
        // remembered.
        if !node.is_open() || !classes.decided(request.constraint).suits(node.class) {
            self.growths[row][number] = Growth { version, found: None };
            return None;
        }
        if !node.has(request) {
            return None;
        }
        let found = self.look(number, node, classes, request);
        self.growths[row][number] = Growth { version, found };
        found
    }

    fn look(
        &mut self,
        number: usize,
        node: &Node,
        classes: &Classes,
        request: &Request,
    ) -> Option<(i64, u16)> {
        let (kinds, weight, rule) = (&self.kinds, self.weight, self.rule);
        let suits = self.suits.entry(node.class).or_insert_with(|| {
            kinds.iter().map(|kind| classes.decided(kind.shape.constraint).suits(node.class)).collect()
        });
        let state = State {
            cpu: node.free(0),
            memory: node.free(1),
            share: node.shares(),
            gpus: node.gpus.into(),
            suits,
        };
        let version = self.versions[number];
        if self.losses[number].0 != version {
            self.losses[number] = (version, loss(kinds, &state, rule));
        }
        let before = self.losses[number].1;
        let step = |after: i64, node: &State<'_>| score(rule, after - before, weight, node);
        match request.gpu {
            GpuRequest::Whole(count) => {
                let gpus = node.whole_gpus(count);
                let after = state.with(request, gpus, WHOLE);
                Some((step(loss(kinds, &after, rule), &after), gpus))
            }
            GpuRequest::None if request.gpu_memory() == 0 || node.gpus == 0 => {
                let after = state.with(request, 0, 0);
                Some((step(loss(kinds, &after, rule), &after), 0))
            }
            GpuRequest::None | GpuRequest::Share(_) => {
                let share = request.gpu.thousandths() as u16;
                let mut best: Option<(i64, u16)> = None;
                let mut seen = [u16::MAX; MAX_GPUS];
                for gpu in node.gpu_numbers().filter(|gpu| node.may_share(*gpu, request)) {
                    // Alike but for their memory, of which losses do not know.
                    if seen[..gpu].contains(&node.taken[gpu]) {
                        continue;
                    }
                    seen[gpu] = node.taken[gpu];
                    let after = state.with(request, 1 << gpu, share);
                    let score = step(loss(kinds, &after, rule), &after);
                    if best.is_none_or(|(least, _)| score < least) {
                        best = Some((score, 1 << gpu));
                    }
                }
                best
            }
        }
    }
}

/// What of the node's GPUs tasks of the mix cannot use, summed over them.
fn loss(kinds: &[Kind], state: &State<'_>, rule: Rule) -> i64 {
    let shares = &state.share[..state.gpus];
    let free: i64 = shares.iter().map(|share| i64::from(*share)).sum();
    if free == 0 {
        return 0;
    }
    let most = shares.iter().copied().max().unwrap_or(0);
    let whole = shares.iter().filter(|share| **share == WHOLE).count();
    let mut sum = 0;
    for (kind, suits) in kinds.iter().zip(state.suits) {
        let Shape { cpu, memory, gpu, gpu_memory: _, constraint: _ } = kind.shape;
        let has_room = *suits && cpu <= state.cpu && (rule == Rule::Paper || memory <= state.memory);
        let least = match gpu {
            GpuRequest::Share(share) if has_room && share <= most => share,
            GpuRequest::Whole(count) if has_room && usize::from(count) <= whole => WHOLE,
            _ => {
                sum += kind.weight * free;
                continue;
            }
        };
        let unusable: i64 =
            state.share.iter().filter(|share| **share < least).map(|share| i64::from(*share)).sum();
        sum += kind.weight * unusable;
    }
    sum
}

/// Steps of the paper's curve.
const STEPS: i64 = 100;
/// What our rule adds to a growth, in millionths of a GPU, for what is left of CPU (by 128 millicores) and of GPUs (by
/// eight thousandths): so that nodes that are nearly full are filled first. Found by trying on the trace "openb".
const CPU_LEFT: i64 = 20;
const GPU_LEFT: i64 = 80;

/// Lower is better.
fn score(rule: Rule, growth: i64, weight: i64, after: &State<'_>) -> i64 {
    match rule {
        Rule::Paper => step(growth, weight),
        Rule::Ours => {
            let gpus: u64 = after.share[..after.gpus].iter().map(|share| u64::from(*share)).sum();
            let growth = growth.saturating_mul(1000) / weight;
            growth + CPU_LEFT * (after.cpu / 128) as i64 + GPU_LEFT * (gpus / 8) as i64
        }
    }
}

/// How many of the paper's hundred steps a growth loses: 100 − ⌊100 / (1 + e^(growth / (1000·weight)))⌋.
fn step(growth: i64, weight: i64) -> i64 {
    // Growth by a GPU, in millionths. A mean growth is within ± 16 GPUs.
    let millionths = growth.saturating_mul(1000) / weight;
    // 100 / (1 + e^x) >= k where x <= ln((100 - k) / k).
    STEPS - LOGITS.iter().take_while(|logit| millionths <= **logit).count() as i64
}

/// ln((100 − k) / k) for k from 1 to 99, in millionths.
const LOGITS: [i64; 99] = [
    4_595_120, 3_891_820, 3_476_099, 3_178_054, 2_944_439, 2_751_535, 2_586_689, 2_442_347, 2_313_635,
    2_197_225, 2_090_741, 1_992_430, 1_900_959, 1_815_290, 1_734_601, 1_658_228, 1_585_627, 1_516_347,
    1_450_010, 1_386_294, 1_324_925, 1_265_666, 1_208_311, 1_152_680, 1_098_612, 1_045_969, 994_623, 944_462,
    895_384, 847_298, 800_119, 753_772, 708_185, 663_294, 619_039, 575_364, 532_217, 489_548, 447_312,
    405_465, 363_965, 322_773, 281_851, 241_162, 200_671, 160_343, 120_144, 80_043, 40_005, 0, -40_005,
    -80_043, -120_144, -160_343, -200_671, -241_162, -281_851, -322_773, -363_965, -405_465, -447_312,
    -489_548, -532_217, -575_364, -619_039, -663_294, -708_185, -753_772, -800_119, -847_298, -895_384,
    -944_462, -994_623, -1_045_969, -1_098_612, -1_152_680, -1_208_311, -1_265_666, -1_324_925, -1_386_294,
    -1_450_010, -1_516_347, -1_585_627, -1_658_228, -1_734_601, -1_815_290, -1_900_959, -1_992_430,
    -2_090_741, -2_197_225, -2_313_635, -2_442_347, -2_586_689, -2_751_535, -2_944_439, -3_178_054,
    -3_476_099, -3_891_820, -4_595_120,
];
