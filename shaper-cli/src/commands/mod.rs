//! The commands, one a file: each asks the agent or the broker and prints what it answers.

mod adopt;
mod apply;
mod cancel;
mod context;
mod describe;
mod doctor;
mod document;
mod exec;
mod explain;
mod get;
mod ledger;
mod logs;
mod manual;
mod node;
mod pki;
mod policy;
mod profile;
mod release;
pub(crate) mod run;
mod set;
mod submit;
mod top;
mod ui;
mod wait;

use std::{
    path::{self, Path},
    process::ExitCode,
};

use crate::{
    args::{Args, Command, Get},
    contexts::Contexts,
    error::Error,
    servers::{self, Servers},
};

/// Does what the command line says.
pub(crate) async fn execute(args: Args) -> Result<ExitCode, Error> {
    let Args { socket, broker, tls_dir, context, command } = args;
    // What needs no server needs no context either, which may be wrong.
    let command = match command {
        Command::Completions { shell } => return manual::completions(shell).map(|()| ExitCode::SUCCESS),
        Command::Man { directory } => return manual::man(&directory).map(|()| ExitCode::SUCCESS),
        Command::Context(command) => {
            let said = servers::said(socket, broker, tls_dir)?;
            return context::context(command, said).map(|()| ExitCode::SUCCESS);
        }
        command => command,
    };
    let contexts = Contexts::load_for(context.as_deref())?;
    let servers = Servers::new(socket, broker, tls_dir, contexts.chosen(context.as_deref())?)?;
    match command {
        Command::Run(args) => return run::run(&servers, args).await,
        Command::Exec(args) => return exec::exec(&servers, args).await,
        Command::Submit(args) => return submit::submit(&servers, args).await,
        Command::Top(args) => return top::top(&servers, &args).await,
        Command::Wait(args) => return wait::wait(&servers, &args).await,
        Command::Get(Get::Tasks(args)) => get::tasks(&servers, &args).await?,
        Command::Get(Get::Nodes(args)) => get::nodes(&servers.broker().await?, &args).await?,
        Command::Get(Get::Policies(args)) => get::policies(&servers.broker().await?, &args).await?,
        Command::Get(Get::Events(args)) => get::events(&servers.broker().await?, &args).await?,
        Command::Get(Get::Scale(args)) => get::scale(&servers.broker().await?, &args).await?,
        Command::Describe(args) => describe::describe(&servers, &args).await?,
        Command::Explain(args) => explain::explain(&servers.broker().await?, &args).await?,
        Command::Ledger(args) => ledger::ledger(&servers.agent().await?, &args).await?,
        Command::Logs(args) => logs::logs(&servers, &args).await?,
        Command::Set(args) => set::set(&servers.agent().await?, &args).await?,
        Command::Cancel(args) => cancel::cancel(&servers, &args).await?,
        Command::Adopt(args) => adopt::adopt(&servers.agent().await?, &args).await?,
        Command::Release(args) => release::release(&servers.agent().await?, &args).await?,
        Command::Node(args) => node::node(&servers.broker().await?, &args).await?,
        Command::Policy(command) => policy::policy(&servers, &command).await?,
        Command::Apply(args) => apply::apply(&servers, &args).await?,
        Command::Profile(args) => profile::profile(&servers.broker().await?, &args).await?,
        Command::Ui => ui::ui(&servers.broker().await?).await?,
        Command::Pki(args) => pki::pki(servers.tls_dir(), args.command).await?,
        Command::Doctor(args) => doctor::doctor(&servers.agent().await?, &args).await?,
        Command::Context(_) | Command::Completions { .. } | Command::Man { .. } => {}
    }
    Ok(ExitCode::SUCCESS)
}

/// A path of the caller's as others need it: absolute, and text.
fn absolute(path: &Path) -> Result<String, Error> {
    let path = path::absolute(path).map_err(Error::CurrentDirectory)?;
    path.into_os_string().into_string().map_err(|path| Error::NotUtf8(path.to_string_lossy().into_owned()))
}
