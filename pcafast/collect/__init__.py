"""Where and when statistics are taken: hooks on the chosen layers of a model."""

from pcafast.collect.collection import Collection, collect

__all__ = ["Collection", "collect"]
