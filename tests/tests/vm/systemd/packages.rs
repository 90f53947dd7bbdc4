//! The Debian packages, installed, upgraded and purged by dpkg on a machine that systemd runs.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use shaper_tests::{
    NOBODY, assert_close,
    bins::binary,
    cgroup::{TestCgroup, cpu_time, mounts, read, write},
    net::NetPair,
    shaper::{Shaper, in_force},
    sink::Sink,
    systemd::systemctl,
    time::{Window, eventually, happens, monotonic_ns},
};

use super::{Running, hardened::mount_bpffs, log_of};

const SECOND: Duration = Duration::from_secs(1);
const UNITS: [&str; 3] = ["shaper-agent.service", "shaper-opener.service", "shaper-broker.service"];
const SOCKET: &str = "/run/shaper/agent.sock";
const BROKER_SOCKET: &str = "/run/shaper-broker/broker.sock";

/// The packages of a revision, by the names of what they install.
fn package(revision: &str, name: &str) -> PathBuf {
    let folder = env::var_os("SHAPER_PACKAGES").expect("`cargo xtask vm --profile systemd` makes packages");
    let folder = Path::new(&folder).join(revision);
    let files = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let begins = format!("{name}_");
    let found = files
        .map(|file| file.expect("it can be listed").path())
        .find(|path| path.file_name().is_some_and(|file| file.to_string_lossy().starts_with(&begins)));
    found.unwrap_or_else(|| panic!("no package {name} in {}", folder.display()))
}

#[track_caller]
fn dpkg(arguments: &[&str]) -> String {
    let mut command = Command::new("dpkg");
    // As apt-get would: what the administrator changed stays.
    command.args(["--force-confold"]).args(arguments).env("DEBIAN_FRONTEND", "noninteractive");
    let output = command.output().expect("this is Debian");
    let said =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{arguments:?}: {said}\n{}", logs());
    said
}

#[track_caller]
fn install(revision: &str, name: &str) -> String {
    dpkg(&["--install", &package(revision, name).display().to_string()])
}

fn logs() -> String {
    UNITS.map(|unit| fs::read_to_string(log_of(unit)).unwrap_or_default()).concat()
}

/// What other tests put in the way, away; and drop-ins as theirs, for a machine on which nothing that is enabled is started.
fn prepare() {
    let _ = fs::remove_dir_all("/usr/lib/shaper");
    for unit in UNITS {
        let units = Path::new("/etc/systemd/system");
        let _ = fs::remove_file(units.join(unit));
        let _ = fs::remove_file(log_of(unit));
    }
    // The file systems on which dpkg would wait are thrown away with the machine.
    fs::write("/etc/dpkg/dpkg.cfg.d/shaper-test", "force-unsafe-io\n").expect("dpkg can be configured");
    // What keeps packages from starting services where there is no systemd to start them.
    let _ = fs::remove_file("/usr/sbin/policy-rc.d");
    forget_most_packages();
    mount_bpffs();
    systemctl(&["daemon-reload"]);
}

/// Has dpkg know of what ours depend on, and of no more: it reads the list of every package's files each time, over 9p.
fn forget_most_packages() {
    const NEEDED: [&str; 3] = ["init-system-helpers", "libc6", "libgcc-s1"];
    let known = Path::new("/var/lib/dpkg");
    let status = fs::read_to_string(known.join("status")).expect("this is Debian");
    let is_needed = |entry: &&str| {
        let name = entry.lines().find_map(|line| line.strip_prefix("Package: "));
        name.is_some_and(|name| NEEDED.contains(&name))
    };
    let needed: Vec<_> = status.split("\n\n").filter(is_needed).collect();
    assert_eq!(needed.len(), NEEDED.len(), "{needed:?}");
    let mounted = Command::new("mount").args(["-t", "tmpfs", "tmpfs", &known.display().to_string()]).status();
    assert!(mounted.is_ok_and(|status| status.success()), "cannot mount a tmpfs");
    for folder in ["alternatives", "info", "parts", "triggers", "updates"] {
        fs::create_dir(known.join(folder)).expect("it is empty");
    }
    fs::write(known.join("status"), needed.join("\n\n") + "\n\n").expect("it is empty");
    for name in NEEDED {
        fs::write(known.join(format!("info/{name}.list")), "/.\n").expect("it is empty");
        fs::write(known.join(format!("info/{name}:amd64.list")), "/.\n").expect("it is empty");
    }
}

