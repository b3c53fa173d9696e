# SPDX-License-Identifier: Apache-2.0
"""The `method` object of a training request: what it may say, and what the cluster makes of it.

Mirrors the k-NN plugin's `KNNMethodContext`, `FaissMethodResolver`, `FaissIVFMethod`, `FaissHNSWMethod` and the faiss
encoders, for the training case only. Messages are the plugin's own words. Rules that changed between versions take a
`version`, a `(major, minor, patch)` tuple; `transforms.versions.VERSION_RULES` lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transforms.errors import RequestError
from transforms.versions import Version

UNDEFINED = "undefined"
ENGINES = ("nmslib", "faiss", "lucene", UNDEFINED)
SPACE_TYPES = ("l2", "cosinesimil", "l1", "linf", "innerproduct", "hamming")
DATA_TYPES = ("binary", "byte", "float")
COMPRESSION_LEVELS = ("1x", "2x", "4x", "8x", "16x", "32x", "64x")
FAISS_COMPRESSION_LEVELS = ("1x", "2x", "8x", "16x", "32x")
MAX_DIMENSION = 16_000
INT_MAX = 2**31 - 1

HNSW_M_DEFAULT = 16
PQ_M_MESSAGE = "Training request ENCODER_PARAMETER_PQ_M is not divisible by vector dimensions"
SQ_BITS_MESSAGE = (
    "Parameter [bits] is required for encoder [sq] on indices created with version 3.6.0 or later. "
    "Supported values: [1, 16]"
)


def validation_failed(messages: Sequence[str]) -> RequestError:
    """The error OpenSearch's `ValidationException` shows for these messages: `Validation Failed: 1: a;2: b;`."""
    numbered = "".join(f"{number}: {message};" for number, message in enumerate(messages, start=1))
    return RequestError(f"Validation Failed: {numbered}")


@dataclass(frozen=True)
class Encoder:
    """How vectors are stored. `parameters` holds what the request gave, or what the plugin resolved; no defaults."""

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """A resolved method. `parameters` has the plugin's defaults filled in; the encoder is kept beside them."""

    name: str
    parameters: Mapping[str, Any]
    encoder: Encoder

    @property
    def definition(self) -> dict[str, Any]:
        """`model_definition` as the plugin stores it (`MethodComponentContext.toXContent`); the key order is free."""
        encoder = {"name": self.encoder.name, "parameters": dict(self.encoder.parameters)}
        return {"name": self.name, "parameters": {**self.parameters, "encoder": encoder}}


@dataclass(frozen=True)
class UserMethod:
    """`method` as the request gave it. `engine` is None when the key is absent, "undefined" when it is null."""

    name: str
    parameters: Mapping[str, Any]
    engine: str | None
    space_type: str


@dataclass(frozen=True)
class Context:
    """What a method is checked against (the plugin's `KNNMethodConfigContext`)."""

    dimension: int
    data_type: str
    mode: str | None
    compression_level: str | None
    version: Version


# --- parsing -----------------------------------------------------------------------------------------------------


def parse_space_type(name: str | None) -> str | None:
    """`name` in the plugin's spelling, or None when no such space exists (`SpaceType.getSpace`)."""
    return name.lower() if name is not None and name.lower() in (*SPACE_TYPES, UNDEFINED) else None


def parse_method(value: object) -> UserMethod:
    """Reads the `method` object (`KNNMethodContext.parse`). Raises RequestError."""
    # Anything but an object reads as an empty one in the plugin, and an empty one lacks its name.
    fields: Mapping[str, Any] = value if isinstance(value, Mapping) else {}
    name, engine, space_type = "", None, UNDEFINED
    parameters: dict[str, Any] = {}
    for key, item in fields.items():
        if key == "engine":
            engine = _parse_method_engine(item)
        elif key == "space_type":
            space_type = _parse_method_space_type(item)
        elif key == "name":
            if not isinstance(item, str):
                raise RequestError("namehas to be a string")
            name = item
        elif key == "parameters":
            if item is not None and not isinstance(item, Mapping):
                raise RequestError("Unable to parse parameters for main method component")
            parameters = _parse_parameters(item)
        else:
            raise RequestError(f"Invalid parameter: {key}")
    if not name:
        raise RequestError("name needs to be set")
    return UserMethod(name, parameters, engine, space_type)


