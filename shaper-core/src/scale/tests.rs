//! Packing, and how a group stands after what happened to it.

use proptest::prelude::*;

use super::*;
use crate::{
    gpu::CardRequest,
    place::{NOTHING, Needs},
    spec::Demand,
    units::{Bytes, Millicores},
};

const GIB: u64 = 1 << 30;
const SECOND: u64 = 1_000_000_000;

fn capacity(cpu: u64, gib: u64) -> Capacity {
    Capacity { cpu: Millicores(cpu), memory: Bytes(gib * GIB), ..NOTHING }
}

fn demand(cpu: u64, gib: u64) -> Demand {
    Demand {
        cpu: Millicores(cpu),
        memory: Bytes(gib * GIB),
        gpu_memory: None,
        network: None,
        storage_io: None,
    }
}

fn room(capacity: Capacity, coming: u32, more: u32) -> Room {
    Room { capacity: Some(capacity), coming, more, resting: None }
}

fn group() -> Group {
    Group {
        name: "workers".into(),
        nodes: "w*".parse().unwrap(),
        capacity: Some(capacity(4000, 16)),
        min: 0,
        max: 10,
        cooldown: 30 * SECOND,
        provision: 300 * SECOND,
        idle: Some(60 * SECOND),
        timeout: 10 * SECOND,
        provider: Provider::Keda,
    }
}

#[test]
fn as_many_nodes_as_it_takes_and_not_one_more() {
    let packed = pack(&[room(capacity(4000, 16), 0, 10)], &[(Needs::of(&demand(1000, 1)), 9)]);
    assert_eq!(
        (&packed.more[..], &packed.fates[0].new[..], packed.fates[0].left),
        (&[3][..], &[(0, 9)][..], 0)
    );
    // What is coming is used first, also by tasks of another kind.
    let packed = pack(
        &[room(capacity(4000, 16), 1, 10)],
        &[(Needs::of(&demand(3000, 1)), 1), (Needs::of(&demand(1000, 1)), 2)],
    );
    assert_eq!((&packed.more[..], &packed.fates[0].coming[..]), (&[1][..], &[(0, 1)][..]));
    assert_eq!((&packed.fates[1].coming[..], &packed.fates[1].new[..]), (&[(0, 1)][..], &[(0, 1)][..]));
    // What is not asked for does not run out.
    let packed = pack(&[room(capacity(4000, 16), 0, 10)], &[(Needs::of(&demand(0, 16)), 2)]);
    assert_eq!(packed.more, [2]);
}

#[test]
fn the_first_group_that_can_help_does_and_the_others_say_why_not() {
    let small = room(capacity(1000, 4), 0, 5);
    let resting = Room { resting: Some(7), ..room(capacity(8000, 64), 0, 5) };
    let full = room(capacity(8000, 64), 0, 1);
    let unknown = Room { capacity: None, coming: 0, more: 5, resting: None };
    let packed = pack(&[small, resting, unknown, full], &[(Needs::of(&demand(4000, 8)), 3)]);
    assert_eq!((&packed.more[..], packed.fates[0].left), (&[0, 0, 0, 1][..], 1));
    let obstacles = &packed.fates[0].obstacles;
    assert!(
        matches!(&obstacles[0], (0, Obstacle::TooSmall(lacking)) if lacking[0].contains("4 cores wanted")),
        "{obstacles:?}"
    );
    assert_eq!(obstacles[1..], [(1, Obstacle::Resting(7)), (2, Obstacle::Unknown), (3, Obstacle::Full)]);
}

