//! PID 1 of the test VM: sets the machine up, runs `/bin/vm`, says how that ended, and switches the machine off.
//!
//! `cargo xtask vm` (xtask/src/vm.rs) reads two lines of it: `shaper-vm: up UPTIME RELEASE` when it runs, and
//! `shaper-vm: exit CODE` at the end. Everything that goes wrong is printed and ends with a code that is not 0.
//! Its arguments, which the kernel takes from behind `--` on its command line, are passed to the tests.
//!
//! With `--host-root` it makes way for systemd instead, on the root of the machine that QEMU runs on, read over 9p
//! (xtask/src/host_root.rs); there a unit runs it with `--service`, and it runs the tests and prints the same lines.
#![deny(unsafe_code)]

use std::convert::Infallible;
use std::env;
use std::ffi::CStr;
use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::panic;
use std::path::Path;
use std::process::{self, Command, Stdio};

use anyhow::{Context, Result, bail};
use rustix::mount::MountFlags;
use rustix::net::{AddressFamily, SocketType};
use rustix::process::{WaitOptions, WaitStatus};

/// The argument that asks only whether the machine boots.
const PROBE: &str = "--probe";

/// The argument that says how much of a soak the tests are to do.
const SOAK: &str = "--soak=";

/// The argument that says that `/bin/vm` is not libtest's: all others are its own.
const BENCH: &str = "--bench";

/// The argument that asks for systemd on the host's root.
const HOST_ROOT: &str = "--host-root";

/// The argument of the unit that systemd starts there, and where that finds what to run, a line each.
const SERVICE: &str = "--service";
const SETTINGS: &str = "/etc/shaper-vm";

/// libtest's: the machine is one.
const ONE_BY_ONE: &str = "--test-threads=1";

const SYSTEMD: &str = "/usr/lib/systemd/systemd";

/// The tests that need it as PID 1.
const SYSTEMD_TESTS: &str = "systemd::";

/// The exit code when not the tests failed, but what is here.
const BROKEN: i32 = 70;

const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

/// (file system, where)
const MOUNTS: &[(&str, &str)] = &[
    ("proc", "/proc"),
    ("sysfs", "/sys"),
    ("devtmpfs", "/dev"),
    ("tmpfs", "/tmp"),
    ("tmpfs", "/run"),
    ("cgroup2", "/sys/fs/cgroup"),
    ("bpf", "/sys/fs/bpf"),
];

fn main() {
    if env::args().nth(1).is_some_and(|argument| argument == SERVICE) {
        let code = verdict(run_as_service);
        kernel::drain(std::io::stdout().as_fd());
        process::exit(code); // at which the unit has systemd power off
    }
    if process::id() != 1 {
        eprintln!("vm-init mounts, loads modules and powers off: it runs as PID 1 of a virtual machine only");
        process::exit(BROKEN);
    }
    verdict(run);
    let error = power_off();
    println!("shaper-vm: cannot power off: {error}");
    // PID 1 must not end. The console has all there is to say, and the harness has a deadline.
    loop {
        std::thread::park();
    }
}

/// Does it, and prints how that ended.
fn verdict(run: fn() -> Result<i32>) -> i32 {
    let code = match panic::catch_unwind(run) {
        Ok(Ok(code)) => code,
        Ok(Err(error)) => {
            println!("shaper-vm: {error:#}");
            BROKEN
        }
        Err(_) => BROKEN, // the panic's message is on the console
    };
    println!("shaper-vm: exit {code}");
    code
}

fn run() -> Result<i32> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    if arguments.iter().any(|argument| argument == HOST_ROOT) {
        match enter_host_root()? {}
    }
    for (file_system, at) in MOUNTS {
        mount(file_system, file_system, at, MountFlags::empty(), None)?;
    }
    say_up()?;
    if arguments.iter().any(|argument| argument == PROBE) {
        return Ok(0);
    }
    enable_controllers()?;
    loopback_up()?;
    insert_modules()?;
    install_applets()?;
    say_features()?;
    let mut tests = tests("/bin/vm", "/bin", "/lib/shaper/shaper.bpf.o");
    if let [BENCH, rest @ ..] = arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        return run_tests(tests.args(rest));
    }
    tests.arg(ONE_BY_ONE);
    for argument in &arguments {
        match argument.strip_prefix(SOAK) {
            Some(fraction) => tests.env("SHAPER_SOAK", fraction),
            None => tests.arg(argument),
        };
    }
    run_tests(tests.args(["--skip", SYSTEMD_TESTS]))
}

