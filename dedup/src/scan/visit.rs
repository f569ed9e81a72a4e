//! One window of a region: what became of its pages since the last visit, and what to merge.

use std::io;

use crate::backing::{Backing, Residency};
use crate::base::page::PageRange;
use crate::merge::domain::Scanner;
use crate::merge::plan::Plan;
use crate::pages::item::PageState;
use crate::pages::region::{Entered, RegionId};

impl<B: Backing> Scanner<B> {
    /// Visits the pages of a window and merges what can be merged. Returns the pages visited.
    pub(crate) fn scan_window(
        &mut self,
        inside: &Entered<'_, B>,
        window: PageRange,
    ) -> io::Result<u32> {
        let mut plan = Plan::default();
        let changes = self.changes;
        let visited = match self.take_watched(inside.region.id(), window.clone()) {
            Some(pages) => self.visit_watched(inside, &pages, &mut plan)?,
            None => self.visit(inside, window.clone(), &mut plan)?,
        };
        self.pages_scanned += u64::from(visited);
        self.merge(inside, &mut plan);
        let page = window.start;
        self.settle_watched(inside, window, &plan.later);
        self.heal(inside, page);
        if self.changes > changes
            && let Some(attached) = self.attached(inside.region.id())
        {
            attached.looks.hasten();
        }
        self.reclaim();
        self.publish_region(inside.region);
        Ok(visited)
    }

    fn visit(
        &mut self,
        inside: &Entered<'_, B>,
        window: PageRange,
        plan: &mut Plan,
    ) -> io::Result<u32> {
        let mut found = Vec::new();
        inside.backing().residency(window.clone(), &mut found)?;
        let mut visited = 0;
        let mut next = window.start;
        for (range, residency) in found {
            self.visit_absent(inside, next..range.start);
            next = range.end;
            match residency {
                Residency::Private => {
                    for page in range {
                        if inside.is_exiting() {
                            return Ok(visited);
                        }
                        if self.is_put_off(inside.region.id(), page) {
                            self.pages_skipped += 1;
                            continue;
                        }
                        self.visit_private(inside, page, plan);
                        visited += 1;
                    }
                }
                Residency::ZeroPage | Residency::Swapped => self.visit_absent(inside, range),
                Residency::Pool => visited += crate::base::page::range_pages(&range),
            }
        }
        self.visit_absent(inside, next..window.end);
        Ok(visited)
    }

    /// Pages without memory of their own: the engine merged them, or the guest gave them back.
    ///
    /// Swapped ones too: they are left alone, as KSM leaves them. A merged page is not taken for
    /// broken on such a word, because the kernel also says it of a page that it is moving; one
    /// sharer too many costs a page, one too few would free a page under a guest.
    fn visit_absent(&mut self, inside: &Entered<'_, B>, range: PageRange) {
        let items = self.items(inside.region.id());
        for page in range {
            if !items.is_merged(page) {
                items.set_state(page, PageState::Untracked);
            }
        }
    }

    /// Whether a page changed so often that it is not worth a visit in this pass.
    fn is_put_off(&mut self, id: RegionId, page: u32) -> bool {
        let hurried = self.hurried;
        let items = self.items(id);
        items.state(page).is_volatile() && !hurried && !items.backoff(page).is_due(items.now)
    }

    fn visit_private(&mut self, inside: &Entered<'_, B>, page: u32, plan: &mut Plan) {
        let id = inside.region.id();
        let (fingerprint, zero) = self.read_page(inside, page);
        let checksum = fingerprint.checksum();
        let before = self.items(id).state(page);
        let calm = match before {
            PageState::Volatile { checksum: seen }
            | PageState::Unshared { checksum: seen }
            | PageState::LeftOut { checksum: seen } => seen == checksum,
            _ => false,
        };
        if !calm {
            self.unshared_by_guest(id, page);
            let items = self.items(id);
            items.set_state(page, PageState::Volatile { checksum });
            if let PageState::Volatile { .. } | PageState::Unshared { .. } = before {
                items.set_backoff(page, items.backoff(page).changed(items.now));
            }
            self.changes += u64::from(!before.is_volatile());
            return;
        }
        self.changes += u64::from(before.calm_checksum().is_none());
        self.plan_calm(id, page, fingerprint, zero, plan);
    }
}
