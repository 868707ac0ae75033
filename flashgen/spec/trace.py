"""Masks and scores written as Python functions: run once on symbols, they leave a text of the language.

    trace(lambda q, kv: (kv <= q) & (q - kv < 4096), kind="mask")     'kv <= q and q - kv < 4096'
    trace(lambda score: 50 * tanh(score / 50), kind="score")          '50 * tanh(score / 50)'

A parameter's name says what it stands for: a variable, a tensor, a parameter of the spec, an entry of the
gallery. What Python does not hand to the symbols (`and`, `or`, `not`, `if`, ``a < b < c``) asks them whether
they are true, and is refused with what to write instead: nothing is left out silently.
"""

from __future__ import annotations

import ast
import inspect
import math
import numbers
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from flashgen.errors import SpecError
from flashgen.spec.gallery import GALLERY
from flashgen.spec.suggest import did_you_mean, quoted, shortened
from flashgen.spec.symbols import MASK_VARIABLES, SCORE_VARIABLES
from flashgen.spec.syntax import MAX_NODES

_Kind = Literal["condition", "number", "tensor", "entry", "either"]
_FLEX = {"b": "batch", "h": "head", "q_idx": "q_index", "kv_idx": "kv"}


def trace(
    function: Callable[..., Any],
    *,
    kind: Literal["mask", "score"],
    tensors: Iterable[str] = (),
    params: Iterable[str] = (),
) -> str:
    """The text of a mask or score that is written as a Python function.

    `tensors` and `params` are names that the function may take besides the language's own. A parameter with a
    default that is none of them keeps its default, and so does one with a name of the gallery.

    Raises:
        SpecError: a parameter is not known, or the function does what the language has no words for.
    """
    variables = MASK_VARIABLES if kind == "mask" else SCORE_VARIABLES
    known: dict[str, _Kind] = dict.fromkeys(GALLERY, "entry")
    known |= dict.fromkeys((*variables, "q_index", "head_dim", *params), "number")
    known |= dict.fromkeys(tensors, "tensor")
    arguments: dict[str, Term] = {}
    positional: list[Term] = []
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # of what is written in C
        called = getattr(function, "__name__", type(function).__name__)
        hint = "write one whose parameters are names of the language: lambda q, kv: kv <= q"
        if kind == "score":
            hint = "write one whose parameters are names of the language: lambda score: 2 * score"
        raise SpecError(f"{quoted(called)} is no Python function that a {kind} can be", hint=hint) from None
    for name, parameter in parameters.items():
        given = parameter.default is not parameter.empty
        if name in known and not (given and known[name] == "entry"):
            term = Term(ast.Name(name), known[name])
            if parameter.kind is parameter.POSITIONAL_ONLY:
                positional.append(term)
            else:
                arguments[name] = term
        elif not given:
            named = [name for name, what in known.items() if what != "entry"]
            entries = [entry.name for entry in GALLERY.values() if entry.kind == kind]
            hint = did_you_mean(name, known, [*named, *(entry for entry in entries if entry not in named)])
            if name in _FLEX:
                hint = f"FlexAttention's b, h, q_idx, kv_idx are {', '.join(_FLEX.values())} here"
            raise SpecError(f"a {kind} cannot take {quoted(name)}", hint=hint)
    result = function(*positional, **arguments)
    if not isinstance(result, Term | numbers.Real):
        what = "nothing" if result is None else f"a {type(result).__name__}"
        raise SpecError(f"the {kind} returns {what}, not an expression of its arguments")
    return ast.unparse(ast.fix_missing_locations(_term(result).node))


