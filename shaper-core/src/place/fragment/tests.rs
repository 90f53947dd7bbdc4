//! Decisions by rows that are kept, beside the formulas for every node anew.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::{
    place::{
        Constraint, Gpus, NodeSpec, Readiness,
        class::Class,
        task::GpuRequest::{None as NoGpu, Share, Whole},
    },
    spec::{Capacity, Demand, Priority},
    units::{Bytes, Iops, Millicores},
};

#[derive(Clone, Debug)]
enum Step {
    Add { cpu: u64, memory: u64, io: Option<u64>, gpu_memory: Option<u64>, gpus: u8, model: u8 },
    Arrive { cpu: u64, memory: u64, io: Option<u64>, gpu_memory: Option<u64>, gpu: GpuRequest, model: u8 },
    Depart(usize),
    Ready(usize, bool),
}

fn a_step() -> impl Strategy<Value = Step> {
    let gpu = prop_oneof![
        2 => Just(NoGpu),
        5 => prop_oneof![Just(190u16), Just(470), Just(500), Just(810), Just(1000)].prop_map(Share),
        2 => (1u8..4).prop_map(Whole),
    ];
    let scarce = || prop::option::weighted(0.1, 0u64..4);
    prop_oneof![
        2 => (0u64..40, 0u64..40, scarce(), scarce(), 0u8..5, 0u8..3)
            .prop_map(|(cpu, memory, io, gpu_memory, gpus, model)| Step::Add { cpu, memory, io, gpu_memory, gpus, model }),
        12 => (0u64..9, 0u64..9, scarce(), scarce(), gpu, 0u8..4)
            .prop_map(|(cpu, memory, io, gpu_memory, gpu, model)| Step::Arrive { cpu, memory, io, gpu_memory, gpu, model }),
        3 => any::<usize>().prop_map(Step::Depart),
        1 => (any::<usize>(), any::<bool>()).prop_map(|(node, ready)| Step::Ready(node, ready)),
    ]
}

/// Every node, and every GPU of it, by the formula; the first of those that are equal.
fn plainly(
    lesson: &Lesson,
    nodes: &[Node],
    classes: &Classes,
    request: &Request,
) -> Option<(i64, Placement)> {
    let mut best: Option<(i64, Placement)> = None;
    for (number, node) in nodes.iter().enumerate() {
        if !node.is_open() || !classes.decided(request.constraint).suits(node.class) || !node.has(request) {
            continue;
        }
        let one_of_all = || (0..usize::from(node.gpus)).filter(|gpu| node.may_share(*gpu, request));
        let ways: Vec<u16> = match request.gpu {
            Whole(count) => vec![node.whole_gpus(count)],
            NoGpu if request.gpu_memory() == 0 || node.gpus == 0 => vec![0],
            NoGpu | Share(_) => one_of_all().map(|gpu| 1 << gpu).collect(),
        };
        let suits = |id: ConstraintId| classes.decided(id).suits(node.class);
        let loss = |state: &State| match lesson {
            Lesson::Paper(suited) => suited.kinds.plainly(suits, state),
            Lesson::Ours(suited) => suited.kinds.plainly(suits, state),
        };
        for gpus in ways {
            let mut after = node.clone();
            after.book(request, gpus, false);
            let score = lesson.score(loss(&State::of(&after)) - loss(&State::of(node)));
            if best.is_none_or(|(least, _)| score < least) {
                best = Some((score, Placement { node: NodeId(number as u32), gpus }));
            }
        }
    }
    best
}

