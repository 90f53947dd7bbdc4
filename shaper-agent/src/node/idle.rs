//! Idle memory is taken away from tasks of which that is wanted. `shaper_core::idle` decides when and how much; no limit is
//! changed. Reclaim itself is done on other threads ([`crate::reclaim`]).

use std::sync::Arc;

use shaper_core::{
    id::{ExecutionId, TaskId},
    idle::{Idle, State, Status, Why},
    ledger::{Actor, Cause, Kind},
    limits::LimitsChange,
    shrink::Swap,
    spec::DecisionKind,
    units::Bytes,
};

use super::{Node, NodeError, Task, change::conclude, memory::Files, not_established, now};
use crate::{
    actuate::Target,
    kernel::{
        cgroup::{CgroupError, memory::Reclaimer},
        mapped::monotonic_ns,
    },
    launch,
    ledger::Intent,
    reclaim::Chunk,
};

/// Of all tasks together, no more than this is asked for in a second, nor while what was asked for is under way.
const TOGETHER: u64 = 64 << 20;
/// What was taken is told of no more often than this …
const TELL_EVERY_NS: u64 = 60_000_000_000;
/// … and only if it is as much as this.
const WORTH_TELLING: u64 = 1 << 20;

const V1: &str = "its memory is limited by a v1 controller, which cannot be asked to reclaim a little \
                  (memory.force_empty takes everything): boot with cgroup v2 alone";
const NO_FILES: &str = "its cgroup has no memory.reclaim (Linux 5.19) or no memory.pressure: the memory controller is not \
                        enabled for it, the kernel is older, or it was booted with psi=0";

/// What is done about a task's idle memory.
#[derive(Default)]
pub(super) enum Idling {
    /// Nothing, as is wanted.
    #[default]
    Off,
    /// Nothing, although that is wanted, and why.
    Not(&'static str),
    /// It is taken.
    On(Box<On>),
}

pub(super) struct On {
    idle: Idle,
    files: Files,
    reclaimer: Arc<Reclaimer>,
    is_cache_only: bool,
    /// The chunk that is under way, by when it began: what is told of an older one does not count.
    chunk: Option<Asked>,
    /// Taken in all when that was last told, and when.
    told: (u64, u64),
}

struct Asked {
    at: u64,
    amount: Bytes,
    /// Reclaimed by then, in all.
    stolen: Bytes,
    _chunk: Chunk,
}

impl Idling {
    /// What is told of it; `None` where nothing is taken.
    pub(super) fn status(&self) -> Option<Status> {
        match self {
            Idling::On(on) => Some(on.idle.status(on.is_cache_only)),
            Idling::Off | Idling::Not(_) => None,
        }
    }

    /// The task's limit was moved or met: it is left alone for a while.
    pub(super) fn disturb(&mut self) {
        if let Idling::On(on) = self {
            on.idle.disturb(monotonic_ns());
        }
    }

    fn of(target: &Target) -> Idling {
        let opened = || -> Result<Option<(Files, Reclaimer)>, CgroupError> {
            Ok(Files::open(&target.cgroup)?.zip(Reclaimer::open(&target.cgroup)?))
        };
        if let Err(why) = can_reclaim(target) {
            return Idling::Not(why);
        }
        let seen = opened().and_then(|opened| {
            let Some((files, reclaimer)) = opened else { return Ok(None) };
            let (seen, swap) = files.observe()?;
            Ok(Some((files, reclaimer, seen, swap)))
        });
        match seen {
            Ok(Some((files, reclaimer, seen, swap))) => Idling::On(Box::new(On {
                idle: Idle::new(&seen, monotonic_ns()),
                files,
                reclaimer: Arc::new(reclaimer),
                is_cache_only: swap == Swap::None,
                chunk: None,
                told: (0, 0),
            })),
            Ok(None) => Idling::Not(NO_FILES),
            // It is tried again as long as the cgroup is there.
            Err(_) => Idling::Off,
        }
    }
}

/// Whether a task can be made to give up a little of its memory.
fn can_reclaim(target: &Target) -> Result<(), &'static str> {
    use crate::kernel::cgroup::{memory, pressure};
    if target.v1_memory.is_some() {
        return Err(V1);
    }
    if !target.cgroup.has(memory::RECLAIM) || !target.cgroup.has(pressure::MEMORY) {
        return Err(NO_FILES);
    }
    Ok(())
}

impl On {
    /// Looks at the task; how much is to be reclaimed, if anything is.
    fn look(&mut self, may_ask: bool) -> Result<Option<Bytes>, CgroupError> {
        let now = monotonic_ns();
        if self.chunk.is_some() || !self.idle.is_due(now) {
            return Ok(None);
        }
        let (seen, swap) = self.files.observe()?;
        self.is_cache_only = swap == Swap::None;
        Ok(self.idle.observed(&seen, may_ask, now))
    }

    /// What is worth telling of, once it rests.
    fn news(&mut self) -> Option<String> {
        let status = self.idle.status(self.is_cache_only);
        let (told, at) = self.told;
        let now = monotonic_ns();
        let since = status.reclaimed.0.saturating_sub(told);
        let is_over = matches!(
            &status.state,
            State::Resting(Why::WorkingSet { .. } | Why::Pressure { .. } | Why::NotReclaimable)
        );
        let is_due = at == 0 || now.saturating_sub(at) >= TELL_EVERY_NS;
        if since < WORTH_TELLING || !is_over || !is_due {
            return None;
        }
        self.told = (status.reclaimed.0, now);
        Some(format!("{} of idle memory were taken; {status} in all", Bytes(since)))
    }
}

