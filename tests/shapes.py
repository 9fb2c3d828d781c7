# SPDX-License-Identifier: MIT
"""Shape comments as assertions.

A line such as

    q = self.wq(x).unflatten(2, (H, K)).transpose(1, 2)  # (B, H, T, K)

is rewritten so that the statement is followed by a check of `q.shape`. A single capital
binds at its first use within one call of the function and must keep that value; entries
like `H/G`, `T-1` or `H·(K+R)` are evaluated. A capital that the function has as an
integer variable, or its object as an attribute (`self.H`), or that the caller of
`instrument` names in `known` (within methods, and functions that have a `model`, a
`config` or weights `w_up`), stands for that value.

What a comment may say:

    x = ...             # (B, T, D)             one shape
    k, v = ...          # (B, G, S, K), S >= T  each target has it, and S >= T holds
    a, b = ...          # (B, T), (B, S)        one shape for each target
    m = ...             # (B, 1, T, S) or None
    y = ...             # (..., D)              any number of dimensions, then D
    z = ...             # (B*beams, n+1)        beams, n: integer variables of the call
    return x            # (B, T, V)
    yield x             # (B,)
    def f(x: Tensor):   # (B, T)                for the parameter on that line
    for x in xs:        # (T, D)                for the loop's target
"""

import ast
import io
import re
import sys
import tokenize
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

SIMPLE = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return, ast.Expr)
SHAPE = re.compile(r"\(((?:[^()]|(?<!\w)\([^()]*\))*)\)")
ARITHMETIC = (
    ast.Expression,
    ast.BinOp,
    ast.Add,
    ast.Sub,
    ast.Mult,
    ast.Div,
    ast.FloorDiv,
    ast.Name,
    ast.Load,
    ast.Constant,
)


class ShapeError(AssertionError):
    """A tensor has another shape than its comment says."""


@dataclass
class Site:
    """One shape comment: its line, its shapes, and how often it was executed."""

    line: int
    comment: str
    shapes: list[list[str]]
    condition: str | None
    optional: bool
    hits: int = 0


@dataclass
class Instrumented:
    """A module's code with its shape comments turned into checks."""

    tree: ast.Module
    filename: str
    sites: list[Site]
    problems: list[str]
    known: Mapping[str, int] = field(default_factory=dict)

    def namespace(self, name: str = "shapes_under_test") -> dict[str, Any]:
        """Executes the module and returns its names."""
        module = types.ModuleType(name)
        sys.modules[name] = module  # dataclasses look their module up here
        names = vars(module)
        names["__file__"] = self.filename
        names["__shape_check__"] = self.check
        names["__shape_frame__"] = {}
        exec(compile(self.tree, self.filename, "exec"), names)
        return names

    def check(
        self, index: int, value: Any, bound: dict[str, int], local: dict[str, Any]
    ) -> Any:
        """Raises ShapeError unless `value` has the shape of comment `index`."""
        site = self.sites[index]
        site.hits += 1
        values = list(value) if isinstance(value, tuple) else [value]
        shapes = site.shapes if len(site.shapes) > 1 else site.shapes * len(values)
        if len(shapes) != len(values):
            raise ShapeError(
                f"{self.where(site)}: {len(shapes)} shapes for {len(values)} values"
            )
        fixed = self.fixed(local)
        for letter, size in fixed.items():
            if letter in bound and letter in local and bound[letter] != size:
                raise ShapeError(
                    f"{self.where(site)}: {letter} stood for {bound[letter]} in this "
                    f"call, and the variable {letter} is {size}"
                )
        for item, shape in zip(values, shapes, strict=True):
            if item is None and site.optional:
                continue
            self.match(site, item, shape, bound, fixed)
        if site.condition and not evaluate(site.condition, {**bound, **fixed}):
            raise ShapeError(
                f"{self.where(site)}: {site.condition} does not hold for "
                f"{show({**bound, **fixed}, site.condition)}"
            )
        return value

    def fixed(self, local: dict[str, Any]) -> dict[str, int]:
        """The names that this call has no say in, the nearest meaning last."""
        owner = local.get("self")
        owners = ("self", "model", "config", "w_up")
        of_model = any(name in local for name in owners)
        sizes = dict(self.known) if of_model else {}
        owned = vars(owner) if hasattr(owner, "__dict__") else {}
        letters = {k: v for k, v in owned.items() if is_letter(k)}
        for name, size in [*letters.items(), *local.items()]:
            if isinstance(size, int) and not isinstance(size, bool):
                sizes[name] = size
        return sizes

    def match(
        self,
        site: Site,
        value: Any,
        shape: list[str],
        bound: dict[str, int],
        fixed: dict[str, int],
    ) -> None:
        if not hasattr(value, "shape"):
            raise ShapeError(f"{self.where(site)}: a {type(value).__name__}, no tensor")
        actual = list(value.shape)
        if shape and shape[0] == "...":
            shape = shape[1:]
            actual = actual[len(actual) - len(shape) :] if shape else []
        if len(actual) != len(shape):
            raise ShapeError(
                f"{self.where(site)}: the shape is {tuple(value.shape)}, "
                f"with {len(actual)} dimensions for {len(shape)}"
            )
        # Plain letters first, so that H/G may stand before the H or G it needs.
        for entry, size in zip(shape, actual, strict=True):
            if is_letter(entry) and entry not in fixed:
                bound.setdefault(entry, size)
        sizes = {**bound, **fixed}
        for entry, size in zip(shape, actual, strict=True):
            try:
                expected = evaluate(entry, sizes)
            except NameError as error:
                raise ShapeError(
                    f"{self.where(site)}: {error} in {entry}; name it alone first"
                ) from None
            if expected != size:
                raise ShapeError(
                    f"{self.where(site)}: the shape is {tuple(value.shape)}; "
                    f"{entry} is {expected}, not {size} ({show(sizes, str(shape))})"
                )

    def where(self, site: Site) -> str:
        return f"{self.filename}:{site.line}: {site.comment}"

    def unexecuted(self, last_line: int) -> list[str]:
        """The comments up to `last_line` that no call has reached."""
        return [
            f"{self.where(site)}: never executed"
            for site in self.sites
            if not site.hits and site.line <= last_line
        ]


