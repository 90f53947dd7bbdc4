//! Fixtures of the tests that need a real kernel: the real agent and command, network namespaces, a
//! sink for traffic, cgroups, and a search for what must not be left behind.
//!
//! A fixture panics when it cannot do its work, and undoes it when it is dropped, after a panic too.
#![forbid(unsafe_code)]

pub mod agent;
pub mod arrivals;
pub mod bins;
pub mod broker;
pub mod burst;
pub mod cards;
pub mod cgroup;
pub mod checker;
pub mod cluster;
pub mod collector;
pub mod connections;
pub mod cut;
pub mod disk;
pub mod faults;
pub mod figures;
pub mod iperf;
pub mod kills;
pub mod knobs;
pub mod leftovers;
pub mod machine;
pub mod net;
pub mod pins;
pub mod process;
pub mod provider;
pub mod random;
pub mod runtimes;
pub mod scrape;
pub mod second_writer;
pub mod shaper;
pub mod sink;
pub mod slow_disk;
pub mod soak;
pub mod statistics;
pub mod swap;
pub mod systemd;
pub mod time;

/// The user that tasks run as: nobody, on every Linux.
pub const NOBODY: u32 = 65_534;

/// Whether the running kernel is of that version or a later one.
pub fn kernel_is_at_least(major: u32, minor: u32) -> bool {
    let name = rustix::system::uname();
    let release = name.release().to_string_lossy();
    let mut numbers = release.split(['.', '-']).map(|number| number.parse().unwrap_or(0));
    (numbers.next(), numbers.next()) >= (Some(major), Some(minor))
}

/// Asserts that `value` is within `percent` of `expected`.
#[track_caller]
pub fn assert_close(what: &str, value: f64, expected: f64, percent: f64) {
    let off = (value / expected - 1.0) * 100.0;
    assert!(
        off.abs() <= percent,
        "{what}: {value:.4e} is {off:+.2} % off {expected:.4e}, more than {percent} %"
    );
}
