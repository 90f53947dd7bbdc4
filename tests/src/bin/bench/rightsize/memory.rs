//! Memory: the request follows the estimate, and the limit grows by the rules of `shaper_core::adjust::memory` when the
//! task meets it. What is modelled: a task that allocates at a rate, the wall at which the kernel tells of it and
//! slows it down, the agent's turns, ten a second, and the kernel that kills above the limit.
//!
//! The generator: eight kinds of tasks, three days each, from a seed. A base of 256 MiB to 4 GiB; every minute one of:
//! a step (once in 90 minutes; to between half and twice the base), a spike (once in 60; up to half as much again, for 1 to 3 minutes), a leak
//! (half of the kinds; a thousandth of the base a minute, until it is back at the base after it has doubled). Allocation at
//! 256 MiB/s, above the wall at a sixteenth of it.

use anyhow::Result;
use shaper_core::{
    adjust::memory::{self as brain, MemoryTask, NodeMemory, Uses},
    id::ExecutionId,
    limits::Limit,
    profile::{Model, Prices, Resource, Sample, Tracker, Unmet, vpa::Recommender},
    spec::Priority,
    units::{Bytes, Micros},
};
use shaper_tests::{random::Random, statistics::mean};

use super::series;
use crate::{Plan, report::Report, traces};

const MIB: u64 = 1 << 20;
const NODE: Bytes = Bytes(64 << 30);
/// Looks a second.
const TURNS: u64 = 10;
/// What a task allocates in a turn …
const ALLOCATES: u64 = 256 * MIB / TURNS;
/// … and above the wall.
const SLOWED: u64 = ALLOCATES / 16;
const MINUTE: u64 = 60;
const MINUTES: u64 = 1440;
const WARM: u64 = MINUTES;
const KINDS: u64 = 8;
const DAYS: u64 = 4;

/// What a task wants, a value for each minute.
struct Wish {
    name: String,
    wants: Vec<u64>,
}

fn generated(kind: u64) -> Wish {
    let mut random = Random(kind);
    let base = (256 << random.below(5)) * MIB;
    let leaks = kind % 2 == 1;
    let (mut level, mut leaked, mut spike, mut spike_left) = (base, 0, 0, 0_u64);
    let wants = (0..DAYS * MINUTES)
        .map(|_| {
            if random.once_in(90) {
                level = base / 2 + random.below(base + base / 2);
            }
            if spike_left == 0 && random.once_in(60) {
                (spike, spike_left) = (level / 10 + random.below(level * 2 / 5), 1 + random.below(3));
            }
            spike_left = spike_left.saturating_sub(1);
            if leaks {
                leaked = if leaked > base { 0 } else { leaked + base / 1000 };
            }
            level + leaked + if spike_left > 0 { spike } else { 0 }
        })
        .collect();
    Wish { name: format!("generated {kind}"), wants }
}

/// Between its values, five minutes apart, use moves evenly.
fn recorded(values: &[u64]) -> Wish {
    let wants = values
        .windows(2)
        .flat_map(|pair| (0..5).map(|minute| (pair[0] * (5 - minute) + pair[1] * minute) / 5))
        .collect();
    Wish { name: "recorded machine".to_owned(), wants }
}

#[derive(Clone, Copy, Debug, Default)]
struct Outcome {
    /// Kills for want of memory.
    kills: u32,
    /// Of the limit in force, and of the request: the unused share, %, a mean over seconds.
    slack: f64,
    request_slack: f64,
    /// Changes of the request, a day.
    changes: f64,
}

