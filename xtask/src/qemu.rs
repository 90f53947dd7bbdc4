//! QEMU: whether it may use KVM here, and one boot from start to end.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant, UNIX_EPOCH};

use anyhow::{Context, Result, bail};

use crate::kernels::Kernel;
use crate::relay::relay;
use crate::{initramfs, process, vm, workspace};

/// A machine that takes longer to print its first line will not print it.
const PROBE_DEADLINE: Duration = Duration::from_secs(10);

/// `quiet` keeps the console for the tests; an oops or a panic is shown all the same, and ends the machine.
const KERNEL_PARAMETERS: &str = "console=ttyS0 quiet panic=-1 oops=panic psi=1 rdinit=/init";

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Accel {
    Kvm,
    Tcg,
    /// TCG whose clock counts instructions: what else this machine does moves no figure. Not for block IO, which is done in
    /// this machine's time.
    Counted,
}

impl Accel {
    fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::Kvm => &["-accel", "kvm", "-cpu", "host"],
            // One thread: with one per vCPU the guest's kernel now and then meets a breakpoint that another vCPU
            // has just patched away, and dies of it (int3 in the scheduler, 6.12). It costs little here.
            Self::Tcg => &["-accel", "tcg,thread=single", "-cpu", "max"],
            // 8 ns an instruction; idle time is skipped.
            Self::Counted => &["-accel", "tcg,thread=single", "-icount", "shift=3,sleep=off", "-cpu", "max"],
        }
    }

    fn parse(name: &str) -> Option<Self> {
        [Self::Kvm, Self::Tcg].into_iter().find(|accel| accel.to_string() == name)
    }
}

impl fmt::Display for Accel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
            Self::Counted => "tcg, counting instructions",
        })
    }
}

/// One machine.
pub(crate) struct Machine<'a> {
    pub(crate) kernel: &'a Kernel,
    pub(crate) initrd: &'a Path,
    /// `/dev/vda`.
    pub(crate) disk: Option<&'a Disk>,
    /// Whether it may read all files of this machine, by 9p; not write.
    pub(crate) host_root: bool,
    pub(crate) accel: Accel,
    /// What PID 1 gets as its arguments.
    pub(crate) init_args: &'a [String],
}

/// An empty disk, whose file is gone with it.
pub(crate) struct Disk(PathBuf);

impl Disk {
    const SIZE: u64 = 256 << 20;

    /// A new one in the file `path`, which takes as much room as the guest writes.
    pub(crate) fn create(path: PathBuf) -> Result<Self> {
        let cannot = || format!("cannot create {}", path.display());
        let file = File::create(&path).with_context(cannot)?;
        file.set_len(Self::SIZE).with_context(cannot)?;
        Ok(Self(path))
    }

    /// QEMU's description of it. Its text has commas between options, and two for one in a file's name.
    fn argument(&self) -> Result<String> {
        let path = self.0.to_str().with_context(|| format!("{} is not UTF-8", self.0.display()))?;
        // What the guest flushes need not reach this machine's disk: it is for this one boot.
        Ok(format!("file={},if=virtio,format=raw,cache=unsafe", path.replace(',', ",,")))
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.0) {
            eprintln!("cannot remove {}: {error}", self.0.display());
        }
    }
}

/// How a boot ended.
#[derive(Debug)]
pub(crate) enum End {
    /// The machine switched itself off, or QEMU failed.
    Exited(ExitStatus),
    /// The caller had seen enough.
    Stopped,
    DeadlinePassed,
}

