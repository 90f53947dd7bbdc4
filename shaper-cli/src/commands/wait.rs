//! `shaper wait`: waits for the end of a task.

use std::process::ExitCode;

use shaper_core::{
    id::TaskId,
    task::{ExitStatus, Phase, TaskStatus},
};

use crate::{
    args::Wait,
    cluster::{ClusterPhase, ClusterTask},
    error::Error,
    exit, output,
    servers::{Found, Servers},
};

pub(super) async fn wait(servers: &Servers, args: &Wait) -> Result<ExitCode, Error> {
    match servers.find(&args.id).await? {
        Found::Node(agent) => exit_code(&agent.wait_task(&args.id).await?),
        Found::Cluster(broker, _) => cluster_exit_code(&broker.wait_task(&args.id).await?),
    }
}

/// The code of a task that has ended.
pub(super) fn exit_code(task: &TaskStatus) -> Result<ExitCode, Error> {
    match &task.phase {
        Phase::Ended { status, at: _ } => Ok(code_of(&task.task_id, status)),
        Phase::Running => Err(Error::NotEnded(task.task_id.clone())),
    }
}

/// The code of a task of the cluster that is over.
pub(super) fn cluster_exit_code(task: &ClusterTask) -> Result<ExitCode, Error> {
    let id = &task.spec.profile.task_id;
    match &task.phase {
        ClusterPhase::Ended { status, at: _ } => Ok(code_of(id, status)),
        ClusterPhase::Cancelled => Err(Error::Cancelled(id.clone())),
        ClusterPhase::Pending { .. } | ClusterPhase::Starting { .. } | ClusterPhase::Running { .. } => {
            Err(Error::NotEnded(id.clone()))
        }
    }
}

/// The code that a status stands for; where that alone would mislead, standard error says more.
fn code_of(id: &TaskId, status: &ExitStatus) -> ExitCode {
    match status {
        ExitStatus::Code(_) | ExitStatus::Signal(_) => {}
        ExitStatus::NotStarted { stage, error, code: _ } => {
            output::warn(&format!("task {id} was not started: {stage}: {error}"));
        }
        ExitStatus::Unknown => {
            output::warn(&format!(
                "how task {id} ended is not known: its supervisor was killed, or it never had one"
            ));
        }
    }
    exit::of_shell_code(status.shell_code())
}
