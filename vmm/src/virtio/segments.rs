//! Guest buffers as a list of ranges, cut without regard to descriptor borders.

use thiserror::Error;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryError};

use super::GuestMemory;

/// A range of guest memory that does not wrap around; whether all of it is memory shows when it is
/// used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) address: GuestAddress,
    pub(crate) length_bytes: u32,
}

/// The list is shorter than what is to be cut off.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("buffers of {have_bytes} bytes, {want_bytes} asked for")]
pub(crate) struct TooShort {
    have_bytes: u64,
    want_bytes: u64,
}

/// Bytes of a piece of a transfer, where pages are smaller: what a device moves before it looks
/// again whether it may go on.
const PIECE_BYTES: u64 = 64 << 10;

/// A part of a transfer that is done at once, if there is memory for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) address: GuestAddress,
    pub(crate) length_bytes: u64,
    /// What the pages come to that it touches, but the first if the piece before ended on it.
    pub(crate) memory_bytes: u64,
}

/// Cuts a range at each multiple of `unit_bytes`.
fn cut(start: u64, end: u64, unit_bytes: u64) -> impl Iterator<Item = (u64, u64)> {
    let mut at = start;
    std::iter::from_fn(move || {
        let next = (at / unit_bytes + 1).saturating_mul(unit_bytes).min(end);
        let piece = (at < end).then_some((at, next));
        at = next;
        piece
    })
}

/// Buffers in the order of their descriptors.
///
/// A driver may cut a request into descriptors as it likes (virtio 1.2, 2.7.4: "the device MUST NOT
/// make assumptions about the particular arrangement of descriptors"), so a header or the status
/// byte is found by counting bytes, never by descriptor.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Segments {
    parts: Vec<Segment>,
}

impl Segments {
    /// Adds a buffer at the end. `None` where it wraps around the end of the address space.
    pub(crate) fn push(&mut self, address: GuestAddress, length_bytes: u32) -> Option<()> {
        address.checked_add(u64::from(length_bytes))?;
        if length_bytes > 0 {
            self.parts.push(Segment {
                address,
                length_bytes,
            });
        }
        Some(())
    }

    pub(crate) fn parts(&self) -> &[Segment] {
        &self.parts
    }

    pub(crate) fn length_bytes(&self) -> u64 {
        self.parts
            .iter()
            .map(|part| u64::from(part.length_bytes))
            .sum()
    }

