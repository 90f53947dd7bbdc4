//! What the agent of this node is asked for.

use std::io::BufReader;

use rustix::process::Signal;
use shaper_core::{
    doctor::Report,
    limits::{Limit, Limits},
    task::{ExitStatus, Phase, TaskStatus, Usage},
    units::{BitsPerSec, Bytes, Millicores, Weight},
};
use shaper_proto::v1;

use crate::{
    fake::{self, Call, err, out, task},
    host::{Host, line, texts},
    terminal::Terminal,
};

fn is_run(call: &Call) -> bool {
    matches!(call, Call::Run(_))
}

fn is_cancel(grace: u64) -> impl Fn(&Call) -> bool {
    move |call| matches!(call, Call::Cancel { grace_millis } if *grace_millis == grace)
}

fn busy_task() -> TaskStatus {
    TaskStatus {
        limits: Limits {
            cpu: Limit::At(Millicores(500)),
            cpu_weight: Weight::new(300),
            memory: Limit::At(Bytes(512 << 20)),
            net_egress: Limit::At(BitsPerSec(10_000_000)),
            storage_io: Limit::Unlimited,
            storage_io_weight: None,
            storage_io_latency: Limit::Unlimited,
            reclaim_idle: None,
            net_egress_guarantee: None,
            net_egress_weight: None,
            net_ingress: Limit::Unlimited,
            gpu_cards: None,
            gpu_memory: Limit::Unlimited,
            gpu_power: Limit::Unlimited,
        },
        usage: Usage {
            memory_bytes: Some(120 << 20),
            cpu_now_millicores: 480,
            egress_now_bps: 9_840_000,
            ingress_now_bps: 128_000,
            egress_granted_bps: None,
            ..Usage::default()
        },
        ..task("etl")
    }
}

#[test]
fn run_streams_both_outputs_and_ends_with_the_code_of_the_task() {
    let host = Host::new();
    let _agent = host.start_agent();
    let mut run =
        host.spawn(&["run", "--id", "web", "--cpu", "0.5", "--env", "MODE=fast", "--", "sh", "-c", "x"]);
    assert_eq!(line(&mut run.stderr), "task web started\n");
    host.node.write("web", [out("one"), err("two")]);
    assert_eq!(line(&mut run.stdout), "one\n");
    assert_eq!(line(&mut run.stderr), "two\n");
    let part = v1::log_chunk::Record { partial: true, ..out("thr") };
    let gap = v1::log_chunk::Record { lost_bytes: 7, ..Default::default() };
    host.node.write("web", [part, out("ee"), gap]);
    host.node.end("web", ExitStatus::Code(3));
    let expected = ("three\n".into(), "shaper: 7 bytes of log are no longer kept\n".into(), 3);
    assert_eq!(run.end(), expected);

    let calls = host.node.calls();
    let Some(Call::Run(request)) = calls.iter().find(|call| is_run(call)) else { panic!("{calls:?}") };
    assert_eq!(request.command, ["sh", "-c", "x"]);
    assert_eq!(request.limits, Some(v1::Limits { cpu_millicores: Some(500), ..Default::default() }));
    assert!(request.env.contains(&"MODE=fast".to_owned()), "{:?}", request.env);
    assert!(request.env.iter().any(|variable| variable.starts_with("PATH=")), "{:?}", request.env);
    assert_eq!(request.cwd, std::env::current_dir().unwrap().to_str().unwrap());
    assert_eq!(request.run_as, None);
}

#[test]
fn run_ends_as_a_shell_would_say_it() {
    let not_started =
        |error: &str, code| ExitStatus::NotStarted { stage: "exec".into(), error: error.into(), code };
    for (status, code, said) in [
        (ExitStatus::Signal(9), 137, ""),
        (
            not_started("No such file or directory", 127),
            127,
            "shaper: task t was not started: exec: No such file or directory\n",
        ),
        (
            not_started("Permission denied", 126),
            126,
            "shaper: task t was not started: exec: Permission denied\n",
        ),
        (
            ExitStatus::Unknown,
            125,
            "shaper: how task t ended is not known: its supervisor was killed, or it never had one\n",
        ),
    ] {
        let host = Host::new();
        let _agent = host.start_agent();
        let run = host.spawn(&["run", "--id", "t", "--", "x"]);
        host.node.await_call(|call| matches!(call, Call::ReadLogs { .. }));
        host.node.end("t", status);
        assert_eq!(run.end(), (String::new(), format!("task t started\n{said}"), code));
    }
}

