//! Whatever bytes come as a body: parted, distributed, read as tensors of each datatype, from JSON and from binary, and
//! written as JSON again. What was read has as many elements as its shape means, and is read back as it was.
#![no_main]

use bytes::Bytes;
use isochrone_tensor::answer::Answer;
use isochrone_tensor::request::Request;
use isochrone_tensor::{Datatype, Json, Tensor, checked, element_count, envelope, from_json, texts};
use libfuzzer_sys::fuzz_target;

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

fuzz_target!(|data: &[u8]| {
    let Some((&[kind, header, count, size], body)) = data.split_first_chunk::<4>() else { return };
    let datatype = DATATYPES[usize::from(kind) % DATATYPES.len()];
    let body = Bytes::copy_from_slice(body);
    let number = header.to_string();
    // Half of the headers are as they come, half are numbers.
    let header = if header & 1 == 0 { number.as_bytes() } else { &data[..data.len().min(12)] };
    if let Ok((json, binary)) = envelope::part(&body, Some(header)) {
        assert_eq!(json.len() + binary.len(), body.len());
        let sizes = [Some(u64::from(size)), None, Some(u64::from(count))];
        if let Ok(parts) = envelope::distribute(&binary, sizes.into_iter()) {
            assert_eq!(parts.iter().flatten().map(Bytes::len).sum::<usize>(), binary.len());
        }
        if let Ok(text) = std::str::from_utf8(&json) {
            read(datatype, from_json(datatype, usize::from(count), text).ok(), usize::from(count));
        }
    }
    // Whole requests and answers, in each encoding.
    let _ = (Request::from_http(&body, Some(header)), Request::from_http(&body, None), Request::from_grpc(&body));
    let _ = (Answer::from_http(&body, Some(header)), Answer::from_http(&body, None), Answer::from_grpc(body.clone()));
    let shape = [i64::from(count), i64::from(size.cast_signed())];
    if let Some(count) = element_count(&shape) {
        read(datatype, checked(datatype, count, &body).ok().map(|()| body), count);
    }
});

fn read(datatype: Datatype, data: Option<Bytes>, count: usize) {
    let Some(data) = data else { return };
    match datatype.size() {
        Some(size) => assert_eq!(data.len(), count * size),
        None => assert_eq!(texts(&data).filter(Result::is_ok).count(), count),
    }
    let tensor = Tensor { name: String::new(), datatype, shape: vec![], data: data.clone() };
    let Ok(json) = serde_json::to_string(&Json(&tensor)) else { return };
    let again = from_json(datatype, count, &json).expect("what was written is read");
    // Numbers keep their value; -0.0 is written as such.
    assert_eq!(again, data, "{json}");
}
