//! Nodes that do not answer.

use super::*;

/// Runs `t` on n1, which is then silent.
async fn lost(broker: &Broker, agent: &mut Agent, spec: v1::TaskSpec) {
    let mut client = broker.client().await;
    submit(&mut client, spec).await.unwrap();
    let mut session = attach(agent, broker).await;
    let start = session.directive().await;
    session.report(agent.start(&start)).await;
    until(&mut client, "t", runs_on("n1")).await;
    drop(session);
    let mut nodes = client.list_nodes(v1::ListNodesRequest {}).await.unwrap().into_inner().nodes;
    while nodes[0].connected {
        tokio::task::yield_now().await;
        nodes = client.list_nodes(v1::ListNodesRequest {}).await.unwrap().into_inner().nodes;
    }
}

#[tokio::test]
async fn a_node_that_is_said_to_be_dead_loses_its_tasks() {
    let broker = Broker::start();
    let mut agent = Agent::new("n1", 4000);
    lost(&broker, &mut agent, spec("t", 1000)).await;
    let mut client = broker.client().await;
    let fence = |node: &str| v1::FenceNodeRequest { node: node.into() };
    let error = client.fence_node(fence("n2")).await.unwrap_err();
    assert_eq!(
        (error.code(), error.message()),
        (Code::NotFound, "there is no node `n2`; `shaper get nodes` lists them")
    );
    let fenced = client.fence_node(fence("n1")).await.unwrap().into_inner();
    assert_eq!(fenced.task_ids, ["t"]);
    let mut other = Agent::new("n2", 4000);
    let mut session = attach(&mut other, &broker).await;
    let start = session.directive().await;
    assert_eq!((start.task_id.as_str(), start.attempt), ("t", 2));
    let error = client.fence_node(fence("n2")).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    // It was not dead.
    let mut session = attach(&mut agent, &broker).await;
    let stop = session.directive().await;
    assert!(matches!(stop.kind, Some(directive::Kind::Stop(_))) && stop.attempt == 1, "{stop:?}");
    assert_eq!(
        kinds(&mut client, "t").await,
        ["pending", "scale_out", "placed", "lost", "lost", "pending", "scale_out", "placed"]
    );
}

#[tokio::test]
async fn a_task_that_is_run_again_is_after_its_time_and_those_who_ask_are_told_that_the_broker_is_there() {
    let broker = Broker::start_as(&["--task-lease-seconds", "5"], &[]);
    let mut agent = Agent::new("n1", 4000);
    let rerun = v1::TaskSpec { on_node_lost: v1::OnNodeLost::Rerun.into(), ..spec("t", 1000) };
    lost(&broker, &mut agent, rerun).await;
    let mut other = Agent::new("n2", 4000);
    let mut session = attach(&mut other, &broker).await;
    for number in [1, 2] {
        session.say(agent_message::Kind::Contact(v1::Contact { number })).await;
        let answer = session.next().await.unwrap();
        assert_eq!(answer, v1::broker_message::Kind::Contact(v1::Contact { number }));
    }
    let start = session.directive().await;
    assert_eq!((start.task_id.as_str(), start.attempt), ("t", 2));
    let Some(directive::Kind::LeasedStart(start)) = start.kind else { panic!("{start:?}") };
    assert_eq!(start.task_lease_seconds, 5);
}
