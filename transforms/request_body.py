# SPDX-License-Identifier: Apache-2.0
"""The body of a Train Model API request: read, checked and resolved.

The rules and the messages are the plugin's (`RestTrainModelHandler`, `SpaceTypeResolver`, `EngineResolver`,
`TrainingModelRequest`). Where the plugin answers 500 (a null or a list where it expects a value) the request is refused
with a message of ours.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from transforms import method as methods
from transforms.errors import RequestError
from transforms.files import read_whole
from transforms.method import INT_MAX, UNDEFINED, Context, Method, UserMethod, validation_failed
from transforms.versions import Version

MAX_SEARCH_SIZE = 10_000
MAX_DESCRIPTION_LENGTH = 1000  # UTF-16 units
MAX_MODEL_ID_BYTES = 512


@dataclass
class Fields:
    """The body's fields as `RestTrainModelHandler` collects them; None or UNDEFINED means not set."""

    training_index: str | None = None
    training_field: str | None = None
    method: UserMethod | None = None
    dimension: int | None = None
    max_training_vector_count: int | None = None
    search_size: int | None = None
    description: str | None = None
    data_type: str | None = None
    mode: str | None = None
    compression_level: str | None = None
    space_type: str = UNDEFINED
    engine: str = UNDEFINED


def read_request(path: str) -> bytes:
    """A file with a Train API body, on any Beam filesystem. Raises RequestError."""
    try:
        return read_whole(path)
    except (OSError, ValueError) as error:
        raise RequestError(f"cannot read request {path!r}: {error}") from error


