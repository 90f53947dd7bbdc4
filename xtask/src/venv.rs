//! Virtual environments of Python below `target`, from PyPI.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::{process, workspace};

/// In the environment: what it was made of.
const STAMP: &str = "made-of.txt";

/// The Python of an environment in `target/NAME` with what the file `requirements` names, and `packages` of this repository as
/// they are; made if it is not there, or was made of something else.
pub(crate) fn python(name: &str, requirements: &str, packages: &[&str], size: &str) -> Result<PathBuf> {
    let folder = workspace::target().join(name);
    let python = folder.join("bin/python");
    let wanted = workspace::root().join(requirements);
    let wanted = fs::read_to_string(&wanted).with_context(|| format!("cannot read {}", wanted.display()))?;
    if fs::read_to_string(folder.join(STAMP)).is_ok_and(|made_of| made_of == wanted) {
        return Ok(python);
    }
    if process::find("python3").is_none() {
        bail!("there is no python3, which {requirements} is for; as root: apt-get install python3-venv");
    }
    eprintln!("installing what {requirements} names into {}: {size}", folder.display());
    let made = process::run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&folder));
    made.context("cannot make a virtual environment; as root: apt-get install python3-venv")?;
    install(&python, &["-r", requirements])?;
    for package in packages {
        // As it is here: a change needs no installation.
        install(&python, &["-e", package])?;
    }
    fs::write(folder.join(STAMP), wanted).context("cannot note what the environment was made of")?;
    Ok(python)
}

fn install(python: &Path, what: &[&str]) -> Result<()> {
    let pip = ["-m", "pip", "--disable-pip-version-check", "install", "--quiet"];
    process::run(Command::new(python).args(pip).args(what).current_dir(workspace::root()))
}