/// Lays the host's root under what systemd is to write and to run, and becomes systemd there.
fn enter_host_root() -> Result<Infallible> {
    const MEMORY: &str = "/memory";
    const ROOT: &str = "/new";
    insert_modules()?;
    // Cached without asking again: nobody builds there while the tests run.
    let share = c"trans=virtio,version=9p2000.L,msize=524288,cache=loose";
    mount("9p", "hostroot", "/host", MountFlags::RDONLY, Some(share))?;
    mount("tmpfs", "tmpfs", MEMORY, MountFlags::empty(), None)?;
    for at in ["/memory/upper", "/memory/work"] {
        fs::create_dir(at).with_context(|| format!("cannot create {at}"))?;
    }
    let layers = c"lowerdir=/over:/host,upperdir=/memory/upper,workdir=/memory/work";
    mount("overlay", "overlay", ROOT, MountFlags::empty(), Some(layers))?;
    enter(Path::new(ROOT)).with_context(|| format!("cannot make {ROOT} the root"))?;
    let arguments =
        ["--unit=shaper-vm.target", "--log-target=console", "--log-level=warning", "--show-status=0"];
    let error = Command::new(SYSTEMD).args(arguments).env_clear().env("PATH", PATH).exec();
    Err(error).with_context(|| format!("cannot start {SYSTEMD}"))
}

/// Makes a mount the root. The first root cannot be unmounted; its files stay, below the new one.
fn enter(root: &Path) -> rustix::io::Result<()> {
    rustix::process::chdir(root)?;
    rustix::mount::mount_move(".", "/")?;
    rustix::process::chroot(".")?;
    rustix::process::chdir("/")
}

/// As a unit of systemd's: runs the tests where the host has them.
fn run_as_service() -> Result<i32> {
    say_up()?;
    let settings = read(SETTINGS)?;
    let mut lines = settings.lines();
    let mut line = || lines.next();
    let named = (line(), line(), line(), line(), line());
    let (Some(program), Some(binaries), Some(object), Some(runtimes), Some(packages)) = named else {
        bail!("{SETTINGS} does not name the tests, the binaries, the kernel programs, runtimes and packages");
    };
    let mut tests = tests(program, binaries, object);
    tests.env("SHAPER_RUNTIMES", runtimes).env("SHAPER_PACKAGES", packages);
    run_tests(tests.arg(ONE_BY_ONE).args(lines))
}

fn say_up() -> Result<()> {
    let uptime = read("/proc/uptime")?;
    let uptime = uptime.split_whitespace().next().unwrap_or("?");
    println!("shaper-vm: up {uptime} {}", read("/proc/sys/kernel/osrelease")?.trim());
    Ok(())
}

/// Mounts a file system on a directory that it makes.
fn mount(kind: &str, source: &str, at: &str, flags: MountFlags, options: Option<&CStr>) -> Result<()> {
    fs::create_dir_all(at).with_context(|| format!("cannot create {at}"))?;
    rustix::mount::mount(source, at, kind, flags, options)
        .with_context(|| format!("cannot mount {kind} on {at}"))
}

fn read(path: &str) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {path}"))
}

/// Gives the root's children every controller there is.
fn enable_controllers() -> Result<()> {
    let control = "/sys/fs/cgroup/cgroup.subtree_control";
    for controller in read("/sys/fs/cgroup/cgroup.controllers")?.split_whitespace() {
        fs::write(control, format!("+{controller}"))
            .with_context(|| format!("cannot write +{controller} to {control}"))?;
    }
    Ok(())
}

/// Inserts the modules that the harness put in, in its order.
fn insert_modules() -> Result<()> {
    for path in read("/modules.order")?.lines() {
        let module = File::open(path).with_context(|| format!("cannot open {path}"))?;
        kernel::insert_module(module.as_fd()).with_context(|| format!("cannot insert {path}"))?;
    }
    Ok(())
}

fn loopback_up() -> Result<()> {
    let socket =
        rustix::net::socket(AddressFamily::INET, SocketType::DGRAM, None).context("cannot open a socket")?;
    kernel::interface_up(socket.as_fd(), "lo").context("cannot bring lo up")
}

