//! Tensors as the wire knows them: a name, a datatype, a shape, and the elements as bytes.
//!
//! The bytes are those of the protocol's binary form, whatever encoding a request came in: little-endian and row-major,
//! and for BYTES each element behind its length (4 bytes). So the binary encodings are passed on as they are, and equal
//! tensors have equal bytes.

#![forbid(unsafe_code)]

pub mod answer;

pub mod envelope;

pub mod request;

/// The protocol's messages (`proto/inference.proto`).
#[allow(missing_docs, unused_qualifications, clippy::all, reason = "generated")]
pub mod proto {
    include!(concat!(env!("OUT_DIR"), "/inference.rs"));
}

/// Their description, for gRPC reflection: a `FileDescriptorSet`.
pub const DESCRIPTION: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/description.bin"));

use std::fmt;

use bytes::Bytes;
use half::{bf16, f16};
use serde::de::{DeserializeSeed, Deserializer, Error as _, SeqAccess, Visitor};
use serde::ser::{Error as _, SerializeSeq};
use serde::{Deserialize, Serialize, Serializer};

/// The datatypes of the Open Inference Protocol v2.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
#[allow(missing_docs, reason = "the protocol's words")]
pub enum Datatype {
    Bool,
    Uint8,
    Uint16,
    Uint32,
    Uint64,
    Int8,
    Int16,
    Int32,
    Int64,
    Fp16,
    Bf16,
    Fp32,
    Fp64,
    Bytes,
}

impl Datatype {
    /// Reads the protocol's word for one.
    pub fn named(name: &str) -> Option<Datatype> {
        Datatype::deserialize(serde::de::value::StrDeserializer::<serde::de::value::Error>::new(name)).ok()
    }

    /// Bytes of an element; `None` where that differs from element to element.
    pub fn size(self) -> Option<usize> {
        match self {
            Datatype::Bool | Datatype::Uint8 | Datatype::Int8 => Some(1),
            Datatype::Uint16 | Datatype::Int16 | Datatype::Fp16 | Datatype::Bf16 => Some(2),
            Datatype::Uint32 | Datatype::Int32 | Datatype::Fp32 => Some(4),
            Datatype::Uint64 | Datatype::Int64 | Datatype::Fp64 => Some(8),
            Datatype::Bytes => None,
        }
    }
}

impl fmt::Display for Datatype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// A named tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Its name in the model's signature.
    pub name: String,
    /// What its elements are.
    pub datatype: Datatype,
    /// Sizes, outermost first. Their product is the number of elements.
    pub shape: Vec<i64>,
    /// The elements in the protocol's binary form.
    pub data: Bytes,
}

/// The number of elements of a shape; `None` for a negative size or a product that does not fit.
pub fn element_count(shape: &[i64]) -> Option<usize> {
    shape.iter().try_fold(1_usize, |product, &size| product.checked_mul(usize::try_from(size).ok()?))
}

/// Holds bytes in the binary form to a number of elements.
///
/// # Errors
/// What does not fit, in words for the client.
pub fn checked(datatype: Datatype, count: usize, data: &[u8]) -> Result<(), String> {
    let Some(size) = datatype.size() else {
        let mut elements = 0;
        for element in texts(data) {
            element?;
            elements += 1;
        }
        return if elements == count { Ok(()) } else { Err(mismatch(elements, count)) };
    };
    // A product of the client's numbers: it is compared, and nothing is reserved by it.
    if count.checked_mul(size) != Some(data.len()) {
        return Err(format!(
            "{} bytes are given; {count} elements of {datatype} have {}",
            data.len(),
            count.saturating_mul(size)
        ));
    }
    if datatype == Datatype::Bool && data.iter().any(|&byte| byte > 1) {
        return Err("a BOOL is 0 or 1".into());
    }
    Ok(())
}

fn mismatch(elements: usize, count: usize) -> String {
    format!("{elements} elements are given; the shape means {count}")
}

