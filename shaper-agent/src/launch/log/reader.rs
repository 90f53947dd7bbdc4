//! The reading side, in the agent.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::FileExt,
    },
    path::{Path, PathBuf},
    sync::OnceLock,
};

use rustix::fs::{CWD, Mode, OFlags, inotify};
use tokio::io::Interest;

use super::{LogError, LogRecord, MAX_RECORD, decode, segment_path, segments};
use crate::launch::async_fd;

/// Reads a task's log from a cursor on, while it is written or after.
///
/// To follow: [`read`] until it returns nothing, then wait for [`changed`], and again.
///
/// [`read`]: LogReader::read
/// [`changed`]: LogReader::changed
pub struct LogReader {
    directory: PathBuf,
    cursor: u64,
    /// Kept open: a segment that is rotated away under a reader can still be read to its end.
    segment: Option<(u64, File)>,
    inotify: OnceLock<OwnedFd>,
}

impl LogReader {
    /// A reader of the log in `directory` from `cursor` on; 0 is the beginning.
    pub fn open(directory: &Path, cursor: u64) -> Result<LogReader, LogError> {
        // Says early that there is no such attempt.
        segments(directory)?;
        Ok(LogReader { directory: directory.to_owned(), cursor, segment: None, inotify: OnceLock::new() })
    }

    /// Where the next [`read`](LogReader::read) begins.
    pub fn cursor(&self) -> u64 {
        self.cursor
    }

    /// The next records, made of about `max_bytes` of the log and at least one; none at its end.
    pub fn read(&mut self, max_bytes: usize) -> Result<Vec<LogRecord>, LogError> {
        let mut records = Records::default();
        loop {
            // Before the segment is read: if there is a later one now, what is read is all of it.
            let offsets = segments(&self.directory)?;
            self.locate(&offsets, &mut records)?;
            let Some((offset, file)) = &self.segment else { break };
            let later = offsets.iter().copied().find(|other| other > offset);

            let mut buffer = vec![0; max_bytes.max(MAX_RECORD)];
            let got = read_at(file, &mut buffer, self.cursor - offset)
                .map_err(|source| LogError::new("read", &segment_path(&self.directory, *offset), source))?;
            let taken = records.decode(&buffer[..got]);
            if taken > 0 {
                self.cursor += taken as u64;
                break;
            }
            if got == buffer.len() {
                // Longer than any record, and no newline: damage.
                records.gap(got as u64);
                self.cursor += got as u64;
                break;
            }
            match later {
                None => break,
                Some(next) => {
                    records.gap(next.saturating_sub(self.cursor));
                    self.cursor = self.cursor.max(next);
                    self.segment = None;
                }
            }
        }
        Ok(records.0)
    }

    /// Opens the segment that the cursor is in, if there is one yet.
    fn locate(&mut self, offsets: &[u64], records: &mut Records) -> Result<(), LogError> {
        if self.segment.is_some() {
            return Ok(());
        }
        let before = offsets.iter().rev().find(|offset| **offset <= self.cursor);
        let Some(offset) = before.or(offsets.first()).copied() else { return Ok(()) };
        let path = segment_path(&self.directory, offset);
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file = match rustix::fs::openat(CWD, &path, flags, Mode::empty()) {
            Ok(file) => File::from(file),
            // Rotated away since it was listed, which takes two later ones.
            Err(rustix::io::Errno::NOENT) => {
                let later = segments(&self.directory)?;
                let progress = later.first().is_some_and(|first| *first > offset);
                return if progress { self.locate(&later, records) } else { Ok(()) };
            }
            Err(errno) => return Err(LogError::new("open", &path, errno)),
        };
        if offset > self.cursor {
            records.gap(offset - self.cursor);
            self.cursor = offset;
        }
        self.segment = Some((offset, file));
        Ok(())
    }

