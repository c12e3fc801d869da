"""The messages that a user of the package can meet, from its source, and those that a page of docs quotes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.helpers.paths import ROOT

PACKAGE = ROOT / "lightning_namo"
GAP = "\0"  # in place of what a message fills in: a name, a number, the text of another error
ERRORS, WARNINGS = ("Error", "Exception"), ("warn", "warning", "deprecation")  # how the names of callees end
_NO_ATTRIBUTE = f"module {GAP} has no attribute {GAP}"
EXEMPT = {
    ("_moved.py", _NO_ATTRIBUTE): "Python's own words, of a name that a module does not have",
    ("cli/__init__.py", _NO_ATTRIBUTE): "the same",
    ("gpt2/data/__init__.py", _NO_ATTRIBUTE): "the same",
    ("checkpoint/parameter_state.py", f"this process is in groups of {GAP} processes"): "in 'Expected to put together'",
    ("cli/routes.py", f"{GAP} has no {GAP}"): "in 'Expected --arguments with which ... can be made'",
    ("gpt2/data/encoding.py", "another file"): "caught; 'Expected ... with SHA-256 ...' follows",
    ("cli/lightning_cli.py", GAP): "an error of `check_config`, as the type that jsonargparse reports",
    ("cli/entry_point.py", f"{GAP}: error: {GAP}"): "the words of an error on the command line",
    ("cli/parsers.py", GAP): "jsonargparse's words",
    ("cli/sweep.py", GAP): "a progress bar",
    ("cli/sweep.py", f"sweep: run {GAP}, {GAP}"): "progress",
    ("integration/preemption.py", GAP * 2): "an exit status",
    ("testing/check_rule.py", f"{GAP}: {GAP}"): "the words of `_expect`, which are read where it is called",
}


class Message(NamedTuple):
    """A message, with `GAP` where it fills something in, and where it is raised or warned of."""

    file: str  # in the package
    line: int
    text: str

    def __str__(self) -> str:
        return f"lightning_namo/{self.file}:{self.line}: {self.text.replace(GAP, '...')}"


class _Module:
    """The messages of one module."""

    def __init__(self, path: Path) -> None:
        self.name, self.tree = path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text("utf-8"))
        self.functions = {n.name: n for n in ast.walk(self.tree) if isinstance(n, ast.FunctionDef)}
        self.scope: list[ast.AST] = [self.tree]

    def messages(self, node: ast.AST) -> Iterator[Message]:
        """Those below a node, in the order of the source."""
        is_scope = isinstance(node, ast.FunctionDef)
        self.scope += [node] * is_scope
        if isinstance(node, ast.Call) and node.args:
            name = ast.unparse(node.func)
            to_stderr = name == "print" and any(ast.unparse(key.value) == "sys.stderr" for key in node.keywords)
            if name == "self._expect":  # of check_rule: (condition, what), after the name of the rule
                yield Message(self.name, node.lineno, f"{GAP}: {self.text(node.args[1])}")
            elif name.endswith(ERRORS + WARNINGS) or name == "super().error" or to_stderr:
                yield Message(self.name, node.lineno, self.text(node.args[0]))
        for child in ast.iter_child_nodes(node):
            yield from self.messages(child)
        del self.scope[len(self.scope) - is_scope :]

    def text(self, node: ast.AST) -> str:
        """What an expression says; names and functions of the module are looked up."""
        if isinstance(node, ast.Constant):
            return node.value if isinstance(node.value, str) else GAP
        if isinstance(node, ast.JoinedStr):
            return "".join(self.text(part) for part in node.values)
        if isinstance(node, ast.FormattedValue):
            return self.text(node.value)
        if isinstance(node, ast.BinOp):
            return self.text(node.left) + self.text(node.right)
        if isinstance(node, ast.Name):
            return self._of_name(node.id)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
            return self.text(node.func.value).replace("{}", GAP)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in self.functions:
            returns = [n for n in ast.walk(self.functions[node.func.id]) if isinstance(n, ast.Return)]
            return self.text(returns[0].value) if len(returns) == 1 and returns[0].value else GAP
        return GAP

    def _of_name(self, name: str) -> str:
        """The text that a name stands for, if it is assigned once, in this function or in the module."""
        for scope in (self.scope[-1], self.tree):
            below = ast.walk(scope) if scope is not self.tree else self.tree.body
            found = [n.value for n in below if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == name]
            if found:
                is_text = isinstance(found[0], ast.Constant | ast.JoinedStr) and len(found) == 1
                return self.text(found[0]) if is_text else GAP
        return GAP


def messages() -> list[Message]:
    """All messages of the package, those of `EXEMPT` too."""
    modules = [_Module(path) for path in sorted(PACKAGE.rglob("*.py"))]
    return [message for module in modules for message in module.messages(module.tree)]


def quoted(page: str) -> list[str]:
    """What a page quotes: all code in the first paragraphs of its bullets that begin with code."""
    paragraphs = re.findall(r"^- (`.*?)\n\n", page, re.MULTILINE | re.DOTALL)
    return [" ".join(text.split()) for paragraph in paragraphs for text in re.findall(r"`([^`]+)`", paragraph)]


def pattern(quote: str) -> re.Pattern[str]:
    """Of a message that begins with a quote, in which "..." stands for what is filled in and what is between that."""
    parts = re.split(r"(?<= )\.{3}|\.{3}(?!\.)", quote.removesuffix("..."))  # "a ....weight", "before x.... is"
    filled = rf"(?:{GAP}(?:[^{GAP}]*?{GAP})*?(?:\.\.\.)?|\.\.\.)"
    return re.compile(filled.join(map(re.escape, parts)))
