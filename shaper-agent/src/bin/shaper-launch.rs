//! The supervisor of one attempt of a task. Started by the agent, outlives it.

use std::{path::Path, process::ExitCode};

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    let (Some(directory), None) = (arguments.next(), arguments.next()) else {
        eprintln!("usage: shaper-launch ATTEMPT-DIRECTORY (started by shaper-agent)");
        return ExitCode::from(2);
    };
    match shaper_agent::launch::supervise(Path::new(&directory)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("shaper-launch: {}", shaper_agent::launch::chain(&error));
            ExitCode::FAILURE
        }
    }
}
