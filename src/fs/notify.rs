//! What a FUSE server tells the kernel unasked. Works on any descriptor of the connection, also after it was aborted.

use std::io;
use std::os::fd::AsFd;

use zeroize::Zeroize as _;

/// FUSE_NOTIFY_INVAL_INODE and FUSE_NOTIFY_INC_EPOCH (include/uapi/linux/fuse.h).
const INVAL_INODE: i32 = 2;
const INC_EPOCH: i32 = 8;

/// Every name that the kernel caches must be looked up anew (Linux 6.16 and later).
///
/// # Errors
/// The kernel does not know this; then names stay cached, and what is behind them does not.
pub fn inc_epoch(device: impl AsFd) -> io::Result<()> {
    notify(device, INC_EPOCH, &[])
}

/// The kernel drops pages, attributes, ACLs, cached entries and link target of an inode. Dirty pages are sent first, unless the
/// connection was aborted. Waits for that.
///
/// # Errors
/// The kernel does not know the inode.
pub fn inval_inode(device: impl AsFd, ino: u64) -> io::Result<()> {
    // ino, offset, length: all of it.
    let body: Vec<u8> = [ino, 0, 0].iter().flat_map(|word| word.to_ne_bytes()).collect();
    notify(device, INVAL_INODE, &body)
}

/// struct fuse_out_header with unique 0, the code in the error field.
fn notify(device: impl AsFd, code: i32, body: &[u8]) -> io::Result<()> {
    let mut message = Vec::with_capacity(16 + body.len());
    message.extend((16 + body.len() as u32).to_ne_bytes());
    message.extend(code.to_ne_bytes());
    message.extend(0_u64.to_ne_bytes());
    message.extend(body);
    rustix::io::write(device, &message)?;
    Ok(())
}

/// FUSE_FORGET, FUSE_INTERRUPT, FUSE_BATCH_FORGET (include/uapi/linux/fuse.h): nobody waits for an answer.
const UNANSWERED: [u32; 3] = [2, 36, 42];
/// Room for the largest request: 1 MiB of data and its header.
const LARGEST: usize = (1 << 20) + (64 << 10);

/// Answers every request with `ENOTCONN`, until the connection ends.
pub fn refuse_all(device: impl AsFd) {
    let mut request = vec![0; LARGEST];
    loop {
        match rustix::io::read(&device, &mut request[..]) {
            // struct fuse_in_header: length, opcode, unique.
            Ok(n) if n >= 16 => {
                let (opcode, unique) = (&request[4..8], &request[8..16]);
                if !UNANSWERED.iter().any(|code| code.to_ne_bytes() == *opcode) {
                    let error = -libc::ENOTCONN;
                    let answer = [&16_u32.to_ne_bytes()[..], &error.to_ne_bytes(), unique].concat();
                    let _ = rustix::io::write(&device, &answer);
                }
                // What programs wrote, and names.
                request[..n].zeroize();
            }
            Ok(_) => return,
            // A request that was taken back meanwhile, or a signal.
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
            Err(_) => return,
        }
    }
}
