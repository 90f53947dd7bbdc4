//! What the brain does, told case by case.

use super::*;

// ---- growing and giving back

#[test]
fn a_task_grows_within_two_seconds_while_there_is_room() {
    for counts_throttling in [true, false] {
        let hungry = Real { counts_throttling, ..task("web", Priority::Low, 200, 1_700) };
        let mut plant = Plant::new(2_000, vec![hungry], vec![]);
        let moves = plant.run(20);
        assert!(plant.cpu_of("web") > 1_700, "{moves:#?}");
        assert!(plant.run(1_000).len() <= 1, "at most the last headroom");
    }
}

#[test]
fn a_reason_says_what_was_seen() {
    let mut plant = Plant::new(1_600, vec![task("web", Priority::Low, 1_000, 2_000)], vec![]);
    let moves = plant.run(1);
    let reason = "uses 1 of 1 core and is throttled 50 % of the time; 0.6 cores are free";
    assert_eq!(reasons(&moves), [("web", reason)]);
    assert!(matches!(&moves[0], Move::Grant { kind: GrantKind::Grew, change, .. }
        if *change == LimitsChange { cpu: Some(Limit::At(Millicores(1_562))), ..NO_CHANGE }));
}

#[test]
fn an_explicit_limit_holds_and_is_put_right_at_once() {
    let limits = Limits { cpu: Limit::At(Millicores(700)), ..Limits::default() };
    let limited = Real { limits, ..task("web", Priority::High, 500, ENDLESS) };
    let mut plant = Plant::new(4_000, vec![limited], vec![policy(Priority::High)]);
    plant.run(300);
    assert_eq!(plant.cpu_of("web"), 700);

    plant.real("web").limits.cpu = Limit::At(Millicores(690));
    assert_eq!(reasons(&plant.run(1)), [("web", "may have at most 0.69 cores")]);
    assert_eq!(plant.cpu_of("web"), 690);
}

#[test]
fn a_task_gives_back_slowly_what_it_leaves_unused_but_never_its_request() {
    let mut plant = Plant::new(4_000, vec![task("web", Priority::Low, 500, 3_000)], vec![]);
    plant.run(50);
    let before = plant.cpu_of("web");
    assert!(before >= 3_000);

    plant.real("web").wants_cpu = 100;
    assert_eq!(plant.run(15), [], "not before it has been quiet for a while");
    let mut last = before;
    for _ in 0..20 {
        plant.run(10);
        let now = plant.cpu_of("web");
        assert!(now * 100 >= last * 75 - 100, "{last} to {now}: more than a quarter in a second");
        last = now;
    }
    assert!((500..=525).contains(&last), "{last}");
    let (_, shrunk) = plant.log.last().unwrap();
    assert!(reasons(std::slice::from_ref(shrunk))[0].1.ends_with("it does not need that much"));
}

#[test]
fn one_with_priority_gets_its_request_at_once_and_more_by_weight() {
    let mut plant = Plant::new(2_000, vec![task("batch", Priority::Low, 200, ENDLESS)], vec![]);
    plant.run(30);
    assert_eq!(plant.cpu_of("batch"), 2_000);

    plant.tasks.push(task("web", Priority::High, 600, ENDLESS));
    plant.run(1);
    assert!(plant.cpu_of("batch") <= 1_400, "the guarantee does not wait for gentle steps");
    let (_, take) = &plant.log[plant.log.len() - 1];
    let reason = reasons(std::slice::from_ref(take))[0].1;
    assert_eq!(reason, "more was granted than there is, 2 cores");

    plant.run(20);
    // 1.2 cores beyond the requests, 4 : 1.
    assert_eq!((plant.cpu_of("web"), plant.cpu_of("batch")), (1_560, 440));
    plant.real("web").wants_cpu = 300;
    plant.run(200);
    assert!(plant.cpu_of("web") <= 630 && plant.cpu_of("batch") >= 1_370);
}

