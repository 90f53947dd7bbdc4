//! The tasks of this node, and everything that happens to them.

mod adjust;
mod adopt;
mod block_io;
mod burst;
mod card_limits;
mod card_watch;
mod cards;
mod change;
pub mod cluster;
mod end;
mod enter;
mod events;
mod found;
mod idle;
mod io_latency;
mod memory;
mod report;
mod second_writer;
mod start;
pub mod telemetry;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use shaper_common::abi::SLOT_FIRST;
use shaper_core::{
    adjust::memory::Uses,
    id::{InvalidTaskId, TaskId},
    limits::{Limit, Limits},
    shrink::{self, NotReclaimable},
    spec::{Image, Policy},
    task::{Origin, Owner, Phase, UnixNanos},
    units::Bytes,
};
use tokio::{
    runtime,
    sync::{mpsc, watch},
};

use self::cluster::{Assignment, News};
pub use self::{change::Hold, enter::EnterRequest, found::Found};
use shaper_proto::peer::Caller;

use crate::{
    actor::Handle,
    actuate::{ActuateError, Knob, Target, Values, Wish},
    calibrate::CalibrateError,
    config::Config,
    contact::{Contact, boottime_ns},
    durable,
    ground::{Ground, GroundError},
    kernel::{
        bpf::{Bpf, BpfConfig, BpfError},
        cgroup::{Cgroup, CgroupError, block, cpu, memory as memory_files, memory::MemoryEvents},
        features,
        v1::V1Error,
    },
    launch::{self, AttachError, Hired, SpawnError, spec::Started},
    lease::LeaseError,
    ledger::Ledger,
    manager::{Manager, ManagerError},
    meter::Meter,
    record::Record,
    waiter::Waiter,
};