    /// What is left behind the first `done_bytes`, in pieces that are moved one at a time.
    /// `page_bytes` is what the kernel gives when a page is touched.
    pub(crate) fn pieces(
        &self,
        done_bytes: u64,
        page_bytes: u64,
    ) -> impl Iterator<Item = Piece> + '_ {
        let mut skip_bytes = done_bytes;
        let mut charged_page = None;
        let unit_bytes = page_bytes.max(PIECE_BYTES);
        self.parts
            .iter()
            .flat_map(move |part| {
                let skipped = u32::try_from(skip_bytes)
                    .map_or(part.length_bytes, |skip| skip.min(part.length_bytes));
                skip_bytes -= u64::from(skipped);
                // No wrap: `push` saw that the end of the part does not.
                let start = part.address.0 + u64::from(skipped);
                let end = part.address.0 + u64::from(part.length_bytes);
                cut(start, end, unit_bytes)
            })
            .map(move |(start, end)| {
                let (first, last) = (start / page_bytes, (end - 1) / page_bytes);
                let again = charged_page == Some(first);
                charged_page = Some(last);
                Piece {
                    address: GuestAddress(start),
                    length_bytes: end - start,
                    memory_bytes: (last - first + 1 - u64::from(again)) * page_bytes,
                }
            })
    }

    /// Cuts off and returns the first `want_bytes` bytes.
    pub(crate) fn take_front(&mut self, want_bytes: u64) -> Result<Segments, TooShort> {
        let have_bytes = self.length_bytes();
        if have_bytes < want_bytes {
            return Err(TooShort {
                have_bytes,
                want_bytes,
            });
        }
        let (mut front, mut back) = (Vec::new(), Vec::new());
        let mut left_bytes = want_bytes;
        for part in self.parts.drain(..) {
            // All of the part, where what is left to cut does not fit into its length.
            let cut = u32::try_from(left_bytes)
                .map_or(part.length_bytes, |left| left.min(part.length_bytes));
            left_bytes -= u64::from(cut);
            if cut > 0 {
                front.push(Segment {
                    length_bytes: cut,
                    ..part
                });
            }
            if cut < part.length_bytes {
                // No wrap: `push` saw that the end of the part does not.
                let address = part.address.unchecked_add(u64::from(cut));
                back.push(Segment {
                    address,
                    length_bytes: part.length_bytes - cut,
                });
            }
        }
        self.parts = back;
        Ok(Segments { parts: front })
    }

    /// Cuts off the last byte and returns its address.
    pub(crate) fn take_last_byte(&mut self) -> Result<GuestAddress, TooShort> {
        let too_short = TooShort {
            have_bytes: 0,
            want_bytes: 1,
        };
        let last = self.parts.last_mut().ok_or(too_short)?;
        last.length_bytes -= 1;
        let address = last.address.unchecked_add(u64::from(last.length_bytes));
        if last.length_bytes == 0 {
            self.parts.pop();
        }
        Ok(address)
    }

    /// Fills `bytes` from the start of the buffers, which are at least that long.
    pub(crate) fn read_bytes(
        &self,
        memory: &GuestMemory,
        mut bytes: &mut [u8],
    ) -> Result<(), GuestMemoryError> {
        for part in &self.parts {
            let (now, later) = bytes.split_at_mut(bytes.len().min(part.length_bytes as usize));
            memory.read_slice(now, part.address)?;
            bytes = later;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn segments(lengths: &[u32]) -> Segments {
        let mut segments = Segments::default();
        for (index, &length_bytes) in lengths.iter().enumerate() {
            segments
                .push(GuestAddress(0x1_0000 * index as u64), length_bytes)
                .unwrap();
        }
        segments
    }

    /// The naive view: the address of every byte.
    fn addresses(segments: &Segments) -> Vec<u64> {
        let bytes = |part: &Segment| {
            let start = part.address.0;
            start..start + u64::from(part.length_bytes)
        };
        segments.parts().iter().flat_map(bytes).collect()
    }

    proptest! {
        #[test]
        fn cutting_keeps_every_byte_in_order(
            lengths in prop::collection::vec(0..40_u32, 0..8),
            want in 0..200_u64,
        ) {
            let whole = segments(&lengths);
            let mut back = whole.clone();
            match back.take_front(want) {
                Ok(front) => {
                    let joined = [addresses(&front), addresses(&back)].concat();
                    prop_assert_eq!(front.length_bytes(), want);
                    prop_assert_eq!(joined, addresses(&whole));
                }
                Err(_) => {
                    prop_assert!(whole.length_bytes() < want);
                    prop_assert_eq!(back, whole);
                }
            }
        }

        #[test]
        fn pieces_are_what_is_left_in_order_and_count_each_page(
            lengths in prop::collection::vec(0..300_000_u32, 0..6),
            done in 0..2_000_000_u64,
            page_shift in prop::sample::select(vec![12_u32, 21]),
        ) {
            let whole = segments(&lengths);
            let page_bytes = 1 << page_shift;
            let done = done.min(whole.length_bytes());
            let mut back = whole.clone();
            back.take_front(done).unwrap();
            let (mut last_page, mut memory_bytes) = (None, 0);
            for piece in whole.pieces(done, page_bytes) {
                prop_assert!((1..=page_bytes.max(PIECE_BYTES)).contains(&piece.length_bytes));
                let front = back.take_front(piece.length_bytes).unwrap();
                prop_assert_eq!(front.parts().len(), 1);
                prop_assert_eq!(front.parts()[0].address, piece.address);
                let end = piece.address.0 + piece.length_bytes;
                let mut at = piece.address.0;
                while at < end {
                    let page = at / page_bytes;
                    memory_bytes += if last_page == Some(page) { 0 } else { page_bytes };
                    last_page = Some(page);
                    at = (page + 1) * page_bytes;
                }
                prop_assert_eq!(piece.memory_bytes, memory_bytes);
                memory_bytes = 0;
            }
            prop_assert_eq!(back.length_bytes(), 0);
        }

        #[test]
        fn the_last_byte_is_the_last_byte(lengths in prop::collection::vec(0..40_u32, 0..8)) {
            let mut rest = segments(&lengths);
            let mut expected = addresses(&rest);
            let last = rest.take_last_byte().ok().map(|address| address.0);
            prop_assert_eq!(last, expected.pop());
            prop_assert_eq!(addresses(&rest), expected);
        }
    }

    #[test]
    fn a_buffer_that_wraps_around_is_refused() {
        let mut segments = Segments::default();
        assert_eq!(segments.push(GuestAddress(u64::MAX), 1), None);
        assert_eq!(segments.push(GuestAddress(u64::MAX - 1), 1), Some(()));
    }
}
