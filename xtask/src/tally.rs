//! Counts of tests, read from what test runners print.

use std::fmt;
use std::ops::AddAssign;

#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub(crate) struct Tally {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    /// Of those that passed, how many had failed before: they measure what else this machine does as well.
    pub(crate) second_try: u64,
}

impl Tally {
    /// One failure that no test runner counted.
    pub(crate) const FAILURE: Self = Self { passed: 0, failed: 1, second_try: 0 };

    /// Reads libtest's closing line: `test result: ok. 12 passed; 0 failed; 1 ignored; …`
    pub(crate) fn of_libtest(line: &str) -> Option<Self> {
        let (_, rest) = line.split_once("test result: ")?;
        Some(Self::sum(rest.split_once(". ")?.1.split("; ")))
    }

    /// Reads nextest's closing line: `Summary [ 0.1s] 12 tests run: 9 passed (1 slow, 1 flaky), 3 failed, 0 skipped`
    pub(crate) fn of_nextest(line: &str) -> Option<Self> {
        let rest = line.trim_start().strip_prefix("Summary [")?;
        let (_, counts) = rest.split_once(" run: ")?;
        Some(Self::sum(counts.split(", ")))
    }

    fn sum<'a>(counts: impl Iterator<Item = &'a str>) -> Self {
        let mut tally = Self::default();
        // nextest says in brackets what is to be said of those that passed.
        for (number, what) in
            counts.flat_map(|count| count.split(" (")).filter_map(|count| count.split_once(' '))
        {
            let Ok(number) = number.parse::<u64>() else { continue };
            if what.starts_with("passed") {
                tally.passed += number;
            } else if what.starts_with("flaky") {
                tally.second_try += number;
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
        self.second_try += other.second_try;
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed", self.passed)?;
        if self.second_try > 0 {
            write!(f, " ({} at a second try)", self.second_try)?;
        }
        write!(f, ", {} failed", self.failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closing_lines_are_read() {
        let libtest =
            "test result: FAILED. 12 passed; 2 failed; 1 ignored; 0 measured; 3 filtered out; finished in 0s";
        assert_eq!(Tally::of_libtest(libtest), Some(Tally { passed: 12, failed: 2, second_try: 0 }));
        assert_eq!(Tally::of_libtest("test place::fits ... ok"), None);

        let nextest = "     Summary [   0.003s] 12 tests run: 8 passed (1 slow, 2 flaky, 1 leaky), 2 failed, 1 timed out, \
                       1 exec failed, 5 skipped";
        assert_eq!(Tally::of_nextest(nextest), Some(Tally { passed: 8, failed: 4, second_try: 2 }));
        let stopped = "     Summary [   0.003s] 3/12 tests run: 2 passed, 1 failed, 0 skipped";
        assert_eq!(Tally::of_nextest(stopped), Some(Tally { passed: 2, failed: 1, second_try: 0 }));
        assert_eq!(Tally::of_nextest("        PASS [   0.003s] shaper-core limits"), None);
    }

    #[test]
    fn tallies_add_up() {
        let mut tally = Tally { passed: 2, failed: 0, second_try: 1 };
        tally += Tally::FAILURE;
        assert_eq!(tally.to_string(), "2 passed (1 at a second try), 1 failed");
    }
}
