//! Two brokers and an etcd: one leads, the other stands by, and the leader is killed, stopped or ended.

use std::time::Instant;

use rustix::process::Signal;
use tonic::Code;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use super::*;
use crate::etcd_process::Cluster;

fn start(etcd: &Cluster, lease_seconds: u64) -> Broker {
    let (endpoints, lease) = (etcd.endpoints().join(","), lease_seconds.to_string());
    Broker::start_as(&["--store", "etcd", "--etcd-endpoints", &endpoints, "--lease-seconds", &lease], &[])
}

/// Waits until a broker says of itself that it serves, or that it does not.
async fn until_it_is(broker: &Broker, wanted: ServingStatus) {
    let mut client = HealthClient::new(broker.channel().await);
    let request = HealthCheckRequest { service: "shaper.v1.Broker".into() };
    let mut changes = client.watch(request).await.unwrap().into_inner();
    let waited = async { while changes.message().await.unwrap().unwrap().status() != wanted {} };
    tokio::time::timeout(PATIENCE, waited).await.unwrap_or_else(|_| panic!("it does not become {wanted:?}"));
}

/// The one that leads, with a task that it acknowledged, and the one that stands by.
async fn two(etcd: &Cluster, lease_seconds: u64) -> (Broker, Broker) {
    let leader = start(etcd, lease_seconds);
    until_it_is(&leader, ServingStatus::Serving).await;
    let standby = start(etcd, lease_seconds);
    submit(&mut leader.client().await, spec("acknowledged", 1000)).await.unwrap();
    (leader, standby)
}

async fn has(broker: &Broker, task: &str) -> bool {
    let request = v1::GetClusterTaskRequest { task_id: task.into() };
    match broker.client().await.get_cluster_task(request).await {
        Ok(_) => true,
        Err(error) if error.code() == Code::NotFound => false,
        Err(error) => panic!("{error}"),
    }
}

#[tokio::test]
async fn one_that_stands_by_says_who_leads() {
    let etcd = Cluster::start(1);
    let (leader, standby) = two(&etcd, 5).await;
    until_it_is(&standby, ServingStatus::NotServing).await;
    let wanted = leader.socket().display().to_string();
    // Right after its start it has not looked yet.
    standby.wait_to_say("standing by");
    let error = submit(&mut standby.client().await, spec("t", 1000)).await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable, "{error}");
    assert!(error.message().contains(&wanted), "{error}");
    assert_eq!(error.metadata().get("shaper-leader").unwrap(), wanted.as_str());
    let error = Agent::new("n", 1000).attach(standby.channel().await).await.err().unwrap();
    assert_eq!(error.code(), Code::Unavailable, "{error}");
    assert!(!has(&leader, "t").await);
}

#[tokio::test]
async fn another_leads_when_the_leader_is_killed() {
    let etcd = Cluster::start(1);
    let (mut leader, standby) = two(&etcd, 2).await;
    let mut agent = Agent::new("n", 4000);
    let mut session = attach(&mut agent, &leader).await;
    let directive = session.directive().await;
    let epoch = agent.highest_epoch;
    leader.kill();
    let killed = Instant::now();
    until_it_is(&standby, ServingStatus::Serving).await;
    println!("killed: another leads after {:?} (lease 2 s)", killed.elapsed());
    assert!(has(&standby, "acknowledged").await);
    let mut session = attach(&mut agent, &standby).await;
    assert!(agent.highest_epoch > epoch, "{} after {epoch}", agent.highest_epoch);
    let again = session.directive().await;
    assert_eq!((&again.task_id, again.attempt), (&directive.task_id, directive.attempt), "the same attempt");
}

#[tokio::test]
async fn another_leads_when_the_leader_stands_still_and_that_one_writes_no_more() {
    let etcd = Cluster::start(1);
    let (mut leader, standby) = two(&etcd, 2).await;
    let mut client = leader.client().await;
    leader.signal(Signal::STOP);
    let stopped = Instant::now();
    // It is there when the process goes on, which does not know yet how late it is.
    let late = tokio::spawn(async move { submit(&mut client, spec("late", 1000)).await });
    until_it_is(&standby, ServingStatus::Serving).await;
    println!("stopped: another leads after {:?} (lease 2 s)", stopped.elapsed());
    submit(&mut standby.client().await, spec("of-the-new", 1000)).await.unwrap();
    leader.signal(Signal::CONT);
    let ended = tokio::task::spawn_blocking(move || leader.wait()).await.unwrap();
    assert_eq!(ended.code(), Some(1), "it ends, to be started again as one that stands by");
    let answer = tokio::time::timeout(PATIENCE, late).await.unwrap().unwrap();
    answer.expect_err("nothing was acknowledged");
    for (task, there) in [("acknowledged", true), ("of-the-new", true), ("late", false)] {
        assert_eq!(has(&standby, task).await, there, "{task}");
    }
}

#[tokio::test]
async fn a_leader_that_is_ended_hands_over_at_once() {
    let etcd = Cluster::start(1);
    // Longer than anything is waited for.
    let (mut leader, standby) = two(&etcd, 60).await;
    assert!(leader.terminate().success());
    until_it_is(&standby, ServingStatus::Serving).await;
    assert!(has(&standby, "acknowledged").await);
}

#[tokio::test]
async fn two_that_begin_together_do_not_both_lead() {
    let etcd = Cluster::start(1);
    let (one, other) = (start(&etcd, 5), start(&etcd, 5));
    let first = tokio::select! {
        () = until_it_is(&one, ServingStatus::Serving) => &one,
        () = until_it_is(&other, ServingStatus::Serving) => &other,
    };
    let second = if std::ptr::eq(first, &one) { &other } else { &one };
    submit(&mut first.client().await, spec("t", 1000)).await.unwrap();
    let error = submit(&mut second.client().await, spec("u", 1000)).await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable, "{error}");
}
