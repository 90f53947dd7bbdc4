//! Memory limits that come below use, with and without swap.

use std::{
    fs,
    path::Path,
    process::Child,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use serde_json::json;
use shaper_core::{
    shrink::{Outcome, Reason, Status},
    spec::{Decision, DecisionKind},
    task::TaskStatus,
};
use shaper_tests::{
    NOBODY,
    agent::Agent,
    broker::{ClusterPhase, ClusterTask},
    cgroup::{TestCgroup, read, unique_name, write},
    cluster::{Cluster, networks},
    disk::Disk,
    soak,
    swap::Swap,
    time::{Window, eventually, monotonic_ns},
};

use super::SECOND;

const MIB: u64 = 1 << 20;
/// Of each kind of conversation, over all ways to have swap or none.
const WHOLE: u32 = 50;

/// A cgroup in which `test-load hold` runs.
struct Held {
    group: TestCgroup,
    load: Child,
    progress: String,
}

impl Held {
    /// Returns once both sets are there.
    fn start(hot: &str, cold: &str, more: &[&str]) -> Held {
        let group = TestCgroup::new();
        let progress = format!("/tmp/{}", unique_name());
        let load = TestCgroup::run(group.path(), None, &[&["hold", &progress, hot, cold], more].concat());
        let held = Held { group, load, progress };
        eventually("the load holds its memory", || held.rounds() > 2);
        held
    }

    fn rounds(&self) -> u64 {
        let bytes = fs::read(&self.progress).unwrap_or_default();
        bytes.try_into().map_or(0, u64::from_ne_bytes)
    }

    fn file(&self, name: &str) -> String {
        read(self.group.path(), name)
    }

    fn used(&self) -> u64 {
        self.file("memory.current").parse().expect("it is a number")
    }

    fn oom_kills(&self) -> u64 {
        value(&self.file("memory.events"), "oom_kill ")
    }

    fn limits(&self) -> [String; 2] {
        ["memory.max", "memory.high"].map(|file| self.file(file))
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let _ = self.load.kill();
        let _ = self.load.wait();
        let _ = fs::remove_file(&self.progress);
    }
}

fn value(text: &str, name: &str) -> u64 {
    let found = text.lines().find_map(|line| line.strip_prefix(name)?.parse().ok());
    found.unwrap_or_else(|| panic!("no {name} in {text}"))
}

/// How long all of a cgroup has waited for memory.
fn full_stall_us(group: &Path) -> u64 {
    let pressure = read(group, "memory.pressure");
    let full = pressure.lines().find_map(|line| line.strip_prefix("full ")?.rsplit_once("total="));
    full.and_then(|(_, total)| total.parse().ok()).unwrap_or_else(|| panic!("no full in {pressure}"))
}

/// When somebody who looks at nothing but the kernel's files could first see a stall of a fifth of half a second, and when
/// the limits were last other than at first, ns.
#[derive(Default)]
struct Witnessed {
    stall: Option<u64>,
    changed: Option<u64>,
}

struct Witness {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Witnessed>,
}

impl Witness {
    fn of(held: &Held) -> Witness {
        let (path, first) = (held.group.path().to_owned(), held.limits());
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let mut witnessed = Witnessed::default();
            let mut totals = std::collections::VecDeque::new();
            while !stopped.load(SeqCst) {
                let now = monotonic_ns();
                let total = full_stall_us(&path);
                totals.push_back((now, total));
                while totals.front().is_some_and(|(at, _)| now - at > 500_000_000) {
                    totals.pop_front();
                }
                if total - totals[0].1 >= 100_000 {
                    witnessed.stall.get_or_insert(now);
                }
                if ["memory.max", "memory.high"].map(|file| read(&path, file)) != first {
                    witnessed.changed = Some(now);
                }
                thread::sleep(Duration::from_millis(10));
            }
            witnessed
        });
        Witness { stop, thread }
    }

    fn end(self) -> Witnessed {
        self.stop.store(true, SeqCst);
        self.thread.join().expect("the witness has not panicked")
    }
}

/// What one conversation came to.
struct Story {
    status: Status,
    seconds: f64,
    /// Rounds of the load a second, meanwhile, by those before.
    progress: f64,
    witnessed: Witnessed,
}

/// Sets the limit of what `held` holds, and waits for what comes of it.
fn shrink(agent: &Agent<'_>, held: &Held, target: &str) -> Story {
    agent.adopt("held", held.group.path(), &[]);
    let before = held.rounds();
    let window = Window::pass(SECOND);
    let usual = (held.rounds() - before) as f64 / window.seconds();

    let witness = Witness::of(held);
    let (from, before) = (monotonic_ns(), held.rounds());
    let answer = agent.shaper().call(&["set", "held", "--memory", target, "--wait", "-o", "json"]);
    let window = Window { from, to: monotonic_ns() };
    let rounds = (held.rounds() - before) as f64 / window.seconds();
    let witnessed = witness.end();
    let task: TaskStatus = serde_json::from_str(&answer.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}{}", answer.stdout, answer.stderr));
    Story {
        status: task.shrink.expect("it has been shrunk, or not"),
        seconds: window.seconds(),
        progress: rounds / usual,
        witnessed,
    }
}

