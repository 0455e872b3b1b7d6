"""README and docs/ against the code: tree, the paper's table, presets' figures, links, settings and meshes shown."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest

from configs import PRESETS
from dsv2_jax import cli, parameters
from dsv2_jax.config import Config
from dsv2_jax.parallel import sharding

ROOT = Path(__file__).parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
README, PODS, TRAINING = PAGES["README.md"], PAGES["docs/pods.md"], PAGES["docs/training.md"]
PODS_CHIPS = {"tiny": 8, "nano": 8, "v2": 256}  # number of chips on which the page runs its commands


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


def tree_paths() -> list[str]:
    """The paths of architecture.md's tree: one name per line, two spaces per level, folders end in a slash."""
    drawn = re.search(r"## The tree\n\n```\n(.*?)```", PAGES["docs/architecture.md"], re.DOTALL)
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
        for folder in ("dsv2_jax", "pallas_kernels", "configs", "benchmarks", "scripts")
        for path in (ROOT / folder).rglob("*.py")
        if path.stat().st_size  # an empty __init__.py says nothing
    }
    assert {path for path in listed if path.endswith(".py") and "/" in path} == there


def test_the_presets_figures():
    rows = re.findall(r"^\| `(\w+)` \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|", TRAINING, re.MULTILINE)
    configs = {name: preset() for name, preset in PRESETS.items()}
    models = {
        name: config.model for name, config in configs.items() if not config.epochs and not config.grpo.group
    }  # fine-tuning adds no model
    assert {name: tuple(int(figure.replace(",", "")) for figure in figures) for name, *figures in rows} == {
        name: (parameters.count(model), parameters.count_activated(model), model.cache_elements)
        for name, model in models.items()
    }


def definition(path: str, name: str) -> ast.AST | None:
    """The function, class, table or `Class.name` of a file; its module where the name is empty."""
    node: ast.AST | None = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    for part in name.split(".") if name else ():
        body = getattr(node, "body", [])
        node = next((n for n in body if part in (getattr(n, "name", None), assigned(n))), None)
    return node


def assigned(node: ast.AST) -> str | None:
    """The name of an annotated assignment."""
    return node.target.id if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) else None


def citations(text: str) -> set[str]:
    """The places of the paper that a text cites: `eq. 9 to 11` gives `eq. 9`, `eq. 10` and `eq. 11`."""
    joined = re.sub(r"\s+#?\s*", " ", text)
    found = set()
    for kind, listed in re.findall(
        r"(eq\.|section|Table|App\.)s? ([\dA-Z][\d.]*(?:(?:, | and | to )\d[\d.]*)*)", joined
    ):
        parts = re.split(r"(, | and | to )", listed)
        places = [part.rstrip(".") for part in parts[::2]]
        for joint, first, last in zip(parts[1::2], places, places[1:], strict=False):
            if joint == " to ":
                places += [str(n) for n in range(int(first), int(last))]
        found |= {f"{kind} {place}" for place in places}
    return found


PAPER = re.findall(
    r"^\| ([^|]+) \| [^|]+ \| [^|]+ \| `([\w/]+\.py)(?::([\w.]+))?` \|$", PAGES["docs/paper.md"], re.MULTILINE
)


@pytest.mark.parametrize(("places", "path", "name"), PAPER, ids=[f"{places}-{name}" for places, _, name in PAPER])
def test_the_code_cites_what_the_papers_table_says_of_it(places, path, name):
    """An equation is cited in the object's own source; a section there, or in the first lines of its file."""
    assert (ROOT / path).is_file()
    source = (ROOT / path).read_text(encoding="utf-8")
    node = definition(path, name)
    assert node is not None, f"{path} has no {name}"
    own = source if isinstance(node, ast.Module) else ast.get_source_segment(source, node)
    of_file = {place for place in citations(ast.get_docstring(ast.parse(source)) or "") if not place.startswith("eq.")}
    assert citations(places) and citations(places) <= citations(own or "") | of_file


def test_the_papers_table_has_every_equation():
    rows = PAGES["docs/paper.md"].count("| `dsv2_jax/") + PAGES["docs/paper.md"].count("| `configs/")
    assert len(PAPER) == rows
    cited = set().union(*(citations(places) for places, _, _ in PAPER))
    assert {f"eq. {number}" for number in range(9, 35)} <= cited
    assert citations("(section 2.2.3, eq. 23 to 25), App. D.1; eq. 28 and 31") == {
        *("section 2.2.3", "App. D.1"),
        *("eq. 23", "eq. 24", "eq. 25", "eq. 28", "eq. 31"),
    }


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def test_every_page_of_the_website_is_in_its_navigation():
    shown = re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(f"docs/{name}" for name in shown) == sorted(set(PAGES) - {"README.md"})


def pods_commands() -> list[tuple[str, list[str]]]:
    """(preset, flags) of every call of train.py in docs/pods.md, by either name; variables of the shell become 1."""
    text = re.sub(r" *\\?\n +(?=--)", " ", PODS)
    found = re.findall(r"(?:train\.py|dsv2-train) (\w+) (?=--)((?:[^\n'\"&>|`]|\\\n)+)", text.replace("\\\n", " "))
    return [(preset, re.sub(r"\$\w+", "1", flags).split()) for preset, flags in found]


def test_commands_for_pods_fit_their_chips():
    """Every call parses completely, and its mesh fits the chips that the page names."""
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
    sections = "model|data|batch|optimizer|compute|cadence|grpo"
    shown = re.findall(rf"--(?:{sections})\.[\w.-]*\w", "\n".join(PAGES.values()))
    shown = ["--" + flag.removeprefix("--").replace("-", "_") for flag in shown]
    assert len(shown) > 30
    assert [flag for flag in shown if flag not in known] == []
