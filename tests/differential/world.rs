//! One of the two sides: a directory that is the root of everything, and a thread for each user.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use rustix::fs::{Gid, Mode, Uid};

use crate::bytes;
use crate::calls::{self, Call, Seen, Table};

/// User, group and further groups: root, and three who share some groups and nothing else.
pub(crate) const USERS: [(u32, u32, &[u32]); 4] =
    [(0, 0, &[]), (54_001, 54_001, &[54_003, 54_010]), (54_002, 54_002, &[54_010]), (54_003, 54_010, &[])];

pub(crate) struct World {
    pub(crate) root: PathBuf,
    table: Arc<Mutex<Table>>,
    users: Vec<Actor>,
}

struct Actor {
    calls: Option<Sender<Call>>,
    seen: Receiver<Seen>,
    thread: Option<JoinHandle<()>>,
}

impl Actor {
    fn new(user: usize, root: PathBuf, table: Arc<Mutex<Table>>) -> Self {
        let (calls, todo) = channel();
        let (done, seen) = channel();
        let run = move || {
            become_user(user, &root);
            for call in todo {
                let seen = calls::run(&call, &mut table.lock().unwrap());
                if done.send(seen).is_err() {
                    break;
                }
            }
        };
        Self { calls: Some(calls), seen, thread: Some(std::thread::spawn(run)) }
    }
}

impl Drop for Actor {
    fn drop(&mut self) {
        self.calls.take();
        let joined = self.thread.take().map(JoinHandle::join);
        assert!(std::thread::panicking() || joined.is_none_or(|joined| joined.is_ok()), "a user's thread panicked");
    }
}

/// This thread gets a root, a working directory and a umask of its own, and these credentials.
fn become_user(user: usize, root: &std::path::Path) {
    let (uid, gid, groups) = USERS[user];
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS).unwrap();
    rustix::process::chdir(root).unwrap();
    rustix::process::chroot(".").unwrap();
    rustix::process::umask(Mode::from_raw_mode(0o022));
    let groups: Vec<Gid> = groups.iter().copied().map(Gid::from_raw).collect();
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    // Linux keeps credentials for each thread; only libc's wrappers change all of them.
    rustix::thread::set_thread_groups(&groups).unwrap();
    rustix::thread::set_thread_res_gid(gid, gid, gid).unwrap();
    rustix::thread::set_thread_res_uid(uid, uid, uid).unwrap();
}

impl World {
    /// With something to begin with.
    pub(crate) fn new(root: PathBuf) -> Self {
        let mode = |name: &str, mode: u32| {
            fs::set_permissions(root.join(name), fs::Permissions::from_mode(mode)).unwrap();
        };
        fs::create_dir_all(root.join("b/b")).unwrap();
        fs::create_dir(root.join("d")).unwrap();
        fs::write(root.join("a"), bytes(5000, 0)).unwrap();
        fs::write(root.join("d/c"), bytes(100, 1)).unwrap();
        chown(root.join("d"), Some(USERS[1].0), Some(54_010)).unwrap();
        chown(root.join("d/c"), Some(USERS[2].0), Some(USERS[2].1)).unwrap();
        for (name, bits) in [("", 0o777), ("a", 0o666), ("b", 0o777), ("b/b", 0o777), ("d", 0o3777), ("d/c", 0o640)] {
            mode(name, bits);
        }
        let mut world = Self { root, table: Arc::default(), users: Vec::new() };
        world.start();
        world
    }

    pub(crate) fn run(&self, user: usize, call: &Call) -> Seen {
        let actor = &self.users[user];
        actor.calls.as_ref().unwrap().send(call.clone()).unwrap();
        actor.seen.recv().unwrap()
    }

    /// What can be told of the descriptors.
    pub(crate) fn descriptors(&self) -> Vec<String> {
        self.table.lock().unwrap().look()
    }

    /// Nobody is in it any more, and nothing is open.
    pub(crate) fn stop(&mut self) {
        self.users.clear();
        *self.table.lock().unwrap() = Table::default();
    }

    pub(crate) fn start(&mut self) {
        self.users = (0..USERS.len()).map(|user| Actor::new(user, self.root.clone(), self.table.clone())).collect();
    }
}