    /// Waits until the log has grown or `exit.json` has appeared. May return for less than that,
    /// and does the first time, because what happened before it was called is not known: read
    /// again, and call it again. One call at a time, within a tokio runtime that has IO enabled.
    pub async fn changed(&self) -> Result<(), LogError> {
        let failed = |operation, source| LogError::new(operation, &self.directory, source);
        let Some(inotify) = self.inotify.get() else {
            let watch = self.watch().map_err(|errno| failed("watch", errno.into()))?;
            // Another caller may have been faster; its watch does as well.
            let _ = self.inotify.set(watch);
            return Ok(());
        };
        let inotify = async_fd(inotify.as_fd(), Interest::READABLE)
            .map_err(|source| failed("register the watch of", source))?;
        let mut guard = inotify.readable().await.map_err(|source| failed("await a change of", source))?;
        let mut buffer = [0; 4096];
        loop {
            match guard.try_io(|inotify| Ok(rustix::io::read(inotify.get_ref(), &mut buffer).map(|_| ())?)) {
                Ok(Ok(())) => {}
                Ok(Err(source)) => return Err(failed("read the changes of", source)),
                Err(_would_block) => return Ok(()),
            }
        }
    }

    fn watch(&self) -> rustix::io::Result<OwnedFd> {
        let inotify = inotify::init(inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC)?;
        // Files that a rename brings, such as exit.json, and segments; bytes in either.
        let events = inotify::WatchFlags::MODIFY
            | inotify::WatchFlags::CREATE
            | inotify::WatchFlags::MOVED_TO
            | inotify::WatchFlags::ONLYDIR;
        inotify::add_watch(&inotify, &self.directory, events)?;
        Ok(inotify)
    }
}

