//! A machine on which a page's commands are executed: a shell in namespaces of its own, in cgroups of its own. Whatever it
//! starts is below these, and ends with it.

use std::{
    fs::{self, Permissions},
    io::{BufRead, BufReader, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc::{self, Receiver, RecvTimeoutError},
    thread,
};

use shaper_agent::kernel::hierarchy::{Hierarchies, place_of};
use shaper_tests::{
    bins::{binary, bpf_object, etcd, fake_nvml},
    cards::FakeCards,
    cgroup::unique_name,
    time::{PATIENCE, happens},
};
use tempfile::TempDir;

use crate::page::root;

/// A shell, and all that it has started.
pub(crate) struct Machine {
    directory: TempDir,
    /// Where the outputs are; the shell's own directory has the page's files alone.
    outputs: TempDir,
    /// Its cgroup of v2, then those of v1.
    groups: Vec<PathBuf>,
    shell: Child,
    stdin: ChildStdin,
    answers: Receiver<String>,
    commands: u32,
    /// What it started last in the background.
    background: u32,
}

/// How a command ended.
#[derive(Debug)]
pub(crate) struct Ended {
    /// Its exit code.
    pub(crate) code: i32,
    /// What it printed, with its errors.
    pub(crate) printed: String,
}

/// What daemons say when they can be asked, ours and those that stages have.
const READY: [&str; 10] = [
    " ready",
    "standing by",
    "listening for those who want a certificate",
    "ready to serve client requests",
    "listening on 127.0.0.1:443", // a registry
    "containerd successfully booted",
    "Server listening on", // sshd
    "Forwarding from",     // kubectl port-forward
    "Scheduler at:",       // of Dask
    "Registered to:",      // a worker of Dask
];
const IN_SESSION: &str = "in session with the broker";

impl Machine {
    /// One on which nothing runs.
    pub(crate) fn start() -> Machine {
        let directory = || tempfile::Builder::new().prefix("shaper-docs-").tempdir();
        let (directory, outputs) =
            (directory().expect("it can be made"), directory().expect("it can be made"));
        // Tasks of any user find what is in it.
        fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).expect("it is ours");
        fs::write(directory.path().join(".cards"), FakeCards::line(2).join("\n")).expect("it is ours");
        let hierarchies = Hierarchies::detect().expect("/proc is mounted").expect("cgroup v2 is mounted");
        let groups = make_groups(&hierarchies);

        let enter = "for group in \"$@\"; do echo $$ > \"$group/cgroup.procs\" || exit; done
                     exec unshare --mount --uts --net --cgroup bash --noprofile --norc";
        let mut command = Command::new("/bin/sh");
        command.args(["-c", enter, "sh"]).args(&groups).stdin(Stdio::piped()).stdout(Stdio::piped());
        for name in ["SHAPER_SOCKET", "SHAPER_BROKER", "SHAPER_TLS_DIR", "SHAPER_BPF_OBJECT", "RUST_LOG"] {
            command.env_remove(name);
        }
        let v1: Vec<&str> = hierarchies.v1.iter().map(|(controller, _)| controller.as_str()).collect();
        let bin_dir = binary("shaper");
        command.env("BIN_DIR", bin_dir.parent().expect("a file is in a directory")).env("V1", v1.join(" "));
        command.env("DIRECTORY", directory.path()).env("BPF_OBJECT", bpf_object()).env("NVML", fake_nvml());
        command.env("ETCD", etcd()).env("REPOSITORY", root());
        let mut shell = command.spawn().expect("a shell can be started");

        let stdin = shell.stdin.take().expect("it is piped");
        let stdout = BufReader::new(shell.stdout.take().expect("it is piped"));
        let (sender, answers) = mpsc::channel();
        thread::spawn(move || {
            let lines = stdout.lines().map_while(Result::ok);
            lines.map(|line| sender.send(line)).take_while(Result::is_ok).for_each(drop);
        });
        let mut machine =
            Machine { directory, outputs, groups, shell, stdin, answers, commands: 0, background: 0 };
        let made = machine.run(include_str!("machine.sh"));
        assert_eq!(made.code, 0, "the machine cannot be made: {}", made.printed);
        machine
    }

    /// The directory in which its commands are executed.
    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Executes a command to its end, or until it is in the background.
    pub(crate) fn run(&mut self, command: &str) -> Ended {
        let output = self.begin(command);
        let code = self.wait_for_answer(command, &output);
        Ended { code, printed: fs::read_to_string(&output).unwrap_or_default() }
    }

    /// Starts a daemon in the background, and waits until it can be asked.
    pub(crate) fn start_daemon(&mut self, command: &str) {
        let output = self.begin(command);
        self.wait_for_answer(command, &output);
        wait_until_ready(self.background, command, &output);
    }

    /// Executes a command at a terminal until it has shown `text`, and ends it.
    pub(crate) fn run_until(&mut self, command: &str, text: &str) {
        let screen = self.outputs.path().join(format!("{}.screen", self.commands));
        // A terminal has a size.
        let at_terminal = format!("stty cols 160 rows 40; exec {command}");
        let quoted = at_terminal.replace('\'', r"'\''");
        let output = self.begin(&format!(
            "script --quiet --flush --return --command '{quoted}' {} < /dev/null > /dev/null &",
            screen.display()
        ));
        self.wait_for_answer(command, &output);
        let shown = || fs::read(&screen).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        let seen = happens(|| shown().is_ok_and(|shown| shown.contains(text)));
        assert!(
            seen,
            "`{command}` has not shown {text:?} within {PATIENCE:?}:\n{}",
            shown().unwrap_or_default()
        );
        let terminal = self.background;
        // By a signal: its code says no more than that.
        self.run(&format!("kill {terminal}; wait {terminal}"));
    }

    /// Has the shell begin with a command; returns the file with what it prints.
    fn begin(&mut self, command: &str) -> PathBuf {
        self.commands += 1;
        let file = |kind: &str| self.outputs.path().join(format!("{}.{kind}", self.commands));
        let (script, output) = (file("sh"), file("out"));
        fs::write(&script, command).expect("the directory is ours");
        let line = format!(
            ". {} < /dev/null > {} 2>&1; echo \"$? ${{!:-0}}\"\n",
            script.display(),
            output.display()
        );
        let sent = self.stdin.write_all(line.as_bytes()).and_then(|()| self.stdin.flush());
        sent.unwrap_or_else(|error| panic!("the shell has ended before `{command}`: {error}"));
        output
    }

    fn wait_for_answer(&mut self, command: &str, output: &Path) -> i32 {
        let printed = || fs::read_to_string(output).unwrap_or_default();
        let answer = match self.answers.recv_timeout(PATIENCE) {
            Ok(answer) => answer,
            Err(RecvTimeoutError::Timeout) => {
                panic!("`{command}` has not ended within {PATIENCE:?}:\n{}", printed())
            }
            Err(RecvTimeoutError::Disconnected) => panic!("`{command}` has ended the shell:\n{}", printed()),
        };
        let mut numbers = answer.split(' ').map(|number| number.parse().ok());
        match (numbers.next().flatten(), numbers.next().flatten()) {
            (Some(code), Some(background)) => {
                self.background = u32::try_from(background).unwrap_or_default();
                code
            }
            _ => panic!("the shell answers {answer:?} to `{command}`"),
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if thread::panicking() {
            let mut outputs: Vec<_> =
                fs::read_dir(self.directory()).into_iter().flatten().flatten().collect();
            outputs.retain(|entry| entry.path().extension().is_some_and(|extension| extension == "log"));
            for log in outputs {
                let text = fs::read_to_string(log.path()).unwrap_or_default();
                eprintln!("--- {}:\n{text}---", log.path().display());
            }
        }
        // All that it started is below its cgroup.
        let _ = fs::write(self.groups[0].join("cgroup.kill"), "1");
        let _ = self.shell.wait();
        for group in &self.groups {
            // What was killed is gone soon, but not at once; a group that stays is seen by its name.
            happens(|| remove(group).is_ok());
        }
    }
}

/// A cgroup of v2, and one of each v1 controller that is used; the first is that of v2.
fn make_groups(hierarchies: &Hierarchies) -> Vec<PathBuf> {
    let name = unique_name();
    if hierarchies.v1.is_empty() {
        for controller in ["+cpu", "+memory", "+io"] {
            // One that is not there is missed by the agent, which says so.
            let _ = fs::write(hierarchies.v2.join("cgroup.subtree_control"), controller);
        }
    }
    let of_v1 = hierarchies.v1.iter().map(|(controller, mount)| {
        mount
            .join(place_of("self", Some(controller)).expect("this process is in every hierarchy"))
            .join(&name)
    });
    let groups: Vec<PathBuf> = std::iter::once(hierarchies.v2.join(&name)).chain(of_v1).collect();
    for group in &groups {
        fs::create_dir(group).unwrap_or_else(|error| panic!("{}: {error}", group.display()));
    }
    groups
}

/// Waits until a daemon says that it can be asked; an agent of a broker's, that it is in session.
fn wait_until_ready(pid: u32, command: &str, output: &Path) {
    // Wherever its errors go.
    let said = || fs::read_to_string(format!("/proc/{pid}/fd/2"));
    let arguments = || fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let mut last = String::new();
    let ready = happens(|| {
        match said() {
            Ok(said) => last = said,
            // It has ended.
            Err(_) => return true,
        }
        let in_session = !arguments().contains("shaper-agent") || !arguments().contains("\0--broker\0");
        READY.iter().any(|ready| last.contains(ready)) && (in_session || last.contains(IN_SESSION))
    });
    let printed = || fs::read_to_string(output).unwrap_or_default();
    assert!(ready && said().is_ok(), "`{command}` is not ready:\n{last}\n{}", printed());
}

/// Removes a cgroup with those below it.
fn remove(group: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            remove(&entry.path())?;
        }
    }
    fs::remove_dir(group)
}
