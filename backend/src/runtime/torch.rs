//! libtorch. The only file that names `tch`.
//!
//! A BERT-like sentence encoder is written out here over its safetensors, as published ("BERT: Pre-training of Deep
//! Bidirectional Transformers", Devlin et al., 2019; mean pooling after "Sentence-BERT", Reimers and Gurevych, 2019);
//! anything else runs as the TorchScript module that it is.

use std::collections::HashMap;
use std::path::Path;

use serde::Deserialize;
use tch::{CModule, Device, IValue, Kind, TchError};

use super::{Failed, Input, Runtime};
use crate::model::{self, Found, Spec};
use crate::tensor::{Data, Tensor, element_count};

/// Rows computed at once. On a CPU more rows fill no more of its units; they only wait for each other.
const ROWS_MAX: usize = 32;

/// Sets how many threads one operation uses. For the whole process, before anything is loaded.
pub(crate) fn set_threads(threads: usize) {
    tch::set_num_threads(i32::try_from(threads).unwrap_or(1));
    tch::set_num_interop_threads(1);
}

/// Loads a model.
///
/// # Errors
/// What is wrong with its files.
pub(crate) fn load(found: &Found) -> Result<Box<dyn Runtime>, String> {
    match found.spec.kind {
        model::Kind::SentenceEncoder => {
            let mut encoder = SentenceEncoder::load(&found.directory, &found.spec)?;
            // The first pass allocates and chooses kernels: it is ours, not the first client's.
            let warm_up = Input::Tokens(vec![vec![0; 16]; 2]);
            let warmed = encoder.run(&[warm_up]).pop().unwrap_or_else(|| Err(Failed("no result".into())));
            warmed.map_err(|error| format!("the first pass failed: {error}"))?;
            Ok(Box::new(encoder))
        }
        model::Kind::Torchscript => Ok(Box::new(Script::load(&found.directory, &found.spec)?)),
    }
}

impl From<TchError> for Failed {
    fn from(error: TchError) -> Failed {
        Failed(error.to_string())
    }
}

/// `config.json` of a BERT-like model, as far as it decides the computation.
#[derive(Deserialize)]
struct BertConfig {
    hidden_size: i64,
    num_hidden_layers: usize,
    num_attention_heads: i64,
    layer_norm_eps: f64,
    hidden_act: String,
    #[serde(default)]
    position_embedding_type: Option<String>,
}

struct Dense {
    /// Shape [out, in].
    weight: tch::Tensor,
    bias: tch::Tensor,
}

impl Dense {
    fn apply(&self, x: &tch::Tensor) -> Result<tch::Tensor, TchError> {
        x.f_linear(&self.weight, Some(&self.bias))
    }
}

struct Norm {
    weight: tch::Tensor,
    bias: tch::Tensor,
    epsilon: f64,
}

impl Norm {
    fn apply(&self, x: &tch::Tensor) -> Result<tch::Tensor, TchError> {
        x.f_layer_norm(self.weight.size(), Some(&self.weight), Some(&self.bias), self.epsilon, false)
    }
}

struct Layer {
    /// Query, key and value in one product: [3 * hidden, hidden].
    attention: Dense,
    attention_output: Dense,
    attention_norm: Norm,
    intermediate: Dense,
    output: Dense,
    output_norm: Norm,
}

struct SentenceEncoder {
    words: tch::Tensor,
    positions: tch::Tensor,
    /// The one token type that single texts have: [hidden].
    token_type: tch::Tensor,
    norm: Norm,
    layers: Vec<Layer>,
    heads: i64,
    output: String,
}

/// Takes tensors out of a safetensors file by name.
struct Weights(HashMap<String, tch::Tensor>);

impl Weights {
    fn take(&mut self, name: &str) -> Result<tch::Tensor, String> {
        let tensor = self.0.remove(name).ok_or_else(|| format!("model.safetensors has no tensor `{name}`"))?;
        Ok(tensor.to_kind(Kind::Float))
    }

    fn dense(&mut self, name: &str) -> Result<Dense, String> {
        Ok(Dense { weight: self.take(&format!("{name}.weight"))?, bias: self.take(&format!("{name}.bias"))? })
    }