NAME = re.compile(r"[A-Za-z_]\w*")


def is_letter(text: str) -> bool:
    return len(text) == 1 and "A" <= text <= "Z"


def show(sizes: Mapping[str, int], mentioned: str) -> str:
    """The sizes of the names that stand in a text: `B = 2, T = 3`."""
    names = set(NAME.findall(mentioned)) & sizes.keys()
    return ", ".join(f"{name} = {sizes[name]}" for name in sorted(names))


def evaluate(expression: str, sizes: Mapping[str, int]) -> Fraction | bool:
    """The exact value of an entry such as `H/G`, or of a comparison such as `S >= T`.

    Raises NameError for a name that has no size.
    """
    names = set(NAME.findall(expression))
    for name in sorted(names - sizes.keys()):
        raise NameError(f"{name} has no size yet")
    exact = {name: Fraction(sizes[name]) for name in names}
    return eval(expression, {"__builtins__": {}}, exact)


def is_entry(text: str) -> bool:
    """Whether `text` is arithmetic over capitals, integer variables and numbers."""
    try:
        tree = ast.parse(text, mode="eval")
    except SyntaxError:
        return False
    return all(
        isinstance(node, ARITHMETIC)
        and (not isinstance(node, ast.Constant) or isinstance(node.value, int))
        for node in ast.walk(tree)
    )


def has_size(text: str) -> bool:
    """Whether an entry holds a capital or a number; words alone may be prose."""
    return is_entry(text) and bool(re.search(r"\b[A-Z]\b|\d", text))


def parse_comment(text: str) -> tuple[list[list[str]], str | None, bool] | None:
    """Shapes, condition and "or None" of a comment; None if it is no shape comment.

    Raises ValueError for a comment that looks like a shape and cannot be checked.
    """
    body = text.lstrip("#").strip().replace("·", "*")
    shapes, rest = [], body
    while match := SHAPE.match(rest):
        entries = [e.strip() for e in match[1].split(",")]
        if entries[-1] == "":  # "(B,)" and "()"
            entries.pop()
        valid = all(is_entry(e) for e in entries[entries[:1] == ["..."] :])
        # "(2)" numbers a point, "(see below)" is prose; "(B,)", "(B)", "()" are shapes.
        alone = match[0] == body and is_letter(match[1])
        shapelike = "," in match[1] or not match[1].strip() or alone
        sized = not entries or any(map(has_size, entries))
        if not valid and shapelike and sized:
            raise ValueError(f"{body!r} cannot be read as a shape")
        if not valid or not sized or not (shapelike or shapes):
            break
        shapes.append(entries)
        rest = rest[match.end() :].lstrip()
        if rest.startswith(", ("):
            rest = rest[2:]
        elif not rest.startswith("("):
            rest = rest.removeprefix(",").strip()
            if SHAPE.match(rest):
                continue
            break
    if not shapes:
        return None
    if rest.startswith(("->", "→", "=>")):
        raise ValueError(f"{body!r}: write the resulting shape alone")
    return shapes, condition_of(rest), "or None" in rest


