//! The real agent, in a place of its own.

use std::{
    cell::RefCell,
    fs::{self, File, OpenOptions, Permissions},
    io::Write,
    os::unix::{fs::PermissionsExt, net::UnixStream, process::ExitStatusExt},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output},
    thread,
    time::Duration,
};

use rustix::{
    net::sockopt::socket_peercred,
    process::{Pid, Signal, kill_process},
};
use shaper_core::task::{TaskStatus, Usage};
use tempfile::TempDir;

use crate::{
    NOBODY, assert_close,
    bins::{binary, bpf_object, fake_nvml},
    cards::FakeCards,
    cgroup::{self, cpu_group, cpu_time, mounts, throttled_periods, unique_name},
    net::{DEVICE, NetPair, Netns, within},
    process::Process,
    shaper::Shaper,
    systemd::Unit,
    time::{Window, eventually, happens},
};

/// An agent to be started.
#[derive(Default)]
pub struct Options<'a> {
    arguments: Vec<String>,
    namespace: Option<&'a Netns>,
    failpoint: Option<String>,
    environment: Vec<(String, String)>,
    without_btf: bool,
    without_capabilities: bool,
    inside: Option<PathBuf>,
    open_files: Option<u32>,
}

impl<'a> Options<'a> {
    /// With these arguments as well.
    pub fn with(mut self, arguments: &[&str]) -> Options<'a> {
        self.arguments.extend(arguments.iter().map(|&argument| argument.to_owned()));
        self
    }

    /// At the near end of `network`, whose device is an uplink.
    pub fn on(mut self, network: &'a NetPair) -> Options<'a> {
        self.namespace = Some(&network.near);
        self.with(&["--uplink", DEVICE])
    }

    /// In that network namespace, without an uplink.
    pub fn within(mut self, namespace: &'a Netns) -> Options<'a> {
        self.namespace = Some(namespace);
        self
    }

    /// It aborts at that place, the first time.
    pub fn dies_at(mut self, failpoint: &str) -> Options<'a> {
        self.failpoint = Some(failpoint.to_owned());
        self
    }

    /// With an offset of a kernel field that is wrong by so many bytes.
    pub fn skewed(mut self, offset: &str, by: i64) -> Options<'a> {
        self.environment.push(("SHAPER_SKEW".into(), format!("{offset}={by}")));
        self
    }

    /// Started in that cgroup, and with its own below it, as where a manager has delegated one.
    pub fn inside(mut self, group: &Path) -> Options<'a> {
        self.inside = Some(group.to_owned());
        self
    }

    /// Started with that many files that it may have open, as far as it does not raise that itself.
    pub fn with_open_files(mut self, count: u32) -> Options<'a> {
        self.open_files = Some(count);
        self
    }

    /// With these cards, as NVIDIA's library shows them.
    pub fn with_cards(mut self, cards: &FakeCards) -> Options<'a> {
        self.environment.push(cards.variable());
        self.with(&["--nvml", &fake_nvml().display().to_string()])
    }

    /// On a kernel that has no BTF, as far as it can see.
    pub fn without_btf(mut self) -> Options<'a> {
        self.without_btf = true;
        self
    }

    /// As root without those of its capabilities that kernel programs need.
    pub fn without_capabilities(mut self) -> Options<'a> {
        self.without_capabilities = true;
        self
    }

    /// Starts it, and waits until it answers.
    pub fn start(mut self) -> Agent<'a> {
        let failpoint = self.failpoint.take();
        let mut agent = self.prepare();
        agent.launch(failpoint.as_deref());
        agent
    }

    /// Makes its place, for [`Agent::start_as_unit`].
    pub fn prepare(self) -> Agent<'a> {
        let directory = tempfile::Builder::new().prefix("shaper-test-").tempdir();
        let directory = directory.expect("a temporary directory can be made");
        // Tasks and callers of any user find what is in it.
        fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).expect("it is ours");
        for name in ["shaper", "test-load"] {
            let copied = fs::copy(binary(name), directory.path().join(name));
            copied.unwrap_or_else(|error| panic!("cannot copy {name}: {error}"));
        }
        let Options {
            arguments,
            namespace,
            failpoint: _,
            environment,
            without_btf,
            without_capabilities,
            inside,
            open_files,
        } = self;
        Agent {
            name: unique_name(),
            directory,
            arguments,
            environment,
            without_btf,
            without_capabilities,
            inside,
            open_files,
            namespace,
            server: None,
            tasks: RefCell::default(),
        }
    }
}

/// An agent with state, cgroups and pins of its own. Dropping it ends its tasks and releases everything.
pub struct Agent<'a> {
    name: String,
    directory: TempDir,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
    without_btf: bool,
    without_capabilities: bool,
    inside: Option<PathBuf>,
    open_files: Option<u32>,
    namespace: Option<&'a Netns>,
    server: Option<Child>,
    tasks: RefCell<Vec<Process>>,
}

