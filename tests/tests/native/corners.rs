//! Corner cases of docs/corner-cases.md that this machine's kernel can show.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command},
    time::Duration,
};

use shaper_agent::{
    actuate::{self, ActuateError, Lasts, Target, Values, Wish},
    kernel::{
        cgroup::Cgroup,
        hierarchy::{Hierarchies, place_of},
        v1::V1Group,
    },
};
use shaper_core::{
    doctor::Availability,
    limits::Limit,
    task::{ExitStatus, Phase},
    units::Millicores,
};
use shaper_tests::{
    agent::{Agent, Options},
    assert_close,
    cgroup::{TestCgroup, cpu_group, cpu_time, mounts, read, unique_name, write},
    knobs::{self, NoPacing, grant},
    process::{Process, pin, spawn_as},
    shaper::in_force,
    time::eventually,
};

const SECOND: Duration = Duration::from_secs(1);

/// What a test has started in a cgroup; it ends with it.
struct Load(Child);

impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn spin_in(group: &Path) -> Load {
    Load(TestCgroup::run(group, None, &["spin"]))
}

/// A group of the v1 cpu controller below the tests' own, and one below that. They go with this.
struct V1Groups([PathBuf; 2]);

impl V1Groups {
    fn make() -> Option<V1Groups> {
        let mount = mounts().1.into_iter().find(|mount| mount.join("cpu.shares").exists())?;
        let own = place_of("self", Some("cpu")).expect("the controller is there");
        let above = mount.join(own).join(unique_name());
        let below = above.join("task");
        fs::create_dir_all(&below).unwrap_or_else(|error| panic!("{}: {error}", below.display()));
        Some(V1Groups([above, below]))
    }

    /// The lower one, as where a task's limits are, and its cgroup.
    fn target(&self, cgroup: &TestCgroup) -> Target {
        let hierarchies = Hierarchies::detect().expect("/proc is mounted").expect("cgroup v2 is mounted");
        let (_, mount) = hierarchies.v1.iter().find(|(name, _)| name == "cpu").expect("it is there");
        let path = self.0[1].strip_prefix(mount).expect("it is below its mount");
        let cgroup = Cgroup::open(&hierarchies.v2, cgroup.path()).expect("it was just made");
        Target { v1_cpu: Some(V1Group::at(mount, "cpu", path)), ..knobs::target(cgroup) }
    }

    fn set(group: &Path, [quota, period, burst]: [&str; 3]) {
        write(group, "cpu.cfs_burst_us", "0");
        write(group, "cpu.cfs_quota_us", "-1");
        write(group, "cpu.cfs_period_us", period);
        write(group, "cpu.cfs_quota_us", quota);
        write(group, "cpu.cfs_burst_us", burst);
    }
}

impl Drop for V1Groups {
    fn drop(&mut self) {
        for group in self.0.iter().rev() {
            let _ = fs::remove_dir(group);
        }
    }
}

fn v1_files(group: &Path) -> String {
    ["cpu.cfs_quota_us", "cpu.cfs_period_us", "cpu.cfs_burst_us"].map(|file| read(group, file)).join(" ")
}

#[test]
fn a_v1_period_at_either_end_comes_back_whatever_the_group_above_has() {
    let Some(groups) = V1Groups::make() else { return }; // A unified host: the VM's tests have the same of v2.
    let (cgroup, [above, below]) = (TestCgroup::new(), &groups.0);
    for beyond in ["999", "1000001"] {
        assert!(fs::write(below.join("cpu.cfs_period_us"), beyond).is_err(), "the kernel takes {beyond}");
    }
    assert!(fs::write(below.join("cpu.cfs_quota_us"), "999").is_err(), "the kernel takes a quota of 999 µs");
    let target = groups.target(&cgroup);
    // Between two writes the quota may not be more than the group above has either: with the first of these it would be
    // fifteen times that if the period were shortened first.
    V1Groups::set(above, ["50000", "100000", "0"]);
    for own in [["1000", "4000", "1000"], ["250000", "1000000", "0"], ["-1", "1000", "0"]] {
        V1Groups::set(below, own);
        let changes = grant(&target, &[Wish::Cpu(Limit::At(Millicores(300)))]).unwrap();
        assert_eq!(v1_files(below), "30000 100000 30000");
        let baseline: Values = changes.iter().map(|change| (change.knob, change.before)).collect();
        grant(&target, &actuate::as_before(&baseline)).unwrap();
        assert_eq!(v1_files(below), own.join(" "));
    }
}

