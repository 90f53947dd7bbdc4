//! A probe of latency: 64 bytes by TCP, there and back.

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use shaper_tests::time::monotonic_ns;

use crate::{load::serve, pulse::Records};

type Message = [u8; 64];

/// Notes of each message when it was sent, and how long it took there and back, ns; pauses for so many µs after each.
pub(super) fn ping(address: &str, file: &Path, pause_us: u64) -> Result<()> {
    let mut stream = TcpStream::connect(address).with_context(|| format!("cannot connect to {address}"))?;
    stream.set_nodelay(true).context("cannot have small messages sent at once")?;
    let records = Records::open(file)?;
    serve(|time| {
        let start = Instant::now();
        let mut count = 0;
        while start.elapsed() < time {
            let sent = monotonic_ns();
            let mut message: Message = [0; _];
            let trip = stream.write_all(&message).and_then(|()| stream.read_exact(&mut message));
            trip.with_context(|| format!("{address} does not answer"))?;
            records.add((sent, monotonic_ns() - sent))?;
            count += 1;
            thread::sleep(Duration::from_micros(pause_us));
        }
        Ok(count)
    })
}

/// Sends everything back.
pub(super) fn pong(address: &str) -> Result<()> {
    let listener = TcpListener::bind(address).with_context(|| format!("cannot listen on {address}"))?;
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // Who pings notices when this ends.
            thread::spawn(move || answer(stream));
        }
    });
    serve(|_| Ok(0))
}

fn answer(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut message: Message = [0; _];
    loop {
        stream.read_exact(&mut message)?;
        stream.write_all(&message)?;
    }
}
