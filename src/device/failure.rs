//! Errors that drivers report late, and a way to make a device fail on purpose.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::DeviceError;

/// First error that the driver reported outside a call's return value.
#[derive(Debug, Clone, Default)]
pub(super) struct Failure(Arc<Mutex<Reports>>);

#[derive(Debug, Default)]
struct Reports {
    error: Option<DeviceError>,
    /// Checks until a fault that was asked for, and the fault.
    due: Option<(u64, Fault, wgpu::Device)>,
}

impl Failure {
    fn lock(&self) -> MutexGuard<'_, Reports> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first error counts, but a lost device is why others follow.
    pub(super) fn set(&self, error: DeviceError) {
        let held = &mut self.lock().error;
        if held.is_none() || matches!(error, DeviceError::Lost { .. }) {
            *held = Some(error);
        }
    }

    /// The error, if there is one. A lost device stays lost; other errors are reported once.
    pub(super) fn check(&self, device: &wgpu::Device) -> Result<(), DeviceError> {
        self.fail_if_due();
        match self.take() {
            // Calls on a lost device are rejected before polling tells that it is lost.
            Err(rejected @ DeviceError::Rejected { .. }) => {
                let _ = device.poll(wgpu::PollType::Poll);
                self.take().and(Err(rejected))
            }
            other => other,
        }
    }

    fn take(&self) -> Result<(), DeviceError> {
        let mut held = self.lock();
        match held.error.take() {
            None => Ok(()),
            Some(DeviceError::Lost { message }) => {
                held.error = Some(DeviceError::Lost { message: message.clone() });
                Err(DeviceError::Lost { message })
            }
            Some(error) => Err(error),
        }
    }

    fn fail_if_due(&self) {
        let mut held = self.lock();
        let Some((checks, ..)) = &mut held.due else { return };
        *checks = checks.saturating_sub(1);
        if *checks > 0 {
            return;
        }
        let due = held.due.take();
        // The device's callbacks take the lock themselves.
        drop(held);
        match due {
            Some((_, Fault::Lost, device)) => device.destroy(),
            Some((_, Fault::OutOfMemory, _)) => self.set(DeviceError::OutOfMemory { bytes: 0 }),
            None => {}
        }
    }
}

/// How a device fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It is gone, with everything on it: as after a crash of its driver.
    Lost,
    /// The driver reports, late, that it has no memory left.
    OutOfMemory,
}

/// Makes a device fail while others use it, to see that they bear it. The CPU device never fails.
#[derive(Debug, Clone)]
pub struct Faults(pub(super) Option<(wgpu::Device, Failure)>);

impl Faults {
    /// Fails at the `n`th time from now that somebody asks whether the device still works: after
    /// allocations, compilations, submissions and waits. A loss at 0 happens at once.
    pub fn inject(&self, fault: Fault, n: u64) {
        let Some((device, failure)) = &self.0 else { return };
        if n == 0 && fault == Fault::Lost {
            device.destroy();
        } else {
            failure.lock().due = Some((n, fault, device.clone()));
        }
    }
}
