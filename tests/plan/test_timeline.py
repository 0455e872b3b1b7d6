"""Simulated times of schedules written by hand, in microseconds."""

import dataclasses

import pytest

from dsv2_jax.plan import hlo
from dsv2_jax.plan.network import Torus
from dsv2_jax.plan.timeline import simulate
from pallas_kernels.chips import CHIPS

# A cycle takes a microsecond, a link moves a byte per microsecond, and four chips in a row are not a ring.
CHIP = dataclasses.replace(CHIPS["v5p"], clock=1e6, link=1e6, hbm=0.5e6, cores=2)
ROW = Torus(CHIP, ((0, 0, 0, 0, 0), (0, 1, 0, 0, 0), (0, 2, 0, 0, 0), (0, 3, 0, 0, 0)))
HOPS = 3  # microseconds


def work(name, cycles, operand="%p"):
    took = f'backend_config={{"estimated_cycles":"{cycles}"}}'
    return f"  %{name} = f32[1]{{0}} fusion({operand}), kind=kLoop, calls=%nothing, {took}"


def program(body, more="", entry="%x"):
    return f"""HloModule test, is_scheduled=true, num_partitions=4

%nothing (a: f32[1]) -> f32[1] {{
  ROOT %a = f32[1]{{0}} parameter(0)
}}
{more}
ENTRY %main (p: f32[1]) -> f32[1] {{
  %p = f32[1]{{0}} parameter(0)
{body}
  ROOT {entry}.root = f32[1]{{0}} bitcast({entry})
}}
"""


def microseconds(text, kernel=lambda *_: 0.0):
    return simulate(hlo.parse(text), ROW, kernel)


GROUP = "channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}"


def gather(name, elements, start=False):
    """An all-gather of float32 shards. The link of the last chip carries the three other shards."""
    if not start:
        return f"  %{name} = f32[{4 * elements}]{{0}} all-gather(%s{elements}), {GROUP}"
    return (
        f"  %{name} = (f32[{elements}]{{0}}, f32[{4 * elements}]{{0}}) all-gather-start(%s{elements}), {GROUP}\n"
    ).rstrip()


def shard(elements):
    return f"  %s{elements} = f32[{elements}]{{0}} bitcast(%p)"


def test_instructions_run_one_after_the_other():
    timeline = microseconds(program("\n".join([work("x", 10), work("y", 32, "%x")]), entry="%y"))
    assert timeline.seconds == pytest.approx(42e-6)


def test_a_synchronous_collective_is_fully_exposed():
    timeline = microseconds(
        program("\n".join([work("x", 10), shard(5), gather("g", 5), work("y", 7, "%g")]), entry="%y")
    )
    assert timeline.seconds == pytest.approx((10 + 3 * 5 * 4 + HOPS + 7) * 1e-6)
    use = timeline.uses["main", "g"]
    assert (use.exposed, use.wire) == (pytest.approx((60 + HOPS) * 1e-6), 60)


@pytest.mark.parametrize(("overlap", "exposed"), [(20, 43), (63, 0), (100, 0)])
def test_an_asynchronous_collective_is_exposed_where_the_core_waits(overlap, exposed):
    lines = [
        shard(5),
        gather("g", 5, start=True),
        work("x", overlap),
        "  %d = f32[20]{0} all-gather-done(%g)",
        work("y", 7, "%d"),
    ]
    timeline = microseconds(program("\n".join(lines), entry="%y"))
    assert timeline.seconds == pytest.approx((overlap + exposed + 7) * 1e-6)
    assert timeline.uses["main", "d"].exposed == pytest.approx(exposed * 1e-6, abs=1e-12)