/// Links busybox's applets into /bin, beside what is there.
fn install_applets() -> Result<()> {
    // Its complaints are about names that are taken, such as `sh`.
    let install =
        Command::new("/bin/busybox").args(["--install", "-s", "/bin"]).stderr(Stdio::null()).status();
    install.context("cannot run busybox --install").map(drop)
}

/// The test binary with its environment.
fn tests(program: &str, binaries: &str, object: &str) -> Command {
    let mut tests = Command::new(program);
    tests
        .current_dir("/tmp")
        .stdin(Stdio::null())
        .env_clear()
        .env("HOME", "/tmp")
        .env("PATH", PATH)
        .env("RUST_BACKTRACE", "1")
        .env("SHAPER_BIN_DIR", binaries)
        .env("SHAPER_BPF_OBJECT", object)
        .env("SHAPER_VM", "1");
    tests
}

/// Prints what this kernel has, for the table in docs/kernel-support.md.
fn say_features() -> Result<()> {
    let probe =
        Command::new("/bin/shaper-agent").arg("probe").output().context("cannot run shaper-agent probe")?;
    for line in String::from_utf8_lossy(&probe.stdout).lines() {
        println!("shaper-vm: feature {line}");
    }
    Ok(())
}

/// Runs the tests, and reaps every orphan meanwhile. The exit code, or 128 and the signal's number.
fn run_tests(tests: &mut Command) -> Result<i32> {
    let shown = tests.get_program().display().to_string();
    let tests = tests.spawn().with_context(|| format!("cannot start {shown}"))?;
    loop {
        let Some((pid, status)) =
            rustix::process::wait(WaitOptions::empty()).context("cannot wait for children")?
        else {
            continue;
        };
        if pid.as_raw_nonzero().get().unsigned_abs() == tests.id() {
            return Ok(exit_code(status));
        }
    }
}

fn exit_code(status: WaitStatus) -> i32 {
    let signal = || status.terminating_signal().map(|signal| 128 + signal);
    status.exit_status().or_else(signal).unwrap_or(BROKEN)
}

/// Switches the machine off once the console has drained; returns only if that fails.
fn power_off() -> std::io::Error {
    kernel::drain(std::io::stdout().as_fd());
    kernel::power_off()
}

/// System calls that no crate of ours wraps with the features that the workspace has on.
#[allow(unsafe_code, reason = "libc's functions take raw pointers and descriptors")]
mod kernel {
    use super::{AsRawFd, BorrowedFd};
    use std::io::{Error, Result};

    /// Inserts a module without parameters; one that is there already is fine.
    pub(super) fn insert_module(module: BorrowedFd<'_>) -> Result<()> {
        // SAFETY: the descriptor is open, and the parameters are a NUL-terminated string that outlives the call.
        let result = unsafe { libc::syscall(libc::SYS_finit_module, module.as_raw_fd(), c"".as_ptr(), 0) };
        match check(result) {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
            other => other,
        }
    }

    /// Sets IFF_UP, leaving an interface's other flags.
    pub(super) fn interface_up(socket: BorrowedFd<'_>, name: &str) -> Result<()> {
        // SAFETY: every byte pattern, zeros included, is a valid `ifreq`.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        // The last byte stays 0 and ends the name.
        let room = request.ifr_name.len() - 1;
        for (to, from) in request.ifr_name[..room].iter_mut().zip(name.bytes()) {
            *to = from.cast_signed();
        }
        // SAFETY: both requests read and write one `ifreq`, which `request` is.
        let get = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &raw mut request) };
        check(get.into())?;
        // SAFETY: SIOCGIFFLAGS has just filled this member of the union.
        unsafe { request.ifr_ifru.ifru_flags |= libc::IFF_UP as libc::c_short };
        // SAFETY: as for the first request.
        check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) }.into())
    }

    /// Waits until a terminal has sent what was written to it; nothing happens for other files.
    pub(super) fn drain(terminal: BorrowedFd<'_>) {
        // SAFETY: the descriptor is open, and the call takes nothing else.
        unsafe { libc::tcdrain(terminal.as_raw_fd()) };
    }

    pub(super) fn power_off() -> Error {
        // SAFETY: the call takes a number; that it ends everything is what it is for.
        unsafe { libc::reboot(libc::RB_POWER_OFF) };
        Error::last_os_error()
    }

    fn check(result: libc::c_long) -> Result<()> {
        if result < 0 { Err(Error::last_os_error()) } else { Ok(()) }
    }
}
