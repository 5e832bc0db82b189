//! libtorch: devices, tensors in and out, and any TorchScript module. Only this file and the encoder's name `tch`.

use bytes::Bytes;
use tch::{CModule, Device, IValue, Kind, TchError};

use super::encoder::SentenceEncoder;
use super::{Failed, Input, Runtime, processor};
use crate::model::{self, Found, Spec};
use crate::tensor::{Datatype, Tensor, element_count};

/// Where models compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// The first GPU if there is one, else the processor.
    Auto,
    /// The processor.
    Cpu,
    /// The GPU of this number.
    Cuda(usize),
}

impl std::str::FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Place, String> {
        match text {
            "auto" => Ok(Place::Auto),
            "cpu" => Ok(Place::Cpu),
            _ => text
                .strip_prefix("cuda:")
                .and_then(|number| number.parse().ok())
                .map(Place::Cuda)
                .ok_or_else(|| "it is auto, cpu or cuda:N".to_owned()),
        }
    }
}

/// A device that is there.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Placed(Device);

impl Placed {
    /// Whether it is a GPU.
    pub(crate) fn is_gpu(self) -> bool {
        self.0.is_cuda()
    }
}

/// Finds the device. Once, before anything is loaded.
///
/// # Errors
/// A GPU is asked for that is not there.
pub(crate) fn place(wanted: Place) -> Result<Placed, String> {
    if wanted == Place::Cpu {
        return Ok(Placed(Device::Cpu));
    }
    processor::load_cuda();
    let count = usize::try_from(tch::Cuda::device_count()).unwrap_or(0);
    match wanted {
        Place::Cuda(number) if number < count => Ok(Placed(Device::Cuda(number))),
        Place::Cuda(number) => Err(format!("there is no GPU {number}: libtorch sees {count}; try --device cpu")),
        _ if count > 0 => Ok(Placed(Device::Cuda(0))),
        _ => Ok(Placed(Device::Cpu)),
    }
}

/// Sets how many threads one operation of the calling thread uses, and loads a model for that thread.
///
/// # Errors
/// What is wrong with its files.
pub(crate) fn load(found: &Found, threads: usize, placed: Placed) -> Result<Box<dyn Runtime>, String> {
    tch::set_num_threads(i32::try_from(found.spec.threads.unwrap_or(threads)).unwrap_or(1));
    let mut runtime: Box<dyn Runtime> = match found.spec.kind {
        model::Kind::SentenceEncoder => Box::new(SentenceEncoder::load(&found.directory, &found.spec, placed.0)?),
        model::Kind::Torchscript => Box::new(Script::load(&found.directory, &found.spec, placed.0)?),
    };
    // The first passes allocate and choose kernels: they are ours, not the first client's.
    for input in warm_up(&found.spec) {
        let warmed = runtime.run(&[input]).pop().unwrap_or_else(|| Err(Failed("no result".into())));
        warmed.map_err(|error| format!("warm-up: {}", first_line(&error.0)))?;
    }
    Ok(runtime)
}

/// Zeros in the shapes of `model.toml`; for a sentence encoder at least one small batch, which also proves its weights.
fn warm_up(spec: &Spec) -> Vec<Input> {
    let size = |size: i64| usize::try_from(size).unwrap_or(0);
    let mut inputs = Vec::new();
    if spec.kind == model::Kind::SentenceEncoder {
        inputs.push(Input::Tokens(vec![vec![0; 16]; 2]));
    }
    for shapes in spec.warm_up.iter().map(|warm_up| &warm_up.shapes) {
        inputs.push(match (spec.kind, shapes.as_slice()) {
            (model::Kind::SentenceEncoder, [shape]) => {
                Input::Tokens(vec![vec![0; size(shape[1]).max(1)]; size(shape[0]).max(1)])
            }
            _ => {
                let zeros = spec.inputs.iter().zip(shapes).map(|(input, shape)| Tensor {
                    name: input.name.clone(),
                    datatype: input.datatype,
                    shape: shape.clone(),
                    data: vec![0; element_count(shape).unwrap_or(0) * input.datatype.size().unwrap_or(0)].into(),
                });
                Input::Tensors { tensors: zeros.collect(), rows: 1 }
            }
        });
    }
    inputs
}

