//! One cgroup whose limits change: a task that shaper starts, or what it adopts.

use std::path::{Path, PathBuf};

use shaper_agent::kernel::hierarchy::Hierarchies;
use shaper_core::{
    limits::{Limit, Limits},
    task::{Phase, TaskStatus},
    units::{Bytes, Millicores, Weight},
};

use super::Call;
use crate::{
    agent::Agent,
    cgroup::{TestCgroup, controller_group, read, write},
    process::Process,
    random::Random,
};

/// The quota of all tasks together where the kernel refuses one above it, µs a period.
pub(super) const BOUND: u64 = 150_000;
const ABOVE_BOUND: &str = "1.6";

/// What an adopted cgroup has before and after, in the order of [`Files::read`].
const BASELINE: [&str; 4] = ["30000 100000", "10000", "77", "104857600"];
const FILES: [&str; 4] = ["cpu.max", "cpu.max.burst", "cpu.weight", "memory.max"];

/// What is asked of a subject.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Free,
    Held(Limits),
}

pub(super) enum Origin {
    /// With how many there were before.
    Launched {
        count: u32,
        process: Option<Process>,
        cgroup: Option<String>,
    },
    Adopted(TestCgroup),
}

impl Origin {
    /// Whether the limits of a cgroup that others made can be changed here.
    pub(super) fn can_be_adopted() -> bool {
        Hierarchies::detect().ok().flatten().is_some_and(|hierarchies| hierarchies.v1.is_empty())
    }
}

pub(super) struct Subject {
    number: u32,
    origin: Origin,
    state: State,
    /// What it may be instead, as nobody knows whether that was decided.
    maybe: Option<State>,
}

/// The files of its limits.
struct Files {
    cpu: (PathBuf, bool),
    memory: (PathBuf, bool),
}

impl Files {
    fn of_group(group: &Path) -> Files {
        Files { cpu: (group.to_owned(), false), memory: (group.to_owned(), false) }
    }

    fn of_process(pid: u32) -> Files {
        Files { cpu: controller_group(pid, "cpu"), memory: controller_group(pid, "memory") }
    }

    fn read(&self) -> [String; 4] {
        let [max, burst, weight, memory] = FILES;
        let (group, is_v1) = &self.cpu;
        let [max, burst, weight] = if *is_v1 {
            ["cpu.cfs_quota_us", "cpu.cfs_burst_us", "cpu.shares"]
        } else {
            [max, burst, weight]
        }
        .map(|file| read(group, file));
        let (group, is_v1) = &self.memory;
        [max, burst, weight, read(group, if *is_v1 { "memory.limit_in_bytes" } else { memory })]
    }

    /// What they say under these limits.
    fn expected(&self, limits: &Limits) -> [String; 4] {
        let quota = limits.cpu.at().map_or(0, |Millicores(milli)| milli * 100);
        let weight = limits.cpu_weight.map_or(0, Weight::get);
        let memory = limits.memory.at().map_or(0, |Bytes(bytes)| bytes);
        let [max, weight] = match self.cpu.1 {
            true => [quota.to_string(), (weight * 1024 / 100).to_string()],
            false => [format!("{quota} 100000"), weight.to_string()],
        };
        [max, quota.to_string(), weight, memory.to_string()]
    }
}

impl Subject {
    pub(super) fn launched(number: u32) -> Subject {
        Subject::new(number, Origin::Launched { count: 0, process: None, cgroup: None })
    }

    pub(super) fn adopted(number: u32) -> Subject {
        let group = TestCgroup::new();
        for (file, value) in FILES.iter().zip(BASELINE) {
            write(group.path(), file, value);
        }
        Subject::new(number, Origin::Adopted(group))
    }

    fn new(number: u32, origin: Origin) -> Subject {
        Subject { number, origin, state: State::Free, maybe: None }
    }

    pub(super) fn state(&self) -> State {
        self.state
    }

    /// Whether it is a task that shaper has started: of one that it has adopted, what others write is put back at the end.
    pub(super) fn is_surely_launched(&self) -> bool {
        self.maybe.is_none() && self.state != State::Free && self.pid().is_some()
    }

    pub(super) fn id(&self) -> String {
        match &self.origin {
            Origin::Launched { count, .. } => format!("task-{}-{count}", self.number),
            Origin::Adopted(_) => format!("service-{}", self.number),
        }
    }

    /// Whether a quota of all tasks together bounds its own.
    pub(super) fn is_bounded(&self) -> bool {
        matches!(self.origin, Origin::Launched { .. })
    }

    pub(super) fn pid(&self) -> Option<u32> {
        match &self.origin {
            Origin::Launched { process, .. } => process.as_ref().map(Process::pid),
            Origin::Adopted(_) => None,
        }
    }

    /// What its cgroup is called, if shaper made it.
    pub(super) fn name_of_cgroup(&self) -> Option<String> {
        match &self.origin {
            Origin::Launched { cgroup, .. } if self.state != State::Free => cgroup.clone(),
            _ => None,
        }
    }

    fn files(&self) -> Option<Files> {
        match &self.origin {
            Origin::Launched { process, .. } => {
                process.as_ref().map(|process| Files::of_process(process.pid()))
            }
            Origin::Adopted(group) => Some(Files::of_group(group.path())),
        }
    }