/// A way to have swap or none, with the word for a set of so many MiB that can be reclaimed in it.
fn with_each_swap(count: u32, mut test: impl FnMut(&str, &dyn Fn(&str, u32) -> String)) {
    let anonymous = |_: &str, mib: u32| mib.to_string();
    for (name, swap) in [("swap in memory", Swap::in_memory as fn() -> Swap), ("swap on disk", Swap::on_disk)]
    {
        let _swap = swap();
        for _ in 0..count {
            test(name, &anonymous);
        }
    }
    let disk = Disk::format_and_mount();
    for _ in 0..count {
        test("no swap", &|name, mib| format!("{mib}:{}", disk.file(name).display()));
    }
}

/// The worst of several, in a line.
#[derive(Default)]
struct Worst {
    count: u32,
    seconds: f64,
    progress: f64,
}

#[test]
fn cold_memory_is_given_up_while_the_task_goes_on() {
    let agent = Agent::start();
    let mut worst = Worst { progress: 1.0, ..Worst::default() };
    with_each_swap(soak::times(WHOLE).div_ceil(6), |swap, set| {
        for more in [&[][..], &["4", "6"]] {
            // Where nothing of its own can be reclaimed, what it takes meanwhile stays.
            let held = Held::start("12", &set("cold", 36), more);
            let story = shrink(&agent, &held, "36Mi");
            let line = format!(
                "{swap}, {more:?}: {} in {:.2} s, progress {:.3}",
                story.status, story.seconds, story.progress
            );
            println!("{line}");
            assert!(matches!(story.status.outcome, Some(Outcome::Done { .. })), "{line}");
            assert_eq!(held.limits(), [(36 * MIB).to_string(), "max".into()], "{line}");
            assert!(held.used() <= 36 * MIB, "{line}");
            assert_eq!(held.oom_kills(), 0, "{line}");
            worst.count += 1;
            worst.seconds = worst.seconds.max(story.seconds);
            worst.progress = worst.progress.min(story.progress);
            agent.shaper().ok(&["release", "held"]);
            assert_eq!(held.limits(), ["max", "max"]);
        }
    });
    let Worst { count, seconds, progress } = worst;
    soak::aim(&format!("{count} of {count} limits came down, in {seconds:.2} s at most"), seconds <= 10.0);
    soak::aim(&format!("the least progress meanwhile was {progress:.3} of the usual"), progress >= 0.9);
}

#[test]
fn a_working_set_above_the_target_is_left_as_it_was() {
    let agent = Agent::start();
    let (mut count, mut seen, mut slowest) = (0, 0, 0.0f64);
    with_each_swap(soak::times(WHOLE).div_ceil(3), |swap, set| {
        let held = Held::start(&set("hot", 40), &set("cold", 8), &[]);
        let story = shrink(&agent, &held, "24Mi");
        let Witnessed { stall, changed } = story.witnessed;
        let after = stall.map(|stall| changed.unwrap_or(0).saturating_sub(stall) as f64 / 1e9);
        let line = format!(
            "{swap}: {} in {:.2} s, progress {:.3}, back {after:?} s after the stall could be seen",
            story.status, story.seconds, story.progress
        );
        println!("{line}");
        assert!(matches!(story.status.outcome, Some(Outcome::Aborted { .. })), "{line}");
        assert_eq!(held.limits(), ["max", "max"], "{line}");
        assert_eq!(held.oom_kills(), 0, "{line}");
        count += 1;
        seen += u32::from(after.is_some());
        slowest = slowest.max(after.unwrap_or(0.0));
        agent.shaper().ok(&["release", "held"]);
    });
    soak::aim(
        &format!(
            "{count} of {count} limits were given up and put back; a stall could be seen in {seen}, and the last was put \
             back {slowest:.2} s after that"
        ),
        slowest <= 1.0,
    );
}

#[test]
fn a_plain_write_below_use_kills() {
    let times = soak::times(WHOLE);
    for _ in 0..times {
        let held = Held::start("12", "36", &[]);
        write(held.group.path(), "memory.max", "37748736");
        assert_eq!(held.oom_kills(), 1);
    }
    println!("soak: {times} of {times} plain writes of memory.max without swap killed");
}

