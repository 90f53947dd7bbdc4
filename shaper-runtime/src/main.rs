//! `shaper-runtime`: an OCI runtime that hands everything over to another (runc, crun), and has the agent adopt each container
//! between its making and its start. Registered with Docker, Podman, containerd or CRI-O in the place of the other.
//!
//! Of `create` and `run` it puts a `createRuntime` hook into the bundle's configuration (config.md of the OCI runtime
//! specification), and becomes the other runtime: nothing of it stays between that and its caller. The hook is this program
//! again (`admit`): the container's first process is in its cgroup then, and waits. What the agent decides is in force before
//! the container's own program runs, in the kernel too, which no bundle can say.
#![forbid(unsafe_code)]

mod admit;
mod bundle;
mod invocation;
mod report;
mod settings;

use std::{
    env,
    ffi::OsString,
    os::unix::process::CommandExt,
    path::PathBuf,
    process::{Command, ExitCode},
};

use shaper_core::document::Failing;

use crate::{invocation::Invocation, settings::Chosen};

/// The words by which a hook calls this program.
const ADMIT: &str = "admit";

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Settings(#[from] settings::SettingsError),
    #[error("the container is not started: {0}")]
    Bundle(#[from] bundle::BundleError),
    #[error("the container is not started: {0}")]
    Admit(#[from] admit::AdmitError),
    #[error("cannot find this program")]
    Own(#[source] std::io::Error),
    #[error("cannot start {}", path.display())]
    Start { path: PathBuf, source: std::io::Error },
}

fn main() -> ExitCode {
    let mut arguments: Vec<OsString> = env::args_os().skip(1).collect();
    let file = settings::take_file(&mut arguments);
    let is_hook = arguments.first().is_some_and(|word| word == ADMIT);
    let invocation = Invocation::of(&arguments);
    let done = match Chosen::load(file) {
        Ok(chosen) if is_hook => admit(&chosen),
        Ok(chosen) => Err(hand_over(&chosen, &invocation, &arguments)),
        Err(error) => Err(error.into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let error = chain(&error);
            report::to_caller(&invocation, &error);
            eprintln!("shaper-runtime: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Becomes the other runtime, or says why not.
fn hand_over(chosen: &Chosen, invocation: &Invocation, arguments: &[OsString]) -> Error {
    if let Some(bundle) = &invocation.bundle
        && rustix::process::geteuid().is_root()
    {
        let prepared = env::current_exe().map_err(Error::Own).and_then(|program| {
            let hook = bundle::Hook::new(&program, chosen);
            bundle::prepare(bundle, &hook).map_err(Error::from)
        });
        if let Err(error) = prepared {
            match chosen.settings.fail {
                Failing::Closed => return error,
                Failing::Open => report::to_system(&format!(
                    "{}: the container is started, and is adopted later: {}",
                    bundle.display(),
                    chain(&error)
                )),
            }
        }
    }
    let source = Command::new(&chosen.runtime).args(arguments).exec();
    Error::Start { path: chosen.runtime.clone(), source }
}

/// What the hook does. Not every runtime tells what a hook says: the system's log has it in any case.
fn admit(chosen: &Chosen) -> Result<(), Error> {
    let Err(error) = admit::admit(chosen, std::io::stdin()) else { return Ok(()) };
    match chosen.settings.fail {
        Failing::Open => {
            report::to_system(&format!("a container is started, and is adopted later: {}", chain(&error)));
            Ok(())
        }
        Failing::Closed => {
            report::to_system(&format!("a container is not started: {}", chain(&error)));
            Err(error.into())
        }
    }
}

/// An error with what is behind it, on a line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let more = error.to_string();
        // An error that shows its source says it already.
        if !text.ends_with(&more) {
            text = format!("{text}: {more}");
        }
        source = error.source();
    }
    text
}
