# cffi has no pyproject hook; everything else is in pyproject.toml.
from setuptools import setup

setup(cffi_modules=["bpf/build_ffi.py:ffi", "tunnel/build_ffi.py:ffi"])
