# SPDX-License-Identifier: Apache-2.0
"""`TrainingRequest`: the body of the k-NN plugin's Train Model API, parsed, checked and resolved.

The rules and the messages are the plugin's (`RestTrainModelHandler`, `TrainingModelRequest`,
`TrainingJobRouterTransportAction`); what it makes of `method` is in `transforms.method`. Where the plugin answers 500
(a null or a list where it expects a value) the request is refused with a message of ours. Nothing here does I/O, so
checks that need a mapping or a cluster state are not made here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from transforms import method as methods
from transforms.errors import RequestError
from transforms.method import INT_MAX, UNDEFINED, Context, Encoder, Method, UserMethod, Version, validation_failed

__all__ = ["NEWEST_TARGET", "VERSION_RULES", "Encoder", "Method", "TrainingRequest"]

NEWEST_TARGET = "3.6.0"
OLDEST_TARGET: Version = (2, 17, 0)
MAX_SEARCH_SIZE = 10_000
MAX_DESCRIPTION_LENGTH = 1000
MAX_MODEL_ID_BYTES = 512
# OpenSearch reads a JSON string of at most 50 000 000 characters; base64 makes 4 of 3 bytes.
MAX_BLOB_BYTES = 37_500_000
MAX_PRECOMPUTED_TABLE_BYTES = 2**31
MAX_CODE_SIZE = 24
POINTS_PER_CENTROID = 256

# The rules that depend on the target version: (first version with the rule, the rule).
VERSION_RULES: tuple[tuple[str, str], ...] = (
    ("2.18.0", "space_type is accepted at the top level (before: only spaceType)"),
    ("2.18.0", "a method without an engine means faiss (before: nmslib, which cannot train)"),
    ("2.18.0", "compression_level is derived from PQ's m and code_size when both are given"),
    ("2.19.0", "mode and compression_level may stand beside method"),
    ("2.19.0", "space_type cosinesimil is supported"),
    ("2.19.0", "training needs max(nlist, 2^code_size) documents for IVF with a given code_size, otherwise 1000"),
    ("2.19.0", "dimension must be divisible by hnsw's m, its default 16 included"),
    ("3.0.0", "training needs 2^code_size documents with PQ (1000 when code_size is not given), otherwise no minimum"),
    ("3.0.0", "dimension must be divisible by hnsw's m only when m is given"),
    ("3.1.0", "compression_level 1x is accepted with mode on_disk"),
    ("3.2.0", "the binary encoder has random_rotation and enable_adc (enable_adc with 1 bit only)"),
    ("3.3.0", "engine is accepted at the top level"),
    ("3.3.0", "compression_level 4x is refused as lucene's alone, unless method names an engine"),
    ("3.5.0", "space_type cosinesimil is refused for byte vectors"),
    ("3.6.0", "the sq encoder has bits, which must be given for float vectors"),
    ("3.6.0", "mode on_disk and compression_level 32x stand for sq with 1 bit (before: the binary encoder with 1 bit)"),
)


@dataclass(frozen=True)
class TrainingRequest:
    """A training request with everything resolved as the cluster at `target_version` would resolve it."""

    model_id: str | None
    preference: str | None
    training_index: str | None
    training_field: str
    dimension: int
    max_training_vector_count: int
    search_size: int
    description: str
    method: Method
    space_type: str
    data_type: str
    mode: str | None
    compression_level: str | None
    target_version: str
    engine: str = "faiss"

    @classmethod
    def parse(
        cls,
        body: str | bytes,
        *,
        model_id: str | None = None,
        preference: str | None = None,
        node_id: str | None = None,
        target_version: str = NEWEST_TARGET,
        require_index: bool = True,
        require_field: bool = True,
    ) -> TrainingRequest:
        """The request in a JSON text. Raises RequestError with the plugin's message.

        `node_id` is the documentation's name for `preference`. `require_index` and `require_field` are False for
        sources that have no index or name their column otherwise.
        """
        query = _Query(model_id, preference, node_id, target_version, require_index, require_field)
        return _resolve(_read_fields(_read_json(body), query.version), query)

    @classmethod
    def from_fields(
        cls,
        fields: Mapping[str, object],
        *,
        model_id: str | None = None,
        preference: str | None = None,
        node_id: str | None = None,
        target_version: str = NEWEST_TARGET,
        require_index: bool = True,
        require_field: bool = True,
    ) -> TrainingRequest:
        """The request in a mapping of body fields, under the same rules as `parse`. Raises RequestError."""
        query = _Query(model_id, preference, node_id, target_version, require_index, require_field)
        return _resolve(_read_fields(fields.items(), query.version), query)

    # --- parameters of the method and its encoder; None where they do not apply ---

    def _method_parameter(self, method_name: str, name: str) -> int | None:
        return self.method.parameters[name] if self.method.name == method_name else None

    def _pq_parameter(self, name: str) -> int | None:
        if self.method.encoder.name != "pq":
            return None
        default: int = methods.IVF_PQ.parameters[name].default
        return self.method.encoder.parameters.get(name, default)

    @property
    def nlist(self) -> int | None:
        """Number of IVF centroids."""
        return self._method_parameter("ivf", "nlist")

    @property
    def nprobes(self) -> int | None:
        """Number of IVF lists a query visits by default."""
        return self._method_parameter("ivf", "nprobes")

    @property
    def hnsw_m(self) -> int | None:
        """HNSW's number of neighbours."""
        return self._method_parameter("hnsw", "m")

    @property
    def ef_construction(self) -> int | None:
        """HNSW's candidate list while building."""
        return self._method_parameter("hnsw", "ef_construction")

    @property
    def ef_search(self) -> int | None:
        """HNSW's candidate list while searching."""
        return self._method_parameter("hnsw", "ef_search")

    @property
    def pq_m(self) -> int | None:
        """Number of PQ sub-vectors."""
        return self._pq_parameter("m")

    @property
    def code_size(self) -> int | None:
        """Bits of one PQ code."""
        return self._pq_parameter("code_size")

    @property
    def quantization_bits(self) -> int | None:
        """Bits per dimension of the `binary` encoder."""
        if self.method.encoder.name != "binary":
            return None
        return self.method.encoder.parameters.get("bits", methods.BINARY.parameters["bits"].default)

    # --- what faiss is asked for ---

    @property
    def index_description(self) -> str:
        """The faiss factory string (`MethodAsMapBuilder`, `AbstractFaissMethod.adjustIndexDescription`)."""
        head = f"IVF{self.nlist}" if self.method.name == "ivf" else f"HNSW{self.hnsw_m}"
        return f"{'B' if self.is_binary else ''}{head},{self._encoder_description()}"

    def _encoder_description(self) -> str:
        encoder = self.method.encoder
        if self.data_type == "byte":
            return "SQ8_direct_signed"
        if encoder.name == "pq":
            # HNSW's PQ takes no code size since 2.10: faiss has it fixed at 8 bits.
            return f"PQ{self.pq_m}" if self.method.name == "hnsw" else f"PQ{self.pq_m}x{self.code_size}"
        if encoder.name == "sq" and encoder.parameters.get("bits") != 1:
            return "SQfp16"
        return "Flat"  # sq with one bit too: the plugin quantises outside faiss, and for IVF not at all

    @property
    def is_binary(self) -> bool:
        """True when faiss trains a binary index: binary vectors, or the `binary` encoder's bits."""
        return self.data_type == "binary" or self.method.encoder.name == "binary"

    @property
    def trained_dimension(self) -> int:
        """Dimension of the faiss index in the blob; bits for a binary index.

        With the `binary` encoder a segment's vectors have bits * dimension bits, padded to whole bytes
        (`OneBitScalarQuantizationState.getDimensions`, `MultiBitScalarQuantizationState.getDimensions`), and they are
        added with the blob's own dimension as stride, so that is what a usable blob has. The cluster's `_train` passes
        the plain dimension instead (`TrainingJob.run`), which is the same for one bit only.
        """
        bits = self.quantization_bits
        return self.dimension if bits is None else math.ceil(bits * self.dimension / 8) * 8

    @property
    def inner_product(self) -> bool:
        """True for METRIC_INNER_PRODUCT, False for METRIC_L2. A binary index has no metric of its own."""
        return not self.is_binary and self.space_type in ("innerproduct", "cosinesimil")

    @property
    def normalize(self) -> bool:
        """True when vectors are scaled to unit length before they are used (`NormalizeVectorTransformer`)."""
        return self.space_type == "cosinesimil"

    # --- how much of what ---

    def _centroids(self) -> int:
        """The largest number of clusters one of faiss's k-means runs looks for."""
        code_size = self.code_size
        return max(self.nlist or 0, 0 if code_size is None else 2**code_size)

    @property
    def usable_vectors(self) -> int:
        """Number of vectors beyond which faiss would draw its own sample: 256 for each centroid."""
        return POINTS_PER_CENTROID * self._centroids()

    @property
    def minimum_vectors(self) -> int:
        """Fewest vectors faiss can train on: as many as its largest k-means has centroids."""
        return self._centroids()

    @property
    def blob_bytes(self) -> int:
        """Size of the serialised model in bytes, as `faiss::write_index` of the trained, empty index gives it."""
        if self.method.name == "hnsw":
            return _hnsw_pq_bytes(self.hnsw_m or 0, self.dimension)
        nlist = self.nlist or 0
        if self.is_binary:
            return _BINARY_IVF_BYTES + nlist * self.trained_dimension // 8
        coarse = _IVF_BYTES + 4 * nlist * self.dimension
        description = self._encoder_description()
        if description == "Flat":
            return coarse
        if description.startswith("PQ"):
            return coarse + _PQ_EXTRA_BYTES + 4 * self.dimension * 2 ** (self.code_size or 0)
        return coarse + _SQ_EXTRA_BYTES

    # --- documents ---

    @property
    def model_definition(self) -> dict[str, Any]:
        """`model_definition` of the model document."""
        return self.method.definition

    def body(self) -> dict[str, Any]:
        """The Train API body that resolves to this request; the index and field are as given."""
        body: dict[str, Any] = {"training_index": self.training_index, "training_field": self.training_field or None}
        body = {name: value for name, value in body.items() if value is not None}
        body["dimension"] = self.dimension
        if self.max_training_vector_count != INT_MAX:
            body["max_training_vector_count"] = self.max_training_vector_count
        if self.search_size != MAX_SEARCH_SIZE:
            body["search_size"] = self.search_size
        if self.description:
            body["description"] = self.description
        body["data_type"] = self.data_type
        if self.mode is not None:
            body["mode"] = self.mode
        if self.mode is not None and parse_version(self.target_version) < (2, 19, 0):
            # Mode and method exclude each other there, so the method is what mode and level resolve to.
            return {**body, "compression_level": self.compression_level, "spaceType": self.space_type}
        # No compression_level: the encoder says it, and not every level it can say is accepted.
        definition = self.method.definition
        if self.hnsw_m == methods.HNSW_M_DEFAULT:
            del definition["parameters"]["m"]  # a given m has to divide the dimension, the same default has not
        return {**body, "method": {"engine": self.engine, "space_type": self.space_type, **definition}}

    # --- checks that need to know more than the request ---

    def check_count(self, count: int, *, documents: int | None = None) -> None:
        """Refuses a source with too few vectors. Raises RequestError.

        `count` is the number of vectors that can be read. `documents` is the number of documents in the training
        index, with or without a vector: where it is given the cluster's own minimum applies
        (`AbstractFaissPQEncoder.validateEncoderConfig`, in 2.19 `AbstractKNNMethod`).
        """
        minimum = self._minimum_documents()
        if documents is not None and min(documents, self.max_training_vector_count) < minimum:
            raise validation_failed([f"Number of training points should be greater than {minimum}"])
        usable = min(count, self.max_training_vector_count)
        if usable >= self.minimum_vectors:
            return
        limit = f" (max_training_vector_count is {self.max_training_vector_count})" if usable < count else ""
        if (self.nlist or 0) > usable:
            raise RequestError(
                f"nlist is {self.nlist}, but there are only {usable} training vectors{limit}: "
                f"nlist must be at most {usable}, or at least {self.minimum_vectors} vectors are needed"
            )
        raise RequestError(
            f"code_size is {self.code_size}, which needs 2^{self.code_size} = {self.minimum_vectors} training vectors, "
            f"but there are only {usable}{limit}"
        )

    def _minimum_documents(self) -> int:
        version = parse_version(self.target_version)
        given_code_size = self.method.encoder.parameters.get("code_size")
        if version < (2, 19, 0):
            return 0
        if version < (3, 0, 0):
            if self.nlist is None or given_code_size is None:
                return 1000
            return max(self.nlist, 2**given_code_size)
        if self.method.encoder.name != "pq":
            return 0
        return 1000 if given_code_size is None else 2**given_code_size

    def check_limits(self, allow_large_model: bool = False) -> list[str]:
        """Refuses what the API accepts and no cluster can use; returns warnings. Raises RequestError."""
        warnings = []
        code_size = self.code_size
        if code_size is not None and code_size > MAX_CODE_SIZE:
            raise RequestError(f"code_size is {code_size}, but faiss can train code sizes from 1 to {MAX_CODE_SIZE} only")
        table = self._precomputed_table_bytes()
        if table > MAX_PRECOMPUTED_TABLE_BYTES:
            raise RequestError(
                f"nlist {self.nlist} * m {self.pq_m} * 2^code_size {code_size} * 4 bytes make a search table of "
                f"{table} bytes, but at most {MAX_PRECOMPUTED_TABLE_BYTES} are allowed: with more, searching crashes the "
                "node (https://github.com/opensearch-project/k-NN/issues/3078). Lower nlist, m or code_size"
            )
        if self.blob_bytes > MAX_BLOB_BYTES:
            message = (
                f"the model has {self.blob_bytes} bytes (nlist {self.nlist}, dimension {self.dimension}), but a cluster "
                f"reads at most {MAX_BLOB_BYTES} unless opensearch.xcontent.string.length.max is raised on every node"
            )
            if not allow_large_model:
                raise RequestError(message)
            warnings.append(message)
        if self.method.name == "ivf" and self.method.encoder.name == "sq" and self._encoder_description() == "Flat":
            warnings.append(
                f"sq with 1 bit does not compress ivf vectors: the cluster builds {self.index_description} "
                f"although it reports compression_level {self.compression_level}"
            )
        return warnings

    def _precomputed_table_bytes(self) -> int:
        """Size of faiss's IVF-PQ table for L2 (`IndexIVFPQ::precompute_table`); 0 where there is none."""
        if self.nlist is None or self.pq_m is None or self.code_size is None or self.inner_product:
            return 0
        return self.nlist * self.pq_m * 2**self.code_size * 4