class Term:
    """A part of an expression, of which Python's operators make larger parts."""

    __slots__ = ("kind", "node", "nodes")

    def __init__(self, node: ast.expr, kind: _Kind, parts: Iterable[Term] = ()) -> None:
        self.node = node
        self.kind: _Kind = kind
        self.nodes: int = 1 + sum(part.nodes for part in parts)
        if self.nodes > MAX_NODES:
            raise SpecError(f"the expression has more than {MAX_NODES} terms")

    def __str__(self) -> str:
        """The text as it stands in messages."""
        return f"'{shortened(ast.unparse(self.node))}'"

    # -- arithmetic

    def __add__(self, other: Any) -> Term:
        return _arithmetic(self, ast.Add(), other)

    def __radd__(self, other: Any) -> Term:
        return _arithmetic(other, ast.Add(), self)

    def __sub__(self, other: Any) -> Term:
        return _arithmetic(self, ast.Sub(), other)

    def __rsub__(self, other: Any) -> Term:
        return _arithmetic(other, ast.Sub(), self)

    def __mul__(self, other: Any) -> Term:
        return _arithmetic(self, ast.Mult(), other)

    def __rmul__(self, other: Any) -> Term:
        return _arithmetic(other, ast.Mult(), self)

    def __truediv__(self, other: Any) -> Term:
        return _arithmetic(self, ast.Div(), other)

    def __rtruediv__(self, other: Any) -> Term:
        return _arithmetic(other, ast.Div(), self)

    def __floordiv__(self, other: Any) -> Term:
        return _arithmetic(self, ast.FloorDiv(), other)

    def __rfloordiv__(self, other: Any) -> Term:
        return _arithmetic(other, ast.FloorDiv(), self)

    def __mod__(self, other: Any) -> Term:
        return _arithmetic(self, ast.Mod(), other)

    def __rmod__(self, other: Any) -> Term:
        return _arithmetic(other, ast.Mod(), self)

    def __pow__(self, other: Any) -> Term:
        return _arithmetic(self, ast.Pow(), other)

    def __rpow__(self, other: Any) -> Term:
        return _arithmetic(other, ast.Pow(), self)

    def __neg__(self) -> Term:
        return Term(ast.UnaryOp(ast.USub(), _number(self).node), "number", [self])

    def __pos__(self) -> Term:
        return _number(self)

    def __abs__(self) -> Term:
        return _call("abs", self)

    def __floor__(self) -> Term:
        return _call("floor", self)

    # -- comparisons and logic

    def __lt__(self, other: Any) -> Term:
        return _comparison(self, ast.Lt(), other)

    def __le__(self, other: Any) -> Term:
        return _comparison(self, ast.LtE(), other)

    def __gt__(self, other: Any) -> Term:
        return _comparison(self, ast.Gt(), other)

    def __ge__(self, other: Any) -> Term:
        return _comparison(self, ast.GtE(), other)

    def __eq__(self, other: Any) -> Term:  # type: ignore[override]
        return _comparison(self, ast.Eq(), other)

    def __ne__(self, other: Any) -> Term:  # type: ignore[override]
        return _comparison(self, ast.NotEq(), other)

    def __and__(self, other: Any) -> Term:
        return _joined(self, ast.And(), other, "&")

    def __rand__(self, other: Any) -> Term:
        return _joined(other, ast.And(), self, "&")

    def __or__(self, other: Any) -> Term:
        return _joined(self, ast.Or(), other, "|")

    def __ror__(self, other: Any) -> Term:
        return _joined(other, ast.Or(), self, "|")

    def __invert__(self) -> Term:
        return Term(ast.UnaryOp(ast.Not(), _condition(self, "~").node), "condition", [self])

    def __xor__(self, other: Any) -> NoReturn:
        raise SpecError("^ is not part of the language", hint="write (a | b) & ~(a & b), and ** for a power")

    __rxor__ = __xor__

    def __lshift__(self, other: Any) -> NoReturn:
        raise SpecError(
            "<< and >> are not part of the language",
            hint="write a * 2**n for a << n, and a // 2**n for a >> n",
        )

    __rlshift__ = __rshift__ = __rrshift__ = __lshift__

    def __matmul__(self, other: Any) -> NoReturn:
        raise SpecError("@ is not part of the language", hint="write * for a product of two numbers")

    __rmatmul__ = __matmul__

    def __divmod__(self, other: Any) -> NoReturn:
        raise SpecError("divmod is not part of the language", hint="write a // b and a % b")

    __rdivmod__ = __divmod__

    # -- tensors and entries of the gallery

    def __getitem__(self, subscripts: Any) -> Term:
        if self.kind != "tensor":
            raise SpecError(f"{self} is no tensor: it takes no subscript")
        given = subscripts if isinstance(subscripts, tuple) else (subscripts,)
        terms = [_number(_term(subscript)) for subscript in given]
        inside = ast.Tuple([term.node for term in terms]) if len(terms) > 1 else terms[0].node
        return Term(ast.Subscript(self.node, inside), "either", terms)

    def __call__(self, *arguments: Any, **named: Any) -> Term:
        if self.kind != "entry":
            raise SpecError(f"{self} cannot be called")
        if named:
            raise SpecError(f"{self} takes no named arguments", hint="write the values in their order")
        terms = [_number(_term(argument)) for argument in arguments]
        return Term(ast.Call(self.node, [term.node for term in terms], []), "either", terms)

    # -- what would take a symbol for a value

    def __bool__(self) -> NoReturn:
        raise SpecError(
            f"{self} is asked whether it is true, but it stands for all queries and keys",
            hint="write & | ~ for and, or, not; (a < b) & (b < c) for a < b < c; where(c, a, b) for if; "
            "minimum(a, b) and maximum(a, b) for min and max",
        )

    def __float__(self) -> NoReturn:
        raise SpecError(
            "a symbol has no value: Python's own functions cannot take it",
            hint="use exp, log, sqrt, tanh, sigmoid, floor of flashgen instead of those of math",
        )

    __int__ = __index__ = __complex__ = __trunc__ = __ceil__ = __float__

    def __round__(self, digits: int = 0) -> NoReturn:
        self.__float__()

    def __hash__(self) -> int:
        raise SpecError(
            f"{self} cannot be a key of a dict or part of a set: it stands for all queries and keys",
            hint="write where(a == 0, b, c), or pass a table in `tensors` and read table[a]",
        )

    def __iter__(self) -> NoReturn:
        raise SpecError(f"{self} stands for one value, not for a list of them", hint=_LENGTHS)

    __len__ = __reversed__ = __iter__

    def __contains__(self, value: Any) -> NoReturn:
        self.__iter__()

    if not TYPE_CHECKING:  # mypy would take every misspelt attribute for one of these

        def __getattr__(self, name: str) -> NoReturn:
            if name.startswith("_"):  # protocols that are tried, and may be lacking
                raise AttributeError(name)
            raise SpecError(f"{self} has no attributes, and no {quoted(name)}", hint=_LENGTHS)

    # -- libraries of arrays

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise SpecError(
            f"torch's {getattr(function, '__name__', function)} cannot take symbols", hint=_OWN_FUNCTIONS
        )

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> NoReturn:
        raise SpecError(f"numpy's {function.__name__} cannot take symbols", hint=_OWN_FUNCTIONS)

    def __array_ufunc__(self, function: Any, method: str, *inputs: Any, **settings: Any) -> Term:
        """numpy's operators, which its numbers on the left of a symbol call, are Python's."""
        operation = _NUMPY_OPERATORS.get(function.__name__)
        if operation is None or method != "__call__" or settings:
            raise SpecError(f"numpy's {function.__name__} cannot take symbols", hint=_OWN_FUNCTIONS)
        left, right = inputs
        if not isinstance(left, Term) and getattr(left, "shape", None) == ():
            left = left.item()  # numpy makes an array of its number
        result: Term = operation(_term(left), right)
        return result


