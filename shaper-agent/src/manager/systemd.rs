//! systemd, over the system bus: what `systemctl set-property --runtime` does (org.freedesktop.systemd1(5)).

use std::{
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::mpsc,
    thread,
    time::Duration,
};

use serde::de::DeserializeOwned;
use shaper_core::limits::Limit;
use zbus::{
    blocking::{Connection, connection::Builder},
    zvariant::{self, DynamicType, OwnedObjectPath, OwnedValue},
};

use super::ManagerError;
use crate::{
    actuate::{Knob, Value},
    kernel::cgroup::cpu::CpuMax,
};

/// What is there if systemd is PID 1 (sd_booted(3)).
const BOOTED: &str = "/run/systemd/system";
const SERVICE: &str = "org.freedesktop.systemd1";
const MANAGER_PATH: &str = "/org/freedesktop/systemd1";
const MANAGER: &str = "org.freedesktop.systemd1.Manager";
const PROPERTIES: &str = "org.freedesktop.DBus.Properties";
/// The node waits for the answer.
const DEADLINE: Duration = Duration::from_secs(2);
/// `infinity`.
const NONE: u64 = u64::MAX;
/// The weight that stands for SCHED_IDLE (systemd 252).
const IDLE: u64 = 0;

/// A unit whose cgroup it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unit(String);

impl Unit {
    /// The unit whose cgroup is `path`, from the mount point on. A cgroup below that of a unit is not systemd's.
    pub(super) fn of(path: &Path) -> Result<Option<Unit>, ManagerError> {
        let Some(path) = path.to_str().filter(|_| is_booted()) else { return Ok(None) };
        let path = format!("/{}", path.trim_start_matches('/'));
        in_time(move || Unit::find(&path))
    }

    fn find(path: &str) -> Result<Option<Unit>, ManagerError> {
        let bus = connect()?;
        let found: OwnedObjectPath = match call(&bus, MANAGER_PATH, MANAGER, "GetUnitByControlGroup", &path) {
            // It is no unit's.
            Err(zbus::Error::MethodError(..)) => return Ok(None),
            other => other.map_err(unreachable)?,
        };
        let name = property(&bus, &found, "org.freedesktop.systemd1.Unit", "Id")?;
        let interface = match name.rsplit_once('.').map(|(_, kind)| kind) {
            Some("service") => "org.freedesktop.systemd1.Service",
            Some("scope") => "org.freedesktop.systemd1.Scope",
            Some("slice") => "org.freedesktop.systemd1.Slice",
            Some("socket") => "org.freedesktop.systemd1.Socket",
            Some("mount") => "org.freedesktop.systemd1.Mount",
            Some("swap") => "org.freedesktop.systemd1.Swap",
            // No other unit has a cgroup.
            _ => return Ok(None),
        };
        let its = property(&bus, &found, interface, "ControlGroup")?;
        Ok((its == path).then_some(Unit(name)))
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.0
    }

    pub(super) fn tell(&self, knob: Knob, value: &Value) -> Result<bool, ManagerError> {
        let properties = properties(knob, value);
        if properties.is_empty() {
            return Ok(false);
        }
        let (unit, value) = (self.0.clone(), *value);
        in_time(move || {
            let properties: Vec<(&str, zvariant::Value<'_>)> =
                properties.into_iter().map(|(name, value)| (name, value.into())).collect();
            let bus = connect()?;
            // Until the next boot, as all that shaper does.
            let runtime = true;
            let arguments = (&unit, runtime, properties);
            match call(&bus, MANAGER_PATH, MANAGER, "SetUnitProperties", &arguments) {
                Ok(()) => Ok(true),
                Err(said @ zbus::Error::MethodError(..)) => {
                    let (value, said) = (Box::new(value), Box::new(said));
                    Err(ManagerError::Refused { knob, value, unit, said })
                }
                Err(error) => Err(unreachable(error)),
            }
        })
    }
}

/// A slice of ours, below that of all services; systemd makes it when something in it starts, or needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice(String);

impl Slice {
    /// That for what is called `name`; there is none in between in the tree.
    pub fn named(name: &str) -> Slice {
        // A `-` would be one more slice above, and runc cuts what it is told at each `:`.
        Slice(format!("shaper-{}.slice", name.replace('_', "_u").replace('-', "_d")))
    }

    /// The one whose cgroup that of a task is.
    pub fn of(cgroup: &Path) -> Option<Slice> {
        let name = cgroup.file_name()?.to_str()?;
        name.ends_with(".slice").then(|| Slice(name.to_owned()))
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.0
    }

    /// Its cgroup, from the mount point on, while it is active.
    pub fn cgroup(&self) -> PathBuf {
        Path::new(Service::SLICE).join(&self.0)
    }

