//! What is told of those who wait.

use super::*;
use crate::place::{Considered, NAMED, Victim};

#[test]
fn why_nobody_makes_room_is_told() {
    let mut world = World::with_nodes(Config::default(), &[4000, 3000]);
    let wide = world.submit(JobSpec { floor: Some(demand(2500)), ..world.job(3000, Priority::Medium) });
    let low = world.submit(world.job(1000, Priority::Low));
    world.submit(world.job(2000, Priority::High));
    assert!(world.runs(low));
    let waits = world.submit(JobSpec { preempts: true, ..world.job(3000, Priority::Medium) });
    let Some(Why::Waits { shrinkable, victims, behind, nodes, .. }) = world.queue.why(single(waits)) else {
        panic!("it waits");
    };
    let counts = |it: &Considered<TaskKey>| (it.victims, it.nodes, it.suffice);
    let victims = victims.expect("it has others ended");
    assert_eq!((counts(&shrinkable), counts(&victims)), ((1, 1, 0), (1, 1, 0)));
    let expected = Victim {
        task: single(wide),
        node: "node-0".to_owned(),
        priority: Priority::Medium,
        since: 0,
        frees: Demand { memory: Bytes(0), ..demand(500) },
        frees_gpu: GpuRequest::None,
        suffices: false,
    };
    assert_eq!(shrinkable.named, std::slice::from_ref(&expected));
    let expected = Victim {
        task: single(low),
        node: "node-1".to_owned(),
        priority: Priority::Low,
        frees: demand(1000),
        ..expected
    };
    assert_eq!(victims.named, [expected]);
    assert_eq!((behind, nodes.feasible, nodes.nodes), (0, 0, 2));
}

#[test]
fn those_who_would_do_are_named_first_and_not_all() {
    let mut world = World::with_nodes(Config::default(), &[1000, 4000]);
    world.submit(world.job(1000, Priority::High));
    let rest = world.submit(world.job(2000, Priority::High));
    world.submit(world.job(1800, Priority::Low));
    world.add(4000, "zone-0");
    let small: Vec<JobId> = (0..200).map(|_| world.submit(world.job(20, Priority::Low))).collect();
    assert!(world.runs(rest) && small.iter().all(|id| world.runs(*id)));
    let spec = JobSpec { preempts: true, ..world.job(4000, Priority::Medium) };
    let waits = JobSpec { spread: Some(Spread { label: Some("none".to_owned()), most: 1 }), ..spec };
    let waits = world.submit(waits);
    let Some(Why::Waits { victims: Some(victims), .. }) = world.queue.why(single(waits)) else {
        panic!("it waits")
    };
    assert_eq!((victims.nodes, victims.suffice), (2, 1));
    assert_eq!((victims.victims, victims.named.len()), (201, NAMED));
    assert!(victims.named.iter().all(|it| it.suffices && it.node == "node-2"), "{victims:?}");
}