/// Decides by both rules, and does what `by` says.
fn compare(steps: Vec<Step>, by: Rule) -> Result<(), TestCaseError> {
    let mut classes = Classes::default();
    let mut nodes: Vec<Node> = Vec::new();
    let mut running: Vec<(Request, Placement)> = Vec::new();
    let mut rules = [Rule::Paper, Rule::Ours].map(Fragments::new);
    for step in steps {
        match step {
            Step::Add { cpu, memory, io, gpu_memory, gpus, model } => {
                let model = Some(format!("model-{model}"));
                let class = classes.class(Class { gpu_model: model.clone(), ..Class::default() });
                let spec = NodeSpec {
                    name: String::new(),
                    capacity: Capacity {
                        cpu: Millicores(cpu),
                        memory: Bytes(memory),
                        gpu_memory: gpu_memory.map(Bytes),
                        network: None,
                        storage_io: io.map(Iops),
                    },
                    gpus: Gpus { count: gpus, model },
                    labels: BTreeMap::new(),
                    taints: BTreeSet::new(),
                };
                nodes.push(Node::new(&spec, class, 0));
            }
            Step::Arrive { cpu, memory, io, gpu_memory, gpu, model } => {
                let gpu_models = match model {
                    0 | 1 => BTreeSet::from([format!("model-{model}")]),
                    _ => BTreeSet::new(),
                };
                let constraint = classes.constraint(&Constraint { gpu_models, ..Constraint::default() });
                let demand = Demand {
                    cpu: Millicores(cpu),
                    memory: Bytes(memory),
                    gpu_memory: gpu_memory.map(Bytes),
                    network: None,
                    storage_io: io.map(Iops),
                };
                let request = Request { demand, gpu, constraint, priority: Priority::Medium };
                let mut at = None;
                for fragments in &mut rules {
                    fragments.learn(&request);
                    let found = fragments.best(&nodes, &classes, &request, |_| true);
                    let lesson = fragments.lesson.as_ref().unwrap();
                    let expected = plainly(lesson, &nodes, &classes, &request);
                    prop_assert_eq!(found, expected.map(|(_, at)| at), "{:?}", fragments.rule);
                    let (score, place) = expected.unzip();
                    let points =
                        place.and_then(|at| fragments.points(&nodes, &classes, &request, at.node.0 as usize));
                    let lesson = fragments.lesson.as_ref().unwrap();
                    let given = score.zip(place).map(|(score, at)| (lesson.points(score), at.gpus));
                    prop_assert_eq!(points, given);
                    // Not that node: the best of the others.
                    let other =
                        fragments.best(&nodes, &classes, &request, |id| Some(id) != place.map(|at| at.node));
                    prop_assert!(other.is_none() || other.map(|at| at.node) != place.map(|at| at.node));
                    if fragments.rule == by {
                        at = found;
                    }
                }
                if let Some(at) = at {
                    nodes[at.node.0 as usize].book(&request, at.gpus, false);
                    running.push((request, at));
                    rules.iter_mut().for_each(|fragments| fragments.touch(at.node.0 as usize));
                }
            }
            Step::Depart(which) if !running.is_empty() => {
                let (request, at) = running.swap_remove(which % running.len());
                nodes[at.node.0 as usize].book(&request, at.gpus, true);
                rules.iter_mut().for_each(|fragments| fragments.touch(at.node.0 as usize));
            }
            Step::Ready(which, ready) if !nodes.is_empty() => {
                let number = which % nodes.len();
                nodes[number].readiness = if ready { Readiness::Ready } else { Readiness::Draining };
                rules.iter_mut().for_each(|fragments| fragments.touch(number));
            }
            Step::Depart(_) | Step::Ready(..) => {}
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn the_node_is_that_of_the_formula(
        steps in prop::collection::vec(a_step(), 1..160),
        by in prop_oneof![Just(Rule::Paper), Just(Rule::Ours)],
    ) {
        compare(steps, by)?;
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20))]

    /// Several blocks of nodes, many of them alike.
    #[test]
    fn the_node_is_that_of_the_formula_among_many(
        nodes in prop::collection::vec(a_step(), 20..40),
        steps in prop::collection::vec(a_step(), 40..160),
        by in prop_oneof![Just(Rule::Paper), Just(Rule::Ours)],
    ) {
        let adds = nodes.into_iter().filter(|step| matches!(step, Step::Add { .. }));
        let many: Vec<Step> = adds.flat_map(|step| std::iter::repeat_n(step, 61)).chain(steps).collect();
        compare(many, by)?;
    }
}

#[test]
fn a_mix_that_changes_is_followed() {
    let mut classes = Classes::default();
    let constraint = classes.constraint(&Constraint::default());
    let request = |cpu| Request {
        demand: Demand {
            cpu: Millicores(cpu),
            memory: Bytes(1),
            gpu_memory: None,
            network: None,
            storage_io: None,
        },
        gpu: Share(500),
        constraint,
        priority: Priority::Medium,
    };
    let mut fragments = Fragments::new(Rule::Ours);
    for cpu in [1, 2] {
        for _ in 0..4 * MEMORY {
            fragments.learn(&request(cpu));
            fragments.best(&[], &classes, &request(cpu), |_| true);
        }
    }
    let tasks = |cpu| {
        fragments.mix.shapes().filter(|(shape, _)| shape.cpu == cpu).map(|(_, tasks)| tasks).sum::<u64>()
    };
    assert!(tasks(1) * 100 < tasks(2), "{} of the old, {} of the new", tasks(1), tasks(2));
    assert!(fragments.mix.tasks() < 2 * MEMORY);
}