    /// Has systemd end it, and forget what it was told of it.
    pub fn stop(self) -> Result<(), ManagerError> {
        in_time(move || {
            let bus = connect()?;
            match call::<OwnedObjectPath>(&bus, MANAGER_PATH, MANAGER, "StopUnit", &(&self.0, "replace")) {
                // It is gone already.
                Ok(_) | Err(zbus::Error::MethodError(..)) => Ok(()),
                Err(error) => Err(unreachable(error)),
            }
        })
    }
}

/// Whether systemd is PID 1.
pub fn is_booted() -> bool {
    Path::new(BOOTED).exists()
}

/// A transient service of ours, in the slice of all of them, whose cgroup is ours to divide.
pub struct Service {
    /// Its name.
    pub name: String,
    /// What it is for.
    pub description: String,
    /// Program and arguments.
    pub command: Vec<String>,
    /// Its standard input and output.
    pub line: OwnedFd,
    /// A slice that is there before it starts.
    pub slice: Option<Slice>,
}

impl Service {
    /// The slice of all services that are started here.
    pub const SLICE: &str = "shaper.slice";

    /// Its cgroup, from the mount point on, while it runs.
    pub fn cgroup(name: &str) -> PathBuf {
        Path::new(Service::SLICE).join(name)
    }

    /// Has systemd begin to start it.
    pub fn start(self) -> Result<(), ManagerError> {
        in_time(move || self.ask())
    }

