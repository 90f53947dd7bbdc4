//! In a virtual machine, as root: cgroup v2 with every controller, on each kernel that is supported.
//!
//! The machine may be emulated, so that everything is slow and no rate is exact. The tests of the module `systemd` are
//! those of a profile of their own, where systemd is PID 1; all others run below a PID 1 that does nothing.

mod block_io;
mod corners;
mod cpu;
mod crash;
mod io_cost;
mod io_latency;
mod kills;
mod knobs;
mod measure;
mod memory;
mod second_writer;
mod systemd;

use std::{path::Path, time::Duration};

use shaper_core::{
    doctor::Availability,
    task::{ExitStatus, Phase},
};
use shaper_tests::{
    agent::{Agent, Options},
    assert_close,
    cgroup::{TestCgroup, cpu_time, read, write},
    disk::Disk,
    kernel_is_at_least,
    leftovers::Leftovers,
    net::{DEVICE, NetPair},
    process::Process,
    shaper::in_force,
    sink::Sink,
    time::{Window, eventually},
};

const SECOND: Duration = Duration::from_secs(1);

/// tcx came with 6.6.
fn uplink_form() -> &'static str {
    if kernel_is_at_least(6, 6) { "tcx" } else { "clsact" }
}

#[test]
fn limits_are_in_the_files_of_the_cgroup_and_changes_too() {
    // What is lent is in the same file.
    let agent = Options::default().with(&["--cpu-burst-pool", "off"]).start();
    let limits = ["--cpu", "0.5", "--cpu-weight", "300", "--memory", "64Mi"];
    let task = agent.run("task", &limits, &["tick", "6000", "0"]);
    let files = || ["cpu.max", "cpu.weight", "memory.max"].map(|file| read(&task.cgroup, file));
    assert_eq!(files(), ["50000 100000", "300", "67108864"]);
    for (resource, file, value) in [
        ("cpu", "cpu.max", "0.5 cores"),
        ("cpu_weight", "cpu.weight", "300"),
        ("memory", "memory.max", "64 MiB"),
    ] {
        assert_eq!(in_force(&task, resource), (file, value));
    }
    agent.shaper().set("task", &["--cpu", "1.25", "--memory", "max"]);
    assert_eq!(files(), ["125000 100000", "300", "max"]);
    agent.shaper().set("task", &["--cpu", "max"]);
    assert_eq!(files(), ["max 100000", "300", "max"]);

    // The agent keeps its own share, whatever its tasks do.
    assert_eq!(read(agent.cgroup_root().join("agent"), "cpu.weight"), "10000");
}

#[test]
fn an_agent_in_a_cgroup_that_was_delegated_to_it_has_its_tasks_below() {
    let group = TestCgroup::new();
    let agent = Options::default().inside(group.path()).start();
    let task = agent.run("task", &["--cpu", "0.5", "--memory", "64Mi"], &["tick", "6000", "0"]);
    assert!(Path::new(&task.cgroup).starts_with(group.path()), "{}", task.cgroup);
    let files = ["cpu.max", "memory.max"].map(|file| read(&task.cgroup, file));
    assert_eq!(files, ["50000 100000", "67108864"]);
    agent.shaper().ok(&["release", "--all"]);
    assert!(!agent.cgroup_root().exists());
}

#[test]
fn a_hog_gets_half_a_core() {
    let agent = Agent::start();
    let task = agent.run("hog", &["--cpu", "0.5"], &["spin"]);
    eventually("it runs", || cpu_time(&task.cgroup) > SECOND / 10);
    let before = cpu_time(&task.cgroup);
    let window = Window::pass(3 * SECOND);
    let cores = (cpu_time(&task.cgroup) - before).as_secs_f64() / window.seconds();
    assert_close("cores at a limit of 0.5", cores, 0.5, 10.0);
    agent.assert_counted("hog", &task.cgroup, 2.0);
}

