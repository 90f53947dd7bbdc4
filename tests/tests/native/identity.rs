//! What uid nobody may do with the agent, and what their task may do with the machine.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
};

use shaper_core::task::TaskStatus;
use shaper_tests::{
    NOBODY,
    agent::{Agent, Options},
    cgroup::mounts,
    shaper::{REFUSED, Shaper},
    time::eventually,
};

/// Another user, of whom the agent knows as little as of nobody.
const OTHER: &str = "1:1";

fn open_to_nobody<'a>() -> Agent<'a> {
    Options::default().with(&["--socket-group", &NOBODY.to_string()]).start()
}

/// A task that root started as `OTHER`.
fn task_of_another(agent: &Agent) -> TaskStatus {
    let load = agent.load();
    let task = agent.shaper().start("foreign", &["--user", OTHER], &[&load, "tick", "600", "0"]);
    agent.ends_with_me(&task);
    task
}

#[track_caller]
fn assert_refused_with(nobody: &Shaper, arguments: &[&str], reason: &str) {
    let said = nobody.refused(arguments);
    assert!(said.contains(reason), "shaper {arguments:?} was refused with: {said}");
}

#[test]
fn nobody_cannot_connect_without_access_to_the_socket() {
    let agent = Agent::start();
    let answer = agent.shaper_as(NOBODY).call(&["get", "tasks"]);
    assert_eq!(answer.code, REFUSED);
    assert!(answer.stderr.contains("you may not use the agent"), "{}", answer.stderr);
}

#[test]
fn nobody_runs_reads_and_cancels_tasks_of_their_own() {
    let agent = open_to_nobody();
    let nobody = agent.shaper_as(NOBODY);
    let load = agent.load();
    let task = nobody.start("mine", &["--cpu", "0.5"], &[&load, "tick", "600", "0"]);
    agent.ends_with_me(&task);
    assert_eq!((task.owner.uid, task.runs_as.uid), (NOBODY, NOBODY));
    assert_eq!(nobody.tasks().len(), 1);
    eventually("the log begins", || nobody.ok(&["logs", "mine"]).starts_with("tick 1\n"));
    nobody.ok(&["cancel", "mine"]);
    assert_eq!(nobody.wait("mine"), 128 + 15);
    nobody.ok(&["release", "mine"]);
    assert!(nobody.tasks().is_empty());
}

#[test]
fn nobody_runs_tasks_as_themselves_only() {
    let agent = open_to_nobody();
    let nobody = agent.shaper_as(NOBODY);
    for user in ["0", "1", "root", "0:65534"] {
        assert_refused_with(
            &nobody,
            &["run", "--user", user, "--", "/bin/true"],
            "may not run a task as uid",
        );
    }
    // Nor with a group or supplementary groups that are not theirs.
    let output = nobody.ok(&["run", "--user", "65534:0", "--", "/bin/sh", "-c", "id -g; id -G"]);
    assert_eq!(output, "65534\n65534\n");
    assert_eq!(agent.shaper().tasks().len(), 1);
}

#[test]
fn another_users_task_looks_like_none_to_nobody() {
    let agent = open_to_nobody();
    let foreign = task_of_another(&agent);
    let nobody = agent.shaper_as(NOBODY);
    assert!(nobody.tasks().is_empty());
    for arguments in [
        &["get", "tasks", "foreign"][..],
        &["describe", "foreign"],
        &["logs", "foreign"],
        &["wait", "foreign"],
        &["cancel", "foreign", "--now"],
        &["set", "foreign", "--cpu", "0.1"],
        &["release", "foreign"],
    ] {
        assert_refused_with(&nobody, arguments, "you have no task `foreign`");
        let absent: Vec<&str> =
            arguments.iter().map(|word| if *word == "foreign" { "absent" } else { word }).collect();
        assert_refused_with(&nobody, &absent, "you have no task `absent`");
    }
    let after = agent.shaper().get("foreign");
    assert_eq!((after.pid, after.limits), (foreign.pid, foreign.limits));
}

#[test]
fn nobody_changes_no_limits_and_adopts_and_releases_nothing() {
    let agent = open_to_nobody();
    let nobody = agent.shaper_as(NOBODY);
    let load = agent.load();
    let task = nobody.start("mine", &["--cpu", "0.5"], &[&load, "tick", "600", "0"]);
    agent.ends_with_me(&task);
    let root = mounts().0.display().to_string();
    for arguments in [
        &["set", "mine", "--cpu", "max"][..],
        &["release", "--all"],
        &["adopt", &root, "--id", "all"],
        &["adopt", "/nonexistent", "--id", "all"],
    ] {
        assert_refused_with(&nobody, arguments, "uid 65534 (user) may not call");
    }
    // Their own, but not while it runs.
    assert_refused_with(&nobody, &["release", "mine"], "only root may");
    assert_eq!(agent.shaper().get("mine").limits, task.limits);
    assert!(agent.process(&task).is_alive());
}

