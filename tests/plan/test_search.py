"""The search over layouts, with a compiler that is played, and the page with pictures."""

import dataclasses
import xml.etree.ElementTree as ElementTree

import pytest

from configs import layouts
from dsv2_jax.config import Mesh
from dsv2_jax.plan import page, search
from dsv2_jax.plan.compile import Topology, laid_out
from dsv2_jax.plan.estimate import Memory, Time, Traffic, estimate
from dsv2_jax.plan.program import Program
from dsv2_jax.plan.timeline import Event, Loop

SLICE = Topology("v5p:2x2x4")
LITE = layouts.on_topology("v2_lite", SLICE.name)


def planned(config, topology, step=1.0, fits=True):
    program = Program(
        fits=fits,
        used=30 * 2**30,
        limit=0,
        parameters=2**30,
        optimizer=2**31,
        cache=0,
        batch=0,
        gradients=2**30,
        coords=(),
        seconds=0,
        host_bytes=0,
    )
    e = estimate(laid_out(config, topology), topology, program, "")
    time = Time(step=step, xla=step, unpriced=0, kernels=0, exposed=step / 10, copies=0, at_peak=step)
    return dataclasses.replace(e, fits=fits, time=time if fits else None)


def test_candidates_are_all_the_meshes_that_the_config_allows():
    found = {tuple(c.mesh.sizes().values()) for c in search.candidates(LITE, SLICE)}
    assert all(
        Mesh(**dict(zip(LITE.mesh.sizes(), sizes, strict=True))).size(*LITE.mesh.sizes()) == 16 for sizes in found
    )
    assert (1, 1, 4, 4, 1, 1) in found and (1, 1, 16, 1, 1, 1) in found and (1, 1, 1, 1, 1, 16) in found
    assert (1, 1, 1, 1, 16, 1) in found


def test_arithmetic_prefers_what_compiling_showed_to_be_better():
    """Tensor parallelism over 16 chips moves more than experts that stay where they are."""

    def of(**sizes):
        return search.guess(dataclasses.replace(LITE, mesh=Mesh(**sizes)), SLICE)

    assert of(fsdp=4, expert=4).traffic < of(fsdp=16).traffic < of(fsdp=1, tensor=16).traffic
    assert of(fsdp=16).memory == pytest.approx(of(fsdp=4, expert=4).memory, rel=0.1)


def test_the_fastest_that_fits_wins():
    steps = iter([3.0, 1.0, 2.0, 0.5])
    tried = []

    def plan(config, topology):
        step = next(steps)
        tried.append(config.mesh.sizes())
        return planned(config, topology, step, fits=step != 0.5)

    results = search.search(LITE, SLICE, plan)
    assert [e.time.step if e.time else None for e in results] == [1.0, 2.0, 3.0, None]
    told = search.show(results)
    assert "does not fit" in told
    winner = " ".join(f"--mesh.{axis} {n}" for axis, n in tried[1].items() if n > 1)
    assert told.splitlines()[-1].startswith(f"best: {winner} --compute.remat")


def test_the_page_is_whole_and_loads_nothing():
    events = (Event("core", "fusion.1 a<b", 0.0, 0.001), Event("x y", "all-gather-start", 0.0002, 0.0012))
    loop = Loop("while.1", "model/transformer.py:1", 26, 0.0015, 26, events)
    traffic = Traffic(kind="all-gather", axes="x y", count=1, wire=2.0**30, busy=0.1, exposed=0.01)
    e = dataclasses.replace(planned(LITE, SLICE), loops=(loop, loop), traffic=(traffic,))
    e = dataclasses.replace(e, memory=Memory(**{f.name: 2**30 for f in dataclasses.fields(Memory)}))
    text = page.page("v2_lite", e)
    assert "http" not in text and "<script" not in text
    drawings = text.split("<svg")[1:]
    assert len(drawings) == 4
    for drawing in drawings:
        ElementTree.fromstring("<svg" + drawing.split("</svg>")[0] + "</svg>")
    assert "a&lt;b" in text
