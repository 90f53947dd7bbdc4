//! The cluster's decisions beside the formula, written down plainly, in rationals.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::{
    exact::tests::{Rational, amount},
    *,
};
use crate::{
    spec::{Capacity, Demand, Priority},
    units::{BitsPerSec, Bytes, Iops, Millicores},
};

/// What happens to a cluster.
#[derive(Clone, Debug)]
enum Step {
    Add(NodeSpec),
    Arrive { demand: Demand, gpu: GpuRequest, constraint: usize },
    Depart(usize),
    Ready(usize, bool),
}

fn small_or(large: impl Strategy<Value = u64> + 'static) -> impl Strategy<Value = u64> {
    prop_oneof![4 => 1u64..12, 1 => large]
}

fn a_node() -> impl Strategy<Value = NodeSpec> {
    let amounts =
        (small_or(amount()), small_or(amount()), prop::option::of(0u64..12), prop::option::of(0u64..12));
    (amounts, prop::option::of(1u64..4), 0u8..4, 0u8..3, any::<bool>()).prop_map(
        |((cpu, memory, network, io), gpu_memory, gpus, kind, tainted)| NodeSpec {
            name: String::new(),
            capacity: Capacity {
                cpu: Millicores(cpu),
                memory: Bytes(memory),
                gpu_memory: gpu_memory.map(Bytes),
                network: network.map(BitsPerSec),
                storage_io: io.map(Iops),
            },
            gpus: Gpus { count: gpus, model: Some(format!("model-{kind}")) },
            labels: BTreeMap::from([("zone".to_owned(), format!("zone-{kind}"))]),
            taints: if tainted && kind == 2 {
                BTreeSet::from([Taint { key: "reserved".into(), value: "x".into() }])
            } else {
                BTreeSet::new()
            },
        },
    )
}

fn a_step() -> impl Strategy<Value = Step> {
    let demand =
        (0u64..6, 0u64..6, prop::option::of(0u64..6), prop::option::of(0u64..6), prop::option::of(0u64..3));
    let demand = demand.prop_map(|(cpu, memory, network, io, gpu)| Demand {
        cpu: Millicores(cpu),
        memory: Bytes(memory),
        gpu_memory: gpu.map(Bytes),
        network: network.map(BitsPerSec),
        storage_io: io.map(Iops),
    });
    let gpu = prop_oneof![
        4 => Just(GpuRequest::None),
        2 => prop_oneof![Just(250u16), Just(500), Just(1000)].prop_map(GpuRequest::Share),
        1 => (1u8..3).prop_map(GpuRequest::Whole),
    ];
    prop_oneof![
        3 => a_node().prop_map(Step::Add),
        8 => (demand, gpu, 0usize..4).prop_map(|(demand, gpu, constraint)| Step::Arrive { demand, gpu, constraint }),
        3 => any::<usize>().prop_map(Step::Depart),
        1 => (any::<usize>(), any::<bool>()).prop_map(|(node, ready)| Step::Ready(node, ready)),
    ]
}

fn constraints() -> [Constraint; 4] {
    let labels =
        BTreeMap::from([("zone".to_owned(), BTreeSet::from(["zone-0".to_owned(), "zone-2".to_owned()]))]);
    let tolerations = BTreeSet::from([Toleration { key: "reserved".into(), value: None }]);
    let gpu_models = BTreeSet::from(["model-1".to_owned()]);
    [
        Constraint::default(),
        Constraint { labels: labels.clone(), ..Constraint::default() },
        Constraint { labels, tolerations, ..Constraint::default() },
        Constraint { gpu_models, ..Constraint::default() },
    ]
}

/// A node as the reference keeps it: tasks in a list, everything summed anew each time.
struct Plain {
    spec: NodeSpec,
    ready: bool,
    tasks: Vec<(Demand, GpuRequest, Placement)>,
}

impl Plain {
    fn used(&self, of: impl Fn(&Demand) -> Option<u64>) -> u128 {
        self.tasks.iter().map(|(demand, ..)| u128::from(of(demand).unwrap_or(0))).sum()
    }

    fn gpus(&self) -> usize {
        let named = usize::from(self.spec.gpus.count);
        if self.spec.capacity.gpu_memory.is_some() { named.max(1) } else { named }
    }

