//! The thread that owns the node's state. Everything that reads or changes it is a job that this
//! thread runs, one after the other; there are no locks.

use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use crate::node::Node;

type Job = Box<dyn FnOnce(&mut Node) + Send>;

/// How often the node adjusts its tasks (see `Node::tick` for what it does less often).
const TICK: Duration = Duration::from_millis(100);
/// Jobs that may wait; more are refused.
const QUEUE: usize = 1024;

/// The node is not there any more, or has more to do than it can.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ActorError {
    /// Its thread ended.
    #[error("the agent is stopping")]
    Stopped,
    /// Its queue is full.
    #[error("the agent has {QUEUE} requests waiting; try again")]
    Busy,
}

/// A way to the node.
#[derive(Clone, Debug)]
pub struct Handle {
    jobs: mpsc::Sender<Job>,
}

impl Handle {
    /// A handle, and the queue to be given to [`run`].
    pub fn new() -> (Handle, Queue) {
        let (jobs, queue) = mpsc::channel(QUEUE);
        (Handle { jobs }, Queue(queue))
    }

    /// Runs `job` on the node and returns what it returns.
    pub async fn call<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Node) -> T + Send + 'static,
    ) -> Result<T, ActorError> {
        let (reply, answer) = oneshot::channel();
        let job: Job = Box::new(move |node| {
            // The caller may have gone away; the work is done all the same.
            let _ = reply.send(job(node));
        });
        self.jobs.try_send(job).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => ActorError::Busy,
            mpsc::error::TrySendError::Closed(_) => ActorError::Stopped,
        })?;
        answer.await.map_err(|_| ActorError::Stopped)
    }

    /// Runs `job` on the node when its turn comes, unless its queue is full.
    pub fn try_tell(&self, job: impl FnOnce(&mut Node) + Send + 'static) {
        let _ = self.jobs.try_send(Box::new(job));
    }

    /// Runs `job` on the node when its turn comes, however long the queue.
    pub async fn tell(&self, job: impl FnOnce(&mut Node) + Send + 'static) {
        // A node that has stopped needs no telling.
        let _ = self.jobs.send(Box::new(job)).await;
    }
}

/// The jobs that wait.
pub struct Queue(mpsc::Receiver<Job>);

/// Runs jobs until every handle is gone or [`Node::is_stopping`].
pub fn run(mut node: Node, Queue(mut jobs): Queue) -> Node {
    while let Some(job) = jobs.blocking_recv() {
        job(&mut node);
        if node.is_stopping() {
            break;
        }
    }
    node
}

/// Sends the node its ticks for as long as it lives.
pub async fn tick(handle: Handle) {
    let mut interval = tokio::time::interval(TICK);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        // A tick that finds the queue full is skipped; the next one does its work.
        if handle.call(Node::tick).await == Err(ActorError::Stopped) {
            return;
        }
    }
}
