//! The binary tensor data extension: JSON first, then the bytes of the tensors, one behind the other
//! (<https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md>).

use bytes::Bytes;

/// Parts a body into its JSON and the bytes after it. Without a header all of it is JSON.
///
/// # Errors
/// The header is no number, or more than there is, in words for the client.
pub fn part(body: &Bytes, header: Option<&[u8]>) -> Result<(Bytes, Bytes), String> {
    let Some(header) = header else { return Ok((body.clone(), Bytes::new())) };
    let length = std::str::from_utf8(header).ok().and_then(|text| text.trim().parse::<usize>().ok());
    let length = length.ok_or("Inference-Header-Content-Length is no number")?;
    if length > body.len() {
        return Err(format!("Inference-Header-Content-Length says {length}; the body has {} bytes", body.len()));
    }
    Ok((body.slice(..length), body.slice(length..)))
}

/// Takes the tensors' bytes, in the order of the inputs. `sizes` has what each input says of itself: `None` has its data
/// in the JSON. Nothing may be left over.
///
/// # Errors
/// The sizes and the bytes do not agree, in words for the client, with the index of the input where there is one.
pub fn distribute(
    binary: &Bytes,
    sizes: impl Iterator<Item = Option<u64>>,
) -> Result<Vec<Option<Bytes>>, (Option<usize>, String)> {
    let mut rest = binary.clone();
    let mut parts = Vec::new();
    for (at, size) in sizes.enumerate() {
        parts.push(match size {
            None => None,
            Some(size) => match usize::try_from(size).ok().filter(|&size| size <= rest.len()) {
                Some(size) => Some(rest.split_to(size)),
                None => {
                    return Err((Some(at), format!("binary_data_size is {size}; {} bytes are left", rest.len())));
                }
            },
        });
    }
    if rest.is_empty() { Ok(parts) } else { Err((None, format!("{} bytes belong to no input", rest.len()))) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_body_is_parted_where_its_header_says() {
        let body = Bytes::from_static(b"{}abcdef");
        assert_eq!(part(&body, None), Ok((body.clone(), Bytes::new())));
        let (json, binary) = part(&body, Some(b"2")).expect("fits");
        assert_eq!((&*json, &*binary), (&b"{}"[..], &b"abcdef"[..]));
        let parts = distribute(&binary, [Some(2), None, Some(4)].into_iter()).expect("fits");
        assert_eq!(parts, [Some(Bytes::from_static(b"ab")), None, Some(Bytes::from_static(b"cdef"))]);
    }

    #[test]
    fn what_does_not_add_up_is_refused() {
        let body = Bytes::from_static(b"{}abcdef");
        for header in ["9", "-1", "", "1e3", "99999999999999999999999", "0x2"] {
            assert!(part(&body, Some(header.as_bytes())).is_err(), "{header}");
        }
        assert!(part(&body, Some(b"\xff")).is_err());
        let distributed = |sizes: &[Option<u64>]| distribute(&body, sizes.iter().copied());
        assert!(distributed(&[Some(7)]).is_err_and(|(at, _)| at.is_none()));
        assert!(distributed(&[Some(7), Some(2)]).is_err_and(|(at, _)| at == Some(1)));
        assert!(distributed(&[Some(u64::MAX)]).is_err_and(|(at, _)| at == Some(0)));
        assert!(distributed(&[None]).is_err());
    }

    proptest! {
        #[test]
        fn every_byte_has_one_owner(body: Vec<u8>, sizes in prop::collection::vec(prop::option::of(0_u64..40), 0..6)) {
            let body = Bytes::from(body);
            if let Ok(parts) = distribute(&body, sizes.iter().copied()) {
                let joined: Vec<u8> = parts.iter().flatten().flat_map(|part| part.to_vec()).collect();
                prop_assert_eq!(joined, body.to_vec());
                let lengths: Vec<Option<u64>> = parts.iter().map(|part| part.as_ref().map(|part| part.len() as u64)).collect();
                prop_assert_eq!(lengths, sizes);
            }
        }
    }
}
