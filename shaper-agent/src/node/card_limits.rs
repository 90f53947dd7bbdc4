//! Limits of the memory and the power of GPU cards: who may have which part of one, and what that asks of the executor.
//!
//! A card is one task's alone, or several have each a part of its memory: then all the parts fit ([decision
//! 0038](../../../docs/decisions/0038-memory-of-a-card-is-lent-ahead-and-ends-who-keeps-it.md)).

use std::{os::unix::fs::MetadataExt, path::Path};

use shaper_core::{
    gpu::{CardMemory, CardSet, CardUsage, Rung},
    id::TaskId,
    ledger::{Cause, Kind},
    limits::{Limit, Limits, LimitsChange},
    spec::DecisionKind,
    units::{Bytes, Milliwatts},
};

use super::{Node, NodeError, RunRequest, Task, change::conclude, now};
use crate::{
    actuate::{self, ActuateError, Change, Knob, Value, Wish},
    gpu::CardError,
    launch,
    ledger::Intent,
};

/// What tells a program of the MPS server how much memory it may allocate of each card that it sees.
const MPS_LIMIT: &str = "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT";
/// Where that server is, for a program that is not told.
const MPS_PIPES: (&str, &str) = ("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps");
const MIB: u64 = 1 << 20;

impl Node {
    /// Refuses cards that are not there, or parts of them that others have.
    pub(super) fn may_have_cards(&self, id: &TaskId, change: &LimitsChange) -> Result<(), NodeError> {
        let LimitsChange { gpu_cards, gpu_memory, gpu_power, .. } = change;
        if gpu_cards.is_none() && gpu_memory.is_none() && gpu_power.is_none() {
            return Ok(());
        }
        let before = self.task(id)?.record.limits;
        let after = before.with(change);
        let cards = after.gpu_cards.unwrap_or_default();
        let known = self.cards.table.cards();
        let unknown = |number: &u32| known.iter().all(|card| card.number != *number);
        if let Some(number) = gpu_cards.and_then(|wanted| wanted.numbers().find(unknown)) {
            let there = CardSet::try_from(known.iter().map(|card| card.number).collect::<Vec<_>>());
            return Err(NodeError::Invalid(format!(
                "gpu_cards: this node has no card {number}; it has {} (see `shaper doctor`)",
                there.unwrap_or_default()
            )));
        }
        for (resource, is_limited) in [
            ("gpu_memory", after.gpu_memory != Limit::Unlimited),
            ("gpu_power", after.gpu_power != Limit::Unlimited),
        ] {
            if is_limited && cards.is_empty() {
                return Err(NodeError::Invalid(format!(
                    "{resource}: it is of the cards that the task may open, and that is none: name them with --cards"
                )));
            }
        }
        let is_less = gpu_cards.is_none()
            && gpu_power.is_none()
            && matches!((after.gpu_memory, before.gpu_memory), (Limit::At(after), Limit::At(before)) if after < before);
        // Whoever gives back need not ask.
        if is_less {
            Ok(())
        } else {
            cards.numbers().try_for_each(|number| self.may_have_card(id, number, &after))
        }
    }

