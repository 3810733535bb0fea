"""Random numbers that depend only on the seed and on the place in the run, so that a run can go on where it stopped."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def seed_stage(seed: int, stage: int, *loaders: Any) -> None:
    """Seed torch, numpy, Python and the loaders with a number derived from the run's seed and the stage's.

    A loader follows if it draws from torch's global generator, as a ``DataLoader`` does, has a generator of its own as
    ``DataLoader(..., generator=...)``, or has a method ``set_epoch``, which is called with the stage's number; each of
    them also as its ``sampler``.
    """
    number = int.from_bytes(hashlib.sha256(f"{seed} {stage}".encode()).digest()[:4], "big")
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)
    for generator in _generators(loaders):
        generator.manual_seed(number)
    for part in _parts(loaders):
        if hasattr(part, "set_epoch"):
            part.set_epoch(stage)


@contextmanager
def random_states_kept(*loaders: Any) -> Iterator[None]:
    """The caller's random states, those of the loaders' own generators included, are as before after the block."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    generators = [torch.default_generator, *_generators(loaders)]
    states = [generator.get_state() for generator in generators]
    of_numpy, of_python = np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        np.random.set_state(of_numpy)
        random.setstate(of_python)


def _generators(loaders: tuple[Any, ...]) -> list[torch.Generator]:
    found = [getattr(part, "generator", None) for part in _parts(loaders)]
    return [generator for generator in found if isinstance(generator, torch.Generator)]


def _parts(loaders: tuple[Any, ...]) -> list[Any]:
    return [part for loader in loaders for part in (loader, getattr(loader, "sampler", None)) if part is not None]
