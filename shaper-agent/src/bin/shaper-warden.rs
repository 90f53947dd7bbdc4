//! Takes back what the agent has lent when it has died or was stopped. Started by the agent.

use std::{path::Path, process::ExitCode};

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    let path = arguments.next();
    let mut number = || arguments.next()?.to_str()?.parse().ok();
    let (Some(path), Some(epoch), Some(agent)) = (path, number(), number()) else {
        eprintln!("usage: shaper-warden TABLE EPOCH AGENT-PID (started by shaper-agent)");
        return ExitCode::from(2);
    };
    let agent = u32::try_from(agent).unwrap_or(0);
    match shaper_agent::warden::watch(Path::new(&path), epoch, agent) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("shaper-warden: {}", shaper_agent::launch::chain(&error));
            ExitCode::FAILURE
        }
    }
}
