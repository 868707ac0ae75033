"""Names of tensors and parameters as C++ may have them."""

from __future__ import annotations

_KEYWORDS = """
alignas alignof and and_eq asm auto bitand bitor bool break case catch char char8_t char16_t char32_t
class compl concept const consteval constexpr constinit const_cast continue co_await co_return co_yield
decltype default delete do double dynamic_cast else enum explicit export extern false float for friend
goto if inline int long mutable namespace new noexcept not not_eq nullptr operator or or_eq private
protected public register reinterpret_cast requires return short signed sizeof static static_assert
static_cast struct switch template this thread_local throw true try typedef typeid typename union unsigned
using virtual void volatile wchar_t while xor xor_eq
"""
_PRINTED = """
batch c diagonal end head kv params place q queries query row row_blocks rows s seqlen_kv seqlen_q t terms
abs max min read bf16 fp16 int64_t ceil_div exp2_approx fabsf floor_div floor_mod fmaxf fminf log2_approx
multiples_of negative_infinity reciprocal_approx rsqrt_approx saturated scaled_tanh sqrt_approx
tanh_approx
"""
_RESERVED = frozenset((_KEYWORDS + _PRINTED).split())


def identifier(name: str) -> str:
    """`name`, with an underscore behind it where C++ or the printed code means something else by it.

    Raises `ValueError` where it is no identifier at all.
    """
    if not (name.isidentifier() and name.isascii()):
        raise ValueError(f"{name!r} is no C++ identifier")
    return f"{name}_" if name in _RESERVED else name


__all__ = ["identifier"]
