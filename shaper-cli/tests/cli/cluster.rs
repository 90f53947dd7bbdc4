//! What the broker is asked for.

use std::{io::Write, path::Path, process::Stdio};

use rustix::process::Signal;
use shaper_core::{
    document,
    spec::{Decision, DecisionKind, NodeVerdict},
    task::ExitStatus,
};
use shaper_proto::v1::{self, cluster_task::Phase};

use crate::{
    fake::{
        self,
        broker::{self, Call, node, spec},
        err, out,
    },
    host::{Host, line, texts},
    terminal::Terminal,
};

const PROFILE: &str = r#"{
  "task_id": "etl-1",
  "resource_demand": {"cpu_cores": 1.5, "memory_gb": 2},
  "priority": "high"
}
"#;

fn ended(code: i32) -> Phase {
    Phase::Ended(v1::Exit { status: Some(v1::exit::Status::Code(code)), unix_nanos: 1 })
}

fn running(on: &str) -> Phase {
    Phase::RunningOn(on.into())
}

fn is_cancel(call: &Call) -> bool {
    matches!(call, Call::Cancel { .. })
}

/// The spec that was submitted last.
fn submitted(host: &Host) -> v1::TaskSpec {
    let calls = host.cluster.calls();
    let spec = calls.iter().rev().find_map(|call| match call {
        Call::Submit(spec) => Some(spec.as_ref().clone()),
        _ => None,
    });
    spec.unwrap_or_else(|| panic!("{calls:?}"))
}

#[test]
fn a_profile_with_a_command_is_submitted() {
    let host = Host::new();
    let _broker = host.start_broker();
    let file = host.file("profile.json", PROFILE);
    let output = host.shaper(&["submit", &file, "--retries", "2", "--user", "0:7", "--", "/bin/sleep", "1"]);
    assert_eq!(texts(&output), ("etl-1\n", "", Some(0)));
    let spec = submitted(&host);
    assert_eq!(spec.command, ["/bin/sleep", "1"]);
    assert_eq!((spec.name.as_str(), spec.namespace.as_str(), spec.retries), ("sleep", "default", 2));
    assert_eq!(spec.cwd, std::env::current_dir().unwrap().to_str().unwrap());
    assert_eq!(spec.run_as, Some(v1::Credentials { uid: 0, gid: 7, groups: vec![] }));
    assert_eq!(spec.profile.unwrap().demand.unwrap().cpu_millicores, 1500);
    let path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    assert_eq!(spec.env, ["HOME=/root", path, "USER=root"]);
}

