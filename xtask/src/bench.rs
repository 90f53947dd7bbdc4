//! `cargo xtask bench`: what shaper costs, and how right it is, against its goals and its peers. Everything is built as
//! it is shipped; what measures is a program of its own (`tests/src/bin/bench`).

use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use clap::{Args as ClapArgs, Subcommand};

use crate::setup::{self, Need};
use crate::{bins, ebpf};

#[derive(ClapArgs)]
pub(crate) struct Args {
    #[command(subcommand)]
    subject: Subject,
}

#[derive(Subcommand)]
enum Subject {
    /// What it costs to measure, and how right the measurement is
    Measure(Options),
}

#[derive(ClapArgs)]
struct Options {
    /// End in one line of JSON with every figure
    #[arg(long)]
    json: bool,
    /// Fewer and shorter rounds: less than a minute
    #[arg(long)]
    quick: bool,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let Args { subject: Subject::Measure(options) } = args;
    setup::ensure(Need::Native)?;
    let objects = ebpf::build()?;
    let bins = bins::build_bench()?;
    let bench = bins.bin("bench");
    let mut command = Command::new(&bench);
    command.arg("measure");
    for (wanted, option) in [(options.json, "--json"), (options.quick, "--quick")] {
        if wanted {
            command.arg(option);
        }
    }
    command
        .env("SHAPER_BIN_DIR", bins.path())
        .env("SHAPER_BPF_OBJECT", &objects.programs)
        .env("SHAPER_BENCH_OBJECT", &objects.bench);
    let status = command.status().with_context(|| format!("cannot start {}", bench.display()))?;
    match status.code() {
        Some(0) => Ok(ExitCode::SUCCESS),
        // It has said why.
        Some(_) => Ok(ExitCode::FAILURE),
        None => bail!("{}: {status}", bench.display()),
    }
}
