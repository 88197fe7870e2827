"""The C engine (tunnel/tunnel.h); engine/host.py is its only user beside the tests."""

from typing import Any

ffi: Any
lib: Any
