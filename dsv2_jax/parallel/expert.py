"""Expert parallelism: tokens travel to the devices of their experts, each at most once to a device (section 2.2.2).

A token that chose several experts of one device is sent there in one copy, with its gates; the device adds up what its
experts make of it, and one vector comes back. With device-limited routing at most M of the D devices are visited, so
at most M T d numbers leave a device where one copy per expert would be K T d. Shapes are static, transfers are not
padded: each device tells all others how many rows it has for whom, in integers, and hidden states move once each way.

    N tokens of this device   K choices of a token   X devices of the expert axis
    P rows sent   S rows received   C L numbers of a row in tiles
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.xla_metadata import set_xla_metadata

from dsv2_jax.config import Mesh, Moe
from dsv2_jax.parallel import collectives
from dsv2_jax.parallel.mesh import platform
from pallas_kernels.common import LANES

AXIS = ("expert",)
_FEW_PAIRS = 32_768  # their rows take a third of a GiB at V2's width: not worth reading the weights twice

Experts = Callable[[Array, Array, Array], Array]  # (x_ND, experts_NK, gates_NK) -> y_ND, of this device's experts


class Plan(NamedTuple):
    """Where rows go. Sent rows are ordered by device, then by token.

    tokens_P: the token of each sent row. devices_P: where it goes. rows_NR, sent_NR: the row of a token's r-th copy,
    and whether it has so many. sizes_XX: rows that device i has for device j, the same on all devices.
    """

    tokens_P: Array
    devices_P: Array
    rows_NR: Array
    sent_NR: Array
    sizes_XX: Array


class Work(NamedTuple):
    """function(*arguments): work that waits for no transfer. The function is one of a module, for it is a jit key."""

    function: Callable[..., Array]
    arguments: tuple[Array, ...]


def most_devices(moe: Moe, devices: int) -> int:
    """Devices that one token can be sent to: its K experts lie in M groups, each on its own run of devices."""
    return min(moe.num_experts_per_tok, devices, moe.topk_group * math.ceil(devices / moe.n_group))


def most_rows(moe: Moe, mesh: Mesh, b: int, t: int, *, dropping: bool) -> int:
    """Rows that a device must have room for when it and its peers each hold b sequences of t tokens."""
    return min(b * mesh.expert * t, most_pairs(moe, mesh, b, t, dropping=dropping))


def most_pairs(moe: Moe, mesh: Mesh, b: int, t: int, *, dropping: bool) -> int:
    """(token, expert) pairs that a device can be asked to compute when it and its peers each hold b sequences of t.

    Without dropping every token may choose all it can of the device's experts. With it a group's pairs are bounded by
    its budget, which holds the exempt sequences too: these alone exceed the budget only if their share times D is above
    the capacity factor.
    """
    sequences, length = b * mesh.expert, t * mesh.context
    everything = sequences * t * min(moe.num_experts_per_tok, moe.n_routed_experts // mesh.expert)
    if not dropping:
        return everything
    together = moe.budget_sequences or sequences
    exempt = math.ceil(moe.exempt_fraction * together) * length * moe.num_experts_per_tok
    pairs = sequences // together * max(moe.budget(together * length), exempt)
    return min(everything, pairs * max(1, moe.n_group // mesh.expert))


def pairs_at_a_time(moe: Moe, b: int, t: int) -> int:
    """Pairs that a device computes in one go: a quarter more than a balanced router sends it, and never few."""
    return max(b * t * moe.num_experts_per_tok * 5 // 4, _FEW_PAIRS)


def dispatch(
    x_ND: Array,
    experts_NK: Array,
    gates_NK: Array,
    experts: Experts,
    moe: Moe,
    mesh: Mesh,
    rows: int,
    beside: tuple[Work, Work] | None = None,
    layer: int = 0,
) -> tuple[Array, Array | None]:
    """`experts` applied where each expert lives: (y_ND of this device's tokens, the result of `beside`).

    Of the work `beside`, the first part runs while rows travel out; the second takes its result as one more argument,
    the first one, and runs while rows come back. `layer` tells one call in a program from another.

    experts_NK int32: ids over all devices, E where a pair is dropped. gates_NK float32. `experts` gets rows from all
    devices with ids among its own E / X experts, E / X for none; rows that have none at all hold anything, NaN too, and
    must not be read. `rows` bounds what it can get (see `most_rows`).
    With so few devices that a token may be sent to all of them, all tokens are gathered instead and the results
    scattered: the same traffic, and nothing to sort.
    """
    own = moe.n_routed_experts // mesh.expert
    out, back = beside or (None, None)
    if mesh.expert <= most_devices(moe, mesh.expert):  # one device, too
        x, gates, ids = (collectives.gather(a, AXIS, 0, mesh) for a in (x_ND, gates_NK, experts_NK))
        y = experts(x, _local(ids, collectives.index(AXIS, mesh), own), gates)
        meanwhile = back.function(out.function(*out.arguments), *back.arguments) if out and back else None
        return collectives.scatter(y, AXIS, 0, mesh), meanwhile
    plan = make_plan(experts_NK // own, most_devices(moe, mesh.expert), mesh)
    # On TPU a row that travels must be whole in memory, so it is tiles of its own, [.., D / 128, 128], from its gather
    # to the sum at home. Of a matrix XLA would make [P, 2, D / 2], which all that touch it pay for tenfold.
    tiles = (-1, LANES) if x_ND.shape[1] % LANES == 0 else (1, -1)
    rows_PCL, gates_PK = expand(x_ND.reshape(len(x_ND), *tiles), plan), expand(gates_NK, plan)
    ids_PK = _local(experts_NK[plan.tokens_P], plan.devices_P[:, None], own)
    notes_PK = jnp.concatenate([gates_PK, ids_PK.astype(jnp.float32)], axis=1)  # they travel in one array
    notes_SK = exchange(notes_PK, plan.sizes_XX, rows)
    # XLA is told to schedule the work between the start of a transfer and its end. Left alone it puts it behind, for it
    # does not know how long a ragged transfer takes. The barriers keep out of a group what needs its results.
    with set_xla_metadata(_scheduling_group_id=str(2 * layer)):
        arrived = exchange(rows_PCL, plan.sizes_XX, rows), _run(out)
    x_SCL, meanwhile = lax.optimization_barrier(arrived)
    x_SD = _relaid(x_SCL, (rows, x_ND.shape[1]))
    gates_SK, ids_SK = jnp.split(notes_SK, 2, axis=1)
    came_S1 = jnp.arange(rows)[:, None] < plan.sizes_XX[:, lax.axis_index(AXIS)].sum()
    y_SD = experts(x_SD, jnp.where(came_S1, ids_SK, own).astype(jnp.int32), gates_SK)
    with set_xla_metadata(_scheduling_group_id=str(2 * layer + 1)):
        arrived = exchange(_relaid(y_SD, x_SCL.shape), plan.sizes_XX.T, len(rows_PCL)), _run(back, meanwhile)
    back_PCL, meanwhile = lax.optimization_barrier(arrived)
    return merge(back_PCL, plan).reshape(x_ND.shape), meanwhile


def _relaid(x: Array, shape: tuple[int, ...]) -> Array:
    """x in another shape, and no part of what makes or reads it: fused with either the change of tiles is dearer."""
    return lax.optimization_barrier(lax.optimization_barrier(x).reshape(shape))


def _run(work: Work | None, *first: Array | None) -> Array | None:
    return _forward_group(work.function, *first, *work.arguments) if work else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _forward_group(function: Callable[..., Array], *arguments: Array) -> Array:
    """The function, whose gradient leaves the scheduling group: in one of a layer's backward pass both would stand."""
    return function(*arguments)


def _forward_group_bwd(function: Callable[..., Array], arguments: tuple[Array, ...], g: Array) -> tuple[Array, ...]:
    with set_xla_metadata(_scheduling_group_id=None):
        return jax.vjp(function, *arguments)[1](g)


_forward_group.defvjp(lambda function, *arguments: (function(*arguments), arguments), _forward_group_bwd)


def _local(ids: Array, device: Array | int, own: int) -> Array:
    """Ids among the `own` experts of a device, `own` for the experts of others."""
    here = ids - device * own
    return jnp.where((here >= 0) & (here < own), here, own)


def make_plan(devices_NK: Array, copies: int, mesh: Mesh) -> Plan:
    """The plan of this device for choices on the given devices, X or more for none; `copies`: devices of a token."""
    n, x = devices_NK.shape[0], mesh.expert
    sends_NX = (devices_NK[:, :, None] == jnp.arange(x)).any(axis=1)
    counts_X = sends_NX.sum(axis=0, dtype=jnp.int32)
    ends_X = jnp.cumsum(counts_X)
    rows_NX = jnp.cumsum(sends_NX, axis=0, dtype=jnp.int32) - 1 + ends_X - counts_X
    rank_NX = jnp.cumsum(sends_NX, axis=1, dtype=jnp.int32) - 1
    copy_NXR = sends_NX[:, :, None] & (rank_NX[:, :, None] == jnp.arange(copies))
    token_NX = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32)[:, None], sends_NX.shape)
    row_P = jnp.arange(n * copies, dtype=jnp.int32)
    return Plan(
        tokens_P=jnp.zeros(n * copies, jnp.int32)
        .at[jnp.where(sends_NX, rows_NX, n * copies)]
        .set(token_NX, mode="drop"),
        devices_P=(row_P[:, None] >= ends_X).sum(axis=1, dtype=jnp.int32),
        rows_NR=jnp.sum(copy_NXR * rows_NX[:, :, None], axis=1),
        sent_NR=copy_NXR.any(axis=1),
        sizes_XX=lax.all_gather(counts_X, AXIS),
    )


