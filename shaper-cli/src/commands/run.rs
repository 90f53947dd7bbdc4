//! `shaper run`: starts a task, and stays with it unless told not to.

use std::{collections::BTreeMap, env, io, path::Path, process::ExitCode, time::Duration};

use shaper_core::{
    id::TaskId,
    limits::{Limit, Limits, LimitsChange},
    spec::{DEFAULT_NAMESPACE, Demand, Image, Priority},
    task::TaskStatus,
};
use shaper_proto::v1;
use tokio::{
    runtime::Handle,
    signal::unix::{Signal, SignalKind, signal},
    sync::oneshot,
};
use tonic::Code;

use super::{absolute, wait};
use crate::{
    args::{Format, Run, Variable},
    client::Client,
    cluster::MeasuredProfile,
    error::Error,
    exit, follow, output,
    servers::Servers,
    users::Account,
};

/// How long the thread that prints may take to stop; it may hang in a terminal that nobody reads.
const FAREWELL: Duration = Duration::from_secs(1);
/// How long a task has between the first signal to us and SIGKILL.
const GRACE: Duration = Duration::from_secs(10);

/// Why there is no environment for the task.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EnvironmentError {
    /// `--env NAME`, and the caller has none of that name.
    #[error("`--env {0}` passes on a variable of yours, but you have none of that name: use --env {0}=VALUE")]
    Unset(String),
    /// The caller has one, of bytes that are no text.
    #[error(
        "your variable {0} is not UTF-8, which is all that can be passed to the agent: use --env {0}=VALUE"
    )]
    NotUtf8(String),
}

pub(crate) async fn run(servers: &Servers, args: Run) -> Result<ExitCode, Error> {
    let client = &servers.agent().await?;
    let (detach, format) = (args.detach, args.output);
    let reclaim_idle = LimitsChange::from(args.limits).reclaim_idle;
    let mut request = request(args)?;
    if request.limits == Some(Limits { reclaim_idle, ..Limits::default() }.into())
        && let Some(limits) = measured(servers, &request).await
    {
        request.limits = Some(Limits { reclaim_idle, ..limits }.into());
    }
    if detach {
        let task = client.run_task(request).await?;
        match format {
            Format::Text => output::print(&format!("{}\n", task.task_id))?,
            Format::Json => output::print_json(&task)?,
            Format::Yaml => output::print_yaml(&task)?,
        }
        return Ok(ExitCode::SUCCESS);
    }
    // Before the task: a signal that comes while it is started must not leave it behind.
    let signals = Signals::install()?;
    let task = client.run_task(request).await?;
    output::remark(&format!("task {} started", task.task_id));
    // On a thread of its own: signals are heard even while a write to a stopped terminal hangs. (A worker that hangs
    // may be the one that would hear them.)
    let (runtime, attended) = (Handle::current(), attend(client.clone(), task.clone()));
    let (leave, left) = oneshot::channel::<()>();
    let attended = async {
        tokio::select! {
            biased;
            _ = left => None,
            outcome = attended => Some(outcome),
        }
    };
    let mut attended = tokio::task::spawn_blocking(move || runtime.block_on(attended));
    tokio::select! {
        outcome = &mut attended => match outcome {
            Ok(outcome) => return outcome.unwrap_or(Err(Error::Left(task.task_id))),
            Err(panic) => std::panic::resume_unwind(panic.into_panic()),
        },
        () = signals.cancel(client, &task.task_id) => {}
    }
    // That thread lets go of the runtime before it is shut down, unless it hangs.
    drop(leave);
    let _ = tokio::time::timeout(FAREWELL, attended).await;
    Err(Error::Left(task.task_id))
}

