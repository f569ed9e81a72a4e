//! How the API names a merge domain.

use std::fmt;
use std::str::FromStr;

use vmm::config::VmConfig;
use vmm::{MergeDomain, VmId};

/// Marks the domain that one VM has to itself. Not in the alphabet of names, so that no merge
/// domain that a client asks for can ever be the private one of somebody's VM.
const PRIVATE_PREFIX: &str = "vm:";

/// The name of a merge domain in paths and replies: `ci`, or `vm:build-17` for the private
/// domain of a VM whose config names no `merge_domain`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DomainName {
    /// Asked for by name; all its VMs share pages.
    Named(MergeDomain),
    /// Of one VM, which shares with nobody.
    Private(VmId),
}

impl DomainName {
    /// That of a VM which is to be created.
    pub fn of_vm(id: &VmId, config: &VmConfig) -> DomainName {
        match &config.samepage.merge_domain {
            Some(domain) => DomainName::Named(domain.clone()),
            None => DomainName::Private(id.clone()),
        }
    }

    /// What its monitor calls it. Only a label: a private domain's may be another's name.
    ///
    /// # Errors
    /// If the id of a private domain's VM is no name of a domain; ids have the same alphabet.
    pub(crate) fn to_label(&self) -> Result<MergeDomain, String> {
        match self {
            DomainName::Named(domain) => Ok(domain.clone()),
            DomainName::Private(id) => id
                .to_string()
                .parse()
                .map_err(|error| format!("vm {id}: {error}")),
        }
    }
}

impl fmt::Display for DomainName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DomainName::Named(domain) => domain.fmt(f),
            DomainName::Private(id) => write!(f, "{PRIVATE_PREFIX}{id}"),
        }
    }
}

impl FromStr for DomainName {
    type Err = String;

    fn from_str(text: &str) -> Result<DomainName, String> {
        let parsed = match text.strip_prefix(PRIVATE_PREFIX) {
            Some(id) => id
                .parse()
                .map(DomainName::Private)
                .map_err(|e| format!("{e}")),
            None => text
                .parse()
                .map(DomainName::Named)
                .map_err(|e| format!("{e}")),
        };
        parsed.map_err(|error| format!("merge domain {text:?}: {error}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_survive_a_round_trip_and_never_meet() {
        for text in ["ci", "vm:ci", "vm-ci"] {
            assert_eq!(text.parse::<DomainName>().unwrap().to_string(), text);
        }
        assert_ne!("ci".parse::<DomainName>(), "vm:ci".parse::<DomainName>());
        for bad in ["", "vm:", "a:b", "vm:vm:a", "a b"] {
            let error = bad.parse::<DomainName>().unwrap_err();
            assert!(error.starts_with("merge domain "), "{error}");
        }
    }
}
