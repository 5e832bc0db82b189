//! A BERT-like sentence encoder over its safetensors, as published ("BERT: Pre-training of Deep Bidirectional
//! Transformers", Devlin et al., 2019; mean pooling after "Sentence-BERT", Reimers and Gurevych, 2019).
//!
//! Rows are packed, not padded: the tokens of a whole batch are one matrix [tokens, hidden], so that every product but
//! attention computes exactly what was asked for. Attention runs over each group of rows of equal length.

use std::collections::HashMap;
use std::path::Path;

use bytes::Bytes;
use serde::Deserialize;
use tch::{Device, Kind, TchError};

use super::torch::{bytes_of, to_device};
use super::{Failed, Input, Runtime};
use crate::model::{Precision, Spec};
use crate::tensor::{Datatype, Tensor};

/// `config.json` of a BERT-like model, as far as it decides the computation.
#[derive(Deserialize)]
struct Config {
    hidden_size: i64,
    num_hidden_layers: usize,
    num_attention_heads: i64,
    layer_norm_eps: f64,
    hidden_act: String,
    #[serde(default)]
    position_embedding_type: Option<String>,
}

struct Dense {
    /// Shape [in, out], as it is multiplied: the other way round each product is a fifth to a third slower.
    weight: tch::Tensor,
    bias: tch::Tensor,
}

impl Dense {
    /// From shape [out, in], as it is published.
    fn of(weight: &tch::Tensor, bias: tch::Tensor) -> Dense {
        Dense { weight: weight.transpose(0, 1).contiguous(), bias }
    }

    fn apply(&self, x: &tch::Tensor) -> Result<tch::Tensor, TchError> {
        self.bias.f_addmm(x, &self.weight)
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
    /// Query, key and value in one product: [hidden, 3 * hidden].
    attention: Dense,
    attention_output: Dense,
    attention_norm: Norm,
    intermediate: Dense,
    output: Dense,
    output_norm: Norm,
}

/// A sentence encoder that can compute.
pub(super) struct SentenceEncoder {
    words: tch::Tensor,
    positions: tch::Tensor,
    /// The one token type that single texts have: [hidden].
    token_type: tch::Tensor,
    norm: Norm,
    layers: Vec<Layer>,
    heads: i64,
    hidden: i64,
    output: String,
    device: Device,
    /// Tokens that are computed at once at most, however many a request has: they bound the memory.
    tokens_max: usize,
}

/// Takes tensors out of a safetensors file by name.
struct Weights {
    tensors: HashMap<String, tch::Tensor>,
    kind: Kind,
    device: Device,
}

impl Weights {
    fn take(&mut self, name: &str, shape: &[i64]) -> Result<tch::Tensor, String> {
        let tensor = self.tensors.remove(name).ok_or_else(|| format!("model.safetensors has no tensor `{name}`"))?;
        let size = tensor.size();
        // -1: any. A wrong size would fail in the middle of a batch.
        if size.len() != shape.len() || size.iter().zip(shape).any(|(&size, &wanted)| wanted != -1 && size != wanted) {
            return Err(format!("model.safetensors: `{name}` has shape {size:?}, not {shape:?}"));
        }
        Ok(tensor.to_kind(self.kind).to_device(self.device))
    }

    /// A weight [outputs, inputs] and its bias.
    fn pair(&mut self, name: &str, outputs: i64, inputs: i64) -> Result<(tch::Tensor, tch::Tensor), String> {
        let weight = self.take(&format!("{name}.weight"), &[outputs, inputs])?;
        let bias = self.take(&format!("{name}.bias"), &[weight.size()[0]])?;
        Ok((weight, bias))
    }

    fn dense(&mut self, name: &str, outputs: i64, inputs: i64) -> Result<Dense, String> {
        let (weight, bias) = self.pair(name, outputs, inputs)?;
        Ok(Dense::of(&weight, bias))
    }

