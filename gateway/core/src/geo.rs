//! Places on the globe, and how far apart they are for a packet.

mod countries;

use std::fmt;

use countries::COUNTRIES;

/// A point on the globe, in degrees.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    latitude: f32,
    longitude: f32,
    /// The same on a sphere of radius 1, worked out once: each decision asks for a distance to each region.
    unit: [f32; 3],
}

impl Point {
    /// `None` unless latitude is within ±90 and longitude within ±180 (NaN is neither).
    pub fn new(latitude: f32, longitude: f32) -> Option<Point> {
        let valid = (-90.0..=90.0).contains(&latitude) && (-180.0..=180.0).contains(&longitude);
        valid.then(|| {
            let ((north, flat), (east, ahead)) = (latitude.to_radians().sin_cos(), longitude.to_radians().sin_cos());
            Point { latitude, longitude, unit: [flat * ahead, flat * east, north] }
        })
    }

    /// Degrees north of the equator.
    pub fn latitude(self) -> f32 {
        self.latitude
    }

    /// Degrees east of Greenwich.
    pub fn longitude(self) -> f32 {
        self.longitude
    }

    /// Great-circle distance in kilometres on a sphere of radius 6,371 km, by the chord between the points.
    ///
    /// The chord rather than the angle's cosine, which loses all precision for points close together in `f32`.
    pub fn distance_km(self, other: Point) -> f32 {
        2.0 * 6371.0 * (self.chord_km(other) / (2.0 * 6371.0)).min(1.0).asin()
    }

    /// The straight way through the globe: never longer than the great circle, and much cheaper to work out.
    pub fn chord_km(self, other: Point) -> f32 {
        let square = |at: usize| (self.unit[at] - other.unit[at]) * (self.unit[at] - other.unit[at]);
        6371.0 * (square(0) + square(1) + square(2)).sqrt()
    }
}

/// An ISO 3166-1 alpha-2 code, upper case.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Country([u8; 2]);

impl Country {
    /// `None` unless `code` is two ASCII letters; lower case is accepted.
    pub fn parse(code: &str) -> Option<Country> {
        let bytes: [u8; 2] = code.as_bytes().try_into().ok()?;
        bytes.iter().all(u8::is_ascii_alphabetic).then(|| Country(bytes.map(|b| b.to_ascii_uppercase())))
    }

    /// The two letters.
    pub fn as_str(&self) -> &str {
        // Two ASCII letters by construction.
        std::str::from_utf8(&self.0).unwrap_or("??")
    }

    /// Whether the code is assigned, that is, in the table of countries.
    pub fn is_known(self) -> bool {
        self.row().is_some()
    }

    /// A point that stands for where the country's users are; `None` for a code that is not in the table.
    pub fn centroid(self) -> Option<Point> {
        self.row().and_then(|&(_, _, latitude, longitude)| Point::new(latitude, longitude))
    }

    /// The continent; `None` for a code that is not in the table.
    pub fn continent(self) -> Option<Continent> {
        self.row().map(|row| row.1)
    }

    fn row(self) -> Option<&'static (&'static [u8; 2], Continent, f32, f32)> {
        COUNTRIES.binary_search_by(|row| row.0.cmp(&self.0)).ok().map(|at| &COUNTRIES[at])
    }
}

impl fmt::Display for Country {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for Country {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The seven continents, as GeoIP databases divide the world.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Continent {
    Africa,
    Antarctica,
    Asia,
    Europe,
    NorthAmerica,
    Oceania,
    SouthAmerica,
}

/// Where a location was learnt, most trusted first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// `locations.toml`, above GeoIP.
    Override,
    /// A GeoIP record with coordinates.
    City,
    /// A GeoIP record with a country only; the point is the country's.
    Country,
    /// Nothing is known about the address.
    Unknown,
}

impl Source {
    /// The word used in answers, logs and `explain`.
    pub fn as_str(self) -> &'static str {
        match self {
            Source::Override => "override",
            Source::City => "city",
            Source::Country => "country",
            Source::Unknown => "unknown",
        }
    }
}

