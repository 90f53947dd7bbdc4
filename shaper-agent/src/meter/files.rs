//! The files of one cgroup, opened once and read again and again.

use std::io;

use shaper_core::{snapshot::Pressure, units::Bytes};

use crate::{
    actuate::Target,
    kernel::{
        cgroup::{
            Cgroup, CgroupError, Contents, File, Open, ReadOnly,
            block::{self, ByDevice, IoStat},
            cpu::{self, CpuStat},
            memory::{self, MemoryEvents},
            pressure,
        },
        v1::{self, V1CpuStat, V1Group, V1OomControl},
    },
};

/// What the files said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reading {
    /// CPU time, ns.
    pub cpu_ns: Option<u64>,
    /// Time that the CPU limit stopped it, ns.
    pub throttled_ns: Option<u64>,
    /// Memory in use.
    pub memory: Option<Bytes>,
    /// The most there was.
    pub memory_peak: Option<Bytes>,
    /// Processes killed for want of memory.
    pub oom_kills: Option<u64>,
    /// Pressure on CPU …
    pub cpu_pressure: Option<Pressure>,
    /// … memory …
    pub memory_pressure: Option<Pressure>,
    /// … and block IO.
    pub io_pressure: Option<Pressure>,
    /// Block IO by device.
    pub io: Option<ByDevice<IoStat>>,
    /// The cgroup, or one of its files, is not there any more.
    pub is_gone: bool,
}

/// A file that is only read.
type Opened<T> = Open<T, ReadOnly>;

/// The open files; one that is not there stays closed.
#[derive(Default)]
pub struct Files {
    cpu_stat: Option<Opened<CpuStat>>,
    v1_cpu_stat: Option<Opened<V1CpuStat>>,
    memory: Option<Opened<Bytes>>,
    memory_peak: Option<Opened<Bytes>>,
    memory_events: Option<Opened<MemoryEvents>>,
    v1_oom_control: Option<Opened<V1OomControl>>,
    pressure: [Option<Opened<Pressure>>; 3],
    io_stat: Option<Opened<ByDevice<IoStat>>>,
}

impl Files {
    /// Opens what is there for a task; `io_stat` if no kernel program counts block IO.
    pub fn open(target: &Target, io_stat: bool) -> Files {
        let cgroup = &target.cgroup;
        let v1_memory = target.v1_memory.as_ref();
        let v1_bytes = |file| v1_memory.and_then(|group: &V1Group| group.open_file(file));
        Files {
            cpu_stat: open(cgroup, cpu::STAT),
            v1_cpu_stat: target.v1_cpu.as_ref().and_then(|group| group.open_file(v1::CPU_STAT)),
            memory: open(cgroup, memory::CURRENT).or_else(|| v1_bytes(v1::MEMORY_USAGE)),
            memory_peak: open(cgroup, memory::PEAK).or_else(|| v1_bytes(v1::MEMORY_MAX_USAGE)),
            memory_events: open(cgroup, memory::EVENTS),
            v1_oom_control: v1_memory.and_then(|group| group.open_file(v1::OOM_CONTROL)),
            pressure: [pressure::CPU, pressure::MEMORY, pressure::IO].map(|file| open(cgroup, file)),
            io_stat: if io_stat { open(cgroup, block::STAT) } else { None },
        }
    }

    /// Reads them all. What cannot be read, or makes no sense, is not there.
    pub fn read(&self) -> Reading {
        let mut is_gone = false;
        let cpu = read(&self.cpu_stat, &mut is_gone);
        let throttled_ns = match read(&self.v1_cpu_stat, &mut is_gone) {
            Some(v1) => Some(v1.throttled_ns),
            None => cpu.and_then(|cpu| cpu.throttled).map(|throttled| throttled.0 * 1000),
        };
        let oom_kills = match read(&self.memory_events, &mut is_gone) {
            Some(events) => Some(events.oom_kill),
            None => read(&self.v1_oom_control, &mut is_gone).map(|oom| oom.kills),
        };
        let [cpu_pressure, memory_pressure, io_pressure] =
            [0, 1, 2].map(|index| read(&self.pressure[index], &mut is_gone));
        let mut reading = Reading {
            cpu_ns: cpu.map(|cpu| cpu.usage.0 * 1000),
            throttled_ns,
            memory: read(&self.memory, &mut is_gone),
            memory_peak: read(&self.memory_peak, &mut is_gone),
            oom_kills,
            cpu_pressure,
            memory_pressure,
            io_pressure,
            io: read(&self.io_stat, &mut is_gone),
            is_gone: false,
        };
        reading.is_gone = is_gone;
        reading
    }

    /// Whether pressure is counted, as far as files say.
    pub fn have_pressure(&self) -> bool {
        self.pressure.iter().all(Option::is_some)
    }

    /// What has happened to its memory.
    pub fn memory_events(&self) -> Option<MemoryEvents> {
        read(&self.memory_events, &mut false)
    }

    /// CPU time, ns.
    pub fn cpu_ns(&self) -> Option<u64> {
        Some(read(&self.cpu_stat, &mut false)?.usage.0 * 1000)
    }

    /// How long the CPU limit has stopped the task so far, ns.
    pub fn throttled_ns(&self) -> Option<u64> {
        match &self.v1_cpu_stat {
            Some(_) => Some(read(&self.v1_cpu_stat, &mut false)?.throttled_ns),
            None => Some(read(&self.cpu_stat, &mut false)?.throttled?.0 * 1000),
        }
    }
}

fn read<T: Contents>(file: &Option<Opened<T>>, is_gone: &mut bool) -> Option<T> {
    match file.as_ref()?.read() {
        Ok(value) => Some(value),
        Err(error) => {
            *is_gone |= error.is_gone();
            if let CgroupError::Malformed { .. } = error {
                tracing::debug!(%error, "not measured");
            }
            None
        }
    }
}

fn open<R, W>(cgroup: &Cgroup, file: File<R, W>) -> Option<Open<R, W>> {
    match cgroup.open_file(file) {
        Ok(file) => file,
        Err(error) => {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, "cannot open a file of a cgroup: it is not measured");
            None
        }
    }
}

/// A file that is read anew each time, such as one of /proc.
pub fn read_to_string(path: &str) -> Option<String> {
    match std::fs::read_to_string(path) {
        Ok(text) => Some(text),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::Unsupported) => None,
        Err(error) => {
            tracing::debug!(path, %error, "cannot read");
            None
        }
    }
}
