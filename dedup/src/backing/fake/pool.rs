//! The model's pool.

use std::collections::BTreeSet;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use super::{Content, FakePage};
use crate::backing::Pool;
use crate::base::page::{PAGE_WORDS, PoolPage};
use crate::base::sync;
use crate::index::fingerprint::Fingerprint;

/// The pool of the model: content by pool page, `None` where nothing was written or all punched.
#[derive(Clone, Debug, Default)]
pub(crate) struct FakePool {
    pages: Arc<Mutex<Vec<Option<Content>>>>,
    /// What happens in the middle of a merge.
    interruption: Arc<Mutex<Option<Interruption>>>,
    /// Pages that nobody uses, still there because punching them failed.
    unpunched: Arc<Mutex<BTreeSet<u32>>>,
    /// Regions that may lie over its pages.
    pub(super) regions: Arc<Mutex<Vec<Over>>>,
    /// Every `punch` fails.
    pub(crate) keeps_pages: Arc<AtomicBool>,
}

/// Where the worker can be interrupted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Moment {
    /// While a run is copied into the pool, after its first page.
    Fill,
    /// While pages are compared with stable pages, after the first pair.
    Compare,
    /// Before pool pages are mapped.
    Map,
    /// After the first pages were copied to where a block is built.
    Stage,
    /// Before what was built aside is put in place.
    Replace,
    /// Before pages get private copies.
    Unshare,
}

/// What lies behind the pages of a region, and under them.
#[derive(Clone, Debug)]
pub(super) struct Over {
    pub(super) pages: Arc<Mutex<Vec<FakePage>>>,
    pub(super) under: Arc<Mutex<Vec<Option<PoolPage>>>>,
}

impl Over {
    fn shows(&self, place: PoolPage) -> bool {
        sync::lock(&self.pages).contains(&FakePage::Shared(place))
    }

    /// As the kernel does for all who map a page that is punched, whatever they wrote.
    fn lose_zero_page(&self, place: PoolPage) {
        let under = sync::lock(&self.under);
        for (page, under) in sync::lock(&self.pages).iter_mut().zip(under.iter()) {
            if *page == FakePage::Zeros && *under == Some(place) {
                *page = FakePage::Absent;
            }
        }
    }
}

struct Interruption(Moment, Box<dyn FnOnce() + Send>);

impl std::fmt::Debug for Interruption {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Interruption({:?})", self.0)
    }
}

impl FakePool {
    pub(crate) fn content(&self, page: PoolPage) -> Option<Content> {
        sync::lock(&self.pages)
            .get(page.0 as usize)
            .copied()
            .flatten()
    }

    /// Lets something happen in the middle of the next merge.
    pub(crate) fn interrupt(&self, moment: Moment, with: impl FnOnce() + Send + 'static) {
        *sync::lock(&self.interruption) = Some(Interruption(moment, Box::new(with)));
    }

    pub(super) fn fill(&self, page: PoolPage, content: Content) {
        let mut pages = sync::lock(&self.pages);
        let index = page.0 as usize;
        if pages.len() <= index {
            pages.resize(index + 1, None);
        }
        sync::lock(&self.unpunched).remove(&page.0);
        let regions = sync::lock(&self.regions);
        assert!(
            !regions.iter().any(|region| region.shows(page)),
            "pool page {index} is written to while in use"
        );
        pages[index] = Some(content);
    }

    pub(super) fn reach(&self, moment: Moment) {
        let due = sync::lock(&self.interruption).take_if(|due| due.0 == moment);
        if let Some(Interruption(_, happen)) = due {
            happen();
        }
    }

    pub(crate) fn used_pages(&self) -> usize {
        sync::lock(&self.pages).iter().flatten().count() - self.unpunched_pages()
    }

    pub(crate) fn unpunched_pages(&self) -> usize {
        sync::lock(&self.unpunched).len()
    }
}

impl Pool for FakePool {
    fn fingerprint(&self, page: PoolPage) -> Fingerprint {
        Fingerprint::of(&[self.content(page).expect("it was filled"); PAGE_WORDS])
    }

    fn allocated_pages(&self) -> io::Result<u64> {
        Ok(sync::lock(&self.pages).iter().flatten().count() as u64)
    }

    fn punch(&self, first: PoolPage, pages: u32) -> io::Result<()> {
        let keeps_pages = self.keeps_pages.load(Ordering::Relaxed);
        let mut all = sync::lock(&self.pages);
        let mut unpunched = sync::lock(&self.unpunched);
        for index in first.0..first.0 + pages {
            if keeps_pages {
                let is_there = all.get(index as usize).is_some_and(Option::is_some);
                is_there.then(|| unpunched.insert(index));
                continue;
            }
            unpunched.remove(&index);
            let regions = sync::lock(&self.regions);
            regions
                .iter()
                .for_each(|region| region.lose_zero_page(PoolPage(index)));
            if let Some(page) = all.get_mut(index as usize) {
                *page = None;
            }
        }
        match keeps_pages {
            true => Err(io::Error::from(io::ErrorKind::OutOfMemory)),
            false => Ok(()),
        }
    }
}
