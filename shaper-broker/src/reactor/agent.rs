//! What agents say, and what they are told.

use std::{collections::BTreeSet, sync::Arc};

use shaper_core::{
    gpu::{CardOffer, CardSet},
    id::{ExecutionId, TaskId},
    spec::{Decision, DecisionKind},
    task::{ExitStatus, Phase as RunPhase, TaskStatus, UnixNanos},
};

use super::{
    Directive, DirectiveKind, DirectiveOutcome, DirectiveResult, Effect, Hello, NodeTask, Phase, Row,
    SessionId, Turn,
    history::{History, Sample},
    places::KNOWN_CARDS,
    state::{Node, NodeRow, Setback, TaskRow},
};

/// Stage of a start that its agent gave up, through no fault of the task's.
const ABANDONED: &str = "abandoned";
/// For what runs although the broker knows it as over.
const STRAY_GRACE_MILLIS: u64 = 10_000;

/// How an execution that an agent reports stands to what the broker knows.
enum Standing {
    /// The broker does not know it: it is left alone.
    Unknown,
    /// It is the latest attempt, and not over.
    Current,
    /// The broker knows that it is over.
    Over,
}

impl Turn<'_> {
    /// The inventory is the truth: what it has runs or has ended, and what it lacks is not there.
    pub(super) fn connected(&mut self, session: SessionId, hello: Hello) {
        let Hello { node: name, boot_id, capacity, inventory, highest_epoch, agent_socket, gpus, containers } =
            hello;
        let gpus = self.known_cards(&name, gpus);
        if highest_epoch > self.state.epoch {
            self.effects.push(Effect::Warn(format!(
                "node {name} has obeyed epoch {highest_epoch}, this broker is at {}: going on above it",
                self.state.epoch
            )));
            self.state.epoch = highest_epoch.saturating_add(1);
            self.rows.push(Row::Epoch);
        }
        let same_boot = self.state.nodes.get(&name).is_none_or(|node| node.row.boot_id == boot_id);
        let row = NodeRow {
            name: name.clone(),
            order: 0,
            capacity,
            boot_id,
            agent_socket,
            cordon: None,
            gpus,
            containers,
        };
        self.register(session, &name, row);
        self.effects.push(Effect::Welcome(session, self.state.epoch));
        let policies = self.policies_for(session);
        self.effects.push(policies);

        let mut has = BTreeSet::new();
        let known: BTreeSet<_> = inventory.iter().map(|report| report.status.task_id.clone()).collect();
        for report in inventory {
            has.insert(report.status.execution());
            self.take(session, &name, report);
        }
        let assigned = self.state.nodes.get(&name).map(|node| node.tasks.clone()).unwrap_or_default();
        for id in assigned {
            let Some(TaskRow { task, .. }) = self.state.tasks.get(&id).map(Box::as_ref) else { continue };
            if task.lost
                && let Some(row) = self.change(&id)
            {
                row.task.lost = false;
            }
            let Some(TaskRow { task, .. }) = self.state.tasks.get(&id).map(Box::as_ref) else { continue };
            let is_victim = task.preempted.is_some();
            let has_cards =
                self.state.nodes.get(&name).is_some_and(|node| node.row.gpus.cards.has_all(task.cards));
            match (has.contains(&task.execution()), task.acknowledged, task.cancel) {
                (true, _, None) if is_victim => self.direct_preemption(&id),
                (true, _, None) => self.direct_resize(&id),
                // It never began, and would only have to end again.
                (false, false, None) if is_victim => self.set_back(&id, Setback::Evicted),
                (true, _, Some(_)) => self.direct_stop(&id),
                // It never began, and its cards are gone: others will do.
                (false, false, None) if !has_cards => self.lose_cards(&id, &name),
                (false, false, None) => self.direct_start(&id),
                // It never began, and now it need not.
                (false, false, Some(_)) => self.cancelled(&id),
                (false, true, _) => self.vanished(&id, &name, same_boot),
            }
        }
        let held = self.state.nodes.get(&name).map(|node| node.holds.clone()).unwrap_or_default();
        for id in held.difference(&known) {
            self.let_go(id, &name);
        }
        self.drain(&name);
        // A node is here that was not.
        self.look_at_all = true;
    }

    /// The node and its session; a session that it had is closed.
    fn register(&mut self, session: SessionId, name: &str, row: NodeRow) {
        let free = self.state.registered.iter().position(Option::is_none);
        let order = free.unwrap_or(self.state.registered.len()) as u64;
        let known = self.state.nodes.get(name).map(|node| &node.row);
        let (order, cordon) = known.map_or((order, None), |row| (row.order, row.cordon.clone()));
        let row = NodeRow { order, cordon, ..row };
        if known != Some(&row) {
            self.rows.push(Row::Node(name.to_owned()));
        }
        let fills_a_gap = known.is_none() && free.is_some();
        let is_other = |known: &NodeRow| {
            (known.capacity, &known.gpus, known.containers) != (row.capacity, &row.gpus, row.containers)
        };
        let has_changed = fills_a_gap || known.is_some_and(is_other);
        if known.is_none() {
            match free {
                Some(free) => self.state.registered[free] = Some(name.to_owned()),
                None => {
                    self.state.registered.push(Some(name.to_owned()));
                    self.state.places.add(&row);
                }
            }
        }
        let node = self.state.nodes.entry(name.to_owned()).or_insert_with(|| Node::new(row.clone()));
        node.row = row;
        // It is told so by the Welcome.
        node.contact_at = self.state.uptime;
        let old = node.session.replace(session);
        self.state.places.open(&node.row, node.takes_work());
        if let Some(old) = old {
            self.state.sessions.remove(&old);
            self.effects.push(Effect::Close(old, format!("the agent of {name} has connected again")));
        }
        self.state.sessions.insert(session, name.to_owned());
        if has_changed {
            self.withdraw(name);
            self.state.find_places();
        }
    }

    /// Of the cards that a node offers those that placement knows.
    fn known_cards(&mut self, node: &str, CardOffer { model, cards }: CardOffer) -> CardOffer {
        let known = CardSet::from_bits(cards.bits() & KNOWN_CARDS.bits());
        if known != cards {
            let (many, most) = (cards.len(), KNOWN_CARDS.len());
            let warning =
                format!("node {node} offers {many} GPU cards: only those numbered below {most} are used");
            self.effects.push(Effect::Warn(warning));
        }
        if known.is_empty() { CardOffer::default() } else { CardOffer { model, cards: known } }
    }

    /// An attempt that never began was to have cards that its node does not offer any more.
    fn lose_cards(&mut self, id: &TaskId, node: &str) {
        let cards = self.state.tasks.get(id).map(|row| row.task.cards).unwrap_or_default();
        let reason = format!("{node} does not offer all of its cards ({cards}) any more; to be placed again");
        self.decide(id, DecisionKind::Lost, reason, Vec::new());
        self.place_again(id);
    }

    /// A node knows no attempt of the task any more.
    pub(super) fn let_go(&mut self, id: &TaskId, node: &str) {
        if self.state.let_go(id, node)
            && let Some(row) = self.state.tasks.get(id)
        {
            self.rows.push(Row::Run { sequence: row.task.sequence(), task: id.clone() });
        }
    }

    /// An attempt that its node knew, and knows no more.
    fn vanished(&mut self, id: &TaskId, node: &str, same_boot: bool) {
        let Some(TaskRow { task, .. }) = self.state.tasks.get(id).map(Box::as_ref) else { return };
        let attempt = task.attempt;
        if task.cancel.is_some() {
            self.cancelled(id);
        } else if same_boot {
            self.decide(
                id,
                DecisionKind::Lost,
                format!("{node} no longer knows attempt {attempt}, which it had: nobody knows how it ended"),
                Vec::new(),
            );
            self.end(id, ExitStatus::Unknown, self.now);
        } else if task.submission.task_lease_seconds.is_some() || self.use_retry(id) {
            let reason =
                format!("{node} was started anew, which ended attempt {attempt}; to be placed again");
            self.decide(id, DecisionKind::Lost, reason, Vec::new());
            self.place_again(id);
        } else {
            let reason =
                format!("{node} was started anew, which ended attempt {attempt}; no retries are left");
            self.decide(id, DecisionKind::Lost, reason, Vec::new());
            self.end(id, ExitStatus::Unknown, self.now);
        }
    }

    pub(super) fn gone(&mut self, session: SessionId) {
        let Some(name) = self.state.sessions.remove(&session) else { return };
        let Some(node) = self.state.nodes.get_mut(&name).filter(|node| node.session == Some(session)) else {
            return;
        };
        node.session = None;
        node.cpu_utilisation_permille = 0;
        self.state.places.open(&node.row, false);
        for id in node.tasks.clone() {
            let Some(task) = self.state.tasks.get(&id).map(|row| &row.task).filter(|task| !task.lost) else {
                continue;
            };
            let reason = match task.submission.task_lease_seconds {
                None => format!(
                    "{name} does not answer; the task stays there until the node is back, or `shaper node fence {name}` says \
                     that it is dead"
                ),
                Some(seconds) => format!(
                    "{name} does not answer; it ends the task {seconds} s after it last heard of the broker, and the task is \
                     placed again half as long after that"
                ),
            };
            self.decide(&id, DecisionKind::Lost, reason, Vec::new());
            if let Some(row) = self.change(&id) {
                row.task.lost = true;
            }
        }
        self.withdraw(&name);
        self.look_at_all = true;
    }

    pub(super) fn result(&mut self, session: SessionId, result: DirectiveResult) {
        let Some(node) = self.state.sessions.get(&session).cloned() else { return };
        let DirectiveResult { execution, generation, outcome } = result;
        let current = matches!(self.standing(&node, &execution), Standing::Current);
        match outcome {
            DirectiveOutcome::Settled(report) => {
                self.take(session, &node, *report);
                if current {
                    self.stays_as_it_is(&execution.task, &node, generation, "it has another directive since");
                }
            }
            DirectiveOutcome::Accepted if current => self.acknowledge(&execution.task),
            DirectiveOutcome::Accepted => self.forgotten(&node, &execution, generation),
            DirectiveOutcome::Refused(why) => {
                let task = self.state.tasks.get(&execution.task).map(|row| &row.task);
                let never_began = task.is_some_and(|task| {
                    !task.acknowledged
                        && task.start_generation == generation
                        && matches!(task.phase, Phase::Starting { .. })
                });
                if current && task.is_some_and(|task| task.preempted == Some(generation)) {
                    self.victim_stays(&execution.task, &node);
                }
                if current {
                    self.stays_as_it_is(&execution.task, &node, generation, &why);
                }
                if current && never_began {
                    self.refused(&execution.task, &node, &why);
                } else {
                    self.effects.push(Effect::Warn(format!(
                        "node {node} refused directive {generation} about {execution}: {why}"
                    )));
                }
            }
        }
    }

    /// An agent has forgotten an attempt that is over; unless it speaks of how that began.
    fn forgotten(&mut self, node: &str, execution: &ExecutionId, generation: u64) {
        let row = self.state.tasks.get(&execution.task);
        let holder = row.and_then(|row| row.task.holders.iter().find(|holder| holder.node == node));
        if holder.is_some_and(|it| it.attempt == execution.attempt && it.start_generation < generation) {
            self.let_go(&execution.task, node);
        }
    }

    fn refused(&mut self, id: &TaskId, node: &str, why: &str) {
        self.decide(id, DecisionKind::Refused, format!("{node} refused to start it: {why}"), Vec::new());
        if self.state.tasks.get(id).is_some_and(|row| row.task.cancel.is_some()) {
            self.cancelled(id);
        } else if self.use_retry(id) {
            self.set_back(id, Setback::Refused);
        } else {
            let status =
                ExitStatus::NotStarted { stage: "refused".to_owned(), error: why.to_owned(), code: 126 };
            self.end(id, status, self.now);
        }
        // It has never known it.
        self.let_go(id, node);
    }

    /// Uses up one of the task's retries, if it has one.
    fn use_retry(&mut self, id: &TaskId) -> bool {
        let Some(TaskRow { task, .. }) = self.change(id) else { return false };
        let has = task.retries_used < task.submission.spec.retries;
        task.retries_used += u32::from(has);
        has
    }

    pub(super) fn report(&mut self, session: SessionId, report: NodeTask) {
        if let Some(node) = self.state.sessions.get(&session).cloned() {
            self.take(session, &node, report);
        }
    }

    pub(super) fn node_report(&mut self, session: SessionId, cpu_utilisation_permille: u32) {
        let node = self.state.sessions.get(&session).and_then(|name| self.state.nodes.get_mut(name));
        if let Some(node) = node {
            node.cpu_utilisation_permille = cpu_utilisation_permille;
        }
    }

    pub(super) fn agent_decided(&mut self, session: SessionId, execution: &ExecutionId, decision: Decision) {
        let Some(node) = self.state.sessions.get(&session).cloned() else { return };
        if !matches!(self.standing(&node, execution), Standing::Current) {
            self.effects.push(Effect::Warn(format!(
                "node {node} decided `{}` about {execution}, which is not on it: {}",
                decision.kind, decision.reason
            )));
            return;
        }
        self.acknowledge(&execution.task);
        self.state.tally.decided(decision.kind);
        let decision = Decision { by: node, ..decision };
        self.state.shown.note(&execution.task, &decision);
        let Some(row) = self.change(&execution.task) else { return };
        row.task.evicted |= decision.kind == DecisionKind::Evicted;
        row.decide(decision);
    }

    fn standing(&self, node: &str, execution: &ExecutionId) -> Standing {
        let Some(TaskRow { task, .. }) = self.state.tasks.get(&execution.task).map(Box::as_ref) else {
            return Standing::Unknown;
        };
        if execution.attempt < task.attempt {
            return Standing::Over;
        }
        if execution.attempt > task.attempt || task.node.as_deref() != Some(node) {
            return Standing::Unknown;
        }
        if task.phase.node().is_some() { Standing::Current } else { Standing::Over }
    }

    /// Takes note of what an agent says about an execution.
    fn take(&mut self, session: SessionId, node: &str, report: NodeTask) {
        let NodeTask { status, generation, evicted, lease_over, request } = report;
        let execution = status.execution();
        let has_ended = matches!(status.phase, RunPhase::Ended { .. });
        match (self.standing(node, &execution), &status.phase) {
            // Never kill on doubt.
            (Standing::Unknown, _) => self.effects.push(Effect::Warn(format!(
                "node {node} has {execution}, which this broker did not place there: it is left alone"
            ))),
            (Standing::Current, _) => {
                // Whoever ended before its node was asked to end it has ended by itself.
                let made_room = |row: &TaskRow| row.task.preempted.is_some_and(|asked| asked <= generation);
                let row = self.state.tasks.get(&execution.task).filter(|row| !row.task.evicted);
                if row.is_some_and(|row| evicted || has_ended && made_room(row))
                    && let Some(row) = self.change(&execution.task)
                {
                    row.task.evicted = true;
                }
                self.update(&execution.task, status, lease_over);
                if let Some(request) = request.filter(|_| !has_ended) {
                    self.guarantees(&execution.task, &request, generation);
                }
            }
            (Standing::Over, RunPhase::Ended { .. }) => {
                self.direct(session, execution, DirectiveKind::Forget)
            }
            (Standing::Over, RunPhase::Running) => {
                let reason = "this attempt is known to be over".to_owned();
                let stop = DirectiveKind::Stop { grace_millis: STRAY_GRACE_MILLIS, reason };
                self.direct(session, execution, stop);
            }
        }
    }

    fn acknowledge(&mut self, id: &TaskId) {
        if self.state.tasks.get(id).is_some_and(|row| !row.task.acknowledged)
            && let Some(row) = self.change(id)
        {
            row.task.acknowledged = true;
        }
    }

    fn update(&mut self, id: &TaskId, mut status: TaskStatus, lease_over: bool) {
        self.acknowledge(id);
        let phase = status.phase.clone();
        let Some(TaskRow { task, .. }) = self.state.tasks.get(id).map(Box::as_ref) else { return };
        let starts = match &task.phase {
            Phase::Starting { node } => Some(node.clone()),
            _ => None,
        };
        if phase == RunPhase::Running {
            self.watch(id, &status);
        }
        let Some(TaskRow { task, .. }) = self.state.tasks.get(id).map(Box::as_ref) else { return };
        let before = task.on_node.as_deref();
        if before != Some(&status) {
            // What it has used is not news for those who watch, and is told anew after each loss of a session.
            let is_news = !before.is_some_and(|before| differs_in_usage_only(before, &mut status));
            let row = if is_news { self.change(id) } else { self.state.tasks.get_mut(id).map(Box::as_mut) };
            if let Some(row) = row {
                row.task.on_node = Some(Arc::new(status));
            }
        }
        match (phase, starts) {
            (RunPhase::Running, Some(node)) => self.move_to(id, Phase::Running { node }),
            (RunPhase::Running, None) => {}
            (RunPhase::Ended { status, at }, _) => self.attempt_ended(id, status, at, lease_over),
        }
    }

    /// The node says that the latest attempt is over.
    fn attempt_ended(&mut self, id: &TaskId, status: ExitStatus, at: UnixNanos, lease_over: bool) {
        let Some(TaskRow { task, .. }) = self.state.tasks.get(id).map(Box::as_ref) else { return };
        let execution = task.execution();
        let session =
            task.phase.node().and_then(|node| self.state.nodes.get(node)).and_then(|node| node.session);
        let evicted = task.evicted;
        if task.cancel.is_some() {
            self.cancelled(id);
        } else if lease_over && task.submission.task_lease_seconds.is_some() {
            let reason = format!(
                "attempt {} was ended on its node, which was started anew or did not hear of the broker in time",
                execution.attempt
            );
            self.take_from_lost(id, &reason);
        } else if evicted {
            self.set_back(id, Setback::Evicted);
        } else if let ExitStatus::NotStarted { stage, error, .. } = &status
            && stage == ABANDONED
        {
            let reason = format!("its start was abandoned, through no fault of its own: {error}");
            self.decide(id, DecisionKind::Refused, reason, Vec::new());
            self.set_back(id, Setback::Abandoned);
        } else {
            self.end(id, status, at);
        }
        if let Some(row) = self.change(id) {
            row.task.generation += 1;
        }
        if let Some(session) = session {
            self.direct(session, execution, DirectiveKind::Forget);
        }
    }

    pub(super) fn cancelled(&mut self, id: &TaskId) {
        self.move_to(id, Phase::Cancelled);
        self.decide(id, DecisionKind::Cancelled, "it is over", Vec::new());
    }

    /// The task is over.
    fn end(&mut self, id: &TaskId, status: ExitStatus, at: UnixNanos) {
        let mut reason = match &status {
            ExitStatus::Code(code) => format!("exit code {code}"),
            ExitStatus::Signal(signal) => format!("ended by signal {signal}"),
            ExitStatus::NotStarted { stage, error, .. } => format!("not started ({stage}): {error}"),
            ExitStatus::Unknown => "nobody saw how it ended".to_owned(),
        };
        let task = self.state.tasks.get(id).and_then(|row| row.task.on_node.as_ref());
        if let Some(kill) = task.and_then(|task| task.oom_kill) {
            reason = format!("{reason}; {kill}");
        }
        if let ExitStatus::Code(0..) = status {
            self.record(id, at);
        }
        self.move_to(id, Phase::Ended { status, at });
        self.decide(id, DecisionKind::Ended, reason, Vec::new());
    }

    /// Adds what it used to the history of its name.
    fn record(&mut self, id: &TaskId, at: UnixNanos) {
        let Some(TaskRow { task, .. }) = self.state.tasks.get(id).map(Box::as_ref) else { return };
        let Some(status) = task.on_node.clone() else { return };
        self.watch_end(id, &status, at);
        let Some(TaskRow { task, .. }) = self.state.tasks.get(id).map(Box::as_ref) else { return };
        let spec = task.spec();
        let key = (spec.namespace.clone(), spec.name.clone());
        let empty = || History::new(key.0.clone(), key.1.clone(), *task.demand());
        let history = self.state.histories.entry(key.clone()).or_insert_with(empty);
        history.add(Sample::of(&status, at), *task.demand(), task.owner().uid);
        self.rows.push(Row::History(key.0, key.1));
    }

    fn direct(&mut self, session: SessionId, execution: ExecutionId, kind: DirectiveKind) {
        let generation = self.state.tasks.get(&execution.task).map_or(0, |row| row.task.generation);
        let directive = Directive { execution, generation, epoch: self.state.epoch, kind };
        self.effects.push(Effect::Direct(session, Box::new(directive)));
    }

    /// A directive about the latest attempt, if its node is connected; else it is due when the node is back.
    pub(super) fn direct_assigned(&mut self, id: &TaskId, kind: DirectiveKind) {
        let Some(TaskRow { task, .. }) = self.state.tasks.get(id).map(Box::as_ref) else { return };
        let node = task.phase.node().and_then(|node| self.state.nodes.get(node));
        if let Some(session) = node.and_then(|node| node.session) {
            self.direct(session, task.execution(), kind);
        }
    }

    pub(super) fn direct_start(&mut self, id: &TaskId) {
        let Some(TaskRow { task, .. }) = self.state.tasks.get(id).map(Box::as_ref) else { return };
        let start = DirectiveKind::Start(task.submission.clone(), task.cards);
        self.direct_assigned(id, start);
    }

    pub(super) fn direct_stop(&mut self, id: &TaskId) {
        let Some(cancel) = self.state.tasks.get(id).and_then(|row| row.task.cancel) else { return };
        let stop =
            DirectiveKind::Stop { grace_millis: cancel.grace_millis, reason: "it was cancelled".to_owned() };
        self.direct_assigned(id, stop);
    }
}

/// Whether two reports of a running task say the same but for what it has used.
fn differs_in_usage_only(before: &TaskStatus, after: &mut TaskStatus) -> bool {
    let usage = std::mem::replace(&mut after.usage, before.usage);
    let is_same = after.phase == RunPhase::Running && before == after;
    after.usage = usage;
    is_same
}
