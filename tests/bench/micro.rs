//! Times of single operations: `cargo bench --manifest-path tests/bench/Cargo.toml`. Nothing asserts one; what must not rise is counted (`counted.rs`).

mod operations;

use criterion::Criterion;

#[global_allocator]
static ALLOCATOR: lethefs::sys::wiping::Wiping = lethefs::sys::wiping::Wiping;

fn main() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut criterion = Criterion::default().configure_from_args();
    for (name, mut operation) in operations::operations(dir.path()) {
        criterion.bench_function(name, |bencher| bencher.iter(&mut operation));
    }
    criterion.final_summary();
}
