//! The table of docs/corner-cases.md: every test that it names is in the source, and every row names one or says why not.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

const DOCUMENT: &str = "docs/corner-cases.md";

/// How the last cell of a row begins that names no test.
const UNTESTED: &str = "Not tested:";

/// What is wrong with the table of the tree at `root`.
pub(crate) fn problems(root: &Path) -> Result<Vec<String>> {
    let path = root.join(DOCUMENT);
    let table = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let found = problems_of(&table, |file| fs::read_to_string(root.join(file)).ok());
    Ok(found.into_iter().map(|problem| format!("{DOCUMENT}{problem}")).collect())
}

fn problems_of(table: &str, source: impl Fn(&str) -> Option<String>) -> Vec<String> {
    let mut problems = Vec::new();
    let mut rows = 0;
    for (number, line) in (1..).zip(table.lines()) {
        let Some(row) = line.strip_prefix("| ").and_then(|line| line.strip_suffix(" |")) else { continue };
        let Some((_, last)) = row.rsplit_once(" | ") else { continue };
        if last == "shown by" {
            continue;
        }
        rows += 1;
        let mut tests = named(last).peekable();
        if tests.peek().is_none() && !last.starts_with(UNTESTED) {
            problems.push(format!(
                ":{number}: names no test (`FILE.rs::NAME`) and does not say `{UNTESTED}` why"
            ));
        }
        for (file, name) in tests {
            match source(file) {
                None => problems.push(format!(":{number}: there is no file {file}")),
                Some(text) if !has_test(&text, name) => {
                    problems.push(format!(":{number}: {file} has no test `{name}`"));
                }
                Some(_) => {}
            }
        }
    }
    if rows == 0 {
        problems.push(": has no rows".to_owned());
    }
    problems
}

/// The tests that a cell names in backticks: a file and a function.
fn named(cell: &str) -> impl Iterator<Item = (&str, &str)> {
    let quoted = cell.split('`').skip(1).step_by(2);
    quoted.filter_map(|text| text.split_once("::")).filter(|(file, _)| file.ends_with(".rs"))
}

/// Whether a source has a function of that name which is a test.
fn has_test(source: &str, name: &str) -> bool {
    let mut is_test = false;
    for line in source.lines().map(str::trim) {
        if line == "#[test]" {
            is_test = true;
        } else if let Some(rest) = line.strip_prefix("fn ") {
            if is_test && rest.strip_prefix(name).is_some_and(|rest| rest.starts_with('(')) {
                return true;
            }
            is_test = false;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE: &str =
        "fn helper() {}\n    #[test]\n    #[should_panic]\n    fn it_holds() {}\nfn it_holds_not() {}\n";

    fn of(last: &str) -> Vec<String> {
        let table = format!("| case | what shaper does | shown by |\n|---|---|---|\n| a | b | {last} |\n");
        problems_of(&table, |file| (file == "a/b.rs").then(|| SOURCE.to_owned()))
    }

    #[test]
    fn a_row_names_tests_that_are_there_or_says_why_it_names_none() {
        assert_eq!(of("`a/b.rs::it_holds`, on v2"), [""; 0]);
        assert_eq!(of("Not tested: no such machine"), [""; 0]);
        assert_eq!(of("by hand").len(), 1);
        // A word in backticks that is no test does not count as one.
        assert_eq!(of("`psi=1`").len(), 1);
        assert_eq!(of("`a/c.rs::it_holds`"), [":3: there is no file a/c.rs"]);
        for name in ["it_hold", "it_holds_not", "helper"] {
            assert_eq!(of(&format!("`a/b.rs::{name}`")), [format!(":3: a/b.rs has no test `{name}`")]);
        }
        assert_eq!(problems_of("no table", |_| None), [": has no rows"]);
    }
}