#[test]
fn a_v1_limit_above_that_of_the_group_above_is_refused_with_the_remedy_and_changes_nothing() {
    let agent = Agent::start();
    let task = agent.run("hog", &["--cpu", "0.1", "--cpu-weight", "50"], &["spin"]);
    let (group, is_v1) = cpu_group(task.pid.expect("it runs"));
    if !is_v1 {
        return; // v2 takes it, and the lower limit holds: the VM's tests show that.
    }
    let above = group.parent().expect("it is below the agent's").to_owned();
    write(&above, "cpu.cfs_quota_us", "30000");
    let files = || (v1_files(&group), read(&group, "cpu.shares"));
    let (before, limits) = (files(), agent.shaper().get("hog").limits);

    let said = agent.shaper().refused(&["set", "hog", "--cpu-weight", "70", "--cpu", "0.5"]);
    for part in ["0.5 cores", "0.3", &above.display().to_string(), "raise the limit of that group"] {
        assert!(said.contains(part), "{part} is not in: {said}");
    }
    assert_eq!((files(), agent.shaper().get("hog").limits), (before, limits));

    assert_eq!(in_force(&agent.shaper().set("hog", &["--cpu", "0.3"]), "cpu").1, "0.3 cores");
    write(&above, "cpu.cfs_quota_us", "-1");
    assert_eq!(in_force(&agent.shaper().set("hog", &["--cpu", "0.5"]), "cpu").1, "0.5 cores");
}

#[test]
fn a_v1_group_that_is_removed_between_reading_and_writing_is_said_to_be_gone() {
    let Some(groups) = V1Groups::make() else { return }; // The VM's tests have the same of v2.
    let (cgroup, below) = (TestCgroup::new(), &groups.0[1]);
    let target = groups.target(&cgroup);
    let wishes = [Wish::Cpu(Limit::At(Millicores(300)))];
    let changes = actuate::plan(&target, &NoPacing, &wishes).unwrap().changes;
    fs::remove_dir(below).unwrap();
    let error = actuate::execute(&target, &mut NoPacing, &changes, Lasts::ForAWhile).unwrap_err();
    assert!(error.is_gone() && error.is_undone(), "{error:?}");
    let error = grant(&target, &wishes).unwrap_err();
    assert!(error.is_gone() && !matches!(error, ActuateError::NoMechanism { .. }), "{error:?}");
}

#[test]
fn a_quota_below_a_millisecond_is_refused_and_one_of_a_millisecond_is_in_force() {
    let agent = Agent::start();
    let answer =
        agent.shaper().call(&["run", "--detach", "--user", "65534", "--cpu", "0.009", "--", "/bin/true"]);
    assert!(answer.code != 0 && answer.stderr.contains("at least 0.01"), "{answer:?}");
    let task = agent.run("least", &["--cpu", "0.01"], &["tick", "600", "0"]);
    assert_eq!(in_force(&task, "cpu").1, "0.01 cores");
    let (group, is_v1) = cpu_group(task.pid.expect("it runs"));
    let file = if is_v1 { "cpu.cfs_quota_us" } else { "cpu.max" };
    assert_eq!(read(group, file).split(' ').next(), Some("1000"));
}

