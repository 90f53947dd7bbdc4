//! Container runtimes for the VM: Debian's packages, unpacked and not installed.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use crate::apt::Apt;
use crate::{process, workspace};

/// What Docker is made of. (What runs in containers is the busybox that the VM's tests have anyway.)
const PACKAGES: [&str; 4] = ["runc", "containerd", "docker.io", "tini"];

/// The folder that has them below it, fetched if it is not there.
pub(crate) fn fetch() -> Result<PathBuf> {
    let folder = workspace::target().join("vm/runtimes");
    if folder.exists() {
        return Ok(folder);
    }
    if process::find("apt-get").is_none() {
        bail!("there is no apt-get here to fetch container runtimes with");
    }
    eprintln!(
        "fetching {} into {}: container runtimes for the VM, which are not installed",
        PACKAGES.join(", "),
        folder.display()
    );
    let partial = folder.with_extension("partial");
    if partial.exists() {
        fs::remove_dir_all(&partial).with_context(|| format!("cannot remove {}", partial.display()))?;
    }
    fs::create_dir_all(&partial).with_context(|| format!("cannot create {}", partial.display()))?;
    Apt::of_machine().unpack(&PACKAGES, &partial)?;
    fs::rename(&partial, &folder).with_context(|| format!("cannot move {} into place", partial.display()))?;
    Ok(folder)
}
