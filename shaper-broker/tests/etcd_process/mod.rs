//! etcd for tests: real processes on ports of loopback, with their data in a temporary folder.
#![allow(dead_code, reason = "several tests have it, none of which uses all of it")]

use std::{
    env,
    fs::File,
    net::{TcpListener, TcpStream},
    path::PathBuf,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

/// A cluster of its own. It ends with this.
pub(crate) struct Cluster {
    members: Vec<Member>,
    directory: tempfile::TempDir,
}

struct Member {
    child: Child,
    client: u16,
}

impl Cluster {
    /// With this many members.
    pub(crate) fn start(members: usize) -> Cluster {
        let directory = tempfile::tempdir().expect("a directory can be made");
        let ports = free_ports(2 * members);
        let (clients, peers) = ports.split_at(members);
        let peer = |number: usize| format!("http://127.0.0.1:{}", peers[number]);
        let names: Vec<_> = (0..members).map(|number| format!("m{number}={}", peer(number))).collect();
        let start = |number: usize| {
            let client = format!("http://127.0.0.1:{}", clients[number]);
            let log =
                File::create(directory.path().join(format!("m{number}.log"))).expect("a log can be made");
            let mut command = Command::new(program());
            command.arg("--data-dir").arg(directory.path().join(format!("m{number}")));
            command.args(["--name", &format!("m{number}"), "--initial-cluster", &names.join(",")]);
            command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
            command.args([
                "--listen-peer-urls",
                &peer(number),
                "--initial-advertise-peer-urls",
                &peer(number),
            ]);
            command
                .stdin(Stdio::null())
                .stdout(log.try_clone().expect("a descriptor can be copied"))
                .stderr(log);
            Member { child: command.spawn().expect("etcd can be started"), client: clients[number] }
        };
        let mut cluster = Cluster { members: (0..members).map(start).collect(), directory };
        cluster.wait();
        cluster
    }

    /// Until each takes connections; what is asked before there is a leader waits for one.
    fn wait(&mut self) {
        let until = Instant::now() + Duration::from_secs(30);
        for (number, member) in self.members.iter_mut().enumerate() {
            while TcpStream::connect(("127.0.0.1", member.client)).is_err() {
                let log = || std::fs::read_to_string(self.directory.path().join(format!("m{number}.log")));
                let ended = member.child.try_wait().expect("it is our child");
                assert!(ended.is_none(), "etcd ended: {ended:?}: {}", log().unwrap_or_default());
                assert!(Instant::now() < until, "etcd takes no connection: {}", log().unwrap_or_default());
                thread::sleep(Duration::from_millis(20));
            }
        }
    }

    /// The port of each member.
    pub(crate) fn ports(&self) -> Vec<u16> {
        self.members.iter().map(|member| member.client).collect()
    }

    /// What each is called by clients.
    pub(crate) fn endpoints(&self) -> Vec<String> {
        self.ports().iter().map(|port| format!("http://127.0.0.1:{port}")).collect()
    }

    /// SIGKILL.
    pub(crate) fn kill(&mut self, member: usize) {
        let child = &mut self.members[member].child;
        child.kill().expect("it is our child");
        child.wait().expect("it is our child");
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for member in &mut self.members {
            // It may have been killed by the test.
            let _ = member.child.kill();
            let _ = member.child.wait();
        }
    }
}

/// Held all at once, so that they differ, and then let go.
fn free_ports(count: usize) -> Vec<u16> {
    let held: Vec<_> = (0..count).map(|_| TcpListener::bind("127.0.0.1:0").expect("a free port")).collect();
    held.iter().map(|listener| listener.local_addr().expect("it is bound").port()).collect()
}

/// On PATH, or where `cargo xtask setup` puts it.
fn program() -> PathBuf {
    let path = env::var_os("PATH").unwrap_or_default();
    let tests = env::current_exe().expect("it runs");
    let built = tests.ancestors().map(|folder| folder.join("tools/bin"));
    let found =
        env::split_paths(&path).chain(built).map(|folder| folder.join("etcd")).find(|file| file.is_file());
    found.expect("there is no etcd here: run `./x setup`, or install what Debian calls etcd-server")
}
