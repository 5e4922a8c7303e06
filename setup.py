"""The one C file of coinfer; optional, since `pipeline/runtime/rans_twin.py` gives the same bytes without it."""

from setuptools import Extension, setup

setup(
    ext_modules=[Extension("pipeline.runtime._rans", ["pipeline/runtime/_rans.c"], extra_compile_args=["-O3"], py_limited_api=True, optional=True)],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
