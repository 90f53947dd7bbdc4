//! A cable between an agent and its broker that can be cut: a proxy of a Unix socket.

use std::{
    fs, io,
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
};

/// The cable. Connect to [`Cut::socket`].
pub struct Cut {
    socket: PathBuf,
    listener: UnixListener,
    cable: Arc<Cable>,
}

struct Cable {
    upstream: PathBuf,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    is_cut: bool,
    streams: Vec<UnixStream>,
}

impl Cut {
    /// One from `socket`, which is made, to `upstream`.
    pub fn new(socket: &Path, upstream: &Path) -> Cut {
        let listener = UnixListener::bind(socket);
        let listener = listener.unwrap_or_else(|error| panic!("{}: {error}", socket.display()));
        let cable = Arc::new(Cable { upstream: upstream.to_owned(), state: Mutex::default() });
        let (accepting, serving) = (listener.try_clone().expect("a socket can be duplicated"), cable.clone());
        thread::spawn(move || {
            while let Ok((stream, _)) = accepting.accept() {
                // Whoever connects while it is cut, or while nobody is at the other end, is hung up on.
                let _ = serving.connect(stream);
            }
        });
        Cut { socket: socket.to_owned(), listener, cable }
    }

    /// The near end.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Nothing passes from here on; both sides see their connections end.
    pub fn cut(&self) {
        let mut state = self.cable.lock();
        state.is_cut = true;
        for stream in state.streams.drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// New connections pass again.
    pub fn mend(&self) {
        self.cable.lock().is_cut = false;
    }
}

impl Cable {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn connect(&self, near: UnixStream) -> io::Result<()> {
        let mut state = self.lock();
        if state.is_cut {
            return Ok(());
        }
        let far = UnixStream::connect(&self.upstream)?;
        for (from, to) in [(&near, &far), (&far, &near)] {
            let (mut from, mut to) = (from.try_clone()?, to.try_clone()?);
            state.streams.push(from.try_clone()?);
            thread::spawn(move || {
                let _ = io::copy(&mut from, &mut to);
                let _ = from.shutdown(Shutdown::Both);
                let _ = to.shutdown(Shutdown::Both);
            });
        }
        Ok(())
    }
}

impl Drop for Cut {
    fn drop(&mut self) {
        self.cut();
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
        let _ = fs::remove_file(&self.socket);
    }
}
