//! The toolchain of the kernel programs: a Rust that can build `core` for BPF, and bpf-linker.
//!
//! Two kinds of machine are served. A developer's has rustup with a nightly and its `rust-src`. Debian's own
//! packages of a recent Rust carry the sources too, and stand in for a nightly with `RUSTC_BOOTSTRAP`.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::setup::{self, Need};
use crate::{process, workspace};

const LINKER_VERSION: &str = "0.13.0";

/// The LLVM that Debian's bpf-linker is built with: packages in `setup`, and bpf-linker's feature of that name.
const DEBIAN_LLVM: u32 = 22;

/// A system rustc older than this lacks the edition of the kernel programs, or emits what bpf-linker cannot read.
const OLDEST_SYSTEM_RUST: (u32, u32) = (1, 90);

const WITH_RUSTUP: &str =
    "with rustup: `rustup toolchain install nightly --profile minimal --component rust-src`";

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Origin {
    RustupNightly,
    System,
}

/// A Rust that can build `core`.
pub(crate) struct Rust {
    origin: Origin,
    cargo: PathBuf,
    rustc: PathBuf,
    /// The major version of its LLVM.
    llvm: u32,
}

/// Everything that builds the kernel programs.
pub(crate) struct Toolchain {
    pub(crate) rust: Rust,
    pub(crate) linker: PathBuf,
}

impl Rust {
    /// A cargo of this toolchain that knows of no other one, with unstable options allowed.
    pub(crate) fn cargo(&self) -> Command {
        let mut command = Command::new(&self.cargo);
        process::forget_outer_cargo(&mut command).env("RUSTC", &self.rustc);
        if self.origin == Origin::System {
            command.env("RUSTC_BOOTSTRAP", "1");
        }
        command
    }

    /// The toolchain at `sysroot`, if it has the library's sources.
    fn at(origin: Origin, sysroot: &Path) -> Option<Self> {
        let (cargo, rustc) = (sysroot.join("bin/cargo"), sysroot.join("bin/rustc"));
        let sources = sysroot.join("lib/rustlib/src/rust/library/core/src/lib.rs");
        if !(cargo.is_file() && rustc.is_file() && sources.is_file()) {
            return None;
        }
        let version =
            process::read(process::forget_outer_cargo(&mut Command::new(&rustc)).arg("-vV")).ok()?;
        let (release, llvm) = parse_version(&version)?;
        (origin == Origin::RustupNightly || release >= OLDEST_SYSTEM_RUST).then_some(Self {
            origin,
            cargo,
            rustc,
            llvm,
        })
    }

    fn rustup_nightly() -> Option<Self> {
        let mut rustup = Command::new("rustup");
        process::forget_outer_cargo(&mut rustup)
            .env("RUSTUP_AUTO_INSTALL", "0")
            .args(["run", "nightly", "rustc", "--print", "sysroot"]);
        let sysroot = process::read(&mut rustup).ok()?;
        Self::at(Origin::RustupNightly, Path::new(sysroot.trim()))
    }

    fn find() -> Option<Self> {
        Self::rustup_nightly().or_else(|| Self::at(Origin::System, Path::new("/usr")))
    }
}

/// Finds the toolchain, installing what is missing where that is possible.
pub(crate) fn prepare() -> Result<Toolchain> {
    let rust = match Rust::find() {
        Some(rust) => rust,
        None => {
            setup::renew(Need::BpfRust)
                .with_context(|| format!("no Rust here can build for BPF ({WITH_RUSTUP})"))?;
            Rust::find().with_context(|| {
                format!(
                    "Debian's cargo-web, rustc-web and rust-web-src are too old or incomplete; {WITH_RUSTUP}"
                )
            })?
        }
    };
    let linker = match find_linker(&rust) {
        Some(linker) => linker,
        None => install_linker(&rust)?,
    };
    Ok(Toolchain { rust, linker })
}