    fn ask(self) -> Result<(), ManagerError> {
        let Service { name, description, command, line, slice } = self;
        let Some(program) = command.first().cloned() else {
            return Err(unreachable(zbus::Error::from(io::Error::from(io::ErrorKind::InvalidInput))));
        };
        let exec = vec![(program, command, false)];
        let shutdown = vec!["shutdown.target"];
        let mut properties: Vec<(&str, zvariant::Value<'_>)> = vec![
            ("Description", description.into()),
            ("Slice", Service::SLICE.into()),
            ("Type", "exec".into()),
            ("ExecStart", zvariant::Value::new(exec)),
            ("Delegate", true.into()),
            // What it divides its cgroup for goes on without it; and an OOM kill there is not its end.
            ("KillMode", "process".into()),
            ("OOMPolicy", "continue".into()),
            ("CollectMode", "inactive-or-failed".into()),
            // No limit that nobody asked for.
            ("TasksMax", NONE.into()),
            // It needs nothing of what a boot brings, but ends in order.
            ("DefaultDependencies", false.into()),
            ("Conflicts", zvariant::Value::new(shutdown.clone())),
            ("Before", zvariant::Value::new(shutdown)),
            ("StandardInputFileDescriptor", zvariant::Value::new(zvariant::Fd::from(&line))),
            ("StandardOutputFileDescriptor", zvariant::Value::new(zvariant::Fd::from(&line))),
            ("StandardError", "journal".into()),
        ];
        if let Some(Slice(slice)) = slice {
            properties.push(("Wants", vec![slice.clone()].into()));
            properties.push(("After", vec![slice].into()));
        }
        let others: Vec<(&str, Vec<(&str, zvariant::Value<'_>)>)> = Vec::new();
        let bus = connect()?;
        let arguments = (&name, "fail", properties, others);
        match call::<OwnedObjectPath>(&bus, MANAGER_PATH, MANAGER, "StartTransientUnit", &arguments) {
            Ok(_job) => Ok(()),
            Err(said @ zbus::Error::MethodError(..)) => {
                Err(ManagerError::NotStarted { unit: name, said: Box::new(said) })
            }
            Err(error) => Err(unreachable(error)),
        }
    }
}

fn unreachable(error: zbus::Error) -> ManagerError {
    ManagerError::Unreachable(Box::new(error))
}

/// Asks on a thread of its own, and waits no longer than the node can: a bus that does not even shake hands would hold
/// it up for good.
fn in_time<T: Send + 'static>(
    ask: impl FnOnce() -> Result<T, ManagerError> + Send + 'static,
) -> Result<T, ManagerError> {
    let io = |error: io::Error| unreachable(zbus::Error::from(error));
    let (sender, answer) = mpsc::sync_channel(1);
    thread::Builder::new()
        .name("ask-systemd".into())
        .spawn(move || {
            // Nobody may wait any more.
            let _ = sender.send(ask());
        })
        .map_err(io)?;
    answer.recv_timeout(DEADLINE).unwrap_or_else(|_| Err(io(io::ErrorKind::TimedOut.into())))
}

fn connect() -> Result<Connection, ManagerError> {
    // Not systemd's private socket: what it sends there has a sender that zbus does not take for one.
    let builder = Builder::system().map_err(unreachable)?;
    builder.method_timeout(DEADLINE).build().map_err(unreachable)
}

fn call<T: DeserializeOwned + zvariant::Type>(
    bus: &Connection,
    path: &str,
    interface: &str,
    method: &str,
    arguments: &(impl serde::Serialize + DynamicType),
) -> zbus::Result<T> {
    bus.call_method(Some(SERVICE), path, Some(interface), method, arguments)?.body().deserialize()
}

fn property(
    bus: &Connection,
    object: &OwnedObjectPath,
    interface: &str,
    name: &str,
) -> Result<String, ManagerError> {
    let value: zbus::Result<OwnedValue> = call(bus, object, PROPERTIES, "Get", &(interface, name));
    value.and_then(|value| Ok(String::try_from(value)?)).map_err(unreachable)
}

/// What systemd calls it; nothing where it has no word for it. (It knows no burst, and `io.max` is divided anew each half
/// second.)
fn properties(knob: Knob, value: &Value) -> Vec<(&'static str, u64)> {
    match (knob, *value) {
        (Knob::Cpu, Value::Bandwidth(bandwidth)) => {
            let CpuMax { quota, period } = bandwidth.max;
            let per_second = quota.at().map_or(NONE, |quota| quota.0 * 1_000_000 / period.0.max(1));
            let period = if period == CpuMax::PERIOD { NONE } else { period.0 };
            vec![("CPUQuotaPerSecUSec", per_second), ("CPUQuotaPeriodUSec", period)]
        }
        (Knob::CpuWeight, Value::Weight(weight)) => vec![("CPUWeight", weight.get().into())],
        (Knob::CpuWeight, Value::Idle) => vec![("CPUWeight", IDLE)],
        (Knob::IoWeight, Value::Weight(weight)) => vec![("IOWeight", weight.get().into())],
        (Knob::Memory | Knob::MemoryHigh | Knob::MemoryLow, Value::Memory(limit)) => {
            let name = match knob {
                Knob::MemoryHigh => "MemoryHigh",
                Knob::MemoryLow => "MemoryLow",
                _ => "MemoryMax",
            };
            let bytes = match limit {
                Limit::At(bytes) => bytes.0,
                Limit::Unlimited => NONE,
            };
            vec![(name, bytes)]
        }
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use shaper_core::units::{Bytes, Micros, Weight};

    use super::*;
    use crate::kernel::cgroup::{block::IoLimits, cpu::Bandwidth};

    #[test]
    fn a_bus_that_does_not_answer_holds_nobody_up() {
        let (end, ended) = mpsc::channel::<()>();
        let answer = in_time(move || {
            // Until this test is over.
            let _ = ended.recv();
            Ok(())
        });
        assert!(matches!(answer, Err(ManagerError::Unreachable(_))), "{answer:?}");
        drop(end);
        assert!(matches!(in_time(|| Ok(7)), Ok(7)));
    }

    #[test]
    fn slices_are_told_apart_and_lie_in_that_of_all() {
        let slice = Slice::named("shaper-web_1.2");
        assert_eq!(slice.name(), "shaper-shaper_dweb_u1.2.slice");
        assert_ne!(slice, Slice::named("shaper_web-1.2"));
        assert_eq!(Slice::of(&Path::new("/sys/fs/cgroup").join(slice.cgroup())), Some(slice));
        assert_eq!(Slice::of(Path::new("/sys/fs/cgroup/shaper/web.slice.1")), None);
    }

    #[test]
    fn systemd_has_its_own_words() {
        let bandwidth = |quota, period| {
            Value::Bandwidth(Bandwidth { max: CpuMax { quota, period }, burst: Some(Micros(5)) })
        };
        let cases = [
            (
                Knob::Cpu,
                bandwidth(Limit::At(Micros(50_000)), CpuMax::PERIOD),
                vec![("CPUQuotaPerSecUSec", 500_000), ("CPUQuotaPeriodUSec", NONE)],
            ),
            (
                Knob::Cpu,
                bandwidth(Limit::At(Micros(20_000)), Micros(50_000)),
                vec![("CPUQuotaPerSecUSec", 400_000), ("CPUQuotaPeriodUSec", 50_000)],
            ),
            (
                Knob::Cpu,
                bandwidth(Limit::Unlimited, CpuMax::PERIOD),
                vec![("CPUQuotaPerSecUSec", NONE), ("CPUQuotaPeriodUSec", NONE)],
            ),
            (Knob::CpuWeight, Value::Weight(Weight::MAX), vec![("CPUWeight", 10_000)]),
            (Knob::CpuWeight, Value::Idle, vec![("CPUWeight", 0)]),
            (Knob::Memory, Value::Memory(Limit::At(Bytes(4096))), vec![("MemoryMax", 4096)]),
            (Knob::MemoryHigh, Value::Memory(Limit::Unlimited), vec![("MemoryHigh", NONE)]),
            (Knob::NetEgress, Value::Rate(Limit::Unlimited), vec![]),
            (
                Knob::IoMax(shaper_core::id::BlockDevice { major: 8, minor: 0 }),
                Value::Io(IoLimits::default()),
                vec![],
            ),
        ];
        for (knob, value, expected) in cases {
            assert_eq!(properties(knob, &value), expected, "{knob} {value}");
        }
    }
}
