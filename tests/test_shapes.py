# SPDX-License-Identifier: MIT
"""Every shape comment of every chapter holds when the model runs."""

import dataclasses
import inspect
import textwrap

import pytest
import shapes
import torch
from chapters import banner_line, discover, load

# Pairwise distinct, so that no two letters can stand for each other by accident.
SIZES = {"vocab_size": 97, "dim": 30, "n_heads": 5, "ffn_dim": 46, "max_seq_len": 41}
# No size, but the way to the lines that scale rotary frequencies.
SIZES["rope_factor"] = 8.0
# With grouped heads H/G must be whole, and K is free of D where it has its own field.
GROUPED = {"dim": 60, "n_heads": 10, "n_kv_heads": 5}
# Plain and rotary width of a head, latents, values: their sums differ from these too.
LATENT = {"head_dim": 10, "rope_dim": 26, "value_dim": 17}
LATENT |= {"latent_dim": 19, "q_latent_dim": 23}
EXPERTS = {"n_experts": 12, "n_active": 8, "n_shared": 2, "expert_ffn_dim": 44}
LETTERS = {
    "D": "dim",
    "H": "n_heads",
    "G": "n_kv_heads",
    "K": "head_dim",
    "F": "ffn_dim",
    "V": "vocab_size",
    "E": "n_experts",
    "A": "n_active",
    "C": "latent_dim",
    "Q": "q_latent_dim",
    "R": "rope_dim",
    "P": "value_dim",
}
B, T, N = 3, 7, 11


def small_config(module):
    """The chapter's TINY with distinct sizes."""
    tiny = module.TINY
    fields = {f.name for f in dataclasses.fields(tiny)}
    sizes = {**SIZES, **LATENT, **EXPERTS}
    if "n_kv_heads" in fields:
        sizes |= GROUPED
    if getattr(tiny, "head_dim", None) is not None and "head_dim" in fields:
        sizes["head_dim"] = 14
    for name, size in (("pad_id", 96), ("bos_id", 95), ("eos_id", 94)):
        if (getattr(tiny, name, None) or 0) >= SIZES["vocab_size"]:
            sizes[name] = size
    sizes = {name: size for name, size in sizes.items() if name in fields}
    return dataclasses.replace(tiny, **sizes)


