//! Loads by iperf3, and what becomes of them.

use std::{
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU16, Ordering::Relaxed},
    thread,
    time::Duration,
};

use anyhow::{Context, Error, Result, ensure};
use shaper_core::units::BitsPerSec;
use shaper_tests::{
    arrivals::{Frames, Received, Recorder, Series},
    connections,
    iperf::Outcome,
    machine,
    net::{DEVICE, Netns},
    time::{Window, happens},
};

use super::bed::Bed;
use crate::say;

const FAR: &str = "10.99.0.2";
/// Seconds beyond its length after which a test is given up.
const PATIENCE: u64 = 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Traffic {
    /// So many connections that send all they can.
    Tcp(u32),
    /// Twice the rate, in datagrams of 1,400 bytes.
    Udp,
}

impl Traffic {
    pub(super) fn name(self) -> String {
        match self {
            Traffic::Tcp(1) => "TCP, 1 flow".to_owned(),
            Traffic::Tcp(flows) => format!("TCP, {flows} flows"),
            Traffic::Udp => "UDP, offered twice".to_owned(),
        }
    }

    pub(super) fn arguments(self, rate: BitsPerSec) -> Vec<String> {
        match self {
            // The default of some hosts is BBR, which paces itself.
            Traffic::Tcp(flows) => {
                ["-C", "cubic", "-P", &flows.to_string()].into_iter().map(str::to_owned).collect()
            }
            Traffic::Udp => {
                ["-u", "-l", "1400", "-b", &(2 * rate.0).to_string()].into_iter().map(str::to_owned).collect()
            }
        }
    }

    fn frames(self) -> Frames {
        match self {
            Traffic::Tcp(_) => Frames::Tcp,
            Traffic::Udp => Frames::AsCounted,
        }
    }
}

/// A test that has ended.
pub(super) struct Run {
    traffic: Traffic,
    pub(super) outcome: Outcome,
    arrived: Series,
    /// When data began to arrive.
    begin: u64,
    /// CPU time that the whole machine used meanwhile.
    machine_cpu: Duration,
}

impl Run {
    /// Runs one for so many seconds. One that fails is tried once more: the two ends talk through the same shaper.
    pub(super) fn of(bed: &Bed, traffic: Traffic, rate: BitsPerSec, seconds: u64) -> Result<Run> {
        Run::once(bed, traffic, rate, seconds).or_else(|error| {
            say(&format!("once more, since {error:#}"));
            Run::once(bed, traffic, rate, seconds)
        })
    }

    fn once(bed: &Bed, traffic: Traffic, rate: BitsPerSec, seconds: u64) -> Result<Run> {
        let mut server = Server::start(bed)?;
        let recorder = Recorder::begin(&bed.pair.far, DEVICE);
        let before = machine::cpu_time();
        let (patience, length) = ((seconds + PATIENCE).to_string(), seconds.to_string());
        let arguments = ["-i", "0.25", "-t", &length, "-J"].map(str::to_owned);
        let mut client = server.client(&["timeout", "-k", "2", &patience]);
        client.args(arguments).args(traffic.arguments(rate));
        client.stdout(Stdio::piped()).stderr(Stdio::piped());
        let output = bed.pair.near.within(|| client.output()).context("cannot start iperf3")?;
        let machine_cpu = machine::cpu_time() - before;
        let arrived = recorder.end();
        server.end(bed)?;
        let outcome = Outcome::parse(&String::from_utf8_lossy(&output.stdout)).map_err(Error::msg);
        let outcome = outcome.with_context(|| {
            format!("{} at {rate}: {}", traffic.name(), String::from_utf8_lossy(&output.stderr).trim())
        })?;
        let begin = arrived.beginning().context("no data arrived")?;
        Ok(Run { traffic, outcome, arrived, begin, machine_cpu })
    }

    /// Bits a second on the wire in a part of it, seconds from its beginning.
    pub(super) fn wire(&self, from: f64, to: f64) -> f64 {
        let at = |seconds: f64| self.begin + (seconds * 1e9) as u64;
        self.arrived.rate(Window { from: at(from), to: at(to) }, self.traffic.frames())
    }

