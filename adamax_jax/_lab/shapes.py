"""The shapes of the arrays of well-known models, for measurements."""

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


def llama2(
    layers: int = 32,
    width: int = 4_096,
    hidden: int = 11_008,
    keys: int = 4_096,
    vocabulary: int = 32_000,
) -> dict[str, Shape]:
    """Llama 2 (Touvron et al., 2023): 291 arrays, 6,738,415,616 numbers.

    ``keys`` is the width of all keys together, and that of all values.
    """
    shapes = {"tokens": (vocabulary, width)}
    for i in range(layers):
        shapes |= {
            f"{i}.attention.norm.scale": (width,),
            f"{i}.attention.query.kernel": (width, width),
            f"{i}.attention.key.kernel": (width, keys),
            f"{i}.attention.value.kernel": (width, keys),
            f"{i}.attention.out.kernel": (width, width),
            f"{i}.mlp.norm.scale": (width,),
            f"{i}.mlp.gate.kernel": (width, hidden),
            f"{i}.mlp.in.kernel": (width, hidden),
            f"{i}.mlp.out.kernel": (hidden, width),
        }
    return shapes | {"norm.scale": (width,), "head.kernel": (width, vocabulary)}


def llama2_70b() -> dict[str, Shape]:
    """Its largest, whose heads share keys: 723 arrays, 68,976,648,192 numbers."""
    return llama2(layers=80, width=8_192, hidden=28_672, keys=1_024)


def many(leaves: int = 100, size: int = 1_000) -> dict[str, Shape]:
    """Arrays of one small size."""
    return {str(i): (size,) for i in range(leaves)}


def matrix(size: int) -> Shape:
    """One array, in rows of 1000 where they divide it."""
    return (size // 1000, 1000) if size % 1000 == 0 else (size,)