    /// Thousandths that are taken of a GPU, and its memory that is.
    fn of_gpu(&self, gpu: usize) -> (u64, u64) {
        let here = self.tasks.iter().filter(|(.., at)| at.gpus >> gpu & 1 == 1);
        here.fold((0, 0), |(share, memory), (demand, request, _)| {
            let taken = match request {
                GpuRequest::None => 0,
                GpuRequest::Share(share) => u64::from(*share),
                GpuRequest::Whole(_) => 1000,
            };
            (share + taken, memory + demand.gpu_memory.map_or(0, |it| it.0))
        })
    }

    fn suits(&self, constraint: &Constraint) -> bool {
        let NodeSpec { labels, taints, gpus, .. } = &self.spec;
        constraint
            .labels
            .iter()
            .all(|(key, values)| labels.get(key).is_some_and(|value| values.contains(value)))
            && (taints.is_empty() || !constraint.tolerations.is_empty())
            && (constraint.gpu_models.is_empty()
                || gpus.model.as_ref().is_some_and(|model| constraint.gpu_models.contains(model)))
    }

    fn fits(&self, demand: &Demand, gpu: GpuRequest) -> bool {
        let Capacity { cpu, memory, gpu_memory, network, storage_io } = self.spec.capacity;
        let rows: [(Option<u64>, Option<u64>, u128); 4] = [
            (Some(demand.cpu.0), Some(cpu.0), self.used(|it| Some(it.cpu.0))),
            (Some(demand.memory.0), Some(memory.0), self.used(|it| Some(it.memory.0))),
            (
                demand.network.map(|it| it.0),
                network.map(|it| it.0),
                self.used(|it| it.network.map(|it| it.0)),
            ),
            (
                demand.storage_io.map(|it| it.0),
                storage_io.map(|it| it.0),
                self.used(|it| it.storage_io.map(|it| it.0)),
            ),
        ];
        let plain = rows.iter().all(|(wanted, total, used)| match (wanted, total) {
            (Some(wanted), Some(total)) => u128::from(*wanted) + used <= u128::from(*total),
            _ => true,
        });
        let wanted = demand.gpu_memory.map_or(0, |it| it.0);
        let has_memory = |taken: u64| gpu_memory.is_none_or(|total| wanted + taken <= total.0);
        let gpus: Vec<(u64, u64)> = (0..self.gpus()).map(|gpu| self.of_gpu(gpu)).collect();
        let has_gpus = match gpu {
            GpuRequest::None => {
                wanted == 0
                    || (gpus.is_empty() && gpu_memory.is_none())
                    || gpus.iter().any(|gpu| has_memory(gpu.1))
            }
            GpuRequest::Share(share) => {
                gpus.iter().any(|(taken, memory)| u64::from(share) + taken <= 1000 && has_memory(*memory))
            }
            GpuRequest::Whole(count) => {
                has_memory(0) && gpus.iter().filter(|gpu| **gpu == (0, 0)).count() >= usize::from(count)
            }
        };
        plain && has_gpus
    }

    fn score(&self) -> Rational {
        let Capacity { cpu, memory, .. } = self.spec.capacity;
        let free = |total: u64, used: u128| u128::from(total).saturating_sub(used);
        Rational::weighted(
            Rational::reduced(free(cpu.0, self.used(|it| Some(it.cpu.0))), cpu.0.into()),
            Rational::reduced(free(memory.0, self.used(|it| Some(it.memory.0))), memory.0.into()),
        )
    }
}

fn reference(nodes: &[Plain], demand: &Demand, gpu: GpuRequest, constraint: &Constraint) -> Option<NodeId> {
    let mut best: Option<(Rational, usize)> = None;
    for (number, node) in nodes.iter().enumerate() {
        if !node.ready || !node.suits(constraint) || !node.fits(demand, gpu) {
            continue;
        }
        let score = node.score();
        if best.is_none_or(|(most, _)| score > most) {
            best = Some((score, number));
        }
    }
    best.map(|(_, number)| NodeId(number as u32))
}

