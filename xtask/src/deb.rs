//! Debian packages: `shaper-agent`, `shaper-broker` and `shaper-cli`, as the crates of those names say
//! (`[package.metadata.deb]`), by cargo-deb.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::bins::{self, BinDir};
use crate::{ebpf, process, workspace};

const CARGO_DEB: &str = "3.8.0";

/// The crates that are packages.
const PACKAGES: [&str; 3] = ["shaper-agent", "shaper-broker", "shaper-cli"];

/// Daemons that are found in /usr/sbin as well. Each prints its own manual page.
const DAEMONS: [&str; 3] = ["shaper-agent", "shaper-broker", "shaper-authority"];

/// A completion for a shell, and its file.
const COMPLETIONS: [(&str, &str); 3] = [("bash", "shaper.bash"), ("zsh", "_shaper"), ("fish", "shaper.fish")];

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Revision of the packages: what is behind the version
    #[arg(long, value_name = "REVISION", default_value = "1")]
    revision: String,
    /// Directory to put them into
    #[arg(long, value_name = "DIR", default_value = "target/debian")]
    out: PathBuf,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let object = ebpf::build()?.programs;
    let bins = bins::build_shipped()?;
    let out = workspace::root().join(&args.out);
    for package in pack(&bins, &object, "release", &args.revision, &out)? {
        println!("{}", package.display());
    }
    Ok(())
}

/// Two revisions of the agent's and one of the others, of the binaries that tests run: for the VM.
pub(crate) fn for_tests(bins: &BinDir, object: &Path) -> Result<PathBuf> {
    let out = workspace::target().join("vm/packages");
    if out.exists() {
        fs::remove_dir_all(&out).with_context(|| format!("cannot remove {}", out.display()))?;
    }
    for revision in ["1", "2"] {
        pack(bins, object, "dev", revision, &out.join(revision))?;
    }
    Ok(out)
}

/// Packs what is built, and returns the packages. `profile` is that of the binaries.
fn pack(bins: &BinDir, object: &Path, profile: &str, revision: &str, out: &Path) -> Result<Vec<PathBuf>> {
    gather(bins, object)?;
    let cargo_deb = tool()?;
    fs::create_dir_all(out).with_context(|| format!("cannot make {}", out.display()))?;
    let pack = |package: &str| {
        let mut command = Command::new(&cargo_deb);
        command.current_dir(workspace::root()).args(["deb", "--no-build", "--locked", "--quiet"]);
        command.args(["--package", package, "--profile", profile, "--deb-revision", revision]);
        // What tests install need not be small.
        command.args((profile == "dev").then_some("--fast"));
        command.arg("--output").arg(out);
        let said = process::read(&mut command).with_context(|| format!("cannot pack {package}"))?;
        let path = said.lines().last().with_context(|| format!("cargo-deb named no package of {package}"))?;
        Ok(PathBuf::from(path))
    };
    PACKAGES.into_iter().map(pack).collect()
}

/// Puts into target/deb what is packed beside the binaries: kernel programs, manual pages, completions, links.
fn gather(bins: &BinDir, object: &Path) -> Result<()> {
    let folder = workspace::target().join("deb");
    if folder.exists() {
        fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    let write = |name: &str, text: &str| {
        let path = folder.join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
    };
    for name in ["completions", "man", "sbin"] {
        let path = folder.join(name);
        fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
    }
    fs::copy(object, folder.join("shaper.bpf.o"))
        .with_context(|| format!("cannot copy {}", object.display()))?;
    for name in DAEMONS {
        write(&format!("man/{name}.8"), &process::read(Command::new(bins.bin(name)).arg("man"))?)?;
        let link = folder.join("sbin").join(name);
        symlink(format!("../lib/shaper/{name}"), &link)
            .with_context(|| format!("cannot link {}", link.display()))?;
    }
    let shaper = bins.bin("shaper");
    process::run(Command::new(&shaper).arg("man").arg(folder.join("man")))?;
    for (shell, name) in COMPLETIONS {
        let text = process::read(Command::new(&shaper).args(["completions", shell]))?;
        write(&format!("completions/{name}"), &text)?;
    }
    Ok(())
}

/// cargo-deb, installed where it is not here yet.
fn tool() -> Result<PathBuf> {
    let tool = workspace::tools().join("bin/cargo-deb");
    let is_it = process::read(Command::new(&tool).args(["deb", "--version"]));
    if is_it.is_ok_and(|version| version.trim().ends_with(CARGO_DEB)) {
        return Ok(tool);
    }
    eprintln!("installing cargo-deb {CARGO_DEB} into {}: it makes packages", workspace::tools().display());
    let mut install = process::cargo();
    install.args(["install", "cargo-deb", "--version", CARGO_DEB, "--locked", "--root"]);
    process::run(install.arg(workspace::tools())).context("cannot install cargo-deb")?;
    Ok(tool)
}