#[test]
fn cpu_goes_down_by_a_quarter_a_step_when_only_wishes_need_the_room() {
    let mut plant = Plant::new(2_000, vec![task("batch", Priority::Low, 100, ENDLESS)], vec![]);
    plant.tasks.push(task("web", Priority::High, 100, 50));
    plant.run(30);
    plant.real("web").wants_cpu = ENDLESS;
    let (mut last, mut downs) = (plant.cpu_of("batch"), 0);
    assert_eq!(last, 1_900);
    for _ in 0..20 {
        for a_move in plant.run(1) {
            if let Move::Grant { kind: GrantKind::Shrunk, reason, .. } = a_move {
                assert!(reason.starts_with("makes room for `web.1` (high), which uses "), "{reason}");
                downs += 1;
            }
        }
        let now = plant.cpu_of("batch");
        assert!(now >= last - last / 4, "{last} to {now}");
        last = now;
    }
    assert!((2..=15).contains(&downs), "{downs}");
    assert_eq!((plant.cpu_of("web"), last), (1_540, 460));
}

#[test]
fn a_task_that_nothing_limits_is_taken_in_gently() {
    let free = Real { cpu_grant: Limit::Unlimited, ..task("web", Priority::Low, 200, 900) };
    let mut plant = Plant::new(4_000, vec![free], vec![]);
    let moves = plant.run(1);
    let reason = "was not limited and uses 0.9 cores; what it does not need is for all";
    assert_eq!(reasons(&moves), [("web", reason)]);
    assert_eq!(plant.cpu_of("web"), 4_000);
    plant.run(200);
    assert!((1_000..1_400).contains(&plant.cpu_of("web")));
    assert_eq!(plant.run(1_000), []);
}

#[test]
fn steady_input_leads_to_no_moves() {
    use Priority::{High, Low, Medium};
    let mut plant = Plant::new(
        4_000,
        vec![
            task("a", High, 500, 450),
            task("b", High, 300, 1_111),
            task("c", Medium, 200, ENDLESS),
            task("d", Low, 200, ENDLESS),
            task("e", Low, 100, 3),
            Real { managed: false, ..task("f", Low, 100, 70) },
            Real { counts_throttling: false, ..task("g", Medium, 100, 333) },
        ],
        vec![policy(High)],
    );
    plant.run(300);
    assert_eq!(plant.run(1_000), []);
}

#[test]
fn noise_leads_to_few_moves() {
    let mut plant = Plant::new(4_000, vec![task("web", Priority::High, 300, 1_000)], vec![]);
    plant.run(100);
    let mut random = 12_345u64;
    let mut moves = 0;
    for _ in 0..1_000 {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        plant.real("web").wants_cpu = 900 + (random >> 33) % 200;
        moves += plant.run(1).len();
    }
    assert!(moves <= 3, "{moves} moves in 100 s of ±10 % noise");
}

#[test]
fn an_unmanaged_task_is_left_alone_and_reckoned_with() {
    let other =
        Real { managed: false, cpu_grant: Limit::Unlimited, ..task("kubelet", Priority::High, 100, 1_000) };
    let mut plant = Plant::new(2_000, vec![other, task("batch", Priority::Low, 100, ENDLESS)], vec![]);
    plant.run(100);
    assert_eq!(plant.real("kubelet").cpu_grant, Limit::Unlimited);
    assert!((700..=1_000).contains(&plant.cpu_of("batch")), "{}", plant.cpu_of("batch"));
}

// ---- pressure

fn starving(policy: Policy) -> Plant {
    let hog = task("hog", Priority::Low, 200, ENDLESS);
    Plant::new(2_000, vec![hog, task("web", Priority::High, 500, ENDLESS)], vec![policy])
}

#[test]
fn a_lone_hog_is_never_evicted() {
    for priority in [Priority::Low, Priority::Medium, Priority::High] {
        let hog = task("hog", Priority::Low, 200, ENDLESS);
        let mut plant = Plant::new(2_000, vec![hog], vec![policy(priority)]);
        plant.run(20);
        assert_eq!(plant.run(1_000), []);
        assert_eq!(plant.cpu_of("hog"), 2_000);

        // Nor beside a task of priority that has what it needs.
        plant.tasks.push(task("web", Priority::High, 500, 400));
        plant.run(1_000);
        assert!(plant.evicted().is_empty());
        assert_eq!(plant.cpu_of("hog"), 1_500);
    }
}