def read_json(body: str | bytes) -> Iterable[tuple[str, Any]]:
    """The members of the JSON object in `body`. Raises RequestError."""
    if not body.strip():
        raise RequestError("request body is required")
    try:
        text = body.decode("utf-8-sig") if isinstance(body, bytes) else body
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
    except RequestError:
        raise
    except (ValueError, RecursionError) as error:
        raise RequestError(f"request body is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        token = "START_ARRAY" if isinstance(value, list) else "VALUE"
        raise RequestError(f"Failed to parse object: expecting token of type [START_OBJECT] but found [{token}]")
    return value.items()


def _object(members: list[tuple[str, Any]]) -> dict[str, Any]:
    """OpenSearch's JSON parser refuses duplicates, before the plugin's own check (`is duplicated.`) sees them."""
    value: dict[str, Any] = {}
    for name, item in members:
        if name in value:
            raise RequestError(f"Duplicate field '{name}'")
        value[name] = item
    return value


def _no_constant(text: str) -> None:
    raise RequestError(f"request body is not valid JSON: {text} is not a JSON number")


def read_fields(members: Iterable[tuple[str, Any]], version: Version) -> Fields:
    """`RestTrainModelHandler.createTransportRequest`, its loop over the tokens. Raises RequestError."""
    fields = Fields()
    for name, value in members:
        if name in ("training_index", "training_field"):
            setattr(fields, name, None if value is None else _text(name, value))
        elif name == "description":
            fields.description = _description(value)
        elif name in ("mode", "compression_level"):
            setattr(fields, name, _text(name, value))
        elif name in ("dimension", "max_training_vector_count", "search_size"):
            number = _integer(name, value)
            setattr(fields, name, None if number == -1 else number)  # -1 is the plugin's word for not set
        elif name == "method":
            fields.method = methods.parse_method(value)
        elif name == "data_type":
            fields.data_type = _data_type(_text(name, value))
        elif name == "spaceType" or (name == "space_type" and version >= (2, 18, 0)):
            if fields.space_type != UNDEFINED:
                raise RequestError("Unable to parse SpaceType as it is duplicated.")
            fields.space_type = _space_type(_text(name, value))
        elif name == "engine" and version >= (3, 3, 0):
            fields.engine = _engine(_text(name, value))
        else:
            raise RequestError(f'Unable to parse token. "{name}" is not a valid parameter.')
    return fields


def _text(name: str, value: object) -> str:
    """`XContentParser.text`: strings as they are, numbers and booleans as their JSON text."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int | float):
        return str(value)
    token = "VALUE_NULL" if value is None else "START_OBJECT" if isinstance(value, Mapping) else "START_ARRAY"
    raise RequestError(f'Can\'t get text on a {token}: "{name}" must be a string')


def _integer(name: str, value: object) -> int:
    """`NumberFieldMapper.NumberType.INTEGER.parse` without coercion: 16, 16.0 and "16" are all sixteen."""
    if isinstance(value, bool):
        value = _text(name, value)
    if isinstance(value, str):
        if not re.fullmatch(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?[dDfF]?\s*", value):
            raise RequestError(f'For input string: "{value}"' if value.strip() else "empty String")
        number = float(value.strip().rstrip("dDfF"))
    elif isinstance(value, int | float):
        number = value
    else:
        raise RequestError(f'"{name}" must be an integer, not {json.dumps(value, default=str)}')
    if not -INT_MAX - 1 <= number <= INT_MAX:
        raise RequestError(f"Value [{value}] is out of range for an integer")
    if number % 1 != 0:
        raise RequestError(f"Value [{value}] has a decimal part")
    return int(number)


def _data_type(text: str) -> str:
    if text.lower() not in methods.DATA_TYPES:
        raise RequestError("Invalid value provided for [data_type] field. Supported values are [binary,byte,float]")
    return text.lower()


def _space_type(text: str) -> str:
    space_type = methods.parse_space_type(text)
    if space_type is None:
        valid = ", ".join(methods.SPACE_TYPES)
        raise RequestError(f"Unable to find space: {text} . Valid values are: [{valid}]")
    return space_type


def _engine(text: str) -> str:
    if text.lower() not in methods.ENGINES:
        raise RequestError(f"Invalid engine type: {text}")
    return text.lower()


def _description(value: object) -> str:
    if value is None:  # the plugin answers 500 (NullPointerException) here
        raise RequestError('"description" must not be null')
    description = _text("description", value)
    if "," in description:
        raise RequestError("Model description cannot contain any commas: ','")
    return description


# --- from fields to a request ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resolved:
    """What the fields come to. `compression_level` and `mode` are as the model document stores them."""

    dimension: int
    data_type: str
    space_type: str
    method: Method
    mode: str | None
    compression_level: str | None


def check_set(fields: Fields, version: Version, require_index: bool, require_field: bool) -> None:
    """Refuses a body that lacks a field or has two that exclude each other. Raises RequestError."""
    if fields.method is None and fields.mode is None and fields.compression_level is None:
        raise RequestError('At least "[method]", "[mode]" or "[compression_level]" needs to be set')
    if version < (2, 19, 0) and fields.method is not None:
        for name in ("mode", "compression_level"):
            if getattr(fields, name) is not None:
                raise RequestError(f'"[method]" and "[{name}]" cannot both be set')
    _ensure_set("dimension", fields.dimension)
    if require_index:
        _ensure_set("training_index", fields.training_index)
    if require_field:
        _ensure_set("training_field", fields.training_field)


def resolve(fields: Fields, version: Version) -> Resolved:
    """The rest of `createTransportRequest`, then `TrainingModelRequest`'s constructor and `validate`.

    Raises RequestError.
    """
    data_type = fields.data_type or "float"
    if data_type != "float" and (fields.mode is not None or fields.compression_level is not None):
        raise RequestError('When "[mode]" or "[compression_level]" is set, "[data_type]" must be set to "[float]"')
    space_type = _resolve_space_type(fields, data_type)
    context = Context(
        dimension=fields.dimension or 0,
        data_type=data_type,
        compression_level=_compression_level(fields.compression_level),
        mode=_mode(fields.mode),
        version=version,
    )
    _check_engine(fields, context)
    method, compression_level = methods.resolve(fields.method, context)
    _check_counts(fields)
    _validate(method, space_type, fields.description or "", context)
    return Resolved(context.dimension, data_type, space_type, method, context.mode, compression_level)


def _check_counts(fields: Fields) -> None:
    """`setMaximumVectorCount` and `setSearchSize`, which the plugin calls after it resolved the method."""
    count, search_size = fields.max_training_vector_count, fields.search_size
    if count is not None and count <= 0:
        raise RequestError(f"Maximum vector count {count} is invalid. Maximum vector count must be greater than 0")
    if search_size is not None and not 0 < search_size <= MAX_SEARCH_SIZE:
        raise RequestError(f"Search size {search_size} is invalid. Search size must be between 0 and 10,000")


def _ensure_set(name: str, value: object) -> None:
    if value is None:
        raise RequestError(f'Request did not set "{name}.')  # the closing quote is missing in the plugin too


def _compression_level(text: str | None) -> str | None:
    if text and text not in methods.COMPRESSION_LEVELS:
        raise RequestError(f'Invalid compression level: "[{text}]"')
    return text or None


def _mode(text: str | None) -> str | None:
    if text and text.lower() not in ("in_memory", "on_disk"):
        raise RequestError(f'Invalid mode: "[{text}]"')
    return text.lower() if text else None


def _resolve_space_type(fields: Fields, data_type: str) -> str:
    """`SpaceTypeResolver.resolveSpaceType`."""
    inner = UNDEFINED if fields.method is None else fields.method.space_type
    given = [space_type for space_type in (inner, fields.space_type) if space_type != UNDEFINED]
    if len(set(given)) > 1:
        raise RequestError(f'Cannot specify conflicting space types: "[{inner}]" "[{fields.space_type}]"')
    return given[0] if given else "hamming" if data_type == "binary" else "l2"


def _check_engine(fields: Fields, context: Context) -> None:
    """`EngineResolver`: only faiss trains. Raises RequestError."""
    inner = None if fields.method is None else fields.method.engine
    if context.version < (3, 3, 0):
        if inner is None and fields.method is not None and context.version < (2, 18, 0):
            raise RequestError(f"Invalid method name: {fields.method.name}")  # the default engine is nmslib there
        engine = "faiss" if inner in (None, UNDEFINED) else inner
    else:
        top = fields.engine
        if top == UNDEFINED and inner in (None, UNDEFINED):
            top = "faiss"
        if top not in (UNDEFINED, "faiss"):
            raise RequestError("Cannot specify engine other than FAISS for training")
        if top == "faiss" and context.compression_level == "4x":
            raise RequestError("Lucene is the only engine that supports 4x compression")
        if top != UNDEFINED and inner not in (None, top):
            raise RequestError(f"Cannot specify conflicting engines: [{inner}] and [{top}]")
        engine = inner or top
    if engine != "faiss":
        raise validation_failed([f'Cannot use "{engine}" engine from training context'])


def _validate(method: Method, space_type: str, description: str, context: Context) -> None:
    """`TrainingModelRequest.validate`, as far as it needs no cluster state. Raises RequestError."""
    errors = methods.method_errors(method, space_type, context)
    if _java_length(description) > MAX_DESCRIPTION_LENGTH:
        errors.append(f"Description exceeds limit of {MAX_DESCRIPTION_LENGTH} characters")
    errors += methods.early_m_errors(method, context)
    if context.data_type != "float" and method.encoder.name != "flat":  # IndexUtil.validateKnnField
        errors.append(f"encoder is not supported for vector data type [{context.data_type}]")
    if errors:
        raise validation_failed(errors)
    if method.encoder.parameters.get("enable_adc") and method.encoder.parameters.get("bits", 1) != 1:
        bits = method.encoder.parameters["bits"]
        raise RequestError(f"Validation Failed: ADC is not supported for bit count: {bits}")


def check_model_id(model_id: str | None) -> None:
    """Refuses an id that is too long for a document (`IndexRequest.validate`). Raises RequestError."""
    size = len((model_id or "").encode())
    if size > MAX_MODEL_ID_BYTES:
        raise validation_failed(
            [f"id [{model_id}] is too long, must be no longer than {MAX_MODEL_ID_BYTES} bytes but was: {size}"]
        )


def _java_length(text: str) -> int:
    """Length in UTF-16 units."""
    return len(text.encode("utf-16-le", "surrogatepass")) // 2
