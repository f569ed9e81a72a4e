//! Where equal contents are: in the pool, at places of it, or at candidates elsewhere.

pub(crate) mod fingerprint;
pub(crate) mod layouts;
pub(crate) mod prehashed;
pub(crate) mod stable;
pub(crate) mod unstable;
