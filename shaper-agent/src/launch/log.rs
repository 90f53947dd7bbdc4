//! A task's output, in the text format of the Kubernetes CRI, one record a line:
//!
//! ```text
//! 2026-11-24T07:03:48.123456789Z stdout F a whole line
//! 2026-11-24T07:03:48.123456790Z stderr P the first 16 KiB of a long one, or one that never ended
//! ```
//!
//! A task's log is one sequence of bytes, cut into segments named by the offset of their first
//! byte, `log.00000000000000000000`, of which the writer keeps the newest two. A cursor is an offset
//! in that sequence: it means the same to every reader, in every process, at any time.
//!
//! One writer, any number of readers, no lock between them. What makes that sound:
//! - a record counts once its newline is there, and the writer never removes a whole record;
//! - a segment is complete once a later one exists.

mod reader;
mod writer;

use std::{
    io,
    path::{Path, PathBuf},
};

pub use reader::LogReader;
pub(super) use writer::LogWriter;

use super::time;

/// Why the log could not be read or begun.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// A system call failed.
    #[error("{operation} {}", path.display())]
    Io {
        /// What was done to it.
        operation: &'static str,
        /// The segment or its directory.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

impl LogError {
    fn new(operation: &'static str, path: &Path, source: impl Into<io::Error>) -> LogError {
        LogError::Io { operation, path: path.to_owned(), source: source.into() }
    }
}

/// Where output came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Descriptor 1.
    Stdout,
    /// Descriptor 2.
    Stderr,
}

impl Stream {
    fn tag(self) -> &'static [u8] {
        match self {
            Stream::Stdout => b"stdout",
            Stream::Stderr => b"stderr",
        }
    }
}

/// What a reader gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LogRecord {
    /// Output of the task.
    Output {
        /// When the supervisor read it, in Unix nanoseconds.
        at: u64,
        /// Where it came from.
        stream: Stream,
        /// No newline followed: the next record of this stream continues the line.
        partial: bool,
        /// The line without its newline. Any bytes but a newline, not only UTF-8.
        content: Vec<u8>,
    },
    /// The log has lost something here: segments that were rotated away, or damage.
    Gap {
        /// How much, in bytes of the log (which are more than those of the output).
        bytes: u64,
    },
}

/// Most bytes of output in one record.
const MAX_CONTENT: usize = 16 << 10;
/// Most bytes of the log in one record.
const MAX_RECORD: usize = time::LENGTH + " stdout F ".len() + MAX_CONTENT + "\n".len();

/// Appends one record. `head` and `tail` together are its content.
pub(crate) fn encode(at: u64, stream: Stream, partial: bool, head: &[u8], tail: &[u8], log: &mut Vec<u8>) {
    time::format(at, log);
    log.push(b' ');
    log.extend_from_slice(stream.tag());
    log.extend_from_slice(if partial { b" P " } else { b" F " });
    log.extend_from_slice(head);
    log.extend_from_slice(tail);
    log.push(b'\n');
}

/// The record in `line`, which has no newline; `None` when it is not one.
pub(crate) fn decode(line: &[u8]) -> Option<LogRecord> {
    let (at, line) = line.split_at_checked(time::LENGTH)?;
    let at = time::parse(at)?;
    let (stream, line) = if let Some(line) = line.strip_prefix(b" stdout ") {
        (Stream::Stdout, line)
    } else {
        (Stream::Stderr, line.strip_prefix(b" stderr ")?)
    };
    let (partial, content) = match line.strip_prefix(b"F ") {
        Some(content) => (false, content),
        None => (true, line.strip_prefix(b"P ")?),
    };
    Some(LogRecord::Output { at, stream, partial, content: content.to_vec() })
}

const SEGMENT_PREFIX: &str = "log.";
const OFFSET_DIGITS: usize = 20;

fn segment_path(directory: &Path, offset: u64) -> PathBuf {
    directory.join(format!("{SEGMENT_PREFIX}{offset:0width$}", width = OFFSET_DIGITS))
}

/// Offsets of the segments in `directory`, ascending.
fn segments(directory: &Path) -> Result<Vec<u64>, LogError> {
    let failed = |source| LogError::new("list", directory, source);
    let mut offsets = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        let digits = name.to_str().and_then(|name| name.strip_prefix(SEGMENT_PREFIX));
        let digits =
            digits.filter(|text| text.len() == OFFSET_DIGITS && text.bytes().all(|b| b.is_ascii_digit()));
        offsets.extend(digits.and_then(|digits| digits.parse::<u64>().ok()));
    }
    offsets.sort_unstable();
    Ok(offsets)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_reads_back_whatever_its_bytes() {
        for content in [&b""[..], b" ", b"plain", b"\xff\xfe\0 not text \r", b"P F stdout"] {
            for (stream, partial) in [(Stream::Stdout, false), (Stream::Stderr, true)] {
                let mut log = Vec::new();
                let (head, tail) = content.split_at(content.len() / 2);
                encode(1_000_000_000_123_456_789, stream, partial, head, tail, &mut log);
                assert!(log.len() <= MAX_RECORD);
                let line = log.strip_suffix(b"\n").unwrap();
                let at = 1_000_000_000_123_456_789;
                let expected = LogRecord::Output { at, stream, partial, content: content.to_vec() };
                assert_eq!(decode(line), Some(expected));
            }
        }
        let mut log = Vec::new();
        encode(0, Stream::Stdout, false, b"x", b"y", &mut log);
        assert_eq!(log, b"1970-01-01T00:00:00.000000000Z stdout F xy\n");
    }

    #[test]
    fn what_is_not_a_record_is_refused() {
        for bad in [
            &b""[..],
            b"1970-01-01T00:00:00.000000000Z",
            b"1970-01-01T00:00:00.000000000Z stdin F x",
            b"1970-01-01T00:00:00.000000000Z stdout X x",
            b"1970-01-01T00:00:00.000000000Z stdout F",
            b"xxxx-01-01T00:00:00.000000000Z stdout F x",
            &[0; 64],
        ] {
            assert_eq!(decode(bad), None);
        }
    }
}