#[test]
fn a_task_spec_from_standard_input_says_it_all() {
    let host = Host::new();
    let _broker = host.start_broker();
    let text = "profile: {task_id: web, resource_demand: {cpu_cores: 1, memory_gb: 1}, priority: low}\n\
                command: [serve, --port, \"80\"]\nenv: {PATH: /bin, MODE: fast}\ncwd: /srv\nname: site\n\
                namespace: www\nlimits: {cpu_cores: 2}\nretries: 5\n";
    let mut command = host.command(&["submit", "-", "-o", "json"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let shown: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(shown["spec"]["profile"]["task_id"], "web");
    assert_eq!(shown["phase"]["pending"]["reason"], "no node fits: cpu");
    let spec = submitted(&host);
    assert_eq!((spec.name.as_str(), spec.namespace.as_str(), spec.cwd.as_str()), ("site", "www", "/srv"));
    assert!(spec.env.contains(&"PATH=/bin".to_owned()) && spec.env.contains(&"MODE=fast".to_owned()));
    assert_eq!(spec.limits.unwrap().cpu_millicores, Some(2000));
    assert_eq!((spec.retries, spec.run_as), (5, None));

    let file = host.file("web.yaml", text);
    let output =
        host.shaper(&["submit", &file, "--name", "n", "--cwd", "/", "--retries", "0", "--", "other"]);
    assert_eq!(output.status.code(), Some(2), "the same id with another spec");
    let spec = submitted(&host);
    assert_eq!((spec.name.as_str(), spec.cwd.as_str(), spec.retries), ("n", "/", 0));
    assert_eq!(spec.command, ["other"]);
}

#[test]
fn the_same_task_twice_is_one_and_another_of_that_id_is_refused() {
    let host = Host::new();
    let _broker = host.start_broker();
    let file = host.file("profile.json", PROFILE);
    for _ in 0..2 {
        assert_eq!(texts(&host.shaper(&["submit", &file, "--", "a"])), ("etl-1\n", "", Some(0)));
    }
    let said = "shaper: cannot submit task `etl-1`: there is a task `etl-1` with another spec: choose another task_id for \
                this one\n";
    assert_eq!(texts(&host.shaper(&["submit", &file, "--", "b"])), ("", said, Some(2)));
}

#[test]
fn submit_waits_for_the_end_across_a_restart_of_the_broker() {
    let host = Host::new();
    let broker = host.start_broker();
    let file = host.file("profile.json", PROFILE);
    let mut submit = host.spawn(&["submit", "--wait", &file, "--", "a"]);
    assert_eq!(line(&mut submit.stdout), "etl-1\n");
    assert_eq!(line(&mut submit.stderr), "task etl-1 is pending: no node fits: cpu\n");
    host.cluster.go_on("etl-1", Phase::StartingOn("n1".into()));
    assert_eq!(line(&mut submit.stderr), "task etl-1 starts on n1, attempt 1\n");
    host.cluster.go_on("etl-1", running("n1"));
    assert_eq!(line(&mut submit.stderr), "task etl-1 runs on n1, attempt 1\n");
    drop(broker);
    assert_eq!(line(&mut submit.stderr), "shaper: the broker went away; waiting for it to come back\n");
    host.cluster.go_on("etl-1", ended(7));
    let _broker = host.start_broker();
    assert_eq!(submit.end(), (String::new(), String::new(), 7));
}

#[test]
fn a_task_that_ends_as_a_shell_would_not_say_is_explained() {
    let host = Host::new();
    let _broker = host.start_broker();
    host.cluster.add(broker::task(spec("t")));
    let not_started = v1::exit::NotStarted { stage: "exec".into(), error: "no such file".into(), code: 127 };
    let status = Some(v1::exit::Status::NotStarted(not_started));
    host.cluster.go_on("t", Phase::Ended(v1::Exit { status, unix_nanos: 1 }));
    let said = "shaper: task t was not started: exec: no such file\n";
    assert_eq!(texts(&host.shaper(&["wait", "t"])), ("", said, Some(127)));
    host.cluster.go_on("t", Phase::Cancelled(true));
    assert_eq!(texts(&host.shaper(&["wait", "t"])), ("", "shaper: task `t` was cancelled\n", Some(1)));
}

#[test]
fn tasks_come_from_the_broker_where_there_is_one() {
    let host = Host::new();
    let _broker = host.start_broker();
    let on_node = Some(fake::task("etl").into());
    host.cluster.add(v1::ClusterTask { on_node, ..broker::task(spec("etl")) });
    host.cluster.go_on("etl", Phase::StartingOn("n1".into()));
    host.cluster.go_on("etl", running("n1"));
    host.cluster.add(broker::task(spec("web")));
    let expected = "\
ID   PHASE    NODE  PRIORITY  CPU  MEMORY     NET   AGE
etl  Running  n1    high      1.5    2GiB  10Mbit  1h0m
web  Pending  -     high      1.5    2GiB  10Mbit  1h0m
";
    assert_eq!(texts(&host.shaper(&["get", "tasks"])), (expected, "", Some(0)));
    let (one, web) = (host.shaper(&["get", "tasks", "web"]), expected.lines().nth(2).unwrap());
    assert!(texts(&one).0.ends_with(&format!("{web}\n")), "{one:?}");
    let wide = host.shaper(&["get", "tasks", "-o", "wide"]);
    let lines: Vec<&str> = texts(&wide).0.lines().collect();
    assert!(lines[1].contains("default/sleep  root") && lines[1].contains("0/max"), "{lines:?}");
    assert!(lines[2].ends_with("no node fits: cpu"), "{lines:?}");
    let json = host.shaper(&["get", "tasks", "-o", "json"]);
    let json: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(json[0]["phase"]["running"]["node"], "n1");
    assert_eq!(json[0]["spec"]["profile"]["demand"]["cpu"], 1500);
}

#[test]
fn a_watch_has_a_line_for_each_change_and_loses_and_doubles_nothing() {
    let host = Host::new();
    let broker = host.start_broker();
    host.cluster.add(broker::task(spec("etl")));
    let mut watch = host.spawn(&["get", "tasks", "--watch"]);
    assert!(line(&mut watch.stdout).starts_with("ID        PHASE     NODE "), "the header");
    let cells = |line: &str| line.split_whitespace().map(String::from).collect::<Vec<_>>();
    let mut next = || cells(&line(&mut watch.stdout))[..3].join(" ");
    assert_eq!(next(), "etl Pending -");
    host.cluster.go_on("etl", Phase::StartingOn("n1".into()));
    assert_eq!(next(), "etl Starting n1");
    host.cluster.outrun_watchers();
    host.cluster.go_on("etl", running("n1"));
    assert_eq!(next(), "etl Running n1");
    drop(broker);
    host.cluster.add(broker::task(spec("web")));
    let _broker = host.start_broker();
    assert_eq!(next(), "web Pending -");
    host.cluster.go_on("etl", ended(0));
    assert_eq!(next(), "etl Exited(0) n1");
    assert_eq!(line(&mut watch.stderr), "shaper: the broker went away; waiting for it to come back\n");
    watch.signal(Signal::KILL);
}

#[test]
fn a_watch_for_programs_has_an_object_a_line() {
    let host = Host::new();
    let _broker = host.start_broker();
    host.cluster.add(broker::task(spec("etl")));
    host.cluster.add(broker::task(spec("web")));
    let mut watch = host.spawn(&["get", "tasks", "etl", "--watch", "-o", "json"]);
    let mut next = || serde_json::from_str::<serde_json::Value>(&line(&mut watch.stdout)).unwrap();
    assert_eq!(next()["phase"]["pending"]["reason"], "no node fits: cpu");
    host.cluster.go_on("web", running("n1"));
    host.cluster.go_on("etl", ended(3));
    assert_eq!(next()["phase"]["ended"]["status"]["code"], 3);
    watch.signal(Signal::KILL);
}

#[test]
fn gpu_cards_of_nodes_and_of_tasks() {
    let host = Host::new();
    let _broker = host.start_broker();
    let cards = |numbers: &[u32]| Some(v1::CardSet { numbers: numbers.to_vec() });
    let plain = node("n1", Path::new("/run/n1.sock"));
    let gib = |gib: u64| Some(gib << 30);
    host.cluster.add_node(v1::NodeStatus {
        capacity: Some(v1::Capacity { gpu_memory_bytes: gib(80), ..plain.capacity.unwrap() }),
        reserved: Some(v1::Capacity { gpu_memory_bytes: gib(120), ..plain.reserved.unwrap() }),
        gpus: Some(v1::CardOffer { model: "NVIDIA A100".into(), cards: cards(&[0, 1, 3, 4]) }),
        // Card 2 is lost, and somebody still has it.
        gpu_cards_taken: cards(&[0, 2, 3]),
        ..plain
    });
    let table = host.shaper(&["get", "nodes", "-o", "wide"]);
    let lines: Vec<Vec<&str>> = texts(&table)
        .0
        .lines()
        .map(|line| line.split("  ").map(str::trim).filter(|it| !it.is_empty()).collect())
        .collect();
    assert_eq!(lines[0][8..10], ["GPUS", "GPU MODEL"]);
    assert_eq!((lines[1][4], &lines[1][8..10]), ("120GiB/320GiB", &["2/4", "NVIDIA A100"][..]));

    let mut whole = spec("whole");
    (whole.gpus, whole.gpu_model) = (2, "A100".into());
    host.cluster.add(v1::ClusterTask { gpu_cards: cards(&[1, 4]), ..broker::task(whole) });
    host.cluster.go_on("whole", running("n1"));
    let text = host.shaper(&["describe", "whole"]);
    let line = texts(&text).0.lines().find(|line| line.starts_with("GPU cards")).unwrap();
    assert!(line.ends_with(": 1,4 (2 to itself of a model `A100`)"), "{line}");
    let json = host.shaper(&["get", "tasks", "-o", "json"]);
    let json: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(json[0]["gpu_cards"], serde_json::json!([1, 4]));
}

#[test]
fn nodes_and_policies_in_tables() {
    let host = Host::new();
    let _broker = host.start_broker();
    assert_eq!(texts(&host.shaper(&["get", "nodes"])), ("", "no nodes\n", Some(0)));
    assert_eq!(texts(&host.shaper(&["get", "policies", "-o", "json"])), ("[]\n", "", Some(0)));
    host.cluster.add_node(node("n1", Path::new("/run/n1.sock")));
    let expected = "\
NAME  STATE        CPU      MEMORY  GPU MEMORY           NET  IOPS  CPU BUSY
n1    Connected  1.5/8  2GiB/16GiB           -  10Mbit/1Gbit     -     42.5%
";
    assert_eq!(texts(&host.shaper(&["get", "nodes"])), (expected, "", Some(0)));
    let wide = host.shaper(&["get", "nodes", "-o", "wide"]);
    assert!(texts(&wide).0.ends_with("/run/n1.sock  b1\n"), "{wide:?}");
    let file = host.file(
        "policy.yaml",
        "policy_name: high_priority_tasks\npriority: high\nresource_demand: {cpu_cores: 8, memory_gb: 16}\n\
         behavior: {eviction_threshold: 0.9, preemption_enabled: true}\n",
    );
    assert_eq!(host.shaper(&["apply", "-f", &file]).status.code(), Some(0));
    let expected = "\
NAME                 NAMESPACE  PRIORITY  EVICTS ABOVE  PREEMPTS  CPU  MEMORY
high_priority_tasks  default    high             90.0%  yes         8   16GiB
";
    assert_eq!(texts(&host.shaper(&["get", "policies"])), (expected, "", Some(0)));
    let wide = host.shaper(&["get", "policies", "-o", "wide"]);
    assert!(texts(&wide).0.ends_with("10000ms         1\n"), "{wide:?}");
}

#[test]
fn a_node_that_is_dead_is_said_to_be() {
    let host = Host::new();
    let _broker = host.start_broker();
    let fenced = host.shaper(&["node", "fence", "gone"]);
    assert_eq!(texts(&fenced), ("node gone had a, b: to be placed again\n", "", Some(0)));
    let there = host.shaper(&["node", "fence", "there"]);
    assert_eq!(texts(&there), ("", "shaper: cannot fence node `there`: node `there` answers\n", Some(2)));
}

#[test]
fn a_node_is_closed_emptied_opened_and_forgotten() {
    let host = Host::new();
    let _broker = host.start_broker();
    let said = |arguments: &[&str]| {
        let output = host.shaper(arguments);
        let (text, errors, code) = texts(&output);
        (text.to_owned(), errors.to_owned(), code)
    };
    let says = |text: &str| (text.to_owned(), String::new(), Some(0));
    assert_eq!(said(&["node", "cordon", "n1"]), says("node n1 takes no more tasks\n"));
    assert_eq!(said(&["node", "uncordon", "n1"]), says("node n1 takes tasks\n"));
    assert_eq!(said(&["node", "drain", "n1"]), says("node n1 is drained: it has no tasks\n"));
    let expected = "\
TASK  PRIORITY  THERE FOR  CPU TIME  GOES TO
etl   low               -      1.5s  waits
node n1 would be drained of 1 task, 1 of which fits nowhere else now; 1.5 s of CPU time have been used so far
";
    assert_eq!(said(&["node", "drain", "--dry-run", "n1"]), says(expected));
    assert_eq!(said(&["node", "remove", "gone"]), says("node gone is forgotten\n"));
    let refused = "shaper: cannot remove node `n1`: node `n1` answers: stop its agent first\n".to_owned();
    assert_eq!(said(&["node", "remove", "n1"]), (String::new(), refused, Some(2)));
    let none = "no groups of nodes: the broker has none to start and end (--scale)\n".to_owned();
    assert_eq!(said(&["get", "scale"]), (String::new(), none, Some(0)));
}

#[test]
fn a_drain_is_waited_for_and_shown() {
    let host = Host::new();
    let _broker = host.start_broker();
    host.cluster.add(broker::task(spec("etl")));
    host.cluster.go_on("etl", running("full"));
    let command = host.command(&["node", "drain", "full", "--wait"]);
    let terminal = Terminal::start(command, 160, 24);
    terminal.await_text("node full is drained of 1 task");
    terminal.await_text("tasks have left full: [");
    terminal.await_text("0 of 1");
    host.cluster.go_on("etl", Phase::StartingOn("other".into()));
    let ended = terminal.end();
    assert!(ended.said.ends_with("node full has none of them any more"), "{ended:?}");
    assert_eq!((ended.code, ended.said.contains("0 of 1"), ended.coloured), (Some(0), false, false));
    // For who is no terminal nothing is drawn.
    let output = host.shaper(&["node", "drain", "full", "--wait"]);
    let (said, errors, code) = texts(&output);
    assert!(said.ends_with("node full has none of them any more\n"), "{said}");
    assert_eq!((errors, code), ("", Some(0)));
}

#[test]
fn policies_are_created_changed_and_left() {
    let host = Host::new();
    let _broker = host.start_broker();
    let policy = |threshold: &str| {
        format!("policy_name: a\npriority: high\nbehavior: {{eviction_threshold: {threshold}}}\n")
    };
    let a = host.file("a.yaml", policy("0.9"));
    let b = host.file("b.json", r#"{"policy_name": "b", "priority": "low", "namespace": "batch"}"#);
    let apply = || host.shaper(&["apply", "-f", &a, &b]);
    assert_eq!(texts(&apply()), ("default/a created\nbatch/b created\n", "", Some(0)));
    assert_eq!(texts(&apply()), ("default/a unchanged\nbatch/b unchanged\n", "", Some(0)));
    host.file("a.yaml", policy("0.8"));
    assert_eq!(texts(&apply()), ("default/a changed\nbatch/b unchanged\n", "", Some(0)));
    assert_eq!(host.cluster.calls(), ["a", "b", "a"].map(|name| Call::Apply(name.into())));
    host.cluster.demote_caller();
    host.file("a.yaml", policy("0.7"));
    let said = "shaper: cannot apply policy `a`: only root may apply policies\n";
    assert_eq!(texts(&apply()), ("", said, Some(2)));
}

#[test]
fn policies_are_compared_deleted_and_gone_back_to() {
    let host = Host::new();
    let _broker = host.start_broker();
    let file = host.file("web.yaml", "policy_name: web\npriority: high\nlimits: {cpu: 2}\n");
    let preview = host.shaper(&["apply", "--dry-run=server", "-f", &file]);
    let expected = "etl (on n1)\n  limits.cpu: at most 2 cores, from web\n";
    assert_eq!((texts(&preview), host.cluster.calls()), ((expected, "", Some(0)), vec![]));
    let diff = || host.shaper(&["policy", "diff", &file]);
    let created = "  web created\n  + limits.cpu: 2\n  + priority: high\n";
    assert_eq!(texts(&diff()), (created, "", Some(0)));
    assert_eq!(host.shaper(&["apply", "-f", &file]).status.code(), Some(0));
    assert_eq!(texts(&diff()), ("  web unchanged\n", "", Some(0)));
    host.file("web.yaml", "policy_name: web\npriority: high\nselector: {labels: {tier: gold}}\n");
    let changed = "  web changed\n  - limits.cpu: 2\n  + selector.labels.tier: gold\n";
    assert_eq!(texts(&diff()), (changed, "", Some(0)));

    let shown = "policy_name: web\npriority: high\nlimits.cpu: 2\nrevision 1\n";
    assert_eq!(texts(&host.shaper(&["policy", "get", "web"])), (shown, "", Some(0)));
    let wide = host.shaper(&["policy", "get", "-o", "wide"]);
    assert!(texts(&wide).0.lines().last().unwrap().contains("high"), "{wide:?}");
    let deleted = host.shaper(&["policy", "delete", "web"]);
    let what =
        "revision 2  1970-01-01T00:00:00.000Z  uid 0\n  web deleted\n  - limits.cpu: 2\n  - priority: high\n";
    assert_eq!(texts(&deleted), (what, "", Some(0)));
    let missing = "shaper: there is no policy `web`; `shaper policy get` lists them\n";
    assert_eq!(texts(&host.shaper(&["policy", "get", "web"])), ("", missing, Some(2)));
    let history = host.shaper(&["policy", "history"]);
    let first = format!("revision 1  1970-01-01T00:00:00.000Z  uid 0\n{created}");
    assert_eq!(texts(&history), (format!("{first}{what}").as_str(), "", Some(0)));
    let back = host.shaper(&["policy", "rollback", "1"]);
    let expected = "revision 2  1970-01-01T00:00:00.000Z  uid 0, back to revision 1\n";
    assert_eq!(texts(&back), (expected, "", Some(0)));
}

#[test]
fn a_task_is_described_with_what_it_asked_for() {
    let host = Host::new();
    let _broker = host.start_broker();
    host.cluster.add(broker::task(spec("etl")));
    let output = host.shaper(&["describe", "etl"]);
    let (stdout, stderr, code) = texts(&output);
    assert_eq!((stderr, code), ("", Some(0)));
    let submitted = stdout.lines().find(|line| line.starts_with("Submitted:")).unwrap();
    assert!(submitted.ends_with("Z (1h0m ago)"), "{submitted}");
    let expected = "\
Task:      etl (attempt 0, 0 retries)
Name:      default/sleep
Phase:     Pending: no node fits: cpu
Priority:  high
Estimate:  60 s
Command:   /bin/sleep 1
Directory: /
Runs as:   root (uid 0, gid 0)
Owner:     root (uid 0, gid 0)

Resources:
  RESOURCE              REQUEST  LIMIT
  cpu                       1.5      -
  cpu_weight                  -      -
  memory                  2 GiB      -
  gpu_memory                  -      -
  network             10 Mbit/s      -
  storage_io                  -      -
  storage_io_weight           -      -
  storage_io_latency          -      -
";
    assert_eq!(stdout.replace(&format!("{submitted}\n"), ""), expected);
    let on_node = Some(fake::task("etl").into());
    host.cluster.add(v1::ClusterTask { on_node, cancel_requested: true, ..broker::task(spec("etl")) });
    host.cluster.go_on("etl", running("n1"));
    let output = host.shaper(&["describe", "etl"]);
    let (stdout, _, _) = texts(&output);
    for part in [
        "Phase:     Running (is to end)\nNode:      n1\n",
        "\nLimits on n1, as last reported:\n",
        "\nUsage:\n",
    ] {
        assert!(stdout.contains(part), "{stdout}");
    }
    for (name, text) in [("all", "limits: {cpu: 3}"), ("sleepers", "limits: {cpu: 2}\nselector: {name: sl*}")]
    {
        let file = host.file(name, format!("policy_name: {name}\npriority: high\n{text}\n"));
        assert_eq!(host.shaper(&["apply", "-f", &file]).status.code(), Some(0));
    }
    let output = host.shaper(&["describe", "etl"]);
    let policies = "\nPolicies:\n  limits.cpu: at most 2 cores, from sleepers\n    not from all: sleepers names the task \
                    more exactly\n";
    assert!(texts(&output).0.ends_with(policies), "{output:?}");
    let json = host.shaper(&["describe", "etl", "-o", "json"]);
    let json: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!((&json["node"], &json["on_node"]["pid"]), (&"n1".into(), &42.into()));
    let rerun = v1::TaskSpec { on_node_lost: v1::OnNodeLost::Rerun.into(), ..spec("etl") };
    host.cluster.add(broker::task(rerun));
    let output = host.shaper(&["describe", "etl"]);
    let (stdout, _, _) = texts(&output);
    assert!(stdout.contains("\nLost node: ended there, and run again elsewhere\n"), "{stdout}");
}

#[test]
fn a_task_of_the_agent_alone_is_still_found() {
    let host = Host::new();
    let _broker = host.start_broker();
    let said = "shaper: cannot get task `web`: the broker knows no task `web`\n";
    assert_eq!(texts(&host.shaper(&["describe", "web"])), ("", said, Some(2)));
    host.node.add(fake::task("web"));
    let _agent = host.start_agent();
    let output = host.shaper(&["describe", "web"]);
    assert!(texts(&output).0.contains("Cgroup:    /sys/fs/cgroup/shaper/web.1"), "{output:?}");
    host.node.write("web", [out("a")]);
    assert_eq!(texts(&host.shaper(&["logs", "web"])), ("a\n", "", Some(0)));
    host.node.end("web", ExitStatus::Code(4));
    assert_eq!(texts(&host.shaper(&["cancel", "web"])), ("web Exited(4)\n", "", Some(0)));
    assert_eq!(texts(&host.shaper(&["wait", "web"])), ("", "", Some(4)));
    assert_eq!(texts(&host.shaper(&["describe", "nope"])).2, Some(2));
}

#[test]
fn cancel_waits_for_the_end_unless_told_not_to() {
    let host = Host::new();
    let _broker = host.start_broker();
    host.cluster.add(broker::task(spec("web")));
    let output = host.shaper(&["cancel", "web", "--grace", "500ms", "--no-wait"]);
    assert_eq!(texts(&output), ("web Pending\n", "", Some(0)));
    let cancel = host.spawn(&["cancel", "web", "--now"]);
    host.cluster.await_call(|call| *call == Call::Watch);
    host.cluster.go_on("web", Phase::Cancelled(true));
    assert_eq!(cancel.end(), ("web Cancelled\n".into(), String::new(), 0));
    let cancels: Vec<Call> = host.cluster.calls().into_iter().filter(is_cancel).collect();
    assert_eq!(cancels, [Call::Cancel { grace_millis: 500 }, Call::Cancel { grace_millis: 0 }]);
}

#[test]
fn a_log_is_read_from_the_agent_of_the_node_or_it_is_said_where_it_is() {
    let host = Host::new();
    let _broker = host.start_broker();
    host.cluster.add(broker::task(spec("etl")));
    let logs = || host.shaper(&["logs", "etl"]);
    let said = "shaper: task `etl` has no log yet: it is Pending\n";
    assert_eq!(texts(&logs()), ("", said, Some(2)));

    host.cluster.go_on("etl", running("n1"));
    let at = |reason: &str| {
        format!("shaper: the log of task `etl` is on node `n1`, {reason}: run `shaper logs etl` there\n")
    };
    assert_eq!(texts(&logs()), ("", at("whose agent is not known to the broker now").as_str(), Some(2)));
    host.cluster.add_node(node("n1", &host.socket()));
    assert_eq!(texts(&logs()), ("", at("which is not this machine").as_str(), Some(2)));
    host.node.add(fake::task("etl"));
    host.node.write("etl", [out("a"), err("b")]);
    let _agent = host.start_agent();
    assert_eq!(texts(&logs()), ("a\n", "b\n", Some(0)));

    // Another machine, whose agent has a socket of the same name as ours.
    host.cluster.add_node(node("n2", &host.socket()));
    host.cluster.go_on("etl", running("n2"));
    let said = at("and this is node `n1`").replacen("`n1`", "`n2`", 1);
    assert_eq!(texts(&logs()), ("", said.as_str(), Some(2)));
}

#[test]
fn decisions_are_listed_and_followed() {
    let host = Host::new();
    let broker = host.start_broker();
    let none = "nothing of that kind was decided since the broker began to lead\n";
    assert_eq!(texts(&host.shaper(&["get", "events"])), ("", none, Some(0)));
    let decision = |second: u64, kind| Decision {
        at: second * 1_000_000_000,
        by: "broker".into(),
        kind,
        reason: "because \u{1b}[31m".into(),
        nodes: vec![],
    };
    host.cluster.decide(decision(1, DecisionKind::Pending).into());
    host.cluster.decide(decision(2, DecisionKind::Placed).into());
    let expected = "\
TIME                  TASK  WHAT     BY      WHY
1970-01-01T00:00:01Z  etl   pending  broker  because \\u{1b}[31m
1970-01-01T00:00:02Z  etl   placed   broker  because \\u{1b}[31m
";
    assert_eq!(texts(&host.shaper(&["get", "events"])), (expected, "", Some(0)));
    let placed = host.shaper(&["get", "events", "etl", "--kind", "placed", "-o", "json"]);
    let events: serde_json::Value = serde_json::from_slice(&placed.stdout).unwrap();
    assert_eq!((events[0]["number"].as_u64(), events.as_array().map(Vec::len)), (Some(2), Some(1)));
    for nothing in [&["other"][..], &["--since", "1h"], &["--kind", "lost"]] {
        let output = host.shaper(&[&["get", "events"], nothing].concat());
        assert_eq!(texts(&output), ("", none, Some(0)), "{nothing:?}");
    }
    let unknown = host.shaper(&["get", "events", "--kind", "what"]);
    assert!(texts(&unknown).1.contains("scale_out") && unknown.status.code() == Some(2), "{unknown:?}");

    let mut watch = host.spawn(&["get", "events", "--watch", "--kind", "placed", "--kind", "ended"]);
    let mut next = || line(&mut watch.stdout);
    assert!(next().starts_with("TIME  "), "the header");
    assert!(next().starts_with("1970-01-01T00:00:02Z"));
    host.cluster.decide(decision(3, DecisionKind::Grew).into());
    drop(broker);
    let _broker = host.start_broker();
    host.cluster.decide(decision(4, DecisionKind::Ended).into());
    assert!(next().starts_with("1970-01-01T00:00:04Z"), "each is there once, also after a loss");
    watch.signal(Signal::KILL);
}

#[test]
fn decisions_are_explained() {
    let host = Host::new();
    let _broker = host.start_broker();
    host.cluster.add(broker::task(spec("etl")));
    let output = host.shaper(&["explain", "etl"]);
    assert_eq!(texts(&output), ("", "nothing was decided about task etl yet\n", Some(0)));
    let decision = Decision {
        at: 1_500_000_000,
        by: "broker".into(),
        kind: DecisionKind::Pending,
        reason: "no node fits".into(),
        nodes: vec![NodeVerdict {
            node: "n1".into(),
            score: None,
            lacking: vec!["cpu: wants 4 cores, 2 are free".into()],
            not_checked: vec!["storage_io".into()],
        }],
    };
    host.cluster.decide(decision.clone().into());
    let expected = "\
1970-01-01T00:00:01.500Z  broker  pending    no node fits
    n1  does not fit: cpu: wants 4 cores, 2 are free (not checked: storage_io)
";
    assert_eq!(texts(&host.shaper(&["explain", "etl"])), (expected, "", Some(0)));
    let json = host.shaper(&["explain", "etl", "-o", "json"]);
    assert_eq!(serde_json::from_slice::<Vec<Decision>>(&json.stdout).unwrap(), [decision]);
    let said = "shaper: cannot explain task `nope`: the broker knows no task `nope`\n";
    assert_eq!(texts(&host.shaper(&["explain", "nope"])), ("", said, Some(2)));
}

#[test]
fn a_measured_profile_can_be_submitted() {
    let host = Host::new();
    let _broker = host.start_broker();
    let said = "shaper: cannot get the profile of `train` in namespace `default`: no task of name `train` has finished in \
                namespace `default`\n";
    assert_eq!(texts(&host.shaper(&["profile", "get", "train"])), ("", said, Some(2)));
    let measured = spec("train").profile;
    let notes = vec!["memory: the peak and a tenth".into()];
    let estimate = v1::ResourceEstimate {
        resource: "cpu".into(),
        request: 1500,
        hours: 2.25,
        touched: 0.015,
        unserved: 0.004,
        unused: 0.35,
    };
    host.cluster.measure(v1::GetProfileResponse {
        profile: measured.clone(),
        executions: 3,
        notes,
        estimates: vec![estimate],
    });
    let output = host.shaper(&["profile", "get", "train"]);
    let expected = r#"{
  "task_id": "train",
  "resource_demand": {
    "cpu_cores": 1.5,
    "memory_gb": 2,
    "network_bandwidth_mbps": 10
  },
  "priority": "high",
  "estimated_runtime_seconds": 60
}
"#;
    let said = "measured in 3 executions of train\nnote: memory: the peak and a tenth\n";
    assert_eq!(texts(&output), (expected, said, Some(0)));
    assert_eq!(document::profile("p", &output.stdout), Ok(measured.unwrap().try_into().unwrap()));
    let file = host.file("p.json", &output.stdout);
    assert_eq!(host.shaper(&["submit", &file, "--", "train"]).status.code(), Some(0));

    let explained = "RESOURCE  REQUEST  MEASURED FOR  ABOVE IT  OF ITS USE  UNUSED\n\
                     cpu           1.5         2.2 h     1.5 %       0.4 %  35.0 %\n";
    let output = host.shaper(&["profile", "explain", "train", "--priority", "high"]);
    assert_eq!(texts(&output), (explained, said, Some(0)));

    assert_eq!(texts(&host.shaper(&["profile", "list"])), ("", "no profiles\n", Some(0)));
    let demand = spec("train").profile.and_then(|profile| profile.demand);
    host.cluster.know(v1::ProfileSummary {
        namespace: "default".into(),
        name: "train".into(),
        executions: 3,
        hours: 2.25,
        demand,
        seen_at_unix_nanos: None,
    });
    let listed = "NAMESPACE  NAME   CPU  MEMORY  NETWORK  FINISHED  MEASURED FOR  LAST\n\
                  default    train  1.5    2GiB   10Mbit         3          2.2h     -\n";
    assert_eq!(texts(&host.shaper(&["profile", "list"])), (listed, "", Some(0)));
}

#[test]
fn run_without_limits_takes_those_of_the_measured_profile() {
    let host = Host::new();
    let (_broker, _agent) = (host.start_broker(), host.start_agent());
    let limits = |args: &[&str]| {
        let output = host.shaper(args);
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        let calls = host.node.calls();
        let request = calls.iter().rev().find_map(|call| match call {
            fake::Call::Run(request) => Some(request.clone()),
            _ => None,
        });
        (request.and_then(|request| request.limits).unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    // Nobody has run it yet.
    let unmeasured = limits(&["run", "-d", "--id", "a", "--", "/opt/train"]);
    assert_eq!(unmeasured, (v1::Limits::default(), String::new()));

    let profile = spec("train").profile;
    host.cluster.measure(v1::GetProfileResponse {
        profile,
        executions: 3,
        notes: Vec::new(),
        estimates: Vec::new(),
    });
    let (measured, said) = limits(&["run", "-d", "--id", "b", "--", "/opt/train"]);
    assert_eq!((measured.cpu_millicores, measured.memory_bytes), (Some(1500), Some(2 << 30)));
    assert_eq!(said, "limits from the measured profile of train: 1.5 cores, 2 GiB\n");
    let (named, said) = limits(&["run", "-d", "--id", "c", "--cpu", "3", "--", "/opt/train"]);
    assert_eq!(named, v1::Limits { cpu_millicores: Some(3000), ..v1::Limits::default() });
    assert_eq!(said, "");
}

#[test]
fn without_a_broker_the_remedy_is_said() {
    let host = Host::new();
    let socket = host.broker_socket();
    let broker = ["--broker", socket.to_str().unwrap()];
    let said = format!(
        "shaper: there is no broker at `{}`: start `shaper-broker`, or name its socket with --broker\n",
        socket.display()
    );
    for command in [
        &["get", "nodes"][..],
        &["get", "tasks"],
        &["explain", "a"],
        &["profile", "get", "a"],
        &["wait", "a"],
    ] {
        let output = host.shaper(&[command, &broker].concat());
        assert_eq!(texts(&output), ("", said.as_str(), Some(1)), "{command:?}");
    }
}

#[test]
fn a_list_for_nobody_ends_quietly() {
    let host = Host::new();
    let _broker = host.start_broker();
    host.cluster.add(broker::task(spec("etl")));
    for args in
        [&["get", "tasks"][..], &["get", "tasks", "--watch"], &["get", "tasks", "--watch", "-o", "json"]]
    {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = host.command(args).stdout(writer).output().unwrap();
        assert_eq!(texts(&output), ("", "", Some(141)), "{args:?}");
    }
}

#[test]
fn ui_prints_the_address_alone_on_standard_output() {
    let host = Host::new();
    let _broker = host.start_broker();
    let said = "open this in a browser within 120 s; it works once:\n";
    let output = host.shaper(&["ui"]);
    assert_eq!(texts(&output), ("http://127.0.0.1:9780/open?code=00ff\n", said, Some(0)));
}
