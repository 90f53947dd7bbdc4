//! What the real daemons tell a scraper, against what they tell by their own calls.

use std::{
    fs,
    os::unix::{fs::PermissionsExt, net::UnixStream},
    path::Path,
};

use shaper_core::ledger::Kind;
use shaper_tests::{
    agent::Options,
    broker::Broker,
    cluster::{Cluster, Load, networks},
    scrape::{Answer, Series, of_address, of_socket},
    time::eventually,
};

const TOKEN: &str = "a-token-of-thirty-two-letters-or-more";

fn of_agent(socket: &Path) -> Series {
    Series::of(&of_socket(socket, &[]))
}

fn secret(directory: &Path, content: &str) -> String {
    let file = directory.join("metrics.token");
    fs::write(&file, content).expect("a file can be written");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).expect("it is ours");
    file.display().to_string()
}

#[test]
fn an_agent_tells_what_its_calls_tell() {
    let directory = tempfile::tempdir().expect("a temporary directory can be made");
    let socket = directory.path().join("metrics.sock");
    let at = socket.display().to_string();
    let agent =
        Options::default().with(&["--metrics", &at, "--node", "n1", "--second-writer", "report"]).start();
    // Before the first task nothing is attached, and that is told.
    assert_eq!(of_agent(&socket).get("shaper_agent_programs_attached"), 0.0);

    let task = agent.run("busy", &["--cpu", "0.5", "--memory", "64Mi", "--net", "8mbit"], &["spin"]);
    let of_task = |metric: &str| format!("{metric}{{task=\"busy\",namespace=\"\",name=\"\"}}");
    let cpu = of_task("shaper_task_cpu_seconds_total");
    eventually("its CPU time is told", || of_agent(&socket).find(&cpu).is_some_and(|seconds| seconds > 0.0));
    let (before, series) = (agent.shaper().usage_of("busy"), of_agent(&socket));
    let after = agent.shaper().usage_of("busy");
    let between = before.cpu.time_ns as f64 / 1e9..=after.cpu.time_ns as f64 / 1e9;
    assert!(between.contains(&series.get(&cpu)), "{} is not in {between:?}", series.get(&cpu));
    let earlier = series.get(&cpu);
    eventually("it grows", || of_agent(&socket).get(&cpu) > earlier);

    // Of what it may use: as was asked for, in base units.
    assert_eq!(series.get(&of_task("shaper_task_limit_cpu_cores")), 0.5);
    assert_eq!(series.get(&of_task("shaper_task_limit_memory_bytes")), f64::from(64 << 20));
    let egress =
        "shaper_task_limit_network_bytes_per_second{task=\"busy\",namespace=\"\",name=\"\",direction=";
    assert_eq!(series.get(&format!("{egress}\"egress\"}}")), 1e6);
    assert_eq!(series.find(&format!("{egress}\"ingress\"}}")), None);
    assert_eq!(series.find(&of_task("shaper_task_request_cpu_cores")), None);
    agent.shaper().set("busy", &["--cpu", "0.25"]);
    assert_eq!(of_agent(&socket).get(&of_task("shaper_task_limit_cpu_cores")), 0.25);
    // The one CPU that it wants is four times that.
    eventually("it is throttled", || {
        of_agent(&socket).get(&of_task("shaper_task_cpu_throttled_seconds_total")) > 0.0
    });

    let series = of_agent(&socket);
    let info = format!(
        "shaper_task_info{{task=\"busy\",namespace=\"\",name=\"\",attempt=\"{}\",uid=\"{}\",origin=\"launched\"}}",
        task.attempt, task.owner.uid
    );
    assert_eq!(series.get(&info), 1.0);
    assert_eq!(series.get("shaper_agent_tasks{phase=\"running\"}"), 1.0);
    assert_eq!(series.get("shaper_machine_memory_bytes"), agent.shaper().top().memory.0 as f64);
    let entries = agent.shaper().ledger("busy");
    let last = entries.iter().map(|entry| entry.number).max().expect("it has entries");
    assert!(of_agent(&socket).get("shaper_agent_ledger_entries_total") >= last as f64);
    assert!(entries.iter().all(|entry| entry.kind != Kind::SecondWriter));
    assert_eq!(series.get("shaper_agent_second_writes_total{policy=\"report\"}"), 0.0);
    assert!(series.get("shaper_agent_tick_seconds_count") > 0.0);
    assert!(series.get("process_cpu_seconds_total") > 0.0);
    let waits = series.find(&of_task("shaper_task_cpu_run_queue_delay_seconds_count"));
    assert_eq!(waits.is_some(), agent.shaper().usage_of("busy").cpu.run_queue.is_some());
    for feature in agent.shaper().doctor().rungs {
        let series =
            series.find(&format!("shaper_agent_feature_available{{feature=\"{}\"}}", feature.feature));
        let is_available = feature.availability == shaper_core::doctor::Availability::Available;
        // What is only there when it has something to say is told of by another metric.
        assert!(series.is_none_or(|series| series == f64::from(u8::from(is_available))), "{feature:?}");
    }

    // Its socket is root's and its group's.
    assert_eq!(fs::metadata(&socket).expect("it is there").permissions().mode() & 0o777, 0o660);
    assert!(UnixStream::connect(&socket).is_ok());
    agent.shaper().ok(&["cancel", "busy"]);
    agent.shaper().wait("busy");
    eventually("its series are gone", || of_agent(&socket).find(&cpu).is_none());
}