/// What tasks of this command's name have used, where a broker knows it: the limits of one for which nobody
/// named any. A task is run without limits rather than not at all.
async fn measured(servers: &Servers, request: &v1::RunTaskRequest) -> Option<Limits> {
    let name = match request.image.parse::<Image>() {
        Ok(image) => image.base().to_owned(),
        Err(_) => Path::new(request.command.first()?).file_name()?.to_str()?.to_owned(),
    };
    let broker = match servers.broker_if_any().await {
        Ok(broker) => broker?,
        Err(error) => {
            output::warn(&format!("no measured profile: {}", exit::chain(&error)));
            return None;
        }
    };
    let profile = match broker.get_profile(&name, DEFAULT_NAMESPACE, Priority::Medium).await {
        Ok(MeasuredProfile { profile, .. }) => profile,
        // Nobody has run it yet.
        Err(error) if error.code() == Some(Code::NotFound) => return None,
        Err(error) => {
            output::warn(&format!("no measured profile: {}", exit::chain(&error)));
            return None;
        }
    };
    let Demand { cpu, memory, network, .. } = profile.demand;
    output::remark(&format!("limits from the measured profile of {name}: {cpu} cores, {memory}"));
    Some(Limits {
        cpu: Limit::At(cpu),
        memory: Limit::At(memory),
        net_egress: network.map_or(Limit::Unlimited, Limit::At),
        ..Limits::default()
    })
}

/// Prints the output of a task to its end; the exit code is the task's.
async fn attend(client: Client, task: TaskStatus) -> Result<ExitCode, Error> {
    let TaskStatus { task_id, attempt, .. } = task;
    match follow::print(client.read_log(&task_id, true), false).await {
        Err(Error::Output(source)) if source.kind() == io::ErrorKind::BrokenPipe => {
            // Nobody reads on, as in `shaper run -- yes | head`. SIGPIPE would end a plain `yes`.
            client.cancel_task(&task_id, GRACE).await?;
            return Err(Error::Output(source));
        }
        outcome => outcome?,
    }
    let ended = client.wait_task(&task_id).await?;
    if ended.attempt != attempt {
        return Err(Error::Superseded { id: task_id, attempt });
    }
    wait::exit_code(&ended)
}

/// The signals by which a user asks for an end.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn install() -> Result<Signals, Error> {
        let install = |kind| signal(kind).map_err(Error::Signals);
        Ok(Signals {
            interrupt: install(SignalKind::interrupt())?,
            terminate: install(SignalKind::terminate())?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }

    /// Cancels a task at the first signal, kills it at the second, and returns at the third.
    async fn cancel(mut self, client: &Client, id: &TaskId) {
        self.next().await;
        ask_to_end(client, id, GRACE);
        output::warn(&format!("cancelling task {id}, with {} s to end; once more kills it", GRACE.as_secs()));
        self.next().await;
        ask_to_end(client, id, Duration::ZERO);
        output::warn(&format!("killing task {id}; once more leaves it to the agent"));
        self.next().await;
    }
}

/// Beside everything else: neither the output nor the next signal waits for the answer.
fn ask_to_end(client: &Client, id: &TaskId, grace: Duration) {
    let (client, id) = (client.clone(), id.clone());
    tokio::spawn(async move {
        if let Err(error) = client.cancel_task(&id, grace).await {
            output::warn(&exit::chain(&error));
        }
    });
}

fn request(args: Run) -> Result<v1::RunTaskRequest, Error> {
    let Run { id, limits, image, gpus, gpu_model, user, environment, cwd, detach: _, output: _, command } =
        args;
    let account = user.map(|user| user.resolve()).transpose()?;
    // An image has its own.
    let passed_on: &[&str] = if image.is_some() { &[] } else { &PASSED_ON };
    let environment = task_environment(passed_on, &environment, account.as_ref(), inherited)?;
    let cwd = match (&cwd, &image) {
        (Some(cwd), _) => absolute(cwd)?,
        (None, Some(_)) => String::new(),
        (None, None) => absolute(Path::new("."))?,
    };
    let limits = Limits::default().with(&LimitsChange::from(limits));
    Ok(v1::RunTaskRequest {
        task_id: id.map(String::from).unwrap_or_default(),
        command,
        env: environment.into_iter().map(|(name, value)| format!("{name}={value}")).collect(),
        cwd,
        limits: Some(limits.into()),
        run_as: account.map(|Account { uid, gid, groups, .. }| v1::Credentials { uid, gid, groups }),
        gpus: gpus.unwrap_or(0),
        gpu_model: gpu_model.unwrap_or_default(),
        image: image.map(String::from).unwrap_or_default(),
    })
}