    fn norm(&mut self, name: &str, epsilon: f64) -> Result<Norm, String> {
        let Dense { weight, bias } = self.dense(name)?;
        Ok(Norm { weight, bias, epsilon })
    }
}

impl SentenceEncoder {
    fn load(directory: &Path, spec: &Spec) -> Result<SentenceEncoder, String> {
        let config = std::fs::read(directory.join("config.json")).map_err(|error| format!("config.json: {error}"))?;
        let config: BertConfig = serde_json::from_slice(&config).map_err(|error| format!("config.json: {error}"))?;
        if config.hidden_act != "gelu" || config.position_embedding_type.is_some_and(|kind| kind != "absolute") {
            return Err("config.json: only hidden_act gelu with absolute positions is known here".into());
        }
        if config.num_attention_heads < 1 || config.hidden_size % config.num_attention_heads != 0 {
            return Err("config.json: hidden_size is no multiple of num_attention_heads".into());
        }
        if spec.outputs[0].shape.last() != Some(&config.hidden_size) {
            return Err(format!("model.toml: the output's last size is not the model's, {}", config.hidden_size));
        }
        let weights = tch::Tensor::read_safetensors(directory.join("model.safetensors"))
            .map_err(|error| format!("model.safetensors: {error}"))?;
        let mut weights = Weights(weights.into_iter().collect());
        let epsilon = config.layer_norm_eps;
        let words = weights.take("embeddings.word_embeddings.weight")?;
        let positions = weights.take("embeddings.position_embeddings.weight")?;
        if spec.max_tokens.is_none_or(|most| i64::try_from(most).is_ok_and(|most| most > positions.size()[0])) {
            return Err(format!("model.toml: max_tokens is beyond the model's {} positions", positions.size()[0]));
        }
        let token_type = weights.take("embeddings.token_type_embeddings.weight")?.get(0);
        let norm = weights.norm("embeddings.LayerNorm", epsilon)?;
        let mut layers = Vec::new();
        for at in 0..config.num_hidden_layers {
            let name = |part: &str| format!("encoder.layer.{at}.{part}");
            let mut projections = Vec::new();
            for part in ["query", "key", "value"] {
                projections.push(weights.dense(&name(&format!("attention.self.{part}")))?);
            }
            let stacked = |part: fn(&Dense) -> &tch::Tensor| {
                tch::Tensor::cat(&projections.iter().map(part).collect::<Vec<_>>(), 0)
            };
            layers.push(Layer {
                attention: Dense { weight: stacked(|dense| &dense.weight), bias: stacked(|dense| &dense.bias) },
                attention_output: weights.dense(&name("attention.output.dense"))?,
                attention_norm: weights.norm(&name("attention.output.LayerNorm"), epsilon)?,
                intermediate: weights.dense(&name("intermediate.dense"))?,
                output: weights.dense(&name("output.dense"))?,
                output_norm: weights.norm(&name("output.LayerNorm"), epsilon)?,
            });
        }
        let output = spec.outputs[0].name.clone();
        Ok(SentenceEncoder { words, positions, token_type, norm, layers, heads: config.num_attention_heads, output })
    }

