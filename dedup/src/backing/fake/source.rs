//! Who tells what the model's regions were written to.

use std::io;

use super::{Call, FakeMemory};
use crate::base::sync;
use crate::pages::dirty::{DirtySource, PageSet};

/// Tells what a region of the model was written to.
#[derive(Debug)]
struct FakeSource(FakeMemory);

impl DirtySource for FakeSource {
    /// Like KVM: a page that is ignored stays in the log, to be told of when it is not.
    fn collect(&self, dirty: &mut PageSet, ignored: &PageSet) -> io::Result<()> {
        *sync::lock(&self.0.ignored) = Some(ignored.clone());
        let all = std::mem::take(&mut *sync::lock(&self.0.written));
        let is_ignored = |page: &u32| ignored.contains(*page);
        let (kept, written): (Vec<u32>, Vec<u32>) = all.into_iter().partition(is_ignored);
        sync::lock(&self.0.written).extend(kept);
        // What it told is lost if it fails.
        self.0.call(Call::Collect)?;
        written.into_iter().for_each(|page| dirty.insert(page));
        Ok(())
    }
}

impl FakeMemory {
    /// Who tells what was written.
    pub(crate) fn source(&self) -> Box<dyn DirtySource> {
        Box::new(FakeSource(self.clone()))
    }

    /// Whether the source was told last to ignore a page.
    pub(crate) fn is_ignored(&self, page: u32) -> bool {
        let ignored = sync::lock(&self.ignored);
        ignored.as_ref().is_some_and(|pages| pages.contains(page))
    }

    /// Has the source name a page that was not written to, as KVM's dirty log does after a read
    /// for which it mapped the page writable.
    pub(crate) fn name_dirty(&self, page: u32) {
        sync::lock(&self.written).push(page);
    }
}
