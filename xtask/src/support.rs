//! The table of docs/kernel-support.md that says what each kernel has: made of what `shaper-agent probe` finds on it, and
//! compared with that whenever the VM's tests run.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::bins::BinDir;
use crate::{process, workspace};

const BEGIN: &str = "<!-- what each kernel has: `cargo xtask vm --write-table` -->\n";
const END: &str = "<!-- end -->";

/// What a kernel has: each feature with `yes`, `no` or `unusable`.
pub(crate) type Features = BTreeMap<String, String>;

/// A line of `shaper-agent probe`: the feature and its state, and perhaps why.
pub(crate) fn feature(line: &str) -> Option<(String, String)> {
    let mut words = line.split('\t');
    let (name, state) = (words.next()?, words.next()?);
    Some((name.to_owned(), state.trim().to_owned()))
}

/// What this machine's kernel has, under its release.
pub(crate) fn of_this_machine(bins: &BinDir) -> Result<(String, Features)> {
    let found = process::read(Command::new(bins.bin("shaper-agent")).arg("probe"))?;
    let release = process::read(Command::new("uname").arg("-r"))?;
    Ok((release.trim().to_owned(), found.lines().filter_map(feature).collect()))
}

/// Columns by their titles, in order.
fn table(columns: &[(String, Features)]) -> String {
    let mut text = String::from("| feature |");
    for (title, _) in columns {
        text += &format!(" {title} |");
    }
    text += "\n|---|";
    text += &"---|".repeat(columns.len());
    text.push('\n');
    let mut names: Vec<&String> = columns.iter().flat_map(|(_, features)| features.keys()).collect();
    names.sort();
    names.dedup();
    for name in names {
        text += &format!("| `{name}` |");
        for (_, features) in columns {
            text += &format!(" {} |", features.get(name).map_or("?", String::as_str));
        }
        text.push('\n');
    }
    text
}

/// The columns of a table as it stands.
fn columns(table: &str) -> Vec<(String, Features)> {
    let cells = |line: &str| -> Vec<String> {
        line.trim_matches('|').split('|').map(|cell| cell.trim().trim_matches('`').to_owned()).collect()
    };
    let mut lines = table.lines();
    let titles = lines.next().map(cells).unwrap_or_default();
    let rows: Vec<Vec<String>> = lines.skip(1).map(cells).collect();
    let column = |(index, title): (usize, &String)| {
        let of_row = |row: &Vec<String>| Some((row.first()?.clone(), row.get(index)?.clone()));
        (title.clone(), rows.iter().filter_map(of_row).collect())
    };
    titles.iter().enumerate().skip(1).map(column).collect()
}

fn path() -> PathBuf {
    workspace::root().join("docs/kernel-support.md")
}

/// Compares what was found with the document, or writes it there. A column whose kernel is not at hand stays as it is.
pub(crate) fn compare(found: &[(String, Features)], write: bool) -> Result<()> {
    let path = path();
    let document = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let place = document.find(BEGIN).map(|at| at + BEGIN.len());
    let place = place.and_then(|start| Some((start, start + document[start..].find(END)?)));
    let (start, end) = place.with_context(|| format!("{} has no place for the table", path.display()))?;
    let stands = columns(&document[start..end]);
    let mut wanted = stands.clone();
    for (title, features) in found {
        match wanted.iter_mut().find(|(stands, _)| stands == title) {
            Some((_, stands)) => stands.clone_from(features),
            // Another machine's kernel is not this document's.
            None if write => wanted.push((title.clone(), features.clone())),
            None => {}
        }
    }
    if wanted == stands {
        return Ok(());
    }
    if !write {
        bail!(
            "{} does not say what the kernels have:\n{}Remedy: cargo xtask vm --write-table",
            path.display(),
            table(&wanted)
        );
    }
    let document = format!("{}{}{}", &document[..start], table(&wanted), &document[end..]);
    fs::write(&path, document).with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_read_as_it_was_written() {
        let features = |pairs: &[(&str, &str)]| -> Features {
            pairs.iter().map(|(name, state)| ((*name).to_owned(), (*state).to_owned())).collect()
        };
        let found = vec![
            ("6.1".to_owned(), features(&[("btf", "yes"), ("tcx", "no")])),
            ("6.12".to_owned(), features(&[("btf", "yes"), ("tcx", "yes")])),
        ];
        let text = table(&found);
        assert_eq!(
            text,
            "| feature | 6.1 | 6.12 |\n|---|---|---|\n| `btf` | yes | yes |\n| `tcx` | no | yes |\n"
        );
        assert_eq!(columns(&text), found);
        assert_eq!(columns(""), []);
    }

    #[test]
    fn a_line_of_the_probe_is_a_feature() {
        assert_eq!(feature("tcx\tno\tEINVAL\n"), Some(("tcx".to_owned(), "no".to_owned())));
        assert_eq!(feature("no tab"), None);
    }
}
