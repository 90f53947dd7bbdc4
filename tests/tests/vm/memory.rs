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
    idle::{self, State, Why},
    ledger::Actor,
    shrink::{Outcome, Reason, Status},
    spec::{Decision, DecisionKind},
    task::TaskStatus,
};
use shaper_tests::{
    NOBODY,
    agent::{Agent, Options},
    broker::{ClusterPhase, ClusterTask},
    cgroup::{TestCgroup, read, unique_name, write},
    cluster::{Cluster, networks},
    disk::Disk,
    soak,
    swap::Swap,
    time::{Window, eventually, happens, monotonic_ns},
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
        Held::start_in(TestCgroup::new(), hot, cold, more)
    }

    fn start_in(group: TestCgroup, hot: &str, cold: &str, more: &[&str]) -> Held {
        let progress = format!("/tmp/{}", unique_name());
        let load = TestCgroup::run(group.path(), None, &[&["hold", &progress, hot, cold], more].concat());
        let held = Held { group, load, progress };
        eventually("the load holds its memory", || held.rounds() > 2);
        held
    }

    /// Rounds a second, over the next seconds.
    fn rate(&self) -> f64 {
        let before = self.rounds();
        let window = Window::pass(3 * SECOND);
        (self.rounds() - before) as f64 / window.seconds()
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
    let on_node = task.on_node.expect("its node told of it");
    let notes = on_node.notes;
    assert!(notes.iter().any(|note| note.starts_with("killed by OOM at 32 MiB, peak 32 MiB")), "{notes:?}");
    assert_eq!(on_node.oom_kill.expect("it is reported").limit.to_string(), "32 MiB");
    let decisions = cluster.broker.decisions("limited");
    let ended = decisions.iter().find(|it| it.kind == DecisionKind::Ended).expect("it ended");
    assert!(ended.reason.contains("killed by OOM at 32 MiB"), "{ended:?}");
}

#[test]
fn what_was_killed_for_want_of_memory_is_remembered_by_the_next_agent() {
    let mut agent = Agent::start();
    agent.run("task", &["--memory", "32Mi"], &["eat", "96"]);
    agent.shaper().wait("task");
    let kill = agent.shaper().get("task").oom_kill.expect("the kernel killed it");
    assert_eq!((kill.kills, kill.limit.to_string().as_str()), (1, "32 MiB"));
    assert!(kill.peak.is_some_and(|peak| peak.0 >= 31 * MIB), "{kill:?}");
    agent.kill9();
    agent.restart();
    assert_eq!(agent.shaper().get("task").oom_kill, Some(kill));
    let described = agent.shaper().ok(&["describe", "task"]);
    assert!(described.contains("killed by OOM at 32 MiB"), "{described}");
}

#[test]
fn the_limit_of_its_owner_survives_an_agent_that_dies_in_a_shrink() {
    let _swap = Swap::in_memory();
    let mut agent = Agent::start();
    let held = Held::start("12", "36", &[]);
    write(held.group.path(), "memory.max", "134217728");
    agent.adopt("held", held.group.path(), &[]);
    agent.shaper().set("held", &["--memory", "36Mi"]);
    eventually("memory.max is lowered", || held.file("memory.max") == "37748736");
    agent.kill9();
    agent.restart();
    // It died while the limit was watched, or, where this machine was slow, after that.
    let is_done = agent.shaper().get("held").limits.memory.at().is_some();
    assert_eq!(held.file("memory.max"), if is_done { "37748736" } else { "134217728" });
    assert_eq!(held.file("memory.high"), "max");
    agent.shaper().ok(&["release", "held"]);
    assert_eq!(held.limits(), ["134217728", "max"]);
}

#[test]
fn a_release_kills_nobody() {
    let agent = Agent::start();
    let group = TestCgroup::new();
    write(group.path(), "memory.max", "25165824");
    agent.adopt("held", group.path(), &["--cpu", "1.5", "--memory", "256Mi"]);
    let held = Held::start_in(group, "12", "36", &[]);
    let said = agent.shaper().ok(&["release", "held"]);
    assert!(said.contains("memory is not `24 MiB` again, but stays at 256 MiB"), "{said}");
    assert_eq!(["cpu.max", "memory.max"].map(|file| held.file(file)), ["max 100000", "268435456"]);
    let before = held.rounds();
    eventually("it goes on", || held.rounds() > before);
    assert_eq!(held.oom_kills(), 0);
}

