//! Does each operation under callgrind, for `scripts/instructions`, which reads what was counted within `measured`.

mod operations;

#[global_allocator]
static ALLOCATOR: lethefs::sys::wiping::Wiping = lethefs::sys::wiping::Wiping;

const TIMES: u32 = 20;

#[inline(never)]
fn measured(operation: &mut dyn FnMut()) {
    for _ in 0..TIMES {
        operation();
    }
    // So that the call above is not the last thing here, and this stays a function of its own.
    std::hint::black_box(());
}

/// Without an argument: the operations, and how often each is done. With the name of one: does it.
fn main() {
    let wanted = std::env::args().nth(1);
    let dir = tempfile::tempdir().expect("a directory");
    for (name, mut operation) in operations::operations(dir.path()) {
        match &wanted {
            None => println!("{TIMES} {name}"),
            Some(wanted) if wanted == name => {
                // What is made once is not counted.
                for _ in 0..TIMES {
                    operation();
                }
                measured(&mut operation);
            }
            Some(_) => {}
        }
    }
}
