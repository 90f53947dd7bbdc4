//! What is measured: processes of this program. Each goes where it is told, says that it is ready, and works for as many
//! milliseconds as each line of its input says. It ends with its input.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufRead, Read, Write},
    net::{Shutdown, TcpListener, TcpStream, UdpSocket},
    os::{
        fd::AsFd,
        unix::fs::{FileExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use crate::{net, pulse};
use anyhow::{Context, Result, bail};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    thread::{CpuSet, sched_setaffinity},
    time::{ClockId, clock_gettime},
};

pub(crate) fn run(kind: &str, arguments: &[&str]) -> Result<()> {
    let mut rest = Vec::new();
    let mut arguments = arguments.iter().copied();
    while let Some(argument) = arguments.next() {
        match argument {
            "--group" => join(Path::new(arguments.next().context("--group: which?")?))?,
            "--cpu" => pin(arguments.next().context("--cpu: which?")?)?,
            other => rest.push(other),
        }
    }
    match (kind, rest.as_slice()) {
        ("relay", []) => relay(),
        ("ring", [size]) => ring(size.parse()?, None),
        ("ring", [size, groups]) => ring(size.parse()?, Some(Path::new(groups))),
        ("read", [file]) => read(Path::new(file)),
        ("udp-send", [address]) => udp_send(address),
        ("udp-sink", [address]) => udp_sink(address),
        ("tcp-send", [address]) => tcp_send(address),
        ("tcp-sink", [address]) => tcp_sink(address),
        ("spin", []) => serve(|time| Ok(spin(time))),
        ("wake", [micros]) => wake(micros.parse()?),
        ("poll", [directory]) => poll_files(Path::new(directory)),
        ("ping" | "pong" | "scatter", _) => net::load(kind, &rest),
        _ => pulse::run(kind, &rest),
    }
}

pub(crate) fn join(group: &Path) -> Result<()> {
    let file = group.join("cgroup.procs");
    fs::write(&file, "0").with_context(|| format!("cannot write {}", file.display()))
}

pub(crate) fn pin(cpu: &str) -> Result<()> {
    let mut cpus = CpuSet::new();
    cpus.set(cpu.parse().with_context(|| format!("--cpu {cpu} is not a number"))?);
    sched_setaffinity(None, &cpus).with_context(|| format!("cannot go to CPU {cpu}"))
}

/// Works whenever there is a line: `work` returns how much it did.
pub(crate) fn serve(mut work: impl FnMut(Duration) -> Result<u64>) -> Result<()> {
    let mut output = io::stdout();
    writeln!(output, "ready").context("nobody listens")?;
    for line in io::stdin().lock().lines() {
        let line = line.context("cannot read the orders")?;
        let millis = line.trim().parse().with_context(|| format!("`{line}` is not a time"))?;
        let (start, cpu) = (Instant::now(), cpu_ns());
        let count = work(Duration::from_millis(millis))?;
        let (elapsed, cpu) = (start.elapsed().as_nanos(), cpu_ns() - cpu);
        writeln!(output, "{count} {elapsed} {cpu}").context("nobody listens")?;
    }
    Ok(())
}

/// CPU time of this process so far.
fn cpu_ns() -> u64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec.cast_unsigned() * 1_000_000_000 + time.tv_nsec.cast_unsigned()
}

/// Passes on every byte that comes.
fn relay() -> Result<()> {
    let (input, output) = (io::stdin(), io::stdout());
    let mut byte = [0];
    while rustix::io::read(input.as_fd(), &mut byte).context("cannot read the token")? > 0 {
        rustix::io::write(output.as_fd(), &byte).context("cannot pass the token on")?;
    }
    Ok(())
}

/// Processes that pass a token round, this one among them; counts the rounds. Where `groups` is given, each but this
/// one is in the cgroup of its number there.
fn ring(size: usize, groups: Option<&Path>) -> Result<()> {
    let program = std::env::current_exe().context("cannot find this program")?;
    let mut relays: Vec<Child> = Vec::new();
    let mut first = None;
    let mut last = None;
    for index in 1..size {
        let mut command = Command::new(&program);
        command.args(["load", "relay"]);
        if let Some(groups) = groups {
            command.arg("--group").arg(groups.join(index.to_string()));
        }
        command.stdin(last.take().map_or_else(Stdio::piped, Stdio::from)).stdout(Stdio::piped());
        let mut relay = command.spawn().context("cannot start a relay")?;
        first = first.or_else(|| relay.stdin.take());
        last = relay.stdout.take();
        relays.push(relay);
    }
    let (first, last) = (first.context("a ring has two processes")?, last.context("a relay has no output")?);
    let round = || -> Result<()> {
        rustix::io::write(&first, b".").context("cannot pass the token on")?;
        if rustix::io::read(&last, &mut [0]).context("cannot read the token")? == 0 {
            bail!("a relay has ended");
        }
        Ok(())
    };
    // Once all pass it on, all are where they belong.
    round()?;
    serve(|time| {
        let start = Instant::now();
        let mut rounds = 0;
        while start.elapsed() < time {
            round()?;
            rounds += 1;
        }
        Ok(rounds)
    })
}

/// A block as the device wants it.
#[repr(C, align(4096))]
struct Block([u8; 4096]);

