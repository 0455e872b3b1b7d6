"""The wheel as the Dockerfile makes and installs it: what is in it, and its commands away from the tree.

The image's steps are run without Docker (dockerfile.py) and without a network: its Python finds the libraries of the
environment that the tests run in, and pip installs the wheel alone. `python tests/dockerfile.py FOLDER` runs the same
steps with everything downloaded.
"""

import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
import tomllib
import urllib.request
import zipfile
from pathlib import Path

import dockerfile
import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PACKAGES = ("dsv2_jax", "pallas_kernels")
HERE = {"python": sys.executable, "libraries": sysconfig.get_path("purelib")}
OFFLINE = {"PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_NO_INDEX": "1"}  # pip reads "0" as: no isolation


@pytest.fixture(scope="session")
def image(tmp_path_factory):
    """The image of the Dockerfile, with the libraries of this environment."""
    built = dockerfile.build(
        ROOT / "Dockerfile",
        tmp_path_factory.mktemp("docker") / "stages",
        **HERE,
        environment=OFFLINE,
    )
    built.environment |= {"JAX_PLATFORMS": "cpu"}
    built.environment |= {name: value for name, value in os.environ.items() if name.startswith("JAX_")}
    return built


@pytest.fixture(scope="session")
def wheel(image):
    """The wheel that its first stage made, open."""
    (path,) = image.root.parent.glob("0/src/dist/*.whl")
    with zipfile.ZipFile(path) as opened:
        yield opened


def files_of_the_tree() -> set[str]:
    """Every file of the packages by its name in a wheel: configs/ is dsv2_jax/presets there."""
    found = [path for name in (*PACKAGES, "configs") for path in (ROOT / name).rglob("*") if path.is_file()]
    names = {path.relative_to(ROOT).as_posix() for path in found if "__pycache__" not in path.parts}
    return {re.sub("^configs/", "dsv2_jax/presets/", name) for name in names}


def test_the_wheel_holds_the_packages_and_nothing_else(wheel):
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == files_of_the_tree()
    assert any(name.endswith(".yaml") for name in names)  # data too
    assert {name.split("/")[0] for name in names} == set(PACKAGES)


def test_what_it_depends_on_is_requirements_txt(image):
    (metadata,) = importlib.metadata.distributions(name="dsv2_jax", path=[str(packages(image))])
    stated = {str(r) for r in map(Requirement, metadata.requires or []) if r.marker is None}
    lines = (line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    assert stated == {str(Requirement(line)) for line in lines if line}


def test_libtpu_that_jax_asks_for_is_one_that_the_options_are_known_with():
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["tpu"]
    (known,) = [r.specifier for r in map(Requirement, extra) if r.name == "libtpu"]
    asked = [Requirement(line) for line in importlib.metadata.requires("jax") or [] if line.startswith("libtpu")]
    assert [r.marker.evaluate({"extra": "tpu"}) for r in asked if r.marker] == [True]
    (exact,) = asked[0].specifier  # ==0.0.42.*
    assert known.contains(exact.version.replace("*", "0"))
    assert all(known.contains(found.version) for found in importlib.metadata.distributions(name="libtpu"))


def packages(image: dockerfile.Image) -> Path:
    """The folder that the image's Python has its packages in."""
    (found,) = (image.root / "venv").glob("lib/python*/site-packages")
    return found


def console_commands(image: dockerfile.Image) -> dict[str, str]:
    (metadata,) = importlib.metadata.distributions(name="dsv2_jax", path=[str(packages(image))])
    return {point.name: point.value for point in metadata.entry_points}


def test_every_command_is_there(image):
    commands = console_commands(image)
    modules = {path.parent.name for path in ROOT.glob("dsv2_jax/*/__main__.py")} | {"train", "eval", "generate"}
    assert {name.removeprefix("dsv2-") for name in commands} == modules - {"alignment"} | {"align"}
    load = "import importlib.metadata as m; [p.load() for p in m.distribution('dsv2_jax').entry_points]"
    where = "; import dsv2_jax; print(dsv2_jax.__file__)"
    ended = image.run(["python", "-c", load + where])
    assert ended.returncode == 0, ended.stderr
    assert Path(ended.stdout.strip()).is_relative_to(packages(image))
    assert all((image.root / "venv" / "bin" / name).is_file() for name in commands)


def test_the_image_says_what_it_can_do(image):
    ended = image.run(image.command)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("usage: dsv2-train PRESET")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("dsv2-train nanoo", "did you mean nano?"),
        ("dsv2-eval --checkpoint nowhere", "no checkpoint in nowhere"),
        ("dsv2-generate --checkpoint nowhere --prompt-ids ids.npy", "--prompt-ids and --out-ids need each other"),
    ],
)
def test_a_mistake_is_one_line_from_an_installed_copy_too(image, command, words):
    ended = image.run(command.split())
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1), ended.stderr
    assert ended.stderr.startswith("error: ") and words in ended.stderr