@jax.custom_vjp
def expand(x_ND: Array, plan: Plan) -> Array:
    """The rows to send, [P, ...]; transposed, `merge`. Both are gathers: no scatter of hidden states is ever made."""
    return x_ND[plan.tokens_P]


@jax.custom_vjp
def merge(rows_PD: Array, plan: Plan) -> Array:
    """The sum of every token's rows, [N, ...], in float32, then of the rows' dtype; transposed, `expand`."""
    y_ND = jnp.zeros((plan.rows_NR.shape[0], *rows_PD.shape[1:]), jnp.float32)
    for r in range(plan.rows_NR.shape[1]):
        sent = plan.sent_NR[:, r].reshape(-1, *(1,) * (rows_PD.ndim - 1))
        y_ND += jnp.where(sent, rows_PD[plan.rows_NR[:, r]], 0)
    return y_ND.astype(rows_PD.dtype)


# Rows that are not sent get a cotangent of some token too; nobody reads it.
expand.defvjp(lambda x, plan: (expand(x, plan), plan), lambda plan, g: (merge(g, plan), None))
merge.defvjp(lambda x, plan: (merge(x, plan), plan), lambda plan, g: (expand(g, plan), None))


def exchange(rows_PD: Array, sizes_XX: Array, room: int) -> Array:
    """Sends runs of rows to the devices of the expert axis: what arrives, in the order of the senders, [room, ...].

    sizes_XX int32: rows of device i for device j. A sender's runs lie in the order of the receivers, without gaps.
    Rows behind the last hold anything: on TPU memory as it was, for zeros are dear to write; on CPU NaN. Transposed,
    the exchange of the transposed sizes.
    """
    return _exchange(room, len(rows_PD), rows_PD, sizes_XX)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _exchange(room: int, room_back: int, rows_PD: Array, sizes_XX: Array) -> Array:
    assert len(rows_PD) == room_back
    return _move(rows_PD, sizes_XX, room)


