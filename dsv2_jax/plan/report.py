"""An estimate as a table for people."""

from dsv2_jax.plan.estimate import Estimate

_GIB = 2**30
_WHAT = {"step": "step", "forward": "forward pass", "decode": "decode step"}


def show(e: Estimate) -> str:
    """The estimate in lines of text."""
    mesh = " x ".join(f"{axis} {n}" for axis, n in e.mesh.items() if n > 1) or "one device"
    how = f"{e.micro_batches} micro-batch{'es' * (e.micro_batches > 1)}, remat {e.remat}, "
    how += "dropping" if e.dropping else "dropless"
    if e.work == "decode":
        how = f"a cache of {e.memory.cache / _GIB:.2f} GiB a device, a token more for each; weights {e.weights}"
    lines = [
        f"{e.topology}: {e.chips} chips, mesh {mesh}; {e.sequences} sequences of {e.length} in {how}",
        "",
        *_memory(e),
        *(_time(e) if e.time else ["", "does not fit"]),
        "",
        f"compiled in {e.compile_seconds:.0f} s with {e.compile_bytes / _GIB:.1f} GiB of this machine's memory",
        *(f"doubt: {doubt}" for doubt in e.doubts),
    ]
    return "\n".join(lines)


def _memory(e: Estimate) -> list[str]:
    m = e.memory
    parts = ("parameters", "optimizer", "gradients", "batch", "cache", "activations")
    if not e.fits:
        return [f"HBM of a device   needs {m.peak / _GIB:.2f} GiB, has {m.size / _GIB:.2f}: does not fit"]
    told = ", ".join(f"{name} {getattr(m, name) / _GIB:.2f}" for name in parts if getattr(m, name))
    return [
        f"HBM of a device   peak {m.peak / _GIB:.2f} GiB of {m.size / _GIB:.0f}, {m.peak / m.size:.0%}",
        f"                  {told}",
    ]


def _time(e: Estimate) -> list[str]:
    assert e.time is not None
    t, what, products = e.time, _WHAT[e.work], 6 if e.work == "step" else 2

    def row(name: str, seconds: float, rest: str = "") -> str:
        return f"  {name:38}{seconds * 1e3:12,.1f} ms {seconds / t.step:6.1%}  {rest}".rstrip()

    lines = [
        "",
        f"time of a {what}, estimated from the compiler's schedule and never measured",
        row(what, t.step, f"{e.tokens_per_second_per_chip:,.0f} tokens/s per chip, {e.mfu:.1%} MFU"),
        row("XLA's operations", t.xla),
        row("the same without an estimate, roughly", t.unpriced),
        row("Pallas kernels", t.kernels),
        row("waiting for other devices", t.exposed),
        row("waiting for copies into VMEM", t.copies),
        row("XLA + kernels at the MXU's peak", t.at_peak, "without the rest: for comparison with others"),
        f"  MFU counts {e.flops_per_token / 1e9:.2f} GFLOP a token: {products} per active parameter, and attention's",
        "",
        f"traffic of a device, {e.wire / _GIB:.2f} GiB on the wire"
        f"{'over':>12}{'times':>9}{'GiB':>10}{'busy ms':>11}{'exposed ms':>12}",
        *(
            f"  {x.kind:38}{x.axes or '-':>12}{x.count:9,}{x.wire / _GIB:10.2f}{x.busy * 1e3:11.1f}"
            f"{x.exposed * 1e3:12.1f}"
            for x in e.traffic
        ),
        "",
        f"dearest operations, by line of source{'ms':>13}{'exposed':>10}{'times':>9}",
        *(f"  {o.source:38}{o.seconds * 1e3:10.1f}{o.exposed * 1e3:10.1f}{o.count:9,}  {o.what}" for o in e.dearest),
    ]
    if e.kernels:
        lines += ["", f"Pallas kernels{'ms':>36}{'at peak':>10}{'of peak':>9}{'times':>9}"]
        lines += [
            f"  {k.name:38}{k.seconds * 1e3:10.1f}{k.at_peak * 1e3:10.1f}{k.efficiency:9.1%}{k.count:9,}"
            for k in e.kernels
        ]
    return lines
