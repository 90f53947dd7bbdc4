//! The real `shaper` command.

use std::{
    io::Write,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use shaper_core::{
    doctor::Report,
    ledger::Entry,
    snapshot::{NodeSnapshot, TaskSnapshot},
    task::{Enforcement, TaskStatus},
};

/// The command, as one user, for one agent or one broker.
#[derive(Clone, Debug)]
pub struct Shaper {
    binary: PathBuf,
    /// The variable that says whom to ask, and where that one listens.
    server: (&'static str, PathBuf),
    uid: u32,
}

/// How a command ended.
#[derive(Debug)]
pub struct Answer {
    /// Its exit code.
    pub code: i32,
    /// What it printed.
    pub stdout: String,
    /// What it remarked.
    pub stderr: String,
}

impl Answer {
    fn of(Output { status, stdout, stderr }: Output) -> Answer {
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Answer { code: status.code().unwrap_or(-1), stdout: text(stdout), stderr: text(stderr) }
    }
}

/// The code of a refusal: nothing was changed.
pub const REFUSED: i32 = 2;

impl Shaper {
    /// The command at `binary` for the agent at `socket`, as that user.
    pub fn new(binary: &Path, socket: &Path, uid: u32) -> Shaper {
        Shaper { binary: binary.to_owned(), server: ("SHAPER_SOCKET", socket.to_owned()), uid }
    }

    /// The same for a broker.
    pub fn of_broker(binary: &Path, socket: &Path, uid: u32) -> Shaper {
        Shaper { binary: binary.to_owned(), server: ("SHAPER_BROKER", socket.to_owned()), uid }
    }

    /// The command with these arguments, to be started.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.binary);
        command.args(arguments).env_remove("SHAPER_SOCKET").env_remove("SHAPER_BROKER");
        command.env(self.server.0, &self.server.1).current_dir("/");
        if self.uid != 0 {
            command.uid(self.uid).gid(self.uid);
        }
        command
    }

    /// Runs it to its end.
    pub fn call(&self, arguments: &[&str]) -> Answer {
        let output = self.command(arguments).output();
        Answer::of(output.unwrap_or_else(|error| panic!("{}: {error}", self.binary.display())))
    }

    /// Runs it, and returns what it prints; it must succeed.
    #[track_caller]
    pub fn ok(&self, arguments: &[&str]) -> String {
        let Answer { code, stdout, stderr } = self.call(arguments);
        assert_eq!(code, 0, "shaper {arguments:?}: {stderr}");
        stdout
    }

    /// Runs it, and returns what it says; it must be refused.
    #[track_caller]
    pub fn refused(&self, arguments: &[&str]) -> String {
        let Answer { code, stdout, stderr } = self.call(arguments);
        assert_eq!(code, REFUSED, "shaper {arguments:?} printed {stdout:?} and said {stderr:?}");
        stderr
    }

    /// Starts a task in the background.
    #[track_caller]
    pub fn start(&self, id: &str, options: &[&str], command: &[&str]) -> TaskStatus {
        let run = ["run", "--detach", "--output", "json", "--id", id];
        let arguments = [&run[..], options, &["--"], command].concat();
        parse(&self.ok(&arguments))
    }

    /// Runs it with `input` as its standard input.
    pub fn call_with(&self, arguments: &[&str], input: &[u8]) -> Answer {
        let mut command = self.command(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn();
        let mut child = child.unwrap_or_else(|error| panic!("{}: {error}", self.binary.display()));
        let mut stdin = child.stdin.take().expect("it is piped");
        // It need not read all of it.
        let _ = stdin.write_all(input);
        drop(stdin);
        Answer::of(child.wait_with_output().expect("a child can be waited for"))
    }

    /// Every task that this user sees.
    #[track_caller]
    pub fn tasks(&self) -> Vec<TaskStatus> {
        parse(&self.ok(&["get", "tasks", "--output", "json"]))
    }

    /// One task.
    #[track_caller]
    pub fn get(&self, id: &str) -> TaskStatus {
        let tasks: Vec<TaskStatus> = parse(&self.ok(&["get", "tasks", id, "--output", "json"]));
        tasks.into_iter().next().expect("one task was asked for")
    }

    /// Changes limits.
    #[track_caller]
    pub fn set(&self, id: &str, limits: &[&str]) -> TaskStatus {
        parse(&self.ok(&[&["set", id, "--output", "json"], limits].concat()))
    }

    /// Waits for the end of a task; its exit code.
    pub fn wait(&self, id: &str) -> i32 {
        self.call(&["wait", id]).code
    }

    /// What the node and its tasks use.
    #[track_caller]
    pub fn top(&self) -> NodeSnapshot {
        parse(&self.ok(&["top", "--once", "--output", "json"]))
    }

    /// What one task uses.
    #[track_caller]
    pub fn usage_of(&self, id: &str) -> TaskSnapshot {
        let tasks = self.top().tasks;
        let found = tasks.into_iter().find(|task| task.task_id.as_str() == id);
        found.unwrap_or_else(|| panic!("{id} is not in the snapshot"))
    }

    /// What was done to a task.
    #[track_caller]
    pub fn ledger(&self, id: &str) -> Vec<Entry> {
        parse(&self.ok(&["ledger", id, "--output", "json"]))
    }

    /// What the node offers.
    #[track_caller]
    pub fn doctor(&self) -> Report {
        parse(&self.ok(&["doctor", "--output", "json"]))
    }
}

#[track_caller]
pub(crate) fn parse<T: for<'a> serde::Deserialize<'a>>(json: &str) -> T {
    serde_json::from_str(json).unwrap_or_else(|error| panic!("{error} in what shaper printed: {json}"))
}

/// What holds one resource of a task, as read back: mechanism and value.
#[track_caller]
pub fn in_force<'a>(task: &'a TaskStatus, resource: &str) -> (&'a str, &'a str) {
    let found = task.enforcement.iter().find(|enforcement| enforcement.resource == resource);
    let Enforcement { mechanism, in_force, .. } =
        found.unwrap_or_else(|| panic!("nothing holds {resource}: {task:?}"));
    (mechanism, in_force)
}
