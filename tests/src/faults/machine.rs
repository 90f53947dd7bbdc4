//! A node that is only pretended: what its tasks do, whether or not an agent looks after them, and what it remembers.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use shaper_proto::v1::{self, agent_message, directive};
use tokio::{runtime, sync::mpsc};

use super::history::{Amount, History, How, Seen};
use crate::random::Random;

/// Of so many tasks that could begin, one is refused.
const REFUSES: u64 = 25;
/// Of so many, one is evicted before its end.
const EVICTS: u64 = 25;
const SIGKILL: i32 = 9;

/// Why an attempt ends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Why {
    Itself,
    Stopped,
    LeaseOver,
}

type News = mpsc::UnboundedSender<agent_message::Kind>;

/// The node. Clones are the same one.
#[derive(Clone)]
pub(super) struct Machine {
    node: String,
    has: Amount,
    history: History,
    state: Arc<Mutex<State>>,
    /// Where the time of its tasks passes.
    time: runtime::Handle,
}

struct State {
    random: Random,
    boot: u32,
    /// On disk: it outlives a boot.
    highest_epoch: u64,
    tasks: BTreeMap<(String, u32), v1::NodeTask>,
    news: Option<News>,
    /// When the agent asked, of the latest question that a broker answered.
    contact: Instant,
}