fn find_linker(rust: &Rust) -> Option<PathBuf> {
    [process::find("bpf-linker"), Some(workspace::tools().join("bin/bpf-linker"))]
        .into_iter()
        .flatten()
        .find(|linker| linker_reads(linker, rust))
}

/// Whether `linker` runs, and understands bitcode of `rust`: LLVM reads what is as old as itself or older.
fn linker_reads(linker: &Path, rust: &Rust) -> bool {
    if process::read(Command::new(linker).arg("--version")).is_err() {
        return false;
    }
    match process::read(Command::new("ldd").arg(linker)).ok().as_deref().and_then(llvm_of_libraries) {
        Some(llvm) => llvm >= rust.llvm,
        None => true, // linked statically: only linking will tell
    }
}

fn install_linker(rust: &Rust) -> Result<PathBuf> {
    let llvm = PathBuf::from(format!("/usr/lib/llvm-{DEBIAN_LLVM}"));
    let mut install = process::cargo();
    install.args(["install", "bpf-linker", "--version", LINKER_VERSION, "--locked", "--root"]);
    install.arg(workspace::tools());
    if rust.origin == Origin::System || llvm.join("bin/llvm-config").is_file() {
        if rust.llvm > DEBIAN_LLVM {
            bail!("rustc has LLVM {}, for which a bpf-linker must be installed by hand, on PATH", rust.llvm);
        }
        setup::ensure(Need::BpfLinker)?;
        // First on PATH, or an older llvm-config of the system is taken and the link fails.
        install.args(["--no-default-features", "--features", &format!("llvm-{DEBIAN_LLVM}")]);
        install.env("PATH", process::path_with(&llvm.join("bin"))?).env("LLVM_PREFIX", &llvm);
    }
    eprintln!(
        "installing bpf-linker {LINKER_VERSION} into {}: it links the kernel programs",
        workspace::tools().display()
    );
    process::run(&mut install)
        .context("cannot install bpf-linker; put one on PATH (`cargo install bpf-linker`)")?;
    find_linker(rust).context("bpf-linker was installed, but does not run with this rustc's LLVM")
}

/// The release and LLVM's major version in `rustc -vV`.
fn parse_version(version: &str) -> Option<((u32, u32), u32)> {
    let field = |name| version.lines().find_map(|line| line.strip_prefix(name));
    let mut release = field("release: ")?.split('.').map(str::parse);
    let (major, minor) = (release.next()?.ok()?, release.next()?.ok()?);
    let llvm = field("LLVM version: ")?.split('.').next()?.parse().ok()?;
    Some(((major, minor), llvm))
}

/// The major version of the libLLVM in ldd's output: `libLLVM.so.22.1`, or as `libLLVM-22.so`.
fn llvm_of_libraries(ldd: &str) -> Option<u32> {
    let (_, rest) = ldd.split_once("libLLVM")?;
    let digits = rest.trim_start_matches(".so.").trim_start_matches('-');
    digits.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_what_the_tools_print() {
        let rustc =
            "rustc 1.96.0 (ac68faa20 2026-05-25)\nbinary: rustc\nrelease: 1.96.0\nLLVM version: 22.1.8\n";
        assert_eq!(parse_version(rustc), Some(((1, 96), 22)));
        assert_eq!(
            parse_version("rustc 1.96.0\nrelease: 1.97.0-nightly\nLLVM version: 22.1\n"),
            Some(((1, 97), 22))
        );
        assert_eq!(parse_version("rustc 1.96.0"), None);

        assert_eq!(llvm_of_libraries("\tlibLLVM.so.22.1 => /usr/lib/x/libLLVM.so.22.1 (0x1)"), Some(22));
        assert_eq!(llvm_of_libraries("\tlibLLVM-19.so.1 => /usr/lib/x/libLLVM-19.so.1 (0x1)"), Some(19));
        assert_eq!(llvm_of_libraries("\tlibc.so.6 => /lib/libc.so.6 (0x1)"), None);
    }
}
