//! Guests, device queues and starts that stand still while memory is made.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

use super::Watch;
use crate::vm::Vm;

/// Domains of which nobody takes memory until this is dropped.
#[derive(Default)]
pub(super) struct Held {
    domains: Vec<Arc<Watch>>,
    /// By address: an id is a domain's own.
    vms: BTreeMap<usize, Arc<Vm>>,
}

impl Held {
    /// Holds all VMs of `domains` that are not held by this yet. Waits for none of them.
    pub(super) fn hold(&mut self, domains: &[Arc<Watch>]) {
        for domain in domains {
            if !self.domains.iter().any(|held| Arc::ptr_eq(held, domain)) {
                domain.room.hold();
                self.domains.push(domain.clone());
            }
            for vm in domain.vms.all() {
                if let Entry::Vacant(place) = self.vms.entry(Arc::as_ptr(&vm).addr()) {
                    vm.hold();
                    place.insert(vm);
                }
            }
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.vms.values().for_each(|vm| vm.release());
        self.domains.iter().for_each(|domain| domain.room.release());
    }
}
