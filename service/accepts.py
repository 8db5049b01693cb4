"""The one check of what models and settings allow: fields of a request against JSON schemas, told in plain words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from jsonschema import Draft202012Validator

from service.errors import Fault, shown

_LISTED = 20  # alternatives that a message lists


class Accepts:
    """What each of some fields takes. Frozen; raises `jsonschema.SchemaError` for a schema that is none."""

    def __init__(self, schemas: Mapping[str, Mapping[str, Any]]) -> None:
        for schema in schemas.values():
            Draft202012Validator.check_schema(schema)
        self._schemas = {name: dict(schema) for name, schema in schemas.items()}
        self._validators = {name: Draft202012Validator(schema) for name, schema in self._schemas.items()}

    def __contains__(self, field: str) -> bool:
        return field in self._schemas

    def faults(self, given: Mapping[str, Any], who: str) -> list[Fault]:
        """What is wrong with the fields that were given. who: whose fields these are, for the message."""
        faults = []
        for name, value in given.items():
            if name not in self._validators:
                faults.append(Fault(("body", name), f"{who} takes no {name}; it takes {self.described}", value))
            elif (error := next(self._validators[name].iter_errors(value), None)) is not None:
                told = json.dumps(shown(value), ensure_ascii=False)
                outside = error.validator in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
                msg = error.message if outside else f"{told} is not {describe(self._schemas[name])}"
                faults.append(Fault(("body", name), msg, value))
        return faults

    def default(self, field: str) -> Any:
        """The value of a field that was not given; None where there is none."""
        return self._schemas.get(field, {}).get("default")

    @cached_property
    def described(self) -> str:
        return "; ".join(f"{name}: {describe(schema)}" for name, schema in self._schemas.items()) or "nothing"


def describe(schema: Mapping[str, Any]) -> str:
    """A JSON schema in words, e.g. "an integer from 1 to 1000"."""
    if "anyOf" in schema:
        return " or ".join(describe(s) for s in schema["anyOf"])
    if "enum" in schema:
        values = [str(v) for v in schema["enum"]]
        more = f", … ({len(values):,} in all)" if len(values) > _LISTED else ""
        return f"one of {', '.join(values[:_LISTED])}{more}"
    kind = schema.get("type")
    if kind == "string":
        return f"a text of {schema.get('minLength', 0)} to {schema.get('maxLength', 'any number of')} characters"
    name = {"integer": "an integer", "number": "a number"}.get(str(kind), "a value")
    bounds = [
        f"{words} {schema[key]}"
        for words, key in (
            ("from", "minimum"),
            ("above", "exclusiveMinimum"),
            ("to", "maximum"),
            ("below", "exclusiveMaximum"),
        )
        if key in schema
    ]
    return " ".join([name, *bounds])
