//! The program as a caller of runtimes has it: in front of a script that stands for runc and says how it was called.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use serde_json::{Value, json};
use tempfile::TempDir;

struct Host {
    directory: TempDir,
}

impl Host {
    /// With a runtime that prints its arguments and its descriptors, and ends with status 7.
    fn new(fail: &str) -> Host {
        let host = Host { directory: tempfile::tempdir().unwrap() };
        let runtime = host.at("runc");
        fs::write(&runtime, "#!/bin/sh\nprintf '%s\\n' \"$@\"\nls -1 /proc/$$/fd | wc -l\nexit 7\n").unwrap();
        fs::set_permissions(&runtime, fs::Permissions::from_mode(0o755)).unwrap();
        let agent = host.at("agent.sock");
        let settings = format!(
            "runtime: {}\nagent: {}\nfail: {fail}\npatience_seconds: 1\n",
            runtime.display(),
            agent.display()
        );
        fs::write(host.at("runtime.yaml"), settings).unwrap();
        fs::create_dir(host.at("bundle")).unwrap();
        fs::write(host.config(), r#"{"ociVersion":"1.0.2"}"#).unwrap();
        host
    }

    fn at(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn config(&self) -> PathBuf {
        self.at("bundle/config.json")
    }

    fn call(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_shaper-runtime"));
        command.arg("--shaper-config").arg(self.at("runtime.yaml")).args(arguments);
        command.current_dir(self.at("bundle")).output().unwrap()
    }

    fn hooks(&self) -> Value {
        let config: Value = serde_json::from_slice(&fs::read(self.config()).unwrap()).unwrap();
        config["hooks"]["createRuntime"].clone()
    }
}

#[test]
fn calls_are_handed_over_whole_and_what_is_made_has_the_hook() {
    let host = Host::new("closed");
    let said = host.call(&["--root", "/r", "state", "c"]);
    // What the runtime has without us: the same words, and no descriptor more.
    let plain = Command::new(host.at("runc")).args(["--root", "/r", "state", "c"]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&said.stdout), String::from_utf8_lossy(&plain.stdout));
    assert!(plain.stdout.starts_with(b"--root\n/r\nstate\nc\n"));
    assert_eq!((said.status.code(), said.stderr), (Some(7), plain.stderr));
    assert_eq!(host.hooks(), Value::Null);

    let said = host.call(&["create", "--pid-file", "/p", "c"]);
    assert_eq!(said.status.code(), Some(7));
    let own = env!("CARGO_BIN_EXE_shaper-runtime");
    let file = format!("--shaper-config={}", host.at("runtime.yaml").display());
    let own = fs::canonicalize(own).unwrap();
    assert_eq!(host.hooks(), json!([{"path": own, "args": ["shaper-runtime", file, "admit"], "timeout": 3}]));
}

#[test]
fn a_bundle_that_is_not_roots_alone_is_refused_or_handed_over_as_it_is() {
    for (fail, code) in [("closed", 1), ("open", 7)] {
        let host = Host::new(fail);
        fs::set_permissions(host.at("bundle"), fs::Permissions::from_mode(0o777)).unwrap();
        let log = host.at("log.json");
        let said = host.call(&["--log", log.to_str().unwrap(), "--log-format", "json", "create", "c"]);
        assert_eq!(said.status.code(), Some(code));
        assert_eq!(host.hooks(), Value::Null);
        if fail == "closed" {
            // As containerd reads it.
            let line: Value = serde_json::from_slice(&fs::read(&log).unwrap()).unwrap();
            let message = line["msg"].as_str().unwrap();
            assert!(message.contains("may be written by others than root"), "{message}");
            assert_eq!(line["level"], "error");
            assert!(line["time"].as_str().unwrap().ends_with('Z'), "{line}");
        }
    }
}

#[test]
fn where_the_agent_is_away_the_settings_decide() {
    for (fail, code) in [("closed", 1), ("open", 0)] {
        let host = Host::new(fail);
        let state = host.at("state.json");
        fs::write(&state, r#"{"ociVersion":"1.0.2","id":"c","status":"creating","pid":1}"#).unwrap();
        let said = admit(&host, &state);
        let text = String::from_utf8(said.stderr).unwrap();
        assert_eq!(said.status.code(), Some(code), "{text}");
        assert_eq!(text.contains("the agent is not there"), fail == "closed", "{text}");
    }
}

fn admit(host: &Host, state: &Path) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_shaper-runtime"));
    command.arg(format!("--shaper-config={}", host.at("runtime.yaml").display())).arg("admit");
    command.env_clear().stdin(fs::File::open(state).unwrap()).output().unwrap()
}

#[test]
fn settings_that_are_wrong_are_an_error_with_the_line() {
    let host = Host::new("shut");
    let said = host.call(&["create", "c"]);
    let text = String::from_utf8(said.stderr).unwrap();
    assert_eq!(said.status.code(), Some(1));
    assert!(text.contains("runtime.yaml:3:") && text.contains("open"), "{text}");
}
