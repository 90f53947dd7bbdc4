//! The commands of the README and of docs/ that take what is no part of each run of the tests: container runtimes, a registry, an
//! SSH server, kubectl with what stands for an API server, minutes of time. Which they are, the docs tests say.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::bins::{self, BinDir};
use crate::setup::{self, Need};
use crate::test::{Output, Stage, counted};
use crate::{kubernetes, unpacked, workspace};

/// The target of shaper-tests that has them, and what the names of their tests begin with.
const TARGET: &str = "docs";
pub(crate) const STAGES: &str = "stages::";

/// What the commands start, or talk to.
const PACKAGES: [&str; 6] = ["skopeo", "podman", "crun", "containerd", "docker-registry", "openssh-server"];

/// Those that take what is installed for them alone.
pub(crate) fn test(bins: &BinDir, bpf_object: &Path) -> Result<Stage> {
    setup::ensure(Need::Vm)?;
    setup::ensure(Need::Commands)?;
    let kubernetes = kubernetes::tools()?;
    let packages = packages()?;
    let mut tests = tests("commands", bins, bpf_object)?;
    tests.env("SHAPER_COMMANDS", packages).env("SHAPER_KUBERNETES", kubernetes);
    counted("commands", tests, Output::Stdout)
}

/// Those that measure.
pub(crate) fn benches(bins: &BinDir, bpf_object: &Path) -> Result<Stage> {
    setup::ensure(Need::Vm)?;
    setup::ensure(Need::Traffic)?;
    counted("benches", tests("benches", bins, bpf_object)?, Output::Stdout)
}

/// Those that repeat what other tests do.
pub(crate) fn soaks(bins: &BinDir, bpf_object: &Path) -> Result<Stage> {
    setup::ensure(Need::Vm)?;
    counted("soaks", tests("soaks", bins, bpf_object)?, Output::Stdout)
}

/// Runs them, of one stage.
pub(crate) fn tests(stage: &str, bins: &BinDir, bpf_object: &Path) -> Result<Command> {
    let mut tests = Command::new(bins::build_tests(TARGET)?);
    // What they build and measure takes minutes, and says so.
    tests.arg(format!("{STAGES}{stage}::")).args(["--test-threads=1", "--nocapture"]);
    tests.env("SHAPER_BIN_DIR", bins.path()).env("SHAPER_BPF_OBJECT", bpf_object);
    Ok(tests)
}

/// The folder that has the packages below it, with what they need that is not installed here.
fn packages() -> Result<PathBuf> {
    let folder = workspace::target().join("commands");
    let why = "for the commands of README and docs";
    unpacked::folder(&folder, &PACKAGES, why)?;
    folder.canonicalize().with_context(|| format!("cannot find {}", folder.display()))
}
