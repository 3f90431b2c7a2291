"""Packaging of the library `ldm`; `constraints.txt` holds the versions it was tested with."""

from pathlib import Path

from setuptools import find_namespace_packages, setup

# Folders beside ldm/ that an installation keeps inside it: there `ldm.files.in_checkout` finds them.
SHIPPED = ["configs", "models", "data"]

setup(
    name="textual-inversion",
    version="0.1.0",
    description="Textual inversion on frozen latent diffusion models: a new word learned from a few images",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=[
        *find_namespace_packages(include=["ldm", "ldm.*"]),
        *(f"ldm.shipped.{name}" for name in SHIPPED),
    ],
    package_dir={f"ldm.shipped.{name}": name for name in SHIPPED},
    package_data={
        "ldm.studio": ["*.css", "*.js"],
        **{f"ldm.shipped.{name}": ["**/*"] for name in SHIPPED},
    },
    entry_points={"console_scripts": ["textual-inversion = ldm.commands.entry:main"]},
    install_requires=[
        "torch>=2.6",
        "pytorch-lightning>=2.5,<3",  # with 2.4 a resumed run is not bit-identical to an uninterrupted one
        "transformers>=4.46",
        "huggingface_hub>=0.23.2",
        "omegaconf>=2.3",
        "einops>=0.6",
        "kornia>=0.7",
        "numpy>=1.26.1",
        "pillow>=10.3",
        "pyyaml>=6.0",
        "safetensors>=0.4.3",
        "tensorboard>=2.13",
        "tqdm>=4.60",
    ],
    # The quantiser of VQ first stages is missing here because it requires torchvision: requirements-no-deps.txt.
    extras_require={
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
            "mypy>=1.15",
            "types-PyYAML",
            "types-tqdm",
            "diffusers>=0.31",
        ],
        "ui": ["gradio>=6.0", "fastapi>=0.115", "uvicorn>=0.30"],
        "notebooks": ["ipykernel>=6.29", "nbclient>=0.10"],
        "browser": ["playwright>=1.45"],  # drives the system's Chromium in the tests of the page
    },
)
