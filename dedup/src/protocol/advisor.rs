//! The advisor: finds the pages of a batch by itself, so that what is due is visited in time.
//!
//! KSM's scan-time advisor looks at how long the last scans of all memory took and corrects the
//! next one by the ratio, smoothed. Here the engine knows at each moment how many pages are due,
//! which with a dirty log is what was written to and not all of memory; so the advisor spreads
//! what is left of it over what is left of the target time, and a burst of writes is answered in
//! the same pass.

use std::time::Duration;

use crate::base::pace::Pace;
use crate::protocol::stopwatch::Spent;

/// Share of a CPU that the advisor takes while anything is left to visit, if the cap allows it. The
/// target time is the latest: a burst costs the same whenever it is visited, and memory that is
/// merged early is there early. A pass with nothing due takes nothing in any case.
const PROMPT_CPU_PERCENT: u32 = 25;

/// What is known of the pass in hand, and of what pages cost.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Advisor {
    /// CPU time of a visited page in picoseconds, smoothed; 0 before the first.
    page_cpu_ps: u64,
    /// The last batch's time on the clock, smoothed.
    batch_wall: Duration,
    /// Of the pass in hand: pages visited, and time gone by, pauses included.
    visited_pages: u64,
    elapsed: Duration,
}

/// KSM's weight of the latest measurement, 30 %.
fn smoothed(before: u64, latest: u64) -> u64 {
    if before == 0 {
        return latest;
    }
    (before.saturating_mul(7)).saturating_add(latest.saturating_mul(3)) / 10
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

impl Advisor {
    /// Takes note of a batch of `pages` visits, and whether a pass ended with it.
    pub(crate) fn note_batch(&mut self, pages: u64, spent: Spent, ended_pass: bool) {
        if let Some(latest_ps) = nanos(spent.cpu).saturating_mul(1000).checked_div(pages) {
            self.page_cpu_ps = smoothed(self.page_cpu_ps, latest_ps);
        }
        let wall_ns = smoothed(nanos(self.batch_wall), nanos(spent.wall));
        self.batch_wall = Duration::from_nanos(wall_ns);
        self.visited_pages += pages;
        self.elapsed += spent.wall;
        if ended_pass {
            (self.visited_pages, self.elapsed) = (0, Duration::ZERO);
        }
    }

    /// Takes note of a pause.
    pub(crate) fn note_pause(&mut self, pause: Duration) {
        if self.visited_pages > 0 {
            self.elapsed += pause;
        }
    }

    /// How many pages the next batch should have, if `due_pages` are to be visited in a pass.
    pub(crate) fn pages_to_scan(&self, pace: &Pace, due_pages: u64) -> u32 {
        let target = Duration::from_millis(u64::from(pace.target_scan_time_ms));
        let sleep = Duration::from_millis(u64::from(pace.sleep_millisecs));
        let cycle = (sleep + self.batch_wall).max(Duration::from_micros(100));
        let batches_left = nanos(target.saturating_sub(self.elapsed)) / nanos(cycle);
        let left_pages = due_pages.saturating_sub(self.visited_pages);
        let in_time_pages = left_pages.div_ceil(batches_left.max(1));
        let pages_for = |percent: u32| {
            let cpu_ps = nanos(cycle) / 100 * u64::from(percent) * 1000;
            cpu_ps.checked_div(self.page_cpu_ps)
        };
        let prompt_pages = pages_for(PROMPT_CPU_PERCENT).unwrap_or(0).min(left_pages);
        let affordable_pages = pages_for(pace.cpu_percent()).unwrap_or(u64::MAX);
        let wanted_pages = in_time_pages.max(prompt_pages).min(affordable_pages);
        let pages = u32::try_from(wanted_pages).unwrap_or(u32::MAX);
        // Whatever somebody may have set: neither bound may be below one page.
        let max = pace.advisor_max_pages_to_scan.max(1);
        pages.clamp(pace.advisor_min_pages_to_scan.clamp(1, max), max)
    }
}

/// How long to rest at least after a batch that took `cpu`, for a share of `percent` of one CPU.
pub(crate) fn rest(cpu: Duration, percent: u32) -> Duration {
    let percent = percent.clamp(1, 100);
    cpu * (100 - percent) / percent
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::pace::AdvisorMode;
    use proptest::prelude::*;

    fn pace() -> impl Strategy<Value = Pace> {
        (
            0..50u32,
            1..=100u32,
            1..20_000u32,
            1..2000u32,
            0..100_000u32,
        )
            .prop_map(|(sleep, cpu, target, min, more)| Pace {
                sleep_millisecs: sleep,
                max_cpu_percent: cpu,
                advisor_mode: AdvisorMode::ScanTime,
                target_scan_time_ms: target,
                advisor_min_pages_to_scan: min,
                advisor_max_pages_to_scan: min + more,
                ..Pace::default()
            })
    }

    /// Runs passes over `due_pages` that cost `page_ns` each. Time and CPU time of the last one.
    fn simulate(pace: &Pace, due_pages: u64, page_ns: u64, passes: u32) -> Spent {
        let mut advisor = Advisor::default();
        let mut last = Spent::default();
        for _ in 0..passes {
            (last, advisor) = (Spent::default(), advisor);
            let mut left_pages = due_pages;
            while left_pages > 0 {
                let pages = u64::from(advisor.pages_to_scan(pace, due_pages)).min(left_pages);
                left_pages -= pages;
                let cpu = Duration::from_nanos(pages * page_ns);
                let spent = Spent { cpu, wall: cpu };
                advisor.note_batch(pages, spent, left_pages == 0);
                let sleep = Duration::from_millis(u64::from(pace.sleep_millisecs));
                let pause = sleep.max(rest(cpu, pace.cpu_percent()));
                advisor.note_pause(pause);
                last.cpu += cpu;
                last.wall += cpu + pause;
            }
        }
        last
    }

    proptest! {
        #[test]
        fn a_batch_is_within_its_bounds(
            pace in pace(),
            due_pages: u32,
            batches in proptest::collection::vec((0..100_000u64, 0..1_000_000_000u64, any::<bool>()), 0..20),
        ) {
            let mut advisor = Advisor::default();
            for (pages, ns, ended) in batches {
                let time = Duration::from_nanos(ns);
                advisor.note_batch(pages, Spent { cpu: time, wall: time }, ended);
                let advised = advisor.pages_to_scan(&pace, u64::from(due_pages));
                prop_assert!(advised >= pace.advisor_min_pages_to_scan);
                prop_assert!(advised <= pace.advisor_max_pages_to_scan);
                let more = advisor.pages_to_scan(&pace, u64::from(due_pages) * 2);
                prop_assert!(more >= advised, "more is due, fewer are advised");
            }
        }

        #[test]
        fn a_pass_never_takes_more_than_its_share_of_a_cpu(
            pace in pace(),
            due_pages in 1000..1_000_000u64,
            page_ns in 200..5000u64,
        ) {
            let pass = simulate(&pace, due_pages, page_ns, 2);
            let share = pass.cpu.as_secs_f64() / pass.wall.as_secs_f64();
            prop_assert!(share <= f64::from(pace.max_cpu_percent) / 100.0 + 0.01, "{share}");
        }

        #[test]
        fn what_is_due_is_visited_in_the_target_time_if_the_cap_allows_it(
            sleep in 1..30u32,
            target in 500..20_000u32,
            cpu_percent_needed in 0..50u64,
            page_ns in 10..2000u64,
        ) {
            let pace = Pace {
                sleep_millisecs: sleep,
                max_cpu_percent: 70,
                advisor_mode: AdvisorMode::ScanTime,
                target_scan_time_ms: target,
                advisor_max_pages_to_scan: u32::MAX,
                ..Pace::default()
            };
            let target = Duration::from_millis(u64::from(target));
            let due_pages = nanos(target) / 100 * cpu_percent_needed / page_ns;
            let pass = simulate(&pace, due_pages, page_ns, 4);
            let slack = target.mul_f64(0.25) + Duration::from_millis(100);
            prop_assert!(pass.wall <= target + slack, "{:?} for {target:?}", pass.wall);
        }
    }

    #[test]
    fn a_burst_is_over_long_before_the_target_if_it_takes_little() {
        let pace = Pace {
            advisor_mode: AdvisorMode::ScanTime,
            target_scan_time_ms: 20_000,
            advisor_max_pages_to_scan: u32::MAX,
            ..Pace::default()
        };
        // 100 ms of CPU time.
        let pass = simulate(&pace, 50_000, 2_000, 3);
        assert!(pass.wall < Duration::from_secs(1), "{pass:?}");
        let share = pass.cpu.as_secs_f64() / pass.wall.as_secs_f64();
        assert!((0.1..0.35).contains(&share), "{share}");
    }

    #[test]
    fn with_nothing_due_a_batch_is_as_small_as_it_may_be() {
        let pace = Pace {
            advisor_mode: AdvisorMode::ScanTime,
            ..Pace::default()
        };
        let advised = Advisor::default().pages_to_scan(&pace, 0);
        assert_eq!(advised, pace.advisor_min_pages_to_scan);
    }

    #[test]
    fn a_share_of_a_cpu_is_kept_by_resting() {
        let cpu = Duration::from_millis(3);
        assert_eq!(rest(cpu, 100), Duration::ZERO);
        assert_eq!(rest(cpu, 75), Duration::from_millis(1));
        assert_eq!(rest(cpu, 0), Duration::from_millis(297));
    }
}