/// A task of the broker's with a request of 32 MiB that takes `mib`, and gives it back once there is a file.
fn submit_eater(cluster: &Cluster<'_>, id: &str, mib: u32, until: &Path) {
    let load = cluster.path().join("test-load").display().to_string();
    let script = format!(
        "{load} eat {mib} & while [ ! -e {} ]; do sleep 0.2; done; kill $!; wait; echo gave; exec sleep 10000",
        until.display()
    );
    let demand = json!({"cpu_cores": 0.5, "memory_gb": 0.03125});
    let spec = json!({
        "profile": {"task_id": id, "resource_demand": demand, "priority": "medium"},
        "command": ["/bin/sh", "-c", script],
        "cwd": "/",
        "run_as": {"uid": NOBODY, "gid": NOBODY},
    });
    cluster.submit_spec(id, &spec.to_string());
    let shaper = cluster.agent("n1").shaper();
    let has_eaten = || {
        let answer = shaper.call(&["logs", id]);
        answer.code == 0 && answer.stdout.contains(&format!("ate {mib} MiB"))
    };
    assert!((0..3).any(|_| happens(has_eaten)), "{}", shaper.ok(&["describe", id]));
}

#[test]
fn memory_that_was_given_comes_back_when_it_is_not_needed() {
    let networks = networks(1);
    let cluster = Cluster::start(&networks, &["cpu=2,memory=256Mi"]);
    let shaper = cluster.agent("n1").shaper();
    let max_of = |id: &str| read(&shaper.get(id).cgroup, "memory.max").parse::<u64>().expect("a number");
    let file = cluster.path().join("first");
    let shrunk = |id: &str, word: &str| {
        let decisions = cluster.broker.decisions(id);
        let it = decisions.iter().find(|it| it.kind == DecisionKind::Shrunk && it.reason.contains(word));
        it.cloned().unwrap_or_else(|| panic!("{id} {word}: {decisions:#?}"))
    };

    // For a minute nobody needs it.
    submit_eater(&cluster, "first", 96, &file);
    assert!(max_of("first") >= 96 * MIB);
    fs::write(&file, "").expect("the directory is there");
    assert!((0..5).any(|_| happens(|| max_of("first") == 32 * MIB)), "{}", max_of("first"));
    println!("{}", shrunk("first", "in the last minute").reason);

    assert_eq!(value(&read(shaper.get("first").cgroup, "memory.events"), "oom_kill "), 0);
    // And then it is quiet.
    let of = |id: &str| cluster.broker.decisions(id).len();
    let before = of("first");
    let _while = Window::pass(soak::times(60).max(5) * SECOND);
    assert_eq!(of("first"), before);
}

/// Minutes go by with each way to have swap: all of them only in a soak.
fn is_left_to_the_soak(swap: &str) -> bool {
    swap == "swap on disk" && soak::times(20) < 20
}

fn idle(agent: &Agent<'_>) -> idle::Status {
    agent.shaper().get("held").idle.expect("its idle memory is looked for")
}

/// Waits, minutes if need be, until nothing more is taken from what was adopted; returns how fast it got on meanwhile, in
/// rounds a second. Nobody looks at it while its rounds are counted: in a guest that emulates two CPUs, whoever asks again
/// and again takes one of them.
fn until_it_rests(agent: &Agent<'_>, held: &Held, enough: impl Fn() -> bool) -> f64 {
    eventually("its idle memory is looked for", || agent.shaper().get("held").idle.is_some());
    let rests = || {
        let State::Resting(why) = idle(agent).state else { return false };
        let is_found = matches!(why, Why::WorkingSet { .. } | Why::NotReclaimable);
        is_found && enough()
    };
    let (mut rounds, mut seconds) = (0, 0.0);
    while seconds < 360.0 {
        let before = held.rounds();
        let window = Window::pass(3 * SECOND);
        (rounds, seconds) = (rounds + held.rounds() - before, seconds + window.seconds());
        if rests() {
            return rounds as f64 / seconds;
        }
    }
    panic!("it does not rest: {:?}", idle(agent));
}

