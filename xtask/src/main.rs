//! shaper's own build, test and demo commands: `cargo xtask COMMAND`, or `./x COMMAND` on a machine that has no
//! toolchain yet. This file only wires; each command lives in the module of its subject.
#![forbid(unsafe_code)]

mod apt;
mod atomics;
mod bench;
mod bins;
mod browser;
mod commands;
mod corner_cases;
mod cpio;
mod dashboards;
mod deb;
mod demo;
mod ebpf;
mod frameworks;
mod fuzz;
mod guards;
mod host_root;
mod image;
mod initramfs;
mod kernels;
mod kubernetes;
mod modules;
mod process;
mod qemu;
mod relay;
mod runtimes;
mod setup;
mod soak;
mod support;
mod tally;
mod test;
mod tidy;
mod toolchain;
mod unpacked;
mod up;
mod venv;
mod vm;
mod workspace;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "xtask", about = "shaper's own build, VM, test and demo commands")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Measure what shaper costs and how right it is, against goals and peers
    Bench(bench::Args),
    /// Build the kernel programs and check their atomics
    BuildEbpf(ebpf::Args),
    /// Write the dashboards for Grafana, deploy/grafana
    Dashboards,
    /// Make Debian packages of agent, broker and command
    Deb(deb::Args),
    /// Show two real tasks being shaped: granted against measured
    Demo(demo::Args),
    /// Make an OCI image of all daemons, target/shaper-image.tar
    Image(image::Args),
    /// Install what other commands need from the system's packages
    Setup(setup::Args),
    /// Do in full, in the VM, what a run of every test does a little of
    Soak(soak::Args),
    /// Run every test: unit, property, native kernel, and the VM on each kernel
    Test(test::Args),
    /// Check cheap invariants of the source tree
    Tidy,
    /// Leave a broker and an agent running, to try things out
    Up(up::Args),
    /// Run the VM tests on Debian kernels in QEMU
    Vm(vm::Args),
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode> {
    match cli.command {
        Command::Bench(args) => bench::run(&args),
        Command::BuildEbpf(args) => ebpf::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Dashboards => dashboards::run().map(|()| ExitCode::SUCCESS),
        Command::Deb(args) => deb::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Demo(args) => demo::run(&args),
        Command::Image(args) => image::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Setup(args) => setup::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Soak(args) => soak::run(&args),
        Command::Test(args) => test::run(&args),
        Command::Tidy => tidy::run(),
        Command::Up(args) => up::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Vm(args) => vm::run(&args),
    }
}
