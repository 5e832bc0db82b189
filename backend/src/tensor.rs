//! Tensors as the wire knows them: a name, a datatype, a shape, and the elements.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};

/// The datatypes of the Open Inference Protocol v2 that JSON can carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub(crate) enum Datatype {
    Bool,
    Uint8,
    Int8,
    Int16,
    Int32,
    Int64,
    Fp32,
    Fp64,
    Bytes,
}

impl fmt::Display for Datatype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// The elements, in row-major order.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub(crate) enum Data {
    Bool(Vec<bool>),
    Uint8(Vec<u8>),
    Int8(Vec<i8>),
    Int16(Vec<i16>),
    Int32(Vec<i32>),
    Int64(Vec<i64>),
    Fp32(Vec<f32>),
    Fp64(Vec<f64>),
    Bytes(Vec<String>),
}

impl Data {
    /// How many elements there are.
    pub(crate) fn len(&self) -> usize {
        match self {
            Data::Bool(data) => data.len(),
            Data::Uint8(data) => data.len(),
            Data::Int8(data) => data.len(),
            Data::Int16(data) => data.len(),
            Data::Int32(data) => data.len(),
            Data::Int64(data) => data.len(),
            Data::Fp32(data) => data.len(),
            Data::Fp64(data) => data.len(),
            Data::Bytes(data) => data.len(),
        }
    }

    /// Whether JSON can say every element: it has no NaN and no infinity.
    pub(crate) fn is_finite(&self) -> bool {
        match self {
            Data::Fp32(data) => data.iter().all(|x| x.is_finite()),
            Data::Fp64(data) => data.iter().all(|x| x.is_finite()),
            _ => true,
        }
    }

    /// Reads JSON, flat or nested, as elements of a datatype. A number that the datatype cannot hold is an error.
    ///
    /// # Errors
    /// What does not fit, in words for the client.
    pub(crate) fn from_json(datatype: Datatype, json: &str) -> Result<Data, String> {
        fn read<T: for<'de> Deserialize<'de>>(json: &str) -> Result<Vec<T>, String> {
            let mut elements = Vec::new();
            let mut deserializer = serde_json::Deserializer::from_str(json);
            Nested(&mut elements)
                .deserialize(&mut deserializer)
                .and_then(|()| deserializer.end())
                .map_err(|error| error.to_string())?;
            Ok(elements)
        }
        Ok(match datatype {
            Datatype::Bool => Data::Bool(read(json)?),
            Datatype::Uint8 => Data::Uint8(read(json)?),
            Datatype::Int8 => Data::Int8(read(json)?),
            Datatype::Int16 => Data::Int16(read(json)?),
            Datatype::Int32 => Data::Int32(read(json)?),
            Datatype::Int64 => Data::Int64(read(json)?),
            Datatype::Fp32 => match read::<f32>(json)? {
                // JSON has no infinity, so one that comes out was a number too large.
                data if data.iter().any(|x| x.is_infinite()) => return Err("a number is too large for FP32".into()),
                data => Data::Fp32(data),
            },
            Datatype::Fp64 => Data::Fp64(read(json)?),
            Datatype::Bytes => Data::Bytes(read(json)?),
        })
    }
}

/// A named tensor.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Tensor {
    /// Its name in the model's signature.
    pub(crate) name: String,
    /// Sizes, outermost first. Their product is the number of elements.
    pub(crate) shape: Vec<i64>,
    /// The elements.
    pub(crate) data: Data,
}

/// The number of elements of a shape; `None` for a negative size or a product that does not fit.
pub(crate) fn element_count(shape: &[i64]) -> Option<usize> {
    shape.iter().try_fold(1_usize, |product, &size| product.checked_mul(usize::try_from(size).ok()?))
}

/// Collects the elements of arrays in arrays.
struct Nested<'a, T>(&'a mut Vec<T>);

impl<'de, T: Deserialize<'de>> DeserializeSeed<'de> for Nested<'_, T> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de, T: Deserialize<'de>> Visitor<'de> for Nested<'_, T> {
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

impl<'de, T: Deserialize<'de>> Nested<'_, T> {
    fn push<D: Deserializer<'de>>(self, element: D) -> Result<(), D::Error> {
        self.0.push(
            T::deserialize(element).map_err(|error| D::Error::custom(format!("element {}: {error}", self.0.len())))?,
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nested_and_flat_json_are_the_same_elements() {
        let flat = Data::from_json(Datatype::Fp32, "[1, 2.5, -3e0, 4]").expect("valid");
        assert_eq!(flat, Data::from_json(Datatype::Fp32, "[[1, 2.5], [-3e0, 4]]").expect("valid"));
        assert_eq!(flat, Data::Fp32(vec![1.0, 2.5, -3.0, 4.0]));
        assert_eq!(
            Data::from_json(Datatype::Bytes, r#"["a", ["ü\n"]]"#),
            Ok(Data::Bytes(vec!["a".into(), "ü\n".into()]))
        );
        assert_eq!(Data::from_json(Datatype::Bool, "[true, false]"), Ok(Data::Bool(vec![true, false])));
        assert_eq!(Data::from_json(Datatype::Int64, "[9223372036854775807]"), Ok(Data::Int64(vec![i64::MAX])));
        assert_eq!(Data::from_json(Datatype::Fp32, "[]"), Ok(Data::Fp32(vec![])));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let deep = "[".repeat(100_000);
        for (datatype, json) in [
            (Datatype::Uint8, "[256]"),
            (Datatype::Uint8, "[-1]"),
            (Datatype::Int8, "[128]"),
            (Datatype::Int32, "[1.5]"),
            (Datatype::Int64, "[9223372036854775808]"),
            (Datatype::Fp32, "[\"1\"]"),
            (Datatype::Fp32, "[1e39]"),
            (Datatype::Fp64, "[1e999]"),
            (Datatype::Fp32, "[NaN]"),
            (Datatype::Fp32, "[null]"),
            (Datatype::Fp32, "[1,]"),
            (Datatype::Fp32, "[1] 2"),
            (Datatype::Fp32, "{\"a\":1}"),
            (Datatype::Bool, "[1]"),
            (Datatype::Bytes, "[1]"),
            (Datatype::Fp32, deep.as_str()),
        ] {
            assert!(Data::from_json(datatype, json).is_err(), "{datatype} {:.40}", json);
        }
    }

    #[test]
    fn shapes_that_overflow_have_no_count() {
        assert_eq!(element_count(&[]), Some(1));
        assert_eq!(element_count(&[2, 3]), Some(6));
        assert_eq!(element_count(&[0, i64::MAX]), Some(0));
        assert_eq!(element_count(&[i64::MAX, 4]), None);
        assert_eq!(element_count(&[-1]), None);
    }
}
