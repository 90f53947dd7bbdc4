//! shaper's own CPU scheduler: that it holds what is in the files, that the kernel's holds it when this one is gone, and that
//! somebody else's is noticed.

use std::{fs, path::Path};

use libbpf_rs::{Link, MapCore, ObjectBuilder};
use shaper_agent::kernel::{sched_ext, scx};
use shaper_core::{doctor::Availability, scheduler::CpuScheduler};
use shaper_tests::{
    agent::{Agent, Options},
    assert_close,
    cgroup::{TestCgroup, cpu_time, read, write},
    kernel_is_at_least,
    time::{Window, eventually},
};

use super::{SECOND, cpu::cores_over_ten_seconds};

/// Takes CPUs with so many threads, wherever they are let.
const HOGS: [&str; 3] = ["once", "/bin", "spin"];

/// Whether this kernel has sched_ext. Debian's have it from 6.18 on (CONFIG_SCHED_CLASS_EXT).
fn is_there() -> bool {
    let there = Path::new(sched_ext::DIRECTORY).is_dir();
    assert!(
        there || !kernel_is_at_least(6, 18),
        "this kernel has sched_ext, but not {}",
        sched_ext::DIRECTORY
    );
    there
}

/// What the kernel says: `disabled`, or the name of the scheduler.
fn loaded() -> String {
    sched_ext::loaded(Path::new(sched_ext::DIRECTORY)).unwrap_or_else(|| "disabled".into())
}

fn start() -> Agent<'static> {
    let agent = Options::default().with(&["--cpu-backend", "scx"]).start();
    assert_eq!(loaded(), "shaper");
    assert_eq!(agent.shaper().doctor().cpu_backend.scheduler, CpuScheduler::Shaper);
    agent
}

fn scheduler(agent: &Agent<'_>) -> CpuScheduler {
    agent.shaper().top().cpu_backend.scheduler
}

/// Cores that a cgroup uses over four seconds, after one in which it may pay what it owes.
fn cores(group: &str) -> f64 {
    Window::pass(SECOND);
    let before = cpu_time(group);
    let window = Window::pass(4 * SECOND);
    (cpu_time(group) - before).as_secs_f64() / window.seconds()
}

/// How long the CPUs have idled since the machine was started, all together, in seconds.
fn idle_time() -> f64 {
    let stat = fs::read_to_string("/proc/stat").expect("/proc is mounted");
    let all = stat.lines().next().expect("it has a line for all CPUs").split_whitespace();
    let ticks: u64 = all.skip(4).take(2).map(|ticks| ticks.parse::<u64>().expect("a number of ticks")).sum();
    ticks as f64 / 100.0
}

/// Asserts that in ten seconds since then, in which there was enough to do, no more than 2 % of two CPUs were left idle.
#[track_caller]
fn assert_busy(idle_before: f64) {
    let idle = idle_time() - idle_before;
    println!("two CPUs have idled for {idle:.2} s in ten");
    assert!(idle < 0.4, "two CPUs have idled for {idle:.2} s in ten");
}

/// A scheduler that is not shaper's: it has another name, and leaves every decision to sched_ext's defaults, which do not
/// look at cgroups. It is there until this is dropped.
fn foreign() -> Link {
    const NAME: &[u8] = b"somebody_elses\0";
    let mut object = ObjectBuilder::default().open_memory(scx::OBJECT).expect("libbpf reads it");
    let mut map = object.maps_mut().find(|map| map.name() == sched_ext::NAME).expect("it has the scheduler");
    let ops = map.initial_value_mut().expect("it has its operations");
    let name = ops.windows(7).position(|part| part == b"shaper\0").expect("it has a name");
    // What comes before are the programs and the flags.
    ops[..name - 4].fill(0);
    ops[name..name + NAME.len()].copy_from_slice(NAME);
    let mut object = object.load().expect("the kernel takes it");
    let mut map = object.maps_mut().find(|map| map.name() == sched_ext::NAME).expect("as above");
    let link = map.attach_struct_ops().expect("no scheduler is loaded");
    assert_eq!(loaded(), "somebody_elses");
    link
}

#[test]
fn where_the_kernel_has_no_sched_ext_the_agent_says_so_and_does_not_start() {
    if is_there() {
        return; // as the other tests show
    }
    let agent = Options::default().with(&["--cpu-backend", "scx"]).prepare();
    let output = agent.command(&[]).output().expect("the agent can be started");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "{said}");
    assert!(said.contains("this kernel has no sched_ext") && said.contains("--cpu-backend kernel"), "{said}");
}

