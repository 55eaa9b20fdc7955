"""Validation of arguments against a tool's JSON Schema."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match
from jsonschema.validators import extend, validator_for
from referencing import Registry


logger = logging.getLogger(__name__)

NOTHING_REMOTE: Registry = Registry()


def find_error(arguments: dict[str, Any], schema: dict[str, Any]) -> str | None:
    """Return the error of arguments that violate a tool's JSON Schema, or `None`.

    Remote references are not fetched. If a part of the schema is invalid, such as an unknown type, only that part is
    ignored.
    """
    try:
        validator = _forgiving(validator_for(schema, default=Draft202012Validator))(schema, registry=NOTHING_REMOTE)
        error = best_match(validator.iter_errors(arguments))
    except Exception as broken:  # such as a reference to itself
        _warn_once(f"arguments are not checked against a broken schema: {broken}")
        return None
    if error is None:
        return None
    place = "".join(f"[{part!r}]" for part in error.absolute_path)
    return f"{place}: {error.message}" if place else error.message


@cache
def _forgiving(validator_class: Any) -> Any:
    """Extend a validator class to ignore keywords whose check fails."""

    def forgive(keyword: str, check: Callable[..., Any]) -> Callable[..., Iterator[Any]]:
        def checked(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[Any]:
            try:
                yield from check(validator, value, instance, schema) or ()
            except RecursionError:
                raise
            except Exception as broken:  # an invalid schema can raise almost any exception
                _warn_once(f"{keyword!r} of a schema is not checked: {' '.join(str(broken).split())[:200]}")

        return checked

    return extend(validator_class, {key: forgive(key, check) for key, check in validator_class.VALIDATORS.items()})


@lru_cache(1024)
def _warn_once(message: str) -> None:
    logger.warning(message)
