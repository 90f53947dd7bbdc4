//! Who follows decisions: those that they may see, as they are made.

use std::{sync::Arc, time::Duration};

use shaper_core::spec::{Credentials, Decision};
use shaper_identity::access::Grant;
use shaper_proto::v1;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::{covers, unavailable};
use crate::{
    actor::{Handle, View},
    reactor::{query, shown::Noted},
};

/// Two looks at the state are at least this far apart: many decisions come in one.
const APART: Duration = Duration::from_millis(100);

type Answer = Result<v1::WatchEventsResponse, Status>;

/// Who follows them.
#[derive(Clone)]
pub(super) struct Follower {
    pub(super) caller: Credentials,
    pub(super) grant: Option<Arc<Grant>>,
}

impl Follower {
    /// Those that there are; and if it is to `go_on`, each further one.
    pub(super) async fn begin(self, broker: Handle, go_on: bool) -> Result<ReceiverStream<Answer>, Status> {
        let (answers, stream) = mpsc::channel(1);
        let (first, last) = self.look(&broker, 0).await?;
        tokio::spawn(async move {
            if answers.send(Ok(first)).await.is_ok() && go_on {
                self.send(&broker, last, &answers).await;
            }
        });
        Ok(ReceiverStream::new(stream))
    }

    async fn send(self, broker: &Handle, mut last: u64, answers: &mpsc::Sender<Answer>) {
        let mut noted = broker.noted();
        loop {
            tokio::select! {
                // When the broker ends, the look says so.
                _ = noted.wait_for(|now| *now > last) => {}
                () = answers.closed() => return,
            }
            let (answer, is_last) = match self.look(broker, last).await {
                Ok((news, now)) => {
                    last = now;
                    if news.events.is_empty() && news.missed == 0 {
                        continue;
                    }
                    (Ok(news), false)
                }
                Err(status) => (Err(status), true),
            };
            if answers.send(answer).await.is_err() || is_last {
                return;
            }
            tokio::time::sleep(APART).await;
        }
    }

    /// What was decided after a decision, and the number of the latest.
    async fn look(&self, broker: &Handle, after: u64) -> Result<(v1::WatchEventsResponse, u64), Status> {
        let who = self.clone();
        broker.read(move |view| (who.news(view, after), view.state.shown.noted())).await.map_err(unavailable)
    }

    fn news(&self, view: &View<'_>, after: u64) -> v1::WatchEventsResponse {
        let news = || view.state.shown.decisions().take_while(|noted| noted.number > after);
        let oldest = news().last().map_or(after + 1, |noted| noted.number);
        // Who has just come has missed nothing.
        let missed = if after == 0 { 0 } else { oldest - after - 1 };
        let mut events: Vec<_> = news().filter(|noted| self.sees(view, noted)).map(event).collect();
        events.reverse();
        v1::WatchEventsResponse { events, missed }
    }

    fn sees(&self, view: &View<'_>, noted: &Noted) -> bool {
        match view.state.tasks.get(&noted.task) {
            Some(row) => {
                query::may_see(&self.caller, row.task.owner()) && covers(self.grant.as_ref(), &row.task)
            }
            // It is forgotten, and whose it was with it.
            None => query::is_operator(&self.caller) && self.grant.is_none(),
        }
    }
}

fn event(Noted { number, task, at, by, kind, reason }: &Noted) -> v1::Event {
    let (by, reason) = (by.clone(), reason.clone());
    let decision = Decision { at: *at, by, kind: *kind, reason, nodes: Vec::new() };
    v1::Event { number: *number, task_id: task.to_string(), decision: Some(decision.into()) }
}