#[test]
fn a_task_has_no_way_to_more_than_its_user_has() {
    let agent = open_to_nobody();
    let foreign = agent.process(&task_of_another(&agent)).pid();
    // Writes `name` if the command that follows it succeeds.
    let script = r#"
        try() { name=$1; shift; "$@" 2>/dev/null && echo "$name"; }
        put() { echo "$1" > "$2"; }
        grep -E '^(NoNewPrivs|CapEff|CapPrm|CapBnd|CapAmb|Uid|Groups):' /proc/self/status
        own=$MOUNT$(sed -n 's/^0:://p' /proc/self/cgroup)
        [ -d "$own" ] && echo "is in $(basename "$own")"
        for file in cgroup.procs cgroup.max.descendants cgroup.subtree_control cpu.max memory.max cgroup.kill; do
            try "wrote $file" put 1 "$own/$file"
        done
        for file in $(find /sys/fs/cgroup -path "*/$AGENT/*" -type f -name '[ct]*'); do
            try "wrote $file" put 1 "$file"
        done
        try "left its cgroup" put $$ "$MOUNT/cgroup.procs"
        try "made a cgroup" mkdir "$own/child"
        try "signalled its supervisor" kill -0 $PPID
        try "signalled another's task" kill -0 $FOREIGN
        try "listed the state" ls "$STATE"
        try "read the state" cat "$STATE/agent.lock"
        try "listed the pins" ls "$PINS"
        try "read the other's environment" cat /proc/$FOREIGN/environ
        echo end"#;
    let environment = [
        format!("MOUNT={}", mounts().0.display()),
        format!("AGENT={}", agent.name()),
        format!("FOREIGN={foreign}"),
        format!("STATE={}", agent.state_dir().display()),
        format!("PINS={}", agent.bpffs_dir().display()),
    ];
    let mut arguments = vec!["run"];
    arguments.extend(environment.iter().flat_map(|variable| ["--env", variable]));
    arguments.extend(["--id", "probe", "--", "/bin/sh", "-c", script]);
    let output = agent.shaper_as(NOBODY).ok(&arguments);
    let lines: Vec<String> =
        output.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    let expected = [
        "Uid: 65534 65534 65534 65534",
        "Groups:",
        "CapPrm: 0000000000000000",
        "CapEff: 0000000000000000",
        "CapBnd: 0000000000000000",
        "CapAmb: 0000000000000000",
        "NoNewPrivs: 1",
        "is in probe.1",
        "end",
    ];
    assert_eq!(lines, expected);
}

#[test]
fn a_task_has_no_descriptor_but_its_own_three() {
    // One that whoever starts the agent has forgotten to close.
    let forgotten = fs::File::open("/dev/null").unwrap();
    rustix::io::fcntl_setfd(&forgotten, rustix::io::FdFlags::empty()).unwrap();
    let agent = open_to_nobody();
    let nobody = agent.shaper_as(NOBODY);
    // Not by a pattern: the shell would open the directory to see what is there.
    let script =
        "fd=0; while [ $fd -lt 1024 ]; do [ -h /proc/$$/fd/$fd ] && echo $fd; fd=$((fd + 1)); done; true";
    for as_whom in [&nobody, &agent.shaper()] {
        let output = as_whom.ok(&["run", "--user", "65534", "--", "/bin/sh", "-c", script]);
        assert_eq!(output, "0\n1\n2\n");
    }
}

#[test]
fn tasks_of_root_are_refused_unless_allowed_and_have_no_capabilities_then() {
    let agent = Agent::start();
    let said = agent.shaper().refused(&["run", "--", "/bin/true"]);
    assert!(said.contains("--user") && said.contains("--allow-root-tasks"), "{said}");
    assert!(agent.shaper().tasks().is_empty());

    let agent = Options::default().with(&["--allow-root-tasks"]).start();
    let output = agent.shaper().ok(&[
        "run",
        "--",
        "/bin/grep",
        "-E",
        "^(Uid|CapEff|NoNewPrivs):",
        "/proc/self/status",
    ]);
    assert_eq!(output, "Uid:\t0\t0\t0\t0\nCapEff:\t0000000000000000\nNoNewPrivs:\t1\n");
}

#[test]
fn tasks_run_as_those_users_alone_that_the_node_allows() {
    let agent = Options::default().with(&["--allowed-uids", "1-9,65534"]).start();
    for user in ["10", "65533"] {
        let whom = format!("{user}:{user}");
        let said = agent.shaper().refused(&["run", "--user", &whom, "--", "/bin/true"]);
        assert!(said.contains(&format!("as uid {user}: it takes 1-9,65534 (--allowed-uids)")), "{said}");
    }
    assert!(agent.shaper().tasks().is_empty());
    for user in ["1:1", "9:9", "65534:65534"] {
        agent.shaper().ok(&["run", "--user", user, "--", "/bin/true"]);
    }
}

#[test]
fn a_user_has_no_more_tasks_than_they_may() {
    let agent = Options::default().with(&["--socket-group", "65534", "--max-tasks-per-user", "1"]).start();
    let nobody = agent.shaper_as(NOBODY);
    let load = agent.load();
    let first = nobody.start("first", &[], &[&load, "tick", "600", "0"]);
    agent.ends_with_me(&first);
    assert_refused_with(&nobody, &["run", "--", "/bin/true"], "the most that one user may have");
    // Root is not held to it.
    agent.shaper().ok(&["run", "--user", "1", "--", "/bin/true"]);
}

#[test]
fn neither_state_nor_pins_nor_socket_are_open_to_others() {
    let agent = open_to_nobody();
    agent.run("any", &[], &["tick", "600", "0"]);
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&agent.state_dir()), mode(&agent.bpffs_dir())), (0o700, 0o700));
    let socket = fs::metadata(agent.socket()).unwrap();
    assert_eq!((socket.permissions().mode() & 0o777, socket.uid(), socket.gid()), (0o660, 0, NOBODY));
}
