//! The `shaper` command: a client of the agent of this node, and of the broker of its cluster. It asks
//! and shows; every decision is theirs.
#![deny(unsafe_code)]

mod args;
mod client;
mod cluster;
mod commands;
mod contexts;
mod error;
mod exit;
mod follow;
mod output;
mod progress;
mod servers;
mod show;
mod time;
mod users;

use std::process::ExitCode;

use clap::Parser;

use crate::{args::Args, error::Error};

fn main() -> ExitCode {
    let args = Args::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(source) => return exit::report(&Error::Runtime(source)),
    };
    let outcome = runtime.block_on(commands::execute(args));
    // Not by dropping it: a worker may hang in a write to a terminal that is stopped.
    runtime.shutdown_background();
    outcome.unwrap_or_else(|error| exit::report(&error))
}
