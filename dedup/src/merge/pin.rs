//! A pin: pages that keep their frames until it is dropped.

use crate::backing::Backing;
use crate::base::page::PageRange;
use crate::merge::unmerge::UNSHARE_PAGES;
use crate::pages::pins::AccessError;
use crate::pages::region::RegionRef;

/// Pinned pages; unpinned on drop.
#[derive(Debug)]
pub(crate) struct Pin<B> {
    region: RegionRef<B>,
    pages: PageRange,
}

impl<B: Backing> Pin<B> {
    pub(crate) fn new(region: &RegionRef<B>, pages: PageRange) -> Result<Pin<B>, AccessError> {
        AccessError::check(&pages, region.backing().pages())?;
        let inside = region.enter().ok_or(AccessError::Exiting)?;
        if !pages.is_empty() {
            region.pins.add(&pages);
        }
        // Made before the pages are touched: its drop takes the pin back if that fails.
        let pin = Pin {
            region: RegionRef::clone(region),
            pages,
        };
        for start in pin.pages.clone().step_by(UNSHARE_PAGES as usize) {
            if inside.is_exiting() {
                return Err(AccessError::Exiting);
            }
            let end = pin.pages.end.min(start.saturating_add(UNSHARE_PAGES));
            inside.backing().unshare(start..end)?;
        }
        Ok(pin)
    }
}

impl<B> Drop for Pin<B> {
    fn drop(&mut self) {
        self.region.pins.remove(&self.pages);
    }
}
