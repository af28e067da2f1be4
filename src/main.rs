//! The `moewe` binary: parses arguments, runs one command, turns errors into a sentence and an
//! exit code.

mod cli;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    match cli.command.run() {
        Ok(code) => {
            #[cfg(feature = "mpi")]
            if code == ExitCode::SUCCESS {
                moewe::parallel::cluster::finish();
            }
            code
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
