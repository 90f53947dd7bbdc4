//! What the agent writes down of a task, before it does anything for it: `task.json` in the task's
//! directory, beside what its supervisor writes.

use std::{
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use shaper_core::{
    id::ExecutionId,
    limits::Limits,
    task::{OomKill, Origin, Owner, Phase, UnixNanos, Usage},
    units::Bytes,
};

use crate::{actuate::Values, durable, node::cluster::Assignment};

/// A task on disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// Which run of which task.
    pub execution: ExecutionId,
    /// Whom it belongs to.
    pub owner: Owner,
    /// Whom its processes run as.
    pub runs_as: Owner,
    /// How it came here.
    pub origin: Origin,
    /// Its slot in the kernel programs' tables, while it runs.
    pub slot: u32,
    /// Its cgroup v2 directory.
    pub cgroup: PathBuf,
    /// The id of that directory when it was adopted: another may be made in its place while no agent looks.
    #[serde(default)]
    pub cgroup_id: Option<u64>,
    /// What it may use.
    pub limits: Limits,
    /// The number of the last entry of the ledger that is in this.
    #[serde(default)]
    pub ledger_number: u64,
    /// What stands beside the limits: knobs that were turned for good.
    #[serde(default)]
    pub standing: Values,
    /// What each knob held before shaper first turned it. It is on disk before the knob is turned.
    pub baseline: Values,
    /// When it came under management.
    pub created_at: UnixNanos,
    /// The boot in which it ran (`/proc/sys/kernel/random/boot_id`).
    pub boot_id: String,
    /// Where it is in its life, as last seen.
    pub phase: Phase,
    /// What it had used when it ended.
    pub usage: Option<Usage>,
    /// The memory limit that somebody asked for while it ran: what it grows beyond that comes back.
    #[serde(default)]
    pub memory_floor: Option<Bytes>,
    /// Whether the kernel has killed for want of memory.
    #[serde(default)]
    pub oom_kill: Option<OomKill>,
    /// What makes it the broker's; `None`: it is this node's own.
    #[serde(default)]
    pub assignment: Option<Assignment>,
    /// Its baseline is back, and it is on its way out of management: whoever finds this goes on with that.
    #[serde(default)]
    pub let_go: bool,
    /// When what is left of it is killed, after a cancellation: `CLOCK_BOOTTIME`, ns.
    pub kill_at_boottime_ns: Option<u64>,
}

const FILE: &str = "task.json";

/// The directory of all tasks.
pub fn tasks_directory(state_dir: &Path) -> PathBuf {
    state_dir.join("tasks")
}

/// The directory of one execution.
pub fn directory(state_dir: &Path, execution: &ExecutionId) -> PathBuf {
    tasks_directory(state_dir).join(execution.to_string())
}

impl Record {
    /// Writes it durably; the directory is made if it is not there.
    pub fn save(&self, state_dir: &Path) -> Result<(), durable::Error> {
        let directory = directory(state_dir, &self.execution);
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&directory)
            .map_err(|source| durable::Error::Io { operation: "make", path: directory.clone(), source })?;
        durable::write_json(&directory.join(FILE), self, 0o600)
    }

    /// Reads that of an execution; `None` if the agent has none, or forgot it.
    pub fn load(state_dir: &Path, execution: &ExecutionId) -> Result<Option<Record>, durable::Error> {
        durable::read_json(&directory(state_dir, execution).join(FILE))
    }

    /// Forgets the task; what its supervisor wrote stays.
    pub fn forget(&self, state_dir: &Path) -> Result<(), durable::Error> {
        let path = directory(state_dir, &self.execution).join(FILE);
        match fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(durable::Error::Io { operation: "remove", path, source })
            }
            _ => Ok(()),
        }
    }
}

/// Removes all that is on disk of an execution.
pub fn erase(state_dir: &Path, execution: &ExecutionId) -> Result<(), durable::Error> {
    let path = directory(state_dir, execution);
    match fs::remove_dir_all(&path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(durable::Error::Io { operation: "remove", path, source })
        }
        _ => Ok(()),
    }
}

/// The executions that have a directory.
pub fn executions(state_dir: &Path) -> Result<Vec<ExecutionId>, durable::Error> {
    let path = tasks_directory(state_dir);
    let entries = match fs::read_dir(&path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(durable::Error::Io { operation: "list", path, source }),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry =
            entry.map_err(|source| durable::Error::Io { operation: "list", path: path.clone(), source })?;
        // What has another name is not ours to judge.
        found.extend(entry.file_name().to_str().and_then(|name| name.parse().ok()));
    }
    found.sort();
    Ok(found)
}
