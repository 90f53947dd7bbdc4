//! Two network namespaces with a veth pair between them, and a receiver that counts.

use std::fs::{self, File};
use std::io::Read;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{self as this_process, Command};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread;

use anyhow::{Context, Result, bail};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::process;

const PREFIX: &str = "shaper-demo-";
const NODE: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
const PEER: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);

pub(super) struct Network {
    node: String,
    peer: String,
}

impl Network {
    /// Makes the pair; what a demo that was killed left behind is removed first.
    pub(super) fn create() -> Result<Network> {
        remove_stale()?;
        let pid = this_process::id();
        let network = Network { node: format!("{PREFIX}{pid}-node"), peer: format!("{PREFIX}{pid}-peer") };
        let (node, peer) = (network.node.as_str(), network.peer.as_str());
        for namespace in [node, peer] {
            ip(&["netns", "add", namespace])?;
        }
        ip(&["link", "add", "up0", "netns", node, "type", "veth", "peer", "name", "up0", "netns", peer])?;
        for (namespace, address) in [(node, NODE), (peer, PEER)] {
            ip(&["-n", namespace, "addr", "add", &format!("{address}/24"), "dev", "up0"])?;
            for device in ["lo", "up0"] {
                ip(&["-n", namespace, "link", "set", device, "up"])?;
            }
        }
        Ok(network)
    }

    /// The namespace of the node, as nsenter takes it.
    pub(super) fn node(&self) -> PathBuf {
        namespace(&self.node)
    }

    /// The device of the node's side.
    pub(super) fn uplink(&self) -> &'static str {
        "up0"
    }

    /// A receiver in the peer's namespace.
    pub(super) fn sink(&self) -> Result<Sink> {
        let path = namespace(&self.peer);
        let file = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
        let bound = thread::spawn(move || -> Result<TcpListener> {
            move_into_link_name_space(rustix::fd::AsFd::as_fd(&file), Some(LinkNameSpaceType::Network))
                .context("cannot enter the peer's network namespace")?;
            TcpListener::bind((PEER, 0)).context("cannot listen in the peer's network namespace")
        });
        // A socket stays in the namespace in which it was made.
        let listener = bound.join().map_err(|_| anyhow::anyhow!("the receiver's thread panicked"))??;
        let address = listener.local_addr().context("the receiver has no address")?;
        let received = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&received);
        thread::spawn(move || {
            for connection in listener.incoming().flatten() {
                let count = Arc::clone(&count);
                thread::spawn(move || receive(connection, &count));
            }
        });
        Ok(Sink { address, received })
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for name in [&self.node, &self.peer] {
            if let Err(error) = ip(&["netns", "del", name]) {
                eprintln!("demo: {error:#}");
            }
        }
    }
}

/// Counts the payload of its connections.
pub(super) struct Sink {
    address: SocketAddr,
    received: Arc<AtomicU64>,
}

impl Sink {
    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Payload received so far, bytes.
    pub(super) fn received(&self) -> u64 {
        self.received.load(Relaxed)
    }
}

fn receive(mut connection: TcpStream, count: &AtomicU64) {
    let mut buffer = vec![0; 256 << 10];
    // The end of the sender is the end of the connection, however it comes.
    while let Ok(length @ 1..) = connection.read(&mut buffer) {
        count.fetch_add(length as u64, Relaxed);
    }
}

fn namespace(name: &str) -> PathBuf {
    Path::new("/run/netns").join(name)
}

fn ip(args: &[&str]) -> Result<()> {
    process::read(Command::new("ip").args(args)).map(drop)
}

fn remove_stale() -> Result<()> {
    let Ok(entries) = fs::read_dir("/run/netns") else { return Ok(()) };
    for entry in entries {
        let name = entry.context("cannot list /run/netns")?.file_name();
        let Some(name) = name.to_str() else { continue };
        let Some((pid, _)) = name.strip_prefix(PREFIX).and_then(|rest| rest.split_once('-')) else {
            continue;
        };
        if pid.parse::<u32>().is_ok() && !Path::new("/proc").join(pid).exists() {
            ip(&["netns", "del", name])?;
        }
    }
    if let Ok(addresses) = process::read(Command::new("ip").args(["-o", "addr", "show"]))
        && addresses.contains(&format!("{NODE}/"))
    {
        bail!("{NODE} is an address of this machine; the demo needs 10.77.0.0/24 for its own namespaces");
    }
    Ok(())
}
