"""The loader of the BPF programs (bpf/loader.h); node/capture.py is its only user beside the tests."""

from typing import Any

ffi: Any

class _Lib:
    CAPTURE_ERROR_LEN: int
    CAPTURE_NO_PINS: int
    CAPTURE_NO_OUT_ETH: int
    CAPTURE_NO_IN_LO: int
    CAPTURE_NO_OUT_LO: int
    CAPTURE_NO_STEER: int
    CAPTURE_NO_ROUTE4: int
    CAPTURE_NO_ROUTE6: int
    CAPTURE_NO_ACCEPT_LOCAL: int
    MODE_OFF: int
    MODE_NOTING: int
    MODE_LENIENT: int
    MODE_STRICT: int
    MODE_DRAINING: int
    SLOT_OUTBOUND: int
    SLOT_INBOUND: int
    SLOT_HBONE: int
    SLOT_COUNT: int
    COUNT_MAX: int

    def capture_prepare(self, pins: bytes, addresses: bytes, error: Any) -> int: ...
    def capture_maps(self, pins: bytes, listeners: Any, engine_sk: Any, error: Any) -> int: ...
    def capture_set_mode(self, pins: bytes, netns: int, interface: bytes, mode: int, error: Any) -> int: ...
    def capture_read(self, pins: bytes, mode: Any, netns_ino: Any, error: Any) -> int: ...
    def capture_verify(self, pins: bytes, netns: int, interface: bytes, error: Any) -> int: ...
    def capture_listeners(self, pins: bytes, error: Any) -> int: ...
    def capture_old(self, pins: bytes, netns: int, error: Any) -> int: ...
    def capture_held(self, pins: bytes, netns: int, error: Any) -> int: ...
    def capture_counters(self, pins: bytes, out: Any, n: int, error: Any) -> int: ...
    def capture_counter_name(self, counter: int) -> Any: ...
    def capture_detach(self, pins: bytes, netns: int, interface: bytes, error: Any) -> int: ...
    def capture_probe(self, i: int, name: Any, error: Any) -> int: ...

lib: _Lib