def _exchange_bwd(_: int, room_back: int, sizes_XX: Array, g_SD: Array) -> tuple[Array, None]:
    with set_xla_metadata(_scheduling_group_id=None):
        return _move(g_SD, sizes_XX.T, room_back), None


_exchange.defvjp(lambda room, _, rows, sizes: (_move(rows, sizes, room), sizes), _exchange_bwd)


def _move(rows_PD: Array, sizes_XX: Array, room: int) -> Array:
    me = lax.axis_index(AXIS)
    sent_XX = jnp.cumsum(sizes_XX, axis=1) - sizes_XX  # where in the sender's rows a run begins
    landed_XX = jnp.cumsum(sizes_XX, axis=0) - sizes_XX  # and where in the receiver's
    if platform() != "cpu":
        runs = (sent_XX[me], sizes_XX[me], landed_XX[me], sizes_XX[:, me])
        empty = lax.empty((room, *rows_PD.shape[1:]), rows_PD.dtype)
        return lax.ragged_all_to_all(rows_PD, empty, *runs, axis_name=AXIS[0])
    # XLA's CPU has no ragged transfer: everybody gets everything and takes what is his.
    everything_XPD = lax.all_gather(rows_PD, AXIS)
    row_S = jnp.arange(room, dtype=jnp.int32)
    ends_X = landed_XX[:, me] + sizes_XX[:, me]
    sender_S = (row_S[:, None] >= ends_X).sum(axis=1)
    came_S = sender_S < len(ends_X)
    sender_S = jnp.minimum(sender_S, len(ends_X) - 1)
    at_S = jnp.where(came_S, sent_XX[sender_S, me] + row_S - landed_XX[sender_S, me], 0)
    came = came_S.reshape(-1, *(1,) * (rows_PD.ndim - 1))
    return jnp.where(came, everything_XPD[sender_S, at_S], jnp.nan)
