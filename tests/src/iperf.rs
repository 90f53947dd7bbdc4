//! What iperf3 says of a test, from the end of its JSON (`-J`, of the client).

use serde::Deserialize;

/// A test's outcome.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// From the first to the last byte, by the sender.
    pub seconds: f64,
    /// Payload that was received.
    pub bytes: f64,
    /// The same by flow; for UDP that is not told.
    pub by_flow: Vec<f64>,
    /// Segments that TCP sent again.
    pub retransmits: u64,
    /// The sender's own estimate, a mean over its reports and flows; of TCP.
    pub mean_rtt_ms: Option<f64>,
    /// CPU time of the processes at both ends, user and system.
    pub cpu_seconds: f64,
}

impl Outcome {
    /// Reads what the client printed.
    pub fn parse(json: &str) -> Result<Outcome, String> {
        let unknown = |problem| format!("{problem} in what iperf3 printed");
        let Output { end, error } = serde_json::from_str(json).map_err(unknown)?;
        match error {
            Some(error) => Err(format!("iperf3: {error}")),
            // A test that did not take place has an empty one.
            None => serde_json::from_value::<End>(end).map_err(unknown)?.outcome(),
        }
    }

    /// CPU time for 10⁹ bytes.
    pub fn cpu_per_gb(&self) -> f64 {
        self.cpu_seconds / (self.bytes / 1e9)
    }
}

#[derive(Deserialize)]
struct Output {
    end: serde_json::Value,
    error: Option<String>,
}

#[derive(Deserialize)]
struct End {
    streams: Vec<Stream>,
    sum_sent: Sum,
    sum_received: Sum,
    cpu_utilization_percent: Utilization,
}

/// Of TCP; that of UDP has neither.
#[derive(Deserialize)]
struct Stream {
    sender: Option<Sender>,
    receiver: Option<Receiver>,
}

#[derive(Deserialize)]
struct Sender {
    /// µs.
    mean_rtt: f64,
}

#[derive(Deserialize)]
struct Receiver {
    bytes: f64,
}

#[derive(Deserialize)]
struct Sum {
    seconds: f64,
    bytes: f64,
    /// Of TCP.
    #[serde(default)]
    retransmits: u64,
}

#[derive(Deserialize)]
struct Utilization {
    host_total: f64,
    remote_total: f64,
}

impl End {
    fn outcome(self) -> Result<Outcome, String> {
        let End { streams, sum_sent, sum_received, cpu_utilization_percent } = self;
        if sum_received.bytes <= 0.0 {
            return Err("nothing arrived in a test of iperf3".to_owned());
        }
        let rtts: Vec<f64> =
            streams.iter().flat_map(|stream| &stream.sender).map(|own| own.mean_rtt).collect();
        let Utilization { host_total, remote_total } = cpu_utilization_percent;
        Ok(Outcome {
            seconds: sum_sent.seconds,
            bytes: sum_received.bytes,
            by_flow: streams.iter().flat_map(|stream| &stream.receiver).map(|own| own.bytes).collect(),
            retransmits: sum_sent.retransmits,
            mean_rtt_ms: (!rtts.is_empty()).then(|| crate::statistics::mean(&rtts) / 1000.0),
            cpu_seconds: (host_total + remote_total) / 100.0 * sum_sent.seconds,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As iperf3 3.12 prints it, without what is not read.
    const TCP: &str = r#"{"start": {}, "intervals": [], "end": {"streams": [
        {"sender": {"socket": 5, "seconds": 1.000174, "bytes": 1253048320, "retransmits": 2, "mean_rtt": 194},
         "receiver": {"socket": 5, "seconds": 1.000174, "bytes": 1253048320}},
        {"sender": {"socket": 7, "seconds": 1.000174, "bytes": 1245184000, "retransmits": 3, "mean_rtt": 216},
         "receiver": {"socket": 7, "seconds": 1.000174, "bytes": 1245184000}}],
        "sum_sent": {"seconds": 1.000174, "bytes": 2498232320, "retransmits": 5, "sender": true},
        "sum_received": {"seconds": 1.002778, "bytes": 2498232320, "sender": true},
        "cpu_utilization_percent": {"host_total": 49.0, "host_user": 0.7, "remote_total": 42.0}}}"#;

    const UDP: &str = r#"{"end": {"streams": [{"udp": {"socket": 5, "bytes": 1250200, "packets": 893}}],
        "sum": {"seconds": 1.000318, "bytes": 1250200, "lost_packets": 0},
        "sum_sent": {"seconds": 1.000087, "bytes": 1250200, "lost_packets": 0},
        "sum_received": {"seconds": 1.000318, "bytes": 1250000, "packets": 893},
        "cpu_utilization_percent": {"host_total": 3.8, "remote_total": 1.2}}}"#;

    #[test]
    fn the_end_of_a_test_of_tcp_is_read() {
        let outcome = Outcome::parse(TCP).unwrap();
        assert_eq!(outcome.by_flow, [1_253_048_320.0, 1_245_184_000.0]);
        assert_eq!((outcome.bytes, outcome.retransmits), (2_498_232_320.0, 5));
        assert_eq!(outcome.mean_rtt_ms, Some(0.205));
        assert!((outcome.cpu_seconds - 0.91 * 1.000174).abs() < 1e-9);
        assert!((outcome.cpu_per_gb() - 0.91 * 1.000174 / 2.498_232_32).abs() < 1e-9);
    }

    #[test]
    fn the_end_of_a_test_of_udp_has_neither_rtt_nor_flows() {
        let outcome = Outcome::parse(UDP).unwrap();
        assert_eq!((outcome.bytes, outcome.mean_rtt_ms, outcome.retransmits), (1_250_000.0, None, 0));
        assert!(outcome.by_flow.is_empty());
    }

    #[test]
    fn a_test_that_failed_is_no_outcome() {
        let refused = r#"{"end": {}, "error": "unable to connect to server: Connection refused"}"#;
        assert_eq!(
            Outcome::parse(refused).unwrap_err(),
            "iperf3: unable to connect to server: Connection refused"
        );
        assert!(Outcome::parse(r#"{"end": {}}"#).unwrap_err().contains("missing field"));
        assert!(Outcome::parse("").unwrap_err().contains("what iperf3 printed"));
        let nothing = UDP.replace("1250000", "0");
        assert!(Outcome::parse(&nothing).unwrap_err().contains("nothing arrived"));
    }
}
