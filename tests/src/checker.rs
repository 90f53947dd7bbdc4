//! Whether every task is in exactly one place. It believes nobody: it compares what the broker says, what
//! each agent says, what the kernel holds, and what the tasks themselves noted.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    sync::mpsc::{self, RecvTimeoutError},
    thread::{self, JoinHandle},
    time::Duration,
};

use shaper_core::{
    id::ExecutionId,
    task::{ExitStatus, Phase},
};

use crate::{
    broker::{ClusterPhase, ClusterTask},
    cluster::Cluster,
    time::{eventually, happens},
};

/// Where a task is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// Over, by itself, with this code.
    Ended(i32),
    /// On a node, alive.
    Running,
    /// On no node.
    Pending,
    /// Over by request.
    Cancelled,
}

/// What the tasks noted, in the order of their notes.
#[derive(Debug, Default)]
pub struct Runs {
    /// Runs that began.
    pub began: Vec<ExecutionId>,
    /// Runs that came to their end.
    pub ended: Vec<ExecutionId>,
}

impl Runs {
    /// What is in the file now.
    #[track_caller]
    pub fn read(path: &Path) -> Runs {
        let mut runs = Runs::default();
        let text = fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        for line in text.lines() {
            let words: Vec<&str> = line.split(' ').collect();
            let (list, run) = match words.as_slice() {
                ["began", run, _] => (&mut runs.began, run),
                ["ended", run, _] => (&mut runs.ended, run),
                _ => panic!("what no task notes: {line:?}"),
            };
            list.push(run.parse().unwrap_or_else(|error| panic!("{line:?}: {error}")));
        }
        runs
    }

    /// The attempts of a task that came to their end.
    pub fn ended_attempts(&self, id: &str) -> Vec<u32> {
        let of = self.ended.iter().filter(|run| run.task.as_str() == id);
        of.map(|run| run.attempt).collect()
    }

    /// What cannot be.
    pub(crate) fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        let (mut began, mut ended) = (BTreeSet::new(), BTreeSet::new());
        for run in &self.began {
            if !began.insert(run) {
                faults.push(format!("{run} was started twice"));
            }
            if self.ended.iter().any(|ended| ended.task == run.task && ended.attempt < run.attempt) {
                faults.push(format!("{run} was started although an earlier one had come to its end"));
            }
        }
        for run in &self.ended {
            if !ended.insert(&run.task) {
                faults.push(format!("{} came to its end twice", run.task));
            }
        }
        faults
    }
}

/// A run with a process that lives, by the kernel.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Live {
    run: ExecutionId,
    cgroup: PathBuf,
    pid: u32,
}

impl Live {
    fn all(roots: &[PathBuf]) -> Vec<Live> {
        let mut all = Vec::new();
        for root in roots {
            for entry in fs::read_dir(root).into_iter().flatten().flatten() {
                let cgroup = entry.path();
                let Some(run) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
                    continue;
                };
                all.extend(processes(&cgroup).into_iter().map(|pid| Live {
                    run: ExecutionId::clone(&run),
                    cgroup: cgroup.clone(),
                    pid,
                }));
            }
        }
        all
    }

    fn still_lives(&self) -> bool {
        processes(&self.cgroup).contains(&self.pid)
    }
}

/// The processes of a cgroup; none if it is gone.
fn processes(cgroup: &Path) -> Vec<u32> {
    let text = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    text.lines().filter_map(|line| line.parse().ok()).collect()
}

/// The tasks that live in one of these cgroups.
pub(crate) fn live(root: &Path) -> BTreeSet<String> {
    Live::all(&[root.to_owned()]).into_iter().map(|live| live.run.task.to_string()).collect()
}

/// Tasks of which two runs live at the same time.
pub(crate) fn doubles(roots: &[PathBuf]) -> Vec<String> {
    let mut by_task: BTreeMap<String, Vec<Live>> = BTreeMap::new();
    for live in Live::all(roots) {
        by_task.entry(live.run.task.to_string()).or_default().push(live);
    }
    let mut faults = Vec::new();
    for (task, lives) in by_task {
        let groups = |lives: &[Live]| lives.iter().map(|live| live.cgroup.clone()).collect::<BTreeSet<_>>();
        if groups(&lives).len() < 2 {
            continue;
        }
        // They were not seen at one instant. Whoever lives still lived when the last of them was seen.
        let lives: Vec<Live> = lives.into_iter().filter(Live::still_lives).collect();
        if groups(&lives).len() > 1 {
            faults.push(format!("two runs of {task} live at the same time: {:?}", groups(&lives)));
        }
    }
    faults
}

