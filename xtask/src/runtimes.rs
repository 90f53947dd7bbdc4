//! Container runtimes for the VM and for what is measured: Debian's packages, unpacked and not installed.

use std::path::PathBuf;

use anyhow::Result;

use crate::unpacked;
use crate::workspace;

/// What Docker is made of, Podman, and the runtimes. (What runs in containers is the busybox that the VM's tests have anyway.)
const PACKAGES: [&str; 6] = ["runc", "crun", "containerd", "docker.io", "podman", "tini"];

/// The folder that has them below it, fetched if it is not there.
pub(crate) fn fetch() -> Result<PathBuf> {
    let folder = workspace::target().join("vm/containers");
    unpacked::folder(&folder, &PACKAGES, "container runtimes for tests")?;
    Ok(folder)
}
