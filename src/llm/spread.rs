//! Further devices that hold a share of the experts: opened, given their share, and tied to the
//! primary one.

use crate::{
    Result,
    device::Device,
    model::{ExpertCache, ExpertShard, Limits, ModelSpec, Precision},
    parallel::{
        CacheOptions, Exchange, ExpertLayout, Owners, ParallelError, Placement, Sharded, Worker,
    },
    weights::Source,
};

use super::LlmOptions;

/// How experts are spread over devices.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum ExpertPlacement {
    /// Consecutive ones on each device.
    #[default]
    Linear,
    /// Dealt out in turn.
    RoundRobin,
    /// As JSON says, see [`Placement::from_json`].
    Json(String),
}

impl ExpertPlacement {
    /// Owners by layer that has experts.
    fn owners(&self, spec: &ModelSpec, n_ranks: usize) -> Result<Vec<Owners>, ParallelError> {
        let layers = spec.moe_layers().map(|(_, moe)| moe.routing.n_experts);
        Ok(match self {
            Self::Linear => layers.map(|n| Owners::linear(n, n_ranks)).collect(),
            Self::RoundRobin => layers.map(|n| Owners::round_robin(n, n_ranks)).collect(),
            Self::Json(text) => {
                let (n_layers, n_experts) = (layers.count(), spec.n_experts());
                Placement::from_json(text, n_layers, n_experts, n_ranks)?.layers().to_vec()
            }
        })
    }
}

/// Devices beside the primary one, and what each of them gets.
#[derive(Debug, Default)]
pub(super) struct Spread {
    /// Ranks from 1 on.
    devices: Vec<Device>,
    /// By layer that has experts; none if the primary device is alone.
    owners: Vec<Owners>,
    /// The primary device has slots for experts, and the host's memory all of them.
    pub(super) cache: Option<CacheOptions>,
    /// Slots of each layer.
    slots: usize,
}

impl Spread {
    /// Opens the devices of ranks 1, 2, ..., or sizes the only one's cache of experts.
    pub(super) async fn open(options: &LlmOptions, spec: &ModelSpec) -> Result<Self> {
        let choices = &options.expert_devices;
        if spec.n_experts() == 0 {
            return Ok(Self::default());
        }
        if let Some(cache) = options.expert_cache {
            if !choices.is_empty() {
                return Err(ParallelError::CacheOnSeveral.into());
            }
            let slots = ExpertCache::slots(spec, Precision::of(options.weights), cache.bytes)?;
            return Ok(Self { cache: Some(cache), slots, ..Self::default() });
        }
        if choices.is_empty() {
            return Ok(Self::default());
        }
        let mut devices = Vec::new();
        for choice in choices {
            let mut device = Device::open(choice).await?;
            if let Some(tier) = options.tier {
                device.shrink(tier);
            }
            devices.push(device);
        }
        let owners = options.expert_placement.owners(spec, 1 + devices.len())?;
        Ok(Self { devices, owners, ..Self::default() })
    }

    /// What the primary device holds.
    pub(super) fn layout(&self) -> ExpertLayout {
        match self.devices.is_empty() {
            true if self.cache.is_some() => ExpertLayout::Cached(self.slots),
            true => ExpertLayout::All,
            false => ExpertLayout::Share(self.owners.clone(), 0),
        }
    }

    /// The limits that every device can keep.
    pub(super) fn fit(&self, limits: Limits, spec: &ModelSpec) -> Limits {
        self.devices.iter().fold(limits, |limits, device| limits.fit(spec, &device.caps()))
    }

    /// One line for each device.
    pub(super) fn describe(&self) -> Vec<String> {
        self.devices.iter().map(Device::describe).collect()
    }

    /// Loads each device's experts, and those alone.
    pub(super) fn load(
        &mut self,
        spec: &ModelSpec,
        source: &dyn Source,
        precision: Precision,
        limits: &Limits,
    ) -> Result<Option<Box<dyn Exchange>>> {
        if self.devices.is_empty() {
            return Ok(None);
        }
        let owners = &self.owners;
        let load = |(i, device): (usize, Device)| -> Result<Box<dyn Worker>> {
            let rank = i + 1;
            let share = (&owners[..], rank);
            let shard = ExpertShard::load(device, spec, source, precision, limits, share)
                .map_err(|e| ParallelError::Worker { rank, cause: e.to_string() })?;
            Ok(Box::new(shard))
        };
        let devices = std::mem::take(&mut self.devices).into_iter().enumerate();
        let workers = devices.map(load).collect::<Result<_>>()?;
        Ok(Some(Box::new(Sharded::new(workers, self.owners.clone()))))
    }
}
