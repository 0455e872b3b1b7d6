"""Expert parallelism: tokens are sent to the devices of their experts, at most once to each device (section 2.2.2).

A token with several experts on one device is sent there as one copy with its gates. The device adds up its experts'
results and sends one vector back. Device-limited routing uses at most M of D devices, so at most M T d numbers leave a
device; one copy per expert would send K T d. Shapes are static and transfers contain no padding: devices first exchange
the number of rows that each sends to each, then send hidden states once in each direction.

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
from dsv2_jax.parallel.mesh import CONTEXT, EXPERT, platform
from pallas_kernels.common import LANES

_FEW_PAIRS = 32_768  # their rows take a third of a GiB at V2's width, which is cheaper than reading the weights twice

Experts = Callable[[Array, Array, Array], Array]  # (x_ND, experts_NK, gates_NK) -> y_ND, of this device's experts


class Bounds(NamedTuple):
    """Static sizes of a dispatch.

    own: experts per device. devices: the maximum number of devices to which one token is sent. rows: the maximum number
    of rows that a device can receive. pairs: the maximum number of (token, expert) pairs that it can receive.
    buffer_size: pairs that it computes at a time.
    """

    own: int
    devices: int
    rows: int
    pairs: int
    buffer_size: int


class Transfer(NamedTuple):
    """Which rows go where. Sent rows are ordered by device, then by token.

    tokens_P: the token of each sent row. devices_P: its destination. rows_NR, sent_NR: the row of a token's r-th copy,
    and whether that copy exists. sizes_XX: rows that device i sends to device j, the same on all devices.
    """

    tokens_P: Array
    devices_P: Array
    rows_NR: Array
    sent_NR: Array
    sizes_XX: Array


class Work(NamedTuple):
    """function(*arguments), computed while rows are sent. As a jit cache key the function must be at module level."""

    function: Callable[..., Array]
    arguments: tuple[Array, ...]


def bounds(moe: Moe, mesh: Mesh, b: int, t: int, *, dropping: bool) -> Bounds:
    """The bounds of a dispatch in which each device holds b sequences of t tokens.

    Without dropping, all K experts of every token may be on one device, as far as it holds K. With dropping, the budget
    bounds a group's pairs, exempt sequences included. Exempt sequences alone exceed the budget only if their share
    times D is above the capacity factor. The buffer holds a quarter more pairs than a balanced router sends, and at
    least `_FEW_PAIRS`.
    """
    own, k = moe.n_routed_experts // mesh.size(*EXPERT), moe.num_experts_per_tok
    # A token's K experts lie in M groups, each on its own run of devices.
    devices = min(k, mesh.size(*EXPERT), moe.topk_group * math.ceil(mesh.size(*EXPERT) / moe.n_group))
    sequences, length = b * mesh.size(*EXPERT), t * mesh.size(*CONTEXT)
    pairs = sequences * t * min(k, own)
    if dropping:
        together = moe.budget_sequences or sequences
        exempt = math.ceil(moe.exempt_fraction * together) * length * k
        budget = sequences // together * max(moe.budget(together * length), exempt)
        pairs = min(pairs, budget * max(1, moe.n_group // mesh.size(*EXPERT)))
    buffer_size = max(b * t * k * 5 // 4, _FEW_PAIRS)
    return Bounds(own=own, devices=devices, rows=min(sequences * t, pairs), pairs=pairs, buffer_size=buffer_size)


def dispatch(
    x_ND: Array,
    experts_NK: Array,
    gates_NK: Array,
    experts: Experts,
    limits: Bounds,
    mesh: Mesh,
    overlap: tuple[Work, Work] | None = None,
    layer: int = 0,
) -> tuple[Array, Array | None]:
    """`experts` applied on the devices that hold them: (y_ND of this device's tokens, the result of `overlap`).

    If a token may be sent to all devices, tokens are all-gathered and the results reduce-scattered instead. The traffic
    is the same, and nothing has to be sorted.

    Args:
      x_ND: Hidden states of this device's tokens.
      experts_NK: int32 ids over all devices; E drops a pair.
      gates_NK: float32.
      experts: Gets rows of all devices with ids among its own E / X experts, E / X for none. Rows without an expert are
        undefined, possibly NaN, and must not be read.
      limits: The static sizes (see `bounds`).
      mesh: The sizes of the mesh.
      overlap: Work that does not depend on the sent rows. The first runs while rows are sent out. The second takes its
        result as its first argument and runs while results are sent back.
      layer: Distinguishes the calls of one program.
    """
    own = limits.own
    out, back = overlap or (None, None)
    if mesh.size(*EXPERT) <= limits.devices:  # includes a single device
        x, gates, ids = (collectives.gather(a, EXPERT, 0, mesh) for a in (x_ND, gates_NK, experts_NK))
        y = experts(x, _local(ids, collectives.index(EXPERT, mesh), own), gates)
        overlapped = back.function(out.function(*out.arguments), *back.arguments) if out and back else None
        return collectives.scatter(y, EXPERT, 0, mesh), overlapped
    transfer = plan_transfer(experts_NK // own, limits.devices, mesh)
    # On TPU a sent row must be contiguous, so each row has its own tiles, [.., D / 128, 128], from the gather to the
    # final sum on the token's own device. XLA would lay a matrix out as [P, 2, D / 2], in which each access takes ten
    # times as long.
    tiles = (-1, LANES) if x_ND.shape[1] % LANES == 0 else (1, -1)
    rows_PCL, gates_PK = expand(x_ND.reshape(len(x_ND), *tiles), transfer), expand(gates_NK, transfer)
    ids_PK = _local(experts_NK[transfer.tokens_P], transfer.devices_P[:, None], own)
    notes_PK = jnp.concatenate([gates_PK, ids_PK.astype(jnp.float32)], axis=1)  # one array, so one transfer
    notes_SK = exchange(notes_PK, transfer.sizes_XX, limits.rows)
    # XLA does not know how long a ragged transfer takes and would schedule the work after it. The scheduling group
    # puts the work between the start and the end of a transfer. The barriers keep operations that need the results out
    # of the group.
    with set_xla_metadata(_scheduling_group_id=str(2 * layer)):
        arrived = exchange(rows_PCL, transfer.sizes_XX, limits.rows), _run(out)
    x_SCL, overlapped = lax.optimization_barrier(arrived)
    x_SD = _retile(x_SCL, (limits.rows, x_ND.shape[1]))
    gates_SK, ids_SK = jnp.split(notes_SK, 2, axis=1)
    came_S1 = jnp.arange(limits.rows)[:, None] < transfer.sizes_XX[:, lax.axis_index(EXPERT)].sum()
    y_SD = experts(x_SD, jnp.where(came_S1, ids_SK, own).astype(jnp.int32), gates_SK)
    with set_xla_metadata(_scheduling_group_id=str(2 * layer + 1)):
        arrived = exchange(_retile(y_SD, x_SCL.shape), transfer.sizes_XX.T, len(rows_PCL)), _run(back, overlapped)
    back_PCL, overlapped = lax.optimization_barrier(arrived)
    return merge(back_PCL, transfer).reshape(x_ND.shape), overlapped


def _retile(x: Array, shape: tuple[int, ...]) -> Array:
    """x in another shape, kept apart from its producer and consumers: fused with them it is slower."""
    return lax.optimization_barrier(lax.optimization_barrier(x).reshape(shape))


def _run(work: Work | None, *first: Array | None) -> Array | None:
    return _forward_group(work.function, *first, *work.arguments) if work else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _forward_group(function: Callable[..., Array], *arguments: Array) -> Array:
    """Calls the function, and takes its backward pass out of the scheduling group.

    Otherwise the group would contain a layer's forward and backward work.
    """
    return function(*arguments)


def _forward_group_bwd(function: Callable[..., Array], arguments: tuple[Array, ...], g: Array) -> tuple[Array, ...]:
    with set_xla_metadata(_scheduling_group_id=None):
        return jax.vjp(function, *arguments)[1](g)


_forward_group.defvjp(lambda function, *arguments: (function(*arguments), arguments), _forward_group_bwd)


def _local(ids: Array, device: Array | int, own: int) -> Array:
    """Ids among the `own` experts of a device; `own` for experts of other devices."""
    here = ids - device * own
    return jnp.where((here >= 0) & (here < own), here, own)


def plan_transfer(devices_NK: Array, copies: int, mesh: Mesh) -> Transfer:
    """This device's transfer, given the device of each choice, X or more for none; `copies`: devices of a token."""
    n, x = devices_NK.shape[0], mesh.size(*EXPERT)
    sends_NX = (devices_NK[:, :, None] == jnp.arange(x)).any(axis=1)
    counts_X = sends_NX.sum(axis=0, dtype=jnp.int32)
    ends_X = jnp.cumsum(counts_X)
    rows_NX = jnp.cumsum(sends_NX, axis=0, dtype=jnp.int32) - 1 + ends_X - counts_X
    rank_NX = jnp.cumsum(sends_NX, axis=1, dtype=jnp.int32) - 1
    copy_NXR = sends_NX[:, :, None] & (rank_NX[:, :, None] == jnp.arange(copies))
    token_NX = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32)[:, None], sends_NX.shape)
    row_P = jnp.arange(n * copies, dtype=jnp.int32)
    return Transfer(
        tokens_P=jnp.zeros(n * copies, jnp.int32)
        .at[jnp.where(sends_NX, rows_NX, n * copies)]
        .set(token_NX, mode="drop"),
        devices_P=(row_P[:, None] >= ends_X).sum(axis=1, dtype=jnp.int32),
        rows_NR=jnp.sum(copy_NXR * rows_NX[:, :, None], axis=1),
        sent_NR=copy_NXR.any(axis=1),
        sizes_XX=lax.all_gather(counts_X, EXPERT),
    )


