"""Requirements: what `--require` says, read before any long work and judged at its end.

    accuracy@ber=1e-4 >= 0.85          the mean that was measured reaches 0.85
    low(accuracy@ber=1e-4) >= 85%      ... and so does the lower end of its confidence interval
    high(sdc1@seu) < 0.1%              the upper end stays below

A bare name compares the mean, because that is the figure people read in the table; such a verdict can be luck where the
interval reaches across the threshold, and `Requirement.certain` says so. `low(...)` and `high(...)` compare the ends of
the interval: for evidence, use `low` with >= and `high` with <=. A figure that counted nothing meets no requirement.
"""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, cast

from resq_deploy.errors import RequirementError
from resq_deploy.report.model import Figure, Requirement

Operator = Literal[">=", "<=", ">", "<"]
Compared = Literal["mean", "low", "high"]

_COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_UNICODE = str.maketrans({"≥": ">=", "≤": "<="})
_WHOLE = re.compile(r"^(?P<left>[^<>]*?)\s*(?P<op>>=|<=|>|<)\s*(?P<right>[^<>]*)$")
_BOUND = re.compile(r"^(?P<bound>[a-z]+)\s*\(\s*(?P<figure>.*?)\s*\)$")
_FIGURE = re.compile(r"^[A-Za-z][\w.:+\-]*(@[\w.:+\-=/,*?\[\]!]+)*$")
_NUMBER = re.compile(r"^[0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]{1,3})?$")
_EXAMPLE = "write it as 'accuracy@ber=1e-4 >= 0.85'"
_LONGEST = 400


@dataclass(frozen=True, slots=True)
class Expression:
    """One requirement as it was written: `compared` of figure `figure`, `operator`, `threshold` in [0, 1]."""

    text: str
    figure: str
    operator: Operator
    threshold: float
    compared: Compared = "mean"


def parse(text: str) -> Expression:
    """Read one expression, `FIGURE OP VALUE` or `low(FIGURE) OP VALUE`.

    OP is >=, <=, > or <; VALUE a share in [0, 1], or a percentage (`85%`). Raises RequirementError.
    """
    plain = " ".join(text.translate(_UNICODE).split())
    whole = _WHOLE.match(plain) if len(plain) <= _LONGEST else None
    if whole is None:
        raise RequirementError(
            f"cannot read the requirement {_short(plain)!r}: it needs one of >=, <=, >, <", _EXAMPLE
        )
    figure, compared = _figure(whole["left"], plain)
    threshold = _share(whole["right"], plain)
    return Expression(plain, figure, cast(Operator, whole["op"]), threshold, compared)


def parse_all(texts: Iterable[str]) -> tuple[Expression, ...]:
    """Read several; the same one twice counts once."""
    return tuple(dict.fromkeys(parse(text) for text in texts))


def check(expressions: Iterable[Expression], names: Iterable[str]) -> None:
    """Raise RequirementError for a figure that is not among `names`.

    Asked before the work starts, with the names that the work will bring.
    """
    known = _by_key(names)
    for expression in expressions:
        _find(expression, known)


def judge(
    expressions: Iterable[Expression], figures: Mapping[str, Figure]
) -> tuple[Requirement, ...]:
    """Compare each expression with the figures that were measured. Raises RequirementError for an unknown figure."""
    known = _by_key(figures)
    return tuple(_judge(e, name := _find(e, known), figures[name]) for e in expressions)


def same_figure(a: str, b: str) -> bool:
    """Whether two names mean one figure: `accuracy@ber=1e-4` and `accuracy@ber=0.0001` do."""
    return _key(a) == _key(b)


def _judge(expression: Expression, name: str, figure: Figure) -> Requirement:
    compare = _COMPARE[expression.operator]
    value = float(getattr(figure, expression.compared))
    ends = {compare(figure.low, expression.threshold), compare(figure.high, expression.threshold)}
    met = figure.n > 0 and compare(value, expression.threshold)
    return Requirement(
        expression=expression.text,
        figure=name,
        value=value,
        met=met,
        compared=expression.compared,
        operator=expression.operator,
        threshold=expression.threshold,
        measured=figure,
        certain=ends == {met},
    )


def _figure(left: str, plain: str) -> tuple[str, Compared]:
    bound = _BOUND.match(left)
    if bound is None:
        return _named(left, plain), "mean"
    if bound["bound"] not in ("mean", "low", "high"):
        raise RequirementError(
            f"cannot read {_short(plain)!r}: there is no {_short(bound['bound'])}(...)",
            "low(...), high(...) or mean(...) of a figure can be compared",
        )
    return _named(bound["figure"], plain), cast(Compared, bound["bound"])


def _named(name: str, plain: str) -> str:
    bare = name.replace(" ", "")
    if not _FIGURE.match(bare):
        what = f"{_short(name)!r} is not the name of a figure" if name else "it names no figure"
        raise RequirementError(f"cannot read the requirement {_short(plain)!r}: {what}", _EXAMPLE)
    return bare


def _share(right: str, plain: str) -> float:
    text = right.replace(" ", "")
    percent = text.endswith("%")
    if not _NUMBER.match(text.removesuffix("%")):
        raise RequirementError(
            f"cannot read the requirement {_short(plain)!r}: {_short(right)!r} is not a number",
            "write a share such as 0.85, or a percentage such as 85%",
        )
    value = Fraction(text.removesuffix("%")) / (100 if percent else 1)
    if value > 1:
        raise RequirementError(
            f"{_short(right)} in {_short(plain)!r} is more than 1, and figures are shares from 0 to 1",
            f"did you mean {text}%?" if value <= 100 and not percent else "100% is the most",
        )
    return float(value)


def _by_key(names: Iterable[str]) -> dict[tuple[object, ...], str]:
    return {_key(name): name for name in names}


def _find(expression: Expression, known: Mapping[tuple[object, ...], str]) -> str:
    name = known.get(_key(expression.figure))
    if name is None:
        raise RequirementError(
            f"no figure {_short(expression.figure)!r} in this validation",
            _suggestion(expression.figure, tuple(known.values())),
        )
    return name


def _suggestion(wanted: str, names: Sequence[str]) -> str:
    if not names:
        return "this validation measures no figure"

    def closeness(name: str) -> float:
        return difflib.SequenceMatcher(None, wanted.lower(), name.lower()).ratio()

    return "known, closest first: " + ", ".join(sorted(names, key=closeness, reverse=True))


def _key(name: str) -> tuple[object, ...]:
    """What a name means: its parts, with numbers compared by value, options in any order."""
    head, *parts = name.replace(" ", "").split("@")
    return (head.lower(), *(tuple(sorted(map(_option, p.split(",")))) for p in parts))


def _option(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    return (key.lower(), _canonical(value)) if equals else (_model(key), "")


def _model(text: str) -> str:
    kind, colon, value = text.partition(":")
    return f"{kind.lower()}:{_canonical(value)}" if colon else kind.lower()


def _canonical(value: str) -> str:
    try:
        top, _, bottom = value.partition("/")
        return f"{float(top) / float(bottom or 1):.6g}"
    except (ValueError, ZeroDivisionError, OverflowError):
        return value.lower()


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
