"""Schedules written by hand, and how long they take on a clock that ticks in microseconds."""

import dataclasses

import pytest

from dsv2_jax.plan import hlo
from dsv2_jax.plan.network import Torus
from dsv2_jax.plan.timeline import play
from pallas_kernels.chips import CHIPS

# A cycle is a microsecond; a link moves a byte in one, and four chips in a row do not close to a ring.
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
    return play(hlo.parse(text), ROW, kernel)


GROUP = "channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}"


def gather(name, elements, start=False):
    """A shard of so many float32; 3 shards of 4 bytes come over the link of the last chip."""
    if not start:
        return f"  %{name} = f32[{4 * elements}]{{0}} all-gather(%s{elements}), {GROUP}"
    return (
        f"  %{name} = (f32[{elements}]{{0}}, f32[{4 * elements}]{{0}}) all-gather-start(%s{elements}), {GROUP}\n"
    ).rstrip()


def shard(elements):
    return f"  %s{elements} = f32[{elements}]{{0}} bitcast(%p)"


def test_one_after_the_other():
    played = microseconds(program("\n".join([work("x", 10), work("y", 32, "%x")]), entry="%y"))
    assert played.seconds == pytest.approx(42e-6)


def test_a_synchronous_collective_is_exposed_whole():
    played = microseconds(program("\n".join([work("x", 10), shard(5), gather("g", 5), work("y", 7, "%g")]), entry="%y"))
    assert played.seconds == pytest.approx((10 + 3 * 5 * 4 + HOPS + 7) * 1e-6)
    use = played.uses["main", "g"]
    assert (use.exposed, use.wire) == (pytest.approx((60 + HOPS) * 1e-6), 60)


@pytest.mark.parametrize(("beside", "exposed"), [(20, 43), (63, 0), (100, 0)])
def test_an_asynchronous_collective_is_exposed_where_the_core_waits(beside, exposed):
    lines = [
        shard(5),
        gather("g", 5, start=True),
        work("x", beside),
        "  %d = f32[20]{0} all-gather-done(%g)",
        work("y", 7, "%d"),
    ]
    played = microseconds(program("\n".join(lines), entry="%y"))
    assert played.seconds == pytest.approx((beside + exposed + 7) * 1e-6)
    assert played.uses["main", "d"].exposed == pytest.approx(exposed * 1e-6, abs=1e-12)


@pytest.mark.parametrize(("elements", "microseconds_of_both"), [(50_000, 2 * 600_003), (5, 63)])
def test_large_collectives_have_their_links_one_after_the_other(elements, microseconds_of_both):
    lines = [
        shard(elements),
        gather("g", elements, start=True),
        gather("h", elements, start=True),
        f"  %dg = f32[{4 * elements}]{{0}} all-gather-done(%g)",
        f"  %dh = f32[{4 * elements}]{{0}} all-gather-done(%h)",
    ]
    played = microseconds(program("\n".join(lines), entry="%dh"))
    assert played.seconds == pytest.approx(microseconds_of_both * 1e-6)


def test_what_slices_do_together_is_awaited_where_it_is_received():
    """A sum of 400 bytes over two slices of two chips: half of it leaves each chip twice, at 2 bytes a microsecond."""
    slices = Torus(
        dataclasses.replace(CHIP, dcn=2e6), ((0, 0, 0, 0, 0), (0, 1, 0, 0, 0), (1, 0, 0, 0, 0), (1, 1, 0, 0, 0))
    )
    meeting = 'frontend_attributes={_xla_host_transfer_rendezvous="psum_0",_xla_megascale_transfer_type="ALL_REDUCE"}'
    lines = [
        shard(100),
        "  %t = token[] after-all()",
        f"  %r = (f32[100]{{0}}, u32[], token[]) recv(%t), channel_id=1, is_host_transfer=true, {meeting}",
        f"  %s = (f32[100]{{0}}, u32[], token[]) send(%s100, %t), channel_id=2, is_host_transfer=true, {meeting}",
        work("x", 50),
        "  %sd = token[] send-done(%s), channel_id=2, is_host_transfer=true",
        "  %rd = (f32[100]{0}, token[]) recv-done(%r), channel_id=1, is_host_transfer=true",
        "  %d = f32[100]{0} get-tuple-element(%rd), index=0",
        work("y", 7, "%d"),
    ]
    played = play(hlo.parse(program("\n".join(lines), entry="%y")), slices, lambda *_: 0.0)
    assert played.uses["main", "s"].wire == 400
    assert played.uses["main", "rd"].exposed == pytest.approx((200 + 1 - 50) * 1e-6)  # and a hop
    assert played.seconds == pytest.approx((200 + 1 + 7) * 1e-6)


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


