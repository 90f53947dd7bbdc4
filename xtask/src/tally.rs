//! Counts of tests, read from what test runners print.

use std::fmt;
use std::ops::AddAssign;

#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub(crate) struct Tally {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
}

impl Tally {
    /// One failure that no test runner counted.
    pub(crate) const FAILURE: Self = Self { passed: 0, failed: 1 };

    /// Reads libtest's closing line: `test result: ok. 12 passed; 0 failed; 1 ignored; …`
    pub(crate) fn of_libtest(line: &str) -> Option<Self> {
        let (_, rest) = line.split_once("test result: ")?;
        Some(Self::sum(rest.split_once(". ")?.1.split("; ")))
    }

    /// Reads nextest's closing line: `Summary [ 0.1s] 12 tests run: 9 passed (1 slow), 3 failed, 0 skipped`
    pub(crate) fn of_nextest(line: &str) -> Option<Self> {
        let rest = line.trim_start().strip_prefix("Summary [")?;
        let (_, counts) = rest.split_once(" run: ")?;
        Some(Self::sum(counts.split(", ")))
    }

    fn sum<'a>(counts: impl Iterator<Item = &'a str>) -> Self {
        let mut tally = Self::default();
        for (number, what) in counts.filter_map(|count| count.split_once(' ')) {
            let Ok(number) = number.parse::<u64>() else { continue };
            if what.starts_with("passed") {
                tally.passed += number;
            } else if ["failed", "timed out", "exec failed"].iter().any(|failure| what.starts_with(failure)) {
                tally.failed += number;
            }
        }
        tally
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed", self.passed, self.failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closing_lines_are_read() {
        let libtest =
            "test result: FAILED. 12 passed; 2 failed; 1 ignored; 0 measured; 3 filtered out; finished in 0s";
        assert_eq!(Tally::of_libtest(libtest), Some(Tally { passed: 12, failed: 2 }));
        assert_eq!(Tally::of_libtest("test place::fits ... ok"), None);

        let nextest = "     Summary [   0.003s] 12 tests run: 8 passed (1 slow, 1 leaky), 2 failed, 1 timed out, \
                       1 exec failed, 5 skipped";
        assert_eq!(Tally::of_nextest(nextest), Some(Tally { passed: 8, failed: 4 }));
        let stopped = "     Summary [   0.003s] 3/12 tests run: 2 passed, 1 failed, 0 skipped";
        assert_eq!(Tally::of_nextest(stopped), Some(Tally { passed: 2, failed: 1 }));
        assert_eq!(Tally::of_nextest("        PASS [   0.003s] shaper-core limits"), None);
    }

    #[test]
    fn tallies_add_up() {
        let mut tally = Tally { passed: 2, failed: 0 };
        tally += Tally::FAILURE;
        assert_eq!(tally.to_string(), "2 passed, 1 failed");
    }
}