#[test]
fn idle_memory_is_taken_and_the_hot_set_stays() {
    let agent = Agent::start();
    let mut least = 1.0f64;
    with_each_swap(1, |swap, set| {
        if is_left_to_the_soak(swap) {
            return;
        }
        let held = Held::start(&set("hot", 28), &set("cold", 20), &[]);
        let (before, usual) = (held.used(), held.rate());
        agent.adopt("held", held.group.path(), &["--reclaim-idle"]);
        let meanwhile = until_it_rests(&agent, &held, || held.used() + 16 * MIB <= before);
        let (status, used) = (idle(&agent), held.used());
        let line = format!(
            "{swap}: {} → {} MiB in use, {status}; {} KiB came back, progress {:.3} meanwhile, {:.3} after",
            before / MIB,
            used / MIB,
            status.refaulted.0 >> 10,
            meanwhile / usual,
            held.rate() / usual
        );
        println!("{line}");
        assert!(used + 16 * MIB <= before, "{line}");
        assert!(used >= 26 * MIB, "{line}");
        // It may have looked once where the hot set begins.
        assert!(status.refaulted.0 <= 36 * MIB, "{line}");
        assert_eq!(held.limits(), ["max", "max"], "{line}");
        assert_eq!(status.is_cache_only, swap == "no swap", "{line}");
        let told = agent.shaper().usage_of("held").memory.and_then(|memory| memory.idle_reclaimed);
        assert!(told.is_some_and(|told| told >= status.reclaimed), "{told:?} {line}");
        eventually("the ledger tells of it", || {
            let is_it = |actor: &Actor| *actor == Actor::Agent("idle".into());
            agent.shaper().ledger("held").iter().any(|entry| is_it(&entry.cause.actor))
        });
        let described = agent.shaper().ok(&["describe", "held"]);
        assert!(described.contains("Idle memory:") && described.contains("reclaimed"), "{described}");
        least = least.min(meanwhile / usual);
        // Told to, it stops.
        agent.shaper().set("held", &["--reclaim-idle=false"]);
        eventually("it is not looked for any more", || agent.shaper().get("held").idle.is_none());
        agent.shaper().ok(&["release", "held"]);
    });
    soak::aim(
        &format!("the least progress while idle memory went was {least:.3} of the usual"),
        least >= 0.95,
    );
}

#[test]
fn a_task_that_uses_all_its_memory_keeps_it() {
    let agent = Options::default().with(&["--reclaim-idle"]).start();
    let mut least = 1.0f64;
    with_each_swap(1, |swap, set| {
        if is_left_to_the_soak(swap) {
            return;
        }
        let held = Held::start(&set("hot", 40), "0", &[]);
        let (before, usual) = (held.used(), held.rate());
        // The agent does it with all; the time after the first rest shows what it makes of this one.
        agent.adopt("held", held.group.path(), &[]);
        let meanwhile = until_it_rests(&agent, &held, || true);
        let _while = Window::pass(soak::times(60).max(15) * SECOND);
        let (status, used) = (idle(&agent), held.used());
        let line = format!(
            "{swap}: {} → {} MiB in use, {status}; {} KiB came back, progress {:.3}",
            before / MIB,
            used / MIB,
            status.refaulted.0 >> 10,
            meanwhile / usual
        );
        println!("{line}");
        assert!(used + 4 * MIB >= before, "{line}");
        // Whether it can spare any is found out three times in so long, and no more.
        assert!(status.reclaimed.0 <= 3 * 40 * MIB, "{line}");
        assert_eq!(held.oom_kills(), 0, "{line}");
        least = least.min(meanwhile / usual);
        agent.shaper().ok(&["release", "held"]);
    });
    soak::aim(
        &format!("the least progress of a task that needs all was {least:.3} of the usual"),
        least >= 0.95,
    );
}
