//! What can go wrong in a command. Each names what was being done; the chain is printed once, in
//! [`exit`](crate::exit).

use std::io;

use shaper_core::id::TaskId;

use crate::{
    client::{CallError, ConnectError},
    commands::run::EnvironmentError,
    users::UserError,
};

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// There is no connection to an agent.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The agent did not do what it was asked to.
    #[error(transparent)]
    Call(#[from] CallError),
    /// `--user` names nobody.
    #[error(transparent)]
    User(#[from] UserError),
    /// The environment of a task could not be put together.
    #[error(transparent)]
    Environment(#[from] EnvironmentError),
    /// A path of the caller's is not one that can be passed on.
    #[error("`{0}` is not UTF-8, which is all that can be passed to the agent")]
    NotUtf8(String),
    /// A relative path leads nowhere.
    #[error("cannot find the current directory")]
    CurrentDirectory(#[source] io::Error),
    /// Standard output does not take what was to be shown.
    #[error("cannot write to standard output")]
    Output(#[source] io::Error),
    /// Signals cannot be waited for.
    #[error("cannot install the signal handlers")]
    Signals(#[source] io::Error),
    /// There is no async runtime.
    #[error("cannot start the runtime")]
    Runtime(#[source] io::Error),
    /// The agent said that a task had ended, and that it had not.
    #[error("task `{0}` still runs, although the agent reported its end; `shaper wait {0}` asks again")]
    NotEnded(TaskId),
    /// The id belongs to another run by now.
    #[error("task `{id}` was run anew, and how attempt {attempt} ended is no longer known")]
    Superseded {
        /// The task.
        id: TaskId,
        /// The run that was waited for.
        attempt: u32,
    },
    /// The user gave up on a task.
    #[error("left task `{0}` to the agent; it may still run: see `shaper describe {0}`")]
    Left(TaskId),
}
