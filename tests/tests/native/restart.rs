//! The agent is killed, and started again: enforcement has no gap, and nothing is forgotten.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader, Read},
    mem::offset_of,
    os::unix::fs::MetadataExt,
    process::Stdio,
    time::Duration,
};

use aya::maps::{Array, HashMap, Map, MapData};
use shaper_common::abi::{LAYOUT, Pace};
use shaper_core::task::{ExitStatus, Phase};
use shaper_tests::{
    agent::{Agent, Options, Used},
    assert_close,
    cgroup::{TestCgroup, cpu_time},
    net::{DEVICE, NetPair},
    pins::{Link, links},
    shaper::in_force,
    sink::Sink,
    time::{Window, monotonic_ns},
};

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn limits_hold_without_a_gap_while_the_agent_is_dead_and_when_it_is_back() {
    let network = NetPair::new();
    let mut agent = Options::default().on(&network).start();
    let sink = Sink::listen(&network.far, NetPair::FAR_V4);
    let hog = agent.run("hog", &["--cpu", "0.5"], &["spin"]);
    // One connection: the shares of many swing, and no swing must be taken for a gap.
    agent.run("upload", &["--net", "50mbit"], &["send", &sink.address(), "1"]);
    sink.wait_for_flows(1);
    Window::pass(SECOND);
    let before = agent.shaper().get("upload").usage;

    let killed_at = monotonic_ns();
    agent.kill9();
    let cpu_before = cpu_time(&hog.cgroup);
    let dead = Window::pass(3 * SECOND);
    let cores = (cpu_time(&hog.cgroup) - cpu_before).as_secs_f64() / dead.seconds();
    assert_close("cores while the agent is dead", cores, 0.5, 10.0);
    assert_close("bits a second while the agent is dead", sink.rate(dead), 50e6, 3.0);

    agent.restart();
    Window::pass(SECOND);
    let restart = Window { from: killed_at, to: monotonic_ns() };
    let highest = sink.highest_rate(restart, SECOND / 2);
    assert!(highest < 1.1 * 50e6, "a burst of {highest:.0} bit/s over the restart");

    // Both are adopted: what they did meanwhile was counted, and they follow.
    let used = Used::between(&before, &agent.shaper().get("upload").usage);
    assert_close("sent over the restart, by what arrived", used.egress, sink.rate(used.window), 1.5);
    assert_close("the uplink's count over the restart", used.uplink, used.egress, 1.5);
    let changed = agent.shaper().set("hog", &["--cpu", "0.2"]);
    assert_eq!((changed.pid, in_force(&changed, "cpu").1), (hog.pid, "0.2 cores"));
    agent.shaper().set("upload", &["--net", "20mbit"]);
    Window::pass(SECOND);
    agent.assert_cores("hog", 0.2, 2 * SECOND);
    assert_close("bits a second after a change", agent.measure("upload", 2 * SECOND).egress, 20e6, 3.0);
}

#[test]
fn a_task_that_ends_while_the_agent_is_dead_has_its_log_and_its_exit_code() {
    let mut agent = Agent::start();
    let task = agent.run("ticker", &[], &["tick", "12", "7"]);
    let process = agent.process(&task);
    agent.kill9();
    process.wait_for_end();

    agent.restart();
    assert_eq!(agent.shaper().wait("ticker"), 7);
    assert!(matches!(agent.shaper().get("ticker").phase, Phase::Ended { status: ExitStatus::Code(7), .. }));
    let expected: String = (1..=12).map(|number| format!("tick {number}\n")).collect();
    assert_eq!(agent.shaper().ok(&["logs", "ticker"]), expected);
}

#[test]
fn a_log_that_is_followed_goes_on_over_a_restart() {
    let mut agent = Agent::start();
    agent.run("ticker", &[], &["tick", "15", "0"]);
    let mut following = agent.shaper().command(&["logs", "--follow", "ticker"]);
    let mut following = following.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut output = BufReader::new(following.stdout.take().unwrap());
    let mut log = String::new();
    output.read_line(&mut log).unwrap();
    agent.kill9();
    agent.restart();
    output.read_to_string(&mut log).unwrap();
    assert!(following.wait().unwrap().success());
    let expected: String = (1..=15).map(|number| format!("tick {number}\n")).collect();
    assert_eq!(log, expected);
}

#[test]
fn a_new_agent_puts_its_programs_behind_the_links_that_are_there() {
    let network = NetPair::new();
    let mut agent = Options::default().on(&network).start();
    agent.run("sleeper", &["--net", "50mbit"], &["tick", "600", "0"]);
    let before = links(&agent.bpffs_dir());
    agent.kill9();
    agent.restart();
    let after = links(&agent.bpffs_dir());

    let names = |links: &BTreeMap<String, Link>| links.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&before), names(&after));
    for (name, link) in &before {
        let now = after[name];
        assert_ne!(now.program, link.program, "{name} still has the old program");
        // The program of a tracing link cannot be replaced, so a second link takes its place.
        let is_cgroups =
            ["device_admission", "net_egress", "net_ingress", "pace_tcp"].contains(&name.as_str());
        let is_tracing = !is_cgroups && !name.starts_with("uplink");
        assert!(is_tracing || now.id == link.id, "{name} was attached anew");
    }
}

