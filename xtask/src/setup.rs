//! What each command needs from the system, as one table, and how it comes there.
//!
//! As root on a system with apt-get the missing packages are installed, after saying which and why. Anywhere else
//! the error names them. Nothing here needs a service manager, so it works inside a container or a chroot.

use std::env;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::{process, toolchain, unpacked};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The command to prepare for
    #[arg(default_value = "test")]
    purpose: Purpose,
}

/// What someone wants to do.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Purpose {
    Test,
    Demo,
    Vm,
    Ebpf,
    Bench,
}

/// A set of system packages that serve one end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Need {
    /// A Rust toolchain with the standard library's sources, when rustup has none.
    BpfRust,
    /// What bpf-linker is built with.
    BpfLinker,
    /// Kernels in QEMU.
    Vm,
    /// Network namespaces and qdiscs on this machine.
    Native,
    /// Loads of the network that others measure with, too.
    Traffic,
    /// What libFuzzer is compiled with.
    Fuzzing,
    /// What the client of etcd is generated with.
    Build,
    /// A browser, and what drives it.
    Browser,
    /// What the commands of the documents take besides.
    Commands,
}

/// How a package shows that it is there.
enum Probe {
    Program(&'static str),
    File(&'static str),
    /// protoc, and the definitions that come with it.
    Protoc,
}

struct Requirement {
    need: Need,
    probe: Probe,
    package: &'static str,
}

const fn program(need: Need, name: &'static str, package: &'static str) -> Requirement {
    Requirement { need, probe: Probe::Program(name), package }
}

const fn file(need: Need, path: &'static str, package: &'static str) -> Requirement {
    Requirement { need, probe: Probe::File(path), package }
}

const REQUIREMENTS: &[Requirement] = &[
    // Asked of dpkg: the older packages `cargo` and `rustc` bring the same files.
    file(Need::BpfRust, "/var/lib/dpkg/info/cargo-web.list", "cargo-web"),
    file(Need::BpfRust, "/var/lib/dpkg/info/rustc-web.list", "rustc-web"),
    file(Need::BpfRust, "/var/lib/dpkg/info/rust-web-src.list", "rust-web-src"),
    program(Need::BpfLinker, "cc", "gcc"),
    file(Need::BpfLinker, "/usr/include/stdlib.h", "libc6-dev"),
    file(Need::BpfLinker, "/usr/lib/llvm-22/lib/libLLVM.so", "llvm-22-dev"),
    file(Need::BpfLinker, "/usr/lib/llvm-22/bin/clang", "clang-22"),
    file(Need::BpfLinker, "/usr/lib/llvm-22/lib/libPolly.a", "libpolly-22-dev"),
    file(Need::BpfLinker, "/usr/include/zstd.h", "libzstd-dev"),
    file(Need::BpfLinker, "/usr/include/zlib.h", "zlib1g-dev"),
    program(Need::Vm, "qemu-system-x86_64", "qemu-system-x86"),
    program(Need::Vm, "busybox", "busybox-static"),
    program(Need::Vm, "depmod", "kmod"),
    program(Need::Vm, "xz", "xz-utils"),
    program(Need::Vm, "mkfs.ext4", "e2fsprogs"),
    program(Need::Vm, "chrt", "util-linux"),
    program(Need::Native, "ip", "iproute2"),
    program(Need::Native, "tc", "iproute2"),
    program(Need::Native, "openssl", "openssl"),
    program(Need::Native, "curl", "curl"),
    program(Need::Traffic, "iperf3", "iperf3"),
    program(Need::Fuzzing, "c++", "g++"),
    program(Need::Browser, "chromium", "chromium"),
    program(Need::Browser, "node", "nodejs"),
    program(Need::Browser, "npm", "npm"),
    program(Need::Commands, "ssh", "openssh-client"),
    Requirement { need: Need::Build, probe: Probe::Protoc, package: "protobuf-compiler" },
    Requirement { need: Need::Build, probe: Probe::Protoc, package: "libprotobuf-dev" },
];

impl Need {
    fn why(self) -> &'static str {
        match self {
            Self::BpfRust => "a Rust toolchain with its library sources, to build the kernel programs",
            Self::BpfLinker => "LLVM, to build bpf-linker, which links the kernel programs",
            Self::Vm => "QEMU, kernel tools and mkfs, to run the VM tests",
            Self::Traffic => "iperf3, to load the network for `bench net`",
            Self::Fuzzing => "a C++ compiler, to build libFuzzer for `soak fuzz`",
            Self::Build => "protoc with its definitions, to build the broker's client of etcd",
            Self::Commands => "ssh, which a documented command uses",
            Self::Browser => "Chromium, and Node.js to drive it, to test the web page",
            Self::Native => {
                "ip and tc, to set up network namespaces for tests and the demo, openssl and curl, which documented commands and what is asked after them use"
            }
        }
    }
}

impl Probe {
    fn succeeds(&self) -> bool {
        match self {
            Self::Program(name) => process::find(name).is_some(),
            Self::File(path) => Path::new(path).exists(),
            Self::Protoc => has_protoc(),
        }
    }
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let needs: &[Need] = match args.purpose {
        Purpose::Test | Purpose::Vm => &[Need::Native, Need::Vm],
        Purpose::Demo => &[Need::Native],
        Purpose::Bench => &[Need::Native, Need::Traffic, Need::Vm],
        Purpose::Ebpf => &[],
    };
    toolchain::prepare()?; // every purpose runs the kernel programs
    ensure(Need::Build)?;
    for &need in needs {
        ensure(need)?;
    }
    println!("everything needed is here");
    Ok(())
}

/// Installs what `need` lacks, or fails with the remedy.
pub(crate) fn ensure(need: Need) -> Result<()> {
    let missing = missing(need);
    if !missing.is_empty() {
        bring(need, &missing)?;
    }
    // What is not a matter of these tests may go on without; those that need it fail and say so.
    if need == Need::Native
        && let Err(error) = unpacked::ETCD.prepare()
    {
        eprintln!("the broker cannot be tested with etcd: {error:#}");
    }
    Ok(())
}

/// Installs the newest there is of everything that `need` names, older versions of which are of no use.
pub(crate) fn renew(need: Need) -> Result<()> {
    bring(need, &packages(need, |_| true))
}

fn bring(need: Need, missing: &[&str]) -> Result<()> {
    let list = missing.join(" ");
    if process::find("apt-get").is_none() {
        bail!("missing {}; install what Debian calls {list}", need.why());
    }
    if !is_root() {
        bail!("missing {}; as root: apt-get install {list}", need.why());
    }
    eprintln!("installing {list}: {}", need.why());
    install(missing).with_context(|| format!("cannot install {list} ({})", need.why()))?;
    let still = self::missing(need);
    if !still.is_empty() {
        bail!("{} installed without an error, but what they bring is not found", still.join(" "));
    }
    Ok(())
}

/// The packages of `need` that are not there, each once.
fn missing(need: Need) -> Vec<&'static str> {
    packages(need, |requirement| !requirement.probe.succeeds())
}

