//! Quantities. Each is an integer of one unit and a type of its own; a decimal exists only in what
//! a user writes, and is converted without a float.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Why a quantity was not understood. The message names the forms that are.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{input}` is not {expected}")]
pub struct ParseQuantityError {
    input: String,
    expected: &'static str,
}

macro_rules! quantity {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub u64);
    };
}

quantity!(
    /// CPU time per time, in thousandths of a core.
    Millicores
);
quantity!(
    /// Memory, in bytes.
    Bytes
);
quantity!(
    /// Bandwidth on the wire, in bits a second (see `shaper_common::wire` for what counts).
    BitsPerSec
);

quantity!(
    /// Storage operations, reads plus writes, a second.
    Iops
);

quantity!(
    /// Bytes read or written a second.
    BytesPerSec
);

quantity!(
    /// A time, in millionths of a second.
    Micros
);

quantity!(
    /// Power, in thousandths of a watt.
    Milliwatts
);

/// Relative share of a contended resource, 1 to 10,000; 100 is the kernel's default (`cpu.weight`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct Weight(u32);

impl Weight {
    /// The weight that a cgroup has when nobody asks for another.
    pub const DEFAULT: Weight = Weight(100);
    /// The most that a cgroup can have.
    pub const MAX: Weight = Weight(10_000);

    /// A weight, or `None` outside 1 to 10,000.
    pub const fn new(weight: u32) -> Option<Weight> {
        if weight >= 1 && weight <= 10_000 { Some(Weight(weight)) } else { None }
    }

    /// The weight as `cpu.weight` takes it.
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl TryFrom<u32> for Weight {
    type Error = ParseQuantityError;

    fn try_from(weight: u32) -> Result<Weight, ParseQuantityError> {
        Weight::new(weight)
            .ok_or_else(|| ParseQuantityError { input: weight.to_string(), expected: Weight::EXPECTED })
    }
}

impl From<Weight> for u32 {
    fn from(weight: Weight) -> u32 {
        weight.0
    }
}

impl Weight {
    const EXPECTED: &str = "a weight: a whole number from 1 to 10000";

    /// Reads `100`.
    pub fn parse(input: &str) -> Result<Weight, ParseQuantityError> {
        let error = || ParseQuantityError { input: input.into(), expected: Self::EXPECTED };
        input.trim().parse().ok().and_then(Weight::new).ok_or_else(error)
    }
}

impl fmt::Display for Weight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Millicores {
    /// The smallest CPU limit: the kernel takes no quota below 1 ms, a hundredth of its period.
    pub const MIN: Millicores = Millicores(10);

    /// Reads decimal cores, `0.5`, or millicores, `500m`.
    pub fn parse(input: &str) -> Result<Millicores, ParseQuantityError> {
        const EXPECTED: &str = "a number of cores, such as 0.5, 2 or 250m, of at least 0.01";
        let error = || ParseQuantityError { input: input.into(), expected: EXPECTED };
        let text = input.trim();
        let milli = match text.strip_suffix('m') {
            Some(milli) => scaled(milli, 1, 0),
            None => scaled(text, 1000, 3),
        };
        milli.map(Millicores).filter(|milli| *milli >= Self::MIN).ok_or_else(error)
    }
}

impl Bytes {
    /// Reads `512Mi`, `1.5GiB`, `64M`, `1048576`: binary and decimal suffixes as Kubernetes has them.
    pub fn parse(input: &str) -> Result<Bytes, ParseQuantityError> {
        const EXPECTED: &str = "an amount of memory, such as 512Mi, 1.5Gi or 64M";
        let error = || ParseQuantityError { input: input.into(), expected: EXPECTED };
        let text = input.trim();
        let text = text.strip_suffix('B').unwrap_or(text);
        const SUFFIXES: [(&str, u64); 8] = [
            ("Ki", 1 << 10),
            ("Mi", 1 << 20),
            ("Gi", 1 << 30),
            ("Ti", 1 << 40),
            ("k", 1_000),
            ("M", 1_000_000),
            ("G", 1_000_000_000),
            ("T", 1_000_000_000_000),
        ];
        let found = SUFFIXES.iter().find_map(|(suffix, unit)| Some((text.strip_suffix(suffix)?, *unit)));
        let (number, unit) = found.unwrap_or((text, 1));
        scaled(number, unit, 9).filter(|bytes| *bytes > 0).map(Bytes).ok_or_else(error)
    }
}

impl BitsPerSec {
    /// The smallest network limit: below it, two segments in a retransmission timeout already
    /// exceed the limit, and a flow would stall (see `shaper_common::pace::SHARE_MIN`).
    pub const MIN: BitsPerSec = BitsPerSec(128_000);
    /// The largest, 400 Gbit/s.
    pub const MAX: BitsPerSec = BitsPerSec(400_000_000_000);