def condition_of(rest: str) -> str | None:
    """The comparison that follows a shape, such as `S >= T`, if there is one."""
    part = re.split(r"[,;:]", rest.strip())[0].strip()
    part = re.sub(r"(?<![<>=!])=(?!=)", "==", part)
    try:
        tree = ast.parse(part, mode="eval").body
    except SyntaxError:
        return None
    if not isinstance(tree, ast.Compare):
        return None
    sides = [ast.unparse(side) for side in (tree.left, *tree.comparators)]
    return part if all(is_entry(side) for side in sides) else None


class Instrumenter(ast.NodeTransformer):
    """Adds the checks to a syntax tree; `by_line` maps lines to site numbers."""

    def __init__(self, by_line: dict[int, int]) -> None:
        self.by_line = by_line
        self.attached: set[int] = set()

    def take(self, first: int, last: int) -> list[int]:
        """The sites on the given lines that no inner statement has taken."""
        found = [
            self.by_line[n]
            for n in range(first, last + 1)
            if n in self.by_line and self.by_line[n] not in self.attached
        ]
        self.attached |= set(found)
        return found

    def check(self, site: int, value: ast.expr, at: ast.AST) -> ast.expr:
        call = ast.Call(
            ast.Name("__shape_check__", ast.Load()),
            [
                ast.Constant(site),
                value,
                ast.Name("__shape_frame__", ast.Load()),
                ast.Call(ast.Name("locals", ast.Load()), [], []),
            ],
            [],
        )
        return ast.fix_missing_locations(ast.copy_location(call, at))

    def after(self, site: int, target: ast.expr, at: ast.AST) -> ast.stmt:
        """A statement that checks what an assignment target now holds."""
        loaded = ast.parse(ast.unparse(target), mode="eval").body
        statement = ast.Expr(self.check(site, loaded, at))
        return ast.fix_missing_locations(ast.copy_location(statement, at))

    def visit_simple(self, node: ast.stmt) -> Any:
        sites = self.take(node.lineno, node.end_lineno)
        if len(sites) > 1:
            self.attached -= set(sites)  # which one is meant cannot be told
            return node
        if not sites:
            return node
        (site,) = sites
        if isinstance(node, ast.Return) and node.value is not None:
            node.value = self.check(site, node.value, node)
        elif isinstance(node, ast.Expr):
            if isinstance(node.value, ast.Yield) and node.value.value is not None:
                node.value.value = self.check(site, node.value.value, node)
            else:
                node.value = self.check(site, node.value, node)
        elif isinstance(node, ast.Assign):
            return [node, *(self.after(site, t, node) for t in node.targets)]
        elif isinstance(node, ast.AugAssign) or node.value is not None:
            return [node, self.after(site, node.target, node)]
        else:
            self.attached.discard(site)
        return node

    visit_Assign = visit_AnnAssign = visit_AugAssign = visit_simple
    visit_Return = visit_Expr = visit_simple

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        checks = []
        arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        for argument in arguments:
            if argument.lineno < node.body[0].lineno:
                for site in self.take(argument.lineno, argument.end_lineno):
                    name = ast.Name(argument.arg, ast.Load())
                    checks.append(self.after(site, name, node.body[0]))
        node = self.generic_visit(node)
        frame = ast.parse("__shape_frame__ = {}").body[0]
        frame = ast.fix_missing_locations(ast.copy_location(frame, node.body[0]))
        docstring = ast.get_docstring(node, clean=False) is not None
        node.body[docstring:docstring] = [frame, *checks]
        return node

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_For(self, node: ast.For) -> ast.AST:
        sites = self.take(node.lineno, node.iter.end_lineno)
        node = self.generic_visit(node)
        node.body[:0] = [self.after(s, node.target, node.body[0]) for s in sites]
        return node


def instrument(
    source: str, filename: str, known: Mapping[str, int] | None = None
) -> Instrumented:
    """Turns the shape comments of `source` into checks.

    `known` fixes letters within methods and in functions that have a `model`, a
    `config` or weights `w_up`: the sizes of the configuration that will run.
    `problems` of the result lists comments that look like shapes and cannot be checked.
    """
    sites: list[Site] = []
    problems, by_line = [], {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        line = token.start[0]
        alone = not token.line[: token.start[1]].strip()
        try:
            parsed = parse_comment(token.string)
        except ValueError as error:
            problems.append(f"{filename}:{line}: {error}")
            continue
        if parsed is not None and not alone:
            by_line[line] = len(sites)
            sites.append(Site(line, token.string, *parsed))
    tree = ast.parse(source)
    worker = Instrumenter(by_line)
    tree = worker.visit(tree)
    for number, site in enumerate(sites):
        if number not in worker.attached:
            problems.append(
                f"{filename}:{site.line}: {site.comment} stands at no single "
                "assignment, return, yield, parameter or loop"
            )
    return Instrumented(tree, filename, sites, problems, known or {})
