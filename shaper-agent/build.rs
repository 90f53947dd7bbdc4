//! Compiles shaper's scheduler, with the feature `scx` only.

use std::{
    env,
    error::Error,
    path::{Path, PathBuf},
    process::Command,
};

/// Names that a clang may have; `SHAPER_CLANG` comes before them.
const CLANGS: [&str; 4] = ["clang", "clang-22", "/usr/lib/llvm-22/bin/clang", "clang-19"];
const SOURCE: &str = "../shaper-ebpf/bpf/sched.bpf.c";
const HEADER: &str = "../shaper-ebpf/bpf/kernel.h";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_SCX").is_none() {
        return Ok(());
    }
    for file in [SOURCE, HEADER] {
        println!("cargo::rerun-if-changed={file}");
    }
    println!("cargo::rerun-if-env-changed=SHAPER_CLANG");
    let clang = clang().ok_or(
        "the feature `scx` needs a clang that knows the target bpf: install clang (Debian: clang-22, with libelf-dev, \
         zlib1g-dev, pkg-config and make for libbpf), or name one in SHAPER_CLANG",
    )?;
    let object = Path::new(&env::var("OUT_DIR")?).join("sched.bpf.o");
    let mut command = Command::new(clang);
    // -g: what libbpf finds kernel fields by is made of it.
    command.args([
        "-target",
        "bpf",
        "-mcpu=v3",
        "-O2",
        "-g",
        "-ffreestanding",
        "-Wall",
        "-Wextra",
        "-Werror",
    ]);
    command.args(["-Wno-unused-parameter", "-Wno-sign-compare", "-c", SOURCE, "-o"]).arg(object);
    let status = command.status()?;
    if !status.success() {
        return Err(format!("{command:?}: {status}").into());
    }
    Ok(())
}

/// The first that is there and has the target.
fn clang() -> Option<PathBuf> {
    let named = env::var_os("SHAPER_CLANG").map(PathBuf::from);
    named.into_iter().chain(CLANGS.map(PathBuf::from)).find(|clang| {
        let targets = Command::new(clang).arg("--print-targets").output();
        targets.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains("bpf "))
    })
}