    /// Reads `100mbit`, `1.5gbit`, `500kbit`; a bare number is Mbit/s.
    pub fn parse(input: &str) -> Result<BitsPerSec, ParseQuantityError> {
        const EXPECTED: &str = "a bandwidth, such as 100mbit, 1.5gbit or 500kbit, from 128kbit to 400gbit (a bare number is Mbit/s)";
        let error = || ParseQuantityError { input: input.into(), expected: EXPECTED };
        let text = input.trim().to_ascii_lowercase();
        let text = text.strip_suffix("/s").or_else(|| text.strip_suffix("ps")).unwrap_or(&text);
        const SUFFIXES: [(&str, u64); 4] =
            [("kbit", 1_000), ("mbit", 1_000_000), ("gbit", 1_000_000_000), ("bit", 1)];
        let found = SUFFIXES.iter().find_map(|(suffix, unit)| Some((text.strip_suffix(suffix)?, *unit)));
        let (number, unit) = found.unwrap_or((text, 1_000_000));
        let bits = scaled(number, unit, 9).map(BitsPerSec).ok_or_else(error)?;
        if bits < Self::MIN || bits > Self::MAX { Err(error()) } else { Ok(bits) }
    }

    /// In whole bytes a second, rounded down.
    pub const fn bytes_per_sec(self) -> u64 {
        self.0 / 8
    }
}

/// `number` in decimal notation times `unit`, rounded down, with at most `digits` decimals.
fn scaled(number: &str, unit: u64, digits: usize) -> Option<u64> {
    let number = number.trim();
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let all_digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    let well_formed = !whole.is_empty()
        && all_digits(whole)
        && all_digits(fraction)
        && fraction.len() <= digits
        && !number.ends_with('.');
    if !well_formed {
        return None;
    }
    let whole = whole.parse::<u64>().ok()?.checked_mul(unit)?;
    if fraction.is_empty() {
        return Some(whole);
    }
    let part = u128::from(fraction.parse::<u64>().ok()?) * u128::from(unit);
    let part = part / 10u128.pow(fraction.len() as u32);
    whole.checked_add(u64::try_from(part).ok()?)
}

impl fmt::Display for Millicores {
    /// Decimal cores: `0.5`, `2`, `0.125`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = format!("{}.{:03}", self.0 / 1000, self.0 % 1000);
        f.pad(text.trim_end_matches('0').trim_end_matches('.'))
    }
}

impl Iops {
    /// More than any device does.
    pub const MAX: Iops = Iops(1_000_000_000);

    /// Reads `500`.
    pub fn parse(input: &str) -> Result<Iops, ParseQuantityError> {
        const EXPECTED: &str = "operations a second: a whole number from 1 to 1000000000";
        let error = || ParseQuantityError { input: input.into(), expected: EXPECTED };
        let operations = input.trim().parse().ok().map(Iops);
        operations.filter(|operations| (Iops(1)..=Self::MAX).contains(operations)).ok_or_else(error)
    }
}

