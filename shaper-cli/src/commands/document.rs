//! Reads documents of the user's.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
};

use shaper_core::document::MAX_BYTES;

use crate::error::Error;

/// A document, as bytes that may be one.
pub(super) struct Document {
    /// Its name, for errors.
    pub(super) name: String,
    pub(super) text: Vec<u8>,
}

impl Document {
    /// Reads a file, or the standard input for `-`: no more of it than shows that it is too long.
    pub(super) fn read(path: &Path) -> Result<Document, Error> {
        let stdin = path == Path::new("-");
        let name = if stdin { "stdin".to_owned() } else { path.to_string_lossy().into_owned() };
        let mut text = Vec::new();
        let most = u64::try_from(MAX_BYTES + 1).unwrap_or(u64::MAX);
        let read = if stdin {
            io::stdin().lock().take(most).read_to_end(&mut text)
        } else {
            File::open(path).and_then(|file| file.take(most).read_to_end(&mut text))
        };
        match read {
            Ok(_) => Ok(Document { name, text }),
            Err(source) => Err(Error::Read { path: name.into(), source }),
        }
    }
}
