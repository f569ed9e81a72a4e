//! A model of memory for tests: the same trait, no kernel, and a look behind the pages.

mod call;
mod device;
mod pool;
mod source;
mod staging;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

pub(crate) use call::Call;
pub(crate) use pool::{FakePool, Moment};
use staging::FakeStaging;

use super::{Backing, Residency};
use crate::base::page::{PAGE_WORDS, PageBuf, PageRange, PoolPage, range_pages};
use crate::base::sync;
use crate::pages::dirty::PageSet;

/// A page's content, told by one word that fills it.
pub(crate) type Content = u64;

/// What lies behind a page of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FakePage {
    Absent,
    /// The kernel's zero page, over a place of the pool.
    Zeros,
    Private(Content),
    /// Mapped to the pool, not written to.
    Shared(PoolPage),
}

/// A region of the model.
#[derive(Clone, Debug)]
pub(crate) struct FakeMemory {
    pages: Arc<Mutex<Vec<FakePage>>>,
    /// The pool page that each page is mapped to, written over or not.
    under: Arc<Mutex<Vec<Option<PoolPage>>>>,
    /// Protected and not released pages.
    protected: Arc<Mutex<Vec<bool>>>,
    pool: FakePool,
    /// Calls of `failing` kinds that still succeed; `fill` and `unshare` make one for each page.
    pub(crate) calls_left: Arc<AtomicU32>,
    /// A set of [`Call`]s: those that take memory, unless told otherwise.
    failing: Arc<AtomicU32>,
    /// It was not told of a huge page, or could not split one.
    keeps_huge: Arc<AtomicBool>,
    /// Writes that the guest makes just before a range is protected.
    racing: Arc<Mutex<Vec<(u32, Content)>>>,
    /// The kernel moves pages about, and says of each that it is swapped.
    pub(crate) moving: Arc<AtomicBool>,
    /// The whole region is one huge page.
    pub(crate) is_huge: Arc<AtomicBool>,
    /// Its exit has freed its pages: nobody looks at them any more.
    freed: Arc<AtomicBool>,
    /// Pages written to since the source was asked last.
    written: Arc<Mutex<Vec<u32>>>,
    /// Pages that nobody wanted to hear of then.
    ignored: Arc<Mutex<Option<PageSet>>>,
    /// Pages whose frames a device has.
    held: Arc<Mutex<Vec<u32>>>,
    /// Pages that their owner gives up just now.
    pub(crate) given_up: Arc<Mutex<PageRange>>,
    /// How many times something was built aside and put in place.
    pub(crate) replaced: Arc<AtomicU32>,
}

impl FakeMemory {
    pub(crate) fn new(pages: u32, pool: &FakePool) -> FakeMemory {
        let over = pool::Over {
            pages: Arc::new(Mutex::new(vec![FakePage::Absent; pages as usize])),
            under: Arc::new(Mutex::new(vec![None; pages as usize])),
        };
        sync::lock(&pool.regions).push(over.clone());
        FakeMemory {
            pages: over.pages,
            under: over.under,
            protected: Arc::new(Mutex::new(vec![false; pages as usize])),
            pool: pool.clone(),
            calls_left: Arc::new(AtomicU32::new(u32::MAX)),
            failing: Arc::new(AtomicU32::new(Call::bits(&Call::TAKING))),
            keeps_huge: Arc::default(),
            racing: Arc::default(),
            moving: Arc::default(),
            is_huge: Arc::default(),
            freed: Arc::default(),
            written: Arc::default(),
            ignored: Arc::default(),
            held: Arc::default(),
            given_up: Arc::default(),
            replaced: Arc::default(),
        }
    }

    /// A write by the guest.
    pub(crate) fn write(&self, page: u32, content: Content) {
        assert!(!self.is_protected(page), "a writer would sleep for ever");
        sync::lock(&self.pages)[page as usize] = FakePage::Private(content);
        sync::lock(&self.written).push(page);
    }

    /// Lets the guest write just before anything is protected next.
    pub(crate) fn write_before_protection(&self, page: u32, content: Content) {
        sync::lock(&self.racing).push((page, content));
    }

    /// Makes the writes that are still due.
    pub(crate) fn finish_racing_writes(&self) {
        let due = std::mem::take(&mut *sync::lock(&self.racing));
        due.into_iter()
            .for_each(|(page, content)| self.write(page, content));
    }

    /// What the guest reads.
    pub(crate) fn content(&self, page: u32) -> Content {
        match self.page(page) {
            FakePage::Absent => {
                // It would show what is filled into the place.
                let under = sync::lock(&self.under)[page as usize];
                let is_freed = self.freed.load(Ordering::Relaxed);
                assert!(
                    under.is_none() || is_freed,
                    "page {page} is absent over {under:?}"
                );
                0
            }
            FakePage::Zeros => 0,
            FakePage::Private(content) => content,
            FakePage::Shared(pool_page) => self
                .pool
                .content(pool_page)
                .expect("a shared page's pool page holds its content"),
        }
    }

