//! What an inference asks for, whatever encoding it came in.
//!
//! The same tensors in JSON, in binary and over gRPC are the same [`Request`] but for `id` and how the outputs are wanted,
//! and so have one [digest](Request::digest). What has no such form, or one that a server could read in another way, is
//! [`Inexact`]: it is not refused, but its answer is nobody else's.

use std::borrow::Cow;
use std::collections::BTreeMap;

use bytes::Bytes;
use prost::Message;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

use crate::proto::infer_parameter::ParameterChoice;
use crate::proto::model_infer_request::InferInputTensor;
use crate::proto::{InferParameter, InferTensorContents, ModelInferRequest};
use crate::{Datatype, Tensor, checked, element_count, envelope, from_json, push_text};

/// Why something cannot be mapped exactly, in a word or two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inexact(pub &'static str);

/// One inference.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// What the client calls it, to be given back.
    pub id: Option<String>,
    /// Each name once.
    pub inputs: Vec<Tensor>,
    /// The outputs that are asked for, in this order; none: all.
    pub outputs: Vec<Wanted>,
    /// Over HTTP: outputs are binary unless one says otherwise.
    pub binary: bool,
    /// It has a time of its own, after which its worker gives it up.
    pub hurried: bool,
    /// What else is asked, but for what only this request's own treatment depends on.
    pub parameters: BTreeMap<String, Parameter>,
}

/// An output that is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Its name.
    pub name: String,
    /// Over HTTP: in binary or in JSON, if it says so.
    pub binary: Option<bool>,
}

/// A parameter of the protocol.
#[derive(Clone, Debug, PartialEq)]
pub enum Parameter {
    /// true or false.
    Bool(bool),
    /// A whole number, of 64 bits with or without a sign.
    Integer(i128),
    /// Any other number.
    Number(f64),
    /// A text.
    Text(String),
}

/// Inputs, outputs or parameters, at most: each is compared with the others.
const NAMES_MAX: usize = 256;

impl Request {
    /// Reads a request over HTTP. `header` is the value of `Inference-Header-Content-Length`.
    ///
    /// # Errors
    /// It has no exact form.
    pub fn from_http(body: &Bytes, header: Option<&[u8]>) -> Result<Request, Inexact> {
        let (json, binary) = envelope::part(body, header).map_err(|_| Inexact("malformed"))?;
        let request: HttpRequest<'_> = serde_json::from_slice(&json).map_err(|_| Inexact("unknown members"))?;
        let sizes: Vec<Option<u64>> = request.inputs.iter().map(HttpInput::binary).collect::<Result<_, _>>()?;
        let parts = envelope::distribute(&binary, sizes.into_iter()).map_err(|_| Inexact("malformed"))?;
        let inputs = request.inputs.iter().zip(parts).map(|(input, part)| {
            let (datatype, count) = known(&input.datatype, &input.shape)?;
            let data = match (part, input.data) {
                (Some(part), None) => checked(datatype, count, &part).map(|()| part),
                (None, Some(json)) => from_json(datatype, count, json.get()),
                _ => return Err(Inexact("malformed")),
            };
            let data = data.map_err(|_| Inexact("elements that do not fit"))?;
            Ok(Tensor { name: input.name.clone().into_owned(), datatype, shape: input.shape.clone(), data })
        });
        let outputs = request.outputs.into_iter().flatten().map(|output| {
            let binary = match output.parameters.as_ref().map(|parameters| &*parameters.0) {
                None | Some([]) => None,
                Some([(name, Parameter::Bool(binary))]) if name == "binary_data" => Some(*binary),
                Some(_) => return Err(Inexact("parameters of an output")),
            };
            Ok(Wanted { name: output.name.into_owned(), binary })
        });
        let outputs = outputs.collect::<Result<Vec<_>, _>>()?;
        let parameters = request.parameters.map(|parameters| parameters.0).unwrap_or_default();
        let binary =
            parameters.iter().any(|(name, value)| name == "binary_data_output" && *value == Parameter::Bool(true));
        let id = request.id.map(Cow::into_owned);
        Request::new(id, inputs.collect::<Result<_, _>>()?, outputs, binary, parameters)
    }

