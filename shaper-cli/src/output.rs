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
pub(crate) enum Column {
    /// Of words.
    Text(&'static str),
    /// Of quantities, which line up at their ends.
    Number(&'static str),
}

/// A table without lines, under a header.
pub(crate) fn table<const N: usize>(
    columns: [Column; N],
    rows: impl IntoIterator<Item = [String; N]>,
) -> String {
    let aligned = |index: usize, text: &str| {
        let alignment = match columns[index] {
            Column::Text(_) => CellAlignment::Left,
            Column::Number(_) => CellAlignment::Right,
        };
        Cell::new(printable(text)).set_alignment(alignment)
    };
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_header(columns.iter().enumerate().map(|(index, column)| match column {
        Column::Text(name) | Column::Number(name) => aligned(index, name),
    }));
    for row in rows {
        table.add_row(row.iter().enumerate().map(|(index, text)| aligned(index, text)));
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
    fn a_name_cannot_steer_the_terminal() {
        assert_eq!(printable("täsk\u{1b}[2J\n"), r"täsk\u{1b}[2J\n");
    }
}
