//! What holds for any input.

use std::collections::BTreeMap;

use proptest::{collection::vec, prelude::*};

use super::*;

fn priority() -> impl Strategy<Value = Priority> {
    prop_oneof![Just(Priority::Low), Just(Priority::Medium), Just(Priority::High)]
}

fn amount() -> impl Strategy<Value = u64> {
    prop_oneof![8 => 0..3_000u64, 1 => Just(0), 1 => any::<u64>()]
}

fn limit() -> impl Strategy<Value = Limit<u64>> {
    prop_oneof![Just(Limit::Unlimited), amount().prop_map(Limit::At)]
}

fn cpu(limit: Limit<u64>) -> Limit<Millicores> {
    limit.at().map_or(Limit::Unlimited, |limit| Limit::At(Millicores(limit)))
}

fn any_task() -> impl Strategy<Value = Real> {
    let who =
        (priority(), prop_oneof![Just("default"), Just("other")], any::<u64>(), prop::bool::weighted(0.9));
    let cpu_part = (10..1_200u64, limit(), limit(), amount(), any::<bool>());
    (who, cpu_part).prop_map(|(who, cpu_part)| {
        let (priority, namespace, started_at, managed) = who;
        let (request, cpu_limit, cpu_grant, wants_cpu, counts_throttling) = cpu_part;
        let real = task("t", priority, request, wants_cpu);
        let limits = Limits { cpu: cpu(cpu_limit), ..Limits::default() };
        let cpu_grant = cpu(cpu_grant);
        let namespace = namespace.to_owned();
        Real { namespace, started_at, managed, limits, cpu_grant, counts_throttling, ..real }
    })
}

/// What is observed at a step, besides what follows from the moves: nothing has to fit anything.
#[derive(Clone, Debug)]
struct Seen {
    elapsed: u64,
    node_used: u64,
    tasks: Vec<SeenTask>,
    waiting: bool,
}

#[derive(Clone, Debug)]
struct SeenTask {
    used: u64,
    throttled: Option<u32>,
    /// A grant that somebody else has put in force.
    meddling: Option<Limit<u64>>,
}

fn any_seen() -> impl Strategy<Value = Seen> {
    let throttled = prop::option::of(prop_oneof![0..1_000u32, any::<u32>()]);
    let meddling = prop::option::weighted(0.1, limit());
    let task = (amount(), throttled, meddling).prop_map(|(used, throttled, meddling)| SeenTask {
        used,
        throttled,
        meddling,
    });
    let tasks = vec(task, 6);
    let elapsed = prop_oneof![5 => Just(TICK_NS), 1 => 0..20_000_000_000u64, 1 => Just(3_000_000_000)];
    (elapsed, amount(), tasks, any::<bool>()).prop_map(|(elapsed, node_used, tasks, waiting)| Seen {
        elapsed,
        node_used,
        tasks,
        waiting,
    })
}

proptest! {
    #[test]
    fn promises_hold_whatever_is_seen(
        capacity in prop_oneof![4 => 500..4_000u64, 1 => amount()],
        mut tasks in vec(any_task(), 0..6),
        policies in vec((priority(), prop::option::of(0..1_200u32), any::<bool>(), 0..3_000u64), 0..3),
        seen in vec(any_seen(), 1..30),
    ) {
        for (index, task) in tasks.iter_mut().enumerate() {
            task.execution.attempt = index as u32 + 1;
        }
        let policies: Vec<Policy> = policies
            .into_iter()
            .map(|(priority, eviction_threshold_permille, preemption_enabled, window_millis)| Policy {
                eviction_threshold_permille, preemption_enabled, window_millis, ..policy(priority)
            })
            .collect();
        let mut brain = Brain::default();
        let (mut now, mut evicted_at) = (0u64, BTreeMap::<ExecutionId, u64>::new());
        for seen in &seen {
            now += seen.elapsed;
            for (task, seen) in tasks.iter_mut().zip(&seen.tasks) {
                if let Some(limit) = &seen.meddling {
                    task.cpu_grant = cpu(*limit);
                }
            }
            let observed: Vec<TaskObservation<'_>> = (tasks.iter().zip(&seen.tasks))
                .map(|(task, seen)| TaskObservation {
                    execution: &task.execution,
                    namespace: &task.namespace,
                    priority: task.priority,
                    request: task.request,
                    limits: task.limits,
                    policy: task.policy(&policies),
                    started_at: task.started_at,
                    managed: task.managed,
                    cpu_grant: task.cpu_grant,
                    cpu_used: Millicores(seen.used),
                    cpu_throttled_permille: seen.throttled,
                })
                .collect();
            let in_force: Vec<PolicyInForce<'_>> =
                policies.iter().map(|policy| PolicyInForce { policy, waiting: seen.waiting }).collect();
            let observation = Observation {
                cpu: Millicores(capacity),
                cpu_used: Millicores(seen.node_used),
                tasks: &observed,
                policies: &in_force,
            };
            let moves = step(&mut brain, &observation, now);

            let mut order = Vec::new();
            let mut evictions = 0;
            for a_move in moves {
                match a_move {
                    Move::Grant { execution, change, kind, reason } => {
                        order.push(kind == GrantKind::Grew);
                        prop_assert!(!reason.is_empty() && !change.is_empty());
                        let task = tasks.iter_mut().find(|task| task.execution == execution).unwrap();
                        prop_assert!(task.managed);
                        task.cpu_grant = change.cpu.unwrap_or(task.cpu_grant);
                    }
                    Move::Evict { execution, .. } => {
                        evictions += 1;
                        let victim = tasks.iter().find(|task| task.execution == execution).unwrap();
                        prop_assert!(victim.managed && victim.namespace == "default");
                        prop_assert!(policies.iter().any(|policy| policy.preemption_enabled
                            && policy.eviction_threshold_permille.is_some()
                            && policy.priority > victim.priority));
                        let last = evicted_at.values().max().copied();
                        prop_assert!(last.is_none_or(|last| now - last >= 1_000_000_000));
                        evicted_at.insert(execution, now);
                    }
                    Move::Stuck { .. } => {}
                }
            }
            prop_assert!(evictions <= 1);
            prop_assert!(order.is_sorted(), "takes before gives");

            let cpu_rows: Vec<Row> = tasks
                .iter()
                .map(|task| Row {
                    managed: task.managed,
                    request: task.request.cpu.0,
                    limit: task.limits.cpu.at().map(|limit| limit.0),
                    grant: task.cpu_grant.at().map(|grant| grant.0),
                })
                .collect();
            check(CPU, capacity, &cpu_rows)?;
        }
    }
}