_LENGTHS = "lengths are seqlen_q and seqlen_kv, which a function may take as it takes q and kv"
_OWN_FUNCTIONS = (
    "use abs, and the functions of flashgen: minimum, maximum, where, sqrt, exp, log, tanh, sigmoid, floor; "
    "a tensor is passed in `tensors` and named as a parameter"
)
_NUMPY_OPERATORS: Mapping[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "divide": operator.truediv,
    "true_divide": operator.truediv,
    "floor_divide": operator.floordiv,
    "remainder": operator.mod,
    "power": operator.pow,
    "less": operator.lt,
    "less_equal": operator.le,
    "greater": operator.gt,
    "greater_equal": operator.ge,
    "equal": operator.eq,
    "not_equal": operator.ne,
    "bitwise_and": operator.and_,
    "bitwise_or": operator.or_,
    "bitwise_xor": operator.xor,
    "left_shift": operator.lshift,
    "right_shift": operator.rshift,
    "matmul": operator.matmul,
    "divmod": divmod,
}


def _term(value: Any) -> Term:
    if isinstance(value, Term):
        return value
    if isinstance(value, bool):
        return Term(ast.Name(str(value).lower()), "condition")
    if not isinstance(value, numbers.Real):
        raise SpecError(f"a {type(value).__name__} has no place in a mask or score")
    number: int | float = int(value) if isinstance(value, numbers.Integral) else float(value)
    if not math.isfinite(number):
        raise SpecError(f"{number} is no number that a mask or score can hold")
    constant = ast.Constant(abs(number))
    negative = math.copysign(1, number) < 0
    return Term(ast.UnaryOp(ast.USub(), constant) if negative else constant, "number")