#[test]
fn memory_of_a_gpu_that_nobody_promised_is_not_there() {
    let wants = Demand { gpu_memory: Some(Bytes(GIB)), ..demand(1000, 1) };
    let packed = pack(&[room(capacity(4000, 16), 0, 10)], &[(Needs::of(&wants), 1)]);
    assert_eq!(packed.more, [0]);
    assert!(packed.fates[0].obstacles[0].1.to_string().contains("gpu_memory"), "{packed:?}");
    let with_gpu = Capacity { gpu_memory: Some(Bytes(2 * GIB)), ..capacity(4000, 16) };
    assert_eq!(pack(&[room(with_gpu, 0, 10)], &[(Needs::of(&wants), 3)]).more, [2]);
    // How many cards there are, and of which model, no group says.
    let gpus = CardRequest { count: 1, model: String::new() };
    let packed = pack(&[room(with_gpu, 1, 10)], &[(Needs { gpus: &gpus, ..Needs::of(&wants) }, 3)]);
    assert_eq!((&packed.more[..], packed.fates[0].left), (&[0][..], 3));
    assert_eq!(packed.fates[0].obstacles, [(0, Obstacle::Cards)]);
}

#[test]
fn nodes_that_turn_out_smaller_make_the_group_smaller() {
    let said = Capacity { network: Some(crate::units::BitsPerSec(100)), ..capacity(8000, 32) };
    let real = Capacity { network: None, ..capacity(2000, 64) };
    let least = template(&said, [real]);
    assert_eq!((least.cpu.0, least.memory.0, least.network), (2000, 32 * GIB, said.network));
}

/// A group with that many nodes here, and as many wanted.
fn standing(nodes: u32) -> Standing {
    let mut standing = Standing::default();
    standing.assume(nodes, SECOND);
    standing.registered = nodes;
    standing
}

fn facts(registered: u32, more: u32) -> Facts {
    Facts { registered, more, ..Facts::default() }
}

fn last(standing: &Standing) -> &str {
    &standing.notes.back().unwrap().text
}

#[test]
fn it_is_asked_once_and_again_only_after_a_pause() {
    let (group, mut it) = (group(), standing(1));
    let (order, _) = it.next(&group, facts(1, 2), 10 * SECOND);
    let order = order.unwrap();
    assert_eq!((order.number, order.target), (1, 3));
    assert!(matches!(order.kind, OrderKind::Grow { by: 2, .. }));
    assert_eq!(it.next(&group, facts(1, 5), 11 * SECOND).0, None, "the first is not answered");
    assert_eq!(it.settle(7, Ok(None), 12 * SECOND), None, "that is no order of now");
    assert!(it.settle(1, Ok(None), 12 * SECOND).is_some());
    assert_eq!((it.target, it.coming(1)), (Some(3), 2));
    assert_eq!(it.next(&group, facts(1, 1), 20 * SECOND).0, None, "it has just been enlarged");
    assert_eq!(it.next(&group, facts(1, 1), 42 * SECOND).0.unwrap().target, 4);
}

#[test]
fn it_never_grows_beyond_its_bounds() {
    let (group, mut it) = (Group { min: 2, max: 4, ..group() }, standing(1));
    let order = it.next(&group, facts(1, 0), SECOND).0.unwrap();
    assert_eq!(order.target, 2, "up to its least size without anybody who waits");
    it.settle(1, Ok(None), SECOND);
    assert_eq!(it.may_grow(&group, 2), 2);
    let order = it.next(&group, facts(2, 9), 100 * SECOND).0.unwrap();
    assert_eq!(order.target, 4);
    it.settle(2, Ok(None), 100 * SECOND);
    assert_eq!(it.next(&group, facts(4, 9), 200 * SECOND).0, None);
}

#[test]
fn a_provider_that_fails_is_left_alone_for_longer_and_longer() {
    let (group, mut it) = (group(), standing(0));
    let mut now = SECOND;
    for (number, rest) in [(1, 30), (2, 60), (3, 120)] {
        assert!(it.next(&group, facts(0, 1), now).0.is_some());
        it.settle(number, Err("no quota".into()), now);
        assert_eq!(last(&it), format!("asked for 1 more: no quota; left alone for {rest} s"));
        assert_eq!(it.next(&group, facts(0, 1), now + (rest - 1) * SECOND).0, None);
        now += rest * SECOND;
    }
    assert_eq!(it.target, Some(0));
    for number in 4..20 {
        assert!(it.next(&group, facts(0, 1), now).0.is_some());
        it.settle(number, Err("no quota".into()), now);
        now = it.rests_until;
    }
    assert!(last(&it).ends_with("left alone for 1800 s"));
    // One that came is forgiven.
    assert!(it.next(&group, facts(0, 1), now).0.is_some());
    it.settle(20, Ok(None), now);
    it.next(&group, facts(1, 0), now + SECOND);
    assert_eq!((it.failures, it.rests_until, &it.problem), (0, 0, &None));
}

