//! Where systemd is PID 1, and thinks that the cgroups are its own.

mod births;
mod containers;
mod hardened;
mod packages;
mod runtimes;
mod units;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command},
};

use shaper_core::ledger::{Actor, Entry};
use shaper_tests::{
    agent::Options,
    bins::binary,
    cgroup::{mounts, read, write},
    second_writer::of_others,
    shaper::in_force,
    systemd::{Unit, state, systemctl},
    time::eventually,
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
    assert!(Path::new(&task.cgroup).starts_with(mounts().0.join("shaper.slice")), "{}", task.cgroup);
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

/// A process of a test's own, which ends with it.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Has a unit of ours begin without what is enabled on the machine that the files are from, and write its log to a file, which
/// is returned.
fn log_of(unit: &str) -> PathBuf {
    let log = PathBuf::from(format!("/run/{unit}.log"));
    let drop_in = Path::new("/etc/systemd/system").join(format!("{unit}.d"));
    fs::create_dir_all(&drop_in).expect("a drop-in can be written");
    let line = format!("StandardOutput=append:{0}\nStandardError=append:{0}", log.display());
    let text = format!("[Unit]\nDefaultDependencies=no\n[Service]\n{line}\n");
    fs::write(drop_in.join("test.conf"), text).expect("a drop-in can be written");
    log
}

/// A service of somebody's, and its cgroup.
fn service(properties: &[&str]) -> (Unit, PathBuf) {
    let mut command = Command::new(binary("test-load"));
    command.args(["tick", "6000", "0"]).env_clear();
    let unit = Unit::start(&command, &[&["DefaultDependencies=no"], properties].concat());
    let group = mounts().0.join(unit.property("ControlGroup").trim_start_matches('/'));
    (unit, group)
}

fn is_by_systemd(entry: &Entry) -> bool {
    entry.cause.actor == Actor::Process { pid: 1, name: "systemd".into() }
}

#[test]
fn systemd_is_told_what_stands_for_a_unit_and_what_it_does_by_itself_is_held() {
    let (service, group) = service(&["CPUQuota=30%", "MemoryMax=300M"]);
    let agent = Options::default().start();
    let shaper = agent.shaper();
    let limits = ["--cpu", "0.5", "--cpu-weight", "300", "--memory", "200Mi"];
    let path = group.display().to_string();
    shaper.ok(&[&["adopt", &path, "--id", "service"][..], &limits].concat());
    let notes = shaper.get("service").notes;
    assert!(notes.iter().any(|note| note.contains(service.name())), "{notes:?}");
    let held = || ["cpu.max", "cpu.max.burst", "cpu.weight", "memory.max"].map(|file| read(&group, file));
    let decided = ["50000 100000", "50000", "300", "209715200"];
    let known =
        || ["CPUQuotaPerSecUSec", "CPUWeight", "MemoryMax"].map(|property| service.property(property));
    let as_decided = ["500ms", "300", "209715200"];
    assert_eq!((held(), known()), (decided.map(String::from), as_decided.map(String::from)));

    // A reload writes what systemd knows, which is what was decided.
    systemctl(&["daemon-reload"]);
    systemctl(&["set-property", "--runtime", service.name(), "TasksMax=100"]);
    assert_eq!(held(), decided);
    assert_eq!(of_others(&shaper, "service"), []);

    // Somebody asks systemd for something else: it is noticed, and systemd told again.
    systemctl(&["set-property", "--runtime", service.name(), "CPUQuota=80%", "MemoryMax=500M"]);
    eventually("it is held", || held() == decided);
    eventually("systemd is told again", || known() == as_decided);
    let entries = of_others(&shaper, "service");
    assert!(entries.len() >= 2 && entries.iter().all(is_by_systemd), "{entries:?}");

    // What is written behind its back, a reload takes back.
    write(&group, "cpu.max", "60000 100000");
    eventually("it is held", || held() == decided);
    systemctl(&["daemon-reload"]);
    assert_eq!(held(), decided);

    // What was asked for last is what comes back.
    shaper.ok(&["release", "service"]);
    assert_eq!(known(), ["600ms", "100", "524288000"].map(String::from));
    systemctl(&["daemon-reload"]);
    assert_eq!(held(), ["60000 100000", "0", "100", "524288000"]);
}

#[test]
fn a_cgroup_below_that_of_a_unit_is_nobodys() {
    let (service, group) = service(&["Delegate=yes"]);
    let below = group.join("below");
    fs::create_dir(&below).unwrap();
    let agent = Options::default().start();
    let path = below.display().to_string();
    agent.shaper().ok(&["adopt", &path, "--id", "leaf", "--net", "10mbit"]);
    let notes = agent.shaper().get("leaf").notes;
    assert!(!notes.iter().any(|note| note.contains(service.name())), "{notes:?}");
}