def _parse_method_engine(item: object) -> str:
    if item is None:
        return UNDEFINED
    if not isinstance(item, str):
        raise RequestError('"engine" must be a string')
    if item.lower() not in ENGINES:
        raise RequestError(f"Invalid engine: {item}")
    return item.lower()


def _parse_method_space_type(item: object) -> str:
    if item is not None and not isinstance(item, str):
        raise RequestError('"space_type" must be a string')
    space_type = parse_space_type(item)
    if space_type is None:
        raise RequestError(f"Invalid space_type: {'null' if item is None else item}")
    return space_type


def _parse_parameters(item: Mapping[str, Any] | None) -> dict[str, Any]:
    parameters: dict[str, Any] = {}
    for key, value in (item or {}).items():
        if value is None:  # the plugin answers 500 (NullPointerException) here
            raise RequestError(f"Parameter [{key}] must not be null.")
        parameters[key] = _parse_component(value) if isinstance(value, Mapping) else value
    return parameters


def _parse_component(fields: Mapping[str, Any]) -> Encoder:
    """A nested component (`MethodComponentContext.parse`)."""
    name = ""
    parameters: dict[str, Any] = {}
    for key, item in fields.items():
        if key == "name":
            if not isinstance(item, str):
                raise RequestError("Component name should be a string")
            name = item
        elif key == "parameters":
            if item is not None and not isinstance(item, Mapping):
                raise RequestError("Unable to parse parameters for  method component")
            parameters = _parse_parameters(item)
        else:
            raise RequestError(f"Invalid parameter for MethodComponentContext: {key}")
    if not name:
        raise RequestError("name needs to be set")
    return Encoder(name, parameters)


# --- what a component may say ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameter:
    """One parameter of a component (`Parameter.IntegerParameter` and its siblings)."""

    kind: type
    default: Any
    valid: Callable[[Any, Context], bool]
    since: Version = (0, 0, 0)

    @property
    def kind_name(self) -> str:
        """The Java class in the plugin's messages."""
        return {int: "Integer", bool: "Boolean", str: "String"}[self.kind]

    def errors(self, name: str, value: object, context: Context) -> list[str]:
        """Messages about `value`; none when it is valid."""
        # A JSON number beyond 32 bits is a Long in the plugin, and True is an int in Python only.
        fits = type(value) is self.kind and not (isinstance(value, int) and not -INT_MAX - 1 <= value <= INT_MAX)
        if not fits:
            return [f"value is not an instance of {self.kind_name} for {self.kind_name} parameter [{name}]."]
        if not self.valid(value, context):
            return [f"parameter validation failed for {self.kind_name} parameter [{name}]."]
        return []


@dataclass(frozen=True)
class Component:
    """A method or an encoder (`MethodComponent`)."""

    name: str
    parameters: Mapping[str, Parameter]
    data_types: tuple[str, ...] = ("float",)
    trains: bool = False

    def known(self, version: Version) -> dict[str, Parameter]:
        """The parameters this version of the plugin has."""
        return {name: parameter for name, parameter in self.parameters.items() if parameter.since <= version}

    def data_type_errors(self, context: Context) -> list[str]:
        if context.data_type in self.data_types:
            return []
        return [f'Method "{self.name}" is not supported for vector data type "{context.data_type.upper()}".']

    def encoder_is_valid(self, encoder: Encoder, context: Context) -> bool:
        """True when `encoder` satisfies this component (`MethodComponent.validate` finds nothing)."""
        known = self.known(context.version)
        return not self.data_type_errors(context) and all(
            name in known and not known[name].errors(name, value, context) for name, value in encoder.parameters.items()
        )

    def with_defaults(self, parameters: Mapping[str, Any], version: Version) -> dict[str, Any]:
        """`parameters` after the defaults it does not name (`getParameterMapWithDefaultsAdded`)."""
        defaults = {name: p.default for name, p in self.known(version).items() if p.default is not None}
        return {**defaults, **parameters}


