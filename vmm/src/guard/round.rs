//! What the guard's thread does in a look: ask, judge, act.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::gauge::{self, Gauge, Limit};
use super::held::Held;
use super::policy::{self, Action, Candidate, Policy, Sight, victim};
use super::{ACTING, HELPLESS, Watch};
use crate::state::EndReason;
use crate::vm::Vm;

/// How long the end of a VM is waited for before the next one is chosen.
const END_PATIENCE: Duration = Duration::from_secs(10);
/// Time between two questions for the pressure.
const PRESSURE_INTERVAL: Duration = Duration::from_secs(1);

/// Time between two questions whether the process was moved into another cgroup.
const MOVE_INTERVAL: Duration = Duration::from_millis(400);
/// The same where memory is short: the answer may wait for whoever changes the host's cgroups.
const MOVE_INTERVAL_SHORT: Duration = Duration::from_secs(2);

/// One guard's looks, and what it remembers between them.
pub(super) struct Round<'a> {
    watch: &'a Arc<Watch>,
    gauge: Gauge,
    policy: Policy,
    begun: Instant,
    /// What the worker was told last.
    hurries: bool,
    /// PSI, and when it was asked for.
    pressure: Option<(Instant, f64)>,
    /// When it was asked last whether the process was moved.
    moves_asked: Instant,
    was_short: bool,
}

