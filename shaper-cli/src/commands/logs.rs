//! `shaper logs`: what a task has written.

use crate::{args::Logs, client::Client, error::Error, follow};

pub(super) async fn logs(client: &Client, args: &Logs) -> Result<(), Error> {
    follow::print(client.read_log(&args.id, args.follow), args.timestamps).await
}
