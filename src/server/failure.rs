//! How an engine ends: what its requests are told, what supervisors and `/metrics` are.

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::{Error, Result, device::DeviceError, parallel::ParallelError};

use super::ApiError;

/// Why the engine has failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cause {
    /// The device is gone.
    Lost,
    /// The device has too little memory.
    Memory,
    /// The device does not answer; nothing that touches it may be waited for.
    Hang,
    /// A bug, or files that have changed.
    Other,
}

/// Why the engine will not come back, as far as a supervisor has to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Death {
    /// The device was lost or hangs, or the engine failed: starting again may help.
    DeviceLost,
    /// The model does not fit any more: starting again as before is of no use.
    OutOfMemory,
}

impl Cause {
    /// All causes, as `/metrics` names them.
    pub(super) const LABELS: [&'static str; 4] = ["lost", "memory", "hang", "other"];

    fn of(error: &Error) -> Self {
        match error {
            Error::Device(error) if error.is_out_of_memory() => Self::Memory,
            Error::Device(DeviceError::Timeout { .. }) => Self::Hang,
            Error::Device(error) if error.is_loss() => Self::Lost,
            Error::Parallel(ParallelError::Worker { source, .. }) => Self::of(source),
            _ => Self::Other,
        }
    }

    pub(super) fn label(self) -> &'static str {
        Self::LABELS[self as usize]
    }

    pub(super) fn death(self) -> Death {
        if self == Self::Memory { Death::OutOfMemory } else { Death::DeviceLost }
    }

    /// What requests in flight are told. Messages of drivers may name paths: they stay in the log.
    pub(super) fn answer(self) -> ApiError {
        ApiError::unavailable(match self {
            Self::Lost => "the device was lost; the model is loading again, try again soon",
            Self::Memory => "the device ran out of memory; the model is loading again",
            Self::Hang => "the device does not answer; the server is stopping",
            Self::Other => "the engine failed; the model is loading again, try again soon",
        })
    }
}

/// Does what may fail or panic, and logs if it does.
pub(super) fn attempt<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T, Cause> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => {
            eprintln!("error: {what} failed: {error}");
            Err(Cause::of(&error))
        }
        Err(_) => {
            eprintln!("error: {what} panicked");
            Err(Cause::Other)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_of_experts_fails_like_the_primary_one() {
        for (error, cause) in [
            (DeviceError::Timeout { seconds: 1 }, Cause::Hang),
            (DeviceError::OutOfMemory { bytes: 1 }, Cause::Memory),
            (DeviceError::Lost { message: String::new() }, Cause::Lost),
        ] {
            let worker = ParallelError::worker(1, error.into());
            assert_eq!(Cause::of(&worker.into()), cause);
        }
    }
}
