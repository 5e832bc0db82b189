//! Clients all over the world, played from one machine by `X-Forwarded-For`.

/// A client: an address that GeoIP databases place well (universities' own networks), and its country.
#[derive(Clone, Copy, Debug)]
pub struct WorldClient {
    /// The address.
    pub address: &'static str,
    /// ISO 3166-1.
    pub country: &'static str,
}

/// One or more on each inhabited continent.
pub const WORLD: [WorldClient; 20] = [
    WorldClient { address: "141.20.1.1", country: "DE" },
    WorldClient { address: "129.187.1.1", country: "DE" },
    WorldClient { address: "129.67.1.1", country: "GB" },
    WorldClient { address: "129.199.1.1", country: "FR" },
    WorldClient { address: "147.83.2.1", country: "ES" },
    WorldClient { address: "130.237.1.1", country: "SE" },
    WorldClient { address: "131.155.1.1", country: "NL" },
    WorldClient { address: "18.9.22.1", country: "US" },
    WorldClient { address: "128.32.1.1", country: "US" },
    WorldClient { address: "128.100.1.1", country: "CA" },
    WorldClient { address: "132.248.1.1", country: "MX" },
    WorldClient { address: "143.107.1.1", country: "BR" },
    WorldClient { address: "157.92.1.1", country: "AR" },
    WorldClient { address: "137.158.1.1", country: "ZA" },
    WorldClient { address: "133.11.0.1", country: "JP" },
    WorldClient { address: "130.54.1.1", country: "JP" },
    WorldClient { address: "147.46.1.1", country: "KR" },
    WorldClient { address: "140.112.1.1", country: "TW" },
    WorldClient { address: "129.94.1.1", country: "AU" },
    WorldClient { address: "130.216.1.1", country: "NZ" },
];
