"""README and docs/ against the code: the tree, presets' figures, functions named, settings and meshes shown."""

import ast
import dataclasses
import re
from pathlib import Path

from configs import PRESETS
from dsv2_jax import cli, parameters
from dsv2_jax.config import Config
from dsv2_jax.parallel import sharding

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PODS = (ROOT / "docs" / "pods.md").read_text(encoding="utf-8")
PODS_CHIPS = {"tiny": 8, "nano": 8, "v2": 256}  # that the page says its commands run on


def tree_paths() -> list[str]:
    """The paths of README's tree: a name a line, two spaces a level, folders with a slash at their end."""
    drawn = re.search(r"## The tree\n\n```\n(.*?)```", README, re.DOTALL)
    assert drawn
    folders, paths = [], []
    for line in drawn[1].splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders = folders[:depth]
        paths.append("".join([*folders, name]))
        if name.endswith("/"):
            folders.append(name)
    return paths


def test_the_tree_names_every_file_and_no_other():
    listed = tree_paths()
    assert len(listed) == len(set(listed))
    assert [path for path in listed if not (ROOT / path).exists()] == []
    there = {
        path.relative_to(ROOT).as_posix()
        for folder in ("dsv2_jax", "pallas_kernels", "configs", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if path.stat().st_size  # an empty __init__.py says nothing
    }
    assert {path for path in listed if path.endswith(".py") and "/" in path} == there


def test_the_presets_figures():
    rows = re.findall(r"^\| `(\w+)` \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|", README, re.MULTILINE)
    configs = {name: preset() for name, preset in PRESETS.items()}
    models = {
        name: config.model for name, config in configs.items() if not config.epochs and not config.grpo.group
    }  # fine-tuning adds no model
    assert {name: tuple(int(figure.replace(",", "")) for figure in figures) for name, *figures in rows} == {
        name: (parameters.count(model), parameters.count_activated(model), model.cache_elements)
        for name, model in models.items()
    }


def defined(path: Path) -> set[str]:
    """Names of a file's functions and classes, and `Class.name` of its classes' own."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return names


def test_every_function_of_the_papers_table_exists():
    named = re.findall(r"`([\w/]+\.py):([\w.]+)`", README)
    assert len(named) > 20
    assert [(path, name) for path, name in named if name not in defined(ROOT / path)] == []


def test_links_lead_to_files():
    for folder, text in (ROOT, README), (ROOT / "docs", PODS):
        links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("https://")]
        assert links
        assert [link for link in links if not (folder / link).exists()] == []


def pods_commands() -> list[tuple[str, list[str]]]:
    """(preset, flags) of every call of train.py in docs/pods.md, by either name; variables of the shell become 1."""
    text = re.sub(r" *\\?\n +(?=--)", " ", PODS)
    found = re.findall(r"(?:train\.py|dsv2-train) (\w+) (?=--)((?:[^\n'\"&>|`]|\\\n)+)", text.replace("\\\n", " "))
    return [(preset, re.sub(r"\$\w+", "1", flags).split()) for preset, flags in found]


def test_commands_for_pods_fit_their_chips():
    """Every call is understood whole, and its mesh can be laid over the chips that the page names."""
    commands = pods_commands()
    assert {preset for preset, _ in commands} == set(PODS_CHIPS)
    assert sum(preset == "v2" for preset, _ in commands) == 2  # TPU VMs, xpk; docs/jobset.yaml has a test of its own
    for preset, flags in commands:
        for extra, chips in ((), 1), (("--mesh.slices", "2", "--mesh.data", "2", "--mesh.tensor", "2"), 2):
            if extra and preset != "v2":
                continue
            config = cli.parse(PRESETS[preset](), [*flags, *extra])
            mesh = config.mesh.resolve(chips * PODS_CHIPS[preset])
            sharding.check_model(config.model, mesh)
            sharding.check_batch(config.batch.micro_size or config.batch.size, config.batch.length, config.model, mesh)


def test_flags_named_in_the_text_on_pods_are_flags():
    known = set(cli.flags(Config)) | {f"--{field.name}" for field in dataclasses.fields(Config)}
    shown = re.findall(r"`(--(?:mesh|processes|batch|cadence|compute|data|model|workdir)\b[\w.]*)", PODS)
    assert len(shown) > 15
    assert [flag for flag in shown if flag not in known] == []


def test_settings_named_in_the_text_are_settings():
    known = set(cli.flags(Config))
    shown = re.findall(r"--(?:model|data|batch|optimizer|compute|cadence)\.[\w.]+", README)
    assert len(shown) > 3
    assert [flag for flag in shown if flag not in known] == []