def test_what_the_sparse_core_runs_begins_when_it_gets_its_operands():
    """Made ready first, begun behind 10 us of work, 63 us long, awaited after 20 more."""
    lines = [
        shard(5),
        '  %r = ((), (), s32[]) async-start(), async_execution_thread="sparsecore", calls=%other_core',
        work("x", 10),
        "  %u = ((f32[5]), f32[20], s32[]) async-update(%r, %s5)",
        work("y", 20, "%x"),
        "  %d = f32[20]{0} async-done(%u)",
    ]
    played = microseconds(program("\n".join(lines), SPARSE, "%d"))
    assert played.seconds == pytest.approx(73e-6)
    assert played.uses["main", "u"].wire == 60
    assert played.uses["main", "d"].exposed == pytest.approx(43e-6)


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
    ("start", "limit", "step", "turns"), [(0, 10, 1, 10), (4, 11, 3, 3), (5, 5, 1, 0), (0, 1, 1, 1)]
)
def test_a_loop_runs_as_often_as_its_condition_says(start, limit, step, turns):
    played = microseconds(looped(work("x", 9), start, limit, step))
    assert played.seconds == pytest.approx(turns * 10e-6)
    assert [loop.turns for loop in played.loops] == [turns]
    assert not played.unsolved
    if turns:
        assert played.uses["body", "x"].count == turns


def test_a_collective_left_running_meets_the_next_turn():
    """63 us of transfer and 31 of work a turn, started behind the work and awaited in front of it: 94 a turn."""
    body = "\n".join([work("x", 30), shard(5), gather("g", 5, start=True), "  %d = f32[20]{0} all-gather-done(%g)"])
    assert microseconds(looped(body)).seconds == pytest.approx(10 * 94e-6)


def test_a_loop_of_unknown_length_is_counted_once_and_reported():
    text = looped(work("x", 9)).replace("constant(0)", "bitcast(%p)")
    played = microseconds(text)
    assert played.seconds == pytest.approx(10e-6)
    assert played.unsolved == ("w",)
    charged = play(hlo.parse(text), ROW, lambda *_: 0.0, unsolved_seconds=70e-6)
    assert charged.seconds == pytest.approx(70e-6) and charged.unsolved == ("w",)


def test_the_dearest_branch_of_a_condition_is_taken_or_the_cheapest():
    head, end = "(z: f32[1]) -> f32[1] {\n  %p = f32[1]{0} parameter(0)\n", "\n  ROOT %r = f32[1]{0} bitcast(%x)\n}\n"
    more = f"\n%cheap {head}{work('x', 3)}{end}\n%dear {head}{work('x', 30)}{end}"
    body = "  %s = s32[] constant(0)\n  %c = f32[1]{0} conditional(%s, %p, %p), branch_computations={%cheap, %dear}"
    text = program(body, more, "%c")
    assert microseconds(text).seconds == pytest.approx(30e-6)
    assert play(hlo.parse(text), ROW, lambda *_: 0.0, cheapest=True).seconds == pytest.approx(3e-6)


def test_a_kernel_takes_what_it_is_said_to_take():
    body = '  %k = f32[1]{0} custom-call(%p), custom_call_target="tpu_custom_call", metadata={op_name="kernel"}'
    assert microseconds(program(body, entry="%k"), lambda *_: 5e-6).seconds == pytest.approx(5e-6)


def test_copies_into_vmem_run_beside_the_core_at_the_bandwidth_of_hbm():
    lines = [
        "  %big = f32[10]{0} bitcast(%p)",
        "  %c = (f32[10]{0}, f32[10]{0}, u32[]) copy-start(%big)",
        work("x", 25),
        "  %d = f32[10]{0} copy-done(%c)",
        work("y", 1, "%d"),
    ]
    played = microseconds(program("\n".join(lines), entry="%y"))
    assert played.seconds == pytest.approx((25 + 15 + 1) * 1e-6)


def test_text_that_is_no_module_is_refused():
    with pytest.raises(ValueError, match="no HLO module"):
        hlo.parse("nonsense")
