from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Piece(_message.Message):
    __slots__ = ("opening", "adapter")
    OPENING_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    opening: Opening
    adapter: bytes
    def __init__(self, opening: _Optional[_Union[Opening, _Mapping]] = ..., adapter: _Optional[bytes] = ...) -> None: ...

class Opening(_message.Message):
    __slots__ = ("protocol", "payload", "signature", "adapter_bytes")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_BYTES_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    payload: bytes
    signature: bytes
    adapter_bytes: int
    def __init__(self, protocol: _Optional[int] = ..., payload: _Optional[bytes] = ..., signature: _Optional[bytes] = ..., adapter_bytes: _Optional[int] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AgentStatus(_message.Message):
    __slots__ = ("version", "site", "pid", "since", "work", "base_digest", "answered", "last_answer")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    WORK_FIELD_NUMBER: _ClassVar[int]
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ANSWERED_FIELD_NUMBER: _ClassVar[int]
    LAST_ANSWER_FIELD_NUMBER: _ClassVar[int]
    version: str
    site: str
    pid: int
    since: float
    work: Work
    base_digest: str
    answered: int
    last_answer: float
    def __init__(self, version: _Optional[str] = ..., site: _Optional[str] = ..., pid: _Optional[int] = ..., since: _Optional[float] = ..., work: _Optional[_Union[Work, _Mapping]] = ..., base_digest: _Optional[str] = ..., answered: _Optional[int] = ..., last_answer: _Optional[float] = ...) -> None: ...

class Work(_message.Message):
    __slots__ = ("run", "server_round", "step", "steps", "since")
    RUN_FIELD_NUMBER: _ClassVar[int]
    SERVER_ROUND_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    run: str
    server_round: int
    step: int
    steps: int
    since: float
    def __init__(self, run: _Optional[str] = ..., server_round: _Optional[int] = ..., step: _Optional[int] = ..., steps: _Optional[int] = ..., since: _Optional[float] = ...) -> None: ...

class CancelRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CancelReply(_message.Message):
    __slots__ = ("stopped",)
    STOPPED_FIELD_NUMBER: _ClassVar[int]
    stopped: bool
    def __init__(self, stopped: _Optional[bool] = ...) -> None: ...
