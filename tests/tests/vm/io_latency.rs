//! A promised latency of block IO: others are held back for it, and let go.

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt,
    path::PathBuf,
    process::Child,
    time::Duration,
};

use shaper_core::{ledger::Entry, task::TaskStatus};
use shaper_tests::{
    agent::Agent,
    cgroup::{TestCgroup, read, write},
    figures::tell,
    shaper::in_force,
    slow_disk::SlowDisk,
    time::{Window, eventually},
};

use super::SECOND;

/// Of the device: each operation takes so long …
const SERVICE: Duration = Duration::from_millis(4);
/// … and so many are done at once.
const DEPTH: u32 = 8;
/// Operations of the aggressor at once.
const CROWD: &str = "64";

/// A task that reads, one operation at a time, and what it noted.
struct Reader {
    log: PathBuf,
}

impl Reader {
    fn start(agent: &Agent<'_>, disk: &SlowDisk, limits: &[&str]) -> Reader {
        let log = agent.directory().join("reader.log");
        let made =
            fs::write(&log, []).and_then(|()| fs::set_permissions(&log, Permissions::from_mode(0o666)));
        made.expect("it is ours");
        agent.run("reader", limits, &["probe", &disk.path(), &log.display().to_string()]);
        Reader { log }
    }

    fn times(&self) -> Vec<u32> {
        let bytes = fs::read(&self.log).expect("it is there");
        bytes.as_chunks::<4>().0.iter().map(|word| u32::from_ne_bytes(*word)).collect()
    }

    /// The 99th percentile of what it reads from now on for so long, ms.
    fn p99(&self, time: Duration) -> f64 {
        let before = self.times().len();
        Window::pass(time);
        let mut since = self.times().split_off(before);
        assert!(since.len() >= 100, "{} operations in {time:?}", since.len());
        since.sort_unstable();
        f64::from(since[(since.len() * 99).div_ceil(100) - 1]) / 1000.0
    }
}

/// The lines of the io.max of a cgroup that are of the device.
fn io_max(group: &str, disk: &SlowDisk) -> Option<String> {
    let text = read(group, "io.max");
    text.lines().find(|line| line.starts_with(&format!("{} ", disk.number()))).map(str::to_owned)
}

fn number(line: &str, name: &str) -> Option<u64> {
    line.split(' ').find_map(|word| word.strip_prefix(name)?.strip_prefix('=')?.parse().ok())
}

fn ledger(agent: &Agent<'_>, id: &str) -> Vec<Entry> {
    let lines = agent.shaper().ok(&["ledger", id, "--output", "json"]);
    serde_json::from_str(&lines).unwrap_or_else(|error| panic!("{error} in {lines}"))
}

fn reason_of_hold(task: &TaskStatus) -> Option<&str> {
    task.enforcement.iter().map(|it| it.in_force.as_str()).find(|text| text.contains("held back for"))
}

