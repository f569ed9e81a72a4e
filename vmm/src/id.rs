//! Names: of a VM, and of the merge domain it belongs to.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Longest name, in bytes.
pub const NAME_LEN_MAX: usize = 64;

/// A name that is empty, too long, or has a character outside `[A-Za-z0-9_-]`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} {name:?} must be 1 to {NAME_LEN_MAX} characters of A-Z a-z 0-9 _ -")]
pub struct NameError {
    what: &'static str,
    name: String,
}

fn check(what: &'static str, name: &str) -> Result<(), NameError> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
    if (1..=NAME_LEN_MAX).contains(&name.len()) && name.bytes().all(allowed) {
        Ok(())
    } else {
        // Cut what is quoted: an error must stay readable whatever was sent.
        let name = name.chars().take(NAME_LEN_MAX + 1).collect();
        Err(NameError { what, name })
    }
}

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The name's text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = NameError;

            fn from_str(name: &str) -> Result<$name, NameError> {
                check($what, name)?;
                Ok($name(name.to_owned()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = NameError;

            fn try_from(name: String) -> Result<$name, NameError> {
                check($what, &name)?;
                Ok($name(name))
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name_type!(
    /// A VM's name: 1 to 64 characters of `[A-Za-z0-9_-]`, the alphabet of Firecracker's `--id`
    /// plus `_`. It is used in paths of the API and in file names, hence the small alphabet.
    VmId,
    "vm id"
);

name_type!(
    /// A merge domain's name, of the same alphabet as [`VmId`]. VMs of one domain may share pages.
    MergeDomain,
    "merge domain"
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_the_alphabet_are_taken_as_they_are() {
        for name in ["a", "ci-runner_07", "A".repeat(64).as_str()] {
            assert_eq!(name.parse::<VmId>().unwrap().to_string(), name);
        }
    }

    #[test]
    fn other_names_are_refused_with_the_name_in_the_error() {
        for name in ["", "a b", "../x", "ä", "A".repeat(65).as_str()] {
            let error = name.parse::<MergeDomain>().unwrap_err().to_string();
            assert!(error.contains("merge domain"), "{error}");
        }
        assert!(
            "a/b"
                .parse::<VmId>()
                .unwrap_err()
                .to_string()
                .contains("a/b")
        );
    }

    #[test]
    fn serde_checks_names_too() {
        assert_eq!(
            serde_json::from_str::<VmId>("\"vm0\"").unwrap().as_str(),
            "vm0"
        );
        let error = serde_json::from_str::<VmId>("\"no space\"").unwrap_err();
        assert!(error.to_string().contains("vm id"), "{error}");
    }
}
