"""A hook of mkdocs: adds an API page for each package, made of the docstrings of its modules."""

from pathlib import Path

from mkdocs.structure.files import File

_ROOT = Path(__file__).resolve().parent.parent
_LEFT_OUT = ("__init__", "__main__", "presets")  # presets is a link to configs


def names():
    """Packages and top-level modules, in the order of the navigation."""
    ours = sorted(path.stem for path in (_ROOT / "dsv2_jax").iterdir() if path.suffix == ".py" or _is_package(path))
    return ["configs", *(f"dsv2_jax.{name}" for name in ours if name not in _LEFT_OUT), "pallas_kernels"]


def on_config(config):
    """Lists the pages at the end of the navigation."""
    config.nav.append({"API": [{name: f"api/{name}.md"} for name in names()]})
    return config


def on_files(files, config):
    """Adds a page for each name, which mkdocstrings fills."""
    for name in names():
        files.append(File.generated(config, f"api/{name}.md", content=f"# {name}\n\n::: {name}\n"))
    return files


def _is_package(path):
    return (path / "__init__.py").is_file()
