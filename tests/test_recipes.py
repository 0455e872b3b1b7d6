"""Recipes of README, Makefile, docs/ and Dockerfile: paths are there, commands parse, what is copied is enough."""

import ast
import glob
import re
import shlex
import sys
import tomllib
import unittest.mock
from pathlib import Path

import pytest

from configs import PRESETS
from dsv2_jax import cli, generate
from dsv2_jax import eval as evaluation
from dsv2_jax.alignment import __main__ as alignment
from dsv2_jax.hf import __main__ as hf
from dsv2_jax.plan import __main__ as plan
from dsv2_jax.serve import __main__ as serve
from pallas_kernels import cost
from pallas_kernels.chips import CHIPS

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "Makefile", "Dockerfile", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
PAGES.append("docs/jobset.yaml")
FOLDERS = "dsv2_jax|pallas_kernels|configs|benchmarks|tests|scripts|docs"
NAMED = (
    rf"(?<![\w/.$~*-])(?:(?:{FOLDERS})/[\w./*-]*\w|(?:train|eval)\.py|requirements[\w-]*\.txt|Makefile|Dockerfile)\b"
)
# `python train.py`, `$(PY) -m dsv2_jax.hf`, `dsv2-train` after any launcher, up to the end of the shell's command.
COMMAND = re.compile(
    r"(?:(?:python3?|\$\(PY\)) (?P<file>-m \w+\.\w+|(?:benchmarks/|tests/)?\w+\.py)"
    r"|(?:^|exec |`|restart |/bin/)dsv2-(?P<script>[a-z]+))(?P<rest>(?: (?![>|&]|2>)[^\n`'&>]+)?)",
    re.MULTILINE,
)
DATACLASSES = {
    "eval": evaluation.Evaluate,
    "generate": generate.Generate,
    "serve": serve.Serve,
    "align": alignment.Align,
    "alignment": alignment.Align,
    "hf export": hf.Export,
    "hf import": hf.Import,
    "plan claims": plan.Claims,
}


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def missing_paths(text: str) -> list[str]:
    """Paths of the tree that a page names and that do not exist; a * matches any name."""
    bare = {name for name in re.findall(r"`(\w+\.py)`", text) if not list(ROOT.glob(f"*/**/{name}"))}
    named = set(re.findall(NAMED, text))
    return sorted({name for name in named if not glob.glob(name, root_dir=ROOT)} | (bare - named))


def commands(text: str) -> list[tuple[str, list[str]]]:
    """(name, arguments) of every command of ours in a page: `train`, `hf`, `benchmarks/engine.py`, `pytest`.

    Of a synopsis the brackets go, all alternatives stay, and a letter or a shell's variable becomes 1.
    """
    found = []
    for match in COMMAND.finditer(re.sub(r"\s*\\\n\s*", " ", text)):
        rest = re.split(r" {2,}| #", match["rest"].replace("[--section.field VALUE ...]", ""))[0]
        rest = re.sub(r"(\[[^]|]*) \| ", r"\1 ", rest).split(" | ")[0]  # alternatives, and what a pipe leads to
        rest = re.sub(r"\$\(\w+\)|\$\w+|\b[A-Z]\b", "1", rest)
        rest = re.sub(r"[\[\]]", " ", rest if rest.count('"') % 2 == 0 else rest.replace('"', ""))
        name = re.sub(r"^(?:-m (?:dsv2_jax\.)?)?(\w+)(?:\.py)?$", r"\1", match["script"] or match["file"])
        found.append((name, shlex.split(rest)))
    return found


def parse(name: str, arguments: list[str]) -> None:
    """Reads a command's arguments with its own parser, which ends the process at a mistake."""
    known = name in (*DATACLASSES, "train", "hf", "plan", "-m pallas_kernels.cost") or (ROOT / name).is_file()
    assert known, name
    if not arguments or arguments == ["--help"]:  # a page may name a command alone
        return
    if name in ("hf", "plan") and f"{name} {arguments[0]}" in DATACLASSES:
        name, arguments = f"{name} {arguments[0]}", arguments[1:]
    if name in DATACLASSES:
        cli.parse(DATACLASSES[name], arguments)
    elif name == "train":
        preset, *flags = ["tiny" if word == "PRESET" else word for word in arguments]
        assert preset in PRESETS, preset
        if flags != ["--help"]:
            cli.parse(PRESETS[preset](), flags)
    elif name == "plan":
        preset, *flags = ["v2" if word == "PRESET" else word for word in arguments]
        plan._parsed(preset, flags)
    elif name == "-m pallas_kernels.cost":
        with unittest.mock.patch.object(sys, "argv", [name, *arguments]):
            options = cost._parsed()
        assert options.shape in cost.OPS[options.op].shapes and options.chip in CHIPS
    elif name.startswith("benchmarks/"):
        own = re.findall(r"^    (\w+): ", text_of(name), re.MULTILINE)
        flags = [word.removeprefix("--").replace("-", "_") for word in arguments if word.startswith("--")]
        assert set(flags) <= set(own), flags
    else:  # no page shows a flag of another one
        assert not [word for word in arguments if word.startswith("-")], name