impl<'a> Round<'a> {
    pub(super) fn new(watch: &'a Arc<Watch>, gauge: Gauge) -> Round<'a> {
        Round {
            watch,
            policy: gauge.policy(),
            gauge,
            begun: Instant::now(),
            hurries: false,
            pressure: None,
            moves_asked: Instant::now(),
            was_short: false,
        }
    }

    /// One look, and what it asks for. Returns the time until the next.
    pub(super) fn look(&mut self) -> Duration {
        let budget_bytes = self.watch.engine.memory_budget_bytes();
        if budget_bytes.is_some() && self.gauge.wants_count(budget_bytes) {
            self.watch.count(&self.gauge);
        }
        self.follow_moves();
        self.ask_pressure();
        if gauge::expects_huge_pages() {
            self.policy.expect_huge_pages();
        }
        let mut sight = self.note();
        let action = self.policy.action(self.begun.elapsed(), &sight);
        let mut is_helpless = false;
        if action == Action::StopVictim {
            is_helpless = !self.make_room(sight);
            self.policy.begin_anew();
            sight = self.note();
        }
        self.watch.room.grant(self.policy.grant_bytes(&sight));
        self.tell_worker(action != Action::Rest);
        let next = self.policy.next_look(&sight);
        if is_helpless {
            next.max(HELPLESS)
        } else {
            next
        }
    }

    /// Looks whether the process was moved, now and then.
    fn follow_moves(&mut self) {
        let interval = if self.was_short {
            MOVE_INTERVAL_SHORT
        } else {
            MOVE_INTERVAL
        };
        if self.moves_asked.elapsed() < interval {
            return;
        }
        self.moves_asked = Instant::now();
        if self.gauge.follow_moves() {
            // Another group's figures say nothing of growth.
            self.policy.begin_anew();
        }
    }

    /// Looks, and has the policy take note of it.
    fn note(&mut self) -> Sight {
        let sight = self.sight();
        self.was_short = sight.filled.is_some_and(policy::Filled::is_short);
        self.policy.note(self.begun.elapsed(), &sight);
        sight
    }

    /// Has the worker hurry, or not any more. If its orders are in use the next look tells it.
    fn tell_worker(&mut self, hurry: bool) {
        if hurry != self.hurries && self.watch.engine.try_set_hurry(hurry) {
            self.hurries = hurry;
        }
    }

    /// Asks for the pressure if the answer is old: the kernel averages it over 10 s.
    fn ask_pressure(&mut self) {
        let is_fresh = |(at, _): (Instant, f64)| at.elapsed() < PRESSURE_INTERVAL;
        if !self.pressure.is_some_and(is_fresh) {
            let percent = self.gauge.pressure_percent();
            self.pressure = Some((Instant::now(), percent));
        }
    }

    fn sight(&self) -> Sight {
        let watch = self.watch;
        let nearest = self.gauge.nearest(watch.engine.memory_budget_bytes());
        let filled = nearest.map(|(_, filled)| filled);
        let is_short = filled.is_some_and(policy::Filled::is_short);
        // Asked for in any case: what happened while there was plenty is over.
        let is_out = self.gauge.is_out();
        Sight {
            filled,
            limit: nearest.map(|(limit, _)| limit),
            spoken_for_bytes: nearest.map_or(0, |(limit, _)| self.spoken_for_bytes(limit)),
            domains: gauge::domains(),
            pressure_percent: self.pressure.map_or(0.0, |(_, percent)| percent),
            is_out: is_short && is_out,
            is_starving: watch.unmerge_victims() && watch.engine.memory_waited_for_bytes() > 0,
        }
    }

    /// What is taken of `limit` for certain, or may be taken already, and does not show in its
    /// figure.
    fn spoken_for_bytes(&self, limit: Limit) -> u64 {
        let uncounted_bytes = match limit {
            Limit::Budget => self.gauge.uncounted_bytes(),
            Limit::Cgroup => 0,
        };
        self.watch.reserved_bytes(limit) + uncounted_bytes
    }

    /// Holds all who share the limit and ends VMs until use is below the line, and one at least for
    /// an unmerge that starves or a group that was out of memory. False if there is nothing left to end.
    fn make_room(&mut self, found: Sight) -> bool {
        let mut held = Held::default();
        held.hold(&self.sharing(&found));
        let _acting = ACTING.lock().unwrap_or_else(PoisonError::into_inner);
        let mut ended = 0;
        loop {
            self.watch.count(&self.gauge);
            let sight = self.sight();
            // What was growing stands still.
            self.policy.begin_anew();
            let is_over = self.policy.action(Duration::ZERO, &sight) == Action::StopVictim;
            let is_short = sight.filled.is_some_and(policy::Filled::is_short);
            let still_counts = found.is_starving && sight.is_starving || found.is_out && is_short;
            let is_owed = still_counts && ended == 0;
            if !is_over && !is_owed {
                return true;
            }
            // Some may have been started meanwhile, and another limit may be nearest.
            let domains = self.sharing(&sight);
            held.hold(&domains);
            if has_ended(&domains) {
                ended += 1;
                continue;
            }
            let Some((domain, vm)) = self.next_end(&domains) else {
                log::error!("memory is over its limit, and there is no vm left to end: {sight:?}");
                return false;
            };
            log::warn!("vm {} is ended for want of memory: {sight:?}", vm.id());
            end(&domain, &vm);
            ended += 1;
            for domain in &domains {
                domain.engine.memory_given_back();
            }
        }
    }

    /// The domains of whose VMs one is ended. An unmerge that starves is given those of its own.
    fn sharing(&self, sight: &Sight) -> Vec<Arc<Watch>> {
        let limit = sight.limit.filter(|_| !sight.is_starving);
        self.watch.sharing(limit.unwrap_or(Limit::Budget))
    }

    /// The VM to end next, and its domain. Only those of the lowest priority are asked how much they
    /// hold: the answer takes a walk through their page tables, and all guests stand still meanwhile.
    fn next_end(&self, domains: &[Arc<Watch>]) -> Option<(Arc<Watch>, Arc<Vm>)> {
        let vms = domains.iter().flat_map(|domain| {
            let vms = domain.vms.all().into_iter();
            vms.map(move |vm| (domain.clone(), vm))
        });
        let mut endable: Vec<_> = vms.filter(|(_, vm)| vm.can_be_ended()).collect();
        let lowest = endable.iter().map(|(_, vm)| vm.oom_priority()).min()?;
        endable.retain(|(_, vm)| vm.oom_priority() == lowest);
        let process = self.gauge.process();
        let candidates: Vec<Candidate> = endable
            .iter()
            .map(|(_, vm)| vm.candidate(process))
            .collect();
        Some(endable.swap_remove(victim(&candidates)?))
    }
}

/// Ends a VM, or has its start given up, and waits for it.
fn end(domain: &Watch, vm: &Arc<Vm>) {
    let deadline = Instant::now() + END_PATIENCE;
    if vm.give_up_start() {
        if !vm.wait_gone(deadline) {
            log::error!("vm {}: its start goes on after {END_PATIENCE:?}", vm.id());
        }
        return;
    }
    vm.end(EndReason::OomVictim);
    match vm.wait_ended(deadline) {
        Some(EndReason::OomVictim) => domain.count_victim(),
        // Somebody else was quicker.
        Some(_) => {}
        None => log::error!("vm {} has not ended within {END_PATIENCE:?}", vm.id()),
    }
}

/// Waits for a VM that is ending anyway, if there is one. True if it has ended: that may do.
fn has_ended(domains: &[Arc<Watch>]) -> bool {
    let mut vms = domains.iter().flat_map(|domain| domain.vms.all());
    let ending = vms.find(|vm| vm.is_ending());
    ending.is_some_and(|vm| vm.wait_gone(Instant::now() + END_PATIENCE))
}
