//! The JSON Schema of each file, for editors: made from the types that files are read into, with what `reference.toml` says of
//! each setting and its default.

use schemars::generate::SchemaSettings;
use schemars::transform::{RecursiveTransform, Transform};
use schemars::{JsonSchema, Schema};
use serde_json::{Value, json};

use super::build::REFERENCE;
use super::file;

/// A kind of file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum File {
    /// `gateway.toml`.
    Gateway,
    /// `regions/NAME.toml`.
    Region,
    /// `tenants.toml`.
    Tenants,
    /// `locations.toml`.
    Locations,
}

/// The schema of a kind of file (JSON Schema 2020-12).
pub fn schema(file: File) -> Value {
    match file {
        File::Gateway => {
            let mut schema = of::<file::Gateway>();
            let tables = [
                ("listener", of::<file::Listener>()),
                ("region", of::<file::Region>()),
                ("endpoint", of::<file::Endpoint>()),
                ("tenant", of::<file::Tenant>()),
            ];
            // What a file has to say itself, its defaults need not.
            let tables = tables.map(|(name, mut table)| {
                table.as_object_mut().map(|table| table.remove("required"));
                (name.to_owned(), table)
            });
            schema["properties"]["defaults"] = json!({ "type": "object", "additionalProperties": false,
                "properties": serde_json::Map::from_iter(tables) });
            if let Some(required) = schema["required"].as_array_mut() {
                required.retain(|name| name != "defaults");
            }
            explain(&mut schema, "");
            explain(&mut schema["properties"]["listeners"]["items"], "defaults.listener");
            schema
        }
        File::Region => {
            let mut schema = of::<file::Region>();
            explain(&mut schema, "defaults.region");
            explain(&mut schema["properties"]["endpoints"]["items"], "defaults.endpoint");
            schema
        }
        File::Tenants => {
            let mut schema = of::<file::Tenants>();
            explain(&mut schema["properties"]["tenants"]["additionalProperties"], "defaults.tenant");
            schema
        }
        File::Locations => of::<file::Locations>(),
    }
}

fn of<T: JsonSchema>() -> Value {
    let mut settings = SchemaSettings::draft2020_12().with(|settings| settings.inline_subschemas = true);
    settings.transforms.push(Box::new(RecursiveTransform(Plain)));
    settings.into_generator().into_root_schema_for::<T>().to_value()
}

/// Takes out what TOML cannot say, null, and what means nothing to an editor.
#[derive(Clone, Debug)]
struct Plain;

impl Transform for Plain {
    fn transform(&mut self, schema: &mut Schema) {
        let Some(schema) = schema.as_object_mut() else { return };
        if let Some(Value::Array(types)) = schema.get_mut("type") {
            types.retain(|kind| kind != "null");
            if let [one] = types.as_slice() {
                let one = one.clone();
                schema.insert("type".into(), one);
            }
        }
        if let Some(Value::Array(any)) = schema.get_mut("anyOf") {
            any.retain(|kind| kind["type"] != "null");
            if let [Value::Object(one)] = any.as_slice() {
                let one = one.clone();
                schema.remove("anyOf");
                schema.extend(one);
            }
        }
        if let Some(Value::Array(values)) = schema.get_mut("enum") {
            values.retain(|value| !value.is_null());
        }
        // What is there if nothing is said is said by the reference.
        schema.remove("default");
    }
}

/// What the reference says in one place.
struct Note {
    table: String,
    /// A setting of it, or else the table itself.
    key: Option<String>,
    /// What stands above it.
    text: String,
    default: Option<Value>,
    /// It is there whether a file says so or not.
    is_default: bool,
}

