//! Cgroups that others make become tasks by rules.

use std::{
    fs,
    os::unix::fs::{MetadataExt, chown},
    path::{Path, PathBuf},
};

use shaper_core::task::{ExitStatus, Phase, TaskStatus};
use shaper_tests::{
    NOBODY,
    agent::{Agent, Options},
    cgroup::TestCgroup,
    shaper::in_force,
    time::eventually,
};
use tempfile::TempDir;

/// A file of rules for the cgroups of one test.
struct Rules {
    directory: TempDir,
    group: TestCgroup,
}

impl Rules {
    fn new() -> Rules {
        let directory = tempfile::tempdir().expect("a temporary directory can be made");
        Rules { directory, group: TestCgroup::new() }
    }

    fn file(&self) -> PathBuf {
        self.directory.path().join("rules.yaml")
    }

    /// The name of the test's cgroup.
    fn name(&self) -> String {
        self.group.path().file_name().expect("it has a name").to_string_lossy().into_owned()
    }

    /// Whole and new, as an editor does it.
    fn write(&self, text: &str) {
        let next = self.directory.path().join("next");
        fs::write(&next, text.replace("GROUP", &self.name())).expect("it is ours");
        fs::rename(next, self.file()).expect("it is ours");
    }

    fn agent(&self) -> Agent<'static> {
        Options::default().with(&["--adopt", &self.file().display().to_string()]).start()
    }
}

const JOBS: &str = "rules: [{name: jobs, select: {cgroup: GROUP/job-*}, task: {limits: {net: 20mbit}}}]";

fn find(agent: &Agent, id: &str) -> Option<TaskStatus> {
    agent.shaper().tasks().into_iter().find(|task| task.task_id.as_str() == id)
}

#[track_caller]
fn adopted(agent: &Agent, id: &str, attempt: u32) -> TaskStatus {
    let runs = || find(agent, id).filter(|task| task.phase == Phase::Running && task.attempt == attempt);
    eventually(&format!("{id} is adopted"), || runs().is_some());
    runs().expect("it is adopted")
}

/// A container's cgroup, as the cgroupfs driver of Docker makes it; its id begins with the number of this process.
fn container(above: &Path, number: u32) -> (PathBuf, String) {
    let id = format!("{:08x}{number:04x}{}", std::process::id(), "0".repeat(52));
    let path = above.join(&id);
    fs::create_dir_all(&path).expect("cgroups can be made");
    (path, format!("container-{}", &id[..12]))
}

#[test]
fn what_is_there_and_what_comes_is_adopted_and_ends_and_comes_again() {
    let rules = Rules::new();
    rules.write(
        "rules:\n- name: containers\n  select: {container: {runtime: docker}}\n  task:\n    namespace: shop\n    \
         labels: {tier: front}\n    limits: {net: 20mbit}\n    writers: report\n",
    );
    let docker = rules.group.make_child("docker");
    let (_, first) = container(&docker, 1);
    let agent = rules.agent();
    let task = adopted(&agent, &first, 1);
    assert!(in_force(&task, "net_egress").1.starts_with("20 Mbit/s"), "{task:?}");
    assert_eq!(task.adopted_by, "containers".parse().ok());
    let workload = task.workload.expect("a rule says what it is");
    assert_eq!((workload.namespace.as_str(), workload.labels["tier"].as_str()), ("shop", "front"));
    let shown = agent.shaper().ok(&["describe", &first]);
    assert!(shown.contains("By rule") && shown.contains("containers"), "{shown}");
    let usage = agent.shaper().usage_of(&first);
    assert_eq!(usage.workload.expect("it reaches the snapshot").labels["tier"], "front");
    assert_eq!(agent.shaper().ledger(&first)[0].cause.reason, "rule containers");

    let (path, second) = container(&docker, 2);
    adopted(&agent, &second, 1);
    // What is below a task is part of it.
    fs::create_dir(path.join("init")).expect("cgroups can be made");
    fs::remove_dir(path.join("init")).expect("it is empty");
    fs::remove_dir(&path).expect("it is empty");
    let ended = || find(&agent, &second).is_some_and(|task| task.phase != Phase::Running);
    eventually("the task has ended with its cgroup", ended);
    let phase = find(&agent, &second).expect("it is remembered").phase;
    assert!(matches!(phase, Phase::Ended { status: ExitStatus::Unknown, .. }), "{phase:?}");
    // A container that is started again has the same name, and is removed and made at once.
    for attempt in 2..5 {
        container(&docker, 2);
        adopted(&agent, &second, attempt);
        fs::remove_dir(&path).expect("it is empty");
    }
}

