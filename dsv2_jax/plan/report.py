"""Reports of estimates: tables for the terminal and an HTML page with charts."""

from html import escape

from dsv2_jax.plan.estimate import Estimate
from dsv2_jax.plan.fit import GrpoIteration
from dsv2_jax.plan.timeline import Loop

_GIB = 2**30
_NAMES = {"step": "step", "forward": "forward pass", "decode": "decode step"}
_WIDTH, _ROW = 1000, 26  # pixels
_COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860")
_WAIT, _TRANSFER, _LOOP = "#c44e52", "#55a868", "#b0b0b0"
_STYLE = (
    "body{font:14px sans-serif;max-width:1040px;margin:2em auto}pre{font-size:12px;overflow-x:auto}svg{display:block}"
)


def table(e: Estimate) -> str:
    """The estimate as text."""
    how = f"{e.micro_batches} micro-batch{'es' * (e.micro_batches > 1)}, remat {e.remat}, "
    how += "dropping" if e.dropping else "dropless"
    if e.work == "decode":
        how = f"a cache of {e.memory.cache / _GIB:.2f} GiB per device, one new token each; weights {e.weights}"
    lines = [
        f"{e.topology}: {e.chips} chips, mesh {_mesh(e)}; {e.sequences} sequences of {e.length} in {how}",
        "",
        *_memory(e),
        *(_time(e) if e.time else ["", "does not fit"]),
        "",
        f"compiled in {e.compile_seconds:.0f} s with {e.compile_bytes / _GIB:.1f} GiB of host memory",
        *(f"caveat: {caveat}" for caveat in e.caveats),
    ]
    return "\n".join(lines)


def _mesh(e: Estimate) -> str:
    return " x ".join(f"{axis} {n}" for axis, n in e.mesh.items() if n > 1) or "one device"


def _memory(e: Estimate) -> list[str]:
    m = e.memory
    parts = ("parameters", "optimizer", "gradients", "batch", "cache", "activations")
    if not e.fits:
        return [f"HBM of a device   needs {m.peak / _GIB:.2f} GiB, has {m.size / _GIB:.2f}: does not fit"]
    text = ", ".join(f"{name} {getattr(m, name) / _GIB:.2f}" for name in parts if getattr(m, name))
    return [
        f"HBM of a device   peak {m.peak / _GIB:.2f} GiB of {m.size / _GIB:.0f}, {m.peak / m.size:.0%}",
        f"                  {text}",
    ]


def _time(e: Estimate) -> list[str]:
    assert e.time is not None
    t, name, products = e.time, _NAMES[e.work], 6 if e.work == "step" else 2

    def row(label: str, seconds: float, rest: str = "") -> str:
        return f"  {label:38}{seconds * 1e3:12,.1f} ms {seconds / t.step:6.1%}  {rest}".rstrip()

    lines = [
        "",
        f"time of a {name}, estimated from the compiler's schedule, not measured",
        row(name, t.step, f"{e.tokens_per_second_per_chip:,.0f} tokens/s per chip, {e.mfu:.1%} MFU"),
        row("XLA operations", t.xla),
        row("XLA operations without an estimate", t.unestimated),
        row("Pallas kernels", t.kernels),
        row("waiting for other devices", t.exposed),
        row("waiting for copies into VMEM", t.copies),
        row("XLA + kernels at the MXU's peak", t.at_peak, "for comparison with other estimates"),
        f"  MFU counts {e.flops_per_token / 1e9:.2f} GFLOP/token: {products} per activated parameter, plus attention",
        "",
        f"traffic of a device, {e.wire / _GIB:.2f} GiB on the wire"
        f"{'axes':>12}{'count':>9}{'GiB':>10}{'busy ms':>11}{'exposed ms':>12}",
        *(
            f"  {x.kind:38}{x.axes or '-':>12}{x.count:9,}{x.wire / _GIB:10.2f}{x.busy * 1e3:11.1f}"
            f"{x.exposed * 1e3:12.1f}"
            for x in e.traffic
        ),
        "",
        f"costliest operations, by source line{'ms':>14}{'exposed':>10}{'count':>9}",
        *(f"  {o.source:38}{o.seconds * 1e3:10.1f}{o.exposed * 1e3:10.1f}{o.count:9,}  {o.what}" for o in e.costliest),
    ]
    if e.kernels:
        lines += ["", f"Pallas kernels{'ms':>36}{'at peak':>10}{'of peak':>9}{'count':>9}"]
        lines += [
            f"  {k.name:38}{k.seconds * 1e3:10.1f}{k.at_peak * 1e3:10.1f}{k.efficiency:9.1%}{k.count:9,}"
            for k in e.kernels
        ]
    return lines


def ranking(results: list[Estimate]) -> str:
    """The results of `fit.search` as a table, with the flags of the best."""
    lines = [f"{'mesh':44}{'remat':>10}{'step ms':>11}{'MFU':>8}{'exposed':>9}{'wire GiB':>10}{'peak GiB':>10}"]
    for e in results:
        t = e.time
        figures = f"{t.step * 1e3:11,.1f}{e.mfu:8.1%}{t.exposed / t.step:9.1%}" if t else f"{'does not fit':>28}"
        lines.append(f"{_mesh(e):44}{e.remat:>10}{figures}{e.wire / _GIB:10.2f}{e.memory.peak / _GIB:10.2f}")
    best = results[0]
    flags = " ".join(f"--mesh.{axis} {n}" for axis, n in best.mesh.items() if n > 1)
    return "\n".join([*lines, "", f"best: {flags} --compute.remat {best.remat}"])


