//! As root, from a cgroup namespace of its own.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::process::{Command, Output};

const PROGRAM: &str = env!("CARGO_BIN_EXE_shaper-nsenter");
const SYS_ADMIN: u64 = 1 << 21;
const SETPCAP: u64 = 1 << 8;
const NET_ADMIN: u64 = 1 << 12;

/// Runs a program in a cgroup namespace of its own, where process 1 is not in it: a shell stands for the machine's.
fn within(program: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new("unshare");
    command.args([
        "--pid",
        "--fork",
        "--mount-proc",
        "sh",
        "-c",
        "unshare --cgroup -- \"$@\"; exit $?",
        "sh",
    ]);
    command.arg(program).args(arguments).output().unwrap()
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

#[test]
fn the_program_is_in_the_machines_namespace_and_lacks_what_that_took() {
    let host = text(&Command::new("readlink").arg("/proc/self/ns/cgroup").output().unwrap());
    let link = ["/proc/self/ns/cgroup"];
    let contained = text(&within("readlink", &link));
    assert!(host.starts_with("cgroup:[") && contained.starts_with("cgroup:["), "{host} {contained}");
    assert_ne!(contained, host);
    assert_eq!(text(&within(PROGRAM, &["readlink", link[0]])), host);

    let status = text(&within(PROGRAM, &["cat", "/proc/self/status"]));
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
        let line = status.lines().find_map(|line| line.strip_prefix(set)).unwrap();
        let has = u64::from_str_radix(line.trim(), 16).unwrap();
        assert_eq!(has & (SYS_ADMIN | SETPCAP), 0, "{set} {has:x}");
        if ["CapPrm:", "CapEff:", "CapBnd:"].contains(&set) {
            assert_ne!(has & NET_ADMIN, 0, "{set} {has:x}");
        }
    }
}

#[test]
fn it_is_the_program_and_says_why_it_cannot_be() {
    let ended = within(PROGRAM, &["sh", "-c", "exit 7"]);
    assert_eq!(ended.status.code(), Some(7));
    for (arguments, why) in [(&[][..], "usage"), (&["/nonexistent"], "cannot start /nonexistent")] {
        let refused = within(PROGRAM, arguments);
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(!refused.status.success() && said.contains(why), "{said}");
    }
    let alone = Command::new("unshare").args(["--pid", "--fork", PROGRAM, "true"]).output().unwrap();
    assert!(String::from_utf8_lossy(&alone.stderr).contains("hostPID"), "{alone:?}");
}
