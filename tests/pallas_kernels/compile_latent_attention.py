"""Compiles latent attention and its gradients for a TPU that is not attached: python FILE TOPOLOGY KIND CORES CASE."""

import functools
import os
import re
import sys

os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

from pallas_kernels.latent_attention import latent_attention
from pallas_kernels.pricing.shapes import LATENT_ATTENTION


def step(*arrays: jax.Array) -> tuple:
    """Result and gradients."""
    *operands, segments_BT, segments_BS, offset, g = arrays
    q, q_rope, k, k_rope, v = operands if len(operands) == 5 else (operands[0], None, operands[1], None, operands[2])

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("attention"))
    def attend(q, q_rope, k, k_rope, v):
        return latent_attention((q, q_rope), (k, k_rope), v, (segments_BT, segments_BS), scale=0.1, offset=offset)

    o, pull = jax.vjp(attend, q, q_rope, k, k_rope, v)
    return o, pull(g)


def main(topology: str, kind: str, cores: int, cases: list[str]) -> None:
    """Compiles each case: SHAPE, SHAPE:float32, SHAPE:T or SHAPE:T:S."""
    target = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    assert target.device_kind == kind, target.device_kind
    device = AbstractDevice(platform="tpu", device_kind=kind, num_cores=cores)
    for case in cases:
        name, *rest = case.split(":")
        shape, dtype = LATENT_ATTENTION[name], jnp.float32 if rest == ["float32"] else jnp.bfloat16
        t, s = (
            ([int(n) for n in rest if n != "float32"] * 2)[:2] if rest and rest != ["float32"] else (shape.tokens,) * 2
        )

        def array(*dims, dtype=dtype):
            return jax.ShapeDtypeStruct(dims, dtype, sharding=SingleDeviceSharding(target))

        h, j = shape.heads, shape.kv_heads
        queries = [array(1, h, t, shape.nope), *([array(1, h, t, shape.rope)] if shape.rope else [])]
        keys = [
            array(1, j, s, shape.nope),
            *([array(1, s, shape.rope)] if shape.rope else []),
            array(1, j, s, shape.value),
        ]
        segments = [array(1, t, dtype=jnp.int32), array(1, s, dtype=jnp.int32), array(dtype=jnp.int32)]
        args = [*queries, *keys, *segments, array(1, h, t, shape.value)]
        with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
            traced = jax.jit(step).trace(*args)
        text = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
        # The policy keeps the forward kernel's results, so it must not run again.
        calls = [
            len(re.findall(rf"%\w*latent_attention_{way}[.\w]* = .* custom-call", text))
            for way in ("forward", "backward")
        ]
        assert calls == [1, 1], (case, calls)
        print("compiled", case, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:])
