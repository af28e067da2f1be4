//! Experts that take the place of loaded ones or join them: found in a checkpoint by their tensors'
//! names, checked and packed before anything changes.

use std::collections::{BTreeSet, HashMap, HashSet};

use crate::{
    Result,
    device::Device,
    parallel::{Owners, PackedExpert, ParallelError},
    weights::{Source, WeightFormat, padded},
};

use super::{
    Model, ModelSpec, MoeSpec, Precision,
    banks::{BankShape, names},
    experts::Experts,
    rows::{Cols, Rows, finite, pack},
};

/// Experts of a file, packed and checked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NewExperts {
    /// In the order of layers and numbers; those numbered from `n_before` on are added.
    pub experts: Vec<PackedExpert>,
    /// Routers, each with a row for every expert. All layers have one where experts are added.
    pub routers: Vec<PackedRouter>,
    /// Experts of each layer that the model has, and those that it will have.
    pub n_before: usize,
    /// See `n_before`.
    pub n_after: usize,
}

/// One layer's router as the primary device holds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackedRouter {
    /// Index among the layers that have experts.
    pub layer: usize,
    /// F32 `[padded room for experts, hidden]`, in the order of matrices on the device.
    pub weights: Vec<u8>,
    /// What is added to scores for the choice. F32 `[room for experts, padded]`, or nothing.
    pub bias: Vec<u8>,
}

impl NewExperts {
    /// Adds those that were taken later, which overrule these.
    pub fn merge(&mut self, later: Self) {
        if self.experts.is_empty() && self.routers.is_empty() {
            *self = later;
            return;
        }
        let place = |e: &PackedExpert| (e.layer, e.expert);
        let places: HashSet<_> = later.experts.iter().map(place).collect();
        let layers: HashSet<_> = later.routers.iter().map(|r| r.layer).collect();
        self.experts.retain(|old| !places.contains(&place(old)));
        self.routers.retain(|old| !layers.contains(&old.layer));
        self.experts.extend(later.experts);
        self.routers.extend(later.routers);
        self.n_after = later.n_after;
    }
}

fn refused(cause: String) -> crate::Error {
    ParallelError::NewExperts { cause }.into()
}

/// Packs every expert that `source` has, to replace those of the same layers and numbers. Its
/// tensors are called as in the model's checkpoint. Experts with the numbers that follow the
/// model's join it, if it has room ([`ModelSpec::with_spare_experts`]), all layers get as many, and
/// there is a router with a row for each of a layer's experts, old and new.
///
/// # Errors
/// [`ParallelError::NewExperts`] for tensors that are neither and for experts without room, and
/// [`crate::weights::WeightsError`] for missing and misshapen tensors, NaNs and infinities.
pub fn pack_experts(
    spec: &ModelSpec,
    precision: Precision,
    source: &dyn Source,
) -> Result<NewExperts> {
    let mut unknown = source.names();
    let n_before = spec.n_present();
    let mut new = NewExperts { n_before, n_after: n_before, ..NewExperts::default() };
    for (layer, (index, moe)) in spec.moe_layers().enumerate() {
        let (prefix, names) = names(|name| source.contains(name), spec, index);
        let found = names.find(&mut unknown, moe.n_present());
        let n_after = moe.n_present() + n_added(index, moe, &found)?;
        if layer > 0 && n_after != new.n_after {
            let cause =
                format!("layer {index} would have {n_after} experts, others {}", new.n_after);
            return Err(refused(cause));
        }
        new.n_after = n_after;
        let gate = format!("{prefix}.gate");
        if n_after > n_before || source.contains(&format!("{gate}.weight")) {
            let room = moe.routing.n_experts;
            let router = Rows::with_room(gate.clone(), n_after, room);
            let mut packed = PackedRouter { layer, weights: Vec::new(), bias: Vec::new() };
            let (rows, cols) = (0..router.stacked(), Cols::all(spec.hidden_size));
            pack(source, &[router], rows, cols, WeightFormat::F32, |_, rows| {
                packed.weights.extend(rows.weights);
            })?;
            unknown.retain(|name| *name != format!("{gate}.weight"));
            if moe.correction_bias {
                let name = format!("{gate}.e_score_correction_bias");
                let mut bias = finite(&source.tensor(&name, &[n_after])?)?;
                bias.resize(padded(room), 0.0);
                packed.bias = bytemuck::cast_slice(&bias).to_vec();
                unknown.retain(|known| *known != name);
            }
            new.routers.push(packed);
        }
        let shape = BankShape { n_experts: n_after, ..BankShape::of(spec, moe, names, precision) };
        for expert in found {
            new.experts.push(PackedExpert { layer, expert, bytes: shape.pack(source, expert)? });
        }
    }
    match (new.experts.is_empty(), unknown.first()) {
        (true, _) => Err(refused("there is no tensor of an expert of this model".to_owned())),
        (_, Some(name)) => {
            let n = unknown.len();
            Err(refused(format!("{n} tensors belong to none, the first of them {name:?}")))
        }
        (false, None) => Ok(new),
    }
}

