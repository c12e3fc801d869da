"""The messages that a user of the package can meet, from its source, and those that a page of docs quotes."""

from __future__ import annotations

import ast
import re
from collections.abc import Container, Iterator
from pathlib import Path
from typing import NamedTuple

from tests.helpers.paths import ROOT

GAP = "\0"  # in place of what a message fills in: a name, a number, the text of another error
TEXT_AT = {"warnings.warn": 0, "rank_zero_warn": 0, "self._expect": 1}  # which argument of a call is a message
NAMES_OF = {"self._expect": f"{GAP}: "}  # what the callee writes before it
EXEMPT = {
    f"module {GAP} has no attribute {GAP}": "Python's own words, of a name that a module does not have",
    f"this process is in groups of {GAP} processes": "caught; its text is in 'Expected to put together ...'",
    f"{GAP} has no {GAP}": "caught; its text is in 'Expected --arguments with which ...'",
    "another file": "caught; 'Expected ... with SHA-256 ...' follows",
    f"{GAP}: error: {GAP}": "what the command line writes before a message",
    f"sweep: run {GAP}, {GAP}": "progress",
}


class Message(NamedTuple):
    """A message, with `GAP` where it fills something in, and where it is raised or warned of."""

    where: str
    text: str

    def __str__(self) -> str:
        return f"{self.where}: {self.text.replace(GAP, '...')}"


class _Module:
    """The messages of one module."""

    def __init__(self, path: Path) -> None:
        self.name, self.tree = path.relative_to(ROOT).as_posix(), ast.parse(path.read_text("utf-8"))
        self.functions = {n.name: n for n in ast.walk(self.tree) if isinstance(n, ast.FunctionDef)}
        self.scope: list[ast.AST] = [self.tree]

    def messages(self, node: ast.AST) -> Iterator[Message]:
        """Those below a node. `raise error`, without a call, raises again what was raised elsewhere."""
        is_scope = isinstance(node, ast.FunctionDef)
        self.scope += [node] * is_scope
        raised = node.exc if isinstance(node, ast.Raise) else None
        for made in raised.values if isinstance(raised, ast.BoolOp) else [raised]:
            if isinstance(made, ast.Call) and made.args:
                yield Message(f"{self.name}:{made.lineno}", self.text(made.args[0]))
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            to_stderr = name == "print" and any(ast.unparse(key.value) == "sys.stderr" for key in node.keywords)
            if name in TEXT_AT or to_stderr:
                text = self.text(node.args[TEXT_AT.get(name, 0)])
                yield Message(f"{self.name}:{node.lineno}", NAMES_OF.get(name, "") + text)
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


def messages(exempt: Container[str] = EXEMPT) -> list[Message]:
    """All messages of the package but those that are exempt, and those that have no words of their own."""
    modules = [_Module(path) for path in sorted((ROOT / "lightning_namo").rglob("*.py"))]
    found = [message for module in modules for message in module.messages(module.tree)]
    return [m for m in found if re.search("[a-z]", m.text) and m.text not in exempt]


def quoted(page: str) -> list[str]:
    """What a page quotes: all code in the first paragraphs of its bullets that begin with code."""
    paragraphs = re.findall(r"^- (`.*?)\n\n", page, re.MULTILINE | re.DOTALL)
    return [" ".join(text.split()) for paragraph in paragraphs for text in re.findall(r"`([^`]+)`", paragraph)]


def pattern(quote: str) -> re.Pattern[str]:
    """Of a message that begins with a quote, in which "..." stands for what is filled in and what is between that."""
    parts = re.split(r"(?<= )\.{3}|\.{3}(?!\.)", quote.removesuffix("..."))  # "a ....weight", "before x.... is"
    filled = rf"(?:{GAP}(?:[^{GAP}]*?{GAP})*?(?:\.\.\.)?|\.\.\.)"
    return re.compile(filled.join(map(re.escape, parts)))