def _integer(default: int | None, valid: Callable[[Any, Context], bool], since: Version = (0, 0, 0)) -> Parameter:
    return Parameter(int, default, valid, since)


def _boolean(since: Version = (0, 0, 0)) -> Parameter:
    return Parameter(bool, False, lambda value, context: True, since)


def _positive(value: int, context: Context) -> bool:
    return value > 0


def _below_20000(value: int, context: Context) -> bool:
    return 0 < value < 20_000


def _divides_dimension(value: int, context: Context) -> bool:
    return 0 < value < 1024 and context.dimension % value == 0


FLAT = Component("flat", {}, data_types=DATA_TYPES)
SQ = Component(
    "sq",
    {
        "type": Parameter(str, "fp16", lambda value, context: value == "fp16"),
        "clip": _boolean(),
        "bits": _integer(None, lambda value, context: value in (1, 16), since=(3, 6, 0)),
    },
)
BINARY = Component(
    "binary",
    {
        "bits": _integer(1, lambda value, context: value in (1, 2, 4)),
        "random_rotation": _boolean(since=(3, 2, 0)),
        "enable_adc": _boolean(since=(3, 2, 0)),
    },
)
IVF_PQ = Component(
    "pq",
    {"m": _integer(1, _divides_dimension), "code_size": _integer(8, lambda value, context: 0 < value < 128)},
    trains=True,
)
HNSW_PQ = Component(
    "pq",
    {"m": _integer(1, _divides_dimension), "code_size": _integer(8, lambda value, context: value == 8)},
    trains=True,
)
IVF = Component(
    "ivf",
    {"nlist": _integer(4, _below_20000), "nprobes": _integer(1, _below_20000)},
    data_types=DATA_TYPES,
    trains=True,
)
HNSW = Component(
    "hnsw",
    {
        "m": _integer(HNSW_M_DEFAULT, _positive),
        "ef_construction": _integer(100, _positive),
        "ef_search": _integer(100, _positive),
    },
    data_types=DATA_TYPES,
)
METHODS = {"ivf": IVF, "hnsw": HNSW}


def encoders(method_name: str) -> dict[str, Component]:
    """The encoders of a method, by name. An unknown method has IVF's, as in `FaissMethodResolver`."""
    return {"flat": FLAT, "sq": SQ, "binary": BINARY, "pq": HNSW_PQ if method_name == "hnsw" else IVF_PQ}


# --- resolution --------------------------------------------------------------------------------------------------


def resolve(user: UserMethod | None, context: Context) -> tuple[Method, str | None]:
    """Fills in what the request left open (`FaissMethodResolver.resolveMethod`, training case).

    Returns the method and the compression level the document stores; None where the plugin cannot tell it.
    Raises RequestError.
    """
    level = context.compression_level
    conflicts = []
    if level is not None and level not in FAISS_COMPRESSION_LEVELS:
        conflicts.append(f'"faiss" does not support "{level}" compression')
    if level == "1x" and context.mode == "on_disk" and context.version < (3, 1, 0):
        conflicts.append('Cannot specify "x1" compression level when using "on_disk" mode')
    if conflicts:
        raise validation_failed(conflicts)

    name = "ivf" if user is None else user.name
    parameters = {} if user is None else dict(user.parameters)
    encoder = parameters.pop("encoder", None)
    if encoder is None:
        encoder = _default_encoder(context)
    elif not isinstance(encoder, Encoder):  # the plugin answers 500 (ClassCastException) here
        raise validation_failed(["value is not an instance of for MethodComponentContext parameter [encoder]."])

    resolved_level = "1x" if encoder is None else _compression_level(name, encoder, context)
    if encoder is not None:
        _check_encoder(parameters, encoder, context)
    if level is not None and resolved_level is not None and level != resolved_level:
        raise validation_failed(["Cannot specify an encoder that conflicts with the provided compression level"])

    filled = METHODS.get(name, IVF).with_defaults(parameters, context.version)
    if name == "hnsw" and resolved_level in ("8x", "16x", "32x"):
        filled = {"ef_construction": 256, "ef_search": 256} | {
            key: value for key, value in filled.items() if key in parameters or not key.startswith("ef_")
        }
    return Method(name, filled, encoder or Encoder("flat")), resolved_level


