//! Submissions and changes of tasks in streams.

use shaper_proto::v1::{SubmitOutcome, submit_outcome::Outcome};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::*;

/// A stream of submissions.
struct Submissions {
    to: mpsc::Sender<v1::SubmitTasksRequest>,
    from: Streaming<v1::SubmitTasksResponse>,
    /// Outcomes that came together with one that was asked for.
    ahead: std::collections::VecDeque<SubmitOutcome>,
}

impl Submissions {
    async fn begin(broker: &Broker) -> Submissions {
        let (to, requests) = mpsc::channel(1);
        let from = broker.client().await.submit_tasks(ReceiverStream::new(requests)).await.unwrap();
        Submissions { to, from: from.into_inner(), ahead: Default::default() }
    }

    async fn send(&self, specs: Vec<v1::TaskSpec>) {
        self.to.send(v1::SubmitTasksRequest { specs }).await.unwrap();
    }

    async fn outcome(&mut self) -> Result<SubmitOutcome, Status> {
        loop {
            if let Some(outcome) = self.ahead.pop_front() {
                return Ok(outcome);
            }
            let answer =
                tokio::time::timeout(PATIENCE, self.from.message()).await.expect("the broker is silent");
            let answer = answer?.ok_or_else(|| Status::unavailable("the stream has ended"))?;
            self.ahead.extend(answer.outcomes);
        }
    }
}

fn code(outcome: &SubmitOutcome) -> Option<Code> {
    match &outcome.outcome {
        Some(Outcome::Refused(refused)) => Some(Code::from(refused.code)),
        _ => None,
    }
}

#[tokio::test]
async fn each_submission_of_a_stream_has_its_outcome_in_order() {
    let broker = Broker::start();
    let mut stream = Submissions::begin(&broker).await;
    let other = spec("other", 2000);
    let bad = v1::TaskSpec { cwd: "here".into(), ..spec("bad", 1000) };
    let worse = v1::TaskSpec { profile: None, ..spec("worse", 1000) };
    stream.send(vec![spec("a", 1000), bad, spec("other", 1000)]).await;
    stream.send(vec![worse, other, spec("a", 1000), spec("b", 1000)]).await;
    let mut outcomes = Vec::new();
    for _ in 0..7 {
        outcomes.push(stream.outcome().await.unwrap());
    }
    let told: Vec<_> = outcomes.iter().map(|it| (it.task_id.as_str(), code(it))).collect();
    let expected = [
        ("a", None),
        ("bad", Some(Code::InvalidArgument)),
        ("other", None),
        ("", Some(Code::InvalidArgument)),
        ("other", Some(Code::AlreadyExists)),
        ("a", None),
        ("b", None),
    ];
    assert_eq!(told, expected);
    assert_eq!(outcomes[0].outcome, outcomes[5].outcome, "the same task");
    drop(stream.to);
    assert!(stream.from.message().await.unwrap().is_none(), "it ends when the client has said all");
    let mut client = broker.client().await;
    let list = client.list_cluster_tasks(v1::ListClusterTasksRequest {}).await.unwrap().into_inner();
    assert_eq!(list.tasks.len(), 3);
}

#[tokio::test]
async fn what_a_stream_was_told_outlives_the_broker() {
    let mut broker = Broker::start();
    let mut stream = Submissions::begin(&broker).await;
    let specs: Vec<_> = (0..500).map(|number| spec(&format!("t{number}"), 1000)).collect();
    for some in specs.chunks(7) {
        stream.send(some.to_vec()).await;
    }
    let mut told = 0;
    while told < 250 {
        assert_eq!(code(&stream.outcome().await.unwrap()), None);
        told += 1;
    }
    broker.kill();
    while stream.outcome().await.is_ok() {
        told += 1;
    }
    broker.start_again(&[]);
    // All are sent again, as after any stream that broke.
    let mut client = broker.client().await;
    let list = client.list_cluster_tasks(v1::ListClusterTasksRequest {}).await.unwrap().into_inner();
    for number in 0..told {
        assert!(list.tasks.iter().any(|task| task_id(task) == format!("t{number}")), "t{number} of {told}");
    }
    let mut stream = Submissions::begin(&broker).await;
    for some in specs.chunks(7) {
        stream.send(some.to_vec()).await;
    }
    for _ in 0..specs.len() {
        assert_eq!(code(&stream.outcome().await.unwrap()), None);
    }
    let list = client.list_cluster_tasks(v1::ListClusterTasksRequest {}).await.unwrap().into_inner();
    assert_eq!(list.tasks.len(), specs.len());
}

fn task_id(task: &v1::ClusterTask) -> &str {
    &task.spec.as_ref().unwrap().profile.as_ref().unwrap().task_id
}

async fn watch_from(
    client: &mut BrokerClient<Channel>,
    revision: u64,
    epoch: u64,
) -> Result<Streaming<v1::ClusterTask>, Status> {
    let from = Some(v1::WatchFrom { revision, epoch });
    let request = v1::WatchClusterTasksRequest { task_id: String::new(), from };
    Ok(client.watch_cluster_tasks(request).await?.into_inner())
}

#[tokio::test]
async fn a_watch_goes_on_after_a_revision_and_a_new_broker_wants_a_new_list() {
    let mut broker = Broker::start();
    let mut client = broker.client().await;
    submit(&mut client, spec("a", 1000)).await.unwrap();
    let list = client.list_cluster_tasks(v1::ListClusterTasksRequest {}).await.unwrap().into_inner();
    for task in ["b", "c"] {
        submit(&mut client, spec(task, 1000)).await.unwrap();
    }
    let mut changes = watch_from(&mut client, list.revision, list.epoch).await.unwrap();
    submit(&mut client, spec("d", 1000)).await.unwrap();
    let mut seen = Vec::new();
    for _ in 0..3 {
        let change = changes.message().await.unwrap().unwrap();
        assert_eq!(change.epoch, list.epoch);
        seen.push((task_id(&change).to_owned(), change.revision));
    }
    let expected = ["b", "c", "d"].into_iter().zip(list.revision + 1..);
    assert_eq!(seen, expected.map(|(task, revision)| (task.to_owned(), revision)).collect::<Vec<_>>());
    let error = watch_from(&mut client, list.revision + 100, list.epoch).await.unwrap_err();
    assert_eq!(error.code(), Code::OutOfRange, "a revision that has not been: {error}");

    broker.kill();
    broker.start_again(&[]);
    let mut client = broker.client().await;
    let error = watch_from(&mut client, list.revision, list.epoch).await.unwrap_err();
    assert_eq!(error.code(), Code::OutOfRange, "{error}");
    assert!(error.message().contains("list the tasks"), "{error}");
    let again = client.list_cluster_tasks(v1::ListClusterTasksRequest {}).await.unwrap().into_inner();
    assert!(again.epoch > list.epoch, "{} after {}", again.epoch, list.epoch);
    let mut changes = watch_from(&mut client, again.revision, again.epoch).await.unwrap();
    submit(&mut client, spec("e", 1000)).await.unwrap();
    assert_eq!(task_id(&changes.message().await.unwrap().unwrap()), "e");
}