/// A task with a request that fits five times on the node below.
fn any_steady_task() -> impl Strategy<Value = Real> {
    let wants = prop_oneof![3 => 0..2_500u64, 1 => Just(ENDLESS)];
    let limit = prop::option::weighted(0.2, 800..3_000u64);
    (priority(), 10..800u64, wants, limit).prop_map(|(priority, request, wants, limit)| {
        let limits = Limits { cpu: cpu(limit.map_or(Limit::Unlimited, Limit::At)), ..Limits::default() };
        Real { limits, ..task("t", priority, request, wants) }
    })
}

proptest! {
    #[test]
    fn whatever_is_steady_settles_and_leaves_nobody_short_beside_free_capacity(
        mut tasks in vec(any_steady_task(), 1..6), pressed in any::<bool>(),
        counts_throttling in any::<bool>(),
    ) {
        for (index, task) in tasks.iter_mut().enumerate() {
            task.execution.attempt = index as u32 + 1;
            task.counts_throttling = counts_throttling;
        }
        let policy = Policy { preemption_enabled: false, ..policy(Priority::High) };
        let mut plant = Plant::new(4_000, tasks, if pressed { vec![policy] } else { vec![] });
        plant.run(400);
        let moves = plant.run(300);
        if !counts_throttling {
            // Then a need on a full node can only be guessed, now and then.
            prop_assert!(moves.len() <= 150, "{} moves in 30 s: {moves:#?}", moves.len());
            return Ok(());
        }
        prop_assert_eq!(moves, []);
        let grant = |task: &Real| task.cpu_grant.at().unwrap().0;
        let free = 4_000 - plant.tasks.iter().map(grant).sum::<u64>();
        for task in &plant.tasks {
            let wants = task.wants_cpu.min(task.limits.cpu.at().map_or(4_000, |limit| limit.0));
            // What others could have, and leave because it is less than 5 % of what they have, stays free. So a limit that
            // is no farther than that above a grant is not gone up to.
            let noise = (grant(task) / 20).max(CPU.least_change);
            prop_assert!(grant(task) + noise >= wants || free < 200, "{free} are free, and {task:?} is short");
        }
    }
}

#[derive(Debug)]
struct Row {
    managed: bool,
    request: u64,
    limit: Option<u64>,
    grant: Option<u64>,
}

/// The promises about what is granted, after a step.
fn check(resource: Resource, capacity: u64, rows: &[Row]) -> Result<(), TestCaseError> {
    let requests: u128 = rows.iter().map(|row| u128::from(row.request.max(resource.minimum))).sum();
    let mut granted = 0u128;
    for row in rows.iter().filter(|row| row.managed) {
        let Some(grant) = row.grant else {
            return Err(TestCaseError::fail(format!("nothing limits {row:?}")));
        };
        let limit = row.limit.unwrap_or(u64::MAX).min(capacity).max(resource.minimum);
        prop_assert!(grant <= limit, "{row:?} is above its limit");
        let guarantee = row.request.max(resource.minimum).min(limit);
        prop_assert!(requests > capacity.into() || grant >= guarantee, "{row:?} is below its request");
        granted += u128::from(grant);
    }
    prop_assert!(
        requests > capacity.into() || granted <= capacity.into(),
        "{granted} of {capacity}: {rows:#?}"
    );
    Ok(())
}
