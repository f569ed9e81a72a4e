//! A domain's budget is its cgroup's limit too, if it has a cgroup.

use super::gateway::{Answer, Gateway, ask};
use super::proxy::Received;
use super::roster::Entry;
use crate::fault::Fault;
use crate::request::MergePatch;

impl Gateway {
    /// Passes a patch on, and has the cgroup's limit follow the budget.
    ///
    /// Whichever is lower holds. So a limit is raised before the monitor is asked, and lowered after it
    /// has made room.
    pub(super) async fn patch(
        &self,
        entry: &Entry,
        patch: &MergePatch,
        received: &Received,
    ) -> Answer {
        let _patching = entry.patching.lock().await;
        let (Some(cgroup), Some(wanted)) = (entry.cgroup(), patch.memory_budget) else {
            return ask(entry, received).await;
        };
        let wanted = wanted.filter(|&bytes| bytes > 0);
        let refused = |error| Fault::internal(format!("merge domain {}: {error}", entry.name));
        let before = cgroup.limit().map_err(refused)?;
        let is_raised = is_above(wanted, before);
        if is_raised {
            cgroup.set_limit(wanted).map_err(refused)?;
        }
        let reply = ask(entry, received).await;
        let is_done = reply
            .as_ref()
            .is_ok_and(|reply| reply.status().is_success());
        let followed = match (is_raised, is_done) {
            (true, false) => cgroup.set_limit(before),
            (false, true) => cgroup.lower_limit(wanted),
            _ => Ok(()),
        };
        if let Err(error) = followed {
            log::warn!("merge domain {}: {error}", entry.name);
        }
        reply
    }
}

/// Whether limit `a` lets more through than limit `b`; none lets all through.
fn is_above(a: Option<u64>, b: Option<u64>) -> bool {
    match (a, b) {
        (_, None) => false,
        (None, Some(_)) => true,
        (Some(a), Some(b)) => a > b,
    }
}

#[cfg(test)]
mod tests {
    use super::is_above;

    #[test]
    fn no_limit_is_above_all_limits_and_not_above_itself() {
        assert!(is_above(None, Some(u64::MAX)));
        assert!(is_above(Some(2), Some(1)));
        assert!(!is_above(Some(1), Some(1)));
        assert!(!is_above(Some(1), None));
        assert!(!is_above(None, None));
    }
}
