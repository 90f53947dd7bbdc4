//! Processes that put themselves into a task: `shaper exec`.

use std::{
    fs,
    io::Read,
    os::unix::net::UnixStream as StdUnixStream,
    path::Path,
    process::{Child, Command, Stdio},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use hyper_util::rt::TokioIo;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use shaper_core::task::{ExitStatus, Origin, Phase, TaskStatus};
use shaper_proto::v1::{self, agent_client::AgentClient};
use shaper_tests::{
    NOBODY,
    agent::{Agent, Options},
    assert_close,
    cgroup::{controller_group, cpu_time, memory_is_v1},
    kernel_is_at_least,
    leftovers::Leftovers,
    process::{Process, spawn_as},
    shaper::{Shaper, in_force},
    time::{Window, eventually},
};
use tokio::{net::UnixStream, runtime};
use tonic::{
    Code, Status,
    transport::{Channel, Endpoint},
};

const SECOND: Duration = Duration::from_secs(1);

/// `shaper exec`, as a child of this process, which a test ends.
struct Entered {
    child: Child,
}

impl Entered {
    /// Starts it, and waits until the task is there and its command is executed.
    #[track_caller]
    fn start(shaper: &Shaper, id: &str, options: &[&str], command: &[&str]) -> Entered {
        let entered = Entered::spawn(shaper, id, options, command);
        entered.wait_until_executed(command[0]);
        assert_eq!(shaper.get(id).pid, Some(entered.pid()));
        entered
    }

    fn spawn(shaper: &Shaper, id: &str, options: &[&str], command: &[&str]) -> Entered {
        let arguments = [&["exec", "--id", id], options, &["--"], command].concat();
        let child = shaper.command(&arguments).stdin(Stdio::null()).spawn();
        Entered { child: child.expect("shaper can be started") }
    }

    #[track_caller]
    fn wait_until_executed(&self, program: &str) {
        eventually("the command is executed", || {
            let line = fs::read(format!("/proc/{}/cmdline", self.pid())).unwrap_or_default();
            line.split(|byte| *byte == 0).next() == Some(program.as_bytes())
        });
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }

    fn kill(&mut self) {
        self.child.kill().and_then(|()| self.child.wait()).expect("it is a child of this process");
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// How a task ended that nobody supervised.
#[track_caller]
fn assert_ended(agent: &Agent, id: &str, expected: ExitStatus) {
    eventually("the task has ended", || agent.shaper().get(id).phase != Phase::Running);
    let Phase::Ended { status, .. } = agent.shaper().get(id).phase else { panic!("it has ended") };
    if kernel_is_at_least(6, 15) {
        assert_eq!(status, expected);
    } else {
        assert_eq!(status, ExitStatus::Unknown);
    }
}

fn v2_of(pid: u32) -> String {
    let places = Process::open(pid).cgroups();
    places.lines().find_map(|line| line.strip_prefix("0::").map(str::to_owned)).expect("cgroup v2 is mounted")
}

#[test]
fn a_process_becomes_a_task_and_stays_who_it_is() {
    let agent = Agent::start();
    let shaper = agent.shaper();
    let load = agent.load();
    let options = [
        "--cpu",
        "0.3",
        "--memory",
        "64Mi",
        "--name",
        "etl.load",
        "--namespace",
        "ml",
        "--label",
        "framework=ray",
    ];
    let mut hog = Entered::start(&shaper, "hog", &options, &[&load, "spin"]);
    agent.outweigh_others(hog.pid());

    let task = shaper.get("hog");
    assert_eq!(task.origin, Origin::Entered { command: vec![load, "spin".into()] });
    assert!(task.cgroup.ends_with(&v2_of(hog.pid())), "{task:?}");
    assert_eq!(Process::open(hog.pid()).parent().pid(), std::process::id());
    assert_eq!(in_force(&task, "cpu").1, "0.3 cores");
    agent.assert_cores("hog", 0.3, 3 * SECOND);
    let usage = shaper.usage_of("hog");
    let workload = usage.workload.expect("it was said");
    assert_eq!((workload.name.as_str(), workload.namespace.as_str()), ("etl.load", "ml"));
    assert_eq!(workload.labels["framework"], "ray");
    assert!(shaper.refused(&["logs", "hog"]).contains("shaper does not have its output"));
    assert!(shaper.ok(&["describe", "hog"]).contains("ml/etl.load, framework=ray"));

    let groups = ["cpu", "memory"].map(|controller| controller_group(hog.pid(), controller).0);
    assert!(groups.iter().all(|group| group.is_dir()), "{groups:?}");
    hog.kill();
    assert_ended(&agent, "hog", ExitStatus::Signal(9));
    eventually("its cgroups are removed", || {
        !Path::new(&task.cgroup).exists() && groups.iter().all(|group| !group.exists())
    });
    let leftovers = Leftovers::of(&agent, None);
    shaper.ok(&["release", "--all"]);
    leftovers.assert_none();
}

#[test]
fn memory_is_limited_and_nothing_of_the_command_line_tool_is_left_in_the_process() {
    let agent = Agent::start();
    let limited = ["exec", "--memory", "48Mi", "--"];
    let eat = agent.load();
    let mut child =
        agent.shaper().command(&[&limited[..], &[eat.as_str(), "eat", "256"]].concat()).spawn().unwrap();
    let status = child.wait().unwrap();
    assert!(!status.success(), "it took 256 MiB with a limit of 48: {status}");

    // What this test was started with is open in all that it starts; nothing is added to that.
    let script = "ls /proc/$$/fd; grep TracerPid /proc/$$/status";
    let plain = Command::new("/bin/sh").args(["-c", script]).stdin(Stdio::null()).output().unwrap();
    let said = agent.shaper().ok(&["exec", "--", "/bin/sh", "-c", script]);
    assert_eq!(said, String::from_utf8(plain.stdout).unwrap());
    // SIGPIPE, which the tool ignores, ends what is executed.
    let said = agent.shaper().ok(&["exec", "--", "/bin/grep", "SigIgn", "/proc/self/status"]);
    let ignored = said.split_ascii_whitespace().nth(1).and_then(|mask| u64::from_str_radix(mask, 16).ok());
    assert_eq!(ignored.map(|mask| mask & 1 << (libc::SIGPIPE - 1)), Some(0), "{said}");
}

#[test]
fn the_task_ends_with_the_last_of_its_processes() {
    let agent = Agent::start();
    let left = agent.directory().join("left");
    let script = format!("sleep 600 > /dev/null 2>&1 & echo $! > {}; exit 3", left.display());
    let answer = agent.shaper().call(&["exec", "--id", "parent", "--", "/bin/sh", "-c", &script]);
    assert_eq!(answer.code, 3, "{}", answer.stderr);
    let sleep = Process::open(fs::read_to_string(&left).unwrap().trim().parse().unwrap());
    assert_eq!(agent.shaper().get("parent").phase, Phase::Running);
    assert!(agent.shaper().get("parent").cgroup.ends_with(&v2_of(sleep.pid())));
    sleep.kill();
    assert_ended(&agent, "parent", ExitStatus::Code(3));
    // The name is free again, and the command may be cancelled.
    let mut next = Entered::start(&agent.shaper(), "parent", &[], &["/bin/sleep", "600"]);
    agent.shaper().ok(&["cancel", "parent"]);
    next.child.wait().unwrap();
    eventually("it has ended", || agent.shaper().get("parent").phase != Phase::Running);
    let Phase::Ended { status, .. } = agent.shaper().get("parent").phase else { panic!("it has ended") };
    // The kernel tells once its parent has taken it, which may be later than the agent asks.
    assert!(matches!(status, ExitStatus::Signal(15) | ExitStatus::Unknown), "{status:?}");
}

#[test]
fn the_limit_holds_without_an_agent_and_the_next_one_has_the_task() {
    let mut agent = Agent::start();
    let load = agent.load();
    let mut hog = Entered::start(&agent.shaper(), "hog", &["--cpu", "0.3"], &[&load, "spin"]);
    let mut brief = Entered::start(&agent.shaper(), "brief", &[], &["/bin/sleep", "600"]);
    let task = agent.shaper().get("hog");
    agent.kill9();
    let before = cpu_time(&task.cgroup);
    let dead = Window::pass(2 * SECOND);
    let cores = (cpu_time(&task.cgroup) - before).as_secs_f64() / dead.seconds();
    assert!(cores < 0.33, "{cores} cores while the agent is dead");
    brief.kill();

    agent.restart();
    assert_eq!(agent.shaper().get("hog").pid, Some(hog.pid()));
    eventually("an end while there was no agent is known", || {
        agent.shaper().get("brief").phase != Phase::Running
    });
    agent.outweigh_others(hog.pid());
    agent.shaper().set("hog", &["--cpu", "0.5"]);
    assert_close("cores after a change", agent.measure("hog", 2 * SECOND).cores, 0.5, 15.0);
    hog.kill();
    assert_ended(&agent, "hog", ExitStatus::Signal(9));
}

#[test]
fn a_process_that_enters_while_the_agent_is_killed_is_there_once() {
    for place in ["agent-after-record", "enter-before-move", "enter-after-move"] {
        let mut agent = Options::default().dies_at(place).start();
        let entering = Entered::spawn(&agent.shaper(), "job", &["--cpu", "0.3"], &["/bin/sleep", "600"]);
        agent.wait_for_abort();
        agent.restart();
        entering.wait_until_executed("/bin/sleep");
        let task = agent.shaper().get("job");
        assert_eq!((task.phase, task.pid), (Phase::Running, Some(entering.pid())), "{place}");
        assert!(task.cgroup.ends_with(&v2_of(entering.pid())), "{place}");
        drop(entering);
        eventually("it has ended", || agent.shaper().get("job").phase != Phase::Running);
    }
}

#[test]
fn who_is_in_a_task_does_not_leave_its_limits() {
    let agent = Agent::start();
    let nested = |outer: &[&str]| {
        let inner = [agent.directory().join("shaper").display().to_string(), "exec".into(), "--".into()];
        let inner: Vec<&str> = inner.iter().map(String::as_str).chain(["/bin/true"]).collect();
        agent.shaper().call(&[outer, &inner].concat())
    };
    let answer = nested(&["exec", "--id", "outer", "--cpu", "0.3", "--"]);
    assert_eq!(answer.code, 2, "{}", answer.stderr);
    assert!(answer.stderr.contains("this process is in task `outer` already"), "{}", answer.stderr);
    let socket = format!("SHAPER_SOCKET={}", agent.socket().display());
    let answer = nested(&["run", "--id", "run", "--user", "0", "--env", &socket, "--"]);
    assert!(
        answer.stderr.contains("runs no tasks as root") || answer.stderr.contains("already"),
        "{answer:?}"
    );
}

#[test]
fn nobody_enters_tasks_of_their_own_within_bounds() {
    let agent = Options::default()
        .with(&["--socket-group", &NOBODY.to_string(), "--max-tasks-per-user", "1"])
        .start();
    let nobody = agent.shaper_as(NOBODY);
    let mut mine = Entered::start(&nobody, "mine", &["--cpu", "0.5"], &["/bin/sleep", "600"]);
    let task: TaskStatus = nobody.get("mine");
    assert_eq!((task.owner.uid, task.runs_as.uid), (NOBODY, NOBODY));
    let more = nobody.refused(&["exec", "--", "/bin/true"]);
    assert!(more.contains("the most that one user may have"), "{more}");
    let refused = nobody.refused(&["set", "mine", "--cpu", "max"]);
    assert!(refused.contains("may not call /shaper.v1.Agent/SetLimits"), "{refused}");
    // Of root's tasks they may neither have the name nor learn more.
    let roots = Entered::start(&agent.shaper(), "roots", &[], &["/bin/sleep", "600"]);
    assert_eq!(nobody.tasks().len(), 1);
    mine.kill();
    eventually("it has ended", || nobody.get("mine").phase != Phase::Running);
    assert!(nobody.refused(&["exec", "--id", "roots", "--", "/bin/true"]).contains("exists already"));
    for bad in [&["--id", "../x"], &["--name", "a/b"], &["--label", "a b=c"]] {
        nobody.refused(&[&["exec"], &bad[..], &["--", "/bin/true"]].concat());
    }
    drop(roots);

    let strict =
        Options::default().with(&["--socket-group", &NOBODY.to_string(), "--allowed-uids", "1000-1999"]);
    let strict = strict.start();
    let refused = strict.shaper_as(NOBODY).refused(&["exec", "--", "/bin/true"]);
    assert!(refused.contains("--allowed-uids"), "{refused}");
}

/// What is said on one connection, whoever has made it.
async fn speak_on(stream: UnixStream) -> AgentClient<Channel> {
    let stream = Mutex::new(Some(stream));
    let connector = tower::service_fn(move |_| {
        let stream = stream.lock().unwrap_or_else(PoisonError::into_inner).take();
        async move { stream.map(TokioIo::new).ok_or_else(|| std::io::Error::other("it is over")) }
    });
    let endpoint = Endpoint::from_static("http://agent");
    AgentClient::new(endpoint.connect_with_connector(connector).await.expect("it is connected"))
}

#[test]
fn the_number_of_a_process_that_has_asked_and_ended_moves_no_other() {
    let agent = Agent::start();
    // A task, so that everything is there, and what is refused is refused for its reason.
    let _other = Entered::start(&agent.shaper(), "other", &[], &["/bin/sleep", "600"]);
    let ours = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
    let mut asks = Command::new(agent.load());
    let socket = agent.socket().display().to_string();
    asks.args(["connect", &socket]).stdin(Stdio::from(ours.try_clone().unwrap()));
    let mut asks = asks.spawn().unwrap();
    let pid = asks.id();
    let ours = StdUnixStream::from(ours);
    eventually("it has connected", || ours.peer_addr().is_ok());
    ours.set_nonblocking(true).unwrap();

    let runtime = runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut client = speak_on(UnixStream::from_std(ours).unwrap()).await;
        // The agent knows by this who has connected.
        client.list_tasks(v1::ListTasksRequest {}).await.unwrap();
        asks.kill().and_then(|()| asks.wait()).unwrap();
        let mut victim = spawn_as(pid, Command::new("/bin/sleep").arg("600"));
        let before = Process::open(pid).cgroups();
        let workload = v1::Workload { name: "trap".into(), ..Default::default() };
        let request = v1::EnterTaskRequest {
            task_id: "trap".into(),
            workload: Some(workload),
            limits: None,
            command: vec!["/bin/true".into()],
        };
        let refused: Status = client.enter_task(request).await.expect_err("who asked has ended");
        assert_ne!(refused.code(), Code::Unavailable, "{refused}");
        assert_eq!(Process::open(pid).cgroups(), before, "the victim was moved");
        victim.kill().and_then(|()| victim.wait()).unwrap();
    });
    let ids: Vec<String> = agent.shaper().tasks().into_iter().map(|task| task.task_id.to_string()).collect();
    assert_eq!(ids, ["other"]);
}

#[test]
fn a_process_in_a_container_is_refused() {
    let agent = Agent::start();
    let shaper = agent.shaper().command(&["exec", "--", "/bin/true"]);
    let mut contained = Command::new("unshare");
    contained.args(["--pid", "--fork"]).arg(shaper.get_program()).args(shaper.get_args());
    contained.env("SHAPER_SOCKET", agent.socket()).env_remove("SHAPER_BROKER").stderr(Stdio::piped());
    let mut child = contained.spawn().unwrap();
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    child.wait().unwrap();
    assert!(said.contains("this process is in a container"), "{said}");
    assert!(agent.shaper().tasks().is_empty() && (memory_is_v1() || !said.is_empty()));
}