#[test]
fn a_hog_beside_a_starving_task_is_pressed_then_evicted() {
    let mut plant = starving(policy(Priority::High));
    plant.run(100);
    assert_eq!((plant.cpu_of("hog"), plant.cpu_of("web")), (460, 1_540), "one window: only weights");
    let moves = plant.run(10);
    assert_eq!((plant.cpu_of("hog"), plant.cpu_of("web")), (200, 1_800), "then pressed");
    assert_eq!(
        reasons(&moves)[0],
        (
            "hog",
            "policy `high_tasks`: the node was 99 % busy over 10 s (threshold 90 %), and `web.1` (high) uses \
                 1.54 of 1.54 cores and is throttled 99 % of the time; goes down towards its request, 0.2 cores"
        )
    );
    plant.run(87);
    assert!(plant.evicted().is_empty(), "not before the second window is over");
    let moves = plant.run(10);
    assert_eq!(plant.evicted(), [(200, "hog")]);
    let told =
        reasons(&moves).into_iter().find(|(task, reason)| *task == "hog" && reason.contains("youngest"));
    assert_eq!(
        told.unwrap().1,
        "policy `high_tasks`: `web.1` (high) uses 1.8 of 1.8 cores and is throttled 99 % of the time, and for 10 s \
         nothing was left to take but the requests of lower tasks; of those it is the youngest of the lowest \
         priority (low)"
    );
    plant.run(1_000);
    assert_eq!(plant.cpu_of("web"), 2_000);
}

#[test]
fn pressure_that_suffices_stays_and_nobody_is_evicted() {
    let mut plant = starving(policy(Priority::High));
    plant.real("web").wants_cpu = 1_650;
    plant.run(120);
    assert!(plant.cpu_of("web") >= 1_650 && plant.cpu_of("hog") < 400);
    plant.run(50);
    assert_eq!(plant.run(1_000), [], "no swinging between pressed and not");

    plant.real("web").wants_cpu = 300;
    plant.run(200);
    assert!(plant.cpu_of("web") <= 525 && plant.cpu_of("hog") >= 1_475, "it ends when it is not needed");
    assert!(plant.evicted().is_empty());
}

#[test]
fn victims_go_one_a_window_the_youngest_of_the_lowest_priority_first() {
    let at = |started_at, real: Real| Real { started_at, ..real };
    let low = |name, started_at| at(started_at, task(name, Priority::Low, 200, ENDLESS));
    let mut plant = starving(policy(Priority::High));
    plant.tasks = vec![
        low("old", 1),
        low("young", 2),
        at(9, task("medium", Priority::Medium, 200, ENDLESS)),
        at(9, task("web", Priority::High, 500, ENDLESS)),
        at(9, task("peer", Priority::High, 60, 50)),
        Real { namespace: "other".into(), ..low("foreign", 9) },
        Real { managed: false, ..task("unmanaged", Priority::Low, 60, 50) },
    ];
    plant.run(1_500);
    let evicted = plant.evicted();
    let names: Vec<&str> = evicted.iter().map(|(_, name)| *name).collect();
    assert_eq!(names, ["young", "old", "medium"]);
    assert!(evicted[0].0 >= 200);
    assert!(evicted.windows(2).all(|pair| pair[1].0 - pair[0].0 >= 100), "{evicted:?}");
    let stuck: Vec<_> = plant.log.iter().filter(|(_, a_move)| matches!(a_move, Move::Stuck { .. })).collect();
    assert_eq!(stuck.len(), 1, "said once: {stuck:#?}");
}

#[test]
fn a_victim_that_stays_is_asked_again_and_no_other_goes() {
    let mut plant = starving(policy(Priority::High));
    plant.tasks.push(Real { started_at: 5, ..task("young", Priority::Low, 100, ENDLESS) });
    for tick in 0..600 {
        if tick == 250 {
            plant.tasks.push(Real { started_at: 9, ..task("younger", Priority::Low, 100, ENDLESS) });
        }
        let before = plant.tasks.clone();
        plant.step();
        if plant.tasks.len() < before.len() {
            // It does not die.
            plant.tasks = before;
        }
    }
    let evicted = plant.evicted();
    assert!((3..=4).contains(&evicted.len()), "{evicted:?}");
    assert!(evicted.iter().all(|(_, name)| *name == "young"), "{evicted:?}");
}

