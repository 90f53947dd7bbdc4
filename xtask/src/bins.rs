//! Builds the host's binaries with cargo, and learns from it where they are.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::process;
use crate::setup::{self, Need};

/// What a user or a test starts.
pub(crate) const SHIPPED: [&str; 9] = [
    "shaper-agent",
    "shaper-authority",
    "shaper-broker",
    "shaper-launch",
    "shaper-nsenter",
    "shaper-opener",
    "shaper-runtime",
    "shaper-warden",
    "shaper",
];

/// The packages that have them.
const PACKAGES: [&str; 5] =
    ["shaper-agent", "shaper-broker", "shaper-cli", "shaper-nsenter", "shaper-runtime"];

/// Stands in programs that abort where a test wants it (`shaper_proto::failpoint`).
const FAILPOINTS: &[u8] = b"SHAPER_FAILPOINT";

/// The folder that holds every binary of the workspace.
pub(crate) struct BinDir(PathBuf);

impl BinDir {
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    pub(crate) fn bin(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

/// What is selected of the workspace for tests: all but this one, which is running.
const WHOLE: [&str; 3] = ["--workspace", "--exclude", "xtask"];

/// Builds all binaries of the workspace, for tests.
pub(crate) fn build() -> Result<BinDir> {
    build_of(&WHOLE)
}

/// Builds them with optimization, for benchmarks.
pub(crate) fn build_release() -> Result<BinDir> {
    build_of(&[&WHOLE[..], &["--release", "--features", "shaper-tests/bench"]].concat())
}

/// Builds what is shipped as it is shipped: without what is there for tests alone.
pub(crate) fn build_shipped() -> Result<BinDir> {
    let mut of = vec!["--release"];
    of.extend(PACKAGES.iter().flat_map(|package| ["--package", package]));
    let bins = build_of(&of)?;
    for name in SHIPPED {
        let path = bins.bin(name);
        let program = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        if program.windows(FAILPOINTS.len()).any(|window| window == FAILPOINTS) {
            bail!("{} was built with failpoints, which are for tests", path.display());
        }
    }
    Ok(bins)
}

fn build_of(of: &[&str]) -> Result<BinDir> {
    setup::ensure(Need::Build)?;
    let built = executables(&[&["build", "--bins"], of].concat())?;
    let shaper = find(built, "shaper", false)?;
    let folder = shaper.parent().with_context(|| format!("{} is in no folder", shaper.display()))?;
    let bins = BinDir(folder.to_owned());
    if let Some(absent) = SHIPPED.iter().find(|name| !bins.bin(name).is_file()) {
        bail!("cargo built no binary named {absent} into {}", folder.display());
    }
    Ok(bins)
}

/// Builds a `[[test]]` of shaper-tests, such as that for the VM, `vm`.
pub(crate) fn build_tests(name: &str) -> Result<PathBuf> {
    // Of the whole workspace, so that dependencies have the same features as in `build`.
    find(executables(&[&["test", "--test", name, "--no-run"], &WHOLE[..]].concat())?, name, true)
}

/// Builds the unit tests of these packages.
pub(crate) fn build_unit_tests(packages: &[&str]) -> Result<Vec<PathBuf>> {
    let built = executables(&[&["test", "--lib", "--no-run"], &WHOLE[..]].concat())?;
    let names: Vec<_> = packages.iter().map(|package| package.replace('-', "_")).collect();
    let found = built.into_iter().filter(|executable| executable.test && names.contains(&executable.name));
    Ok(found.map(|executable| executable.path).collect())
}

fn find(executables: Vec<Executable>, name: &str, test: bool) -> Result<PathBuf> {
    let found = executables.into_iter().find(|executable| executable.name == name && executable.test == test);
    let kind = if test { "test binary" } else { "binary" };
    found.map(|executable| executable.path).with_context(|| format!("cargo built no {kind} named {name}"))
}

#[derive(Debug, PartialEq, Eq)]
struct Executable {
    name: String,
    /// Whether it is run by libtest.
    test: bool,
    path: PathBuf,
}

/// Runs cargo with `args`, and returns the executables it built or found fresh.
fn executables(args: &[&str]) -> Result<Vec<Executable>> {
    let mut cargo = process::cargo();
    cargo
        .args(args)
        .args(["--locked", "--message-format", "json-render-diagnostics"])
        .stderr(Stdio::inherit());
    let messages = process::read(&mut cargo)?;
    messages.lines().filter_map(|line| executable(line).transpose()).collect()
}

/// The executable that one of cargo's messages is about.
fn executable(message: &str) -> Result<Option<Executable>> {
    #[derive(Deserialize)]
    struct Message {
        target: Option<Target>,
        profile: Option<Profile>,
        executable: Option<PathBuf>,
    }
    #[derive(Deserialize)]
    struct Target {
        name: String,
    }
    #[derive(Deserialize)]
    struct Profile {
        test: bool,
    }
    let message: Message = serde_json::from_str(message)
        .with_context(|| format!("cargo printed an unknown message: {message}"))?;
    Ok(match (message.target, message.profile, message.executable) {
        (Some(target), Some(profile), Some(path)) => {
            Some(Executable { name: target.name, test: profile.test, path })
        }
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn executables_are_read_from_cargos_messages() {
        let message = |name: &str, test: bool, path: &str| {
            format!(
                r#"{{"reason":"compiler-artifact","target":{{"name":"{name}"}},"profile":{{"test":{test}}},
                "executable":{path}}}"#
            )
        };
        // A package's test comes with its binaries.
        let messages = [message("vm", true, "\"/t/deps/vm-1\""), message("vm-init", false, "\"/t/vm-init\"")];
        let built = messages.iter().map(|message| executable(message).unwrap().unwrap()).collect();
        assert_eq!(find(built, "vm", true).unwrap(), Path::new("/t/deps/vm-1"));

        assert_eq!(executable(&message("shaper-core", false, "null")).unwrap(), None);
        assert_eq!(executable(r#"{"reason":"build-finished","success":true}"#).unwrap(), None);
        assert!(executable("error").is_err());
    }
}