/// Reads blocks from anywhere in a file, past the page cache.
fn read(file: &Path) -> Result<()> {
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(file);
    let opened = opened.with_context(|| format!("cannot open {} for direct reads", file.display()))?;
    let size = size_of::<Block>() as u64;
    let blocks =
        opened.metadata().with_context(|| format!("cannot look at {}", file.display()))?.len() / size;
    let mut block = Box::new(Block([0; 4096]));
    let mut random: u64 = 0x9e37_79b9_7f4a_7c15;
    serve(|time| {
        let start = Instant::now();
        let mut reads = 0;
        while start.elapsed() < time {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let at = random % blocks * size;
            opened
                .read_exact_at(&mut block.0, at)
                .with_context(|| format!("cannot read {}", file.display()))?;
            reads += 1;
        }
        Ok(reads)
    })
}

/// Payload of a datagram.
const DATAGRAM: [u8; 64] = [0; 64];
/// Datagrams between two looks at the clock.
const BURST: u64 = 16;

fn udp_send(address: &str) -> Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:0").context("cannot make a socket")?;
    socket.connect(address).with_context(|| format!("cannot connect to {address}"))?;
    serve(|time| {
        let start = Instant::now();
        let mut sent = 0;
        while start.elapsed() < time {
            for _ in 0..BURST {
                socket.send(&DATAGRAM).with_context(|| format!("cannot send to {address}"))?;
            }
            sent += BURST;
        }
        Ok(sent)
    })
}

/// Its work is to say how much has come so far.
fn udp_sink(address: &str) -> Result<()> {
    let socket = UdpSocket::bind(address).with_context(|| format!("cannot listen on {address}"))?;
    let received = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&received);
    thread::spawn(move || {
        let mut datagram = DATAGRAM;
        while socket.recv(&mut datagram).is_ok() {
            count.fetch_add(1, Relaxed);
        }
    });
    serve(|_| Ok(received.load(Relaxed)))
}

/// Each order is a connection; its time ends when the other end has read everything.
fn tcp_send(address: &str) -> Result<()> {
    let data = vec![0; 64 << 10];
    serve(|time| {
        let mut stream =
            TcpStream::connect(address).with_context(|| format!("cannot connect to {address}"))?;
        let start = Instant::now();
        let mut sent = 0;
        while start.elapsed() < time {
            stream.write_all(&data).with_context(|| format!("cannot send to {address}"))?;
            sent += data.len() as u64;
        }
        stream.shutdown(Shutdown::Write).context("cannot end what is sent")?;
        stream.read_to_end(&mut Vec::new()).with_context(|| format!("{address} has not read everything"))?;
        Ok(sent)
    })
}

/// Its work is to say how much has come so far.
fn tcp_sink(address: &str) -> Result<()> {
    let listener = TcpListener::bind(address).with_context(|| format!("cannot listen on {address}"))?;
    let received = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&received);
    thread::spawn(move || {
        let mut data = vec![0; 256 << 10];
        for mut stream in listener.incoming().flatten() {
            while let Ok(length @ 1..) = stream.read(&mut data) {
                count.fetch_add(length as u64, Relaxed);
            }
        }
    });
    serve(|_| Ok(received.load(Relaxed)))
}

fn spin(time: Duration) -> u64 {
    let start = Instant::now();
    let mut turns = 0;
    while start.elapsed() < time {
        std::hint::spin_loop();
        turns += 1;
    }
    turns
}

/// How often it wakes.
const WAKES: Timespec = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };

/// A service with little to do: it wakes and computes for so many microseconds. It ends with its input.
fn wake(micros: u64) -> Result<()> {
    writeln!(io::stdout(), "ready").context("nobody listens")?;
    let input = io::stdin();
    while poll(&mut [PollFd::new(&input, PollFlags::IN)], Some(&WAKES)).context("cannot wait")? == 0 {
        spin(Duration::from_micros(micros));
    }
    Ok(())
}

/// What an exporter reads of each cgroup.
const FILES: [&str; 7] = [
    "cpu.stat",
    "memory.current",
    "memory.stat",
    "io.stat",
    "cpu.pressure",
    "memory.pressure",
    "io.pressure",
];

/// A poller as node exporters are: each second it opens, reads and closes the files of every cgroup.
fn poll_files(directory: &Path) -> Result<()> {
    let cannot = || format!("cannot list {}", directory.display());
    let mut files: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir(directory).with_context(cannot)? {
        let group = entry.with_context(cannot)?.path();
        if group.is_dir() {
            files.extend(FILES.map(|name| group.join(name)).into_iter().filter(|file| file.exists()));
        }
    }
    let mut text = String::new();
    serve(|time| {
        let start = Instant::now();
        let mut seconds = 0;
        let mut read = 0;
        while Duration::from_secs(seconds) < time {
            for file in &files {
                text.clear();
                File::open(file)
                    .and_then(|mut opened| opened.read_to_string(&mut text))
                    .with_context(|| format!("cannot read {}", file.display()))?;
                read += 1;
            }
            seconds += 1;
            thread::sleep((start + Duration::from_secs(seconds)).saturating_duration_since(Instant::now()));
        }
        Ok(read)
    })
}