    /// CPU time that the whole machine used for 10⁹ bytes.
    pub(super) fn machine_cpu_per_gb(&self) -> f64 {
        self.machine_cpu.as_secs_f64() / (self.outcome.bytes / 1e9)
    }
}

/// A load that goes on until it is ended.
pub(super) struct Endless {
    client: Child,
    server: Server,
}

impl Endless {
    /// Begins, and returns once data arrives.
    pub(super) fn begin(bed: &Bed, traffic: Traffic, rate: BitsPerSec) -> Result<Endless> {
        let server = Server::start(bed)?;
        let recorder = Recorder::begin(&bed.pair.far, DEVICE);
        let mut client = server.client(&[]);
        client.args(["-t", "600"]).args(traffic.arguments(rate)).stdout(Stdio::null());
        let client = bed.pair.near.within(|| client.spawn()).context("cannot start iperf3")?;
        let endless = Endless { client, server };
        Window::pass(ARRIVAL);
        ensure!(recorder.end().beginning().is_some(), "no data arrived of {} at {rate}", traffic.name());
        Ok(endless)
    }

    /// Ends it, and returns once nothing of it is on its way any more.
    pub(super) fn end(mut self, bed: &Bed) -> Result<()> {
        end(&mut self.client);
        self.server.end(bed)
    }
}

/// Longer than there is between two frames at any rate.
const REST: Duration = Duration::from_millis(100);
/// How long a load has to fill its queue.
const ARRIVAL: Duration = Duration::from_secs(1);

impl Drop for Endless {
    fn drop(&mut self) {
        end(&mut self.client);
    }
}

/// iperf3 at the far end, for one test.
struct Server {
    process: Child,
    port: u16,
    task: PathBuf,
}

impl Server {
    /// Starts it, and waits until it listens.
    fn start(bed: &Bed) -> Result<Server> {
        static NEXT: AtomicU16 = AtomicU16::new(5201);
        let port = NEXT.fetch_add(1, Relaxed);
        let arguments = ["iperf3", "-s", "-1", "--forceflush", "-p", &port.to_string()];
        let mut command = inside(&bed.far, &arguments);
        command.stdout(Stdio::piped()).stderr(Stdio::null());
        let process = spawn(&bed.pair.far, &mut command)?;
        let mut server = Server { process, port, task: bed.task.clone() };
        let said = server.process.stdout.take().context("a child has no output")?;
        let mut lines = BufReader::new(said).lines();
        let listens = lines.any(|line| line.is_ok_and(|line| line.starts_with("Server listening")));
        ensure!(listens, "iperf3 has ended before it listened");
        // What else it says goes nowhere, but is taken.
        thread::spawn(move || lines.for_each(drop));
        Ok(server)
    }

    /// A client of it in the task's cgroup.
    fn client(&self, before: &[&str]) -> Command {
        inside(&self.task, &[before, &["iperf3", "-c", FAR, "-p", &self.port.to_string()]].concat())
    }

    /// Ends it, and returns once nothing that was sent to it is on its way any more: what waits in a queue would
    /// arrive in the next test.
    fn end(&mut self, bed: &Bed) -> Result<()> {
        end(&mut self.process);
        let gone = happens(|| {
            let before = Received::of(&bed.pair.far, DEVICE);
            Window::pass(REST);
            connections::to_port(&bed.pair.near, self.port) == 0
                && Received::of(&bed.pair.far, DEVICE) == before
        });
        ensure!(gone, "what was sent to an iperf3 that has ended is still on its way");
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        end(&mut self.process);
    }
}

fn end(process: &mut Child) {
    // It may have ended by itself.
    let _ = process.kill();
    let _ = process.wait();
}

fn spawn(namespace: &Netns, command: &mut Command) -> Result<Child> {
    namespace.within(|| command.spawn()).context("cannot start iperf3; `./x setup bench` installs it")
}

/// A command that is in a cgroup from its first instruction on.
pub(super) fn inside(group: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", "echo $$ > \"$0\"/cgroup.procs && exec \"$@\""]).arg(group).args(arguments);
    command.stdin(Stdio::null());
    command
}