fn packages(need: Need, wanted: impl Fn(&Requirement) -> bool) -> Vec<&'static str> {
    let mut packages: Vec<_> =
        REQUIREMENTS.iter().filter(|r| r.need == need && wanted(r)).map(|r| r.package).collect();
    packages.dedup();
    packages
}

fn install(packages: &[&str]) -> Result<()> {
    // A fresh container has no package lists, an old one lists of versions that are gone, or too old. Where nothing can be
    // refreshed, what is listed may do.
    if let Err(error) = apt_update() {
        eprintln!("going on with the package lists that are here: {error:#}");
    }
    process::run(
        Command::new("apt-get")
            .args(["install", "-y", "-q", "--no-install-recommends"])
            .args(packages)
            .env("DEBIAN_FRONTEND", "noninteractive"),
    )
}

/// Refreshes apt's lists, at most once in this process; whether it did so now.
pub(crate) fn apt_update() -> Result<bool> {
    static DONE: AtomicBool = AtomicBool::new(false);
    if !is_root() || DONE.swap(true, Ordering::SeqCst) {
        return Ok(false);
    }
    eprintln!("refreshing apt's package lists");
    process::run(Command::new("apt-get").args(["update", "-q"]))?;
    Ok(true)
}

/// Whether protoc runs, and has the definitions that etcd's import.
fn has_protoc() -> bool {
    let program = env::var_os("PROTOC").unwrap_or_else(|| "protoc".into());
    let mut command = Command::new(program);
    command.args(["-I/dev", "--descriptor_set_out=/dev/null", "/dev/stdin"]);
    let started = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    started.is_ok_and(|mut child| {
        let text = b"syntax = \"proto3\"; import \"google/protobuf/descriptor.proto\";";
        let written = child.stdin.take().is_some_and(|mut stdin| stdin.write_all(text).is_ok());
        child.wait().is_ok_and(|status| status.success()) && written
    })
}

pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requirements_of_one_package_stand_together() {
        // `missing` names each package once by comparing neighbours.
        for need in [
            Need::BpfRust,
            Need::BpfLinker,
            Need::Vm,
            Need::Native,
            Need::Traffic,
            Need::Fuzzing,
            Need::Build,
            Need::Browser,
            Need::Commands,
        ] {
            let mut packages: Vec<_> =
                REQUIREMENTS.iter().filter(|r| r.need == need).map(|r| r.package).collect();
            packages.dedup();
            let distinct: std::collections::BTreeSet<_> = packages.iter().collect();
            assert_eq!(distinct.len(), packages.len(), "{need:?}");
        }
    }
}
