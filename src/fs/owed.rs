//! Replies that are owed while a worker waits for the backing filesystem.
//!
//! The kernel keeps the pages of a READ locked, and those of a WRITE under writeback, until it is answered, and drops nothing of
//! them before. On a disk that hangs that is never. So such a reply lies in a place of its worker's, and is whose who takes it
//! first: the worker's, when it has an answer, or a seal's, which refuses it and goes on.

use std::sync::{Arc, Mutex};

use super::errno::Failed;
use super::inode::lock;

/// A reply that can be refused by somebody else than who works on it.
pub trait Debt: Send + 'static {
    /// Of a write: the inode and the number of bytes, which are lost if it is refused.
    fn write(&self) -> Option<(u64, u64)>;
    /// Says no.
    fn refuse(self, why: Failed);
}

/// A worker's place, for one reply at a time.
pub struct Place<D>(Mutex<Option<D>>);

impl<D> Place<D> {
    /// From now on it can be refused. Before the gate is asked: who closes the gate first and then refuses misses none.
    pub fn put(&self, debt: D) {
        *lock(&self.0) = Some(debt);
    }

    /// To be answered. `None`: it was refused.
    pub fn take(&self) -> Option<D> {
        lock(&self.0).take()
    }
}

trait Refusable: Send + Sync {
    fn refuse(&self, writes: bool, why: Failed) -> Option<(u64, u64)>;
}

impl<D: Debt> Refusable for Place<D> {
    fn refuse(&self, writes: bool, why: Failed) -> Option<(u64, u64)> {
        let debt = {
            let mut place = lock(&self.0);
            if !writes && place.as_ref().is_some_and(|debt| debt.write().is_some()) {
                return None;
            }
            place.take()?
        };
        let written = debt.write();
        debt.refuse(why);
        written
    }
}

/// All workers' places.
#[derive(Default)]
pub struct Owed(Mutex<Vec<Arc<dyn Refusable>>>);

impl Owed {
    /// A place for a worker. Stays here when that ends, and is empty then.
    pub fn place<D: Debt>(&self) -> Arc<Place<D>> {
        let place = Arc::new(Place(Mutex::new(None)));
        lock(&self.0).push(place.clone());
        place
    }

    /// Refuses what is owed; of WRITEs only if `writes`. The inodes and bytes of those.
    pub fn refuse(&self, writes: bool, why: Failed) -> Vec<(u64, u64)> {
        lock(&self.0).iter().filter_map(|place| place.refuse(writes, why)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Sender, channel};

    struct Told(Option<(u64, u64)>, Sender<i32>);

    impl Debt for Told {
        fn write(&self) -> Option<(u64, u64)> {
            self.0
        }

        fn refuse(self, why: Failed) {
            self.1.send(why.errno()).expect("heard");
        }
    }

    #[test]
    fn whoever_comes_first_has_it() {
        let owed = Owed::default();
        let (say, said) = channel();
        let (reads, writes, idle) = (owed.place(), owed.place(), owed.place::<Told>());
        reads.put(Told(None, say.clone()));
        writes.put(Told(Some((7, 4096)), say.clone()));
        assert!(owed.refuse(false, Failed::raw(5)).is_empty());
        assert_eq!((said.try_iter().collect::<Vec<_>>(), reads.take().is_none()), (vec![5], true));
        assert_eq!(owed.refuse(true, Failed::raw(6)), [(7, 4096)]);
        assert_eq!((said.try_iter().collect::<Vec<_>>(), writes.take().is_none()), (vec![6], true));
        // Nothing twice, and nothing that is answered.
        reads.put(Told(None, say));
        assert!(reads.take().is_some() && idle.take().is_none());
        assert!(owed.refuse(true, Failed::raw(7)).is_empty() && said.try_recv().is_err());
    }
}
