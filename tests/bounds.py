"""Forward error bounds of a computed result, carried through the computation in float64.

A sum of n products that is rounded n times differs from the exact sum by at most n u sum |a||b|, u being half of eps.
Roundings are independent, so the errors of a sum grow with the square root of n (Higham and Mary, "A new approach to
probabilistic rounding error analysis", 2019): their deviation is below sqrt(n) u sum |a||b| / 2, whatever the order of
the sum. Errors that enter a further sum add up in squares too. So a bound depends only on the lengths and the sizes of
the sums, not on the CPU or on the results of another implementation.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

_DEVIATIONS = 5.0  # that a single number may be off
_DEVIATIONS_OF_SCALE = 8.0  # that the scale of all numbers may be off: those of a row share some of their errors
_OF_MEAN_SQUARE = 1.25  # the root mean square of many errors, over that of their deviations
_FUNCTION = 2.0  # deviation of exp, sigmoid and the like in float32, in halves of the last place


class Number(NamedTuple):
    """Float64 values, and of a computation of them, each of the same shape:

    noise, the standard deviation of errors that are independent of each other, and error, a bound for those that
    others may share, which add up in full.
    """

    value: np.ndarray
    noise: np.ndarray
    error: np.ndarray

    @property
    def bound(self) -> np.ndarray:
        """How far off a number may be."""
        return self.error + _DEVIATIONS * self.noise

    def __add__(self, other: "Number") -> "Number":
        total = Number(self.value + other.value, np.hypot(self.noise, other.noise), self.error + other.error)
        return total.to("float32")

    def __sub__(self, other: "Number") -> "Number":
        return self + Number(-other.value, other.noise, other.error)

    def __mul__(self, other: "Number") -> "Number":
        a, b = np.abs(self.value), np.abs(other.value)
        noise = np.hypot(a * other.noise, self.noise * b)
        error = a * other.error + self.error * b + self.bound * other.bound
        return Number(self.value * other.value, noise, error).to("float32")

    def __getitem__(self, at) -> "Number":
        return Number(*(x[at] for x in self))

    def to(self, dtype) -> "Number":
        """Rounded to a dtype."""
        return Number(self.value, np.hypot(self.noise, _unit(dtype) / 2 * np.abs(self.value)), self.error)

    def sum(self, axis: int) -> "Number":
        """A sum in float32, in any order."""
        rounding = _unit() / 2 * self.value.shape[axis] ** 0.5 * np.abs(self.value).sum(axis)
        noise = np.hypot(np.sqrt((self.noise**2).sum(axis)), rounding)
        return Number(self.value.sum(axis), noise, self.error.sum(axis))

    def through(self, function: Callable, slope: float) -> "Number":
        """A function of no steeper slope, in float32."""
        value = function(self.value)
        return Number(value, np.hypot(slope * self.noise, _FUNCTION * _unit() * np.abs(value)), slope * self.error)

    def shared(self) -> "Number":
        """The same, to be used in many numbers whose errors are then alike."""
        return Number(self.value, np.zeros_like(self.noise), self.bound)

    def each(self, function: Callable) -> "Number":
        """A change of shape."""
        return Number(*map(function, self))


def exact(x) -> Number:
    """What goes in: it is what it is."""
    value = np.asarray(x, np.float64)
    return Number(value, np.zeros_like(value), np.zeros_like(value))


def stack(numbers) -> Number:
    """Along a new first axis."""
    return Number(*map(np.stack, zip(*numbers, strict=True)))


def concatenate(numbers) -> Number:
    """Along the first axis."""
    return Number(*map(np.concatenate, zip(*numbers, strict=True)))


def product(subscripts: str, a: Number, b: Number) -> Number:
    """np.einsum of two operands, products and sums in float32."""
    terms, result = subscripts.split("->")
    sizes = dict(zip(terms.replace(",", ""), (*a.value.shape, *b.value.shape), strict=True))
    length = int(np.prod([size for name, size in sizes.items() if name not in result]))

    def einsum(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.einsum(subscripts, x, y, optimize=True) if x.any() and y.any() else np.zeros(())

    size_a, size_b = np.abs(a.value), np.abs(b.value)
    value = np.einsum(subscripts, a.value, b.value, optimize=True)
    rounding = _unit() / 2 * length**0.5 * einsum(size_a, size_b)
    noise = np.sqrt(rounding**2 + einsum(size_a**2, b.noise**2) + einsum(a.noise**2, size_b**2))
    error = einsum(size_a, b.error) + einsum(a.error, size_b + b.bound)
    return Number(value, np.broadcast_to(noise, value.shape), np.broadcast_to(error, value.shape))


def softmax(scores: Number, sees: np.ndarray) -> Number:
    """exp(scores) over the last axis, normalised; in float32, over what is seen. Rows that see nothing give 0.

    A kernel may keep the sum's logarithm alone: what it rounds to, and scores, go into the exponent. So weights are as
    good as the last bit of the largest number there.
    """
    value = np.where(sees, scores.value, -np.inf)
    top = np.where(sees.any(-1, keepdims=True), value.max(-1, keepdims=True), 0)
    weights = np.exp(value - top)
    total = np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    weights, logarithm = weights / total, top + np.log(total)
    sizes = np.where(sees, np.abs(scores.value), 0) + np.abs(logarithm)
    off = np.where(sees, np.hypot(scores.noise, _unit() * (_FUNCTION + sizes)), 0)
    shared = (weights * np.where(sees, scores.error, 0)).sum(-1, keepdims=True) + _DEVIATIONS * _unit() * (
        np.abs(logarithm) + scores.value.shape[-1] ** 0.5
    )
    shared = shared + _DEVIATIONS * np.sqrt(((weights * off) ** 2).sum(-1, keepdims=True))
    underflow = np.where(sees, float(np.finfo(np.float32).tiny), 0)
    return Number(weights, weights * off, weights * (np.where(sees, scores.error, 0) + shared) + underflow)


def attention(q: Number, k: Number, v: Number, g: Number, sees: np.ndarray, scale: float, dtype) -> tuple[Number, ...]:
    """softmax(scale q k^T) v and its gradients (o, dq, dk, dv) for the cotangent g; q [B, H, T, K], k [B, H, S, K].

    Weights and gradients of scores are rounded to the dtype before they are multiplied; so are o and dq. dk and dv are
    not rounded yet: heads may share them.
    """
    p = softmax(product("bhtk,bhsk->bhts", q, k) * exact(scale), sees)
    o = product("bhts,bhsv->bhtv", p.to(dtype), v).to(dtype)
    dp = product("bhtv,bhsv->bhts", g, v).to(dtype)
    of_weights = (p * dp).sum(-1)  # the mean of dp, and so is g o: either may be taken
    mean = product("bhtv,bhtv->bht", g, o)
    mean = Number(mean.value, np.hypot(mean.noise, of_weights.noise), mean.error + of_weights.error).shared()
    ds = (p * (dp - mean[..., None]) * exact(scale)).to(dtype)
    dq = product("bhts,bhsk->bhtk", ds, k).to(dtype)
    return o, dq, product("bhts,bhtk->bhsk", ds, q), product("bhts,bhtv->bhsv", p.to(dtype), g)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x))."""
    return 1 / (1 + np.exp(-x))


