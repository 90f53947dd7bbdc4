//! Prints the log of a task as the task wrote it: its standard output to ours, its standard error
//! to ours.

use std::io::{self, Write};

use shaper_proto::v1::log_chunk::{Record, Stream};

use crate::{client::LogReader, error::Error, time::Utc};

/// Prints what `log` has, to its end.
pub(crate) async fn print(mut log: LogReader<'_>, timestamps: bool) -> Result<(), Error> {
    let mut printer = Printer::new(timestamps);
    while let Some(records) = log.next().await? {
        // Not locked: while one of them is stuck, remarks can still be made on the other.
        printer.print(&records, &mut io::stdout(), &mut io::stderr()).map_err(Error::Output)?;
    }
    Ok(())
}

/// Which of the two.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Target {
    Stdout,
    Stderr,
}

/// Puts lines together out of records.
struct Printer {
    timestamps: bool,
    /// Whether the last line of standard output, and of standard error, goes on.
    unfinished: [bool; 2],
}

impl Printer {
    fn new(timestamps: bool) -> Printer {
        Printer { timestamps, unfinished: [false; 2] }
    }

    /// Writes as much as possible at once, and keeps the order of the two where they meet again,
    /// on a terminal.
    fn print(
        &mut self,
        records: &[Record],
        stdout: &mut impl Write,
        stderr: &mut impl Write,
    ) -> io::Result<()> {
        let mut write = |target: Target, bytes: &[u8]| match target {
            Target::Stdout => stdout.write_all(bytes).and_then(|()| stdout.flush()),
            // Who closed our standard error does not want to know.
            Target::Stderr => {
                stderr.write_all(bytes).and_then(|()| stderr.flush()).or_else(unless_broken_pipe)
            }
        };
        let mut pending = Vec::new();
        let mut pending_for = Target::Stdout;
        for record in records {
            let gap = record.lost_bytes > 0;
            let target = match record.stream() {
                _ if gap => Target::Stderr,
                Stream::Stderr => Target::Stderr,
                Stream::Stdout | Stream::Unspecified => Target::Stdout,
            };
            if target != pending_for {
                write(pending_for, &pending)?;
                pending.clear();
                pending_for = target;
            }
            if gap {
                // What these lines went on with is lost; what comes next is another line.
                let [stdout_unfinished, stderr_unfinished] = std::mem::take(&mut self.unfinished);
                if stdout_unfinished {
                    write(Target::Stdout, b"\n")?;
                }
                if stderr_unfinished {
                    pending.push(b'\n');
                }
                writeln!(pending, "shaper: {} bytes of log are no longer kept", record.lost_bytes)?;
            } else {
                self.line(record, target, &mut pending)?;
            }
        }
        write(pending_for, &pending)
    }

    fn line(&mut self, record: &Record, target: Target, line: &mut Vec<u8>) -> io::Result<()> {
        let unfinished = &mut self.unfinished[target as usize];
        if self.timestamps && !*unfinished {
            write!(line, "{:.9} ", Utc(record.unix_nanos))?;
        }
        line.extend_from_slice(&record.content);
        if !record.partial {
            line.push(b'\n');
        }
        *unfinished = record.partial;
        Ok(())
    }
}

fn unless_broken_pipe(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::BrokenPipe { Ok(()) } else { Err(error) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(stream: Stream, content: &str, partial: bool) -> Record {
        Record {
            unix_nanos: 1_000_000_002,
            stream: stream.into(),
            content: content.into(),
            partial,
            lost_bytes: 0,
        }
    }

    fn printed(timestamps: bool, chunks: &[&[Record]]) -> (String, String) {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let mut printer = Printer::new(timestamps);
        for chunk in chunks {
            printer.print(chunk, &mut stdout, &mut stderr).unwrap();
        }
        (String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
    }

    #[test]
    fn a_long_line_comes_in_parts_and_leaves_whole() {
        let out = |content, partial| record(Stream::Stdout, content, partial);
        let err = record(Stream::Stderr, "oops", false);
        let chunks: [&[Record]; 2] =
            [&[out("be", true), err], &[out("gin", true), out("", false), out("x", true)]];
        assert_eq!(printed(false, &chunks), ("begin\nx".into(), "oops\n".into()));
        let stamp = "1970-01-01T00:00:01.000000002Z";
        let stamped = (format!("{stamp} begin\n{stamp} x"), format!("{stamp} oops\n"));
        assert_eq!(printed(true, &chunks), stamped);
    }

    #[test]
    fn a_gap_is_said_and_ends_the_line_that_it_cut() {
        let gap = Record { lost_bytes: 12, ..Record::default() };
        let said = "shaper: 12 bytes of log are no longer kept\n";
        let (out, err) = (Stream::Stdout, Stream::Stderr);
        let records = [record(out, "cut", true), gap.clone(), record(out, "next", false)];
        assert_eq!(printed(false, &[&records]), ("cut\nnext\n".into(), said.into()));
        let records = [record(err, "cut", true), gap, record(err, "next", false)];
        assert_eq!(printed(false, &[&records]), (String::new(), format!("cut\n{said}next\n")));
    }
}
