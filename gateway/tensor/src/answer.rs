//! What an inference answers, to and from each encoding. The worker writes its answers by this code, and the gateway writes
//! kept ones by it: byte for byte the same.

use std::borrow::Cow;
use std::collections::BTreeMap;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::proto::infer_parameter::ParameterChoice;
use crate::proto::model_infer_response::InferOutputTensor;
use crate::proto::{InferParameter, ModelInferResponse};
use crate::request::{Inexact, Pairs, Parameter, Request, Wanted};
use crate::{Datatype, Json, Tensor, checked, element_count, envelope, from_json};

/// One answer. Its parameters are texts: the worker has no others.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// The model's name.
    pub model: String,
    /// The version that has answered.
    pub version: String,
    /// What the model says beside its outputs.
    pub parameters: BTreeMap<String, String>,
    /// The outputs, in the order in which they were asked for.
    pub outputs: Vec<Tensor>,
}

/// An answer as HTTP carries it.
#[derive(Debug, PartialEq, Eq)]
pub struct Http {
    /// The JSON, and behind it the binary outputs.
    pub body: Vec<u8>,
    /// The length of the JSON, if there is anything behind it: `Inference-Header-Content-Length`.
    pub header: Option<usize>,
}

impl Answer {
    /// Reads an answer over HTTP. `header` is the value of `Inference-Header-Content-Length`.
    ///
    /// # Errors
    /// It has no exact form.
    pub fn from_http(body: &Bytes, header: Option<&[u8]>) -> Result<Answer, Inexact> {
        let (json, binary) = envelope::part(body, header).map_err(|_| Inexact("malformed"))?;
        let answer: HttpAnswer<'_> = serde_json::from_slice(&json).map_err(|_| Inexact("unknown members"))?;
        let sizes = answer.outputs.iter().map(|output| output.parameters.as_ref()?.binary_data_size);
        let parts = envelope::distribute(&binary, sizes).map_err(|_| Inexact("malformed"))?;
        let outputs = answer.outputs.iter().zip(parts).map(|(output, part)| {
            let count = element_count(&output.shape).ok_or(Inexact("a shape without a size"))?;
            let data = match (part, output.data) {
                (Some(part), None) => checked(output.datatype, count, &part).map(|()| part),
                (None, Some(json)) => from_json(output.datatype, count, json.get()),
                _ => return Err(Inexact("malformed")),
            };
            let data = data.map_err(|_| Inexact("elements that do not fit"))?;
            Ok(Tensor {
                name: output.name.clone().into_owned(),
                datatype: output.datatype,
                shape: output.shape.clone(),
                data,
            })
        });
        let parameters = answer.parameters.map(|parameters| parameters.0).unwrap_or_default();
        let parameters = parameters.into_iter().map(|(name, value)| match value {
            Parameter::Text(value) => Ok((name, value)),
            _ => Err(Inexact("a parameter that is no text")),
        });
        Ok(Answer {
            model: answer.model_name.into_owned(),
            version: answer.model_version.into_owned(),
            parameters: parameters.collect::<Result<_, _>>()?,
            outputs: outputs.collect::<Result<_, _>>()?,
        })
    }

    /// Reads a gRPC message, without its prefix.
    ///
    /// # Errors
    /// It has no exact form.
    pub fn from_grpc(message: Bytes) -> Result<Answer, Inexact> {
        let answer = <ModelInferResponse as prost::Message>::decode(message).map_err(|_| Inexact("malformed"))?;
        if answer.raw_output_contents.len() != answer.outputs.len() {
            return Err(Inexact("outputs that are not raw"));
        }
        let outputs = answer.outputs.into_iter().zip(answer.raw_output_contents).map(|(output, data)| {
            let datatype = Datatype::named(&output.datatype).ok_or(Inexact("an unknown datatype"))?;
            let count = element_count(&output.shape).ok_or(Inexact("a shape without a size"))?;
            checked(datatype, count, &data).map_err(|_| Inexact("elements that do not fit"))?;
            Ok(Tensor { name: output.name, datatype, shape: output.shape, data })
        });
        let parameters = answer.parameters.into_iter().map(|(name, value)| match value.parameter_choice {
            Some(ParameterChoice::StringParam(value)) => Ok((name, value)),
            _ => Err(Inexact("a parameter that is no text")),
        });
        Ok(Answer {
            model: answer.model_name,
            version: answer.model_version,
            parameters: parameters.collect::<Result<_, _>>()?,
            outputs: outputs.collect::<Result<_, _>>()?,
        })
    }