#[test]
fn an_eater_is_killed_within_its_limit_and_the_node_survives() {
    let agent = Agent::start();
    let bystander = agent.run("bystander", &["--memory", "32Mi"], &["tick", "6000", "0"]);
    agent.shaper().start("eater", &["--user", "65534", "--memory", "64Mi"], &[&agent.load(), "eat", "256"]);
    assert_eq!(agent.shaper().wait("eater"), 128 + 9);
    assert!(matches!(agent.shaper().get("eater").phase, Phase::Ended { status: ExitStatus::Signal(9), .. }));
    assert!(agent.process(&bystander).is_alive());
}

#[test]
fn traffic_is_paced_and_counted_and_release_all_leaves_nothing() {
    let network = NetPair::new();
    let agent = Options::default().on(&network).start();
    let sink = Sink::listen(&network.far, NetPair::FAR_V4);
    let task = agent.run("upload", &["--net", "20mbit"], &["send", &sink.address(), "2"]);
    assert_eq!(agent.shaper().doctor().uplinks, [format!("{DEVICE} ({})", uplink_form())]);
    sink.wait_for_flows(2);
    Window::pass(2 * SECOND);
    let used = agent.measure("upload", 3 * SECOND);
    assert_close("sent, at the sockets", used.egress, 20e6, 5.0);
    assert_close("the uplink's count, by that of the sockets", used.uplink, used.egress, 1.5);
    assert_close("what was received, by what was sent", sink.rate(used.window), used.egress, 5.0);

    let leftovers = Leftovers::of(&agent, Some(&network));
    agent.shaper().ok(&["release", "--all"]);
    leftovers.assert_none();
    let free = sink.rate(Window::pass(SECOND));
    assert!(free > 2.0 * 20e6, "{free:.0} bit/s after the release");
    assert!(agent.process(&task).is_alive());
}

#[test]
fn a_qdisc_that_was_there_stays() {
    let network = NetPair::new();
    network.near.tc(&["qdisc", "add", "dev", DEVICE, "clsact"]);
    let agent = Options::default().on(&network).start();
    agent.run("task", &[], &["tick", "6000", "0"]);
    let filters = || network.near.tc(&["filter", "show", "dev", DEVICE, "egress"]);
    assert_eq!(filters().is_empty(), uplink_form() == "tcx", "{}", filters());
    agent.shaper().ok(&["release", "--all"]);
    assert!(filters().is_empty(), "{}", filters());
    assert!(network.near.tc(&["qdisc", "show", "dev", DEVICE]).contains("clsact"));
}

#[test]
fn what_a_cgroup_writes_is_in_its_io_stat_under_the_number_of_the_disk() {
    let disk = Disk::format_and_mount();
    let group = TestCgroup::new();
    // +memory: what is written later is charged to the group that the memory was charged to.
    write(group.path(), "cgroup.subtree_control", "+io +memory");
    for way in ["direct", "buffered"] {
        let child = group.make_child(way);
        let path = disk.file(way).display().to_string();
        let mut load = TestCgroup::run(&child, None, &["write", &path, "1024", way]);
        assert!(load.wait().unwrap().success(), "{way}");
        let written = disk.io_stat(&child, "wbytes");
        assert!(written >= 1 << 20, "{way}: {written} of 1 MiB: {}", read(&child, "io.stat"));
    }
}

#[test]
fn an_adopted_cgroup_gets_its_own_limits_back_even_from_a_new_agent() {
    let mut agent = Agent::start();
    let group = TestCgroup::new();
    let (own_cpu, own_memory) = ("30000 100000", "104857600");
    write(group.path(), "cpu.max", own_cpu);
    write(group.path(), "memory.max", own_memory);
    let mut hog = TestCgroup::run(&group.make_child("child"), None, &["spin"]);
    let files = || ["cpu.max", "memory.max"].map(|file| read(group.path(), file));

    let path = group.path().display().to_string();
    agent
        .shaper()
        .ok(&["adopt", &path, "--id", "service", "--cpu", "0.5", "--memory", "200Mi", "--net", "5mbit"]);
    assert_eq!(files(), ["50000 100000", "209715200"]);
    let older = "connections older than the adoption";
    let has_note = agent.shaper().get("service").notes.iter().any(|note| note.contains(older));
    assert_eq!(has_note, !kernel_is_at_least(6, 12));

    agent.kill9();
    agent.restart();
    agent.shaper().set("service", &["--cpu", "max"]);
    assert_eq!(files(), ["max 100000", "209715200"]);
    agent.shaper().ok(&["release", "service"]);
    assert_eq!(files(), [own_cpu, own_memory]);
    assert!(hog.try_wait().unwrap().is_none(), "the process of the adopted cgroup has ended");
    hog.kill().and_then(|()| hog.wait()).unwrap();
}