def _default_encoder(context: Context) -> Encoder | None:
    """The encoder that mode and compression level stand for; None when they ask for none."""
    level = context.compression_level or ("32x" if context.mode == "on_disk" else "1x")
    if level == "1x" or context.data_type != "float":
        return None
    since_3_6 = context.version >= (3, 6, 0)
    if level == "32x" and since_3_6:
        return Encoder("sq", {"bits": 1})  # the plugin removes the defaults of type and clip again
    if level == "2x":
        return Encoder("sq", SQ.with_defaults({"bits": 16} if since_3_6 else {}, context.version))
    bits = {"8x": 4, "16x": 2, "32x": 1}[level]
    return Encoder("binary", BINARY.with_defaults({"bits": bits}, context.version))


def _compression_level(method_name: str, encoder: Encoder, context: Context) -> str | None:
    """What the encoder's parameters amount to (`Encoder.calculateCompressionLevel`)."""
    if encoder.name == "flat":
        return "1x"
    if encoder.name == "sq":
        return _sq_compression_level(encoder, context)
    if encoder.name == "binary":
        return _binary_compression_level(encoder, context)
    if encoder.name == "pq":
        return _pq_compression_level(encoders(method_name)["pq"], encoder, context)
    return None


def _sq_compression_level(encoder: Encoder, context: Context) -> str:
    bits = encoder.parameters.get("bits")
    if type(bits) is not int or context.version < (3, 6, 0):
        return "2x"
    if bits not in (1, 16):
        raise RequestError(f"Unsupported bits value: {bits}")
    return "32x" if bits == 1 else "2x"


def _binary_compression_level(encoder: Encoder, context: Context) -> str | None:
    if "bits" not in encoder.parameters:
        return None
    _require_valid(BINARY, encoder, "bits", context)
    return {1: "32x", 2: "16x", 4: "8x"}[encoder.parameters["bits"]]


def _pq_compression_level(component: Component, encoder: Encoder, context: Context) -> str | None:
    if "m" not in encoder.parameters or "code_size" not in encoder.parameters or context.version < (2, 18, 0):
        return None
    _require_valid(component, encoder, "m", context)
    _require_valid(component, encoder, "code_size", context)
    compression = context.dimension * 32 / (encoder.parameters["m"] * encoder.parameters["code_size"])
    steps = ((2, "1x"), (4, "2x"), (8, "4x"), (16, "8x"), (32, "16x"), (64, "32x"))
    return next((level for limit, level in steps if compression < limit), "64x")


def _require_valid(component: Component, encoder: Encoder, name: str, context: Context) -> None:
    errors = component.parameters[name].errors(name, encoder.parameters[name], context)
    if errors:
        raise validation_failed(errors)


def _check_encoder(parameters: Mapping[str, Any], encoder: Encoder, context: Context) -> None:
    """`Encoder.validateEncoderConfig`, which the resolver calls since 3.0."""
    # The plugin reads `m` one level too high: this is HNSW's m, not the encoder's. Only a given m counts.
    if encoder.name == "pq" and context.version >= (3, 0, 0) and _leaves_rest(context.dimension, parameters.get("m")):
        raise validation_failed([PQ_M_MESSAGE])
    if encoder.name == "sq" and context.version >= (3, 6, 0):
        _check_sq(encoder, context)


def _leaves_rest(dimension: int, m: object) -> bool:
    return type(m) is int and m != 0 and dimension % m != 0


