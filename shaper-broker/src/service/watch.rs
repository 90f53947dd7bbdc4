//! Who watches tasks: what they are sent, and from where on.

use std::sync::Arc;

use shaper_core::{id::TaskId, spec::Credentials};
use shaper_identity::access::Grant;
use shaper_proto::v1;
use tokio::sync::{broadcast, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::{covers, own, refused, unavailable};
use crate::{
    actor::{ActorError, Handle, View},
    reactor::{Refusal, Task, query},
    wire,
};

/// Messages that wait for a watcher; the rest waits in the channel of changes, which has an end.
const AHEAD: usize = 16;

type Answer = Result<v1::ClusterTask, Status>;

/// Who watches, and which task: any, if none is named.
pub(super) struct Watcher {
    pub(super) caller: Credentials,
    pub(super) grant: Option<Arc<Grant>>,
    pub(super) id: Option<TaskId>,
}

/// Where a watch begins.
struct Beginning {
    epoch: u64,
    tasks: Vec<Arc<Task>>,
    changes: broadcast::Receiver<Arc<Task>>,
}

impl Watcher {
    /// The tasks as they are, or the changes after a revision; and then every change that the caller may see.
    pub(super) async fn begin(
        self,
        broker: &Handle,
        from: Option<v1::WatchFrom>,
    ) -> Result<ReceiverStream<Answer>, Status> {
        let (watcher, beginning) = match from {
            Some(v1::WatchFrom { revision, epoch }) => {
                let begin = move |view: &View<'_>| {
                    let tasks = view.since(epoch, revision);
                    let beginning = tasks.map(|tasks| Beginning { epoch, tasks, changes: view.changes() });
                    (self, beginning)
                };
                let (watcher, beginning) = broker.read(begin).await.map_err(unavailable)?;
                let beginning = beginning.ok_or_else(|| {
                    Status::out_of_range(format!(
                        "not all changes after revision {revision} of epoch {epoch} are known any more; list the tasks, \
                         and watch from the revision of the list"
                    ))
                })?;
                (watcher, beginning)
            }
            None => {
                let begin = move |view: &View<'_>| {
                    let tasks = self.tasks(view);
                    let changes = view.changes();
                    tasks.map(|tasks| (self, Beginning { epoch: view.state.epoch, tasks, changes }))
                };
                broker.read(begin).await.map_err(unavailable)?.map_err(refused)?
            }
        };
        let (answers, stream) = mpsc::channel(AHEAD);
        tokio::spawn(watcher.send(beginning, answers));
        Ok(ReceiverStream::new(stream))
    }

    /// The tasks as they are.
    fn tasks(&self, view: &View<'_>) -> Result<Vec<Arc<Task>>, Refusal> {
        let tasks = match &self.id {
            Some(id) => vec![own(view, &self.caller, self.grant.as_ref(), id)?],
            None => {
                let mut tasks: Vec<_> =
                    query::tasks(view.state, &self.caller).filter(|task| self.sees(task)).collect();
                tasks.sort_unstable_by_key(|task| task.id());
                tasks
            }
        };
        Ok(tasks.into_iter().map(|task| Arc::new(task.clone())).collect())
    }

    fn sees(&self, task: &Task) -> bool {
        self.id.as_ref().is_none_or(|id| task.id() == id)
            && query::may_see(&self.caller, task.owner())
            && covers(self.grant.as_ref(), task)
    }

    async fn send(self, beginning: Beginning, answers: mpsc::Sender<Answer>) {
        let Beginning { epoch, tasks, mut changes } = beginning;
        for task in tasks.into_iter().filter(|task| self.sees(task)) {
            if answers.send(Ok(wire::cluster_task(epoch, &task))).await.is_err() {
                return;
            }
        }
        loop {
            let change = tokio::select! {
                change = changes.recv() => change,
                () = answers.closed() => return,
            };
            let answer = match change {
                Ok(task) if !self.sees(&task) => continue,
                Ok(task) => Ok(wire::cluster_task(epoch, &task)),
                Err(broadcast::error::RecvError::Lagged(missed)) => Err(Status::out_of_range(format!(
                    "{missed} changes were missed; list the tasks and watch again"
                ))),
                Err(broadcast::error::RecvError::Closed) => Err(unavailable(ActorError::Stopped)),
            };
            let is_last = answer.is_err();
            if answers.send(answer).await.is_err() || is_last {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use tokio_stream::StreamExt;
    use tonic::Code;

    use super::*;
    use crate::{
        actor::{self, Actor, CHANGES},
        reactor::{Bounds, Event, tests as examples},
        store::memory::Memory,
    };

    #[tokio::test]
    async fn a_watcher_that_falls_behind_is_told_to_list_again() {
        let (broker, seat) = actor::prepare(Bounds::default());
        let actor = Actor::open(Box::new(Memory::default()), seat).unwrap();
        let running = thread::spawn(move || actor.run());
        let watcher = Watcher { caller: examples::USER, grant: None, id: None };
        let mut changes = watcher.begin(&broker, None).await.unwrap();
        // More than wait for it and in the channel.
        let most = CHANGES + 2 * AHEAD;
        let submit = |number| {
            let spec =
                Box::new(examples::spec(&format!("t{number}"), 1000, shaper_core::spec::Priority::Low, 0));
            Event::Submit { caller: examples::USER, spec }
        };
        broker.ask_all((0..most).map(submit).collect()).await.unwrap().await.unwrap();
        let mut seen = 0;
        let error = loop {
            match changes.next().await.expect("a reason") {
                Ok(_) => seen += 1,
                Err(error) => break error,
            }
        };
        assert_eq!(error.code(), Code::OutOfRange, "{error:?} after {seen}");
        assert!(error.message().contains("list the tasks"), "{error:?}");
        broker.stop().await;
        running.join().unwrap().unwrap();
    }
}
