//! How long a VM's memory takes to go while the worker is in the middle of a batch.
//!
//! Ours only: what kernel KSM does at an exit happens inside `munmap` and `exit_mmap`, which cannot
//! be told apart from freeing the memory.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use dedup::{ExitPath, RegionHandle};

use crate::measure::{Figures, float, go_on, merge, wait_for};
use crate::peer::{Peer, Samepage, Written, filled, rewrite_word};
use crate::random::Random;
use crate::workload::Workload;

/// Pages of the region that comes and goes.
const LEAVING_PAGES: usize = 1024;

/// Pages of the others written to each millisecond, with what they hold already: that breaks their
/// sharing and has the worker merge them again.
const DIRTIED_PAGES_PER_MS: usize = 32;

/// Latencies of `exits` exits, in microseconds, while the regions of `workload` are written to and
/// merged.
pub(crate) fn exits(workload: &Workload, exits: usize) -> io::Result<Figures> {
    let mut peer = Samepage::new(workload)?;
    merge(&mut peer, &workload.oracle())?;
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| dirty(&peer, workload, &done));
        let latencies = leave_again_and_again(&peer, workload, exits);
        done.store(true, Ordering::Relaxed);
        latencies
    })
}

fn dirty(peer: &Samepage, workload: &Workload, done: &AtomicBool) {
    let starts = peer.region_starts();
    let mut random = Random::new(5);
    while !done.load(Ordering::Relaxed) {
        for _ in 0..DIRTIED_PAGES_PER_MS {
            let region = random.below(starts.len());
            // Not what the region that comes and goes is a clone of: what all others are busy with
            // is not shared at all.
            let page = LEAVING_PAGES + random.below(workload.regions[region].len() - LEAVING_PAGES);
            rewrite_word(starts[region], page, 511);
            peer.wrote(region, page);
        }
        wait_for(Duration::from_millis(1));
    }
}

fn leave_again_and_again(
    peer: &Samepage,
    workload: &Workload,
    exits: usize,
) -> io::Result<Figures> {
    // A clone of the beginning of the others, so that there is something to merge it with.
    let leaving = Workload {
        regions: vec![workload.regions[0][..LEAVING_PAGES].to_vec()],
        has_huge_pages: false,
    };
    let mut random = Random::new(9);
    let mut latencies_us = Vec::with_capacity(exits);
    let mut handed_over = 0;
    for _ in 0..exits {
        go_on()?;
        let mapping = filled(&leaving, 0)?;
        let region = peer
            .engine
            .register_watched(mapping, Box::new(Written::default()))
            .map_err(io::Error::other)?;
        let pages = 1 + random.below(LEAVING_PAGES / 2);
        wait_for_merged(&region, pages as u64)?;
        let begun = Instant::now();
        let path = region.exit();
        latencies_us.push(begun.elapsed().as_secs_f64() * 1e6);
        handed_over += u64::from(path == ExitPath::HandedOver);
    }
    latencies_us.sort_by(f64::total_cmp);
    let at = |per_mille: usize| latencies_us[(latencies_us.len() - 1) * per_mille / 1000];
    Ok(Figures::from([
        ("exit_us.p50".to_owned(), at(500)),
        ("exit_us.p99".to_owned(), at(990)),
        ("exit_us.max".to_owned(), at(1000)),
        (
            "handed_over_fraction".to_owned(),
            float(handed_over) / float(exits as u64),
        ),
    ]))
}

/// Waits until so many of the region's pages are merged: at most of these moments the worker is in
/// the middle of the region.
fn wait_for_merged(region: &RegionHandle, pages: u64) -> io::Result<()> {
    let until = Instant::now() + Duration::from_secs(30);
    while region.stats().pages_merging < pages {
        go_on()?;
        if Instant::now() > until {
            return Err(io::Error::other("a clone is not merged in 30 s"));
        }
        std::hint::spin_loop();
    }
    Ok(())
}