#[test]
fn an_agent_that_was_killed_is_followed_by_one_that_knows_all_and_can_release_all() {
    let mut agent = Agent::start();
    let task = agent.run("hog", &["--cpu", "0.5", "--memory", "64Mi"], &["spin"]);
    let ticker = agent.process(&agent.run("ticker", &[], &["tick", "5", "7"]));
    agent.kill9();
    ticker.wait_for_end();
    assert_eq!(read(&task.cgroup, "cpu.max"), "50000 100000");
    let before = cpu_time(&task.cgroup).as_secs_f64();
    agent.restart();
    assert_eq!(agent.shaper().wait("ticker"), 7);
    let counted = agent.shaper().get("hog").usage.cpu_time_ns as f64 / 1e9;
    assert!(counted > 0.9 * before, "{counted} s counted after {before} s");
    assert_eq!(in_force(&agent.shaper().set("hog", &["--cpu", "0.2"]), "cpu").1, "0.2 cores");

    let leftovers = Leftovers::of(&agent, None);
    agent.shaper().ok(&["release", "--all"]);
    leftovers.assert_none();
    for process in [Process::open(agent.pid()), agent.process(&task)] {
        assert_eq!(process.cgroups().trim(), "0::/", "where the agent came from");
    }
}

#[test]
fn the_doctor_knows_what_this_kernel_has() {
    let agent = Agent::start();
    let report = agent.shaper().doctor();
    assert_eq!(report.cgroups, "unified");
    let expected = [
        ("btf", true),
        ("cap-bpf", true),
        ("cgroup-v2", true),
        ("cgroup-v2-cpu", true),
        ("cgroup-v2-memory", true),
        ("cgroup-kill", true),
        ("tcx", kernel_is_at_least(6, 6)),
        ("iterator-cb-flags", kernel_is_at_least(6, 12)),
        ("no-foreign-scheduler", true),
    ];
    for (feature, there) in expected {
        let rung = report.rungs.iter().find(|rung| rung.feature == feature);
        let rung = rung.unwrap_or_else(|| panic!("the report has no {feature}"));
        let found = &rung.availability;
        let as_expected = match found {
            Availability::Available => there,
            Availability::Missing { evidence } => !there && !evidence.is_empty(),
            Availability::Unusable { .. } => false,
        };
        assert!(as_expected, "{feature}: {found:?}");
    }
}

#[test]
fn under_lockdown_everything_works_as_before() {
    corners::lock_down();
    let agent = Agent::start();
    let task = agent.run("hog", &["--cpu", "0.5", "--net", "5mbit"], &["spin"]);
    let rungs = agent.shaper().doctor().rungs;
    let wrong = rungs.iter().filter(|rung| {
        ["self-test", "program", "cap-bpf", "btf"].iter().any(|name| rung.feature.starts_with(name))
            && rung.availability != Availability::Available
    });
    assert_eq!(wrong.count(), 0, "{rungs:?}");
    eventually("it runs", || cpu_time(&task.cgroup) > SECOND / 2);
    let before = cpu_time(&task.cgroup);
    let window = Window::pass(2 * SECOND);
    assert_close("cores", (cpu_time(&task.cgroup) - before).as_secs_f64() / window.seconds(), 0.5, 10.0);
    agent.assert_counted("hog", &task.cgroup, 2.0);
}