/// The elements of BYTES data, each as it is. After an error there is no further element.
pub fn texts(data: &[u8]) -> impl Iterator<Item = Result<&[u8], String>> {
    let mut rest = data;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let element = rest.split_first_chunk::<4>().and_then(|(length, after)| {
            // Within what was sent, whatever the length claims.
            after.split_at_checked(usize::try_from(u32::from_le_bytes(*length)).ok()?)
        });
        let Some((element, after)) = element else {
            rest = &[];
            return Some(Err("the data ends within an element of BYTES".into()));
        };
        rest = after;
        Some(Ok(element))
    })
}

/// Appends an element of BYTES.
///
/// # Errors
/// It has 4 GiB or more.
pub fn push_text(data: &mut Vec<u8>, element: &[u8]) -> Result<(), String> {
    let length = u32::try_from(element.len()).map_err(|_| "an element is too long for BYTES".to_owned())?;
    data.extend_from_slice(&length.to_le_bytes());
    data.extend_from_slice(element);
    Ok(())
}

/// A kind of number or text that JSON can carry for a datatype, and its binary form.
trait Element: for<'de> Deserialize<'de> {
    fn push(self, data: &mut Vec<u8>) -> Result<(), String>;
}

macro_rules! number {
    ($($type:ty),*) => {$(
        impl Element for $type {
            fn push(self, data: &mut Vec<u8>) -> Result<(), String> {
                data.extend_from_slice(&self.to_le_bytes());
                Ok(())
            }
        }
    )*};
}

number!(u8, u16, u32, u64, i8, i16, i32, i64, f64);

impl Element for bool {
    fn push(self, data: &mut Vec<u8>) -> Result<(), String> {
        data.push(u8::from(self));
        Ok(())
    }
}

impl Element for f32 {
    fn push(self, data: &mut Vec<u8>) -> Result<(), String> {
        // JSON has no infinity, so one that comes out was a number too large.
        if self.is_infinite() {
            return Err("a number is too large for FP32".into());
        }
        data.extend_from_slice(&self.to_le_bytes());
        Ok(())
    }
}

macro_rules! half {
    ($name:ident, $type:ty, $word:literal) => {
        #[derive(Deserialize)]
        #[serde(transparent)]
        struct $name(f32);

        impl Element for $name {
            fn push(self, data: &mut Vec<u8>) -> Result<(), String> {
                let narrowed = <$type>::from_f32(self.0);
                if narrowed.is_infinite() {
                    return Err(concat!("a number is too large for ", $word).into());
                }
                data.extend_from_slice(&narrowed.to_le_bytes());
                Ok(())
            }
        }
    };
}

half!(Half, f16, "FP16");
half!(Brain, bf16, "BF16");

impl Element for String {
    fn push(self, data: &mut Vec<u8>) -> Result<(), String> {
        push_text(data, self.as_bytes())
    }
}

/// Reads JSON, flat or nested, as `count` elements of a datatype. A number that the datatype cannot hold is an error.
///
/// # Errors
/// What does not fit, in words for the client.
pub fn from_json(datatype: Datatype, count: usize, json: &str) -> Result<Bytes, String> {
    fn read<T: Element>(count: usize, json: &str) -> Result<Bytes, String> {
        let mut elements = Elements { data: Vec::new(), count: 0, of: std::marker::PhantomData::<T> };
        let mut deserializer = serde_json::Deserializer::from_str(json);
        Nested(&mut elements)
            .deserialize(&mut deserializer)
            .and_then(|()| deserializer.end())
            .map_err(|error| error.to_string())?;
        if elements.count == count { Ok(elements.data.into()) } else { Err(mismatch(elements.count, count)) }
    }
    match datatype {
        Datatype::Bool => read::<bool>(count, json),
        Datatype::Uint8 => read::<u8>(count, json),
        Datatype::Uint16 => read::<u16>(count, json),
        Datatype::Uint32 => read::<u32>(count, json),
        Datatype::Uint64 => read::<u64>(count, json),
        Datatype::Int8 => read::<i8>(count, json),
        Datatype::Int16 => read::<i16>(count, json),
        Datatype::Int32 => read::<i32>(count, json),
        Datatype::Int64 => read::<i64>(count, json),
        Datatype::Fp16 => read::<Half>(count, json),
        Datatype::Bf16 => read::<Brain>(count, json),
        Datatype::Fp32 => read::<f32>(count, json),
        Datatype::Fp64 => read::<f64>(count, json),
        Datatype::Bytes => read::<String>(count, json),
    }
}

