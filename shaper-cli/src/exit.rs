//! How a command ends: its exit code, and the one line that says why.

use std::{error::Error as StdError, io, process::ExitCode};

use tonic::Code;

use crate::{
    client::{CallError, ConnectError, Failure},
    error::Error,
    output,
};

/// The request failed, or there is nobody to ask.
const FAILED: u8 = 1;
/// Wrong usage (as clap has it), or the request was refused: nothing was changed.
const REFUSED: u8 = 2;
/// 128 + SIGPIPE: how a command ends that the reader of its output has left.
const BROKEN_PIPE: u8 = 141;

/// Prints the error with its causes, and says which code it ends in.
pub(crate) fn report(error: &Error) -> ExitCode {
    let code = code(error);
    match error {
        // In the form that editors and people know from compilers.
        Error::Document(error) => error.to_string().lines().for_each(output::remark),
        _ if code == BROKEN_PIPE => {}
        error => output::warn(&chain(error)),
    }
    ExitCode::from(code)
}

/// The code that a shell would see of a process which ended with `code`.
pub(crate) fn of_shell_code(code: i32) -> ExitCode {
    // As the kernel does: the low byte is what the parent is told.
    ExitCode::from(code.to_le_bytes()[0])
}

/// An error and its causes, from the outside in.
pub(crate) fn chain(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

fn code(error: &Error) -> u8 {
    match error {
        Error::Output(source) if source.kind() == io::ErrorKind::BrokenPipe => BROKEN_PIPE,
        Error::Call(CallError { failure: Failure::Answered { code, .. }, .. }) => code_of_status(*code),
        Error::Connect(
            ConnectError::Denied { .. } | ConnectError::NoCertificate(_) | ConnectError::Certificate(_),
        )
        | Error::Document(_)
        | Error::Read { .. }
        | Error::NoCommand(_)
        | Error::NoProgram
        | Error::NoSuchPolicy(_)
        | Error::WatchWithoutBroker
        | Error::NotATerminal
        | Error::NoLog { .. }
        | Error::LogElsewhere { .. }
        | Error::User(_)
        | Error::Pki(_)
        | Error::Identity(_)
        | Error::Token(_)
        | Error::Context(_)
        | Error::ContextBroker(..)
        | Error::Environment(_)
        | Error::NotUtf8(_) => REFUSED,
        Error::Connect(_)
        | Error::Call(_)
        | Error::CurrentDirectory(_)
        | Error::File(_)
        | Error::Output(_)
        | Error::Terminal { .. }
        | Error::Signals(_)
        | Error::Runtime(_)
        | Error::NotEnded(_)
        | Error::Superseded { .. }
        | Error::NotShrunk(_)
        | Error::Cancelled(_)
        | Error::OtherIdentity { .. }
        | Error::Left(_) => FAILED,
    }
}

fn code_of_status(code: Code) -> u8 {
    match code {
        Code::InvalidArgument
        | Code::NotFound
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::Unauthenticated
        | Code::FailedPrecondition
        | Code::OutOfRange
        | Code::ResourceExhausted
        | Code::Unimplemented => REFUSED,
        Code::Ok
        | Code::Cancelled
        | Code::Unknown
        | Code::DeadlineExceeded
        | Code::Aborted
        | Code::Internal
        | Code::Unavailable
        | Code::DataLoss => FAILED,
    }
}
