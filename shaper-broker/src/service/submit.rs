//! Many submissions in one stream. What is there is decided in one go; while that becomes durable the next are read.

use std::sync::Arc;

use shaper_core::spec::{Credentials, TaskSpec};
use shaper_identity::access::Grant;
use shaper_proto::v1::{self, submit_outcome::Outcome};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::{Stream, StreamExt, wrappers::ReceiverStream};
use tonic::{Status, Streaming};

use super::{another_answer, breach, invalid, refused, unavailable};
use crate::{
    actor::{ActorError, Handle},
    reactor::{Answer, Event, Refusal},
    ready,
};

/// Messages that are read at a time.
const AT_A_TIME: usize = 64;
/// Of these, how many wait for their answers before more is read.
const AHEAD: usize = 16;

type Answers = oneshot::Receiver<Vec<Result<Answer, Refusal>>>;

/// What was read at a time.
struct Batch {
    /// What is known of each: a refusal if it was not even asked for.
    outcomes: Vec<v1::SubmitOutcome>,
    answers: Answers,
}

fn refusal(status: &Status) -> Option<Outcome> {
    let (code, message) = (status.code().into(), status.message().to_owned());
    Some(Outcome::Refused(v1::SubmitRefusal { code, message }))
}

/// An outcome for each spec, in their order.
pub(super) fn outcomes(
    broker: Handle,
    caller: Credentials,
    grant: Option<Arc<Grant>>,
    specs: Streaming<v1::SubmitTasksRequest>,
) -> impl Stream<Item = Result<v1::SubmitTasksResponse, Status>> {
    let (batches, stream) = mpsc::channel(AHEAD);
    tokio::spawn(read(broker, caller, grant, specs, batches));
    ReceiverStream::new(stream).then(|batch: Result<Batch, Status>| async { batch?.conclude().await })
}

/// Reads until the client says no more, or no longer listens.
async fn read(
    broker: Handle,
    caller: Credentials,
    grant: Option<Arc<Grant>>,
    mut specs: Streaming<v1::SubmitTasksRequest>,
    batches: mpsc::Sender<Result<Batch, Status>>,
) {
    loop {
        let some = ready::some(&mut specs, AT_A_TIME).await;
        if some.is_empty() {
            return;
        }
        let (mut outcomes, mut events, mut failed) = (Vec::new(), Vec::new(), None);
        for message in some {
            match message {
                Ok(v1::SubmitTasksRequest { specs }) => {
                    for spec in specs {
                        let task_id = spec.profile.as_ref().map(|it| it.task_id.clone()).unwrap_or_default();
                        let outcome = match check(grant.as_ref(), spec) {
                            Ok(spec) => {
                                events.push(Event::Submit { caller: caller.clone(), spec });
                                None
                            }
                            Err(status) => refusal(&status),
                        };
                        outcomes.push(v1::SubmitOutcome { task_id, outcome });
                    }
                }
                Err(status) => failed = Some(status),
            }
        }
        let batch = match broker.ask_all(events).await {
            Ok(answers) => Ok(Batch { outcomes, answers }),
            Err(error) => Err(unavailable(error)),
        };
        let is_last = batch.is_err() || failed.is_some();
        if batches.send(batch).await.is_err() {
            return;
        }
        if let Some(status) = failed {
            // The client may be gone.
            let _ = batches.send(Err(status)).await;
        }
        if is_last {
            return;
        }
    }
}

fn check(grant: Option<&Arc<Grant>>, spec: v1::TaskSpec) -> Result<Box<TaskSpec>, Status> {
    let spec = Box::new(TaskSpec::try_from(spec).map_err(invalid)?);
    if let Some(grant) = grant {
        grant.permits(&spec).map_err(|error| breach(&error))?;
    }
    Ok(spec)
}

impl Batch {
    /// When all of it is durable.
    async fn conclude(self) -> Result<v1::SubmitTasksResponse, Status> {
        let Batch { mut outcomes, answers } = self;
        let stopped = || unavailable(ActorError::Stopped);
        let mut answers = answers.await.map_err(|_| stopped())?.into_iter();
        for asked in outcomes.iter_mut().filter(|it| it.outcome.is_none()) {
            asked.outcome = match answers.next().ok_or_else(stopped)? {
                Ok(Answer::Task(_, task)) => Some(Outcome::Revision(task.revision)),
                Ok(_) => return Err(another_answer()),
                Err(refusal_of_broker) => refusal(&refused(refusal_of_broker)),
            };
        }
        Ok(v1::SubmitTasksResponse { outcomes })
    }
}
