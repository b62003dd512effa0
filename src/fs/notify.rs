//! What a FUSE server tells the kernel unasked. Works on any descriptor of the connection, also after it was aborted.

use std::io;
use std::os::fd::AsFd;

use rustix::event::{PollFd, PollFlags, Timespec};
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

/// Opcodes (include/uapi/linux/fuse.h).
const FORGET: u32 = 2;
const WRITE: u32 = 16;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;
/// struct fuse_in_header.
const IN_HEADER: usize = 40;
/// Room for the largest request: 1 MiB of data and its header.
const LARGEST: usize = (1 << 20) + (64 << 10);

/// What a request that was refused would have done.
#[derive(Debug, PartialEq, Eq)]
pub enum Refused {
    /// References that the kernel gives back: inodes and how many each. Cannot be refused.
    Forget(Vec<(u64, u64)>),
    /// An inode, and bytes that a program had written.
    Write(u64, u64),
    /// Anything else.
    Other,
}

/// Room for a request, which is overwritten as soon as the request was refused.
pub struct Room(Vec<u8>);

impl Default for Room {
    fn default() -> Self {
        Self(vec![0; LARGEST])
    }
}

impl Room {
    /// Takes the next request and answers it with this errno. `None`: there is none now.
    ///
    /// # Errors
    /// The connection has ended.
    pub fn refuse_next(&mut self, device: impl AsFd, errno: i32) -> io::Result<Option<Refused>> {
        let request = &mut self.0;
        let n = match rustix::io::read(&device, &mut request[..]) {
            Ok(n) if n >= IN_HEADER => n,
            // A request that was taken back meanwhile, or a signal.
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => return Ok(None),
            Ok(_) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Err(errno) => return Err(errno.into()),
        };
        let refused = what(&request[..n]);
        // Nobody waits for an answer to these.
        if !matches!(word(request, 4), FORGET | INTERRUPT | BATCH_FORGET) {
            let answer = [&16_u32.to_ne_bytes()[..], &(-errno).to_ne_bytes(), &request[8..16]].concat();
            let _ = rustix::io::write(&device, &answer);
        }
        // What programs wrote, and names.
        request[..n].zeroize();
        Ok(Some(refused))
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|word| word.try_into().ok()).map_or(0, u32::from_ne_bytes)
}

fn long(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|word| word.try_into().ok()).map_or(0, u64::from_ne_bytes)
}

/// struct fuse_in_header (length, opcode, unique, nodeid, …), and behind it the operation's own.
fn what(request: &[u8]) -> Refused {
    let ino = long(request, 16);
    match word(request, 4) {
        FORGET => Refused::Forget(vec![(ino, long(request, IN_HEADER))]),
        // A count, a word unused, and that many pairs.
        BATCH_FORGET => {
            let many = word(request, IN_HEADER) as usize;
            let pairs = request.get(IN_HEADER + 8..).unwrap_or_default().chunks_exact(16).take(many);
            Refused::Forget(pairs.map(|pair| (long(pair, 0), long(pair, 8))).collect())
        }
        // A handle, an offset, a length.
        WRITE => Refused::Write(ino, word(request, IN_HEADER + 16).into()),
        _ => Refused::Other,
    }
}

/// Answers every request with `ENOTCONN`, until the connection ends.
pub fn refuse_all(device: impl AsFd) {
    let mut room = Room::default();
    while room.refuse_next(&device, libc::ENOTCONN).is_ok() {}
}

/// Whether the connection still has a filesystem and was not aborted (fuse_dev_poll, fs/fuse/dev.c).
pub fn is_alive(device: impl AsFd) -> bool {
    let mut ready = [PollFd::from_borrowed_fd(device.as_fd(), PollFlags::empty())];
    let polled = rustix::event::poll(&mut ready, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
    polled.is_ok() && !ready[0].revents().contains(PollFlags::ERR)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_requests_would_have_done() {
        let request = |opcode: u32, ino: u64, body: &[u64]| {
            let body: Vec<u8> = body.iter().flat_map(|word| word.to_ne_bytes()).collect();
            let header = [&(40 + body.len() as u32).to_ne_bytes()[..], &opcode.to_ne_bytes(), &1_u64.to_ne_bytes()];
            [&header.concat(), &ino.to_ne_bytes()[..], &[0; 16], &body].concat()
        };
        assert_eq!(what(&request(FORGET, 7, &[3])), Refused::Forget(vec![(7, 3)]));
        // The count is a word, and the one behind it means nothing; more than there are is said.
        assert_eq!(what(&request(BATCH_FORGET, 0, &[2, 7, 1, 8, 2, 9, 3])), Refused::Forget(vec![(7, 1), (8, 2)]));
        assert_eq!(what(&request(BATCH_FORGET, 0, &[9, 7, 1])), Refused::Forget(vec![(7, 1)]));
        assert_eq!(what(&request(WRITE, 7, &[0, 4096, 512, 0, 0])), Refused::Write(7, 512));
        assert_eq!(what(&request(15, 7, &[0, 4096, 512])), Refused::Other);
        assert_eq!(what(&[]), Refused::Other);
    }
}
