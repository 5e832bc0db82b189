//! One request in every encoding is one request, and every other one is another. One answer in every encoding is read as
//! what was written.

#![allow(clippy::expect_used, reason = "a test that cannot go on fails")]

use std::collections::BTreeMap;

use bytes::Bytes;
use isochrone_tensor::answer::Answer;
use isochrone_tensor::proto::infer_parameter::ParameterChoice;
use isochrone_tensor::proto::model_infer_request::{InferInputTensor, InferRequestedOutputTensor};
use isochrone_tensor::proto::{InferParameter, InferTensorContents, ModelInferRequest};
use isochrone_tensor::request::{Inexact, Parameter, Request, Wanted};
use isochrone_tensor::{Datatype, Json, Tensor, push_text, texts};
use proptest::prelude::*;
use prost::Message;
use serde_json::{Value, json};

const DATATYPES: [Datatype; 14] = [
    Datatype::Bool,
    Datatype::Uint8,
    Datatype::Uint16,
    Datatype::Uint32,
    Datatype::Uint64,
    Datatype::Int8,
    Datatype::Int16,
    Datatype::Int32,
    Datatype::Int64,
    Datatype::Fp16,
    Datatype::Bf16,
    Datatype::Fp32,
    Datatype::Fp64,
    Datatype::Bytes,
];

/// Elements of any kind: of texts too, whose bytes may be anything.
fn tensor(name: &'static str) -> impl Strategy<Value = Tensor> {
    (0..DATATYPES.len(), 0_i64..4, 1_i64..4).prop_flat_map(move |(datatype, rows, columns)| {
        let datatype = DATATYPES[datatype];
        let count = (rows * columns) as usize;
        let data = match datatype.size() {
            Some(size) => prop::collection::vec(any::<u8>(), count * size)
                .prop_map(move |mut bytes| {
                    if datatype == Datatype::Bool {
                        bytes.iter_mut().for_each(|byte| *byte &= 1);
                    }
                    bytes
                })
                .boxed(),
            None => prop::collection::vec(prop::collection::vec(any::<u8>(), 0..6), count)
                .prop_map(|elements| {
                    let mut data = Vec::new();
                    elements.iter().for_each(|element| push_text(&mut data, element).expect("short"));
                    data
                })
                .boxed(),
        };
        data.prop_map(move |data| Tensor { name: name.into(), datatype, shape: vec![rows, columns], data: data.into() })
    })
}

fn parameters() -> impl Strategy<Value = BTreeMap<String, Parameter>> {
    let value = prop_oneof![
        any::<bool>().prop_map(Parameter::Bool),
        any::<i64>().prop_map(|value| Parameter::Integer(value.into())),
        any::<u64>().prop_map(|value| Parameter::Integer(value.into())),
        (-1e9_f64..1e9).prop_map(|value| Parameter::Number(value + 0.5)),
        ".{0,6}".prop_map(Parameter::Text),
    ];
    prop::collection::btree_map("[a-d]{1,2}", value, 0..3)
}

fn request() -> impl Strategy<Value = Request> {
    (tensor("a"), prop::option::of(tensor("b")), prop::sample::subsequence(vec!["x", "y"], 0..=2), parameters())
        .prop_map(|(first, second, outputs, parameters)| Request {
            id: Some("i".into()),
            inputs: [Some(first), second].into_iter().flatten().collect(),
            outputs: outputs.into_iter().map(|name| Wanted { name: name.into(), binary: None }).collect(),
            binary: false,
            hurried: false,
            parameters,
        })
}

fn plain(value: &Parameter) -> Value {
    match value {
        Parameter::Bool(value) => json!(value),
        Parameter::Integer(value) => i64::try_from(*value).map_or_else(|_| json!(*value as u64), |value| json!(value)),
        Parameter::Number(value) => json!(value),
        Parameter::Text(value) => json!(value),
    }
}

