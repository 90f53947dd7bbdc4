//! `shaper cancel`: ends a task.

use std::time::Duration;

use crate::{args::Cancel, client::Client, error::Error, output, show};

pub(super) async fn cancel(client: &Client, args: &Cancel) -> Result<(), Error> {
    let Cancel { id, grace, now, no_wait } = args;
    let grace = if *now { Duration::ZERO } else { grace.0 };
    let asked = client.cancel_task(id, grace).await?;
    let task = if *no_wait { asked } else { client.wait_task(id).await? };
    output::print(&format!("{id} {}\n", show::phase(&task.phase)))
}
