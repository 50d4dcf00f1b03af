"""How the time of a layer grows with the number of experts when two are selected.

    python benchmarks/growth.py

A linear 2048 wide, 2048 tokens, experts of rank 16, k = 2: the time of forward and backward, the
base's own taken off, for 8 to 128 experts. What is computed per token stays the same, so a path
whose cost follows the selected experts grows by the router only.
"""

from __future__ import annotations

from report import main
from subjects import Base, adapted, forward_backward, layer_input, mixture
from timing import Result, Settings, interleave

TOKENS, TOP_K, RANK = 2048, 2, 16
SIZES = (8, 16, 32, 64, 128)


def measure(settings: Settings, tokens: int = TOKENS, width: int = 2048) -> Result:
    """The adapter's part for each number of experts, over that for the fewest."""
    base = Base(width).to(settings.device, settings.dtype)
    x, upstream = layer_input(tokens, settings, width)
    sizes = (SIZES[0], SIZES[-1]) if settings.quick else SIZES
    layers = {"base": base} | {
        f"{experts} experts": adapted(
            base, mixture(["linear"], num_experts=experts, top_k=TOP_K, r=RANK), settings
        )
        for experts in sizes
    }
    times = interleave(
        {name: forward_backward(layer, x, upstream, settings) for name, layer in layers.items()},
        settings,
        label=f"{tokens} tokens",
    )
    result = Result()
    result.add(f"k {TOP_K}, r {RANK}, {tokens} tokens", times)
    fewest = f"{sizes[0]} experts"
    result.comparisons = [
        times.compare(
            f"{experts} experts, k {TOP_K}, r {RANK}",
            f"{experts} experts",
            fewest,
            "base",
            **({"at_most": 2.0} if experts == sizes[-1] else {}),
        )
        for experts in sizes[1:]
    ]
    return result


if __name__ == "__main__":
    main(measure, __file__, __doc__)