impl From<TchError> for Failed {
    fn from(error: TchError) -> Failed {
        Failed(error.to_string())
    }
}

/// Any TorchScript module.
struct Script {
    module: CModule,
    spec: Spec,
    device: Device,
}

impl Script {
    fn load(directory: &std::path::Path, spec: &Spec, device: Device) -> Result<Script, String> {
        let wrong = |error: TchError| format!("model.pt: {}", first_line(&error.to_string()));
        let mut module = CModule::load_on_device(directory.join("model.pt"), device).map_err(wrong)?;
        module.f_set_eval().map_err(wrong)?;
        Ok(Script { module, spec: spec.clone(), device })
    }

    fn forward(&self, mut arguments: Vec<IValue>) -> Result<Vec<tch::Tensor>, Failed> {
        if let Some(method) = &self.spec.before_each {
            self.module.method_is::<IValue>(method, &[])?;
        }
        let returned = self.module.forward_is(&arguments);
        if returned.is_err() {
            // The binding forgets its own handles of the arguments when a module raises. They share these tensors, so what
            // is emptied here is not lost with them.
            for argument in &mut arguments {
                if let IValue::Tensor(tensor) = argument {
                    let empty = tch::Tensor::f_empty([0_i64], (tensor.f_kind()?, tensor.device()))?;
                    tensor.f_set_data(&empty)?;
                }
            }
        }
        let returned = match returned? {
            IValue::Tensor(tensor) => vec![tensor],
            IValue::TensorList(tensors) => tensors,
            IValue::Tuple(values) => values
                .into_iter()
                .map(|value| match value {
                    IValue::Tensor(tensor) => Ok(tensor),
                    _ => Err(Failed("the module returned a tuple of other things than tensors".into())),
                })
                .collect::<Result<_, _>>()?,
            _ => return Err(Failed("the module returned no tensor".into())),
        };
        if returned.len() != self.spec.outputs.len() {
            let (got, named) = (returned.len(), self.spec.outputs.len());
            return Err(Failed(format!("the module returned {got} tensors; model.toml names {named}")));
        }
        Ok(returned)
    }

    fn one(&self, tensors: &[Tensor]) -> Result<Vec<Tensor>, Failed> {
        let arguments: Vec<IValue> = self
            .spec
            .inputs
            .iter()
            .zip(tensors)
            .map(|(spec, tensor)| if spec.scalar { scalar(tensor) } else { Ok(IValue::Tensor(self.given(tensor)?)) })
            .collect::<Result<_, _>>()?;
        let returned = self.forward(arguments)?;
        returned.iter().zip(&self.spec.outputs).map(|(tensor, spec)| taken(&spec.name, tensor)).collect()
    }

    /// Computes requests as one, joined along the first dimension, and takes the results apart again.
    fn joined(&self, requests: &[&[Tensor]], rows: &[i64]) -> Result<Vec<Vec<Tensor>>, Failed> {
        let arguments: Vec<IValue> = (0..self.spec.inputs.len())
            .map(|at| {
                let parts: Vec<tch::Tensor> =
                    requests.iter().map(|tensors| self.given(&tensors[at])).collect::<Result<_, _>>()?;
                Ok::<_, Failed>(IValue::Tensor(tch::Tensor::f_cat(&parts, 0)?))
            })
            .collect::<Result<_, _>>()?;
        let mut results: Vec<Vec<Tensor>> = requests.iter().map(|_| Vec::new()).collect();
        for (tensor, spec) in self.forward(arguments)?.iter().zip(&self.spec.outputs) {
            if tensor.size().first() != Some(&rows.iter().sum()) {
                return Err(Failed(format!("output `{}` has not one row for each row of the batch", spec.name)));
            }
            for (part, result) in tensor.f_split_with_sizes(rows, 0)?.iter().zip(&mut results) {
                result.push(taken(&spec.name, part)?);
            }
        }
        Ok(results)
    }

    fn given(&self, tensor: &Tensor) -> Result<tch::Tensor, TchError> {
        to_device(given(tensor)?, self.device)
    }
}

