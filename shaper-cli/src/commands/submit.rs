//! `shaper submit`: has the broker place a task.

use std::{path::Path, process::ExitCode};

use shaper_core::{
    document::{self, NoCommand, TaskDraft},
    spec::{Credentials, TaskSpec},
};

use super::{absolute, document::Document, wait};
use crate::{
    args::{Format, Submit},
    client::Broker,
    cluster::{ClusterPhase, ClusterTask},
    error::Error,
    output,
    servers::Servers,
    users::{self, Account, NameAndHome},
};

/// Where programs are looked for, unless the spec says otherwise. Not the caller's PATH: the same file
/// is the same task, from whichever shell it is submitted.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

pub(super) async fn submit(servers: &Servers, args: Submit) -> Result<ExitCode, Error> {
    let (wait, format) = (args.wait, args.output);
    let spec = spec(args)?;
    let broker = servers.broker().await?;
    let task = broker.submit(spec).await?;
    match format {
        Format::Text => output::print(&format!("{}\n", task.spec.profile.task_id))?,
        Format::Json => output::print_json(&task)?,
        Format::Yaml => output::print_yaml(&task)?,
    }
    if wait { follow(&broker, &task).await } else { Ok(ExitCode::SUCCESS) }
}

/// Says where the task is, until it is over; the exit code is the task's.
async fn follow(broker: &Broker, task: &ClusterTask) -> Result<ExitCode, Error> {
    let id = &task.spec.profile.task_id;
    let mut watch = broker.watch(Some(id));
    let mut said = String::new();
    loop {
        let task = watch.next().await?;
        if task.is_over() {
            return wait::cluster_exit_code(&task);
        }
        let phase = match &task.phase {
            ClusterPhase::Pending { reason } if reason.is_empty() => "is pending".into(),
            ClusterPhase::Pending { reason } => format!("is pending: {reason}"),
            ClusterPhase::Starting { node } => format!("starts on {node}, attempt {}", task.attempt),
            ClusterPhase::Running { node } => format!("runs on {node}, attempt {}", task.attempt),
            ClusterPhase::Ended { .. } | ClusterPhase::Cancelled => continue,
        };
        if said != phase {
            output::remark(&format!("task {id} {phase}"));
            said = phase;
        }
    }
}

fn spec(args: Submit) -> Result<TaskSpec, Error> {
    let Submit { file, image, name, cwd, user, retries, detach: _, wait: _, output: _, command } = args;
    let Document { name: file, text } = Document::read(&file)?;
    let mut draft = document::task(&file, text).map_err(Box::new)?;
    draft.name = name.or(draft.name);
    draft.image = image.or(draft.image);
    draft.retries = retries.unwrap_or(draft.retries);
    if !command.is_empty() {
        draft.command = Some(command);
    }
    if let Some(cwd) = cwd {
        draft.cwd = Some(absolute(&cwd)?);
    }
    if let Some(user) = user {
        let Account { uid, gid, groups, name: _, home: _ } = user.resolve()?;
        draft.run_as = Some(Credentials { uid, gid, groups });
    }
    // An image has its own.
    if draft.image.is_none() {
        add_environment(&mut draft);
    }
    let current = absolute(Path::new("."))?;
    draft.complete(&current).map_err(|NoCommand| Error::NoCommand(file))
}

/// What a program may count on, where the spec does not say it: where to look for others, and who it is.
fn add_environment(draft: &mut TaskDraft) {
    let uid = draft.run_as.as_ref().map_or_else(users::caller, |run_as| run_as.uid);
    let NameAndHome { name, home } = users::name_and_home(uid);
    for (variable, value) in [("PATH", Some(PATH.to_owned())), ("HOME", home), ("USER", name)] {
        if let Some(value) = value {
            draft.env.entry(variable.to_owned()).or_insert(value);
        }
    }
}
