//! The writing side, in the supervisor.

use std::{
    fs::File,
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use super::{LogError, MAX_CONTENT, MAX_RECORD, Stream, encode, segment_path, segments};
use crate::durable;

/// Most bytes of the log gathered for one `write`. A read of one-byte lines becomes 40 times as much.
const MAX_BATCH: usize = 256 << 10;
const KEPT_SEGMENTS: usize = 2;

/// Writes a task's log. A disk that takes nothing costs output, never the task: [`append`] does not
/// fail, it counts what was lost, and the log says so once it can be written again.
///
/// [`append`]: LogWriter::append
pub(in crate::launch) struct LogWriter {
    directory: PathBuf,
    segment_bytes: u64,
    segment: Segment,
    /// The start of a line, by stream, until the rest of it comes.
    pending: [Vec<u8>; 2],
    batch: Batch,
    lost: Option<Lost>,
}

struct Segment {
    file: File,
    offset: u64,
    len: u64,
    /// A failed write left bytes behind that could not be removed: nothing may follow them.
    torn: bool,
}

/// Encoded records that are not yet in the file.
#[derive(Default)]
struct Batch {
    bytes: Vec<u8>,
    /// For each record: where it ends in `bytes`, and how much output it holds.
    records: Vec<(usize, u64)>,
}

struct Lost {
    bytes: u64,
    cause: io::Error,
}

impl LogWriter {
    /// Begins the log. `directory` must hold none: an attempt has one writer, once.
    pub(in crate::launch) fn create(directory: &Path, segment_bytes: u64) -> Result<LogWriter, LogError> {
        let segment = Segment::create(directory, 0)
            .map_err(|source| LogError::new("create", &segment_path(directory, 0), source))?;
        Ok(LogWriter {
            directory: directory.to_owned(),
            segment_bytes,
            segment,
            pending: [const { Vec::new() }; 2],
            batch: Batch::default(),
            lost: None,
        })
    }

    /// Takes output that was read at `at`. Whole lines are in the file on return; the start of a
    /// line waits for the rest of it.
    pub(in crate::launch) fn append(&mut self, at: u64, stream: Stream, bytes: &[u8]) {
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            let (mut text, ends) = match piece.strip_suffix(b"\n") {
                Some(text) => (text, true),
                None => (piece, false),
            };
            while self.pending[stream as usize].len() + text.len() > MAX_CONTENT {
                let (head, rest) = text.split_at(MAX_CONTENT - self.pending[stream as usize].len());
                self.push(at, stream, true, head);
                text = rest;
            }
            if ends {
                self.push(at, stream, false, text);
            } else {
                self.pending[stream as usize].extend_from_slice(text);
            }
        }
        self.flush(at);
    }

    /// Writes what waits for the end of its line.
    pub(in crate::launch) fn flush_partial(&mut self, at: u64, stream: Stream) {
        if !self.pending[stream as usize].is_empty() {
            self.push(at, stream, true, b"");
        }
        self.flush(at);
    }

    /// Whether the start of a line waits for the rest of it.
    pub(in crate::launch) fn has_partial(&self) -> bool {
        self.pending.iter().any(|pending| !pending.is_empty())
    }

    /// Makes durable what was taken, except starts of lines.
    pub(in crate::launch) fn sync(&mut self, at: u64) -> Result<(), LogError> {
        self.report_loss(at);
        let path = segment_path(&self.directory, self.segment.offset);
        self.segment.file.sync_data().map_err(|source| LogError::new("sync", &path, source))?;
        durable::sync_directory(&self.directory)
            .map_err(|error| LogError::new("sync", &self.directory, io::Error::other(error)))
    }

    /// One record out of what waits in `stream` and `tail`.
    fn push(&mut self, at: u64, stream: Stream, partial: bool, tail: &[u8]) {
        let limit = usize::try_from(self.segment_bytes).unwrap_or(MAX_BATCH).min(MAX_BATCH);
        if self.batch.bytes.len() + MAX_RECORD > limit {
            self.flush(at);
        }
        let head = &mut self.pending[stream as usize];
        encode(at, stream, partial, head, tail, &mut self.batch.bytes);
        self.batch.records.push((self.batch.bytes.len(), (head.len() + tail.len()) as u64));
        head.clear();
    }

    /// A line of our own about output that was lost, once such a line can be written.
    fn report_loss(&mut self, at: u64) {
        let Some(Lost { bytes, cause }) = &self.lost else { return };
        let notice = format!("[shaper: {bytes} bytes of output lost: {cause}]");
        let mut record = Vec::with_capacity(MAX_RECORD);
        encode(at, Stream::Stderr, false, notice.as_bytes(), b"", &mut record);
        if self.prepare(record.len()).and_then(|()| self.segment.write(&record)).is_ok() {
            self.lost = None;
        }
    }

    fn flush(&mut self, at: u64) {
        if self.batch.bytes.is_empty() {
            return;
        }
        // Lost before this batch, so said before it.
        self.report_loss(at);
        let Batch { mut bytes, mut records } = std::mem::take(&mut self.batch);
        let written = self.prepare(bytes.len()).and_then(|()| self.segment.write(&bytes));
        if let Err((kept, cause)) = written {
            let lost = records.iter().filter(|(end, _)| *end > kept).map(|(_, output)| output).sum::<u64>();
            let before = self.lost.as_ref().map_or(0, |lost| lost.bytes);
            self.lost = Some(Lost { bytes: before + lost, cause });
        }
        // Back, for their capacity.
        bytes.clear();
        records.clear();
        self.batch = Batch { bytes, records };
    }

    /// Begins a new segment when `more` bytes do not fit into this one.
    fn prepare(&mut self, more: usize) -> Result<(), (usize, io::Error)> {
        let full = self.segment.len > 0 && self.segment.len + more as u64 > self.segment_bytes;
        if !full && !self.segment.torn {
            return Ok(());
        }
        match self.rotate() {
            // Too long a segment is better than lost output.
            Err(_) if !self.segment.torn => Ok(()),
            result => result.map_err(|error| (0, error)),
        }
    }

    fn rotate(&mut self) -> io::Result<()> {
        let next = Segment::create(&self.directory, self.segment.end()?)?;
        // Here, because `sync` reaches the newest segment only. Its failure must not stop the log.
        let _ = self.segment.file.sync_data();
        self.segment = next;
        if let Ok(offsets) = segments(&self.directory) {
            for offset in offsets.iter().rev().skip(KEPT_SEGMENTS) {
                // One that stays behind is removed at the next rotation.
                let _ = std::fs::remove_file(segment_path(&self.directory, *offset));
            }
        }
        Ok(())
    }
}