/// Fills `buffer` from `offset` on, or up to the end of the file.
fn read_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    if i64::try_from(offset).is_err() {
        // A cursor that was never ours. No file reaches there, and `pread` would refuse.
        return Ok(0);
    }
    let mut got = 0;
    while got < buffer.len() {
        match file.read_at(&mut buffer[got..], offset + got as u64) {
            Ok(0) => break,
            Ok(more) => got += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(got)
}

#[derive(Default)]
struct Records(Vec<LogRecord>);

impl Records {
    fn gap(&mut self, bytes: u64) {
        match self.0.last_mut() {
            _ if bytes == 0 => {}
            Some(LogRecord::Gap { bytes: before }) => *before += bytes,
            _ => self.0.push(LogRecord::Gap { bytes }),
        }
    }

    /// Takes the whole lines of `log` and says how many bytes they are.
    fn decode(&mut self, log: &[u8]) -> usize {
        let mut taken = 0;
        for line in log.split_inclusive(|byte| *byte == b'\n') {
            let Some(text) = line.strip_suffix(b"\n") else { break };
            taken += line.len();
            match decode(text) {
                Some(record) => self.0.push(record),
                None => self.gap(line.len() as u64),
            }
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use std::{future::Future, io::Write, pin::pin, task::Poll};

    use super::{
        super::{LogWriter, Stream, encode},
        *,
    };

    fn record(text: &str) -> Vec<u8> {
        let mut log = Vec::new();
        encode(1, Stream::Stdout, false, text.as_bytes(), b"", &mut log);
        log
    }

    fn output(text: &str) -> LogRecord {
        LogRecord::Output { at: 1, stream: Stream::Stdout, partial: false, content: text.into() }
    }

    fn segment(directory: &Path, offset: u64, content: &[u8]) -> File {
        let mut file =
            File::options().create_new(true).append(true).open(segment_path(directory, offset)).unwrap();
        file.write_all(content).unwrap();
        file
    }

    #[test]
    fn half_a_record_is_left_for_later() {
        let directory = tempfile::tempdir().unwrap();
        let second = record("second");
        let mut file = segment(directory.path(), 0, &record("first"));
        file.write_all(&second[..20]).unwrap();
        let mut reader = LogReader::open(directory.path(), 0).unwrap();
        assert_eq!(reader.read(1).unwrap(), [output("first")]);
        let cursor = reader.cursor();
        assert_eq!(reader.read(1).unwrap(), []);
        assert_eq!(reader.cursor(), cursor);
        file.write_all(&second[20..]).unwrap();
        assert_eq!(reader.read(1).unwrap(), [output("second")]);
        assert_eq!(LogReader::open(directory.path(), cursor).unwrap().read(1).unwrap(), [output("second")]);
    }

    #[test]
    fn what_was_rotated_away_is_a_gap() {
        let directory = tempfile::tempdir().unwrap();
        segment(directory.path(), 1000, &record("kept"));
        let mut reader = LogReader::open(directory.path(), 300).unwrap();
        assert_eq!(reader.read(1).unwrap(), [LogRecord::Gap { bytes: 700 }, output("kept")]);
        assert_eq!(reader.cursor(), 1000 + record("kept").len() as u64);
    }

    #[test]
    fn an_open_segment_is_read_to_its_end_after_it_was_removed() {
        let directory = tempfile::tempdir().unwrap();
        let (first, second) = (record("first"), record("second"));
        let mut file = segment(directory.path(), 0, &first);
        let mut reader = LogReader::open(directory.path(), 0).unwrap();
        assert_eq!(reader.read(1).unwrap(), [output("first")]);
        file.write_all(&second).unwrap();
        std::fs::remove_file(segment_path(directory.path(), 0)).unwrap();
        segment(directory.path(), (first.len() + second.len()) as u64, &record("third"));
        assert_eq!(reader.read(1).unwrap(), [output("second")]);
        assert_eq!(reader.read(1).unwrap(), [output("third")]);
    }

    #[test]
    fn damage_costs_only_itself() {
        let directory = tempfile::tempdir().unwrap();
        // What a power loss leaves: blocks of zeros, and a record cut short.
        let mut log = record("before");
        log.extend_from_slice(&[0; 100]);
        log.push(b'\n');
        log.extend_from_slice(&vec![0; 3 * MAX_RECORD]);
        log.push(b'\n');
        log.extend_from_slice(&record("between"));
        let torn = &record("torn")[..25];
        log.extend_from_slice(torn);
        segment(directory.path(), 0, &log);
        segment(directory.path(), log.len() as u64, &record("after"));

        let mut reader = LogReader::open(directory.path(), 0).unwrap();
        let (mut text, mut lost) = (Vec::new(), 0);
        loop {
            let records = reader.read(1).unwrap();
            if records.is_empty() {
                break;
            }
            for record in records {
                match record {
                    LogRecord::Output { content, .. } => text.push(String::from_utf8(content).unwrap()),
                    LogRecord::Gap { bytes } => lost += bytes,
                }
            }
        }
        assert_eq!(text, ["before", "between", "after"]);
        assert_eq!(lost, (101 + 3 * MAX_RECORD + 1 + torn.len()) as u64);
    }

    #[test]
    fn a_cursor_past_the_end_reads_nothing() {
        let directory = tempfile::tempdir().unwrap();
        segment(directory.path(), 0, &record("x"));
        let mut reader = LogReader::open(directory.path(), u64::MAX).unwrap();
        assert_eq!(reader.read(1).unwrap(), []);
        assert!(LogReader::open(&directory.path().join("absent"), 0).is_err());
    }

    #[tokio::test]
    async fn a_follower_wakes_for_growth_and_only_then() {
        let directory = tempfile::tempdir().unwrap();
        let mut writer = LogWriter::create(directory.path(), 1 << 20).unwrap();
        let mut reader = LogReader::open(directory.path(), 0).unwrap();
        reader.changed().await.unwrap();
        assert_eq!(reader.read(1).unwrap(), []);
        {
            let mut changed = pin!(reader.changed());
            std::future::poll_fn(|context| {
                assert!(changed.as_mut().poll(context).is_pending());
                Poll::Ready(())
            })
            .await;
            writer.append(1, Stream::Stdout, b"grown\n");
            changed.await.unwrap();
        }
        assert_eq!(reader.read(1).unwrap(), [output("grown")]);
        crate::durable::write(&directory.path().join("exit.json"), b"{}", 0o600).unwrap();
        reader.changed().await.unwrap();
    }
}