/// What a task used between two reports.
#[derive(Clone, Copy, Debug)]
pub struct Used {
    /// From one report to the other.
    pub window: Window,
    /// CPU time per time.
    pub cores: f64,
    /// Sent by its sockets, bits a second.
    pub egress: f64,
    /// Of that, through the uplinks.
    pub uplink: f64,
}

impl Used {
    /// What two reports say.
    pub fn between(before: &Usage, after: &Usage) -> Used {
        let window = Window { from: before.at_monotonic_ns, to: after.at_monotonic_ns };
        let rate = |before: u64, after: u64| (after - before) as f64 / window.seconds();
        Used {
            window,
            cores: rate(before.cpu_time_ns, after.cpu_time_ns) / 1e9,
            egress: rate(before.egress.bytes, after.egress.bytes) * 8.0,
            uplink: rate(before.uplink_egress.bytes, after.uplink_egress.bytes) * 8.0,
        }
    }
}

impl<'a> Agent<'a> {
    /// One without special wishes.
    pub fn start() -> Agent<'a> {
        Options::default().start()
    }

    /// The name that its cgroups and pins have.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A directory for whatever belongs to the test.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Its state.
    pub fn state_dir(&self) -> PathBuf {
        self.directory().join("state")
    }

    /// Its socket.
    pub fn socket(&self) -> PathBuf {
        self.directory().join("agent.sock")
    }

    /// Its cgroups.
    pub fn cgroup_root(&self) -> PathBuf {
        self.inside.clone().unwrap_or_else(|| mounts().0).join(&self.name)
    }

    /// Its pins.
    pub fn bpffs_dir(&self) -> PathBuf {
        Path::new("/sys/fs/bpf").join(&self.name)
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.server.as_ref().expect("the agent runs").id()
    }

    /// The command for it, as root.
    pub fn shaper(&self) -> Shaper {
        self.shaper_as(0)
    }

    /// The command for it, as that user and the group of the same number.
    pub fn shaper_as(&self, uid: u32) -> Shaper {
        Shaper::new(&self.directory().join("shaper"), &self.socket(), uid)
    }

    /// `test-load`, where every user can run it.
    pub fn load(&self) -> String {
        self.directory().join("test-load").display().to_string()
    }

    /// Starts `test-load` as a task of nobody's.
    #[track_caller]
    pub fn run(&self, id: &str, limits: &[&str], load: &[&str]) -> TaskStatus {
        let user = format!("{NOBODY}:{NOBODY}");
        let options = [&["--user", &user], limits].concat();
        let task = self.shaper().start(id, &options, &[&[self.load().as_str()], load].concat());
        self.ends_with_me(&task);
        self.outweigh_others(self.process(&task).pid());
        task
    }

    /// Brings a cgroup under its management.
    #[track_caller]
    pub fn adopt(&self, id: &str, group: &Path, limits: &[&str]) {
        let group = group.display().to_string();
        self.shaper().ok(&[&["adopt", &group, "--id", id], limits].concat());
    }

    /// Lets the agent's cgroups win against what else this machine does, so that what a task gets is what
    /// its limit allows.
    pub fn outweigh_others(&self, pid: u32) {
        let (root, file, weight) = match cpu_group(pid) {
            (group, true) => (group, "cpu.shares", "102400"),
            (group, false) => (group, "cpu.weight", "10000"),
        };
        cgroup::write(root.parent().expect("a task is below the agent's root"), file, weight);
    }

    /// The process of a task; it is ended when the agent is dropped, even if it was released before.
    #[track_caller]
    pub fn process(&self, task: &TaskStatus) -> Process {
        Process::open(task.pid.unwrap_or_else(|| panic!("{} does not run: {:?}", task.task_id, task.phase)))
    }

    /// Ends the process of a task when the agent is dropped.
    #[track_caller]
    pub fn ends_with_me(&self, task: &TaskStatus) {
        self.tasks.borrow_mut().push(self.process(task));
    }

    /// Lets `time` pass, and returns what a task used in it.
    #[track_caller]
    pub fn measure(&self, id: &str, time: Duration) -> Used {
        let before = self.shaper().get(id).usage;
        Window::pass(time);
        Used::between(&before, &self.shaper().get(id).usage)
    }

    /// Asserts that the agent's count of a task's CPU time is the kernel's of its cgroup, within so many percent. It is read
    /// between two readings of the kernel's: asking takes long where all is emulated.
    #[track_caller]
    pub fn assert_counted(&self, id: &str, group: impl AsRef<Path>, percent: f64) {
        let before = cpu_time(&group).as_secs_f64();
        let counted = self.shaper().get(id).usage.cpu_time_ns as f64 / 1e9;
        let after = cpu_time(&group).as_secs_f64();
        let range = before * (1.0 - percent / 100.0)..=after * (1.0 + percent / 100.0);
        assert!(range.contains(&counted), "{counted} s counted, the kernel has {before} to {after} s");
    }

    /// Asserts that a task that wants more gets the CPU time of its limit.
    ///
    /// Where other work of this machine kept it from its limit, which the kernel tells by not having
    /// throttled it, it is measured a second time.
    #[track_caller]
    pub fn assert_cores(&self, id: &str, limit: f64, time: Duration) {
        let pid = self.shaper().get(id).pid.expect("it runs");
        let attempt = || {
            let before = throttled_periods(pid);
            let cores = self.measure(id, time).cores;
            let after = throttled_periods(pid);
            let at_limit = (after.0 - before.0) as f64 / (after.1 - before.1) as f64;
            (cores, at_limit)
        };
        let (mut cores, mut at_limit) = attempt();
        if cores < limit && at_limit < 0.9 {
            (cores, at_limit) = attempt();
        }
        let what = format!("cores of {id}, at its limit in {:.0} % of the periods", at_limit * 100.0);
        assert_close(&what, cores, limit, 10.0);
    }

    /// The agent's program with everything that says where it works; `arguments` come first.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = if self.without_btf {
            let mut command = Command::new("unshare");
            command.args(["--mount", "sh", "-c", "mount -t tmpfs none /sys/kernel/btf && exec \"$@\"", "sh"]);
            command.arg(binary("shaper-agent"));
            command
        } else if self.without_capabilities {
            let mut command = Command::new("setpriv");
            command.args(["--bounding-set", "-bpf,-perfmon,-sys_admin"]).arg(binary("shaper-agent"));
            command
        } else if let Some(count) = self.open_files {
            let mut command = Command::new("/bin/sh");
            command.args(["-c", "ulimit -S -n \"$0\" && exec \"$@\"", &count.to_string()]);
            command.arg(binary("shaper-agent"));
            command
        } else if let Some(group) = &self.inside {
            let mut command = Command::new("/bin/sh");
            command.args(["-c", "echo $$ > \"$0\"/cgroup.procs && exec \"$@\""]).arg(group);
            command.arg(binary("shaper-agent"));
            command
        } else {
            Command::new(binary("shaper-agent"))
        };
        command.args(arguments).arg("--listen").arg(self.socket()).arg("--state-dir").arg(self.state_dir());
        command.arg("--cgroup-root").arg(self.cgroup_root()).arg("--bpffs-dir").arg(self.bpffs_dir());
        command.arg("--bpf-object").arg(bpf_object()).args(&self.arguments).env("RUST_LOG", "info");
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command
    }

    /// Has systemd start it, as a service with these properties besides, and waits until it answers.
    #[track_caller]
    pub fn start_as_unit(&self, properties: &[&str]) -> Unit {
        let log = format!("StandardError=append:{}", self.log().display());
        let unit = Unit::start(&self.command(&[]), &[properties, &["StandardOutput=null", &log]].concat());
        let answered = happens(|| UnixStream::connect(self.socket()).is_ok());
        assert!(answered, "the unit shaper-agent does not answer: {}", self.said());
        unit
    }

    /// Starts it again, where it was.
    pub fn restart(&mut self) {
        self.launch(None);
    }

    /// Starts it again, to abort at that place.
    pub fn restart_to_die_at(&mut self, failpoint: &str) {
        self.launch(Some(failpoint));
    }

    /// Starts it again, to abort at that place. False where it came there before it could answer.
    #[track_caller]
    pub fn restart_to_die_at_or_before(&mut self, failpoint: &str) -> bool {
        let mut server = self.spawn(Some(failpoint));
        if happens(|| is_answered(&server, &self.socket()) || has_ended(&mut server))
            && !has_ended(&mut server)
        {
            self.server = Some(server);
            return true;
        }
        aborted(&mut server, "shaper-agent");
        false
    }

    /// Starts it, and kills it so long after that.
    pub fn start_and_kill9_after(&mut self, time: Duration) {
        let server = self.spawn(None);
        thread::sleep(time);
        self.server = Some(server);
        self.kill9();
    }

    fn launch(&mut self, failpoint: Option<&str>) {
        let mut server = self.spawn(failpoint);
        answers(&mut server, "shaper-agent", &self.socket(), || self.said());
        self.server = Some(server);
    }

    fn spawn(&self, failpoint: Option<&str>) -> Child {
        assert!(self.server.is_none(), "the agent runs");
        let log = OpenOptions::new().create(true).append(true).open(self.log());
        let mut command = self.command(&[]);
        command.stderr(log.expect("the agent's log can be written"));
        command.envs(failpoint.map(|place| ("SHAPER_FAILPOINT", place)));
        within(self.namespace, || command.spawn()).expect("shaper-agent can be started")
    }

    /// The process that takes back what it has lent, once it has one.
    #[track_caller]
    pub fn warden(&self) -> Process {
        let processes = self.cgroup_root().join("warden/cgroup.procs");
        let mut found = None;
        eventually("it has a warden", || {
            let text = fs::read_to_string(&processes).unwrap_or_default();
            found = text.lines().next().and_then(|pid| pid.parse().ok());
            found.is_some()
        });
        Process::open(found.expect("just found"))
    }

    /// Stops it, as Ctrl-Z does, or lets it go on.
    pub fn freeze(&self, freeze: bool) {
        let server = self.server.as_ref().expect("the agent runs");
        let signal = if freeze { Signal::STOP } else { Signal::CONT };
        kill_process(Pid::from_child(server), signal).expect("it is not reaped yet");
    }

    /// Kills it, without waiting for its end.
    pub fn signal_kill9(&self) {
        let server = self.server.as_ref().expect("the agent runs");
        kill_process(Pid::from_child(server), Signal::KILL).expect("it is not reaped yet");
    }

    /// Kills it.
    pub fn kill9(&mut self) {
        self.end(Signal::KILL);
    }

    /// Waits until it has aborted by itself.
    #[track_caller]
    pub fn wait_for_abort(&mut self) {
        let mut server = self.server.take().expect("the agent runs");
        aborted(&mut server, "shaper-agent");
    }

    /// Asks it to end, and waits until it has.
    #[track_caller]
    pub fn stop(&mut self) {
        let status = self.end(Signal::TERM);
        assert!(status.success(), "shaper-agent: {status}: {}", self.said());
    }

    fn end(&mut self, signal: Signal) -> ExitStatus {
        let mut server = self.server.take().expect("the agent runs");
        let pid = Pid::from_child(&server);
        kill_process(pid, signal).expect("it is not reaped yet");
        server.wait().expect("a child can be waited for")
    }

    /// Releases everything without a running agent.
    pub fn release_offline(&self) -> Output {
        let mut command = self.command(&["release", "--all"]);
        within(self.namespace, || command.output()).expect("shaper-agent can be started")
    }

    fn log(&self) -> PathBuf {
        self.directory().join("agent.log")
    }

    /// What the agent has logged.
    pub fn said(&self) -> String {
        fs::read_to_string(self.log()).unwrap_or_default()
    }
}

