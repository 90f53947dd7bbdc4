//! Patterns of cgroup paths and of names.

use std::{fmt, str::FromStr};

/// Why a pattern was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a pattern is 1 to {MAX} printable characters; `*` stands for any but `/`, `**` for any, `?` for one but `/`"
)]
pub struct InvalidGlob;

/// The longest pattern, in bytes.
const MAX: usize = 256;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Letter(char),
    /// `?`
    One,
    /// `*`
    Some,
    /// `**`
    Any,
}

/// A pattern: `*` stands for any characters but `/`, also for none; `**` for any; `?` for one that is not `/`.
///
/// It takes time in proportion to the length of both, whatever they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Glob {
    text: String,
    parts: Vec<Part>,
}

impl Glob {
    /// Whether it matches all of a text.
    pub fn matches(&self, text: &str) -> bool {
        self.after(text)[self.parts.len()]
    }

    /// Whether it may match something that lies below the directory of that path.
    pub fn may_match_below(&self, directory: &str) -> bool {
        let directory = format!("{directory}/");
        let reached = self.after(&directory);
        // At the very end of the pattern there is nothing left for a name below.
        reached[..self.parts.len()].contains(&true)
    }

    /// Before which parts one can be once the text was read.
    fn after(&self, text: &str) -> Vec<bool> {
        let mut reached = vec![false; self.parts.len() + 1];
        reached[0] = true;
        self.skip(&mut reached);
        for letter in text.chars() {
            let mut next = vec![false; reached.len()];
            for (at, part) in self.parts.iter().enumerate().filter(|(at, _)| reached[*at]) {
                match part {
                    Part::Letter(own) => next[at + 1] |= *own == letter,
                    Part::One => next[at + 1] |= letter != '/',
                    Part::Some => next[at] |= letter != '/',
                    Part::Any => next[at] = true,
                }
            }
            self.skip(&mut next);
            reached = next;
        }
        reached
    }

    /// What stands for nothing can be passed over.
    fn skip(&self, reached: &mut [bool]) {
        for (at, part) in self.parts.iter().enumerate() {
            if reached[at] && matches!(part, Part::Some | Part::Any) {
                reached[at + 1] = true;
            }
        }
    }
}

impl FromStr for Glob {
    type Err = InvalidGlob;

    fn from_str(text: &str) -> Result<Glob, InvalidGlob> {
        if text.is_empty() || text.len() > MAX || text.chars().any(char::is_control) {
            return Err(InvalidGlob);
        }
        let mut parts = Vec::new();
        for letter in text.chars() {
            match (letter, parts.last()) {
                ('*', Some(Part::Some | Part::Any)) => {
                    parts.pop();
                    parts.push(Part::Any);
                }
                ('*', _) => parts.push(Part::Some),
                ('?', _) => parts.push(Part::One),
                (letter, _) => parts.push(Part::Letter(letter)),
            }
        }
        Ok(Glob { text: text.to_owned(), parts })
    }
}

impl fmt::Display for Glob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn glob(text: &str) -> Glob {
        text.parse().unwrap()
    }

    #[test]
    fn stars_stop_at_a_slash_unless_there_are_two() {
        for (pattern, matching, other) in [
            ("a/*.service", "a/b.service", "a/b/c.service"),
            ("a/**.service", "a/b/c.service", "b/c.service"),
            ("**/x", "a/b/x", "x"),
            ("a?c", "abc", "a/c"),
            ("*", "", "a/b"),
            ("**", "a/b", "-"),
            ("ab*ab", "abab", "ab"),
        ] {
            assert!(glob(pattern).matches(matching), "{pattern} {matching}");
            assert!(pattern == "**" || !glob(pattern).matches(other), "{pattern} {other}");
        }
        for bad in ["", "a\nb", &"a".repeat(MAX + 1)] {
            assert_eq!(bad.parse::<Glob>(), Err(InvalidGlob));
        }
    }

    #[test]
    fn what_cannot_lead_to_a_match_is_known() {
        let pattern = glob("user.slice/user-1000.slice/*/job-*");
        assert!(pattern.may_match_below("user.slice"));
        assert!(pattern.may_match_below("user.slice/user-1000.slice/a"));
        assert!(!pattern.may_match_below("user.slice/user-1001.slice"));
        assert!(!pattern.may_match_below("user.slice/user-1000.slice/a/job-1"));
        assert!(glob("a/**").may_match_below("a/b/c"));
    }

    #[test]
    fn a_pattern_that_is_made_to_take_long_does_not() {
        let pattern = glob(&"*a".repeat(MAX / 2));
        assert!(!pattern.matches(&"a".repeat(4096).replace("aaaa", "aaa/")));
        assert!(pattern.matches(&"a".repeat(4096)));
    }

    /// The plain rule, by trying everything.
    fn plainly(pattern: &[char], text: &[char]) -> bool {
        match pattern {
            [] => text.is_empty(),
            ['*', '*', rest @ ..] => {
                (0..=text.len()).any(|taken| plainly(rest, &text[taken..]))
                    // More stars say the same again.
                    || (rest.first() == Some(&'*') && plainly(&pattern[1..], text))
            }
            ['*', rest @ ..] => (0..=text.len())
                .take_while(|taken| !text[..*taken].contains(&'/'))
                .any(|taken| plainly(rest, &text[taken..])),
            ['?', rest @ ..] => {
                text.first().is_some_and(|letter| *letter != '/') && plainly(rest, &text[1..])
            }
            [own, rest @ ..] => text.first() == Some(own) && plainly(rest, &text[1..]),
        }
    }

    proptest! {
        #[test]
        fn it_says_what_the_plain_rule_says(pattern in "[ab/*?]{1,8}", text in "[ab/]{0,8}") {
            let letters = |text: &str| text.chars().collect::<Vec<_>>();
            prop_assert_eq!(glob(&pattern).matches(&text), plainly(&letters(&pattern), &letters(&text)));
        }

        #[test]
        fn a_match_lies_below_where_it_may(
            pattern in "[ab/*?]{1,8}",
            above in "[ab]{1,3}(/[ab]{1,3}){0,2}",
            name in "[ab]{1,3}",
        ) {
            let pattern = glob(&pattern);
            if pattern.matches(&format!("{above}/{name}")) {
                prop_assert!(pattern.may_match_below(&above));
            }
        }
    }
}