#[test]
fn what_cannot_be_reclaimed_is_refused_with_everything_beside_it() {
    let agent = Agent::start();
    let held = Held::start("12", "36", &[]);
    agent.adopt("held", held.group.path(), &["--cpu", "0.5", "--memory", "128Mi"]);
    let said = agent.shaper().refused(&["set", "held", "--cpu", "0.7", "--memory", "24Mi"]);
    assert!(said.contains("below what the task cannot be without") && said.contains("no swap"), "{said}");
    assert_eq!(["cpu.max", "memory.max"].map(|file| held.file(file)), ["50000 100000", "134217728"]);
    assert_eq!(held.oom_kills(), 0);
}

#[test]
fn an_agent_that_dies_on_the_way_is_followed_by_one_that_calls_it_off() {
    let _swap = Swap::in_memory();
    let mut agent = Agent::start();
    let held = Held::start("12", "36", &[]);
    agent.adopt("held", held.group.path(), &["--memory", "128Mi"]);
    let set = agent.shaper().set("held", &["--memory", "36Mi"]);
    let status = set.shrink.expect("it is on its way");
    assert_eq!((status.outcome, set.limits.memory.to_string().as_str()), (None, "128 MiB"));
    eventually("memory.high is lowered", || held.file("memory.high") != "max");
    agent.kill9();
    agent.restart();
    assert_eq!(held.limits(), ["134217728", "max"]);
    assert_eq!(agent.shaper().get("held").limits.memory.to_string(), "128 MiB");
    // One that ends by request leaves nothing for the next to call off.
    agent.shaper().set("held", &["--memory", "36Mi"]);
    eventually("memory.high is lowered", || held.file("memory.high") != "max");
    agent.stop();
    assert_eq!(held.limits(), ["134217728", "max"]);
    agent.restart();
    // And again, to its end.
    let set = agent.shaper().set("held", &["--memory", "36Mi", "--wait"]);
    assert!(matches!(set.shrink.unwrap().outcome, Some(Outcome::Done { .. })));
    // One that another limit calls off.
    let set = agent.shaper().set("held", &["--memory", "24Mi"]);
    let is_under_way = set.shrink.unwrap().outcome.is_none();
    let set = agent.shaper().set("held", &["--memory", "256Mi"]);
    if is_under_way {
        let outcome = set.shrink.unwrap().outcome;
        assert!(matches!(outcome, Some(Outcome::Aborted { reason: Reason::Cancelled, .. })), "{outcome:?}");
    }
    assert_eq!(held.limits(), ["268435456", "max"]);
}

#[test]
fn a_task_of_the_brokers_grows_before_the_kernel_kills_and_one_with_a_limit_is_told_of() {
    let networks = networks(1);
    let cluster = Cluster::start(&networks, &["cpu=2,memory=256Mi"]);
    let load = cluster.path().join("test-load").display().to_string();
    let spec = |id: &str, limits: serde_json::Value| {
        let demand = json!({"cpu_cores": 0.5, "memory_gb": 0.03125});
        let mut spec = json!({
            "profile": {"task_id": id, "resource_demand": demand, "priority": "medium"},
            "command": [load, "eat", "96"],
            "cwd": "/",
            "run_as": {"uid": NOBODY, "gid": NOBODY},
        });
        if let Some(spec) = spec.as_object_mut().filter(|_| !limits.is_null()) {
            spec.insert("limits".into(), limits);
        }
        spec.to_string()
    };
    cluster.submit_spec("grows", &spec("grows", serde_json::Value::Null));
    let shaper = cluster.agent("n1").shaper();
    eventually("it has eaten what it wants", || {
        let answer = shaper.call(&["logs", "grows"]);
        answer.code == 0 && answer.stdout.contains("ate 96 MiB")
    });
    let task = shaper.get("grows");
    assert_eq!(value(&read(&task.cgroup, "memory.events"), "oom_kill "), 0);
    let limit = task.limits.memory.at().expect("it has one").0;
    assert!(limit >= 96 * MIB, "{limit}");
    assert_eq!(read(&task.cgroup, "memory.max"), limit.to_string());
    let decisions = cluster.broker.decisions("grows");
    let of_memory = |decision: &&Decision| decision.reason.starts_with("memory 32 MiB");
    let grew = decisions.iter().find(of_memory).unwrap_or_else(|| panic!("{decisions:#?}"));
    assert_eq!(grew.kind, DecisionKind::Grew);

    cluster.submit_spec("limited", &spec("limited", json!({"memory_gb": 0.03125})));
    let ended = |task: &ClusterTask| matches!(task.phase, ClusterPhase::Ended { .. });
    let task = cluster.broker.wait_until("limited", "over", ended);
    let notes = task.on_node.expect("its node told of it").notes;
    assert!(notes.iter().any(|note| note.starts_with("killed by OOM at 32 MiB, peak 32 MiB")), "{notes:?}");
}