/// Lets it all happen, and compares each decision.
fn compare(steps: Vec<Step>, copies: usize) -> Result<(), TestCaseError> {
    let mut cluster = Cluster::default();
    cluster.index_best_fit();
    let constraints = constraints();
    let ids = constraints.each_ref().map(|it| cluster.constraint(it));
    let mut plain: Vec<Plain> = Vec::new();
    let mut tasks: Vec<(Request, Placement)> = Vec::new();
    for step in steps {
        match step {
            Step::Add(spec) => {
                for _ in 0..copies {
                    let spec = NodeSpec { name: format!("node-{}", plain.len()), ..spec.clone() };
                    cluster.add(spec.clone()).unwrap();
                    plain.push(Plain { spec, ready: true, tasks: Vec::new() });
                }
            }
            Step::Arrive { demand, gpu, constraint } => {
                let request =
                    Request { demand, gpu, constraint: ids[constraint], priority: Priority::Medium };
                let expected = reference(&plain, &demand, gpu, &constraints[constraint]);
                let found = cluster.decide(&request, &Scoring::of(Scorer::Seed));
                prop_assert_eq!(found.map(|it| it.node), expected);
                let fits = |id: NodeId| cluster.fits(id, &request);
                let counted = plain
                    .iter()
                    .filter(|it| it.ready && it.suits(&constraints[constraint]) && it.fits(&demand, gpu));
                prop_assert_eq!(cluster.ids().filter(|id| fits(*id)).count(), counted.count());
                for id in cluster.ids() {
                    prop_assert_eq!(cluster.obstacles(id, &request).is_empty(), cluster.fits(id, &request));
                }
                for scoring in ["best-fit", "fgd", "fragmentation", "seed:1,best-fit:1", "fgd:1,seed:3"] {
                    let other = cluster.decide(&request, &scoring.parse().unwrap());
                    prop_assert_eq!(other.is_some(), found.is_some(), "{}", scoring);
                    prop_assert!(other.is_none_or(|other| cluster.fits(other.node, &request)), "{}", scoring);
                    prop_assert!(
                        other.is_none_or(|other| cluster.clone().allocate(&request, other)),
                        "{}",
                        scoring
                    );
                }
                if let Some(at) = found {
                    prop_assert!(cluster.allocate(&request, at));
                    plain[at.node.0 as usize].tasks.push((demand, gpu, at));
                    tasks.push((request, at));
                }
                cluster.learn(&request);
            }
            Step::Depart(which) if !tasks.is_empty() => {
                let (request, at) = tasks.swap_remove(which % tasks.len());
                cluster.release(&request, at);
                let here = &mut plain[at.node.0 as usize].tasks;
                let gone = here.iter().position(|it| *it == (request.demand, request.gpu, at));
                here.swap_remove(gone.unwrap());
            }
            Step::Ready(which, ready) if !plain.is_empty() => {
                let number = which % plain.len();
                plain[number].ready = ready;
                let readiness = if ready { Readiness::Ready } else { Readiness::Cordoned };
                cluster.set_readiness(NodeId(number as u32), readiness);
            }
            Step::Depart(_) | Step::Ready(..) => {}
        }
        // Never more than there is.
        for node in &plain {
            let Capacity { cpu, memory, .. } = node.spec.capacity;
            prop_assert!(node.used(|it| Some(it.cpu.0)) <= cpu.0.into());
            prop_assert!(node.used(|it| Some(it.memory.0)) <= memory.0.into());
            prop_assert!((0..node.gpus()).all(|gpu| node.of_gpu(gpu).0 <= 1000));
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn the_node_is_that_of_the_plain_formula(steps in prop::collection::vec(a_step(), 1..60)) {
        compare(steps, 1)?;
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20))]

    /// So many nodes that leaves and groups are split and joined, and most of them alike.
    #[test]
    fn the_node_is_that_of_the_plain_formula_among_many(steps in prop::collection::vec(a_step(), 40..80)) {
        compare(steps, 97)?;
    }
}

#[test]
fn what_is_not_there_is_not_allocated() {
    let mut cluster = Cluster::default();
    let any = cluster.constraint(&Constraint::default());
    let capacity = Capacity { cpu: Millicores(1000), memory: Bytes(10), ..NOTHING };
    let spec = NodeSpec {
        name: "n".into(),
        capacity,
        gpus: Gpus { count: 1, model: None },
        labels: BTreeMap::new(),
        taints: BTreeSet::new(),
    };
    let node = cluster.add(spec.clone()).unwrap();
    assert_eq!(cluster.add(spec.clone()), Err(NodeError::Exists("n".into())));
    let many = NodeSpec { name: "m".into(), gpus: Gpus { count: 17, model: None }, ..spec };
    assert!(matches!(cluster.add(many), Err(NodeError::TooManyGpus { gpus: 17, .. })));

    let demand =
        Demand { cpu: Millicores(600), memory: Bytes(1), gpu_memory: None, network: None, storage_io: None };
    let gpu = GpuRequest::Share(600);
    let request = Request { demand, gpu, constraint: any, priority: Priority::Low };
    let at = Placement { node, gpus: 1 };
    assert!(!cluster.allocate(&request, Placement { gpus: 0, ..at }), "it asks for a GPU");
    assert!(!cluster.allocate(&request, Placement { gpus: 2, ..at }), "there is no second GPU");
    assert!(cluster.allocate(&request, at));
    assert!(!cluster.allocate(&request, at));
    assert_eq!(cluster.taken(node), Some(Taken { cpu: 600, memory: 1, gpu: 600 }));
    // What runs is a fact, and more than there is leaves nothing.
    cluster.adopt(&request, at);
    assert!(!cluster.fits(
        node,
        &Request { demand: Demand { cpu: Millicores(1), ..demand }, gpu: GpuRequest::None, ..request }
    ));
    cluster.release(&request, at);
    cluster.release(&request, at);
    assert_eq!(cluster.taken(node), Some(Taken::default()));
}

