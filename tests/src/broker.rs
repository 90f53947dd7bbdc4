//! The real broker, in a place of its own, and what it tells of tasks and nodes.

use std::{
    fs::{self, OpenOptions, Permissions},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command},
    thread,
};

use rustix::process::{Pid, Signal, kill_process};
use serde::Deserialize;
use shaper_core::{
    gpu::{CardOffer, CardSet},
    spec::{Capacity, Decision, DecisionKind, Demand, TaskSpec},
    task::{ExitStatus, Owner, TaskStatus, UnixNanos},
};
use tempfile::TempDir;

use crate::{
    agent::{aborted, answers},
    bins::binary,
    shaper::{Shaper, parse},
    time::{PATIENCE, eventually, happens},
};

/// A broker with a socket and a state of its own.
pub struct Broker {
    directory: TempDir,
    arguments: Vec<String>,
    server: Option<Child>,
}

/// A task as the broker tells it.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClusterTask {
    /// What was submitted.
    pub spec: TaskSpec,
    /// By whom.
    pub owner: Owner,
    /// The latest.
    pub attempt: u32,
    /// Where it is.
    pub phase: ClusterPhase,
    /// Of the latest attempt.
    pub node: Option<String>,
    /// When it came.
    pub submitted_at: UnixNanos,
    /// Of the latest change.
    pub revision: u64,
    /// Whether it is to end.
    pub cancel_requested: bool,
    /// As its node told.
    pub on_node: Option<TaskStatus>,
    /// What is reserved for it, if that is not what it asked for.
    #[serde(default)]
    pub reserved: Option<Demand>,
    /// The GPU cards that it has.
    #[serde(default)]
    pub gpu_cards: CardSet,
}

/// Where a task is.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClusterPhase {
    /// On no node.
    Pending {
        /// Why.
        reason: String,
    },
    /// Assigned.
    Starting {
        /// To which node.
        node: String,
    },
    /// Running.
    Running {
        /// On which node.
        node: String,
    },
    /// Over.
    Ended {
        /// How.
        status: ExitStatus,
        /// When.
        at: UnixNanos,
    },
    /// Over by request.
    Cancelled,
}

impl ClusterTask {
    /// Its id.
    pub fn id(&self) -> &str {
        self.spec.profile.task_id.as_str()
    }

    /// Whether it runs, as far as the broker knows.
    pub fn runs(&self) -> bool {
        matches!(self.phase, ClusterPhase::Running { .. })
    }

    /// Whether it waits.
    pub fn is_pending(&self) -> bool {
        matches!(self.phase, ClusterPhase::Pending { .. })
    }

    /// How it ended, if it has.
    pub fn ended(&self) -> Option<&ExitStatus> {
        match &self.phase {
            ClusterPhase::Ended { status, .. } => Some(status),
            _ => None,
        }
    }
}

/// A node as the broker tells it.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeStatus {
    /// Its name.
    pub name: String,
    /// Whether its agent is there.
    pub connected: bool,
    /// What it has.
    pub capacity: Capacity,
    /// What is reserved of it.
    pub reserved: Capacity,
    /// In thousandths.
    pub cpu_utilisation_permille: u32,
    /// Of the agent.
    pub agent_socket: Option<String>,
    /// Of the machine.
    pub boot_id: String,
    /// By whom, if it takes no tasks.
    pub cordoned_by: Option<String>,
    /// Those that it has are to go.
    pub drains: bool,
    /// The GPU cards that it offers.
    #[serde(default)]
    pub gpus: Option<CardOffer>,
    /// Those of which tasks have something.
    #[serde(default)]
    pub gpu_cards_taken: CardSet,
}

impl Broker {
    /// One that root alone may use.
    pub fn start() -> Broker {
        Broker::start_with(&[])
    }