impl Segment {
    fn create(directory: &Path, offset: u64) -> io::Result<Segment> {
        let path = segment_path(directory, offset);
        let file = File::options().append(true).create_new(true).mode(0o600).open(path)?;
        Ok(Segment { file, offset, len: 0, torn: false })
    }

    /// The offset at which the next segment begins. After torn bytes, behind them.
    fn end(&self) -> io::Result<u64> {
        let len = if self.torn { self.file.metadata()?.len() } else { self.len };
        Ok(self.offset + len)
    }

    /// Appends whole records. On failure says how many bytes of them are in the file; these end
    /// with a record.
    fn write(&mut self, records: &[u8]) -> Result<(), (usize, io::Error)> {
        let mut done = 0;
        let cause = loop {
            match self.file.write(&records[done..]) {
                Ok(0) => break io::ErrorKind::WriteZero.into(),
                Ok(written) => done += written,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => break error,
            }
            if done == records.len() {
                self.len += done as u64;
                return Ok(());
            }
        };
        let kept = records[..done].iter().rposition(|byte| *byte == b'\n').map_or(0, |last| last + 1);
        self.len += kept as u64;
        self.torn = kept < done && self.file.set_len(self.len).is_err();
        Err((kept, cause))
    }
}

#[cfg(test)]
mod tests {
    use super::{super::LogRecord, *};
    use crate::launch::log::LogReader;

    fn read(directory: &Path) -> Vec<(Stream, bool, Vec<u8>)> {
        let mut reader = LogReader::open(directory, 0).unwrap();
        let mut all = Vec::new();
        loop {
            let records = reader.read(1 << 20).unwrap();
            if records.is_empty() {
                return all;
            }
            all.extend(records.into_iter().map(|record| match record {
                LogRecord::Output { at: _, stream, partial, content } => (stream, partial, content),
                LogRecord::Gap { bytes } => panic!("a gap of {bytes}"),
            }));
        }
    }

