"""The shape of the tree: which folder may import which, and how large files and functions may be.

The sources are parsed, never imported. Every rule is a function from a tree to its violations. Each has two tests: the
project has none, and a small tree with a planted violation has that one.
"""

import ast
import collections
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From the bottom up. A module imports from lower rows and from its own folder; folders of one row do not import each
# other. So no import goes up, and there is no circle.
LAYERS = (
    ({"config"}, "Settings know nothing but each other."),
    ({"cli", "storage", "parameters"}, "Flags, files on disk and the table of parameter names follow from settings."),
    ({"data", "sandbox", "pallas_kernels"}, "Text, untrusted programs and kernels know no model."),
    ({"parallel"}, "The mesh and its collectives move rows in the tiles of the kernels."),
    ({"ops"}, "Operations pick a kernel, or its counterpart in XLA or on CPU."),
    ({"model"}, "The paper's equations call operations."),
    ({"training", "inference"}, "Training updates a model; inference generates with one."),
    ({"hf"}, "Conversion maps Hugging Face folders to checkpoints and back."),
    ({"loading"}, "Loading opens a checkpoint or a Hugging Face folder."),
    ({"start"}, "A run's settings start from a preset and a checkpoint that is loaded."),
    ({"evaluation"}, "Evaluation measures what was loaded."),
    ({"pretraining"}, "Pretraining is a stage: a loss, its data and its evaluation."),
    ({"alignment"}, "Alignment trains in further stages, with rewards and evaluations."),
    ({"presets"}, "Presets are settings of every stage."),
    ({"serve", "plan"}, "The server and the planner run or compile all of it."),
    ({"train", "eval", "generate", "__main__"}, "Commands stand on top: nothing imports them."),
)
RANK = {name: rank for rank, (names, _) in enumerate(LAYERS) for name in names}

FILES = ("dsv2_jax", "pallas_kernels", "configs", "benchmarks", "scripts", "train.py", "eval.py")
MOST_LINES, MOST_FUNCTION_LINES, MOST_ARGUMENTS = 400, 80, 8


def sources(root: Path, *names: str) -> list[Path]:
    """The Python files in these folders of the tree, or of these names."""
    found = [
        path for name in names for path in ([root / name] if name.endswith(".py") else (root / name).rglob("*.py"))
    ]
    return sorted(path for path in found if path.exists())


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of all that a file imports, also inside functions."""
    package = path.relative_to(root).parent.parts
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*above, *([node.module] if node.module else [])))
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def folder(dotted: str) -> str | None:
    """The row's entry that a dotted name belongs to: `model` of dsv2_jax.model.moe. None outside the project."""
    first, *rest = dotted.split(".")
    if first == "dsv2_jax" and rest:
        return rest[0]
    return {"configs": "presets", "pallas_kernels": "pallas_kernels"}.get(first)


def upward_imports(root: Path) -> list[str]:
    """Imports that do not go down: up, between folders of one row, or with a folder that no row names."""
    found = []
    for path in sources(root, "dsv2_jax", "pallas_kernels", "configs"):
        module = path.relative_to(root).with_suffix("")
        own = folder(".".join(module.parts))
        here = "__main__" if module.name == "__main__" else own
        if here not in RANK and module.parts != ("dsv2_jax", "__init__"):
            found.append(f"{path.relative_to(root)}: no row of LAYERS names {here}")
            continue
        for line, dotted in imported(path, root):
            command = "__main__" in dotted.split(".")
            there = "__main__" if command and folder(dotted) else folder(dotted)
            if there in (None, own):
                continue
            if there not in RANK or here not in RANK or RANK[there] >= RANK[here]:
                found.append(f"{path.relative_to(root)}:{line}: {here} imports {there}")
    return found


def platforms_in_model(root: Path) -> list[str]:
    """Places in dsv2_jax/model that ask which platform runs."""
    asks = {"platform", "default_backend"}
    found = []
    for path in sources(root, "dsv2_jax/model"):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {part for alias in node.names for part in alias.name.split(".")}
                line = node.lineno
            elif isinstance(node, ast.Name):
                names, line = {node.id}, node.lineno
            elif isinstance(node, ast.Attribute):
                names, line = {node.attr}, node.lineno
            else:
                continue
            found += [f"{path.relative_to(root)}:{line}: {name}" for name in sorted(names & asks)]
    return found


