#!/usr/bin/env python3
"""Holds the JSON Schemas of the configuration to files that are valid, and to some that are not.

schemas.py SCHEMAS_DIR CONFIG_DIR...: each directory as the gateway reads it."""
import json
import sys
import tomllib
from pathlib import Path

import fastjsonschema

schemas, *directories = map(Path, sys.argv[1:])
validate = {
    name: fastjsonschema.compile(json.loads((schemas / f"{name}.json").read_text()))
    for name in ["gateway", "region", "tenants", "locations"]
}
checked = 0
for directory in directories:
    for file in sorted([*directory.glob("*.toml"), *directory.glob("regions/*.toml")]):
        name = "region" if file.parent.name == "regions" else file.stem
        validate["gateway" if name == "reference" else name](tomllib.loads(file.read_text()))
        checked += 1

for name, text, word in [
    ("gateway", '[limits]\nconections = 5', "conections"),
    ("gateway", '[limits]\nconnections = "5"', "integer"),
    ("gateway", "[probes]\ninterval = 5", "string"),
    ("gateway", '[[listeners]]\nclient_ip = "peer"', "address"),
    ("gateway", '[steering]\npolicy = "closest"', "policy"),
    ("gateway", '[defaults.region]\ndrian = true', "drian"),
    ("region", 'country = "IE"\nlatitude = 1.0', "longitude"),
    ("region", 'country = "IE"\nlatitude = 1\nlongitude = 1\n[[endpoints]]\nhttpp = "x"', "httpp"),
    ("tenants", "[tenants.a]\nresidency = { requires = [] }", "residency"),
    ("tenants", '[tenants.a]\nkeys = [{ hash = "x", hash_file = "y" }]', "keys"),
    ("locations", '[[locations]]\ncountry = "DE"', "cidr"),
]:
    try:
        validate[name](tomllib.loads(text))
    except fastjsonschema.JsonSchemaException as error:
        assert word in str(error), (text, str(error))
        checked += 1
    else:
        raise AssertionError(f"{name}: {text!r} passes")
print(f"ok {checked}")
