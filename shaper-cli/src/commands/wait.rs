//! `shaper wait`: waits for the end of a task.

use std::process::ExitCode;

use shaper_core::task::{ExitStatus, Phase, TaskStatus};

use crate::{args::Wait, client::Client, error::Error, exit, output};

pub(super) async fn wait(client: &Client, args: &Wait) -> Result<ExitCode, Error> {
    exit_code(&client.wait_task(&args.id).await?)
}

/// The code of a task that has ended; where that alone would mislead, standard error says more.
pub(super) fn exit_code(task: &TaskStatus) -> Result<ExitCode, Error> {
    let id = &task.task_id;
    let Phase::Ended { status, at: _ } = &task.phase else { return Err(Error::NotEnded(id.clone())) };
    match status {
        ExitStatus::Code(_) | ExitStatus::Signal(_) => {}
        ExitStatus::NotStarted { stage, error, code: _ } => {
            output::warn(&format!("task {id} was not started: {stage}: {error}"));
        }
        ExitStatus::Unknown => {
            output::warn(&format!("how task {id} ended is not known: its supervisor was killed"));
        }
    }
    Ok(exit::of_shell_code(status.shell_code()))
}
