//! Python with the frameworks that the package of `python/` works inside of: a virtual environment below `target`, from PyPI.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};

use crate::bins::{self, BinDir};
use crate::test::{Output, Stage, counted};
use crate::{ebpf, process, workspace};

/// The target of shaper-tests that needs it.
pub(crate) const TARGET: &str = "frameworks";
/// What is installed, with versions.
const REQUIREMENTS: &str = "python/requirements.txt";
/// In the environment: what it was made of.
const STAMP: &str = "made-of.txt";

/// The environment's Python; made if it is not there, or was made of something else.
fn python() -> Result<PathBuf> {
    let folder = workspace::target().join("python");
    let python = folder.join("bin/python");
    let wanted = workspace::root().join(REQUIREMENTS);
    let wanted = fs::read_to_string(&wanted).with_context(|| format!("cannot read {}", wanted.display()))?;
    if fs::read_to_string(folder.join(STAMP)).is_ok_and(|made_of| made_of == wanted) {
        return Ok(python);
    }
    if process::find("python3").is_none() {
        bail!("there is no python3, to test the frameworks with; as root: apt-get install python3-venv");
    }
    eprintln!("installing what {REQUIREMENTS} names into {}: half a gigabyte", folder.display());
    let made = process::run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&folder));
    made.context("cannot make a virtual environment; as root: apt-get install python3-venv")?;
    let pip = ["-m", "pip", "--disable-pip-version-check", "install", "--quiet"];
    process::run(Command::new(&python).args(pip).args(["-r", REQUIREMENTS]).current_dir(workspace::root()))?;
    // The package itself as it is here: a change needs no installation.
    process::run(Command::new(&python).args(pip).args(["-e", "python"]).current_dir(workspace::root()))?;
    fs::write(folder.join(STAMP), wanted).context("cannot note what the environment was made of")?;
    Ok(python)
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
