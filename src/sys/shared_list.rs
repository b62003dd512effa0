//! A list of numbers in memory that a process shares with those it forks: which inodes the kernel may cache, for the
//! supervisor; and by when the daemon will be heard of. Holds no secret.
#![allow(unsafe_code)]

use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Words in front of the numbers: the place that was used last, and when the daemon is due.
const HEADER: usize = 2;

/// By when a daemon will have said something else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    /// On CLOCK_BOOTTIME, which goes on while the machine is suspended.
    SinceBoot(Duration),
    /// On CLOCK_MONOTONIC, which does not.
    Running(Duration),
}

impl Due {
    /// Nanoseconds and, in the lowest bit, which clock. Zero is none.
    fn word(self) -> u64 {
        let (at, running) = match self {
            Self::SinceBoot(at) => (at, 0),
            Self::Running(at) => (at, 1),
        };
        // Enough for 292 years.
        let nanoseconds = u64::try_from(at.as_nanos()).unwrap_or(u64::MAX).clamp(1, u64::MAX >> 1);
        nanoseconds << 1 | running
    }

    fn of(word: u64) -> Option<Self> {
        let at = Duration::from_nanos(word >> 1);
        match (word, word & 1) {
            (0, _) => None,
            (_, 0) => Some(Self::SinceBoot(at)),
            _ => Some(Self::Running(at)),
        }
    }
}

/// Numbers that fit, most first: memory is used only as far as the list was ever long (8 bytes each), but a system that
/// overcommits nothing counts all of it.
const CAPACITIES: [usize; 3] = [1 << 27, 1 << 22, 1 << 16];

/// See the module's text.
pub struct SharedList {
    start: NonNull<AtomicU64>,
    capacity: usize,
    /// Places to use again. Private to the process that adds.
    free: Mutex<Free>,
}

struct Free {
    places: Vec<u32>,
    used: usize,
}

impl Default for Free {
    fn default() -> Self {
        Self { places: Vec::new(), used: HEADER - 1 }
    }
}

// SAFETY: the mapping is owned by this value and lives until drop; it is reached only as atomics.
unsafe impl Send for SharedList {}
// SAFETY: as above.
unsafe impl Sync for SharedList {}

impl SharedList {
    /// An empty list, to be made before the fork.
    ///
    /// # Errors
    /// No memory.
    pub fn new() -> io::Result<Arc<Self>> {
        let mut error = io::Error::from(io::ErrorKind::OutOfMemory);
        for capacity in CAPACITIES {
            match Self::map(capacity) {
                Ok(list) => return Ok(Arc::new(list)),
                Err(other) => error = other,
            }
        }
        Err(error)
    }

    fn map(capacity: usize) -> io::Result<Self> {
        let len = capacity * size_of::<AtomicU64>();
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice; nothing existing is touched.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { start, capacity, free: Mutex::default() })
    }

    /// All places, the header's first.
    fn words(&self) -> &[AtomicU64] {
        // SAFETY: `start` is page-aligned and mapped for `capacity` words until drop, zeroed at first; another process
        // changes them only as atomics, too.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.capacity) }
    }

    /// Adds a number that is not zero, until the entry is dropped. `None`: the list is full.
    pub fn add(self: &Arc<Self>, number: u64) -> Option<Entry> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let place = match free.places.pop() {
            Some(place) => place as usize,
            None if free.used + 1 < self.capacity => {
                free.used += 1;
                self.words()[0].store(free.used as u64, Ordering::SeqCst);
                free.used
            }
            None => return None,
        };
        self.words()[place].store(number, Ordering::SeqCst);
        Some(Entry { list: self.clone(), place: place as u32 })
    }

    /// Says by when something else will be said here. `None`: nobody need wait for it.
    pub fn set_due(&self, due: Option<Due>) {
        self.words()[1].store(due.map_or(0, Due::word), Ordering::SeqCst);
    }

    /// What was said last.
    pub fn due(&self) -> Option<Due> {
        Due::of(self.words()[1].load(Ordering::SeqCst))
    }

    /// The numbers in it.
    pub fn numbers(&self) -> Vec<u64> {
        let words = self.words();
        let used = (words[0].load(Ordering::SeqCst) as usize).clamp(HEADER - 1, self.capacity - 1);
        words[HEADER..=used].iter().map(|word| word.load(Ordering::SeqCst)).filter(|number| *number != 0).collect()
    }
}

impl Drop for SharedList {
    fn drop(&mut self) {
        // SAFETY: our own mapping, not used after this.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.capacity * size_of::<AtomicU64>()) };
    }
}

/// A number in a list.
pub struct Entry {
    list: Arc<SharedList>,
    place: u32,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.list.words()[self.place as usize].store(0, Ordering::SeqCst);
        self.list.free.lock().unwrap_or_else(PoisonError::into_inner).places.push(self.place);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_added_is_there_until_it_is_dropped() {
        let list = Arc::new(SharedList::map(HEADER + 3).unwrap());
        let (a, b, c) = (list.add(10).unwrap(), list.add(20).unwrap(), list.add(30).unwrap());
        assert!(list.add(40).is_none(), "full");
        assert_eq!(list.numbers(), [10, 20, 30]);
        drop(b);
        assert_eq!(list.numbers(), [10, 30]);
        let d = list.add(50).unwrap();
        assert_eq!(list.numbers(), [10, 50, 30]);
        drop((a, c, d));
        assert!(list.numbers().is_empty());
    }

    #[test]
    fn a_child_sees_what_its_parent_adds_and_the_other_way_round() {
        let list = SharedList::new().unwrap();
        let _before = list.add(1).unwrap();
        // SAFETY: the child only reads and writes the shared words and leaves by _exit: it takes no lock and allocates nothing.
        match unsafe { libc::fork() } {
            0 => {
                let words = list.words();
                words[HEADER + 1].store(words[HEADER].load(Ordering::SeqCst) + 6, Ordering::SeqCst);
                words[0].store(HEADER as u64 + 1, Ordering::SeqCst);
                list.set_due(Some(Due::Running(Duration::from_secs(9))));
                // SAFETY: ends this process alone, without running anything.
                unsafe { libc::_exit(0) }
            }
            child => {
                // SAFETY: waits for the process just made; no pointers are passed.
                assert_eq!(unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) }, child);
            }
        }
        assert_eq!(list.numbers(), [1, 7]);
        assert_eq!(list.due(), Some(Due::Running(Duration::from_secs(9))));
    }

    #[test]
    fn what_is_due() {
        let list = SharedList::map(HEADER + 1).unwrap();
        assert_eq!(list.due(), None);
        let at = Duration::new(3 * 365 * 24 * 3600, 123_456_789);
        for due in [Due::SinceBoot(at), Due::Running(at), Due::SinceBoot(Duration::from_nanos(1))] {
            list.set_due(Some(due));
            assert_eq!(list.due(), Some(due));
        }
        // Whatever the time, it is a time.
        for at in [Duration::ZERO, Duration::MAX] {
            list.set_due(Some(Due::SinceBoot(at)));
            assert!(matches!(list.due(), Some(Due::SinceBoot(_))));
        }
        list.set_due(None);
        assert_eq!((list.due(), list.numbers()), (None, vec![]));
    }
}
