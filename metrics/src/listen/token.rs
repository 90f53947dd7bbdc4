//! The token of a scraper: a file with it, or with its hash, so that the daemon need not know it.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use http::{HeaderMap, header};
use shaper_identity::{
    files::{self, FileError},
    token::{fingerprint, is_same},
};

/// Bytes of the file.
const LONGEST_FILE: u64 = 4096;
/// A shorter one could be guessed.
const SHORTEST: usize = 32;
/// Before a hash, in hexadecimal.
const HASH: &str = "sha256:";
/// Letters of one.
const HASH_LENGTH: usize = 64;

/// Why there is no token.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The file.
    #[error("--metrics-token-file")]
    File(#[from] FileError),
    /// What is in it.
    #[error(
        "--metrics-token-file: {} holds no token: a line of at least {SHORTEST} letters without spaces, or `{HASH}` and its \
         SHA-256 in hexadecimal. Make one: openssl rand -hex 32",
        .0.display()
    )]
    Form(PathBuf),
}

/// What must be shown.
pub(super) struct Token {
    file: PathBuf,
    /// SHA-256 of it, in hexadecimal, as it was read last.
    known: Arc<Mutex<String>>,
}

fn read(file: &Path) -> Result<String, TokenError> {
    let text = files::read_secret(file, LONGEST_FILE)?;
    let text = text.trim();
    let form = || TokenError::Form(file.to_owned());
    match text.strip_prefix(HASH) {
        Some(hash) => {
            let is_hash = hash.len() == HASH_LENGTH && hash.bytes().all(|letter| letter.is_ascii_hexdigit());
            is_hash.then(|| hash.to_ascii_lowercase()).ok_or_else(form)
        }
        None if text.len() < SHORTEST || text.contains(|letter: char| !letter.is_ascii_graphic()) => {
            Err(form())
        }
        None => Ok(fingerprint(text.as_bytes())),
    }
}

impl Token {
    /// Reads the file.
    pub(super) fn load(file: &Path) -> Result<Token, TokenError> {
        Ok(Token { file: file.to_owned(), known: Arc::new(Mutex::new(read(file)?)) })
    }

    /// Whether a request shows it. The file is read anew each time, so that another token holds at once; what was read last
    /// stays where it cannot be.
    pub(super) async fn is_in(&self, headers: &HeaderMap) -> bool {
        let mut shown = headers.get_all(header::AUTHORIZATION).iter();
        let (Some(only), None) = (shown.next(), shown.next()) else { return false };
        let Some((scheme, token)) = only.to_str().ok().and_then(|text| text.split_once(' ')) else {
            return false;
        };
        if !scheme.eq_ignore_ascii_case("bearer") {
            return false;
        }
        let (file, known) = (self.file.clone(), Arc::clone(&self.known));
        let hash = tokio::task::spawn_blocking(move || {
            let mut known = known.lock().unwrap_or_else(PoisonError::into_inner);
            if let Ok(read) = read(&file) {
                *known = read;
            }
            known.clone()
        });
        // Hashes are compared: how long that takes says nothing of the token.
        hash.await.is_ok_and(|hash| is_same(&hash, &fingerprint(token.trim().as_bytes())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_holds_a_token_or_its_hash() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("token");
        let token = "0123456789abcdef0123456789abcdef";
        let hash = fingerprint(token.as_bytes());
        for content in
            [format!("{token}\n"), format!("sha256:{hash}"), format!("sha256:{}\n", hash.to_uppercase())]
        {
            files::replace(&file, content.as_bytes(), 0o600).unwrap();
            assert_eq!(read(&file).unwrap(), hash, "{content}");
        }
        for content in
            ["", "short", &token[1..], &format!("{token} {token}"), "sha256:", &format!("sha256:{token}")]
        {
            files::replace(&file, content.as_bytes(), 0o600).unwrap();
            let error = read(&file).unwrap_err().to_string();
            assert!(error.contains("openssl rand"), "{content}: {error}");
        }
        files::replace(&file, token.as_bytes(), 0o644).unwrap();
        assert!(matches!(read(&file), Err(TokenError::File(_))));
    }
}
