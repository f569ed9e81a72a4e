//! Whether a VM may start: what a domain's VMs could hold, against what its budget may be
//! overcommitted by. And what is said of memory that is not there. Pure.

use std::collections::BTreeMap;

use crate::guard::gauge::Limit;
use crate::id::VmId;

/// A start that would promise more memory than the domain is to promise.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
#[error(
    "mem_size_mib: the vm's {wanted_bytes} bytes and the {held_bytes} bytes of started vms are {missing_bytes} bytes \
     more than the merge domain may promise (memory_budget {budget_bytes} x overcommit_ratio {overcommit_ratio})"
)]
pub struct NoRoom {
    /// Nominal memory of the VM.
    pub wanted_bytes: u64,
    /// Nominal memory of the VMs that were started before.
    pub held_bytes: u64,
    /// Budget of the domain.
    pub budget_bytes: u64,
    /// How many times the budget may be promised.
    pub overcommit_ratio: f64,
    /// What would have to be given up for the VM to start.
    pub missing_bytes: u64,
}

/// A start has no room. The numbers are of the limit that is short.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "kernel and initrd take {wanted_bytes} bytes of memory, {room_bytes} are left of the \
     {limit} of {limit_bytes}: {} more are needed",
    .wanted_bytes - .room_bytes
)]
pub struct NoMemory {
    /// What loading takes.
    pub wanted_bytes: u64,
    /// What is left of the limit, less what is kept free and what other starts have reserved.
    pub room_bytes: u64,
    /// Which limit.
    pub limit: Limit,
    /// The limit.
    pub limit_bytes: u64,
}

/// An unmerge has no room. The numbers are of the limit that is short.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "private copies of what is merged take {needed_bytes} bytes of memory, {room_bytes} are left of \
     the {limit} of {limit_bytes}: {} more are needed",
    self.missing_bytes()
)]
pub struct UnmergeNoRoom {
    /// What is merged takes so much more when nothing is shared.
    pub needed_bytes: u64,
    /// What may be taken before VMs would be ended for it.
    pub room_bytes: u64,
    /// Which limit.
    pub limit: Limit,
    /// The limit.
    pub limit_bytes: u64,
}

impl UnmergeNoRoom {
    /// What would have to be given up for the unmerge to fit.
    pub fn missing_bytes(&self) -> u64 {
        self.needed_bytes.saturating_sub(self.room_bytes)
    }
}

/// Why a start was given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum GivenUp {
    /// It was the one to go when memory ran out.
    #[error("was given up: the merge domain ran out of memory")]
    NoMemory,
    /// A request to stop the VM came first.
    #[error("was given up: the vm was stopped")]
    Stopped,
}

/// Starts that are under way: they hold memory before their VMs are seen to.
#[derive(Debug, Default)]
pub(crate) struct Claims(BTreeMap<VmId, u64>);

impl Claims {
    /// Claims `wanted_bytes` for the start of `id`, if they fit. `started` are the VMs that hold
    /// memory, with what they may hold; `id` itself does not count among them. False if a start of
    /// `id` holds a claim already, which stays that start's to settle.
    pub(crate) fn claim(
        &mut self,
        id: &VmId,
        wanted_bytes: u64,
        started: impl Iterator<Item = (VmId, u64)>,
        promise: Option<Promise>,
    ) -> Result<bool, NoRoom> {
        let mut held: BTreeMap<VmId, u64> = started.collect();
        held.extend(self.0.iter().map(|(id, bytes)| (id.clone(), *bytes)));
        held.remove(id);
        let held_bytes = held.values().sum();
        if let Some(promise) = promise {
            promise.check(wanted_bytes, held_bytes)?;
        }
        Ok(self.0.insert(id.clone(), wanted_bytes).is_none())
    }

    /// The start of `id` is over, one way or the other.
    pub(crate) fn settle(&mut self, id: &VmId) {
        self.0.remove(id);
    }
}

/// What a domain may promise its VMs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Promise {
    pub(crate) budget_bytes: u64,
    pub(crate) overcommit_ratio: f64,
}

impl Promise {
    fn bytes(self) -> u64 {
        #[expect(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "saturates; a page more or less of a ratio means nothing"
        )]
        let bytes = (self.budget_bytes as f64 * self.overcommit_ratio) as u64;
        bytes
    }

    fn check(self, wanted_bytes: u64, held_bytes: u64) -> Result<(), NoRoom> {
        let needed_bytes = held_bytes.saturating_add(wanted_bytes);
        let missing_bytes = needed_bytes.saturating_sub(self.bytes());
        if missing_bytes == 0 {
            return Ok(());
        }
        Err(NoRoom {
            wanted_bytes,
            held_bytes,
            budget_bytes: self.budget_bytes,
            overcommit_ratio: self.overcommit_ratio,
            missing_bytes,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn id(number: usize) -> VmId {
        format!("vm{number}").parse().unwrap()
    }

    const PROMISE: Promise = Promise {
        budget_bytes: 100,
        overcommit_ratio: 2.5,
    };

    #[test]
    fn a_start_that_does_not_fit_says_how_much_is_missing() {
        let mut claims = Claims::default();
        let started = [(id(1), 200)].into_iter();
        let refused = claims
            .claim(&id(2), 60, started, Some(PROMISE))
            .unwrap_err();
        assert_eq!((refused.missing_bytes, refused.held_bytes), (10, 200));
        let text = refused.to_string();
        assert!(
            text.contains("10 bytes more") && text.contains("100 x overcommit_ratio 2.5"),
            "{text}"
        );
        claims
            .claim(&id(2), 50, [(id(1), 200)].into_iter(), Some(PROMISE))
            .unwrap();
    }

    #[test]
    fn starts_under_way_count_once_and_until_they_are_settled() {
        let mut claims = Claims::default();
        let none = std::iter::empty;
        claims.claim(&id(1), 200, none(), Some(PROMISE)).unwrap();
        claims.claim(&id(2), 60, none(), Some(PROMISE)).unwrap_err();
        let again = claims.claim(&id(1), 200, none(), Some(PROMISE)).unwrap();
        assert!(!again, "the first one's to settle");
        // Seen to run, and not settled yet.
        claims
            .claim(&id(2), 50, [(id(1), 200)].into_iter(), Some(PROMISE))
            .unwrap();
        claims.settle(&id(1));
        claims.settle(&id(2));
        claims.claim(&id(3), 250, none(), Some(PROMISE)).unwrap();
    }

    #[test]
    fn without_a_ratio_or_a_budget_every_start_fits() {
        let mut claims = Claims::default();
        claims
            .claim(&id(1), u64::MAX, [(id(2), 5)].into_iter(), None)
            .unwrap();
    }

    proptest! {
        #[test]
        fn what_is_admitted_never_adds_up_to_more_than_the_promise(
            starts in proptest::collection::vec((0..6_usize, 1..120_u64, any::<bool>()), 1..40)
        ) {
            let (mut claims, mut started) = (Claims::default(), BTreeMap::new());
            for (vm, bytes, ends) in starts {
                let vm = id(vm);
                if ends {
                    started.remove(&vm);
                } else if !started.contains_key(&vm)
                    && claims.claim(&vm, bytes, started.clone().into_iter(), Some(PROMISE)).is_ok()
                {
                    started.insert(vm.clone(), bytes);
                    claims.settle(&vm);
                }
                prop_assert!(started.values().sum::<u64>() <= 250);
            }
        }
    }
}