def parse_version(text: str) -> Version:
    """`3.6`, `3.6.0` or `3.6.0-SNAPSHOT` as (3, 6, 0). Raises RequestError."""
    match = re.fullmatch(r"(\d+)\.(\d+)(?:\.(\d+))?(?:-[A-Za-z0-9.]+)?", text.strip())
    if match is None:
        raise RequestError(f'target version "{text}" is not a version; give it as {NEWEST_TARGET}')
    version = (int(match[1]), int(match[2]), int(match[3] or 0))
    if version < OLDEST_TARGET:
        oldest = ".".join(map(str, OLDEST_TARGET))
        raise RequestError(f"target version {text} is too old: {oldest} is the oldest supported")
    return version


# --- parsing -----------------------------------------------------------------------------------------------------


class _Query:
    """What does not stand in the body: the model id and the query parameters, checked."""

    def __init__(
        self,
        model_id: str | None,
        preference: str | None,
        node_id: str | None,
        target_version: str,
        require_index: bool,
        require_field: bool,
    ):
        if preference and node_id and preference != node_id:
            raise RequestError(f'preference "{preference}" and node_id "{node_id}" mean the same but differ')
        self.model_id = model_id if model_id and model_id.strip() else None
        self.preference = preference or node_id or None
        self.version = parse_version(target_version)
        self.require_index = require_index
        self.require_field = require_field