#[test]
fn nodes_that_do_not_come_are_given_up_and_taken_back() {
    let (group, mut it) = (group(), standing(1));
    it.next(&group, facts(1, 3), SECOND);
    it.settle(1, Ok(None), SECOND);
    it.next(&group, facts(2, 0), 100 * SECOND);
    assert_eq!(it.coming(2), 2);
    assert_eq!(it.next(&group, facts(2, 0), 300 * SECOND).0, None);
    let order = it.next(&group, facts(2, 0), 301 * SECOND).0.unwrap();
    assert_eq!((order.target, &order.kind), (2, &OrderKind::Withdraw { nodes: 2 }));
    assert_eq!((it.coming(2), it.resting(302 * SECOND)), (0, Some(331 * SECOND)));
    it.settle(2, Ok(None), 302 * SECOND);
    assert_eq!((it.target, it.given_up), (Some(2), 0));
    // Where that cannot be, they are not waited for all the same.
    let mut it = standing(0);
    it.next(&group, facts(0, 1), SECOND);
    it.settle(1, Ok(None), SECOND);
    assert!(it.next(&group, facts(0, 0), 400 * SECOND).0.is_some());
    it.settle(2, Err("unimplemented".into()), 400 * SECOND);
    assert_eq!((it.coming(0), it.target), (0, Some(1)));
    let order = it.next(&group, facts(0, 1), 500 * SECOND).0.unwrap();
    assert_eq!(order.target, 2, "beside the one that may yet come");
    // And if they come late, they are welcome.
    it.settle(3, Ok(None), 500 * SECOND);
    it.next(&group, facts(2, 0), 501 * SECOND);
    assert_eq!((it.coming(2), it.given_up), (0, 0));
}

#[test]
fn a_provider_that_lies_is_found_out() {
    let (group, mut it) = (group(), standing(0));
    it.next(&group, facts(0, 2), SECOND);
    it.settle(1, Ok(Some(0)), SECOND);
    assert_eq!((it.target, it.failures), (Some(0), 1));
    assert!(last(&it).starts_with("its provider was asked for 2, said yes, and works towards 0"));
    // It said yes, and later not any more.
    let mut it = standing(0);
    it.next(&group, facts(0, 2), SECOND);
    it.settle(1, Ok(Some(2)), SECOND);
    assert!(it.observe(Ok(Observed { target: 1, errors: Vec::new() }), 2 * SECOND));
    assert_eq!((it.target, it.failures, it.coming(0)), (Some(1), 1, 1));
    // It cannot start one.
    let errors = vec!["w2: quota".to_owned()];
    assert!(it.observe(Ok(Observed { target: 1, errors }), 3 * SECOND));
    assert_eq!(it.coming(0), 0);
    assert!(matches!(
        it.next(&group, facts(0, 0), 4 * SECOND).0.unwrap().kind,
        OrderKind::Withdraw { nodes: 1 }
    ));
    // Somebody else enlarged it: that is not beyond belief, and nobody is blamed.
    let mut it = standing(1);
    assert!(it.observe(Ok(Observed { target: 3, errors: Vec::new() }), SECOND));
    assert_eq!((it.target, it.failures), (Some(3), 0));
}

