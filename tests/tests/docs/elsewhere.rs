//! Commands that are not executed here, and what executes them instead.

use std::process::Command;

use crate::page::{read, root};

/// Why a command is not executed here, and where it is.
pub(crate) struct Elsewhere {
    why: &'static str,
    place: Place,
}

/// What executes it. Each names something that must be there.
enum Place {
    /// A stage of the gate, `.ci/run`, with this text.
    Gate(&'static str),
    /// A test: the file, and the function in it.
    Test(&'static str, &'static str),
    /// Somebody, now and then: a document that says what came of it, and names the command.
    Hand(&'static str, &'static str),
}

/// By the gate.
pub(crate) fn gate(why: &'static str, stage: &'static str) -> Elsewhere {
    Elsewhere { why, place: Place::Gate(stage) }
}

/// By another test.
pub(crate) fn test(why: &'static str, file: &'static str, function: &'static str) -> Elsewhere {
    Elsewhere { why, place: Place::Test(file, function) }
}

/// By somebody; that document says what came of it, and has these words.
pub(crate) fn by_hand(why: &'static str, document: &'static str, words: &'static str) -> Elsewhere {
    Elsewhere { why, place: Place::Hand(document, words) }
}

impl Elsewhere {
    /// Asserts that what is to execute the command is there, and of xtask's own that it is understood.
    pub(crate) fn assert_there(&self, at: &str, command: &str) {
        let (file, needle) = match self.place {
            Place::Gate(stage) => (".ci/run", stage.to_owned()),
            Place::Test(file, function) => (file, format!("fn {function}(")),
            Place::Hand(document, words) => (document, words.to_owned()),
        };
        assert!(
            read(file).contains(&needle),
            "{at}: `{command}` is not executed here ({}), and {file} has no `{needle}`",
            self.why
        );
        let of_xtask = command.strip_prefix("cargo xtask ").or_else(|| command.strip_prefix("./x "));
        if let Some(arguments) = of_xtask {
            assert_understood(at, arguments);
        }
    }
}

/// Asserts that xtask takes these arguments: it reads all up to `--help`, and then does nothing.
pub(crate) fn assert_understood(at: &str, arguments: &str) {
    let own = arguments.split_once(" -- ").map_or(arguments, |(own, _)| own);
    let mut command = Command::new(env!("CARGO"));
    command.current_dir(root()).args(["run", "--quiet", "--locked", "--package", "xtask", "--"]);
    let output = command.args(own.split_whitespace()).arg("--help").output().expect("cargo can be started");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{at}: cargo xtask {own}: {said}");
}
