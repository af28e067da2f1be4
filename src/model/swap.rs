//! Experts that take the place of loaded ones: found in a checkpoint by their tensors' names,
//! checked and packed before anything changes.

use std::collections::HashMap;

use crate::{
    Result,
    device::Device,
    parallel::{Owners, PackedExpert, ParallelError},
    weights::Source,
};

use super::{
    Model, ModelSpec, Precision,
    banks::{BankShape, names},
};

/// Packs every expert that `source` has, ready to replace those of the same layers and numbers.
/// Its tensors are called as in the model's checkpoint, and there are no others.
///
/// # Errors
/// [`ParallelError::NewExperts`] for tensors that belong to no expert of this model, and
/// [`crate::weights::WeightsError`] for missing and misshapen ones, NaNs and infinities.
pub fn pack_experts(
    spec: &ModelSpec,
    precision: Precision,
    source: &dyn Source,
) -> Result<Vec<PackedExpert>> {
    let refused = |cause: String| ParallelError::NewExperts { cause };
    let tensors = source.names();
    let (mut packed, mut n_known) = (Vec::new(), 0);
    for (layer, (index, moe)) in spec.moe_layers().enumerate() {
        let n_experts = moe.routing.n_experts;
        let (_, names) = names(|name| source.contains(name), spec, index);
        let (found, n) = names.found(&tensors, n_experts);
        n_known += n;
        if let Some(expert) = found.iter().find(|&&expert| expert >= n_experts) {
            let cause = format!("layer {index} has {n_experts} experts, and no number {expert}");
            return Err(refused(cause).into());
        }
        let shape = BankShape::of(spec, moe, names, precision);
        for expert in found {
            packed.push(PackedExpert { layer, expert, bytes: shape.pack(source, expert)? });
        }
    }
    match packed.is_empty() {
        true => Err(refused("there is no tensor of an expert of this model".to_owned()).into()),
        false if n_known < tensors.len() => {
            let cause = format!("{} tensors belong to none", tensors.len() - n_known);
            Err(refused(cause).into())
        }
        false => Ok(packed),
    }
}

impl Model {
    /// Packed weights of an expert, if it stays on this device.
    ///
    /// # Errors
    /// [`crate::device::DeviceError`] if the device fails.
    pub fn read_expert(
        &self,
        device: &mut Device,
        layer: usize,
        expert: usize,
    ) -> Result<Option<Vec<u8>>> {
        let experts = self.routed_experts().nth(layer);
        let found = experts.and_then(|experts| Some((experts, experts.place(expert)?)));
        found.map(|(experts, place)| experts.banks().read(device, place)).transpose()
    }

    /// Overwrites an expert that stays on this device, behind all work submitted so far.
    pub fn write_expert(&self, device: &mut Device, new: &PackedExpert) {
        if let Some(experts) = self.routed_experts().nth(new.layer)
            && let Some(place) = experts.place(new.expert)
        {
            experts.banks().write(device, place, &new.bytes);
        }
    }

    /// Moves experts of a layer to where `new` has them on this device, the primary one; `packed`
    /// has those that move, by number.
    pub fn rearrange(
        &mut self,
        device: &mut Device,
        layer: usize,
        owners: (&Owners, &Owners),
        packed: &HashMap<usize, Vec<u8>>,
    ) {
        if let Some(experts) = self.routed_experts_mut(layer) {
            experts.rearrange(device, owners, 0, packed);
        }
    }
}
