//! Container runtimes for the VM: Debian's packages, unpacked and not installed.

use std::path::PathBuf;

use anyhow::Result;

use crate::unpacked::{self, With};
use crate::workspace;

/// What Docker is made of. (What runs in containers is the busybox that the VM's tests have anyway.)
const PACKAGES: [&str; 4] = ["runc", "containerd", "docker.io", "tini"];

/// The folder that has them below it, fetched if it is not there.
pub(crate) fn fetch() -> Result<PathBuf> {
    let folder = workspace::target().join("vm/runtimes");
    unpacked::folder(&folder, &PACKAGES, With::Nothing, "container runtimes for the VM")?;
    Ok(folder)
}
