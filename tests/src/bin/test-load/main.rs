//! What the tests run as a task: something that uses one resource, in a known way, until it is ended.
#![deny(unsafe_code)]

mod sockets;

use std::{
    env,
    fs::{self, File},
    hint::black_box,
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::unix::{
        fs::{FileExt, OpenOptionsExt},
        process::CommandExt,
    },
    path::Path,
    process::{self, Command, ExitCode},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::net::{self, netdevice, sockopt};
use rustix::thread::{CpuSet, sched_setaffinity};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

const USAGE: &str = "\
usage: test-load spin                 uses one CPU
       test-load pinned CPUS          uses each of these CPUs, 0,1, with a thread that stays there
       test-load once PATH spin THREADS
                                      uses that many CPUs, but only once PATH is there
       test-load straddle LOG MS TIMES
                                      finds out when the periods of its CPU quota end, by being stopped; notes that in LOG;
                                      then computes for that long around the end of a period, half of it before, that often;
                                      notes in LOG that it did, and stays
       test-load fork                 starts processes that end at once, one after the other
       test-load send ADDRESS FLOWS [RATE|greedy]
                                      sends zeros on that many connections; that have a pacing rate of their own (bytes a
                                      second); or that unset it a thousand times a second
       test-load flood ADDRESS BYTES [RATE]
                                      sends datagrams of that many bytes without end; so many bytes a second
       test-load frames DEVICE BYTES  sends frames of that many bytes without end, past the kernel's protocols
       test-load datagrams ADDRESS COUNT BYTES TOS
                                      sends that many datagrams of that many bytes at once, with that type of
                                      service, and stays
       test-load receive ADDRESS COUNT
                                      takes what comes to that address by TCP and UDP, and keeps count of its payload
                                      in the file COUNT, of either (twice 64 bits, of this machine's order)
       test-load connect PATH         connects its standard input, a socket, to the one at PATH, and stays
       test-load eat MIB              takes memory, says so, and keeps it
       test-load hold PROGRESS HOT COLD [RATE MORE]
                                      holds two sets of memory and touches all of HOT every 50 ms, COLD never; a set
                                      is a number of MiB, or one with `:` and a file that is made for it. Says so, and
                                      counts in the file PROGRESS (64 bits, of this machine's order) how often it came
                                      round in time. Takes RATE MiB more a second, until it has MORE MiB more
       test-load write PATH KIB direct|buffered
                                      writes that much in pieces of 4 KiB, brings it to the disk, says so
       test-load read PATH            reads that file from the disk, in pieces of 4 KiB
       test-load churn PATH read|write [THREADS]
                                      does so without end, or writes over its first 4 MiB, four pieces at once, or that
                                      many
       test-load probe PATH LOG       reads pieces of 4 KiB without end, one at a time, and adds to the file LOG how
                                      long each took (µs, 32 bits, of this machine's order)
       test-load tick COUNT CODE      prints a line every 100 ms, and exits with CODE
       test-load witness LOG spin     notes in LOG that it runs, and uses one CPU
       test-load witness LOG until PATH CODE
                                      notes in LOG that it runs; once PATH is there, that it ends, and
                                      exits with CODE
       test-load witness LOG for MILLIS CODE
                                      the same, after so long";

const PIECE_KIB: u32 = 4;

/// Whoever else has the socket speaks on it then as this process.
fn connect(path: &str) -> io::Result<ExitCode> {
    net::connect(io::stdin(), &net::SocketAddrUnix::new(path)?)?;
    loop {
        thread::park();
    }
}

const TICK: Duration = Duration::from_millis(100);

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["spin"] => spin(),
        ["once", path, "spin", threads] => match threads.parse::<usize>() {
            Ok(threads) if threads > 0 => once(Path::new(path)).and_then(|()| spin_on(threads)),
            _ => return usage(),
        },
        ["straddle", log, millis, times] => match (millis.parse(), times.parse()) {
            (Ok(millis), Ok(times)) => straddle(log, Duration::from_millis(millis), times),
            _ => return usage(),
        },
        ["pinned", cpus] => match cpus.split(',').map(str::parse).collect::<Result<Vec<usize>, _>>() {
            Ok(cpus) => pinned(&cpus),
            Err(_) => return usage(),
        },
        ["fork"] => fork(),
        ["send", address, flows] => match (address.parse(), flows.parse()) {
            (Ok(address), Ok(flows)) => send(address, flows, Pacing::Default),
            _ => return usage(),
        },
        ["send", address, flows, "greedy"] => match (address.parse(), flows.parse()) {
            (Ok(address), Ok(flows)) => send(address, flows, Pacing::Greedy),
            _ => return usage(),
        },
        ["send", address, flows, rate] => match (address.parse(), flows.parse(), rate.parse()) {
            (Ok(address), Ok(flows), Ok(rate)) => send(address, flows, Pacing::At(rate)),
            _ => return usage(),
        },
        ["flood", address, bytes] => match (address.parse(), bytes.parse()) {
            (Ok(address), Ok(bytes)) => flood(address, bytes, None),
            _ => return usage(),
        },
        ["flood", address, bytes, rate] => match (address.parse(), bytes.parse(), rate.parse()) {
            (Ok(address), Ok(bytes), Ok(rate)) => flood(address, bytes, Some(rate)),
            _ => return usage(),
        },
        ["frames", device, bytes] => match bytes.parse() {
            Ok(bytes) => frames(device, bytes),
            Err(_) => return usage(),
        },
        ["receive", address, count] => match address.parse() {
            Ok(address) => receive(address, count),
            Err(_) => return usage(),
        },
        ["datagrams", address, count, bytes, tos] => {
            match (address.parse(), count.parse(), bytes.parse(), tos.parse()) {
                (Ok(address), Ok(count), Ok(bytes), Ok(tos)) => datagrams(address, count, bytes, tos),
                _ => return usage(),
            }
        }
        ["eat", mib] => match mib.parse() {
            Ok(mib) => eat(mib),
            Err(_) => return usage(),
        },
        ["hold", progress, hot, cold, more @ ..] => {
            let growth = match more {
                [] => Some((0, 0)),
                [rate, most] => rate.parse().ok().zip(most.parse().ok()),
                _ => None,
            };
            match (Set::parse(hot), Set::parse(cold), growth) {
                (Some(hot), Some(cold), Some(growth)) => hold(progress, &hot, &cold, growth),
                _ => return usage(),
            }
        }
        ["write", path, kib, way @ ("direct" | "buffered")] => match kib.parse::<u32>() {
            Ok(kib) if kib % PIECE_KIB == 0 => write(path, kib, *way == "direct"),
            _ => return usage(),
        },
        ["read", path] => read(path),
        ["churn", path, way @ ("read" | "write")] => churn(path, *way == "write", 4),
        ["churn", path, way @ ("read" | "write"), threads] => match threads.parse() {
            Ok(threads) => churn(path, *way == "write", threads),
            Err(_) => return usage(),
        },
        ["probe", path, log] => probe(path, log),
        ["connect", path] => connect(path),
        ["tick", count, code] => match (count.parse(), code.parse::<u8>()) {
            (Ok(count), Ok(code)) => tick(count).map(|()| ExitCode::from(code)),
            _ => return usage(),
        },
        ["witness", log, "spin"] => note(log, "began").and_then(|()| spin()),
        ["witness", log, "for", millis, code] => match (millis.parse(), code.parse::<u8>()) {
            (Ok(millis), Ok(code)) => {
                lasting(log, Duration::from_millis(millis)).map(|()| ExitCode::from(code))
            }
            _ => return usage(),
        },
        ["witness", log, "until", path, code] => match code.parse::<u8>() {
            Ok(code) => until(log, Path::new(path)).map(|()| ExitCode::from(code)),
            Err(_) => return usage(),
        },
        _ => return usage(),
    };
    done.unwrap_or_else(|error| {
        eprintln!("test-load: {error}");
        ExitCode::FAILURE
    })
}

fn usage() -> ExitCode {
    eprintln!("{USAGE}");
    ExitCode::from(2)
}

fn spin() -> io::Result<ExitCode> {
    loop {
        black_box(());
    }
}

fn spin_on(threads: usize) -> io::Result<ExitCode> {
    for _ in 1..threads {
        thread::spawn(spin);
    }
    spin()
}

/// The period of a CPU quota.
const PERIOD: Duration = Duration::from_millis(100);

fn straddle(log: &str, length: Duration, times: u32) -> io::Result<ExitCode> {
    let is_in = |time: Duration| move |start: Instant| start.elapsed() < time;
    let compute = |goes_on: &dyn Fn(Instant) -> bool| {
        let start = Instant::now();
        // When it went on after it had been stopped for the longest time.
        let (mut last, mut longest, mut went_on) = (start, Duration::ZERO, start);
        while goes_on(start) {
            let now = Instant::now();
            if now - last > longest {
                (longest, went_on) = (now - last, now);
            }
            last = now;
        }
        went_on
    };
    let end = compute(&is_in(20 * PERIOD));
    note(log, "found")?;
    for number in 0..times {
        // Not each period: what was saved is nothing by then, and what was used is paid.
        let due = end + PERIOD * (45 + 5 * number) - length / 2;
        thread::sleep(due.saturating_duration_since(Instant::now()));
        compute(&is_in(length));
    }
    note(log, "did")?;
    loop {
        thread::park();
    }
}

/// Ends when the first of the threads does.
fn pinned(cpus: &[usize]) -> io::Result<ExitCode> {
    let (failed, failures) = std::sync::mpsc::channel();
    for &cpu in cpus {
        let failed = failed.clone();
        thread::spawn(move || {
            let mut there = CpuSet::new();
            there.set(cpu);
            let error = match sched_setaffinity(None, &there) {
                Ok(()) => spin().err(),
                Err(error) => Some(error.into()),
            };
            // The first to fail is heard; nobody waits for the others.
            let _ = failed.send(error.unwrap_or_else(|| io::ErrorKind::Other.into()));
        });
    }
    drop(failed);
    Err(failures.recv().unwrap_or_else(|_| io::ErrorKind::InvalidInput.into()))
}

fn fork() -> io::Result<ExitCode> {
    Err(Command::new("/bin/sh").args(["-c", "while :; do /bin/true; done"]).exec())
}

/// What a program does to the pacing of its connections.
#[derive(Clone, Copy)]
enum Pacing {
    /// Nothing.
    Default,
    /// Sets a rate, bytes a second.
    At(u32),
    /// Unsets the rate, again and again.
    Greedy,
}

/// Ends when the first of the connections does.
fn send(address: SocketAddr, flows: usize, pacing: Pacing) -> io::Result<ExitCode> {
    let (failed, failures) = std::sync::mpsc::channel();
    for _ in 0..flows {
        let mut stream = TcpStream::connect(address)?;
        match pacing {
            Pacing::Default => {}
            Pacing::At(rate) => sockets::set_pacing_rate(&stream, rate)?,
            Pacing::Greedy => {
                let stream = stream.try_clone()?;
                thread::spawn(move || {
                    while sockets::set_pacing_rate(&stream, sockets::UNPACED).is_ok() {
                        thread::sleep(Duration::from_millis(1));
                    }
                });
            }
        }
        let failed = failed.clone();
        thread::spawn(move || {
            let zeros = vec![0; 128 << 10];
            let error = loop {
                if let Err(error) = stream.write_all(&zeros) {
                    break error;
                }
            };
            // The first to fail is heard; nobody waits for the others.
            let _ = failed.send(error);
        });
    }
    drop(failed);
    Err(failures.recv().unwrap_or_else(|_| io::ErrorKind::InvalidInput.into()))
}

fn datagrams(address: SocketAddr, count: usize, bytes: usize, tos: u8) -> io::Result<ExitCode> {
    let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any)?;
    if address.is_ipv4() {
        sockopt::set_ip_tos(&socket, tos)?;
    } else {
        sockopt::set_ipv6_tclass(&socket, tos.into())?;
    }
    let zeros = vec![0; bytes];
    for _ in 0..count {
        match socket.send_to(&zeros, address) {
            // What a queue refuses is what it is for; nobody listens at the other end, and says so.
            Ok(_) => {}
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
            Err(error) => return Err(error),
        }
    }
    loop {
        thread::park();
    }
}

fn flood(address: SocketAddr, bytes: usize, rate: Option<u64>) -> io::Result<ExitCode> {
    let socket = UdpSocket::bind(if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
    let zeros = vec![0; bytes];
    let send = || match socket.send_to(&zeros, address) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Err(error),
        // Whatever is refused, the next one may not be.
        _ => Ok(()),
    };
    let Some(rate) = rate else {
        loop {
            send()?;
        }
    };
    let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC)?;
    let millisecond = Timespec { tv_sec: 0, tv_nsec: 1_000_000 };
    let every = Itimerspec { it_interval: millisecond, it_value: millisecond };
    timerfd_settime(&timer, TimerfdTimerFlags::empty(), &every)?;
    let mut due = 0;
    loop {
        let mut ticks = [0; 8];
        rustix::io::read(&timer, &mut ticks)?;
        due += u64::from_ne_bytes(ticks) * rate / 1000;
        while due >= bytes as u64 {
            due -= bytes as u64;
            send()?;
        }
    }
}

