//! The supervisor of one attempt of a task. Started by the agent or, for it, by systemd; outlives it.

use std::{path::Path, process::ExitCode};

use shaper_agent::launch::{self, Parent};

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let (parent, directory) = match &arguments[..] {
        [directory] => (Parent::Agent, directory),
        [unit, directory] if unit == "--unit" => (Parent::Systemd, directory),
        _ => {
            eprintln!("usage: shaper-launch [--unit] ATTEMPT-DIRECTORY (started by shaper-agent)");
            return ExitCode::from(2);
        }
    };
    match launch::supervise(Path::new(directory), parent) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("shaper-launch: {}", launch::chain(&error));
            ExitCode::FAILURE
        }
    }
}