def grpo_table(iteration: GrpoIteration) -> str:
    """The memory of a GRPO iteration's phases, then the estimates of its programs, as text."""
    lines = [f"HBM of a device in an iteration of GRPO, GiB of {iteration.size / _GIB:.0f}"]
    for phase in iteration.phases:
        resident = ", ".join(f"{name} {size / _GIB:.2f}" for name, size in phase.resident.items() if size)
        lines.append(f"  {phase.name:18}{phase.peak / _GIB:7.2f}: program {phase.program / _GIB:.2f}, {resident}")
    if iteration.preparing.time:
        seconds, wire = iteration.preparing.time.step, iteration.preparing.wire
        lines.append(f"preparing weights: {seconds:.2f} s, {wire / _GIB:.1f} GiB on the wire per device")
    parts = (("an optimizer step", iteration.updating), ("a step of the sampler", iteration.sampling))
    return "\n".join(lines + [f"\n{name}\n{table(estimate)}" for name, estimate in parts])


def page(name: str, e: Estimate) -> str:
    """The estimate as one self-contained HTML page with charts: memory, a layer's timeline, traffic by axis."""
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(name)} on {escape(e.topology)}</title>",
        f"<style>{_STYLE}</style><h1>{escape(name)} on {escape(e.topology)}</h1>",
        "<p>Estimates from the compiler's schedule, not measurements.</p>",
        f"<h2>Memory of a device</h2>{_memory_chart(e)}",
        *(f"<h2>{escape(_loop_title(loop, i))}</h2>{_loop_chart(loop)}" for i, loop in enumerate(e.loops)),
        f"<h2>Traffic of a device</h2>{_traffic_chart(e)}" if e.traffic else "",
        f"<h2>All figures</h2><pre>{escape(table(e))}</pre></html>",
    ]
    return "\n".join(parts)


def _svg(height: int, body: str) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height}" width="100%" font-size="11" font-family="sans-serif">{body}</svg>'


def _rectangle(x: float, y: float, width: float, height: float, colour: str, title: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.3):.2f}" height="{height}" fill="{colour}">'
        f"<title>{escape(title)}</title></rect>"
    )


def _memory_chart(e: Estimate) -> str:
    m, x, body = e.memory, 0.0, ""
    scale = _WIDTH / max(m.size, m.peak)
    for i, name in enumerate(("parameters", "optimizer", "gradients", "batch", "cache", "activations")):
        size = getattr(m, name)
        body += _rectangle(x, 0, size * scale, 30, _COLOURS[i], f"{name}: {size / _GIB:.2f} GiB")
        body += f'<rect x="{i * 160}" y="42" width="10" height="10" fill="{_COLOURS[i]}"/>'
        body += f'<text x="{i * 160 + 14}" y="51">{name} {size / _GIB:.2f} GiB</text>'
        x += size * scale
    body += (
        f'<line x1="{m.size * scale:.1f}" x2="{m.size * scale:.1f}" y1="0" y2="34" stroke="black" stroke-width="2"/>'
    )
    return _svg(60, body)


def _loop_title(loop: Loop, i: int) -> str:
    direction = "backward" if i else "forward"
    return f"A layer {direction}: {loop.seconds * 1e3:.2f} ms, {loop.iterations} iterations at {loop.source}"


def _loop_chart(loop: Loop) -> str:
    resources = list(dict.fromkeys(["core", *(event.resource for event in loop.events)]))
    body = ""
    for event in loop.events:
        y, start = resources.index(event.resource) * _ROW, max(0.0, event.start)
        colour = _TRANSFER if event.resource != "core" else _COLOURS[_stable_number(event.name) % 2]
        if event.resource == "core" and ("-done" in event.name or event.name.startswith(("all-", "reduce-scatter"))):
            colour = _WAIT
        if event.name.startswith("loop of"):
            colour = _LOOP
        scale = _WIDTH / loop.seconds
        title = f"{event.name}: {(event.end - event.start) * 1e3:.3f} ms"
        body += _rectangle(start * scale, y + 12, (event.end - start) * scale, _ROW - 14, colour, title)
    labels = "".join(f'<text x="0" y="{i * _ROW + 10}">{escape(name)}</text>' for i, name in enumerate(resources))
    return _svg(len(resources) * _ROW + 4, body + labels)


def _stable_number(name: str) -> int:
    """A number that is the same in every run, unlike `hash`."""
    return sum(map(ord, name))


def _traffic_chart(e: Estimate) -> str:
    axes: dict[str, list] = {}
    for x in e.traffic:
        axes.setdefault(x.axes or "-", []).append(x)
    longest, body = max(sum(x.wire for x in rows) for rows in axes.values()) or 1.0, ""
    kinds = list(dict.fromkeys(x.kind for x in e.traffic))
    for i, (axis, rows) in enumerate(axes.items()):
        at = 0.0
        body += f'<text x="0" y="{i * _ROW + 14}">{escape(axis)}</text>'
        for x in rows:
            width = x.wire / longest * (_WIDTH - 80)
            title = f"{x.kind} over {axis}: {x.wire / _GIB:.2f} GiB, exposed {x.exposed * 1e3:.1f} ms"
            body += _rectangle(80 + at, i * _ROW + 3, width, _ROW - 8, _COLOURS[kinds.index(x.kind) % 6], title)
            at += width
    for i, kind in enumerate(kinds):
        y = len(axes) * _ROW + 6
        body += f'<rect x="{i * 160}" y="{y}" width="10" height="10" fill="{_COLOURS[i % 6]}"/>'
        body += f'<text x="{i * 160 + 14}" y="{y + 9}">{escape(kind)}</text>'
    return _svg(len(axes) * _ROW + 24, body)
