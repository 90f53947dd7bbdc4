//! Markup, written so that nothing from outside can become any: text and attributes are escaped, and what is not escaped is
//! a literal of this program.

use std::fmt::{self, Display, Write};

use time::OffsetDateTime;

/// A piece of a page.
#[derive(Debug, Default)]
pub(super) struct Html(String);

/// Writes with the letters of markup replaced.
struct Escaped<'a>(&'a mut String);

impl Write for Escaped<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for letter in text.chars() {
            match letter {
                '&' => self.0.push_str("&amp;"),
                '<' => self.0.push_str("&lt;"),
                '>' => self.0.push_str("&gt;"),
                '"' => self.0.push_str("&quot;"),
                '\'' => self.0.push_str("&#39;"),
                letter => self.0.push(letter),
            }
        }
        Ok(())
    }
}

impl Html {
    /// Markup of this program's own.
    pub(super) fn raw(&mut self, markup: &'static str) -> &mut Html {
        self.0.push_str(markup);
        self
    }

    /// Text.
    pub(super) fn text(&mut self, text: impl Display) -> &mut Html {
        // To write to a string does not fail.
        let _ = write!(Escaped(&mut self.0), "{text}");
        self
    }

    /// An attribute of the element that is being opened.
    pub(super) fn attribute(&mut self, name: &'static str, value: impl Display) -> &mut Html {
        self.raw(" ").raw(name).raw("=\"").text(value).raw("\"")
    }

    /// A link to a page of ours: what stands between the slashes is encoded.
    pub(super) fn link(&mut self, folder: &'static str, name: &str) -> &mut Html {
        self.raw("<a").attribute("href", format_args!("/{folder}/{}", Encoded(name))).raw(">");
        self.text(name).raw("</a>")
    }

    /// A cell of a table, under its heading.
    pub(super) fn cell(&mut self, heading: &'static str, fill: impl FnOnce(&mut Html)) -> &mut Html {
        self.raw("<td").attribute("data-label", heading).raw(">");
        fill(self);
        self.raw("</td>")
    }

    /// A cell with text.
    pub(super) fn text_cell(&mut self, heading: &'static str, text: impl Display) -> &mut Html {
        self.cell(heading, |html| {
            html.text(text);
        })
    }

    /// Begins a table; what it shows is `caption`.
    pub(super) fn table(&mut self, caption: &'static str, headings: &[&'static str]) -> &mut Html {
        self.raw("<div class=\"scroll\" tabindex=\"0\" role=\"region\"").attribute("aria-label", caption);
        self.raw("><table><caption>").raw(caption).raw("</caption><thead><tr>");
        for heading in headings {
            self.raw("<th scope=\"col\">").raw(heading).raw("</th>");
        }
        self.raw("</tr></thead><tbody>")
    }

    /// Ends it.
    pub(super) fn end_table(&mut self) -> &mut Html {
        self.raw("</tbody></table></div>")
    }

    /// A point in time: as a machine reads it, and how long ago it was.
    pub(super) fn when(&mut self, at: u64, now: u64) -> &mut Html {
        self.raw("<time").attribute("datetime", Moment(at)).attribute("title", Moment(at)).raw(">");
        self.text(Ago(now.saturating_sub(at))).raw("</time>")
    }

    /// How much of something is taken: as a bar, and in words beside it.
    pub(super) fn share(
        &mut self,
        what: &'static str,
        taken: u64,
        of: u64,
        words: impl Display,
    ) -> &mut Html {
        let permille = u64::try_from(u128::from(taken) * 1000 / u128::from(of.max(1))).unwrap_or(u64::MAX);
        self.raw("<span class=\"share\"><meter max=\"1000\" high=\"900\"");
        self.attribute("value", permille.min(1000)).attribute("aria-label", what).raw(">");
        self.raw("</meter><span>").text(words).raw("</span></span>")
    }

    /// All of it.
    pub(super) fn into_string(self) -> String {
        self.0
    }
}

/// Text as it stands in an address.
pub(super) struct Encoded<'a>(pub(super) &'a str);

impl Display for Encoded<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in self.0.bytes() {
            match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => {
                    f.write_char(byte.into())?
                }
                byte => write!(f, "%{byte:02X}")?,
            }
        }
        Ok(())
    }
}

const SECOND: u64 = 1_000_000_000;
const MINUTE: u64 = 60;
const HOUR: u64 = 60 * MINUTE;
const DAY: u64 = 24 * HOUR;

/// A span in words, ns.
pub(super) struct Ago(pub(super) u64);

impl Display for Ago {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 / SECOND {
            seconds @ ..MINUTE => write!(f, "{seconds} s ago"),
            seconds @ MINUTE..HOUR => write!(f, "{} min ago", seconds / MINUTE),
            seconds @ HOUR..DAY => write!(f, "{} h ago", seconds / HOUR),
            seconds => write!(f, "{} d ago", seconds / DAY),
        }
    }
}

/// A point in time, as RFC 3339 has it.
pub(super) struct Moment(pub(super) u64);

impl Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at =
            OffsetDateTime::from_unix_timestamp_nanos(self.0.into()).unwrap_or(OffsetDateTime::UNIX_EPOCH);
        let (year, month, day) = (at.year(), u8::from(at.month()), at.day());
        let (hour, minute, second) = (at.hour(), at.minute(), at.second());
        write!(f, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn web_text_and_attributes_are_never_markup() {
        let mut html = Html::default();
        html.raw("<p").attribute("title", "\" onload='x").raw(">").text("<script>&").raw("</p>");
        html.link("tasks", "../a?b=\"c\"&d");
        assert_eq!(
            html.into_string(),
            "<p title=\"&quot; onload=&#39;x\">&lt;script&gt;&amp;</p><a \
             href=\"/tasks/..%2Fa%3Fb%3D%22c%22%26d\">../a?b=&quot;c&quot;&amp;d</a>"
        );
    }

    #[test]
    fn web_times_are_told_for_machines_and_people() {
        assert_eq!(Moment(1_795_849_445 * SECOND).to_string(), "2026-11-28T07:04:05Z");
        for (seconds, told) in [(0, "0 s ago"), (61, "1 min ago"), (7200, "2 h ago"), (200_000, "2 d ago")] {
            assert_eq!(Ago(seconds * SECOND).to_string(), told);
        }
    }
}
