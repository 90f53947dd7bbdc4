//! What is done with a store besides serving: `shaper-broker store verify|backup|restore|dump`.
//!
//! Who only looks takes nothing over and changes nothing ([`Redb::look`], [`Etcd::look`]). A file is one process's at a time,
//! so its broker has to be stopped; etcd is read while brokers run. To restore is one transaction ([`restore`]).

use std::{
    fs,
    io::{self, BufRead, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use clap::Subcommand;
use rustix::process::{Flock, FlockType, fcntl_getlk};
use shaper_proto::daemon::OptionError;

use crate::{
    config::{StoreConfig, Stores},
    reactor::rows::Content,
    store::{Snapshot, StoreError, etcd::Etcd, redb::Redb},
};

pub mod backup;
mod restore;
mod verify;

use backup::{Backup, BackupError, WriteError};

/// What to do with the store.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Check whether a broker can go on from the store: every row, and of a file every page. Exit code 1: it cannot
    Verify {
        /// Check this backup instead
        #[arg(long, value_name = "FILE")]
        backup: Option<PathBuf>,
    },
    /// Write all rows to a file, as they are at one moment
    Backup {
        /// Where to
        file: PathBuf,
        /// Replace the file, if it exists
        #[arg(long)]
        force: bool,
    },
    /// Bring the rows of a backup into a store that is empty
    Restore {
        /// What `backup` wrote, from whatever kind of store
        file: PathBuf,
        /// Also replace what is in the store
        #[arg(long)]
        force: bool,
        /// What it means is known; do not ask
        #[arg(long)]
        yes: bool,
    },
    /// Print the rows, a line of JSON each
    Dump {
        /// Those whose key begins so, such as task/
        #[arg(long, value_name = "PREFIX", default_value = "")]
        prefix: String,
    },
}

/// Why it was not done.
#[derive(Debug, thiserror::Error)]
pub enum UpkeepError {
    /// Nothing is kept.
    #[error("--store memory keeps nothing; say --store redb or --store etcd")]
    Memory,
    /// No file.
    #[error("there is no store at {}; say --state-dir DIR, or --store etcd", path.display())]
    NoStore {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// A broker has it.
    #[error(
        "the store {} is open in {}, and a file is one process's at a time: stop the broker (`systemctl stop \
         shaper-broker`), and start it again afterwards",
        path.display(),
        who(*pid)
    )]
    InUse {
        /// The file.
        path: PathBuf,
        /// Who, if the kernel says.
        pid: Option<i32>,
    },
    /// Files would be made that its user cannot open.
    #[error(
        "{} belongs to uid {owner}, which could not open what is made there now: run this as that user \
         (`sudo -u '#{owner}' shaper-broker store …`)",
        directory.display()
    )]
    OtherUser {
        /// The state directory.
        directory: PathBuf,
        /// Whose it is.
        owner: u32,
    },
    /// A broker leads.
    #[error("the broker at {leader} leads on {place}: stop all brokers of this cluster first")]
    Led {
        /// The prefix.
        place: String,
        /// Where it is found.
        leader: String,
    },
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The directory.
    #[error(transparent)]
    Option(#[from] OptionError),
    /// The file of a backup.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is no backup.
    #[error("{} cannot be used", path.display())]
    Backup {
        /// The file.
        path: PathBuf,
        /// Why.
        source: BackupError,
    },
    /// No backup was made.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// A newer shaper wrote it.
    #[error(
        "{} has rows of schema {found}, and this program knows {known}: restore it with the newer shaper-broker that made it",
        path.display()
    )]
    NewerSchema {
        /// The backup.
        path: PathBuf,
        /// In it.
        found: u64,
        /// The highest that this program knows.
        known: u64,
    },
    /// No broker could go on from it.
    #[error("nothing was restored: no broker could go on from what is in {}; take an older backup", path.display())]
    Unusable {
        /// The backup.
        path: PathBuf,
    },
    /// It has rows already.
    #[error(
        "nothing was restored: {place} is not empty; choose an empty store, or say --force to replace what is there"
    )]
    NotEmpty {
        /// The store.
        place: String,
    },
    /// Nobody said yes.
    #[error("nothing was restored; say --yes when that is what you want")]
    NotConfirmed,
    /// Somebody wrote.
    #[error("nothing was restored: {place} was changed meanwhile; stop all brokers of this cluster first")]
    Changed {
        /// The store.
        place: String,
    },
    /// What is read is not what was written.
    #[error(
        "what is in {place} now is not what is in the backup: check its disk, and restore once more with --force"
    )]
    Differs {
        /// The store.
        place: String,
    },
    /// What is said.
    #[error("cannot print")]
    Print(#[from] io::Error),
}

