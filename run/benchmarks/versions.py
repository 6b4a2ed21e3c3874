"""One line: the device, and the versions of what its numbers depend on."""

import importlib.metadata
import platform

import torch

PACKAGES = ("torch", "triton", "deepspeed", "transformers", "timm", "numpy")


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "is missing"


if __name__ == "__main__":
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} thread(s)"
    packages = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    print(f"{device}; Python {platform.python_version()}, {packages}")
