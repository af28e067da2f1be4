//! `moewe bench transfers`: how fast bytes get to a device and back.

use std::process::ExitCode;

use anyhow::ensure;
use clap::Args;
use moewe::{
    bench::transfers,
    device::{Device, DeviceChoice},
};

use crate::cli::{devices::bytes, report::print_line};

/// Options of `moewe bench transfers`.
#[derive(Debug, Args)]
pub(super) struct Transfers {
    /// Adapter: auto, cpu, a number or part of a name from `moewe adapters`
    #[arg(long, default_value = "auto")]
    device: DeviceChoice,
    /// Sizes in bytes, or with K, M or G
    #[arg(long, value_delimiter = ',', value_parser = bytes, default_value = "256,64K,1M,64M")]
    bytes: Vec<u64>,
}

impl Transfers {
    pub(super) fn run(self) -> anyhow::Result<ExitCode> {
        let sized = |n: &u64| *n > 0 && n.is_multiple_of(16);
        ensure!(self.bytes.iter().all(sized), "--bytes are multiples of 16");
        let mut device = pollster::block_on(Device::open(&self.device))?;
        eprintln!("{}", device.describe());
        print_line(format_args!("{:<26} {:>12} {:>12} {:>10}", "way", "bytes", "us", "GB/s"))?;
        for &n in &self.bytes {
            for row in transfers(&mut device, n)? {
                let (us, rate) = (row.seconds * 1e6, n as f64 / row.seconds / 1e9);
                print_line(format_args!("{:<26} {n:>12} {us:>12.1} {rate:>10.2}", row.way))?;
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}
