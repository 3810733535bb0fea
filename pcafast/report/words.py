"""Keys of the report as words."""

_NAMES = {"macs": "MACs", "gpu": "GPU", "cuda": "CUDA", "pcafast": "pcafast"}


def words(key: str, *, begin: bool = True) -> str:
    """``batch_size`` as Batch size, or as batch size where it does not begin a line."""
    first, *rest = (_NAMES.get(word, word) for word in str(key).split("_"))
    if begin and first not in _NAMES.values():
        first = first[:1].upper() + first[1:]
    return " ".join([first, *rest])