/// Why a request was refused or failed.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// A task id that is not one.
    #[error(transparent)]
    TaskId(#[from] InvalidTaskId),
    /// No such task, or none of the caller's.
    #[error("you have no task `{0}` on this node (see `shaper get tasks`)")]
    NoSuchTask(TaskId),
    /// The id is taken.
    #[error("a task `{0}` exists already; choose another --id, or let it end first")]
    Exists(TaskId),
    /// Not the caller's to do.
    #[error("{0}")]
    Denied(String),
    /// Not in this state of things.
    #[error("{0}")]
    Precondition(String),
    /// A bound was reached.
    #[error("{0}")]
    Exhausted(String),
    /// A limit.
    #[error(transparent)]
    Actuate(#[from] ActuateError),
    /// A memory limit that cannot come to be.
    #[error(transparent)]
    NotReclaimable(#[from] NotReclaimable),
    /// Our cgroups.
    #[error(transparent)]
    Ground(#[from] GroundError),
    /// A unit for a task.
    #[error(transparent)]
    Manager(#[from] ManagerError),
    /// A cgroup.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// A group of a v1 controller.
    #[error(transparent)]
    V1(#[from] V1Error),
    /// The kernel programs.
    #[error(transparent)]
    Bpf(#[from] BpfError),
    /// What is written down.
    #[error(transparent)]
    Record(#[from] durable::Error),
    /// The supervisor.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// What became of an attempt.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// The table of what is lent.
    #[error(transparent)]
    Lease(#[from] LeaseError),
    /// What a calibration left in force.
    #[error(transparent)]
    Calibrate(#[from] CalibrateError),
    /// Some of several things could not be done; the others were.
    #[error("{}", .0.join("; "))]
    Partly(Vec<String>),
    /// A system call.
    #[error("cannot {verb}")]
    System {
        /// What was tried.
        verb: &'static str,
        /// What went wrong.
        source: io::Error,
    },
}

/// A command to be run as a task.
#[derive(Clone, Debug)]
pub struct RunRequest {
    /// Which run of the task this is to be; `None`: the next.
    pub attempt: Option<u32>,
    /// Its id; `None`: one is made.
    pub task_id: Option<TaskId>,
    /// Program and arguments.
    pub command: Vec<String>,
    /// Its whole environment.
    pub env: Vec<(String, String)>,
    /// Its working directory.
    pub cwd: PathBuf,
    /// What it may use.
    pub limits: Limits,
    /// Whom it runs as; `None`: the caller.
    pub run_as: Option<Caller>,
    /// Whom it belongs to; `None`: the caller.
    pub owner: Option<Owner>,
    /// What makes it the broker's.
    pub assignment: Option<Assignment>,
    /// So many GPU cards that no other task has …
    pub gpus: u32,
    /// … whose model contains this.
    pub gpu_model: String,
    /// What it runs in.
    pub image: Option<Image>,
}

/// How long a supervisor may take to say that its task runs.
const LAUNCH_DEADLINE: Duration = Duration::from_secs(20);
/// How long systemd may take to start one; the node waits for it.
const HIRE_DEADLINE: Duration = Duration::from_secs(2);
/// How long an evicted task has to end by itself.
const EVICTION_GRACE: Duration = Duration::from_secs(5);
/// A note on a task.
const SUPERVISOR_LOST: &str =
    "its supervisor was killed: its output since then is lost, its exit code will be unknown";
/// Most bytes of a command with its environment.
const COMMAND_MAX: usize = 128 << 10;
/// Ended tasks of one user that are remembered; the first that ended are forgotten first.
const ENDED_KEPT: usize = 256;

struct Task {
    record: Record,
    /// Present from launch until everything in the kernel is gone.
    target: Option<Target>,
    /// Whether `record.slot` is this task's to give back.
    holds_slot: bool,
    /// Its supervisor, where that waits to be told that it may start the task.
    supervisor: Option<Hired>,
    started: Option<Started>,
    /// The main process is over; what remains is to find out how.
    over: bool,
    /// The record on disk is older than this one.
    unsaved: bool,
    ended: watch::Sender<bool>,
    /// Its memory limit on its way below use …
    shrinking: Option<memory::Shrinking>,
    /// … or how the last such ended.
    last_shrink: Option<shrink::Status>,
    /// What a shrink could not put back at its end.
    memory_owed: Vec<Wish>,
    /// What had happened to its memory when that was last looked at.
    memory_events: MemoryEvents,
    /// What is taken of its idle memory.
    idling: idle::Idling,
    /// Where its `memory.high` stands so that it grows in time.
    wall: Limit<Bytes>,
    /// What each knob that was turned was last seen to hold, or was turned to.
    in_force: Values,
    /// Knobs that hold what somebody else wrote …
    differs: BTreeMap<Knob, second_writer::Differs>,
    /// … and when such were last turned back, `CLOCK_MONOTONIC` ns.
    turned_back_ns: VecDeque<u64>,
    notes: Vec<String>,
}

impl Task {
    fn is_running(&self) -> bool {
        self.record.phase == Phase::Running
    }

    /// Whether there is anything to be done about it by and by.
    fn needs_care(&self) -> bool {
        let is_steady = self.is_running() && !self.over && self.record.kill_at_boottime_ns.is_none();
        self.unsaved || (self.is_held() && !is_steady)
    }

    /// Whether there is anything of it that can be let go: processes, limits, a place in the kernel.
    fn is_held(&self) -> bool {
        self.is_running() || self.target.is_some()
    }
}

/// The state of this node. One thread owns it (see [`crate::actor`]).
pub struct Node {
    config: Config,
    handle: Handle,
    runtime: runtime::Handle,
    boot_id: String,
    /// When the broker was last heard of.
    contact: Arc<Contact>,
    ground: Option<Ground>,
    bpf: Option<Bpf>,
    events: Option<Waiter>,
    tasks: BTreeMap<TaskId, Task>,
    ledger: Ledger,
    meter: Meter,
    cards: cards::Cards,
    /// How often stock was taken: whoever follows the snapshots waits for the next.
    stocks: watch::Sender<u64>,
    free_slots: BTreeSet<u32>,
    /// Where the broker listens, while there is a session.
    news: Option<mpsc::Sender<News>>,
    highest_epoch: u64,
    session: u64,
    policies: Vec<Policy>,
    policies_revision: u64,
    adjustment: adjust::Loop,
    memory_uses: Uses,
    ceilings: block_io::Ceilings,
    guards: io_latency::Guards,
    /// Whose idle memory was last looked at.
    idle_turn: Option<TaskId>,
    lending: Option<burst::Lending>,
    warden: Option<burst::Warden>,
    writers: second_writer::Watch,
    /// When a warden was last started, `CLOCK_MONOTONIC` ns.
    warden_at_ns: Option<u64>,
    cpu_utilisation_permille: u32,
    ticks: u64,
    counts: telemetry::Counts,
    /// Cgroups that somebody released after a rule had adopted them, by id.
    let_alone: BTreeSet<u64>,
    stopping: bool,
    // Held for as long as the node lives.
    _lock: fs::File,
}

impl Node {
    /// Takes up what an earlier agent left. `lock` is that of the state directory.
    pub fn open(
        config: Config,
        lock: fs::File,
        handle: Handle,
        runtime: runtime::Handle,
    ) -> Result<Node, NodeError> {
        let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id")
            .map_err(|source| NodeError::System { verb: "read the boot id", source })?
            .trim()
            .to_owned();
        let wanted = SLOT_FIRST + config.max_tasks;
        let slots = Bpf::pinned_slots(&config.bpffs_dir)?.unwrap_or(wanted);
        if slots != wanted {
            let have = slots - SLOT_FIRST;
            tracing::warn!(
                have,
                wanted = config.max_tasks,
                "the tables of an earlier agent stay as they are"
            );
        }
        let contact = Contact::begin(&config.state_dir, &boot_id)
            .map_err(|source| NodeError::System { verb: "note when the broker was heard of", source })?;
        let (ledger, decided) = Ledger::open(&config.state_dir, now())?;
        let cards = cards::Cards::open(&config, &boot_id)?;
        let mut node = Node {
            config,
            handle,
            runtime,
            boot_id,
            contact: Arc::new(contact),
            ground: None,
            bpf: None,
            events: None,
            tasks: BTreeMap::new(),
            ledger,
            meter: Meter::default(),
            cards,
            stocks: watch::Sender::new(0),
            free_slots: (SLOT_FIRST..slots).collect(),
            news: None,
            highest_epoch: 0,
            session: 0,
            policies: Vec::new(),
            policies_revision: 0,
            adjustment: adjust::Loop::default(),
            memory_uses: Uses::default(),
            ceilings: block_io::Ceilings::default(),
            guards: io_latency::Guards::default(),
            idle_turn: None,
            lending: None,
            warden: None,
            writers: second_writer::Watch::default(),
            warden_at_ns: None,
            cpu_utilisation_permille: 0,
            ticks: 0,
            counts: telemetry::Counts::default(),
            let_alone: BTreeSet::new(),
            stopping: false,
            _lock: lock,
        };
        node.load_epoch()?;
        node.adopt_all(&decided)?;
        node.keep_contact();
        Ok(node)
    }

    /// Ends the thread after the job that calls this.
    pub fn stop(&mut self) {
        self.call_off_all();
        // Holding others back needs a living agent, as what is lent does; limits do not.
        self.let_all_holds_go("the agent ends");
        self.close_books();
        self.stopping = true;
    }

    /// Whether [`Node::stop`] was called.
    pub fn is_stopping(&self) -> bool {
        self.stopping
    }

    fn state_dir(&self) -> &Path {
        &self.config.state_dir
    }

    /// Makes what the agent needs in the kernel, or finds it. Where that fails and nothing was there before, nothing is
    /// left.
    fn establish(&mut self) -> Result<(), NodeError> {
        let is_new = self.ground.is_none() && !Bpf::is_pinned(&self.config.bpffs_dir);
        let established = self.establish_all();
        if established.is_err() && is_new {
            self.disestablish();
        }
        established
    }

    fn disestablish(&mut self) {
        self.events = None;
        self.close_books();
        self.writers = second_writer::Watch::default();
        self.meter.tell_by(None);
        self.bpf = None;
        if let Err(error) = Bpf::discard(&self.bpf_config()) {
            tracing::warn!(error = %launch::chain(&error), "cannot take away what was made in the kernel");
        }
        if let Some(ground) = self.ground.take()
            && let Err(error) = ground.remove()
        {
            tracing::warn!(error = %launch::chain(&error), "cannot take away the agent's cgroups");
        }
    }

    fn bpf_config(&self) -> BpfConfig {
        BpfConfig {
            object: self.config.bpf_object.clone(),
            directory: self.config.bpffs_dir.clone(),
            cgroup_mount: self.config.hierarchies.v2.clone(),
            uplinks: self.config.uplinks.clone(),
            slots: SLOT_FIRST + self.config.max_tasks,
            state_dir: self.config.state_dir.clone(),
            debug: self.config.debug_bpf,
            network: self.config.capacity.network,
            opener: self.config.opener.clone(),
        }
    }

    fn establish_all(&mut self) -> Result<(), NodeError> {
        let Config { hierarchies, cgroup_root, state_dir, .. } = &self.config;
        if self.ground.is_none() {
            self.ground = Some(Ground::establish(hierarchies, cgroup_root, state_dir, &self.boot_id)?);
        }
        if self.bpf.is_none() {
            let mut bpf = Bpf::establish(self.bpf_config()).map_err(|error| match features::lacking() {
                Some(lacking) => NodeError::Precondition(format!(
                    "{}: {lacking}; run the agent with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON",
                    launch::chain(&error)
                )),
                None => error.into(),
            })?;
            if let Some(ground) = &self.ground {
                let (cgroup, v1_io) = ground.agent()?;
                let v1_io = v1_io.map(|group| group.id()).transpose()?;
                bpf.self_test(cgroup.id(), v1_io, &self.config.state_dir)?;
            }
            bpf.govern(self.cards.table.cards())?;
            let events = bpf.take_events()?;
            self.bpf = Some(bpf);
            self.set_alarms();
            self.watch_writers();
            self.open_books()?;
            let follower = events::start(events, self.handle.clone(), self.lending.clone());
            self.events = Some(follower.map_err(|source| NodeError::System {
                verb: "start the thread that waits for events",
                source,
            })?);
        }
        Ok(())
    }

    /// Where the limits of a task are enforced.
    fn target(&self, cgroup: Cgroup, record: &Record) -> Result<Target, NodeError> {
        let ground = self.ground.as_ref().ok_or_else(not_established)?;
        let group = |controller, is_in_v2| {
            if matches!(record.origin, Origin::Adopted) || is_in_v2 {
                return Ok(None);
            }
            ground.v1_group(controller, &record.execution.to_string())
        };
        let v1_cpu = group("cpu", cgroup.has(cpu::MAX))?;
        let v1_memory = group("memory", cgroup.has(memory_files::MAX))?;
        let v1_io = group("blkio", cgroup.has(block::STAT))?;
        let manager = self.manager(&cgroup, record);
        Ok(Target {
            cgroup,
            v1_cpu,
            v1_memory,
            v1_io,
            manager,
            slot: record.slot,
            has_sockets: true,
            shares_network: self.config.capacity.network.is_some(),
            cards: self.cards.holders.clone(),
        })
    }

    /// Who else manages a cgroup. What the agent made is the agent's alone.
    fn manager(&self, cgroup: &Cgroup, record: &Record) -> Option<Manager> {
        if !matches!(record.origin, Origin::Adopted) {
            return None;
        }
        let path = cgroup.path().strip_prefix(&self.config.hierarchies.v2).unwrap_or(cgroup.path());
        Manager::of(path).unwrap_or_else(|error| {
            tracing::warn!(cgroup = %cgroup.path().display(), error = %launch::chain(&error), "nobody knows who manages a cgroup: what he writes is a second writer's");
            None
        })
    }

    /// Every 100 ms: looks at what is active, and adjusts what the broker's tasks may use. Every fifth time, guards
    /// promised latencies of block IO and divides its ceilings, kills what is overdue and takes away what is left of ended tasks; every tenth, takes stock and reports to the
    /// broker.
    pub fn tick(&mut self) {
        let begun = Instant::now();
        self.ticks += 1;
        self.look_at_shrinks();
        self.turn_loans();
        self.adjust();
        if self.ticks.is_multiple_of(10) {
            self.take_stock();
            self.look_at_cards();
            self.look_at_memory();
            self.reclaim_idle();
        }
        if self.ticks.is_multiple_of(5) {
            self.guard_io();
            self.divide_io();
            self.end_overdue();
            self.look_after_tasks();
        }
        if self.ticks.is_multiple_of(10) {
            self.compare_some();
            self.keep_contact();
            self.tell_all();
            self.keep_ledger();
        }
        self.counts.turned(begun.elapsed());
    }

    fn take_stock(&mut self) {
        if let Some(bpf) = &self.bpf {
            match self.meter.take_stock(bpf) {
                Ok(doubtful) => {
                    let tasks: Vec<TaskId> =
                        doubtful.into_iter().filter_map(|slot| self.task_of_slot(slot)).collect();
                    for id in tasks {
                        self.end_if_gone(&id);
                        if let (Some(bpf), Some(task)) = (&self.bpf, self.tasks.get(&id))
                            && let Some(target) = task.target.as_ref().filter(|_| task.is_running())
                        {
                            self.meter.open_anew(bpf, target);
                        }
                    }
                }
                Err(error) => tracing::warn!(error = %launch::chain(&error), "cannot take stock"),
            }
        } else {
            self.meter.take_stock_of_machine();
        }
        self.stocks.send_modify(|stocks| *stocks += 1);
    }

    fn task_of_slot(&self, slot: u32) -> Option<TaskId> {
        let has_it = |task: &Task| task.target.as_ref().is_some_and(|target| target.slot == slot);
        self.tasks.iter().find(|(_, task)| has_it(task)).map(|(id, _)| id.clone())
    }

    fn look_after_tasks(&mut self) {
        let ids: Vec<TaskId> =
            self.tasks.iter().filter(|(_, task)| task.needs_care()).map(|(id, _)| id.clone()).collect();
        for id in ids {
            if let Err(error) = self.tick_task(&id) {
                tracing::warn!(task = %id, error = %launch::chain(&error), "cannot look after a task");
            }
        }
    }

    fn tick_task(&mut self, id: &TaskId) -> Result<(), NodeError> {
        let Some(task) = self.tasks.get_mut(id) else { return Ok(()) };
        if task.unsaved {
            task.record.save(&self.config.state_dir)?;
            task.unsaved = false;
        }
        if !task.memory_owed.is_empty() && task.shrinking.is_none() {
            self.put_back_owed(id)?;
        }
        let Some(task) = self.tasks.get_mut(id) else { return Ok(()) };
        if !task.is_running() {
            return self.clean_up(id);
        }
        if task.over {
            let execution = task.record.execution.clone();
            return self.settle(&execution);
        }
        let Some(target) = &task.target else { return Ok(()) };
        if task.record.kill_at_boottime_ns.is_some_and(|at| at <= boottime_ns()) {
            target.cgroup.kill()?;
            task.record.kill_at_boottime_ns = None;
        }
        Ok(())
    }

    fn insert(&mut self, record: Record, target: Option<Target>) {
        let ended = watch::Sender::new(record.phase != Phase::Running);
        let id = record.execution.task.clone();
        let task = Task {
            holds_slot: target.is_some(),
            record,
            target,
            supervisor: None,
            started: None,
            over: false,
            unsaved: false,
            ended,
            shrinking: None,
            last_shrink: None,
            memory_owed: Vec::new(),
            memory_events: MemoryEvents::default(),
            idling: idle::Idling::Off,
            wall: Limit::Unlimited,
            in_force: Values::new(),
            differs: BTreeMap::new(),
            turned_back_ns: VecDeque::new(),
            notes: Vec::new(),
        };
        self.tasks.insert(id, task);
    }

    fn note(&mut self, id: &TaskId, text: &str) {
        if let Some(task) = self.tasks.get_mut(id)
            && !task.notes.iter().any(|note| note == text)
        {
            task.notes.push(text.to_owned());
        }
    }

    fn task(&self, id: &TaskId) -> Result<&Task, NodeError> {
        self.tasks.get(id).ok_or_else(|| NodeError::NoSuchTask(id.clone()))
    }

    fn task_mut(&mut self, id: &TaskId) -> Result<&mut Task, NodeError> {
        self.tasks.get_mut(id).ok_or_else(|| NodeError::NoSuchTask(id.clone()))
    }

    /// Somebody else's task looks like none.
    fn visible(&self, caller: &Caller, id: &TaskId) -> Result<(), NodeError> {
        match self.tasks.get(id) {
            Some(task) if caller.may_use(&task.record.owner) => Ok(()),
            _ => Err(NodeError::NoSuchTask(id.clone())),
        }
    }

    fn only_operator(&self, caller: &Caller, what: &str) -> Result<(), NodeError> {
        if caller.is_operator() {
            Ok(())
        } else {
            Err(NodeError::Denied(format!("uid {} may not {what}: only root may", caller.uid)))
        }
    }
}

fn not_established() -> NodeError {
    NodeError::Precondition("the agent holds nothing in the kernel at this moment".into())
}

fn now() -> UnixNanos {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