#[test]
fn a_cgroup_made_while_no_agent_looked_is_not_the_one_that_was_there_before() {
    let mut agent = Agent::start();
    let group = TestCgroup::new();
    let path = group.make_child("service");
    agent.adopt("service", &path, &["--net", "20mbit"]);
    agent.kill9();
    fs::remove_dir(&path).unwrap();
    fs::create_dir(&path).unwrap();
    let hog = spin_in(&path);
    eventually("it runs", || cpu_time(&path) > SECOND / 5);
    agent.restart();
    let phase = agent.shaper().get("service").phase;
    assert!(matches!(phase, Phase::Ended { status: ExitStatus::Unknown, .. }), "{phase:?}");
    // It is anybody's, and begins from zero.
    agent.adopt("other", &path, &[]);
    let task = agent.shaper().get("other");
    assert_eq!(in_force(&task, "net_egress").1, "max");
    assert!(agent.measure("other", SECOND).cores > 0.2);
    drop(hog);
}

#[test]
fn a_process_that_has_the_number_of_a_dead_task_is_not_that_task() {
    let mut agent = Agent::start();
    let task = agent.run("task", &["--cpu", "0.5"], &["tick", "600", "0"]);
    let (main, pid) = (agent.process(&task), task.pid.expect("it runs"));
    let supervisor = main.parent();
    agent.kill9();
    // Nobody is left who could tell how it ended.
    for process in [&supervisor, &main] {
        process.kill();
        process.wait_for_end();
    }
    eventually("its number is free", || !Path::new(&format!("/proc/{pid}")).exists());
    let other = Load(spawn_as(pid, Command::new(agent.load()).arg("spin")));
    agent.restart();
    let found = agent.shaper().get("task");
    assert!(matches!(found.phase, Phase::Ended { status: ExitStatus::Unknown, .. }), "{found:?}");
    agent.shaper().ok(&["release", "--all"]);
    assert!(Process::open(other.0.id()).is_alive(), "a process of somebody else's was killed");
}

#[test]
fn a_process_that_moves_is_counted_where_it_is() {
    let agent = Agent::start();
    let groups = [TestCgroup::new(), TestCgroup::new()];
    let ids = ["from", "to"];
    for (id, group) in ids.iter().zip(&groups) {
        agent.adopt(id, group.path(), &[]);
    }
    let counted = || ids.map(|id| agent.shaper().get(id).usage.cpu_time_ns as f64 / 1e9);
    let kernels = || [0, 1].map(|index: usize| cpu_time(groups[index].path()).as_secs_f64());
    let hog = spin_in(groups[0].path());
    eventually("it runs", || kernels()[0] > 0.5);
    write(groups[1].path(), "cgroup.procs", &hog.0.id().to_string());
    // Until it is switched out once, what it uses counts where it was, and where it has a CPU to itself that may take long.
    pin(hog.0.id(), 0);
    pin(hog.0.id(), 1);
    eventually("it runs where it is", || kernels()[1] > 1.0);
    let (counted, kernels) = (counted(), kernels());
    for (counted, kernels) in counted.iter().zip(kernels) {
        assert!(
            (counted - kernels).abs() < 0.1 + 0.05 * kernels,
            "{counted:?} s counted, {kernels:?} s used"
        );
    }
    assert_close("counted in both", counted.iter().sum(), kernels.iter().sum(), 5.0);
}

#[test]
fn threads_in_cgroups_of_their_own_count_for_the_domain_above() {
    let agent = Agent::start();
    let group = TestCgroup::new();
    agent.adopt("service", group.path(), &[]);
    let threaded = group.make_child("threaded");
    write(&threaded, "cgroup.type", "threaded");
    assert_eq!(read(group.path(), "cgroup.type"), "domain threaded");
    let hog = Load(TestCgroup::run(group.path(), None, &["pinned", "0,1"]));
    let threads = || {
        let entries = fs::read_dir(format!("/proc/{}/task", hog.0.id())).into_iter().flatten().flatten();
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect::<Vec<_>>()
    };
    eventually("its threads are there", || threads().len() == 3);
    write(&threaded, "cgroup.threads", threads().last().expect("just counted"));
    eventually("one of them runs there", || cpu_time(&threaded) > SECOND / 2);
    agent.assert_counted("service", group.path(), 5.0);
    // Its processes cannot be listed there, and nobody needs to.
    agent.shaper().ok(&["release", "service"]);
    agent.adopt("thread", &threaded, &[]);
    assert!(agent.measure("thread", SECOND).cores > 0.2);
    agent.shaper().ok(&["release", "thread"]);
}

