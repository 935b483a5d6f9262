"""Packaging; settings of the development tools are in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    name="vllm-kvsplice",
    version="0.1.0",
    description="Calibrated, compressed KV cache for vLLM: 4-5x more tokens in the same memory",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["vllm_kvsplice", "vllm_kvsplice.*", "calibration"]),
    package_data={"vllm_kvsplice": ["py.typed"]},
    # vllm itself is not named here: pip would replace a CPU or ROCm build by the CUDA one. See requirements/.
    install_requires=[
        "torch",
        "transformers",
        "safetensors",
        "pydantic>=2",
        "typer",
        "rich",
        "datasets",
        "huggingface_hub",
    ],
    entry_points={
        "console_scripts": ["kvsplice = vllm_kvsplice.cli:main"],
        "vllm.general_plugins": ["kvsplice = vllm_kvsplice:register"],
    },
)
