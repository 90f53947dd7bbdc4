//! Two brokers with one etcd: agents and clients that know both go where the leader is.

use std::path::Path;

use serde_json::json;
use shaper_tests::{
    NOBODY,
    agent::Options,
    broker::{Broker, ClusterPhase},
    cluster::networks,
    shaper::Shaper,
    time::eventually,
};

use crate::etcd_process::Cluster as Etcd;

fn start(etcd: &Etcd) -> Broker {
    let endpoints = etcd.endpoints().join(",");
    Broker::start_with(&["--store", "etcd", "--etcd-endpoints", &endpoints, "--lease-seconds", "2"])
}

fn leads(broker: &Broker) -> bool {
    broker.said().lines().any(|line| line.ends_with("leading"))
}

#[test]
fn a_task_runs_on_while_another_broker_comes_to_lead() {
    let (etcd, networks) = (Etcd::start(1), networks(1));
    let mut first = start(&etcd);
    eventually("one broker leads", || leads(&first));
    let second = start(&etcd);
    // The one that stands by is asked first.
    let both = format!("{},{}", second.socket().display(), first.socket().display());
    let options = Options::default().within(&networks[0]);
    let agent = options.with(&["--node", "n1", "--broker", &both, "--capacity", "cpu=1,memory=1Gi"]).start();
    first.wait_for_node("n1", true);

    let shaper = Shaper::of_broker(&first.directory().join("shaper"), Path::new(&both), 0);
    let demand = json!({"cpu_cores": 0.1, "memory_gb": 0.0625});
    let spec = json!({
        "profile": {"task_id": "t", "resource_demand": demand, "priority": "medium"},
        "command": ["sleep", "600"],
        "cwd": "/",
        "run_as": {"uid": NOBODY, "gid": NOBODY},
    });
    let answer = shaper.call_with(&["submit", "-"], spec.to_string().as_bytes());
    assert_eq!(answer.code, 0, "{answer:?}");
    first.wait_until("t", "running", |task| task.runs());
    let process = agent.process(&agent.shaper().get("t"));

    first.kill9();
    eventually("the other broker leads", || leads(&second));
    second.wait_for_node("n1", true);
    let task = second.task("t");
    assert!(task.runs() && task.attempt == 1 && process.is_alive(), "{task:?}");
    // What knows both still finds the one that is there.
    shaper.ok(&["cancel", "t"]);
    second.wait_until("t", "cancelled", |task| matches!(task.phase, ClusterPhase::Cancelled));
    eventually("its process has ended", || !process.is_alive());
}
