//! Cgroups that a rule takes (`crate::adoption` finds them): they become tasks of root's.

use std::path::{Path, PathBuf};

use shaper_core::{
    adopt::Writers,
    id::{ExecutionId, TaskId},
    ledger::Cause,
    limits::{Limit, Limits},
    task::{Origin, TaskStatus, Workload},
};
use shaper_proto::peer::Caller;

use super::{Node, NodeError, now};
use crate::{
    kernel::cgroup::Cgroup,
    launch,
    record::{self, Record},
};

/// A cgroup, and what a rule makes of it.
#[derive(Clone, Debug)]
pub struct Found {
    /// The cgroup.
    pub cgroup: PathBuf,
    /// Its id: what was judged; another that has its place since was not.
    pub cgroup_id: u64,
    /// The rule.
    pub rule: TaskId,
    /// What the task is: its name is the task's id, unless that is somebody else's.
    pub workload: Workload,
    /// What it may use.
    pub limits: Limits,
    /// What is done when others write to its files.
    pub writers: Option<Writers>,
}

/// The longest name of a task.
const NAME_MAX: usize = 63;
/// Digits that tell names apart.
const DIGEST: usize = 8;

/// `name` with a digest (FNV-1a, folded) of a cgroup's path, and of `salt`.
fn beside(name: &str, cgroup: &Path, salt: u64) -> String {
    let bytes = cgroup.as_os_str().as_encoded_bytes().iter().copied().chain(salt.to_le_bytes());
    let digest = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |digest, byte| {
        (digest ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let folded = (digest >> 32) ^ (digest & u64::from(u32::MAX));
    // Names are ASCII.
    let start = name.get(..NAME_MAX - DIGEST - 1).unwrap_or(name);
    format!("{start}-{folded:0DIGEST$x}")
}

/// Whether a ceiling is asked for that is above the rule's.
fn asks_for_more(asked: &Limits, rule: &Limits) -> bool {
    fn above<T: Copy + Ord>(asked: Limit<T>, rule: Limit<T>) -> bool {
        asked.at().zip(rule.at()).is_some_and(|(asked, rule)| asked > rule)
    }
    above(asked.cpu, rule.cpu)
        || above(asked.memory, rule.memory)
        || above(asked.net_egress, rule.net_egress)
        || above(asked.net_ingress, rule.net_ingress)
        || above(asked.storage_io, rule.storage_io)
}

/// So many released cgroups are remembered; those that were made first are forgotten first.
const LET_ALONE_MAX: usize = 4096;

impl Node {
    /// Adopts what was found, unless it is a task already or was released. Of each: the task, if it is one since now, or what is
    /// in the way. Once all are, [`Node::join_found`] has to follow.
    pub fn adopt_found(&mut self, found: Vec<Found>) -> Vec<Result<Option<TaskId>, String>> {
        let adopt = |found| match self.adopt_one(found) {
            Err(NodeError::Cgroup(error)) if error.is_gone() => Ok(None),
            other => other.map_err(|error| launch::chain(&error)),
        };
        found.into_iter().map(adopt).collect()
    }

    /// Has the connections of tasks that were adopted follow their limits: it looks through those of the whole machine.
    pub fn join_found(&mut self, adopted: &[TaskId]) {
        if let Err(error) = self.join_older_sockets(adopted) {
            tracing::warn!(error = %launch::chain(&error), "cannot look for older connections of adopted cgroups");
        }
    }

    /// Adopts what is about to be started, with no ceiling above `asked`, or what it is in, which `is_older`; `None`: it was
    /// released, or is gone. Where it is adopted already, its ceilings are lowered.
    pub fn admit(
        &mut self,
        found: Found,
        asked: &Limits,
        is_older: bool,
    ) -> Result<Option<TaskStatus>, NodeError> {
        let (cgroup, cgroup_id) = (found.cgroup.clone(), found.cgroup_id);
        let (rules, rule) = (found.limits, found.rule.clone());
        let limits = rules.at_most(asked);
        let wants_more = asks_for_more(asked, &rules);
        let adopted = self.adopt_one(Found { limits, ..found })?;
        let (id, is_new) = match adopted {
            Some(id) => {
                if is_older {
                    self.join_found(std::slice::from_ref(&id));
                }
                (id, true)
            }
            None => match self.task_in(&cgroup, cgroup_id) {
                Some(id) => (id, false),
                None => return Ok(None),
            },
        };
        if !is_new {
            let before = self.task(&id)?.record.limits;
            let lower = before.at_most(asked);
            if lower != before {
                let cause = Cause::agent("adoption", "annotations of the container");
                self.change_or_shrink(&id, &lower.as_change(), &cause)?;
            }
        }
        if wants_more {
            self.note(&id, &format!("its annotations ask for more than rule `{rule}` gives: the rule holds"));
        }
        self.status(&id).map(Some)
    }

    /// The task whose cgroup that is.
    fn task_in(&self, cgroup: &Path, cgroup_id: u64) -> Option<TaskId> {
        let is_it = |record: &Record| record.cgroup == cgroup && record.cgroup_id == Some(cgroup_id);
        let mut tasks = self.tasks.iter();
        let found = tasks.find(|(_, task)| task.target.is_some() && is_it(&task.record));
        found.map(|(id, _)| id.clone())
    }

    /// The task, if it was adopted now.
    fn adopt_one(&mut self, found: Found) -> Result<Option<TaskId>, NodeError> {
        let Found { cgroup, cgroup_id, rule, mut workload, limits, writers } = found;
        // One that was made anew is told of anew.
        let is_judged = Cgroup::open(&self.config.hierarchies.v2, &cgroup)?.id() == cgroup_id;
        if !is_judged || self.let_alone.contains(&cgroup_id) {
            return Ok(None);
        }
        self.end_those_gone(&cgroup, cgroup_id, &workload.name);
        if self.task_in(&cgroup, cgroup_id).is_some() {
            return Ok(None);
        }
        let on_disk = record::executions(self.state_dir())?;
        let id = self.name_of_found(&workload.name, &cgroup, cgroup_id, &on_disk)?;
        let wanted = std::mem::replace(&mut workload.name, id.clone());
        let root = Caller { uid: 0, gid: 0, groups: Vec::new() };
        let attempt = self.next_attempt_beside(&root, &id, None, &on_disk)?;
        let before = self.tasks.get(&id).map(|task| task.record.execution.clone());
        let execution = ExecutionId { task: id.clone(), attempt };
        let at = (now(), self.boot_id.as_str());
        let record = Record::beginning(execution, root.as_owner(), Origin::Adopted, limits, at);
        let cause = Cause::agent("adoption", format!("rule {rule}"));
        let record = Record { cgroup, workload: Some(workload), adopted_by: Some(rule), writers, ..record };
        self.begin_adopted(record, cause)?;
        if let Some(target) = &mut self.task_mut(&id)?.target {
            target.has_sockets = true;
        }
        if let Some(before) = before {
            self.erase_if_over(&before);
        }
        if wanted != id {
            self.note(&id, &format!("the name that its rule gives, `{wanted}`, is another task's"));
        }
        tracing::info!(task = %id, %wanted, "adopted by a rule");
        Ok(Some(id))
    }

    /// What a task is called: as its rule says, unless somebody else has that name.
    fn name_of_found(
        &self,
        wanted: &TaskId,
        cgroup: &Path,
        cgroup_id: u64,
        on_disk: &[ExecutionId],
    ) -> Result<TaskId, NodeError> {
        if self.is_for_rules(wanted, on_disk) {
            return Ok(wanted.clone());
        }
        // Who may run tasks can guess the first, and not the second, which is made when the cgroup is.
        for salt in [0, cgroup_id] {
            let id: TaskId = beside(wanted.as_str(), cgroup, salt).parse()?;
            if self.is_for_rules(&id, on_disk) {
                return Ok(id);
            }
        }
        Err(NodeError::Exists(wanted.clone()))
    }

    /// Whether a rule may give a name: nobody has it, or a task of a rule's that has ended. Nobody else's log or record is
    /// replaced.
    fn is_for_rules(&self, id: &TaskId, on_disk: &[ExecutionId]) -> bool {
        if let Some(task) = self.tasks.get(id)
            && (task.record.adopted_by.is_none() || task.is_running())
        {
            return false;
        }
        on_disk.iter().filter(|execution| execution.task == *id).all(|execution| {
            // Of a released one there is no record. One that cannot be read may be anybody's.
            match Record::load(self.state_dir(), execution) {
                Ok(record) => record.is_none_or(|record| record.adopted_by.is_some()),
                Err(_) => false,
            }
        })
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

#[cfg(test)]
mod tests {
    use shaper_core::units::{BitsPerSec, Millicores};

    use super::*;

    #[test]
    fn more_is_asked_for_only_where_the_rule_has_a_ceiling() {
        let cpu = |at| Limits { cpu: Limit::At(Millicores(at)), ..Limits::default() };
        let rule = Limits { net_egress: Limit::At(BitsPerSec(1)), ..cpu(500) };
        assert!(asks_for_more(&cpu(501), &rule));
        assert!(!asks_for_more(&cpu(500), &rule) && !asks_for_more(&Limits::default(), &rule));
        assert!(!asks_for_more(&cpu(500), &Limits::default()));
    }

    #[test]
    fn a_name_beside_anothers_is_a_name_and_tells_cgroups_apart() {
        let long = "n".repeat(NAME_MAX);
        for name in ["nginx", &long] {
            let made = |path: &str, salt| beside(name, Path::new(path), salt);
            let id = made("/sys/fs/cgroup/a", 0);
            assert!(id.parse::<TaskId>().is_ok() && id.len() <= NAME_MAX, "{id}");
            assert_eq!(id, made("/sys/fs/cgroup/a", 0));
            assert_ne!(id, made("/sys/fs/cgroup/b", 0));
            assert_ne!(id, made("/sys/fs/cgroup/a", 7));
        }
    }
}
