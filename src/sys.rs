//! The only room with `unsafe`: what neither the standard library nor `rustix` offers safely. Each use says why it is sound.

pub mod extents;
pub mod fuse_device;
pub mod process;
pub mod secret_map;
pub mod shared_list;
pub mod wiping;
