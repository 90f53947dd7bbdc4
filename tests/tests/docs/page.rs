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
    repository,
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
    after: Vec<&'static str>,
    has_figures: bool,
    runs: Runs,
}

/// A stage of `./x test --all` which executes what takes more than seconds, or more than every machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// With what is installed for it alone.
    Commands,
    /// What measures: a little of it.
    Benches,
    /// What repeats what other tests do: a little of it.
    Soaks,
    /// With Ray and Dask.
    Frameworks,
}

/// When a command is executed.
enum Runs {
    /// With each run of the tests.
    Always,
    /// And in a stage, where what follows needs it.
    AlwaysAnd(Stage),
    /// In a stage.
    In(Stage),
    /// Not by this.
    Elsewhere(Elsewhere),
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
        after: Vec::new(),
        has_figures: false,
        runs: Runs::Always,
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

    /// This must succeed when it has, and shows what it did.
    pub(crate) fn after(mut self, command: &'static str) -> Direction {
        self.after.push(command);
        self
    }

    /// It measures: it ends in figures.
    pub(crate) fn has_figures(mut self) -> Direction {
        self.has_figures = true;
        self
    }

    /// In a stage, too.
    pub(crate) fn also_in(mut self, stage: Stage) -> Direction {
        self.runs = Runs::AlwaysAnd(stage);
        self
    }

    /// In a stage alone.
    pub(crate) fn only_in(mut self, stage: Stage) -> Direction {
        self.runs = Runs::In(stage);
        self
    }

    /// Not here.
    pub(crate) fn elsewhere(mut self, elsewhere: Elsewhere) -> Direction {
        self.runs = Runs::Elsewhere(elsewhere);
        self
    }

    /// The command as this reader has it.
    fn read(&self, at: &str, command: &str) -> String {
        let mut text = command.to_owned();
        for (word, instead) in &self.reads {
            assert!(text.contains(word), "{at}: `{text}` has no {word}");
            text = text.replace(word, instead);
        }
        text.replace(" …", "")
    }

    /// Whether it is executed in a stage, or with each run of the tests.
    fn is_in(&self, stage: Option<Stage>) -> bool {
        match (&self.runs, stage) {
            (Runs::Always | Runs::AlwaysAnd(_), None) => true,
            (Runs::In(one) | Runs::AlwaysAnd(one), Some(stage)) => *one == stage,
            _ => false,
        }
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

/// Executes the commands of a page that belong to a stage, or to each run of the tests.
pub(crate) fn execute(page: &str, mut directions: Vec<Direction>, stage: Option<Stage>) {
    let (blocks, commands) = commands(page);
    assert!(!commands.is_empty(), "{page} has no command: take it out of the pages that have");
    let mut machine = None;
    let mut asked_for = BTreeSet::new();
    for command in &commands {
        let told = directions.iter().position(|direction| direction.command == command.text);
        let direction = told.map_or_else(|| on(""), |place| directions.remove(place));
        let at = format!("{page}:{}", command.line);
        match &direction.runs {
            Runs::Elsewhere(elsewhere) if stage.is_none() => elsewhere.assert_there(&at, &command.text),
            Runs::In(_) if stage.is_none() => repository::assert_understood(&at, &command.text),
            _ if !direction.is_in(stage) => {}
            _ if repository::is_for(&command.text) => {
                perform_in_repository(&at, command, &direction);
            }
            _ => {
                if direction.fresh {
                    // The old one first: both have the same addresses, as far as the kernel programs see.
                    drop(machine.take());
                }
                let machine = machine.get_or_insert_with(Machine::start);
                perform(machine, &at, command, &direction, &blocks, &mut asked_for);
                for after in &direction.after {
                    let ended = machine.run(after);
                    assert_eq!(ended.code, 0, "{at}: after it, `{after}`:\n{}", ended.printed);
                }
            }
        }
    }
    let left: Vec<_> = directions.iter().map(|direction| direction.command).collect();
    assert!(left.is_empty(), "{page} has these commands no more, or not so often: {left:#?}");
}

fn perform_in_repository(at: &str, command: &Command, direction: &Direction) {
    let run = |text: &str| {
        eprintln!("{at}: {text}");
        let (printed, status) = repository::run(text);
        // What measures fails where it misses a goal: that is a figure like others, on a machine like this.
        assert!(status.success() || direction.has_figures, "{at}: `{text}`: {status}");
        printed
    };
    for first in &direction.first {
        run(first);
    }
    let printed = run(&direction.read(at, &command.text));
    if direction.has_figures {
        repository::assert_figures(at, &printed);
    }
    for after in &direction.after {
        run(after);
    }
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
    let mut text = direction.read(at, &command.text);
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
