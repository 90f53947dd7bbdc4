//! systemd as PID 1, and units of a test's own.

use std::{ffi::OsStr, process::Command};

use crate::cgroup::unique_name;

/// A transient service. Dropping it stops it.
pub struct Unit {
    name: String,
}

impl Unit {
    /// Starts `command` as one with these properties.
    pub fn start(command: &Command, properties: &[&str]) -> Unit {
        let name = format!("{}.service", unique_name());
        let mut run = Command::new("systemd-run");
        run.args(["--quiet", "--collect", "--service-type=exec", "--unit", &name]);
        for property in properties {
            run.args(["--property", property]);
        }
        for (variable, value) in command.get_envs() {
            let value = value.expect("a unit's environment starts empty");
            run.args([OsStr::new("--setenv"), &[variable, value].join(OsStr::new("="))]);
        }
        say(run.arg("--").arg(command.get_program()).args(command.get_args()));
        Unit { name }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A property, as `systemctl show` has it.
    pub fn property(&self, name: &str) -> String {
        systemctl(&["show", "--value", "--property", name, &self.name])
    }
}

impl Drop for Unit {
    fn drop(&mut self) {
        let stopped = Command::new("systemctl").args(["stop", &self.name]).status();
        if !stopped.is_ok_and(|status| status.success()) {
            eprintln!("cannot stop {}", self.name);
        }
    }
}

/// What `systemctl` prints; it must succeed.
#[track_caller]
pub fn systemctl(arguments: &[&str]) -> String {
    say(Command::new("systemctl").args(arguments))
}

/// Whether systemd has started what it was told to: `starting`, `running`, `degraded` …; `offline` is no systemd.
pub fn state() -> String {
    // Its exit code says the same, and is 0 for `running` only.
    let output = Command::new("systemctl").arg("is-system-running").output().expect("systemctl is installed");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

#[track_caller]
fn say(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}", said.trim());
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}
