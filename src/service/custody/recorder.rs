//! Records on a thread of its own: an audit log on a disk that hangs must keep neither a renewal nor a seal waiting.

use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::audit::{Event, Peer, Sink};

/// How long the end of a mount waits for what is not recorded yet.
const PATIENCE: Duration = Duration::from_secs(5);

type Entry = (Option<Peer>, Event);

/// Takes events in, in order.
pub(super) struct Recorder {
    to: Mutex<Option<Sender<Entry>>>,
    done: Mutex<Receiver<()>>,
}

impl Recorder {
    pub(super) fn start(sink: Arc<Sink>) -> io::Result<Self> {
        let (to, from) = channel::<Entry>();
        let (tell, done) = channel();
        std::thread::Builder::new().name("lethefs-audit".into()).spawn(move || {
            for (peer, event) in from {
                let _ = match peer {
                    Some(peer) => sink.record_for(peer, event),
                    None => sink.record(event),
                };
            }
            let _ = tell.send(());
        })?;
        Ok(Self { to: Mutex::new(Some(to)), done: Mutex::new(done) })
    }

    pub(super) fn record(&self, peer: Option<Peer>, event: Event) {
        if let Some(to) = &*self.to.lock().unwrap_or_else(PoisonError::into_inner) {
            let _ = to.send((peer, event));
        }
    }

    /// No more will come: waits a while for what is under way.
    pub(super) fn end(&self) {
        drop(self.to.lock().unwrap_or_else(PoisonError::into_inner).take());
        if self.done.lock().unwrap_or_else(PoisonError::into_inner).recv_timeout(PATIENCE).is_err() {
            tracing::error!("the audit log does not take the last events of this mount");
        }
    }
}
