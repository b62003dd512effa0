//! One loaded module per process, and calls into it that end.
//!
//! A module is initialised once per process and may hang for as long as its device does. So every call runs on a thread
//! of its own, one at a time for each module, and its caller waits for a bounded time. While one call hangs the next
//! ones wait for their turn in vain, and fail as unreachable; when it comes back, its result is dropped (and wiped) and
//! the next call is served. So a hung device costs one thread, not one for each renewal. After a call that the device
//! kept from being served, the module is ended and started anew.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use cryptoki::context::{CInitializeArgs, CInitializeFlags, Pkcs11 as Library};
use cryptoki::error::{Error, RvError};

use super::classify::{failed, never_answered};
use super::config::{Config, Pin, config};
use crate::kms::{Failure, KmsError};

/// A module, loaded at the first call.
pub(super) struct Module {
    path: PathBuf,
    busy: Mutex<bool>,
    freed: Condvar,
    library: Mutex<Option<Library>>,
    /// The PIN that a token has refused: see [`Module::is_refused`].
    refused: Mutex<Option<Pin>>,
}

static MODULES: Mutex<BTreeMap<PathBuf, Arc<Module>>> = Mutex::new(BTreeMap::new());

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Values are replaced whole, so a panic elsewhere leaves them valid.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Gives the turn to the next call, however this one ends.
struct Turn(Arc<Module>);

impl Drop for Turn {
    fn drop(&mut self) {
        *locked(&self.0.busy) = false;
        self.0.freed.notify_one();
    }
}

impl Module {
    /// The module at a path: the same one for all who name it.
    pub(super) fn at(path: &Path) -> Arc<Self> {
        let mut modules = locked(&MODULES);
        modules
            .entry(path.to_owned())
            .or_insert_with(|| {
                Arc::new(Self {
                    path: path.to_owned(),
                    busy: Mutex::new(false),
                    freed: Condvar::new(),
                    library: Mutex::new(None),
                    refused: Mutex::new(None),
                })
            })
            .clone()
    }

    /// Runs `job` with the loaded module, for at most `limit` with the wait for its turn.
    pub(super) fn run<T: Send + 'static>(
        self: &Arc<Self>,
        limit: Duration,
        job: impl FnOnce(&Self, &Library) -> Result<T, KmsError> + Send + 'static,
    ) -> Result<T, KmsError> {
        let deadline = Instant::now() + limit;
        let left = || deadline.saturating_duration_since(Instant::now());
        let busy = locked(&self.busy);
        let (mut busy, _) =
            self.freed.wait_timeout_while(busy, left(), |busy| *busy).unwrap_or_else(PoisonError::into_inner);
        if *busy {
            return Err(never_answered(&self.path));
        }
        *busy = true;
        drop(busy);
        let turn = Turn(self.clone());
        let (send, receive) = mpsc::sync_channel(1);
        std::thread::Builder::new()
            .name("lethefs-pkcs11".into())
            .spawn(move || {
                let result = turn.0.load().and_then(|library| job(&turn.0, &library));
                if result.as_ref().err().is_some_and(|error: &KmsError| {
                    matches!(error.failure, Failure::Unreachable | Failure::Unavailable)
                }) {
                    turn.0.unload();
                }
                drop(turn);
                // If nobody waits any more, the result is dropped here, and what is secret in it wiped.
                let _ = send.send(result);
            })
            .map_err(|error| {
                config(format!("cannot start a thread for the token's module: {error}")).with_source(error)
            })?;
        receive.recv_timeout(left()).unwrap_or_else(|_| Err(never_answered(&self.path)))
    }

    fn load(&self) -> Result<Library, KmsError> {
        let mut library = locked(&self.library);
        if let Some(library) = &*library {
            return Ok(library.clone());
        }
        let shown = self.path.display();
        let made = Library::new(&self.path).map_err(|error| {
            config(format!("{shown} cannot be loaded as a PKCS #11 module: check LETHEFS_PKCS11_MODULE"))
                .with_detail(error.to_string().replace('\n', " "))
        })?;
        match made.initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK)) {
            Ok(()) | Err(Error::Pkcs11(RvError::CryptokiAlreadyInitialized, _)) => {}
            Err(error) => return Err(failed(&error, &format!("the module {shown}"), "start")),
        }
        *library = Some(made.clone());
        Ok(made)
    }

    /// Ends the module, so that the next call starts it anew. Some do not find their device again otherwise (SoftHSM its
    /// token directory, clients of network modules their connection).
    fn unload(&self) {
        if let Some(library) = locked(&self.library).take() {
            // In its own trouble it may refuse even this; then it is used as it is.
            let _ = library.finalize();
        }
    }

    /// Whether this is the PIN that was refused. It is not tried again: a token locks itself after a few wrong PINs, and
    /// a mount asks every few seconds.
    pub(super) fn is_refused(&self, pin: &Pin) -> bool {
        locked(&self.refused).as_ref().is_some_and(|refused| refused.same_as(pin))
    }

    /// Remembers what became of a PIN.
    pub(super) fn remember(&self, refused: Option<Pin>) {
        *locked(&self.refused) = refused;
    }
}

impl Config {
    /// Runs `job` with this configuration's module.
    pub(super) fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce(&Module, &Library) -> Result<T, KmsError> + Send + 'static,
    ) -> Result<T, KmsError> {
        self.check_module()?;
        Module::at(&self.module).run(self.timeout, job)
    }
}
