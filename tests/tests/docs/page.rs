//! A page: its commands are executed in order, each as it is there, and must succeed.
//!
//! `…` behind a command stands for options that are left out, and is dropped. A daemon is waited for until it can be asked,
//! with `&` or without. What a command prints is compared where the page shows it ([`crate::form`]); one that only looks is
//! asked again until it prints that, since what it looks at may still be under way. Where that is not enough, there is a
//! [`Direction`].

use std::{collections::BTreeSet, fs, path::Path};

use shaper_tests::time::{PATIENCE, happens};

use crate::{
    elsewhere::Elsewhere,
    form,
    machine::Machine,
    markdown::{self, Block, Command},
};

/// What there is to say of a command of a page.
pub(crate) struct Direction {
    command: &'static str,
    fresh: bool,
    first: Vec<&'static str>,
    files: Vec<(&'static str, &'static str, usize)>,
    reads: Vec<(&'static str, &'static str)>,
    until: Option<&'static str>,
    is_no_daemon: bool,
    elsewhere: Option<Elsewhere>,
}

/// Of the next command that is this one.
pub(crate) fn on(command: &'static str) -> Direction {
    Direction {
        command,
        fresh: false,
        first: Vec::new(),
        files: Vec::new(),
        reads: Vec::new(),
        until: None,
        is_no_daemon: false,
        elsewhere: None,
    }
}

impl Direction {
    /// On a machine on which nothing runs.
    pub(crate) fn fresh(mut self) -> Direction {
        self.fresh = true;
        self
    }

    /// After this: what the reader has besides, or does meanwhile. A daemon in the background is waited for.
    pub(crate) fn first(mut self, command: &'static str) -> Direction {
        self.first.push(command);
        self
    }

    /// With a file of what the page shows: its block of that language, counted from 0.
    pub(crate) fn file(mut self, path: &'static str, language: &'static str, number: usize) -> Direction {
        self.files.push((path, language, number));
        self
    }

    /// With this for a word that stands for something of the reader's.
    pub(crate) fn reads(mut self, word: &'static str, instead: &'static str) -> Direction {
        self.reads.push((word, instead));
        self
    }

    /// At a terminal until it shows this: it does not end by itself.
    pub(crate) fn until(mut self, shown: &'static str) -> Direction {
        self.until = Some(shown);
        self
    }

    /// In the background, but nothing that one can ask.
    pub(crate) fn no_daemon(mut self) -> Direction {
        self.is_no_daemon = true;
        self
    }

    /// Not here.
    pub(crate) fn elsewhere(mut self, elsewhere: Elsewhere) -> Direction {
        self.elsewhere = Some(elsewhere);
        self
    }
}

/// Where the repository is.
pub(crate) fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// The text of a file of the repository.
pub(crate) fn read(file: &str) -> String {
    fs::read_to_string(root().join(file)).unwrap_or_else(|error| panic!("{file}: {error}"))
}

/// The commands of a page, in order, with its blocks.
pub(crate) fn commands(page: &str) -> (Vec<Block>, Vec<Command>) {
    let found = markdown::blocks(&read(page)).and_then(|blocks| {
        let commands = blocks.iter().map(markdown::commands).collect::<Result<Vec<_>, _>>()?.concat();
        Ok((blocks, commands))
    });
    found.unwrap_or_else(|problem| panic!("{page}: {problem}"))
}

/// Executes all commands of a page.
pub(crate) fn execute(page: &str, mut directions: Vec<Direction>) {
    let (blocks, commands) = commands(page);
    assert!(!commands.is_empty(), "{page} has no command: take it out of the pages that have");
    let mut machine = None;
    let mut asked_for = BTreeSet::new();
    for command in &commands {
        let told = directions.iter().position(|direction| direction.command == command.text);
        let direction = told.map_or_else(|| on(""), |place| directions.remove(place));
        let at = format!("{page}:{}", command.line);
        match direction.elsewhere {
            Some(elsewhere) => elsewhere.assert_there(&at, &command.text),
            None => {
                if direction.fresh {
                    // The old one first: both have the same addresses, as far as the kernel programs see.
                    drop(machine.take());
                }
                let machine = machine.get_or_insert_with(Machine::start);
                perform(machine, &at, command, &direction, &blocks, &mut asked_for);
            }
        }
    }
    let left: Vec<_> = directions.iter().map(|direction| direction.command).collect();
    assert!(left.is_empty(), "{page} has these commands no more, or not so often: {left:#?}");
}

fn perform(
    machine: &mut Machine,
    at: &str,
    command: &Command,
    direction: &Direction,
    blocks: &[Block],
    asked_for: &mut BTreeSet<String>,
) {
    eprintln!("{at}: {}", command.text);
    for &(path, language, number) in &direction.files {
        let block = blocks.iter().filter(|block| block.language == language).nth(number);
        let block = block.unwrap_or_else(|| panic!("{at}: the page has no block {number} of {language}"));
        fs::write(machine.directory().join(path), &block.text).expect("the directory is ours");
    }
    for first in &direction.first {
        if first.ends_with('&') {
            machine.start_daemon(first);
            continue;
        }
        let ended = machine.run(first);
        assert_eq!(ended.code, 0, "{at}: before it, `{first}`:\n{}", ended.printed);
    }
    let mut text = command.text.clone();
    for (word, instead) in &direction.reads {
        assert!(text.contains(word), "{at}: `{text}` has no {word}");
        text = text.replace(word, instead);
    }
    let mut text = text.replace(" …", "");
    asked_for.extend(form::numbers(&text));
    if let Some(shown) = direction.until {
        return machine.run_until(&text, shown);
    }
    if stays(&text) {
        text.push_str(" &");
    }
    if text.ends_with('&') && !direction.is_no_daemon {
        return machine.start_daemon(&text);
    }
    let mut ended = machine.run(&text);
    assert_eq!(ended.code, 0, "{at}: `{text}`:\n{}", ended.printed);
    let Some(shown) = &command.shown else { return };
    let difference = |printed: &str| form::difference(shown, printed, asked_for);
    if difference(&ended.printed).is_some() && only_looks(&text) {
        happens(|| {
            ended = machine.run(&text);
            difference(&ended.printed).is_none()
        });
    }
    if let Some(line) = difference(&ended.printed) {
        panic!("{at}: `{text}` has not within {PATIENCE:?}:\n{line}\nIt printed:\n{}", ended.printed);
    }
}

/// Whether it is a daemon of ours, which would stay in the foreground until it is ended.
fn stays(command: &str) -> bool {
    let mut words = command.split_whitespace();
    let daemons = ["shaper-agent", "shaper-broker", "shaper-authority"];
    // Their subcommands do not stay.
    words.next().is_some_and(|program| daemons.contains(&program))
        && words.next().is_none_or(|word| word.starts_with('-'))
        && !command.ends_with('&')
}

fn only_looks(command: &str) -> bool {
    let looks = ["get", "describe", "top", "explain", "ledger", "logs", "profile", "doctor", "policy"];
    let mut words = command.split_whitespace();
    words.any(|word| word == "shaper") && words.any(|word| looks.contains(&word))
}