    /// Embeds rows of token ids, none empty: [rows, hidden], each of unit length.
    fn embed(&self, rows: &[&[u32]]) -> Result<tch::Tensor, TchError> {
        let longest = rows.iter().map(|row| row.len()).max().unwrap_or(0);
        let (count, length) = (rows.len() as i64, longest as i64);
        let mut ids = vec![0_i64; rows.len() * longest];
        let mut mask = vec![false; rows.len() * longest];
        for (at, row) in rows.iter().enumerate() {
            for (to, &id) in row.iter().enumerate() {
                ids[at * longest + to] = i64::from(id);
                // From the row's length, never from the id: a text can contain the padding token itself.
                mask[at * longest + to] = true;
            }
        }
        let ids = tch::Tensor::f_from_slice(&ids)?.f_view([count, length])?;
        let mask = tch::Tensor::f_from_slice(&mask)?.f_view([count, length])?;
        // Without padding there is nothing to mask, and the unmasked attention is faster.
        let padded = rows.iter().any(|row| row.len() < longest);
        let attention_mask = padded.then(|| mask.f_view([count, 1, 1, length])).transpose()?;

        let words = tch::Tensor::f_embedding(&self.words, &ids, -1, false, false)?;
        let x = words.f_add(&self.positions.f_narrow(0, 0, length)?)?.f_add(&self.token_type)?;
        let mut x = self.norm.apply(&x)?;
        for layer in &self.layers {
            x = self.layer(layer, &x, attention_mask.as_ref())?;
        }
        let mask = mask.f_unsqueeze(-1)?.f_to_kind(Kind::Float)?;
        let sum = x.f_mul(&mask)?.f_sum_dim_intlist([1_i64].as_slice(), false, Kind::Float)?;
        // The mean's divisor falls out of the normalisation: only the direction counts.
        let norm = sum.f_norm_scalaropt_dim(2, [1_i64].as_slice(), true)?.f_clamp_min(1e-12)?;
        sum.f_div(&norm)
    }

    fn layer(&self, layer: &Layer, x: &tch::Tensor, mask: Option<&tch::Tensor>) -> Result<tch::Tensor, TchError> {
        let (count, length, hidden) = x.size3()?;
        let size = hidden / self.heads;
        // [rows, tokens, 3 * hidden] -> 3 of [rows, heads, tokens, size].
        let projected =
            layer.attention.apply(x)?.f_view([count, length, 3, self.heads, size])?.f_permute([2, 0, 3, 1, 4])?;
        let (query, key, value) = (projected.f_get(0)?, projected.f_get(1)?, projected.f_get(2)?);
        let context = tch::Tensor::f_scaled_dot_product_attention(&query, &key, &value, mask, 0.0, false, None, false)?;
        let context = context.f_transpose(1, 2)?.f_reshape([count, length, hidden])?;
        let x = layer.attention_norm.apply(&layer.attention_output.apply(&context)?.f_add(x)?)?;
        let inner = layer.intermediate.apply(&x)?.f_gelu("none")?;
        layer.output_norm.apply(&layer.output.apply(&inner)?.f_add(&x)?)
    }

    /// Embeds the rows of a batch in groups of similar length, so that little is padded, and puts them back in order.
    fn embed_all(&self, rows: &[&[u32]]) -> Result<Vec<f32>, TchError> {
        let hidden = self.words.size()[1] as usize;
        let mut order: Vec<usize> = (0..rows.len()).collect();
        order.sort_by_key(|&at| rows[at].len());
        let mut all = vec![0.0; rows.len() * hidden];
        for group in order.chunks(ROWS_MAX) {
            let grouped: Vec<&[u32]> = group.iter().map(|&at| rows[at]).collect();
            let mut embedded = vec![0.0_f32; group.len() * hidden];
            let length = embedded.len();
            self.embed(&grouped)?.f_contiguous()?.f_copy_data(&mut embedded, length)?;
            for (row, &at) in embedded.chunks_exact(hidden).zip(group) {
                all[at * hidden..][..hidden].copy_from_slice(row);
            }
        }
        Ok(all)
    }
}

impl Runtime for SentenceEncoder {
    fn run(&mut self, batch: &[Input]) -> Vec<Result<Vec<Tensor>, Failed>> {
        // For the thread: nothing is remembered for a backward pass.
        let _guard = tch::no_grad_guard();
        let texts = |input: &Input| match input {
            Input::Tokens(rows) => rows.len(),
            Input::Tensors(_) => 0,
        };
        let rows: Vec<&[u32]> = batch
            .iter()
            .flat_map(|input| match input {
                Input::Tokens(rows) => rows.as_slice(),
                Input::Tensors(_) => &[],
            })
            .map(Vec::as_slice)
            .collect();
        let hidden = self.words.size()[1];
        match self.embed_all(&rows) {
            Err(error) => batch.iter().map(|_| Err(Failed(error.to_string()))).collect(),
            Ok(all) => {
                let mut rest = all.as_slice();
                batch
                    .iter()
                    .map(|input| {
                        let (own, others) = rest.split_at(texts(input) * hidden as usize);
                        rest = others;
                        let shape = vec![texts(input) as i64, hidden];
                        Ok(vec![Tensor { name: self.output.clone(), shape, data: Data::Fp32(own.to_vec()) }])
                    })
                    .collect()
            }
        }
    }
}

