//! The program: see the library's `cli`.

/// Whatever library held a key or plaintext, it does not stay in freed memory.
#[global_allocator]
static ALLOCATOR: lethefs::sys::wiping::Wiping = lethefs::sys::wiping::Wiping;

fn main() {
    lethefs::cli::main()
}