/// As a client of the JSON form writes it, or of the binary one. `None` where JSON cannot say it.
fn http(request: &Request, binary: bool) -> Option<Request> {
    let (mut inputs, mut attached) = (Vec::new(), Vec::new());
    for tensor in &request.inputs {
        let mut input = json!({ "name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape });
        if binary {
            input["parameters"] = json!({ "binary_data_size": tensor.data.len() });
            attached.extend_from_slice(&tensor.data);
        } else {
            input["data"] = serde_json::to_value(Json(tensor)).ok()?;
        }
        inputs.push(input);
    }
    let outputs: Vec<Value> = request.outputs.iter().map(|output| json!({ "name": output.name })).collect();
    let mut parameters: serde_json::Map<String, Value> =
        request.parameters.iter().map(|(name, value)| (name.clone(), plain(value))).collect();
    parameters.insert("binary_data_output".into(), false.into());
    let body = json!({ "id": request.id, "inputs": inputs, "outputs": outputs, "parameters": parameters });
    let mut body = body.to_string().into_bytes();
    let header = body.len().to_string();
    body.extend_from_slice(&attached);
    let header = binary.then_some(header.as_bytes());
    Some(Request::from_http(&body.into(), header).expect("exact"))
}

fn contents(tensor: &Tensor) -> Option<InferTensorContents> {
    let data = &tensor.data;
    let mut contents = InferTensorContents::default();
    macro_rules! numbers {
        ($field:ident, $type:ty) => {
            contents.$field = data
                .chunks_exact(size_of::<$type>())
                .map(|bytes| <$type>::from_le_bytes(bytes.try_into().expect("whole")).into())
                .collect()
        };
    }
    match tensor.datatype {
        Datatype::Bool => contents.bool_contents = data.iter().map(|byte| *byte == 1).collect(),
        Datatype::Int8 => numbers!(int_contents, i8),
        Datatype::Int16 => numbers!(int_contents, i16),
        Datatype::Int32 => numbers!(int_contents, i32),
        Datatype::Int64 => numbers!(int64_contents, i64),
        Datatype::Uint8 => numbers!(uint_contents, u8),
        Datatype::Uint16 => numbers!(uint_contents, u16),
        Datatype::Uint32 => numbers!(uint_contents, u32),
        Datatype::Uint64 => numbers!(uint64_contents, u64),
        Datatype::Fp32 => numbers!(fp32_contents, f32),
        Datatype::Fp64 => numbers!(fp64_contents, f64),
        Datatype::Fp16 | Datatype::Bf16 => return None,
        Datatype::Bytes => {
            contents.bytes_contents =
                texts(data).map(|element| Bytes::copy_from_slice(element.expect("whole"))).collect();
        }
    }
    Some(contents)
}

fn message(request: &Request, raw: bool) -> Option<ModelInferRequest> {
    let choice = |value: &Parameter| match value {
        Parameter::Bool(value) => ParameterChoice::BoolParam(*value),
        Parameter::Integer(value) => match i64::try_from(*value) {
            Ok(value) => ParameterChoice::Int64Param(value),
            Err(_) => ParameterChoice::Uint64Param(*value as u64),
        },
        Parameter::Number(value) => ParameterChoice::DoubleParam(*value),
        Parameter::Text(value) => ParameterChoice::StringParam(value.clone()),
    };
    let inputs = request.inputs.iter().map(|tensor| {
        Some(InferInputTensor {
            name: tensor.name.clone(),
            datatype: tensor.datatype.to_string(),
            shape: tensor.shape.clone(),
            parameters: BTreeMap::new(),
            contents: if raw { None } else { Some(contents(tensor)?) },
        })
    });
    let output = |output: &Wanted| InferRequestedOutputTensor { name: output.name.clone(), ..Default::default() };
    let parameter = |value| InferParameter { parameter_choice: Some(choice(value)) };
    Some(ModelInferRequest {
        model_name: "m".into(),
        id: request.id.clone().unwrap_or_default(),
        parameters: request.parameters.iter().map(|(name, value)| (name.clone(), parameter(value))).collect(),
        inputs: inputs.collect::<Option<_>>()?,
        outputs: request.outputs.iter().map(output).collect(),
        raw_input_contents: if raw { request.inputs.iter().map(|t| t.data.clone()).collect() } else { Vec::new() },
        ..ModelInferRequest::default()
    })
}

fn digest(request: &Request) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    request.digest(&mut hasher);
    hasher.finalize()
}

proptest! {
    #[test]
    fn the_encodings_of_a_request_are_one(request in request()) {
        let grpc = |raw| message(&request, raw).map(|message| Request::from_grpc(&message.encode_to_vec().into()).expect("exact"));
        let read = [http(&request, false), http(&request, true), grpc(true), grpc(false)];
        for read in read.into_iter().flatten() {
            // NaN is another than itself, but has the same bytes.
            prop_assert_eq!(digest(&read), digest(&request));
            prop_assert_eq!(&read.inputs, &request.inputs);
            prop_assert_eq!(&read.parameters, &request.parameters);
        }
    }

    #[test]
    fn any_change_is_another_request(request in request(), other in request(), kind in 0..8, at: prop::sample::Index, bit in 0_u32..8) {
        let mut changed = request.clone();
        match kind {
            0 => {
                let tensor = &mut changed.inputs[0];
                prop_assume!(!tensor.data.is_empty());
                let mut data = tensor.data.to_vec();
                data[at.index(tensor.data.len())] ^= 1_u8 << bit;
                tensor.data = data.into();
            }
            1 => changed.inputs[0].shape.push(1),
            2 => changed.inputs[0].shape.reverse(),
            3 => changed.inputs[0].name.push('\0'),
            4 => drop(changed.parameters.insert("e".into(), Parameter::Text(String::new()))),
            5 => changed.outputs.push(Wanted { name: "z".into(), binary: None }),
            6 => changed.inputs[0].datatype = DATATYPES[at.index(DATATYPES.len())],
            _ => changed = other,
        }
        prop_assume!((&changed.inputs, &changed.outputs, &changed.parameters) != (&request.inputs, &request.outputs, &request.parameters));
        prop_assert_ne!(digest(&changed), digest(&request));
    }

    /// The order of inputs and what the client calls it are no part of it, nor how it wants its outputs.
    #[test]
    fn what_means_nothing_changes_nothing(request in request()) {
        let mut same = request.clone();
        same.inputs.reverse();
        same.id = None;
        same.binary = true;
        same.outputs.iter_mut().for_each(|output| output.binary = Some(true));
        prop_assert_eq!(digest(&same), digest(&request));
    }

    #[test]
    fn an_answer_is_read_as_it_was_written(x in tensor("x"), y in tensor("y"), binary: bool, wanted: Option<bool>) {
        let answer = Answer {
            model: "m".into(),
            version: "1".into(),
            parameters: BTreeMap::from([("digest".into(), "d".into())]),
            outputs: vec![x, y],
        };
        let outputs = [Wanted { name: "x".into(), binary: wanted }];
        if let Ok(written) = answer.to_http(Some("i"), &outputs, binary) {
            let header = written.header.map(|header| header.to_string());
            let read = Answer::from_http(&written.body.clone().into(), header.as_deref().map(str::as_bytes));
            let again = read.clone().expect("exact").to_http(Some("i"), &outputs, binary);
            prop_assert_eq!(again.expect("exact"), written);
            prop_assert_eq!(read, Ok(answer.clone()));
        }
        let message = answer.to_grpc(Some("i")).encode_to_vec();
        prop_assert_eq!(Answer::from_grpc(message.into()), Ok(answer));
    }

    #[test]
    fn nothing_that_is_read_crashes(bytes: Vec<u8>, text: String, header in prop::option::of(0_usize..40)) {
        for bytes in [Bytes::from(bytes), Bytes::from(text.into_bytes())] {
            let header = header.map(|header| header.to_string());
            let header = header.as_deref().map(str::as_bytes);
            let _ = (Request::from_http(&bytes, header), Request::from_grpc(&bytes));
            let _ = (Answer::from_http(&bytes, header), Answer::from_grpc(bytes.clone()));
        }
    }
}

#[test]
fn what_could_be_read_in_two_ways_is_not_mapped() {
    let inputs = r#""inputs":[{"name":"a","datatype":"FP32","shape":[1],"data":[1]}]"#;
    let read = |body: String| Request::from_http(&body.into(), None);
    assert!(read(format!("{{{inputs}}}")).is_ok());
    for (members, why) in [
        (r#""parameters":{"a":1,"a":2}"#, Inexact("a name that stands twice")),
        (r#""parameters":{"sequence_id":7}"#, Inexact("a sequence")),
        (r#""parameters":{"a":[1]}"#, Inexact("unknown members")),
        (r#""parameters":{"a":null}"#, Inexact("unknown members")),
        (r#""model":"m""#, Inexact("unknown members")),
        (r#""outputs":[{"name":"x","parameters":{"classification":2}}]"#, Inexact("parameters of an output")),
        (r#""outputs":[{"name":"x","parameters":[true]}]"#, Inexact("unknown members")),
        (r#""parameters":{"timeout":-1}"#, Inexact("a parameter of another kind")),
        (r#""parameters":{"binary_data_output":"true"}"#, Inexact("a parameter of another kind")),
        (r#""outputs":[{"name":"x"},{"name":"x"}]"#, Inexact("a name that stands twice")),
        (inputs, Inexact("unknown members")),
    ] {
        assert_eq!(read(format!("{{{inputs},{members}}}")), Err(why), "{members}");
    }
    for (input, why) in [
        (r#"{"name":"a","datatype":"FP32","shape":[2],"data":[1]}"#, Inexact("elements that do not fit")),
        (
            r#"{"name":"a","datatype":"FP32","shape":[1],"data":[1],"parameters":{"x":1}}"#,
            Inexact("parameters of an input"),
        ),
        (r#"{"name":"a","datatype":"FP33","shape":[1],"data":[1]}"#, Inexact("an unknown datatype")),
        (r#"{"name":"a","datatype":"INT8","shape":[1],"data":[300]}"#, Inexact("elements that do not fit")),
        (r#"{"name":"a","datatype":"FP32","shape":[-1],"data":[1]}"#, Inexact("a shape without a size")),
    ] {
        assert_eq!(read(format!("{{\"inputs\":[{input}]}}")), Err(why), "{input}");
    }
    let many: Vec<String> = (0..300).map(|at| format!("\"p{at}\":1")).collect();
    let many = format!("{{{inputs},\"parameters\":{{{}}}}}", many.join(","));
    assert_eq!(read(many), Err(Inexact("too many names")));
    assert!(read(format!("{{{inputs},\"parameters\":{{\"timeout\":5}}}}")).expect("exact").hurried);
    // A field that is not known here.
    let request = Request::from_http(&format!("{{{inputs}}}").into(), None).expect("exact");
    let mut bytes = message(&request, true).expect("sayable").encode_to_vec();
    bytes.extend_from_slice(b"\xfa\x3f\x01x");
    assert_eq!(Request::from_grpc(&bytes.into()), Err(Inexact("unknown members")));
}
