//! Samepage: tests.
