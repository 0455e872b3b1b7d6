"""Runs a Dockerfile's steps where there is no Docker: python tests/dockerfile.py FOLDER [DOCKERFILE].

Every stage is a folder with a virtual environment as its Python, and a path in the image is a path in that folder. The
steps come from the Dockerfile and its .dockerignore. A step that cannot be run this way raises an error and is never
skipped. Not from an image: the libraries and programs of this system, and its Python of the version that FROM names.
"""

import argparse
import dataclasses
import glob
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

_SETTINGS = re.compile(r"PIP_|(HTTPS?|NO|ALL)_PROXY$|SSL_CERT_|REQUESTS_CA_BUNDLE$", re.IGNORECASE)  # that pip goes by


@dataclasses.dataclass
class Image:
    """What the steps of a stage have made so far."""

    root: Path  # of its file system
    work: str = "/"  # its working directory
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    command: list[str] = dataclasses.field(default_factory=list)  # of CMD

    def path(self, name: str) -> Path:
        """The path here of a path in the image, which is relative to its working directory or absolute."""
        return self.root / os.path.normpath(os.path.join(self.work, name)).lstrip("/")

    def run(self, command: list[str], **options) -> subprocess.CompletedProcess[str]:
        """Runs a command in the image, its output as text in the result. Options are those of subprocess.run."""
        return subprocess.run(command, **self._place(), capture_output=True, text=True, check=False, **options)

    def start(self, command: list[str], **options) -> subprocess.Popen[str]:
        """Starts a command in the image."""
        return subprocess.Popen(command, **self._place(), text=True, **options)

    def _place(self) -> dict:
        own = {"PATH": f"{self.root / 'venv' / 'bin'}:/usr/local/bin:/usr/bin:/bin", "HOME": str(self.path("/root"))}
        kept = {name: value for name, value in os.environ.items() if _SETTINGS.match(name)}
        config = Path.home() / ".config" / "pip" / "pip.conf"
        if config.exists():
            kept.setdefault("PIP_CONFIG_FILE", str(config))
        return {"cwd": self.path("."), "env": {**kept, **own, **self.environment}}


