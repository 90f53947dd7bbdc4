//! The broker dies at each of its failpoints; the next one finishes what it began, once.

use crate::{agent::Agent, broker::Broker, ended_with, spec, submit, until};

const SIGABRT: i32 = 6;
const SIGKILL: i32 = 9;

/// The commits are: the node, the task, its acknowledgement and what follows.
const PLACES: [&str; 12] = [
    "after-receive-submit",
    "before-commit:1",
    "before-commit:2",
    "before-commit:3",
    "after-commit:1",
    "after-commit:2",
    "after-commit:3",
    "before-answer",
    "before-directive",
    "after-directive",
    "on-task-ended-before-commit",
    "on-task-ended-after-commit",
];

#[tokio::test]
async fn a_crash_at_any_place_loses_and_doubles_nothing() {
    for place in PLACES {
        let mut broker = Broker::start_with(&[("SHAPER_FAILPOINT", place)]);
        let mut agent = Agent::new("n1", 4000);
        let (session, mut client) = (broker.channel().await, broker.client().await);
        let (submitted, ()) = tokio::join!(submit(&mut client, spec("t", 1000)), agent.obey(session));
        // How many commits there are depends on what comes together: one that is not reached is no crash.
        let signal = broker.end_signal();
        let may_be_missed = place.ends_with('3') && signal == Some(SIGKILL);
        assert!(signal == Some(SIGABRT) || may_be_missed, "{place}: {signal:?}, {submitted:?}");

        broker.start_again(&[]);
        let mut client = broker.client().await;
        if submitted.is_ok() {
            let task = until(&mut client, "t", |_| true).await;
            assert_eq!(
                task.spec.map(|spec| spec.name),
                Some("sleep".into()),
                "{place}: acknowledged and lost"
            );
        }
        submit(&mut client, spec("t", 1000)).await.unwrap();
        // An end that the agent was told to forget was durable: then there is nothing left to be told.
        if agent.starts.is_empty() || !agent.inventory.is_empty() {
            agent.obey(broker.channel().await).await;
        }
        until(&mut client, "t", ended_with(0)).await;
        assert_eq!(agent.starts, [("t".to_owned(), 1)], "{place}");
        assert!(agent.inventory.is_empty(), "{place}");
    }
}
