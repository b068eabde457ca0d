"""How large a regular expression is once its counted repetitions are written out."""

from __future__ import annotations

import re

_PARTS = re.compile(
    r"""
    \\(?:[pPxu]\{[^}]*\}|.)           # an escape
    | \[\^?\]?(?:\\.|[^\]\\])*\]      # a class
    | \{(?P<least>\d+)(?P<more>,(?P<most>\d*))?\}
    | .
    """,
    re.VERBOSE | re.DOTALL,
)
_CAP = 10**12  # sizes beyond are not told apart


def expanded_size(pattern: str) -> int:
    """Characters and classes of ``pattern``, each as often as it is repeated at most by ``{m,n}``.

    An upper bound on what a compiler may write out: (a{1000}){1000} is a text of a million bytes.
    """
    sums, last = [0], 0  # of the groups that are open, and of what stands before a repetition
    for part in _PARTS.finditer(pattern):
        text = part[0]
        if part["least"] is not None:
            times = max(_number(part["least"]), _number(part["most"] or "1"), 1)
            sums[-1] = min(sums[-1] + last * (times - 1), _CAP)
            last = min(last * times, _CAP)
        elif text == "(":
            sums.append(0)
        elif text == ")" and len(sums) > 1:
            last = sums.pop()
            sums[-1] += last
        elif text not in "?*+|":
            sums[-1] += 1
            last = 1
    return min(sum(sums), _CAP)


def _number(digits: str) -> int:
    return int(digits) if len(digits) < 10 else _CAP