impl Micros {
    /// The shortest latency of block IO that can be promised: less says more of the CPU than of the device.
    pub const LATENCY_MIN: Micros = Micros(100);
    /// The longest: what is above, the histograms do not tell apart.
    pub const LATENCY_MAX: Micros = Micros(500_000);

    /// Reads a latency: `5ms`, `1.5ms`, `500us`, `0.25s`.
    pub fn parse_latency(input: &str) -> Result<Micros, ParseQuantityError> {
        const EXPECTED: &str = "a latency, such as 5ms, 1.5ms or 500us, from 100us to 500ms";
        let error = || ParseQuantityError { input: input.into(), expected: EXPECTED };
        const SUFFIXES: [(&str, u64); 4] = [("ms", 1_000), ("us", 1), ("µs", 1), ("s", 1_000_000)];
        let text = input.trim();
        let found = SUFFIXES.iter().find_map(|(suffix, unit)| Some((text.strip_suffix(suffix)?, *unit)));
        let (number, unit) = found.ok_or_else(error)?;
        let micros = scaled(number, unit, 6).map(Micros);
        micros.filter(|it| (Self::LATENCY_MIN..=Self::LATENCY_MAX).contains(it)).ok_or_else(error)
    }
}

impl Milliwatts {
    /// More than any card draws.
    pub const MAX: Milliwatts = Milliwatts(100_000_000);

    /// Reads watts: `250W`, `250`, `72.5W`.
    pub fn parse(input: &str) -> Result<Milliwatts, ParseQuantityError> {
        const EXPECTED: &str = "a power in watts, such as 250W or 72.5W, of at most 100000W";
        let error = || ParseQuantityError { input: input.into(), expected: EXPECTED };
        let text = input.trim();
        let power = scaled(text.strip_suffix('W').unwrap_or(text), 1000, 3).map(Milliwatts);
        power.filter(|power| (Milliwatts(1)..=Self::MAX).contains(power)).ok_or_else(error)
    }
}

impl fmt::Display for Milliwatts {
    /// `250 W`, `72.5 W`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let watts = format!("{}.{:03}", self.0 / 1000, self.0 % 1000);
        f.pad(&format!("{} W", watts.trim_end_matches('0').trim_end_matches('.')))
    }
}

impl fmt::Display for Micros {
    /// `250 µs`, `5 ms`, `12.345 ms`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 < 1000 {
            return f.pad(&format!("{} µs", self.0));
        }
        let millis = format!("{}.{:03}", self.0 / 1000, self.0 % 1000);
        f.pad(&format!("{} ms", millis.trim_end_matches('0').trim_end_matches('.')))
    }
}

impl fmt::Display for Bytes {
    /// The largest binary unit that leaves a value of at least 1, with one decimal where it matters.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&in_units(self.0, 1024, &["B", "KiB", "MiB", "GiB", "TiB"]))
    }
}

impl fmt::Display for BitsPerSec {
    /// The largest decimal unit that leaves a value of at least 1, with one decimal where it matters.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&in_units(self.0, 1000, &["bit/s", "kbit/s", "Mbit/s", "Gbit/s"]))
    }
}

impl fmt::Display for Iops {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{} IOPS", self.0))
    }
}

