//! Regions, and sets of them.

use crate::geo::{Country, Point};

/// The most regions that one configuration may have. A set of regions is then four words, copied freely.
pub const REGIONS_MAX: usize = 256;

/// A region's place in its snapshot. Of no meaning in another snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RegionIndex(u8);

impl RegionIndex {
    /// `None` from [`REGIONS_MAX`] on.
    pub fn new(at: usize) -> Option<RegionIndex> {
        u8::try_from(at).ok().map(RegionIndex)
    }

    /// The place as a number for indexing.
    pub fn get(self) -> usize {
        usize::from(self.0)
    }
}

/// What the rules and the steering need to know of a region.
#[derive(Clone, Debug)]
pub struct Region {
    /// The name, as in its file.
    pub name: Box<str>,
    /// The country that it stands in.
    pub country: Country,
    /// Where it stands.
    pub point: Point,
    /// The residency zones that it belongs to, sorted.
    pub zones: Vec<Box<str>>,
    /// No new request, whatever its health.
    pub drain: bool,
    /// Its share under the policy `weighted`, against the others'.
    pub weight: f32,
    /// What a request costs there, in the operator's own unit: of regions that are almost as good, the cheapest.
    pub cost: f32,
    /// Requests in flight from which on the next region helps, and beyond which it gets no more.
    pub soft_limit: u32,
    /// Never below `soft_limit`.
    pub hard_limit: u32,
}

impl Region {
    /// A region without limits, of weight 1 and no cost.
    pub fn new(name: &str, country: Country, point: Point) -> Region {
        Region {
            name: name.into(),
            country,
            point,
            zones: Vec::new(),
            drain: false,
            weight: 1.0,
            cost: 0.0,
            soft_limit: u32::MAX,
            hard_limit: u32::MAX,
        }
    }
}

/// A set of regions of one snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RegionSet([u64; REGIONS_MAX / 64]);

impl RegionSet {
    /// No region.
    pub const EMPTY: RegionSet = RegionSet([0; REGIONS_MAX / 64]);

    /// The set of the regions at which `belongs` is true.
    pub fn of<'a>(regions: impl IntoIterator<Item = &'a Region>, belongs: impl Fn(&Region) -> bool) -> RegionSet {
        let mut set = RegionSet::EMPTY;
        for (at, region) in regions.into_iter().enumerate() {
            if let Some(index) = RegionIndex::new(at).filter(|_| belongs(region)) {
                set.insert(index);
            }
        }
        set
    }

    /// Adds one region.
    pub fn insert(&mut self, region: RegionIndex) {
        self.0[region.get() / 64] |= 1 << (region.get() % 64);
    }

    /// Takes one region out.
    pub fn remove(&mut self, region: RegionIndex) {
        self.0[region.get() / 64] &= !(1 << (region.get() % 64));
    }

    /// Whether the region is in the set.
    pub fn contains(self, region: RegionIndex) -> bool {
        self.0[region.get() / 64] & (1 << (region.get() % 64)) != 0
    }

    /// The regions in both sets.
    pub fn intersection(self, other: RegionSet) -> RegionSet {
        let mut both = self;
        both.0.iter_mut().zip(other.0).for_each(|(word, mask)| *word &= mask);
        both
    }

    /// The regions in either set.
    pub fn union(self, other: RegionSet) -> RegionSet {
        let mut either = self;
        either.0.iter_mut().zip(other.0).for_each(|(word, mask)| *word |= mask);
        either
    }

    /// Whether there is no region in the set.
    pub fn is_empty(self) -> bool {
        self == RegionSet::EMPTY
    }

    /// How many regions are in the set.
    pub fn len(self) -> usize {
        self.0.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// The regions that are not in the other set.
    pub fn difference(self, other: RegionSet) -> RegionSet {
        let mut rest = self;
        rest.0.iter_mut().zip(other.0).for_each(|(word, mask)| *word &= !mask);
        rest
    }

    /// The regions in ascending order.
    pub fn iter(self) -> Iter {
        Iter { words: self.0, at: 0 }
    }
}

/// The regions of a set in ascending order.
#[derive(Clone, Debug)]
pub struct Iter {
    words: [u64; REGIONS_MAX / 64],
    at: usize,
}

impl Iterator for Iter {
    type Item = RegionIndex;

    fn next(&mut self) -> Option<RegionIndex> {
        loop {
            let word = self.words.get_mut(self.at)?;
            if *word != 0 {
                let bit = word.trailing_zeros() as u8;
                *word &= *word - 1;
                // Four words of 64: it fits.
                return Some(RegionIndex(self.at as u8 * 64 + bit));
            }
            self.at += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_holds_what_was_put_in_and_no_more() {
        let mut set = RegionSet::EMPTY;
        let places = [0, 1, 63, 64, 127, 200, 255];
        for at in places {
            set.insert(RegionIndex::new(at).expect("below the bound"));
        }
        assert_eq!(set.iter().map(RegionIndex::get).collect::<Vec<_>>(), places);
        assert_eq!(set.len(), places.len());
        set.remove(RegionIndex::new(64).expect("below the bound"));
        assert!(!set.contains(RegionIndex::new(64).expect("below the bound")));
        assert_eq!(RegionIndex::new(REGIONS_MAX), None);
    }
}
