//! What arrives at a device, over time, by its own counters.

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use crate::{
    net::Netns,
    time::{Window, monotonic_ns},
};

/// How often the counters are read.
const EVERY: Duration = Duration::from_millis(5);
/// What TCP's header with time stamps, that of IPv4 and that of Ethernet take.
const HEADERS: f64 = 66.0;
/// Payload of a full segment.
const SEGMENT: f64 = 1448.0;
/// More between two readings than what two ends of a test tell each other before it.
const DATA: f64 = 1000.0;

/// What a device has received so far.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Received {
    /// As it counts them: with Ethernet headers, but of a buffer that stands for many segments only one header.
    pub bytes: u64,
    /// Buffers.
    pub packets: u64,
}

impl Received {
    /// What `device` in `namespace` has received so far.
    pub fn of(namespace: &Netns, device: &str) -> Received {
        namespace.within(|| Received::here(device))
    }

    /// The same, where this thread is.
    fn here(device: &str) -> Received {
        let text = fs::read_to_string("/proc/thread-self/net/dev").expect("/proc is mounted");
        Received::parse(&text, device).unwrap_or_else(|| panic!("no counts of {device} in {text}"))
    }

    /// From `/proc/net/dev`.
    pub fn parse(text: &str, device: &str) -> Option<Received> {
        let counts = text.lines().find_map(|line| line.trim().strip_prefix(device)?.strip_prefix(':'))?;
        let mut fields = counts.split_whitespace().map(str::parse);
        match (fields.next(), fields.next()) {
            (Some(Ok(bytes)), Some(Ok(packets))) => Some(Received { bytes, packets }),
            _ => None,
        }
    }
}

/// What consists of bytes on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frames {
    /// Of TCP by IPv4: what the frames would be that the buffers stand for.
    Tcp,
    /// The buffers.
    AsCounted,
}

/// Reads a device's counters until it is ended.
pub struct Recorder {
    thread: Option<JoinHandle<Series>>,
    ends: Arc<AtomicBool>,
}

impl Recorder {
    /// Begins with `device` in `namespace`.
    pub fn begin(namespace: &Netns, device: &'static str) -> Recorder {
        let ends = Arc::new(AtomicBool::new(false));
        let told = ends.clone();
        // A thread is in the namespace of the one that started it.
        let thread = namespace.within(|| {
            thread::spawn(move || {
                let mut samples = Vec::new();
                while !told.load(Relaxed) {
                    samples.push((monotonic_ns(), Received::here(device)));
                    thread::sleep(EVERY);
                }
                samples.push((monotonic_ns(), Received::here(device)));
                Series { samples }
            })
        });
        Recorder { thread: Some(thread), ends }
    }

    /// Ends it.
    pub fn end(mut self) -> Series {
        self.ends.store(true, Relaxed);
        let thread = self.thread.take().expect("it is ended once");
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.ends.store(true, Relaxed);
    }
}

/// Readings, in order of time.
pub struct Series {
    samples: Vec<(u64, Received)>,
}

impl Series {
    /// When data began to arrive.
    pub fn beginning(&self) -> Option<u64> {
        let steps = self.samples.windows(2);
        let mut data = steps.filter(|pair| payload(step(pair[0].1, pair[1].1)) >= DATA);
        data.next().map(|pair| pair[0].0)
    }

    /// Rate in `window`, bits a second on the wire.
    pub fn rate(&self, window: Window, frames: Frames) -> f64 {
        let (bytes, packets) = {
            let (from, to) = (self.at(window.from), self.at(window.to));
            (to.0 - from.0, to.1 - from.1)
        };
        let counted = match frames {
            Frames::Tcp => {
                let payload = payload((bytes, packets));
                // Not all segments are full.
                payload + HEADERS * (payload / SEGMENT).max(packets)
            }
            Frames::AsCounted => bytes,
        };
        counted * 8.0 / window.seconds()
    }

    /// Bytes and packets at a time, as if all came evenly between two readings.
    fn at(&self, time: u64) -> (f64, f64) {
        let next = self.samples.partition_point(|(at, _)| *at < time);
        let Some(&(before_at, before)) = self.samples.get(next.saturating_sub(1)) else { return (0.0, 0.0) };
        let &(after_at, after) = self.samples.get(next).unwrap_or(&(before_at, before));
        let share = if after_at > before_at && time > before_at {
            (time - before_at) as f64 / (after_at - before_at) as f64
        } else {
            0.0
        };
        let (bytes, packets) = step(before, after);
        (before.bytes as f64 + share * bytes, before.packets as f64 + share * packets)
    }
}

fn step(before: Received, after: Received) -> (f64, f64) {
    ((after.bytes - before.bytes) as f64, (after.packets - before.packets) as f64)
}

fn payload((bytes, packets): (f64, f64)) -> f64 {
    bytes - HEADERS * packets
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn series(samples: &[(u64, u64, u64)]) -> Series {
        let sample = |&(at, bytes, packets)| (at, Received { bytes, packets });
        Series { samples: samples.iter().map(sample).collect() }
    }

    #[test]
    fn counts_of_a_device_are_read() {
        let text = "Inter-|   Receive  |  Transmit\n face |bytes    packets errs\n    lo: 10 1 0 0\n   up0:1514 2 0 0\n";
        assert_eq!(Received::parse(text, "up0"), Some(Received { bytes: 1514, packets: 2 }));
        assert_eq!(Received::parse(text, "up"), None);
        assert_eq!(Received::parse("up0: x 2", "up0"), None);
    }

    #[test]
    fn a_buffer_is_the_segments_that_it_stands_for() {
        // One buffer of 40 full segments each half second.
        let buffer = 40 * 1448 + 66;
        let arrived = series(&[(0, 0, 0), (SECOND / 2, buffer, 1), (SECOND, 2 * buffer, 2)]);
        let window = Window { from: 0, to: SECOND };
        assert_eq!(arrived.rate(window, Frames::Tcp), 80.0 * 1514.0 * 8.0);
        assert_eq!(arrived.rate(window, Frames::AsCounted), 2.0 * buffer as f64 * 8.0);
    }

    #[test]
    fn small_segments_have_a_header_each() {
        let arrived = series(&[(0, 0, 0), (SECOND, 10 * 166, 10)]);
        assert_eq!(arrived.rate(Window { from: 0, to: SECOND }, Frames::Tcp), 1660.0 * 8.0);
    }

    #[test]
    fn between_two_readings_everything_comes_evenly() {
        let arrived = series(&[(0, 0, 0), (SECOND, 1000, 10), (2 * SECOND, 1000, 10)]);
        let window = Window { from: SECOND / 2, to: 3 * SECOND / 2 };
        assert_eq!(arrived.rate(window, Frames::AsCounted), 500.0 * 8.0);
        let after = Window { from: 2 * SECOND, to: 3 * SECOND };
        assert_eq!(arrived.rate(after, Frames::AsCounted), 0.0);
    }

    #[test]
    fn data_begins_after_what_both_ends_tell_each_other() {
        let arrived = series(&[(5, 0, 0), (10, 400, 4), (15, 900, 8), (20, 2414, 9), (25, 3928, 10)]);
        assert_eq!(arrived.beginning(), Some(15));
        assert_eq!(series(&[(5, 0, 0), (10, 400, 4)]).beginning(), None);
    }
}
