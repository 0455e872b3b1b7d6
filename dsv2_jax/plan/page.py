"""An estimate as one HTML page with pictures: memory, a layer forward and backward on its clocks, traffic by axis."""

from html import escape

from dsv2_jax.plan import report
from dsv2_jax.plan.estimate import Estimate
from dsv2_jax.plan.timeline import Loop

_GIB = 2**30
_WIDTH, _LANE = 1000, 26  # pixels
_COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860")
_WAIT, _TRANSFER, _LOOP = "#c44e52", "#55a868", "#b0b0b0"
_STYLE = (
    "body{font:14px sans-serif;max-width:1040px;margin:2em auto}pre{font-size:12px;overflow-x:auto}svg{display:block}"
)


def page(name: str, e: Estimate) -> str:
    """The whole page; it loads nothing."""
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(name)} on {escape(e.topology)}</title>",
        f"<style>{_STYLE}</style><h1>{escape(name)} on {escape(e.topology)}</h1>",
        "<p>Estimates of the compiler's schedule; nothing here was measured.</p>",
        f"<h2>Memory of a device</h2>{_memory(e)}",
        *(f"<h2>{escape(_title(loop, i))}</h2>{_loop(loop)}" for i, loop in enumerate(e.loops)),
        f"<h2>Traffic of a device</h2>{_traffic(e)}" if e.traffic else "",
        f"<h2>All figures</h2><pre>{escape(report.show(e))}</pre></html>",
    ]
    return "\n".join(parts)


def _svg(height: int, body: str) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height}" width="100%" font-size="11" font-family="sans-serif">{body}</svg>'


def _rectangle(x: float, y: float, width: float, height: float, colour: str, title: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.3):.2f}" height="{height}" fill="{colour}">'
        f"<title>{escape(title)}</title></rect>"
    )


def _memory(e: Estimate) -> str:
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


def _title(loop: Loop, i: int) -> str:
    return f"A layer {'backward' if i else 'forward'}: {loop.seconds * 1e3:.2f} ms, {loop.turns} turns at {loop.source}"


def _loop(loop: Loop) -> str:
    lanes = list(dict.fromkeys(["core", *(event.lane for event in loop.events)]))
    body = ""
    for event in loop.events:
        y, start = lanes.index(event.lane) * _LANE, max(0.0, event.start)
        colour = _TRANSFER if event.lane != "core" else _COLOURS[_number(event.name) % 2]
        if event.lane == "core" and ("-done" in event.name or event.name.startswith(("all-", "reduce-scatter"))):
            colour = _WAIT
        if event.name.startswith("loop of"):
            colour = _LOOP
        scale = _WIDTH / loop.seconds
        told = f"{event.name}: {(event.end - event.start) * 1e3:.3f} ms"
        body += _rectangle(start * scale, y + 12, (event.end - start) * scale, _LANE - 14, colour, told)
    labels = "".join(f'<text x="0" y="{i * _LANE + 10}">{escape(lane)}</text>' for i, lane in enumerate(lanes))
    return _svg(len(lanes) * _LANE + 4, body + labels)


def _number(name: str) -> int:
    """A number that stays the same from run to run."""
    return sum(map(ord, name))


def _traffic(e: Estimate) -> str:
    axes: dict[str, list] = {}
    for x in e.traffic:
        axes.setdefault(x.axes or "-", []).append(x)
    longest, body = max(sum(x.wire for x in rows) for rows in axes.values()) or 1.0, ""
    kinds = list(dict.fromkeys(x.kind for x in e.traffic))
    for i, (axis, rows) in enumerate(axes.items()):
        at = 0.0
        body += f'<text x="0" y="{i * _LANE + 14}">{escape(axis)}</text>'
        for x in rows:
            width = x.wire / longest * (_WIDTH - 80)
            told = f"{x.kind} over {axis}: {x.wire / _GIB:.2f} GiB, exposed {x.exposed * 1e3:.1f} ms"
            body += _rectangle(80 + at, i * _LANE + 3, width, _LANE - 8, _COLOURS[kinds.index(x.kind) % 6], told)
            at += width
    for i, kind in enumerate(kinds):
        y = len(axes) * _LANE + 6
        body += f'<rect x="{i * 160}" y="{y}" width="10" height="10" fill="{_COLOURS[i % 6]}"/>'
        body += f'<text x="{i * 160 + 14}" y="{y + 9}">{escape(kind)}</text>'
    return _svg(len(axes) * _LANE + 24, body)