    /// Reads a gRPC message, without its prefix. The model and its version are the caller's to read.
    ///
    /// # Errors
    /// It has no exact form.
    pub fn from_grpc(message: &Bytes) -> Result<Request, Inexact> {
        let request = ModelInferRequest::decode(message.clone()).map_err(|_| Inexact("malformed"))?;
        // What is not known here was left out, and could mean something to the server.
        if request.encode_to_vec() != *message {
            return Err(Inexact("unknown members"));
        }
        let raw = &request.raw_input_contents;
        if !(raw.is_empty() || raw.len() == request.inputs.len()) {
            return Err(Inexact("malformed"));
        }
        let inputs = request.inputs.into_iter().enumerate().map(|(at, input)| {
            if !input.parameters.is_empty() {
                return Err(Inexact("parameters of an input"));
            }
            let (datatype, count) = known(&input.datatype, &input.shape)?;
            let data =
                elements(&input, raw.get(at), datatype, count).map_err(|_| Inexact("elements that do not fit"))?;
            Ok(Tensor { name: input.name, datatype, shape: input.shape, data })
        });
        let inputs = inputs.collect::<Result<_, _>>()?;
        let outputs = request.outputs.into_iter().map(|output| match output.parameters.is_empty() {
            true => Ok(Wanted { name: output.name, binary: None }),
            false => Err(Inexact("parameters of an output")),
        });
        let parameters = request.parameters.into_iter().map(|(name, value)| Ok((name, parameter(value)?)));
        // An empty text is what is not there (proto3).
        let id = Some(request.id).filter(|id| !id.is_empty());
        Request::new(id, inputs, outputs.collect::<Result<_, _>>()?, false, parameters.collect::<Result<_, _>>()?)
    }

    fn new(
        id: Option<String>,
        inputs: Vec<Tensor>,
        outputs: Vec<Wanted>,
        binary: bool,
        parameters: Vec<(String, Parameter)>,
    ) -> Result<Request, Inexact> {
        let twice = |names: &[&str]| (1..names.len()).any(|at| names[..at].contains(&names[at]));
        if inputs.len().max(outputs.len()).max(parameters.len()) > NAMES_MAX {
            return Err(Inexact("too many names"));
        }
        let names: [Vec<&str>; 3] = [
            inputs.iter().map(|input| &*input.name).collect(),
            outputs.iter().map(|output| &*output.name).collect(),
            parameters.iter().map(|(name, _)| &**name).collect(),
        ];
        if names.iter().any(|names| twice(names)) {
            return Err(Inexact("a name that stands twice"));
        }
        // State between requests makes each answer its own.
        if names[2].iter().any(|name| name.starts_with("sequence_")) {
            return Err(Inexact("a sequence"));
        }
        let mut hurried = false;
        let mut meant = BTreeMap::new();
        for (name, value) in parameters {
            // These say how to treat this request, not what to compute. What they cannot be is the worker's to refuse.
            match (&*name, &value) {
                ("binary_data_output", Parameter::Bool(_)) | ("priority", Parameter::Integer(_)) => {}
                ("timeout", Parameter::Integer(micros)) if u64::try_from(*micros).is_ok() => hurried |= *micros > 0,
                ("binary_data_output" | "priority" | "timeout", _) => {
                    return Err(Inexact("a parameter of another kind"));
                }
                _ => drop(meant.insert(name, value)),
            }
        }
        Ok(Request { id, inputs, outputs, binary, hurried, parameters: meant })
    }

