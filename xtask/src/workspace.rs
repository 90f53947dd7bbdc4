//! Where things are in this repository.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::de::DeserializeOwned;

use crate::process;

/// The repository's root.
pub(crate) fn root() -> &'static Path {
    const MANIFEST_DIR: &str = env!("CARGO_MANIFEST_DIR");
    Path::new(MANIFEST_DIR).parent().unwrap_or(Path::new("/"))
}

/// The folder of everything that is built or fetched, which `git clean` and `rm -r` may take at any time.
pub(crate) fn target() -> PathBuf {
    root().join("target")
}

/// Where `cargo install --root` puts the tools that only this repository needs.
pub(crate) fn tools() -> PathBuf {
    target().join("tools")
}

/// What cargo knows of the packages of the workspace at `manifest`, read as `T`.
pub(crate) fn metadata<T: DeserializeOwned>(manifest: &Path) -> Result<T> {
    let mut cargo = process::cargo();
    cargo.args(["metadata", "--no-deps", "--format-version", "1", "--manifest-path"]).arg(manifest);
    serde_json::from_str(&process::read(&mut cargo)?)
        .with_context(|| format!("cannot understand cargo's metadata of {}", manifest.display()))
}