#[test]
fn a_promised_latency_is_kept_beside_an_aggressor() {
    let disk = SlowDisk::new(SERVICE, DEPTH);
    let agent = Agent::start();
    let reader = Reader::start(&agent, &disk, &[]);
    eventually("it reads", || reader.times().len() > 50);
    let alone = reader.p99(6 * SECOND);
    let hog = agent.run("hog", &[], &["churn", &disk.path(), "read", CROWD]);
    Window::pass(SECOND);
    let without = reader.p99(6 * SECOND);

    let promise = format!("{:.1}ms", alone * 1.6);
    agent.shaper().set("reader", &["--io-latency", &promise]);
    eventually("the hog is held", || io_max(&hog.cgroup, &disk).is_some());
    let kept = alone * 1600.0;
    eventually("the last reads keep the promise", || {
        reader.times().iter().rev().take(300).filter(|took| f64::from(**took) > kept).count() <= 3
    });
    let with = reader.p99(10 * SECOND);
    let of_hog = io_max(&hog.cgroup, &disk).unwrap_or_default();
    tell("p99 of a reader alone", alone, "ms", "", true);
    tell("the same beside 64 reads at once", without, "ms", "", true);
    tell("the same, promised 1.6 of it alone", with, "ms", "<= 2 x alone", with <= 2.0 * alone);
    let left = number(&of_hog, "riops").unwrap_or(0);
    tell("what the aggressor is left", left as f64, "IOPS", "", true);
    assert!(without > 2.0 * alone, "the hog does not matter: p99 {without:.1} ms, alone {alone:.1} ms");
    assert!(with <= 2.0 * alone, "p99 {with:.1} ms, alone {alone:.1} ms");

    // Every hold has its reason, for whoever asks.
    let entries = ledger(&agent, "hog");
    let because = format!("on {} (", disk.number());
    let is_hold = |entry: &&Entry| {
        entry.cause.reason.starts_with("held to ")
            && entry.cause.reason.contains("because task `reader` waits p99")
    };
    let holds: Vec<&Entry> = entries.iter().filter(is_hold).collect();
    assert!(
        !holds.is_empty() && holds.iter().all(|entry| entry.cause.reason.contains(&because)),
        "{entries:?}"
    );
    let task = agent.shaper().get("hog");
    assert!(
        reason_of_hold(&task).is_some_and(|text| text.contains("task `reader`")),
        "{:?}",
        task.enforcement
    );
    let promised = agent.shaper().get("reader");
    let (by, state) = in_force(&promised, "storage_io_latency");
    assert!(by == "limits of others" && state.contains("1 held back"), "{by}: {state}");
    assert_eq!(io_max(&promised.cgroup, &disk), None, "who is promised something is not held");

    agent.shaper().set("reader", &["--io-latency", "max"]);
    eventually("the hog is let go", || read(&hog.cgroup, "io.max").is_empty());
}

/// What ends with the test, or before.
struct Outsider(Child);

impl Drop for Outsider {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn the_lower_of_ceiling_and_hold_is_in_force_and_a_hold_does_not_outlive_its_agent_and_victim() {
    let disk = SlowDisk::new(SERVICE, DEPTH);
    let mut agent = Agent::start();
    let group = TestCgroup::new();
    write(group.path(), "io.max", &format!("{} rbps=104857600", disk.number()));
    let path = group.path().display().to_string();
    agent.adopt("hog", group.path(), &["--io", "800"]);
    let _hog = Outsider(TestCgroup::run(group.path(), None, &["churn", &disk.path(), "read", CROWD]));
    let rate = |name: &str| io_max(&path, &disk).and_then(|line| number(&line, name));
    eventually("its ceiling is divided", || rate("riops").is_some_and(|riops| riops > 700));
    assert_eq!(rate("rbps"), Some(104_857_600));

    // A tight promise: everybody is held as far as that goes.
    let reader = Reader::start(&agent, &disk, &["--io-latency", "6ms"]);
    eventually("it reads", || reader.times().len() > 50);
    eventually("the hog is held below its ceiling", || rate("riops").is_some_and(|riops| riops < 400));
    assert!(rate("rbps").is_some_and(|bytes| bytes < 104_857_600), "{:?}", io_max(&path, &disk));

    let reader = agent.process(&agent.shaper().get("reader"));
    agent.kill9();
    assert!(rate("riops").is_some_and(|riops| riops < 800), "what is held stays while nobody is there");
    reader.kill();
    reader.wait_for_end();
    agent.restart();
    eventually("its bytes are its own again", || rate("rbps") == Some(104_857_600));
    eventually("its ceiling is in force", || rate("riops").is_some_and(|riops| riops > 700));
    agent.shaper().ok(&["release", "hog"]);
    assert_eq!(rate("riops"), None);
    assert_eq!(rate("rbps"), Some(104_857_600));
}

#[test]
fn what_is_not_managed_is_left_alone_and_said_to_be() {
    let disk = SlowDisk::new(SERVICE, DEPTH);
    let agent = Agent::start();
    let group = TestCgroup::new();
    write(group.path().parent().unwrap(), "cgroup.subtree_control", "+io");
    let _outsider = Outsider(TestCgroup::run(group.path(), None, &["churn", &disk.path(), "read", CROWD]));
    let reader = Reader::start(&agent, &disk, &["--io-latency", "6ms"]);
    eventually("it reads", || reader.times().len() > 50);
    let said = || in_force(&agent.shaper().get("reader"), "storage_io_latency").1.to_owned();
    eventually("that nobody can be held is said", || said().contains("that shaper does not manage"));
    assert_eq!(read(group.path(), "io.max"), "");
    println!("{}", said());
}
