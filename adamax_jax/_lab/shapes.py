"""Shapes of arrays, for measurements."""

Shape = tuple[int, ...]


def transformer(
    layers: int = 8, width: int = 512, vocabulary: int = 16_384, context: int = 1_024
) -> dict[str, Shape]:
    """GPT-2's parameters at another size: 100 arrays, 34,132,992 numbers."""
    shapes = {"tokens": (vocabulary, width), "positions": (context, width)}
    for i in range(layers):
        shapes |= {
            f"{i}.attention.norm.scale": (width,),
            f"{i}.attention.norm.bias": (width,),
            f"{i}.attention.in.kernel": (width, 3 * width),
            f"{i}.attention.in.bias": (3 * width,),
            f"{i}.attention.out.kernel": (width, width),
            f"{i}.attention.out.bias": (width,),
            f"{i}.mlp.norm.scale": (width,),
            f"{i}.mlp.norm.bias": (width,),
            f"{i}.mlp.in.kernel": (width, 4 * width),
            f"{i}.mlp.in.bias": (4 * width,),
            f"{i}.mlp.out.kernel": (4 * width, width),
            f"{i}.mlp.out.bias": (width,),
        }
    return shapes | {"norm.scale": (width,), "norm.bias": (width,)}


def many(leaves: int = 100, size: int = 1_000) -> dict[str, Shape]:
    """Arrays of one small size."""
    return {str(i): (size,) for i in range(leaves)}
