//! The certificate of a daemon that serves those who have none: they show a token instead.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use rustls::ServerConfig;

use super::chain;
use crate::tls::{self, Material, TlsError};

/// A certificate that is replaced when its files are.
pub struct Certificate {
    directory: PathBuf,
    known: Arc<Mutex<Known>>,
}

struct Known {
    fingerprint: String,
    config: Arc<ServerConfig>,
    /// The last error about the files.
    told: Option<String>,
}

impl Certificate {
    /// Reads a directory.
    pub fn load(directory: &Path) -> Result<Certificate, TlsError> {
        let material = Material::load(directory)?;
        let known =
            Known { config: material.server_of_tokens()?, fingerprint: material.fingerprint, told: None };
        Ok(Certificate { directory: directory.to_owned(), known: Arc::new(Mutex::new(known)) })
    }

    /// For the next connection: by the files as they are now, or as they were when they could be used last.
    pub async fn current(&self) -> Arc<ServerConfig> {
        let (directory, known) = (self.directory.clone(), Arc::clone(&self.known));
        let look = move || {
            let mut known = known.lock().unwrap_or_else(PoisonError::into_inner);
            if let Err(error) = known.look(&directory) {
                let error = chain(&error);
                if known.told.as_ref() != Some(&error) {
                    tracing::error!(error, "the certificate for metrics cannot be read anew");
                    known.told = Some(error);
                }
            }
        };
        // If it panics, what is known stays.
        let _ = tokio::task::spawn_blocking(look).await;
        Arc::clone(&self.known.lock().unwrap_or_else(PoisonError::into_inner).config)
    }
}

impl Known {
    fn look(&mut self, directory: &Path) -> Result<(), TlsError> {
        if tls::fingerprint_of(directory)? == self.fingerprint {
            return Ok(());
        }
        let material = Material::load(directory)?;
        *self = Known { config: material.server_of_tokens()?, fingerprint: material.fingerprint, told: None };
        Ok(())
    }
}
