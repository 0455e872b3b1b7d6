"""What attention, its pages and experts run on, by the setting, the platform and the chip; the devices are mocks."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from configs import models
from dsv2_jax.config import Compute
from dsv2_jax.inference import programs
from dsv2_jax.ops import switch
from pallas_kernels.latent_attention import CachePages, Sequences, latent_attention, latent_decode

KINDS = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "TPU7x": "tpu7x"}  # those with kernels


@pytest.fixture(autouse=True)
def forget_warnings():
    switch._warn_once.cache_clear()


def on(kind: str, platform: str = "tpu"):
    """A context in which programs are traced for devices of this kind."""
    device = AbstractDevice(platform=platform, device_kind=kind, num_cores=1)
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


@pytest.mark.parametrize("kind", KINDS)
def test_chips_with_kernels(kind, capfd):
    with on(kind):
        assert [switch.implementation(Compute(kernels=how)) for how in ("auto", "pallas", "xla")] == [
            "pallas",
            "pallas",
            "xla",
        ]
    assert [switch.implementation(Compute(kernels=how), KINDS[kind]) for how in ("auto", "xla")] == ["pallas", "xla"]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("kind", ["TPU v4", "TPU v3", "TPU v9 ultra"])
def test_other_tpus_take_xla_and_say_so_once(kind, capfd):
    with on(kind):
        assert switch.implementation(Compute()) == switch.implementation(Compute()) == "xla"
        assert switch.implementation(Compute(kernels="xla")) == "xla"
        with pytest.raises(ValueError, match=f"the kernels run on TPUs of v5e, v5p, v6e, tpu7x and not on {kind}"):
            switch.implementation(Compute(kernels="pallas"))
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 1
    assert told[0].startswith(f"warning: there are no kernels for {kind}: ")


def test_cpus_take_the_cpu_loops_in_silence(capfd):
    assert switch.implementation(Compute()) == switch.implementation(Compute(kernels="xla")) == "cpu"
    with pytest.raises(ValueError, match=r"compute\.kernels is pallas, but .* not on cpu: leave it at auto"):
        switch.implementation(Compute(kernels="pallas"))
    assert capfd.readouterr().err == ""


def test_a_gpu_is_warned_of_once(capfd):
    with on("NVIDIA H100", "gpu"):
        assert [switch.implementation(Compute(kernels=how)) for how in ("auto", "xla")] == ["xla", "xla"]
    (told,) = capfd.readouterr().err.splitlines()
    assert told.startswith("warning: this program is untested on gpu devices")


@pytest.mark.parametrize(
    ("kind", "how", "kernel"),
    [("TPU v5", "auto", True), ("TPU v5", "xla", False), ("TPU v4", "auto", False), ("TPU v9 ultra", "auto", False)],
)
def test_pages_are_read_by_what_was_chosen(kind, how, kernel):
    """The program of a call of the engine holds the decode kernel there, and nowhere else."""
    model = dataclasses.replace(models.tiny(), num_hidden_layers=1, first_k_dense_replace=1)
    compute = Compute(dtype="bfloat16", kernels=how)
    setup = programs.Setup(model=model, compute=compute, form="compute", weights="compute", devices=None)
    with on(kind):
        prepared, pages = programs.described(setup, 5, 128)
        traced = programs.forward.trace(prepared, pages, programs.blank(1, 4, 0, 0, 2), setup=setup)
    assert ("latent_decode" in str(traced.jaxpr)) == kernel


def test_kernels_that_are_missing_raise():
    q_THC, pages = jnp.zeros((1, 2, 8)), jnp.zeros((2, 128, 8))
    one = jnp.ones(1, jnp.int32)
    with on("TPU v4"):
        with pytest.raises(ValueError, match=r"the kernels run on TPU v5e, v5p, v6e, tpu7x"):
            cache, sequences = CachePages(pages, pages.swapaxes(1, 2)), Sequences(one[:, None], one)
            latent_decode((q_THC, q_THC), cache, sequences, scale=1.0)
        x, segments = jnp.zeros((1, 2, 4, 8)), jnp.ones((1, 4), jnp.int32)
        with pytest.raises(ValueError, match=r"the kernels run on TPU v5e, v5p, v6e, tpu7x"):
            latent_attention((x, None), (x, None), x, (segments, segments), scale=1.0)
