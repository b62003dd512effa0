//! A bounded cache of key material in memory that the kernel neither swaps, dumps nor shows to others.
//!
//! One [`Arena`] is a number of fixed-size slots, found by a 128-bit tag. When it is full the least recently used slot is
//! wiped and reused: keys never spill to other memory. Locking is the caller's (the keyring's shards).

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use zeroize::Zeroize;

use crate::sys::secret_map::SecretMap;

/// Bytes of a slot: four keys.
pub const SLOT_LEN: usize = 128;

/// The slots. See the module's text.
pub struct Arena {
    memory: SecretMap,
    index: HashMap<u128, usize>,
    slots: Vec<Slot>,
    hand: usize,
}

struct Slot {
    tag: Option<u128>,
    // Set by readers under a shared guard, cleared by the clock's hand under an exclusive one.
    used: AtomicBool,
}

impl Arena {
    /// An empty arena of `bytes`, rounded up to whole pages.
    ///
    /// # Errors
    /// No locked memory to be had (`RLIMIT_MEMLOCK`).
    pub fn new(bytes: usize) -> io::Result<Self> {
        let memory = SecretMap::new(bytes)?;
        let count = memory.bytes().len() / SLOT_LEN;
        let slots = (0..count).map(|_| Slot { tag: None, used: AtomicBool::new(false) }).collect();
        Ok(Self { memory, index: HashMap::with_capacity(count), slots, hand: 0 })
    }

    /// Shows the slot with this tag to nobody but the caller's borrow.
    pub fn find(&self, tag: u128) -> Option<&[u8; SLOT_LEN]> {
        let slot = *self.index.get(&tag)?;
        self.slots[slot].used.store(true, Ordering::Relaxed);
        self.memory.bytes()[slot * SLOT_LEN..].first_chunk()
    }

    /// Fills the slot with this tag in place, evicting another if need be. If `fill` fails the slot is left empty.
    ///
    /// # Errors
    /// `fill`'s.
    pub fn insert<T, E>(&mut self, tag: u128, fill: impl FnOnce(&mut [u8; SLOT_LEN]) -> Result<T, E>) -> Result<T, E> {
        let slot = match self.index.get(&tag) {
            Some(&slot) => slot,
            None => self.free_slot(),
        };
        let range = slot * SLOT_LEN..(slot + 1) * SLOT_LEN;
        let Some(bytes) = self.memory.bytes_mut()[range].first_chunk_mut() else { unreachable!("within the arena") };
        match fill(bytes) {
            Ok(value) => {
                self.slots[slot].tag = Some(tag);
                self.slots[slot].used.store(true, Ordering::Relaxed);
                self.index.insert(tag, slot);
                Ok(value)
            }
            Err(error) => {
                bytes.zeroize();
                self.slots[slot].tag = None;
                self.index.remove(&tag);
                Err(error)
            }
        }
    }

    /// Wipes everything.
    pub fn wipe(&mut self) {
        self.memory.bytes_mut().zeroize();
        self.index.clear();
        for slot in &mut self.slots {
            slot.tag = None;
        }
    }

    /// Occupied slots.
    pub fn len(&self) -> usize {
        self.index.len()
    }

    /// Whether no slot is occupied.
    pub fn is_empty(&self) -> bool {
        self.index.is_empty()
    }

    /// How the memory is kept from others, for `status`.
    pub fn protection(&self) -> &'static str {
        self.memory.protection()
    }

    /// The clock algorithm: the first slot not used since the hand last passed.
    fn free_slot(&mut self) -> usize {
        loop {
            let slot = self.hand;
            self.hand = (self.hand + 1) % self.slots.len();
            match self.slots[slot].tag {
                Some(_) if self.slots[slot].used.swap(false, Ordering::Relaxed) => {}
                Some(tag) => {
                    self.index.remove(&tag);
                    self.slots[slot].tag = None;
                    self.memory.bytes_mut()[slot * SLOT_LEN..(slot + 1) * SLOT_LEN].zeroize();
                    return slot;
                }
                None => return slot,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn evicts_when_full_and_wipes() {
        let mut arena = Arena::new(4096).unwrap();
        for tag in 0..100_u128 {
            arena
                .insert::<_, ()>(tag, |bytes| {
                    bytes.fill(tag as u8 + 1);
                    Ok(())
                })
                .unwrap();
            assert_eq!(arena.find(tag).unwrap()[5], tag as u8 + 1);
        }
        assert_eq!(arena.len(), 32);
        arena.wipe();
        assert!(arena.is_empty());
        assert!(arena.memory.bytes().iter().all(|byte| *byte == 0));
    }

    #[test]
    fn a_failed_fill_leaves_nothing() {
        let mut arena = Arena::new(4096).unwrap();
        let failed = arena.insert::<(), _>(1, |bytes| {
            bytes.fill(9);
            Err("no")
        });
        assert_eq!(failed, Err("no"));
        assert!(arena.find(1).is_none());
        assert!(arena.memory.bytes().iter().all(|byte| *byte == 0));
    }
}
