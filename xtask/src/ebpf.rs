//! Builds `shaper-ebpf`, a workspace of its own, into `target/bpf/shaper.bpf.o`, and what its programs are measured
//! against into `target/bpf/bench.bpf.o`.

use std::env::consts::ARCH;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::{atomics, process, toolchain, workspace};

const TARGET: &str = "bpfel-unknown-none";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Also copy the object to this file
    #[arg(long, value_name = "PATH")]
    out: Option<PathBuf>,
    /// Build nothing; check the instructions of this object
    #[arg(long, value_name = "PATH", conflicts_with = "out")]
    check_only: Option<PathBuf>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    if let Some(object) = &args.check_only {
        atomics::check(object)?;
        println!("{}: every atomic read-modify-write fetches", object.display());
        return Ok(());
    }
    let object = build()?.programs;
    if let Some(out) = &args.out {
        copy(&object, out)?;
    }
    println!("{}", args.out.as_ref().unwrap_or(&object).display());
    Ok(())
}

/// The absolute paths of what was built.
pub(crate) struct Objects {
    /// The kernel programs.
    pub(crate) programs: PathBuf,
    /// What they are measured against.
    pub(crate) bench: PathBuf,
}

/// Builds and checks the kernel programs.
pub(crate) fn build() -> Result<Objects> {
    let toolchain = toolchain::prepare()?;
    let source = workspace::root().join("shaper-ebpf");
    let target = workspace::target().join("bpf");

    let mut cargo = toolchain.rust.cargo();
    cargo
        .current_dir(&source)
        .args(["build", "--release", "--target", TARGET, "-Z", "build-std=core", "--target-dir"])
        .arg(&target)
        .env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", &toolchain.linker)
        .env("CARGO_ENCODED_RUSTFLAGS", rustflags().join("\x1f"));
    if source.join("Cargo.lock").exists() {
        cargo.arg("--locked");
    }
    process::run(&mut cargo).context("cannot build the kernel programs")?;

    let object = |bin: &str, name: &str| {
        let built = target.join(TARGET).join("release").join(bin);
        atomics::check(&built)?;
        let object = target.join(name);
        copy(&built, &object)?;
        Ok::<_, anyhow::Error>(object)
    };
    Ok(Objects { programs: object("shaper-ebpf", "shaper.bpf.o")?, bench: object("bench", "bench.bpf.o")? })
}

fn rustflags() -> [String; 4] {
    [
        format!("--cfg=bpf_target_arch=\"{ARCH}\""), // whose registers the programs read
        "-Cdebuginfo=2".into(),                      // BTF is made of it
        "-Clink-arg=--btf".into(),
        "-Ctarget-cpu=v3".into(), // atomics that fetch
    ]
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    Ok(())
}
