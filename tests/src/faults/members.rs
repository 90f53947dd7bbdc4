//! The members of an etcd cluster, each a process in a network namespace of its own.

use std::{
    fs::{self, OpenOptions},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
};

use rustix::process::Signal;

use super::switch::{Lan, Plug, Switch};
use crate::{bins::etcd, net::Netns, process::Process, time::eventually};

/// How many.
pub(super) const MEMBERS: usize = 3;
/// The address of the first.
const FIRST: u8 = 11;
const CLIENTS: u16 = 2379;
const PEERS: u16 = 2380;

/// One of them.
pub(super) struct Member {
    number: usize,
    pub(super) netns: Netns,
    pub(super) plug: Plug,
    directory: PathBuf,
    child: Mutex<Option<Child>>,
}

fn address(number: usize) -> String {
    Lan::Etcd.address(FIRST + number as u8)
}

fn client_url(number: usize) -> String {
    format!("http://{}:{CLIENTS}", address(number))
}

fn peer_url(number: usize) -> String {
    format!("http://{}:{PEERS}", address(number))
}

/// What brokers are told.
pub(super) fn endpoints() -> String {
    (0..MEMBERS).map(client_url).collect::<Vec<_>>().join(",")
}

/// Starts all of them, and returns when each is ready.
pub(super) fn start(switch: &Switch, directory: &Path) -> Vec<Member> {
    let members: Vec<Member> = (0..MEMBERS)
        .map(|number| {
            let netns = Netns::new();
            let plug = switch.connect(&netns, &format!("e{number}"), Lan::Etcd, FIRST + number as u8);
            let directory = directory.join(format!("e{number}"));
            fs::create_dir(&directory).expect("a directory can be made");
            let member = Member { number, netns, plug, directory, child: Mutex::default() };
            member.start();
            member
        })
        .collect();
    for member in &members {
        eventually("a member of etcd is ready", || member.said().contains("ready to serve client requests"));
    }
    members
}

impl Member {
    /// Starts it, with whatever data it has.
    pub(super) fn start(&self) {
        let name = |number: usize| format!("m{number}");
        let cluster: Vec<_> =
            (0..MEMBERS).map(|number| format!("{}={}", name(number), peer_url(number))).collect();
        let (client, peer) = (client_url(self.number), peer_url(self.number));
        let log = OpenOptions::new().create(true).append(true).open(self.log());
        let mut command = Command::new(etcd());
        command.arg("--data-dir").arg(self.directory.join("data")).args(["--name", &name(self.number)]);
        command.args(["--initial-cluster", &cluster.join(",")]);
        command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
        command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(log.expect("a file can be made"));
        let child = self.netns.within(|| command.spawn()).expect("etcd can be started");
        *self.lock() = Some(child);
    }

    fn lock(&self) -> MutexGuard<'_, Option<Child>> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// SIGKILL.
    pub(super) fn kill(&self) {
        if let Some(mut child) = self.lock().take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// One that has been killed is fine.
    pub(super) fn signal(&self, signal: Signal) {
        if let Some(child) = &*self.lock() {
            Process::open(child.id()).signal(signal);
        }
    }

    fn log(&self) -> PathBuf {
        self.directory.join("log")
    }

    pub(super) fn said(&self) -> String {
        fs::read_to_string(self.log()).unwrap_or_default()
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.kill();
    }
}