    /// Adds what the request means to a digest: inputs and parameters by name, outputs in their order, every length before
    /// what it counts, so that no two meanings are the same bytes.
    pub fn digest(&self, hasher: &mut blake3::Hasher) {
        let mut inputs: Vec<&Tensor> = self.inputs.iter().collect();
        inputs.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        number(hasher, inputs.len());
        for Tensor { name, datatype, shape, data } in inputs {
            text(hasher, name);
            hasher.update(&[*datatype as u8]);
            number(hasher, shape.len());
            for size in shape {
                hasher.update(&size.to_le_bytes());
            }
            number(hasher, data.len());
            hasher.update(data);
        }
        number(hasher, self.outputs.len());
        self.outputs.iter().for_each(|output| text(hasher, &output.name));
        number(hasher, self.parameters.len());
        for (name, value) in &self.parameters {
            text(hasher, name);
            match value {
                Parameter::Bool(value) => {
                    hasher.update(&[0, u8::from(*value)]);
                }
                Parameter::Integer(value) => {
                    hasher.update(&[1]).update(&value.to_le_bytes());
                }
                Parameter::Number(value) => {
                    hasher.update(&[2]).update(&value.to_bits().to_le_bytes());
                }
                Parameter::Text(value) => {
                    hasher.update(&[3]);
                    text(hasher, value);
                }
            }
        }
    }
}

/// Adds a number to a digest.
pub fn number(hasher: &mut blake3::Hasher, number: usize) {
    hasher.update(&(number as u64).to_le_bytes());
}

/// Adds a text to a digest, behind its length.
pub fn text(hasher: &mut blake3::Hasher, text: &str) {
    number(hasher, text.len());
    hasher.update(text.as_bytes());
}

fn known(datatype: &str, shape: &[i64]) -> Result<(Datatype, usize), Inexact> {
    let datatype = Datatype::named(datatype).ok_or(Inexact("an unknown datatype"))?;
    Ok((datatype, element_count(shape).ok_or(Inexact("a shape without a size"))?))
}

fn parameter(value: InferParameter) -> Result<Parameter, Inexact> {
    Ok(match value.parameter_choice.ok_or(Inexact("a parameter without a value"))? {
        ParameterChoice::BoolParam(value) => Parameter::Bool(value),
        ParameterChoice::Int64Param(value) => Parameter::Integer(value.into()),
        ParameterChoice::Uint64Param(value) => Parameter::Integer(value.into()),
        ParameterChoice::DoubleParam(value) => Parameter::Number(value),
        ParameterChoice::StringParam(value) => Parameter::Text(value),
    })
}

/// An input's elements, raw or from the field that fits their datatype.
///
/// # Errors
/// What does not fit, in words for the client.
pub fn elements(
    input: &InferInputTensor,
    raw: Option<&Bytes>,
    datatype: Datatype,
    count: usize,
) -> Result<Bytes, String> {
    let data = match (raw, &input.contents) {
        (Some(_), Some(_)) => return Err("it has both contents and raw_input_contents".into()),
        (Some(raw), None) => raw.clone(),
        (None, Some(contents)) => from_contents(datatype, contents)?,
        (None, None) if count == 0 => Bytes::new(),
        (None, None) => return Err("it has neither contents nor raw_input_contents".into()),
    };
    checked(datatype, count, &data)?;
    Ok(data)
}

