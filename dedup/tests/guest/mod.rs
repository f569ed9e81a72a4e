//! A guest's hand on its memory, and what the kernel says lies behind it.

#![allow(
    dead_code,
    unreachable_pub,
    clippy::allow_attributes,
    reason = "shared by several test programs, each of which uses a part of it"
)]
#![expect(
    unsafe_code,
    reason = "plays the guest: reads and writes mapped memory"
)]

use std::fs::{self, File};
use std::io::Read;

use dedup::{Mapping, PAGE_WORDS};

fn address(mapping: &Mapping, page: usize, word: usize) -> *mut u64 {
    let words = mapping.as_ptr().cast::<u64>();
    assert!((page + 1) * PAGE_WORDS * 8 <= mapping.size_bytes() && word < PAGE_WORDS);
    words.wrapping_add(page * PAGE_WORDS + word)
}

pub fn write_word(mapping: &Mapping, page: usize, word: usize, content: u64) {
    // SAFETY: the word lies inside the range, which is mapped.
    unsafe { address(mapping, page, word).write_volatile(content) };
}

pub fn read_word(mapping: &Mapping, page: usize, word: usize) -> u64 {
    // SAFETY: the word lies inside the range, which is mapped.
    unsafe { address(mapping, page, word).read_volatile() }
}

/// Writes a page whose content is told by a number.
pub fn write_page(mapping: &Mapping, page: usize, content: u64) {
    for word in 0..PAGE_WORDS {
        write_word(mapping, page, word, content * (word as u64 + 1));
    }
}

/// Checks what [`write_page`] wrote.
pub fn assert_holds(mapping: &Mapping, page: usize, content: u64) {
    for word in 0..PAGE_WORDS {
        let found = read_word(mapping, page, word);
        assert_eq!(found, content * (word as u64 + 1), "page {page}");
    }
}

/// Reads a file into the first pages of a mapping, straight from the kernel.
pub fn read_file(mapping: &Mapping, pages: usize, file: &mut File) {
    let len_bytes = pages * PAGE_WORDS * 8;
    assert!(len_bytes <= mapping.size_bytes());
    // SAFETY: the bytes lie inside the range, which is mapped. The engine replaces pages by equal ones
    // only, and nobody else of the test touches them meanwhile.
    let bytes = unsafe { std::slice::from_raw_parts_mut(mapping.as_ptr(), len_bytes) };
    file.read_exact(bytes).expect("the file is as long");
}

/// Whether a line of `maps` or `smaps` that begins with addresses is about a part of the mapping;
/// `None` for any other line.
fn is_inside(mapping: &Mapping, line: &str) -> Option<bool> {
    let start = mapping.as_ptr().addr();
    let end = start + mapping.size_bytes();
    let (from, to) = line.split(' ').next()?.split_once('-')?;
    let parse = |text| usize::from_str_radix(text, 16).ok();
    Some(parse(from)? < end && start < parse(to)?)
}

/// VMAs that lie in a mapping, by `/proc/self/maps`.
pub fn vmas(mapping: &Mapping) -> usize {
    let maps = fs::read_to_string("/proc/self/maps").expect("maps is there");
    let inside = |line: &&str| is_inside(mapping, line).expect("a range");
    maps.lines().filter(inside).count()
}

/// Bytes of a mapping by a field of `/proc/self/smaps`, as `AnonHugePages`.
pub fn smaps_bytes(mapping: &Mapping, field: &str) -> usize {
    let smaps = fs::read_to_string("/proc/self/smaps").expect("smaps is there");
    let (mut inside, mut bytes) = (false, 0);
    for line in smaps.lines() {
        if let Some(is_inside) = is_inside(mapping, line) {
            inside = is_inside;
        } else if inside
            && let Some((name, kib)) = line.split_once(':')
            && name == field
        {
            let kib = kib.trim().trim_end_matches(" kB");
            bytes += kib.parse::<usize>().expect("a number") * 1024;
        }
    }
    bytes
}

/// The flags of every VMA in a mapping, by `/proc/self/smaps`.
pub fn flags(mapping: &Mapping) -> Vec<String> {
    let smaps = fs::read_to_string("/proc/self/smaps").expect("smaps is there");
    let (mut inside, mut flags) = (false, Vec::new());
    for line in smaps.lines() {
        if let Some(is_inside) = is_inside(mapping, line) {
            inside = is_inside;
        } else if let Some(found) = line.strip_prefix("VmFlags:").filter(|_| inside) {
            flags.push(found.to_owned());
        }
    }
    flags
}