#[test]
fn a_broker_tells_of_its_cluster_whoever_has_the_token() {
    let directory = tempfile::tempdir().expect("a temporary directory can be made");
    let token_file = secret(directory.path(), TOKEN);
    let arguments = ["--metrics", "tcp://127.0.0.1:0", "--metrics-token-file", &token_file];
    let broker = Broker::start_with(&arguments);
    let address = |said: &str| {
        let rest = said.split("serving metrics address=").nth(1)?;
        rest.split_whitespace().next().map(str::to_owned)
    };
    eventually("it says where its metrics are", || address(&broker.said()).is_some());
    let address = address(&broker.said()).expect("it was said");
    let token = format!("Authorization: Bearer {TOKEN}");
    let networks = networks(1);
    let cluster = Cluster::start_of(broker, &networks, &["cpu=1,memory=512Mi"]);

    // Nobody else.
    let wrong = format!("{token}x");
    for (headers, status) in
        [(&[][..], 401), (&[wrong.as_str()], 401), (&[&*token, &format!("X: {}", "x".repeat(20_000))], 431)]
    {
        let Answer { status: found, body } = of_address(&address, headers);
        assert_eq!(found, status, "{body}");
        assert!(!body.contains("shaper_broker"), "{body}");
    }
    let scrape = || Series::of(&of_address(&address, &[&token]));

    cluster.submit("runs", 0.75, "medium", Load::Until(0));
    cluster.wait_until_runs("runs");
    cluster.submit("waits", 0.5, "medium", Load::Until(0));
    cluster.submit("large", 4.0, "medium", Load::Until(0));
    let series = scrape();
    let phase =
        |series: &Series, phase: &str| series.get(&format!("shaper_broker_tasks{{phase=\"{phase}\"}}"));
    assert_eq!((phase(&series, "running"), phase(&series, "pending")), (1.0, 2.0));
    assert_eq!(series.get("shaper_broker_waiting_tasks{lack=\"room\"}"), 1.0, "{series:?}");
    assert_eq!(series.get("shaper_broker_waiting_tasks{lack=\"large-nodes\"}"), 1.0);
    assert!(series.get("shaper_broker_waiting_longest_seconds") > 0.0);
    assert_eq!(
        (series.get("shaper_broker_leads"), series.get("shaper_broker_info{store=\"redb\"}")),
        (1.0, 1.0)
    );
    assert_eq!(series.get("shaper_broker_nodes{state=\"connected\"}"), 1.0);
    let node = &cluster.broker.nodes()[0];
    assert_eq!(series.get("shaper_broker_capacity_memory_bytes"), node.capacity.memory.0 as f64);
    assert_eq!(
        series.get("shaper_broker_node_reserved_cpu_cores{node=\"n1\"}"),
        node.reserved.cpu.0 as f64 / 1e3
    );
    assert_eq!(series.get("shaper_broker_placement_seconds_count"), 1.0);
    let decided = |series: &Series, kind: &str| {
        series.get(&format!("shaper_broker_decisions_total{{decision=\"{kind}\"}}"))
    };
    assert_eq!((decided(&series, "placed"), decided(&series, "pending")), (1.0, 2.0));
    assert!(series.get("shaper_broker_commit_seconds_count") >= 3.0);
    assert_eq!(series.kind("shaper_broker_decisions_total"), Some("counter"));
    assert_eq!(series.kind("shaper_broker_commit_seconds"), Some("histogram"));
    assert_eq!(series.get("shaper_metrics_requests_refused_total{reason=\"token\"}"), 2.0);

    let open = of_address(&address, &[&token, "Accept: application/openmetrics-text; version=1.0.0"]);
    assert!(open.body.ends_with("# EOF\n"), "{}", open.body);

    cluster.let_end("runs");
    cluster.wait_until_runs("waits");
    cluster.let_end("waits");
    cluster.broker.wait_until("waits", "over", |task| task.ended().is_some());
    let series = scrape();
    let phases = (phase(&series, "running"), phase(&series, "pending"), phase(&series, "over"));
    assert_eq!(phases, (0.0, 1.0, 2.0));
    cluster.broker.shaper().ok(&["cancel", "large"]);
}
