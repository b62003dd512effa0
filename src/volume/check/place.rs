//! Where something was found: names from the root down, shared with everything else that is there.

use std::sync::Arc;

/// An object's place in the backing tree.
#[derive(Debug)]
pub struct Place {
    parent: Option<Arc<Place>>,
    name: Vec<u8>,
    plain: Option<Vec<u8>>,
    depth: usize,
}

impl Place {
    /// The root directory's.
    pub fn root() -> Arc<Self> {
        Arc::new(Self { parent: None, name: Vec::new(), plain: None, depth: 0 })
    }

    /// Of an entry in this directory: its backing name, and its plaintext name if that is known.
    pub fn below(self: &Arc<Self>, name: &[u8], plain: Option<Vec<u8>>) -> Arc<Self> {
        let (parent, name, depth) = (Some(self.clone()), name.to_vec(), self.depth + 1);
        Arc::new(Self { parent, name, plain, depth })
    }

    /// How many names lead here.
    pub fn depth(&self) -> usize {
        self.depth
    }

    /// The last of them.
    pub fn name(&self) -> &[u8] {
        &self.name
    }

    /// The backing names from the root down.
    pub fn names(&self) -> Vec<Vec<u8>> {
        let mut names: Vec<_> = self.upwards().map(|place| place.name.clone()).collect();
        names.reverse();
        names
    }

    /// The plaintext names, if all are known.
    pub fn plain_names(&self) -> Option<Vec<Vec<u8>>> {
        let mut names = self.upwards().map(|place| place.plain.clone()).collect::<Option<Vec<_>>>()?;
        names.reverse();
        Some(names)
    }

    fn upwards(&self) -> impl Iterator<Item = &Self> {
        std::iter::successors(Some(self), |place| place.parent.as_deref()).take(self.depth)
    }
}

/// From the leaf up, one after the other: a tree may be deeper than a stack.
impl Drop for Place {
    fn drop(&mut self) {
        let mut next = self.parent.take();
        while let Some(mut place) = next.and_then(Arc::into_inner) {
            next = place.parent.take();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_in_order_and_deeper_than_a_stack() {
        let dir = Place::root().below(b"AA", Some(b"a".to_vec()));
        let file = dir.below(b"BB", Some(b"b".to_vec()));
        assert_eq!((file.names(), file.depth()), (vec![b"AA".to_vec(), b"BB".to_vec()], 2));
        assert_eq!(file.plain_names(), Some(vec![b"a".to_vec(), b"b".to_vec()]));
        assert_eq!(file.below(b"CC", None).plain_names(), None);
        assert_eq!((Place::root().names(), Place::root().plain_names()), (Vec::new(), Some(Vec::new())));
        let mut deep = Place::root();
        for _ in 0..1_000_000 {
            deep = deep.below(b"x", None);
        }
        assert_eq!(deep.depth(), 1_000_000);
        drop(deep);
    }
}
