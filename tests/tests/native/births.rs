//! Containers that wait to be started, as a runtime's hook tells of them.

use std::{
    fs,
    io::Write,
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::Path,
    process::{Child, Command, Output, Stdio},
};

use serde_json::json;
use shaper_core::task::TaskStatus;
use shaper_tests::{
    NOBODY,
    agent::{Agent, Options},
    bins::binary,
    cgroup::{TestCgroup, read},
    shaper::in_force,
    time::eventually,
};
use tempfile::TempDir;

/// A node with one rule for containers below a cgroup of the test's.
struct Host {
    /// First: it is released while its rules are there.
    agent: Agent<'static>,
    group: TestCgroup,
    directory: TempDir,
}

impl Host {
    fn new(fail: &str, rules: &str) -> Host {
        let (directory, group) =
            (tempfile::tempdir().expect("a temporary directory can be made"), TestCgroup::new());
        let name = group.path().file_name().expect("it has a name").to_string_lossy().into_owned();
        let file = directory.path().join("rules.yaml");
        fs::write(&file, rules.replace("GROUP", &name)).expect("it is ours");
        let agent = Options::default().with(&["--adopt", &file.display().to_string()]).start();
        let settings = format!("runtime: /bin/true\nagent: {}\nfail: {fail}\n", agent.socket().display());
        fs::write(directory.path().join("runtime.yaml"), settings).expect("it is ours");
        Host { agent, group, directory }
    }

    /// What a hook is started with, as `uid`, for a container whose first process is that.
    fn admit_as(&self, uid: u32, pid: u32, annotations: &serde_json::Value) -> Output {
        let state = json!({ "ociVersion": "1.0.2", "id": "c", "status": "creating", "pid": pid, "annotations": annotations });
        let mut command = Command::new(binary("shaper-runtime"));
        command
            .arg(format!("--shaper-config={}", self.directory.path().join("runtime.yaml").display()))
            .arg("admit");
        command.env_clear().stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.uid(uid).spawn().expect("it can be started");
        let mut input = child.stdin.take().expect("it is piped");
        input.write_all(state.to_string().as_bytes()).expect("it reads");
        drop(input);
        child.wait_with_output().expect("it ends")
    }

    #[track_caller]
    fn admitted(&self, pid: u32, annotations: &serde_json::Value) {
        let said = self.admit_as(0, pid, annotations);
        assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
    }

    #[track_caller]
    fn refused(&self, pid: u32, annotations: &serde_json::Value) -> String {
        let said = self.admit_as(0, pid, annotations);
        assert!(!said.status.success());
        String::from_utf8(said.stderr).expect("it is UTF-8")
    }

    fn find(&self, cgroup: &Path) -> Option<TaskStatus> {
        let path = cgroup.display().to_string();
        self.agent.shaper().tasks().into_iter().find(|task| task.cgroup == path)
    }
}

/// A process that waits in a cgroup.
struct Waits(Child);

impl Waits {
    fn within(group: &Path) -> Waits {
        let waits = Waits(TestCgroup::run(group, None, &["tick", "6000", "0"]));
        let pid = waits.0.id().to_string();
        eventually("it is in its cgroup", || read(group, "cgroup.procs").lines().any(|line| line == pid));
        waits
    }
}

impl Drop for Waits {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

const JOBS: &str = "rules: [{name: jobs, select: {cgroup: GROUP/job-*}, task: {limits: {net: 20mbit}}}]";

#[test]
fn what_is_decided_is_in_force_when_the_hook_returns_and_annotations_only_take_away() {
    let host = Host::new("closed", JOBS);
    for (name, annotations, expected, wants_more) in [
        ("job-1", json!({}), "20 Mbit/s", false),
        ("job-2", json!({ "shaper/limit.net": "5mbit", "other": "x" }), "5 Mbit/s", false),
        ("job-3", json!({ "shaper/limit.net": "1gbit" }), "20 Mbit/s", true),
    ] {
        let group = host.group.make_child(name);
        let waits = Waits::within(&group);
        host.admitted(waits.0.id(), &annotations);
        // Nobody waits for it: it was so when the hook ended, whether this or the look at the directories came first.
        let task = host.find(&group).expect("it is adopted");
        assert!(in_force(&task, "net_egress").1.starts_with(expected), "{task:?}");
        assert_eq!(task.adopted_by, "jobs".parse().ok());
        assert_eq!(
            task.notes.iter().any(|note| note.contains("ask for more than rule `jobs`")),
            wants_more,
            "{task:?}"
        );
    }
    // Released, it is its runtime's, also where that starts something in it again.
    let group = host.group.path().join("job-1");
    host.agent.shaper().ok(&["release", "job-1"]);
    let waits = Waits::within(&group);
    host.admitted(waits.0.id(), &json!({}));
    assert!(host.find(&group).is_none());
}

#[test]
fn what_no_rule_takes_is_started_and_what_is_above_is_taken_whole() {
    let host = Host::new("closed", JOBS);
    let other = Waits::within(&host.group.make_child("other"));
    host.admitted(other.0.id(), &json!({}));
    assert!(host.agent.shaper().tasks().is_empty());
    // A pod's container does not decide for the pod.
    let pod = host.group.make_child("job-pod");
    let inner = pod.join("first");
    fs::create_dir(&inner).expect("cgroups can be made");
    let waits = Waits::within(&inner);
    host.admitted(waits.0.id(), &json!({ "shaper/limit.net": "1mbit" }));
    let task = host.find(&pod).expect("it is adopted");
    assert!(in_force(&task, "net_egress").1.starts_with("20 Mbit/s"), "{task:?}");
    assert!(host.find(&inner).is_none());
}

#[test]
fn what_is_wrong_or_anothers_is_refused_with_the_reason() {
    let host = Host::new("closed", JOBS);
    let group = host.group.make_child("job-1");
    let waits = Waits::within(&group);
    let said = host.refused(waits.0.id(), &json!({ "shaper/limit.cpus": "1" }));
    assert!(said.contains("there is no annotation `shaper/limit.cpus`"), "{said}");
    let said = host.refused(waits.0.id(), &json!({ "shaper/limit.net": "fast" }));
    assert!(said.contains("shaper/limit.net") && said.contains("100mbit"), "{said}");
    let mut ended = Command::new("/bin/true").spawn().expect("it can be started");
    ended.wait().expect("it ends");
    let said = host.refused(ended.id(), &json!({}));
    assert!(said.contains("cannot tell the cgroup of process"), "{said}");

    fs::set_permissions(host.directory.path(), fs::Permissions::from_mode(0o755)).expect("it is ours");
    let said = host.admit_as(NOBODY, waits.0.id(), &json!({}));
    let text = String::from_utf8_lossy(&said.stderr).into_owned();
    assert!(!said.status.success() && text.contains("the agent: "), "{text}");
}

#[test]
fn an_agent_without_rules_says_so() {
    let host = Host::new("closed", JOBS);
    let agent = Agent::start();
    let settings = format!("runtime: /bin/true\nagent: {}\nfail: closed\n", agent.socket().display());
    fs::write(host.directory.path().join("runtime.yaml"), settings).expect("it is ours");
    let waits = Waits::within(&host.group.make_child("job-1"));
    let said = host.refused(waits.0.id(), &json!({}));
    assert!(said.contains("start it with --adopt FILE"), "{said}");
}
