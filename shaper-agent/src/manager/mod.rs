//! Who else manages a cgroup, and writes to its files what he thinks should be there.
//!
//! systemd keeps what a unit may use in its own state, and writes that to the cgroup again whenever it reloads or any
//! property of the unit changes. So a change that stands is told to the manager first, and written to the file all the
//! same: the manager has its own way of rounding, and no word for some things. What lasts for a moment is only written.
//! Whatever a manager does of its own accord later is a second writer's work (docs/decisions/0012).

mod systemd;

use std::path::Path;

use crate::actuate::{Knob, Value};

pub use systemd::{Service, Slice, Unit, is_booted};

/// Who manages a cgroup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Manager {
    /// systemd: it is that of a unit.
    Systemd(Unit),
}

/// Why a manager has not taken a change.
#[derive(Debug, thiserror::Error)]
pub enum ManagerError {
    /// It does not answer.
    #[error("systemd cannot be asked")]
    Unreachable(#[source] Box<zbus::Error>),
    /// It says no.
    #[error("systemd refuses {knob} `{value}` for {unit}")]
    Refused {
        /// What was to be turned.
        knob: Knob,
        /// To what.
        value: Box<Value>,
        /// The unit.
        unit: String,
        /// What it said.
        #[source]
        said: Box<zbus::Error>,
    },
    /// It starts no unit.
    #[error("systemd does not start {unit}")]
    NotStarted {
        /// The unit.
        unit: String,
        /// What it said.
        #[source]
        said: Box<zbus::Error>,
    },
}

impl Manager {
    /// Finds who manages the cgroup `path`, from the mount point on; `None`: nobody that is known here.
    pub fn of(path: &Path) -> Result<Option<Manager>, ManagerError> {
        Ok(Unit::of(path)?.map(Manager::Systemd))
    }

    /// Tells what a knob is to hold from now on; `false`: it has no word for that.
    pub fn tell(&self, knob: Knob, value: &Value) -> Result<bool, ManagerError> {
        match self {
            Manager::Systemd(unit) => unit.tell(knob, value),
        }
    }
}

impl std::fmt::Display for Manager {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Manager::Systemd(unit) => write!(f, "systemd, as {}", unit.name()),
        }
    }
}
