//! A supervisor that somebody else starts: systemd, as the main process of a unit.
//!
//! It has no parent in the agent, so that neither it nor the task inherits anything from it. It is started before its
//! task is known, since its cgroup has to be there first; it says its process id, and waits for a word. Where that
//! does not come, because the agent has gone, it ends, and its unit with it.

use std::{
    io::{self, Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    time::Duration,
};

use super::{Heard, SpawnError, Spawned, attempt, hear, open_pidfd, spawned};

/// The word.
pub(super) const GO: &[u8] = b"\n";

/// A supervisor that waits for a word.
#[derive(Debug)]
pub struct Hired {
    line: UnixStream,
    pid: u32,
}

impl Hired {
    /// Waits at most `deadline` for a supervisor to say who it is. `line` is the other end of its standard input and output.
    pub fn answered(line: UnixStream, deadline: Duration) -> io::Result<Hired> {
        let said = match hear(&mut &line, deadline)? {
            Heard::Line(said) => said,
            Heard::End => return Err(io::Error::new(io::ErrorKind::BrokenPipe, "it has ended")),
            Heard::Nothing => return Err(io::ErrorKind::TimedOut.into()),
        };
        let pid = std::str::from_utf8(&said).ok().and_then(|said| said.trim_end().parse().ok());
        let pid = pid.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "it says no process id"))?;
        Ok(Hired { line, pid })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Has it run the attempt in `attempt_dir`, as [`super::spawn`] does.
    pub fn go(mut self, attempt_dir: &Path, deadline: Duration) -> Result<Spawned, SpawnError> {
        let io_error = |operation| {
            move |source: io::Error| SpawnError::Io { operation, directory: attempt_dir.to_owned(), source }
        };
        // It may have ended, but as long as it holds the other end its id is its own.
        let pidfd = open_pidfd(self.pid).map_err(|errno| io_error("open a pidfd of")(errno.into()))?;
        let start_time = attempt::start_time(self.pid).map_err(io_error("read the start time of"))?;
        self.line.write_all(GO).map_err(io_error("write to"))?;
        let heard = hear(&mut &self.line, deadline).map_err(io_error("read from"))?;
        spawned(heard, self.pid, start_time, pidfd, attempt_dir, deadline)
            .unwrap_or_else(|| Err(SpawnError::Left { directory: attempt_dir.to_owned() }))
    }
}

/// In the supervisor: says who it is and waits for the word. False: it is not to run anything.
pub(super) fn is_wanted() -> io::Result<bool> {
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{}", std::process::id())?;
    stdout.flush()?;
    let mut word = [0; GO.len()];
    // Not through std's own buffer.
    let mut stdin = std::fs::File::from(owned_stdin()?);
    loop {
        match stdin.read(&mut word) {
            Ok(got) => return Ok(got == GO.len()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn owned_stdin() -> io::Result<OwnedFd> {
    Ok(rustix::io::fcntl_dupfd_cloexec(io::stdin().as_fd(), 3)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(5);

    #[test]
    fn it_is_known_by_what_it_says() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(b"4711\n").unwrap();
        assert_eq!(Hired::answered(ours, SOON).unwrap().pid(), 4711);

        for (said, kind) in
            [(&b"who?\n"[..], io::ErrorKind::InvalidData), (&b""[..], io::ErrorKind::BrokenPipe)]
        {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            theirs.write_all(said).unwrap();
            drop(theirs);
            assert_eq!(Hired::answered(ours, SOON).unwrap_err().kind(), kind, "{said:?}");
        }
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let silent = Hired::answered(ours, Duration::from_millis(10));
        assert_eq!(silent.unwrap_err().kind(), io::ErrorKind::TimedOut);
    }
}
