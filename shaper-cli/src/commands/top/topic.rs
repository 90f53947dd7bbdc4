//! Text as a name and what there is to say under it, in lines as broad as there is room.

use crate::output::printable;

pub(super) struct Topic {
    name: String,
    items: Vec<String>,
}

impl Topic {
    pub(super) fn new(name: impl Into<String>, items: impl IntoIterator<Item = String>) -> Topic {
        let items = items.into_iter().map(|item| printable(&item)).collect();
        Topic { name: printable(&name.into()), items }
    }

    /// Broken between items, and behind the room for the name.
    fn lines(&self, indent: usize, width: usize) -> Vec<String> {
        const GAP: &str = "  ";
        let mut lines = Vec::new();
        let mut line = format!("{:<indent$}", self.name);
        let mut is_empty = true;
        for item in &self.items {
            let longer = line.chars().count() + GAP.len() + item.chars().count();
            if !is_empty && longer > width {
                lines.push(std::mem::replace(&mut line, " ".repeat(indent)));
                is_empty = true;
            }
            if !is_empty {
                line.push_str(GAP);
            }
            line.push_str(item);
            is_empty = false;
        }
        lines.push(line);
        lines
    }
}

/// Topics in lines of at most `width`, unless an item alone is longer.
pub(super) fn lines(topics: &[Topic], indent: usize, width: usize) -> Vec<String> {
    topics.iter().flat_map(|topic| topic.lines(indent, width)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_broken_between_items() {
        let topic = Topic::new("Names", ["one", "two", "three\n", "a-long-one"].map(String::from));
        let expected = ["Names  one  two", r"       three\n", "       a-long-one"];
        assert_eq!(lines(&[topic], 7, 15), expected);
        assert_eq!(lines(&[Topic::new("Nothing", [])], 9, 1), ["Nothing  "]);
    }
}