def test_a_folder_named_configs_in_the_working_directory_is_ignored(image):
    (image.path("configs")).mkdir(exist_ok=True)
    (image.path("configs") / "__init__.py").write_text("raise SystemExit('a stranger')\n")
    ended = image.run(["python", "-m", "dsv2_jax.train", "--help"])
    assert (ended.returncode, ended.stderr) == (0, "")


def listing(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if "__pycache__" not in path.parts}


@pytest.mark.slow
def test_trains_stops_exports_and_serves(image):
    """One step and SIGTERM, which saves; the checkpoint exported; one request served from the export."""
    text = "".join(f"line {i} of a text about nothing\n" for i in range(400))
    image.path("text.txt").write_text(text)
    before = listing(packages(image))
    command = ["dsv2-train", "tiny", "--workdir", "run", "--data.source", "text.txt", "--model.vocab_size", "320"]
    with image.start([*command, "--tokens", "10000000"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        metrics = image.path("run/metrics.jsonl")
        while process.poll() is None and not (metrics.exists() and '"step": 1' in metrics.read_text()):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        said = process.communicate()[0]
    assert process.returncode == 75, said
    ended = image.run(["dsv2-hf", "export", "--checkpoint", "run", "--out", "hf"])
    assert ended.returncode == 0, ended.stderr
    serve = ["dsv2-serve", "--checkpoint", "hf", "--port", "0"]
    with image.start(serve, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        address = re.search(r"http://\S+/v1", process.stdout.readline())
        try:
            assert address
            body = {"model": "hf", "prompt": "line", "max_tokens": 4, "temperature": 0}
            request = urllib.request.Request(
                f"{address[0]}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            answer = json.loads(urllib.request.urlopen(request, timeout=60).read())
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()
    assert answer["usage"]["completion_tokens"] == 4
    assert listing(packages(image)) == before  # corpora and tokenizers are written to the current folder
    assert image.path("data/corpora").is_dir()


TOY = """# a comment
FROM python:3.11-slim AS first
WORKDIR /made
COPY kept/ .
RUN cp a.txt b.txt && \\
    echo $WORD > c.txt

FROM python:3.11-slim
ENV WORD=seen
COPY --from=first /made/ there/
RUN echo "$WORD" > there/d.txt
CMD ["python", "-c", "print(2)"]
"""


def toy(folder: Path, text: str) -> Path:
    (folder / "context" / "kept").mkdir(parents=True)
    (folder / "context" / "kept" / "a.txt").write_text("a")
    (folder / "context" / "kept" / "left.out").write_text("b")
    (folder / "context" / ".dockerignore").write_text("*\n!kept\n**/*.out\n")
    (folder / "context" / "Dockerfile").write_text(text)
    return folder / "context" / "Dockerfile"


def test_steps_are_run_as_they_are_written(tmp_path):
    built = dockerfile.build(toy(tmp_path, TOY), tmp_path / "stages", **HERE)
    assert {path.name: path.read_text() for path in built.path("/there").iterdir()} == {
        "a.txt": "a", "b.txt": "a", "c.txt": "\n", "d.txt": "seen\n"
    }  # fmt: skip
    assert built.run(built.command).stdout == "2\n"


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("COPY nothing .", FileNotFoundError),
        ("COPY Dockerfile .", FileNotFoundError),  # .dockerignore leaves it out
        ("RUN exit 3", RuntimeError),
        ("RUN rm -rf /made", ValueError),
        ("EXPOSE 80", ValueError),
        ("CMD dsv2-train nano", ValueError),
    ],
)
def test_a_step_that_fails_or_cannot_be_run_ends_it(tmp_path, line, error):
    with pytest.raises(error, match=re.escape(line)):
        dockerfile.build(toy(tmp_path, f"FROM python:3.11-slim\n{line}\n"), tmp_path / "stages", **HERE)
