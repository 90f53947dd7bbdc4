//! `shaper exec`: this process becomes a task, and then the command.

use std::{
    io,
    os::unix::process::CommandExt,
    path::Path,
    process::{Command, ExitCode},
};

use shaper_core::limits::{Limits, LimitsChange};
use shaper_proto::v1;

use crate::{args::Exec, error::Error, exit, output, servers::Servers};

/// The variable that tells the command which task it is.
const TASK_ID: &str = "SHAPER_TASK_ID";
/// As a shell has it: what cannot be executed, and what is not there.
const NOT_EXECUTABLE: i32 = 126;
const NOT_FOUND: i32 = 127;

pub(crate) async fn exec(servers: &Servers, args: Exec) -> Result<ExitCode, Error> {
    let Exec { id, name, namespace, labels, limits, command } = args;
    let [program, arguments @ ..] = command.as_slice() else { return Err(Error::NoProgram) };
    let name = match name {
        Some(name) => name.into(),
        None => Path::new(program).file_name().unwrap_or_default().to_string_lossy().into_owned(),
    };
    let workload = v1::Workload {
        name,
        namespace: namespace.map(String::from).unwrap_or_default(),
        labels: labels.into_iter().collect(),
    };
    let request = v1::EnterTaskRequest {
        task_id: id.map(String::from).unwrap_or_default(),
        workload: Some(workload),
        limits: Some(Limits::default().with(&LimitsChange::from(limits)).into()),
        command: command.clone(),
    };
    let task = servers.agent().await?.enter_task(request).await?;
    // Every descriptor of ours is closed by it, and every thread ends.
    let error = Command::new(program).args(arguments).env(TASK_ID, task.task_id.as_str()).exec();
    output::warn(&format!("cannot execute `{program}`: {error}"));
    let code = if error.kind() == io::ErrorKind::NotFound { NOT_FOUND } else { NOT_EXECUTABLE };
    Ok(exit::of_shell_code(code))
}
