"""The structures of backends/kernels as ctypes has them: one class a C struct, fields in its order."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p


class Grid(ctypes.Structure):
    _fields_ = [
        ("step", c_float),
        ("inverse", c_float),
        ("zero_point", c_int32),
        ("qmin", c_int32),
        ("qmax", c_int32),
    ]


class Requantize(ctypes.Structure):
    _fields_ = [
        ("multiplier", c_void_p),
        ("shift", c_void_p),
        ("ratio", c_void_p),
        ("per_channel", c_int64),
        ("zero_point", c_int32),
        ("qmin", c_int32),
        ("qmax", c_int32),
    ]


class Linear(ctypes.Structure):
    _fields_ = [
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("scale", c_void_p),
        ("table", c_void_p),
        ("n", c_int64),
        ("k", c_int64),
        ("flip", c_int64),
        ("behind", c_int64),
        ("curve", c_int64),
        ("requantize", Requantize),
        ("grid", Grid),
    ]


class IntSoftmax(ctypes.Structure):
    _fields_ = [
        ("table", c_void_p),
        ("multiplier", c_int64),
        ("shift", c_int64),
        ("limit", c_int64),
        ("divider", c_int64),
        ("last", c_int64),
    ]


class Attention(ctypes.Structure):
    _fields_ = [
        ("q_signed", c_int64),
        ("q_zero", c_int64),
        ("k_signed", c_int64),
        ("k_zero", c_int64),
        ("v_signed", c_int64),
        ("v_zero", c_int64),
        ("scale", c_float),
        ("probs", Grid),
        ("whole", IntSoftmax),
        ("out", Requantize),
    ]


class Strides(ctypes.Structure):
    _fields_ = [("batch", c_int64), ("head", c_int64), ("row", c_int64)]


class Tokens(ctypes.Structure):
    _fields_ = [
        ("q", c_void_p),
        ("k", c_void_p),
        ("v", c_void_p),
        ("mask", c_void_p),
        ("q_strides", Strides),
        ("k_strides", Strides),
        ("v_strides", Strides),
        ("mask_strides", Strides),
        ("mask_step", c_int64),
        ("mask_kind", c_int64),
        ("batch", c_int64),
        ("heads", c_int64),
        ("rows", c_int64),
        ("keys", c_int64),
        ("dim", c_int64),
    ]


class Product(ctypes.Structure):
    _fields_ = [
        ("n", c_int64),
        ("k", c_int64),
        ("m", c_int64),
        ("a_signed", c_int64),
        ("a_zero", c_int64),
        ("b_signed", c_int64),
        ("b_zero", c_int64),
        ("b_in_columns", c_int64),
        ("a_stride", c_int64),
        ("b_stride", c_int64),
    ]


class IntNorm(ctypes.Structure):
    _fields_ = [
        ("gain", c_void_p),
        ("offset", c_void_p),
        ("n", c_int64),
        ("fraction", c_int64),
        ("eps", c_int64),
        ("shift", c_int64),
        ("zero_point", c_int64),
        ("qmin", c_int64),
        ("qmax", c_int64),
    ]


class Term(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p),
        ("multiplier", c_void_p),
        ("bytes", c_int64),
        ("is_unsigned", c_int64),
        ("zero_point", c_int64),
        ("per_channel", c_int64),
        ("is_row", c_int64),
    ]


class Sum(ctypes.Structure):
    _fields_ = [
        ("terms", Term * 3),
        ("count", c_int64),
        ("n", c_int64),
        ("shift", c_int64),
        ("zero_point", c_int64),
        ("qmin", c_int64),
        ("qmax", c_int64),
        ("out_bytes", c_int64),
    ]
