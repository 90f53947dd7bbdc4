//! How tasks end.

use std::time::Duration;

use shaper_core::task::{ExitStatus, Phase, TaskStatus};
use shaper_tests::{
    NOBODY,
    agent::{Agent, Options},
    cgroup::cpu_time,
    leftovers::Leftovers,
    process::Process,
    shaper::in_force,
    time::{Window, eventually},
};

fn sh(agent: &Agent, id: &str, script: &str) -> TaskStatus {
    let user = NOBODY.to_string();
    agent.shaper().start(id, &["--user", &user], &["/bin/sh", "-c", script])
}

#[test]
fn a_task_whose_supervisor_is_killed_goes_on_under_its_limits_and_ends_as_unknown() {
    const NOTE: &str = "its supervisor was killed";
    let mut agent = Agent::start();
    let task = agent.run("hog", &["--cpu", "0.2"], &["spin"]);
    let process = agent.process(&task);
    let supervisor = process.parent();
    supervisor.kill();
    supervisor.wait_for_end();

    let before = cpu_time(&task.cgroup);
    let window = Window::pass(Duration::from_secs(2));
    let cores = (cpu_time(&task.cgroup) - before).as_secs_f64() / window.seconds();
    assert!(process.is_alive() && cores < 0.25, "{cores} cores");
    let has_note = |agent: &Agent| agent.shaper().get("hog").notes.iter().any(|note| note.contains(NOTE));
    assert!(has_note(&agent), "nothing says that the supervisor was killed");

    agent.kill9();
    agent.restart();
    assert!(has_note(&agent), "a new agent does not say that the supervisor was killed");
    assert_eq!(in_force(&agent.shaper().set("hog", &["--cpu", "0.3"]), "cpu").1, "0.3 cores");

    process.kill();
    assert_eq!(agent.shaper().wait("hog"), 125);
    assert!(matches!(agent.shaper().get("hog").phase, Phase::Ended { status: ExitStatus::Unknown, .. }));
}

#[test]
fn a_task_that_ignores_sigterm_is_killed_after_its_grace() {
    let agent = Agent::start();
    let task = sh(&agent, "stubborn", "trap '' TERM; while :; do sleep 0.1; done");
    agent.ends_with_me(&task);
    agent.shaper().ok(&["cancel", "stubborn", "--grace", "300ms"]);
    assert!(matches!(
        agent.shaper().get("stubborn").phase,
        Phase::Ended { status: ExitStatus::Signal(9), .. }
    ));
}

#[test]
fn a_task_that_heeds_sigterm_ends_as_it_wants() {
    let agent = Agent::start();
    let task = sh(&agent, "gentle", "trap 'exit 3' TERM; while :; do sleep 0.1; done");
    agent.ends_with_me(&task);
    agent.shaper().ok(&["cancel", "gentle"]);
    assert_eq!(agent.shaper().wait("gentle"), 3);
}

#[test]
fn what_the_main_process_left_running_ends_with_it() {
    let agent = Agent::start();
    let left = agent.directory().join("left");
    std::fs::write(&left, "").unwrap();
    std::os::unix::fs::chown(&left, Some(NOBODY), None).unwrap();
    let script =
        format!("sleep 1000 & echo $! > {}; read line < /proc/self/stat; exec sleep 0.5", left.display());
    sh(&agent, "parent", &script);
    let child = || std::fs::read_to_string(&left).unwrap().trim().parse().ok();
    eventually("the child is there", || child().is_some());
    let child = Process::open(child().unwrap());

    assert_eq!(agent.shaper().wait("parent"), 0);
    child.wait_for_end();
    eventually("the cgroup is gone", || !agent.cgroup_root().join("parent.1").exists());
}

#[test]
fn an_id_can_be_used_again_once_its_task_has_ended() {
    let agent = Agent::start();
    agent.shaper().start("job", &["--user", "65534"], &["/bin/sh", "-c", "echo first; exit 4"]);
    assert_eq!(agent.shaper().wait("job"), 4);
    let again = agent.shaper().start("job", &["--user", "65534"], &["/bin/sh", "-c", "echo second"]);
    assert_eq!(again.attempt, 2);
    assert_eq!(agent.shaper().wait("job"), 0);
    assert_eq!(agent.shaper().ok(&["logs", "job"]), "second\n");
}

#[test]
fn the_agent_may_have_more_files_open_than_its_tasks() {
    let soft = |pid: u32| {
        let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
        let line = limits.lines().find_map(|line| line.strip_prefix("Max open files")).unwrap();
        line.split_whitespace().map(|word| word.parse().unwrap_or(0)).take(2).collect::<Vec<u64>>()
    };
    let agent = Options::default().with_open_files(512).start();
    let task = agent.run("task", &[], &["tick", "600", "0"]);
    let (of_agent, of_task) = (soft(agent.pid()), soft(task.pid.unwrap()));
    assert_eq!(of_agent[0], of_agent[1], "the agent's is not the hard one");
    assert_eq!((of_task[0], of_task[1]), (512, of_agent[1]));
}

#[test]
fn two_agents_count_and_release_independently() {
    let (one, other) = (Agent::start(), Agent::start());
    let limits = ["--cpu", "0.2"];
    let task = one.run("hog", &limits, &["spin"]);
    let same_id = other.run("hog", &limits, &["spin"]);
    assert_ne!(task.cgroup, same_id.cgroup);
    assert_eq!((one.shaper().tasks().len(), other.shaper().tasks().len()), (1, 1));
    for agent in [&one, &other] {
        agent.assert_cores("hog", 0.2, Duration::from_secs(2));
    }

    let leftovers = Leftovers::of(&one, None);
    one.shaper().ok(&["release", "--all"]);
    leftovers.assert_none();
    other.assert_cores("hog", 0.2, Duration::from_secs(2));
}
