//! What a caller of an OCI runtime asks for: as much of the command line of runc and crun as has to be understood here.

use std::{
    ffi::{OsStr, OsString},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

/// Options before the command that have a value, which may be a word of its own (runc(8), crun(1)).
const GLOBAL: [&str; 7] = ["root", "log", "log-format", "log-level", "criu", "rootless", "cgroup-manager"];
/// Those of `create` and `run`.
const OF_COMMAND: [&str; 7] = ["bundle", "b", "config", "f", "pid-file", "console-socket", "preserve-fds"];

/// One call of a runtime.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Invocation {
    /// Where the caller looks for errors, and whether as JSON.
    pub(crate) log: Option<(PathBuf, bool)>,
    /// The bundle of what is to be made; `None`: nothing is.
    pub(crate) bundle: Option<PathBuf>,
}

impl Invocation {
    pub(crate) fn of(arguments: &[OsString]) -> Invocation {
        let mut words = arguments.iter();
        let (mut log, mut is_json) = (None, false);
        let mut command = None;
        while let Some(word) = words.next() {
            let Some((name, value)) = option(word) else {
                command = Some(word.as_os_str());
                break;
            };
            let value = value.or_else(|| {
                takes_value(name, &GLOBAL).then(|| words.next()).flatten().map(|v| v.as_os_str())
            });
            match name {
                b"log" => log = value.map(PathBuf::from),
                b"log-format" => is_json = value == Some(OsStr::new("json")),
                _ => {}
            }
        }
        let makes = command.is_some_and(|command| command == "create" || command == "run");
        let bundle = makes.then(|| {
            let mut bundle = None;
            while let Some(word) = words.next() {
                let Some((name, value)) = option(word) else { continue };
                let value = value.or_else(|| {
                    takes_value(name, &OF_COMMAND).then(|| words.next()).flatten().map(|v| v.as_os_str())
                });
                if matches!(name, b"bundle" | b"b") {
                    bundle = value.map(PathBuf::from);
                }
            }
            bundle.unwrap_or_else(|| Path::new(".").to_owned())
        });
        Invocation { log: log.map(|path| (path, is_json)), bundle }
    }
}

/// The name of an option, and its value if that is in the same word.
fn option(word: &OsStr) -> Option<(&[u8], Option<&OsStr>)> {
    let text = word.as_bytes();
    let name =
        text.strip_prefix(b"--").or_else(|| text.strip_prefix(b"-")).filter(|name| !name.is_empty())?;
    match name.iter().position(|&byte| byte == b'=') {
        Some(end) => Some((&name[..end], Some(OsStr::from_bytes(&name[end + 1..])))),
        None => Some((name, None)),
    }
}

fn takes_value(name: &[u8], known: &[&str]) -> bool {
    known.iter().any(|known| known.as_bytes() == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(line: &str) -> Invocation {
        Invocation::of(&line.split_whitespace().map(OsString::from).collect::<Vec<_>>())
    }

    #[test]
    fn callers_are_understood() {
        // containerd's shim; Podman's conmon; by hand.
        let docker = of(
            "--root /run/docker/runtime-runc/moby --log /b/log.json --log-format json --systemd-cgroup create \
                         --bundle /b --pid-file /b/init.pid 4f0c",
        );
        assert_eq!((docker.log, docker.bundle), (Some(("/b/log.json".into(), true)), Some("/b".into())));
        let podman =
            of("--cgroup-manager systemd --log-format=json --log=/l create --bundle=/b --pid-file /p 4f0c");
        assert_eq!((podman.log, podman.bundle), (Some(("/l".into(), true)), Some("/b".into())));
        assert_eq!(of("run -b /b c").bundle, Some("/b".into()));
        assert_eq!(of("run --detach c").bundle, Some(".".into()));
        assert_eq!(of("run --pid-file --bundle c").bundle, Some(".".into()));
    }

    #[test]
    fn other_calls_make_nothing() {
        for line in [
            "",
            "--version",
            "start c",
            "delete --force run",
            "--root create state c",
            "--log create",
            "exec c create",
        ] {
            assert_eq!(of(line).bundle, None, "{line}");
        }
    }
}