@jax.custom_vjp
def expand(x_ND: Array, transfer: Transfer) -> Array:
    """The rows to send, [P, ...]. Its transpose is `merge`; both are gathers, so hidden states are never scattered."""
    return x_ND[transfer.tokens_P]


@jax.custom_vjp
def merge(rows_PD: Array, transfer: Transfer) -> Array:
    """The sum of each token's rows, [N, ...] in the rows' dtype, added in float32. Its transpose is `expand`."""
    y_ND = jnp.zeros((transfer.rows_NR.shape[0], *rows_PD.shape[1:]), jnp.float32)
    for r in range(transfer.rows_NR.shape[1]):
        sent = transfer.sent_NR[:, r].reshape(-1, *(1,) * (rows_PD.ndim - 1))
        y_ND += jnp.where(sent, rows_PD[transfer.rows_NR[:, r]], 0)
    return y_ND.astype(rows_PD.dtype)


# Rows that are not sent also get the cotangent of some token; nothing reads it.
expand.defvjp(lambda x, to: (expand(x, to), to), lambda to, g: (merge(g, to), None))
merge.defvjp(lambda x, to: (merge(x, to), to), lambda to, g: (expand(g, to), None))


def exchange(rows_PD: Array, sizes_XX: Array, buffer_rows: int) -> Array:
    """Sends runs of rows to the devices of the expert axis and returns the received rows by sender, [buffer_rows, ...].

    sizes_XX int32: rows that device i sends to device j. A sender's runs are in the order of the receivers, without
    gaps. Rows after the last received one are undefined: uninitialised memory on TPU, because writing zeros is slow,
    and NaN on CPU. The transpose is the exchange with transposed sizes.
    """
    return _exchange(buffer_rows, len(rows_PD), rows_PD, sizes_XX)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _exchange(buffer_rows: int, buffer_back: int, rows_PD: Array, sizes_XX: Array) -> Array:
    assert len(rows_PD) == buffer_back
    return _move(rows_PD, sizes_XX, buffer_rows)


