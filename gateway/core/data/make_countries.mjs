// Makes gateway/core/src/geo/countries.rs: one row for each ISO 3166-1 alpha-2
// code, and XK (Kosovo), with its continent and the point that stands for its
// users when a network distance is estimated.
//
// To run it, copy this file into an empty directory, and there:
//
//   npm install world-atlas@2.0.2 topojson-client@3.1.0 d3-geo@3.1.2 \
//       i18n-iso-countries@7.14.0 countries-list@3.4.1
//   node make_countries.mjs PATH/TO/countries.rs
//   rustfmt PATH/TO/countries.rs   (with the rustfmt.toml here: no change)
//
//   world-atlas 2.0.2 (ISC)          countries-10m.json: Natural Earth's
//                                    1:10m shapes, which are public domain
//   topojson-client 3.1.0 (ISC)      reads that file
//   d3-geo 3.1.2 (ISC)               areas and centroids on the sphere
//   i18n-iso-countries 7.14.0 (MIT)  the codes, numeric to alpha-2
//   countries-list 3.4.1 (MIT)       continents
//
// Made with Node.js 20. The points are rough: one stands for a whole country,
// so in a large one a user may be thousands of kilometres from it.

import { writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { geoArea, geoCentroid, geoContains, geoDistance } from "d3-geo";
import { feature } from "topojson-client";
import { countries } from "countries-list";

const require = createRequire(import.meta.url);
const iso = require("i18n-iso-countries");
const atlas = require("world-atlas/countries-10m.json");

// ISO 3166-1 has 249 codes in use; XK is a user-assigned one in wide use.
const EXPECTED = 250;

const CONTINENT = {
  AF: "Africa",
  AN: "Antarctica",
  AS: "Asia",
  EU: "Europe",
  NA: "NorthAmerica",
  OC: "Oceania",
  SA: "SouthAmerica",
};

// Continents that countries-list gives otherwise.
const CONTINENT_BY_HAND = {
  RU: "EU", // most people, and the point below, are in the European part
};

// Shapes with no numeric code in the atlas, by name.
const CODE_BY_NAME = { Kosovo: "XK" };

// The rule is the centroid of the largest polygon. These points, latitude then
// longitude, stand in where that polygon is not where people are, or where its
// centroid is far from them. They are rough centres of population, judged by
// hand from where the large cities are, except where a source is named.
const POINT_BY_HAND = {
  // Large countries, settled at one side.
  AR: [-34.0, -60.5], // between Buenos Aires and Rosario
  AU: [-33.5, 147.0], // amid Sydney, Melbourne, Brisbane; the rule: the desert
  BR: [-19.5, -45.5], // Minas Gerais; the rule: Mato Grosso
  CA: [45.0, -79.5], // Ontario, the Windsor-Quebec corridor; the rule: Manitoba's north
  CN: [33.0, 113.5], // Henan; the rule: Gansu
  CO: [5.5, -74.7], // Bogota, Medellin and Cali; the rule: the plains
  KZ: [46.5, 71.0], // towards Almaty
  MX: [20.5, -100.0], // Queretaro, the central highlands
  RU: [55.8, 44.0], // south of Nizhny Novgorod; the rule: Siberia
  US: [37.42, -92.35], // mean centre of population, 2020 census (Missouri)
  ZA: [-28.0, 28.2], // towards Johannesburg

  // Europe.
  DK: [55.8, 11.0], // between Jutland and Copenhagen
  FI: [61.7, 24.9],
  GR: [38.5, 23.3], // towards Athens
  IS: [64.15, -21.7], // Reykjavik
  NO: [60.6, 9.5], // north-west of Oslo
  SE: [59.3, 15.5], // between Stockholm and Gothenburg

  // Africa: coasts and rivers, against empty interiors.
  AO: [-10.5, 14.8], // Luanda, Benguela, Huambo
  BJ: [7.0, 2.4],
  BW: [-24.0, 25.9], // Gaborone and the east
  CF: [5.0, 18.6], // Bangui
  CG: [-4.2, 14.0], // Brazzaville and Pointe-Noire
  CI: [6.3, -5.0],
  DZ: [35.7, 3.0], // the north; the rule: the Sahara
  EG: [29.9, 31.1], // Cairo
  EH: [27.1, -13.1], // Laayoune; part of MA in the atlas
  GA: [0.0, 10.2], // towards Libreville
  GM: [13.4, -16.5], // the west; the rule: over the border
  GN: [10.2, -12.5],
  KE: [-0.6, 36.9], // Nairobi and the highlands
  LY: [32.0, 15.5], // the coast
  MA: [33.0, -6.5], // towards Casablanca and Rabat
  ML: [13.3, -6.5], // the south, Bamako and Segou
  MR: [17.5, -13.8], // the south-west
  NA: [-19.8, 16.8], // the north and Windhoek
  NE: [13.7, 6.5], // the south
  SD: [14.6, 32.0], // Khartoum and Gezira
  SN: [14.6, -16.3], // towards Dakar
  TD: [11.0, 16.8], // the south
  TG: [7.0, 1.2],
  TN: [36.0, 10.0],

  // Asia.
  AE: [25.0, 55.2], // Dubai
  AF: [34.5, 67.8],
  ID: [-7.0, 110.0], // Java; the rule: Borneo
  IL: [32.0, 34.9], // Tel Aviv
  IR: [34.0, 51.8],
  JO: [32.0, 35.9], // Amman
  MN: [47.9, 106.9], // Ulaanbaatar
  MV: [4.18, 73.51], // Male
  MY: [3.5, 102.0], // the peninsula; the rule: Borneo
  OM: [23.4, 58.0], // towards Muscat
  PH: [14.3, 121.2], // south of Manila
  PK: [30.5, 72.0], // Punjab
  TJ: [38.6, 69.2],
  TR: [39.6, 32.5],
  UZ: [40.3, 67.5], // Samarkand, Tashkent, the Fergana valley
  YE: [14.8, 44.5],

  // The Americas.
  BS: [25.03, -77.4], // New Providence (Nassau); the rule: Andros
  GF: [4.9, -52.4], // Cayenne; part of FR in the atlas
  GL: [64.2, -51.6], // Nuuk; the rule: the ice sheet
  GP: [16.25, -61.55], // part of FR in the atlas
  GY: [6.7, -58.1], // Georgetown
  MQ: [14.64, -61.0], // part of FR in the atlas
  BQ: [12.15, -68.27], // Bonaire; part of NL in the atlas
  PE: [-11.0, -76.5], // towards Lima
  PY: [-25.4, -56.8], // the east
  SR: [5.75, -55.2], // Paramaribo
  TC: [21.78, -72.25], // Providenciales
  UY: [-34.3, -56.1], // towards Montevideo
  VE: [9.9, -67.8], // the north

  // Oceania.
  KI: [1.38, 173.05], // South Tarawa; the rule: Kiritimati, 3300 km away
  NC: [-22.2, 166.4], // Noumea
  NZ: [-39.0, 175.5], // North Island; the rule: South Island
  PN: [-25.07, -130.1], // Pitcairn itself; the rule: Henderson
  TK: [-9.2, -171.85], // Nukunonu
  UM: [19.29, 166.64], // Wake, the one with a standing staff
  VU: [-17.7, 168.35], // Efate (Port Vila)
  WS: [-13.85, -171.8], // Upolu (Apia)

  // The rest: far islands, Antarctica, and a shape too small to measure.
  AQ: [-77.85, 166.67], // McMurdo, the largest station
  BV: [-54.42, 3.36], // part of NO in the atlas; nobody lives there
  CC: [-12.17, 96.84], // "Indian Ocean Ter." in the atlas
  CX: [-10.47, 105.65], // "Indian Ocean Ter." in the atlas
  RE: [-21.1, 55.5], // part of FR in the atlas
  SJ: [78.22, 15.65], // Longyearbyen; part of NO in the atlas
  VA: [41.9, 12.45],
  YT: [-12.82, 45.15], // part of FR in the atlas
};

const EARTH_KM = 6371;
const NEAR_KM = 25; // a point by hand is on its land, or this near to it

const fail = (message) => {
  console.error(`make_countries: ${message}`);
  process.exit(1);
};

/** The polygons of a feature, each a GeoJSON geometry of its own. */
const polygons = ({ geometry }) => {
  const parts =
    geometry.type === "Polygon" ? [geometry.coordinates] : geometry.coordinates;
  return parts.map((coordinates) => ({ type: "Polygon", coordinates }));
};

/** The rule: the centroid, [latitude, longitude], of the largest polygon. */
const ruleFor = (parts) => {
  const largest = parts.reduce((a, b) => (geoArea(b) > geoArea(a) ? b : a));
  const [lon, lat] = geoCentroid(largest);
  return [lat, lon];
};

/** Whether a point is on one of the polygons, or near to a vertex of one. */
const isOnOrNear = (parts, [lat, lon]) =>
  parts.some(
    (part) =>
      geoContains(part, [lon, lat]) ||
      part.coordinates[0].some(
        (vertex) => geoDistance(vertex, [lon, lat]) * EARTH_KM < NEAR_KM,
      ),
  );

const [, , output] = process.argv;
if (!output) fail("usage: node make_countries.mjs PATH/TO/countries.rs");

const shapes = new Map();
const allParts = [];
for (const shape of feature(atlas, atlas.objects.countries).features) {
  const parts = polygons(shape);
  allParts.push(...parts);
  const code =
    CODE_BY_NAME[shape.properties.name] ??
    (shape.id && iso.numericToAlpha2(shape.id));
  if (code) shapes.set(code, [...(shapes.get(code) ?? []), ...parts]);
}
// The atlas draws only the inland strip of it as EH, and the rest as MA.
shapes.delete("EH");

const codes = Object.keys(iso.getAlpha2Codes()).sort();
if (codes.length !== EXPECTED) fail(`${codes.length} codes, not ${EXPECTED}`);
for (const code of Object.keys(POINT_BY_HAND)) {
  if (!codes.includes(code)) fail(`${code}: a point for no known code`);
}

const rows = codes.map((code) => {
  const continent =
    CONTINENT[CONTINENT_BY_HAND[code] ?? countries[code]?.continent];
  if (!continent) fail(`${code}: no continent`);

  const parts = shapes.get(code);
  const byHand = POINT_BY_HAND[code];
  if (!parts && !byHand) fail(`${code}: no shape and no point by hand`);
  // A code with no shape of its own has its land in another's.
  if (byHand && !isOnOrNear(parts ?? allParts, byHand)) {
    fail(`${code}: the point by hand is not on its land`);
  }
  const [lat, lon] = byHand ?? ruleFor(parts);
  if (!(Math.abs(lat) <= 90 && Math.abs(lon) <= 180)) {
    fail(`${code}: bad point ${lat}, ${lon}`);
  }
  return `    (b"${code}", ${continent}, ${lat.toFixed(2)}, ${lon.toFixed(2)}),`;
});

writeFileSync(
  output,
  `//! Where each country is: its continent, and a point that stands for its users.
//!
//! Made by \`data/make_countries.mjs\`; change that script, not this file.
//!
//! The point is the centroid of the country's largest polygon, or, where people
//! live far from that, a rough centre of population set by hand in the script.
//!
//! Sources:
//! - shapes: Natural Earth 1:10m (public domain), as packaged in \`world-atlas\`
//!   2.0.2 (ISC, Copyright 2013-2019 Michael Bostock), measured with
//!   \`topojson-client\` 3.1.0 and \`d3-geo\` 3.1.2 (both ISC);
//! - codes: \`i18n-iso-countries\` 7.14.0 (MIT, Copyright (c) 2016 widdix GmbH);
//! - continents: \`countries-list\` 3.4.1 (MIT, Copyright (c) 2014 Annexare
//!   Studio), except that Russia is put in Europe.

use super::Continent::{self, Africa, Antarctica, Asia, Europe, NorthAmerica, Oceania, SouthAmerica};

/// Code (ISO 3166-1 alpha-2, and XK), continent, latitude and longitude in
/// degrees; in order of code, for a binary search.
pub(crate) static COUNTRIES: [(&[u8; 2], Continent, f32, f32); ${rows.length}] = [
${rows.join("\n")}
];
`,
);
