//! One entry: its name, then the object itself.

use super::*;
use crate::keyring::Dek;
use crate::volume::file::check::Copies;
use crate::volume::{Damage, link, node, replay, xattr};

/// How often something that a live mount may be changing is looked at before it is believed to be wrong.
const LOOKS: u32 = 4;

impl<'a> Check<'a> {
    pub(super) fn entry<'s>(
        &'s self,
        scope: &rayon::Scope<'s>,
        name: &[u8],
        keys: Option<&DirKeys>,
        place: &Arc<Place>,
        dir: &Arc<OwnedFd>,
    ) {
        if self.over() {
            return;
        }
        let stat = match storage::stat(dir.as_fd(), name) {
            Ok(stat) => stat,
            Err(Errno::NOENT) if self.request.live.is_some() => return,
            Err(errno) => {
                return self.report(Fault::Unreadable, place, Some((name, None)), because(0, &errno.into()));
            }
        };
        let mut entry = Entry { dir, place, name, plain: None, stat };
        if stat.st_dev != self.volume.device() {
            return self.report_entry(Fault::OtherFilesystem, &entry, nothing());
        }
        if let Some(keys) = keys {
            match keys.plain_name(self.volume.keys(), dir.as_fd(), name) {
                Ok(plain) => entry.plain = Some(plain),
                Err(VolumeError::Damaged(_)) => {
                    if self.still_there(dir.as_fd(), name, stat.st_ino) {
                        let fault = match name.strip_prefix(format::LONG_PREFIX.as_bytes()) {
                            Some(_) => Fault::Sidecar,
                            None if format::un_b64(name).is_none() => Fault::Foreign,
                            None => Fault::Name,
                        };
                        self.report_entry(fault, &entry, nothing());
                        if fault == Fault::Foreign {
                            return;
                        }
                    }
                }
                Err(error) => return self.fail(error),
            }
        }
        let counter = match storage::file_type(&stat) {
            FileType::Directory => {
                let plain = entry.plain.take();
                let place = place.below(name, plain);
                let parent = dir.clone();
                return scope.spawn(move |scope| self.below(scope, &place, parent));
            }
            FileType::Symlink => {
                self.link(&entry);
                &self.request.progress.links
            }
            FileType::RegularFile if stat.st_size as u64 == format::NODE_RECORD => {
                self.node(&entry);
                &self.request.progress.nodes
            }
            FileType::RegularFile => {
                self.file(&entry);
                &self.request.progress.files
            }
            _ => return self.report_entry(Fault::Planted, &entry, nothing()),
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// A directory below another. Opened only now: what waits holds no descriptor of its own.
    fn below<'s>(&'s self, scope: &rayon::Scope<'s>, place: &Arc<Place>, parent: Arc<OwnedFd>) {
        if self.over() {
            return;
        }
        let opened = storage::open_dir(parent.as_fd(), place.name());
        drop(parent);
        match opened {
            Ok(fd) => self.directory(scope, place, &Arc::new(fd)),
            Err(Errno::NOENT) if self.request.live.is_some() => {}
            Err(errno) => self.report(Fault::Unreadable, place, None, because(0, &errno.into())),
        }
    }

    /// Notes that an object is here; says so if it is elsewhere, too.
    pub(super) fn seen(&self, object: ObjectId, ino: u64, place: &Arc<Place>, entry: Option<(&[u8], Option<&[u8]>)>) {
        let other = *lock(&self.objects).entry(object).or_insert(ino);
        if other != ino {
            let more = detail(format!("the other one has the backing inode number {other}"));
            self.report(Fault::Duplicate, place, entry, Finding { object: Some(object), ino, ..more });
        }
    }

    fn seen_entry(&self, object: ObjectId, entry: &Entry<'_>) {
        self.seen(object, entry.stat.st_ino, entry.place, Some((entry.name, entry.plain.as_deref())));
    }

    pub(super) fn attributes(
        &self,
        held: BorrowedFd<'_>,
        dek: &Dek,
        place: &Arc<Place>,
        entry: Option<(&[u8], Option<&[u8]>)>,
        ino: u64,
    ) {
        match xattr::damaged(self.volume, held, dek) {
            Ok(damaged) if damaged.is_empty() => {}
            Ok(damaged) => {
                let more = detail(format!("{} of its attributes", damaged.len()));
                self.report(Fault::Attribute, place, entry, Finding { object: Some(dek.object()), ino, ..more });
            }
            Err(VolumeError::Backing(Errno::OPNOTSUPP)) => {}
            Err(error @ VolumeError::Keyring(_)) => self.fail(error),
            Err(error) => self.report(Fault::Unreadable, place, entry, because(ino, &error)),
        }
    }

    fn link(&self, entry: &Entry<'_>) {
        let first = match storage::readlink(entry.dir.as_fd(), entry.name) {
            Ok(first) => first,
            Err(Errno::NOENT) if self.request.live.is_some() => return,
            Err(errno) => return self.report_entry(Fault::Unreadable, entry, because(0, &errno.into())),
        };
        let object = link::object(self.volume, &first);
        if let Some(object) = object {
            self.seen_entry(object, entry);
            if link::has_tail(&first) {
                lock(&self.tails).insert(object);
            }
        }
        let tailed = link::has_tail(&first);
        match link::open(self.volume, first) {
            Ok(_) => {}
            Err(VolumeError::Damaged(damage)) => {
                if !self.still_there(entry.dir.as_fd(), entry.name, entry.stat.st_ino) {
                    return;
                }
                let fault = match (damage, object) {
                    (Damage::Type, _) => Fault::ObjectType,
                    (_, Some(_)) if tailed => Fault::LinkTail,
                    _ => Fault::Link,
                };
                self.report_entry(fault, entry, Finding { object, ..nothing() });
            }
            Err(error @ VolumeError::Keyring(_)) => self.fail(error),
            Err(error) => self.report_entry(Fault::Unreadable, entry, because(0, &error)),
        }
    }

    /// Opens the entry's backing file. `None`: it was said why not, or it is not this file any more.
    fn open(&self, entry: &Entry<'_>) -> Option<OwnedFd> {
        let opened = storage::open_file(entry.dir.as_fd(), entry.name, false)
            .and_then(|fd| Ok((storage::stat_fd(fd.as_fd())?.st_ino, fd)));
        match opened {
            Ok((ino, fd)) => (ino == entry.stat.st_ino).then_some(fd),
            Err(Errno::NOENT) if self.request.live.is_some() => None,
            Err(errno) => {
                self.report_entry(Fault::Unreadable, entry, because(0, &errno.into()));
                None
            }
        }
    }

    fn node(&self, entry: &Entry<'_>) {
        let Some(fd) = self.open(entry) else { return };
        match node::read(self.volume, fd.as_fd()) {
            Ok(header) => {
                self.seen_entry(header.dek.object(), entry);
                let name = Some((entry.name, entry.plain.as_deref()));
                self.attributes(fd.as_fd(), &header.dek, entry.place, name, entry.stat.st_ino);
            }
            Err(VolumeError::Damaged(damage)) => {
                let fault = if damage == Damage::Type { Fault::ObjectType } else { Fault::Header };
                self.report_entry(fault, entry, nothing());
            }
            Err(error @ VolumeError::Keyring(_)) => self.fail(error),
            Err(error) => self.report_entry(Fault::Unreadable, entry, because(0, &error)),
        }
    }

    fn file(&self, entry: &Entry<'_>) {
        let linked = entry.stat.st_nlink > 1;
        if linked && !self.is_first_name(entry) {
            return;
        }
        let found = self.look_until_sure(entry);
        for (fault, more) in &found {
            self.report_entry(*fault, entry, more.clone());
        }
        if linked {
            let mut all = lock(&self.linked);
            let this = all.entry(entry.stat.st_ino).or_default();
            for Waiting { place, name, plain } in this.waiting.drain(..) {
                for (fault, more) in &found {
                    let more = Finding { ino: entry.stat.st_ino, ..more.clone() };
                    self.report(*fault, &place, Some((&name, plain.as_deref())), more);
                }
            }
            this.found = Some(found);
        }
    }

    /// Whether nobody looks at this file yet; else what was found of it is said of this name, too, now or later.
    fn is_first_name(&self, entry: &Entry<'_>) -> bool {
        let mut all = lock(&self.linked);
        let mut first = false;
        let this = all.entry(entry.stat.st_ino).or_insert_with(|| {
            first = true;
            Linked::default()
        });
        match &this.found {
            _ if first => {}
            Some(found) => {
                for (fault, more) in found {
                    self.report_entry(*fault, entry, more.clone());
                }
            }
            None => this.waiting.push(Waiting {
                place: entry.place.clone(),
                name: entry.name.to_vec(),
                plain: entry.plain.clone(),
            }),
        }
        first
    }

    /// Looks at a file, and again if a live mount may have changed it meanwhile. What is wrong with it.
    fn look_until_sure(&self, entry: &Entry<'_>) -> Vec<(Fault, Finding)> {
        let mut found = Vec::new();
        let Some(fd) = self.open(entry) else { return found };
        let looks = if self.request.live.is_some() { LOOKS } else { 1 };
        for look in 1..=looks {
            found.clear();
            match self.look(entry, fd.as_fd(), look == 1, &mut found) {
                Ok(()) if found.is_empty() => break,
                Ok(()) => {}
                Err(error @ VolumeError::Keyring(_)) => self.fail(error),
                Err(error) => found.push((Fault::Unreadable, because(0, &error))),
            }
            if !self.still_there(entry.dir.as_fd(), entry.name, entry.stat.st_ino) {
                found.clear();
                break;
            }
        }
        found
    }

    /// Everything about one regular file. What is wrong with its contents goes to `found`; what does not change from look to
    /// look is said at the first.
    fn look(
        &self,
        entry: &Entry<'_>,
        fd: BorrowedFd<'_>,
        at_first: bool,
        found: &mut Vec<(Fault, Finding)>,
    ) -> Result<(), VolumeError> {
        if let Some(live) = self.request.live
            && let Some(result) = self.look_live(live, entry, fd, at_first, found)
        {
            return result;
        }
        let copies = Copies::read(self.volume, fd)?;
        let Some(header) = &copies.header else {
            let fault = if copies.other_type { Fault::ObjectType } else { Fault::Header };
            found.push((fault, nothing()));
            return Ok(());
        };
        let object = Some(header.dek.object());
        if at_first {
            self.identify(entry, fd, &header.dek);
        }
        if copies.mutable.is_none() {
            let whole = storage::stat_fd(fd)?.st_size as u64 >= format::HEADER;
            let fault = if whole { Fault::MutableHeader } else { Fault::Truncated };
            found.push((fault, Finding { object, ..nothing() }));
            return Ok(());
        }
        if copies.bad_static != [false; 2] || copies.bad_mutable {
            let which = if copies.bad_mutable { "a mutable copy" } else { "a static copy" };
            let which =
                if copies.first_is_anothers { "the first is another file's: a mount refuses the file" } else { which };
            found.push((Fault::HeaderCopy, Finding { object, ..detail(which.into()) }));
        }
        if copies.first_is_anothers {
            // What it holds can be looked at once it has its own back.
            return Ok(());
        }
        let mut records = self.records.get(&header.dek.object()).map_or(&[][..], Vec::as_slice);
        if !replay::meant_for(records, self.root, fd)? {
            records = &[];
        }
        let state = match FileState::load_with(self.volume, fd, records) {
            Ok(state) => state,
            Err(VolumeError::Damaged(damage)) => {
                let fault = match damage {
                    Damage::Truncated => Fault::Truncated,
                    Damage::Extended => Fault::Extended,
                    _ => Fault::MutableHeader,
                };
                found.push((fault, Finding { object, ..nothing() }));
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        let mut blocks = Vec::new();
        let mut next = Some(0);
        while let Some(first) = next
            && !self.over()
        {
            next = state.check_blocks(self.volume, fd, first, |block, _| add(&mut blocks, block))?;
            self.count(first, next, state.size());
        }
        if !blocks.is_empty() {
            found.push((Fault::Block, Finding { object, blocks, ..nothing() }));
        }
        Ok(())
    }

    fn identify(&self, entry: &Entry<'_>, fd: BorrowedFd<'_>, dek: &Dek) {
        self.seen_entry(dek.object(), entry);
        let name = Some((entry.name, entry.plain.as_deref()));
        self.attributes(fd, dek, entry.place, name, entry.stat.st_ino);
    }

    /// The same for a file that the mount has in hand. `None`: it has not.
    fn look_live(
        &self,
        live: &dyn Live,
        entry: &Entry<'_>,
        fd: BorrowedFd<'_>,
        at_first: bool,
        found: &mut Vec<(Fault, Finding)>,
    ) -> Option<Result<(), VolumeError>> {
        let (mut blocks, mut dek) = (Vec::new(), None::<Dek>);
        let mut next = Some(0);
        while let Some(first) = next
            && !self.over()
        {
            let mut looked = Ok(None);
            // Some blocks at a time, so that nobody waits long who writes to the file.
            let known = live.with_file(entry.stat.st_ino, &mut |state| {
                dek.get_or_insert_with(|| state.dek().clone());
                looked = state.check_blocks(self.volume, fd, first, |block, _| add(&mut blocks, block));
                if let Ok(next) = looked {
                    self.count(first, next, state.size());
                }
            });
            if !known {
                return None;
            }
            match looked {
                Ok(on) => next = on,
                Err(error) => return Some(Err(error)),
            }
        }
        if let Some(dek) = dek.as_ref().filter(|_| at_first) {
            self.identify(entry, fd, dek);
        }
        if !blocks.is_empty() {
            let object = dek.map(|dek| dek.object());
            found.push((Fault::Block, Finding { object, blocks, ..nothing() }));
        }
        Some(Ok(()))
    }

    fn count(&self, first: u64, next: Option<u64>, size: u64) {
        let start = first * format::BLOCK;
        let end = next.map_or(size, |next| next * format::BLOCK);
        self.request.progress.bytes.fetch_add(end.saturating_sub(start), Ordering::Relaxed);
    }
}

/// Adds a block to a list of runs.
fn add(runs: &mut Vec<(u64, u64)>, block: u64) {
    match runs.last_mut() {
        Some((_, last)) if *last + 1 == block => *last = block,
        _ => runs.push((block, block)),
    }
}
