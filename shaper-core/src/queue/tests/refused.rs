//! What is refused, and what is forgotten.

use super::*;

#[test]
fn what_cannot_be_is_refused_with_its_numbers() {
    let mut world = World::with_nodes(Config::default(), &[1000]);
    let job = |tasks| JobSpec { tasks, ..world.job(1, Priority::High) };
    let borrows = JobSpec { oversubscribes: true, ..job(Tasks::One) };
    let cases = [
        (job(Tasks::Gang(0)), Refusal::NoTasks),
        (job(Tasks::Gang(u32::MAX)), Refusal::TooManyTasks { asked: u32::MAX, most: MAX_TASKS }),
        (job(Tasks::Array { count: 7, at_once: Some(0) }), Refusal::NoneAtOnce { tasks: 7 }),
        (borrows, Refusal::NotLow { priority: Priority::High }),
        (
            JobSpec { after_ok: vec![JobId(0)], ..job(Tasks::One) },
            Refusal::NoSuchJob { job: JobId(0), submitted: 0 },
        ),
    ];
    for (spec, why) in cases {
        assert_eq!(world.tell(Input::Submit(spec)), [Decision::Refused(why)]);
    }
    let again = world.tell(Input::Node(node("node-0", 1, "zone-0")));
    assert!(
        matches!(&again[..], [Decision::Refused(why @ Refusal::Node(_))] if why.to_string().contains("node-0"))
    );
}

#[test]
fn what_ended_long_ago_is_forgotten() {
    let mut world = World::with_nodes(Config { remembers: 8, ..Config::default() }, &[3000]);
    let stays = world.submit(world.job(1000, Priority::Medium));
    let first = world.submit(world.job(1000, Priority::Medium));
    world.end(single(first), Outcome::Succeeded);
    let after = |world: &World, job| JobSpec { after_ok: vec![job], ..world.job(1000, Priority::Medium) };
    let mut latest = first;
    for number in 0..500 {
        // One waits for who stays and is cancelled; one runs after the one before it.
        let waits = world.submit(after(&world, stays));
        world.tell(Input::Cancel(waits));
        let array = JobSpec { tasks: Tasks::Array { count: 2, at_once: None }, ..after(&world, latest) };
        latest = world.submit(array);
        for index in 0..2 {
            let outcome = if number % 3 == 0 { Outcome::Lost } else { Outcome::Succeeded };
            world.end(TaskKey { job: latest, index }, outcome);
        }
        // Those of eight tasks, and who stays.
        assert!(world.queue.jobs.len() <= 9, "{} after {number}", world.queue.jobs.len());
        assert!(world.queue.jobs[stays].dependents.is_empty());
        if number % 3 == 0 {
            latest = world.submit(world.job(1000, Priority::Medium));
            world.end(single(latest), Outcome::Succeeded);
        }
    }
    assert_eq!(world.queue.why(single(first)), Some(Why::Forgotten));
    assert_eq!(world.queue.why(single(latest)), Some(Why::Over(Verdict::Succeeded)));
    let refused = Refusal::Forgotten { job: first, remembers: 8 };
    assert_eq!(world.tell(Input::Submit(after(&world, first))), [Decision::Refused(refused)]);
    assert_eq!(world.tell(Input::Cancel(first)), []);
    // Of more tasks than are remembered, the latest is.
    let wide = Tasks::Array { count: 20, at_once: None };
    let wide = world.submit(JobSpec { tasks: wide, ..world.job(1, Priority::Medium) });
    for index in 0..20 {
        world.end(TaskKey { job: wide, index }, Outcome::Succeeded);
    }
    assert_eq!(world.queue.jobs.len(), 2);
    let next = world.submit(after(&world, wide));
    assert!(world.runs(next) && world.runs(stays));
}

#[test]
fn a_long_chain_ends_with_its_first() {
    let mut world = World::with_nodes(Config { remembers: 4, ..Config::default() }, &[1000]);
    let first = world.submit(world.job(1000, Priority::Medium));
    let mut before = first;
    for _ in 0..20_000 {
        before = JobId(before.0 + 1);
        let spec = JobSpec { after_ok: vec![JobId(before.0 - 1)], ..world.job(1, Priority::Low) };
        assert_eq!(world.queue.handle(Input::Submit(spec), 0), [Decision::Accepted(before)]);
    }
    let ended = world.queue.handle(Input::Cancel(first), 0);
    assert_eq!(ended.len(), 20_002, "the stop of the first, its end, and theirs");
    assert_eq!(ended.last(), Some(&Decision::Over(before, Verdict::Skipped)));
    assert_eq!(world.queue.jobs.len(), 5);
}