fn property(unit: &str, name: &str) -> String {
    systemctl(&["show", "--value", "--property", name, unit])
}

/// That a package has started it, and has it start at boot.
#[track_caller]
fn assert_begun(unit: &str) {
    let state = ["ActiveState", "UnitFileState"].map(|name| property(unit, name));
    assert_eq!(state, ["active", "enabled"], "{unit}\n{}", logs());
}

#[test]
fn an_upgrade_leaves_no_gap_and_a_purge_leaves_nothing() {
    prepare();
    install("1", "shaper-cli");
    install("1", "shaper-agent");
    let unit = UNITS[0];
    assert_begun(unit);
    assert_eq!(property(UNITS[1], "ActiveState"), "active");
    // Type=notify: `active` is `ready`.
    let shaper = Shaper::new(Path::new("/usr/bin/shaper"), Path::new(SOCKET), 0);
    assert_eq!(shaper.call(&["get", "tasks", "-o", "name"]).code, 0, "{}", logs());
    for path in [
        "/usr/sbin/shaper-agent",
        "/usr/share/bash-completion/completions/shaper",
        "/usr/share/man/man1/shaper-run.1.gz",
        "/usr/share/man/man8/shaper-agent.8.gz",
    ] {
        assert!(Path::new(path).exists(), "{path}");
    }

    // A task, and somebody's cgroup that sends to another network namespace.
    let load = Path::new("/usr/local/bin/test-load");
    fs::copy(binary("test-load"), load).expect("a load can be copied");
    let user = format!("{NOBODY}:{NOBODY}");
    let limits = ["--user", &user, "--cpu", "0.5", "--memory", "64Mi"];
    let task = shaper.start("task", &limits, &[&load.display().to_string(), "spin"]);
    let pid = task.pid.expect("it runs");
    let (network, group) = (NetPair::new(), TestCgroup::new());
    write(group.path(), "cpu.max", "30000 100000");
    let sink = Sink::listen(&network.far, NetPair::FAR_V4);
    let path = group.path().display().to_string();
    shaper.ok(&["adopt", &path, "--id", "service", "--cpu", "0.4", "--net", "10mbit"]);
    let child = group.make_child("child");
    let _sender = Running(TestCgroup::run(&child, Some(&network.near), &["send", &sink.address(), "1"]));
    sink.wait_for_flows(1);
    Window::pass(2 * SECOND);

    // The administrator's options stay, and are in force.
    fs::write("/etc/default/shaper-agent", "SHAPER_AGENT_OPTIONS=\"--max-tasks-per-user 7\"\n")
        .expect("it is there");
    let (first, from) = (property(unit, "MainPID"), monotonic_ns());
    let (cpu, held) = (cpu_time(&task.cgroup), || [&*task.cgroup, &path].map(|group| read(group, "cpu.max")));
    install("2", "shaper-agent");
    let second = property(unit, "MainPID");
    assert!(first != second && second != "0", "{first} {second}");
    eventually("the next one answers", || shaper.call(&["get", "tasks"]).code == 0);
    let (used, window) = ((cpu_time(&task.cgroup) - cpu).as_secs_f64(), Window { from, to: monotonic_ns() });
    // Over the whole of it, from before to after; and in the second in which most was received, which is more than was sent
    // where the receiver waited for a CPU. Without a limit it is hundreds: a gap of a twentieth of a second would show.
    let (cores, seconds) = (used / window.seconds(), window.seconds());
    let (mean, most) = (sink.rate(window), sink.highest_rate(window, SECOND));
    println!(
        "soak: upgrade in {seconds:.1} s: {cores:.3} cores; {:.2} Mbit/s, at most {:.2} in a second",
        mean / 1e6,
        most / 1e6
    );
    assert!(cores < 0.53, "{cores} cores in {seconds} s");
    assert!(mean < 10.5e6 && most < 15e6, "{mean} bit/s, at most {most}, while it was upgraded");
    assert_eq!(held(), ["50000 100000", "40000 100000"]);
    let command_line = fs::read_to_string(format!("/proc/{second}/cmdline")).expect("it runs");
    assert!(command_line.contains("--max-tasks-per-user\x007"), "{command_line}");
    let changed = shaper.set("task", &["--cpu", "0.25"]);
    assert_eq!(in_force(&changed, "cpu").1, "0.25 cores");
    Window::pass(SECOND);
    let window = Window::pass(3 * SECOND);
    assert_close("sent after the upgrade", sink.rate(window), 10e6, 8.0);

    // An agent that hangs is started anew.
    let drop_in = Path::new("/etc/systemd/system").join(format!("{unit}.d/watchdog.conf"));
    fs::write(&drop_in, "[Service]\nWatchdogSec=4\n").expect("a drop-in can be written");
    systemctl(&["daemon-reload"]);
    systemctl(&["restart", unit]);
    let hangs = property(unit, "MainPID");
    systemctl(&["kill", "--kill-whom=main", "--signal=STOP", unit]);
    let is_new = || !["0", &hangs].contains(&&*property(unit, "MainPID"));
    assert!(happens(|| is_new() && property(unit, "ActiveState") == "active"), "{}", logs());
    assert_eq!(property(unit, "NRestarts"), "1");
    assert_eq!(held(), ["25000 100000", "40000 100000"]);

    // Gone, and so is all that it did; what ran runs on.
    dpkg(&["--purge", "shaper-agent"]);
    assert!(Path::new(&format!("/proc/{pid}")).exists(), "the task runs on");
    assert_eq!(read(&task.cgroup, "cpu.max"), "max 100000");
    assert_eq!(read(&task.cgroup, "memory.max"), "max");
    assert_eq!(read(group.path(), "cpu.max"), "30000 100000");
    for path in [
        "/sys/fs/bpf/shaper",
        "/var/lib/shaper",
        "/usr/lib/shaper",
        "/etc/default/shaper-agent",
        "/run/shaper/agent.sock",
    ] {
        assert!(!Path::new(path).exists(), "{path}");
    }
    assert!(!mounts().0.join("shaper").exists(), "its own cgroup");
    let known = Command::new("systemctl").args(["cat", unit]).output().expect("systemctl is there");
    let known = String::from_utf8_lossy(&known.stdout).into_owned();
    assert!(!known.contains("ExecStart"), "{known}");
    let received = || sink.by_connection().iter().sum::<u64>() as f64;
    let before = received();
    let window = Window::pass(2 * SECOND);
    let rate = (received() - before) * 8.0 / window.seconds();
    assert!(rate > 20e6, "{rate} bit/s where nothing limits it any more");
    systemctl(&["kill", "--signal=KILL", &unit_of(&task.cgroup)]);
    dpkg(&["--purge", "shaper-cli"]);
}

