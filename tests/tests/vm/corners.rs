//! Corner cases of docs/corner-cases.md that need cgroup v2 with its controllers, or a machine of the test's own.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::{Child, Command},
    time::Duration,
};

use rustix::{mount::MountFlags, time::ClockId};
use shaper_agent::{
    actuate::{self, Lasts, Target, Values, Wish},
    kernel::{
        cgroup::{
            Cgroup,
            pressure::{self, Stall, Trigger},
        },
        hierarchy::Hierarchies,
    },
};
use shaper_core::{
    limits::Limit,
    snapshot::{DeviceUsage, Latency},
    task::Phase,
    units::{Micros, Millicores},
};
use shaper_tests::{
    agent::{Agent, Options},
    assert_close,
    cgroup::{TestCgroup, cpu_time, read, write},
    disk::Disk,
    kernel_is_at_least,
    knobs::{self, NoPacing, grant},
    shaper::in_force,
    slow_disk::SlowDisk,
    time::{Window, eventually, happens, monotonic_ns},
};

use super::SECOND;

/// What a test has started; it ends with it.
struct Load(Child);

impl Load {
    fn run(group: &Path, load: &[&str]) -> Load {
        Load(TestCgroup::run(group, None, load))
    }

    fn pid(&self) -> String {
        self.0.id().to_string()
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs a program that has to succeed.
#[track_caller]
fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {}", said.trim());
}

fn target(group: &Path) -> Target {
    let hierarchies = Hierarchies::detect().expect("/proc is mounted").expect("cgroup v2 is mounted");
    let cgroup = Cgroup::open(&hierarchies.v2, group).expect("it is there");
    knobs::target(cgroup)
}

/// Cores that are used in such a time, by the kernel's count.
fn cores(group: &Path, time: Duration) -> f64 {
    let before = cpu_time(group);
    let window = Window::pass(time);
    (cpu_time(group) - before).as_secs_f64() / window.seconds()
}

#[test]
fn a_period_at_either_end_and_no_limit_come_back() {
    let group = TestCgroup::new();
    let files = || ["cpu.max", "cpu.max.burst"].map(|file| read(group.path(), file));
    // No cgroup can have such a one, so none has to be put back.
    for beyond in ["999 100000", "1000 999", "1000 1000001"] {
        assert!(fs::write(group.path().join("cpu.max"), beyond).is_err(), "the kernel takes {beyond}");
    }
    let target = target(group.path());
    for own in [["1000 1000", "1000"], ["250000 1000000", "0"], ["max 1000", "0"], ["max 1000000", "0"]] {
        write(group.path(), "cpu.max.burst", "0");
        write(group.path(), "cpu.max", own[0]);
        write(group.path(), "cpu.max.burst", own[1]);
        let changes = grant(&target, &[Wish::Cpu(Limit::At(Millicores(10)))]).unwrap();
        assert_eq!(files(), ["1000 100000", "1000"]);
        let baseline: Values = changes.iter().map(|change| (change.knob, change.before)).collect();
        grant(&target, &actuate::as_before(&baseline)).unwrap();
        assert_eq!(files(), own);
    }
}

#[test]
fn a_cgroup_that_is_removed_between_reading_and_writing_is_gone_and_its_successor_is_left_alone() {
    let group = TestCgroup::new();
    write(group.path(), "cgroup.subtree_control", "+cpu +memory");
    let path = group.make_child("service");
    let target = target(&path);
    let wishes = [Wish::Cpu(Limit::At(Millicores(300))), Wish::Memory(Limit::Unlimited)];
    let changes = actuate::plan(&target, &NoPacing, &wishes).unwrap().changes;
    fs::remove_dir(&path).unwrap();
    fs::create_dir(&path).unwrap();
    let error = actuate::execute(&target, &mut NoPacing, &changes, Lasts::ForAWhile).unwrap_err();
    assert!(error.is_gone() && error.is_undone(), "{error:?}");
    let error = grant(&target, &wishes).unwrap_err();
    assert!(error.is_gone(), "{error:?}");
    assert_eq!(read(&path, "cpu.max"), "max 100000");
}

#[test]
fn a_change_of_a_task_whose_cgroup_was_removed_says_that_it_has_ended() {
    let agent = Agent::start();
    let group = TestCgroup::new();
    let path = group.make_child("service");
    agent.adopt("service", &path, &["--net", "5mbit"]);
    // What the kernel has to tell waits in the ring, with the request.
    agent.freeze(true);
    fs::remove_dir(&path).unwrap();
    let mut set = agent.shaper().command(&["set", "service", "--cpu", "0.5"]);
    let mut set = set.stderr(std::process::Stdio::piped()).spawn().unwrap();
    agent.freeze(false);
    let mut said = String::new();
    io::Read::read_to_string(&mut set.stderr.take().unwrap(), &mut said).unwrap();
    assert_eq!(set.wait().unwrap().code(), Some(shaper_tests::shaper::REFUSED), "{said}");
    assert!(said.contains("has ended"), "{said}");
    eventually("its end is known", || agent.shaper().get("service").phase != Phase::Running);
    agent.shaper().ok(&["release", "service"]);
}

#[test]
fn the_lower_limit_of_a_cgroup_above_holds_and_each_has_its_own_again_when_it_goes() {
    // Who gets less than his limit is lent more later: that is not what this is about.
    let agent = Options::default().with(&["--cpu-burst-pool", "off"]).start();
    let group = TestCgroup::new();
    write(group.path(), "cgroup.subtree_control", "+cpu");
    let children = ["one", "two"].map(|name| group.make_child(name));
    let hogs = [0, 1].map(|cpu: usize| Load::run(&children[cpu], &["pinned", &cpu.to_string()]));
    write(group.path(), "cpu.max", "40000 100000");
    for (id, child) in ["one", "two"].iter().zip(&children) {
        agent.adopt(id, child, &["--cpu", "0.5"]);
        assert_eq!(read(child, "cpu.max"), "50000 100000");
    }
    // What they may owe is paid by then.
    Window::pass(SECOND);
    assert_close("cores of both, below one with 0.4", cores(group.path(), 3 * SECOND), 0.4, 10.0);
    write(group.path(), "cpu.max", "max 100000");
    eventually("both have theirs", || cores(group.path(), SECOND) > 0.9);
    let both = cores(group.path(), 2 * SECOND);
    assert!(both < 1.1, "{both} cores of 0.5 each");
    for id in ["one", "two"] {
        agent.shaper().ok(&["release", id]);
    }
    assert_eq!(read(&children[0], "cpu.max"), "max 100000");
    drop(hogs);
}

#[test]
fn a_quota_holds_over_threads_in_cgroups_of_their_own_and_a_threaded_cgroup_has_no_memory() {
    let agent = Agent::start();
    let group = TestCgroup::new();
    agent.adopt("service", group.path(), &["--cpu", "0.3"]);
    let threaded = ["one", "two"].map(|name| {
        let path = group.make_child(name);
        write(&path, "cgroup.type", "threaded");
        path
    });
    write(group.path(), "cgroup.subtree_control", "+cpu");
    let hog = Load::run(group.path(), &["pinned", "0,1"]);
    let threads = || {
        let entries = fs::read_dir(format!("/proc/{}/task", hog.pid())).into_iter().flatten().flatten();
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect::<Vec<_>>()
    };
    eventually("its threads are there", || threads().len() == 3);
    for (thread, group) in threads()[1..].iter().zip(&threaded) {
        write(group, "cgroup.threads", thread);
    }
    Window::pass(SECOND);
    let before = threaded.each_ref().map(cpu_time);
    assert_close("cores of two threads, of 0.3", cores(group.path(), 3 * SECOND), 0.3, 10.0);
    assert!(threaded.each_ref().map(cpu_time) > before, "one of them stands still");
    agent.assert_counted("service", group.path(), 5.0);
    agent.shaper().ok(&["release", "service"]);

    // A part of one: CPU time is its own, memory is not.
    let path = threaded[0].display().to_string();
    let said = agent.shaper().refused(&["adopt", &path, "--id", "thread", "--memory", "64Mi"]);
    assert!(said.contains("memory"), "{said}");
    agent.adopt("thread", &threaded[0], &["--cpu", "0.2"]);
    assert_eq!(read(&threaded[0], "cpu.max"), "20000 100000");
    agent.shaper().ok(&["release", "thread"]);
    assert_eq!(read(&threaded[0], "cpu.max"), "max 100000");
}

/// A CPU that is off. Dropping this switches it on.
struct CpuOff(PathBuf);

impl CpuOff {
    fn new(number: u32) -> CpuOff {
        let path = PathBuf::from(format!("/sys/devices/system/cpu/cpu{number}/online"));
        fs::write(&path, "0").unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        CpuOff(path)
    }
}

impl Drop for CpuOff {
    fn drop(&mut self) {
        fs::write(&self.0, "1").unwrap_or_else(|error| eprintln!("{}: {error}", self.0.display()));
    }
}

#[test]
fn a_cpu_that_is_switched_off_and_on_costs_no_count_and_no_limit_even_over_a_restart() {
    let mut agent = Agent::start();
    // With more, the one CPU that is left would be its alone: it outweighs this test.
    const LIMIT: f64 = 0.8;
    let task = agent.run("hog", &["--cpu", &LIMIT.to_string()], &["pinned", "0,1"]);
    let group = PathBuf::from(&task.cgroup);
    let cpus = |agent: &Agent| agent.shaper().top().cpus;
    eventually("it runs", || cpu_time(&group) > SECOND);
    agent.assert_counted("hog", &group, 5.0);
    let off = CpuOff::new(1);
    eventually("there is one", || cpus(&agent) == 1);
    assert_close("cores on the one that is left", cores(&group, 2 * SECOND), LIMIT, 10.0);
    agent.assert_counted("hog", &group, 5.0);

    agent.kill9();
    agent.restart();
    let health = agent.shaper().doctor();
    let distrusted = health.rungs.iter().find(|rung| rung.feature.starts_with("self-test"));
    assert!(distrusted.is_none(), "{distrusted:?}");
    drop(off);
    eventually("there are two", || cpus(&agent) == 2);
    // Whoever was there does not come back by himself, but others do.
    let other = agent.run("other", &["--cpu", "0.5"], &["pinned", "1"]);
    Window::pass(SECOND);
    let other = Path::new(&other.cgroup);
    assert_close("cores on the one that is back", cores(other, 2 * SECOND), 0.5, 10.0);
    agent.assert_counted("hog", &group, 5.0);
    agent.assert_counted("other", other, 5.0);
}

#[test]
fn a_real_time_process_is_counted_though_no_quota_holds_it_and_is_held_when_it_is_none_any_more() {
    let agent = Agent::start();
    let group = TestCgroup::new();
    agent.adopt("service", group.path(), &["--cpu", "0.2"]);
    let hog = Load::run(group.path(), &["spin"]);
    eventually("it runs", || cpu_time(group.path()) > SECOND / 5);
    run("chrt", &["--fifo", "--pid", "1", &hog.pid()]);
    let real_time = cores(group.path(), 2 * SECOND);
    agent.assert_counted("service", group.path(), 5.0);
    run("chrt", &["--other", "--pid", "0", &hog.pid()]);
    Window::pass(SECOND);
    let usual = cores(group.path(), 2 * SECOND);
    assert!(real_time > 0.5, "{real_time} cores: this kernel holds it");
    // Less, while it pays back what it used beyond its limit.
    assert!(usual < 0.23, "{usual} cores of a usual one");
    agent.assert_counted("service", group.path(), 5.0);
}

#[test]
fn pressure_that_a_cgroup_does_not_count_is_absent_and_the_task_goes_on() {
    let agent = Agent::start();
    let groups = [TestCgroup::new(), TestCgroup::new()];
    // One before it is adopted, one after: then files that the agent has open are gone.
    write(groups[0].path(), "cgroup.pressure", "0");
    let hogs = groups.each_ref().map(|group| Load::run(group.path(), &["spin"]));
    for (id, group) in ["before", "after"].iter().zip(&groups) {
        agent.adopt(id, group.path(), &["--cpu", "0.3"]);
    }
    let counts = |id: &str| agent.shaper().usage_of(id).cpu.pressure.is_some();
    eventually("pressure is counted", || counts("after"));
    assert!(!counts("before"));
    write(groups[1].path(), "cgroup.pressure", "0");
    eventually("it is not counted any more", || !counts("after"));
    for id in ["before", "after"] {
        let task = agent.shaper().get(id);
        assert_eq!(task.phase, Phase::Running, "{id}");
        assert_eq!(in_force(&agent.shaper().set(id, &["--cpu", "0.4"]), "cpu").1, "0.4 cores");
        assert!(agent.measure(id, SECOND).cores > 0.1, "{id}");
    }
    assert!(!agent.said().contains("ERROR"), "{}", agent.said());
    for group in &groups {
        write(group.path(), "cgroup.pressure", "1");
    }
    eventually("it is counted again", || counts("before") && counts("after"));
    drop(hogs);
}

#[test]
fn a_short_window_of_pressure_is_for_newer_kernels_and_the_agents_for_all() {
    let group = TestCgroup::new();
    let cgroup = target(group.path()).cgroup;
    let set = |time, window| {
        let trigger = Trigger { stall: Stall::Some, time: Micros(time), window: Micros(window) };
        cgroup.watch_pressure(pressure::CPU, &trigger).map(|fd| fd.is_some())
    };
    let short = set(2_000, 20_000);
    if kernel_is_at_least(6, 12) {
        assert!(short.as_ref().is_ok_and(|set| *set), "{short:?}");
    } else {
        let errno = short.unwrap_err().errno();
        assert_eq!(errno, Some(rustix::io::Errno::INVAL));
    }
    assert!(set(200_000, 2_000_000).unwrap());
}

/// What a task does on a device.
fn io_on(agent: &Agent, id: &str, device: &str) -> Option<DeviceUsage> {
    agent.shaper().usage_of(id).io.into_iter().find(|io| io.device == device)
}

#[test]
fn block_io_that_the_kernel_does_not_time_is_counted_and_has_no_latency() {
    let disk = SlowDisk::new(Duration::from_millis(1), 4);
    let name = disk.path().trim_start_matches("/dev/").to_owned();
    let queue = PathBuf::from(format!("/sys/block/{name}/queue"));
    let agent = Agent::start();
    let group = TestCgroup::new();
    agent.adopt("service", group.path(), &["--io-latency", "50ms"]);
    let churn = Load::run(group.path(), &["churn", &disk.path(), "read", "1"]);
    let read = || io_on(&agent, "service", disk.number()).map(|io| io.read).unwrap_or_default();
    let promise = || in_force(&agent.shaper().get("service"), "storage_io_latency").1.to_owned();
    let is_timed = |latency: Option<Latency>| latency.is_some_and(|latency| latency.count > 0);
    eventually("it is timed", || is_timed(read().latency) && promise().starts_with("p99"));

    // A scheduler has requests timed for itself.
    fs::write(queue.join("scheduler"), "none").unwrap();
    fs::write(queue.join("iostats"), "0").unwrap();
    if kernel_is_at_least(6, 18) {
        eventually("it is not timed", || read().operations_per_sec > 0 && read().latency.is_none());
        eventually("the promise says so", || promise().contains("iostats is 0"));
    } else {
        // The time of submission is in the bio, whoever asks.
        Window::pass(3 * SECOND);
        assert!(read().operations_per_sec > 0 && is_timed(read().latency), "{:?}", read());
    }
    // Counted it is all the same.
    let before = read().operations;
    eventually("it is counted", || read().operations > before + 100);
    fs::write(queue.join("iostats"), "1").unwrap();
    eventually("it is timed again", || is_timed(read().latency) && promise().starts_with("p99"));
    drop(churn);
}

#[test]
fn a_device_that_is_taken_away_takes_nothing_with_it() {
    let disk = Disk::format_and_mount();
    let slow = SlowDisk::new(Duration::from_millis(1), 4);
    let gone = slow.number().to_owned();
    let agent = Agent::start();
    let group = TestCgroup::new();
    // Its own limit of the device that goes cannot come back.
    write(group.path(), "io.max", &format!("{gone} rbps=1048576"));
    agent.adopt("service", group.path(), &["--io", "300"]);
    let lines = || read(group.path(), "io.max");
    assert!(lines().contains(&gone), "{}", lines());
    let file = disk.file("file").display().to_string();
    fs::write(&file, vec![1; 4 << 20]).unwrap();
    let mut lost = Load::run(group.path(), &["churn", &slow.path(), "read", "2"]);
    let kept = Load::run(group.path(), &["churn", &file, "read", "2"]);
    let operations = || io_on(&agent, "service", disk.number()).map_or(0, |io| io.read.operations);
    eventually("both are used", || {
        operations() > 50 && io_on(&agent, "service", &gone).is_some_and(|io| io.read.operations > 50)
    });
    drop(slow);
    eventually("who used it has an error", || lost.0.try_wait().unwrap().is_some());
    assert!(!lines().contains(&gone), "{}", lines());
    // A change is of what is there, at once …
    agent.shaper().set("service", &["--io", "200"]);
    assert!(!lines().contains(&gone) && lines().contains(disk.number()), "{}", lines());
    // … and the ceiling is now all for what is left.
    Window::pass(4 * SECOND);
    let before = (disk.io_stat(group.path(), "rios"), monotonic_ns());
    Window::pass(4 * SECOND);
    let seconds = (monotonic_ns() - before.1) as f64 / 1e9;
    assert_close("--io 200", (disk.io_stat(group.path(), "rios") - before.0) as f64 / seconds, 200.0, 5.0);
    agent.shaper().ok(&["release", "service"]);
    assert_eq!(lines(), "");
    drop(kept);
}

/// A disk of scsi_debug that does only half of each third command. Dropping it takes it away.
struct HalfDisk {
    name: String,
}

impl HalfDisk {
    fn new() -> HalfDisk {
        const DRIVER: &str = "/sys/bus/pseudo/drivers/scsi_debug";
        /// SDEBUG_OPT_SHORT_TRANSFER
        const SHORT: &str = "0x100";
        let disks = || {
            let entries = fs::read_dir("/sys/block").expect("sysfs is mounted").flatten();
            let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
            names.filter(|name| name.starts_with("sd")).collect::<Vec<_>>()
        };
        assert!(disks().is_empty(), "{:?}", disks());
        run("insmod", &["/modules/scsi_debug.ko", "dev_size_mb=8", "delay=0"]);
        eventually("its disk is there", || !disks().is_empty());
        let disk = HalfDisk { name: disks().remove(0) };
        eventually("it is looked at no more", || {
            disk.path().exists() && Path::new("/sys/block").join(&disk.name).join("queue/iostats").exists()
        });
        write(DRIVER, "opts", SHORT);
        write(DRIVER, "every_nth", "3");
        disk
    }

