//! Shows another program's output as it comes, and hands over its lines for reading.

use std::io::{self, Read, Write};

/// Copies `from` to `echo` until its end, without carriage returns, and calls `on_line` with each line, free of
/// terminal escapes. What a program prints before its newline is shown at once. An `echo` that fails, such as a
/// closed pipe, stops only the showing.
pub(crate) fn relay(
    mut from: impl Read,
    mut echo: impl Write,
    mut on_line: impl FnMut(String),
) -> io::Result<()> {
    let mut buffer = [0; 4096];
    let mut line = Vec::new();
    loop {
        let read = match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        let shown: Vec<u8> = buffer[..read].iter().copied().filter(|&byte| byte != b'\r').collect();
        let _ = echo.write_all(&shown).and_then(|()| echo.flush());
        for byte in shown {
            if byte == b'\n' {
                on_line(without_escapes(&String::from_utf8_lossy(&line)));
                line.clear();
            } else {
                line.push(byte);
            }
        }
    }
    if !line.is_empty() {
        on_line(without_escapes(&String::from_utf8_lossy(&line)));
    }
    Ok(())
}

/// `text` without terminal control sequences (ESC [ … letter, or ESC and one character).
fn without_escapes(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(char) = chars.next() {
        if char != '\x1b' {
            plain.push(char);
        } else if chars.next() == Some('[') {
            chars.by_ref().find(char::is_ascii_alphabetic);
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_handed_over_plain_and_shown_as_they_came() {
        let (mut echo, mut lines) = (Vec::new(), Vec::new());
        let input = b"\x1b[1mone\x1b[0m\r\ntwo\n\nlast";
        relay(&input[..], &mut echo, |line| lines.push(line)).unwrap();
        assert_eq!(lines, ["one", "two", "", "last"]);
        assert_eq!(echo, b"\x1b[1mone\x1b[0m\ntwo\n\nlast");
    }
}