/// The unit in whose cgroup, or below whose, this is.
fn unit_of(cgroup: &str) -> String {
    let unit = cgroup.split('/').find(|part| part.ends_with(".service") || part.ends_with(".scope"));
    unit.unwrap_or_else(|| panic!("no unit in {cgroup}")).to_owned()
}

#[test]
fn the_brokers_package_keeps_its_store_until_it_is_purged() {
    prepare();
    install("1", "shaper-cli");
    install("1", "shaper-broker");
    let unit = UNITS[2];
    assert_begun(unit);
    let policy = Path::new("/run/shaper-policy.yaml");
    fs::write(policy, "policy_name: p\npriority: high\n").expect("/run can be written");
    let shaper = Shaper::of_broker(Path::new("/usr/bin/shaper"), Path::new(BROKER_SOCKET), 0);
    shaper.ok(&["apply", "-f", &policy.display().to_string()]);
    let first = property(unit, "MainPID");
    install("2", "shaper-broker");
    assert_ne!(property(unit, "MainPID"), first);
    assert_eq!(shaper.ok(&["get", "policies", "-o", "name"]), "p\n");

    dpkg(&["--remove", "shaper-broker"]);
    assert!(Path::new("/var/lib/shaper-broker/store.redb").exists(), "removed is not purged");
    dpkg(&["--purge", "shaper-broker", "shaper-cli"]);
    for path in ["/var/lib/shaper-broker", "/usr/lib/shaper", "/etc/default/shaper-broker"] {
        assert!(!Path::new(path).exists(), "{path}");
    }
}