def project_in_kernels(root: Path) -> list[str]:
    """Imports of dsv2_jax in pallas_kernels, which is usable without it."""
    return [
        f"{path.relative_to(root)}:{line}: {dotted}"
        for path in sources(root, "pallas_kernels")
        for line, dotted in imported(path, root)
        if dotted.split(".")[0] == "dsv2_jax"
    ]


def long_files(root: Path) -> list[str]:
    found = []
    for path in sources(root, *FILES):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MOST_LINES:
            found.append(f"{path.relative_to(root)}: {lines} lines")
    return found


def functions(root: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for path in sources(root, *FILES):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{path.relative_to(root)}:{node.lineno}: {node.name}", node


def long_functions(root: Path) -> list[str]:
    lengths = ((where, (node.end_lineno or node.lineno) - node.lineno + 1) for where, node in functions(root))
    return [f"{where} has {lines} lines" for where, lines in lengths if lines > MOST_FUNCTION_LINES]


def wide_functions(root: Path) -> list[str]:
    """Functions of too many arguments: keyword-only ones count, self and cls do not."""
    found = []
    for where, node in functions(root):
        names = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
        if names and names[0] in ("self", "cls"):
            names = names[1:]
        count = len(names) + len(node.args.kwonlyargs)
        if count > MOST_ARGUMENTS:
            found.append(f"{where} has {count} arguments")
    return found


def repeated_classes(root: Path) -> list[str]:
    places = collections.defaultdict(list)
    for path in sources(root, *FILES):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(str(path.relative_to(root)))
    return [f"{name}: {', '.join(files)}" for name, files in sorted(places.items()) if len(files) > 1]


def expect_none(violations: list[str]) -> None:
    assert not violations, "\n" + "\n".join(violations)


def test_imports_go_down():
    expect_none(upward_imports(ROOT))


def test_model_asks_for_no_platform():
    expect_none(platforms_in_model(ROOT))


def test_kernels_do_not_import_the_project():
    expect_none(project_in_kernels(ROOT))


def test_files_are_short():
    expect_none(long_files(ROOT))


def test_functions_are_short():
    expect_none(long_functions(ROOT))


def test_functions_take_few_arguments():
    expect_none(wide_functions(ROOT))


def test_class_names_stand_once():
    expect_none(repeated_classes(ROOT))


def test_every_folder_has_a_row():
    """A row for each folder and module of the package, so that a new one is given its place."""
    inside = {path.stem for path in (ROOT / "dsv2_jax").iterdir() if path.is_dir() or path.suffix == ".py"}
    assert inside - {"__init__", "__pycache__"} <= set(RANK)


def tree(root: Path, files: dict[str, str]) -> Path:
    """Writes sources to a folder: the small trees of the checks below."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("name", "source", "violations"),
    [
        ("dsv2_jax/model/moe.py", "from dsv2_jax.training import loop", 1),
        ("dsv2_jax/model/moe.py", "from dsv2_jax import training", 1),
        ("dsv2_jax/model/moe.py", "import dsv2_jax.training.loop", 1),
        ("dsv2_jax/model/moe.py", "from ..training import loop", 1),
        ("dsv2_jax/model/moe.py", "def late():\n    from dsv2_jax.training import loop", 1),
        ("dsv2_jax/model/moe.py", "if True:\n    from configs import models", 1),
        ("dsv2_jax/model/moe.py", "from dsv2_jax.elsewhere import x", 1),
        ("dsv2_jax/elsewhere/a.py", "x = 1", 1),
        ("dsv2_jax/serve/app.py", "from dsv2_jax.serve.__main__ import main", 1),
        ("dsv2_jax/data/text.py", "from dsv2_jax.parallel import mesh", 1),
        ("pallas_kernels/cost.py", "from dsv2_jax.plan import hlo", 1),
        ("dsv2_jax/config/__init__.py", "from dsv2_jax.storage import folder", 1),
        ("dsv2_jax/model/moe.py", "from dsv2_jax.parallel import mesh\nfrom . import rope\nimport jax", 0),
        ("dsv2_jax/plan/__main__.py", "from dsv2_jax import presets\nfrom dsv2_jax.plan import fit", 0),
        ("dsv2_jax/train.py", "from dsv2_jax import presets, plan, start", 0),
        ("configs/align.py", "from dsv2_jax.start import init\nfrom dsv2_jax.presets import models", 0),
        ("dsv2_jax/hf/names.py", "from dsv2_jax import parameters", 0),
    ],
)
def test_imports_that_do_not_go_down_are_found(tmp_path, name, source, violations):
    assert len(upward_imports(tree(tmp_path, {name: source}))) == violations


def test_a_circle_is_found(tmp_path):
    both = {"dsv2_jax/model/a.py": "import dsv2_jax.data.b", "dsv2_jax/data/b.py": "import dsv2_jax.model.a"}
    assert upward_imports(tree(tmp_path, both)) == ["dsv2_jax/data/b.py:1: data imports model"]


@pytest.mark.parametrize(
    ("source", "violations"),
    [
        ("from dsv2_jax.parallel.mesh import platform", 1),
        ("import jax\ncpu = jax.devices()[0].platform == 'cpu'", 1),
        ("from dsv2_jax.parallel import mesh\n\ndef f():\n    return mesh.platform()", 1),
        ("import jax\ncpu = jax.default_backend()", 1),
        ("def platforms(x):\n    return x", 0),
    ],
)
def test_a_platform_in_model_is_found(tmp_path, source, violations):
    assert len(platforms_in_model(tree(tmp_path, {"dsv2_jax/model/a.py": source}))) == violations
    assert platforms_in_model(tree(tmp_path / "other", {"dsv2_jax/ops/a.py": source})) == []


@pytest.mark.parametrize("source", ["import dsv2_jax", "def f():\n    from dsv2_jax.config import check"])
def test_the_project_in_kernels_is_found(tmp_path, source):
    planted = {"pallas_kernels/pricing/a.py": source, "pallas_kernels/b.py": "from pallas_kernels import chips"}
    (found,) = project_in_kernels(tree(tmp_path, planted))
    assert found.startswith("pallas_kernels/pricing/a.py")


def test_a_long_file_is_found(tmp_path):
    planted = {"benchmarks/long.py": "x = 1\n" * (MOST_LINES + 1), "train.py": "x = 1\n" * MOST_LINES}
    assert long_files(tree(tmp_path, planted)) == [f"benchmarks/long.py: {MOST_LINES + 1} lines"]


def test_a_long_function_is_found(tmp_path):
    def of(lines):
        return "class A:\n    async def f(self):\n" + "        x = 1\n" * (lines - 1)

    planted = {"scripts/long.py": of(MOST_FUNCTION_LINES + 1), "scripts/short.py": of(MOST_FUNCTION_LINES)}
    assert long_functions(tree(tmp_path, planted)) == [f"scripts/long.py:2: f has {MOST_FUNCTION_LINES + 1} lines"]


def test_a_function_of_many_arguments_is_found(tmp_path):
    def of(count):
        named = ", ".join(f"a{i}" for i in range(count - 1))
        return f"class A:\n    def f(self, {named}, *, last): ..."

    planted = {"configs/wide.py": of(MOST_ARGUMENTS + 1), "configs/narrow.py": of(MOST_ARGUMENTS)}
    assert wide_functions(tree(tmp_path, planted)) == [f"configs/wide.py:2: f has {MOST_ARGUMENTS + 1} arguments"]


def test_a_class_name_that_stands_twice_is_found(tmp_path):
    planted = {
        "dsv2_jax/a.py": "class Plan: ...\nclass Own: ...",
        "pallas_kernels/b.py": "def f():\n    class Plan: ...",
    }
    assert repeated_classes(tree(tmp_path, planted)) == ["Plan: dsv2_jax/a.py, pallas_kernels/b.py"]
