"""The search over layouts with a fake compiler, and the HTML page."""

import dataclasses
import xml.etree.ElementTree as ElementTree

import pytest

from configs import layouts
from dsv2_jax.config import Mesh
from dsv2_jax.plan import fit, report
from dsv2_jax.plan.compile import Topology, laid_out
from dsv2_jax.plan.estimate import Memory, Time, Traffic, estimate
from dsv2_jax.plan.program import CompiledProgram
from dsv2_jax.plan.timeline import Loop, TimelineEvent

SLICE = Topology("v5p:2x2x4")
LITE = layouts.on_topology("v2_lite", SLICE.name)


def planned(config, topology, step=1.0, fits=True):
    program = CompiledProgram(
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
    time = Time(step=step, xla=step, unestimated=0, kernels=0, exposed=step / 10, copies=0, at_peak=step)
    return dataclasses.replace(e, fits=fits, time=time if fits else None)


def test_candidates_are_all_valid_meshes():
    found = {tuple(c.mesh.sizes().values()) for c in fit.candidates(LITE, SLICE)}
    assert all(
        Mesh(**dict(zip(LITE.mesh.sizes(), sizes, strict=True))).size(*LITE.mesh.sizes()) == 16 for sizes in found
    )
    assert (1, 1, 4, 4, 1, 1) in found and (1, 1, 16, 1, 1, 1) in found and (1, 1, 1, 1, 1, 16) in found
    assert (1, 1, 1, 1, 16, 1) in found


def test_arithmetic_ranks_traffic_as_compiled_programs_do():
    """Tensor parallelism over 16 chips sends more than FSDP, and FSDP more than expert parallelism."""

    def guess(**sizes):
        return fit.guess(dataclasses.replace(LITE, mesh=Mesh(**sizes)), SLICE)

    assert guess(fsdp=4, expert=4).traffic < guess(fsdp=16).traffic < guess(fsdp=1, tensor=16).traffic
    assert guess(fsdp=16).memory == pytest.approx(guess(fsdp=4, expert=4).memory, rel=0.1)


def test_search_ranks_the_fastest_layout_that_fits_first():
    steps = iter([3.0, 1.0, 2.0, 0.5])
    tried = []

    def plan(config, topology, _):
        step = next(steps)
        tried.append(config.mesh.sizes())
        return planned(config, topology, step, fits=step != 0.5)

    results = fit.search(LITE, SLICE, plan)
    assert [e.time.step if e.time else None for e in results] == [1.0, 2.0, 3.0, None]
    text = report.ranking(results)
    assert "does not fit" in text
    flags = " ".join(f"--mesh.{axis} {n}" for axis, n in tried[1].items() if n > 1)
    assert text.splitlines()[-1].startswith(f"best: {flags} --compute.remat")


def test_page_is_valid_and_self_contained():
    events = (
        TimelineEvent("core", "fusion.1 a<b", 0.0, 0.001),
        TimelineEvent("x y", "all-gather-start", 0.0002, 0.0012),
    )
    loop = Loop("while.1", "model/transformer.py:1", 26, 0.0015, 26, events)
    traffic = Traffic(kind="all-gather", axes="x y", count=1, wire=2.0**30, busy=0.1, exposed=0.01)
    e = dataclasses.replace(planned(LITE, SLICE), loops=(loop, loop), traffic=(traffic,))
    e = dataclasses.replace(e, memory=Memory(**{f.name: 2**30 for f in dataclasses.fields(Memory)}))
    text = report.page("v2_lite", e)
    assert "http" not in text and "<script" not in text
    drawings = text.split("<svg")[1:]
    assert len(drawings) == 4
    for drawing in drawings:
        ElementTree.fromstring("<svg" + drawing.split("</svg>")[0] + "</svg>")
    assert "a&lt;b" in text
