//! What can go wrong in a command. Each names what was being done; the chain is printed once, in
//! [`exit`](crate::exit).

use std::{io, path::PathBuf};

use shaper_core::{document::DocumentError, id::TaskId};
use shaper_identity::{
    Identity, address::InvalidAddress, files::FileError, name::InvalidIdentity, pki::PkiError,
    token::TokenError,
};

use crate::{
    client::{CallError, ConnectError},
    commands::run::EnvironmentError,
    contexts::ContextError,
    users::UserError,
};

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// There is no connection.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// It was not done what was asked for.
    #[error(transparent)]
    Call(#[from] CallError),
    /// The clusters that have names.
    #[error(transparent)]
    Context(#[from] ContextError),
    /// A context that was written by hand.
    #[error("the context's broker `{0}`")]
    ContextBroker(String, #[source] InvalidAddress),
    /// A file of ours.
    #[error(transparent)]
    File(#[from] FileError),
    /// There is no certificate.
    #[error(transparent)]
    Pki(Box<PkiError>),
    /// A name that nobody can have.
    #[error(transparent)]
    Identity(#[from] InvalidIdentity),
    /// A token that is none.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// The authority signed somebody else's name.
    #[error("the authority gave a certificate of {other} to {own}, which was not taken")]
    OtherIdentity {
        /// Who asked.
        own: Box<Identity>,
        /// Whose it is.
        other: Box<Identity>,
    },
    /// `--user` names nobody.
    #[error(transparent)]
    User(#[from] UserError),
    /// The environment of a task could not be put together.
    #[error(transparent)]
    Environment(#[from] EnvironmentError),
    /// A document is not what it has to be.
    #[error(transparent)]
    Document(#[from] Box<DocumentError>),
    /// A document cannot be read.
    #[error("cannot read `{}`", .path.display())]
    Read {
        /// The document.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A profile says what a task needs, not what it does.
    #[error(
        "`{0}` has no command: add one after `--`, as in `shaper submit {0} -- python3 train.py`, or a line such as \
         `command: [\"python3\", \"train.py\"]` to a task spec"
    )]
    NoCommand(String),
    /// Nothing to become.
    #[error("no command was given: add one after `--`")]
    NoProgram,
    /// Only a broker tells of changes.
    #[error("--watch needs a broker: name its socket with --broker")]
    WatchWithoutBroker,
    /// There is nowhere to draw.
    #[error(
        "standard output is not a terminal on which figures can be drawn anew: use `shaper top --once` for one table, \
         or `shaper top -o json` for an object a second"
    )]
    NotATerminal,
    /// The terminal does not do its part.
    #[error("cannot {operation} the terminal; `shaper top --once` does without one")]
    Terminal {
        /// What it was to do.
        operation: &'static str,
        /// Why it did not.
        source: io::Error,
    },
    /// The task has not been on a node.
    #[error("task `{id}` has no log yet: it is {phase}")]
    NoLog {
        /// The task.
        id: TaskId,
        /// Where it is instead.
        phase: String,
    },
    /// The log is on another machine.
    #[error("the log of task `{id}` is on node `{node}`, {reason}: run `shaper logs {id}` there")]
    LogElsewhere {
        /// The task.
        id: TaskId,
        /// Where its log is.
        node: String,
        /// Why it cannot be reached from here.
        reason: String,
    },
    /// A memory limit did not come below use.
    #[error("the memory limit of task `{0}` is what it was")]
    NotShrunk(TaskId),
    /// There is no exit code to pass on.
    #[error("task `{0}` was cancelled")]
    Cancelled(TaskId),
    /// A policy that is not there, or that the caller may not see.
    #[error("there is no policy `{0}`; `shaper policy get` lists them")]
    NoSuchPolicy(String),
    /// A path of the caller's is not one that can be passed on.
    #[error("`{0}` is not UTF-8, which is all that can be passed on")]
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