#[test]
fn hogs_divide_all_cpus_by_their_weights() {
    if !is_there() {
        return;
    }
    let agent = start();
    for (id, load) in [("free", vec![HOGS[0], HOGS[1], HOGS[2], "2"]), ("pinned", vec!["pinned", "0,1"])] {
        let run =
            |name: &str, weight: &str| agent.run(&format!("{id}-{name}"), &["--cpu-weight", weight], &load);
        let tasks = [run("more", "300"), run("less", "100")];
        Window::pass(SECOND);
        let idle = idle_time();
        let cores = cores_over_ten_seconds(&[&tasks[0].cgroup, &tasks[1].cgroup]);
        assert_busy(idle);
        let all: f64 = cores.iter().sum();
        println!("{id}: {:.3} and {:.3} cores for the weights 300 and 100", cores[0], cores[1]);
        assert_close("part of the weight 300", cores[0] / all, 0.75, 5.0);
        assert_close("part of the weight 100", cores[1] / all, 0.25, 5.0);
        for task in tasks {
            agent.process(&task).kill();
            agent.shaper().call(&["wait", task.task_id.as_str()]);
        }
    }
}

#[test]
fn tasks_that_may_run_on_one_cpu_only_leave_none_idle() {
    if !is_there() {
        return;
    }
    let agent = start();
    // Two on the first CPU, of which one has most of the weight; one on the second; and one that goes where there is room.
    let start = |id: &str, weight: &str, load: &[&str]| agent.run(id, &["--cpu-weight", weight], load);
    let tasks = [
        start("heavy", "1000", &["pinned", "0"]),
        start("beside", "100", &["pinned", "0"]),
        start("other", "100", &["pinned", "1"]),
        start("free", "100", &["spin"]),
    ];
    Window::pass(SECOND);
    let groups: Vec<&str> = tasks.iter().map(|task| task.cgroup.as_str()).collect();
    let idle = idle_time();
    let cores = cores_over_ten_seconds(&groups);
    println!("heavy, beside, other, free: {cores:.3?}");
    assert_busy(idle);
    assert!(cores.iter().all(|cores| *cores > 0.02), "{cores:?}");
}

#[test]
fn limits_hold_alone_and_beside_others_and_for_what_is_below() {
    if !is_there() {
        return;
    }
    let agent = start();
    let task = agent.run("hog", &[], &[HOGS[0], HOGS[1], HOGS[2], "2"]);
    let hold = |milli: u32, beside: &str| {
        agent.shaper().set("hog", &["--cpu", &format!("{milli}m")]);
        Window::pass(SECOND);
        let cores = cores_over_ten_seconds(&[&task.cgroup])[0];
        println!("{cores:.4} cores at a limit of {milli}m, {beside}");
        assert_close(
            &format!("cores at a limit of {milli}m, {beside}"),
            cores,
            f64::from(milli) / 1000.0,
            3.0,
        );
    };
    for milli in [50, 300, 1500] {
        hold(milli, "alone");
    }
    agent.run("neighbour", &[], &[HOGS[0], HOGS[1], HOGS[2], "2"]);
    hold(300, "beside two hogs");
    agent.shaper().ok(&["cancel", "neighbour"]);

    // A limit above the cgroup with the hogs.
    let group = TestCgroup::new();
    write(group.path(), "cgroup.subtree_control", "+cpu");
    let mut below = TestCgroup::run(&group.make_child("child"), None, &[HOGS[0], HOGS[1], HOGS[2], "2"]);
    agent.adopt("parent", group.path(), &["--cpu", "0.4"]);
    let used = cores(&group.path().display().to_string());
    println!("{used:.4} cores below a limit of 0.4");
    assert_close("cores below a limit of 0.4", used, 0.4, 5.0);
    below.kill().and_then(|()| below.wait()).expect("it is our child");
}

/// The kernel would throw out a scheduler that leaves a task waiting for 20 s.
#[test]
fn whoever_has_hardly_any_weight_or_quota_runs_in_time() {
    if !is_there() {
        return;
    }
    let agent = start();
    agent.run("heavy", &["--cpu-weight", "10000"], &["pinned", "0,0,1,1"]);
    let light = agent.run("light", &["--cpu-weight", "1"], &["pinned", "0"]);
    let many = agent.run("many", &["--cpu", "50m"], &[HOGS[0], HOGS[1], HOGS[2], "40"]);
    Window::pass(SECOND);
    let from = cpu_time(&many.cgroup);
    let mut window = Window::pass(SECOND / 100);
    for _ in 0..3 {
        let before = cpu_time(&light.cgroup);
        window.to = Window::pass(9 * SECOND).to;
        assert!(cpu_time(&light.cgroup) > before, "nothing in nine seconds");
        assert_eq!(loaded(), "shaper");
    }
    let used = (cpu_time(&many.cgroup) - from).as_secs_f64() / window.seconds();
    println!("forty threads with a limit of 0.05 use {used:.4} cores");
    assert!(used < 0.05 * 1.15, "{used:.4} cores of 0.05");
}