struct Elements<T> {
    data: Vec<u8>,
    count: usize,
    of: std::marker::PhantomData<T>,
}

/// Collects the elements of arrays in arrays.
struct Nested<'a, T>(&'a mut Elements<T>);

impl<'de, T: Element> DeserializeSeed<'de> for Nested<'_, T> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de, T: Element> Visitor<'de> for Nested<'_, T> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of elements of the input's datatype")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<(), A::Error> {
        while sequence.next_element_seed(Nested(self.0))?.is_some() {}
        Ok(())
    }

    fn visit_bool<E: serde::de::Error>(self, value: bool) -> Result<(), E> {
        self.push(serde::de::value::BoolDeserializer::new(value))
    }

    fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<(), E> {
        self.push(serde::de::value::I64Deserializer::new(value))
    }

    fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<(), E> {
        self.push(serde::de::value::U64Deserializer::new(value))
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<(), E> {
        self.push(serde::de::value::F64Deserializer::new(value))
    }

    fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<(), E> {
        self.push(serde::de::value::StrDeserializer::new(value))
    }
}

impl<T: Element> Nested<'_, T> {
    fn push<'de, D: Deserializer<'de>>(self, element: D) -> Result<(), D::Error> {
        let at = self.0.count;
        let element = T::deserialize(element).map_err(|error| D::Error::custom(format!("element {at}: {error}")))?;
        element.push(&mut self.0.data).map_err(|error| D::Error::custom(format!("element {at}: {error}")))?;
        self.0.count += 1;
        Ok(())
    }
}

/// A tensor's elements as one flat JSON array.
///
/// # Errors
/// It has what JSON cannot say: NaN, infinity, or BYTES that are not UTF-8.
#[derive(Debug)]
pub struct Json<'a>(pub &'a Tensor);

