//! The whole path: a policy in YAML, two tasks submitted as JSON profiles, a broker that places them, a node
//! that lets one grow while there is room and takes it back when one with priority needs it; and why.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::network::Network;
use super::node::{Broker, Membership, Node};
use super::report::Report;
use super::{Limits, Task, measure, observe, say};
use crate::bins::BinDir;

/// Less than the machine has, so that what is shared out is what the node was given.
const CAPACITY: &str = "cpu=1.2,memory=1Gi,network=100mbit";

const POLICY: &str = r#"policy_name: "high_priority_tasks"
priority: "high"
resource_demand: {cpu_cores: 0.8, memory_gb: 0.125}
behavior: {eviction_threshold: 0.9, preemption_enabled: true}
"#;

const BATCH: &str = r#"{"task_id":"batch-job","resource_demand":{"cpu_cores":0.4,"memory_gb":0.125,
"network_bandwidth_mbps":20},"priority":"low","estimated_runtime_seconds":3600}"#;

const SERVICE: &str = r#"{"task_id":"web-service","resource_demand":{"cpu_cores":0.8,"memory_gb":0.125,
"network_bandwidth_mbps":60},"priority":"high"}"#;

/// From a change to its measurement: demand is found by asking, step by step.
const SETTLE: Duration = Duration::from_secs(4);
const MEASURE: Duration = Duration::from_secs(3);
const START: Duration = Duration::from_secs(20);

/// Adds what was granted and measured to the report, and returns why everything was decided.
pub(super) fn run(bins: &BinDir, object: &Path, network: &Network, report: &mut Report) -> Result<String> {
    say("the whole path: a broker, an agent with 1.2 cores and 100 Mbit/s for it, one policy");
    let broker = Broker::start(bins)?;
    let membership = Membership { broker: broker.socket(), capacity: CAPACITY };
    let node = Node::start(bins, object, network, Some(membership))?;
    node.at_broker(&["apply", "-f", "-"], POLICY)?;

    let mut tasks = vec![submit(Task::new("batch-job", network.sink()?), &node, BATCH)?];
    say("batch-job (low, requests 0.4 cores and 20 Mbit/s, takes what it can get) is alone");
    stage("alone", &node, &mut tasks, report)?;
    tasks.push(submit(Task::new("web-service", network.sink()?), &node, SERVICE)?);
    say("web-service (high, requests 0.8 cores and 60 Mbit/s, takes what it can get) joins it");
    stage("together", &node, &mut tasks, report)?;

    let mut why = String::from("WHY\n");
    for task in &tasks {
        why += &node.at_broker(&["explain", task.name], "")?;
        why += "\n";
    }
    for task in &tasks {
        node.at_broker(&["cancel", task.name, "--now"], "")?;
    }
    node.release_all()?;
    node.check_nothing_is_left()?;
    Ok(why)
}

/// Submits a profile, and waits until the task runs.
fn submit(mut task: Task, node: &Node, profile: &str) -> Result<Task> {
    let command = task.command(2);
    node.at_broker(
        &["submit", "-", "--user", "nobody", "--cwd", "/", "--", "bash", "-c", &command],
        profile,
    )?;
    let start = Instant::now();
    loop {
        let statuses = node.statuses()?;
        let status = statuses.iter().find(|status| status["task_id"] == task.name);
        if status.is_some_and(|status| status["pid"].is_u64()) {
            break;
        }
        if start.elapsed() > START {
            bail!("{} does not run: {}", task.name, node.at_broker(&["explain", task.name], "")?);
        }
        std::thread::sleep(super::SAMPLE);
    }
    task.find_cgroup(node)?;
    Ok(task)
}

/// Lets the node adjust, then compares what each task is granted with what it was seen to use.
fn stage(title: &str, node: &Node, tasks: &mut [Task], report: &mut Report) -> Result<()> {
    observe(node, tasks, SETTLE)?;
    let names: Vec<_> = tasks.iter().map(|task| task.name).collect();
    let (from, granted) = measure(node, tasks, MEASURE, || {
        let statuses = node.statuses()?;
        let granted_to = |name: &&str| {
            let status = statuses.iter().find(|status| status["task_id"] == *name);
            granted(status.with_context(|| format!("task {name} is gone"))?)
        };
        names.iter().map(granted_to).collect()
    })?;
    for (task, granted) in tasks.iter_mut().zip(granted) {
        report.compare(title, task.name, granted, from, &task.observations);
        task.observations.clear();
    }
    Ok(())
}

/// What a task may use now.
fn granted(status: &Value) -> Result<Limits> {
    let cpu = status["limits"]["cpu"]["at"].as_u64().context("no CPU is granted")?;
    let network = status["usage"]["egress_granted_bps"].as_u64().context("no network is granted")?;
    Ok(Limits { cores: cpu as f64 / 1e3, mbit: network as f64 / 1e6 })
}