    /// One with these arguments as well.
    pub fn start_with(arguments: &[&str]) -> Broker {
        let directory = tempfile::Builder::new().prefix("shaper-test-broker-").tempdir();
        let directory = directory.expect("a temporary directory can be made");
        // Callers of any user find the command there.
        fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).expect("it is ours");
        fs::copy(binary("shaper"), directory.path().join("shaper")).expect("shaper can be copied");
        let arguments = arguments.iter().map(|&argument| argument.to_owned()).collect();
        let mut broker = Broker { directory, arguments, server: None };
        broker.restart();
        broker
    }

    /// Where everything of it is.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Its process, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.server.as_ref().map(Child::id)
    }

    /// Its socket.
    pub fn socket(&self) -> PathBuf {
        self.directory().join("broker.sock")
    }

    /// Its state.
    pub fn state_dir(&self) -> PathBuf {
        self.directory().join("state")
    }

    /// The command for it, as root.
    pub fn shaper(&self) -> Shaper {
        self.shaper_as(0)
    }

    /// The command for it, as that user and the group of the same number.
    pub fn shaper_as(&self, uid: u32) -> Shaper {
        Shaper::of_broker(&self.directory().join("shaper"), &self.socket(), uid)
    }

    /// Starts it again, where it was.
    pub fn restart(&mut self) {
        self.launch(None);
    }

    /// Starts it again; it aborts at that place, the first time.
    pub fn restart_to_die_at(&mut self, failpoint: &str) {
        self.launch(Some(failpoint));
    }

    fn launch(&mut self, failpoint: Option<&str>) {
        assert!(self.server.is_none(), "the broker runs");
        let log = OpenOptions::new().create(true).append(true).open(self.log());
        let mut command = Command::new(binary("shaper-broker"));
        command.arg("--listen").arg(self.socket()).arg("--state-dir").arg(self.state_dir());
        command.args(&self.arguments).env("RUST_LOG", "info");
        command.envs(failpoint.map(|place| ("SHAPER_FAILPOINT", place)));
        command.stderr(log.expect("the broker's log can be written"));
        let mut server = command.spawn().expect("shaper-broker can be started");
        answers(&mut server, "shaper-broker", &self.socket(), || self.said());
        self.server = Some(server);
    }

    /// Kills it.
    pub fn kill9(&mut self) {
        let mut server = self.server.take().expect("the broker runs");
        kill_process(Pid::from_child(&server), Signal::KILL).expect("it is not reaped yet");
        server.wait().expect("a child can be waited for");
    }

    /// Waits until it has aborted by itself.
    #[track_caller]
    pub fn wait_for_abort(&mut self) {
        let mut server = self.server.take().expect("the broker runs");
        aborted(&mut server, "shaper-broker");
    }

    /// Sets a policy, in YAML.
    #[track_caller]
    pub fn apply(&self, policy: &str) {
        let answer = self.shaper().call_with(&["apply", "-f", "-"], policy.as_bytes());
        assert_eq!(answer.code, 0, "{}", answer.stderr);
    }

    /// Every task.
    #[track_caller]
    pub fn tasks(&self) -> Vec<ClusterTask> {
        self.tasks_as(0)
    }

    /// Every task that a user sees.
    #[track_caller]
    pub fn tasks_as(&self, uid: u32) -> Vec<ClusterTask> {
        parse(&self.shaper_as(uid).ok(&["get", "tasks", "--output", "json"]))
    }

    /// One task.
    #[track_caller]
    pub fn task(&self, id: &str) -> ClusterTask {
        let tasks: Vec<ClusterTask> = parse(&self.shaper().ok(&["get", "tasks", id, "--output", "json"]));
        tasks.into_iter().next().expect("one task was asked for")
    }

    /// Every node.
    #[track_caller]
    pub fn nodes(&self) -> Vec<NodeStatus> {
        parse(&self.shaper().ok(&["get", "nodes", "--output", "json"]))
    }

    /// What was decided about a task.
    #[track_caller]
    pub fn decisions(&self, id: &str) -> Vec<Decision> {
        parse(&self.shaper().ok(&["explain", id, "--output", "json"]))
    }

    /// The same, the kinds alone.
    #[track_caller]
    pub fn kinds(&self, id: &str) -> Vec<DecisionKind> {
        self.decisions(id).into_iter().map(|decision| decision.kind).collect()
    }

    /// Waits until a task is as wanted.
    #[track_caller]
    pub fn wait_until(&self, id: &str, what: &str, is: impl Fn(&ClusterTask) -> bool) -> ClusterTask {
        let mut task = None;
        let happened = happens(|| {
            // It may not have been submitted yet.
            task = self.tasks().into_iter().find(|task| task.id() == id);
            task.as_ref().is_some_and(&is)
        });
        match task {
            Some(task) if happened => task,
            task => {
                let decisions = task.is_some().then(|| self.decisions(id));
                panic!("{id} is not {what} within {PATIENCE:?}: {task:#?}\n{decisions:#?}");
            }
        }
    }

    /// Waits until that node is connected, or is not.
    #[track_caller]
    pub fn wait_for_node(&self, name: &str, connected: bool) {
        eventually(&format!("{name} is connected: {connected}"), || {
            self.nodes().iter().any(|node| node.name == name && node.connected == connected)
        });
    }

    fn log(&self) -> PathBuf {
        self.directory().join("broker.log")
    }

    /// What it has logged.
    pub fn said(&self) -> String {
        fs::read_to_string(self.log()).unwrap_or_default()
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        if self.server.is_some() {
            self.kill9();
        }
        if thread::panicking() {
            eprintln!("--- the broker's log:\n{}---", self.said());
        }
    }
}