fn who(pid: Option<i32>) -> String {
    pid.map_or_else(|| "another process".to_owned(), |pid| format!("process {pid}"))
}

/// Does it. False: the store was looked at, and something is wrong with it.
pub fn run(
    command: Command,
    store: &StoreConfig,
    answers: &mut dyn BufRead,
    out: &mut dyn Write,
) -> Result<bool, UpkeepError> {
    match command {
        Command::Verify { backup: Some(file) } => {
            let Backup { head, rows } = read_backup(&file)?;
            let place = file.display().to_string();
            Ok(verify::report(&Snapshot { place, schema: head.schema, rows, leader: None }, out)?)
        }
        Command::Verify { backup: None } => verify::verify(store, out),
        Command::Backup { file, force } => back_up(&file, force, store, out),
        Command::Restore { file, force, yes } => {
            restore::restore(&file, restore::Consent { force, yes }, store, answers, out)?;
            Ok(true)
        }
        Command::Dump { prefix } => dump(prefix.as_bytes(), store, out),
    }
}

/// A store that is not to be changed, and what keeps a broker from it meanwhile.
struct Look {
    snapshot: Snapshot,
    lock: Option<fs::File>,
}

/// Reads all of a store.
fn look(store: &StoreConfig) -> Result<Look, UpkeepError> {
    match &store.rows {
        Stores::Memory => Err(UpkeepError::Memory),
        Stores::Redb => {
            let path = store.file();
            if !path.exists() {
                return Err(UpkeepError::NoStore { path });
            }
            let lock = lock(store)?;
            Ok(Look { snapshot: Redb::look(&path)?, lock: Some(lock) })
        }
        Stores::Etcd(etcd) => Ok(Look { snapshot: Etcd::look(etcd.place.clone())?, lock: None }),
    }
}

/// The state directory, for as long as the file is there.
fn lock(store: &StoreConfig) -> Result<fs::File, UpkeepError> {
    if let Ok(metadata) = fs::metadata(&store.state_dir)
        && metadata.uid() != rustix::process::geteuid().as_raw()
    {
        return Err(UpkeepError::OtherUser { directory: store.state_dir.clone(), owner: metadata.uid() });
    }
    store.lock_state().map_err(|error| match error {
        OptionError::Locked { daemon, directory } => {
            UpkeepError::InUse { path: store.file(), pid: holder(&directory.join(format!("{daemon}.lock"))) }
        }
        error => error.into(),
    })
}

/// Who has a record lock on a file.
fn holder(file: &Path) -> Option<i32> {
    let file = fs::File::options().write(true).open(file).ok()?;
    let found = fcntl_getlk(&file, &Flock::from(FlockType::WriteLock)).ok()?;
    Some(found?.pid?.as_raw_pid())
}

fn read_backup(path: &Path) -> Result<Backup, UpkeepError> {
    let bytes = fs::read(path).map_err(|source| UpkeepError::Read { path: path.to_owned(), source })?;
    Backup::decode(&bytes).map_err(|source| UpkeepError::Backup { path: path.to_owned(), source })
}

fn back_up(file: &Path, force: bool, store: &StoreConfig, out: &mut dyn Write) -> Result<bool, UpkeepError> {
    let Look { snapshot, lock: _lock } = look(store)?;
    let whole = verify::report(&snapshot, out)?;
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let backup = snapshot.backup(since.as_secs());
    backup.write(file, force)?;
    writeln!(out, "{} rows are in {}", backup.rows.len(), file.display())?;
    if !whole {
        writeln!(out, "they are copied as they are, and no broker could go on from them")?;
    }
    Ok(whole)
}

fn dump(prefix: &[u8], store: &StoreConfig, out: &mut dyn Write) -> Result<bool, UpkeepError> {
    let Look { snapshot, lock: _lock } = look(store)?;
    let mut whole = true;
    for (key, value) in snapshot.rows.iter().filter(|(key, _)| key.starts_with(prefix)) {
        let key = String::from_utf8_lossy(key);
        match Content::decode(&key, value) {
            Ok(value) => writeln!(out, "{}", serde_json::json!({ "key": key, "value": value }))?,
            Err(error) => {
                whole = false;
                writeln!(out, "{}", serde_json::json!({ "key": key, "error": chain(&error) }))?;
            }
        }
    }
    Ok(whole)
}

/// An error and its causes in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
