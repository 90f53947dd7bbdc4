//! Changes of what a task may use: written down, put in force, and undone where that fails.

use shaper_core::{
    id::TaskId,
    ledger::Cause,
    limits::{Limits, LimitsChange},
};
use shaper_proto::failpoint;

use super::{Node, NodeError, not_established};
use crate::{
    actuate::{self, Knob, Target, Values, Wish},
    kernel::bpf::Bpf,
    launch,
};

/// How long a change stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hold {
    /// Until the next one, over restarts of the agent.
    Standing,
    /// As long as this agent lives: the next one puts back what was decided before.
    Transient,
}

impl Node {
    /// Changes limits of a task, all or none.
    pub(super) fn change(
        &mut self,
        id: &TaskId,
        change: &LimitsChange,
        cause: &Cause,
    ) -> Result<(), NodeError> {
        let limits = self.task(id)?.record.limits.with(change);
        let mut standing = self.task(id)?.record.standing.clone();
        if change.cpu_weight.is_some() {
            // Whoever names a weight wants that, and nothing that was decided in its place.
            standing.remove(&Knob::CpuWeight);
        }
        let mut wishes = Wish::of(change);
        if let Some(ceiling) = change.storage_io {
            wishes.extend(self.io_wishes(id, ceiling)?);
        }
        self.carry_through(id, &wishes, limits, standing, cause)?;
        if change.cpu.is_some()
            && let Err(error) = self.watch_quota(id)
        {
            // The limit holds all the same; what is lost is the warning.
            tracing::warn!(task = %id, error = %launch::chain(&error), "cannot watch a CPU quota");
        }
        Ok(())
    }

    /// Turns knobs of a task beside or within its limits, all or none. What a knob held before it was first turned is
    /// on disk before it is.
    pub fn set_knobs(
        &mut self,
        id: &TaskId,
        wishes: &[Wish],
        hold: Hold,
        cause: &Cause,
    ) -> Result<(), NodeError> {
        let record = &self.task(id)?.record;
        let (limits, mut standing) = (record.limits, record.standing.clone());
        if hold == Hold::Standing {
            let (target, bpf) = self.held(id)?;
            standing.extend(actuate::values(target, bpf, wishes)?);
        }
        self.carry_through(id, wishes, limits, standing, cause)
    }

    /// Puts knobs back to what was decided for good: the limits, what stands, or what was there before.
    pub fn put_back(&mut self, id: &TaskId, knobs: &[Knob], cause: &Cause) -> Result<(), NodeError> {
        let record = &self.task(id)?.record;
        let (limits, standing) = (record.limits, record.standing.clone());
        let mut wishes = actuate::decided(&limits, &standing, &record.baseline);
        wishes.retain(|wish| knobs.contains(&wish.knob()));
        self.carry_through(id, &wishes, limits, standing, cause)
    }

    /// Puts every knob of a task that was ever turned to what was decided for it.
    pub(super) fn put_all_back(&mut self, id: &TaskId, cause: &Cause) -> Result<(), NodeError> {
        let knobs: Vec<Knob> = self.task(id)?.record.baseline.keys().copied().collect();
        self.put_back(id, &knobs, cause)
    }

    /// The kernel's side of a task.
    fn held(&self, id: &TaskId) -> Result<(&Target, &Bpf), NodeError> {
        let target = self.task(id)?.target.as_ref().ok_or_else(not_established)?;
        Ok((target, self.bpf.as_ref().ok_or_else(not_established)?))
    }

    /// Turns knobs, with what is to be remembered of it: the record first, then the effect.
    fn carry_through(
        &mut self,
        id: &TaskId,
        wishes: &[Wish],
        limits: Limits,
        standing: Values,
        _cause: &Cause,
    ) -> Result<(), NodeError> {
        let (target, bpf) = self.held(id)?;
        let changes = actuate::plan(target, bpf, wishes)?;
        let state_dir = self.config.state_dir.clone();
        let task = self.tasks.get_mut(id).ok_or_else(|| NodeError::NoSuchTask(id.clone()))?;
        let target = task.target.as_ref().ok_or_else(not_established)?;
        let bpf = self.bpf.as_mut().ok_or_else(not_established)?;
        let before = (task.record.limits, std::mem::replace(&mut task.record.standing, standing));
        task.record.limits = limits;
        let mut is_first_touch = false;
        for change in &changes {
            task.record.baseline.entry(change.knob).or_insert_with(|| {
                is_first_touch = true;
                change.before
            });
        }
        if is_first_touch || before != (task.record.limits, task.record.standing.clone()) {
            failpoint::hit("change-before-record");
            task.record.save(&state_dir)?;
            failpoint::hit("change-after-record");
        }
        if let Err(error) = actuate::execute(target, bpf, &changes) {
            (task.record.limits, task.record.standing) = before;
            task.record.save(&state_dir)?;
            return Err(error.into());
        }
        failpoint::hit("change-after-effect");
        Ok(())
    }
}