/// A QEMU that ends with its owner, on every way out.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // An error here says that it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Machine<'_> {
    /// Boots, copies the console to `echo`, and calls `on_line` with each of its lines until it breaks off. What QEMU
    /// itself has to say goes to `errors`.
    pub(crate) fn boot(
        &self,
        deadline: Duration,
        echo: impl Write + Send + 'static,
        errors: Stdio,
        mut on_line: impl FnMut(&str) -> ControlFlow<()>,
    ) -> Result<End> {
        let deadline = Instant::now() + deadline;
        let mut command = self.command()?;
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(errors).spawn();
        let child = child.with_context(|| format!("cannot start `{}`", process::shown(&command)))?;
        let mut qemu = Running(child);
        let console = qemu.0.stdout.take().context("QEMU has no standard output")?;

        let (lines, received) = mpsc::channel();
        // Not joined: it ends with QEMU's output, and a line that nobody waits for any more is lost on purpose.
        thread::spawn(move || relay(console, echo, |line| drop(lines.send(line))));
        loop {
            match received.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) if on_line(&line).is_break() => return Ok(End::Stopped),
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => return Ok(End::DeadlinePassed),
                Err(RecvTimeoutError::Disconnected) => {
                    return qemu.0.wait().map(End::Exited).context("cannot wait for QEMU");
                }
            }
        }
    }

    fn command(&self) -> Result<Command> {
        let mut parameters = KERNEL_PARAMETERS.to_owned();
        if !self.init_args.is_empty() {
            parameters += " --";
        }
        for argument in self.init_args {
            parameters += " ";
            parameters += &quoted(argument)?;
        }
        let mut command = Command::new("qemu-system-x86_64");
        command
            // The binaries with their symbols are a third of it, twice while they are unpacked.
            .args(["-m", "2560M", "-smp", "2", "-no-reboot", "-nic", "none"])
            // As -nographic, less the firmware's output.
            .args(["-display", "none", "-monitor", "none", "-serial", "stdio"])
            .args(self.accel.arguments())
            .arg("-kernel")
            .arg(&self.kernel.image)
            .arg("-initrd")
            .arg(self.initrd)
            .args(["-append", &parameters]);
        if self.host_root {
            command.args(["-fsdev", "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap"]);
            command.args(["-device", "virtio-9p-pci,fsdev=root,mount_tag=hostroot"]);
        }
        if let Some(disk) = self.disk {
            command.args(["-drive", &disk.argument()?]);
        }
        Ok(command)
    }
}

/// `argument` as one word of a kernel command line, which knows double quotes and nothing to escape them.
fn quoted(argument: &str) -> Result<String> {
    if argument.contains(['"', '\n']) || argument.is_empty() {
        bail!("the kernel's command line cannot carry the argument {argument:?}");
    }
    Ok(if argument.contains(char::is_whitespace) { format!("\"{argument}\"") } else { argument.to_owned() })
}

/// Which accelerator boots `kernel` here. `/dev/kvm` may open and its guests still hang (nested virtualisation),
/// so the answer is that of a boot, remembered for this kernel image.
pub(crate) fn accel(kernel: &Kernel, init: &Path) -> Result<Accel> {
    if fs::File::options().read(true).write(true).open("/dev/kvm").is_err() {
        return Ok(Accel::Tcg);
    }
    let remembered = remembered(kernel)?;
    if let Some(accel) = fs::read_to_string(&remembered).ok().and_then(|name| Accel::parse(name.trim())) {
        return Ok(accel);
    }
    eprintln!("trying KVM, for at most {} s", PROBE_DEADLINE.as_secs());
    let accel = if boots_with_kvm(kernel, init)? { Accel::Kvm } else { Accel::Tcg };
    eprintln!("using {accel} for {kernel}; remove {} to try again", remembered.display());
    fs::write(&remembered, format!("{accel}\n"))
        .with_context(|| format!("cannot write {}", remembered.display()))?;
    Ok(accel)
}

fn boots_with_kvm(kernel: &Kernel, init: &Path) -> Result<bool> {
    let initrd = workspace::target().join("vm/probe.cpio");
    initramfs::write_probe(init, &initrd)?;
    let init_args = ["--probe".to_owned()];
    let machine = Machine {
        kernel,
        initrd: &initrd,
        disk: None,
        host_root: false,
        accel: Accel::Kvm,
        init_args: &init_args,
    };
    let end = machine.boot(PROBE_DEADLINE, io::sink(), Stdio::null(), |line| {
        if vm::is_up(line) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    Ok(matches!(end, End::Stopped))
}

/// The file with the accelerator of this very image.
fn remembered(kernel: &Kernel) -> Result<PathBuf> {
    let cannot = || format!("cannot read {}", kernel.image.display());
    let image = kernel.image.metadata().with_context(cannot)?;
    let modified = image.modified().with_context(cannot)?.duration_since(UNIX_EPOCH).unwrap_or_default();
    let folder = workspace::target().join("vm/accel");
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    Ok(folder.join(format!("{}-{}-{}", kernel.release, image.len(), modified.as_secs())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_quoted_for_the_kernel() {
        assert_eq!(quoted("net::pace").unwrap(), "net::pace");
        assert_eq!(quoted("two words").unwrap(), "\"two words\"");
        assert!(quoted("a\"b").is_err());
        assert!(quoted("").is_err());
    }

    #[test]
    fn a_disk_is_empty_and_goes_with_its_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a,b.img");
        let disk = Disk::create(path.clone()).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), Disk::SIZE);
        assert!(disk.argument().unwrap().contains("/a,,b.img,if=virtio"));
        drop(disk);
        assert!(!path.exists());
    }

    #[test]
    fn accelerators_read_back() {
        for accel in [Accel::Kvm, Accel::Tcg] {
            assert_eq!(Accel::parse(&accel.to_string()), Some(accel));
        }
        assert_eq!(Accel::parse("hvf"), None);
    }
}
