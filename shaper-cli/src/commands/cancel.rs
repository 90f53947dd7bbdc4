//! `shaper cancel`: ends a task.

use std::time::Duration;

use crate::{
    args::Cancel,
    error::Error,
    output,
    progress::Progress,
    servers::{Found, Servers},
    show,
};

pub(super) async fn cancel(servers: &Servers, args: &Cancel) -> Result<(), Error> {
    let Cancel { id, grace, now, no_wait } = args;
    let grace = if *now { Duration::ZERO } else { grace.0 };
    let found = servers.find(id).await?;
    let shown = (!no_wait).then(|| Progress::of_time(&format!("waiting for {id} to end")));
    let phase = match found {
        Found::Node(agent) => {
            let asked = agent.cancel_task(id, grace).await?;
            let task = if *no_wait { asked } else { agent.wait_task(id).await? };
            show::phase(&task.phase)
        }
        Found::Cluster(broker, _) => {
            let asked = broker.cancel_task(id, grace).await?;
            let task = if *no_wait { asked } else { broker.wait_task(id).await? };
            show::cluster_phase(&task.phase)
        }
    };
    drop(shown);
    output::print(&format!("{id} {phase}\n"))
}