#[test]
fn a_name_that_anybody_could_have_made_is_not_believed() {
    let rules = Rules::new();
    rules.write(
        "rules:\n- {name: forged, select: {container: {runtime: podman}}}\n- {name: units, select: {unit: GROUP.service}}\n\
         - {name: mine, select: {cgroup: \"GROUP/theirs/mine-*\"}}\n",
    );
    let theirs = rules.group.make_child("theirs");
    chown(&theirs, Some(NOBODY), Some(NOBODY)).expect("root may");
    let forge = |number: u32| {
        let name = format!("libpod-{:08x}{number:04x}{}", std::process::id(), "0".repeat(52));
        fs::create_dir_all(theirs.join("libpod_parent").join(name)).expect("cgroups can be made");
    };
    forge(1);
    let agent = rules.agent();
    forge(2);
    fs::create_dir(theirs.join(rules.name() + ".service")).expect("cgroups can be made");
    // So many that whoever followed all of them would be busy.
    for number in 0..300 {
        fs::create_dir(theirs.join(format!("bomb-{number}"))).expect("cgroups can be made");
    }
    fs::create_dir(theirs.join("mine-1")).expect("cgroups can be made");
    adopted(&agent, "mine-1", 1);
    let cgroups: Vec<String> = agent.shaper().tasks().into_iter().map(|task| task.cgroup).collect();
    let inside = cgroups.iter().filter(|cgroup| Path::new(cgroup).starts_with(&theirs));
    assert_eq!(inside.collect::<Vec<_>>(), [&theirs.join("mine-1").display().to_string()]);
    // The same names where root alone could have made them.
    let service = rules.group.make_child(&(rules.name() + ".service"));
    let task = adopted(&agent, &rules.name(), 1);
    assert_eq!(task.cgroup, service.display().to_string());
}

#[test]
fn a_directory_that_is_given_away_while_the_agent_watches_is_not_believed_any_more() {
    let rules = Rules::new();
    rules.write(
        "rules:\n- {name: units, select: {unit: \"GROUP-*.service\"}}\n- {name: mine, select: {cgroup: GROUP/later/mine-*}}\n",
    );
    let agent = rules.agent();
    let later = rules.group.make_child("later");
    let unit = |number: u32| later.join(format!("{}-{number}.service", rules.name()));
    fs::create_dir(unit(1)).expect("cgroups can be made");
    adopted(&agent, &format!("{}-1", rules.name()), 1);
    chown(&later, Some(NOBODY), Some(NOBODY)).expect("root may");
    fs::create_dir(unit(2)).expect("cgroups can be made");
    fs::create_dir(later.join("mine-1")).expect("cgroups can be made");
    adopted(&agent, "mine-1", 1);
    assert!(find(&agent, &format!("{}-2", rules.name())).is_none());
}

#[test]
fn a_name_that_is_somebody_elses_stays_theirs() {
    let rules = Rules::new();
    rules.write(JOBS);
    let agent = rules.agent();
    agent.run("job-1", &[], &["tick", "600", "0"]);
    let path = rules.group.make_child("job-1").display().to_string();
    let beside = || agent.shaper().tasks().into_iter().find(|task| task.cgroup == path);
    eventually("it is adopted under another name", || beside().is_some());
    let task = beside().expect("it is adopted");
    assert!(task.task_id.as_str().starts_with("job-1-"), "{task:?}");
    let theirs = find(&agent, "job-1").expect("it is as it was");
    assert_eq!((theirs.attempt, theirs.adopted_by, theirs.phase), (1, None, Phase::Running));
}

