//! The VM's root file system: PID 1, the tests, what they start, and the kernel's modules.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::bins::{self, BinDir};
use crate::cpio::Archive;
use crate::kernels::Kernel;
use crate::{modules, process};

/// Where the guest has the kernel programs; vm-init tells the tests.
const BPF_OBJECT: &str = "/lib/shaper/shaper.bpf.o";

/// Programs of this machine that the tests start beside busybox's applets.
const TOOLS: [&str; 4] = ["ip", "tc", "mkfs.ext4", "chrt"];

/// What the tests run as a task.
const LOAD: &str = "test-load";

/// Not busybox's: that one takes its applets before what is on PATH, and has an `ip` and a `tc` of its own.
const SHELL: &str = "/bin/sh";

/// What goes in beside a kernel's modules.
pub(crate) struct Contents {
    pub(crate) bins: BinDir,
    /// What PID 1 runs.
    pub(crate) program: PathBuf,
    pub(crate) bpf_object: PathBuf,
}

impl Contents {
    pub(crate) fn init(&self) -> PathBuf {
        self.bins.bin("vm-init")
    }
}

/// Writes the initramfs that runs the contents' program on `kernel`.
pub(crate) fn write(kernel: &Kernel, contents: &Contents, to: &Path) -> Result<()> {
    let mut archive = create(to)?;
    let mut programs =
        vec![(contents.init(), "/init".to_owned()), (contents.program.clone(), "/bin/vm".to_owned())];
    for name in bins::SHIPPED.into_iter().chain([LOAD]) {
        programs.push((contents.bins.bin(name), format!("/bin/{name}")));
    }
    programs.push((SHELL.into(), SHELL.to_owned()));
    programs.push((installed("busybox")?, "/bin/busybox".to_owned()));
    for name in TOOLS {
        programs.push((installed(name)?, format!("/usr/sbin/{name}")));
    }
    for (from, path) in &programs {
        add_program(&mut archive, from, path)?;
    }
    archive.copy(&contents.bpf_object, BPF_OBJECT)?;
    archive.file(
        "/etc/passwd",
        0o644,
        b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    )?;
    archive.file("/etc/group", 0o644, b"root:x:0:\nnogroup:x:65534:\nnobody:x:65533:\n")?;
    add_modules(&mut archive, kernel, &[])?;
    archive.finish().map(drop)
}

/// Adds what is inserted at the start, and its order; and what tests insert.
pub(crate) fn add_modules(
    archive: &mut Archive<impl Write>,
    kernel: &Kernel,
    required: &[&str],
) -> Result<()> {
    let mut order = String::new();
    for module in modules::wanted(&kernel.modules, required)? {
        let path = format!("/modules/{}.ko", module.name);
        archive.file(&path, 0o644, &module.data)?;
        if module.at_start {
            order += &path;
            order.push('\n');
        }
    }
    archive.file("/modules.order", 0o644, order.as_bytes())
}

/// Writes an initramfs of PID 1 alone, for a boot that only shows that the machine can.
pub(crate) fn write_probe(init: &Path, to: &Path) -> Result<()> {
    let mut archive = create(to)?;
    add_program(&mut archive, init, "/init")?;
    archive.finish().map(drop)
}

pub(crate) fn create(to: &Path) -> Result<Archive<BufWriter<File>>> {
    let file = File::create(to).with_context(|| format!("cannot create {}", to.display()))?;
    Ok(Archive::new(BufWriter::new(file)))
}

fn installed(program: &str) -> Result<PathBuf> {
    process::find(program).with_context(|| format!("{program} is not installed (`cargo xtask setup vm`)"))
}

/// Adds a program and the shared libraries it needs, these at their own paths.
pub(crate) fn add_program(archive: &mut Archive<impl Write>, from: &Path, path: &str) -> Result<()> {
    archive.copy(from, path)?;
    for library in libraries_of(from)? {
        if !archive.contains(&library) {
            archive.copy(Path::new(&library), &library)?;
        }
    }
    Ok(())
}

/// The shared libraries that a program needs, and what loads them: their paths on this machine.
pub(crate) fn libraries_of(program: &Path) -> Result<Vec<String>> {
    // Not `read`: ldd fails for a static program, and needs nothing then.
    let ldd = process::output(process::forget_outer_cargo(&mut Command::new("ldd")).arg(program))?;
    Ok(libraries(&String::from_utf8_lossy(&ldd.stdout)).map(str::to_owned).collect())
}

/// The absolute paths in ldd's output: `libc.so.6 => /lib/libc.so.6 (0x7f…)`, `/lib64/ld-linux-x86-64.so.2 (0x7f…)`.
fn libraries(ldd: &str) -> impl Iterator<Item = &str> {
    ldd.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_read_from_what_ldd_prints() {
        let ldd = "\tlinux-vdso.so.1 (0x00007ffd)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f1)\n\
                   \t/lib64/ld-linux-x86-64.so.2 (0x00007f2)\n";
        let found: Vec<_> = libraries(ldd).collect();
        assert_eq!(found, ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"]);
        assert_eq!(libraries("\tnot a dynamic executable\n").count(), 0);
    }
}