#[test]
fn why_it_fits_nowhere_is_told() {
    let mut cluster = Cluster::default();
    let node = |name: &str, cpu, memory, zone: &str, gpus| NodeSpec {
        name: name.into(),
        capacity: Capacity { cpu: Millicores(cpu), memory: Bytes(memory), ..NOTHING },
        gpus: Gpus { count: gpus, model: None },
        labels: BTreeMap::from([("zone".to_owned(), zone.to_owned())]),
        taints: BTreeSet::new(),
    };
    for spec in [
        node("small", 1000, 100, "a", 1),
        node("narrow", 4000, 50, "a", 1),
        node("elsewhere", 8000, 800, "b", 1),
        node("full", 3000, 300, "a", 1),
    ] {
        cluster.add(spec).unwrap();
    }
    let labels = BTreeMap::from([("zone".to_owned(), BTreeSet::from(["a".to_owned()]))]);
    let constraint = cluster.constraint(&Constraint { labels, ..Constraint::default() });
    let demand = Demand {
        cpu: Millicores(2000),
        memory: Bytes(90),
        gpu_memory: None,
        network: Some(BitsPerSec(5)),
        storage_io: None,
    };
    let request = Request { demand, gpu: GpuRequest::Share(500), constraint, priority: Priority::High };
    let seed = Scoring::of(Scorer::Seed);
    let full = cluster.node("full").unwrap();
    cluster.set_readiness(full, Readiness::Draining);
    let why = cluster.explain(&request, &seed);
    assert_eq!((why.nodes, why.feasible, why.winner.as_deref()), (4, 0, None));
    assert_eq!(why.not_checked, [(Filter::Network, 4)]);
    let told: Vec<_> =
        why.remedies().map(|it| format!("{} {}: {}", it.nodes, it.nearest.0, it.nearest.1)).collect();
    assert_eq!(
        told,
        [
            "1 full: it is being drained",
            "1 elsewhere: its label zone is b",
            "1 small: cpu: 2 cores wanted, 1 cores free",
            "1 narrow: memory: 90 B wanted, 50 B free",
        ]
    );

    cluster.set_readiness(full, Readiness::Ready);
    let why = cluster.explain(&request, &seed);
    assert_eq!((why.feasible, why.winner.as_deref()), (1, Some("full")));
    let names: Vec<_> = why.top.iter().map(|it| it.node.as_str()).collect();
    assert_eq!(names, ["full"]);
    assert_eq!(why.top[0].points, POINTS, "it is empty");
}

/// The fewest victims of medium priority, and then the fewest, that any set of lower tasks of any node has.
fn fewest(nodes: &[Plain], running: &[(u64, Request, Placement)], request: &Request) -> Option<(u32, u32)> {
    let mut best: Option<(u32, u32)> = None;
    for (number, node) in nodes.iter().enumerate() {
        let here: Vec<_> = running
            .iter()
            .filter(|(_, it, at)| at.node.0 as usize == number && it.priority < request.priority)
            .collect();
        for subset in 1u32..1 << here.len() {
            let goes = |index: usize| subset >> index & 1 == 1;
            let mut rest = node.tasks.clone();
            let mut medium = 0;
            for (index, (_, it, at)) in here.iter().enumerate().filter(|(index, _)| goes(*index)) {
                let gone = rest.iter().position(|task| *task == (it.demand, it.gpu, *at)).unwrap();
                rest.swap_remove(gone);
                medium += u32::from(here[index].1.priority == Priority::Medium);
            }
            let rest = Plain { spec: node.spec.clone(), ready: true, tasks: rest };
            let cost = (medium, subset.count_ones());
            if rest.fits(&request.demand, request.gpu) && best.is_none_or(|best| cost < best) {
                best = Some(cost);
            }
        }
    }
    best
}

