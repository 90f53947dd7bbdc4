//! Either daemon is aborted at each of its named points; the next one finishes what it began, once.

use std::process::{Child, Stdio};

use shaper_core::{spec::DecisionKind, task::ExitStatus};
use shaper_tests::{
    broker::ClusterTask,
    checker::{Expect, Runs, Watch, check, check_settled},
    cluster::{Cluster, Load, networks},
};

const CODE: u8 = 7;

/// `shaper submit --wait` of the task `t`: it asks again by itself while it gets no answer.
fn submitter(cluster: &Cluster) -> Child {
    let spec = cluster.spec("t", 0.2, "medium", Load::Until(CODE));
    let file = cluster.path().join("t.json");
    std::fs::write(&file, &spec).expect("a file can be made");
    let file = file.display().to_string();
    let mut command = cluster.broker.shaper().command(&["submit", "--wait", &file]);
    let submitter = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let submitter = submitter.expect("shaper can be started");
    cluster.acknowledged("t", &spec);
    submitter
}

/// The task has come to its end, exactly once, and all agree on that; submitting it again is no new task.
#[track_caller]
fn assert_ended_once(cluster: &Cluster, mut submitter: Child, watch: Watch) -> ClusterTask {
    let task = cluster.broker.wait_until("t", "over", |task| task.ended().is_some());
    assert_eq!(task.ended(), Some(&ExitStatus::Code(CODE.into())), "{:#?}", cluster.broker.decisions("t"));
    assert_eq!(
        submitter.wait().expect("it is a child").code(),
        Some(CODE.into()),
        "what the submitter was told"
    );
    check_settled(cluster, &[("t", Expect::Ended(CODE.into()))]);
    let again = cluster.submit("t", 0.2, "medium", Load::Until(CODE));
    assert_eq!((again.attempt, again.submitted_at), (task.attempt, task.submitted_at));
    assert!(again.ended().is_some(), "{again:?}");
    assert_eq!(Runs::read(&cluster.runs()).ended_attempts("t"), [task.attempt]);
    watch.end();
    task
}

/// The broker aborts there while `t` is on its way from submission to its end.
fn broker_dies_at(place: &str) {
    let networks = networks(1);
    let mut cluster = Cluster::start(&networks, &["cpu=1,memory=1Gi"]);
    // So that nothing but the task is written from here on.
    cluster.broker.kill9();
    cluster.broker.restart_to_die_at(place);
    cluster.broker.wait_for_node("n1", true);
    let watch = Watch::begin(&cluster);
    let submitter = submitter(&cluster);
    if place.starts_with("on-task-ended") {
        cluster.wait_until_runs("t");
    }
    cluster.let_end("t");
    cluster.broker.wait_for_abort();
    cluster.broker.restart();
    let task = assert_ended_once(&cluster, submitter, watch);
    assert_eq!(task.attempt, 1, "no broker that dies costs a run");
}

/// The agent aborts there while `t` is on its way from submission to its end.
fn agent_dies_at(place: &str) -> (ClusterTask, Vec<DecisionKind>) {
    let networks = networks(1);
    let mut cluster = Cluster::start_to_die_at(&networks, &["cpu=1,memory=1Gi"], Some(place));
    let watch = Watch::begin(&cluster);
    let submitter = submitter(&cluster);
    cluster.let_end("t");
    cluster.agents[0].wait_for_abort();
    check(&cluster);
    cluster.agents[0].restart();
    let task = assert_ended_once(&cluster, submitter, watch);
    let kinds = cluster.broker.kinds("t");
    (task, kinds)
}

#[test]
fn a_broker_that_dies_after_it_received_a_task_has_it_once() {
    broker_dies_at("after-receive-submit");
}

#[test]
fn a_broker_that_dies_before_it_recorded_a_task_has_it_once() {
    broker_dies_at("before-commit");
}

#[test]
fn a_broker_that_dies_after_it_recorded_a_task_has_it_once() {
    broker_dies_at("after-commit");
}

#[test]
fn a_broker_that_dies_before_it_answers_has_the_task_once() {
    broker_dies_at("before-answer");
}

#[test]
fn a_broker_that_dies_before_it_directs_has_the_task_started_once() {
    broker_dies_at("before-directive");
}

#[test]
fn a_broker_that_dies_after_it_directed_has_the_task_started_once() {
    broker_dies_at("after-directive");
}

#[test]
fn a_broker_that_dies_before_it_recorded_an_end_hears_of_it_again() {
    broker_dies_at("on-task-ended-before-commit");
}

#[test]
fn a_broker_that_dies_after_it_recorded_an_end_knows_it() {
    broker_dies_at("on-task-ended-after-commit");
}

#[test]
fn an_agent_that_dies_before_it_recorded_a_task_starts_it_when_it_is_back() {
    let (task, _) = agent_dies_at("agent-before-record");
    assert_eq!(task.attempt, 1, "the same directive again");
}

#[test]
fn a_task_that_was_recorded_and_never_started_runs_in_another_attempt() {
    let (task, kinds) = agent_dies_at("agent-after-record");
    assert!(task.attempt == 2 && kinds.contains(&DecisionKind::Refused), "{kinds:?}");
}

#[test]
fn a_task_that_was_prepared_and_never_started_runs_in_another_attempt() {
    let (task, kinds) = agent_dies_at("agent-before-spawn");
    assert!(task.attempt == 2 && kinds.contains(&DecisionKind::Refused), "{kinds:?}");
}

#[test]
fn an_agent_that_dies_after_it_started_a_task_takes_it_up_when_it_is_back() {
    assert_eq!(agent_dies_at("agent-after-spawn").0.attempt, 1);
}

#[test]
fn an_agent_that_dies_before_it_says_that_a_task_runs_says_so_when_it_is_back() {
    assert_eq!(agent_dies_at("agent-before-result").0.attempt, 1);
}

#[test]
fn an_agent_that_dies_before_it_recorded_an_end_finds_it_out_when_it_is_back() {
    assert_eq!(agent_dies_at("agent-before-end-is-recorded").0.attempt, 1);
}

#[test]
fn an_agent_that_dies_after_it_recorded_an_end_says_so_when_it_is_back() {
    assert_eq!(agent_dies_at("agent-after-end-is-recorded").0.attempt, 1);
}
