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

fn main() {
    let dir = tempfile::tempdir().expect("a directory");
    for (name, mut operation) in operations::operations(dir.path()) {
        // What is made once is not counted.
        for _ in 0..TIMES {
            operation();
        }
        println!("{TIMES} {name}");
        measured(&mut operation);
    }
}