impl Serialize for Json<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        fn numbers<const N: usize, T: Serialize, S: Serializer>(
            serializer: S,
            data: &[u8],
            number: impl Fn([u8; N]) -> Result<T, &'static str>,
        ) -> Result<S::Ok, S::Error> {
            let (chunks, _) = data.as_chunks::<N>();
            let mut sequence = serializer.serialize_seq(Some(chunks.len()))?;
            for chunk in chunks {
                sequence.serialize_element(&number(*chunk).map_err(S::Error::custom)?)?;
            }
            sequence.end()
        }
        fn finite<T: Into<f64> + Copy>(number: T) -> Result<T, &'static str> {
            if number.into().is_finite() {
                Ok(number)
            } else {
                Err("it has numbers that JSON cannot say; ask for binary data")
            }
        }
        let data = &*self.0.data;
        match self.0.datatype {
            Datatype::Bool => numbers::<1, _, S>(serializer, data, |[byte]| Ok(byte != 0)),
            Datatype::Uint8 => numbers(serializer, data, |bytes| Ok(u8::from_le_bytes(bytes))),
            Datatype::Uint16 => numbers(serializer, data, |bytes| Ok(u16::from_le_bytes(bytes))),
            Datatype::Uint32 => numbers(serializer, data, |bytes| Ok(u32::from_le_bytes(bytes))),
            Datatype::Uint64 => numbers(serializer, data, |bytes| Ok(u64::from_le_bytes(bytes))),
            Datatype::Int8 => numbers(serializer, data, |bytes| Ok(i8::from_le_bytes(bytes))),
            Datatype::Int16 => numbers(serializer, data, |bytes| Ok(i16::from_le_bytes(bytes))),
            Datatype::Int32 => numbers(serializer, data, |bytes| Ok(i32::from_le_bytes(bytes))),
            Datatype::Int64 => numbers(serializer, data, |bytes| Ok(i64::from_le_bytes(bytes))),
            Datatype::Fp16 => numbers(serializer, data, |bytes| finite(f16::from_le_bytes(bytes).to_f32())),
            Datatype::Bf16 => numbers(serializer, data, |bytes| finite(bf16::from_le_bytes(bytes).to_f32())),
            Datatype::Fp32 => numbers(serializer, data, |bytes| finite(f32::from_le_bytes(bytes))),
            Datatype::Fp64 => numbers(serializer, data, |bytes| finite(f64::from_le_bytes(bytes))),
            Datatype::Bytes => {
                let mut sequence = serializer.serialize_seq(None)?;
                for element in texts(data) {
                    let text = std::str::from_utf8(element.map_err(S::Error::custom)?);
                    sequence.serialize_element(
                        text.map_err(|_| S::Error::custom("it has bytes that are not UTF-8; ask for binary data"))?,
                    )?;
                }
                sequence.end()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(datatype: Datatype, count: usize, json: &str) -> Result<Vec<u8>, String> {
        from_json(datatype, count, json).map(Vec::from)
    }

    fn floats(numbers: &[f32]) -> Vec<u8> {
        numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
    }

    #[test]
    fn nested_and_flat_json_are_the_same_elements() {
        let flat = read(Datatype::Fp32, 4, "[1, 2.5, -3e0, 4]").expect("valid");
        assert_eq!(flat, read(Datatype::Fp32, 4, "[[1, 2.5], [-3e0, 4]]").expect("valid"));
        assert_eq!(flat, floats(&[1.0, 2.5, -3.0, 4.0]));
        assert_eq!(read(Datatype::Bytes, 2, r#"["a", ["ü\n"]]"#), Ok(b"\x01\0\0\0a\x03\0\0\0\xc3\xbc\n".to_vec()));
        assert_eq!(read(Datatype::Bool, 2, "[true, false]"), Ok(vec![1, 0]));
        assert_eq!(read(Datatype::Int64, 1, "[9223372036854775807]"), Ok(i64::MAX.to_le_bytes().to_vec()));
        assert_eq!(read(Datatype::Bf16, 1, "[1]"), Ok(vec![0x80, 0x3f]));
        assert_eq!(read(Datatype::Fp16, 1, "[-2]"), Ok(vec![0, 0xc0]));
        assert_eq!(read(Datatype::Fp32, 0, "[]"), Ok(vec![]));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let deep = "[".repeat(100_000);
        for (datatype, json) in [
            (Datatype::Uint8, "[256]"),
            (Datatype::Uint8, "[-1]"),
            (Datatype::Uint16, "[65536]"),
            (Datatype::Int8, "[128]"),
            (Datatype::Int32, "[1.5]"),
            (Datatype::Int64, "[9223372036854775808]"),
            (Datatype::Fp16, "[65520]"),
            (Datatype::Bf16, "[3.4e38]"),
            (Datatype::Fp32, "[\"1\"]"),
            (Datatype::Fp32, "[1e39]"),
            (Datatype::Fp64, "[1e999]"),
            (Datatype::Fp32, "[NaN]"),
            (Datatype::Fp32, "[null]"),
            (Datatype::Fp32, "[1,]"),
            (Datatype::Fp32, "[1] 2"),
            (Datatype::Fp32, "[1, 2]"),
            (Datatype::Fp32, "[]"),
            (Datatype::Fp32, "{\"a\":1}"),
            (Datatype::Bool, "[1]"),
            (Datatype::Bytes, "[1]"),
            (Datatype::Fp32, deep.as_str()),
        ] {
            assert!(read(datatype, 1, json).is_err(), "{datatype} {:.40}", json);
        }
    }

    #[test]
    fn bytes_that_do_not_fit_are_refused() {
        for (datatype, count, data) in [
            (Datatype::Fp32, 1, &b"\0\0\0"[..]),
            (Datatype::Fp32, usize::MAX, b""),
            (Datatype::Bool, 1, b"\x02"),
            (Datatype::Bytes, 1, b""),
            (Datatype::Bytes, 1, b"\x01\0\0"),
            (Datatype::Bytes, 1, b"\xff\xff\xff\xffabc"),
            (Datatype::Bytes, 1, b"\0\0\0\0\0\0\0\0"),
            (Datatype::Bytes, 2, b"\x02\0\0\0a\0\0\0\0"),
        ] {
            assert!(checked(datatype, count, data).is_err(), "{datatype} {count} {data:?}");
        }
        assert_eq!(checked(Datatype::Bytes, 2, b"\x01\0\0\0a\0\0\0\0"), Ok(()));
    }

    #[test]
    fn shapes_that_overflow_have_no_count() {
        assert_eq!(element_count(&[]), Some(1));
        assert_eq!(element_count(&[2, 3]), Some(6));
        assert_eq!(element_count(&[0, i64::MAX]), Some(0));
        assert_eq!(element_count(&[i64::MAX, 4]), None);
        assert_eq!(element_count(&[-1]), None);
    }

    #[test]
    fn json_does_not_say_what_it_cannot() {
        let json = |datatype, data: &[u8]| {
            let tensor = Tensor { name: String::new(), datatype, shape: vec![], data: Bytes::copy_from_slice(data) };
            serde_json::to_string(&Json(&tensor)).map_err(|error| error.to_string())
        };
        assert!(json(Datatype::Fp32, &floats(&[1.0, f32::NAN])).is_err());
        assert!(json(Datatype::Fp16, &[0, 0x7c]).is_err());
        assert!(json(Datatype::Bytes, b"\x01\0\0\0\xff").is_err());
        assert_eq!(json(Datatype::Bool, &[1, 0]).as_deref(), Ok("[true,false]"));
        assert_eq!(json(Datatype::Bf16, &[0x80, 0x3f]).as_deref(), Ok("[1.0]"));
    }

    proptest! {
        /// What is written as JSON is read back as the same bytes.
        #[test]
        fn json_gives_the_same_bytes_back(numbers: Vec<f32>, words: Vec<String>, integers: Vec<i64>) {
            let numbers: Vec<f32> = numbers.into_iter().filter(|number| number.is_finite()).collect();
            let mut text = Vec::new();
            words.iter().for_each(|word| push_text(&mut text, word.as_bytes()).expect("short"));
            let integer = integers.iter().flat_map(|number| number.to_le_bytes()).collect();
            for (datatype, count, data) in [
                (Datatype::Fp32, numbers.len(), floats(&numbers)),
                (Datatype::Bytes, words.len(), text),
                (Datatype::Int64, integers.len(), integer),
            ] {
                prop_assert_eq!(checked(datatype, count, &data), Ok(()));
                let tensor = Tensor { name: String::new(), datatype, shape: vec![], data: data.into() };
                let json = serde_json::to_string(&Json(&tensor)).expect("finite");
                prop_assert_eq!(from_json(datatype, count, &json), Ok(tensor.data));
            }
        }

        /// Nothing that is read crashes.
        #[test]
        fn no_bytes_crash(count: usize, data: Vec<u8>, json: String) {
            for datatype in [Datatype::Bool, Datatype::Fp32, Datatype::Bytes, Datatype::Bf16] {
                let _ = checked(datatype, count, &data);
                let _ = from_json(datatype, count, &json);
            }
        }
    }
}
