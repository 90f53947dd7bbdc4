//! Python with the frameworks that the package of `python/` works inside of: a virtual environment below `target`, from PyPI.

use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};

use crate::bins::{self, BinDir};
use crate::test::{Output, Stage, counted};
use crate::{commands, ebpf, venv};

/// The target of shaper-tests that needs it.
pub(crate) const TARGET: &str = "frameworks";
/// What is installed, with versions.
const REQUIREMENTS: &str = "python/requirements.txt";
/// The environment's Python.
fn python() -> Result<PathBuf> {
    venv::python("python", REQUIREMENTS, &["python"], "half a gigabyte")
}

/// Runs the tests of the package, and those against real frameworks, with what was built.
pub(crate) fn test(bins: &BinDir) -> Result<Stage> {
    let python = python()?;
    let mut tests = Command::new(bins::build_tests(TARGET)?);
    // One after the other: they measure. What they print has the figures.
    tests.args(["--test-threads=1", "--nocapture"]);
    tests.env("SHAPER_PYTHON", python).env("SHAPER_BIN_DIR", bins.path());
    tests.env("SHAPER_BPF_OBJECT", ebpf::build()?.programs);
    counted("frameworks", tests, Output::Stdout)
}

/// The commands of the documents that start them.
pub(crate) fn commands(bins: &BinDir) -> Result<Stage> {
    let mut tests = commands::tests("frameworks", bins, &ebpf::build()?.programs)?;
    tests.env("SHAPER_PYTHON", python()?);
    counted("frameworks, commands", tests, Output::Stdout)
}

/// What a worker in a task costs, and a task of such a worker, beside the frameworks alone.
pub(crate) fn bench() -> Result<ExitCode> {
    let python = python()?;
    let bins = bins::build_release()?;
    let mut tests = Command::new(bins::build_tests(TARGET)?);
    tests.args(["--test-threads=1", "--nocapture", "ray", "dask"]).env("PYTEST_ADDOPTS", "-k overhead");
    tests.env("SHAPER_PYTHON", python).env("SHAPER_BIN_DIR", bins.path());
    tests.env("SHAPER_BPF_OBJECT", ebpf::build()?.programs);
    let status = tests.status().context("cannot start the tests of frameworks")?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
