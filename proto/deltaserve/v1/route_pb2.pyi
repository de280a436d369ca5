import datetime

from deltaserve.v1 import generation_pb2 as _generation_pb2
from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RampShape(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RAMP_SHAPE_UNSPECIFIED: _ClassVar[RampShape]
    RAMP_SHAPE_STEP: _ClassVar[RampShape]
    RAMP_SHAPE_LINEAR: _ClassVar[RampShape]

class GuardrailMetric(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    GUARDRAIL_METRIC_UNSPECIFIED: _ClassVar[GuardrailMetric]
    GUARDRAIL_METRIC_ERROR: _ClassVar[GuardrailMetric]
    GUARDRAIL_METRIC_SLOW: _ClassVar[GuardrailMetric]
    GUARDRAIL_METRIC_SLOW_FIRST_TOKEN: _ClassVar[GuardrailMetric]
    GUARDRAIL_METRIC_REFUSAL: _ClassVar[GuardrailMetric]
    GUARDRAIL_METRIC_EMPTY: _ClassVar[GuardrailMetric]
    GUARDRAIL_METRIC_LONG: _ClassVar[GuardrailMetric]
    GUARDRAIL_METRIC_NEGATIVE_FEEDBACK: _ClassVar[GuardrailMetric]
    GUARDRAIL_METRIC_REWARD: _ClassVar[GuardrailMetric]

class RouteState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROUTE_STATE_UNSPECIFIED: _ClassVar[RouteState]
    ROUTE_STATE_ACTIVE: _ClassVar[RouteState]
    ROUTE_STATE_HELD: _ClassVar[RouteState]
    ROUTE_STATE_ROLLED_BACK: _ClassVar[RouteState]
    ROUTE_STATE_FAILED: _ClassVar[RouteState]
RAMP_SHAPE_UNSPECIFIED: RampShape
RAMP_SHAPE_STEP: RampShape
RAMP_SHAPE_LINEAR: RampShape
GUARDRAIL_METRIC_UNSPECIFIED: GuardrailMetric
GUARDRAIL_METRIC_ERROR: GuardrailMetric
GUARDRAIL_METRIC_SLOW: GuardrailMetric
GUARDRAIL_METRIC_SLOW_FIRST_TOKEN: GuardrailMetric
GUARDRAIL_METRIC_REFUSAL: GuardrailMetric
GUARDRAIL_METRIC_EMPTY: GuardrailMetric
GUARDRAIL_METRIC_LONG: GuardrailMetric
GUARDRAIL_METRIC_NEGATIVE_FEEDBACK: GuardrailMetric
GUARDRAIL_METRIC_REWARD: GuardrailMetric
ROUTE_STATE_UNSPECIFIED: RouteState
ROUTE_STATE_ACTIVE: RouteState
ROUTE_STATE_HELD: RouteState
ROUTE_STATE_ROLLED_BACK: RouteState
ROUTE_STATE_FAILED: RouteState

class Route(_message.Message):
    __slots__ = ("name", "arms", "control", "salt", "coverage", "layer", "ramp", "guardrails", "bandit", "etag", "state", "reason", "weights", "start_time", "update_time")
    class WeightsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    ARMS_FIELD_NUMBER: _ClassVar[int]
    CONTROL_FIELD_NUMBER: _ClassVar[int]
    SALT_FIELD_NUMBER: _ClassVar[int]
    COVERAGE_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    RAMP_FIELD_NUMBER: _ClassVar[int]
    GUARDRAILS_FIELD_NUMBER: _ClassVar[int]
    BANDIT_FIELD_NUMBER: _ClassVar[int]
    ETAG_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    START_TIME_FIELD_NUMBER: _ClassVar[int]
    UPDATE_TIME_FIELD_NUMBER: _ClassVar[int]
    name: str
    arms: _containers.RepeatedCompositeFieldContainer[Arm]
    control: str
    salt: str
    coverage: float
    layer: LayerSlice
    ramp: Ramp
    guardrails: _containers.RepeatedCompositeFieldContainer[Guardrail]
    bandit: Bandit
    etag: str
    state: RouteState
    reason: str
    weights: _containers.ScalarMap[str, float]
    start_time: _timestamp_pb2.Timestamp
    update_time: _timestamp_pb2.Timestamp
    def __init__(self, name: _Optional[str] = ..., arms: _Optional[_Iterable[_Union[Arm, _Mapping]]] = ..., control: _Optional[str] = ..., salt: _Optional[str] = ..., coverage: _Optional[float] = ..., layer: _Optional[_Union[LayerSlice, _Mapping]] = ..., ramp: _Optional[_Union[Ramp, _Mapping]] = ..., guardrails: _Optional[_Iterable[_Union[Guardrail, _Mapping]]] = ..., bandit: _Optional[_Union[Bandit, _Mapping]] = ..., etag: _Optional[str] = ..., state: _Optional[_Union[RouteState, str]] = ..., reason: _Optional[str] = ..., weights: _Optional[_Mapping[str, float]] = ..., start_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., update_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class Arm(_message.Message):
    __slots__ = ("name", "model", "adapters", "weight", "sampling", "stop", "shadow", "digests")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    SHADOW_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    name: str
    model: str
    adapters: _containers.RepeatedCompositeFieldContainer[_generation_pb2.WeightedAdapter]
    weight: float
    sampling: _generation_pb2.SamplingParams
    stop: _generation_pb2.StopParams
    shadow: float
    digests: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., model: _Optional[str] = ..., adapters: _Optional[_Iterable[_Union[_generation_pb2.WeightedAdapter, _Mapping]]] = ..., weight: _Optional[float] = ..., sampling: _Optional[_Union[_generation_pb2.SamplingParams, _Mapping]] = ..., stop: _Optional[_Union[_generation_pb2.StopParams, _Mapping]] = ..., shadow: _Optional[float] = ..., digests: _Optional[_Iterable[str]] = ...) -> None: ...

class LayerSlice(_message.Message):
    __slots__ = ("name", "start", "end")
    NAME_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    name: str
    start: float
    end: float
    def __init__(self, name: _Optional[str] = ..., start: _Optional[float] = ..., end: _Optional[float] = ...) -> None: ...

class Ramp(_message.Message):
    __slots__ = ("points", "shape", "gated")
    POINTS_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    GATED_FIELD_NUMBER: _ClassVar[int]
    points: _containers.RepeatedCompositeFieldContainer[RampPoint]
    shape: RampShape
    gated: bool
    def __init__(self, points: _Optional[_Iterable[_Union[RampPoint, _Mapping]]] = ..., shape: _Optional[_Union[RampShape, str]] = ..., gated: _Optional[bool] = ...) -> None: ...

class RampPoint(_message.Message):
    __slots__ = ("after", "weights")
    class WeightsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    AFTER_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    after: _duration_pb2.Duration
    weights: _containers.ScalarMap[str, float]
    def __init__(self, after: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., weights: _Optional[_Mapping[str, float]] = ...) -> None: ...

class Guardrail(_message.Message):
    __slots__ = ("metric", "tolerated", "versus_control", "seconds", "tokens", "refusals")
    METRIC_FIELD_NUMBER: _ClassVar[int]
    TOLERATED_FIELD_NUMBER: _ClassVar[int]
    VERSUS_CONTROL_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    REFUSALS_FIELD_NUMBER: _ClassVar[int]
    metric: GuardrailMetric
    tolerated: float
    versus_control: bool
    seconds: float
    tokens: int
    refusals: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, metric: _Optional[_Union[GuardrailMetric, str]] = ..., tolerated: _Optional[float] = ..., versus_control: _Optional[bool] = ..., seconds: _Optional[float] = ..., tokens: _Optional[int] = ..., refusals: _Optional[_Iterable[str]] = ...) -> None: ...

class Bandit(_message.Message):
    __slots__ = ("floor", "interval", "least_users")
    FLOOR_FIELD_NUMBER: _ClassVar[int]
    INTERVAL_FIELD_NUMBER: _ClassVar[int]
    LEAST_USERS_FIELD_NUMBER: _ClassVar[int]
    floor: float
    interval: _duration_pb2.Duration
    least_users: int
    def __init__(self, floor: _Optional[float] = ..., interval: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., least_users: _Optional[int] = ...) -> None: ...

class PutRouteRequest(_message.Message):
    __slots__ = ("route",)
    ROUTE_FIELD_NUMBER: _ClassVar[int]
    route: Route
    def __init__(self, route: _Optional[_Union[Route, _Mapping]] = ...) -> None: ...

class PutRouteResponse(_message.Message):
    __slots__ = ("route",)
    ROUTE_FIELD_NUMBER: _ClassVar[int]
    route: Route
    def __init__(self, route: _Optional[_Union[Route, _Mapping]] = ...) -> None: ...

class GetRouteRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class GetRouteResponse(_message.Message):
    __slots__ = ("route",)
    ROUTE_FIELD_NUMBER: _ClassVar[int]
    route: Route
    def __init__(self, route: _Optional[_Union[Route, _Mapping]] = ...) -> None: ...

class ListRoutesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListRoutesResponse(_message.Message):
    __slots__ = ("routes",)
    ROUTES_FIELD_NUMBER: _ClassVar[int]
    routes: _containers.RepeatedCompositeFieldContainer[Route]
    def __init__(self, routes: _Optional[_Iterable[_Union[Route, _Mapping]]] = ...) -> None: ...

class DeleteRouteRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class DeleteRouteResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RollBackRouteRequest(_message.Message):
    __slots__ = ("name", "reason")
    NAME_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    name: str
    reason: str
    def __init__(self, name: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class RollBackRouteResponse(_message.Message):
    __slots__ = ("route",)
    ROUTE_FIELD_NUMBER: _ClassVar[int]
    route: Route
    def __init__(self, route: _Optional[_Union[Route, _Mapping]] = ...) -> None: ...

class RecordFeedbackRequest(_message.Message):
    __slots__ = ("request_id", "user", "route", "reward", "labels", "feedback_id")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    USER_FIELD_NUMBER: _ClassVar[int]
    ROUTE_FIELD_NUMBER: _ClassVar[int]
    REWARD_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    FEEDBACK_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    user: str
    route: str
    reward: float
    labels: _containers.ScalarMap[str, str]
    feedback_id: str
    def __init__(self, request_id: _Optional[str] = ..., user: _Optional[str] = ..., route: _Optional[str] = ..., reward: _Optional[float] = ..., labels: _Optional[_Mapping[str, str]] = ..., feedback_id: _Optional[str] = ...) -> None: ...

class RecordFeedbackResponse(_message.Message):
    __slots__ = ("route", "arm")
    ROUTE_FIELD_NUMBER: _ClassVar[int]
    ARM_FIELD_NUMBER: _ClassVar[int]
    route: str
    arm: str
    def __init__(self, route: _Optional[str] = ..., arm: _Optional[str] = ...) -> None: ...

class GetReportRequest(_message.Message):
    __slots__ = ("route", "level", "cuped", "points", "tuned_for")
    ROUTE_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    CUPED_FIELD_NUMBER: _ClassVar[int]
    POINTS_FIELD_NUMBER: _ClassVar[int]
    TUNED_FOR_FIELD_NUMBER: _ClassVar[int]
    route: str
    level: float
    cuped: bool
    points: int
    tuned_for: int
    def __init__(self, route: _Optional[str] = ..., level: _Optional[float] = ..., cuped: _Optional[bool] = ..., points: _Optional[int] = ..., tuned_for: _Optional[int] = ...) -> None: ...

class GetReportResponse(_message.Message):
    __slots__ = ("route", "start_time", "arms", "sample_ratio", "history", "warnings")
    ROUTE_FIELD_NUMBER: _ClassVar[int]
    START_TIME_FIELD_NUMBER: _ClassVar[int]
    ARMS_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_RATIO_FIELD_NUMBER: _ClassVar[int]
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    route: Route
    start_time: _timestamp_pb2.Timestamp
    arms: _containers.RepeatedCompositeFieldContainer[ArmReport]
    sample_ratio: SampleRatio
    history: _containers.RepeatedCompositeFieldContainer[ReportPoint]
    warnings: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, route: _Optional[_Union[Route, _Mapping]] = ..., start_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., arms: _Optional[_Iterable[_Union[ArmReport, _Mapping]]] = ..., sample_ratio: _Optional[_Union[SampleRatio, _Mapping]] = ..., history: _Optional[_Iterable[_Union[ReportPoint, _Mapping]]] = ..., warnings: _Optional[_Iterable[str]] = ...) -> None: ...

class ArmReport(_message.Message):
    __slots__ = ("arm", "shadow", "requests", "anonymous_requests", "users", "rewarded_users", "reward", "difference", "difference_one_look", "detectable", "shares", "first_token_seconds", "seconds", "prompt_tokens", "completion_tokens", "variance_reduction")
    class SharesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Estimate
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Estimate, _Mapping]] = ...) -> None: ...
    ARM_FIELD_NUMBER: _ClassVar[int]
    SHADOW_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    ANONYMOUS_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    USERS_FIELD_NUMBER: _ClassVar[int]
    REWARDED_USERS_FIELD_NUMBER: _ClassVar[int]
    REWARD_FIELD_NUMBER: _ClassVar[int]
    DIFFERENCE_FIELD_NUMBER: _ClassVar[int]
    DIFFERENCE_ONE_LOOK_FIELD_NUMBER: _ClassVar[int]
    DETECTABLE_FIELD_NUMBER: _ClassVar[int]
    SHARES_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    VARIANCE_REDUCTION_FIELD_NUMBER: _ClassVar[int]
    arm: str
    shadow: bool
    requests: int
    anonymous_requests: int
    users: int
    rewarded_users: int
    reward: Estimate
    difference: Estimate
    difference_one_look: Estimate
    detectable: float
    shares: _containers.MessageMap[str, Estimate]
    first_token_seconds: Quantiles
    seconds: Quantiles
    prompt_tokens: int
    completion_tokens: int
    variance_reduction: float
    def __init__(self, arm: _Optional[str] = ..., shadow: _Optional[bool] = ..., requests: _Optional[int] = ..., anonymous_requests: _Optional[int] = ..., users: _Optional[int] = ..., rewarded_users: _Optional[int] = ..., reward: _Optional[_Union[Estimate, _Mapping]] = ..., difference: _Optional[_Union[Estimate, _Mapping]] = ..., difference_one_look: _Optional[_Union[Estimate, _Mapping]] = ..., detectable: _Optional[float] = ..., shares: _Optional[_Mapping[str, Estimate]] = ..., first_token_seconds: _Optional[_Union[Quantiles, _Mapping]] = ..., seconds: _Optional[_Union[Quantiles, _Mapping]] = ..., prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., variance_reduction: _Optional[float] = ...) -> None: ...

