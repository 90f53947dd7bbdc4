//! Network namespaces: two, with a cable between them.

use std::{
    fs::{self, File},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::AsFd,
    process::Command,
    thread,
};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::cgroup::unique_name;

/// A named network namespace.
pub struct Netns {
    name: String,
    file: File,
}

impl Netns {
    /// A new one, with its loopback up.
    pub fn new() -> Netns {
        let name = unique_name();
        ip(&["netns", "add", &name]);
        let file = File::open(format!("/run/netns/{name}"));
        let file = file.unwrap_or_else(|error| panic!("/run/netns/{name}: {error}"));
        let namespace = Netns { name, file };
        namespace.ip(&["link", "set", "lo", "up"]);
        namespace
    }

    /// Runs `action` inside, on a thread of its own; what it spawns stays inside.
    pub fn within<T: Send>(&self, action: impl FnOnce() -> T + Send) -> T {
        let enter_and_act = || {
            let entered = move_into_link_name_space(self.file.as_fd(), Some(LinkNameSpaceType::Network));
            entered.unwrap_or_else(|error| panic!("cannot enter the namespace {}: {error}", self.name));
            action()
        };
        match thread::scope(|scope| scope.spawn(enter_and_act).join()) {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    /// Runs `ip` on it.
    pub fn ip(&self, arguments: &[&str]) {
        ip(&[&["-n", self.name.as_str()], arguments].concat());
    }

    /// Lays a cable from a new device here to one of the other namespace.
    pub fn connect(&self, device: &str, other: &Netns, other_device: &str) {
        let peer = ["peer", "name", other_device, "netns", &other.name];
        self.ip(&[&["link", "add", device, "type", "veth"], &peer[..]].concat());
    }

    /// Bytes that have arrived at a device here, as the device counts them.
    pub fn received(&self, device: &str) -> u64 {
        let counts = self.within(|| fs::read_to_string("/proc/thread-self/net/dev"));
        let counts = counts.expect("every process has it");
        let found = counts.lines().find_map(|line| line.trim().strip_prefix(&format!("{device}:")));
        let bytes = found.and_then(|counts| counts.split_whitespace().next()?.parse().ok());
        bytes.unwrap_or_else(|| panic!("no device {device} in {counts}"))
    }

    /// What `tc` prints here.
    pub fn tc(&self, arguments: &[&str]) -> String {
        run(Command::new("tc").args(["-n", &self.name]).args(arguments))
    }
}

impl Default for Netns {
    fn default() -> Netns {
        Netns::new()
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "delete", &self.name]).status();
    }
}

/// Runs `action` inside `namespace`, or here where there is none.
pub(crate) fn within<T: Send>(namespace: Option<&Netns>, action: impl FnOnce() -> T + Send) -> T {
    match namespace {
        Some(namespace) => namespace.within(action),
        None => action(),
    }
}

/// Name of the device at either end of the cable.
pub const DEVICE: &str = "up0";

/// Two namespaces, connected: the agent and its tasks are in the near one, the world is the far one.
pub struct NetPair {
    /// Where the agent is.
    pub near: Netns,
    /// Where its traffic goes.
    pub far: Netns,
}

impl NetPair {
    /// Addresses of the far end.
    pub const FAR_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 99, 0, 2));
    /// See above.
    pub const FAR_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd99, 0, 0, 0, 0, 0, 0, 2));

    /// Addresses of the near end.
    pub const NEAR_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 99, 0, 1));
    /// See above.
    pub const NEAR_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd99, 0, 0, 0, 0, 0, 0, 1));

    /// A new pair, its cable up.
    pub fn new() -> NetPair {
        let (near, far) = (Netns::new(), Netns::new());
        near.connect(DEVICE, &far, DEVICE);
        for (namespace, v4, v6) in
            [(&near, "10.99.0.1/24", "fd99::1/64"), (&far, "10.99.0.2/24", "fd99::2/64")]
        {
            namespace.ip(&["address", "add", v4, "dev", DEVICE]);
            namespace.ip(&["address", "add", v6, "dev", DEVICE, "nodad"]);
            namespace.ip(&["link", "set", DEVICE, "up"]);
        }
        NetPair { near, far }
    }
}

impl Default for NetPair {
    fn default() -> NetPair {
        NetPair::new()
    }
}

fn ip(arguments: &[&str]) {
    run(Command::new("ip").args(arguments));
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| match error.kind() {
        io::ErrorKind::NotFound => panic!("{command:?}: not installed; `./x setup native` does that"),
        _ => panic!("{command:?}: {error}"),
    });
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}", said.trim());
    String::from_utf8_lossy(&output.stdout).into_owned()
}
