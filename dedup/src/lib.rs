//! Samepage: dedup.
