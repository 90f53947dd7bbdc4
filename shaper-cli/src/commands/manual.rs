//! `shaper completions` and `shaper man`: what shells and manuals know of the command line, from the command line itself.

use std::path::Path;

use clap::CommandFactory;
use clap_complete::Shell;
use shaper_identity::files::FileError;

use crate::{args::Args, error::Error, output};

pub(super) fn completions(shell: Shell) -> Result<(), Error> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Args::command(), "shaper", &mut text);
    output::print(&String::from_utf8_lossy(&text))
}

/// A page for `shaper`, and one for each command.
pub(super) fn man(directory: &Path) -> Result<(), Error> {
    let failed = |verb| move |source| FileError { verb, path: directory.to_owned(), source };
    std::fs::create_dir_all(directory).map_err(failed("make"))?;
    clap_mangen::generate_to(Args::command(), directory).map_err(failed("write manual pages into"))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{env, fmt::Write as _, fs};

    use clap::Command;

    use super::*;

    const INTRODUCTION: &str = "\
# The command line

Every command and option of `shaper`, as `--help` tells them; `man shaper` has the same. The daemons have theirs in their own
`--help` and manual pages (`man shaper-agent`, `man shaper-broker`, `man shaper-authority`).

Written by `SHAPER_REGENERATE=1 cargo nextest run -p shaper-cli the_document`: change `shaper-cli/src/args`.
";

    fn add(command: &mut Command, name: &str, text: &mut String) {
        let help = command.clone().bin_name(name).term_width(100).render_long_help();
        let help: Vec<_> = help.to_string().lines().map(|line| line.trim_end().to_owned()).collect();
        let _ = writeln!(text, "\n## {name}\n\n```text\n{}\n```", help.join("\n").trim_end());
        for sub in command.get_subcommands_mut().filter(|sub| sub.get_name() != "help" && !sub.is_hide_set())
        {
            let name = format!("{name} {}", sub.get_name());
            add(sub, &name, text);
        }
    }

    #[test]
    fn the_document_is_that_of_the_command_line() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/cli.md");
        let mut command = Args::command();
        command.build();
        let mut expected = INTRODUCTION.to_owned();
        add(&mut command, "shaper", &mut expected);
        if env::var_os("SHAPER_REGENERATE").is_some() {
            fs::write(path, expected).unwrap();
            return;
        }
        let found = fs::read_to_string(path).unwrap_or_default();
        let remedy = "regenerate it: SHAPER_REGENERATE=1 cargo nextest run -p shaper-cli the_document";
        assert!(found == expected, "docs/cli.md differs from the command line; {remedy}");
    }
}