impl Drop for Agent<'_> {
    fn drop(&mut self) {
        if self.server.is_some() {
            self.end(Signal::KILL);
        }
        for task in self.tasks.get_mut() {
            task.kill();
        }
        end_tasks_below(&self.cgroup_root());
        let released = self.release_offline();
        if thread::panicking() {
            eprintln!("--- the agent's log:\n{}---", self.said());
        }
        if !released.status.success() {
            eprintln!("cannot release: {}", String::from_utf8_lossy(&released.stderr));
            let _ = cgroup::remove(&self.cgroup_root());
            let _ = fs::remove_dir_all(self.bpffs_dir());
        }
        // The supervisors of the tasks that were killed are still writing there.
        happens(|| fs::remove_dir_all(self.directory()).is_ok());
    }
}

/// Waits until a daemon answers at its socket.
#[track_caller]
pub(crate) fn answers(server: &mut Child, name: &str, socket: &Path, said: impl Fn() -> String) {
    let answered = happens(|| {
        let ended = server.try_wait().expect("a child can be waited for");
        assert!(ended.is_none(), "{name}: {}, {ended:?}", said());
        is_answered(server, socket)
    });
    assert!(answered, "{name} does not answer: {}", said());
}

/// Whether a daemon listens at its socket.
fn is_answered(server: &Child, socket: &Path) -> bool {
    // A child that an earlier one was about to start may listen in its place for a moment.
    let listener = UnixStream::connect(socket).ok().and_then(|stream| socket_peercred(&stream).ok());
    listener.is_some_and(|peer| peer.pid.as_raw_nonzero().get() == server.id() as i32)
}

fn has_ended(server: &mut Child) -> bool {
    server.try_wait().expect("a child can be waited for").is_some()
}

/// Waits until a daemon has aborted, as at a failpoint.
#[track_caller]
pub(crate) fn aborted(server: &mut Child, name: &str) {
    let mut ended = None;
    eventually(&format!("{name} has aborted"), || {
        ended = server.try_wait().expect("a child can be waited for");
        ended.is_some()
    });
    let signal = ended.and_then(|status| status.signal());
    assert_eq!(signal, Some(Signal::ABORT.as_raw()), "{name} did not abort: {ended:?}");
}

fn end_tasks_below(root: &Path) {
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        if let Ok(mut kill) = File::options().write(true).open(entry.path().join("cgroup.kill")) {
            let _ = kill.write_all(b"1");
        }
    }
}
