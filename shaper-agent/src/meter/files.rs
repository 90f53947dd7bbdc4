//! The files of one cgroup, opened once and read again and again.

use std::{fs::File, io, os::unix::fs::FileExt};

use rustix::fs::{Mode, OFlags};
use shaper_core::snapshot::Pressure;

use crate::{
    actuate::Target,
    kernel::{cgroup::Cgroup, v1::V1Group},
};

/// What the files said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reading {
    /// CPU time, ns.
    pub cpu_ns: Option<u64>,
    /// Time that the CPU limit stopped it, ns.
    pub throttled_ns: Option<u64>,
    /// Memory in use, bytes.
    pub memory: Option<u64>,
    /// The most there was.
    pub memory_peak: Option<u64>,
    /// Processes killed for want of memory.
    pub oom_kills: Option<u64>,
    /// Pressure on CPU …
    pub cpu_pressure: Option<Pressure>,
    /// … memory …
    pub memory_pressure: Option<Pressure>,
    /// … and block IO.
    pub io_pressure: Option<Pressure>,
    /// Block IO by device.
    pub io: Option<Vec<DeviceIo>>,
    /// The cgroup is not there any more.
    pub is_gone: bool,
}

/// A line of `io.stat`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceIo {
    /// As the kernel numbers it inside: major << 20 | minor.
    pub device: u32,
    /// Bytes read, bytes written.
    pub bytes: [u64; 2],
    /// Reads, writes.
    pub operations: [u64; 2],
}

/// The open files; one that is not there stays closed.
#[derive(Default)]
pub struct Files {
    cpu_stat: Option<File>,
    throttled: Option<File>,
    memory: Option<File>,
    memory_peak: Option<File>,
    memory_events: Option<File>,
    pressure: [Option<File>; 3],
    io_stat: Option<File>,
}

/// cpu.stat and io.stat of a cgroup with many devices are the longest.
const BUFFER: usize = 8192;

impl Files {
    /// Opens what is there for a task; `io_stat` if no kernel program counts block IO.
    pub fn open(target: &Target, io_stat: bool) -> Files {
        let v2 = |name| open(&target.cgroup, name);
        let v1 = |group: &Option<V1Group>, name| File::open(group.as_ref()?.directory().join(name)).ok();
        let throttled = v1(&target.v1_cpu, "cpu.stat");
        Files {
            cpu_stat: v2("cpu.stat"),
            throttled,
            memory: v2("memory.current").or_else(|| v1(&target.v1_memory, "memory.usage_in_bytes")),
            memory_peak: v2("memory.peak").or_else(|| v1(&target.v1_memory, "memory.max_usage_in_bytes")),
            memory_events: v2("memory.events").or_else(|| v1(&target.v1_memory, "memory.oom_control")),
            pressure: ["cpu.pressure", "memory.pressure", "io.pressure"].map(v2),
            io_stat: if io_stat { v2("io.stat") } else { None },
        }
    }

    /// Reads them all. What cannot be read, or makes no sense, is not there.
    pub fn read(&self) -> Reading {
        let mut buffer = [0; BUFFER];
        let mut is_gone = false;
        let mut text = |file: &Option<File>| -> Option<String> {
            let length = match file.as_ref()?.read_at(&mut buffer, 0) {
                Ok(length) => length,
                Err(error) => {
                    is_gone |= error.raw_os_error() == Some(libc::ENODEV);
                    return None;
                }
            };
            String::from_utf8(buffer[..length].to_vec()).ok()
        };
        let cpu_stat = text(&self.cpu_stat);
        let cpu = |name| value(cpu_stat.as_deref()?, name);
        let throttled_ns = match text(&self.throttled) {
            Some(v1) => value(&v1, "throttled_time"),
            None => cpu("throttled_usec").map(|us| us * 1000),
        };
        let whole = |text: Option<String>| text?.trim().parse().ok();
        let [cpu_pressure, memory_pressure, io_pressure] =
            [0, 1, 2].map(|index| pressure(&text(&self.pressure[index])?));
        let mut reading = Reading {
            cpu_ns: cpu("usage_usec").map(|us| us * 1000),
            throttled_ns,
            memory: whole(text(&self.memory)),
            memory_peak: whole(text(&self.memory_peak)),
            oom_kills: text(&self.memory_events).and_then(|text| value(&text, "oom_kill")),
            cpu_pressure,
            memory_pressure,
            io_pressure,
            io: text(&self.io_stat).map(|text| io_stat(&text)),
            is_gone: false,
        };
        reading.is_gone = is_gone;
        reading
    }