#[test]
fn run_outlives_its_agent_and_loses_and_doubles_nothing() {
    let host = Host::new();
    let agent = host.start_agent();
    let mut run = host.spawn(&["run", "--id", "web", "--", "x"]);
    assert_eq!(line(&mut run.stderr), "task web started\n");
    host.node.write("web", [out("1"), out("2"), out("3")]);
    for expected in ["1\n", "2\n", "3\n"] {
        assert_eq!(line(&mut run.stdout), expected);
    }

    drop(agent);
    assert_eq!(line(&mut run.stderr), "shaper: the agent went away; waiting for it to come back\n");
    host.node.write("web", [out("4")]);
    let agent = host.start_agent();
    assert_eq!(line(&mut run.stdout), "4\n");

    drop(agent);
    assert_eq!(line(&mut run.stderr), "shaper: the agent went away; waiting for it to come back\n");
    host.node.write("web", [out("5"), out("6")]);
    host.node.end("web", ExitStatus::Code(4));
    let _agent = host.start_agent();
    assert_eq!(run.end(), ("5\n6\n".into(), String::new(), 4));
    let cursors: Vec<u64> = host
        .node
        .calls()
        .iter()
        .filter_map(|call| if let Call::ReadLogs { cursor } = call { Some(*cursor) } else { None })
        .collect();
    assert_eq!(cursors, [0, 3, 4]);
}

#[test]
fn wait_outlives_the_agent() {
    let host = Host::new();
    host.node.add(task("web"));
    let agent = host.start_agent();
    let wait = host.spawn(&["wait", "web"]);
    host.node.await_call(|call| *call == Call::Wait);
    drop(agent);
    host.node.end("web", ExitStatus::Code(5));
    let _agent = host.start_agent();
    let said = "shaper: the agent went away; waiting for it to come back\n";
    assert_eq!(wait.end(), (String::new(), said.into(), 5));
}

#[test]
fn signals_cancel_then_kill_and_the_output_goes_on_to_the_end() {
    let host = Host::new();
    let _agent = host.start_agent();
    let mut run = host.spawn(&["run", "--id", "web", "--", "x"]);
    assert_eq!(line(&mut run.stderr), "task web started\n");
    run.signal(Signal::INT);
    host.node.await_call(is_cancel(10_000));
    run.signal(Signal::TERM);
    host.node.await_call(is_cancel(0));
    host.node.write("web", [out("last words")]);
    host.node.end("web", ExitStatus::Signal(9));
    let said = "shaper: cancelling task web, with 10 s to end; once more kills it\n\
                shaper: killing task web; once more leaves it to the agent\n";
    assert_eq!(run.end(), ("last words\n".into(), said.into(), 137));
}

#[test]
fn a_signal_is_heard_while_nobody_reads_the_output() {
    let host = Host::new();
    let _agent = host.start_agent();
    let started = "task web started";
    let run = host.command(&["run", "--id", "web", "--", "x"]);
    let terminal = Terminal::start_unread(run, 80, 24, started.len());
    // More than a pty holds.
    host.node.write("web", (0..200).map(|_| out(&"x".repeat(1000))));
    host.node.await_call(|call| matches!(call, Call::ReadLogs { cursor } if *cursor == 0));
    terminal.signal(Signal::INT);
    host.node.await_call(is_cancel(10_000));
}

#[test]
fn a_third_signal_leaves_even_while_the_agent_is_away() {
    let host = Host::new();
    let agent = host.start_agent();
    let mut run = host.spawn(&["run", "--id", "web", "--", "x"]);
    assert_eq!(line(&mut run.stderr), "task web started\n");
    drop(agent);
    assert_eq!(line(&mut run.stderr), "shaper: the agent went away; waiting for it to come back\n");
    run.signal(Signal::INT);
    assert!(line(&mut run.stderr).contains("cancelling task web"));
    run.signal(Signal::INT);
    assert!(line(&mut run.stderr).contains("killing task web"));
    run.signal(Signal::INT);
    let said = "shaper: left task `web` to the agent; it may still run: see `shaper describe web`\n";
    assert_eq!(run.end(), (String::new(), said.into(), 1));
}