#[test]
fn an_agent_that_was_killed_finds_what_ended_and_what_came_meanwhile() {
    let rules = Rules::new();
    rules.write(JOBS);
    let (kept, gone) = (rules.group.make_child("job-kept"), rules.group.make_child("job-gone"));
    let mut agent = rules.agent();
    adopted(&agent, "job-kept", 1);
    adopted(&agent, "job-gone", 1);
    agent.kill9();
    fs::remove_dir(&gone).expect("it is empty");
    rules.group.make_child("job-new");
    agent.restart();
    adopted(&agent, "job-new", 1);
    let task = adopted(&agent, "job-kept", 1);
    assert_eq!((task.adopted_by, task.cgroup), ("jobs".parse().ok(), kept.display().to_string()));
    assert_ne!(find(&agent, "job-gone").expect("it is remembered").phase, Phase::Running);
}

#[test]
fn a_file_that_is_wrong_leaves_the_rules_as_they_were() {
    let rules = Rules::new();
    rules.write(JOBS);
    let agent = rules.agent();
    rules.write("rules: [{name: jobs, select: {cgroup: GROUP/job-*, unit: a}}]");
    let log = || agent.said();
    eventually("the agent says so", || log().contains("has cgroup and unit, of which it can have one"));
    rules.group.make_child("job-1");
    adopted(&agent, "job-1", 1);
    rules.write("rules: [{name: others, select: {cgroup: GROUP/other-*}}]");
    rules.group.make_child("other-1");
    assert_eq!(adopted(&agent, "other-1", 1).adopted_by, "others".parse().ok());
    // What was adopted by a rule that is gone stays.
    adopted(&agent, "job-1", 1);
}

#[test]
fn what_was_released_is_left_alone_until_it_is_made_anew() {
    let rules = Rules::new();
    rules.write(JOBS);
    let first = rules.group.make_child("job-1");
    let agent = rules.agent();
    adopted(&agent, "job-1", 1);
    agent.shaper().ok(&["release", "job-1"]);
    // The rules are read again, and all is looked through.
    rules.write(&format!("# once more\n{JOBS}"));
    eventually("they are read", || agent.said().contains("the rules of adoption have changed"));
    rules.group.make_child("job-2");
    adopted(&agent, "job-2", 1);
    assert!(find(&agent, "job-1").is_none());
    let before = fs::metadata(&first).expect("it is there").ino();
    fs::remove_dir(&first).expect("it is empty");
    rules.group.make_child("job-1");
    assert_ne!(fs::metadata(&first).expect("it is there").ino(), before);
    adopted(&agent, "job-1", 1);
}

#[test]
fn a_check_says_what_would_be_adopted_and_adopts_nothing() {
    let rules = Rules::new();
    rules.write(JOBS);
    let job = rules.group.make_child("job-1");
    rules.group.make_child("other");
    let agent = Agent::start();
    let check = |file: &Path| {
        let mut command = std::process::Command::new(shaper_tests::bins::binary("shaper-agent"));
        command.args(["adoption", "--check"]).arg(file).output().expect("the agent can be run")
    };
    let output = check(&rules.file());
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let expected = format!("jobs\tjob-1\t{}/job-1\n", rules.name());
    assert_eq!((said, job.exists()), (expected, true));
    assert!(agent.shaper().tasks().is_empty());
    rules.write("rules: [{name: jobs, select: {cgroup: GROUP/job-*}, task: {limits: {net: fast}}}]");
    let output = check(&rules.file());
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        !output.status.success() && said.contains("^^^^") && said.contains("help: write it with a unit"),
        "{said}"
    );
}
