//! Where a client is: the operator's overrides, then the databases. Unknown is a value, never an error.

use std::net::IpAddr;
use std::path::Path;

use isochrone_core::geo::{Country, Location, Point};
use isochrone_core::steer::stable_hash;
use maxminddb::{Reader, WithinOptions};
use serde::Deserialize;

use crate::config::Config;

/// Records looked at to tell the schema. The first ones of a database may be special networks without data.
const SCHEMA_PROBES: usize = 1000;

/// One opened MMDB file.
///
/// Read into memory rather than mapped: a mapped file that somebody truncates kills the process.
pub struct Database {
    reader: Reader<Vec<u8>>,
    schema: Schema,
}

/// How a database lays out a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Schema {
    /// MaxMind's GeoIP2 and GeoLite2, City or Country: nested, coordinates in doubles.
    MaxMind,
    /// ip-location-db's: flat, coordinates in 32-bit floats.
    Flat,
}

#[derive(Deserialize)]
struct MaxMindRecord<'a> {
    #[serde(borrow)]
    country: Option<MaxMindCountry<'a>>,
    location: Option<MaxMindLocation>,
}

#[derive(Deserialize)]
struct MaxMindCountry<'a> {
    iso_code: Option<&'a str>,
}

#[derive(Deserialize)]
struct MaxMindLocation {
    latitude: Option<f64>,
    longitude: Option<f64>,
}

#[derive(Deserialize)]
struct FlatRecord<'a> {
    country_code: Option<&'a str>,
    latitude: Option<f32>,
    longitude: Option<f32>,
}

impl Database {
    /// Opens a file and makes sure that it holds locations.
    ///
    /// # Errors
    /// A file that cannot be read, is no MMDB, is damaged, or is of another kind than City or Country; in words for the
    /// operator.
    pub fn open(path: &Path) -> Result<Database, String> {
        let reader = Reader::open_readfile(path).map_err(|error| format!("it is no readable MMDB file: {error}"))?;
        let schema = schema(&reader)?;
        Ok(Database { reader, schema })
    }

    /// When the database was made, in seconds since 1970.
    pub fn build_epoch(&self) -> u64 {
        self.reader.metadata().build_epoch
    }

    /// `None` where the database says nothing about the address. A damaged record says nothing either.
    fn locate(&self, address: IpAddr) -> Option<Location> {
        if address.is_ipv6() && self.reader.metadata().ip_version == 4 {
            return None;
        }
        let found = self.reader.lookup(address).ok()?;
        let (country, point) = match self.schema {
            Schema::MaxMind => {
                let record: MaxMindRecord<'_> = found.decode().ok()??;
                let point = record.location.and_then(|at| Point::new(at.latitude? as f32, at.longitude? as f32));
                (record.country.and_then(|country| Country::parse(country.iso_code?)), point)
            }
            Schema::Flat => {
                let record: FlatRecord<'_> = found.decode().ok()??;
                let point = record.latitude.zip(record.longitude).and_then(|(north, east)| Point::new(north, east));
                (record.country_code.and_then(Country::parse), point)
            }
        };
        (country.is_some() || point.is_some()).then(|| Location::from_record(country, point))
    }
}

impl std::fmt::Debug for Database {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Database({}, {:?})", self.reader.metadata().database_type, self.schema)
    }
}

/// Tells the schema by the metadata and by the records: a database of another kind would otherwise look healthy and find
/// nobody.
fn schema(reader: &Reader<Vec<u8>>) -> Result<Schema, String> {
    let kind = &reader.metadata().database_type;
    let networks = reader.networks(WithinOptions::default()).map_err(|error| format!("it is damaged: {error}"))?;
    for network in networks.take(SCHEMA_PROBES) {
        let network = network.map_err(|error| format!("it is damaged: {error}"))?;
        if let Ok(Some(MaxMindRecord { country: Some(MaxMindCountry { iso_code: Some(_) }), .. })) = network.decode() {
            return Ok(Schema::MaxMind);
        }
        if let Ok(Some(FlatRecord { country_code: Some(_), .. })) = network.decode() {
            return Ok(Schema::Flat);
        }
    }
    Err(format!("its type is `{kind}` and its records name no country; a City or Country database is needed"))
}

/// A number for the client's address prefix (/24 or /48) that is the same at every gateway: by it clients are moved a few at
/// a time, and spread by weight.
pub(crate) fn client_hash(address: IpAddr) -> u64 {
    match address {
        IpAddr::V4(address) => stable_hash(&address.octets()[..3]),
        IpAddr::V6(address) => stable_hash(&address.octets()[..6]),
    }
}

/// Locates a client.
pub(crate) fn locate(config: &Config, address: IpAddr) -> Location {
    let overridden = config.overrides.iter().find(|(net, _)| net.contains(&address));
    overridden
        .map(|(_, location)| *location)
        .or_else(|| config.geoip.iter().find_map(|database| database.locate(address)))
        .unwrap_or(Location::UNKNOWN)
}