#[test]
fn what_an_agent_of_another_layout_left_is_taken_over_and_detached() {
    let network = NetPair::new();
    let mut agent = Options::default().on(&network).start();
    let sink = Sink::listen(&network.far, NetPair::FAR_V4);
    agent.run("upload", &["--net", "20mbit"], &["send", &sink.address(), "1"]);
    sink.wait_for_flows(1);
    agent.kill9();
    // As if it had been of layout 0, which no agent ever was.
    let (ours, others) = (format!("v{}", shaper_common::abi::LAYOUT), agent.bpffs_dir().join("v0"));
    fs::rename(agent.bpffs_dir().join(&ours), &others).unwrap();
    agent.restart();
    assert!(!others.exists() && agent.bpffs_dir().join(ours).exists());
    Window::pass(2 * SECOND);
    let used = agent.measure("upload", 2 * SECOND);
    assert_close("sent", used.egress, 20e6, 5.0);
    assert_close("the same, as it arrived", sink.rate(used.window), used.egress, 2.0);
}

#[test]
fn a_program_that_never_was_is_no_task_after_a_restart_either() {
    let mut agent = Agent::start();
    let answer = agent.shaper().call(&["run", "--id", "absent", "--user", "65534", "--", "/no/such/program"]);
    assert_eq!(answer.code, 127, "{}", answer.stderr);
    agent.kill9();
    agent.restart();
    assert_eq!(agent.shaper().wait("absent"), 127);
}

#[test]
fn an_agent_whose_uplink_is_gone_takes_up_its_tasks_all_the_same() {
    let network = NetPair::new();
    let mut agent = Options::default().on(&network).start();
    let hog = agent.run("hog", &["--cpu", "0.2"], &["spin"]);
    agent.kill9();
    network.near.ip(&["link", "delete", DEVICE]);
    agent.restart();
    assert_eq!(agent.shaper().get("hog").pid, hog.pid);
    assert_eq!(in_force(&agent.shaper().set("hog", &["--cpu", "0.3"]), "cpu").1, "0.3 cores");
}

/// The pinned maps are root's to write, and root is not always shaper.
#[test]
fn what_was_written_into_the_pinned_maps_meanwhile_is_put_right() {
    let network = NetPair::new();
    let mut agent = Options::default().on(&network).start();
    let sink = Sink::listen(&network.far, NetPair::FAR_V4);
    let task = agent.run("upload", &["--net", "20mbit"], &["send", &sink.address(), "1"]);
    sink.wait_for_flows(1);
    agent.kill9();

    let map = |name: &str| {
        let pin = agent.bpffs_dir().join(format!("v{LAYOUT}/maps/{name}"));
        MapData::from_pin(&pin).unwrap_or_else(|error| panic!("{}: {error}", pin.display()))
    };
    let number = |path: &str| fs::metadata(path).expect("it is there").ino();
    let mut table: HashMap<_, u64, u64> = HashMap::try_from(Map::HashMap(map("CGROUP_SLOT"))).unwrap();
    let entry = table.get(&number(&task.cgroup), 0).expect("the task is in the table");
    let slot = entry as u32;
    // Somebody else's cgroup is charged to the task, as one below it would be, and one to an account that nobody has.
    let others = [TestCgroup::new(), TestCgroup::new()];
    let others = others.each_ref().map(|group| number(&group.path().display().to_string()));
    table.insert(others[0], entry | 1 << 32, 0).unwrap();
    table.insert(others[1], u64::from(slot + 1), 0).unwrap();
    // And the task may send ten times as much.
    let mut pace: Array<_, [u8; size_of::<Pace>()]> = Array::try_from(Map::Array(map("PACE"))).unwrap();
    let mut value = pace.get(&slot, 0).unwrap();
    let rate = &mut value[offset_of!(Pace, rate)..][..8];
    let raised = u64::from_ne_bytes(rate.try_into().unwrap()) * 10;
    rate.copy_from_slice(&raised.to_ne_bytes());
    pace.set(slot, value, 0).unwrap();

    agent.restart();
    for other in others {
        assert!(table.get(&other, 0).is_err(), "{other} is in the table still");
    }
    assert_eq!(table.get(&number(&task.cgroup), 0).map(|entry| entry as u32).ok(), Some(slot));
    assert!(in_force(&agent.shaper().get("upload"), "net_egress").1.starts_with("20 Mbit/s"));
    Window::pass(SECOND);
    assert_close("sent by what was decided", sink.rate(Window::pass(3 * SECOND)), 20e6, 5.0);
}
