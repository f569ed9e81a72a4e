//! What is built aside in the model.

use std::sync::Mutex;
use std::sync::atomic::Ordering;

use super::{Content, FakeMemory, FakePage};
use crate::base::page::{PageRange, PoolPage};
use crate::base::sync;

/// What is to replace a range of the model, page by page; `None` shows what lies under it.
#[derive(Debug)]
pub(crate) struct FakeStaging {
    range: PageRange,
    under: Option<PoolPage>,
    pages: Mutex<Vec<Option<FakePage>>>,
}

impl FakeStaging {
    pub(super) fn new(range: PageRange, under: Option<PoolPage>) -> FakeStaging {
        FakeStaging {
            pages: Mutex::new(vec![None; range.len()]),
            range,
            under,
        }
    }

    pub(super) fn put(&self, page: u32, put: FakePage) {
        let staged = &mut sync::lock(&self.pages)[(page - self.range.start) as usize];
        assert_eq!(*staged, None, "page {page} is there already");
        *staged = Some(put);
    }

    pub(super) fn put_zeros(&self, page: u32) {
        let zeros = match self.under {
            Some(_) => FakePage::Zeros,
            None => FakePage::Absent,
        };
        self.put(page, zeros);
    }

    pub(super) fn take(&self, page: u32) {
        let index = (page - self.range.start) as usize;
        let before = sync::lock(&self.pages)[index].take();
        assert!(before.is_some(), "page {page} is not there");
    }

    pub(super) fn copy_of(&self, page: u32) -> Content {
        let staged = sync::lock(&self.pages)[(page - self.range.start) as usize];
        let Some(FakePage::Private(copy)) = staged else {
            panic!("whoever looks at page {page} would sleep: {staged:?}")
        };
        copy
    }
}

impl FakeMemory {
    /// Puts what was built in place.
    pub(super) fn put_in_place(&self, staging: &FakeStaging) {
        let staged = sync::lock(&staging.pages).clone();
        for (page, staged) in staging.range.clone().zip(staged) {
            assert!(self.is_protected(page), "replaced without protection");
            let place = staging
                .under
                .map(|first| first.plus(page - staging.range.start));
            let (shows, new) = match (staged, place) {
                (Some(FakePage::Private(copy)), _) => (Some(copy), FakePage::Private(copy)),
                (Some(zeros), _) => (Some(0), zeros),
                (None, Some(place)) => (self.pool.content(place), FakePage::Shared(place)),
                (None, None) => (Some(0), FakePage::Absent),
            };
            assert!(self.may_show(page, shows), "page {page} is changed");
            self.put(page, new);
            sync::lock(&self.under)[page as usize] = place;
        }
        self.is_huge.store(false, Ordering::Relaxed);
        self.replaced.fetch_add(1, Ordering::Relaxed);
    }
}
