//! The commands, one a file: each asks the agent and prints what it answers.

mod adopt;
mod cancel;
mod describe;
mod doctor;
mod get;
mod logs;
mod release;
pub(crate) mod run;
mod set;
mod wait;

use std::{
    path::{self, Path},
    process::ExitCode,
};

use crate::{
    args::{Args, Command, Get},
    client::Client,
    error::Error,
};

/// Does what the command line says.
pub(crate) async fn execute(args: Args) -> Result<ExitCode, Error> {
    let Args { socket, command } = args;
    let client = Client::connect(&socket).await?;
    match command {
        Command::Run(args) => return run::run(&client, args).await,
        Command::Wait(args) => return wait::wait(&client, &args).await,
        Command::Get(Get::Tasks(args)) => get::tasks(&client, &args).await?,
        Command::Describe(args) => describe::describe(&client, &args).await?,
        Command::Logs(args) => logs::logs(&client, &args).await?,
        Command::Set(args) => set::set(&client, &args).await?,
        Command::Cancel(args) => cancel::cancel(&client, &args).await?,
        Command::Adopt(args) => adopt::adopt(&client, &args).await?,
        Command::Release(args) => release::release(&client, &args).await?,
        Command::Doctor(args) => doctor::doctor(&client, &args).await?,
    }
    Ok(ExitCode::SUCCESS)
}

/// A path of the caller's as the agent needs it: absolute, and text.
fn absolute(path: &Path) -> Result<String, Error> {
    let path = path::absolute(path).map_err(Error::CurrentDirectory)?;
    path.into_os_string().into_string().map_err(|path| Error::NotUtf8(path.to_string_lossy().into_owned()))
}