    fn norm(&mut self, name: &str, size: i64, epsilon: f64) -> Result<Norm, String> {
        let [weight, bias] = ["weight", "bias"].map(|part| self.take(&format!("{name}.{part}"), &[size]));
        Ok(Norm { weight: weight?, bias: bias?, epsilon })
    }
}

/// Rows of equal length that lie behind each other in the packed matrix.
struct Group {
    /// The first token's place.
    begin: i64,
    rows: i64,
    length: i64,
}

impl SentenceEncoder {
    /// Loads it.
    ///
    /// # Errors
    /// What is wrong with its files.
    pub(super) fn load(directory: &Path, spec: &Spec, device: Device) -> Result<SentenceEncoder, String> {
        let config = std::fs::read(directory.join("config.json")).map_err(|error| format!("config.json: {error}"))?;
        let config: Config = serde_json::from_slice(&config).map_err(|error| format!("config.json: {error}"))?;
        if config.hidden_act != "gelu" || config.position_embedding_type.is_some_and(|kind| kind != "absolute") {
            return Err("config.json: only hidden_act gelu with absolute positions is known here".into());
        }
        let hidden = config.hidden_size;
        if config.num_attention_heads < 1 || hidden < 1 || hidden % config.num_attention_heads != 0 {
            return Err("config.json: hidden_size is no multiple of num_attention_heads".into());
        }
        if spec.outputs[0].shape.last() != Some(&hidden) {
            return Err(format!("model.toml: the output's last size is not the model's, {hidden}"));
        }
        let tensors = tch::Tensor::read_safetensors(directory.join("model.safetensors"))
            .map_err(|error| format!("model.safetensors: {error}"))?;
        let kind = match spec.precision {
            Precision::F32 => Kind::Float,
            Precision::Bf16 => Kind::BFloat16,
        };
        let mut weights = Weights { tensors: tensors.into_iter().collect(), kind, device };
        let epsilon = config.layer_norm_eps;
        let words = weights.take("embeddings.word_embeddings.weight", &[-1, hidden])?;
        let positions = weights.take("embeddings.position_embeddings.weight", &[-1, hidden])?;
        if spec.max_tokens.is_none_or(|most| i64::try_from(most).is_ok_and(|most| most > positions.size()[0])) {
            return Err(format!("model.toml: max_tokens is beyond the model's {} positions", positions.size()[0]));
        }
        let token_type = weights.take("embeddings.token_type_embeddings.weight", &[-1, hidden])?.get(0);
        let norm = weights.norm("embeddings.LayerNorm", hidden, epsilon)?;
        let mut layers = Vec::new();
        for at in 0..config.num_hidden_layers {
            let name = |part: &str| format!("encoder.layer.{at}.{part}");
            let (mut projections, mut biases) = (Vec::new(), Vec::new());
            for part in ["query", "key", "value"] {
                let (weight, bias) = weights.pair(&name(&format!("attention.self.{part}")), hidden, hidden)?;
                projections.push(weight);
                biases.push(bias);
            }
            let attention = Dense::of(&tch::Tensor::cat(&projections, 0), tch::Tensor::cat(&biases, 0));
            let intermediate = weights.dense(&name("intermediate.dense"), -1, hidden)?;
            let inner = intermediate.weight.size()[1];
            layers.push(Layer {
                attention,
                attention_output: weights.dense(&name("attention.output.dense"), hidden, hidden)?,
                attention_norm: weights.norm(&name("attention.output.LayerNorm"), hidden, epsilon)?,
                intermediate,
                output: weights.dense(&name("output.dense"), hidden, inner)?,
                output_norm: weights.norm(&name("output.LayerNorm"), hidden, epsilon)?,
            });
        }
        let (heads, output) = (config.num_attention_heads, spec.outputs[0].name.clone());
        let tokens_max = spec.batching().max_batch_tokens;
        Ok(SentenceEncoder { words, positions, token_type, norm, layers, heads, hidden, output, device, tokens_max })
    }

    /// Embeds rows of token ids, none empty: FP32 bytes of [rows, hidden], each of unit length, in the rows' order.
    fn embed_all(&self, rows: &[&[u32]]) -> Result<Vec<u8>, TchError> {
        let (mut all, mut rest) = (Vec::with_capacity(rows.len() * self.hidden as usize * size_of::<f32>()), rows);
        while !rest.is_empty() {
            let mut tokens = 0;
            let fits = |row: &&[u32]| {
                tokens += row.len();
                tokens <= self.tokens_max
            };
            let (now, later) = rest.split_at(rest.iter().copied().take_while(fits).count().max(1));
            all.append(&mut self.embed(now)?);
            rest = later;
        }
        Ok(all)
    }

