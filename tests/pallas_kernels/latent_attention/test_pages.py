"""Writing tokens to the pages of a cache."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.latent_attention import pages


def test_append() -> None:
    """Chunks, single tokens and sequences without any; padding and all other slots stay as they were."""
    lengths, queries, k = [9, 4, 0, 5], [6, 1, 0, 5], 4
    starts = np.cumsum([0, *queries])
    table_NP = np.array([[7, 2, 5], [0, 9, 9], [9, 9, 9], [3, 6, 9]])
    rng = np.random.default_rng(0)
    latent_LKC, rope_LRK = rng.normal(size=(10, k, 3)), rng.normal(size=(10, 2, k))
    c_TC, r_TR = rng.normal(size=(15, 3)), rng.normal(size=(15, 2))
    integers = [jnp.asarray(x, jnp.int32) for x in (table_NP, lengths, starts)]
    ours = jax.jit(pages.append)(*(jnp.asarray(x, jnp.float32) for x in (latent_LKC, rope_LRK, c_TC, r_TR)), *integers)
    for n, (length, count) in enumerate(zip(lengths, queries, strict=True)):
        for i in range(count):
            slot = length - count + i
            latent_LKC[table_NP[n, slot // k], slot % k] = c_TC[starts[n] + i]
            rope_LRK[table_NP[n, slot // k], :, slot % k] = r_TR[starts[n] + i]
    np.testing.assert_array_equal(ours[0], latent_LKC.astype(np.float32))
    np.testing.assert_array_equal(ours[1], rope_LRK.astype(np.float32))