fn receive(address: SocketAddr, count: &str) -> io::Result<ExitCode> {
    let (listener, socket) = (TcpListener::bind(address)?, UdpSocket::bind(address)?);
    let count = Arc::new(File::options().write(true).open(count)?);
    // It listens.
    count.write_all_at(&[0; 16], 0)?;
    let (by_tcp, streams) = (Arc::new(AtomicU64::new(0)), count.clone());
    thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            let (by_tcp, count) = (by_tcp.clone(), streams.clone());
            thread::spawn(move || {
                let mut buffer = vec![0; 256 << 10];
                while let Ok(got @ 1..) = stream.read(&mut buffer) {
                    let sum = by_tcp.fetch_add(got as u64, Relaxed) + got as u64;
                    if count.write_all_at(&sum.to_ne_bytes(), 0).is_err() {
                        return;
                    }
                }
            });
        }
    });
    let (mut buffer, mut sum) = (vec![0; 64 << 10], 0u64);
    loop {
        sum += socket.recv(&mut buffer)? as u64;
        count.write_all_at(&sum.to_ne_bytes(), 8)?;
    }
}

fn frames(device: &str, bytes: usize) -> io::Result<ExitCode> {
    let number = netdevice::name_to_index(UdpSocket::bind("0.0.0.0:0")?, device)?;
    let socket = sockets::PacketSocket::on(number)?;
    // To everybody, from nobody, of a protocol for experiments (IEEE 802).
    let mut frame = vec![0; bytes.max(60)];
    frame[..6].fill(0xff);
    frame[12..14].copy_from_slice(&[0x88, 0xb5]);
    loop {
        match socket.send(&frame) {
            Err(error) if error.raw_os_error() != Some(libc::ENOBUFS) => return Err(error),
            _ => {}
        }
    }
}

