//! `shaper release`: lifts limits and forgets tasks; their processes go on.

use crate::{
    args::{Format, Release},
    client::Client,
    error::Error,
    output::{self, printable},
};

pub(super) async fn release(client: &Client, args: &Release) -> Result<(), Error> {
    let mut done = Vec::new();
    let outcome = each(client, args, &mut done).await;
    // What was done before a failure is told as well.
    match args.output {
        Format::Json => output::print_json(&done)?,
        Format::Yaml => output::print_yaml(&done)?,
        Format::Text => {
            output::print(&done.iter().map(|line| format!("{}\n", printable(line))).collect::<String>())?;
        }
    }
    outcome
}

async fn each(client: &Client, args: &Release, done: &mut Vec<String>) -> Result<(), Error> {
    if args.all {
        done.extend(client.release_all().await?);
    }
    for id in &args.ids {
        done.extend(client.release_task(id).await?);
    }
    Ok(())
}