    fn embed(&self, rows: &[&[u32]]) -> Result<Vec<u8>, TchError> {
        // Sorted by length, so that equal lengths lie behind each other.
        let mut order: Vec<usize> = (0..rows.len()).collect();
        order.sort_by_key(|&at| rows[at].len());
        let tokens = rows.iter().map(|row| row.len()).sum();
        let (mut ids, mut places, mut owners) =
            (Vec::with_capacity(tokens), Vec::with_capacity(tokens), Vec::with_capacity(tokens));
        let mut groups: Vec<Group> = Vec::new();
        for &at in &order {
            let length = rows[at].len() as i64;
            match groups.last_mut().filter(|group| group.length == length) {
                Some(group) => group.rows += 1,
                None => groups.push(Group { begin: ids.len() as i64, rows: 1, length }),
            }
            ids.extend(rows[at].iter().map(|&id| i64::from(id)));
            places.extend(0..length);
            // Sums go straight to where the row came from.
            owners.resize(ids.len(), at as i64);
        }
        let on_device = |numbers: &[i64]| to_device(tch::Tensor::f_from_slice(numbers)?, self.device);
        let (ids, places, owners) = (on_device(&ids)?, on_device(&places)?, on_device(&owners)?);

        let words = tch::Tensor::f_embedding(&self.words, &ids, -1, false, false)?;
        let places = tch::Tensor::f_embedding(&self.positions, &places, -1, false, false)?;
        let mut x = self.norm.apply(&words.f_add(&places)?.f_add(&self.token_type)?)?;
        for layer in &self.layers {
            x = self.layer(layer, &x, &groups)?;
        }
        let sums = tch::Tensor::f_zeros([rows.len() as i64, self.hidden], (Kind::Float, self.device))?.f_index_add(
            0,
            &owners,
            &x.f_to_kind(Kind::Float)?,
        )?;
        // The mean's divisor falls out of the normalisation: only the direction counts.
        let norms = sums.f_norm_scalaropt_dim(2, [1_i64].as_slice(), true)?.f_clamp_min(1e-12)?;
        bytes_of(&sums.f_div(&norms)?)
    }

    fn layer(&self, layer: &Layer, x: &tch::Tensor, groups: &[Group]) -> Result<tch::Tensor, TchError> {
        let size = self.hidden / self.heads;
        let projected = layer.attention.apply(x)?;
        let mut contexts = Vec::with_capacity(groups.len());
        for group in groups {
            // [rows * length, 3 * hidden] -> 3 of [rows, heads, length, size].
            let own = projected.f_narrow(0, group.begin, group.rows * group.length)?;
            let own = own.f_view([group.rows, group.length, 3, self.heads, size])?.f_permute([2, 0, 3, 1, 4])?;
            let (query, key, value) = (own.f_get(0)?, own.f_get(1)?, own.f_get(2)?);
            let none: Option<&tch::Tensor> = None;
            let context =
                tch::Tensor::f_scaled_dot_product_attention(&query, &key, &value, none, 0.0, false, None, false)?;
            contexts.push(context.f_transpose(1, 2)?.f_reshape([group.rows * group.length, self.hidden])?);
        }
        let context = match contexts.as_slice() {
            [one] => one.shallow_clone(),
            several => tch::Tensor::f_cat(several, 0)?,
        };
        let x = layer.attention_norm.apply(&layer.attention_output.apply(&context)?.f_add_(x)?)?;
        let inner = layer.intermediate.apply(&x)?.f_gelu("none")?;
        layer.output_norm.apply(&layer.output.apply(&inner)?.f_add_(&x)?)
    }
}

impl Runtime for SentenceEncoder {
    fn run(&mut self, batch: &[Input]) -> Vec<Result<Vec<Tensor>, Failed>> {
        // For the thread: nothing is remembered for a backward pass.
        let _guard = tch::no_grad_guard();
        let texts = |input: &Input| match input {
            Input::Tokens(rows) => rows.len(),
            Input::Tensors { .. } => 0,
        };
        let rows: Vec<&[u32]> = batch
            .iter()
            .flat_map(|input| match input {
                Input::Tokens(rows) => rows.as_slice(),
                Input::Tensors { .. } => &[],
            })
            .map(Vec::as_slice)
            .collect();
        match self.embed_all(&rows) {
            Err(error) => batch.iter().map(|_| Err(Failed(error.to_string()))).collect(),
            Ok(all) => {
                let (mut rest, row) = (Bytes::from(all), self.hidden as usize * size_of::<f32>());
                batch
                    .iter()
                    .map(|input| {
                        let data = rest.split_to(texts(input) * row);
                        let shape = vec![texts(input) as i64, self.hidden];
                        Ok(vec![Tensor { name: self.output.clone(), datatype: Datatype::Fp32, shape, data }])
                    })
                    .collect()
            }
        }
    }
}