    pub(super) fn start(&self, agent: &Agent, random: &mut Random) -> (Vec<String>, State) {
        let (options, limits) = limits(&Limits::default(), 0b111, random);
        let arguments = match &self.origin {
            Origin::Launched { .. } => {
                let user = format!("{0}:{0}", crate::NOBODY);
                let run = ["run", "--detach", "--id", &self.id(), "--user", &user].map(str::to_owned);
                let task = ["--".to_owned(), agent.load(), "tick".to_owned(), "60000".into(), "0".into()];
                [&run[..], &options, &task].concat()
            }
            Origin::Adopted(group) => {
                let group = group.path().display().to_string();
                [&["adopt".to_owned(), group, "--id".into(), self.id()][..], &options].concat()
            }
        };
        (arguments, State::Held(limits))
    }

    pub(super) fn set(&self, before: &Limits, random: &mut Random) -> (Vec<String>, State) {
        let which = 1 + random.below(7);
        let (options, after) = limits(before, which, random);
        ([&["set".to_owned(), self.id()][..], &options].concat(), State::Held(after))
    }

    /// A quota above the bound: the kernel refuses it.
    pub(super) fn set_in_vain(&self) -> Vec<String> {
        ["set", &self.id(), "--cpu", ABOVE_BOUND, "--cpu-weight", "400"].map(str::to_owned).into()
    }

    /// It was asked for `after`, and that was the answer.
    pub(super) fn asked(&mut self, after: State, call: Call) {
        match call {
            Call::Done | Call::DoneAtLast => (self.state, self.maybe) = (after, None),
            Call::Refused => {}
            Call::Lost => self.maybe = Some(after),
        }
    }

    /// It runs, says the agent.
    pub(super) fn has_started(&mut self, agent: &Agent) {
        let status = agent.shaper().get(&self.id());
        self.note_process(&status, agent);
    }

    fn note_process(&mut self, status: &TaskStatus, agent: &Agent) {
        if let Origin::Launched { process, cgroup, .. } = &mut self.origin
            && process.is_none()
        {
            agent.ends_with_me(status);
            *process = Some(agent.process(status));
            *cgroup = Path::new(&status.cgroup).file_name().map(|name| name.to_string_lossy().into_owned());
        }
    }

    /// The agent is back, and says what there is: that is one of the two that are possible.
    pub(super) fn settle(&mut self, tasks: &[TaskStatus], agent: &Agent) {
        let id = self.id();
        let found = tasks.iter().find(|task| task.task_id.as_str() == id && task.phase == Phase::Running);
        let says = found.map_or(State::Free, |task| State::Held(task.limits));
        assert!(
            says == self.state || Some(says) == self.maybe,
            "{id} is {says:?}, and not {:?} or {:?}; the agent said: {}",
            self.state,
            self.maybe,
            agent.said()
        );
        (self.state, self.maybe) = (says, None);
        if let Some(task) = found {
            self.note_process(task, agent);
        }
    }

    /// Its files are at what was decided, or as they were found.
    pub(super) fn assert_as_decided(&mut self, agent: &Agent) {
        let id = self.id();
        match (self.state, self.files(), &mut self.origin) {
            (State::Held(limits), Some(files), _) => {
                let ledger = || agent.shaper().call(&["ledger", &id]).stdout;
                assert_eq!(files.read(), files.expected(&limits), "{id}; the ledger has: {}", ledger());
            }
            (State::Held(_), None, _) => panic!("{id} runs without a process"),
            (State::Free, Some(files), Origin::Adopted(_)) => {
                assert_eq!(files.read(), BASELINE, "{id}; the agent said: {}", agent.said());
            }
            (State::Free, _, Origin::Launched { count, process, cgroup }) => {
                // One that was let go runs on, where nothing of the agent's holds it; the next has another name.
                if let Some(process) = process.take() {
                    assert!(process.is_alive(), "{id} was let go and has ended");
                    let groups = process.cgroups();
                    assert!(!groups.contains(agent.name()), "{id} is still in {groups}");
                    process.kill();
                }
                *cgroup = None;
                *count += 1;
            }
            (State::Free, None, Origin::Adopted(_)) => unreachable!("a cgroup has files"),
        }
    }

    /// Another quota, by somebody who is not the agent.
    pub(super) fn write_quota(&self, quota: u64) {
        let Some(Files { cpu: (group, is_v1), .. }) = self.files() else { return };
        if is_v1 {
            write(group, "cpu.cfs_quota_us", &quota.to_string());
        } else {
            write(group, "cpu.max", &format!("{quota} 100000"));
        }
    }
}

/// New values for some of the limits (by bits: CPU, weight, memory), and how they are asked for.
fn limits(before: &Limits, which: u64, random: &mut Random) -> (Vec<String>, Limits) {
    let mut limits = *before;
    let mut options = Vec::new();
    let mut ask = |option: &str, value: String| options.extend([option.to_owned(), value]);
    if which & 1 != 0 {
        let milli = 100 * (1 + random.below(10));
        limits.cpu = Limit::At(Millicores(milli));
        ask("--cpu", format!("{}.{}", milli / 1000, milli % 1000 / 100));
    }
    if which & 2 != 0 {
        let weight = 25 * (1 + random.below(40));
        limits.cpu_weight = Weight::new(weight as _);
        ask("--cpu-weight", weight.to_string());
    }
    if which & 4 != 0 {
        let mebibytes = 64 + 16 * random.below(20);
        limits.memory = Limit::At(Bytes(mebibytes << 20));
        ask("--memory", format!("{mebibytes}Mi"));
    }
    (options, limits)
}