def silu(x: Number) -> tuple[Number, Number]:
    """x sigmoid(x) and its derivative."""
    s = sigmoid(x.value)
    rest = x.value * s * (1 - s)
    noise = np.hypot(0.5 * x.noise, _FUNCTION * _unit() * (s + np.abs(rest)))  # rounded before they cancel
    return x.through(lambda a: a * sigmoid(a), 1.1), Number(s + rest, noise, 0.5 * x.error)


def grouped_swiglu(
    x: Number,
    experts_NK: np.ndarray,
    gates: Number,
    weights: tuple[Number, Number, Number],
    g: Number,
    dtype,
    turns: int = 1,
) -> list[Number]:
    """The experts' SwiGLU over pairs and its gradients (y, dx, dgates, dw_gate, dw_up, dw_down) for the cotangent g.

    experts_NK: an id of no expert drops its pair. Products that are operands of others are rounded to the dtype first.
    turns: how often the sums are rounded, once per chunk of pairs.
    """
    (n, k), w_gate, w_up, w_down = experts_NK.shape, *weights
    pairs_of = [np.flatnonzero(experts_NK == e) for e in range(len(w_gate.value))]
    found: list[list[Number]] = [[] for _ in range(6)]
    for e, pairs in enumerate(pairs_of):
        x_P, g_P, gate_P = x[pairs // k], g[pairs // k], gates.each(lambda a, pairs=pairs: a.reshape(-1)[pairs, None])
        a, u = (product("pd,df->pf", x_P, w[e]).to(dtype) for w in (w_gate, w_up))
        s, by_a = silu(a)
        dh = product("pd,fd->pf", g_P, w_down[e]).to(dtype)
        hidden, da, du = (z.to(dtype) for z in (s * u * gate_P, dh * gate_P * u * by_a, dh * gate_P * s))
        parts = [
            product("pf,fd->pd", hidden, w_down[e]),
            product("pf,df->pd", da, w_gate[e]) + product("pf,df->pd", du, w_up[e]),
            (s * u * dh).sum(1),
            product("pd,pf->df", x_P, da),
            product("pd,pf->df", x_P, du),
            product("pf,pd->fd", hidden, g_P),
        ]
        for numbers, part in zip(found, parts, strict=True):
            numbers.append(part)

    def by_pair(numbers: list[Number]) -> Number:
        own = concatenate(numbers)
        whole = exact(np.zeros((n * k, *own.value.shape[1:])))
        for all_pairs, kept in zip(whole, own, strict=True):
            all_pairs[np.concatenate(pairs_of)] = kept
        return whole.each(lambda a: a.reshape(n, k, *a.shape[1:]))

    y, dx = (by_pair(numbers).to(dtype).sum(1) for numbers in found[:2])
    results = [y, dx, *map(stack, found[3:])]
    for _ in range(turns):
        results = [result.to(dtype) for result in results]
    return [*results[:2], by_pair(found[2]), *results[2:]]


class Ratios(NamedTuple):
    """Errors over their bounds: the largest of a number, the root mean square of all, and that of their scale.

    Independent errors cancel in a sum over all numbers: what is left of them there is a wrong scale. That finds faults
    far below the last bit of a single number.
    """

    number: float
    mean_square: float
    scale: float


def ratios(got, true: Number) -> Ratios:
    """How far off a result is, in parts of what is allowed."""
    off = np.asarray(got, np.float64) - true.value
    assert off.shape == true.value.shape, (off.shape, true.value.shape)
    if not off.size:
        return Ratios(0.0, 0.0, 0.0)
    if not np.isfinite(off).all() or (off[true.bound == 0] != 0).any():
        return Ratios(np.inf, np.inf, np.inf)
    if not off.any():
        return Ratios(0.0, 0.0, 0.0)
    expected = true.noise + true.error
    number = (np.abs(off) / np.where(true.bound == 0, 1, true.bound)).max()
    square = np.sqrt((off**2).mean() / (expected**2).mean()) / (_OF_MEAN_SQUARE + _DEVIATIONS / off.size**0.5)
    deviation = np.sqrt(((expected * true.value) ** 2).sum())
    scale = np.abs((off * true.value).sum()) / (_DEVIATIONS_OF_SCALE * deviation) if deviation else 0.0
    return Ratios(float(number), float(square), float(scale))


def check(got, true: Number, what: object = "") -> None:
    """Fails if a number, the mean square of all, or their scale is further off than its bound."""
    for name, ratio in ratios(got, true)._asdict().items():
        assert ratio <= 1, f"{what}: the {name} is off by {ratio:.3g} times its bound"


def _unit(dtype="float32") -> float:
    """Half of the distance from 1 to the next number."""
    return float(jnp.finfo(dtype).eps) / 2
