//! Where guest memory is in a server's address space. Pure.
//!
//! A guest's memory is one range of private mappings: anonymous ones, and of the pool. Guests touch
//! each other, and other memory of the server may touch them, so mappings alone do not tell where
//! one begins. What does: a guest begins at a multiple of 2 MiB, and has the pointer to its MP table
//! at one address, where no kernel overwrites it.

use vmm::memory::layout::EBDA_ADDRESS;

/// What guest memory begins at a multiple of.
const ALIGNMENT_BYTES: u64 = 2 << 20;
/// What the pool is called in `/proc/PID/maps`.
pub(crate) const POOL: &str = "/memfd:samepage-pool";
/// Where a guest's mark is.
pub(crate) const MARK_ADDRESS: u64 = EBDA_ADDRESS;
/// Length of the mark.
pub(crate) const MARK_BYTES: usize = 10;

/// A place in the pool's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PoolPlace {
    pub(crate) inode: u64,
    pub(crate) offset: u64,
}

/// One mapping that may be guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) start: u64,
    pub(crate) end: u64,
    /// Where in the pool it is mapped to; none if it is anonymous.
    pub(crate) pool: Option<PoolPlace>,
}

impl Part {
    /// The part of it that lies in a range; none if there is none.
    pub(crate) fn within(&self, start: u64, end: u64) -> Option<Part> {
        let part = Part {
            start: self.start.max(start),
            end: self.end.min(end),
            pool: self.pool.map(|place| PoolPlace {
                offset: place.offset + start.saturating_sub(self.start),
                ..place
            }),
        };
        (part.start < part.end).then_some(part)
    }
}

/// A guest's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct GuestRange {
    pub(crate) start: u64,
    pub(crate) end: u64,
}

/// The mappings that may be guest memory, from a text as `/proc/PID/maps`.
pub(crate) fn parts(maps: &str) -> Vec<Part> {
    maps.lines().filter_map(part).collect()
}

/// From `7f00-7f01 rw-p 00003000 00:01 1025 /memfd:samepage-pool (deleted)`.
fn part(line: &str) -> Option<Part> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    // The pool's shared view is no guest's.
    fields.next().filter(|&rights| rights == "rw-p")?;
    let offset = hex(fields.next()?)?;
    let inode = fields.nth(1)?.parse().ok()?;
    let pool = match fields.next() {
        None => None,
        Some(POOL) => Some(PoolPlace { inode, offset }),
        // Named anonymous memory is somebody's who names it.
        Some(_) => return None,
    };
    Some(Part {
        start: hex(start)?,
        end: hex(end)?,
        pool,
    })
}

/// Ranges of parts without a gap between them, in ascending order.
fn ranges(parts: &[Part]) -> Vec<GuestRange> {
    let mut ranges: Vec<GuestRange> = Vec::new();
    for part in parts {
        match ranges.last_mut() {
            Some(last) if last.end == part.start => last.end = part.end,
            _ => ranges.push(GuestRange {
                start: part.start,
                end: part.end,
            }),
        }
    }
    ranges
}

/// Guests of any of the given sizes, in ascending order of addresses. `mark_at` reads the bytes at
/// an address, none where there is no memory.
pub(crate) fn guests<E>(
    parts: &[Part],
    sizes_bytes: &[u64],
    mut mark_at: impl FnMut(u64) -> Result<Option<[u8; MARK_BYTES]>, E>,
) -> Result<Vec<GuestRange>, E> {
    let mut found = Vec::new();
    for range in ranges(parts) {
        let mut starts = Vec::new();
        let mut start = range.start.next_multiple_of(ALIGNMENT_BYTES);
        while start + MARK_ADDRESS + (MARK_BYTES as u64) <= range.end {
            if mark_at(start + MARK_ADDRESS)? == Some(mark()) {
                starts.push(start);
            }
            start += ALIGNMENT_BYTES;
        }
        for (index, &start) in starts.iter().enumerate() {
            let end_max = starts.get(index + 1).copied().unwrap_or(range.end);
            let fitting = sizes_bytes.iter().filter(|&&size| start + size <= end_max);
            if let Some(size) = fitting.max() {
                let end = start + size;
                found.push(GuestRange { start, end });
            }
        }
    }
    Ok(found)
}