/// How many of the experts that were found join those of a layer.
fn n_added(index: usize, moe: &MoeSpec, found: &BTreeSet<usize>) -> Result<usize> {
    let n = moe.n_present();
    let added: Vec<usize> = found.range(n..).copied().collect();
    let wrong = (n..).zip(&added).find(|&(next, &e)| e != next || e >= moe.routing.n_experts);
    if let Some((_, expert)) = wrong {
        let spare = moe.n_spare;
        return Err(refused(format!(
            "layer {index} has {n} experts, room for {spare} more from number {n} on, and no \
             number {expert}; --spare-experts makes room"
        )));
    }
    match added.len().is_multiple_of(moe.unit()) {
        true => Ok(added.len()),
        false => {
            let (found, unit) = (added.len(), moe.unit());
            let cause = format!("layer {index} gets {found} more, and its groups have {unit} each");
            Err(refused(cause))
        }
    }
}

impl Experts {
    fn read_router(&self, device: &mut Device, layer: usize) -> Result<PackedRouter> {
        let parts: Vec<_> = self.router.parts().map(|(_, matrix)| matrix.weights).collect();
        let weights = device.read_all(&parts).wait_now()?;
        let bias = match self.correction_bias {
            Some(bias) => device.read_all(&[bias.alone]).wait_now()?,
            None => Vec::new(),
        };
        Ok(PackedRouter { layer, weights, bias })
    }

    fn write_router(&self, device: &mut Device, new: &PackedRouter) {
        let mut weights = &new.weights[..];
        for (_, matrix) in self.router.parts() {
            let (part, rest) = weights.split_at(matrix.weights.bytes() as usize);
            device.write_at(&matrix.weights, 0, part);
            weights = rest;
        }
        if let Some(bias) = self.correction_bias {
            device.write_at(&bias.alone, 0, &new.bias);
            // It ends where the room for experts does; what pads that is never read.
            let behind = bias.after_norm.bytes() - new.bias.len() as u64;
            device.write_at(&bias.after_norm, behind, &new.bias);
        }
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
        found.map(|(experts, place)| experts.read(device, place)).transpose()
    }

    /// Overwrites an expert that stays on this device, behind all work submitted so far.
    pub fn write_expert(&self, device: &mut Device, new: &PackedExpert) {
        if let Some(experts) = self.routed_experts().nth(new.layer)
            && let Some(place) = experts.place(new.expert)
        {
            experts.write(device, place, &new.bytes);
        }
    }

    /// A layer's router; `layer` counts those that have one.
    ///
    /// # Errors
    /// [`crate::device::DeviceError`] if the device fails.
    pub fn read_router(&self, device: &mut Device, layer: usize) -> Result<Option<PackedRouter>> {
        self.experts().nth(layer).map(|experts| experts.read_router(device, layer)).transpose()
    }

    /// Overwrites a router, behind all work submitted so far.
    pub fn write_router(&self, device: &mut Device, new: &PackedRouter) {
        if let Some(experts) = self.experts().nth(new.layer) {
            experts.write_router(device, new);
        }
    }

    /// Has routers choose among so many experts of each layer; recordings made before know fewer.
    pub fn set_present(&mut self, n: usize) {
        self.spec.set_present(n);
        let choices: Vec<_> = self.spec.moe_layers().map(|(_, moe)| moe.choice()).collect();
        self.experts_mut().zip(choices).for_each(|(experts, choice)| experts.choice = choice);
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
        if let Some(experts) = self.experts_mut().nth(layer) {
            experts.routed_mut().rearrange(device, owners, 0, packed);
        }
    }
}
