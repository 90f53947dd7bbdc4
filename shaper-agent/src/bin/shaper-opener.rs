//! Opens for the agent what takes CAP_SYS_ADMIN, so that the agent needs not have it. Started by systemd.

use std::{path::PathBuf, process::ExitCode};

use clap::Parser;
use shaper_agent::{launch, opener};

/// Opens what takes CAP_SYS_ADMIN for an agent without it: an fanotify group, and walks of the agent's iterator in other
/// network namespaces. It serves root alone.
#[derive(Parser)]
#[command(version)]
struct Options {
    /// Where to listen
    #[arg(long, value_name = "SOCKET", default_value = opener::SOCKET)]
    listen: PathBuf,
}

fn main() -> ExitCode {
    let options = Options::parse();
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).init();
    match opener::serve(&options.listen) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!(
                "shaper-opener: cannot listen on {}: {}",
                options.listen.display(),
                launch::chain(&error)
            );
            ExitCode::FAILURE
        }
    }
}