def _number(value: Any) -> Term:
    term = _term(value)
    if term.kind == "condition":
        raise SpecError(
            f"{term} is a condition, where a number is due",
            hint="write where(condition, 1, 0); conditions are joined with & and |, and not compared",
        )
    return term


def _condition(value: Any, operator: str) -> Term:
    term = _term(value)
    if term.kind == "number":
        hints = {"~": "write ~(kv <= q)", "where": "write where(kv <= q, a, b)"}
        tighter = f"'{operator}' binds tighter than comparisons: write (kv <= q) {operator} (q - kv < 4096)"
        raise SpecError(
            f"'{operator}' takes conditions, but {term} is a number", hint=hints.get(operator, tighter)
        )
    return term


def _arithmetic(left: Any, op: ast.operator, right: Any) -> Term:
    a, b = _number(left), _number(right)
    return Term(ast.BinOp(a.node, op, b.node), "number", [a, b])


def _comparison(left: Any, op: ast.cmpop, right: Any) -> Term:
    a, b = _number(left), _number(right)
    return Term(ast.Compare(a.node, [op], [b.node]), "condition", [a, b])


def _joined(left: Any, op: ast.boolop, right: Any, operator: str) -> Term:
    a, b = _condition(left, operator), _condition(right, operator)
    return Term(ast.BoolOp(op, [a.node, b.node]), "condition", [a, b])


def _call(name: str, *arguments: Any, kind: _Kind = "number") -> Term:
    terms = [_number(argument) for argument in arguments]
    return Term(ast.Call(ast.Name(name), [term.node for term in terms], []), kind, terms)


def where(condition: Any, then: Any, otherwise: Any) -> Term:
    """`then` where the condition holds, else `otherwise`: numbers both, or conditions both."""
    terms = [_condition(condition, "where"), _term(then), _term(otherwise)]
    node = ast.Call(ast.Name("where"), [term.node for term in terms], [])
    return Term(node, "condition" if "condition" in (terms[1].kind, terms[2].kind) else "either", terms)


def minimum(*values: Any) -> Term:
    """The least of several numbers."""
    return _call("min", *values)


def maximum(*values: Any) -> Term:
    """The greatest of several numbers."""
    return _call("max", *values)


def sqrt(x: Any) -> Term:
    """The square root."""
    return _call("sqrt", x)


def exp(x: Any) -> Term:
    """The exponential function."""
    return _call("exp", x)


def log(x: Any) -> Term:
    """The natural logarithm."""
    return _call("log", x)


def tanh(x: Any) -> Term:
    """The hyperbolic tangent."""
    return _call("tanh", x)


def sigmoid(x: Any) -> Term:
    """``1 / (1 + exp(-x))``."""
    return _call("sigmoid", x)


def floor(x: Any) -> Term:
    """The greatest integer that is no greater."""
    return _call("floor", x)


__all__ = [
    "Term",
    "exp",
    "floor",
    "log",
    "maximum",
    "minimum",
    "sigmoid",
    "sqrt",
    "tanh",
    "trace",
    "where",
]