#[test]
fn a_killed_agent_leaves_the_kernels_scheduler_with_the_same_limits() {
    if !is_there() {
        return;
    }
    let mut agent = start();
    let task = agent.run("hog", &["--cpu", "0.3", "--cpu-weight", "300"], &["pinned", "0,1"]);
    let files = || ["cpu.max", "cpu.weight"].map(|file| read(&task.cgroup, file));
    assert_eq!(files(), ["30000 100000", "300"]);
    let with = cores(&task.cgroup);
    agent.kill9();
    assert_eq!(loaded(), "disabled");
    let without = cores(&task.cgroup);
    println!("{with:.4} cores at a limit of 0.3 with shaper's scheduler, {without:.4} after kill -9");
    assert_eq!(files(), ["30000 100000", "300"]);
    assert_close("cores with shaper's scheduler", with, 0.3, 5.0);
    assert_close("cores after kill -9", without, 0.3, 5.0);

    agent.restart();
    assert_eq!((loaded(), scheduler(&agent)), ("shaper".into(), CpuScheduler::Shaper));
    agent.stop();
    assert_eq!(loaded(), "disabled");
    agent.restart();
    let done = agent.shaper().ok(&["release", "--all"]);
    assert!(done.contains("has left the CPUs"), "{done}");
    assert_eq!(loaded(), "disabled");
}

#[test]
fn an_ejection_is_told_and_limits_stay_in_force() {
    if !is_there() {
        return;
    }
    let agent = start();
    let task = agent.run("hog", &["--cpu", "0.3"], &["pinned", "0,1"]);
    assert!(agent.shaper().usage_of("hog").cpu.throttled_permille.is_none(), "nobody counts that");
    fs::write("/proc/sysrq-trigger", "S").expect("this is root");
    eventually("the agent knows", || scheduler(&agent) == CpuScheduler::Kernel);
    let backend = agent.shaper().top().cpu_backend;
    println!("told: {backend}");
    assert!(backend.ejected.is_some_and(|ejection| ejection.why.contains("sysrq")));
    assert!(agent.shaper().doctor().cpu_backend.ejected.is_some());
    assert!(agent.said().contains("was ejected"), "{}", agent.said());
    assert_eq!((loaded(), read(&task.cgroup, "cpu.max")), ("disabled".into(), "30000 100000".into()));
    assert_close("cores after the ejection", cores(&task.cgroup), 0.3, 5.0);
    assert!(agent.shaper().usage_of("hog").cpu.throttled_permille.is_some());

    // It does not come back by itself.
    agent.run("next", &["--cpu", "0.3"], &["tick", "600", "0"]);
    assert_eq!(loaded(), "disabled");
}

#[test]
fn a_foreign_scheduler_is_told_of_and_not_replaced() {
    if !is_there() {
        return;
    }
    let agent = Agent::start();
    let task = agent.run("hog", &["--cpu", "0.3"], &["pinned", "0,1"]);
    assert_close("cores before", cores(&task.cgroup), 0.3, 5.0);
    let foreign = foreign();
    let name = "somebody_elses";
    eventually("the agent knows", || scheduler(&agent) == CpuScheduler::Foreign { name: name.into() });
    let inert = cores(&task.cgroup);
    println!("{inert:.3} cores at a limit of 0.3, with a scheduler that does not know of it");
    assert!(inert > 0.6, "the limit is in force: {inert:.3} cores");
    let notes = agent.shaper().get("hog").notes;
    assert!(
        notes.iter().any(|note| note.contains(name) && note.contains("may not be in force")),
        "{notes:?}"
    );
    let report = agent.shaper().doctor();
    let rung = report.rungs.iter().find(|rung| rung.feature == "no-foreign-scheduler").expect("it is probed");
    let Availability::Missing { evidence } = &rung.availability else { panic!("{rung:?}") };
    assert!(evidence.contains(name), "{evidence}");
    assert!(agent.shaper().ok(&["doctor"]).contains(&format!("divided by the sched_ext scheduler `{name}`")));

    let other = Options::default().with(&["--cpu-backend", "scx"]).prepare();
    let output = other.command(&[]).output().expect("the agent can be started");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "{said}");
    assert!(said.contains(&format!("`{name}` is loaded already")), "{said}");
    assert_eq!(loaded(), name);

    drop(foreign);
    assert_eq!(loaded(), "disabled");
    eventually("the agent knows", || scheduler(&agent) == CpuScheduler::Kernel);
    assert_close("cores after it", cores(&task.cgroup), 0.3, 5.0);
}