#[test]
fn a_cancellation_reaches_the_agent_when_it_is_back() {
    let host = Host::new();
    let agent = host.start_agent();
    let mut run = host.spawn(&["run", "--id", "web", "--", "x"]);
    assert_eq!(line(&mut run.stderr), "task web started\n");
    drop(agent);
    assert_eq!(line(&mut run.stderr), "shaper: the agent went away; waiting for it to come back\n");
    run.signal(Signal::INT);
    assert!(line(&mut run.stderr).contains("cancelling task web"));
    let _agent = host.start_agent();
    host.node.await_call(is_cancel(10_000));
    host.node.end("web", ExitStatus::Signal(15));
    let (_, _, code) = run.end();
    assert_eq!(code, 143);
}

#[test]
fn who_reads_no_further_ends_the_task_as_sigpipe_would() {
    let host = Host::new();
    let _agent = host.start_agent();
    let mut run = host.spawn(&["run", "--id", "web", "--", "yes"]);
    assert_eq!(line(&mut run.stderr), "task web started\n");
    run.stdout = BufReader::new(Box::new(std::io::empty()));
    host.node.write("web", [out("y")]);
    host.node.await_call(is_cancel(10_000));
    assert_eq!(run.end(), (String::new(), String::new(), 141));
}

#[test]
fn a_list_for_nobody_ends_quietly() {
    let host = Host::new();
    host.node.add(busy_task());
    let _agent = host.start_agent();
    for format in ["table", "json"] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = host.command(&["get", "tasks", "-o", format]).stdout(writer).output().unwrap();
        assert_eq!(texts(&output), ("", "", Some(141)));
    }
}

#[test]
fn a_detached_task_is_named_or_shown() {
    let host = Host::new();
    let _agent = host.start_agent();
    assert_eq!(texts(&host.shaper(&["run", "-d", "--", "x"])), ("made-1\n", "", Some(0)));
    let output = host.shaper(&["run", "-d", "-o", "json", "--id", "web", "--user", "0:7", "--", "x"]);
    let task: TaskStatus = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((task.task_id.as_str(), task.phase), ("web", Phase::Running));
    let run_as = v1::Credentials { uid: 0, gid: 7, groups: vec![] };
    host.node.await_call(|call| matches!(call, Call::Run(request) if request.run_as == Some(run_as.clone())));
}

#[test]
fn what_the_agent_refuses_is_told_in_its_words() {
    let host = Host::new();
    host.node.add(task("web"));
    let _agent = host.start_agent();
    for (args, said) in [
        (
            &["run", "-d", "--id", "web", "--", "x"][..],
            "shaper: cannot run task `web`: a task `web` runs already\n",
        ),
        (&["get", "tasks", "nope"], "shaper: cannot get task `nope`: there is no task `nope`\n"),
        (&["release", "--all"], "shaper: cannot release all tasks: only root may release all tasks\n"),
        (&["logs", "nope"], "shaper: cannot read the log of task `nope`: there is no task `nope`\n"),
    ] {
        let output = host.shaper(args);
        let (_, stderr, code) = texts(&output);
        assert_eq!((stderr, code), (said, Some(2)), "{args:?}");
    }
}

#[test]
fn wrong_usage_is_told_before_anybody_is_asked() {
    let host = Host::new();
    let _agent = host.start_agent();
    for (args, said) in [
        (&["run", "--cpu", "-1", "--", "x"][..], ""),
        (
            &["run", "--cpu=-1", "--", "x"],
            "`-1` is not a number of cores, such as 0.5, 2 or 250m, of at least 0.01",
        ),
        (&["run", "--memory", "lots", "--", "x"], "`lots` is not an amount of memory, such as 512Mi"),
        (&["set", "web", "--net", "1kbit"], "`1kbit` is not a bandwidth, such as 100mbit"),
        (&["set", "web", "--cpu-weight", "0"], "`0` is not a weight: a whole number from 1 to 10000"),
        (&["set", "web"], "--cpu <CORES|max>|--cpu-weight <N>|--memory <SIZE|max>|--net <RATE|max>"),
        (&["run", "--id", "../x", "--", "x"], "`../x` is not a valid task id"),
        (&["run", "x"], "unexpected argument 'x'"),
        (&["run"], "<CMD>"),
        (&["run", "-o", "json", "--", "x"], "--detach"),
        (&["run", "--user", "root:wheel", "--", "x"], "`root:wheel` is not a user"),
        (&["run", "--env", "=x", "--", "x"], "a variable is NAME=VALUE"),
        (&["cancel", "web", "--grace", "10"], "`10` is not a length of time, such as 10s"),
        (&["cancel", "web", "--grace", "1s", "--now"], "cannot be used with"),
        (&["release"], "<ID|--all>"),
        (&["release", "web", "--all"], "cannot be used with"),
        (&["adopt", "/sys/fs/cgroup/x"], "--id <ID>"),
        (&["run", "--env", "SURELY_NOT_SET", "--", "x"], "use --env SURELY_NOT_SET=VALUE"),
        (
            &["run", "--user", "no-such-user-here", "--", "x"],
            "there is no user `no-such-user-here` on this node",
        ),
    ] {
        let output = host.shaper(args);
        let (stdout, stderr, code) = texts(&output);
        assert_eq!((stdout, code), ("", Some(2)), "{args:?}: {stderr}");
        assert!(stderr.contains(said), "{args:?}: {stderr}");
    }
    assert_eq!(host.node.calls(), []);
}