@dataclass
class _Fields:
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


def _read_json(body: str | bytes) -> Iterable[tuple[str, Any]]:
    """The members of the JSON object in `body`, duplicates included. Raises RequestError."""
    if not body.strip():
        raise RequestError("request body is required")
    try:
        text = body.decode("utf-8-sig") if isinstance(body, bytes) else body
        value = json.loads(text, object_pairs_hook=_JsonObject, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"request body is not valid JSON: {error}") from error
    if not isinstance(value, _JsonObject):
        token = "START_ARRAY" if isinstance(value, list) else "VALUE"
        raise RequestError(f"Failed to parse object: expecting token of type [START_OBJECT] but found [{token}]")
    return value.members


class _JsonObject(dict[str, Any]):
    """A JSON object that remembers all its members, because a duplicate is an error only the reader can word."""

    def __init__(self, members: list[tuple[str, Any]]):
        super().__init__(members)
        self.members = members


def _no_constant(text: str) -> None:
    raise RequestError(f"request body is not valid JSON: {text} is not a JSON number")


def _read_fields(members: Iterable[tuple[str, Any]], version: Version) -> _Fields:
    """`RestTrainModelHandler.createTransportRequest`, its loop over the tokens. Raises RequestError."""
    fields = _Fields()
    for name, value in members:
        if name in ("training_index", "training_field", "description"):
            _ensure_not_set(fields, name)
            setattr(fields, name, None if value is None else _text(name, value))
        elif name in ("mode", "compression_level"):
            _ensure_not_set(fields, name)
            setattr(fields, name, _text(name, value))
        elif name in ("dimension", "max_training_vector_count", "search_size"):
            _ensure_not_set(fields, name)
            number = _integer(name, value)
            setattr(fields, name, None if number == -1 else number)  # -1 is the plugin's word for not set
        elif name == "method":
            _ensure_not_set(fields, name)
            _refuse_nested_duplicates(value)
            fields.method = methods.parse_method(value)
        elif name == "data_type":
            _ensure_not_set(fields, name)
            fields.data_type = _data_type(_text(name, value))
        elif name == "spaceType" or (name == "space_type" and version >= (2, 18, 0)):
            if fields.space_type != UNDEFINED:
                raise RequestError("Unable to parse SpaceType as it is duplicated.")
            fields.space_type = _space_type(_text(name, value))
        elif name == "engine" and version >= (3, 3, 0):
            if fields.engine != UNDEFINED:
                raise RequestError("Unable to parse KNNEngine as it is duplicated.")
            fields.engine = _engine(_text(name, value))
        else:
            raise RequestError(f'Unable to parse token. "{name}" is not a valid parameter.')
        if name == "description":
            _check_description(fields.description)
    return fields


