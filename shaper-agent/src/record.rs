//! What the agent writes down of a task, before it does anything for it: `task.json` in the task's
//! directory, beside what its supervisor writes.

use std::{
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use shaper_core::{
    adopt::Writers,
    id::{ExecutionId, TaskId},
    limits::Limits,
    task::{OomKill, Origin, Owner, Phase, UnixNanos, Usage, Workload},
    units::Bytes,
};

use crate::{actuate::Values, durable, ledger::Decided, node::cluster::Assignment};

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
    /// What it is an execution of, where somebody has said.
    #[serde(default)]
    pub workload: Option<Workload>,
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
    /// What was decided before `ledger_number`: what holds if nothing says what came of that, and it cannot be.
    #[serde(default)]
    pub before: Option<Before>,
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
    /// The rule by which it was adopted.
    #[serde(default)]
    pub adopted_by: Option<TaskId>,
    /// What is done when others write to its files; `None`: as with all tasks of the node.
    #[serde(default)]
    pub writers: Option<Writers>,
    /// When what is left of it is killed, after a cancellation: `CLOCK_BOOTTIME`, ns.
    pub kill_at_boottime_ns: Option<u64>,
    /// What the MPS server was told that each of its processes may allocate of a card.
    #[serde(default)]
    pub mps_memory: Option<Bytes>,
}

/// What was decided before a change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Before {
    /// [`Record::limits`].
    pub limits: Limits,
    /// [`Record::standing`].
    pub standing: Values,
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
    /// Of one that begins `at` that time in that boot, and is nowhere in the kernel yet: it runs as its owner, and is this node's own.
    pub fn beginning(
        execution: ExecutionId,
        owner: Owner,
        origin: Origin,
        limits: Limits,
        at: (UnixNanos, &str),
    ) -> Record {
        let (created_at, boot_id) = at;
        Record {
            execution,
            owner,
            runs_as: owner,
            origin,
            workload: None,
            slot: 0,
            cgroup: PathBuf::new(),
            cgroup_id: None,
            limits,
            ledger_number: 0,
            standing: Values::new(),
            before: None,
            baseline: Values::new(),
            created_at,
            boot_id: boot_id.to_owned(),
            phase: Phase::Running,
            usage: None,
            memory_floor: None,
            oom_kill: None,
            assignment: None,
            let_go: false,
            adopted_by: None,
            writers: None,
            kill_at_boottime_ns: None,
            mps_memory: None,
        }
    }

    /// Writes it: durably what the agent has started, which goes on elsewhere or is told of after a power loss. The cgroup of
    /// another's ends with the boot, and every limit on it: so its record has to outlive the agent alone. The directory is made
    /// if it is not there.
    pub fn save(&self, state_dir: &Path) -> Result<(), durable::Error> {
        let directory = directory(state_dir, &self.execution);
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&directory)
            .map_err(|source| durable::Error::Io { operation: "make", path: directory.clone(), source })?;
        let path = directory.join(FILE);
        match self.origin {
            Origin::Launched { .. } => durable::write_json(&path, self, 0o600),
            Origin::Adopted | Origin::Entered { .. } => durable::write_json_for_this_boot(&path, self, 0o600),
        }
    }

    /// Takes up what the ledger has of it besides: what a loop decided since this was saved, and what came of what was
    /// about to be done then.
    pub fn catch_up(&mut self, decided: &Decided) {
        if decided.failed.contains(&self.ledger_number)
            && let Some(Before { limits, standing }) = self.before.take()
        {
            (self.limits, self.standing) = (limits, standing);
        }
        if decided.number < self.ledger_number {
            return;
        }
        let known = Before { limits: self.limits, standing: self.standing.clone() };
        if decided.number > self.ledger_number {
            self.limits = decided.limits.unwrap_or(self.limits);
            if let Some(standing) = &decided.standing {
                self.standing.clone_from(standing);
            }
        }
        match &decided.before {
            None => self.before = None,
            Some(_) if decided.number == self.ledger_number => {}
            Some((limits, standing)) => {
                self.before = Some(Before {
                    limits: limits.unwrap_or(known.limits),
                    standing: standing.clone().unwrap_or(known.standing),
                });
            }
        }
    }

    /// Reads that of an execution; `None` if the agent has none, or forgot it, or a power loss left an empty file.
    pub fn load(state_dir: &Path, execution: &ExecutionId) -> Result<Option<Record>, durable::Error> {
        let path = directory(state_dir, execution).join(FILE);
        match durable::read_json(&path) {
            Err(durable::Error::Parse { .. }) if fs::metadata(&path).is_ok_and(|found| found.len() == 0) => {
                Ok(None)
            }
            read => read,
        }
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use shaper_core::{limits::Limit, units::Millicores};

    use super::*;

    fn cpu(milli: u64) -> Limits {
        Limits { cpu: Limit::At(Millicores(milli)), ..Limits::default() }
    }

    /// As it was saved with the intent 5 of 0.6 cores, where 0.5 were decided before.
    fn saved() -> Record {
        let owner = Owner { uid: 1000, gid: 100 };
        Record {
            slot: 3,
            cgroup: "/sys/fs/cgroup/a".into(),
            ledger_number: 5,
            before: Some(Before { limits: cpu(500), standing: Values::new() }),
            ..Record::beginning("a.1".parse().unwrap(), owner, Origin::Adopted, cpu(600), (0, ""))
        }
    }

    /// The limits, and those before, after what the ledger has.
    fn caught_up(decided: &Decided) -> (Limits, Option<Limits>) {
        let mut record = saved();
        record.catch_up(decided);
        (record.limits, record.before.map(|before| before.limits))
    }

    #[test]
    fn what_came_of_the_last_change_is_taken_from_the_ledger() {
        let of = |number, milli, before: Option<u64>| Decided {
            number,
            limits: Some(cpu(milli)),
            before: before.map(|milli| (Some(cpu(milli)), None)),
            ..Decided::default()
        };
        // It was not even written there, or nothing says what came of it.
        assert_eq!(caught_up(&of(4, 500, None)), (cpu(600), Some(cpu(500))));
        assert_eq!(caught_up(&of(5, 600, Some(500))), (cpu(600), Some(cpu(500))));
        // It was done; it failed, and the agent died before it could save that.
        assert_eq!(caught_up(&of(5, 600, None)), (cpu(600), None));
        let failed = Decided { failed: BTreeSet::from([5]), ..of(4, 500, None) };
        assert_eq!(caught_up(&failed), (cpu(500), None));
        // A loop decided more since, and that is known to be in force or not.
        assert_eq!(caught_up(&of(7, 700, None)), (cpu(700), None));
        assert_eq!(caught_up(&of(7, 700, Some(600))), (cpu(700), Some(cpu(600))));
        let never_said = Decided { before: Some((None, None)), ..of(7, 700, None) };
        assert_eq!(caught_up(&never_said), (cpu(700), Some(cpu(600))));
    }
}
