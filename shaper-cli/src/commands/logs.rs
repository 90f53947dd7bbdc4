//! `shaper logs`: what a task has written.

use std::path::Path;

use crate::{
    args::Logs,
    client::{Broker, Client},
    cluster::{ClusterTask, NodeStatus},
    error::Error,
    follow,
    servers::{Found, Servers},
    show,
};

pub(super) async fn logs(servers: &Servers, args: &Logs) -> Result<(), Error> {
    let agent = match servers.find(&args.id).await? {
        Found::Node(agent) => agent,
        Found::Cluster(broker, task) => agent_of(&broker, &task).await?,
    };
    follow::print(agent.read_log(&args.id, args.follow), args.timestamps).await
}

/// The agent that has the log of a task, which is not the broker's: it has to be on this machine.
async fn agent_of(broker: &Broker, task: &ClusterTask) -> Result<Client, Error> {
    let id = &task.spec.profile.task_id;
    let Some(node) = &task.node else {
        return Err(Error::NoLog { id: id.clone(), phase: show::cluster_phase(&task.phase) });
    };
    let elsewhere = |reason: String| Error::LogElsewhere { id: id.clone(), node: node.clone(), reason };
    let nodes = broker.list_nodes().await?;
    let status: Option<&NodeStatus> = nodes.iter().find(|status| status.name == *node);
    let Some(socket) = status.and_then(|status| status.agent_socket.as_deref()) else {
        return Err(elsewhere("whose agent is not known to the broker now".into()));
    };
    if !Path::new(socket).exists() {
        return Err(elsewhere("which is not this machine".into()));
    }
    let agent = Client::connect(Path::new(socket)).await?;
    // Every machine may have a socket of that name.
    match agent.doctor().await?.node {
        found if found == *node => Ok(agent),
        found => Err(elsewhere(format!("and this is node `{found}`"))),
    }
}