    pub(crate) fn page(&self, page: u32) -> FakePage {
        sync::lock(&self.pages)[page as usize]
    }

    pub(crate) fn is_unprotected(&self) -> bool {
        !sync::lock(&self.protected).contains(&true)
    }

    fn is_protected(&self, page: u32) -> bool {
        sync::lock(&self.protected)[page as usize]
    }

    fn set_protected(&self, range: PageRange, protected: bool) {
        for page in range {
            sync::lock(&self.protected)[page as usize] = protected;
        }
    }

    /// Lets calls of these kinds fail after `calls_left` more.
    pub(crate) fn fail(&self, kinds: &[Call], calls_left: u32) {
        self.failing.store(Call::bits(kinds), Ordering::Relaxed);
        self.calls_left.store(calls_left, Ordering::Relaxed);
        let keeps_pages = kinds.contains(&Call::Punch);
        self.pool.keeps_pages.store(keeps_pages, Ordering::Relaxed);
    }

    /// Lets everything succeed again.
    pub(crate) fn recover(&self) {
        self.fail(&Call::TAKING, u32::MAX);
    }

    /// Whether a page may come to show this: what it shows, or zeros if its owner gives it up.
    fn may_show(&self, page: u32, content: Option<Content>) -> bool {
        let is_given_up = sync::lock(&self.given_up).contains(&page);
        let is_freed = self.freed.load(Ordering::Relaxed);
        is_freed || content == Some(self.content(page)) || is_given_up && content == Some(0)
    }

    fn keep_no_part_of_a_huge_page(&self) {
        assert!(
            !self.is_huge.load(Ordering::Relaxed) || self.keeps_huge.load(Ordering::Relaxed),
            "a part of a huge page is not given back"
        );
    }

    fn call(&self, kind: Call) -> io::Result<()> {
        if self.failing.load(Ordering::Relaxed) & Call::bits(&[kind]) == 0 {
            return Ok(());
        }
        call::count_down(&self.calls_left)
    }

    /// Makes one call for each part until one fails, or some are done: the kernel may stop early.
    fn call_for_parts<T>(&self, kind: Call, parts: &[T], change: impl Fn(&T)) -> io::Result<usize> {
        const PARTS_MAX: usize = 3;
        for (done, part) in parts.iter().take(PARTS_MAX).enumerate() {
            match self.call(kind) {
                Err(error) if done == 0 => return Err(error),
                Err(_) => return Ok(done),
                Ok(()) => change(part),
            }
        }
        Ok(parts.len().min(PARTS_MAX))
    }
}

impl Backing for FakeMemory {
    type Pool = FakePool;
    type Staging = FakeStaging;

    fn pages(&self) -> u32 {
        u32::try_from(sync::lock(&self.pages).len()).expect("few pages")
    }

    fn residency(
        &self,
        range: PageRange,
        found: &mut Vec<(PageRange, Residency)>,
    ) -> io::Result<()> {
        self.call(Call::Residency)?;
        for page in range {
            if self.moving.load(Ordering::Relaxed) && self.page(page) != FakePage::Absent {
                found.push((page..page + 1, Residency::Swapped));
                continue;
            }
            // A shared page shows up as absent or as the pool's, by whether it was touched.
            match self.page(page) {
                FakePage::Private(_) => found.push((page..page + 1, Residency::Private)),
                FakePage::Shared(_) if page % 2 == 0 => {
                    found.push((page..page + 1, Residency::Pool));
                }
                FakePage::Zeros => found.push((page..page + 1, Residency::ZeroPage)),
                FakePage::Shared(_) | FakePage::Absent => {}
            }
        }
        Ok(())
    }

    fn has_huge_page(&self, _range: PageRange) -> io::Result<bool> {
        let told = self.call(Call::HasHugePage);
        self.keeps_huge.fetch_or(told.is_err(), Ordering::Relaxed);
        told?;
        Ok(self.is_huge.load(Ordering::Relaxed))
    }

    fn split_huge_page(&self, _page: u32) -> io::Result<()> {
        let split = self.call(Call::SplitHugePage);
        self.keeps_huge.fetch_or(split.is_err(), Ordering::Relaxed);
        split?;
        self.is_huge.store(false, Ordering::Relaxed);
        Ok(())
    }

    fn read(&self, page: u32, into: &mut PageBuf) {
        *into = [self.content(page); PAGE_WORDS];
    }

