//! etcd for tests: real processes on ports of loopback, with their data in a temporary folder.
#![allow(dead_code, reason = "several tests have it, none of which uses all of it")]

use std::{
    env,
    io::{self, BufRead, BufReader},
    net::TcpListener,
    path::PathBuf,
    process::{Child, Command, Stdio},
    thread,
};

/// A cluster of its own. It ends with this.
pub(crate) struct Cluster {
    members: Vec<Member>,
    _directory: tempfile::TempDir,
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
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
            Member { child: command.spawn().expect("etcd can be started"), client: clients[number] }
        };
        let mut cluster = Cluster { members: (0..members).map(start).collect(), _directory: directory };
        cluster.wait();
        cluster
    }

    /// Until each says that it is ready.
    fn wait(&mut self) {
        for member in &mut self.members {
            let mut log = BufReader::new(member.child.stderr.take().expect("it is piped"));
            let mut said = String::new();
            loop {
                let before = said.len();
                let read = log.read_line(&mut said).expect("etcd says text");
                assert!(read > 0, "etcd ended:\n{said}");
                if said[before..].contains("ready to serve client requests") {
                    break;
                }
            }
            // It stands still once nobody reads what it says. Its end ends this.
            thread::spawn(move || io::copy(&mut log, &mut io::sink()));
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