def _exchange_bwd(_: int, buffer_back: int, sizes_XX: Array, g_SD: Array) -> tuple[Array, None]:
    with set_xla_metadata(_scheduling_group_id=None):
        return _move(g_SD, sizes_XX.T, buffer_back), None


_exchange.defvjp(lambda buffer_rows, _, rows, sizes: (_move(rows, sizes, buffer_rows), sizes), _exchange_bwd)


def _move(rows_PD: Array, sizes_XX: Array, buffer_rows: int) -> Array:
    me = lax.axis_index(EXPERT)
    sent_XX = jnp.cumsum(sizes_XX, axis=1) - sizes_XX  # the start of each run among the sender's rows
    landed_XX = jnp.cumsum(sizes_XX, axis=0) - sizes_XX  # and among the receiver's
    if platform() != "cpu":
        runs = (sent_XX[me], sizes_XX[me], landed_XX[me], sizes_XX[:, me])
        empty = lax.empty((buffer_rows, *rows_PD.shape[1:]), rows_PD.dtype)
        return lax.ragged_all_to_all(rows_PD, empty, *runs, axis_name=EXPERT[0])
    # XLA's CPU backend has no ragged transfer: each device gathers all rows and picks its own.
    everything_XPD = lax.all_gather(rows_PD, EXPERT)
    row_S = jnp.arange(buffer_rows, dtype=jnp.int32)
    ends_X = landed_XX[:, me] + sizes_XX[:, me]
    sender_S = (row_S[:, None] >= ends_X).sum(axis=1)
    came_S = sender_S < len(ends_X)
    sender_S = jnp.minimum(sender_S, len(ends_X) - 1)
    at_S = jnp.where(came_S, sent_XX[sender_S, me] + row_S - landed_XX[sender_S, me], 0)
    came = came_S.reshape(-1, *(1,) * (rows_PD.ndim - 1))
    return jnp.where(came, everything_XPD[sender_S, at_S], jnp.nan)