    #[test]
    fn lines_are_joined_and_split() {
        let directory = tempfile::tempdir().unwrap();
        let mut writer = LogWriter::create(directory.path(), 1 << 20).unwrap();
        writer.append(1, Stream::Stdout, b"a");
        writer.append(2, Stream::Stderr, b"other\n");
        writer.append(3, Stream::Stdout, b"b\n\nrest");
        let long = vec![b'x'; 2 * MAX_CONTENT + 5];
        writer.append(4, Stream::Stderr, &long);
        writer.append(5, Stream::Stderr, b"\n");
        writer.append(6, Stream::Stderr, &long[..MAX_CONTENT]);
        writer.append(7, Stream::Stderr, b"\n");
        assert!(writer.has_partial());
        writer.flush_partial(8, Stream::Stdout);
        assert!(!writer.has_partial());
        use Stream::{Stderr, Stdout};
        assert_eq!(
            read(directory.path()),
            [
                (Stderr, false, b"other".to_vec()),
                (Stdout, false, b"ab".to_vec()),
                (Stdout, false, b"".to_vec()),
                (Stderr, true, vec![b'x'; MAX_CONTENT]),
                (Stderr, true, vec![b'x'; MAX_CONTENT]),
                (Stderr, false, vec![b'x'; 5]),
                (Stderr, false, vec![b'x'; MAX_CONTENT]),
                (Stdout, true, b"rest".to_vec()),
            ]
        );
    }

    #[test]
    fn segments_stay_small_and_two() {
        let directory = tempfile::tempdir().unwrap();
        let mut writer = LogWriter::create(directory.path(), 64 << 10).unwrap();
        for _ in 0..40 {
            writer.append(1, Stream::Stdout, &b"\n".repeat(1000));
            writer.append(1, Stream::Stdout, &[&vec![b'y'; 10_000][..], b"\n"].concat());
        }
        let offsets = segments(directory.path()).unwrap();
        assert_eq!(offsets.len(), 2);
        for offset in offsets {
            assert!(std::fs::metadata(segment_path(directory.path(), offset)).unwrap().len() <= 64 << 10);
        }
    }

    #[test]
    fn what_a_full_disk_cost_is_said_when_it_works_again() {
        let directory = tempfile::tempdir().unwrap();
        let mut writer = LogWriter::create(directory.path(), 1 << 20).unwrap();
        writer.append(1, Stream::Stdout, b"before\n");
        let full = File::options().write(true).open("/dev/full").unwrap();
        let works = std::mem::replace(&mut writer.segment.file, full);
        writer.append(2, Stream::Stdout, b"12345\n678\n");
        writer.append(3, Stream::Stdout, b"90\n");
        writer.segment.file = works;
        writer.append(4, Stream::Stdout, b"after\n");
        let records = read(directory.path());
        let text: Vec<_> = records.iter().map(|(_, _, content)| String::from_utf8_lossy(content)).collect();
        assert_eq!(text.len(), 3, "{text:?}");
        assert_eq!((&*text[0], &*text[2]), ("before", "after"));
        assert!(text[1].starts_with("[shaper: 10 bytes of output lost: No space left"), "{}", text[1]);
    }

    #[test]
    fn nothing_follows_bytes_that_could_not_be_removed() {
        let directory = tempfile::tempdir().unwrap();
        let mut writer = LogWriter::create(directory.path(), 1 << 20).unwrap();
        writer.append(1, Stream::Stdout, b"before\n");
        writer.segment.file.write_all(b"1970-01-01T00:0").unwrap();
        writer.segment.torn = true;
        writer.append(2, Stream::Stdout, b"after\n");
        let mut reader = LogReader::open(directory.path(), 0).unwrap();
        let mut records = Vec::new();
        while records.len() < 3 {
            records.extend(reader.read(1 << 20).unwrap());
        }
        assert_eq!(records[1], LogRecord::Gap { bytes: 15 });
        assert!(matches!(&records[2], LogRecord::Output { content, .. } if content == b"after"));
    }
}
