//! A broker as it is shipped, and what it costs.

use std::{fs, path::PathBuf, time::Duration};

use anyhow::{Context, Result};
use hyper_util::rt::TokioIo;
use shaper_tests::broker::Broker;
use tokio::{net::UnixStream, runtime::Runtime};
use tonic::transport::{Channel, Endpoint};

/// A broker, and the threads of its clients and agents.
pub(super) struct Rig {
    broker: Broker,
    pub(super) runtime: Runtime,
}

impl Rig {
    pub(super) fn start(arguments: &[&str]) -> Result<Rig> {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        Ok(Rig { broker: Broker::start_with(arguments), runtime })
    }

    /// One that has ended.
    pub(super) fn stopped() -> Result<Rig> {
        let mut rig = Rig::start(&[])?;
        rig.broker.kill9();
        Ok(rig)
    }

    /// Starts one that has ended; returns when it answers.
    pub(super) fn resume(&mut self) {
        self.broker.restart();
    }

    /// Its state.
    pub(super) fn state_dir(&self) -> PathBuf {
        self.broker.state_dir()
    }

    pub(super) fn pid(&self) -> Result<u32> {
        self.broker.pid().context("the broker does not run")
    }

    /// Kills it, and starts it again.
    pub(super) fn restart(&mut self) -> Result<()> {
        self.broker.kill9();
        self.broker.restart();
        Ok(())
    }

    pub(super) async fn connect(&self) -> Result<Channel> {
        let socket = self.broker.socket();
        let connector = tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        let endpoint = Endpoint::from_static("http://broker");
        endpoint.connect_with_connector(connector).await.context("cannot connect to the broker")
    }

    /// Resident, in bytes.
    pub(super) fn memory(&self) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid()?))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
        let kib: u64 = line.trim().trim_end_matches(" kB").parse()?;
        Ok(kib << 10)
    }
}

/// What a process has used of the CPUs, all of its threads.
pub(super) fn cpu_time(pid: u32) -> Result<Duration> {
    let mut sum = 0;
    for thread in fs::read_dir(format!("/proc/{pid}/task")).context("the broker has ended")? {
        let schedstat = fs::read_to_string(thread?.path().join("schedstat"))?;
        let on_cpu = schedstat.split(' ').next().unwrap_or_default();
        sum += on_cpu.parse::<u64>().with_context(|| format!("schedstat: {schedstat}"))?;
    }
    Ok(Duration::from_nanos(sum))
}
