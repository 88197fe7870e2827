"""Engines of tests with the C engine under ASan and UBSan: nothing of the product knows of it.

`make check` builds the extension so (build.mk) and names it in SIDESTEP_SANITIZED (a directory with sidestep/_tunnel)
and the sanitizers' library in SIDESTEP_SANITIZER; without them engines are what everybody gets. This file is also the
host's start then: `python sanitized.py engine ...` puts that directory before the package's own and goes on as
`sidestep engine ...`.
"""

import os
import re
import sys
from pathlib import Path

FOLDER, LIBRARY = os.environ.get("SIDESTEP_SANITIZED", ""), os.environ.get("SIDESTEP_SANITIZER", "")
REPORT = re.compile(r"AddressSanitizer|LeakSanitizer|UndefinedBehaviorSanitizer|runtime error:")
STARTED = "engine under sanitizers"


def host() -> list[str]:
    """What Python is to run instead of an engine's command line."""
    return [__file__] if FOLDER else ["-m", "sidestep"]


def environment() -> dict[str, str] | None:
    """The engine's environment; None: the own one."""
    if not FOLDER:
        return None
    # The interpreter frees little at its end: leaks would be its own, and ours are counted by the fuzz targets.
    options = {"ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return {**os.environ, **options, "LD_PRELOAD": LIBRARY}


def check(log: str) -> None:
    """An engine has ended: fails the test when a sanitizer has reported, or when it was not the sanitized one."""
    assert not REPORT.search(log), log
    assert not FOLDER or STARTED in log, f"not sanitized: {log}"


def main() -> int:
    """As `sidestep`, with the other extension."""
    import sidestep

    sidestep.__path__.insert(0, str(Path(FOLDER) / "sidestep"))
    from sidestep import _tunnel
    from sidestep.__main__ import main as sidestep_main

    assert _tunnel.__file__.startswith(FOLDER), _tunnel.__file__
    print(STARTED, file=sys.stderr, flush=True)
    return sidestep_main()


if __name__ == "__main__":
    sys.exit(main())