#[test]
fn without_an_agent_the_remedy_is_said() {
    let host = Host::new();
    let socket = host.socket();
    let output = host.shaper(&["get", "tasks"]);
    let said = format!(
        "shaper: there is no agent at `{}`: start `shaper-agent`, or name its socket with --socket\n",
        socket.display()
    );
    assert_eq!(texts(&output), ("", said.as_str(), Some(1)));

    drop(host.start_agent());
    let output = host.shaper(&["get", "tasks"]);
    let said = format!(
        "shaper: nothing listens at `{}`: start `shaper-agent`, or name its socket with --socket\n",
        socket.display()
    );
    assert_eq!(texts(&output), ("", said.as_str(), Some(1)));

    let long = format!("/{}", "x".repeat(200));
    let output = host.shaper(&["get", "tasks", "--socket", &long]);
    let said =
        format!("shaper: cannot connect to the agent at `{long}`: path must be shorter than SUN_LEN\n");
    assert_eq!(texts(&output), ("", said.as_str(), Some(1)));
}

#[test]
fn tasks_in_a_table() {
    let host = Host::new();
    host.node.add(busy_task());
    let _agent = host.start_agent();
    let expected = "\
ID   PHASE    USER       CPU         MEMORY         NET OUT   NET IN   AGE
etl  Running  root  0.48/0.5  120MiB/512MiB  9.8Mbit/10Mbit  128kbit  1h0m
";
    assert_eq!(texts(&host.shaper(&["get", "tasks"])), (expected, "", Some(0)));
    assert_eq!(texts(&host.shaper(&["get", "tasks", "etl"])), (expected, "", Some(0)));
}

#[test]
fn json_is_the_domain_type() {
    let host = Host::new();
    let (etl, web) = (busy_task(), task("web"));
    host.node.add(web.clone());
    host.node.add(etl.clone());
    let _agent = host.start_agent();
    let list = host.shaper(&["get", "tasks", "-o", "json"]);
    assert_eq!(serde_json::from_slice::<Vec<TaskStatus>>(&list.stdout).unwrap(), [etl.clone(), web]);
    let one = host.shaper(&["describe", "etl", "-o", "json"]);
    assert_eq!(serde_json::from_slice::<TaskStatus>(&one.stdout).unwrap(), etl);
    let report = host.shaper(&["doctor", "-o", "json"]);
    assert_eq!(serde_json::from_slice::<Report>(&report.stdout).unwrap(), fake::report());
}

#[test]
fn no_tasks_are_said_to_people_and_an_empty_list_to_programs() {
    let host = Host::new();
    let _agent = host.start_agent();
    assert_eq!(texts(&host.shaper(&["get", "tasks"])), ("", "no tasks\n", Some(0)));
    assert_eq!(texts(&host.shaper(&["get", "tasks", "-o", "json"])), ("[]\n", "", Some(0)));
}

#[test]
fn a_change_is_shown_as_it_was_read_back() {
    let host = Host::new();
    host.node.add(task("web"));
    let _agent = host.start_agent();
    let output = host.shaper(&["set", "web", "--cpu", "2", "--net", "5mbit"]);
    let expected = "\
cpu: max cores → 2 cores (cpu.max)
net_egress: max → 5 Mbit/s
note: `net_egress` holds for what leaves this machine
";
    assert_eq!(texts(&output), (expected, "", Some(0)));
    let output = host.shaper(&["set", "web", "--cpu", "max", "-o", "json"]);
    let task: TaskStatus = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(task.limits.cpu, Limit::Unlimited);
}