class Estimate(_message.Message):
    __slots__ = ("value", "low", "high")
    VALUE_FIELD_NUMBER: _ClassVar[int]
    LOW_FIELD_NUMBER: _ClassVar[int]
    HIGH_FIELD_NUMBER: _ClassVar[int]
    value: float
    low: float
    high: float
    def __init__(self, value: _Optional[float] = ..., low: _Optional[float] = ..., high: _Optional[float] = ...) -> None: ...

class Quantiles(_message.Message):
    __slots__ = ("p50", "p90", "p99", "mean")
    P50_FIELD_NUMBER: _ClassVar[int]
    P90_FIELD_NUMBER: _ClassVar[int]
    P99_FIELD_NUMBER: _ClassVar[int]
    MEAN_FIELD_NUMBER: _ClassVar[int]
    p50: float
    p90: float
    p99: float
    mean: float
    def __init__(self, p50: _Optional[float] = ..., p90: _Optional[float] = ..., p99: _Optional[float] = ..., mean: _Optional[float] = ...) -> None: ...

class SampleRatio(_message.Message):
    __slots__ = ("mismatch", "p_value", "anytime_p_value", "expected")
    class ExpectedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    MISMATCH_FIELD_NUMBER: _ClassVar[int]
    P_VALUE_FIELD_NUMBER: _ClassVar[int]
    ANYTIME_P_VALUE_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FIELD_NUMBER: _ClassVar[int]
    mismatch: bool
    p_value: float
    anytime_p_value: float
    expected: _containers.ScalarMap[str, float]
    def __init__(self, mismatch: _Optional[bool] = ..., p_value: _Optional[float] = ..., anytime_p_value: _Optional[float] = ..., expected: _Optional[_Mapping[str, float]] = ...) -> None: ...

