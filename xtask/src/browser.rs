//! Chromium and what drives it, for the tests of the web page: Debian's browser, and playwright-core from the npm registry, below
//! `target`.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::bins::{self, BinDir};
use crate::setup::{self, Need};
use crate::test::{Output, Stage, counted};
use crate::{ebpf, process, workspace};

/// The target of shaper-tests that needs it.
pub(crate) const TARGET: &str = "browser";
/// The program that drives the browser, and what it is made of.
const FILES: [&str; 3] = ["page.mjs", "package.json", "package-lock.json"];
/// In the folder: what was installed.
const STAMP: &str = "made-of.json";
/// What playwright-core runs on, in the version of the lock file: Debian 12 has it.
const NODE_MAJOR: u32 = 18;

/// Where the program is, with all that it needs.
fn folder() -> Result<PathBuf> {
    setup::ensure(Need::Browser)?;
    let version = process::read(Command::new("node").arg("--version"))?;
    let major =
        version.trim().trim_start_matches('v').split('.').next().and_then(|it| it.parse::<u32>().ok());
    if major.is_none_or(|major| major < NODE_MAJOR) {
        bail!(
            "node is {}, and {NODE_MAJOR} is needed to drive a browser; install what Debian calls nodejs",
            version.trim()
        );
    }
    let folder = workspace::target().join("browser");
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    for name in FILES {
        let from = workspace::root().join("tests/browser").join(name);
        fs::copy(&from, folder.join(name)).with_context(|| format!("cannot copy {}", from.display()))?;
    }
    let wanted =
        fs::read_to_string(folder.join("package-lock.json")).context("cannot read what was copied")?;
    if fs::read_to_string(folder.join(STAMP)).is_ok_and(|made_of| made_of == wanted) {
        return Ok(folder);
    }
    eprintln!("installing playwright-core into {}, to drive Chromium", folder.display());
    let mut npm = Command::new("npm");
    npm.args(["ci", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix"]).arg(&folder);
    process::run(&mut npm)?;
    fs::write(folder.join(STAMP), wanted).context("cannot note what was installed")?;
    Ok(folder)
}

/// Runs the tests of the web page.
pub(crate) fn test(bins: &BinDir) -> Result<Stage> {
    let mut tests = Command::new(bins::build_tests(TARGET)?);
    tests.args(["--test-threads=1", "--nocapture"]).env("SHAPER_BROWSER", folder()?);
    tests.env("SHAPER_BIN_DIR", bins.path()).env("SHAPER_BPF_OBJECT", ebpf::build()?.programs);
    counted("browser", tests, Output::Stdout)
}