#[test]
fn a_node_has_as_many_tasks_as_it_has_slots_and_a_slot_comes_back() {
    let agent = Options::default().with(&["--max-tasks", "2"]).start();
    agent.run("one", &[], &["spin"]);
    agent.run("two", &["--cpu", "0.2"], &["spin"]);
    let third = ["run", "--id", "three", "--user", "65534", "--", "/bin/true"];
    let answer = agent.shaper().call(&third);
    assert!(answer.code != 0 && answer.stderr.contains("--max-tasks"), "{answer:?}");
    assert_eq!(agent.shaper().tasks().len(), 2);
    agent.shaper().ok(&["cancel", "one", "--now"]);
    eventually("its slot is free", || !agent.cgroup_root().join("one.1").exists());
    // The slot begins from zero with whoever is next.
    let next = agent.run("next", &[], &["tick", "600", "0"]);
    let usage = agent.shaper().get("next").usage.cpu_time_ns;
    assert!(usage < 100_000_000, "{usage} ns");
    assert!(agent.process(&next).is_alive());
}

#[test]
fn a_task_cannot_make_itself_real_time() {
    let agent = Agent::start();
    // A real-time task is not held by a CPU quota.
    for class in ["--fifo", "--rr"] {
        let id = class.trim_start_matches('-');
        let run = ["run", "--id", id, "--user", "65534", "--cpu", "0.2", "--"];
        let answer = agent.shaper().call(&[&run[..], &["chrt", class, "1", "/bin/true"]].concat());
        assert!(answer.code != 0 && answer.stderr.contains("not permitted"), "{answer:?}");
    }
}

#[test]
fn nothing_is_done_without_the_capabilities_and_it_is_said_which() {
    let agent = Options::default().without_capabilities().start();
    let answer = agent.shaper().call(&["run", "--detach", "--user", "65534", "--", "/bin/true"]);
    assert!(answer.code != 0 && answer.stderr.contains("CAP_BPF"), "{answer:?}");
    let rungs = agent.shaper().doctor().rungs;
    let found = rungs.iter().find(|rung| rung.feature == "cap-bpf").map(|rung| &rung.availability);
    let reason = match found {
        Some(Availability::Unusable { reason }) => reason,
        other => panic!("{other:?}"),
    };
    assert_eq!(reason, "this process lacks CAP_PERFMON, CAP_BPF");
    assert!(
        agent.shaper().tasks().is_empty() && !agent.cgroup_root().exists() && !agent.bpffs_dir().exists()
    );
}

#[test]
fn a_process_that_sleeps_longer_than_clocks_are_remembered_waits_no_longer_than_the_kernel_says() {
    let agent = Agent::start();
    // It leaves its CPU idle for 100 ms at a time, and what is known of that CPU's clock is older than that by then.
    let task = agent.run("sleeper", &[], &["tick", "600", "0"]);
    let pid = task.pid.expect("it runs");
    let waited_ns = || -> u64 {
        let stat = fs::read_to_string(format!("/proc/{pid}/schedstat")).expect("it runs");
        stat.split(' ')
            .nth(1)
            .and_then(|waited| waited.trim().parse().ok())
            .expect("schedstat has three numbers")
    };
    let mut most = 0;
    eventually("it has woken often enough", || {
        let delay = agent.shaper().usage_of("sleeper").cpu.run_queue.expect("it is measured");
        most = most.max(delay.p99_ns);
        agent.shaper().ok(&["logs", "sleeper"]).lines().count() >= 30
    });
    // A bucket of the histogram ends a quarter above where it begins.
    let kernels = waited_ns();
    assert!(most > 0, "no wait was seen");
    assert!(
        most <= kernels + kernels / 4 + 1000,
        "a wait of {most} ns is told where all waits are {kernels} ns"
    );
}
