//! How many requests are in hand at a time, for each merge domain.
//!
//! A request can block for long: a start reads files, a stop waits for a disk. Each takes a thread, so
//! without a bound those of one domain whose storage hangs take all threads of the server.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::domain_name::DomainName;
use crate::fault::Fault;

/// Most requests of one merge domain that are carried out at a time.
pub const REQUESTS_MAX: usize = 64;
/// How long one more waits for a place, before it is refused.
const PLACE_TIME: Duration = Duration::from_secs(2);

/// The places of all domains, and those for requests of no domain.
#[derive(Debug, Default)]
pub(crate) struct Places {
    /// Those with a request in hand, and some that had one.
    domains: Mutex<HashMap<Option<DomainName>, Arc<Semaphore>>>,
}

impl Places {
    /// Waits for a place, not for long. It is free again when the permit is dropped.
    ///
    /// # Errors
    /// 503 if the domain has [`REQUESTS_MAX`] requests in hand all the time.
    pub(crate) async fn take(
        &self,
        domain: Option<DomainName>,
    ) -> Result<OwnedSemaphorePermit, Fault> {
        let whose = match &domain {
            Some(name) => format!("merge domain {name}"),
            None => "the server".to_owned(),
        };
        let place = self.of(domain).acquire_owned();
        match tokio::time::timeout(PLACE_TIME, place).await {
            Ok(Ok(permit)) => Ok(permit),
            // Nobody closes the semaphore.
            Ok(Err(_)) | Err(_) => Err(Fault::unavailable(format!(
                "{whose}: {REQUESTS_MAX} requests are in hand, which is the most"
            ))),
        }
    }

    fn of(&self, domain: Option<DomainName>) -> Arc<Semaphore> {
        // Single inserts and removes: whole after any panic.
        let mut domains = self.domains.lock().unwrap_or_else(PoisonError::into_inner);
        // A domain without a request in hand needs none: ids of VMs that are gone would pile up.
        domains.retain(|_, places| Arc::strong_count(places) > 1);
        let fresh = || Arc::new(Semaphore::new(REQUESTS_MAX));
        Arc::clone(domains.entry(domain).or_insert_with(fresh))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn domain(name: &str) -> Option<DomainName> {
        Some(DomainName::Named(name.parse().unwrap()))
    }

    #[tokio::test]
    async fn domain_with_all_its_requests_in_hand_refuses_one_more_and_no_other_does() {
        let places = Places::default();
        let mut taken = Vec::new();
        for _ in 0..REQUESTS_MAX {
            taken.push(places.take(domain("hung")).await.unwrap());
        }
        let refused = places.take(domain("hung")).await.unwrap_err();
        assert_eq!(refused.status, hyper::StatusCode::SERVICE_UNAVAILABLE);
        assert!(refused.message.contains("hung"), "{}", refused.message);
        drop(places.take(domain("well")).await.unwrap());
        drop(places.take(None).await.unwrap());

        taken.pop();
        drop(places.take(domain("hung")).await.unwrap());
    }

    #[tokio::test]
    async fn places_of_idle_domains_are_forgotten() {
        let places = Places::default();
        for name in ["a", "b", "c"] {
            drop(places.take(domain(name)).await.unwrap());
        }
        let held = places.take(domain("d")).await.unwrap();
        drop(places.take(domain("e")).await.unwrap());
        assert_eq!(places.domains.lock().unwrap().len(), 2);
        drop(held);
    }
}
