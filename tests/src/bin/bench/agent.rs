//! What the agent itself uses, beside a poller that reads the same cgroups as node exporters do.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use shaper_proto::v1::{AdoptCgroupRequest, Limits, WatchSnapshotsRequest, agent_client::AgentClient};
use shaper_tests::{
    bins::{binary, bpf_object},
    cgroup::{TestCgroup, cpu_time, mounts, unique_name},
    time::{Window, happens},
};
use tempfile::TempDir;
use tokio::{runtime::Runtime, task::JoinHandle};
use tonic::transport::Channel;

use crate::{Plan, child::Load, report::Report, say};

/// Percent of a core, with 1,000 tasks of which 100 are active.
const CPU_GOAL: f64 = 1.0;
const MEMORY_GOAL_MIB: f64 = 40.0;
const FEW: usize = 200;
const MANY: usize = 1_000;
const ACTIVE: usize = 100;
/// Microseconds of work of an active process at a time …
const LONG: &str = "200";
/// … and where all are: with more, they alone would fill two CPUs.
const SHORT: &str = "20";

pub(crate) fn measure(plan: Plan, report: &mut Report) -> Result<()> {
    let parent = TestCgroup::new();
    let groups: Vec<PathBuf> = (0..MANY).map(|number| parent.make_child(&number.to_string())).collect();
    let active = wake(&groups[..ACTIVE], LONG)?;
    let agent = Agent::start()?;

    say(&format!("adopting {FEW} cgroups"));
    agent.adopt(&groups[..FEW])?;
    let used = agent.used(plan)?;
    report.tell("agent: CPU, 200 tasks, 100 active", used.cpu, "% core");
    report.tell("agent: memory, 200 tasks", used.memory_mib, "MiB");
    if plan.is_quick {
        // A thousand are adopted and released in 50 seconds.
        return poll(plan, report, &parent, "1,000 cgroups, 100 active");
    }
    say(&format!("adopting {} cgroups more", MANY - FEW));
    agent.adopt(&groups[FEW..])?;
    let used = agent.used(plan)?;
    report.at_most(CPU_GOAL, "agent: CPU, 1,000 tasks, 100 active", used.cpu, "% core");
    report.at_most(MEMORY_GOAL_MIB, "agent: memory, 1,000 tasks", used.memory_mib, "MiB");
    poll(plan, report, &parent, "1,000 cgroups, 100 active")?;
    drop(active);
    let _active = wake(&groups, SHORT)?;
    let used = agent.used(plan)?;
    report.tell("agent: CPU, 1,000 tasks, all active", used.cpu, "% core");
    report.tell("agent: memory, 1,000 tasks, all active", used.memory_mib, "MiB");
    poll(plan, report, &parent, "1,000 cgroups, all active")
}

/// A process in each that wakes 20 times a second and computes for so many microseconds.
fn wake(groups: &[PathBuf], micros: &str) -> Result<Vec<Load>> {
    let start =
        |group: &PathBuf| Load::begin(&["wake", micros, "--group", &group.display().to_string()], None);
    groups.iter().map(start).collect()
}

fn poll(plan: Plan, report: &mut Report, parent: &TestCgroup, what: &str) -> Result<()> {
    let mut poller = Load::start(&["poll", &parent.path().display().to_string()], None)?;
    let done = poller.run(plan.long_window)?;
    let cpu = 100.0 * done.cpu_seconds / done.seconds;
    report.tell(&format!("poller of the cgroups' files: CPU, {what}"), cpu, "% core");
    let files = done.count as f64 / plan.long_window.as_secs() as f64 / MANY as f64;
    report.tell("poller: files in a cgroup", files, "");
    Ok(())
}

struct Used {
    /// Percent of a core.
    cpu: f64,
    memory_mib: f64,
}

/// The real agent in a place of its own, which it leaves as it found it.
struct Agent {
    process: Child,
    root: PathBuf,
    _state: TempDir,
    runtime: Runtime,
    client: AgentClient<Channel>,
    watcher: JoinHandle<()>,
    snapshots: Arc<AtomicU64>,
}

