"""cffi recipe of sidestep._tunnel: the declaration is tunnel.h, every C file but the supervisor's is linked."""

from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent

ffi = FFI()
ffi.cdef((HERE / "tunnel.h").read_text().split("/* cdef begin */", 1)[1].split("/* cdef end */", 1)[0])
ffi.set_source(
    "sidestep._tunnel",
    '#include "tunnel.h"',
    sources=sorted(f"tunnel/{path.name}" for path in HERE.glob("*.c") if path.name != "supervise.c"),
    include_dirs=["tunnel"],
    libraries=["ssl", "crypto", "nghttp2", "pthread"],
    define_macros=[("_GNU_SOURCE", None)],
    extra_compile_args=["-O2", "-g", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-fstack-protector-strong"],
    depends=["bpf/maps.h", *sorted(f"tunnel/{path.name}" for path in HERE.glob("*.h"))],
)

if __name__ == "__main__":
    ffi.compile(verbose=True)
