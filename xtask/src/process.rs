//! Running other programs: errors name the command, and no `cargo` inherits what was meant for another one.

use std::ffi::{OsStr, OsString};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use anyhow::{Context, Result, bail};

use crate::workspace;

/// The cargo that runs this program, and so the toolchain of the host's crates; started at the repository's root.
///
/// What `cargo run` tells this program of its own package is taken away: build scripts that look at that (ring's does) would
/// run anew, and all that depends on them would be built anew, whenever cargo is called now by hand and now from here.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    for (name, _) in env::vars_os() {
        let is_of_package =
            |name: &str| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_");
        if name.to_str().is_some_and(is_of_package) {
            command.env_remove(name);
        }
    }
    command.current_dir(workspace::root());
    command
}

/// In what time a daemon starts or ends, on a slow machine too.
pub(crate) const READY: Duration = Duration::from_secs(30);

/// Waits until a daemon that was started answers at its socket; its log is in the error when it does not.
pub(crate) fn wait_until_ready(daemon: &mut Child, socket: &Path, log: &Path) -> Result<()> {
    let start = Instant::now();
    while UnixStream::connect(socket).is_err() {
        let ended = daemon.try_wait().context("cannot wait for a daemon")?;
        if ended.is_some() || start.elapsed() > READY {
            bail!("it did not start:\n{}", fs::read_to_string(log).unwrap_or_default());
        }
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Runs `command` with its output on ours, and fails when it does.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("cannot start `{}`", shown(command)))?;
    if !status.success() {
        bail!("`{}` failed: {status}", shown(command));
    }
    Ok(())
}

/// Runs `command` and returns its standard output as text; its standard error becomes part of the error.
pub(crate) fn read(command: &mut Command) -> Result<String> {
    let output = output(command)?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        let said = if stderr.is_empty() { String::new() } else { format!(": {}", stderr.trim()) };
        bail!("`{}` failed: {}{said}", shown(command), output.status);
    }
    String::from_utf8(output.stdout)
        .with_context(|| format!("`{}` printed what is not UTF-8", shown(command)))
}

/// Runs `command` to its end, whatever that is.
pub(crate) fn output(command: &mut Command) -> Result<Output> {
    command.output().with_context(|| format!("cannot start `{}`", shown(command)))
}

/// `command` as one would type it.
pub(crate) fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}

/// The file that `program` names: looked up on PATH, then in the administrator's folders, which a user's PATH
/// often lacks.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|folder| folder.join(program))
        .find(|file| file.is_file())
}

/// PATH with `folder` before everything else.
pub(crate) fn path_with(folder: &Path) -> Result<OsString> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::join_paths(std::iter::once(folder.to_owned()).chain(env::split_paths(&path)))
        .with_context(|| format!("cannot put {} on PATH", folder.display()))
}

/// Takes away what the cargo around us set for its own toolchain and for the host's crates, so that a cargo of
/// another toolchain starts as from a fresh shell.
pub(crate) fn forget_outer_cargo(command: &mut Command) -> &mut Command {
    for (name, _) in env::vars_os() {
        if name.to_str().is_some_and(belongs_to_outer_cargo) {
            command.env_remove(name);
        }
    }
    command
}

fn belongs_to_outer_cargo(name: &str) -> bool {
    const EXACT: &[&str] = &[
        "CARGO",
        "CARGO_ENCODED_RUSTFLAGS",
        "CARGO_INCREMENTAL",
        "CARGO_MAKEFLAGS",
        "LD_LIBRARY_PATH", // `cargo run` puts its own toolchain's libraries there
        "MAKEFLAGS",
        "RUSTFLAGS",
        "RUSTUP_TOOLCHAIN",
        "RUST_RECURSION_COUNT",
    ];
    const PREFIX: &[&str] = &[
        "CARGO_BUILD_",
        "CARGO_MANIFEST_",
        "CARGO_PKG_",
        "CARGO_PROFILE_",
        "CARGO_TARGET_",
        "RUSTC",
        "RUSTDOC",
    ];
    EXACT.contains(&name) || PREFIX.iter().any(|prefix| name.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_of_the_outer_cargo_are_told_from_the_users() {
        for name in
            ["CARGO", "RUSTC", "RUSTC_WRAPPER", "RUSTUP_TOOLCHAIN", "CARGO_BUILD_TARGET", "RUSTDOCFLAGS"]
        {
            assert!(belongs_to_outer_cargo(name), "{name}");
        }
        for name in
            ["CARGO_HOME", "CARGO_TERM_COLOR", "CARGO_NET_OFFLINE", "RUSTUP_HOME", "RUST_BACKTRACE", "PATH"]
        {
            assert!(!belongs_to_outer_cargo(name), "{name}");
        }
    }

    #[test]
    fn failures_name_the_command() {
        let error = read(Command::new("false").arg("--now")).unwrap_err();
        assert!(error.to_string().starts_with("`false --now` failed"), "{error}");
        let error = run(&mut Command::new("no-such-program-here")).unwrap_err();
        assert!(error.to_string().contains("no-such-program-here"), "{error}");
    }
}
