//! The `moewe` binary: parses arguments, runs one command, turns errors into a sentence and an
//! exit code.

mod cli;

use std::process::ExitCode;

use clap::Parser;

/// Exit code when the device was lost; supervisors may start again.
const DEVICE_LOST: u8 = 3;
/// Exit code when memory is too small; starting again as before is of no use.
const OUT_OF_MEMORY: u8 = 4;

fn exit_code(error: &anyhow::Error) -> ExitCode {
    let device = error.chain().find_map(|cause| match cause.downcast_ref()? {
        moewe::Error::Device(error) => Some(error),
        _ => None,
    });
    match device {
        Some(error) if error.is_out_of_memory() => OUT_OF_MEMORY.into(),
        Some(error) if error.is_loss() => DEVICE_LOST.into(),
        _ => ExitCode::FAILURE,
    }
}

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
            exit_code(&error)
        }
    }
}
