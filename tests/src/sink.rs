//! The far end of every connection: a TCP server that counts what arrives, and when.

use std::{
    io::{self, Read},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};

use rustix::net::{Shutdown, shutdown};

use crate::{
    net::Netns,
    time::{Window, eventually, monotonic_ns},
};

/// Counts are kept for so long each …
const BIN: u64 = 10_000_000;
/// … and for so many of them: twenty minutes.
const BINS: usize = 120_000;

/// The server. It ends when it is dropped.
pub struct Sink {
    address: SocketAddr,
    listener: TcpListener,
    counts: Arc<Counts>,
}

struct Counts {
    start: u64,
    /// Payload by the time of its arrival.
    bins: Vec<AtomicU64>,
    connections: Mutex<Vec<Connection>>,
}

struct Connection {
    stream: TcpStream,
    payload: Arc<AtomicU64>,
}

impl Sink {
    /// Listens on `address` in `namespace`, on a port of the kernel's choice.
    pub fn listen(namespace: &Netns, address: IpAddr) -> Sink {
        let listener = namespace.within(|| TcpListener::bind((address, 0)));
        let listener = listener.unwrap_or_else(|error| panic!("cannot listen on {address}: {error}"));
        let bins = (0..BINS).map(|_| AtomicU64::new(0)).collect();
        let counts = Arc::new(Counts { start: monotonic_ns(), bins, connections: Mutex::default() });
        let accepting = listener.try_clone().expect("a socket can be duplicated");
        let counted = counts.clone();
        thread::spawn(move || {
            while let Ok((stream, _)) = accepting.accept() {
                counted.clone().serve(stream);
            }
        });
        Sink { address: listener.local_addr().expect("a bound socket has an address"), listener, counts }
    }

    /// Where to send.
    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// Waits for so many connections on which something has arrived.
    #[track_caller]
    pub fn wait_for_flows(&self, flows: usize) {
        eventually("the connections carry data", || {
            self.by_connection().iter().filter(|payload| **payload > 0).count() >= flows
        });
    }

    /// Payload by connection so far, in the order of their coming.
    pub fn by_connection(&self) -> Vec<u64> {
        let connections = self.counts.connections.lock().unwrap_or_else(PoisonError::into_inner);
        connections.iter().map(|connection| connection.payload.load(Relaxed)).collect()
    }

    /// Payload that arrived in `window`, bytes.
    pub fn payload(&self, window: Window) -> f64 {
        let Counts { start, bins, .. } = &*self.counts;
        let (from, to) = (window.from.saturating_sub(*start), window.to.saturating_sub(*start));
        let share =
            |bin: u64| to.min((bin + 1) * BIN).saturating_sub(from.max(bin * BIN)) as f64 / BIN as f64;
        (from / BIN..=to / BIN).map(|bin| bins[bin as usize].load(Relaxed) as f64 * share(bin)).sum()
    }

    /// Rate at which it came, bits a second on the wire.
    pub fn rate(&self, window: Window) -> f64 {
        self.payload(window) * 8.0 / window.seconds() * self.wire_per_payload()
    }

    /// The highest rate over any `span` in `window`, bits a second on the wire.
    pub fn highest_rate(&self, window: Window, span: Duration) -> f64 {
        let span = u64::try_from(span.as_nanos()).expect("a span is short");
        let starts = (window.from..=window.to.saturating_sub(span)).step_by(BIN as usize);
        starts.map(|from| self.rate(Window { from, to: from + span })).fold(0.0, f64::max)
    }

    /// A full frame of 1514 bytes, by what of it is payload beside an IP header and one of TCP with
    /// time stamps.
    fn wire_per_payload(&self) -> f64 {
        if self.address.is_ipv4() { 1514.0 / 1448.0 } else { 1514.0 / 1428.0 }
    }
}

impl Counts {
    fn serve(self: Arc<Counts>, stream: TcpStream) {
        let payload = Arc::new(AtomicU64::new(0));
        let reading = stream.try_clone().expect("a socket can be duplicated");
        let connection = Connection { stream, payload: payload.clone() };
        self.connections.lock().unwrap_or_else(PoisonError::into_inner).push(connection);
        thread::spawn(move || {
            // A sender that is killed resets its connection: an end like any other.
            let _ = self.count(reading, &payload);
        });
    }

    fn count(&self, mut stream: TcpStream, payload: &AtomicU64) -> io::Result<()> {
        let mut buffer = vec![0; 256 << 10];
        loop {
            let got = match stream.read(&mut buffer)? {
                0 => return Ok(()),
                got => got as u64,
            };
            payload.fetch_add(got, Relaxed);
            if let Some(bin) = self.bins.get(((monotonic_ns() - self.start) / BIN) as usize) {
                bin.fetch_add(got, Relaxed);
            }
        }
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        let _ = shutdown(&self.listener, Shutdown::Both);
        let connections = self.counts.connections.lock().unwrap_or_else(PoisonError::into_inner);
        for connection in connections.iter() {
            let _ = connection.stream.shutdown(std::net::Shutdown::Both);
        }
    }
}
