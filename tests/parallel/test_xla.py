"""The compiler's options: left out for a libtpu that may not know them, taken by the installed one, by all commands."""

import importlib.metadata
import os
import subprocess
import sys

import jax
import pytest

from dsv2_jax import eval as evaluation
from dsv2_jax import generate, loading, train
from dsv2_jax.parallel import xla
from dsv2_jax.serve import __main__ as serve_command

COMPILE = """
import sys
from dsv2_jax.parallel import xla
xla.choose()
import jax, jax.numpy as jnp
from jax.experimental import topologies
device = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices[0]
x = jax.ShapeDtypeStruct((128, 128), jnp.bfloat16, sharding=jax.sharding.SingleDeviceSharding(device))
jax.jit(lambda x: x @ x).lower(x).compile(xla.options())
print("compiled with", len(xla.options()))
"""


def installed(monkeypatch, version: str | None) -> None:
    """As if this libtpu were installed, on a machine that may have a TPU."""

    def of(name):
        assert name == "libtpu"
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(xla.importlib.metadata, "version", of)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--mine=1")


@pytest.mark.parametrize("version", ["0.0.42", "0.0.42.1", "0.0.50.1", "0.0.52", "0.0.52.dev20260701+nightly"])
def test_versions_that_take_them(monkeypatch, capfd, version):
    installed(monkeypatch, version)
    xla.choose()
    flags = os.environ["LIBTPU_INIT_ARGS"].split()
    assert len(flags) == len(xla.OPTIONS) + 1
    assert "--xla_tpu_enable_all_gather_offload_tracing=true" in flags
    assert "--xla_tpu_offload_gather_to_sparsecore=false" in flags
    assert flags[-1] == "--mine=1"  # the last one counts
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("version", ["0.0.41", "0.0.53", "0.0.53.dev20260901+nightly", "0.1", "1.0.0"])
def test_other_versions_run_without_and_say_so(monkeypatch, capfd, version):
    installed(monkeypatch, version)
    xla.choose()
    assert os.environ["LIBTPU_INIT_ARGS"] == "--mine=1"
    told = capfd.readouterr().err
    assert told.count("\n") == 1
    assert told.startswith("warning: left out 12 compiler options untested with libtpu ")


def test_an_option_has_a_range_of_its_own(monkeypatch):
    monkeypatch.setattr(xla, "OPTIONS", {"old": xla.Option(True, before=(0, 0, 50)), "new": xla.Option(False)})
    installed(monkeypatch, "0.0.51")
    assert xla.options() == {"new": False}
    assert xla.left_out() == "left out 1 compiler option untested with libtpu 0.0.51"


def test_a_library_elsewhere_has_no_known_version(monkeypatch, capfd):
    installed(monkeypatch, "0.0.52")
    monkeypatch.setenv("TPU_LIBRARY_PATH", "/usr/lib/libtpu.so")
    xla.choose()
    assert os.environ["LIBTPU_INIT_ARGS"] == "--mine=1"
    assert "libtpu of unknown version" in capfd.readouterr().err


@pytest.mark.parametrize(("version", "platforms"), [(None, ""), ("9.9", "cpu")])
def test_nothing_is_said_where_there_is_no_tpu(monkeypatch, capfd, version, platforms):
    installed(monkeypatch, version)
    if platforms:
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
    xla.choose()
    assert os.environ["LIBTPU_INIT_ARGS"] == "--mine=1"
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("main", "argv"),
    [
        (train.main, ["tiny", "--workdir", "run"]),
        (evaluation.main, ["--checkpoint", "run"]),
        (generate.main, ["--checkpoint", "run", "--prompt", "a"]),
        (serve_command.main, ["--checkpoint", "run"]),
    ],
    ids=["train", "eval", "generate", "serve"],
)
def test_commands_choose_before_jax_meets_its_devices(monkeypatch, tmp_path, main, argv):
    class ChosenError(Exception):
        pass

    def chosen():
        raise ChosenError

    def too_early(*_):
        raise AssertionError("JAX looked for devices first")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["command", *argv])
    monkeypatch.setattr(xla, "choose", chosen)
    for module, name in (jax, "devices"), (jax, "default_backend"), (jax, "process_count"), (loading, "load"):
        monkeypatch.setattr(module, name, too_early)
    with pytest.raises(ChosenError):
        main()


@pytest.mark.tpu
def test_the_installed_libtpu_takes_all():
    def run(arguments: str) -> subprocess.CompletedProcess:
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": arguments, "PYTHONPATH": "."}
        command = [sys.executable, "-c", COMPILE]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    done = run("")
    assert done.stdout == f"compiled with {len(xla.OPTIONS)}\n", done.stderr[-2000:]
    assert run("--xla_tpu_no_such_option=true").returncode != 0  # what the ranges are for