impl Node {
    /// Whoever asks that idle memory be taken is refused where it cannot be. A node that a broker chose, or that does so
    /// with all, says so in a note instead.
    pub(super) fn may_reclaim_idle(
        &self,
        id: &TaskId,
        change: &LimitsChange,
        cause: &Cause,
    ) -> Result<(), NodeError> {
        if change.reclaim_idle != Some(true) || !matches!(cause.actor, Actor::User(_)) {
            return Ok(());
        }
        let target = self.task(id)?.target.as_ref().ok_or_else(not_established)?;
        can_reclaim(target).map_err(|why| {
            NodeError::Precondition(format!(
                "memory that task `{id}` does not use cannot be taken away: {why}"
            ))
        })
    }

    /// Every second: takes a little from whoever does not miss it.
    pub(super) fn reclaim_idle(&mut self) {
        let by_default = self.config.reclaim_idle;
        let wants = |task: &Task| {
            let is_steady = task.is_running() && !task.over && task.record.kill_at_boottime_ns.is_none();
            is_steady && task.record.limits.reclaim_idle.unwrap_or(by_default)
        };
        let mut ids = Vec::new();
        let mut under_way = 0;
        for (id, task) in &mut self.tasks {
            match (wants(task), &task.idling, &task.target) {
                (false, _, _) | (true, _, None) => task.idling = Idling::Off,
                (true, Idling::Off, Some(target)) => task.idling = Idling::of(target),
                (true, Idling::Not(_) | Idling::On(_), Some(_)) => {}
            }
            if let Idling::On(on) = &task.idling {
                under_way += on.chunk.as_ref().map_or(0, |asked| asked.amount.0);
                ids.push(id.clone());
            }
        }
        // Whoever was served last comes last.
        let first = ids.partition_point(|id| Some(id) <= self.idle_turn.as_ref());
        ids.rotate_left(first);
        for id in ids {
            under_way += self.reclaim_idle_of(&id, under_way < TOGETHER);
        }
    }

    /// Looks at one task; how much it was asked for.
    fn reclaim_idle_of(&mut self, id: &TaskId, may_ask: bool) -> u64 {
        let Some(task) = self.tasks.get_mut(id).filter(|task| task.shrinking.is_none()) else { return 0 };
        let Idling::On(on) = &mut task.idling else { return 0 };
        let looked = on.look(may_ask);
        let news = on.news();
        let asked = looked.and_then(|amount| {
            let Some(amount) = amount else { return Ok(None) };
            Ok(Some((amount, on.files.stolen()?)))
        });
        let asked = match asked {
            Ok(Some((amount, stolen))) => {
                let at = monotonic_ns();
                let (execution, handle) = (task.record.execution.clone(), self.handle.clone());
                let runtime = self.runtime.clone();
                let done = move |reclaimed: Result<_, CgroupError>| {
                    tracing::debug!(%execution, %amount, ?reclaimed, "idle memory is reclaimed");
                    runtime.spawn(async move {
                        handle.tell(move |node| node.idle_reclaimed(&execution, at)).await
                    });
                };
                let chunk = Chunk::start(&self.runtime, Arc::clone(&on.reclaimer), amount, done);
                on.chunk = Some(Asked { at, amount, stolen, _chunk: chunk });
                self.idle_turn = Some(id.clone());
                amount.0
            }
            Ok(None) => 0,
            Err(error) => {
                if !error.is_gone() {
                    tracing::warn!(task = %id, error = %launch::chain(&error), "cannot look for idle memory");
                }
                // Begun anew, if there is anything to begin with.
                task.idling = Idling::Off;
                0
            }
        };
        if let Some(news) = news {
            self.tell_reclaimed(id, news);
        }
        asked
    }

    /// A chunk is over: what it brought.
    fn idle_reclaimed(&mut self, execution: &ExecutionId, at: u64) {
        let Some(task) = self.tasks.get_mut(&execution.task).filter(|it| it.record.execution == *execution)
        else {
            return;
        };
        let Idling::On(on) = &mut task.idling else { return };
        let Some(asked) = on.chunk.take_if(|asked| asked.at == at) else { return };
        let stolen = on.files.stolen().unwrap_or(asked.stolen);
        on.idle.reclaimed(Bytes(stolen.0.saturating_sub(asked.stolen.0)), monotonic_ns());
    }

    /// In the ledger nothing is turned by it; that it was done, and why, is there.
    fn tell_reclaimed(&mut self, id: &TaskId, news: String) {
        let Some(task) = self.tasks.get(id) else { return };
        let (execution, owner) = (task.record.execution.clone(), task.record.owner);
        let intent = Intent {
            execution: execution.clone(),
            owner,
            kind: Kind::Transient,
            cause: Cause::agent("idle", news.clone()),
            limits: None,
            standing: None,
            changes: Vec::new(),
        };
        match self.ledger.intend(now(), intent) {
            Ok(number) => conclude(&mut self.ledger, number, &Ok(())),
            Err(error) => tracing::warn!(error = %launch::chain(&error), "a reclaim is not in the ledger"),
        }
        self.tell_decision(&execution, DecisionKind::Reclaimed, news);
    }
}
