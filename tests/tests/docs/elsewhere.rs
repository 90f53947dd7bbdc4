//! Commands that are not executed here: the gate itself executes them, or a test of `./x test --all`.

use crate::{page::read, repository};

/// Why a command is not executed here, and where it is.
pub(crate) struct Elsewhere {
    why: &'static str,
    place: Place,
}

enum Place {
    /// A stage of `.ci/run`, as it is there.
    Gate(&'static str),
    /// A test of tests/tests/vm/systemd/containers.rs.
    Containers(&'static str),
}

/// By the gate.
pub(crate) fn gate(why: &'static str, stage: &'static str) -> Elsewhere {
    Elsewhere { why, place: Place::Gate(stage) }
}

/// In the VM, with Docker or Podman, which take cgroup v2 alone, and an image that needs no registry.
pub(crate) fn with_containers(test: &'static str) -> Elsewhere {
    Elsewhere { why: "it takes containers", place: Place::Containers(test) }
}

impl Elsewhere {
    /// Asserts that what is to execute the command is there, and of xtask's own that it is understood.
    pub(crate) fn assert_there(&self, at: &str, command: &str) {
        let (file, text) = match self.place {
            Place::Gate(stage) => (".ci/run", stage.to_owned()),
            Place::Containers(test) => ("tests/tests/vm/systemd/containers.rs", format!("fn {test}()")),
        };
        let (is_there, why) = (read(file).contains(&text), self.why);
        assert!(is_there, "{at}: `{command}` is not executed here ({why}), and {file} has no `{text}`");
        repository::assert_understood(at, command);
    }
}