    /// CPU time, ns.
    pub fn cpu_ns(&self) -> Option<u64> {
        let mut buffer = [0; BUFFER];
        let length = self.cpu_stat.as_ref()?.read_at(&mut buffer, 0).ok()?;
        value(std::str::from_utf8(&buffer[..length]).ok()?, "usage_usec").map(|us| us * 1000)
    }

    /// How long the CPU limit has stopped the task so far, ns.
    pub fn throttled_ns(&self) -> Option<u64> {
        let mut buffer = [0; BUFFER];
        let (file, name, scale) = match &self.throttled {
            Some(v1) => (v1, "throttled_time", 1),
            None => (self.cpu_stat.as_ref()?, "throttled_usec", 1000),
        };
        let length = file.read_at(&mut buffer, 0).ok()?;
        value(std::str::from_utf8(&buffer[..length]).ok()?, name).map(|value| value * scale)
    }
}

fn open(cgroup: &Cgroup, name: &str) -> Option<File> {
    let opened = rustix::fs::openat(cgroup, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    match opened {
        Ok(file) => Some(file.into()),
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::OPNOTSUPP) => None,
        Err(error) => {
            let path = cgroup.path().join(name);
            tracing::warn!(path = %path.display(), %error, "cannot open a file of a cgroup: it is not measured");
            None
        }
    }
}

/// The value behind `name` in lines of names and values.
pub fn value(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?.trim().parse().ok()
}

/// Pressure stall information, as in `/proc/pressure`.
pub fn pressure(text: &str) -> Option<Pressure> {
    let mut found = Pressure::default();
    let mut has_some = false;
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        let kind = words.next()?;
        let field = |name: &str| line.split_ascii_whitespace().find_map(|word| word.strip_prefix(name));
        let avg10 = hundredths(field("avg10=")?)?;
        let total = field("total=")?.parse().ok()?;
        match kind {
            "some" => {
                (found.some_avg10, found.some_total_us) = (avg10, total);
                has_some = true;
            }
            "full" => (found.full_avg10, found.full_total_us) = (avg10, total),
            _ => return None,
        }
    }
    has_some.then_some(found)
}

/// `12.34` as 1234.
fn hundredths(text: &str) -> Option<u32> {
    let (whole, fraction) = text.split_once('.')?;
    if fraction.len() != 2 {
        return None;
    }
    Some(whole.parse::<u32>().ok()?.checked_mul(100)? + fraction.parse::<u32>().ok()?)
}

/// The lines of `io.stat` that say something.
pub fn io_stat(text: &str) -> Vec<DeviceIo> {
    let line = |line: &str| {
        let (device, values) = line.split_once(' ')?;
        let (major, minor) = device.split_once(':')?;
        let field = |name: &str| {
            values.split(' ').find_map(|word| word.strip_prefix(name)).and_then(|value| value.parse().ok())
        };
        Some(DeviceIo {
            device: major.parse::<u32>().ok()? << 20 | minor.parse::<u32>().ok()?,
            bytes: [field("rbytes=")?, field("wbytes=")?],
            operations: [field("rios=")?, field("wios=")?],
        })
    };
    text.lines().filter_map(line).collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pressure_is_read_in_hundredths() {
        let text = "some avg10=1.53 avg60=0.87 avg300=0.36 total=9471\nfull avg10=0.05 avg60=0.00 avg300=0.00 total=12\n";
        let expected = Pressure { some_avg10: 153, full_avg10: 5, some_total_us: 9471, full_total_us: 12 };
        assert_eq!(pressure(text), Some(expected));
        assert_eq!(pressure(text.lines().next().unwrap()).map(|found| found.full_total_us), Some(0));
        for broken in ["", "some avg10=1.5 total=1", "some avg10=1.53", "many avg10=1.53 total=2"] {
            assert_eq!(pressure(broken), None, "{broken}");
        }
    }

    #[test]
    fn io_stat_has_a_line_for_each_device() {
        let text = "254:0 rbytes=4096 wbytes=8192 rios=1 wios=2 dbytes=0 dios=0\n7:0 \n8:16 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n";
        let found = io_stat(text);
        assert_eq!(found.len(), 2);
        assert_eq!(found[0], DeviceIo { device: 254 << 20, bytes: [4096, 8192], operations: [1, 2] });
        assert_eq!(found[1].device, 8 << 20 | 16);
    }

    #[test]
    fn a_value_is_found_by_its_whole_name() {
        let text = "oom 3\noom_kill 2\noom_group_kill 1\n";
        assert_eq!(value(text, "oom_kill"), Some(2));
        assert_eq!(value(text, "oom_kil"), None);
    }
}