@pytest.mark.parametrize(("elements", "microseconds_of_both"), [(50_000, 2 * 600_003), (5, 63)])
def test_large_collectives_use_their_links_one_after_the_other(elements, microseconds_of_both):
    lines = [
        shard(elements),
        gather("g", elements, start=True),
        gather("h", elements, start=True),
        f"  %dg = f32[{4 * elements}]{{0}} all-gather-done(%g)",
        f"  %dh = f32[{4 * elements}]{{0}} all-gather-done(%h)",
    ]
    timeline = microseconds(program("\n".join(lines), entry="%dh"))
    assert timeline.seconds == pytest.approx(microseconds_of_both * 1e-6)


def test_a_collective_between_slices_is_awaited_at_its_receive():
    """An all-reduce of 400 bytes over two slices: each chip sends half of it twice, at 2 bytes per microsecond."""
    slices = Torus(
        dataclasses.replace(CHIP, dcn=2e6), ((0, 0, 0, 0, 0), (0, 1, 0, 0, 0), (1, 0, 0, 0, 0), (1, 1, 0, 0, 0))
    )
    rendezvous = (
        'frontend_attributes={_xla_host_transfer_rendezvous="psum_0",_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    lines = [
        shard(100),
        "  %t = token[] after-all()",
        f"  %r = (f32[100]{{0}}, u32[], token[]) recv(%t), channel_id=1, is_host_transfer=true, {rendezvous}",
        f"  %s = (f32[100]{{0}}, u32[], token[]) send(%s100, %t), channel_id=2, is_host_transfer=true, {rendezvous}",
        work("x", 50),
        "  %sd = token[] send-done(%s), channel_id=2, is_host_transfer=true",
        "  %rd = (f32[100]{0}, token[]) recv-done(%r), channel_id=1, is_host_transfer=true",
        "  %d = f32[100]{0} get-tuple-element(%rd), index=0",
        work("y", 7, "%d"),
    ]
    timeline = simulate(hlo.parse(program("\n".join(lines), entry="%y")), slices, lambda *_: 0.0)
    assert timeline.uses["main", "s"].wire == 400
    assert timeline.uses["main", "rd"].exposed == pytest.approx((200 + 1 - 50) * 1e-6)  # with one hop
    assert timeline.seconds == pytest.approx((200 + 1 + 7) * 1e-6)


SPARSE = """
%inside (m: f32[5]) -> f32[20] {
  %m = f32[5]{0} parameter(0)
  ROOT %gathered = f32[20]{0} all-gather(%m), GROUP
}, execution_thread="sparsecore"

%other_core (o: f32[5]) -> f32[20] {
  %o = f32[5]{0} parameter(0)
  ROOT %c = f32[20]{0} call(%o), to_apply=%inside
}, execution_thread="sparsecore"
""".replace("GROUP", GROUP)


def test_a_sparsecore_collective_starts_at_its_async_update():
    """The collective starts after 10 us of work, takes 63 us and is awaited after 20 us more."""
    lines = [
        shard(5),
        '  %r = ((), (), s32[]) async-start(), async_execution_thread="sparsecore", calls=%other_core',
        work("x", 10),
        "  %u = ((f32[5]), f32[20], s32[]) async-update(%r, %s5)",
        work("y", 20, "%x"),
        "  %d = f32[20]{0} async-done(%u)",
    ]
    timeline = microseconds(program("\n".join(lines), SPARSE, "%d"))
    assert timeline.seconds == pytest.approx(73e-6)
    assert timeline.uses["main", "u"].wire == 60
    assert timeline.uses["main", "d"].exposed == pytest.approx(43e-6)


LOOP = """
%condition (c: (s32[], f32[1])) -> pred[] {
  %c = (s32[], f32[1]{0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %n = s32[] constant(LIMIT)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%step (q: s32[]) -> s32[] {
  %q = s32[] parameter(0)
  %one = s32[] constant(STEP)
  ROOT %next = s32[] add(%q, %one)
}

%body (b: (s32[], f32[1])) -> (s32[], f32[1]) {
  %b = (s32[], f32[1]{0}) parameter(0)
  %j = s32[] get-tuple-element(%b), index=0
  %p = f32[1]{0} get-tuple-element(%b), index=1
  %k = s32[] fusion(%j), kind=kLoop, calls=%step, backend_config={"estimated_cycles":"1"}
BODY
  ROOT %t = (s32[], f32[1]{0}) tuple(%k, %x)
}
"""


