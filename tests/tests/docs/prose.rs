//! Commands in the running text. They are not executed, but there must be a command of that name with these options.

use std::{collections::BTreeMap, process::Command};

use shaper_tests::bins::binary;

use crate::{all_pages, markdown::spans, page::read, repository};

const PROGRAMS: [&str; 4] = ["shaper", "shaper-agent", "shaper-authority", "shaper-broker"];

/// What `--help` says of a command, by its words.
#[derive(Default)]
struct Helps(BTreeMap<Vec<String>, String>);

impl Helps {
    fn of(&mut self, words: &[&str]) -> &str {
        let key: Vec<String> = words.iter().map(|&word| word.to_owned()).collect();
        self.0.entry(key).or_insert_with(|| {
            let output = Command::new(binary(words[0])).args(&words[1..]).arg("--help").output();
            String::from_utf8_lossy(&output.expect("it can be started").stdout).into_owned()
        })
    }

    /// What is wrong with a command line.
    fn problem(&mut self, line: &str) -> Option<String> {
        // What is behind it is another's, or another command.
        let line = line.split(" -- ").next().unwrap_or_default();
        let line = line.split([';', '|', '>']).next().unwrap_or_default();
        let mut words = line.split_whitespace();
        let mut path = vec![words.next()?];
        let own = self.of(&path).to_owned();
        let mut after_option = false;
        for word in words {
            let word = word.trim_matches(['(', ')', '[', ']', ',']);
            // It may be the option's value.
            let may_be_value = std::mem::replace(&mut after_option, word.starts_with('-'));
            if word.starts_with('-') && word.len() > 1 {
                let option = word.split('=').next().unwrap_or_default();
                if !has_option(&own, option) && !has_option(self.of(&path), option) {
                    return Some(format!("`{}` has no option {option}", path.join(" ")));
                }
            } else if has_command(self.of(&path), word) {
                path.push(word);
            } else if !may_be_value && is_word(word) && self.of(&path).contains("\nCommands:") {
                return Some(format!("`{}` has no command {word}", path.join(" ")));
            }
        }
        None
    }
}

/// Not a placeholder, a path or an address.
fn is_word(word: &str) -> bool {
    !word.is_empty() && word.chars().all(|letter| letter.is_ascii_lowercase() || letter == '-')
}

fn has_command(help: &str, name: &str) -> bool {
    let commands = help.split("\nCommands:\n").nth(1).unwrap_or_default();
    let listed = commands.lines().take_while(|line| !line.is_empty());
    listed.filter_map(|line| line.trim_start().split(' ').next()).any(|listed| listed == name)
}

fn has_option(help: &str, option: &str) -> bool {
    let ends = |rest: &str| !rest.starts_with(|next: char| next.is_ascii_alphanumeric() || next == '-');
    help.match_indices(option).any(|(at, _)| ends(&help[at + option.len()..]))
}

#[test]
fn commands_in_the_running_text_are_understood() {
    let mut helps = Helps::default();
    let mut problems = Vec::new();
    for page in all_pages() {
        for (line, span) in spans(&read(&page)) {
            let at = format!("{page}:{line}");
            let program = span.split(' ').next().unwrap_or_default();
            if PROGRAMS.contains(&program) {
                problems.extend(helps.problem(&span).map(|problem| format!("{at}: `{span}`: {problem}")));
            } else if repository::arguments(&span).is_some() {
                // `…` stands for what is left out, and brackets for what may be.
                let own = span.split_whitespace().take_while(|word| !word.contains('…'));
                let own = own.map(|word| word.trim_matches(['[', ']']));
                repository::assert_understood(&at, &own.collect::<Vec<_>>().join(" "));
            }
        }
    }
    assert!(problems.is_empty(), "{problems:#?}");
}

#[test]
fn what_there_is_not_is_found() {
    let mut helps = Helps::default();
    for (line, problem) in [
        ("shaper get tasks --watch", None),
        ("shaper node fence NODE", None),
        ("shaper --broker https://b:7070 get nodes", None),
        ("shaper-broker store verify --backup FILE", None),
        ("shaper node burn NODE", Some("`shaper node` has no command burn")),
        ("shaper get tasks --wach", Some("`shaper get tasks` has no option --wach")),
        ("shaper got tasks", Some("`shaper` has no command got")),
        ("shaper-broker store check", Some("`shaper-broker store` has no command check")),
        ("shaper-agent --metric", Some("`shaper-agent` has no option --metric")),
    ] {
        assert_eq!(helps.problem(line).as_deref(), problem, "{line}");
    }
}
