"""The log of agent and control plane: one line per event on stderr, `time event key=value ...`. Never a key, a token, a
CSR or a certificate.

A reader that has stopped reading must not stop the process: a line that would block is dropped and counted.
"""

import os
import select
import time

_STDERR = 2
_LINE = 3000  # below PIPE_BUF: a pipe that polls writable takes it whole, without blocking
_dropped = 0  # since the last line that got through
_lost = 0  # ever


def event(name: str, **fields: object) -> None:
    """Writes one line. Empty fields are left out, values with spaces quoted; control characters never get through."""
    global _dropped, _lost
    parts = [time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), name]
    parts += [f"{key}={_text(value)}" for key, value in fields.items() if value is not None and value != ""]
    if _dropped:
        parts.append(f"lines_dropped={_dropped}")
    line = " ".join(parts).encode()[:_LINE] + b"\n"
    try:
        poll = select.poll()
        poll.register(_STDERR, select.POLLOUT)
        if poll.poll(0) == [(_STDERR, select.POLLOUT)]:
            os.write(_STDERR, line)
            _dropped = 0
            return
    except OSError:
        pass
    _dropped, _lost = _dropped + 1, _lost + 1


def dropped() -> int:
    """Lines lost since the start."""
    return _lost


def _text(value: object) -> str:
    text = "".join(c if c.isprintable() else "?" for c in str(value))[:500]
    return '"' + text.replace('"', "'") + '"' if not text or any(c in text for c in ' "=') else text
