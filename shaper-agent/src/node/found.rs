//! Cgroups that a rule takes (`crate::adoption` finds them): they become tasks of root's.

use std::path::{Path, PathBuf};

use shaper_core::{
    adopt::Writers,
    id::{ExecutionId, TaskId},
    ledger::Cause,
    limits::Limits,
    task::{Origin, Workload},
};
use shaper_proto::peer::Caller;

use super::{Node, NodeError, now};
use crate::{kernel::cgroup::Cgroup, launch, record::Record};

/// A cgroup, and what a rule makes of it.
#[derive(Clone, Debug)]
pub struct Found {
    /// The cgroup.
    pub cgroup: PathBuf,
    /// The rule.
    pub rule: TaskId,
    /// What the task is: its name is the task's id.
    pub workload: Workload,
    /// What it may use.
    pub limits: Limits,
    /// What is done when others write to its files.
    pub writers: Option<Writers>,
}

/// So many released cgroups are remembered; those that were made first are forgotten first.
const LET_ALONE_MAX: usize = 4096;

impl Node {
    /// Adopts what was found, unless it is a task already or was released; of each what is in the way, if anything is.
    pub fn adopt_found(&mut self, found: Vec<Found>) -> Vec<(PathBuf, Option<String>)> {
        let mut adopted = Vec::new();
        let mut results = Vec::new();
        for found in found {
            let cgroup = found.cgroup.clone();
            let id = found.workload.name.clone();
            let refused = match self.adopt_one(found) {
                Ok(true) => {
                    adopted.push(id);
                    None
                }
                Ok(false) => None,
                Err(NodeError::Cgroup(error)) if error.is_gone() => None,
                Err(error) => Some(launch::chain(&error)),
            };
            results.push((cgroup, refused));
        }
        if !adopted.is_empty()
            && let Err(error) = self.join_older_sockets(&adopted)
        {
            tracing::warn!(error = %launch::chain(&error), "cannot look for older connections of adopted cgroups");
        }
        results
    }

    /// Whether it was adopted now.
    fn adopt_one(&mut self, found: Found) -> Result<bool, NodeError> {
        let Found { cgroup, rule, workload, limits, writers } = found;
        let cgroup_id = Cgroup::open(&self.config.hierarchies.v2, &cgroup)?.id();
        if self.let_alone.contains(&cgroup_id) {
            return Ok(false);
        }
        self.end_those_gone(&cgroup, cgroup_id, &workload.name);
        let is_it = |record: &Record| record.cgroup == cgroup && record.cgroup_id == Some(cgroup_id);
        if self.tasks.values().any(|task| task.target.is_some() && is_it(&task.record)) {
            return Ok(false);
        }
        let id = workload.name.clone();
        let root = Caller { uid: 0, gid: 0, groups: Vec::new() };
        let attempt = self.next_attempt(&root, &id, None)?;
        let execution = ExecutionId { task: id.clone(), attempt };
        let at = (now(), self.boot_id.as_str());
        let record = Record::beginning(execution.clone(), root.as_owner(), Origin::Adopted, limits, at);
        let cause = Cause::agent("adoption", format!("rule {rule}"));
        let record = Record { cgroup, workload: Some(workload), adopted_by: Some(rule), writers, ..record };
        self.begin_adopted(record, cause)?;
        if attempt > 1 {
            self.erase_if_over(&ExecutionId { attempt: attempt - 1, ..execution });
        }
        tracing::info!(task = %id, "adopted by a rule");
        Ok(true)
    }

    /// Ends what stood in the place of a new cgroup, or had its name: the kernel tells of an end by another way than of a
    /// beginning, and may come later.
    fn end_those_gone(&mut self, cgroup: &Path, cgroup_id: u64, id: &TaskId) {
        let is_before = |record: &Record| record.cgroup == cgroup && record.cgroup_id != Some(cgroup_id);
        let before = self
            .tasks
            .iter()
            .filter(|(own, task)| task.target.is_some() && (*own == id || is_before(&task.record)));
        let before: Vec<TaskId> = before.map(|(id, _)| id.clone()).collect();
        for id in before {
            self.end_if_gone(&id);
        }
    }

    /// Remembers that a task of a rule's is being released: the rule does not take it again, as long as this agent runs.
    pub(super) fn leave_alone(&mut self, record: &Record) {
        if record.adopted_by.is_none() {
            return;
        }
        self.let_alone.extend(record.cgroup_id);
        while self.let_alone.len() > LET_ALONE_MAX {
            self.let_alone.pop_first();
        }
    }
}
