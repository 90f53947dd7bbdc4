//! A broker process with a directory of its own.

use std::{
    cell::RefCell,
    io::{BufRead, BufReader},
    os::unix::{fs::PermissionsExt, process::ExitStatusExt},
    path::PathBuf,
    process::{Child, Command, ExitStatus, Output, Stdio},
    sync::mpsc::{Receiver, channel},
    time::Duration,
};

use hyper_util::rt::TokioIo;
use rustix::process::{Pid, Signal};
use shaper_proto::v1::broker_client::BrokerClient;
use tonic::transport::{Channel, Endpoint};

/// How long anything may take before the test fails. Nothing waits this long when all is well.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// nobody.
pub(crate) const NOBODY: u32 = 65_534;

pub(crate) struct Broker {
    directory: tempfile::TempDir,
    arguments: Vec<String>,
    child: Option<Child>,
    /// What it says on its standard error, line by line …
    lines: Receiver<String>,
    /// … and what of that was looked at, since its start.
    said: RefCell<String>,
}

impl Broker {
    /// A broker that listens.
    pub(crate) fn start() -> Broker {
        Broker::start_with(&[])
    }

    /// A broker that listens, with variables in its environment.
    pub(crate) fn start_with(environment: &[(&str, &str)]) -> Broker {
        Broker::start_as(&[], environment)
    }

    /// A broker that listens, with options of its own.
    pub(crate) fn start_as(arguments: &[&str], environment: &[(&str, &str)]) -> Broker {
        let mut broker = Broker::of(arguments);
        broker.start_again(environment);
        broker
    }

    /// Starts on what an earlier process left.
    pub(crate) fn start_again(&mut self, environment: &[(&str, &str)]) {
        let mut child =
            self.command().envs(environment.iter().copied()).stderr(Stdio::piped()).spawn().unwrap();
        self.lines = forward(&mut child);
        self.said.take();
        self.child = Some(child);
        self.wait_to_say(" ready ");
    }

    /// Returns once it has said this since its start.
    pub(crate) fn wait_to_say(&self, text: &str) {
        let mut said = self.said.borrow_mut();
        while !said.contains(text) {
            let line = self.lines.recv_timeout(PATIENCE);
            let Ok(line) = line else { panic!("the broker does not say {text:?}:\n{said}") };
            said.push_str(&line);
        }
    }

    /// What `shaper-broker store …` comes to, with the options of this broker.
    pub(crate) fn store(&self, arguments: &[&str], environment: &[(&str, &str)]) -> Output {
        let mut command = self.command();
        command.arg("store").args(arguments).envs(environment.iter().copied()).stdin(Stdio::null());
        command.output().unwrap()
    }

    /// Its process.
    pub(crate) fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    /// Its state directory.
    pub(crate) fn state_dir(&self) -> PathBuf {
        self.directory.path().join("state")
    }

    /// A broker that has not been started yet.
    pub(crate) fn of(arguments: &[&str]) -> Broker {
        let directory = tempfile::tempdir().unwrap();
        // Other users must be able to get to the socket.
        std::fs::set_permissions(directory.path(), PermissionsExt::from_mode(0o755)).unwrap();
        let arguments = arguments.iter().map(|&argument| argument.to_owned()).collect();
        Broker { directory, arguments, child: None, lines: channel().1, said: RefCell::default() }
    }

    /// The command line of this broker.
    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_shaper-broker"));
        command.arg("--listen").arg(self.socket()).arg("--state-dir").arg(self.state_dir());
        command.arg("--socket-group").arg(NOBODY.to_string()).args(&self.arguments);
        command.env("RUST_LOG", "info").env("NO_COLOR", "1").env_remove("SHAPER_FAILPOINT");
        command
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("broker.sock")
    }

    /// kill -9.
    pub(crate) fn kill(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(9));
    }

    /// SIGTERM, and how it ends.
    pub(crate) fn terminate(&mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        self.wait()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let child = self.child.as_ref().unwrap();
        rustix::process::kill_process(Pid::from_child(child), signal).unwrap();
    }

    /// How it ends by itself.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        self.child.take().unwrap().wait().unwrap()
    }

    /// kill -9, unless it has ended by itself: the signal that ended it.
    #[cfg(feature = "failpoints")]
    pub(crate) fn end_signal(&mut self) -> Option<i32> {
        let mut child = self.child.take().unwrap();
        // It may be gone already.
        let _ = child.kill();
        child.wait().unwrap().signal()
    }

    pub(crate) async fn channel(&self) -> Channel {
        connect(self.socket()).await
    }

    pub(crate) async fn client(&self) -> BrokerClient<Channel> {
        BrokerClient::new(self.channel().await)
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Shows what the broker says, and passes it on.
fn forward(child: &mut Child) -> Receiver<String> {
    let stderr = child.stderr.take().unwrap();
    let (sender, lines) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stderr).lines().map_while(Result::ok) {
            eprintln!("broker: {line}");
            // Nobody listens once the test is over.
            let _ = sender.send(format!("{line} \n"));
        }
    });
    lines
}

pub(crate) async fn connect(socket: PathBuf) -> Channel {
    let connector = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { tokio::net::UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    Endpoint::from_static("http://shaper-broker").connect_with_connector(connector).await.unwrap()
}
