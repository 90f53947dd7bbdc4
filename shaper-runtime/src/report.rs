//! Where errors are told: to who called, in the log that it names, and to the system's.

use std::{fs::OpenOptions, io::Write, os::unix::net::UnixDatagram};

use serde_json::json;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::invocation::Invocation;

/// Facility daemon, severity warning (RFC 3164).
const PRIORITY: u32 = 3 * 8 + 4;

/// A line as runc writes it (logrus), by which containerd and Podman know why a container was not made.
pub(crate) fn to_caller(invocation: &Invocation, error: &str) {
    let Some((path, is_json)) = &invocation.log else { return };
    let time = OffsetDateTime::now_utc().format(&Rfc3339).unwrap_or_default();
    let message = format!("shaper-runtime: {error}");
    let line = if *is_json {
        json!({ "level": "error", "msg": message, "time": time }).to_string()
    } else {
        format!("time={time:?} level=error msg={message:?}")
    };
    // It is told on standard error as well.
    if let Ok(mut log) = OpenOptions::new().append(true).create(true).open(path) {
        let _ = writeln!(log, "{line}");
    }
}

/// To syslog, or journald, which listens in its place. Whoever is away hears nothing.
pub(crate) fn to_system(text: &str) {
    let Ok(socket) = UnixDatagram::unbound() else { return };
    let _ = socket.send_to(format!("<{PRIORITY}>shaper-runtime: {text}").as_bytes(), "/dev/log");
}
