//! Pressure stall information and its triggers (Documentation/accounting/psi.rst).

use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags};
use shaper_core::{snapshot::Pressure, units::Micros};

use super::{
    Cgroup, CgroupError,
    file::{Contents, File, Malformed, ReadOnly, hundredths, number},
};

/// Waiting for a CPU.
pub const CPU: File<Pressure, ReadOnly> = File::new("cpu.pressure");
/// Waiting for memory.
pub const MEMORY: File<Pressure, ReadOnly> = File::new("memory.pressure");
/// Waiting for block IO.
pub const IO: File<Pressure, ReadOnly> = File::new("io.pressure");

impl Contents for Pressure {
    fn from_text(text: &str) -> Result<Pressure, Malformed> {
        let mut found = Pressure::default();
        let mut has_some = false;
        for line in text.lines() {
            let malformed = || Malformed::new(line);
            let (kind, fields) = line.split_once(' ').ok_or_else(malformed)?;
            let field =
                |name: &str| fields.split(' ').find_map(|word| word.strip_prefix(name)).ok_or_else(malformed);
            let (avg10, total) = (hundredths(field("avg10=")?)?, number(field("total=")?)?);
            match kind {
                "some" => {
                    (found.some_avg10, found.some_total_us) = (avg10, total);
                    has_some = true;
                }
                "full" => (found.full_avg10, found.full_total_us) = (avg10, total),
                _ => return Err(malformed()),
            }
        }
        if has_some { Ok(found) } else { Err(Malformed::new(text)) }
    }
}

/// Who has to wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stall {
    /// At least one task.
    Some,
    /// All that could run.
    Full,
}

/// What the kernel is to tell of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trigger {
    /// Who has to wait …
    pub stall: Stall,
    /// … so long …
    pub time: Micros,
    /// … in such a window. Without CAP_SYS_RESOURCE only whole pairs of seconds are allowed; before 6.5 none is
    /// below half a second.
    pub window: Micros,
}

impl Trigger {
    fn text(&self) -> String {
        let stall = match self.stall {
            Stall::Some => "some",
            Stall::Full => "full",
        };
        // The kernel takes the zero with it.
        format!("{stall} {} {}\0", self.time.0, self.window.0)
    }
}

impl Cgroup {
    /// Has the kernel tell of pressure: the descriptor has `EPOLLPRI` each time, at most once a window, and `EPOLLERR`
    /// once the cgroup is gone. `None` where the kernel counts no pressure. The trigger goes with the descriptor.
    pub fn watch_pressure(
        &self,
        file: File<Pressure, ReadOnly>,
        trigger: &Trigger,
    ) -> Result<Option<OwnedFd>, CgroupError> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let fd = match rustix::fs::openat(self, file.name(), flags, Mode::empty()) {
            Ok(fd) => fd,
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::OPNOTSUPP) => return Ok(None),
            Err(errno) => return Err(self.error("open", file.name(), errno.into())),
        };
        match rustix::io::write(&fd, trigger.text().as_bytes()) {
            Ok(_) => Ok(Some(fd)),
            Err(rustix::io::Errno::OPNOTSUPP) => Ok(None),
            Err(errno) => Err(self.error("set a trigger on", file.name(), errno.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn pressure_is_read_in_hundredths() {
        let text = "some avg10=1.53 avg60=0.87 avg300=0.36 total=9471\nfull avg10=0.05 avg60=0.00 avg300=0.00 total=12";
        let expected = Pressure { some_avg10: 153, full_avg10: 5, some_total_us: 9471, full_total_us: 12 };
        assert_eq!(Pressure::from_text(text), Ok(expected));
        // The CPU pressure of a machine had one line before 5.13.
        let some = text.lines().next().unwrap();
        assert_eq!(Pressure::from_text(some).map(|found| found.full_total_us), Ok(0));
        for broken in ["", "some avg10=1.5 total=1", "some avg10=1.53", "many avg10=1.53 total=2", "some"] {
            assert!(Pressure::from_text(broken).is_err(), "{broken}");
        }
        assert!(Pressure::from_text(text.lines().nth(1).unwrap()).is_err(), "full alone is not pressure");
    }

    #[test]
    fn a_trigger_as_the_kernel_takes_it() {
        let trigger = Trigger { stall: Stall::Full, time: Micros(100_000), window: Micros(2_000_000) };
        assert_eq!(trigger.text(), "full 100000 2000000\0");
    }

    proptest! {
        #[test]
        fn whatever_the_numbers(some in 0u32..=10_000, full in 0u32..=10_000, totals: (u64, u64)) {
            let line = |kind, avg: u32, total| {
                format!("{kind} avg10={}.{:02} avg60=0.00 avg300=0.00 total={total}", avg / 100, avg % 100)
            };
            let text = format!("{}\n{}", line("some", some, totals.0), line("full", full, totals.1));
            let expected =
                Pressure { some_avg10: some, full_avg10: full, some_total_us: totals.0, full_total_us: totals.1 };
            prop_assert_eq!(Pressure::from_text(&text), Ok(expected));
        }

        #[test]
        fn no_text_panics(text in "[ -~\n]{0,64}") {
            let _ = Pressure::from_text(&text);
        }
    }
}