fn eat(mib: usize) -> io::Result<ExitCode> {
    let mut eaten: Vec<Vec<u8>> = Vec::new();
    for _ in 0..mib {
        // Not zeros: those would not be touched.
        eaten.push(black_box(vec![1; 1 << 20]));
    }
    say(&format!("ate {mib} MiB"))?;
    loop {
        thread::park();
        black_box(&eaten);
    }
}

/// Memory that is held: anonymous, or the page cache of a file.
struct Set<'a> {
    pages: usize,
    file: Option<&'a str>,
}

enum Held {
    Anonymous(Vec<u8>),
    Cached(File, usize),
}

const PAGE: usize = 4096;
const ROUND: Duration = Duration::from_millis(50);
/// In so many rounds a cached set is touched whole, a part in each: a call for each page, in an emulated machine, would take all
/// of a round, whose number would then tell how fast the machine is, and not whether the task waits for memory.
const CACHED_PARTS: usize = 4;

impl<'a> Set<'a> {
    fn parse(text: &'a str) -> Option<Set<'a>> {
        let (mib, file) = text.split_once(':').map_or((text, None), |(mib, file)| (mib, Some(file)));
        Some(Set { pages: mib.parse::<usize>().ok()? << 8, file })
    }

    fn take(&self) -> io::Result<Held> {
        let Some(path) = self.file else { return Ok(Held::Anonymous(anonymous(self.pages))) };
        let mut file = File::options().read(true).write(true).create(true).truncate(true).open(path)?;
        for _ in 0..self.pages {
            file.write_all(&Piece::ONES.0)?;
        }
        // What is dirty cannot be taken away.
        file.sync_all()?;
        Ok(Held::Cached(file, self.pages))
    }
}

impl Held {
    /// In a round.
    fn touch(&mut self, round: u64) -> io::Result<()> {
        match self {
            Held::Anonymous(bytes) => {
                for page in bytes.chunks_mut(PAGE) {
                    page[1] = page[1].wrapping_add(1);
                }
                black_box(bytes);
            }
            Held::Cached(file, pages) => {
                let part = round as usize % CACHED_PARTS;
                for page in *pages * part / CACHED_PARTS..*pages * (part + 1) / CACHED_PARTS {
                    file.read_exact_at(&mut [0], (page * PAGE) as u64)?;
                }
            }
        }
        Ok(())
    }
}

/// Pages of which no two are alike, so that a compressing swap has to keep them.
fn anonymous(pages: usize) -> Vec<u8> {
    let mut bytes = vec![0; pages * PAGE];
    for (number, page) in bytes.chunks_mut(PAGE).enumerate() {
        let mut word = number as u64 + 1;
        for place in page[..PAGE / 2].chunks_exact_mut(8) {
            word = word.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
            place.copy_from_slice(&word.to_ne_bytes());
        }
    }
    bytes
}

fn hold(progress: &str, hot: &Set<'_>, cold: &Set<'_>, (rate, most): (usize, usize)) -> io::Result<ExitCode> {
    let progress = File::options().write(true).create(true).truncate(false).open(progress)?;
    let (cold, mut hot) = (cold.take()?, hot.take()?);
    let mut more: Vec<Vec<u8>> = Vec::new();
    let mut owed = 0;
    say("holds")?;
    let mut due = Instant::now();
    for round in 1u64.. {
        hot.touch(round)?;
        owed += (rate << 8) * ROUND.as_millis() as usize;
        let pages = (owed / 1000).min((most << 8) - more.iter().map(Vec::len).sum::<usize>() / PAGE);
        if pages > 0 {
            more.push(anonymous(pages));
            owed %= 1000;
        }
        progress.write_all_at(&round.to_ne_bytes(), 0)?;
        // Rounds that were missed are lost.
        let now = Instant::now();
        due = (due + ROUND).max(now);
        thread::sleep(due - now);
    }
    black_box((cold, more));
    Ok(ExitCode::SUCCESS)
}

/// Aligned as direct IO wants it.
#[repr(align(4096))]
struct Piece([u8; PIECE_KIB as usize * 1024]);

impl Piece {
    const ONES: Piece = Piece([1; PIECE_KIB as usize * 1024]);
}

fn read(path: &str) -> io::Result<ExitCode> {
    let mut file = File::options().read(true).custom_flags(libc::O_DIRECT).open(path)?;
    let mut piece = Piece::ONES;
    while file.read(&mut piece.0)? > 0 {}
    say("read").map(|()| ExitCode::SUCCESS)
}

fn write(path: &str, kib: u32, direct: bool) -> io::Result<ExitCode> {
    let piece = Piece::ONES;

    let flags = if direct { libc::O_DIRECT } else { 0 };
    let mut file = File::options().write(true).create(true).truncate(true).custom_flags(flags).open(path)?;
    for _ in 0..kib / PIECE_KIB {
        file.write_all(&piece.0)?;
    }
    file.sync_all()?;
    say(&format!("wrote {kib} KiB")).map(|()| ExitCode::SUCCESS)
}

/// Ends when the first of the threads does.
fn churn(path: &str, writes: bool, threads: u64) -> io::Result<ExitCode> {
    const PIECES: u64 = (4 << 20) / (PIECE_KIB as u64 * 1024);
    let mut options = File::options();
    let file = Arc::new(options.read(true).write(writes).custom_flags(libc::O_DIRECT).open(path)?);
    let (failed, failures) = std::sync::mpsc::channel();
    for first in 0..threads {
        let (file, failed) = (file.clone(), failed.clone());
        thread::spawn(move || {
            let mut piece = Piece::ONES;
            let error = (first..).find_map(|number| {
                let at = number * threads % PIECES * piece.0.len() as u64;
                let done = if writes {
                    file.write_all_at(&piece.0, at)
                } else {
                    file.read_exact_at(&mut piece.0, at)
                };
                done.err()
            });
            // The first to fail is heard; nobody waits for the others.
            let _ = failed.send(error.unwrap_or_else(|| io::ErrorKind::InvalidInput.into()));
        });
    }
    drop(failed);
    Err(failures.recv().unwrap_or_else(|_| io::ErrorKind::InvalidInput.into()))
}

fn probe(path: &str, log: &str) -> io::Result<ExitCode> {
    const PIECES: u64 = (4 << 20) / (PIECE_KIB as u64 * 1024);
    let file = File::options().read(true).custom_flags(libc::O_DIRECT).open(path)?;
    let mut log = File::options().append(true).open(log)?;
    let mut piece = Piece::ONES;
    for number in 0u64.. {
        let start = Instant::now();
        let at = number * 37 % PIECES * piece.0.len() as u64;
        file.read_exact_at(&mut piece.0, at)?;
        let took = u32::try_from(start.elapsed().as_micros()).unwrap_or(u32::MAX);
        log.write_all(&took.to_ne_bytes())?;
    }
    Ok(ExitCode::SUCCESS)
}

fn tick(count: u32) -> io::Result<()> {
    for number in 1..=count {
        say(&format!("tick {number}"))?;
        thread::sleep(TICK);
    }
    Ok(())
}

fn until(log: &str, path: &Path) -> io::Result<()> {
    note(log, "began")?;
    once(path)?;
    note(log, "ended")
}

fn lasting(log: &str, time: Duration) -> io::Result<()> {
    note(log, "began")?;
    thread::sleep(time);
    note(log, "ended")
}

/// Returns once there is something at `path`.
fn once(path: &Path) -> io::Result<()> {
    let watch = inotify::init(CreateFlags::CLOEXEC)?;
    inotify::add_watch(&watch, path.parent().unwrap_or(path), WatchFlags::CREATE | WatchFlags::MOVED_TO)?;
    let mut events = File::from(watch);
    // It is looked for once the watch is set: nothing falls in between.
    while !path.exists() {
        let _ = events.read(&mut [0; 4096])?;
    }
    Ok(())
}

/// Adds a line to a file: what happened, to which run of which task, and its process. The name of the
/// run is that of its cgroup.
fn note(log: &str, what: &str) -> io::Result<()> {
    let cgroups = fs::read_to_string("/proc/self/cgroup")?;
    let cgroup = cgroups.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or_default();
    let run = cgroup.rsplit('/').next().unwrap_or_default();
    let line = format!("{what} {run} {}\n", process::id());
    // One write to the end of the file: lines of several tasks do not mix.
    fs::OpenOptions::new().append(true).open(log)?.write_all(line.as_bytes())
}

fn say(line: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{line}").and_then(|()| stdout.flush())
}