/// The estimate as the request, and the limit as the agent moves it.
fn live(wish: &Wish, prices: &Prices) -> Result<Outcome> {
    let execution = ExecutionId { task: "wish".parse()?, attempt: 1 };
    let (mut model, mut tracker) = (Model::default(), Tracker::new(Resource::Memory));
    let mut uses = Uses::default();
    let node = NodeMemory { capacity: NODE, available: NODE };
    let mut request = None::<u64>;
    let (mut used, mut grant) = (wish.wants[0], wish.wants[0] * 2);
    let mut outcome = Outcome::default();
    let (mut seconds, mut changes) = (0_u64, 0_u32);
    for (minute, &wants) in (0_u64..).zip(&wish.wants) {
        let mut peak = used;
        let mut unmet = Unmet::Nothing;
        for second in 0..MINUTE {
            let mut is_short = false;
            for _ in 0..TURNS {
                let wall = brain::wall(Bytes(grant)).0;
                used = if used >= wants {
                    wants
                } else if used < wall {
                    // The wall stops it in the middle of a turn.
                    wants.min(used + ALLOCATES).min(wall)
                } else {
                    wants.min(used + SLOWED)
                };
                if used > grant {
                    outcome.kills += u32::from(minute >= WARM);
                    unmet = Unmet::Killed;
                    used = grant / 2;
                }
                peak = peak.max(used);
                is_short = used >= wall;
                if is_short {
                    let task = task(&execution, request, grant, used, true);
                    for growth in brain::grow(&node, &[task]) {
                        grant = growth.to.0;
                    }
                }
            }
            let now = (minute * MINUTE + second) * 1_000_000_000;
            let task = task(&execution, request, grant, used, is_short);
            for back in brain::give_back(&mut uses, &node, &[task], now) {
                grant = back.to.0.max(used);
            }
            if minute >= WARM {
                seconds += 1;
                outcome.slack += 1.0 - used as f64 / grant as f64;
                let held = request.unwrap_or(grant);
                outcome.request_slack += held.saturating_sub(used) as f64 / held as f64;
            }
        }
        let at = (minute + 1) * MINUTE * 1_000_000_000;
        let sample = Sample { used: peak, over: Micros(MINUTE * 1_000_000), at, unmet };
        tracker.observe(&mut model, prices, &sample);
        if minute + 1 >= WARM
            && let Some(advice) = tracker.advise(&model, prices, request, 1.0 / 60.0)
        {
            changes += u32::from(request.is_some_and(|held| held != advice.limit));
            request = Some(advice.limit);
            grant = grant.max(advice.limit);
        }
    }
    let seconds = seconds.max(1) as f64;
    Ok(Outcome {
        slack: 100.0 * outcome.slack / seconds,
        request_slack: 100.0 * outcome.request_slack / seconds,
        changes: f64::from(changes) * 86_400.0 / seconds,
        ..outcome
    })
}

fn task(
    execution: &ExecutionId,
    request: Option<u64>,
    grant: u64,
    used: u64,
    is_short: bool,
) -> MemoryTask<'_> {
    MemoryTask {
        execution,
        priority: Priority::Medium,
        limit: Limit::Unlimited,
        floor: Bytes(request.unwrap_or(0)),
        is_fixed: false,
        grant: Limit::At(Bytes(grant)),
        used: Bytes(used),
        is_short,
    }
}

/// VPA's target as the limit: minutes above it, each of which would be a kill, and slack, %.
fn vpa(wish: &Wish) -> (u32, f64) {
    let mut rule = Recommender::new(Resource::Memory);
    let (mut kills, mut slack, mut minutes) = (0, 0.0, 0_u32);
    for (minute, &wants) in (0_u64..).zip(&wish.wants) {
        if minute >= WARM
            && let Some(limit) = rule.target()
        {
            kills += u32::from(wants > limit);
            slack += limit.saturating_sub(wants) as f64 / limit as f64;
            minutes += 1;
        }
        rule.observe(&Sample { used: wants, over: Micros(MINUTE * 1_000_000), at: 0, unmet: Unmet::Nothing });
    }
    (kills, 100.0 * slack / f64::from(minutes.max(1)))
}

pub(crate) fn measure(plan: Plan, report: &mut Report) -> Result<()> {
    let kinds = if plan.is_quick { KINDS / 2 } else { KINDS };
    let mut wishes: Vec<Wish> = (0..kinds).map(generated).collect();
    match series::memory()? {
        Some(values) => wishes.push(recorded(&values)),
        None => {
            report.skip(
                "memory of a machine",
                &format!("there is no {}", traces::folder().join("usage").display()),
            );
        }
    }
    for priority in [Priority::High, Priority::Medium, Priority::Low] {
        let prices = Prices::of(Resource::Memory, priority);
        let outcomes = wishes.iter().map(|wish| live(wish, &prices)).collect::<Result<Vec<_>>>()?;
        let name = format!("memory, {priority}");
        let kills: u32 = outcomes.iter().map(|outcome| outcome.kills).sum();
        report.exactly(0.0, &format!("{name}: kills"), f64::from(kills), "");
        let of = |figure: fn(&Outcome) -> f64| mean(&outcomes.iter().map(figure).collect::<Vec<_>>());
        let slack = of(|outcome| outcome.slack);
        if priority == Priority::Low {
            report.at_most(25.0, &format!("{name}: slack of the limit"), slack, "%");
        } else {
            report.tell(&format!("{name}: slack of the limit"), slack, "%");
        }
        report.tell(&format!("{name}: slack of the request"), of(|outcome| outcome.request_slack), "%");
        report.tell(&format!("{name}: changes of the request"), of(|outcome| outcome.changes), "1/day");
        if let (Some(wish), Some(outcome)) = (wishes.last(), outcomes.last()) {
            report.tell(&format!("{name}: slack of the limit, {}", wish.name), outcome.slack, "%");
        }
    }
    let theirs: Vec<(u32, f64)> = wishes.iter().map(vpa).collect();
    report.tell(
        "memory, VPA's rule: minutes above the limit",
        theirs.iter().map(|it| f64::from(it.0)).sum(),
        "",
    );
    report.tell("memory, VPA's rule: slack", mean(&theirs.iter().map(|it| it.1).collect::<Vec<_>>()), "%");
    Ok(())
}