fn a_task() -> impl Strategy<Value = (u64, u64, GpuRequest, Priority)> {
    let gpu = prop_oneof![
        3 => Just(GpuRequest::None),
        2 => prop_oneof![Just(250u16), Just(500), Just(1000)].prop_map(GpuRequest::Share),
    ];
    let priority =
        prop_oneof![3 => Just(Priority::Low), 1 => Just(Priority::Medium), 1 => Just(Priority::High)];
    (1u64..6, 1u64..6, gpu, priority)
}

/// Victims that were chosen, and the fewest that would have done.
fn preempt(
    tasks: Vec<(u64, u64, GpuRequest, Priority)>,
    last: (u64, u64, GpuRequest),
) -> Result<[u32; 2], TestCaseError> {
    let mut cluster = Cluster::default();
    let any = cluster.constraint(&Constraint::default());
    let mut plain = Vec::new();
    for number in 0..4 {
        let spec = NodeSpec {
            name: format!("node-{number}"),
            capacity: Capacity { cpu: Millicores(10), memory: Bytes(10), ..NOTHING },
            gpus: Gpus { count: number % 3, model: None },
            labels: BTreeMap::new(),
            taints: BTreeSet::new(),
        };
        cluster.add(spec.clone()).unwrap();
        plain.push(Plain { spec, ready: true, tasks: Vec::new() });
    }
    let request = |(cpu, memory, gpu, priority): (u64, u64, GpuRequest, Priority)| Request {
        demand: Demand {
            cpu: Millicores(cpu),
            memory: Bytes(memory),
            gpu_memory: None,
            network: None,
            storage_io: None,
        },
        gpu,
        constraint: any,
        priority,
    };
    let mut residents = Residents::default();
    let mut running = Vec::new();
    let best_fit = Scoring::of(Scorer::BestFit);
    for (task, it) in (0..).zip(tasks) {
        let request = request(it);
        let Some(at) = cluster.decide(&request, &best_fit) else { continue };
        prop_assert!(cluster.allocate(&request, at));
        plain[at.node.0 as usize].tasks.push((request.demand, request.gpu, at));
        residents.start(Resident { task, request, at, since: task });
        running.push((task, request, at));
    }
    let request = request((last.0, last.1, last.2, Priority::High));
    if cluster.decide(&request, &best_fit).is_some() {
        return Ok([0, 0]);
    }
    let fewest = fewest(&plain, &running, &request);
    let Some(found) = residents.preempt(&cluster, &request, 100, |_| true) else {
        prop_assert_eq!(fewest, None);
        return Ok([0, 0]);
    };
    let Some((medium, count)) = fewest else {
        return Err(TestCaseError::fail("there is no way, and one was found"));
    };
    prop_assert!((found.cost.medium, found.cost.victims) >= (medium, count));
    prop_assert_eq!(found.victims.len(), found.cost.victims as usize);
    // The room that was promised is there once they are gone, and not a moment before.
    cluster.adopt(&request, found.at);
    for victim in &found.victims {
        let resident = residents.stop(*victim).unwrap();
        prop_assert!(resident.request.priority < Priority::High);
        prop_assert!(!cluster.fits(found.at.node, &request));
        cluster.release(&resident.request, resident.at);
    }
    cluster.release(&request, found.at);
    prop_assert!(cluster.allocate(&request, found.at));
    Ok([found.cost.victims, count])
}

#[test]
fn victims_are_few() {
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(2000));
    let sums = std::cell::Cell::new([0u32; 2]);
    let last = (
        1u64..11,
        1u64..11,
        prop_oneof![Just(GpuRequest::None), Just(GpuRequest::Share(500)), Just(GpuRequest::Whole(2))],
    );
    runner
        .run(&(prop::collection::vec(a_task(), 4..24), last), |(tasks, last)| {
            let [chosen, fewest] = preempt(tasks, last)?;
            let [all, least] = sums.get();
            sums.set([all + chosen, least + fewest]);
            Ok(())
        })
        .unwrap();
    let [chosen, fewest] = sums.get();
    assert!(fewest > 500, "only {fewest} victims in all");
    assert!(chosen * 100 <= fewest * 105, "{chosen} victims, where {fewest} would have done");
}
