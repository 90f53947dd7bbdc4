//! What is wrong with a document, where, and what to write instead.

use std::fmt;

/// Why a document was refused. `Display` renders it with the line at fault, as rustc does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DocumentError {
    /// Name of the document, as its reader gave it.
    pub file: String,
    /// Line of the value or key at fault, from 1.
    pub line: u32,
    /// Column of it, in characters, from 1.
    pub column: u32,
    /// The field at fault, such as `resource_demand.cpu_cores`; empty for the document as a whole.
    pub path: String,
    /// What is wrong.
    pub message: String,
    /// What to write instead.
    pub remedy: Option<String>,
    excerpt: Option<Box<Excerpt>>,
}

/// The line at fault, or the part of it around the fault.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Excerpt {
    text: String,
    /// Characters before the fault.
    before: usize,
    /// Characters of the fault.
    marked: usize,
}

impl std::error::Error for DocumentError {}

impl fmt::Display for DocumentError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let DocumentError { file, line, column, path, message, remedy, excerpt } = self;
        write!(f, "{}:{line}:{column}: ", printable(file))?;
        if !path.is_empty() {
            write!(f, "{path}: ")?;
        }
        f.write_str(message)?;
        if let Some(excerpt) = excerpt {
            let Excerpt { text, before, marked } = excerpt.as_ref();
            let number = line.to_string();
            let gutter = " ".repeat(number.len());
            let carets = "^".repeat(*marked);
            write!(f, "\n{gutter} |\n{number} | {text}\n{gutter} | {:before$}{carets}", "")?;
        }
        if let Some(remedy) = remedy {
            write!(f, "\nhelp: {remedy}")?;
        }
        Ok(())
    }
}

/// A part of a document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// From 1.
    pub(super) line: u32,
    /// In characters, from 1.
    pub(super) column: u32,
    /// In characters.
    pub(super) length: usize,
}

impl Place {
    /// Where a document begins.
    pub(super) const START: Place = Place { line: 1, column: 1, length: 1 };
}

impl DocumentError {
    /// An error in `text`; without a text, no line is shown.
    pub(super) fn new(
        file: &str,
        text: Option<&str>,
        place: Place,
        path: &str,
        message: String,
    ) -> DocumentError {
        let Place { line, column, length: _ } = place;
        let excerpt = text.and_then(|text| excerpt(text, place)).map(Box::new);
        DocumentError {
            file: file.to_owned(),
            line,
            column,
            path: path.to_owned(),
            message,
            remedy: None,
            excerpt,
        }
    }

    /// The same, with what to write instead.
    #[must_use]
    pub(super) fn with_remedy(self, remedy: impl Into<String>) -> DocumentError {
        DocumentError { remedy: Some(remedy.into()), ..self }
    }
}

/// The most of a line that is shown.
const WIDTH: usize = 100;
/// How much of it comes before the fault, at most.
const LEAD: usize = 60;

fn excerpt(text: &str, place: Place) -> Option<Excerpt> {
    let line = lines(text).nth(usize::try_from(place.line).ok()?.checked_sub(1)?)?;
    let line = if place.line == 1 { line.trim_start_matches('\u{feff}') } else { line };
    let column = usize::try_from(place.column).ok()?.checked_sub(1)?;
    let fits = line.chars().nth(WIDTH).is_none();
    let skipped = if fits { 0 } else { column.saturating_sub(LEAD) };
    let mut rest = line.chars().skip(skipped);
    // One character, whatever it is, takes one place, so that the mark is below what it means.
    let shown: String = rest.by_ref().take(WIDTH).map(visible).collect();
    let before = column - skipped;
    let room = shown.chars().count().saturating_sub(before);
    let head = if skipped > 0 { "…" } else { "" };
    let tail = if rest.next().is_some() { "…" } else { "" };
    Some(Excerpt {
        text: format!("{head}{}{tail}", if tail.is_empty() { shown.trim_end() } else { &shown }),
        before: before + head.chars().count(),
        marked: place.length.clamp(1, room.max(1)),
    })
}

/// The lines of a text, which `\n`, `\r\n` and, in YAML, a lone `\r` end.
fn lines(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = Some(text);
    std::iter::from_fn(move || {
        let text = rest?;
        let Some(end) = text.find(['\n', '\r']) else { return rest.take() };
        let after = &text[end..];
        rest = after.strip_prefix("\r\n").or_else(|| after.get(1..));
        Some(&text[..end])
    })
}

fn visible(letter: char) -> char {
    match letter {
        '\t' => ' ',
        letter if letter.is_control() => char::REPLACEMENT_CHARACTER,
        letter => letter,
    }
}

/// Text of a document in backquotes, as [`shortened`] has it.
pub(super) fn quoted(text: &str) -> String {
    format!("`{}`", shortened(text))
}

/// Text of a document: on one line, without what would steer a terminal, and not long.
pub(super) fn shortened(text: &str) -> String {
    const LONGEST: usize = 64;
    let shown = printable(&text.chars().take(LONGEST).collect::<String>());
    let more = if text.chars().nth(LONGEST).is_some() { "…" } else { "" };
    format!("{shown}{more}")
}

pub(super) fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for letter in text.chars() {
        if letter.is_control() { shown.extend(letter.escape_default()) } else { shown.push(letter) }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str, line: u32, column: u32, length: usize) -> String {
        let place = Place { line, column, length };
        DocumentError::new("a.yaml", Some(text), place, "x.y", "is wrong".into()).to_string()
    }

    #[test]
    fn the_mark_is_below_the_fault() {
        let shown = at("a: 1\n\tb: ä5\r\n", 2, 5, 2);
        assert_eq!(shown, "a.yaml:2:5: x.y: is wrong\n  |\n2 |  b: ä5\n  |     ^^");
        let shown = at("\u{feff}a", 1, 1, 9);
        assert_eq!(shown, "a.yaml:1:1: x.y: is wrong\n  |\n1 | a\n  | ^");
    }

    #[test]
    fn of_a_long_line_the_part_around_the_fault_is_shown() {
        let line = format!("{}!!{}", "a".repeat(5000), "b".repeat(5000));
        let shown = at(&line, 1, 5001, 2);
        let lines: Vec<&str> = shown.lines().collect();
        assert_eq!(lines[2], format!("1 | …{}!!{}…", "a".repeat(LEAD), "b".repeat(WIDTH - LEAD - 2)));
        assert_eq!(lines[3], format!("  | {}^^", " ".repeat(LEAD + 1)));
    }

    #[test]
    fn nothing_steers_the_terminal() {
        let place = Place { line: 1, column: 1, length: 40 };
        let error =
            DocumentError::new("\u{1b}[2J", Some("\u{1b}[31mx\u{7}"), place, "", quoted("\u{1b}a\nb"));
        let error = error.with_remedy("none").to_string();
        assert!(!error.chars().any(|letter| letter.is_control() && letter != '\n'), "{error:?}");
        assert_eq!(error.lines().count(), 5, "{error}");
    }

    #[test]
    fn a_place_beyond_the_text_shows_no_line() {
        assert_eq!(at("a", 7, 1, 1), "a.yaml:7:1: x.y: is wrong");
        assert_eq!(at("a", 1, 3, 1), "a.yaml:1:3: x.y: is wrong\n  |\n1 | a\n  |   ^");
    }
}
