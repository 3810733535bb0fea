"""The structures of csrc/kernels.h that kernels are called with, filled in from tensors."""

import ctypes

import torch


class ChannelView(ctypes.Structure):
    DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("sizes", ctypes.c_int64 * 3),
        ("strides", ctypes.c_int64 * 3),
    )

    @classmethod
    def of(cls, x: torch.Tensor) -> "ChannelView":
        sizes, strides = (ctypes.c_int64 * 3)(*x.shape), (ctypes.c_int64 * 3)(*x.stride())
        return cls(x.data_ptr(), cls.DTYPES.index(x.dtype), sizes, strides)


class MapView(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("sizes", ctypes.c_int64 * 4),
        ("strides", ctypes.c_int64 * 4),
    )

    @classmethod
    def of(cls, x: torch.Tensor) -> "MapView":
        sizes, strides = (ctypes.c_int64 * 4)(*x.shape), (ctypes.c_int64 * 4)(*x.stride())
        return cls(x.data_ptr(), ChannelView.DTYPES.index(x.dtype), sizes, strides)


class TaylorArgs(ctypes.Structure):
    _fields_ = (
        ("activation", ChannelView),
        ("gradient", ChannelView),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("examples", "positions", "sums", "skipped", "workspace")),
    )


class MomentsArgs(ctypes.Structure):
    STATE = ("count", "mean", "centred_squares", "absolute", "zeros", "skipped")
    _fields_ = (("x", ChannelView), *((name, ctypes.c_void_p) for name in (*STATE, "workspace")))


class CovarianceArgs(ctypes.Structure):
    STATE = ("count", "mean", "comoment", "skipped")
    _fields_ = (
        ("x", ChannelView),
        ("weight", ctypes.c_void_p),
        ("groups", ctypes.c_int64),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in (*STATE, "workspace")),
    )


class PatchCovarianceArgs(ctypes.Structure):
    STATE = ("patches", "count", "left", "right", "comoment", "skipped")
    _fields_ = (
        ("x", MapView),
        ("height", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("source_rows", ctypes.c_void_p),
        ("source_columns", ctypes.c_void_p),
        ("taps", ctypes.c_int64),
        ("tap_offsets", ctypes.c_void_p),
        ("row_step", ctypes.c_int64),
        ("column_step", ctypes.c_int64),
        ("lattices", ctypes.c_int64),
        ("pairs", ctypes.c_void_p),
        ("slots", ctypes.c_int64),
        ("slot_ends", ctypes.c_void_p),
        ("slot_lattices", ctypes.c_void_p),
        ("groups", ctypes.c_int64),
        ("patches_per_example", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in (*STATE, "workspace")),
        ("padded", ctypes.c_int64),
    )


class RankArgs(ctypes.Structure):
    _fields_ = (
        ("x", MapView),
        ("rtol", ctypes.c_double),
        ("atol", ctypes.c_double),
        ("ranks", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
    )