/// Looks at the kernel and at the notes all the time, on a thread of its own.
pub struct Watch {
    stop: mpsc::Sender<()>,
    thread: JoinHandle<BTreeSet<String>>,
}

impl Watch {
    /// From now on.
    pub fn begin(cluster: &Cluster) -> Watch {
        let (roots, runs) = (cluster.cgroup_roots(), cluster.runs());
        let (stop, stopped) = mpsc::channel();
        let watch = move || {
            let mut faults = BTreeSet::new();
            while stopped.recv_timeout(Duration::from_millis(10)) == Err(RecvTimeoutError::Timeout) {
                faults.extend(doubles(&roots));
                faults.extend(Runs::read(&runs).faults());
            }
            faults
        };
        Watch { stop, thread: thread::spawn(watch) }
    }

    /// Asserts that nothing was wrong until now.
    #[track_caller]
    pub fn end(self) {
        let Watch { stop, thread } = self;
        drop(stop);
        let faults = thread.join().expect("the watch does not panic");
        assert!(faults.is_empty(), "{faults:#?}");
    }
}

/// Asserts what holds at any moment at which the broker answers.
#[track_caller]
pub fn check(cluster: &Cluster) {
    let tasks = cluster.broker.tasks();
    let mut faults = doubles(&cluster.cgroup_roots());
    let runs = Runs::read(&cluster.runs());
    faults.extend(runs.faults());
    faults.extend(lost(cluster, &tasks));
    for task in &tasks {
        let ended = runs.ended_attempts(task.id());
        match &task.phase {
            ClusterPhase::Ended { status: ExitStatus::Code(_), .. } if ended != [task.attempt] => {
                faults.push(format!("{} is said to have ended in {}: {ended:?}", task.id(), task.attempt));
            }
            ClusterPhase::Pending { .. } | ClusterPhase::Cancelled if !ended.is_empty() => {
                faults.push(format!("{} came to its end in {ended:?}, but is {:?}", task.id(), task.phase));
            }
            _ => {}
        }
    }
    assert!(faults.is_empty(), "{faults:#?}");
}

/// Acknowledged tasks that the broker does not have exactly once.
fn lost(cluster: &Cluster, tasks: &[ClusterTask]) -> Vec<String> {
    let mut faults = Vec::new();
    for id in cluster.all_acknowledged() {
        match tasks.iter().filter(|task| task.id() == id).count() {
            1 => {}
            count => faults.push(format!("the broker has {id}, which it acknowledged, {count} times")),
        }
    }
    faults
}

/// Asserts that every acknowledged task is where it is to be, by all accounts. All agents must be there.
#[track_caller]
pub fn check_settled(cluster: &Cluster, expected: &[(&str, Expect)]) {
    check(cluster);
    let mut named: Vec<&str> = expected.iter().map(|(id, _)| *id).collect();
    named.sort_unstable();
    assert_eq!(named, cluster.all_acknowledged(), "all that was acknowledged is to be accounted for");
    // What has ended is taken away a moment later.
    let mut faults = Vec::new();
    let settles = happens(|| {
        faults = settled_faults(cluster, expected);
        faults.is_empty()
    });
    assert!(settles, "{faults:#?}\n{:#?}", cluster.broker.tasks());
}