#[test]
fn a_memory_limit_below_use_is_on_its_way_or_waited_for() {
    let host = Host::new();
    host.node.add(task("web"));
    let _agent = host.start_agent();
    let expected = "\
memory: max → 32 MiB
memory: the limit is to come down to 32 MiB: 48 MiB in use, 64 MiB at first
";
    assert_eq!(texts(&host.shaper(&["set", "web", "--memory", "32Mi"])), (expected, "", Some(0)));
    let output = host.shaper(&["set", "web", "--memory", "32Mi", "--wait"]);
    let (stdout, stderr, code) = texts(&output);
    let given_up = "the task waited for memory: all of it for 120 ms, a part for 130 ms, of 500 ms. Of 64 MiB in use, \
                    16 MiB could be reclaimed";
    assert!(stdout.contains(given_up), "{stdout}");
    assert!(stderr.contains("the memory limit of task `web` is what it was"), "{stderr}");
    assert_eq!(code, Some(1));
}

#[test]
fn logs_are_printed_to_where_they_are() {
    let host = Host::new();
    host.node.add(task("web"));
    let stamped = v1::log_chunk::Record { unix_nanos: 1_000_000_002, ..out("a") };
    host.node.write("web", [stamped, err("b"), out("c")]);
    let _agent = host.start_agent();
    assert_eq!(texts(&host.shaper(&["logs", "web"])), ("a\nc\n", "b\n", Some(0)));
    let output = host.shaper(&["logs", "--timestamps", "web"]);
    assert!(texts(&output).0.starts_with("1970-01-01T00:00:01.000000002Z a\n"), "{output:?}");
}

#[test]
fn cancel_waits_for_the_end_unless_told_not_to() {
    let host = Host::new();
    host.node.add(task("web"));
    let _agent = host.start_agent();
    let output = host.shaper(&["cancel", "web", "--grace", "500ms", "--no-wait"]);
    assert_eq!(texts(&output), ("web Running\n", "", Some(0)));
    let cancel = host.spawn(&["cancel", "web", "--now"]);
    host.node.await_call(|call| *call == Call::Wait);
    host.node.end("web", ExitStatus::Signal(9));
    assert_eq!(cancel.end(), ("web Signaled(9)\n".into(), String::new(), 0));
    let graces = [Call::Cancel { grace_millis: 500 }, Call::Cancel { grace_millis: 0 }, Call::Wait];
    assert_eq!(host.node.calls(), graces);
}

#[test]
fn who_enters_a_task_becomes_the_command() {
    let host = Host::new();
    let _agent = host.start_agent();
    let script = "echo $$ $SHAPER_TASK_ID; exit 7";
    let arguments =
        ["exec", "--id", "w1", "--namespace", "ml", "--label", "framework=ray", "--cpu", "0.5", "--"];
    let output = host.shaper(&[&arguments[..], &["/bin/sh", "-c", script]].concat());
    let (stdout, stderr, code) = texts(&output);
    assert_eq!((stderr, code), ("", Some(7)));
    assert!(stdout.ends_with(" w1\n"), "{stdout}");
    let expected = v1::EnterTaskRequest {
        task_id: "w1".into(),
        workload: Some(v1::Workload {
            name: "sh".into(),
            namespace: "ml".into(),
            labels: [("framework".into(), "ray".into())].into(),
        }),
        limits: Some(v1::Limits { cpu_millicores: Some(500), ..Default::default() }),
        command: ["/bin/sh", "-c", script].map(String::from).into(),
    };
    assert_eq!(host.node.calls(), [Call::Enter(expected)]);
    let output = host.shaper(&["exec", "--", "/nowhere/at/all"]);
    let said = "shaper: cannot execute `/nowhere/at/all`: No such file or directory (os error 2)\n";
    assert_eq!(texts(&output), ("", said, Some(127)));
}

#[test]
fn a_cgroup_is_adopted_with_limits() {
    let host = Host::new();
    let _agent = host.start_agent();
    let output = host.shaper(&["adopt", "/sys/fs/cgroup/db.slice", "--id", "db", "--cpu", "2"]);
    assert_eq!(texts(&output), ("db\n", "", Some(0)));
    let expected = v1::AdoptCgroupRequest {
        task_id: "db".into(),
        cgroup: "/sys/fs/cgroup/db.slice".into(),
        limits: Some(v1::Limits { cpu_millicores: Some(2000), ..Default::default() }),
    };
    assert_eq!(host.node.calls(), [Call::Adopt(expected)]);
}

