//! Everything that is printed goes through here: tables and JSON to standard output, remarks to
//! standard error.

use std::{
    fmt::Write as _,
    io::{self, Write as _},
};

use comfy_table::{Cell, CellAlignment, Table, presets};
use serde::Serialize;

use crate::error::Error;

/// Prints a text that ends its own lines.
pub(crate) fn print(text: &str) -> Result<(), Error> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(Error::Output)
}

/// Prints a value as JSON.
pub(crate) fn print_json(value: &impl Serialize) -> Result<(), Error> {
    let mut stdout = io::stdout().lock();
    serde_json::to_writer_pretty(&mut stdout, value)
        .map_err(io::Error::from)
        .and_then(|()| stdout.write_all(b"\n"))
        .and_then(|()| stdout.flush())
        .map_err(Error::Output)
}

/// Prints a value as a YAML document.
pub(crate) fn print_yaml(value: &impl Serialize) -> Result<(), Error> {
    let text = serde_yaml::to_string(value).map_err(|error| Error::Output(io::Error::other(error)))?;
    print(text.trim_end()).and_then(|()| print("\n"))
}

/// Prints a value as one of several YAML documents.
pub(crate) fn print_yaml_document(value: &impl Serialize) -> Result<(), Error> {
    print("---\n").and_then(|()| print_yaml(value))
}

/// Prints a value as JSON on one line.
pub(crate) fn print_json_line(value: &impl Serialize) -> Result<(), Error> {
    let line = serde_json::to_string(value).map_err(|error| Error::Output(error.into()))?;
    print(&format!("{line}\n"))
}

/// Says a line on standard error, as shaper.
pub(crate) fn warn(text: &str) {
    remark(&format!("shaper: {text}"));
}

/// Says a line on standard error.
pub(crate) fn remark(text: &str) {
    // Where even this cannot be written, there is nobody left to tell.
    let _ = writeln!(io::stderr(), "{}", printable(text));
}

/// Text of others, with what would steer a terminal made visible.
pub(crate) fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for letter in text.chars() {
        if letter.is_control() {
            shown.extend(letter.escape_default());
        } else {
            shown.push(letter);
        }
    }
    shown
}

/// A column of a table.
#[derive(Clone, Copy)]
pub(crate) enum Column {
    /// Of words.
    Text(&'static str),
    /// Of quantities, which line up at their ends.
    Number(&'static str),
}

impl Column {
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Column::Text(name) | Column::Number(name) => name,
        }
    }
}

/// A table without lines, under a header.
pub(crate) fn table<const N: usize>(
    columns: [Column; N],
    rows: impl IntoIterator<Item = [String; N]>,
) -> String {
    table_of(&columns, rows)
}

/// The same where the number of columns is not known before; a row has a text for each.
pub(crate) fn table_of<R: AsRef<[String]>>(columns: &[Column], rows: impl IntoIterator<Item = R>) -> String {
    let aligned = |index: usize, text: &str| {
        let alignment = match columns[index] {
            Column::Text(_) => CellAlignment::Left,
            Column::Number(_) => CellAlignment::Right,
        };
        Cell::new(printable(text)).set_alignment(alignment)
    };
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_header(columns.iter().enumerate().map(|(index, column)| aligned(index, column.name())));
    for row in rows {
        table.add_row(row.as_ref().iter().enumerate().map(|(index, text)| aligned(index, text)));
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    let mut text = String::new();
    for line in table.lines() {
        // Writing to a String does not fail.
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text
}

/// A table whose rows come one by one: columns grow as they have to.
pub(crate) struct Ledger<const N: usize> {
    columns: [Column; N],
    widths: [usize; N],
    has_header: bool,
}

impl<const N: usize> Ledger<N> {
    pub(crate) fn new(columns: [Column; N]) -> Ledger<N> {
        let widths = std::array::from_fn(|index| columns[index].name().len().max(8));
        Ledger { columns, widths, has_header: false }
    }

    /// A row as a line, below the header if it is the first.
    pub(crate) fn line(&mut self, row: &[String; N]) -> String {
        let row: [String; N] = std::array::from_fn(|index| printable(&row[index]));
        for (width, text) in self.widths.iter_mut().zip(&row) {
            *width = text.chars().count().max(*width);
        }
        let header: [&str; N] = std::array::from_fn(|index| self.columns[index].name());
        let mut lines = if self.has_header { String::new() } else { self.aligned(&header) };
        self.has_header = true;
        lines.push_str(&self.aligned(&row.each_ref().map(String::as_str)));
        lines
    }

    fn aligned(&self, row: &[&str; N]) -> String {
        let cells =
            row.iter().zip(&self.columns).zip(&self.widths).map(|((text, column), &width)| match column {
                Column::Text(_) => format!("{text:<width$}"),
                Column::Number(_) => format!("{text:>width$}"),
            });
        format!("{}\n", cells.collect::<Vec<_>>().join("  ").trim_end())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_lines_up_and_has_no_trailing_space() {
        let rows = [("a", "10"), ("longer", "5")].map(|(name, count)| [name.to_owned(), count.to_owned()]);
        let text = table([Column::Text("NAME"), Column::Number("COUNT")], rows);
        assert_eq!(text, "NAME    COUNT\na          10\nlonger      5\n");
    }

    #[test]
    fn a_ledger_lines_up_as_far_as_can_be_known() {
        let mut ledger = Ledger::new([Column::Text("NAME"), Column::Number("COUNT"), Column::Text("NOTE")]);
        let row = |name: &str| [name.to_owned(), "10".to_owned(), String::new()];
        assert_eq!(ledger.line(&row("a")), "NAME         COUNT  NOTE\na               10\n");
        assert_eq!(ledger.line(&row("longer-name")), "longer-name        10\n");
        assert_eq!(ledger.line(&row("b\n")), "b\\n                10\n");
    }

    #[test]
    fn a_name_cannot_steer_the_terminal() {
        assert_eq!(printable("täsk\u{1b}[2J\n"), r"täsk\u{1b}[2J\n");
    }
}