    fn may_have_card(&self, id: &TaskId, number: u32, after: &Limits) -> Result<(), NodeError> {
        let refused = |why: String| Err(NodeError::Precondition(why));
        if after.gpu_memory != Limit::Unlimited && !self.cards.holders.is_seen(number) {
            return refused(format!(
                "gpu_memory: nothing holds a task to a part of card {number}, and nobody sees what is used of it: that takes \
                 NVIDIA's driver (--nvml) or the controller dmem"
            ));
        }
        let others: Vec<(&TaskId, &Task)> = self.holders_of(number, Some(id)).collect();
        let Some((holder, _)) = others.first() else { return Ok(()) };
        let granted = format!("card {number} is granted to task `{holder}`");
        let Limit::At(wanted) = after.gpu_memory else {
            return refused(format!(
                "gpu_cards: {granted}; a card has one task, or several that each have a part of its memory (--gpu-memory)"
            ));
        };
        let is_alone = |(_, task): &&(&TaskId, &Task)| {
            let limits = &task.record.limits;
            limits.gpu_memory == Limit::Unlimited || limits.gpu_power != Limit::Unlimited
        };
        if let Some((holder, _)) = others.iter().find(is_alone) {
            return refused(format!("gpu_cards: card {number} is granted to task `{holder}` alone"));
        }
        if after.gpu_power != Limit::Unlimited {
            return refused(format!("gpu_power: {granted}, too, and would be slowed down with it"));
        }
        let Some(memory) =
            self.card_usages().iter().find(|usage| usage.card.number == number).and_then(|it| it.memory)
        else {
            return refused(format!("gpu_memory: nobody says how much memory card {number} has"));
        };
        let promised: u64 =
            others.iter().filter_map(|(_, task)| task.record.limits.gpu_memory.at()).map(|it| it.0).sum();
        let left = memory.0.saturating_sub(promised);
        if wanted.0 <= left {
            return Ok(());
        }
        refused(format!(
            "gpu_memory: {wanted} of card {number} are not there: of {memory} {} are granted to other tasks and {} are left",
            Bytes(promised),
            Bytes(left)
        ))
    }