#[test]
fn release_tells_what_was_done_also_before_a_failure() {
    let host = Host::new();
    host.node.add(task("web"));
    let _agent = host.start_agent();
    let output = host.shaper(&["release", "web", "nope"]);
    let said = "shaper: cannot release task `nope`: there is no task `nope`\n";
    assert_eq!(texts(&output), ("web: cpu.max back to max\n", said, Some(2)));
}

#[test]
fn a_task_is_described_in_groups() {
    let host = Host::new();
    let described = TaskStatus { notes: vec!["no memory\u{1b}[31m controller".into()], ..busy_task() };
    host.node.add(described);
    let _agent = host.start_agent();
    let output = host.shaper(&["describe", "etl"]);
    let (stdout, stderr, code) = texts(&output);
    assert_eq!((stderr, code), ("", Some(0)));
    let created = stdout.lines().find(|line| line.starts_with("Created:")).unwrap();
    assert!(created.ends_with("Z (1h0m ago)"), "{created}");
    let expected = r"Task:      etl (attempt 1)
Phase:     Running
Origin:    sh -c 'echo it'\''s'
Runs as:   root (uid 0, gid 0)
Owner:     root (uid 0, gid 0)
PID:       42
Cgroup:    /sys/fs/cgroup/shaper/etl.1

Limits:
  RESOURCE                LIMIT  ENFORCED BY  IN FORCE, READ BACK
  cpu                       0.5  cpu.max      max cores
  cpu_weight                300  -            -
  memory                512 MiB  -            -
  net_egress          10 Mbit/s  -            -
  storage_io                max  -            -
  storage_io_weight    as found  -            -
  storage_io_latency        max  -            -

Usage:
  RESOURCE               NOW    TOTAL  PACKETS
  cpu             0.48 cores  0.000 s        -
  memory             120 MiB        -        -
  sent            9.8 Mbit/s      0 B        0
  sent by uplink           -      0 B        0
  received        128 kbit/s      0 B        0

Notes:
  no memory\u{1b}[31m controller
";
    assert_eq!(stdout.replace(&format!("{created}\n"), ""), expected);
}

#[test]
fn doctor_shows_the_node_and_the_ladder() {
    let host = Host::new();
    let _agent = host.start_agent();
    let expected = "\
Node:     n1
Kernel:   6.12.1
Cgroups:  unified, below /sys/fs/cgroup/shaper
BPF pins: /sys/fs/bpf/shaper
Uplinks:  eth0 (tcx), eth1 (clsact)
GPUs:     0: Fake H100 (GPU-1, device 195:0, 80 GiB)

FEATURE  STATUS                              USED FOR  WITHOUT IT
tcx      available                           counting  not counted
dmem     missing: not in cgroup.controllers  counting  not counted
";
    assert_eq!(texts(&host.shaper(&["doctor"])), (expected, "", Some(0)));
}

#[test]
fn the_ledger_is_that_of_all_tasks_or_of_one() {
    let host = Host::new();
    let _agent = host.start_agent();
    for id in ["web", "etl"] {
        host.spawn(&["run", "-d", "--id", id, "--", "x"]).end();
    }
    let (all, said) = (host.shaper(&["ledger"]), "shaper: a remark\n");
    let (stdout, stderr, code) = texts(&all);
    assert_eq!((stderr, code), (said, Some(0)));
    assert_eq!(stdout.lines().count(), 3, "{stdout}");
    assert!(stdout.contains("cpu: max → 0.5 cores  done     run"), "{stdout}");
    let one = host.shaper(&["ledger", "web", "-o", "json"]);
    let entries: Vec<shaper_core::ledger::Entry> = serde_json::from_str(texts(&one).0).unwrap();
    let tasks: Vec<&str> = entries.iter().map(|entry| entry.execution.task.as_str()).collect();
    assert_eq!(tasks, ["web"]);
    // The tasks of the fake are from the year 1970.
    assert_eq!(texts(&host.shaper(&["ledger", "-o", "json", "--since", "1h"])).0, "[]\n");
    assert!(texts(&host.shaper(&["ledger", "web", "-o", "wide"])).0.contains("ATTEMPT"));
    assert_eq!(
        texts(&host.shaper(&["ledger", "nobody"])),
        ("", "shaper: a remark\nnothing is in the ledger\n", Some(0))
    );
}