def looped(body, start=0, limit=10, step=1):
    more = LOOP.replace("BODY", body).replace("LIMIT", str(limit)).replace("STEP", str(step))
    entry = (
        f"  %zero = s32[] constant({start})\n  %in = (s32[], f32[1]{{0}}) tuple(%zero, %p)\n"
        "  %w = (s32[], f32[1]{0}) while(%in), condition=%condition, body=%body\n"
        "  %r = f32[1]{0} get-tuple-element(%w), index=1"
    )
    return program(entry, more, "%r")


@pytest.mark.parametrize(
    ("start", "limit", "step", "count"), [(0, 10, 1, 10), (4, 11, 3, 3), (5, 5, 1, 0), (0, 1, 1, 1)]
)
def test_trip_count_follows_from_the_condition(start, limit, step, count):
    timeline = microseconds(looped(work("x", 9), start, limit, step))
    assert timeline.seconds == pytest.approx(count * 10e-6)
    assert [loop.iterations for loop in timeline.loops] == [count]
    assert not timeline.unknown_loops
    if count:
        assert timeline.uses["body", "x"].count == count


def test_every_iteration_waits_for_its_collective():
    """An iteration has 31 us of work and then a transfer of 63 us, which it awaits at once: 94 us."""
    body = "\n".join([work("x", 30), shard(5), gather("g", 5, start=True), "  %d = f32[20]{0} all-gather-done(%g)"])
    assert microseconds(looped(body)).seconds == pytest.approx(10 * 94e-6)


def test_a_loop_that_depends_on_data_counts_one_iteration():
    text = looped(work("x", 9)).replace("constant(0)", "bitcast(%p)")
    timeline = microseconds(text)
    assert timeline.seconds == pytest.approx(10e-6)
    assert timeline.unknown_loops == ("w",)
    given = simulate(hlo.parse(text), ROW, lambda *_: 0.0, unknown_loop_seconds=70e-6)
    assert given.seconds == pytest.approx(70e-6) and given.unknown_loops == ("w",)


def test_a_conditional_takes_its_slowest_or_fastest_branch():
    head, end = "(z: f32[1]) -> f32[1] {\n  %p = f32[1]{0} parameter(0)\n", "\n  ROOT %r = f32[1]{0} bitcast(%x)\n}\n"
    more = f"\n%fast {head}{work('x', 3)}{end}\n%slow {head}{work('x', 30)}{end}"
    body = "  %s = s32[] constant(0)\n  %c = f32[1]{0} conditional(%s, %p, %p), branch_computations={%fast, %slow}"
    text = program(body, more, "%c")
    assert microseconds(text).seconds == pytest.approx(30e-6)
    assert simulate(hlo.parse(text), ROW, lambda *_: 0.0, fastest_branch=True).seconds == pytest.approx(3e-6)


def test_a_kernel_takes_the_given_time():
    body = '  %k = f32[1]{0} custom-call(%p), custom_call_target="tpu_custom_call", metadata={op_name="kernel"}'
    assert microseconds(program(body, entry="%k"), lambda *_: 5e-6).seconds == pytest.approx(5e-6)


def test_copies_into_vmem_overlap_with_the_core_at_the_bandwidth_of_hbm():
    lines = [
        "  %big = f32[10]{0} bitcast(%p)",
        "  %c = (f32[10]{0}, f32[10]{0}, u32[]) copy-start(%big)",
        work("x", 25),
        "  %d = f32[10]{0} copy-done(%c)",
        work("y", 1, "%d"),
    ]
    timeline = microseconds(program("\n".join(lines), entry="%y"))
    assert timeline.seconds == pytest.approx((25 + 15 + 1) * 1e-6)


def test_text_without_a_module_raises():
    with pytest.raises(ValueError, match="not an HLO module"):
        hlo.parse("nonsense")