/// Any TorchScript module.
struct Script {
    module: CModule,
    spec: Spec,
}

impl Script {
    fn load(directory: &Path, spec: &Spec) -> Result<Script, String> {
        let mut module = CModule::load_on_device(directory.join("model.pt"), Device::Cpu)
            .map_err(|error| format!("model.pt: {}", first_line(&error)))?;
        module.f_set_eval().map_err(|error| format!("model.pt: {}", first_line(&error)))?;
        Ok(Script { module, spec: spec.clone() })
    }

    fn forward(&self, tensors: &[Tensor]) -> Result<Vec<Tensor>, Failed> {
        if let Some(method) = &self.spec.before_each {
            self.module.method_is::<IValue>(method, &[])?;
        }
        let arguments: Vec<IValue> = self
            .spec
            .inputs
            .iter()
            .zip(tensors)
            .map(|(spec, tensor)| argument(spec.scalar, tensor))
            .collect::<Result<_, _>>()?;
        let returned = match self.module.forward_is(&arguments)? {
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
        returned.iter().zip(&self.spec.outputs).map(|(tensor, spec)| taken(&spec.name, tensor)).collect()
    }
}

impl Runtime for Script {
    fn run(&mut self, batch: &[Input]) -> Vec<Result<Vec<Tensor>, Failed>> {
        let _guard = tch::no_grad_guard();
        batch
            .iter()
            .map(|input| match input {
                Input::Tensors(tensors) => self.forward(tensors),
                Input::Tokens(_) => Err(Failed("a TorchScript module takes no tokens".into())),
            })
            .collect()
    }
}

fn argument(scalar: bool, tensor: &Tensor) -> Result<IValue, Failed> {
    if scalar {
        return match &tensor.data {
            Data::Int64(data) if data.len() == 1 => Ok(IValue::Int(data[0])),
            _ => Err(Failed("a scalar input is one INT64".into())),
        };
    }
    let flat = match &tensor.data {
        Data::Bool(data) => tch::Tensor::f_from_slice(data),
        Data::Uint8(data) => tch::Tensor::f_from_slice(data),
        Data::Int8(data) => tch::Tensor::f_from_slice(data),
        Data::Int16(data) => tch::Tensor::f_from_slice(data),
        Data::Int32(data) => tch::Tensor::f_from_slice(data),
        Data::Int64(data) => tch::Tensor::f_from_slice(data),
        Data::Fp32(data) => tch::Tensor::f_from_slice(data),
        Data::Fp64(data) => tch::Tensor::f_from_slice(data),
        Data::Bytes(_) => return Err(Failed("a TorchScript module takes no BYTES".into())),
    }?;
    Ok(IValue::Tensor(flat.f_view(tensor.shape.as_slice())?))
}

fn taken(name: &str, tensor: &tch::Tensor) -> Result<Tensor, Failed> {
    let shape = tensor.size();
    let count = element_count(&shape).unwrap_or(0);
    let tensor = tensor.f_contiguous()?;
    macro_rules! copied {
        ($variant:ident, $zero:expr) => {{
            let mut data = vec![$zero; count];
            tensor.f_copy_data(&mut data, count)?;
            Data::$variant(data)
        }};
    }
    let data = match tensor.f_kind()? {
        Kind::Bool => copied!(Bool, false),
        Kind::Uint8 => copied!(Uint8, 0),
        Kind::Int8 => copied!(Int8, 0),
        Kind::Int16 => copied!(Int16, 0),
        Kind::Int => copied!(Int32, 0),
        Kind::Int64 => copied!(Int64, 0),
        Kind::Float => copied!(Fp32, 0.0),
        Kind::Double => copied!(Fp64, 0.0),
        other => return Err(Failed(format!("the module returned elements of kind {other:?}"))),
    };
    Ok(Tensor { name: name.to_owned(), shape, data })
}

/// libtorch's messages go on for pages.
fn first_line(error: &TchError) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}