fn in_units(value: u64, base: u64, units: &[&str]) -> String {
    let (mut unit, mut size) = (0, 1u64);
    while unit + 1 < units.len() && value / size >= base {
        unit += 1;
        size *= base;
    }
    let tenths = u128::from(value) * 10 / u128::from(size);
    match tenths % 10 {
        0 => format!("{} {}", tenths / 10, units[unit]),
        tenth => format!("{}.{} {}", tenths / 10, tenth, units[unit]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn cores() {
        assert_eq!(Millicores::parse("0.5"), Ok(Millicores(500)));
        assert_eq!(Millicores::parse(" 2 "), Ok(Millicores(2000)));
        assert_eq!(Millicores::parse("250m"), Ok(Millicores(250)));
        for bad in ["", "-1", "0", "0.005", "1e3", "NaN", ".5", "1.", "0.0001", "99999999999999999999", "+1"]
        {
            assert!(Millicores::parse(bad).is_err(), "{bad}");
        }
        let shown = Millicores::parse("-1").unwrap_err().to_string();
        assert_eq!(shown, "`-1` is not a number of cores, such as 0.5, 2 or 250m, of at least 0.01");
        assert_eq!(Millicores(1250).to_string(), "1.25");
        assert_eq!(Millicores(2000).to_string(), "2");
        assert_eq!(Millicores(10_000).to_string(), "10");
    }

    #[test]
    fn memory() {
        assert_eq!(Bytes::parse("512Mi"), Ok(Bytes(512 << 20)));
        assert_eq!(Bytes::parse("1.5GiB"), Ok(Bytes(3 << 29)));
        assert_eq!(Bytes::parse("64M"), Ok(Bytes(64_000_000)));
        assert_eq!(Bytes::parse("4096"), Ok(Bytes(4096)));
        for bad in ["", "0", "-1Mi", "1Pi", "Mi", "20000000Ti"] {
            assert!(Bytes::parse(bad).is_err(), "{bad}");
        }
        assert_eq!(Bytes(3 << 29).to_string(), "1.5 GiB");
    }

    #[test]
    fn power() {
        for (text, milliwatts, shown) in
            [("250W", 250_000, "250 W"), (" 72.5 W", 72_500, "72.5 W"), ("300", 300_000, "300 W")]
        {
            assert_eq!(Milliwatts::parse(text), Ok(Milliwatts(milliwatts)));
            assert_eq!(Milliwatts(milliwatts).to_string(), shown);
        }
        for bad in ["", "0", "-1W", "1kW", "W", "100001W"] {
            assert!(Milliwatts::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn bandwidth() {
        assert_eq!(BitsPerSec::parse("100mbit"), Ok(BitsPerSec(100_000_000)));
        assert_eq!(BitsPerSec::parse("1.5 Gbit/s"), Ok(BitsPerSec(1_500_000_000)));
        assert_eq!(BitsPerSec::parse("10"), Ok(BitsPerSec(10_000_000)));
        for bad in ["", "0", "1kbit", "500gbit", "10MB", "fast"] {
            assert!(BitsPerSec::parse(bad).is_err(), "{bad}");
        }
        assert_eq!(BitsPerSec(12_500_000).to_string(), "12.5 Mbit/s");
    }

    #[test]
    fn latencies() {
        for (text, micros, shown) in [
            ("5ms", 5000, "5 ms"),
            (" 1.5 ms", 1500, "1.5 ms"),
            ("250us", 250, "250 µs"),
            ("250µs", 250, "250 µs"),
            ("0.25s", 250_000, "250 ms"),
            ("12.345ms", 12_345, "12.345 ms"),
        ] {
            assert_eq!(Micros::parse_latency(text), Ok(Micros(micros)), "{text}");
            assert_eq!(Micros(micros).to_string(), shown);
            assert_eq!(Micros::parse_latency(&shown.replace(' ', "")), Ok(Micros(micros)));
        }
        for bad in ["", "5", "99us", "0.6s", "ms", "-1ms", "1 min"] {
            assert!(Micros::parse_latency(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn weights() {
        assert_eq!(Weight::parse("300").map(Weight::get), Ok(300));
        assert!(Weight::parse("0").is_err() && Weight::parse("10001").is_err());
    }

    proptest! {
        #[test]
        fn what_is_shown_can_be_read_again(milli in 10u64..10_000_000) {
            prop_assert_eq!(Millicores::parse(&Millicores(milli).to_string()), Ok(Millicores(milli)));
        }

        #[test]
        fn no_input_panics(input in ".{0,24}") {
            let _ = (Millicores::parse(&input), Bytes::parse(&input), BitsPerSec::parse(&input), Weight::parse(&input));
        }
    }
}
