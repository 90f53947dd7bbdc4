//! A machine for tests: sockets, files, and the `shaper` command.

use std::{
    io::{BufRead, BufReader, Read},
    path::PathBuf,
    process::{Child, Command, Output, Stdio},
    sync::Arc,
};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::fake::{
    self, Node, Server,
    broker::{self, Cluster},
};

/// A node with sockets, and an agent and a broker while they are started.
pub(crate) struct Host {
    pub(crate) node: Arc<Node>,
    pub(crate) cluster: Arc<Cluster>,
    directory: TempDir,
}

impl Host {
    pub(crate) fn new() -> Host {
        Host { node: Node::new(), cluster: Cluster::new(), directory: TempDir::new().unwrap() }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("agent.sock")
    }

    pub(crate) fn start_agent(&self) -> Server {
        fake::start_agent(&self.node, &self.socket())
    }

    pub(crate) fn broker_socket(&self) -> PathBuf {
        self.directory.path().join("broker.sock")
    }

    /// From now on commands know of a broker.
    pub(crate) fn start_broker(&self) -> Server {
        broker::start(&self.cluster, &self.broker_socket())
    }

    /// A file with this in it.
    pub(crate) fn file(&self, name: &str, text: impl AsRef<[u8]>) -> String {
        let path = self.directory.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.into_os_string().into_string().unwrap()
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_shaper"));
        command
            .args(args)
            .env("SHAPER_SOCKET", self.socket())
            .env_remove("SHAPER_BROKER")
            .env_remove("SHAPER_CONTEXT")
            .env("XDG_CONFIG_HOME", self.directory.path())
            .stdin(Stdio::null());
        if self.broker_socket().exists() {
            command.env("SHAPER_BROKER", format!("unix:{}", self.broker_socket().display()));
        }
        command
    }

    pub(crate) fn shaper(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    pub(crate) fn spawn(&self, args: &[&str]) -> Running {
        let mut child = self.command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let stdout = BufReader::new(Box::new(child.stdout.take().unwrap()) as Box<dyn Read>);
        let stderr = BufReader::new(Box::new(child.stderr.take().unwrap()) as Box<dyn Read>);
        Running { child, stdout, stderr }
    }
}

/// A command that runs.
pub(crate) struct Running {
    child: Child,
    pub(crate) stdout: BufReader<Box<dyn Read>>,
    pub(crate) stderr: BufReader<Box<dyn Read>>,
}

impl Running {
    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// The rest of what it prints, and its exit code.
    pub(crate) fn end(mut self) -> (String, String, i32) {
        let (stdout, stderr) = (rest(&mut self.stdout), rest(&mut self.stderr));
        (stdout, stderr, self.child.wait().unwrap().code().unwrap())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // For a test that fails; otherwise it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn line(from: &mut impl BufRead) -> String {
    let mut line = String::new();
    from.read_line(&mut line).unwrap();
    line
}

pub(crate) fn rest(from: &mut impl Read) -> String {
    let mut text = String::new();
    from.read_to_string(&mut text).unwrap();
    text
}

pub(crate) fn texts(output: &Output) -> (&str, &str, Option<i32>) {
    let text = |bytes| std::str::from_utf8(bytes).unwrap();
    (text(&output.stdout), text(&output.stderr), output.status.code())
}
