"""JAX's training step on the nets of `benchmark.py`: reads how often to step, answers seconds a step, until its end.

    python jax_peer.py NET RULE FORM

Needs jax and optax alone. NET is one of NETS, RULE `bp`, `dfa` or `lra_e`, FORM `step` (jitted, called once a
mini-batch) or `scan` (a hundred mini-batches in one call). Pixels become floats within the step, as with us.
"""

import os
import sys
import time
from functools import partial

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

import jax  # pyright: ignore[reportMissingImports]
import jax.numpy as jnp  # pyright: ignore[reportMissingImports]
import numpy as np
import optax  # pyright: ignore[reportMissingImports]
from jax import lax  # pyright: ignore[reportMissingImports]

CHUNK = 100  # mini-batches
# in_shape, convolutions (channels, kernel, stride), sizes of dense layers, classes, batch, optimizer
NETS = {
    "784-256x4-10, batch 50, AdamW": ((784,), [], [256] * 4 + [10], 10, 50, optax.adamw(1e-3, weight_decay=0.01)),
    "784-200-200-10, batch 64, RMSprop": ((784,), [], [200, 200, 10], 10, 64, optax.rmsprop(1e-4, decay=0.9)),
    "all-convolutional, 2 classes, batch 64, AdamW": (
        (32, 32, 3),
        [(96, 5, 2), (96, 3, 2), (96, 3, 1)],
        [1],
        2,
        64,
        optax.adamw(1e-3, weight_decay=0.01),
    ),
}


def product(h, W, stride):
    """A layer's product: a dense layer's, or a convolution's of images (N, H, W, C)."""
    if W.ndim == 2:
        return h.reshape(len(h), -1) @ W
    return lax.conv_general_dilated(h, W, (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def main(title: str, rule: str, form: str) -> None:
    shape, convolutions, dense, classes, batch, optimizer = NETS[title]
    random = np.random.default_rng(0)
    strides = [stride for _, _, stride in convolutions] + [1] * len(dense)
    L = len(strides)

    def forward(w, x):
        z, h = [], [x]
        for l in range(L):
            z.append(product(h[-1], w[f"W{l}"], strides[l]) + w[f"b{l}"])
            h.append(jnp.tanh(z[-1]))
        return z, h[:-1]

    def drawn(*size):
        fan_in = int(np.prod(size[:-1]))
        return jnp.array(random.uniform(-1, 1, size) / fan_in**0.5, jnp.float32)

    w, fixed, h = {}, {}, jnp.zeros((1, *shape))
    for l in range(L):
        size = (convolutions[l][1],) * 2 + (h.shape[-1], convolutions[l][0]) if l < len(convolutions) else None
        w[f"W{l}"] = drawn(*(size or (h[0].size, dense[l - len(convolutions)])))
        h = product(h, w[f"W{l}"], strides[l])
        w[f"b{l}"] = jnp.zeros(h.shape[-1])
        if rule == "dfa" and l < L - 1:
            fixed[f"B{l}"] = drawn(dense[-1], h[0].size)
        if rule == "lra_e" and l > 0:
            w[f"E{l}"] = drawn(*w[f"W{l}"].shape)

    def gradient_of_product(l, w, h, d):
        """Of W and b from the layer's input and the error at its output, per sample."""
        if w[f"W{l}"].ndim == 2:
            return {f"W{l}": h.reshape(len(h), -1).T @ d / len(h), f"b{l}": d.mean(0)}
        _, pull = jax.vjp(lambda W: product(h, W, strides[l]), w[f"W{l}"])
        return {f"W{l}": pull(d / len(h))[0], f"b{l}": d.sum((0, 1, 2)) / len(h)}

    def error(z, y):
        return jax.nn.softmax(z) - y if classes > 2 else jax.nn.sigmoid(z) - y

    def bp(w, x, y):
        def loss(w):
            z = forward(w, x)[0][-1]
            each = (
                optax.softmax_cross_entropy(z, y) if classes > 2 else optax.sigmoid_binary_cross_entropy(z, y).sum(-1)
            )
            return each.mean()

        return jax.grad(loss)(w)

    def dfa(w, x, y):
        z, h = forward(w, x)
        e = error(z[-1], y)
        g = gradient_of_product(L - 1, w, h[-1], e)
        for l in range(L - 1):
            d = (e @ fixed[f"B{l}"]).reshape(z[l].shape) * (1 - h[l + 1] ** 2)
            g |= gradient_of_product(l, w, h[l], d)
        return g

    def lra_e(w, x, y, beta=0.1):
        z, h = forward(w, x)
        e = error(z[-1], y)
        g = gradient_of_product(L - 1, w, h[-1], e)
        for l in range(L - 1, 0, -1):
            g[f"E{l}"] = g[f"W{l}"]
            e = h[l] - jnp.tanh(z[l - 1] - beta * (e @ w[f"E{l}"].T))
            g |= gradient_of_product(l - 1, w, h[l - 1], e)
        return g

    grads = {"bp": bp, "dfa": dfa, "lra_e": lra_e}[rule]

    def step(carry, batch):
        w, state = carry
        pixels, y = batch
        updates, state = optimizer.update(grads(w, pixels.astype(jnp.float32) / 255, y), state, w)
        return (optax.apply_updates(w, updates), state), None

    pixels = jnp.array(random.integers(0, 256, (CHUNK, batch, *shape), dtype=np.uint8))
    labels = random.integers(0, classes, (CHUNK, batch))
    y = jnp.array(np.eye(classes, dtype=np.float32)[labels][..., -dense[-1] :])
    carry = w, optimizer.init(w)
    scan = jax.jit(lambda carry, pixels, y: lax.scan(step, carry, (pixels, y))[0], donate_argnums=0)
    once = jax.jit(lambda carry, pixels, y: step(carry, (pixels, y))[0], donate_argnums=0)
    batches = [(pixels[i], y[i]) for i in range(CHUNK)]

    def seconds(times: int) -> float:
        nonlocal carry
        start = time.perf_counter()
        if form == "scan":
            times = -(-times // CHUNK) * CHUNK
            for _ in range(times // CHUNK):
                carry = scan(carry, pixels, y)
        else:
            for i in range(times):
                carry = once(carry, *batches[i % CHUNK])
        jax.block_until_ready(carry)
        return (time.perf_counter() - start) / times

    for line in iter(partial(sys.stdin.readline), ""):
        print(seconds(int(line)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