fn from_contents(datatype: Datatype, contents: &InferTensorContents) -> Result<Bytes, String> {
    fn narrow<const N: usize, T: Copy, U: TryFrom<T>>(from: &[T], bytes: fn(U) -> [u8; N]) -> Result<Vec<u8>, String> {
        let mut data = Vec::with_capacity(from.len() * N);
        for (at, &number) in from.iter().enumerate() {
            let number = U::try_from(number).map_err(|_| format!("element {at} does not fit"))?;
            data.extend_from_slice(&bytes(number));
        }
        Ok(data)
    }
    let data = match datatype {
        Datatype::Bool => contents.bool_contents.iter().map(|&value| u8::from(value)).collect(),
        Datatype::Int8 => narrow(&contents.int_contents, i8::to_le_bytes)?,
        Datatype::Int16 => narrow(&contents.int_contents, i16::to_le_bytes)?,
        Datatype::Int32 => narrow(&contents.int_contents, i32::to_le_bytes)?,
        Datatype::Int64 => narrow(&contents.int64_contents, i64::to_le_bytes)?,
        Datatype::Uint8 => narrow(&contents.uint_contents, u8::to_le_bytes)?,
        Datatype::Uint16 => narrow(&contents.uint_contents, u16::to_le_bytes)?,
        Datatype::Uint32 => narrow(&contents.uint_contents, u32::to_le_bytes)?,
        Datatype::Uint64 => narrow(&contents.uint64_contents, u64::to_le_bytes)?,
        Datatype::Fp32 => narrow(&contents.fp32_contents, f32::to_le_bytes)?,
        Datatype::Fp64 => narrow(&contents.fp64_contents, f64::to_le_bytes)?,
        Datatype::Fp16 | Datatype::Bf16 => return Err(format!("{datatype} is given as raw_input_contents")),
        Datatype::Bytes => {
            let mut data = Vec::new();
            contents.bytes_contents.iter().try_for_each(|element| push_text(&mut data, element))?;
            data
        }
    };
    Ok(data.into())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct HttpRequest<'a> {
    #[serde(borrow)]
    id: Option<Cow<'a, str>>,
    #[serde(borrow)]
    inputs: Vec<HttpInput<'a>>,
    #[serde(borrow, default)]
    outputs: Option<Vec<HttpOutput<'a>>>,
    #[serde(default)]
    parameters: Option<Pairs>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct HttpInput<'a> {
    #[serde(borrow)]
    name: Cow<'a, str>,
    shape: Vec<i64>,
    #[serde(borrow)]
    datatype: Cow<'a, str>,
    #[serde(borrow)]
    data: Option<&'a RawValue>,
    #[serde(default)]
    parameters: Option<Pairs>,
}

impl HttpInput<'_> {
    /// The size of its part of what stands behind the JSON.
    fn binary(&self) -> Result<Option<u64>, Inexact> {
        match self.parameters.as_ref().map(|parameters| &*parameters.0) {
            None | Some([]) => Ok(None),
            Some([(name, Parameter::Integer(size))]) if name == "binary_data_size" => {
                u64::try_from(*size).map(Some).map_err(|_| Inexact("malformed"))
            }
            Some(_) => Err(Inexact("parameters of an input")),
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct HttpOutput<'a> {
    #[serde(borrow)]
    name: Cow<'a, str>,
    #[serde(default)]
    parameters: Option<Pairs>,
}

/// The members of an object, those that stand twice too.
pub(crate) struct Pairs(pub(crate) Vec<(String, Parameter)>);

impl<'de> Deserialize<'de> for Pairs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Pairs, D::Error> {
        struct Members;
        impl<'de> Visitor<'de> for Members {
            type Value = Pairs;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object of parameters")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Pairs, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = members.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(Members)
    }
}

impl<'de> Deserialize<'de> for Parameter {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Parameter, D::Error> {
        struct Scalar;
        impl Visitor<'_> for Scalar {
            type Value = Parameter;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("true, false, a number or a text")
            }

            fn visit_bool<E>(self, value: bool) -> Result<Parameter, E> {
                Ok(Parameter::Bool(value))
            }

            fn visit_i64<E>(self, value: i64) -> Result<Parameter, E> {
                Ok(Parameter::Integer(value.into()))
            }

            fn visit_u64<E>(self, value: u64) -> Result<Parameter, E> {
                Ok(Parameter::Integer(value.into()))
            }

            fn visit_f64<E>(self, value: f64) -> Result<Parameter, E> {
                Ok(Parameter::Number(value))
            }

            fn visit_str<E>(self, value: &str) -> Result<Parameter, E> {
                Ok(Parameter::Text(value.to_owned()))
            }
        }
        deserializer.deserialize_any(Scalar)
    }
}
