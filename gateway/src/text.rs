//! Numbers to text on the request path, where the general formatting machinery costs more than the decision it describes.

use std::net::IpAddr;

use bytes::Bytes;
use http::HeaderValue;

/// Appends a whole number.
pub(crate) fn push_number(text: &mut String, number: u64) {
    text.push_str(itoa::Buffer::new().format(number));
}

/// Appends a number of milliseconds with one decimal. What is no sensible number of them is `?`.
pub(crate) fn push_tenths(text: &mut String, milliseconds: f32) {
    let tenths = (milliseconds * 10.0).round();
    if !(0.0..1e15).contains(&tenths) {
        return text.push('?');
    }
    let tenths = tenths as u64;
    push_number(text, tenths / 10);
    text.push('.');
    push_number(text, tenths % 10);
}

/// Appends microseconds as milliseconds with three decimals.
pub(crate) fn push_milliseconds(text: &mut String, microseconds: u64) {
    push_number(text, microseconds / 1000);
    text.push('.');
    // The leading one keeps the zeros.
    text.push_str(&itoa::Buffer::new().format(1000 + microseconds % 1000)[1..]);
}

/// An address as a header has it.
pub(crate) fn address(address: IpAddr) -> HeaderValue {
    let text = match address {
        IpAddr::V4(v4) => {
            let mut text = String::with_capacity(15);
            for (at, octet) in v4.octets().into_iter().enumerate() {
                if at > 0 {
                    text.push('.');
                }
                push_number(&mut text, u64::from(octet));
            }
            text
        }
        IpAddr::V6(v6) => v6.to_string(),
    };
    header(text).unwrap_or_else(|| HeaderValue::from_static("unknown"))
}

/// 128 bits as 32 hexadecimal digits.
pub(crate) fn hex(bits: u128) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut text = String::with_capacity(32);
    for byte in bits.to_be_bytes() {
        text.push(char::from(DIGITS[usize::from(byte >> 4)]));
        text.push(char::from(DIGITS[usize::from(byte & 15)]));
    }
    text
}

/// A header's value without a copy.
pub(crate) fn header(text: String) -> Option<HeaderValue> {
    HeaderValue::from_maybe_shared(Bytes::from(text)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_like_those_of_the_standard_library() {
        for ms in [0.0_f32, 0.04, 0.06, 0.95, 1.25, 9.99, 21.73, 123_456.79] {
            let mut text = String::new();
            push_tenths(&mut text, ms);
            let (ours, theirs): (f32, f32) =
                (text.parse().expect("a number"), format!("{ms:.1}").parse().expect("a number"));
            // The two may round a tie differently.
            assert!((ours - theirs).abs() <= 0.1001, "{ms}: {text}");
            assert_eq!(text.split_once('.').map(|(_, tenth)| tenth.len()), Some(1), "{text}");
        }
        for bad in [f32::NAN, f32::INFINITY, -1.0] {
            let mut text = String::new();
            push_tenths(&mut text, bad);
            assert_eq!(text, "?");
        }
        for (us, expected) in [(0, "0.000"), (7, "0.007"), (1050, "1.050"), (12_345_678, "12345.678")] {
            let mut text = String::new();
            push_milliseconds(&mut text, us);
            assert_eq!(text, expected);
        }
        assert_eq!(hex(0xab), format!("{:032x}", 0xab));
        assert_eq!(hex(u128::MAX), "f".repeat(32));
        for ip in ["0.0.0.0", "255.255.255.255", "10.0.203.7", "2001:db8::1"] {
            assert_eq!(address(ip.parse().expect("valid")), ip);
        }
    }
}
