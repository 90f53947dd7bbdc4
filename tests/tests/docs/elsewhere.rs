//! Commands that are not executed here: the gate itself executes them.

use crate::{page::read, repository};

/// Why a command is not executed here, and where it is.
pub(crate) struct Elsewhere {
    why: &'static str,
    /// A stage of `.ci/run`, as it is there.
    stage: &'static str,
}

/// By the gate.
pub(crate) fn gate(why: &'static str, stage: &'static str) -> Elsewhere {
    Elsewhere { why, stage }
}

impl Elsewhere {
    /// Asserts that what is to execute the command is there, and of xtask's own that it is understood.
    pub(crate) fn assert_there(&self, at: &str, command: &str) {
        let Elsewhere { why, stage } = self;
        let is_there = read(".ci/run").contains(stage);
        assert!(is_there, "{at}: `{command}` is not executed here ({why}), and .ci/run has no `{stage}`");
        repository::assert_understood(at, command);
    }
}
