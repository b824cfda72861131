"""Package metadata of megatron_bpipe."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

setup(
    name="megatron_bpipe",
    version="0.1.0",
    description="Memory-balanced pipeline parallelism (BPipe) for Megatron-LM",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.12",
    packages=find_packages(include=["megatron_bpipe", "megatron_bpipe.*"]),
    package_data={"megatron_bpipe": ["py.typed", "simulate/draw/page*"]},
    # A cluster's image brings its own torch and Megatron: neither is a hard dependency.
    install_requires=[],
    extras_require={
        "train": ["torch>=2.6", "megatron-core>=0.18", "numpy", "psutil"],
        "gpu": ["nvidia-ml-py"],  # tells NVLink from PCIe
        "plot": ["matplotlib"],
        "dev": ["pytest", "hypothesis", "mypy", "ruff", "pre-commit"],
    },
    entry_points={"console_scripts": ["bpipe = megatron_bpipe.cli.main:main"]},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