impl Runtime for Script {
    fn run(&mut self, batch: &[Input]) -> Vec<Result<Vec<Tensor>, Failed>> {
        let _guard = tch::no_grad_guard();
        let requests: Vec<&[Tensor]> = batch
            .iter()
            .map(|input| match input {
                Input::Tensors { tensors, .. } => tensors.as_slice(),
                Input::Tokens(_) => &[],
            })
            .collect();
        if batch.len() > 1 && self.spec.batching().max_batch_size > 1 {
            let rows: Vec<i64> = batch.iter().map(|input| input.rows() as i64).collect();
            match self.joined(&requests, &rows) {
                Ok(results) => return results.into_iter().map(Ok).collect(),
                // Some values of one request may be what failed: the others are not to pay for it, so each runs alone.
                Err(error) => {
                    tracing::warn!(reason = %error, requests = batch.len(), "a batch failed; each runs alone");
                }
            }
        }
        requests.iter().map(|tensors| self.one(tensors)).collect()
    }
}

fn scalar(tensor: &Tensor) -> Result<IValue, Failed> {
    match (tensor.datatype, <[u8; 8]>::try_from(&*tensor.data)) {
        (Datatype::Int64, Ok(bytes)) => Ok(IValue::Int(i64::from_le_bytes(bytes))),
        _ => Err(Failed("a scalar input is one INT64".into())),
    }
}

/// A libtorch tensor of the same elements.
fn given(tensor: &Tensor) -> Result<tch::Tensor, TchError> {
    let kind = match tensor.datatype {
        Datatype::Bool => Kind::Bool,
        Datatype::Uint8 => Kind::Uint8,
        Datatype::Int8 => Kind::Int8,
        Datatype::Int16 => Kind::Int16,
        Datatype::Int32 => Kind::Int,
        Datatype::Int64 => Kind::Int64,
        Datatype::Fp16 => Kind::Half,
        Datatype::Bf16 => Kind::BFloat16,
        Datatype::Fp32 => Kind::Float,
        Datatype::Fp64 => Kind::Double,
        other => return Err(TchError::Kind(format!("libtorch's binding holds no {other}"))),
    };
    // `from_data_size` trusts the shape: fewer bytes would be read beyond their end.
    let bytes = element_count(&tensor.shape).and_then(|count| count.checked_mul(kind.elt_size_in_bytes()));
    if bytes != Some(tensor.data.len()) {
        return Err(TchError::Shape(format!(
            "`{}` has {} bytes for {:?}",
            tensor.name,
            tensor.data.len(),
            tensor.shape
        )));
    }
    tch::Tensor::f_from_data_size(&tensor.data, &tensor.shape, kind)
}

/// Brings a tensor to a device. To a GPU from pinned memory and without waiting, so that the copy and the computation
/// before it overlap.
pub(super) fn to_device(tensor: tch::Tensor, device: Device) -> Result<tch::Tensor, TchError> {
    if device.is_cuda() {
        let kind = tensor.f_kind()?;
        return tensor.f_pin_memory(device)?.f_to_device_(device, kind, true, false);
    }
    Ok(tensor)
}

/// The elements of a tensor, row-major and little-endian.
pub(super) fn bytes_of(tensor: &tch::Tensor) -> Result<Vec<u8>, TchError> {
    let tensor = tensor.f_to_device(Device::Cpu)?.f_contiguous()?;
    let count = tensor.numel();
    let mut data = vec![0; count * tensor.f_kind()?.elt_size_in_bytes()];
    tensor.f_copy_data_u8(&mut data, count)?;
    Ok(data)
}

fn taken(name: &str, tensor: &tch::Tensor) -> Result<Tensor, Failed> {
    let datatype = match tensor.f_kind()? {
        Kind::Bool => Datatype::Bool,
        Kind::Uint8 => Datatype::Uint8,
        Kind::Int8 => Datatype::Int8,
        Kind::Int16 => Datatype::Int16,
        Kind::Int => Datatype::Int32,
        Kind::Int64 => Datatype::Int64,
        Kind::Half => Datatype::Fp16,
        Kind::BFloat16 => Datatype::Bf16,
        Kind::Float => Datatype::Fp32,
        Kind::Double => Datatype::Fp64,
        other => return Err(Failed(format!("the module returned elements of kind {other:?}"))),
    };
    Ok(Tensor { name: name.to_owned(), datatype, shape: tensor.size(), data: Bytes::from(bytes_of(tensor)?) })
}

/// libtorch's messages go on for pages.
fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}
