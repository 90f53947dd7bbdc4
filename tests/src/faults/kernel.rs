//! What real agents run, by the kernel and by what their tasks note: looked at all the time.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::PathBuf,
    sync::mpsc::{self, RecvTimeoutError},
    thread::{self, JoinHandle},
    time::Duration,
};

use serde::Deserialize;

use super::history::{Amount, History, How, Seen};
use crate::checker::{self, Runs};

/// Between two looks.
const PAUSE: Duration = Duration::from_millis(10);

/// A node with a real agent.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub(super) name: String,
    pub(super) cgroups: PathBuf,
    /// The file with the highest epoch that it has obeyed.
    pub(super) epoch: PathBuf,
    pub(super) has: Amount,
}

/// Looks, until it is told to end.
pub(super) struct Watch {
    stop: mpsc::Sender<()>,
    thread: JoinHandle<BTreeSet<String>>,
}

impl Watch {
    /// From now on. Tasks note in `runs` that they begin and end.
    pub(super) fn begin(nodes: Vec<Node>, runs: PathBuf, history: History) -> Watch {
        let roots: Vec<PathBuf> = nodes.iter().map(|node| node.cgroups.clone()).collect();
        let (stop, stopped) = mpsc::channel();
        let watch = move || {
            let (mut faults, mut obeyed) = (BTreeSet::new(), BTreeMap::new());
            while stopped.recv_timeout(PAUSE) == Err(RecvTimeoutError::Timeout) {
                faults.extend(checker::doubles(&roots));
                faults.extend(Runs::read(&runs).faults());
                for node in &nodes {
                    faults.extend(overcommitted(node, &history));
                    if let Some(epoch) = epoch_of(node)
                        && obeyed.insert(node.name.clone(), epoch) != Some(epoch)
                    {
                        history.note(Seen::Obeyed { node: node.name.clone(), epoch });
                    }
                }
            }
            faults
        };
        Watch { stop, thread: thread::spawn(watch) }
    }

    /// What was wrong until now.
    pub(super) fn end(self) -> BTreeSet<String> {
        let Watch { stop, thread } = self;
        drop(stop);
        match thread.join() {
            Ok(faults) => faults,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

fn epoch_of(node: &Node) -> Option<u64> {
    #[derive(Deserialize)]
    struct Highest {
        epoch: u64,
    }
    let text = fs::read(&node.epoch).ok()?;
    serde_json::from_slice(&text).ok().map(|Highest { epoch }| epoch)
}

/// Whether what lives on a node asks for more than it has.
fn overcommitted(node: &Node, history: &History) -> Option<String> {
    let live = checker::live(&node.cgroups);
    if live.is_empty() {
        return None;
    }
    let demands = history.demands();
    let sum = |live: &BTreeSet<String>| {
        live.iter().filter_map(|task| demands.get(task)).fold(Amount::default(), |sum, demand| Amount {
            millicores: sum.millicores + demand.millicores,
            bytes: sum.bytes + demand.bytes,
        })
    };
    let is_too_much = |sum: Amount| sum.millicores > node.has.millicores || sum.bytes > node.has.bytes;
    if !is_too_much(sum(&live)) {
        return None;
    }
    // They were not seen at one instant. Who lives still lived when the last of them was seen.
    let live: BTreeSet<String> = checker::live(&node.cgroups).intersection(&live).cloned().collect();
    let sum = sum(&live);
    is_too_much(sum).then(|| format!("{} has {:?} and runs {sum:?}: {live:?}", node.name, node.has))
}

/// Writes into the history how tasks have ended by themselves: each with the code that is its own.
pub(super) fn note_ends(runs: &Runs, history: &History, code: impl Fn(&str) -> i32) {
    for run in &runs.ended {
        let task = run.task.to_string();
        let how = How::Code(code(&task));
        history.note(Seen::Over { task, attempt: run.attempt, how });
    }
}
