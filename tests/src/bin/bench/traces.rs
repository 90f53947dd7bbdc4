//! Real traces, from the folder that `SHAPER_DATA` names (by default `../shared/data` beside the repository).

use std::{
    env,
    fs::File,
    io::Read,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};

/// Where they are, or would be.
pub(crate) fn folder() -> PathBuf {
    env::var_os("SHAPER_DATA").map_or_else(|| PathBuf::from("../shared/data"), PathBuf::from)
}

/// The text of a file that gzip has packed.
pub(crate) fn unpacked(path: &Path) -> Result<String> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut gzip = Command::new("gzip").arg("-dc").stdin(file).stdout(Stdio::piped()).spawn()?;
    let mut text = String::new();
    gzip.stdout.take().context("gzip has no output")?.read_to_string(&mut text)?;
    let status = gzip.wait()?;
    if !status.success() {
        bail!("gzip of {}: {status}", path.display());
    }
    Ok(text)
}