impl Agent {
    fn start() -> Result<Agent> {
        let state = TempDir::new().context("cannot make a temporary directory")?;
        let name = unique_name();
        let (root, socket) = (mounts().0.join(&name), state.path().join("agent.sock"));
        let log = fs::File::create(state.path().join("agent.log")).context("cannot make the agent's log")?;
        let mut process = Command::new(binary("shaper-agent"))
            .arg("--listen")
            .arg(&socket)
            .arg("--state-dir")
            .arg(state.path().join("state"))
            .arg("--cgroup-root")
            .arg(&root)
            .arg("--bpffs-dir")
            .arg(Path::new("/sys/fs/bpf").join(&name))
            .arg("--bpf-object")
            .arg(bpf_object())
            .args(["--max-tasks", "2000", "--on-exit", "release"])
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .context("cannot start the agent")?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.context("cannot make a runtime")?;
        let mut client = None;
        let answers = happens(|| {
            let connect = AgentClient::connect(format!("unix://{}", socket.display()));
            client = runtime.block_on(connect).ok();
            client.is_some() || !matches!(process.try_wait(), Ok(None))
        });
        let client = client.filter(|_| answers).with_context(|| {
            let said = fs::read_to_string(state.path().join("agent.log")).unwrap_or_default();
            format!("the agent does not answer: {said}")
        })?;
        let snapshots = Arc::new(AtomicU64::new(0));
        let watcher = runtime.spawn(watch(client.clone(), Arc::clone(&snapshots)));
        Ok(Agent { process, root, _state: state, runtime, client, watcher, snapshots })
    }

    fn adopt(&self, groups: &[PathBuf]) -> Result<()> {
        for group in groups {
            let name = group.file_name().unwrap_or_default().to_string_lossy();
            let request = AdoptCgroupRequest {
                task_id: format!("bench-{name}"),
                cgroup: group.display().to_string(),
                limits: Some(Limits::default()),
            };
            let adopted = self.runtime.block_on(self.client.clone().adopt_cgroup(request));
            adopted.with_context(|| format!("cannot adopt {}", group.display()))?;
        }
        Ok(())
    }

    /// Lets time pass, in which one client follows the snapshots.
    fn used(&self, plan: Plan) -> Result<Used> {
        let group = self.root.join("agent");
        let (before, seen) = (cpu_time(&group), self.snapshots.load(Relaxed));
        let window = Window::pass(plan.long_window);
        let cpu = (cpu_time(&group) - before).as_secs_f64();
        let seen = self.snapshots.load(Relaxed) - seen;
        ensure!(seen + 2 >= plan.long_window.as_secs(), "the client saw {seen} snapshots");
        let path = format!("/proc/{}/status", self.process.id());
        let status = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next());
        let kib: f64 =
            resident.and_then(|kib| kib.parse().ok()).with_context(|| format!("no VmRSS in {path}"))?;
        Ok(Used { cpu: 100.0 * cpu / window.seconds(), memory_mib: kib / 1024.0 })
    }
}

/// Follows the snapshots until the agent has ended, and counts them.
async fn watch(mut client: AgentClient<Channel>, count: Arc<AtomicU64>) {
    client = client.max_decoding_message_size(64 << 20);
    match client.watch_snapshots(WatchSnapshotsRequest {}).await {
        Ok(answer) => {
            let mut snapshots = answer.into_inner();
            while let Ok(Some(_)) = snapshots.message().await {
                count.fetch_add(1, Relaxed);
            }
        }
        Err(status) => eprintln!("bench: cannot watch the snapshots: {status}"),
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.watcher.abort();
        let asked = kill_process(Pid::from_child(&self.process), Signal::TERM);
        let ended = self.process.wait();
        if asked.is_err() || !ended.is_ok_and(|status| status.success()) {
            eprintln!("bench: the agent has not released everything: see {}", self.root.display());
        }
    }
}
