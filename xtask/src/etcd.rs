//! etcd for the tests of the broker: Debian's package, unpacked and not installed. Installed, it would start a daemon of
//! its own, under systemd and without.

use std::fs;

use anyhow::{Context, Result, bail};

use crate::apt::Apt;
use crate::{process, workspace};

const PACKAGE: &str = "etcd-server";

/// Brings it to where the tests look for it besides PATH: `target/tools/bin`.
pub(crate) fn prepare() -> Result<()> {
    let tools = workspace::tools();
    let program = tools.join("bin/etcd");
    if process::find("etcd").is_some() || program.is_file() {
        return Ok(());
    }
    if process::find("apt-get").is_none() {
        bail!("missing etcd, to test the broker with; install what Debian calls {PACKAGE}");
    }
    eprintln!("fetching {PACKAGE} into {}: to test the broker with; it is not installed", tools.display());
    let partial = tools.join("etcd.partial");
    if partial.exists() {
        fs::remove_dir_all(&partial).with_context(|| format!("cannot remove {}", partial.display()))?;
    }
    for folder in [&partial, &tools.join("bin")] {
        fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    }
    Apt::of_machine().unpack(&[PACKAGE], &partial)?;
    fs::rename(partial.join("usr/bin/etcd"), &program)
        .with_context(|| format!("{PACKAGE} has no program to move to {}", program.display()))?;
    fs::remove_dir_all(&partial).with_context(|| format!("cannot remove {}", partial.display()))
}