def _check_sq(encoder: Encoder, context: Context) -> None:
    """`FaissSQEncoder.validateEncoderConfig`."""
    bits = encoder.parameters.get("bits")
    if bits is None and context.data_type == "float":
        raise validation_failed([SQ_BITS_MESSAGE])
    if type(bits) is not int:
        return
    only_fp16 = {
        "type": "The type parameter is only applicable for fp16 quantization (bits=16).",
        "clip": "Clipping is only applicable for fp16 quantization (bits=16).",
    }
    for name, reason in only_fp16.items():
        if bits != 16 and name in encoder.parameters:
            raise validation_failed(
                [f"Parameter [{name}] is not supported when [bits={bits}] for encoder [sq]. {reason}"]
            )
    expected = "32x" if bits == 1 else "2x"
    if context.compression_level not in (None, expected):
        message = (
            f"Compression level [{context.compression_level}] is incompatible with [bits={bits}] for encoder [sq]. "
            f"Expected compression level: [{expected}]"
        )
        raise validation_failed([message])


# --- validation --------------------------------------------------------------------------------------------------


def method_errors(method: Method, space_type: str, context: Context) -> list[str]:
    """What `KNNMethodContext.validate` and `isTrainingRequired` say of a resolved method, numbered later.

    Raises RequestError for the two findings the plugin throws at once.
    """
    component = METHODS.get(method.name)
    if component is None:
        raise RequestError(f"Invalid method name: {method.name}")
    # SpaceType.validateVectorDataType: hamming is for bits, everything else is not.
    if (space_type == "hamming") != (context.data_type == "binary"):
        raise RequestError(f"Space type [{space_type}] is not supported with [{context.data_type}] data type")

    errors = _dimension_errors(context)
    if not _space_type_supported(space_type, context.version):
        errors.append(f'"{method.name}" with "faiss" configuration does not support space type: "{space_type}".')
    errors += component.data_type_errors(context)
    for name, value in method.parameters.items():
        parameter = component.known(context.version).get(name)
        errors += [f"Unknown parameter '{name}' found"] if parameter is None else parameter.errors(name, value, context)
    encoder_component = encoders(method.name).get(method.encoder.name)
    if encoder_component is None or not encoder_component.encoder_is_valid(method.encoder, context):
        errors.append("parameter validation failed for MethodComponentContext parameter [encoder].")
    if space_type == "cosinesimil" and context.data_type == "byte" and context.version >= (3, 5, 0):
        errors.append(
            "Faiss engine does not support cosine similarity with byte vectors. "
            "Cosine similarity requires vector normalization which is only supported for float vectors. "
            "Please use float data type or choose a different space type like l2 or inner_product."
        )
    if not component.trains and encoder_component is not None and not encoder_component.trains:
        errors.append("Method does not require training.")
    return errors


def _dimension_errors(context: Context) -> list[str]:
    if context.dimension > MAX_DIMENSION:
        return [f"Dimension value cannot be greater than {MAX_DIMENSION} for vector with engine: faiss"]
    if context.data_type == "binary" and context.dimension % 8 != 0:
        return ["Dimension should be multiply of 8 for binary vector data type"]
    if context.dimension <= 0:  # ours: no mapping has such a field, so the plugin fails when it compares the two
        return [f"Dimension value must be greater than 0, but is {context.dimension}"]
    return []


def _space_type_supported(space_type: str, version: Version) -> bool:
    if space_type == "cosinesimil":
        return version >= (2, 19, 0)
    return space_type in ("l2", "innerproduct", "hamming")


def early_m_errors(method: Method, context: Context) -> list[str]:
    """2.19 checks HNSW's `m` after the defaults are filled in, whatever the encoder (`AbstractKNNMethod`)."""
    if (2, 19, 0) <= context.version < (3, 0, 0) and _leaves_rest(context.dimension, method.parameters.get("m")):
        return [PQ_M_MESSAGE]
    return []
