"""What is installed, and what to do about what is missing or in conflict."""

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from narrows.calibrate import here_file
from narrows.errors import NarrowsError
from narrows.modules.compiled import compiler
from narrows.samples import minilm_folder, smollm2_file

# package -> (the extra that brings it, what it is for)
WANTED = {
    "torch": ("torch", "apply, verify, capturing modules"),
    "transformers": ("hf", "apply, verify, capturing any Hugging Face family"),
    "diffusers": ("diffusers", "capturing diffusion models"),
    "onnx": ("onnx", "capturing ONNX files"),
    "gguf": ("hf", "reading gguf files"),
}


def examine() -> list[dict[str, Any]]:
    """One row a finding: what, what was found, whether it is well, advice."""
    fine = sys.version_info >= (3, 11)
    rows: list[dict[str, Any]] = [_row("python", platform.python_version(), fine, "" if fine else "narrows needs 3.11 or newer")]
    for package, (extra, use) in WANTED.items():
        try:
            rows.append(_row(package, version(package), True, ""))
        except PackageNotFoundError:
            rows.append(_row(package, "missing", False, f"pip install 'narrows[{extra}]' for {use}"))
    if find_spec("torchvision") is not None:
        advice = "a build that does not match torch breaks transformers; if imports fail, pip uninstall torchvision"
        rows.append(_row("torchvision", version("torchvision"), True, advice))
    for name, find in (("smollm2-135m", smollm2_file), ("all-minilm-l6-v2", minilm_folder)):
        try:
            rows.append(_row(name, str(find().name), True, ""))
        except NarrowsError as error:
            rows.append(_row(name, "missing", False, error.remedy))
    found = compiler()
    advice = "" if found else "install gcc or clang (as `cc`): kernels for weights of few bits are compiled for this CPU"
    rows.append(_row("C compiler", found or "missing", found is not None, advice))
    kept = here_file().is_file()
    rows.append(
        _row(
            "machine `here`",
            "calibrated" if kept else "not yet",
            kept,
            "" if kept else "narrows calibrate, or it is done when first needed",
        )
    )
    return rows


def _row(what: str, found: str, ok: bool, advice: str) -> dict[str, Any]:
    return {"what": what, "found": found, "ok": ok, "advice": advice}
