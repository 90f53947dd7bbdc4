//! Containers whose limits are held while their runtime, or systemd for it, writes what it knows.

use std::path::Path;

use serde_json::json;
use shaper_core::ledger::Actor;
use shaper_tests::{
    agent::{Agent, Options},
    cards::open_in,
    cgroup::{mounts, read},
    runtimes::{Bundle, Docker, Driver, Oci},
    second_writer::of_others,
    systemd::systemctl,
    time::{eventually, monotonic_ns},
};

const FILES: [&str; 3] = ["cpu.max", "cpu.weight", "memory.max"];
/// Every runtime lets a container open these: one stands for a GPU card, and the container is granted none.
const CARD: &str = "/dev/full";
const NO_CARD: &str = "/dev/zero";
const DECIDED: [&str; 3] = ["50000 100000", "300", "209715200"];

/// A container whose limits are held.
struct Held<'a> {
    agent: Agent<'a>,
    group: std::path::PathBuf,
}

impl Held<'_> {
    fn adopt(cgroup: &Path) -> Held<'static> {
        let agent = Options::default().with(&["--nvml", "off", "--gpu-device", CARD]).start();
        let group = mounts().0.join(cgroup);
        assert_eq!(open_in(&group, CARD), "");
        let path = group.display().to_string();
        let limits = ["--cpu", "0.5", "--cpu-weight", "300", "--memory", "200Mi", "--cards", "none"];
        agent.shaper().ok(&[&["adopt", &path, "--id", "container"][..], &limits].concat());
        let held = Held { agent, group };
        assert_eq!(held.files(), DECIDED);
        held.assert_closed();
        held
    }

    /// It opens no card, and everything else.
    #[track_caller]
    fn assert_closed(&self) {
        let said = open_in(&self.group, CARD);
        assert!(said.contains("Operation not permitted"), "{said}");
        assert_eq!(open_in(&self.group, NO_CARD), "");
    }

    /// Everything is as its manager has it: its files, and what it opens.
    #[track_caller]
    fn let_go(&self) -> [String; 3] {
        self.agent.shaper().ok(&["release", "container"]);
        assert_eq!(open_in(&self.group, CARD), "");
        self.files()
    }

    fn files(&self) -> [String; 3] {
        FILES.map(|file| read(&self.group, file))
    }

    /// Whatever `change` writes is noticed and turned back, and this prints how soon after it has returned.
    #[track_caller]
    fn outlasts(&self, what: &str, by: &[&str], change: impl FnOnce()) {
        let before = of_others(&self.agent.shaper(), "container").len();
        change();
        let from = monotonic_ns();
        // Its manager writes device rules anew, and never ours.
        self.assert_closed();
        eventually("what was decided is in force", || self.files() == DECIDED);
        println!("{what}: as decided {} ms after it had returned", (monotonic_ns() - from) / 1_000_000);
        let entries = || of_others(&self.agent.shaper(), "container").split_off(before);
        eventually("it is in the ledger", || !entries().is_empty());
        for entry in entries() {
            let Actor::Process { name, .. } = &entry.cause.actor else { panic!("{entry:?}") };
            assert!(by.contains(&name.as_str()), "{what}: {entry:?}");
        }
    }

    /// A reload writes nothing that was not decided.
    fn outlasts_a_reload(&self) {
        let before = of_others(&self.agent.shaper(), "container").len();
        systemctl(&["daemon-reload"]);
        assert_eq!(self.files(), DECIDED);
        self.assert_closed();
        assert_eq!(of_others(&self.agent.shaper(), "container").len(), before);
    }
}

fn resources() -> serde_json::Value {
    json!({ "memory": { "limit": 300 << 20 }, "cpu": { "quota": 80_000, "period": 100_000 } })
}

#[test]
fn limits_of_a_container_of_runc_are_held_over_its_updates() {
    let container = Bundle::new(Driver::Cgroupfs).with_resources(&resources()).run(&Oci::plain("runc"));
    let held = Held::adopt(&container.cgroup());
    held.outlasts("runc update", &["runc"], || {
        container.update(&["--memory", "400M", "--cpu-quota", "90000"])
    });
    held.outlasts_a_reload();
    let files = held.let_go();
    assert_eq!((files[0].as_str(), files[2].as_str()), ("90000 100000", "419430400"));
}

#[test]
fn limits_of_a_container_of_runc_below_systemd_are_held_over_its_updates() {
    let container = Bundle::new(Driver::Systemd).with_resources(&resources()).run(&Oci::plain("runc"));
    let held = Held::adopt(&container.cgroup());
    held.outlasts_a_reload();
    let writers = ["runc", "systemd"];
    held.outlasts("runc --systemd-cgroup update", &writers, || container.update(&["--memory", "400M"]));
    held.outlasts_a_reload();
    let unit = container.cgroup();
    let unit = unit.file_name().and_then(|name| name.to_str()).unwrap();
    held.outlasts("SetUnitProperties", &writers, || {
        systemctl(&["set-property", "--runtime", unit, "CPUQuota=70%"]);
    });
    held.outlasts_a_reload();
    let files = held.let_go();
    assert_eq!((files[0].as_str(), files[2].as_str()), ("70000 100000", "419430400"));
}

#[test]
fn limits_of_a_container_of_docker_are_held_over_its_updates() {
    let docker = Docker::start();
    let id = docker.run(&["--cpus", "0.8", "--memory", "300m", "--memory-swap", "600m"]);
    let held = Held::adopt(&docker.cgroup(&id));
    held.outlasts_a_reload();
    let writers = ["runc", "systemd"];
    held.outlasts("docker update", &writers, || {
        docker.ok(&["update", "--memory", "400m", "--cpus", "0.9", &id]);
    });
    held.outlasts_a_reload();
    let files = held.let_go();
    assert_eq!((files[0].as_str(), files[2].as_str()), ("90000 100000", "419430400"));
}