#[test]
fn below_the_threshold_nothing_happens() {
    // A third task sleeps on its request, so the node is never busy.
    let mut plant = starving(policy(Priority::High));
    plant.tasks.push(task("sleeper", Priority::Low, 500, 0));
    plant.run(1_000);
    assert!(plant.evicted().is_empty());
    assert_eq!(plant.cpu_of("hog"), 360, "what its weight gives it");

    let mut plant = starving(Policy { eviction_threshold_permille: None, ..policy(Priority::High) });
    plant.run(1_000);
    assert!(plant.evicted().is_empty());
}

#[test]
fn a_policy_acts_for_those_alone_whom_its_selector_selects() {
    let gold =
        Selector { labels: BTreeMap::from([("tier".to_owned(), "gold".to_owned())]), ..Selector::default() };
    let mut plant = starving(Policy { selector: gold, ..policy(Priority::High) });
    plant.run(1_000);
    assert!(plant.evicted().is_empty());
    assert_eq!(plant.cpu_of("hog"), 460, "what its weight gives it");
    plant.real("web").labels.insert("tier".into(), "gold".into());
    plant.run(10);
    assert_eq!(plant.cpu_of("hog"), 200, "pressed");
    plant.run(200);
    assert_eq!(plant.evicted().len(), 1);
}

#[test]
fn of_two_policies_for_one_task_the_more_specific_one_acts() {
    let mild = Policy {
        policy_name: "web_is_patient".into(),
        preemption_enabled: false,
        selector: Selector { name: "web*".parse().ok(), ..Selector::default() },
        ..policy(Priority::High)
    };
    let mut plant = starving(mild);
    plant.policies.push((policy(Priority::High), false));
    plant.run(1_000);
    assert!(plant.evicted().is_empty());
    assert_eq!(plant.cpu_of("hog"), 200, "pressed");
}

#[test]
fn a_node_that_is_no_longer_busy_evicts_nobody() {
    let mut plant = starving(policy(Priority::High));
    plant.run(110);
    assert_eq!(plant.cpu_of("hog"), 200, "pressed");
    plant.tasks.push(task("sleeper", Priority::Low, 500, 0));
    plant.run(1_000);
    assert!(plant.evicted().is_empty());
    assert_eq!((plant.cpu_of("hog"), plant.cpu_of("web")), (200, 1_300), "pressure does not swing with it");
}

#[test]
fn without_preemption_a_hog_is_pressed_and_never_evicted() {
    let mut plant = starving(Policy { preemption_enabled: false, ..policy(Priority::High) });
    plant.run(2_000);
    assert!(plant.evicted().is_empty());
    assert_eq!((plant.cpu_of("hog"), plant.cpu_of("web")), (200, 1_800));
    let stuck: Vec<_> = plant.log.iter().filter(|(_, a_move)| matches!(a_move, Move::Stuck { .. })).collect();
    assert_eq!(stuck.len(), 1, "{stuck:#?}");
}

#[test]
fn equals_are_never_pressed_and_it_is_said_that_nothing_helps() {
    let mut plant = starving(policy(Priority::High));
    plant.real("hog").priority = Priority::High;
    plant.run(1_000);
    assert!(plant.evicted().is_empty());
    assert_eq!((plant.cpu_of("hog"), plant.cpu_of("web")), (850, 1_150));
    let told: Vec<Move> = plant.log.iter().map(|(_, a_move)| a_move.clone()).collect();
    let told: Vec<_> = reasons(&told).into_iter().filter(|(who, _)| *who == "high_tasks").collect();
    assert_eq!(told.len(), 1, "{told:#?}");
    assert!(told[0].1.ends_with("but no task of lower priority can be moved in its namespace"));
}

#[test]
fn a_task_that_waits_for_the_node_counts_as_short() {
    let mut plant =
        Plant::new(2_000, vec![task("hog", Priority::Low, 200, ENDLESS)], vec![policy(Priority::High)]);
    plant.policies[0].1 = true;
    plant.run(400);
    assert_eq!(plant.evicted(), [(200, "hog")]);
}
