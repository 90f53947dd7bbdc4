//! What is wrong is refused, with the reason and a way out, before anything is changed.

use std::{fs, process::Command};

use shaper_core::task::TaskStatus;
use shaper_tests::{
    agent::{Agent, Options},
    bins::{binary, bpf_object},
    cgroup::memory_is_v1,
    shaper::in_force,
    time::eventually,
};

/// A file of the task's record tells whether anything was changed.
fn state(agent: &Agent) -> Vec<std::path::PathBuf> {
    let tasks = fs::read_dir(agent.state_dir().join("tasks")).into_iter().flatten().flatten();
    let mut paths: Vec<_> = tasks.map(|entry| entry.path()).collect();
    paths.sort();
    paths
}

#[test]
fn a_command_line_that_makes_no_sense_is_refused_and_changes_nothing() {
    let agent = Agent::start();
    agent.run("there", &["--cpu", "0.5"], &["tick", "600", "0"]);
    let before = (state(&agent), agent.shaper().get("there").limits);
    let run = |options: &[&'static str]| {
        [&["run", "--detach", "--user", "65534"], options, &["--", "/bin/true"]].concat()
    };
    for arguments in [
        run(&["--id", "../../x"]),
        run(&["--id", ""]),
        run(&["--id", "a/b"]),
        run(&["--cpu=-1"]),
        run(&["--cpu", "-1"]),
        run(&["--cpu", "0"]),
        run(&["--cpu", "half"]),
        run(&["--memory", "0"]),
        run(&["--memory", "1Pi"]),
        run(&["--net", "fast"]),
        run(&["--net", "1kbit"]),
        run(&["--cpu-weight", "0"]),
        run(&["--user", "no-such-user"]),
        run(&["--env", "=x"]),
        run(&["--id", "there"]),
        vec!["run"],
        vec!["run", "--"],
        vec!["run", "--user", "65534", "--", ""],
        vec!["set", "there"],
        vec!["set", "there", "--net", "fast"],
        vec!["set", "absent", "--cpu", "1"],
        vec!["release"],
        vec!["release", "absent"],
        vec!["release", "there", "--all"],
        vec!["cancel", "there", "--grace", "soon"],
        vec!["wait", "../x"],
        vec!["adopt", "/sys/fs/cgroup"],
        vec!["no-such-command"],
    ] {
        let said = agent.shaper().refused(&arguments);
        assert!(!said.trim().is_empty() && !said.contains("panicked"), "shaper {arguments:?} said: {said}");
    }
    assert_eq!((state(&agent), agent.shaper().get("there").limits), before);
    assert_eq!(agent.shaper().tasks().len(), 1);
    assert!(!agent.said().contains("ERROR"), "{}", agent.said());
}

#[test]
fn an_id_that_runs_is_refused_with_a_way_out() {
    let agent = Agent::start();
    agent.run("there", &[], &["tick", "600", "0"]);
    let said = agent.shaper().refused(&["run", "--id", "there", "--user", "65534", "--", "/bin/true"]);
    assert!(said.contains("exists already; choose another --id"), "{said}");
}

#[test]
fn no_agent_is_told_apart_from_a_refusal() {
    let answer = Agent::start().shaper().command(&["get", "tasks"]).env("SHAPER_SOCKET", "/absent").output();
    let answer = answer.unwrap();
    assert_eq!(answer.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&answer.stderr).contains("start `shaper-agent`"));
}

#[test]
fn the_agent_listens_on_no_tcp_port() {
    let state = tempfile::tempdir().unwrap();
    for address in ["127.0.0.1:0", "tcp://0.0.0.0:7070", "[::1]:7070"] {
        let mut command = Command::new(binary("shaper-agent"));
        command.args(["--listen", address, "--bpf-object"]).arg(bpf_object());
        let output = command.arg("--state-dir").arg(state.path().join("state")).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(
            !output.status.success() && said.contains("Say, for example, /run/shaper/agent.sock"),
            "{said}"
        );
        assert!(!state.path().join("state").exists(), "something was made before the options were checked");
    }
}

#[test]
fn two_agents_never_share_a_state_directory() {
    let agent = Agent::start();
    let output = agent.command(&[]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("belongs to another agent that is running"), "{said}");
    assert!(!agent.release_offline().status.success(), "released under a running agent");
    assert!(agent.shaper().tasks().is_empty(), "the first agent does not answer any more");
}

#[test]
fn a_change_of_which_one_part_is_impossible_changes_nothing() {
    let agent = Agent::start();
    let limits = ["--cpu", "0.5", "--memory", "512Mi", "--net", "50mbit"];
    let before = agent.run("task", &limits, &["eat", "32"]);
    eventually("it has eaten", || agent.shaper().ok(&["logs", "task"]).contains("ate"));
    let change = ["set", "task", "--cpu", "0.7", "--cpu-weight", "300", "--memory", "4Ki", "--net", "20mbit"];
    let said = agent.shaper().refused(&change);
    assert!(said.contains("is below what the task uses now"), "{said}");

    let after = agent.shaper().get("task");
    assert_eq!(after.limits, before.limits);
    let cpu_and_memory = |task: &TaskStatus| {
        ["cpu", "cpu_weight", "memory"].map(|resource| in_force(task, resource).1.to_owned())
    };
    assert_eq!(cpu_and_memory(&after), cpu_and_memory(&before));
    assert!(in_force(&after, "net_egress").1.starts_with("50 Mbit/s"), "{after:?}");
}

#[test]
fn idle_memory_that_nobody_can_take_is_not_promised() {
    let agent = Agent::start();
    agent.run("there", &[], &["tick", "600", "0"]);
    let before = state(&agent);
    let user = ["run", "--detach", "--id", "other", "--user", "65534", "--reclaim-idle", "--", "/bin/true"];
    if !memory_is_v1() {
        agent.shaper().ok(&user);
        agent.shaper().set("there", &["--reclaim-idle"]);
        return;
    }
    for arguments in [&user[..], &["set", "there", "--reclaim-idle", "--cpu", "0.5"]] {
        let said = agent.shaper().refused(arguments);
        assert!(said.contains("memory.force_empty") && said.contains("boot with cgroup v2"), "{said}");
    }
    assert_eq!(state(&agent), before);
    let task = agent.shaper().get("there");
    assert_eq!((task.limits, task.idle), (Default::default(), None));
    // An agent that was told to do so with all says why it does not.
    let agent = Options::default().with(&["--reclaim-idle"]).start();
    agent.run("there", &[], &["tick", "600", "0"]);
    eventually("it says why", || {
        agent.shaper().get("there").notes.iter().any(|note| note.contains("memory.force_empty"))
    });
}
