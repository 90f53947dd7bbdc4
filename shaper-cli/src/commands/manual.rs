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
