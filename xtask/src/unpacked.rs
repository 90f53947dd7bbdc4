//! Programs for tests: from Debian's packages, unpacked and not installed. Installed, they would start daemons of their own,
//! under systemd and without.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::apt::Apt;
use crate::{process, workspace};

/// A package, and what of it is wanted.
pub(crate) struct Unpacked {
    package: &'static str,
    programs: &'static [&'static str],
    why: &'static str,
}

/// etcd for the tests of the broker.
pub(crate) const ETCD: Unpacked =
    Unpacked { package: "etcd-server", programs: &["etcd"], why: "to test the broker with" };

/// Prometheus for the tests of dashboards and alerts.
pub(crate) const PROMETHEUS: Unpacked = Unpacked {
    package: "prometheus",
    programs: &["prometheus", "promtool"],
    why: "to test dashboards and alerts with",
};

impl Unpacked {
    /// Brings its programs to where the tests look for them besides PATH: `target/tools/bin`.
    pub(crate) fn prepare(&self) -> Result<()> {
        let Unpacked { package, programs, why } = self;
        let tools = workspace::tools();
        let is_here = |name: &&str| process::find(name).is_some() || tools.join("bin").join(name).is_file();
        if programs.iter().all(is_here) {
            return Ok(());
        }
        if process::find("apt-get").is_none() {
            bail!("missing {}, {why}; install what Debian calls {package}", programs.join(" and "));
        }
        eprintln!("fetching {package} into {}: {why}; it is not installed", tools.display());
        let partial = tools.join(format!("{package}.partial"));
        if partial.exists() {
            fs::remove_dir_all(&partial).with_context(|| format!("cannot remove {}", partial.display()))?;
        }
        for folder in [&partial, &tools.join("bin")] {
            fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        }
        Apt::of_machine().unpack(&[package], &partial)?;
        for name in *programs {
            let program = tools.join("bin").join(name);
            fs::rename(partial.join("usr/bin").join(name), &program)
                .with_context(|| format!("{package} has no program to move to {}", program.display()))?;
        }
        fs::remove_dir_all(&partial).with_context(|| format!("cannot remove {}", partial.display()))
    }
}

/// Makes `folder`, if it is not there, with these packages below it, and what apt would install with them.
pub(crate) fn folder(folder: &Path, packages: &[&str], why: &str) -> Result<()> {
    if folder.exists() {
        return Ok(());
    }
    let list = packages.join(", ");
    if process::find("apt-get").is_none() {
        bail!("there is no apt-get here to fetch {list} with, {why}");
    }
    eprintln!("fetching {list} into {}: {why}; they are not installed", folder.display());
    let partial = folder.with_extension("partial");
    if partial.exists() {
        fs::remove_dir_all(&partial).with_context(|| format!("cannot remove {}", partial.display()))?;
    }
    fs::create_dir_all(&partial).with_context(|| format!("cannot create {}", partial.display()))?;
    let apt = Apt::of_machine();
    let needed = apt.needed(packages)?;
    apt.unpack(&needed.iter().map(String::as_str).collect::<Vec<_>>(), &partial)?;
    fs::rename(&partial, folder).with_context(|| format!("cannot move {} into place", partial.display()))
}