    fn is_zero(&self, page: u32) -> bool {
        self.content(page) == 0
    }

    fn equals_pool(&self, page: u32, pool: &FakePool, pool_page: PoolPage) -> bool {
        let are_equal = Some(self.content(page)) == pool.content(pool_page);
        self.pool.reach(Moment::Compare);
        are_equal
    }

    fn may_equal_pool(&self, page: u32, pool: &FakePool, pool_page: PoolPage) -> bool {
        // Wrong now and then, as the look at the first bytes is.
        let stable = pool.content(pool_page).unwrap_or(0);
        self.content(page) & 1 == stable & 1
    }

    fn fill(&self, range: PageRange, pool: &FakePool, first: PoolPage) -> io::Result<()> {
        for page in range.clone() {
            self.call(Call::Fill)?;
            assert!(
                !self.is_protected(page),
                "a writer waits while a stable page is filled"
            );
            pool.fill(first.plus(page - range.start), self.content(page));
            pool.reach(Moment::Fill);
        }
        Ok(())
    }

    fn protect(&self, range: PageRange) -> io::Result<()> {
        self.finish_racing_writes();
        if let Err(error) = self.call(Call::Protect) {
            // As far as it got.
            let middle = range.start + (range.end - range.start).div_ceil(2);
            self.set_protected(range.start..middle, true);
            return Err(error);
        }
        self.set_protected(range, true);
        Ok(())
    }

    fn release(&self, range: PageRange, _remapped: bool) {
        self.set_protected(range, false);
    }

    fn discard(&self, parts: &[PageRange]) -> io::Result<usize> {
        let discard = |page: u32| {
            assert!(self.is_protected(page), "dropped without protection");
            let under = sync::lock(&self.under)[page as usize];
            let (shows, left) = match under {
                Some(place) => (self.pool.content(place), FakePage::Shared(place)),
                None => (Some(0), FakePage::Absent),
            };
            assert!(self.may_show(page, shows), "page {page} is changed");
            self.keep_no_part_of_a_huge_page();
            self.put(page, left);
        };
        self.call_for_parts(Call::Discard, parts, |part| {
            part.clone().for_each(discard);
        })
    }

    fn map(&self, pool: &FakePool, range: PageRange, first: PoolPage) -> io::Result<()> {
        self.call(Call::Map)?;
        self.pool.reach(Moment::Map);
        if range_pages(&range) < self.pages() {
            self.keep_no_part_of_a_huge_page();
        }
        for page in range.clone() {
            assert!(self.is_protected(page), "mapped without protection");
            let place = first.plus(page - range.start);
            assert!(
                self.may_show(page, pool.content(place)),
                "page {page} is changed"
            );
            self.put(page, FakePage::Shared(place));
            sync::lock(&self.under)[page as usize] = Some(place);
        }
        Ok(())
    }

    fn stage(
        &self,
        _pool: &FakePool,
        range: PageRange,
        under: Option<PoolPage>,
    ) -> io::Result<FakeStaging> {
        self.call(Call::Stage)?;
        Ok(FakeStaging::new(range, under))
    }

    fn stage_copies(&self, staging: &FakeStaging, pages: PageRange) -> io::Result<()> {
        self.call(Call::StageCopies)?;
        pages.for_each(|page| staging.put(page, FakePage::Private(self.content(page))));
        self.pool.reach(Moment::Stage);
        Ok(())
    }

    fn stage_zeros(&self, staging: &FakeStaging, pages: PageRange) -> io::Result<()> {
        self.call(Call::StageZeros)?;
        pages.for_each(|page| staging.put_zeros(page));
        Ok(())
    }

    fn unstage(&self, staging: &FakeStaging, page: u32) -> io::Result<()> {
        self.call(Call::Unstage)?;
        staging.take(page);
        Ok(())
    }

    fn equals_staged(&self, staging: &FakeStaging, page: u32) -> bool {
        staging.copy_of(page) == self.content(page)
    }

    fn replace(&self, staging: FakeStaging) -> io::Result<()> {
        self.call(Call::Replace)?;
        self.pool.reach(Moment::Replace);
        self.put_in_place(&staging);
        Ok(())
    }

    fn unshare(&self, range: PageRange) -> io::Result<()> {
        self.pool.reach(Moment::Unshare);
        for page in range {
            self.call(Call::Unshare)?;
            let content = self.content(page);
            if !matches!(self.page(page), FakePage::Private(_)) {
                self.put(page, FakePage::Private(content));
            }
        }
        Ok(())
    }

    fn free_all(&self) {
        self.freed.store(true, Ordering::Relaxed);
        for page in sync::lock(&self.pages).iter_mut() {
            *page = FakePage::Absent;
        }
    }
}
