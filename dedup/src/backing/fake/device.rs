//! A device that uses pages of the model by their frames.

use super::{Content, FakeMemory, FakePage};
use crate::base::page::PageRange;
use crate::base::sync;

impl FakeMemory {
    /// Gives a device the frames of pages, which are private.
    pub(crate) fn hold_frames(&self, pages: PageRange) {
        sync::lock(&self.held).extend(pages);
    }

    /// Takes all frames back.
    pub(crate) fn let_frames_go(&self) {
        sync::lock(&self.held).clear();
    }

    /// A write by the device: protection does not stop it.
    pub(crate) fn write_by_device(&self, page: u32, content: Content) {
        assert!(sync::lock(&self.held).contains(&page), "no device has it");
        let page = &mut sync::lock(&self.pages)[page as usize];
        assert!(matches!(page, FakePage::Private(_)), "not its frame");
        *page = FakePage::Private(content);
    }

    /// Puts something else in place of a page.
    pub(super) fn put(&self, page: u32, with: FakePage) {
        let is_held = sync::lock(&self.held).contains(&page);
        assert!(!is_held, "page {page} is replaced while a device uses it");
        sync::lock(&self.pages)[page as usize] = with;
    }
}