    fn path(&self) -> PathBuf {
        Path::new("/dev").join(&self.name)
    }

    fn number(&self) -> String {
        read(Path::new("/sys/block").join(&self.name), "dev")
    }

    /// Commands that it was given.
    fn commands(&self) -> u64 {
        let count = read(Path::new("/sys/block").join(&self.name), "device/iorequest_cnt");
        u64::from_str_radix(count.trim_start_matches("0x"), 16).expect("it is a number")
    }
}

impl Drop for HalfDisk {
    fn drop(&mut self) {
        // Whoever had it open may be on his way out.
        let is_gone = happens(|| {
            Command::new("rmmod").arg("scsi_debug").output().is_ok_and(|output| output.status.success())
        });
        if !is_gone {
            eprintln!("scsi_debug cannot be removed");
        }
    }
}

#[test]
fn a_request_that_is_done_in_parts_is_one_operation_of_all_its_bytes() {
    const READS: u64 = 12;
    let disk = HalfDisk::new();
    let agent = Agent::start();
    let group = TestCgroup::new();
    agent.adopt("service", group.path(), &[]);
    let before = disk.commands();
    let script = format!(
        "echo $$ > {}/cgroup.procs; exec dd if={} of=/dev/null bs=65536 count={READS} iflag=direct",
        group.path().display(),
        disk.path().display(),
    );
    run("/bin/sh", &["-c", &script]);
    let commands = disk.commands() - before;
    assert!(commands > READS, "{commands} commands for {READS} requests: none was done in parts");
    let counted = || io_on(&agent, "service", &disk.number()).map(|io| (io.read.bytes, io.read.operations));
    let all = Some((READS * 65536, READS));
    let same = happens(|| counted() == all);
    assert!(same, "{:?} counted: {}", counted(), read(group.path(), "io.stat"));
}

/// Clocks that part by how long the machine slept, s.
fn asleep() -> f64 {
    let seconds = |clock| {
        let now = rustix::time::clock_gettime(clock);
        now.tv_sec as f64 + now.tv_nsec as f64 / 1e9
    };
    seconds(ClockId::Boottime) - seconds(ClockId::Monotonic)
}

#[test]
fn a_machine_that_was_asleep_has_its_limits_and_counts_nothing_of_that_time() {
    let agent = Agent::start();
    let task = agent.run("hog", &["--cpu", "0.5"], &["spin"]);
    let group = Path::new(&task.cgroup);
    eventually("it runs", || cpu_time(group) > SECOND / 2);
    let before = asleep();
    // An alarm that rings before the machine sleeps keeps it from that, rather than let it sleep for ever.
    let sleeps = |seconds: u32| {
        let alarm = "/sys/class/rtc/rtc0/wakealarm";
        fs::write(alarm, "0").unwrap();
        let wakeups = fs::read_to_string("/sys/power/wakeup_count").unwrap();
        fs::write(alarm, format!("+{seconds}")).unwrap();
        fs::write("/sys/power/wakeup_count", wakeups.trim())
            .and_then(|()| fs::write("/sys/power/state", "mem"))
    };
    let done = sleeps(5).or_else(|_| sleeps(20));
    done.expect("this machine can sleep");
    let slept = asleep() - before;
    assert!(slept > 1.0, "it slept for {slept} s");
    Window::pass(SECOND);
    assert_close("cores after that", cores(group, 3 * SECOND), 0.5, 10.0);
    agent.assert_counted("hog", group, 5.0);
    let usage = agent.shaper().usage_of("hog").cpu;
    assert!(usage.run_queue.is_some_and(|delay| delay.p99_ns < 1_000_000_000), "{usage:?}");
    assert_eq!(in_force(&agent.shaper().set("hog", &["--cpu", "0.3"]), "cpu").1, "0.3 cores");
}

/// The last by its name, for it cannot be undone: what this machine does then, it does locked down.
pub(crate) fn lock_down() {
    const SECURITY: &str = "/sys/kernel/security";
    let file = Path::new(SECURITY).join("lockdown");
    if !file.exists() {
        rustix::mount::mount("securityfs", SECURITY, "securityfs", MountFlags::empty(), None)
            .unwrap_or_else(|error| panic!("cannot mount securityfs: {error}"));
    }
    fs::write(&file, "confidentiality").unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    let now = fs::read_to_string(&file).expect("what can be written can be read");
    assert!(now.contains("[confidentiality]"), "{now}");
}
