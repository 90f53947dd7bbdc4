//! Starts a program in the cgroup namespace of this machine, from a container that shares its processes (`hostPID`).
//!
//! A container has a cgroup namespace of its own unless it is privileged, and where cgroup v2 is mounted with `nsdelegate`, as
//! systemd mounts it, no process gets out of the cgroups of its namespace: the agent could not move to cgroups of its own. To
//! enter another namespace takes CAP_SYS_ADMIN, and to let go of that for good, CAP_SETPCAP. The program has neither.
#![forbid(unsafe_code)]

use std::{
    env,
    ffi::OsString,
    fs::{self, File},
    io,
    os::{fd::AsFd, unix::process::CommandExt},
    process::{Command, ExitCode, id},
};

use rustix::thread::{
    CapabilitySet, LinkNameSpaceType, capabilities, capability_is_in_bounding_set,
    clear_ambient_capability_set, move_into_link_name_space, remove_capability_from_bounding_set,
    set_capabilities,
};

/// What this program has and the next one has not. SETPCAP last: it takes away the others.
const DROPPED: [CapabilitySet; 2] = [CapabilitySet::SYS_ADMIN, CapabilitySet::SETPCAP];

const OURS: &str = "/proc/self/ns/cgroup";
const HOSTS: &str = "/proc/1/ns/cgroup";

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("usage: shaper-nsenter PROGRAM [ARGUMENT]...")]
    Usage,
    #[error("this is process 1 of its own: start the container with the machine's processes (hostPID: true)")]
    Alone,
    #[error("cannot look at {0}: {1}; it takes CAP_SYS_PTRACE, and no AppArmor profile that forbids it")]
    Look(&'static str, io::Error),
    #[error("cannot enter the machine's cgroup namespace: {0}; it takes CAP_SYS_ADMIN")]
    Enter(io::Error),
    #[error("cannot let go of capabilities: {0}; it takes CAP_SETPCAP")]
    LetGo(io::Error),
    #[error("cannot start {}: {source}", program.display())]
    Start { program: OsString, source: io::Error },
}

fn main() -> ExitCode {
    let error = start();
    eprintln!("shaper-nsenter: {error}");
    ExitCode::FAILURE
}

/// Becomes the program, or says why not.
fn start() -> Error {
    let mut words = env::args_os().skip(1);
    let Some(program) = words.next() else { return Error::Usage };
    if let Err(error) = enter().and_then(|()| let_go().map_err(|errno| Error::LetGo(errno.into()))) {
        return error;
    }
    let source = Command::new(&program).args(words).exec();
    Error::Start { program, source }
}

fn enter() -> Result<(), Error> {
    if id() == 1 {
        return Err(Error::Alone);
    }
    let look = |path| fs::read_link(path).map_err(|source| Error::Look(path, source));
    // A privileged container is there already.
    if look(OURS)? == look(HOSTS)? {
        return Ok(());
    }
    let hosts = File::open(HOSTS).map_err(|source| Error::Look(HOSTS, source))?;
    move_into_link_name_space(hosts.as_fd(), Some(LinkNameSpaceType::ControlGroup))
        .map_err(|errno| Error::Enter(errno.into()))
}

/// Of root, the next program has what is in the bounding set, and what it inherits.
fn let_go() -> rustix::io::Result<()> {
    let mut sets = capabilities(None)?;
    clear_ambient_capability_set()?;
    for dropped in DROPPED {
        sets.inheritable.remove(dropped);
        if capability_is_in_bounding_set(dropped)? {
            remove_capability_from_bounding_set(dropped)?;
        }
    }
    set_capabilities(None, sets)
}