/// Where a client is. Unknown is a value, never an error.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Location {
    /// The country, if known.
    pub country: Option<Country>,
    /// The point used for distances, if known.
    pub point: Option<Point>,
    /// Where this was learnt.
    pub source: Source,
}

impl Location {
    /// A client about whom nothing is known.
    pub const UNKNOWN: Location = Location { country: None, point: None, source: Source::Unknown };

    /// What a GeoIP record tells: its own point, else its country's.
    pub fn from_record(country: Option<Country>, point: Option<Point>) -> Location {
        match (point, country.and_then(Country::centroid)) {
            (Some(point), _) => Location { country, point: Some(point), source: Source::City },
            (None, Some(point)) => Location { country, point: Some(point), source: Source::Country },
            // A country that is not in the table still counts for the country rules.
            (None, None) => Location {
                country,
                point: None,
                source: if country.is_some() { Source::Country } else { Source::Unknown },
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(latitude: f32, longitude: f32) -> Point {
        Point::new(latitude, longitude).expect("valid")
    }

    #[test]
    fn distances_agree_with_published_ones() {
        // Great-circle distances between city centres, from geodesic calculators, in kilometres.
        let rows = [
            (point(51.5074, -0.1278), point(40.7128, -74.0060), 5570.0),
            (point(35.6762, 139.6503), point(37.7749, -122.4194), 8280.0),
            (point(-33.8688, 151.2093), point(-34.6037, -58.3816), 11800.0),
            (point(53.3498, -6.2603), point(53.3498, -6.2603), 0.0),
        ];
        for (a, b, km) in rows {
            assert!((a.distance_km(b) - km).abs() <= km * 0.01 + 0.01, "{a:?} {b:?} {}", a.distance_km(b));
            assert_eq!(a.distance_km(b), b.distance_km(a));
        }
    }

    #[test]
    fn antipodes_and_the_date_line() {
        assert!((point(0.0, 0.0).distance_km(point(0.0, 180.0)) - 20015.0).abs() < 5.0);
        assert!(point(0.0, 179.9).distance_km(point(0.0, -179.9)) < 25.0);
        assert!(point(90.0, 0.0).distance_km(point(90.0, 120.0)) < 1.0);
    }

    #[test]
    fn points_off_the_globe_are_refused() {
        for (latitude, longitude) in [(90.1, 0.0), (0.0, -180.1), (f32::NAN, 0.0), (0.0, f32::INFINITY)] {
            assert_eq!(Point::new(latitude, longitude), None);
        }
    }

    #[test]
    fn countries_parse_strictly() {
        assert_eq!(Country::parse("no").map(|c| c.to_string()), Some("NO".to_owned()));
        for bad in ["", "D", "DEU", "D1", "Ä", "\u{0}\u{0}"] {
            assert_eq!(Country::parse(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn the_country_table_is_sorted_and_on_the_globe() {
        assert!(COUNTRIES.windows(2).all(|pair| pair[0].0 < pair[1].0));
        assert!(COUNTRIES.iter().all(|row| Point::new(row.2, row.3).is_some()));
        let germany = Country::parse("DE").expect("valid");
        assert_eq!(germany.continent(), Some(Continent::Europe));
        assert!(germany.centroid().expect("in the table").distance_km(point(51.0, 10.0)) < 200.0);
    }

    #[test]
    fn a_country_record_is_placed_at_its_centroid_and_an_unlisted_one_keeps_its_code() {
        let japan = Country::parse("JP");
        assert_eq!(Location::from_record(japan, None).source, Source::Country);
        assert!(Location::from_record(japan, None).point.is_some());
        let unlisted = Location::from_record(Country::parse("QZ"), None);
        assert_eq!((unlisted.source, unlisted.point), (Source::Country, None));
        assert_eq!(Location::from_record(None, None), Location::UNKNOWN);
    }
}