    /// Which tasks were granted a card.
    pub(super) fn holders_of<'a>(
        &'a self,
        number: u32,
        but: Option<&'a TaskId>,
    ) -> impl Iterator<Item = (&'a TaskId, &'a Task)> {
        let has_it = move |(id, task): &(&TaskId, &Task)| {
            let cards = task.record.limits.gpu_cards.unwrap_or_default();
            task.is_held() && but != Some(*id) && cards.contains(number)
        };
        self.tasks.iter().filter(has_it)
    }

    /// What is reserved for a task of the broker's comes before what others were lent: they go back to what they requested,
    /// the lowest first, as far as is needed.
    pub(super) fn make_card_room(&mut self, id: &TaskId) -> Result<(), NodeError> {
        let Task { record, .. } = self.task(id)?;
        let (Some(_), Limit::At(wanted)) = (&record.assignment, record.limits.gpu_memory) else {
            return Ok(());
        };
        let cards = record.limits.gpu_cards.unwrap_or_default();
        for CardUsage { card, memory, .. } in self.card_usages() {
            let (true, Some(memory)) = (cards.contains(card.number), memory) else { continue };
            let (mut promised, mut lent) = (wanted.0, Vec::new());
            for (other, task) in self.holders_of(card.number, Some(id)) {
                let Limit::At(grant) = task.record.limits.gpu_memory else { continue };
                promised = promised.saturating_add(grant.0);
                if let Some((priority, request)) = task.lent_of_card()
                    && grant > request
                {
                    lent.push((priority, grant.0 - request.0, other.clone(), request));
                }
            }
            lent.sort();
            for (_, excess, other, request) in lent {
                if promised <= memory.0 {
                    break;
                }
                promised -= excess;
                let reason =
                    format!("memory of card {} → {request}: `{id}` has {wanted} of it reserved", card.number);
                self.lend_of_card(&other, request, &reason, DecisionKind::Shrunk)?;
                self.ask_to_free(&other, reason);
            }
        }
        Ok(())
    }

    /// Has a task of the broker's have another part of its card.
    pub(super) fn lend_of_card(
        &mut self,
        id: &TaskId,
        to: Bytes,
        reason: &str,
        kind: DecisionKind,
    ) -> Result<(), NodeError> {
        let change = LimitsChange { gpu_memory: Some(Limit::At(to)), ..LimitsChange::default() };
        self.change(id, &change, &Cause::agent("lend", reason))?;
        let execution = self.task(id)?.record.execution.clone();
        self.tell_decision(&execution, kind, reason.to_owned());
        Ok(())
    }

    /// What limits ask of the memory and the power of cards: of those that the task has, and of those that it had.
    pub(super) fn card_wishes(&self, id: &TaskId, limits: &Limits) -> Result<Vec<Wish>, NodeError> {
        let cards = limits.gpu_cards.unwrap_or_default();
        let is_over = |knob: &Knob| match knob {
            Knob::GpuMemory(number) => !cards.contains(*number) || limits.gpu_memory == Limit::Unlimited,
            Knob::GpuPower(number) => !cards.contains(*number) || limits.gpu_power == Limit::Unlimited,
            _ => false,
        };
        let baseline = &self.task(id)?.record.baseline;
        let back = baseline
            .iter()
            .filter(|(knob, _)| is_over(knob))
            .map(|(knob, value)| Wish::Exactly(*knob, *value));
        let memory =
            limits.gpu_memory.at().into_iter().flat_map(|memory| {
                cards.numbers().map(move |number| Wish::GpuMemory(number, Limit::At(memory)))
            });
        let power = limits
            .gpu_power
            .at()
            .into_iter()
            .flat_map(|power| cards.numbers().map(move |number| Wish::GpuPower(number, power)));
        Ok(back.chain(memory).chain(power).collect())
    }

    /// A card of which a part of the memory is wanted: of those that are shared the one with the least that is enough, else
    /// one that nobody has.
    pub(super) fn choose_card(&self, wanted: Bytes, model: &str) -> Result<CardSet, NodeError> {
        let mut found: Option<(bool, u64, u32)> = None;
        let (mut seen, mut most) = (0, Bytes(0));
        for CardUsage { card, memory, trouble, .. } in self.card_usages() {
            let (Some(memory), None, true) = (memory, trouble, card.model.contains(model)) else { continue };
            let grants = || self.holders_of(card.number, None).map(|(_, task)| &task.record.limits);
            if grants().any(|it| it.gpu_memory == Limit::Unlimited || it.gpu_power != Limit::Unlimited) {
                continue;
            }
            seen += 1;
            let promised: u64 = grants().filter_map(|it| it.gpu_memory.at()).map(|it| it.0).sum();
            let left = memory.0.saturating_sub(promised);
            most = most.max(Bytes(left));
            let candidate = (promised == 0, left, card.number);
            if left >= wanted.0 && found.is_none_or(|best| candidate < best) {
                found = Some(candidate);
            }
        }
        let Some((_, _, number)) = found else {
            return Err(NodeError::Exhausted(format!(
                "gpu_memory: {wanted} of one card are wanted; of the {seen} cards of this node that no task has to itself, none \
                 has more than {most} left (see `shaper top`)"
            )));
        };
        CardSet::try_from(vec![number]).map_err(|error| NodeError::Invalid(error.to_string()))
    }

    /// Has the MPS server hold a program to its part of the cards, where nothing stronger does. What is held so.
    pub(super) fn limit_by_mps(&self, request: &mut RunRequest) -> Option<Bytes> {
        let RunRequest { env, limits, .. } = request;
        let (cards, Limit::At(memory)) = (limits.gpu_cards?, limits.gpu_memory) else { return None };
        let pipes = env.iter().find(|(name, _)| name == MPS_PIPES.0).map_or(MPS_PIPES.1, |(_, value)| value);
        // A directory of somebody else's shows nothing.
        let serves = |control: &Path| {
            control.metadata().is_ok_and(|it| it.uid() == 0 && it.mode() & 0o170_000 == 0o010_000)
        };
        let is_watched =
            |number| self.cards.holders.strongest(number).is_some_and(|(rung, _)| rung == Rung::Watchdog);
        let is_set = env.iter().any(|(name, _)| name == MPS_LIMIT);
        if is_set || !serves(&Path::new(pipes).join("control")) || !cards.numbers().all(is_watched) {
            return None;
        }
        // As the program counts them.
        let each: Vec<String> =
            (0..cards.len()).map(|place| format!("{place}={}M", memory.0 / MIB)).collect();
        env.push((MPS_LIMIT.into(), each.join(",")));
        Some(Bytes(memory.0 / MIB * MIB))
    }

    /// What a task has of the memory of cards, and may have.
    pub(super) fn card_memory(&self, id: &TaskId) -> Vec<CardMemory> {
        let mut found = self.cards.uses_of(id);
        let Some(task) = self.tasks.get(id) else { return Vec::new() };
        let limits = &task.record.limits;
        for number in limits.gpu_cards.unwrap_or_default().numbers() {
            let (limit, enforced_by) = match limits.gpu_memory {
                Limit::Unlimited if !self.cards.holders.is_part(number) => continue,
                Limit::Unlimited => (self.memory_of(number), Some(Rung::Mig)),
                limit => (limit, self.rung(task, number)),
            };
            let of_card = found.entry(number).or_insert(CardMemory {
                number,
                used: Bytes(0),
                processes: 0,
                limit,
                enforced_by,
            });
            (of_card.limit, of_card.enforced_by) = (limit, enforced_by);
        }
        found.into_values().collect()
    }

    /// Puts back the power of cards that tasks had limited which have ended: unlike all else that is not gone with their cgroups.
    pub(super) fn give_power_back(&mut self) {
        let of_task = |(id, task): (&TaskId, &Task)| {
            let of_card = |(knob, value): (&Knob, &Value)| match (knob, value) {
                (Knob::GpuPower(card), Value::Power(power)) => Some((id.clone(), *card, *power)),
                _ => None,
            };
            let ended = !task.is_running() && task.record.boot_id == self.boot_id;
            task.record.baseline.iter().filter_map(of_card).filter(|_| ended).collect::<Vec<_>>()
        };
        let owed: Vec<_> = self.tasks.iter().flat_map(of_task).collect();
        for (id, card, power) in owed {
            if let Err(error) = self.give_one_power_back(&id, card, power) {
                tracing::warn!(task = %id, card, error = %launch::chain(&error), "cannot put the power of a card back; it is tried again");
            }
        }
    }

    fn give_one_power_back(&mut self, id: &TaskId, card: u32, power: Milliwatts) -> Result<(), NodeError> {
        let knob = Knob::GpuPower(card);
        let before = match self.cards.holders.power(card) {
            Ok(before) => before,
            // What is gone took its limit with it.
            Err(CardError::Gone { .. }) => power,
            Err(error) => return Err(ActuateError::from(error).into()),
        };
        if before != power {
            let record = &self.task(id)?.record;
            let intent = Intent {
                execution: record.execution.clone(),
                owner: record.owner,
                kind: Kind::Release,
                cause: Cause::agent("end", "the task has ended"),
                changes: vec![Change { knob, before: Value::Power(before), after: Value::Power(power) }],
                limits: None,
                standing: None,
            };
            let number = self.ledger.intend(now(), intent)?;
            let result = actuate::put_power_back(&self.cards.holders, card, power);
            conclude(&mut self.ledger, number, &result);
            result?;
        }
        let state_dir = self.config.state_dir.clone();
        let task = self.task_mut(id)?;
        task.record.baseline.remove(&knob);
        task.unsaved = task.record.save(&state_dir).is_err();
        Ok(())
    }

    /// How much memory a card has.
    fn memory_of(&self, number: u32) -> Limit<Bytes> {
        let usages = self.card_usages();
        let memory = usages.iter().find(|usage| usage.card.number == number).and_then(|usage| usage.memory);
        memory.map_or(Limit::Unlimited, Limit::At)
    }

    /// What holds a task to its part of a card.
    pub(super) fn rung(&self, task: &Task, number: u32) -> Option<Rung> {
        let rung = self.cards.holders.rung(number, &task.target.as_ref()?.cgroup);
        let by_mps = task.record.mps_memory.zip(task.record.limits.gpu_memory.at());
        let is_by_mps = rung == Rung::Watchdog && by_mps.is_some_and(|(mps, limit)| mps <= limit);
        Some(if is_by_mps { Rung::Mps } else { rung })
    }
}