def letters_of(config):
    """The letters that a configuration fixes, by STYLE's names."""
    known = {k: getattr(config, name, None) for k, name in LETTERS.items()}
    known = {k: size for k, size in known.items() if isinstance(size, int)}
    plain = getattr(config, "head_dim", config.dim // config.n_heads)
    known.setdefault("K", plain)
    return known


def variants(config):
    """The configuration, and those that lead to lines it does not reach."""
    yield config
    if getattr(config, "q_latent_dim", None) is not None:
        yield dataclasses.replace(config, q_latent_dim=None)
    if hasattr(config, "n_groups"):
        groups = {"n_groups": 4, "n_active_groups": 3, "n_mtp": 2}
        yield dataclasses.replace(config, **groups)
    if hasattr(config, "fp8"):
        yield dataclasses.replace(config, fp8=not config.fp8)


def call(function, *args, **options):
    """Calls with those of `options` that the function has."""
    names = inspect.signature(function).parameters
    return function(*args, **{k: v for k, v in options.items() if k in names})


def exercise(names, config):
    """Runs everything above the banner on a model of the given configuration."""
    model = names["Transformer"](config)
    batch = torch.randint(5, 90, (B, T))
    for training in (True, False):
        model.train(training)
        if "greedy" in names:
            source = torch.randint(5, 90, (B, N))
            model(source, batch)
        else:
            model(batch)
        out = names["loss"](model, loss_batch(names, batch))
        (out[0] if isinstance(out, tuple) else out).backward()
    if "greedy" in names:
        exercise_translation(names, model)
    else:
        exercise_generation(names, model, batch)
    if hasattr(model, "new_cache"):
        cache = model.new_cache(B, 29)
        with torch.no_grad():
            model(batch, cache=cache)  # prefill
            model(batch[:, :1], cache=cache)  # one position
            model(batch[:, :4], cache=cache)  # a ragged chunk
            cache.truncate(5)
            padded = model.new_cache(B, 29, pad=torch.tensor([0, 2, 4]))
            model(batch, cache=padded)
            model(batch[:, :1], cache=padded)
    for name in [name for name in names if name.startswith("attend_")]:
        exercise_attention(names[name], config)
    if hasattr(model, "predict_ahead"):
        model.predict_ahead(batch)
    if "speculate" in names:
        names["speculate"](model, batch[:1], 9)
        names["speculate"](model, batch[:1], 9, temperature=0.8, top_k=13)


def exercise_attention(attend, config):
    """One of several forms of attention, some of which no model takes."""
    K, P, R = config.head_dim, config.value_dim, config.rope_dim
    w_up = torch.randn(config.n_heads, K + P, config.latent_dim)
    kv = torch.randn(B, N, config.latent_dim + R)
    for rows in (1, B):
        for queries in (1, T, N):
            q = torch.randn(B, config.n_heads, queries, K + R)
            seen = torch.ones(rows, 1, queries, N, dtype=torch.bool).tril(N - queries)
            attend(q, kv, w_up, 0.5, seen)
            if queries in (1, N):
                attend(q, kv, w_up, 0.5)


def loss_batch(names, batch):
    """A batch as the chapter's `loss` takes it: a pair in chapter 1, else tokens."""
    if "greedy" in names:
        return torch.randint(5, 90, (B, N)), batch
    return batch


def exercise_translation(names, model):
    source = torch.randint(5, 90, (B, N))
    source[0, 8:] = model.config.pad_id if hasattr(model, "config") else 0
    names["greedy"](model, source)
    call(names["beam_search"], model, source, beams=4, length_penalty=0.6)


def exercise_generation(names, model, batch):
    generate = names["generate"]
    generate(model, batch, 5)
    call(generate, model, batch, 5, temperature=0.8, top_k=13, top_p=0.9, stop=(3,))
    if "pad" in inspect.signature(generate).parameters:
        generate(model, batch, 5, pad=torch.tensor([0, 2, 4]))


@pytest.mark.parametrize("chapter", discover(), ids=str)
def test_the_shape_comments_of_the_chapter_hold(chapter):
    config = small_config(load(chapter))
    source = chapter.source
    checked = shapes.instrument(source, chapter.path, letters_of(config))
    assert not checked.problems, "\n".join(checked.problems)
    names = checked.namespace()
    # The configuration must be of the class that the instrumented module defines.
    for variant in variants(config):
        exercise(names, names["Config"](**field_values(variant)))
    missed = checked.unexecuted(banner_line(source) - 1)
    assert not missed, "\n".join(missed)
    assert sum(site.hits > 0 for site in checked.sites) >= 10


def field_values(config):
    fields = [f.name for f in dataclasses.fields(config) if f.init]
    return {name: getattr(config, name) for name in fields}


# ---------------------------------------------------------------------------
# the checker's own tests
# ---------------------------------------------------------------------------


def run(body, *args, known=None, name="f"):
    """Executes a snippet with its comments checked and calls its function `f`."""
    source = "import torch\n" + textwrap.dedent(body)
    checked = shapes.instrument(source, "snippet.py", known)
    assert not checked.problems, checked.problems
    checked.namespace()[name](*args)
    assert not checked.unexecuted(10**6), checked.unexecuted(10**6)
    return checked


X = torch.zeros(2, 3, 5)

RIGHT = {
    "one shape": "def f(x):\n    y = x.mT  # (B, D, T)\n    z = y.mT  # (B, T, D)",
    "words after": "def f(x):\n    y = x  # (B, T, D), over which z broadcasts",
    "a number": "def f(x):\n    y = x[:, None]  # (B, 1, T, D)",
    "compound": "def f(x):\n    T = 3\n    y = x[:, 1:]  # (B, T-1, D)",
    "whole division": "def f(x):\n    y = x[:1]  # (B/2, T, D)\n",
    "two targets": "def f(x):\n    a, b = x, x + 1  # (B, T, D)",
    "a shape each": "def f(x):\n    a, b = x, x[0]  # (B, T, D), (T, D)",
    "a chain": "def f(x):\n    a = b = x  # (B, T, D)",
    "augmented": "def f(x):\n    x += 1  # (B, T, D)",
    "annotated": "def f(x):\n    y: object = x  # (B, T, D)",
    "a slice": "def f(x):\n    x[:, :2] = 0  # (B, 2, D)",
    "return": "def f(x):\n    return x  # (B, T, D)",
    "return two": "def f(x):\n    return x, x[0]  # (B, T, D), (T, D)",
    "many lines": "def f(x):\n    return x.add(\n        x,\n    )  # (B, T, D)",
    "first line": "def f(x):\n    y = x.add(  # (B, T, D)\n        x,\n    )",
    "parameter": "def f(\n    x,  # (B, T, D)\n    y=1,\n):\n    'Doc.'\n    return x",
    "loop": "def f(x):\n    for row in x:  # (T, D)\n        pass",
    "ellipsis": "def f(x):\n    y = x  # (..., D)\n    z = x[0, 0]  # (D,)",
    "scalar": "def f(x):\n    y = x.sum()  # ()",
    "none": "def f(x):\n    y = None  # (B, T) or None",
    "condition": "def f(x):\n    y = x  # (B, T, D), D >= T",
    "nested": (
        "def f(x):\n    y = x  # (B, T, D)\n"
        "    def g(z):\n        return z  # (T, B)\n    g(x[0])"
    ),
    "generator": (
        "def f(x):\n    list(g(x))\n"
        "def g(x):\n    for row in x:\n        yield row  # (T, D)"
    ),
    "prose": "def f(x):\n    y = x  # (B, T, D)\n    z = 1  # (2) see below (A, b)",
    "a variable": "def f(x):\n    beams = 2\n    y = x  # (beams, T, D)",
    "a product": (
        "def f(x):\n    y = x  # (B, T, D)\n    z = x.flatten(1)  # (B, T·D)"
    ),
    "parentheses": (
        "def f(x):\n    y = x  # (B, T, D)\n"
        "    z = torch.zeros(2, 16)  # (B, B·(T + D))"
    ),
    "with a variable": "def f(x):\n    n = 4\n    y = x  # (B, T, n+1)",
    "no comma": "def f(x):\n    y = x[:, 0, 0]  # (B)",
    "each call anew": (
        "def f(x):\n    g(x)\n    g(x.mT)\ndef g(x):\n    return x * 1  # (B, T, D)"
    ),
}


@pytest.mark.parametrize("case", RIGHT)
def test_a_right_comment_passes(case):
    body = RIGHT[case]
    if case == "whole division":
        body = "def f(x):\n    z = x  # (B, T, D)\n    y = x[:1]  # (B/2, T, D)\n"
    run(body, X.clone())


LIES = {
    "too few": ("def f(x):\n    y = x  # (B, D)", "3 dimensions for 2"),
    "swapped later": (
        "def f(x):\n    y = x  # (B, T, D)\n    z = x  # (B, D, T)",
        r"D is 5, not 3 \(B = 2, D = 5, T = 3\)",
    ),
    "a number": ("def f(x):\n    y = x  # (B, 1, D)", "1 is 1, not 3"),
    "same letter twice": ("def f(x):\n    y = x  # (B, B, D)", "B is 2, not 3"),
    "compound": (
        "def f(x):\n    y = x  # (B, T, D)\n    z = x  # (B, T-1, D)",
        "T-1 is 2, not 3",
    ),
    "no whole division": (
        "def f(x):\n    y = x  # (B, T, D)\n    z = x[:, :1]  # (B, T/B, D)",
        "T/B is 3/2, not 1",
    ),
    "a product": (
        "def f(x):\n    y = x  # (B, T, D)\n    z = x.flatten(1)  # (B, B·(T + D))",
        r"B\*\(T \+ D\) is 16, not 15",
    ),
    "unbound": ("def f(x):\n    y = x  # (B, T, H/G)", "G has no size yet in H/G"),
    "second target": (
        "def f(x):\n    a, b = x, x.mT  # (B, T, D)",
        "T is 3, not 5",
    ),
    "count": ("def f(x):\n    a, b = x, x  # (B, T), (B, T), (B, T)", "3 shapes for 2"),
    "return": (
        "def f(x):\n    y = x  # (B, T, D)\n    return x.mT  # (B, T, D)",
        "T is 3, not 5",
    ),
    "parameter": ("def f(\n    x,  # (B, T)\n):\n    return x", "3 dimensions for 2"),
    "yield": ("def f(x):\n    list(g(x))\ndef g(x):\n    yield x  # (B,)", "for 1"),
    "loop": ("def f(x):\n    for row in x:  # (B, T, D)\n        pass", "for 3"),
    "condition": ("def f(x):\n    y = x  # (B, T, D), T >= D", "T >= D does not hold"),
    "equality": ("def f(x):\n    y = x  # (B, T, D), T = 1", "T == 1 does not hold"),
    "a variable": (
        "def f(x):\n    n = 4\n    y = x  # (B, T, n)",
        r"n is 4, not 5 \(B = 2, T = 3, n = 4\)",
    ),
    "no variable": ("def f(x):\n    y = x  # (B, T, n)", "n has no size yet in n"),
    "no comma": ("def f(x):\n    y = x  # (B)", "3 dimensions for 1"),
    "no tensor": ("def f(x):\n    y = 3  # (B,)", "a int, no tensor"),
    "none": ("def f(x):\n    y = None  # (B, T)", "a NoneType, no tensor"),
    "variable first": (
        "def f(x):\n    T = 4\n    y = x  # (B, T, D)",
        "T is 4, not 3",
    ),
    "variable later": (
        "def f(x):\n    y = x  # (B, T, D)\n    T = 4\n    z = x[0, 0]  # (D,)",
        "T stood for 3 in this call, and the variable T is 4",
    ),
    "ellipsis": (
        "def f(x):\n    y = x  # (B, T, D)\n    z = x.mT  # (..., D)",
        "D is 5, not 3",
    ),
}


@pytest.mark.parametrize("case", LIES)
def test_a_lying_comment_is_caught(case):
    body, message = LIES[case]
    with pytest.raises(shapes.ShapeError, match=message):
        run(body, X.clone())


METHOD = """
class Part:
    def __init__(self):
        self.H = 3

    def forward(self, x):
        return x * 1  # (B, {}, {})

def f(x):
    Part().forward(x)
"""


def test_the_sizes_of_the_object_and_of_the_configuration_count_in_methods():
    run(METHOD.format("H", "D"), X, known={"D": 5})
    with pytest.raises(shapes.ShapeError, match="H is 3, not 5"):
        run(METHOD.format("D", "H"), X.mT.contiguous().mT)
    with pytest.raises(shapes.ShapeError, match="D is 4, not 5"):
        run(METHOD.format("H", "D"), X, known={"D": 4})
    # A function that is shared between callers is bound by its arguments alone.
    run("def f(x):\n    y = x  # (B, T, D)", X, known={"D": 4})


def test_an_unexecuted_comment_is_named():
    source = (
        "def f(x):\n    if x is None:\n        y = x  # (B, T)\n    return x  # (B,)"
    )
    checked = shapes.instrument(source, "snippet.py")
    checked.namespace()["f"](torch.zeros(2))
    (missed,) = checked.unexecuted(99)
    assert missed == "snippet.py:3: # (B, T): never executed"
    assert checked.unexecuted(2) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("y = x  # (B, T, d.im)", "cannot be read as a shape"),
        ("y = x  # (B, 2K)", "cannot be read as a shape"),
        ("y = x  # (B, T) -> (B, D)", "write the resulting shape alone"),
        ("assert x is x  # (B, T)", "stands at no single assignment"),
        ("y = (\n    x,  # (B, T)\n    x,  # (B, D)\n)", "stands at no single"),
    ],
)
def test_a_comment_that_cannot_be_checked_is_a_problem(line, message):
    source = "def f(x):\n" + textwrap.indent(line, "    ")
    problems = shapes.instrument(source, "snippet.py").problems
    assert problems and all(message in problem for problem in problems)


@pytest.mark.parametrize(
    "comment",
    ["# see (B, T)", "# (2) the second step", "# (this, that)", "# why", "# (in SDPA)"],
)
def test_prose_is_no_shape(comment):
    assert shapes.parse_comment(comment) is None


def test_a_comment_in_a_string_is_text():
    source = 'def f(x):\n    """\n    y = x  # (B, T)\n    """'
    assert shapes.instrument(source, "snippet.py").sites == []
