"""LaTeX as plain text: one spelling for what is typeset alike, and none of what only styles."""

import re

_TOKEN = re.compile(r"\\\\|\\[a-zA-Z]+|\\.|[{}]|[^\\{}]+", re.DOTALL)
_STYLE = re.compile(
    r"boxed|[fmh]box|emph|text(?:bf|it|rm|normal|sf|tt)?|math(?:bf|it|rm|sf|tt)|boldsymbol|bm|operatorname"
)
"""Commands that go with the braces of their argument."""
_SIZE = re.compile(r"left|right|middle|[bB]igg?[lr]?|displaystyle|textstyle|limits")
_SAME = {
    **dict.fromkeys(["dfrac", "tfrac", "cfrac"], "frac"),
    **dict.fromkeys(["dbinom", "tbinom"], "binom"),
    **dict.fromkeys(["ldots", "cdots"], "dots"),
    "to": "rightarrow",
}
_NUM_ARGUMENTS = {"frac": 2, "binom": 2, "sqrt": 1, "overline": 1}
_SYMBOLS = {
    **{"%": "%", "$": "usd ", "#": "#", "&": "&", "_": "_", ",": "\u2009", "!": ""},
    **dict.fromkeys([";", ":", " ", ">", "quad", "qquad"], " "),
    **dict.fromkeys(["(", ")", "[", "]"], ""),
    **{
        "times": "x",
        "cdot": "x",
        "div": "/",
        "pi": "π",
        "infty": "∞",
        "pm": "±",
        "cup": "\u222a",
        "cap": "\u2229",
        "in": "\u2208",
    },
    **{"le": "≤", "leq": "≤", "ge": "≥", "geq": "≥", "ne": "≠", "neq": "≠", "lt": "<", "gt": ">", "degree": "°"},
    **{"circ": "\u2218", "lbrace": r"\{", "rbrace": r"\}"},
}
_AFTERWARDS = {
    re.compile(pattern): replacement
    for pattern, replacement in {
        r"\^ ?(?:\{ ?∘ ?\}|∘)": "°",
        r" ?\{ ?, ?\} ?": ",",
        r"\\frac\{ ?([-+]? ?[0-9.]+) ?\}\{ ?([0-9]+) ?\}": r" \1/\2",
        r"([\^_])\{ ?([-+]?[0-9]+|[a-zA-Z]) ?\}": r"\1\2",
    }.items()
}


def plain_latex(text: str) -> str:
    r"""Take out styles, sizes and spacing, give arguments their braces, and write symbols as characters.

    >>> plain_latex(r"\boxed{\dfrac{\sqrt2}{3}}"), plain_latex(r"\left(1,\!\tfrac12\right)"), plain_latex(r"x^{2}\le3")
    ('\\frac{\\sqrt{2}}{3}', '(1, 1/2)', 'x^2≤3')
    """
    text = text.replace("√", r"\sqrt ")
    if "\\" not in text and "{" not in text:
        return text
    text = re.sub(r"(?<=[0-9])~(?=\\)", " ", text)
    text = _Writer().write(text)
    for pattern, replacement in _AFTERWARDS.items():
        text = pattern.sub(replacement, text)
    return text


class _Writer:
    """Writes one token after the other; groups may be nested as deeply as a model likes."""

    def __init__(self) -> None:
        self.written: list[str] = []
        self.groups: list[tuple[str, int]] = []
        """Of each open group: how it closes, and how many arguments follow it."""
        self.num_due = 0
        """Arguments that the last command still wants."""
        self.is_styled = False
        """Whether the last token was a style, so that the next brace goes."""
        self.joins = False
        """Whether the last token was a negative space, which takes a blank after it along."""

    def write(self, text: str) -> str:
        for token in _TOKEN.findall(text):
            if token == "{":
                self._open()
            elif token == "}":
                closing, self.num_due = self.groups.pop() if self.groups else ("}", 0)
                self.written.append(closing)
            elif token.startswith("\\"):
                self._command(token[1:])
            else:
                self._characters(token)
        return "".join(self.written)

    def _open(self) -> None:
        is_argument = self.num_due > 0
        goes = self.is_styled and not is_argument
        self.written.append("" if goes else "{")
        self.groups.append(("" if goes else "}", max(0, self.num_due - 1)))
        self.num_due, self.is_styled = 0, False

    def _command(self, name: str) -> None:
        name = _SAME.get(name, name)
        self.joins = name == "!"
        self.is_styled = _STYLE.fullmatch(name) is not None
        if self.is_styled or _SIZE.fullmatch(name):
            return
        written = _SYMBOLS.get(name, f"\\{name}")
        if self.num_due and written.strip():
            self._argument(written)
        else:
            self.written.append(written)
        self.num_due = _NUM_ARGUMENTS.get(name, self.num_due)

    def _characters(self, text: str) -> None:
        if self.joins:
            text = text.lstrip()
        if self.is_styled and not text.strip():
            return  # A blank before the brace of the style.
        self.joins = self.is_styled = False
        while self.num_due and (text := text.lstrip()):
            option, bracket, rest = text.partition("]")
            if text.startswith("[") and bracket:
                self.written.append(option + bracket)
                text = rest
            else:
                self._argument(text[0])
                text = text[1:]
        self.written.append(text)

    def _argument(self, text: str) -> None:
        self.written.append(f"{{{text}}}")
        self.num_due -= 1
