//! Tasks in units of their own.

use std::{fs, path::Path};

use shaper_core::task::{ExitStatus, Phase, TaskStatus};
use shaper_tests::{
    agent::{Agent, Options},
    cgroup::{mounts, read},
    shaper::in_force,
    systemd::systemctl,
    time::eventually,
};

const LIMITS: &[&str] = &["--cpu", "0.5", "--memory", "64Mi"];

/// The unit in which a task runs.
fn unit(task: &TaskStatus) -> String {
    let path = Path::new(&task.cgroup).strip_prefix(mounts().0.join("shaper.slice"));
    let path = path.unwrap_or_else(|_| panic!("{} is not in shaper.slice", task.cgroup));
    path.iter().next().expect("it is below the slice").to_string_lossy().into_owned()
}

fn property(unit: &str, name: &str) -> String {
    systemctl(&["show", "--value", "--property", name, unit])
}

fn is_gone(unit: &str) -> bool {
    property(unit, "LoadState") == "not-found" && !mounts().0.join("shaper.slice").join(unit).exists()
}

fn files(task: &TaskStatus) -> [String; 2] {
    ["cpu.max", "memory.max"].map(|file| read(&task.cgroup, file))
}

const AS_ASKED: [&str; 2] = ["50000 100000", "67108864"];

#[test]
fn a_task_has_a_unit_whose_end_is_the_tasks() {
    let agent = Agent::start();
    let task = agent.run("task", LIMITS, &["tick", "6000", "0"]);
    let unit = unit(&task);
    let process = agent.process(&task);
    assert_eq!(property(&unit, "ActiveState"), "active");
    // Nothing of the agent's is inherited: the supervisor is PID 1's child, and in a group beside its task.
    let supervisor = process.parent();
    assert_eq!(supervisor.pid().to_string(), property(&unit, "MainPID"));
    assert_eq!(supervisor.parent().pid(), 1);
    assert!(supervisor.cgroups().trim_end().ends_with(&format!("{unit}/supervisor")));
    for what in [&["daemon-reload"][..], &["set-property", "--runtime", &unit, "CPUWeight=77"]] {
        systemctl(what);
        assert_eq!(files(&task), AS_ASKED);
    }

    // As with `shaper cancel`, whoever knows systemd can end it.
    systemctl(&["stop", &unit]);
    process.wait_for_end();
    eventually("the end is known", || agent.shaper().get("task").phase != Phase::Running);
    let phase = agent.shaper().get("task").phase;
    assert!(matches!(phase, Phase::Ended { status: ExitStatus::Signal(15), .. }), "{phase:?}");
    eventually("the unit is gone", || is_gone(&unit));

    // What ends by itself leaves nothing either, and its log and exit code are there.
    let user = format!("{0}:{0}", shaper_tests::NOBODY);
    let task = agent.shaper().start("exits", &["--user", &user], &["/bin/sh", "-c", "echo said; exit 7"]);
    assert_eq!(agent.shaper().wait("exits"), 7);
    assert_eq!(agent.shaper().ok(&["logs", "exits"]), "said\n");
    eventually("the unit is gone", || is_gone(&self::unit(&task)));
}

#[test]
fn a_task_in_a_unit_outlives_agent_and_supervisor_and_is_let_go_where_it_is() {
    let mut agent = Agent::start();
    let task = agent.run("task", LIMITS, &["tick", "6000", "0"]);
    let (unit, process) = (unit(&task), agent.process(&task));
    agent.kill9();
    agent.restart();
    assert_eq!(files(&task), AS_ASKED);
    assert_eq!(in_force(&agent.shaper().set("task", &["--cpu", "0.25"]), "cpu"), ("cpu.max", "0.25 cores"));

    let released = agent.shaper().ok(&["release", "task"]);
    assert!(released.contains("its processes go on in"), "{released}");
    assert!(process.is_alive());
    assert_eq!(files(&task), ["max 100000", "max"]);
    assert!(
        fs::read_to_string(Path::new(&task.cgroup).join("cgroup.procs"))
            .unwrap()
            .contains(&process.pid().to_string())
    );
    process.kill();
    eventually("the unit is gone", || is_gone(&unit));

    // One that says nothing: whose output nobody reads any more would end by that.
    let task = agent.run("other", LIMITS, &["spin"]);
    let process = agent.process(&task);
    process.parent().kill();
    let says_so =
        |task: &TaskStatus| task.notes.iter().any(|note| note.contains("its supervisor was killed"));
    eventually("it is noted", || says_so(&agent.shaper().get("other")));
    assert!(process.is_alive());
    systemctl(&["daemon-reload"]);
    assert_eq!(files(&task), AS_ASKED);
}

#[test]
fn an_agent_that_dies_before_its_task_leaves_no_unit() {
    for place in ["start-after-cgroup", "start-after-slot", "agent-before-spawn"] {
        let mut agent = Options::default().dies_at(place).start();
        let user = format!("{0}:{0}", shaper_tests::NOBODY);
        let load = agent.load();
        let run = ["run", "--detach", "--id", "task", "--user", &user, "--", &load, "tick", "6000", "0"];
        assert_ne!(agent.shaper().call(&run).code, 0);
        agent.wait_for_abort();
        let unit = format!("{}-task.1.service", agent.name());
        eventually("the unit is gone", || is_gone(&unit));
        agent.restart();
        let phase = agent.shaper().get("task").phase;
        assert!(
            matches!(phase, Phase::Ended { status: ExitStatus::NotStarted { .. }, .. }),
            "{place}: {phase:?}"
        );
    }
}
