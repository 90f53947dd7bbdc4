//! Loads from the side of who starts and reads them.

use std::{
    io::{BufRead, BufReader, Write},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result};
use shaper_tests::net::Netns;

/// A process of this program that does its work when it is told. It ends with this.
pub(crate) struct Load {
    name: String,
    process: Child,
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

/// What a load has done.
#[derive(Clone, Copy)]
pub(crate) struct Done {
    pub(crate) count: u64,
    pub(crate) seconds: f64,
    /// CPU time of the process.
    pub(crate) cpu_seconds: f64,
}

impl Done {
    /// Done in a second.
    pub(crate) fn rate(&self) -> f64 {
        self.count as f64 / self.seconds
    }
}

impl Load {
    /// Starts one, and waits until it is ready.
    pub(crate) fn start(arguments: &[&str], namespace: Option<&Netns>) -> Result<Load> {
        let mut load = Load::begin(arguments, namespace)?;
        load.answer()?;
        Ok(load)
    }

    /// Starts one that need not be waited for.
    pub(crate) fn begin(arguments: &[&str], namespace: Option<&Netns>) -> Result<Load> {
        let name = format!("load {}", arguments.join(" "));
        let mut command = Command::new(std::env::current_exe().context("cannot find this program")?);
        command.arg("load").args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
        let spawned = match namespace {
            Some(namespace) => namespace.within(|| command.spawn()),
            None => command.spawn(),
        };
        let mut process = spawned.with_context(|| format!("cannot start the {name}"))?;
        let orders = process.stdin.take();
        let answers = process.stdout.take().context("a child has no output")?;
        Ok(Load { name, process, orders, answers: BufReader::new(answers) })
    }

    /// Has it work for so long.
    pub(crate) fn run(&mut self, time: Duration) -> Result<Done> {
        self.order(time)?;
        self.done()
    }

    /// Has several work for so long, at once.
    pub(crate) fn run_all(loads: &mut [Load], time: Duration) -> Result<()> {
        loads.iter_mut().try_for_each(|load| load.order(time))?;
        loads.iter_mut().try_for_each(|load| load.done().map(drop))
    }

    fn order(&mut self, time: Duration) -> Result<()> {
        let orders = self.orders.as_mut().context("a child has no input")?;
        writeln!(orders, "{}", time.as_millis()).with_context(|| format!("the {} has ended", self.name))
    }

    fn done(&mut self) -> Result<Done> {
        let answer = self.answer()?;
        let mut numbers = answer.split(' ').map(|number| number.trim().parse::<u64>());
        match (numbers.next(), numbers.next(), numbers.next()) {
            (Some(Ok(count)), Some(Ok(nanos)), Some(Ok(cpu))) => {
                Ok(Done { count, seconds: nanos as f64 / 1e9, cpu_seconds: cpu as f64 / 1e9 })
            }
            _ => anyhow::bail!("the {} answered: {answer}", self.name),
        }
    }

    fn answer(&mut self) -> Result<String> {
        let mut line = String::new();
        let length = self.answers.read_line(&mut line);
        if length.with_context(|| format!("cannot read what the {} says", self.name))? == 0 {
            let status = self.process.wait().context("cannot wait for a child")?;
            anyhow::bail!("the {} has ended: {status}", self.name);
        }
        Ok(line)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.orders = None;
        // Not all watch for the end of their orders while they work.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