class ReportPoint(_message.Message):
    __slots__ = ("time", "arm", "rewarded_users", "reward", "difference")
    TIME_FIELD_NUMBER: _ClassVar[int]
    ARM_FIELD_NUMBER: _ClassVar[int]
    REWARDED_USERS_FIELD_NUMBER: _ClassVar[int]
    REWARD_FIELD_NUMBER: _ClassVar[int]
    DIFFERENCE_FIELD_NUMBER: _ClassVar[int]
    time: _timestamp_pb2.Timestamp
    arm: str
    rewarded_users: int
    reward: Estimate
    difference: Estimate
    def __init__(self, time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., arm: _Optional[str] = ..., rewarded_users: _Optional[int] = ..., reward: _Optional[_Union[Estimate, _Mapping]] = ..., difference: _Optional[_Union[Estimate, _Mapping]] = ...) -> None: ...

class EraseUserRequest(_message.Message):
    __slots__ = ("user", "tenant")
    USER_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    user: str
    tenant: str
    def __init__(self, user: _Optional[str] = ..., tenant: _Optional[str] = ...) -> None: ...

class EraseUserResponse(_message.Message):
    __slots__ = ("counts", "requests", "feedback")
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    FEEDBACK_FIELD_NUMBER: _ClassVar[int]
    counts: int
    requests: int
    feedback: int
    def __init__(self, counts: _Optional[int] = ..., requests: _Optional[int] = ..., feedback: _Optional[int] = ...) -> None: ...
