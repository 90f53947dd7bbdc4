//! Taking over a cgroup that another manager made.

use std::{fs, path::Path, time::Duration};

use shaper_core::task::{ExitStatus, Phase};
use shaper_tests::{
    agent::{Agent, Options},
    assert_close,
    cgroup::{TestCgroup, cpu_time, mounts, read},
    net::NetPair,
    shaper::{REFUSED, in_force},
    sink::Sink,
    time::{Window, eventually},
};

const SECOND: Duration = Duration::from_secs(1);

#[track_caller]
fn assert_refused(agent: &Agent, path: &Path, reason: &str) {
    let path = path.display().to_string();
    let said = agent.shaper().refused(&["adopt", &path, "--id", "second", "--net", "1mbit"]);
    assert!(said.contains(reason), "adopting {path} was refused with: {said}");
}

#[test]
fn old_sockets_and_cgroups_below_made_before_and_after_are_limited_and_counted_together() {
    let network = NetPair::new();
    let agent = Options::default().on(&network).start();
    let sink = Sink::listen(&network.far, NetPair::FAR_V4);
    let group = TestCgroup::new();
    let older = group.make_child("older");
    let mut first = TestCgroup::run(&older, Some(&network.near), &["send", &sink.address(), "1"]);
    sink.wait_for_flows(1);
    let free = sink.rate(Window::pass(SECOND / 2));
    assert!(free > 5.0 * 20e6, "{free:.0} bit/s before the adoption");

    agent.adopt("service", group.path(), &["--net", "20mbit"]);
    // What was on its way is a debt that is saved again first.
    Window::pass(3 * SECOND);
    let used = agent.measure("service", 2 * SECOND);
    assert_close("sent on a socket older than the adoption", used.egress, 20e6, 3.0);
    assert_close("the same, as it arrived", sink.rate(used.window), used.egress, 1.5);

    let younger = group.make_child("younger");
    let mut second = TestCgroup::run(&younger, Some(&network.near), &["send", &sink.address(), "1"]);
    sink.wait_for_flows(2);
    Window::pass(SECOND);
    let before = sink.by_connection();
    let used = agent.measure("service", 3 * SECOND);
    let sent: Vec<u64> =
        sink.by_connection().iter().zip(&before).map(|(after, before)| after - before).collect();
    assert!(sent.iter().all(|bytes| *bytes > 500_000), "by connection: {sent:?}");
    assert_close("sent by both", used.egress, 20e6, 3.0);
    assert_close("the same, as it arrived", sink.rate(used.window), used.egress, 1.5);

    agent.shaper().ok(&["release", "service"]);
    let free = sink.rate(Window::pass(SECOND));
    assert!(free > 5.0 * 20e6, "{free:.0} bit/s after the release");
    for child in [&mut first, &mut second] {
        assert!(child.try_wait().unwrap().is_none(), "a process of the adopted cgroup has ended");
        child.kill().and_then(|()| child.wait()).unwrap();
    }
}

#[test]
fn an_adopted_cgroup_is_still_managed_after_a_restart() {
    let mut agent = Agent::start();
    let group = TestCgroup::new();
    agent.adopt("service", group.path(), &["--net", "20mbit"]);
    agent.kill9();
    agent.restart();
    let task = agent.shaper().get("service");
    assert!(in_force(&task, "net_egress").1.starts_with("20 Mbit/s"), "{task:?}");
    let child = group.make_child("child");
    let mut hog = TestCgroup::run(&child, None, &["spin"]);
    eventually("the hog runs", || !cpu_time(&child).is_zero());
    let counted = agent.measure("service", SECOND).cores;
    hog.kill().and_then(|()| hog.wait()).unwrap();
    assert!(counted > 0.1, "{counted} cores of a child that came after the restart");
}

#[test]
fn an_adopted_cgroup_that_is_removed_has_ended() {
    let agent = Agent::start();
    let group = TestCgroup::new();
    agent.adopt("service", group.path(), &[]);
    drop(group);
    eventually("the task has ended", || agent.shaper().get("service").phase != Phase::Running);
    assert!(matches!(agent.shaper().get("service").phase, Phase::Ended { status: ExitStatus::Unknown, .. }));
}

#[test]
fn an_adopted_cgroup_is_not_cancelled_and_has_no_log() {
    let agent = Agent::start();
    let group = TestCgroup::new();
    agent.adopt("service", group.path(), &[]);
    assert!(agent.shaper().refused(&["cancel", "service"]).contains("shaper release service"));
    assert!(agent.shaper().refused(&["logs", "service"]).contains("was adopted"));
}

#[test]
fn a_cgroup_that_lies_too_deep_is_refused_and_the_one_above_is_not() {
    let agent = Agent::start();
    let group = TestCgroup::new();
    let deepest = (2..=16).fold(group.path().to_owned(), |above, level| above.join(level.to_string()));
    fs::create_dir_all(deepest.join("17")).unwrap();
    assert_refused(&agent, &deepest.join("17"), "lies 17 levels below");
    agent.adopt("deep", &deepest, &[]);
}

#[test]
fn a_cgroup_belongs_to_one_task() {
    let agent = Agent::start();
    let group = TestCgroup::new();
    let middle = group.make_child("middle");
    let below = group.make_child("middle/below");
    agent.adopt("service", &middle, &[]);
    for overlapping in [&middle, &below, group.path()] {
        assert_refused(&agent, overlapping, "a cgroup belongs to one task");
    }
    let task = agent.run("any", &[], &["tick", "600", "0"]);
    for own in [Path::new(&task.cgroup), &agent.cgroup_root(), &agent.cgroup_root().join("agent")] {
        assert_refused(&agent, own, "is the agent's own");
    }
}

#[test]
fn what_is_no_cgroup_of_this_host_is_not_adopted() {
    let agent = Agent::start();
    let group = TestCgroup::new();
    let link = agent.directory().join("link");
    std::os::unix::fs::symlink(group.path(), &link).unwrap();
    assert_refused(&agent, &mounts().0, "the root of the hierarchy");
    assert_refused(&agent, Path::new("/tmp"), "not below");
    assert_refused(&agent, &link, "not below");
    assert_refused(&agent, &group.path().join("absent"), "cannot open the cgroup");
    assert!(agent.shaper().tasks().is_empty());
}

#[test]
fn a_path_with_dots_leads_to_nothing_that_is_refused_by_its_name() {
    let agent = Agent::start();
    let group = TestCgroup::new();
    agent.run("any", &[], &["tick", "600", "0"]);
    // Each is another spelling of what may not be adopted.
    let own = Path::new("..").join(agent.name());
    for path in [group.path().join(".."), group.path().join(&own), group.path().join(own.join("agent"))] {
        let said = agent.shaper().call(&["adopt", &path.display().to_string(), "--id", "dots"]);
        assert_eq!(said.code, REFUSED, "{} was adopted", path.display());
    }
}

#[test]
fn a_limit_that_no_controller_of_this_host_can_hold_is_refused_with_the_reason() {
    let (v2, _) = mounts();
    if read(&v2, "cgroup.controllers").split(' ').any(|name| name == "cpu") {
        return; // A unified host: the VM's tests limit an adopted cgroup there.
    }
    let agent = Agent::start();
    let group = TestCgroup::new();
    let path = group.path().display().to_string();
    let said = agent.shaper().refused(&["adopt", &path, "--id", "service", "--cpu", "0.5", "--net", "1mbit"]);
    assert!(said.contains("shaper doctor"), "{said}");
    assert!(agent.shaper().tasks().is_empty());
}
