//! The density benchmark; see `density --help`.

use std::process::ExitCode;

fn main() -> ExitCode {
    samepage_tests::density::command::main()
}
