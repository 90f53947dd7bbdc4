//! Where systemd is PID 1, and thinks that the cgroups are its own.

use shaper_tests::{
    agent::Options,
    cgroup::{mounts, read},
    shaper::in_force,
    systemd::{state, systemctl},
};

/// Default dependencies would start what is enabled on the machine that the files are from.
const UNIT: &[&str] = &["Delegate=yes", "DefaultDependencies=no"];

#[test]
fn the_limits_of_an_agent_in_a_unit_survive_a_reload_and_the_end_of_the_unit() {
    assert_eq!(read("/proc/1", "comm"), "systemd");
    assert!(["starting", "running", "degraded"].contains(&state().as_str()), "{}", state());
    let (v2, v1) = mounts();
    assert_eq!((v2.to_str(), v1.as_slice()), (Some("/sys/fs/cgroup"), &[][..]));

    let agent = Options::default().prepare();
    let unit = agent.start_as_unit(UNIT);
    let task = agent.run("task", &["--cpu", "0.5", "--memory", "64Mi"], &["spin"]);
    let files = || ["cpu.max", "memory.max"].map(|file| read(&task.cgroup, file));
    let asked = ["50000 100000", "67108864"];
    assert_eq!(files(), asked);
    systemctl(&["daemon-reload"]);
    assert_eq!(files(), asked);
    assert_eq!(unit.property("ActiveState"), "active");

    drop(unit);
    systemctl(&["daemon-reload"]);
    assert_eq!(files(), asked);
    assert!(agent.process(&task).is_alive());

    let _unit = agent.start_as_unit(UNIT);
    let changed = agent.shaper().set("task", &["--cpu", "0.25"]);
    assert_eq!(in_force(&changed, "cpu"), ("cpu.max", "0.25 cores"));
    assert_eq!(files(), ["25000 100000", "67108864"]);
}