    /// Writes it as HTTP has it, to a request with this id, these outputs, and this word on those that say nothing.
    ///
    /// # Errors
    /// An output has what JSON cannot say.
    pub fn to_http(&self, id: Option<&str>, outputs: &[Wanted], binary: bool) -> Result<Http, serde_json::Error> {
        let (mut results, mut attached) = (Vec::new(), Vec::new());
        for (at, tensor) in self.outputs.iter().enumerate() {
            let binary = outputs.get(at).and_then(|output| output.binary).unwrap_or(binary);
            let parameters =
                binary.then_some(HttpOutputParameters { binary_data_size: Some(tensor.data.len() as u64) });
            if binary {
                attached.push(&tensor.data);
            }
            let data = (!binary).then_some(Json(tensor));
            let (name, datatype, shape) = (&*tensor.name, tensor.datatype, &*tensor.shape);
            results.push(HttpResult { name, datatype, shape, parameters, data });
        }
        let (model_name, model_version, parameters) = (&*self.model, &*self.version, &self.parameters);
        let written = HttpWritten { model_name, model_version, id, parameters, outputs: results };
        let mut body = serde_json::to_vec(&written)?;
        let header = (!attached.is_empty()).then_some(body.len());
        attached.iter().for_each(|data| body.extend_from_slice(data));
        Ok(Http { body, header })
    }

    /// Writes it as gRPC has it.
    pub fn to_grpc(&self, id: Option<&str>) -> ModelInferResponse {
        let parameter =
            |value: &String| InferParameter { parameter_choice: Some(ParameterChoice::StringParam(value.clone())) };
        let output = |tensor: &Tensor| InferOutputTensor {
            name: tensor.name.clone(),
            datatype: tensor.datatype.to_string(),
            shape: tensor.shape.clone(),
            ..InferOutputTensor::default()
        };
        ModelInferResponse {
            model_name: self.model.clone(),
            model_version: self.version.clone(),
            id: id.unwrap_or_default().to_owned(),
            parameters: self.parameters.iter().map(|(name, value)| (name.clone(), parameter(value))).collect(),
            outputs: self.outputs.iter().map(output).collect(),
            raw_output_contents: self.outputs.iter().map(|tensor| tensor.data.clone()).collect(),
        }
    }

    /// Whether this is what a request asks for: by its names, in their order.
    pub fn answers(&self, request: &Request) -> bool {
        request.outputs.is_empty()
            || request.outputs.iter().map(|wanted| &wanted.name).eq(self.outputs.iter().map(|tensor| &tensor.name))
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct HttpAnswer<'a> {
    #[serde(borrow)]
    model_name: Cow<'a, str>,
    #[serde(borrow)]
    model_version: Cow<'a, str>,
    #[serde(rename = "id")]
    _id: Option<serde::de::IgnoredAny>,
    #[serde(default)]
    parameters: Option<Pairs>,
    #[serde(borrow)]
    outputs: Vec<HttpOutput<'a>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct HttpOutput<'a> {
    #[serde(borrow)]
    name: Cow<'a, str>,
    datatype: Datatype,
    shape: Vec<i64>,
    #[serde(default)]
    parameters: Option<HttpOutputParameters>,
    #[serde(borrow)]
    data: Option<&'a RawValue>,
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct HttpOutputParameters {
    binary_data_size: Option<u64>,
}

#[derive(Serialize)]
struct HttpWritten<'a> {
    model_name: &'a str,
    model_version: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    parameters: &'a BTreeMap<String, String>,
    outputs: Vec<HttpResult<'a>>,
}

#[derive(Serialize)]
struct HttpResult<'a> {
    name: &'a str,
    datatype: Datatype,
    shape: &'a [i64],
    #[serde(skip_serializing_if = "Option::is_none")]
    parameters: Option<HttpOutputParameters>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<Json<'a>>,
}
