//! `shaper context`: clusters by name.

use crate::{
    args::{ContextCommand, TableFormat},
    contexts::{Context, Contexts},
    error::Error,
    output::{self, Column},
};

/// `said`: what the options and the environment name.
pub(super) fn context(command: ContextCommand, said: Context) -> Result<(), Error> {
    let mut contexts = Contexts::load()?;
    match command {
        ContextCommand::List { output } => return list(&contexts, output),
        ContextCommand::Set { name } => contexts.set(&name, said)?,
        ContextCommand::Use { name } => contexts.choose(name)?,
        ContextCommand::Delete { name } => contexts.delete(&name)?,
    }
    Ok(contexts.save()?)
}

const COLUMNS: [Column; 5] = [
    Column::Text("CURRENT"),
    Column::Text("NAME"),
    Column::Text("BROKER"),
    Column::Text("SOCKET"),
    Column::Text("CERTIFICATE"),
];

fn list(contexts: &Contexts, format: TableFormat) -> Result<(), Error> {
    match format {
        TableFormat::Json => output::print_json(contexts),
        TableFormat::Yaml => output::print_yaml(contexts),
        TableFormat::Table | TableFormat::Wide if contexts.contexts.is_empty() => {
            output::remark("no contexts: `shaper context set` keeps one");
            Ok(())
        }
        TableFormat::Table | TableFormat::Wide => {
            let rows = contexts.contexts.iter().map(|(name, context)| {
                let mark = if contexts.current.as_ref() == Some(name) { "*" } else { "" };
                let path = |path: &Option<std::path::PathBuf>| {
                    path.as_ref().map_or_else(|| "-".to_owned(), |path| path.display().to_string())
                };
                let broker =
                    context.broker.as_deref().map_or("-", |at| if at.is_empty() { "none" } else { at });
                [mark.into(), name.clone(), broker.into(), path(&context.socket), path(&context.tls_dir)]
            });
            output::print(&output::table(COLUMNS, rows))
        }
    }
}
