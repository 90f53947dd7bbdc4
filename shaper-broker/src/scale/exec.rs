//! A program of the operator's that is told what size a group is to have.

use std::process::Stdio;

use shaper_core::scale::{Group, Order};
use tokio::{io::AsyncWriteExt, process::Command};

use super::webhook::data;

/// Where programs that it starts are looked for.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The program.
pub(super) struct Exec {
    command: Vec<String>,
}

impl Exec {
    pub(super) fn new(command: &[String]) -> Exec {
        Exec { command: command.to_vec() }
    }

    /// Runs it, with the order as JSON in its input. It is killed if whoever waits for this does no more.
    pub(super) async fn carry_out(&self, group: &Group, order: &Order) -> Result<(), String> {
        let [program, arguments @ ..] = &self.command[..] else {
            return Err("there is no program".to_owned());
        };
        let mut command = Command::new(program);
        command.args(arguments).env_clear().env("PATH", PATH).current_dir("/").kill_on_drop(true);
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|error| format!("cannot start {program}: {error}"))?;
        if let Some(mut input) = child.stdin.take() {
            // It need not read it.
            let _ = input.write_all(data(group, order).to_string().as_bytes()).await;
        }
        let output =
            child.wait_with_output().await.map_err(|error| format!("cannot wait for {program}: {error}"))?;
        if output.status.success() {
            return Ok(());
        }
        let text = String::from_utf8_lossy(&output.stderr);
        Err(format!("{program} failed ({}): {}", output.status, text.trim()))
    }
}
