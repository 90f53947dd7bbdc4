//! The file of a store in memory: what is written to it there stays there.
//!
//! redb repairs a file that was not closed, and to check one is to rebuild a part of it. So whoever only looks has it do
//! that to an image. The locks are the file's: nobody else has it open meanwhile.

use std::{fs::File, io, ops::Bound, sync::OnceLock};

use redb::{
    BackendError, DatabaseError, StorageBackend,
    backends::{FileBackend, InMemoryBackend},
};

/// See the module.
#[derive(Debug)]
pub(super) struct Image {
    file: FileBackend,
    /// Filled when it is first needed: then redb has the locks.
    memory: OnceLock<InMemoryBackend>,
}

impl Image {
    /// Of a file that was opened for reading and for writing, which the locks take.
    pub(super) fn of(file: File) -> Result<Image, DatabaseError> {
        Ok(Image { file: FileBackend::new(file)?, memory: OnceLock::new() })
    }

    fn memory(&self) -> io::Result<&InMemoryBackend> {
        if let Some(memory) = self.memory.get() {
            return Ok(memory);
        }
        let length = self.file.len()?;
        let mut bytes = vec![0; usize::try_from(length).map_err(io::Error::other)?];
        self.file.read(0, &mut bytes)?;
        let memory = InMemoryBackend::new();
        memory.set_len(length)?;
        memory.write(0, &bytes)?;
        Ok(self.memory.get_or_init(|| memory))
    }
}

impl StorageBackend for Image {
    fn len(&self) -> io::Result<u64> {
        self.memory()?.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.memory()?.read(offset, out)
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.memory()?.set_len(length)
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.memory()?.write(offset, data)
    }

    fn close(&self) -> io::Result<()> {
        self.file.close()
    }

    fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.file.try_lock_range(start, end)
    }

    fn try_lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.file.try_lock_shared_range(start, end)
    }

    fn lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.file.lock_range(start, end)
    }

    fn lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.file.lock_shared_range(start, end)
    }

    fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.file.unlock_range(start, end)
    }

    fn query_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.file.query_lock_range(start, end)
    }
}