impl Machine {
    pub(super) fn new(
        node: &str,
        has: Amount,
        history: &History,
        random: Random,
        time: &runtime::Handle,
    ) -> Machine {
        let state = State {
            random,
            boot: 1,
            highest_epoch: 0,
            tasks: BTreeMap::new(),
            news: None,
            contact: Instant::now(),
        };
        Machine {
            node: node.to_owned(),
            has,
            history: history.clone(),
            state: Arc::new(Mutex::new(state)),
            time: time.clone(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a broker is told first. From here on, changes go to `news`.
    pub(super) fn meet(&self, news: News) -> v1::Hello {
        let mut state = self.lock();
        state.news = Some(news);
        v1::Hello {
            node: self.node.clone(),
            boot_id: format!("boot-{}", state.boot),
            capacity: Some(v1::Capacity {
                cpu_millicores: self.has.millicores,
                memory_bytes: self.has.bytes,
                ..Default::default()
            }),
            inventory: state.tasks.values().cloned().collect(),
            highest_epoch: state.highest_epoch,
            agent_socket: format!("/run/{}.sock", self.node),
            gpus: None,
            runs_containers: false,
        }
    }

    /// Obeys an epoch, or says why not.
    pub(super) fn obey(&self, epoch: u64) -> Result<(), String> {
        let mut state = self.lock();
        state.obey(epoch)?;
        self.history.note(Seen::Obeyed { node: self.node.clone(), epoch });
        Ok(())
    }

    /// A broker has answered what was asked then.
    pub(super) fn heard(&self, asked: Instant) {
        let mut state = self.lock();
        state.contact = state.contact.max(asked);
    }

    /// Carries out a directive, once: the answer.
    pub(super) fn carry_out(&self, directive: &v1::Directive) -> agent_message::Kind {
        use v1::directive_result::Outcome;
        let outcome = self.try_to(directive).unwrap_or_else(Outcome::Refused);
        agent_message::Kind::Result(v1::DirectiveResult {
            task_id: directive.task_id.clone(),
            attempt: directive.attempt,
            generation: directive.generation,
            outcome: Some(outcome),
        })
    }

    fn try_to(&self, directive: &v1::Directive) -> Result<v1::directive_result::Outcome, String> {
        use v1::directive_result::Outcome;
        let v1::Directive { task_id, attempt, generation, epoch, kind } = directive;
        let key = (task_id.clone(), *attempt);
        let mut state = self.lock();
        state.obey(*epoch)?;
        self.history.note(Seen::Accepted {
            node: self.node.clone(),
            task: task_id.clone(),
            attempt: *attempt,
            epoch: *epoch,
        });
        let (start, lease) = match kind {
            Some(directive::Kind::Start(start)) => (Some(start), None),
            Some(directive::Kind::LeasedStart(v1::LeasedStart { start, task_lease_seconds })) => {
                (start.as_ref(), Some(Duration::from_secs((*task_lease_seconds).into())))
            }
            _ => (None, None),
        };
        match (start, kind) {
            (Some(start), _) => {
                if let Some(there) = state.tasks.get(&key) {
                    return Ok(Outcome::Settled(there.clone()));
                }
                if lease.is_some_and(|lease| state.contact.elapsed() >= lease) {
                    return Err("no broker was heard of for the lease".to_owned());
                }
                if state.random.once_in(REFUSES) {
                    return Err("this node does not feel like it".to_owned());
                }
                let task = started(directive, start)?;
                let (time, how) = state.fate(&task);
                state.tasks.insert(key.clone(), task.clone());
                self.history.note(Seen::Began {
                    node: self.node.clone(),
                    task: task_id.clone(),
                    attempt: *attempt,
                });
                let (machine, boot) = (self.clone(), state.boot);
                if let Some(lease) = lease {
                    self.time.spawn(self.clone().supervise(key.clone(), lease, boot));
                }
                self.time.spawn(async move {
                    tokio::time::sleep(time).await;
                    machine.end(&key, how, Why::Itself, Some(boot));
                });
                Ok(Outcome::Settled(task))
            }
            (None, Some(directive::Kind::Stop(_))) => {
                let task =
                    state.tasks.get_mut(&key).ok_or_else(|| format!("there is no {task_id}.{attempt}"))?;
                task.generation = task.generation.max(*generation);
                drop(state);
                self.end(&key, How::Signal(SIGKILL), Why::Stopped, None);
                let there = self.lock().tasks.get(&key).cloned();
                there.map(Outcome::Settled).ok_or_else(|| format!("{task_id}.{attempt} is gone"))
            }
            (None, Some(directive::Kind::Forget(_))) => {
                if state.tasks.get(&key).is_some_and(|it| !runs(it)) {
                    state.tasks.remove(&key);
                }
                Ok(Outcome::Accepted(true))
            }
            (None, _) => Err("it says nothing".to_owned()),
        }
    }

    /// As a supervisor: ends an attempt when no broker was heard of for its lease.
    async fn supervise(self, key: (String, u32), lease: Duration, boot: u32) {
        loop {
            let until = {
                let state = self.lock();
                if state.boot != boot || !state.tasks.get(&key).is_some_and(runs) {
                    return;
                }
                state.contact + lease
            };
            if until <= Instant::now() {
                return self.end(&key, How::Signal(SIGKILL), Why::LeaseOver, Some(boot));
            }
            tokio::time::sleep_until(until.into()).await;
        }
    }

    /// An attempt ends, if it still lives (and, where that matters, in the same boot).
    fn end(&self, key: &(String, u32), how: How, why: Why, boot: Option<u32>) {
        let mut state = self.lock();
        if boot.is_some_and(|boot| boot != state.boot) {
            return;
        }
        let Some(entry) = state.tasks.get_mut(key).filter(|entry| runs(entry)) else { return };
        let status = match how {
            How::Code(code) => v1::exit::Status::Code(code),
            How::Signal(signal) => v1::exit::Status::Signal(signal),
            How::NotStarted | How::Unknown => v1::exit::Status::Unknown(true),
        };
        // By itself it is killed only where the node evicts it.
        entry.evicted = why == Why::Itself && matches!(how, How::Signal(_));
        entry.lease_over = why == Why::LeaseOver;
        if let Some(task) = &mut entry.task {
            task.exit = Some(v1::Exit { status: Some(status), unix_nanos: 1 });
        }
        let entry = entry.clone();
        self.history.note(Seen::Over { task: key.0.clone(), attempt: key.1, how });
        if entry.evicted {
            let decision = v1::Decision {
                unix_nanos: 1,
                by: self.node.clone(),
                kind: "evicted".to_owned(),
                reason: "for a test".to_owned(),
                nodes: Vec::new(),
            };
            state.tell(agent_message::Kind::Decision(v1::TaskDecision {
                task_id: key.0.clone(),
                attempt: key.1,
                decision: Some(decision),
            }));
        }
        state.tell(agent_message::Kind::Task(entry));
    }

    /// The machine is started anew. What ran is gone without a trace; what had ended is on disk.
    pub(super) fn boot(&self) {
        let mut state = self.lock();
        state.boot += 1;
        state.news = None;
        let lost: Vec<_> =
            state.tasks.iter().filter(|(_, it)| runs(it)).map(|(key, _)| key.clone()).collect();
        for key in lost {
            state.tasks.remove(&key);
            self.history.note(Seen::Over { task: key.0, attempt: key.1, how: How::Unknown });
        }
    }
}

impl State {
    fn obey(&mut self, epoch: u64) -> Result<(), String> {
        if epoch < self.highest_epoch {
            return Err(format!("epoch {epoch} is over: this node has obeyed epoch {}", self.highest_epoch));
        }
        self.highest_epoch = epoch;
        Ok(())
    }

    /// What will become of a task, and when.
    fn fate(&mut self, task: &v1::NodeTask) -> (Duration, How) {
        let command = task.task.as_ref().map(|task| task.command.as_slice()).unwrap_or_default();
        let number = |index: usize| command.get(index).and_then(|word| word.parse::<u64>().ok()).unwrap_or(0);
        let time = Duration::from_millis(number(1));
        if self.random.once_in(EVICTS) {
            (time / 2, How::Signal(SIGKILL))
        } else {
            (time, How::Code(number(2) as i32))
        }
    }

    /// Tells the broker, if one listens.
    fn tell(&mut self, news: agent_message::Kind) {
        if self.news.as_ref().is_some_and(|sender| sender.send(news).is_err()) {
            self.news = None;
        }
    }
}

/// The command of a task that ends by itself after so long, with that code.
pub(super) fn command(time: Duration, code: u8) -> Vec<String> {
    vec!["run".to_owned(), time.as_millis().to_string(), code.to_string()]
}

fn runs(entry: &v1::NodeTask) -> bool {
    entry.task.as_ref().is_some_and(|task| task.exit.is_none())
}

fn started(directive: &v1::Directive, start: &v1::Start) -> Result<v1::NodeTask, String> {
    let spec = start.spec.clone().ok_or("a start without a spec")?;
    let task = v1::Task {
        task_id: directive.task_id.clone(),
        attempt: directive.attempt,
        owner: start.owner.clone(),
        runs_as: spec.run_as.or_else(|| start.owner.clone()),
        command: spec.command,
        limits: Some(v1::Limits::default()),
        usage: Some(v1::Usage::default()),
        ..v1::Task::default()
    };
    Ok(v1::NodeTask {
        task: Some(task),
        generation: directive.generation,
        evicted: false,
        lease_over: false,
        request: None,
    })
}
