import datetime

from deltaserve.v1 import route_pb2 as _route_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetServerInfoResponse(_message.Message):
    __slots__ = ("version", "base", "device", "adapter_formats", "memory", "load")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FORMATS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    version: str
    base: BaseModel
    device: str
    adapter_formats: _containers.RepeatedScalarFieldContainer[str]
    memory: MemoryPlan
    load: Load
    def __init__(self, version: _Optional[str] = ..., base: _Optional[_Union[BaseModel, _Mapping]] = ..., device: _Optional[str] = ..., adapter_formats: _Optional[_Iterable[str]] = ..., memory: _Optional[_Union[MemoryPlan, _Mapping]] = ..., load: _Optional[_Union[Load, _Mapping]] = ...) -> None: ...

class BaseModel(_message.Message):
    __slots__ = ("name", "architecture", "fingerprint", "held_fingerprint", "quantization", "dtype", "max_length", "vocab_size", "chat", "names")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    HELD_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    MAX_LENGTH_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    name: str
    architecture: str
    fingerprint: str
    held_fingerprint: str
    quantization: str
    dtype: str
    max_length: int
    vocab_size: int
    chat: bool
    names: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., architecture: _Optional[str] = ..., fingerprint: _Optional[str] = ..., held_fingerprint: _Optional[str] = ..., quantization: _Optional[str] = ..., dtype: _Optional[str] = ..., max_length: _Optional[int] = ..., vocab_size: _Optional[int] = ..., chat: _Optional[bool] = ..., names: _Optional[_Iterable[str]] = ...) -> None: ...

class MemoryPlan(_message.Message):
    __slots__ = ("weights_bytes", "kv_cache_bytes", "adapter_budget_bytes", "budget_bytes", "free_bytes", "step_bytes", "kv_token_bytes", "kv_floor_bytes", "kv_tokens", "adapters")
    WEIGHTS_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_CACHE_BYTES_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    STEP_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_TOKEN_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_FLOOR_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    weights_bytes: int
    kv_cache_bytes: int
    adapter_budget_bytes: int
    budget_bytes: int
    free_bytes: int
    step_bytes: int
    kv_token_bytes: int
    kv_floor_bytes: int
    kv_tokens: int
    adapters: _containers.RepeatedCompositeFieldContainer[AdapterFit]
    def __init__(self, weights_bytes: _Optional[int] = ..., kv_cache_bytes: _Optional[int] = ..., adapter_budget_bytes: _Optional[int] = ..., budget_bytes: _Optional[int] = ..., free_bytes: _Optional[int] = ..., step_bytes: _Optional[int] = ..., kv_token_bytes: _Optional[int] = ..., kv_floor_bytes: _Optional[int] = ..., kv_tokens: _Optional[int] = ..., adapters: _Optional[_Iterable[_Union[AdapterFit, _Mapping]]] = ...) -> None: ...

class AdapterFit(_message.Message):
    __slots__ = ("kind", "bytes", "count", "kv_tokens")
    KIND_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_FIELD_NUMBER: _ClassVar[int]
    kind: str
    bytes: int
    count: int
    kv_tokens: int
    def __init__(self, kind: _Optional[str] = ..., bytes: _Optional[int] = ..., count: _Optional[int] = ..., kv_tokens: _Optional[int] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("running_requests", "waiting_requests", "kv_blocks_total", "kv_blocks_used", "kv_block_size", "adapter_bytes", "kv_bytes", "kv_blocks_idle")
    RUNNING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    WAITING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_USED_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_IDLE_FIELD_NUMBER: _ClassVar[int]
    running_requests: int
    waiting_requests: int
    kv_blocks_total: int
    kv_blocks_used: int
    kv_block_size: int
    adapter_bytes: int
    kv_bytes: int
    kv_blocks_idle: int
    def __init__(self, running_requests: _Optional[int] = ..., waiting_requests: _Optional[int] = ..., kv_blocks_total: _Optional[int] = ..., kv_blocks_used: _Optional[int] = ..., kv_block_size: _Optional[int] = ..., adapter_bytes: _Optional[int] = ..., kv_bytes: _Optional[int] = ..., kv_blocks_idle: _Optional[int] = ...) -> None: ...

class GetStatsRequest(_message.Message):
    __slots__ = ("history_seconds",)
    HISTORY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    history_seconds: int
    def __init__(self, history_seconds: _Optional[int] = ...) -> None: ...

class GetStatsResponse(_message.Message):
    __slots__ = ("time", "window_seconds", "prompt_tokens", "completion_tokens", "requests", "shed_requests", "first_token_seconds", "inter_token_seconds", "models", "load", "memory", "history")
    TIME_FIELD_NUMBER: _ClassVar[int]
    WINDOW_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    SHED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    INTER_TOKEN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    time: _timestamp_pb2.Timestamp
    window_seconds: float
    prompt_tokens: int
    completion_tokens: int
    requests: int
    shed_requests: int
    first_token_seconds: _route_pb2.Quantiles
    inter_token_seconds: _route_pb2.Quantiles
    models: _containers.RepeatedCompositeFieldContainer[ModelTraffic]
    load: Load
    memory: MemoryUse
    history: _containers.RepeatedCompositeFieldContainer[StatsPoint]
    def __init__(self, time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., window_seconds: _Optional[float] = ..., prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., requests: _Optional[int] = ..., shed_requests: _Optional[int] = ..., first_token_seconds: _Optional[_Union[_route_pb2.Quantiles, _Mapping]] = ..., inter_token_seconds: _Optional[_Union[_route_pb2.Quantiles, _Mapping]] = ..., models: _Optional[_Iterable[_Union[ModelTraffic, _Mapping]]] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., memory: _Optional[_Union[MemoryUse, _Mapping]] = ..., history: _Optional[_Iterable[_Union[StatsPoint, _Mapping]]] = ...) -> None: ...

class ModelTraffic(_message.Message):
    __slots__ = ("model", "requests", "prompt_tokens", "completion_tokens")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    model: str
    requests: int
    prompt_tokens: int
    completion_tokens: int
    def __init__(self, model: _Optional[str] = ..., requests: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ...) -> None: ...

class MemoryUse(_message.Message):
    __slots__ = ("kv_used_bytes", "kv_idle_bytes", "kv_empty_bytes", "adapter_bytes", "free_bytes")
    KV_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_IDLE_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_EMPTY_BYTES_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_BYTES_FIELD_NUMBER: _ClassVar[int]
    FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    kv_used_bytes: int
    kv_idle_bytes: int
    kv_empty_bytes: int
    adapter_bytes: int
    free_bytes: int
    def __init__(self, kv_used_bytes: _Optional[int] = ..., kv_idle_bytes: _Optional[int] = ..., kv_empty_bytes: _Optional[int] = ..., adapter_bytes: _Optional[int] = ..., free_bytes: _Optional[int] = ...) -> None: ...

class StatsPoint(_message.Message):
    __slots__ = ("time", "prompt_tokens", "completion_tokens", "requests", "first_token_seconds", "inter_token_seconds")
    TIME_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    INTER_TOKEN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    time: _timestamp_pb2.Timestamp
    prompt_tokens: int
    completion_tokens: int
    requests: int
    first_token_seconds: _route_pb2.Quantiles
    inter_token_seconds: _route_pb2.Quantiles
    def __init__(self, time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., requests: _Optional[int] = ..., first_token_seconds: _Optional[_Union[_route_pb2.Quantiles, _Mapping]] = ..., inter_token_seconds: _Optional[_Union[_route_pb2.Quantiles, _Mapping]] = ...) -> None: ...
