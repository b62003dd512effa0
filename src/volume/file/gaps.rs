//! Which blocks of a file are holes, as far as this mount knows: so that a file whose holes have all been filled is sealed as
//! one without. (The kernel writes the parts of a large file in any order: for a moment nearly every one has holes.)

use std::collections::BTreeMap;

use super::format::BLOCK;

/// A file with more holes than this has holes.
const MOST: usize = 1024;

/// Ranges of blocks, first to end; `None`: not known.
pub(super) struct Gaps(Option<BTreeMap<u64, u64>>);

impl Gaps {
    /// Of a file that has none.
    pub(super) fn none() -> Self {
        Self(Some(BTreeMap::new()))
    }

    /// Of a file that may have some, who knows where.
    pub(super) fn unknown() -> Self {
        Self(None)
    }

    /// Whether there is none for certain.
    pub(super) fn is_none(&self) -> bool {
        self.0.as_ref().is_some_and(BTreeMap::is_empty)
    }

    /// The file grows from one size to another, and nothing is written.
    pub(super) fn add(&mut self, from: u64, to: u64) {
        if let Some(ranges) = &mut self.0 {
            ranges.insert(from / BLOCK, to.div_ceil(BLOCK));
        }
        if self.0.as_ref().is_some_and(|ranges| ranges.len() > MOST) {
            self.0 = None;
        }
    }

    /// These blocks become holes.
    pub(super) fn punch(&mut self, first: u64, end: u64) {
        self.fill(first, end);
        self.add(first * BLOCK, end * BLOCK);
    }

    /// These blocks are written, or cut off.
    pub(super) fn fill(&mut self, first: u64, end: u64) {
        let Some(ranges) = &mut self.0 else { return };
        while let Some((&from, &to)) = ranges.range(..end).next_back().filter(|(_, to)| **to > first) {
            ranges.remove(&from);
            if to > end {
                ranges.insert(end, to);
            }
            if from < first {
                ranges.insert(from, first);
                break;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        #[test]
        fn as_a_list_of_blocks_would_say(steps in proptest::collection::vec((0_u64..40, 1_u64..12), 1..60)) {
            let (mut gaps, mut size) = (Gaps::none(), 0_u64);
            let mut holes = [false; 2000];
            for (n, (at, len)) in steps.into_iter().enumerate() {
                if n % 7 == 1 {
                    let end = (at + len).min(size);
                    if at < end {
                        gaps.punch(at, end);
                        holes[at as usize..end as usize].fill(true);
                    }
                } else if n % 3 == 0 {
                    gaps.add(size * BLOCK, (size + len) * BLOCK - 7);
                    holes[size as usize..(size + len) as usize].fill(true);
                    size += len;
                } else {
                    gaps.fill(at, at + len);
                    holes[at as usize..(at + len) as usize].fill(false);
                }
                let found: Vec<u64> = gaps.0.iter().flatten().flat_map(|(from, to)| *from..*to).collect();
                let right: Vec<u64> = (0..2000).filter(|n| holes[*n as usize]).collect();
                proptest::prop_assert_eq!(&found, &right);
                proptest::prop_assert_eq!(gaps.is_none(), right.is_empty());
            }
        }
    }

    #[test]
    fn too_many_are_not_remembered_and_not_denied() {
        let mut gaps = Gaps::none();
        for n in 0..=MOST as u64 {
            gaps.add(2 * n * BLOCK, (2 * n + 1) * BLOCK);
        }
        gaps.fill(0, u64::MAX);
        assert!(!gaps.is_none());
    }
}
