"""Dataclasses from untrusted JSON: no field missing, none unknown, each of its type."""

import types
from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Made = TypeVar("Made")


def from_fields(cls: type[Made], content: object, optional: Collection[str] = ()) -> Made:
    """An instance of a dataclass from the fields in `content`; only `optional` ones may be left to their defaults.

    A field whose type is another dataclass is made likewise; JSON's lists become tuples where a tuple is wanted. Raises
    ValueError naming the field that is missing, unknown or of another type.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"{cls.__name__} is {content!r:.40}, not a JSON object")
    hints = get_type_hints(cls)
    names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    for name in content:
        if name not in names:
            raise ValueError(f"field {name!r} is unknown to this version")
    for name in names:
        if name not in content and name not in optional:
            raise ValueError(f"field {name!r} is missing")
    return cls(**{name: _typed(name, value, hints[name]) for name, value in content.items()})


def _typed(name: str, value: Any, hint: Any) -> Any:
    """`value` as the type `hint` has it. Raises ValueError for a value of another type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        [hint] = [argument for argument in arguments if argument is not type(None)]
        return _typed(name, value, hint)
    if origin is tuple and isinstance(value, list):
        return tuple(_typed(name, item, arguments[0]) for item in value)
    if origin is dict and isinstance(value, dict):
        return {key: _typed(name, item, arguments[1]) for key, item in value.items()}
    if origin is Literal and isinstance(value, str):  # which ones there are, the dataclass knows
        return value
    if hasattr(hint, "__dataclass_fields__"):
        return from_fields(hint, value)
    if isinstance(value, int) and abs(value) >= 1 << 63:
        raise ValueError(f"field {name!r} is a number of more than 64 bits")
    # a bool is an int to isinstance, and an int is a fine float
    wanted = (int, float) if hint is float else hint
    if origin is None and isinstance(value, wanted) and (hint is bool) == isinstance(value, bool):
        return value
    raise ValueError(f"field {name!r} is {value!r:.40}, not of type {getattr(hint, '__name__', hint)}")
