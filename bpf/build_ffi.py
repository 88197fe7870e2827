"""cffi recipe of sidestep._bpf: declarations from loader.h and maps.h, skeletons made by build.mk first."""

import re
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent


def cdef(name: str) -> str:
    """The part of a header that cffi reads."""
    text = (HERE / name).read_text()
    part = text.split("/* cdef begin */", 1)[1].split("/* cdef end */", 1)[0]
    return re.sub(r"#define CAPTURE_(LAYOUT|FORMER) .*", "", part).replace(
        "CAPTURE_ERROR_LEN 512", "CAPTURE_ERROR_LEN ..."
    )


ffi = FFI()
ffi.cdef("typedef uint8_t __u8; typedef uint16_t __u16; typedef uint32_t __u32; typedef uint64_t __u64;")
ffi.cdef(cdef("maps.h") + cdef("loader.h"))
ffi.set_source(
    "sidestep._bpf",
    '#include "maps.h"\n#include "loader.h"',
    sources=["bpf/loader.c"],
    include_dirs=["bpf", "build/bpf"],
    libraries=["bpf"],
    extra_compile_args=[
        "-O2",
        "-std=gnu11",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unused-parameter",
        "-Wno-cast-function-type",
    ],
    depends=[
        "bpf/loader.h",
        "bpf/loader.c",
        "bpf/maps.h",
        *(f"build/bpf/{name}.skel.h" for name in ("capture", "survey", "kubelet", "flows")),
    ],
)

if __name__ == "__main__":
    ffi.compile(verbose=True)
