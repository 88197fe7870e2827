"""The control plane's log: one line per event on stderr, `time event key=value ...`. Never a key, a token or a CSR.

A reader that has stopped reading must not stop the control plane: a line that would block is dropped and counted.
"""

import os
import select
import time

_STDERR = 2
_LINE = 3000  # below PIPE_BUF: a pipe that polls writable takes it whole, without blocking
_dropped = 0


def event(name: str, **fields: object) -> None:
    """Writes one line. Empty fields are left out, control characters never get through."""
    global _dropped
    parts = [time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), name]
    parts += [f"{key}={_text(value)}" for key, value in fields.items() if value is not None and value != ""]
    if _dropped:
        parts.append(f"lines_dropped={_dropped}")
    try:
        poll = select.poll()
        poll.register(_STDERR, select.POLLOUT)
        # Asked twice: a signal that comes during the first look makes it an empty one.
        if (poll.poll(0) or poll.poll(0)) != [(_STDERR, select.POLLOUT)]:
            _dropped += 1
            return
        os.write(_STDERR, " ".join(parts).encode()[:_LINE] + b"\n")
        _dropped = 0
    except OSError:
        _dropped += 1


def _text(value: object) -> str:
    text = "".join(c if c.isprintable() else "?" for c in str(value))[:500]
    return '"' + text.replace('"', "'") + '"' if not text or any(c in text for c in ' "=') else text
