"""Packaging, and the C++ engine where there is a compiler; settings of the development tools are in pyproject.toml."""

import platform
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup

KERNELS = Path("vllm_kvsplice/engines/cpu")
X86 = platform.machine() in ("x86_64", "AMD64")
# Only a file of its own may use instructions that not every processor has.
AVX2 = ["-mavx2", "-mfma", "-mbmi2"]
AVX512 = [*AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vbmi", "vnni"))]
FLAGS = {
    "codec.cpp": ["-ffp-contract=off"],
    "avx2.cpp": AVX2,
    "avx512.cpp": AVX512,
    "amx.cpp": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16"],
}


def native_extension() -> dict[str, Any]:
    """Arguments of `setup` that build the kernels; none without torch. A failed build leaves the package without them."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        print("vllm-kvsplice: torch is not importable here, so the C++ engine is not built", file=sys.stderr)
        return {}

    class OptionalBuild(BuildExtension):
        """Compiles every file with its own flags and on a core of its own."""

        def build_extensions(self) -> None:
            compile_one, compile_all = self.compiler._compile, self.compiler.compile
            pool, running = ThreadPoolExecutor(), list[Future[None]]()

            def begin(obj: str, source: str, ext: str, cc_args: Any, postargs: list[str], pp_opts: Any) -> None:
                flags = postargs + FLAGS.get(Path(source).name, [])
                running.append(pool.submit(compile_one, obj, source, ext, cc_args, flags, pp_opts))

            def finish(*args: Any, **options: Any) -> list[str]:
                objects = compile_all(*args, **options)
                for compilation in running:
                    compilation.result()
                return objects

            self.compiler._compile, self.compiler.compile = begin, finish
            try:
                super().build_extensions()
            # Torch looks for the compiler on its own and raises whatever that brings up.
            except Exception as error:
                print(f"vllm-kvsplice: the C++ engine is not built ({error})", file=sys.stderr)

    sources = ["binding.cpp", "codec.cpp", "portable.cpp", *(["avx2.cpp", "avx512.cpp", "amx.cpp"] if X86 else [])]
    kernels = CppExtension(
        "vllm_kvsplice.engines.cpu._native",
        [str(KERNELS / name) for name in sources],
        depends=[str(path) for path in KERNELS.glob("*.h")],
        extra_compile_args=["-std=c++20", "-O3", "-fopenmp", "-Wno-psabi", "-Wno-ignored-attributes"],
        extra_link_args=["-fopenmp"],
    )
    kernels.optional = True
    return {"ext_modules": [kernels], "cmdclass": {"build_ext": OptionalBuild.with_options(use_ninja=False)}}


setup(
    name="vllm-kvsplice",
    version="0.1.0",
    description="Calibrated, compressed KV cache for vLLM: 4-5x more tokens in the same memory",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["vllm_kvsplice", "vllm_kvsplice.*", "calibration", "calibration.*"]),
    package_data={
        "calibration.fim": ["report.html"],
        "vllm_kvsplice": ["py.typed", "engines/cpu/*.h", "engines/cpu/*.cpp"],
    },
    # vllm itself is not named here: pip would replace a CPU or ROCm build by the CUDA one. See requirements/.
    install_requires=[
        "torch",
        "transformers",
        "safetensors",
        "pydantic>=2",
        "typer>=0.19",
        "rich",
        "datasets",
        "huggingface_hub",
        "matplotlib",
        "pandas",
        "plotly",
    ],
    extras_require={"wandb": ["wandb"]},
    entry_points={
        "console_scripts": ["kvsplice = vllm_kvsplice.cli:main"],
        "vllm.general_plugins": ["kvsplice = vllm_kvsplice:register"],
    },
    **native_extension(),
)