fn settled_faults(cluster: &Cluster, expected: &[(&str, Expect)]) -> Vec<String> {
    let mut faults = Vec::new();
    let (tasks, runs) = (cluster.broker.tasks(), Runs::read(&cluster.runs()));
    let live = Live::all(&cluster.cgroup_roots());
    let on_nodes: Vec<_> = cluster.agents.iter().map(|agent| agent.shaper().tasks()).collect();
    for (id, expect) in expected {
        let Some(task) = tasks.iter().find(|task| task.id() == *id) else {
            faults.push(format!("{id} is lost"));
            continue;
        };
        let is = match &task.phase {
            ClusterPhase::Pending { .. } => Some(Expect::Pending),
            ClusterPhase::Running { .. } => Some(Expect::Running),
            ClusterPhase::Ended { status: ExitStatus::Code(code), .. } => Some(Expect::Ended(*code)),
            ClusterPhase::Cancelled => Some(Expect::Cancelled),
            ClusterPhase::Starting { .. } | ClusterPhase::Ended { .. } => None,
        };
        if is != Some(*expect) {
            faults.push(format!("{id} is {:?}, not {expect:?}", task.phase));
        }
        let lives: Vec<&Live> = live.iter().filter(|live| live.run.task.as_str() == *id).collect();
        let told = on_nodes.iter().flatten().filter(|status| status.task_id.as_str() == *id);
        let running: Vec<_> = told.clone().filter(|status| status.phase == Phase::Running).collect();
        if *expect == Expect::Running {
            let node = task.node.as_deref().map(|node| cluster.agent(node).cgroup_root());
            match lives.as_slice() {
                [live] if live.run.attempt == task.attempt && live.cgroup.parent() == node.as_deref() => {
                    if running.len() != 1 || running[0].pid != Some(live.pid) {
                        faults.push(format!("{id} is process {}, but agents say {running:?}", live.pid));
                    }
                }
                _ => faults.push(format!("{id} runs as {lives:?}, not as {} on {node:?}", task.attempt)),
            }
        } else if !lives.is_empty() || !running.is_empty() {
            faults.push(format!("{id} is to be {expect:?}, but {lives:?} live, and agents say {running:?}"));
        }
        if let Expect::Ended(code) = expect {
            if runs.ended_attempts(id) != [task.attempt] {
                faults.push(format!("{id} came to its end in {:?}", runs.ended_attempts(id)));
            }
            let well = |phase: &Phase| matches!(phase, Phase::Ended { status: ExitStatus::Code(it), .. } if it == code);
            if !told.clone().any(|status| status.attempt == task.attempt && well(&status.phase)) {
                faults.push(format!("no agent knows that {id} ended with {code}"));
            }
        }
    }
    for Live { run, cgroup, pid } in &live {
        if !expected.iter().any(|(id, _)| *id == run.task.as_str()) {
            faults.push(format!("process {pid} in {} belongs to no task", cgroup.display()));
        }
    }
    faults
}

/// Waits until a run of this task has noted that it began.
#[track_caller]
pub fn wait_until_began(cluster: &Cluster, id: &str) {
    eventually(&format!("{id} began"), || {
        Runs::read(&cluster.runs()).began.iter().any(|run| run.task.as_str() == id)
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn faults(notes: &str) -> Vec<String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), notes).unwrap();
        Runs::read(file.path()).faults()
    }

    #[test]
    fn what_is_wrong_with_runs_is_seen() {
        assert!(faults("began a.1 7\nbegan b.1 8\nended a.1 7\nbegan b.2 9\nended b.2 9\n").is_empty());
        assert_eq!(faults("began a.1 7\nbegan a.1 8\n"), ["a.1 was started twice"]);
        let again = faults("began a.1 7\nended a.1 7\nbegan a.2 8\nended a.2 8\n");
        assert!(again.contains(&"a came to its end twice".to_owned()), "{again:?}");
        assert!(again.iter().any(|fault| fault.contains("a.2 was started although")), "{again:?}");
    }

    #[test]
    fn two_runs_that_live_at_the_same_time_are_seen() {
        let roots = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let paths: Vec<PathBuf> = roots.iter().map(|root| root.path().to_owned()).collect();
        let live = |root: usize, run: &str| {
            fs::create_dir(paths[root].join(run)).unwrap();
            fs::write(paths[root].join(run).join("cgroup.procs"), "7\n").unwrap();
        };
        live(0, "a.1");
        live(1, "b.1");
        assert!(doubles(&paths).is_empty());
        live(1, "a.1");
        live(1, "b.2");
        assert_eq!(doubles(&paths).len(), 2, "{:?}", doubles(&paths));
    }
}