/// What a program may count on.
const PASSED_ON: [&str; 5] = ["PATH", "HOME", "USER", "LANG", "TERM"];

/// A variable of the caller's.
fn inherited(name: &str) -> Result<Option<String>, EnvironmentError> {
    match env::var(name) {
        Ok(value) => Ok(Some(value)),
        Err(env::VarError::NotPresent) => Ok(None),
        Err(env::VarError::NotUnicode(_)) => Err(EnvironmentError::NotUtf8(name.to_owned())),
    }
}

/// The environment of the task: what is passed on to find programs and be understood, who it is, and
/// what was asked for. The last to name a variable decides.
fn task_environment(
    passed_on: &[&str],
    asked_for: &[Variable],
    account: Option<&Account>,
    inherited: impl Fn(&str) -> Result<Option<String>, EnvironmentError>,
) -> Result<BTreeMap<String, String>, EnvironmentError> {
    let set_by_user = |name: &str| {
        asked_for.iter().any(|variable| matches!(variable, Variable::Set { name: set, .. } if set == name))
    };
    let mut environment = BTreeMap::new();
    for &name in passed_on {
        let value = match (name, account) {
            _ if set_by_user(name) => None,
            ("HOME", Some(account)) => account.home.clone(),
            ("USER", Some(account)) => account.name.clone(),
            _ => inherited(name)?,
        };
        environment.extend(value.map(|value| (name.to_owned(), value)));
    }
    for variable in asked_for {
        let (name, value) = match variable {
            Variable::Set { name, value } => (name, value.clone()),
            Variable::Inherit(name) => {
                (name, inherited(name)?.ok_or_else(|| EnvironmentError::Unset(name.clone()))?)
            }
        };
        environment.insert(name.clone(), value);
    }
    Ok(environment)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn callers(name: &str) -> Result<Option<String>, EnvironmentError> {
        match name {
            "LANG" => Err(EnvironmentError::NotUtf8("LANG".into())),
            "TERM" | "UNSET" => Ok(None),
            name => Ok(Some(format!("caller's {name}"))),
        }
    }

    fn environment(asked_for: &[&str], account: Option<&Account>) -> Result<Vec<String>, String> {
        let asked_for: Vec<Variable> = asked_for.iter().map(|text| text.parse().unwrap()).collect();
        let environment =
            task_environment(&PASSED_ON, &asked_for, account, callers).map_err(|error| error.to_string())?;
        Ok(environment.into_iter().map(|(name, value)| format!("{name}={value}")).collect())
    }

    #[test]
    fn the_last_to_name_a_variable_decides() {
        let environment = environment(&["LANG=C", "A=1", "TOKEN", "A=2", "PATH="], None);
        let expected =
            ["A=2", "HOME=caller's HOME", "LANG=C", "PATH=", "TOKEN=caller's TOKEN", "USER=caller's USER"];
        assert_eq!(environment, Ok(expected.map(String::from).to_vec()));
    }

    #[test]
    fn another_user_has_another_home() {
        let nobody = Account {
            uid: 65_534,
            gid: 65_534,
            groups: vec![],
            name: Some("nobody".into()),
            home: Some("/nowhere".into()),
        };
        let expected = ["HOME=/nowhere", "LANG=C", "PATH=caller's PATH", "USER=nobody"];
        assert_eq!(environment(&["LANG=C"], Some(&nobody)), Ok(expected.map(String::from).to_vec()));
        let nameless = Account { name: None, home: None, ..nobody };
        let expected = ["LANG=C", "PATH=caller's PATH"];
        assert_eq!(environment(&["LANG=C"], Some(&nameless)), Ok(expected.map(String::from).to_vec()));
    }

    #[test]
    fn what_cannot_be_passed_on_is_said_with_the_way_out() {
        assert!(environment(&["LANG=C", "UNSET"], None).unwrap_err().ends_with("use --env UNSET=VALUE"));
        assert!(environment(&[], None).unwrap_err().starts_with("your variable LANG is not UTF-8"));
    }
}
