"""The house rules that a machine can read: sizes, the import law, banned constructs and words."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "narrows"
FILES = sorted(SOURCE.rglob("*.py"))

# A module imports only from layers above it, or from its own.
LAYERS = [
    {"errors", "progress"},
    {"units", "figures", "kinds", "staging"},
    {"step", "machine", "site", "host", "papers"},
    {"graph"},
    {"backward", "parallel", "layout", "formulas"},
    {"cost", "costmodel", "energy", "footprint"},
    {"capture", "technique", "samples", "headers", "weight_files", "torch_archive"},
    {"diagnose", "gain", "explain", "modules", "formats"},
    {"techniques", "free", "own", "recover", "simulate"},
    {"plan", "claims", "directory", "gguf_file", "streaming", "measured"},
    {"prescribe", "verify", "ablation", "calibrate", "validate", "search", "emit", "probes", "ranks", "anchors", "run"},
    {"workflow", "here", "doctor", "experiments"},
    {"report"},
    {"cli", "docs", "__main__"},
]
RANK = {name: i for i, layer in enumerate(LAYERS) for name in layer}


def module_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(path: Path) -> list[tuple[str, bool]]:
    """(narrows module, whether at the top of the file) for each import of the package in a file."""
    found = []
    tree = ast.parse(path.read_text())
    loaded = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) != "TYPE_CHECKING"]
    top = set(tree.body) | {n for node in loaded for n in node.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "narrows":
            names = [node.module.split(".")[1]] if "." in node.module else [alias.name for alias in node.names]
            found += [(name, node in top) for name in names]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_follow_the_law(path: Path) -> None:
    own = module_of(path)
    if path.name == "__init__.py" and not path.read_text():
        return
    assert own in RANK, f"{own} has no layer: put it into LAYERS"
    for name, at_top in imported(path):
        if at_top and name in RANK:
            assert RANK[name] <= RANK[own], f"{own} may not import {name} when it is loaded"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_files_keep_their_size_and_manners(path: Path) -> None:
    text = path.read_text()
    limit = 300 if "techniques" in path.parts else 500
    assert text.count("\n") <= limit
    for banned in (
        "except Exception",
        "except:",
        "import pickle",
        "torch.load(",
        "trust_remote_code=True",
        "os.system",
        "hasattr(self",
    ):
        assert banned not in text, banned
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", text)


@pytest.mark.parametrize("path", [p for p in FILES if "techniques" in p.parts and p.name != "__init__.py"], ids=lambda p: p.stem)
def test_techniques_do_not_import_each_other_or_torch(path: Path) -> None:
    torch_free = [
        path,
        *(
            SOURCE / "modules" / f"{name}.py"
            for name in re.findall(r"^from narrows\.modules\.(\w+) import", path.read_text(), re.M)
        ),
    ]
    assert "techniques" not in [name for name, at_top in imported(path) if at_top]
    for file in torch_free:
        assert not re.search(r"^(import|from) (torch|transformers)", file.read_text(), re.M), (
            f"{file.name} imports torch when it is loaded"
        )


def test_technique_files_carry_their_paper_s_name() -> None:
    from narrows.papers import module_name, papers

    known = {(module_name(p.family), module_name(p.slug)) for p in papers()}
    for path in (SOURCE / "techniques").rglob("*.py"):
        if path.name != "__init__.py":
            assert (path.parent.name, path.stem) in known, f"{path} is no row of the catalogue"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_public_functions_say_what_they_are_for(path: Path) -> None:
    if path.parent not in (SOURCE, SOURCE / "modules") and "techniques" not in path.parts:
        return  # what users call; inside `capture/` and `report/` a name can be enough
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"
