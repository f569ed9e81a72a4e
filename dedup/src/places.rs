//! Guesses: which stable page a page is likely to be equal to, before it was read.
//!
//! VMs born from one image hold the same content at the same place, and content that moved mostly
//! moved in runs. A right guess is compared under protection at once, so the page is read once
//! instead of twice, and not hashed at all.

use crate::page::{PageRange, PoolPage};

/// For each page number the stable page last shared there, by any region.
#[derive(Debug, Default)]
pub(crate) struct Places {
    /// One more than the pool page; 0 where nothing was shared yet.
    places: Vec<u32>,
}

impl Places {
    /// Pages `part` of some region were mapped to the pool's pages from `first` on.
    pub(crate) fn note(&mut self, part: &PageRange, first: PoolPage) {
        let end = part.end as usize;
        if self.places.len() < end {
            self.places.reserve_exact(end - self.places.len());
            self.places.resize(end, 0);
        }
        for (place, pool_page) in self.places[part.start as usize..end]
            .iter_mut()
            .zip(first.0 + 1..)
        {
            *place = pool_page;
        }
    }

    /// The stable page last shared at this page number. It may have died since.
    pub(crate) fn at(&self, page: u32) -> Option<PoolPage> {
        let place = *self.places.get(page as usize)?;
        place.checked_sub(1).map(PoolPage)
    }

    pub(crate) fn forget_all(&mut self) {
        self.places = Vec::new();
    }

    pub(crate) fn metadata_bytes(&self) -> u64 {
        (self.places.capacity() * size_of::<u32>()) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_page_shared_at_a_place_is_the_guess() {
        let mut places = Places::default();
        assert_eq!(places.at(5), None);
        places.note(&(4..7), PoolPage(0));
        assert_eq!(places.at(3), None);
        assert_eq!(places.at(4), Some(PoolPage(0)));
        places.note(&(5..6), PoolPage(40));
        assert_eq!(places.at(5), Some(PoolPage(40)));
        assert_eq!(places.at(6), Some(PoolPage(2)));
        assert_eq!(places.at(7), None);
    }
}
