//! The client's address, from the peer or from the one header that a trusted proxy writes.
//!
//! Such a header is a list to which each proxy adds on the right. It is read from there, and only as far as trusted
//! proxies vouch for it: whatever stands further left was written by somebody who may be the attacker.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use http::HeaderMap;
use http::header::FORWARDED;

use crate::config::{ForwardedBy, Trust};

/// The most entries read, from the right.
const HOPS_MAX: usize = 32;

pub(super) fn client_ip(peer: IpAddr, trust: &Trust, headers: &HeaderMap) -> IpAddr {
    let peer = normalised(peer);
    if !trust.trusts(peer) {
        return peer;
    }
    let (name, parse): (_, fn(&str) -> Option<IpAddr>) = match trust.source {
        ForwardedBy::Peer => return peer,
        ForwardedBy::XForwardedFor => ("x-forwarded-for", address),
        ForwardedBy::Forwarded => (FORWARDED.as_str(), forwarded_for),
    };
    let mut client = peer;
    // Several headers of one name are one list (RFC 9110, section 5.3): the last line is the rightmost.
    let lines = headers.get_all(name).iter().rev().map(|value| value.to_str().unwrap_or_default());
    for entry in lines.flat_map(|line| line.rsplit(',')).take(HOPS_MAX) {
        // What cannot be read ends the chain: nobody vouches for what is left of it.
        let Some(address) = parse(entry.trim()).map(normalised) else { break };
        client = address;
        if !trust.trusts(client) {
            break;
        }
    }
    client
}

/// An address as it is, in brackets, or with a port, as proxies write them.
fn address(text: &str) -> Option<IpAddr> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Some(address);
    }
    if let Ok(socket) = text.parse::<SocketAddr>() {
        return Some(socket.ip());
    }
    text.strip_prefix('[')?.strip_suffix(']')?.parse::<Ipv6Addr>().ok().map(IpAddr::V6)
}

/// The `for` of one element of `Forwarded` (RFC 7239, section 4).
fn forwarded_for(element: &str) -> Option<IpAddr> {
    element.split(';').find_map(|pair| {
        let (name, value) = pair.split_once('=')?;
        name.trim().eq_ignore_ascii_case("for").then(|| address(value.trim().trim_matches('"')))?
    })
}

/// IPv4 in IPv6 clothes is IPv4: mapped (RFC 4291, section 2.5.5.2) or by NAT64's well-known prefix (RFC 6052).
pub(super) fn normalised(address: IpAddr) -> IpAddr {
    let IpAddr::V6(v6) = address else { return address };
    if let Some(v4) = v6.to_ipv4_mapped() {
        return IpAddr::V4(v4);
    }
    match v6.segments() {
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] => IpAddr::V4(Ipv4Addr::from((u32::from(high) << 16) | u32::from(low))),
        _ => address,
    }
}

#[cfg(test)]
mod tests {
    use http::{HeaderName, HeaderValue};

    use super::*;

    fn client(peer: &str, source: ForwardedBy, lines: &[&str]) -> String {
        let trust = Trust {
            proxies: ["127.0.0.0/8", "10.0.0.0/8", "fd00::/8"].map(|net| net.parse().expect("valid")).to_vec(),
            source,
        };
        let name = if source == ForwardedBy::Forwarded { "forwarded" } else { "x-forwarded-for" };
        let headers = HeaderMap::from_iter(
            lines
                .iter()
                .map(|line| (HeaderName::from_static(name), HeaderValue::from_bytes(line.as_bytes()).expect("valid"))),
        );
        client_ip(peer.parse().expect("valid"), &trust, &headers).to_string()
    }

    #[test]
    fn x_forwarded_for_is_read_from_the_right_as_far_as_trust_goes() {
        use ForwardedBy::XForwardedFor;
        let rows: [(&str, &[&str], &str); 16] = [
            ("127.0.0.1", &["203.0.113.7"], "203.0.113.7"),
            ("127.0.0.1", &[], "127.0.0.1"),
            // An untrusted peer's word is nothing.
            ("198.51.100.1", &["203.0.113.7"], "198.51.100.1"),
            // The client wrote the left part itself.
            ("127.0.0.1", &["1.2.3.4, 203.0.113.7"], "203.0.113.7"),
            ("127.0.0.1", &["203.0.113.7, 10.1.1.1"], "203.0.113.7"),
            ("127.0.0.1", &["1.2.3.4", "203.0.113.7, 10.1.1.1"], "203.0.113.7"),
            ("127.0.0.1", &["203.0.113.7", "10.1.1.1", "10.2.2.2"], "203.0.113.7"),
            // All trusted: the leftmost of them.
            ("127.0.0.1", &["10.3.3.3, 10.1.1.1"], "10.3.3.3"),
            // What cannot be read ends the chain.
            ("127.0.0.1", &["203.0.113.7, unknown, 10.1.1.1"], "10.1.1.1"),
            ("127.0.0.1", &["203.0.113.7, "], "127.0.0.1"),
            ("127.0.0.1", &["\u{e9}"], "127.0.0.1"),
            // Ports, brackets, and IPv4 in IPv6.
            ("127.0.0.1", &["203.0.113.7:4711"], "203.0.113.7"),
            ("127.0.0.1", &["[2001:db8::1]:443"], "2001:db8::1"),
            ("127.0.0.1", &["[2001:db8::1]"], "2001:db8::1"),
            ("::ffff:127.0.0.1", &["::ffff:203.0.113.7"], "203.0.113.7"),
            ("fd00::1", &["64:ff9b::cb00:7107"], "203.0.113.7"),
        ];
        for (peer, lines, expected) in rows {
            assert_eq!(client(peer, XForwardedFor, lines), expected, "{peer} {lines:?}");
        }
    }

    #[test]
    fn forwarded_is_read_the_same_way_and_the_other_header_is_not() {
        use ForwardedBy::Forwarded;
        let rows: [(&[&str], &str); 6] = [
            (&["for=203.0.113.7;proto=https"], "203.0.113.7"),
            (&["for=1.2.3.4, for=203.0.113.7;by=10.0.0.1"], "203.0.113.7"),
            (&["proto=http;For=\"[2001:db8::1]:4711\""], "2001:db8::1"),
            (&["for=_hidden"], "127.0.0.1"),
            (&["for=203.0.113.7, for=unknown"], "127.0.0.1"),
            (&["by=203.0.113.7"], "127.0.0.1"),
        ];
        for (lines, expected) in rows {
            assert_eq!(client("127.0.0.1", Forwarded, lines), expected, "{lines:?}");
        }
        assert_eq!(client("127.0.0.1", ForwardedBy::Peer, &["203.0.113.7"]), "127.0.0.1");
    }

    #[test]
    fn a_long_list_is_read_to_a_bound() {
        let list = format!("203.0.113.7{}", ", 10.0.0.1".repeat(1000));
        assert_eq!(client("127.0.0.1", ForwardedBy::XForwardedFor, &[&list]), "10.0.0.1");
    }
}
