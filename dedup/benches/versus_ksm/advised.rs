//! Both engines at the pace that their advisors find, with the same target: what a domain costs that
//! is all merged and hardly written to, and how soon clones that come all at once are merged.

use std::io;
use std::time::{Duration, Instant};

use dedup::PAGE_SIZE_BYTES;

use crate::measure::{Figures, float, go_on, merge, wait_for};
use crate::peer::{Peer, write_word};
use crate::random::Random;
use crate::workload::Workload;

/// Clones that come at once.
const BURST_REGIONS: usize = 4;

/// Longest that they may take to be merged.
const BURST_MAX: Duration = Duration::from_secs(60);

/// For KSM's advisor, which corrects itself from scan to scan, to find its pace.
const SETTLING: Duration = Duration::from_secs(16);

/// A hundredth of all pages is written to each second, in the last region, which has no equal: what
/// is shared stays so, and can be counted.
struct Steady {
    random: Random,
    region: usize,
    pages: usize,
    pages_per_s: usize,
}

impl Steady {
    const SLICES_PER_S: u32 = 50;

    fn new(workload: &Workload) -> Steady {
        let pages: usize = workload.regions.iter().map(Vec::len).sum();
        let region = workload.regions.len() - 1;
        Steady {
            random: Random::new(3),
            region,
            pages: workload.regions[region].len(),
            pages_per_s: pages / 100,
        }
    }

    /// Writes for `window`, or until `done`. Returns how long it was.
    fn write(
        &mut self,
        peer: &dyn Peer,
        window: Duration,
        done: impl Fn() -> io::Result<bool>,
    ) -> io::Result<Duration> {
        let start = peer.region_starts()[self.region];
        let begun = Instant::now();
        let mut slice = 0;
        while begun.elapsed() < window && !done()? {
            go_on()?;
            for _ in 0..self.pages_per_s / Self::SLICES_PER_S as usize {
                let page = self.random.below(self.pages);
                let value = self.random.below(usize::MAX >> 12);
                write_word(start, page, 511, value as u64);
                peer.wrote(self.region, page);
            }
            slice += 1;
            let next = Duration::from_secs(1) / Self::SLICES_PER_S * slice;
            wait_for(next.saturating_sub(begun.elapsed()));
        }
        Ok(begun.elapsed())
    }
}

/// CPU while calm, and time and CPU for a burst of clones, with an advisor that is to have visited
/// what is due in `target_ms`.
pub(crate) fn advised(
    peer: &mut dyn Peer,
    workload: &Workload,
    target_ms: u32,
    window: Duration,
) -> io::Result<Figures> {
    merge(peer, &workload.oracle())?;
    peer.advise(target_ms)?;
    let mut steady = Steady::new(workload);
    steady.write(peer, SETTLING, || Ok(false))?;

    let before_ns = peer.cpu_ns()?;
    let calm = steady.write(peer, window, || Ok(false))?;
    let calm_cpu_s = float(peer.cpu_ns()? - before_ns) / 1e9;

    let merged_before = peer.progress()?.given_back_pages;
    (0..BURST_REGIONS).try_for_each(|_| peer.add(workload, 0))?;
    // What was merged while the clones were still coming counts, their memory does not.
    let pages = (BURST_REGIONS * workload.regions[0].len()) as u64;
    let target = merged_before + pages * 99 / 100;
    let before_ns = peer.cpu_ns()?;
    let is_done = || Ok(peer.progress()?.given_back_pages >= target);
    let burst = steady.write(peer, BURST_MAX, is_done)?;
    let burst_cpu_s = float(peer.cpu_ns()? - before_ns) / 1e9;
    let burst_pages = peer
        .progress()?
        .given_back_pages
        .saturating_sub(merged_before);

    let all_pages: usize = workload.regions.iter().map(Vec::len).sum();
    let gib = float((all_pages * PAGE_SIZE_BYTES) as u64) / float(1 << 30);
    Ok(Figures::from([
        (
            "rest_cpu_per_gib.1".to_owned(),
            calm_cpu_s / calm.as_secs_f64() / gib,
        ),
        ("burst_wall_to_99pct_s".to_owned(), burst.as_secs_f64()),
        ("burst_cpu_s".to_owned(), burst_cpu_s),
        (
            "burst_reached_fraction".to_owned(),
            float(burst_pages) / float(pages),
        ),
    ]))
}
