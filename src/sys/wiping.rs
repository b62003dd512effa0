//! Memory that is overwritten when it is done with: an allocator, the unused part of a stack, and what an old request left in
//! the buffer behind a new one.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// The system's allocator, which overwrites what is freed: bodies of HTTP replies, JSON and other libraries' buffers carry keys
/// and plaintext, and none of those libraries wipes them.
pub struct Wiping;

// SAFETY: every call is the system allocator's, with the same layouts; `dealloc` writes only to the block that it was given and
// that nobody may use any more. `realloc` is the trait's own (allocate, copy, free), so that what moves is wiped, too.
unsafe impl GlobalAlloc for Wiping {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller gives up a block of this layout: `layout.size()` bytes of it may be written.
        unsafe {
            wipe(block, layout.size());
            System.dealloc(block, layout);
        }
    }
}

/// Overwrites in a way that the compiler does not leave out.
///
/// # Safety
/// `len` bytes at `start` may be written.
unsafe fn wipe(start: *mut u8, len: usize) {
    // SAFETY: the caller's promise.
    unsafe { std::ptr::write_bytes(start, 0, len) };
    std::hint::black_box(start);
    std::sync::atomic::compiler_fence(std::sync::atomic::Ordering::SeqCst);
}

/// Bytes of stack below the caller that [`unused_stack`] overwrites: deeper than cipher work goes, well within a thread's 2 MiB.
const STACK: usize = 256 << 10;

/// Overwrites what earlier calls left on this thread's stack below the caller.
#[inline(never)]
pub fn unused_stack() {
    let mut below = [0_u8; STACK];
    // SAFETY: all of our own array.
    unsafe { wipe(below.as_mut_ptr(), below.len()) };
    std::hint::black_box(&mut below);
}

/// Where a thread receives requests: each is written over the last one, from the same address on.
#[derive(Clone, Copy)]
struct RequestBuffer {
    base: usize,
    end: usize,
}

thread_local! {
    static BUFFER: Cell<RequestBuffer> = const { Cell::new(RequestBuffer { base: 0, end: 0 }) };
}

/// The request that this thread handles has `part` in it, and its `first` part at this offset.
///
/// For handlers of requests only, with parts of the request: nobody else may call this, or [`behind_request`] overwrites what is
/// not a request's.
pub(crate) fn saw_request(part: &[u8], first: &[u8], offset: usize) {
    let base = first.as_ptr().expose_provenance() - offset;
    let _ = part.as_ptr().expose_provenance();
    let seen = BUFFER.get();
    // Should an offset be wrong once, then rather too little is overwritten.
    BUFFER.set(RequestBuffer { base: base.max(seen.base), end: seen.end.max(part.as_ptr().addr() + part.len()) });
}

/// Overwrites what earlier, longer requests left behind the present one, of `len` bytes. For a request's handler only.
pub(crate) fn behind_request(len: usize) {
    let seen = BUFFER.get();
    let from = seen.base + len;
    if seen.base != 0 && from < seen.end {
        // SAFETY: the range lies within requests that this thread has received into its buffer, which fuser keeps for as long as
        // the thread runs (fuser 0.18, session.rs: one `FuseReadBuf` for each event loop) and reads the next request into. The
        // present request ends before it, so nobody refers to it, and whoever reads it next has read(2) fill it first. (That
        // fuser's own exclusive borrow of the whole buffer is on the stack meanwhile is beyond what Rust's aliasing models
        // allow; nothing is read or written through it until the handler has returned. docs/decisions/0014.)
        unsafe { wipe(std::ptr::with_exposed_provenance_mut(from), seen.end - from) };
        BUFFER.set(RequestBuffer { end: from, ..seen });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_freed_block_is_overwritten() {
        // Large blocks are mapped and unmapped; of small ones the allocator gives the same again, its own links in the first bytes.
        let layout = Layout::from_size_align(1024, 16).unwrap();
        let mut looked_at = 0;
        for _ in 0..100 {
            // SAFETY: the layout is not empty; blocks are written within their bounds, freed once, and looked at only by way of
            // the allocator's own next block at the same place.
            unsafe {
                let block = Wiping.alloc(layout);
                std::ptr::write_bytes(block, 0xa5, 1024);
                Wiping.dealloc(block, layout);
                let again = System.alloc(layout);
                if again == block {
                    looked_at += 1;
                    let bytes = std::slice::from_raw_parts(again.add(64), 1024 - 64);
                    assert!(!bytes.contains(&0xa5));
                }
                System.dealloc(again, layout);
            }
        }
        assert!(looked_at > 0, "the allocator never gave a block again");
    }

    #[test]
    fn what_lies_behind_a_request_is_overwritten_and_the_request_is_not() {
        let mut buffer = vec![7_u8; 1000];
        saw_request(&buffer[80..900], &buffer[80..90], 80);
        saw_request(&buffer[40..50], &buffer[40..50], 40);
        behind_request(40);
        std::hint::black_box(&mut buffer);
        assert!(buffer[..40].iter().all(|byte| *byte == 7));
        assert!(buffer[40..900].iter().all(|byte| *byte == 0));
        assert!(buffer[900..].iter().all(|byte| *byte == 7), "never seen, never touched");
    }
}