/// The floating pointer to the MP table behind it: signature, address, length, revision
/// (MultiProcessor Specification 1.4, 4.1).
pub(crate) fn mark() -> [u8; MARK_BYTES] {
    const POINTER_BYTES: u64 = 16;
    let mut mark = *b"_MP_\0\0\0\0\x01\x04";
    let table = EBDA_ADDRESS + POINTER_BYTES;
    mark[4..8].copy_from_slice(&table.to_le_bytes()[..4]);
    mark
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn found(maps: &str, sizes_bytes: &[u64], starts: &[u64]) -> Vec<(u64, u64)> {
        let mark_at = |address: u64| {
            let is_marked = starts.iter().any(|start| start + MARK_ADDRESS == address);
            Ok::<_, Infallible>(is_marked.then(mark))
        };
        let Ok(guests) = guests(&parts(maps), sizes_bytes, mark_at);
        guests
            .iter()
            .map(|guest| (guest.start, guest.end))
            .collect()
    }

    #[test]
    fn private_memory_and_the_pool_may_be_guests() {
        let maps = "\
7f0000000000-7f0000200000 rw-p 00000000 00:00 0 
7f0000200000-7f0000201000 rw-p 00003000 00:01 1025                       /memfd:samepage-pool (deleted)
7f0000300000-7f0000400000 rw-s 00000000 00:01 1025                       /memfd:samepage-pool (deleted)
7f0000400000-7f0000500000 r--p 00000000 00:00 0 
55d0a0000000-55d0a0021000 rw-p 00000000 00:00 0                          [heap]
";
        let place = PoolPlace {
            inode: 1025,
            offset: 0x3000,
        };
        let expected = [
            Part {
                start: 0x7f00_0000_0000,
                end: 0x7f00_0020_0000,
                pool: None,
            },
            Part {
                start: 0x7f00_0020_0000,
                end: 0x7f00_0020_1000,
                pool: Some(place),
            },
        ];
        assert_eq!(parts(maps), expected);
    }

    #[test]
    fn the_rest_of_a_part_goes_on_in_the_pool() {
        let part = Part {
            start: 0x1000,
            end: 0x5000,
            pool: Some(PoolPlace {
                inode: 1,
                offset: 0x8000,
            }),
        };
        let rest = part.within(0x3000, 0x9000).unwrap();
        assert_eq!((rest.start, rest.end), (0x3000, 0x5000));
        assert_eq!(rest.pool.unwrap().offset, 0xa000);
        assert_eq!(part.within(0x5000, 0x9000), None);
    }

    #[test]
    fn guests_that_touch_each_other_and_other_memory_are_told_apart() {
        // 1 MiB of something else, two guests of 4 MiB in three mappings, 3 MiB of something else.
        let maps = "\
00f00000-01400000 rw-p 00000000 00:00 0 
01400000-01500000 rw-p 00003000 00:01 9 /memfd:samepage-pool (deleted)
01500000-01b00000 rw-p 00000000 00:00 0 
";
        let (first, second) = (16 * MIB, 20 * MIB);
        let guests = found(maps, &[4 * MIB], &[first, second]);
        assert_eq!(guests, [(first, second), (second, 24 * MIB)]);
    }

    #[test]
    fn guests_of_two_sizes_take_what_fits() {
        let maps = "01000000-01e00000 rw-p 00000000 00:00 0 \n";
        let (first, second) = (16 * MIB, 20 * MIB);
        let guests = found(maps, &[8 * MIB, 4 * MIB], &[first, second]);
        assert_eq!(guests, [(first, second), (second, 28 * MIB)]);
    }

    #[test]
    fn memory_without_a_mark_is_no_guest() {
        let maps = "01000000-02000000 rw-p 00000000 00:00 0 \n";
        assert_eq!(found(maps, &[4 * MIB], &[]), []);
    }
}