#[test]
fn a_node_is_given_back_once_nothing_ran_there_for_long() {
    let (group, mut it) = (group(), standing(2));
    let idle = |since: u64| Facts { idle: vec![("w1".into(), since * SECOND)], ..facts(2, 0) };
    assert_eq!(it.next(&group, idle(10), 69 * SECOND).0, None);
    let waits = Facts { more: 1, ..idle(10) };
    let order = it.clone().next(&group, waits, 70 * SECOND).0.unwrap();
    assert!(matches!(order.kind, OrderKind::Grow { .. }), "not while others wait");
    let order = it.next(&group, idle(10), 70 * SECOND).0.unwrap();
    assert_eq!((order.target, order.kind), (1, OrderKind::Remove { node: "w1".into() }));
    it.settle(1, Ok(None), 71 * SECOND);
    assert_eq!((it.target, it.leaving.len()), (Some(1), 1));
    it.next(&group, facts(1, 0), 72 * SECOND);
    assert!(it.left("w1") && !it.left("w1"));
    // Never below its least size; and never, if nothing says when.
    let mut it = standing(2);
    assert_eq!(it.next(&Group { min: 2, ..group.clone() }, idle(10), 70 * SECOND).0, None);
    assert_eq!(it.next(&Group { idle: None, ..group.clone() }, idle(10), 70 * SECOND).0, None);
    // What is said to be ended and is not counts again.
    it.next(&group, idle(10), 70 * SECOND);
    it.settle(1, Ok(None), 70 * SECOND);
    it.next(&group, facts(1, 0), 371 * SECOND);
    assert!(it.leaving.is_empty() && last(&it).contains("w1, which is still here"), "{it:?}");
}

proptest! {
    #[test]
    fn whoever_is_said_to_have_a_node_has_one(
        rooms in prop::collection::vec((500u64..8000, 1u64..16, 0u32..3, 0u32..4), 1..4),
        kinds in prop::collection::vec((100u64..6000, 1u64..8, 1u32..12), 1..6),
    ) {
        let rooms: Vec<_> = rooms.into_iter().map(|(cpu, gib, coming, more)| room(capacity(cpu, gib), coming, more)).collect();
        let kinds: Vec<_> = kinds.into_iter().map(|(cpu, gib, tasks)| (demand(cpu, gib), tasks)).collect();
        let needs: Vec<_> = kinds.iter().map(|(demand, tasks)| (Needs::of(demand), *tasks)).collect();
        let packed = pack(&rooms, &needs);
        for (group, room) in rooms.iter().enumerate() {
            prop_assert!(packed.more[group] <= room.more);
            // In all, no more is on the nodes of a group than they have.
            let of = |on: &[(usize, u32)]| on.iter().filter(|(at, _)| *at == group).map(|(_, tasks)| u64::from(*tasks)).sum::<u64>();
            let tasks: Vec<_> = packed.fates.iter().map(|fate| of(&fate.coming) + of(&fate.new)).collect();
            let nodes = u64::from(room.coming + packed.more[group]);
            let capacity = room.capacity.unwrap();
            let sum = |each: fn(&Demand) -> u64| kinds.iter().zip(&tasks).map(|((demand, _), tasks)| each(demand) * tasks).sum::<u64>();
            prop_assert!(sum(|demand| demand.cpu.0) <= nodes * capacity.cpu.0);
            prop_assert!(sum(|demand| demand.memory.0) <= nodes * capacity.memory.0);
        }
        for ((_, tasks), fate) in kinds.iter().zip(&packed.fates) {
            let placed: u32 = fate.coming.iter().chain(&fate.new).map(|(_, tasks)| tasks).sum();
            prop_assert_eq!(placed + fate.left, *tasks);
            prop_assert!(fate.left == 0 || fate.obstacles.len() == rooms.len());
        }
        // Without the last node of a group that was asked for, somebody would have none: it is not asked for in vain.
        let whole = |packed: &Packing| packed.fates.iter().map(|fate| fate.left).sum::<u32>();
        for (group, room) in rooms.iter().enumerate().filter(|(group, _)| packed.more[*group] > 0) {
            let mut fewer = rooms.clone();
            fewer[group] = Room { more: packed.more[group] - 1, ..*room };
            for (other, room) in fewer.iter_mut().enumerate().filter(|(other, _)| *other != group) {
                room.more = packed.more[other];
            }
            prop_assert!(whole(&pack(&fewer, &needs)) >= whole(&packed));
        }
    }
}
