//! How many files this process may have open: the meter keeps ten of each task's, and the usual limit of a thousand is
//! meant for programs that use select(2), which this is none of. Tasks are, perhaps: they get the limit that was found.

use std::{io, os::unix::process::CommandExt, process::Command, sync::OnceLock};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The limit that was found, where it was raised.
static FOUND: OnceLock<Rlimit> = OnceLock::new();

/// Raises the limit to the hard one.
pub fn raise() -> io::Result<()> {
    let found = getrlimit(Resource::Nofile);
    if found.current == found.maximum {
        return Ok(());
    }
    setrlimit(Resource::Nofile, Rlimit { current: found.maximum, maximum: found.maximum })?;
    // Nobody else raises it.
    let _ = FOUND.set(found);
    Ok(())
}

/// Has a child begin with the limit that this process began with.
pub(crate) fn restore_in(command: &mut Command) {
    let Some(found) = FOUND.get().copied() else { return };
    // SAFETY: between fork and exec, one system call, on memory that is the child's own.
    unsafe {
        command.pre_exec(move || Ok(setrlimit(Resource::Nofile, found)?));
    }
}
