"""Generates JSON Schemas for editors, and docs/configuration.md, from the fields of the configuration.

python -m harness.run.reference
"""

import json
from typing import Any

from pydantic import TypeAdapter

from harness.run.config import CONFIG_FILES
from harness.run.files import ROOT
from harness.run.keys import Part, keys_of, part_of

INTRODUCTION = (
    "Generated from the fields in `harness/run/config.py` by `make generated`.",
    "",
    "The part says what changing a key means. `recipe` and `execution` keys make another recipe, so runs that differ "
    "in them are not replicates. A run resumes from its checkpoints only with the same `recipe` keys "
    "and seeds. `seed` keys tell replicates apart. `interval` and `report` keys may change at any time.",
)


def schema_of(config_class: type) -> dict[str, Any]:
    """Return the JSON Schema of a configuration file, with descriptions and `$schema` as an allowed key."""
    schema = TypeAdapter(config_class).json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    for name in keys_of(config_class, *Part):
        schema["properties"][name]["x-part"] = part_of(config_class, name)
    schema["properties"]["$schema"] = {"type": "string", "description": "Path or URL of this schema."}
    return schema


def schema_text(config_class: type) -> str:
    """Return a schema as it is written to disk."""
    return json.dumps(schema_of(config_class), indent=2) + "\n"


def reference() -> str:
    """Return the reference of all keys as Markdown, in the order of the fields."""
    parts = ["# Configuration", "", *INTRODUCTION]
    for name, config_class in CONFIG_FILES.items():
        parts += ["", f"## {name}.json", "", "| key | part | type | default | meaning |", "|---|---|---|---|---|"]
        entries = TypeAdapter(config_class).json_schema()["properties"]
        for key in keys_of(config_class, *Part):
            entry = entries[key]
            default = f"`{json.dumps(entry['default'])}`" if "default" in entry else "required"
            cells = [
                f"`{key}`",
                part_of(config_class, key),
                _type_in_words(entry),
                default,
                " ".join(entry["description"].split()),
            ]
            parts.append(f"| {' | '.join(cells)} |")
    return "\n".join(parts) + "\n"


def _type_in_words(entry: dict[str, Any]) -> str:
    if "anyOf" in entry:
        return " or ".join(_type_in_words(option) for option in entry["anyOf"])
    if "enum" in entry or "const" in entry:
        return " or ".join(f"`{json.dumps(value)}`" for value in entry.get("enum", [entry.get("const")]))
    if entry.get("type") == "array":
        return f"list of {_type_in_words(entry['items'])}"
    if "$ref" in entry:
        return "objects"
    bounds = [("exclusiveMinimum", ">"), ("minimum", ">="), ("exclusiveMaximum", "<"), ("maximum", "<=")]
    shown = [f"{sign} {entry[bound]:,}" for bound, sign in bounds if bound in entry]
    return " ".join([entry["type"], *([", ".join(shown)] if shown else [])])


if __name__ == "__main__":
    for file_name, file_class in CONFIG_FILES.items():
        (ROOT / "runs" / "schema" / f"{file_name}.schema.json").write_text(schema_text(file_class))
    (ROOT / "docs" / "configuration.md").write_text(reference())