fn notes() -> Vec<Note> {
    let (mut notes, mut table, mut above) = (Vec::new(), String::new(), Vec::new());
    let plain = |name: &str| !name.is_empty() && name.bytes().all(|b| b.is_ascii_lowercase() || b"._".contains(&b));
    for line in REFERENCE.lines() {
        let is_default = !line.starts_with('#');
        let code = line.strip_prefix("# ").unwrap_or(line);
        let header = code.strip_prefix('[').map(|code| code.trim_matches(['[', ']'])).filter(|name| plain(name));
        let key = code.split_once(" = ").map(|(key, _)| key).filter(|key| plain(key));
        if let Some(header) = header {
            table = header.to_owned();
        } else if key.is_none() {
            match line.strip_prefix("# ") {
                Some(words) => above.push(words),
                None => above.clear(),
            }
            continue;
        }
        let entry = code.parse::<toml::Table>().ok().and_then(|mut entry| entry.remove(key?));
        notes.push(Note {
            table: table.clone(),
            key: key.filter(|_| header.is_none()).map(str::to_owned),
            text: std::mem::take(&mut above).join(" "),
            default: entry.filter(|_| is_default).and_then(|value| serde_json::to_value(value).ok()),
            is_default,
        });
    }
    notes
}

/// Adds what the reference says of `table`, and of the tables in it, to the schema of that table.
fn explain(schema: &mut Value, table: &str) {
    for note in notes() {
        let path = match note.table.strip_prefix(table) {
            Some(rest) if table.is_empty() || rest.is_empty() || rest.starts_with('.') => rest.trim_start_matches('.'),
            _ => continue,
        };
        let mut path: Vec<&str> = path.split('.').filter(|name| !name.is_empty()).collect();
        let name = match &note.key {
            Some(key) => key,
            // A table is a setting of the one around it.
            None => match path.pop() {
                Some(name) => name,
                None => continue,
            },
        };
        let Some(around) = place(schema, &path) else { continue };
        if let Some(required) = around.get_mut("required").and_then(Value::as_array_mut).filter(|_| note.is_default) {
            required.retain(|required| required != name);
        }
        let Some(property) = around.get_mut("properties").and_then(|properties| properties.get_mut(name)) else {
            continue;
        };
        if !note.text.is_empty() {
            property["description"] = note.text.into();
        }
        if let Some(default) = note.default {
            property["default"] = default;
        }
    }
}

/// The schema of a table below another; of each item, if it is an array of tables.
fn place<'s>(schema: &'s mut Value, path: &[&str]) -> Option<&'s mut Value> {
    path.iter().try_fold(schema, |schema, name| {
        let property = schema.get_mut("properties")?.get_mut(*name)?;
        if property["type"] == "array" { property.get_mut("items") } else { Some(property) }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_schemas_in_the_repository_are_those_of_the_types() {
        for (file, name) in [
            (File::Gateway, "gateway"),
            (File::Region, "region"),
            (File::Tenants, "tenants"),
            (File::Locations, "locations"),
        ] {
            let path = format!("{}/../config/schema/{name}.json", env!("CARGO_MANIFEST_DIR"));
            let kept = std::fs::read_to_string(&path).unwrap_or_default();
            let made = format!("{:#}\n", schema(file));
            assert!(kept == made, "{path} is not up to date: isochrone schema {name} > config/schema/{name}.json");
        }
    }

    #[test]
    fn every_setting_of_the_reference_is_explained_with_its_default() {
        let schema = schema(File::Gateway);
        for note in notes() {
            let mut table = &schema;
            for name in note.table.split('.') {
                table = &table["properties"][name];
                table = if table["type"] == "array" { &table["items"] } else { table };
            }
            let place = note.key.as_ref().map_or(table, |key| &table["properties"][key]);
            assert!(place.is_object(), "{} {:?} is in no type", note.table, note.key);
            assert!(
                note.default.is_none()
                    || note.table.starts_with("defaults")
                    || place["default"] == note.default.unwrap()
            );
        }
        assert_eq!(schema["properties"]["probes"]["properties"]["interval"]["default"], "1s");
    }
}
