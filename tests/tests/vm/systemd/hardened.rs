//! The daemons under the units that are shipped, at their own paths. What a test adds is a drop-in: nothing that is enabled on
//! the machine that the files are from is started, and the log goes to a file.

use std::{
    fs,
    os::unix::{
        fs::{PermissionsExt, symlink},
        net::UnixStream,
    },
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use shaper_core::{doctor::Availability, ledger::Actor};
use shaper_tests::{
    NOBODY, assert_close,
    bins::{binary, bpf_object},
    cgroup::{TestCgroup, cpu_time, mounts, read, write},
    net::NetPair,
    second_writer::of_others,
    shaper::{Shaper, in_force},
    sink::Sink,
    systemd::systemctl,
    time::{Window, eventually, happens},
};

use super::{Running, log_of};

const AGENT: &str = include_str!("../../../../packaging/systemd/shaper-agent.service");
const OPENER: &str = include_str!("../../../../packaging/systemd/shaper-opener.service");
const BROKER: &str = include_str!("../../../../packaging/systemd/shaper-broker.service");
const SYSUSERS: &str = include_str!("../../../../packaging/sysusers.d/shaper-broker.conf");

const SECOND: Duration = Duration::from_secs(1);
const OPENER_SOCKET: &str = shaper_agent::opener::SOCKET;
const CAP_NET_ADMIN: u64 = 1 << 12;
const CAP_SYS_ADMIN: u64 = 1 << 21;

/// A unit as it is shipped, started. Dropping it stops it.
struct Shipped {
    name: &'static str,
    log: PathBuf,
}

impl Shipped {
    #[track_caller]
    fn start(name: &'static str, unit: &str, programs: &[(&str, &Path)], socket: &str) -> Shipped {
        let folder = Path::new("/usr/lib/shaper");
        fs::create_dir_all(folder).expect("this machine's root can be written");
        for (program, at) in programs {
            let link = folder.join(program);
            let _ = fs::remove_file(&link);
            symlink(at, &link).unwrap_or_else(|error| panic!("{}: {error}", link.display()));
        }
        let units = Path::new("/etc/systemd/system");
        fs::write(units.join(name), unit).expect("a unit can be written");
        let log = log_of(name);
        let shipped = Shipped { name, log };
        systemctl(&["daemon-reload"]);
        systemctl(&["start", name]);
        // One of another kind is there as well.
        let is_there = |error: std::io::Error| error.raw_os_error() == Some(libc::EPROTOTYPE);
        let answered = happens(|| UnixStream::connect(socket).map_or_else(is_there, |_| true));
        let state = systemctl(&["show", "--property", "ActiveState,SubState,Result,ExecMainStatus", name]);
        assert!(answered, "{name} does not answer: {state}\n{}", shipped.said());
        shipped
    }

    fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// The process's fields of `/proc/PID/status`.
    fn status(&self, field: &str) -> String {
        status(&systemctl(&["show", "--value", "--property", "MainPID", self.name]), field)
    }

    /// Prints how exposed systemd thinks it is.
    fn tell_exposure(&self, most: f64) {
        let output = Command::new("systemd-analyze").args(["security", "--no-pager", self.name]).output();
        let output = output.expect("systemd-analyze comes with systemd");
        let text = String::from_utf8_lossy(&output.stdout);
        let line = text.lines().find(|line| line.contains("Overall exposure level"));
        let line =
            line.unwrap_or_else(|| panic!("no sum: {text}{}", String::from_utf8_lossy(&output.stderr)));
        println!("soak: {}", line.trim_start_matches(|letter: char| !letter.is_ascii_alphabetic()));
        let figure = line.rsplit(": ").next().and_then(|rest| rest.split(' ').next()?.parse::<f64>().ok());
        let figure = figure.unwrap_or_else(|| panic!("no figure: {line}"));
        assert!(figure <= most, "{}: {figure}, and {most} is documented\n{text}", self.name);
    }
}

impl Drop for Shipped {
    fn drop(&mut self) {
        let stopped = Command::new("systemctl").args(["stop", self.name]).status();
        if !stopped.is_ok_and(|status| status.success()) {
            eprintln!("cannot stop {}", self.name);
        }
        if std::thread::panicking() {
            eprintln!("{}", self.said());
        }
    }
}

fn status(pid: &str, field: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let found = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    found.unwrap_or_else(|| panic!("no {field} of {pid}")).trim().to_owned()
}

/// On a machine that systemd has booted it is there; here, what is below PID 1 is not as usual, and an agent without a sandbox
/// mounts it itself.
pub(super) fn mount_bpffs() {
    let mounts = fs::read_to_string("/proc/mounts").expect("every process has it");
    if !mounts.lines().any(|line| line.split(' ').nth(1) == Some("/sys/fs/bpf")) {
        let mounted = Command::new("mount").args(["-t", "bpf", "bpf", "/sys/fs/bpf"]).status();
        assert!(mounted.is_ok_and(|status| status.success()), "cannot mount a BPF file system");
    }
}

/// The agent's service, which brings along that of the opener.
fn agent() -> (Shipped, Shipped, Shaper) {
    mount_bpffs();
    let opener = binary("shaper-opener");
    let programs = [("shaper-opener", opener.as_path())];
    let opener = Shipped::start("shaper-opener.service", OPENER, &programs, OPENER_SOCKET);
    let (agent, launch, warden) = (binary("shaper-agent"), binary("shaper-launch"), binary("shaper-warden"));
    let object = bpf_object();
    let programs = [
        ("shaper-agent", agent.as_path()),
        ("shaper-launch", launch.as_path()),
        ("shaper-warden", warden.as_path()),
        ("shaper.bpf.o", object.as_path()),
    ];
    let socket = "/run/shaper/agent.sock";
    let unit = Shipped::start("shaper-agent.service", AGENT, &programs, socket);
    (unit, opener, Shaper::new(&binary("shaper"), Path::new(socket), 0))
}

/// A load where tasks of any user find it.
fn load() -> PathBuf {
    let load = PathBuf::from("/usr/lib/shaper/test-load");
    let _ = fs::remove_file(&load);
    fs::copy(binary("test-load"), &load).expect("a load can be copied");
    fs::set_permissions(&load, fs::Permissions::from_mode(0o755)).expect("it is ours");
    load
}

#[test]
fn the_agent_has_what_it_needs_under_its_unit_and_its_tasks_know_nothing_of_it() {
    let (unit, opener, shaper) = agent();
    assert_eq!(u64::from_str_radix(&unit.status("CapEff"), 16).map(|set| set & CAP_SYS_ADMIN), Ok(0));
    assert_eq!(u64::from_str_radix(&opener.status("CapEff"), 16), Ok(CAP_SYS_ADMIN | CAP_NET_ADMIN));
    assert_eq!((unit.status("Seccomp").as_str(), unit.status("NoNewPrivs").as_str()), ("2", "1"));

    // Nothing that this kernel has is kept from it.
    let mut probe = Command::new(binary("shaper-agent"));
    let outside = probe.arg("probe").output().expect("it runs outside as well");
    let outside = String::from_utf8_lossy(&outside.stdout).into_owned();
    let report = shaper.doctor();
    for rung in &report.rungs {
        assert!(!matches!(rung.availability, Availability::Unusable { .. }), "{rung:?}");
        let there = rung.availability == Availability::Available;
        let line = outside.lines().find(|line| line.split('\t').next() == Some(&rung.feature));
        assert!(
            line.is_none_or(|line| (line.split('\t').nth(1) == Some("yes")) == there),
            "{rung:?}: {line:?}"
        );
    }

    let user = format!("{NOBODY}:{NOBODY}");
    let limits = ["--user", &user, "--cpu", "0.5", "--memory", "64Mi", "--net", "20mbit", "--io", "200"];
    let load = load().display().to_string();
    let task = shaper.start("task", &limits, &[&load, "spin"]);
    let pid = task.pid.expect("it runs").to_string();
    let unit_of_task = task.cgroup.trim_start_matches(&mounts().0.display().to_string()).to_owned();
    assert!(unit_of_task.starts_with("/shaper.slice/"), "{unit_of_task}");
    assert_eq!(status(&pid, "Seccomp"), "0", "a task is under no filter");
    let namespaces =
        |pid: &str| ["mnt", "uts", "net"].map(|kind| fs::read_link(format!("/proc/{pid}/ns/{kind}")).ok());
    assert_eq!(namespaces(&pid), namespaces("1"), "a task sees the machine as it is");

    // Each is in force and is held.
    for (resource, held) in [("cpu", "0.5 cores"), ("memory", "64 MiB"), ("net_egress", "20 Mbit/s")] {
        let (mechanism, value) = in_force(&task, resource);
        assert!(value.starts_with(held), "{resource} by {mechanism}: {value}");
    }
    assert_eq!(read(&task.cgroup, "memory.max"), "67108864");
    let rate_of = |amount: &dyn Fn() -> f64, seconds: u32| {
        Window::pass(2 * SECOND);
        let before = amount();
        let window = Window::pass(seconds * SECOND);
        (amount() - before) / window.seconds()
    };
    let cores = rate_of(&|| cpu_time(&task.cgroup).as_secs_f64(), 3);
    assert_close("cores of a task", cores, 0.5, 12.0);
    let churn = Running(TestCgroup::run(Path::new(&task.cgroup), None, &["churn", "/dev/nullb0", "read"]));
    let reads = || {
        let stat = read(&task.cgroup, "io.stat");
        stat.split_whitespace()
            .filter_map(|field| field.strip_prefix("rios=")?.parse::<f64>().ok())
            .sum::<f64>()
    };
    assert_close("reads a second", rate_of(&reads, 5), 200.0, 5.0);
    drop(churn);
    shaper.set("task", &["--cpu", "0.25"]);
    assert_eq!(read(&task.cgroup, "cpu.max"), "25000 100000");

    // The agent may end, and its tasks and their limits do not.
    systemctl(&["restart", unit.name]);
    eventually("the next one answers", || shaper.call(&["get", "tasks"]).code == 0);
    assert_eq!(read(&task.cgroup, "cpu.max"), "25000 100000");
    shaper.ok(&["cancel", "task"]);
    eventually("it has ended", || !Path::new(&format!("/proc/{pid}")).exists());
    let said = unit.said();
    assert!(!said.contains("Operation not permitted") && !said.contains("Permission denied"), "{said}");

    unit.tell_exposure(AGENT_EXPOSURE);
    opener.tell_exposure(OPENER_EXPOSURE);
    shaper.ok(&["release", "--all"]);
}

#[test]
fn under_its_unit_the_agent_holds_what_it_adopts_and_gives_it_back() {
    let (unit, opener, shaper) = agent();
    let (network, group) = (NetPair::new(), TestCgroup::new());
    write(group.path(), "cpu.max", "30000 100000");
    // In a network namespace of its own, and connected before.
    let sink = Sink::listen(&network.far, NetPair::FAR_V4);
    let child = group.make_child("child");
    let _sender = Running(TestCgroup::run(&child, Some(&network.near), &["send", &sink.address(), "1"]));
    sink.wait_for_flows(1);
    let path = group.path().display().to_string();
    shaper.ok(&["adopt", &path, "--id", "service", "--cpu", "0.5", "--net", "10mbit"]);
    assert_eq!(read(group.path(), "cpu.max"), "50000 100000");
    Window::pass(2 * SECOND);
    let window = Window::pass(4 * SECOND);
    assert_close("sent on a connection that was there before", sink.rate(window), 10e6, 8.0);

    // Somebody else writes.
    write(group.path(), "cpu.max", "80000 100000");
    eventually("it is turned back", || read(group.path(), "cpu.max") == "50000 100000");
    eventually("it is known who it was", || !of_others(&shaper, "service").is_empty());
    let ours = std::process::id();
    for entry in of_others(&shaper, "service") {
        assert!(matches!(entry.cause.actor, Actor::Process { pid, .. } if pid == ours), "{entry:?}");
    }
    shaper.ok(&["release", "service"]);
    assert_eq!(read(group.path(), "cpu.max"), "80000 100000", "what was asked for last");
    assert!(opener.said().contains("opened"), "{}", opener.said());
    let said = unit.said() + &opener.said();
    assert!(!said.contains("Operation not permitted") && !said.contains("Permission denied"), "{said}");
    shaper.ok(&["release", "--all"]);
}

#[test]
fn the_broker_needs_no_capability() {
    fs::write("/run/shaper-sysusers.conf", SYSUSERS).expect("/run can be written");
    let made = Command::new("systemd-sysusers").arg("/run/shaper-sysusers.conf").output();
    let made = made.expect("systemd-sysusers comes with systemd");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let broker = binary("shaper-broker");
    let socket = "/run/shaper-broker/broker.sock";
    let unit = Shipped::start("shaper-broker.service", BROKER, &[("shaper-broker", &broker)], socket);
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(unit.status(set), "0000000000000000", "{set}");
    }
    assert!(!unit.status("Uid").starts_with('0') && unit.status("Seccomp") == "2");
    let policy = Path::new("/run/shaper-policy.yaml");
    fs::write(policy, "policy_name: p\npriority: high\n").expect("/run can be written");
    let shaper = Shaper::of_broker(&binary("shaper"), Path::new(socket), 0);
    shaper.ok(&["apply", "-f", &policy.display().to_string()]);
    // It is on disk.
    systemctl(&["restart", unit.name]);
    eventually("the next one answers", || UnixStream::connect(socket).is_ok());
    assert!(shaper.ok(&["get", "policies"]).contains("high"));
    unit.tell_exposure(BROKER_EXPOSURE);
}

/// A tenth more than docs/operating.md says, from 0 to 10: an older or newer systemd looks at other things.
const AGENT_EXPOSURE: f64 = 4.3;
const OPENER_EXPOSURE: f64 = 3.0;
const BROKER_EXPOSURE: f64 = 1.5;
