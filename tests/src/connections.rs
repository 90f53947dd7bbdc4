//! TCP connections of a network namespace.

use std::fs;

use crate::net::Netns;

/// The states in which nothing is sent any more: `TIME_WAIT`, `CLOSE` and `LISTEN`.
const SILENT: [&str; 3] = ["06", "07", "0A"];

/// How many of `namespace` lead to that port of another and may still send something there. A process that ends leaves
/// what it has written to the kernel.
pub fn to_port(namespace: &Netns, port: u16) -> usize {
    let text = namespace.within(|| fs::read_to_string("/proc/thread-self/net/tcp"));
    count(&text.expect("/proc is mounted"), port)
}

fn count(text: &str, port: u16) -> usize {
    let connections = text.lines().skip(1).map(|line| line.split_whitespace().skip(2));
    let leads_there = |address: &str| {
        let of = address.split_once(':').and_then(|(_, port)| u16::from_str_radix(port, 16).ok());
        of == Some(port)
    };
    let sends = connections.filter_map(|mut fields| Some((fields.next()?, fields.next()?)));
    sends.filter(|(remote, state)| leads_there(remote) && !SILENT.contains(state)).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_still_send_is_counted() {
        let text = "\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100630A:D2F0 0200630A:1451 01 00000000:00000000 00:00000000 00000000     0        0 1
   1: 0100630A:D2F2 0200630A:1451 04 00000000:00000000 00:00000000 00000000     0        0 0
   2: 0100630A:D2F4 0200630A:1451 06 00000000:00000000 00:00000000 00000000     0        0 0
   3: 0100630A:D2F6 0200630A:1452 01 00000000:00000000 00:00000000 00000000     0        0 2
   4: 0100630A:1451 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 3
";
        assert_eq!((count(text, 5201), count(text, 5202), count(text, 5203)), (2, 1, 0));
    }
}