def _ensure_not_set(fields: _Fields, name: str) -> None:
    if getattr(fields, name) is not None:
        raise RequestError(f'Unable to parse token. "{name}" is duplicated.')


def _refuse_nested_duplicates(value: object) -> None:
    """The cluster's JSON parser refuses a duplicated key anywhere; `method` is a map too late to see it."""
    if isinstance(value, _JsonObject):
        names = [name for name, _ in value.members]
        duplicates = [name for name in names if names.count(name) > 1]
        if duplicates:
            raise RequestError(f"Duplicate field '{duplicates[0]}'")
        for _, item in value.members:
            _refuse_nested_duplicates(item)


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
    if isinstance(value, str):
        if not re.fullmatch(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?[dDfF]?\s*", value):
            raise RequestError(f'For input string: "{value}"' if value.strip() else "empty String")
        number = float(value.strip().rstrip("dDfF"))
    elif isinstance(value, int | float) and not isinstance(value, bool):
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


def _check_description(description: str | None) -> None:
    if description is None:  # the plugin answers 500 (NullPointerException) here
        raise RequestError('"description" must not be null')
    if "," in description:
        raise RequestError("Model description cannot contain any commas: ','")


# --- from fields to a request ------------------------------------------------------------------------------------


def _resolve(fields: _Fields, query: _Query) -> TrainingRequest:
    """The rest of `createTransportRequest`, then `TrainingModelRequest`'s constructor and `validate`."""
    version = query.version
    if fields.method is None and fields.mode is None and fields.compression_level is None:
        raise RequestError('At least "[method]", "[mode]" or "[compression_level]" needs to be set')
    if version < (2, 19, 0) and fields.method is not None:
        for name in ("mode", "compression_level"):
            if getattr(fields, name) is not None:
                raise RequestError(f'"[method]" and "[{name}]" cannot both be set')
    _ensure_set("dimension", fields.dimension)
    if query.require_index:
        _ensure_set("training_index", fields.training_index)
    if query.require_field:
        _ensure_set("training_field", fields.training_field)
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
    count, search_size = fields.max_training_vector_count, fields.search_size
    if count is not None and count <= 0:
        raise RequestError(f"Maximum vector count {count} is invalid. Maximum vector count must be greater than 0")
    if search_size is not None and not 0 < search_size <= MAX_SEARCH_SIZE:
        raise RequestError(f"Search size {search_size} is invalid. Search size must be between 0 and 10,000")
    _validate(method, space_type, fields.description or "", query.model_id, context)
    return TrainingRequest(
        model_id=query.model_id,
        preference=query.preference,
        training_index=fields.training_index,
        training_field=fields.training_field or "",
        dimension=context.dimension,
        max_training_vector_count=count or INT_MAX,
        search_size=search_size or MAX_SEARCH_SIZE,
        description=fields.description or "",
        method=method,
        space_type=space_type,
        data_type=data_type,
        mode=context.mode,
        compression_level=compression_level,
        target_version=".".join(map(str, version)),
    )


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


def _resolve_space_type(fields: _Fields, data_type: str) -> str:
    """`SpaceTypeResolver.resolveSpaceType`."""
    inner = UNDEFINED if fields.method is None else fields.method.space_type
    given = [space_type for space_type in (inner, fields.space_type) if space_type != UNDEFINED]
    if len(set(given)) > 1:
        raise RequestError(f'Cannot specify conflicting space types: "[{inner}]" "[{fields.space_type}]"')
    return given[0] if given else "hamming" if data_type == "binary" else "l2"


def _check_engine(fields: _Fields, context: Context) -> None:
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


def _validate(method: Method, space_type: str, description: str, model_id: str | None, context: Context) -> None:
    """`TrainingModelRequest.validate`, as far as it needs no cluster state. Raises RequestError."""
    errors = methods.method_errors(method, space_type, context)
    if _java_length(description) > MAX_DESCRIPTION_LENGTH:
        errors.append(f"Description exceeds limit of {MAX_DESCRIPTION_LENGTH} characters")
    errors += methods.early_m_errors(method, context)
    if context.data_type != "float" and method.encoder.name != "flat":
        errors.append(f"encoder is not supported for vector data type [{context.data_type}]")
    if errors:
        raise validation_failed(errors)
    if method.encoder.parameters.get("enable_adc") and method.encoder.parameters.get("bits", 1) != 1:
        bits = method.encoder.parameters["bits"]
        raise RequestError(f"Validation Failed: ADC is not supported for bit count: {bits}")
    id_bytes = len((model_id or "").encode())
    if id_bytes > MAX_MODEL_ID_BYTES:
        raise validation_failed(
            [f"id [{model_id}] is too long, must be no longer than {MAX_MODEL_ID_BYTES} bytes but was: {id_bytes}"]
        )


def _java_length(text: str) -> int:
    """Length in UTF-16 units."""
    return len(text.encode("utf-16-le", "surrogatepass")) // 2


# --- sizes of serialised indexes (faiss/impl/index_write.cpp) ----------------------------------------------------

# Bytes beside the centroids and codewords, measured on trained indexes; tests hold them to faiss's own output.
_IVF_BYTES = 139  # heads of index and flat quantizer, direct map, empty inverted lists
_PQ_EXTRA_BYTES = 41  # by_residual, code size, head of the product quantizer
_SQ_EXTRA_BYTES = 45  # scalar quantizer, code size, by_residual
_BINARY_IVF_BYTES = 115
_HNSW_PQ_BYTES = 195  # heads of graph, index and its IndexPQ storage
_HNSW_LEVEL_BYTES = 12  # a double in assign_probas and an int in cum_nneighbor_per_level


def _hnsw_pq_bytes(m: int, dimension: int) -> int:
    """An empty graph over 2^8 codewords; its level table depends on m (`faiss::HNSW::set_default_probas`)."""
    levels = 0
    while m > 1 and m**-levels * (1 - 1 / m) >= 1e-9:
        levels += 1
    return _HNSW_PQ_BYTES + _HNSW_LEVEL_BYTES * levels + 4 * dimension * 2**8
