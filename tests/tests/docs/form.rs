//! Whether what a command prints has the form that the page shows.
//!
//! Spaces count as one, and none at the ends of lines. A number that stands by itself may be another, with its unit, unless a
//! command above on the page has the same number: then it is one that was asked for. A date may be another. `…` stands for
//! anything within a line; a line that is `…` alone stands for any lines.

use std::collections::BTreeSet;

use regex::Regex;

const DATE: &str = "[0-9]{4}-[0-9]{2}-[0-9]{2}(?:T[0-9:.]+Z?)?";
const NUMBER: &str = "[0-9]+(?:[.][0-9]+)?";
/// Of what is counted by powers, so that it may change with the number.
const UNIT: &str = "(?:[KMGT]iB|B|[kKMG]?bit|ns|µs|ms|s|m|h|d)";

fn regex(pattern: &str) -> Regex {
    Regex::new(pattern).unwrap_or_else(|error| panic!("{error}"))
}

/// The numbers that a command asks for.
pub(crate) fn numbers(command: &str) -> BTreeSet<String> {
    let numbers = regex("[0-9]+(?:[.][0-9]+)*");
    numbers.find_iter(command).map(|found| found.as_str().to_owned()).collect()
}

/// None where it has, and else the first line that it lacks.
pub(crate) fn difference(shown: &str, printed: &str, asked_for: &BTreeSet<String>) -> Option<String> {
    let lines = |text: &str| text.trim_end().lines().map(squeezed).collect::<Vec<_>>();
    let (shown, printed) = (lines(shown), lines(printed));
    let mut left = &printed[..];
    let mut any = false;
    for line in &shown {
        if line == "…" {
            any = true;
            continue;
        }
        let pattern = pattern(line, asked_for);
        match left.iter().position(|line| pattern.is_match(line)) {
            Some(at) if at == 0 || any => left = &left[at + 1..],
            _ => return Some(line.clone()),
        }
        any = false;
    }
    left.first().filter(|_| !any).map(|line| format!("(nothing more, where it printed `{line}`)"))
}

fn squeezed(line: &str) -> String {
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// What a line that is shown allows.
fn pattern(line: &str, asked_for: &BTreeSet<String>) -> Regex {
    let words = regex(&format!("{DATE}|[A-Za-z0-9_.µ-]+|."));
    let (date, number, unit) = (
        regex(&format!("^{DATE}$")),
        regex(&format!("^({NUMBER})({UNIT})?([.]?)$")),
        regex(&format!("^{UNIT}([.]?)$")),
    );
    let mut pattern = String::from("^");
    let mut after_number = false;
    for word in words.find_iter(line).map(|word| word.as_str()) {
        let any_number = number.captures(word).filter(|found| !asked_for.contains(&found[1]));
        let any_unit = unit.captures(word).filter(|_| after_number);
        // A unit may stand behind its number with a space between.
        after_number = any_number.is_some() || after_number && word == " ";
        if word == "…" {
            pattern.push_str(".*");
        } else if date.is_match(word) {
            pattern.push_str(DATE);
        } else if let Some(found) = any_number {
            pattern.push_str(&format!("{NUMBER}{UNIT}?{}", regex::escape(&found[3])));
        } else if let Some(found) = any_unit {
            pattern.push_str(&format!("{UNIT}{}", regex::escape(&found[1])));
        } else {
            pattern.push_str(&regex::escape(word));
        }
    }
    pattern.push('$');
    regex(&pattern)
}

#[test]
fn numbers_may_be_others_but_not_those_that_were_asked_for() {
    let asked_for = numbers("shaper run --cpu 0.5 --memory 64Mi -- ./n1");
    let same = |shown: &str, printed: &str| difference(shown, printed, &asked_for).is_none();
    assert!(same("train-1  0.047/0.5  256KiB/64MiB\n", "train-1 1.2/0.5   0B/64MiB"));
    assert!(!same("train-1  0.047/0.5", "train-1 1.2/0.6"));
    assert!(!same("train-1  256KiB/64MiB", "train-1  256KiB/32MiB"));
    assert!(!same("train-1  0.047", "train-2  0.047"));
    assert!(same("sent 3 KiB, 12 packets in 2 s.", "sent 0 B, 0 packets in 10 ms."));
    assert!(same("at 2026-11-28T15:23:50Z (3s ago)", "at 2027-01-02T05:23:50.1Z (12m ago)"));
    assert!(!same("cpu.max 7", "cpu.weight 7"));
    assert!(!same("at 10.77.0.2", "at 10.77.0.3"));
}

#[test]
fn dots_stand_for_what_is_not_shown() {
    let same = |shown: &str, printed: &str| difference(shown, printed, &BTreeSet::new()).is_none();
    assert!(same("ID …\n…\nend\n", "ID PHASE\na\nb\nend"));
    assert!(same("a\n…", "a"));
    assert!(same("a\n…", "a\nb"));
    assert!(!same("a\n", "a\nb"));
    assert!(!same("a\nb\n", "a"));
    assert!(!same("…\nb\n", "a"));
    assert!(same("", ""));
    assert!(!same("", "a"));
}