def steps(text: str) -> list[tuple[str, str]]:
    """(instruction, the rest) of every step, continued lines joined, comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines)).splitlines()
    return [(word.upper(), rest.strip()) for word, _, rest in (line.strip().partition(" ") for line in joined) if word]


def build(dockerfile: Path, folder: Path, *, python: str = "", libraries: str = "", environment=None) -> Image:
    """Runs all steps in a new folder, with the Dockerfile's own folder as the context, and returns the last image.

    python: the interpreter of all stages, in place of the one that FROM names. libraries: a folder of packages that
    every stage finds in addition to its own, such as pip. environment: more variables for every RUN. Raises ValueError
    for a step that cannot be run here, FileNotFoundError for a COPY of a missing file, RuntimeError for a RUN that
    fails.
    """
    folder.mkdir()
    stages: dict[str, Image] = {}
    image = None
    for word, rest in steps(dockerfile.read_text(encoding="utf-8")):
        if word == "FROM":
            version, name = _base(rest)
            image = Image(folder / str(len(stages)), environment=dict(environment or {}))
            stages[name or str(len(stages))] = image
            _make(image, python or _python(version), libraries)
        elif image is None:
            raise ValueError(f"{word} stands before FROM")
        elif word == "ENV":
            image.environment |= dict(pair.split("=", 1) for pair in shlex.split(rest))
        elif word == "WORKDIR":
            image.work = os.path.normpath(os.path.join(image.work, rest))
            image.path(".").mkdir(parents=True, exist_ok=True)
        elif word == "COPY":
            _copy(rest, image, stages, dockerfile.parent)
        elif word == "RUN":
            if re.search(r"""(?<![\w.$:/*-])/\w""", rest):
                raise ValueError(f"RUN {rest}: an absolute path means this machine's own here; use one under WORKDIR")
            ended = image.run(["sh", "-c", rest])
            if ended.returncode:
                raise RuntimeError(f"RUN {rest}: exit code {ended.returncode}\n{ended.stdout}{ended.stderr}")
        elif word == "CMD":
            image.command = _exec_form(rest)
        else:
            raise ValueError(f"{word} {rest}: there is no way to run this without Docker")
    if image is None:
        raise ValueError(f"{dockerfile} has no FROM")
    return image


def ignored(path: str, patterns: list[str]) -> bool:
    """Whether a .dockerignore leaves out a path: the last pattern that the path or a parent of it matches decides."""
    parts = path.split("/")
    heads = ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]
    out = False
    for pattern in patterns:
        plain = re.escape(pattern.removeprefix("!").strip("/"))
        regex = plain.replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*")
        if any(re.fullmatch(regex, head) for head in heads):
            out = not pattern.startswith("!")
    return out


def _base(rest: str) -> tuple[str, str]:
    found = re.fullmatch(r"python:(3\.\d+)-slim(?: AS (\w+))?", rest, re.IGNORECASE)
    if not found:
        raise ValueError(f"FROM {rest}: only python:3.X-slim has a virtual environment for its likeness")
    return found[1], found[2] or ""


def _python(version: str) -> str:
    """An interpreter of this version that can make virtual environments."""
    builds = sorted(glob.glob(os.path.expanduser(f"~/.pyenv/versions/{version}.*/bin/python")))
    for candidate in (f"python{version}", *builds):
        try:
            subprocess.run([candidate, "-c", "import ensurepip, venv"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            continue
        return candidate
    raise ValueError(f"there is no Python {version} on this machine")


def _make(image: Image, python: str, libraries: str) -> None:
    image.path("/root").mkdir(parents=True)
    venv = image.root / "venv"
    subprocess.run([python, "-m", "venv", *["--without-pip"] * bool(libraries), venv], check=True)
    if libraries:
        (packages,) = venv.glob("lib/python*/site-packages")
        (packages / "libraries.pth").write_text(libraries)
        (venv / "bin" / "pip").write_text('#!/bin/sh\nexec python -m pip "$@"\n')
        (venv / "bin" / "pip").chmod(0o755)


def _copy(rest: str, image: Image, stages: dict[str, Image], context: Path) -> None:
    words = shlex.split(rest)
    stage = stages[words.pop(0).removeprefix("--from=")] if words[0].startswith("--from=") else None
    *sources, target = words
    there = image.path(target)
    into_folder = target.endswith(("/", ".")) or len(sources) > 1
    for name in sources:
        source = stage.path(name) if stage else context / name
        hidden = stage is None and name != "." and ignored(name, _patterns(context))
        if hidden or not source.exists():
            raise FileNotFoundError(f"COPY {rest}: there is no {name}" + ", by .dockerignore" * hidden)
        if source.is_file():
            place = there / source.name if into_folder else there
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, place)
        else:
            leave_out = None if stage else _leaves_out(context)
            shutil.copytree(source, there, symlinks=True, dirs_exist_ok=True, ignore=leave_out)


def _patterns(context: Path) -> list[str]:
    file = context / ".dockerignore"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def _leaves_out(context: Path):
    patterns = _patterns(context)

    def leave_out(folder: str, names: list[str]) -> list[str]:
        inside = Path(folder).relative_to(context)
        return [name for name in names if ignored((inside / name).as_posix(), patterns)]

    return leave_out


def _exec_form(rest: str) -> list[str]:
    try:
        command = json.loads(rest)
    except json.JSONDecodeError:
        raise ValueError(f"CMD {rest}: without a list a shell runs it, which keeps signals to itself") from None
    return command


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a new folder for the stages")
    parser.add_argument("dockerfile", type=Path, nargs="?", default=Path(__file__).parent.parent / "Dockerfile")
    given = parser.parse_args()
    built = build(given.dockerfile.resolve(), given.folder.resolve())
    done = built.run(built.command)
    print(f"image       {built.root}\ncommand     {shlex.join(built.command)}\n{done.stdout}{done.stderr}", end="")
    sys.exit(done.returncode)