def copied(text: str) -> list[list[str]]:
    """What each recipe takes to another machine: the sources of a line of scp, and of all COPY lines of a page."""
    joined = text.replace("\\\n", " ")
    by_scp = [words.split() for words in re.findall(r" scp (.*?) \w+:", joined)]
    by_copy = [line.split()[:-1] for line in re.findall(r"^COPY (?!--from)(.*)", joined, re.MULTILINE)]
    recipes = [*by_scp, [word for words in by_copy for word in words]]
    return [kept for words in recipes if (kept := [word for word in words if not word.startswith("-")])]


def left_behind(sources: list[str]) -> set[str]:
    """Packages and modules of the tree that the Python files among the sources import, and that are not among them."""
    here = {path.name.removesuffix(".py") for path in ROOT.iterdir() if path.is_dir() or path.suffix == ".py"}
    if "." in sources:
        return set()
    files = [file for name in sources if (path := ROOT / name).exists() for file in [path, *path.rglob("*.py")]]
    imported = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if file.suffix == ".py" else ():
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").split(".")[0])
    return (imported & here) - {name.removesuffix(".py") for name in sources}


@pytest.mark.parametrize("page", PAGES)
def test_paths_are_there(page):
    assert missing_paths(text_of(page)) == []


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse(page, capsys):
    for name, arguments in commands(text_of(page)):
        try:
            parse(name, arguments)
        except SystemExit as end:
            assert end.code == 0, f"{name} {shlex.join(arguments)}: {capsys.readouterr().err}"


def test_commands_are_found():
    found = {page: [name for name, _ in commands(text_of(page))] for page in PAGES}
    for page in "README.md", "docs/start.md":
        assert {"train", "eval", "generate", "serve", "hf", "plan"} <= set(found[page])
    assert found["docs/pods.md"].count("train") >= 5 and "plan" in found["docs/planning.md"]
    assert {"train", "eval", "generate", "hf", "alignment"} <= set(found["Makefile"])


@pytest.mark.parametrize("page", PAGES)
def test_what_is_copied_to_a_machine_is_enough(page):
    """A recipe takes a wheel, or every folder that what it takes imports."""
    assert [(sources, left_behind(sources)) for sources in copied(text_of(page)) if left_behind(sources)] == []


def test_the_pods_recipes_take_the_wheel_and_what_restarts_it():
    assert copied(text_of("docs/pods.md")) == [["dist/*.whl", "scripts/restart"]] * 2
    assert copied(text_of("Dockerfile")) == [[".", "requirements.txt"]]


def test_scripts_named_are_those_of_the_wheel():
    """In the pages, the Dockerfile and the manifest, wherever a command can be."""
    scripts = set(tomllib.loads(text_of("pyproject.toml"))["project"]["scripts"])
    for page in PAGES:
        named = re.findall(r"""(?:^\s*|exec |restart |/bin/|\["?|`)(dsv2-[a-z]+)\b""", text_of(page), re.MULTILINE)
        assert set(named) <= scripts, page
        assert named or page not in ("docs/pods.md", "Dockerfile", "docs/jobset.yaml")


def test_targets_of_make_that_are_named_are_there():
    targets = set(re.findall(r"^(\w+):", text_of("Makefile"), re.MULTILINE))
    for page in PAGES:
        assert set(re.findall(r"^ *make (\w+)|`make (\w+)`", text_of(page), re.MULTILINE)) <= {
            pair for target in targets for pair in ((target, ""), ("", target))
        }, page


# What docs/pods.md said before there was a wheel.
WITHOUT_A_WHEEL = """
gcloud compute tpus tpu-vm scp --recurse dsv2_jax configs scripts train.py eval.py requirements.txt dsv2: --zone=$ZONE
gcloud compute tpus tpu-vm scp --recurse dsv2_jax configs scripts train.py requirements.txt dsv2: \\
    --worker=all --project=$PROJECT --zone=$ZONE
FROM python:3.12-slim
COPY requirements.txt .
COPY dsv2_jax dsv2_jax
COPY configs configs
COPY train.py eval.py ./
python train.py v2 --mesh.fdsp -1
"""


def test_recipes_that_forget_a_package_are_found(capsys):
    assert [left_behind(sources) for sources in copied(WITHOUT_A_WHEEL)] == [{"pallas_kernels"}] * 3
    with pytest.raises(SystemExit) as end:
        parse(*commands(WITHOUT_A_WHEEL)[0])
    assert end.value.code == 2 and "did you mean --mesh.fsdp?" in capsys.readouterr().err
    assert missing_paths("see `scripts/start` and docs/pod.md") == ["docs/pod.md", "scripts/start"]
