//! Scrapes of the daemons' metrics, and what is in them.

use std::{
    io::{self, Read, Write},
    net::TcpStream,
    os::unix::net::UnixStream,
    path::Path,
};

use crate::time::eventually;

/// What was answered.
#[derive(Clone, Debug)]
pub struct Answer {
    /// As HTTP has it.
    pub status: u16,
    /// The rest.
    pub body: String,
}

/// Asks at a Unix socket, once somebody listens there: a daemon has another for calls, and that is there first.
pub fn of_socket(socket: &Path, headers: &[&str]) -> Answer {
    let mut stream = None;
    eventually(&format!("somebody listens at {}", socket.display()), || {
        stream = UnixStream::connect(socket).ok();
        stream.is_some()
    });
    ask(stream.expect("it is connected"), headers)
}

/// Asks over TCP.
pub fn of_address(address: &str, headers: &[&str]) -> Answer {
    let stream = TcpStream::connect(address);
    ask(stream.unwrap_or_else(|error| panic!("cannot connect to {address}: {error}")), headers)
}

fn ask(mut stream: impl Read + Write, headers: &[&str]) -> Answer {
    let headers: String = headers.iter().map(|header| format!("{header}\r\n")).collect();
    let request = format!("GET /metrics HTTP/1.1\r\nHost: test\r\n{headers}\r\n");
    let mut answer = Vec::new();
    // Whoever is refused in the middle of the request may not have been read to its end.
    let _ = stream.write_all(request.as_bytes());
    match stream.read_to_end(&mut answer) {
        Err(error) if error.kind() != io::ErrorKind::ConnectionReset => panic!("cannot read: {error}"),
        _ => {}
    }
    let text = String::from_utf8(answer).expect("it is text");
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {text}"));
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    Answer { status: status.unwrap_or_else(|| panic!("no status: {head}")), body: body.to_owned() }
}

/// The series of one scrape.
#[derive(Clone, Debug)]
pub struct Series(String);

impl Series {
    /// Of a scrape that was answered.
    #[track_caller]
    pub fn of(answer: &Answer) -> Series {
        assert_eq!(answer.status, 200, "{}", answer.body);
        Series(answer.body.clone())
    }

    /// The value of a series, as in `name{label="value"}`, with its labels in the order of the table; `None`: it is not there.
    #[track_caller]
    pub fn find(&self, series: &str) -> Option<f64> {
        let mut values = self.0.lines().filter_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        let value = values.next()?;
        assert_eq!(values.next(), None, "{series} is there twice");
        Some(value.parse().unwrap_or_else(|_| panic!("{series} is no number: {value}")))
    }

    /// The same of one that must be there.
    #[track_caller]
    pub fn get(&self, series: &str) -> f64 {
        self.find(series).unwrap_or_else(|| panic!("{series} is not in {}", self.0))
    }

    /// The names of the series, without labels.
    pub fn names(&self) -> Vec<&str> {
        let lines = self.0.lines().filter(|line| !line.starts_with('#'));
        lines.filter_map(|line| line.split(['{', ' ']).next()).collect()
    }

    /// The type of a metric, as its header says it.
    pub fn kind(&self, metric: &str) -> Option<&str> {
        self.0.lines().find_map(|line| line.strip_prefix(&format!("# TYPE {metric} ")))
    }
}
