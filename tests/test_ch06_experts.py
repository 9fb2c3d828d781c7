# SPDX-License-Identifier: MIT
"""Chapter 6, what is new in it: routing, experts, balance, looking ahead, speculation.

References are loops over tokens and experts, the papers' formulas, and Hugging Face's
classes; every parameter is random, and no two sizes are alike.
"""

import copy
import itertools
import math
from collections import Counter
from dataclasses import replace
from functools import cache as remember
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from chapters import find, load
from torch.utils.checkpoint import checkpoint

CHAPTER = find("ch06")
moe = load(CHAPTER)

# The sizes of the small model, by the letters of the chapter; S_ shared experts.
D, L, V, E, A, S_, F_, M = 36, 3, 97, 12, 3, 2, 20, 2
KINDS = ["deepseek_v3", "deepseek_v2"]
V2 = {"model_type": "deepseek_v2", "n_mtp": 0, "renormalise": False}


def equal(a, b, atol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def near(a, b, relative: float = 1e-5) -> None:
    """Equal within a part of the largest value."""
    equal(a, b, relative * b.abs().max().item())


@pytest.fixture(scope="module")
def hf():
    """The transformers package, imported once."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def small(kind: str = "deepseek_v3", **changes):
    """The chapter's small config, or the same of a V2 model."""
    second = V2 if kind == "deepseek_v2" else {}
    return replace(moe.small_config(), **{**second, **changes})


def ours_random(config, dtype: torch.dtype = torch.float64, seed: int = 0):
    """A model with every parameter random, in eval mode."""
    model = moe.Transformer(config).eval()
    moe.randomise(model, seed)
    return model.to(dtype)


@remember
def shared_model(n_mtp: int = M):
    """A random model in float64, for tests that leave it as it is."""
    return ours_random(small(n_mtp=n_mtp))


def some_tokens(B: int, T: int, vocab: int = V, seed: int = 1):
    return torch.randint(vocab, (B, T), generator=torch.Generator().manual_seed(seed))


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


# --- which experts, and how much of each ----------------------------------------------


def route_by_hand(x: list[float], rows: list, bias: list[float], c) -> dict:
    """The experts of one token, each with its weight: sums and sorted lists."""
    z = [sum(a * b for a, b in zip(x, row, strict=True)) for row in rows]
    if is_v3 := c.model_type == "deepseek_v3":
        s = [1 / (1 + math.exp(-value)) for value in z]
        choice = [a + b for a, b in zip(s, bias, strict=True)]
    else:
        total = sum(math.exp(value) for value in z)
        s = choice = [math.exp(value) / total for value in z]
    size = len(s) // c.n_groups
    groups = [range(g * size, (g + 1) * size) for g in range(c.n_groups)]

    def rank(group: range) -> float:
        return sum(sorted((choice[i] for i in group), reverse=True)[: 1 + is_v3])

    kept = sorted(groups, key=rank, reverse=True)[: c.n_active_groups]
    left = [i for group in kept for i in group]
    chosen = sorted(left, key=lambda i: choice[i], reverse=True)[: c.n_active]
    whole = sum(s[i] for i in chosen) if c.renormalise else 1.0
    return {i: c.routed_scale * s[i] / whole for i in chosen}


# Of a bias of -3 every score for choosing is negative.
GROUPS = {"one": (1, 1), "2 of 4": (4, 2), "all 4": (4, 4), "1 of 2": (2, 1)}
BIASES = {
    "none": lambda: torch.zeros(E),
    "random": lambda: normal(E, dtype=torch.float32, seed=5),
    "all at -3": lambda: 0.1 * normal(E, dtype=torch.float32, seed=5) - 3,
}


def routing_cases():
    for groups in GROUPS:
        yield from (("deepseek_v3", groups, bias) for bias in BIASES)
        yield "deepseek_v2", groups, "none"


def random_router(kind: str, groups: str, bias: str, dtype=torch.float64, **changes):
    """A router whose scores lie far apart; its weight is what the test may read."""
    n, kept = GROUPS[groups]
    c = small(kind, n_groups=n, n_active_groups=kept, routed_scale=1.7, **changes)
    router = moe.Router(c)
    with torch.no_grad():
        router.weight.copy_(0.3 * normal(E, D, seed=2))
        if kind == "deepseek_v3":
            router.bias.copy_(BIASES[bias]())
    return router.to(dtype)


def scattered(weights, chosen, E: int = E):
    """The weight of every expert for each token, 0 of those not chosen: (N, E)."""
    weights, chosen = weights.flatten(0, -2), chosen.flatten(0, -2)
    return weights.new_zeros(len(chosen), E).scatter(1, chosen, weights)


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize(("kind", "groups", "bias"), list(routing_cases()))
def test_routing_by_hand(kind, groups, bias, renormalise):
    """Sorted lists, token by token: the same experts and the same weights."""
    router = random_router(kind, groups, bias, renormalise=renormalise)
    x = normal(2, 23, D, seed=3)
    with torch.no_grad():
        weights, routing = router(x)
    assert weights.shape == routing.chosen.shape == (2, 23, A)
    assert routing.scores.shape == (2, 23, E)
    offset = router.bias.tolist() if kind == "deepseek_v3" else []
    found = scattered(weights, routing.chosen)
    for token, row in zip(x.flatten(0, 1), found, strict=True):
        wanted = route_by_hand(
            token.tolist(), router.weight.tolist(), offset, router.config
        )
        assert len(wanted) == A and {i for i in range(E) if row[i]} == set(wanted)
        for i, weight in wanted.items():
            assert math.isclose(row[i], weight, rel_tol=1e-12)


@pytest.mark.parametrize(("kind", "groups", "bias"), list(routing_cases()))
def test_routing_is_hugging_faces(hf, kind, groups, bias):
    from transformers.models.deepseek_v2 import modeling_deepseek_v2 as second
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as third

    router = random_router(kind, groups, bias, torch.float32)
    config = hf.AutoConfig.for_model(**router.config.to_hf())
    is_v3 = kind == "deepseek_v3"
    theirs = (third.DeepseekV3TopkRouter if is_v3 else second.DeepseekV2TopkRouter)(
        config
    )
    with torch.no_grad():
        theirs.weight.copy_(router.weight)
        if is_v3:
            theirs.e_score_correction_bias.copy_(router.bias)
    x = normal(2, 50, D, dtype=torch.float32, seed=3)
    weights, routing = router(x)
    logits, *expected = theirs(x)
    equal(scattered(weights, routing.chosen), scattered(*expected), 1e-6)
    scores = logits.sigmoid() if is_v3 else logits.softmax(-1)
    equal(routing.scores.flatten(0, 1), scores, 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_of_float32_whatever_comes_in(kind):
    """Rounded to bfloat16, scores of many experts would be alike."""
    router = random_router(kind, "2 of 4", "random", torch.bfloat16)
    x = normal(2, 9, D, dtype=torch.bfloat16)
    exact = copy.deepcopy(router).float()
    assert router.weight.dtype == torch.bfloat16
    expected, told = exact(x.float())
    weights, routing = router(x)
    assert weights.dtype == routing.scores.dtype == torch.float32
    torch.testing.assert_close((weights, *routing), (expected, *told), rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        weights, routing = exact(x.float())
    assert weights.dtype == routing.scores.dtype == torch.float32
    torch.testing.assert_close((weights, *routing), (expected, *told), rtol=0, atol=0)
    assert router.double()(x.double())[0].dtype == torch.float64


CASTS = {
    "to(bfloat16)": lambda m: m.to(torch.bfloat16),
    "bfloat16()": lambda m: m.bfloat16(),
    "half()": lambda m: m.half(),
    "double()": lambda m: m.double(),
    "there and back": lambda m: m.bfloat16().float(),
    "a copy": lambda m: copy.deepcopy(m.bfloat16()),
    "to a device and dtype": lambda m: m.to("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("cast", CASTS)
def test_the_bias_stays_in_float32(cast):
    """A step of γ on 1 would be lost in bfloat16."""
    model = ours_random(small(), torch.float32)
    before = []
    for i, router in enumerate(model.routers()):
        router.bias += 1.0 + 0.001 * i
        before.append(router.bias.clone())
    model = CASTS[cast](model)
    assert len(model.routers()) == L - 1 + M
    for router, bias in zip(model.routers(), before, strict=True):
        assert router.bias.dtype == torch.float32 and torch.equal(router.bias, bias)
        assert "bias" in dict(router.named_buffers()) and "bias" in router.state_dict()


@pytest.mark.parametrize("cast", [lambda m: m, lambda m: m.bfloat16()])
def test_the_bias_has_room_without_memory(cast):
    with torch.device("meta"):
        model = cast(moe.Transformer(small()))
    assert {r.bias.device.type for r in model.routers()} == {"meta"}
    model = model.to_empty(device="cpu")
    for router in model.routers():
        assert router.bias.dtype == torch.float32 and router.bias.shape == (E,)
        assert router.bias.device.type == router.weight.device.type == "cpu"


def test_no_gradient_reaches_the_bias():
    """It is no parameter; the weights it leads to are those of the scores alone."""
    model = ours_random(small()).train()
    optimizer = moe.make_optimizer(model, moe.Recipe())
    moe.loss(model, some_tokens(2, 12)).backward()
    stepped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(stepped) == len(list(model.parameters()))
    for router in model.routers():
        assert not router.bias.requires_grad and router.bias.grad is None
        assert id(router.bias) not in stepped
    router = random_router("deepseek_v3", "one", "none")
    x = normal(2, 7, D)
    before, _ = router(x)
    router.bias += 0.7  # of all: the same are chosen
    torch.testing.assert_close(router(x)[0], before, rtol=0, atol=0)


# --- the experts ----------------------------------------------------------------------


def silu(x):
    return x / (1 + torch.exp(-x))


def by_loop(x, weights, chosen, w_gate_up, w_down):
    """Token by token, expert by expert, unit by unit: the formula as it reads."""
    rows = []
    for n, token in enumerate(x):
        total = torch.zeros_like(token)
        for weight, i in zip(weights[n], chosen[n].tolist(), strict=True):
            for f in range(w_gate_up.shape[2]):
                gate, up = w_gate_up[i, 0, f] @ token, w_gate_up[i, 1, f] @ token
                total = total + weight * silu(gate) * up * w_down[i, :, f]
        rows.append(total)
    return torch.stack(rows)


# Sizes of the loops' cases; 4 and 8 are whole 16 bytes in float32.
FEW = {"dim": 8, "expert_ffn_dim": 4, "n_experts": 6, "n_active": 2}
FEW |= {"n_groups": 1, "n_active_groups": 1}


def some_choices(case: str):
    """Expert numbers (N, A): no two alike for one token."""
    generator = torch.Generator().manual_seed(4)
    if case == "one token":
        return torch.tensor([[4, 1]])
    if case == "all to one":
        return torch.full((7, 1), 3)
    among = torch.tensor([1, 3, 4] if case == "some without" else range(6))
    order = [torch.randperm(len(among), generator=generator)[:2] for _ in range(11)]
    return among[torch.stack(order)]


CHOICES = ["any", "some without", "all to one", "one token"]


def random_experts(dtype: torch.dtype, **changes):
    experts = moe.Experts(replace(small(), **{**FEW, **changes}))
    with torch.no_grad():
        for i, parameter in enumerate(experts.parameters()):
            parameter.copy_(0.7 * normal(*parameter.shape, seed=10 + i))
    return experts.to(dtype)


def run(function, experts, x, weights, chosen) -> list:
    """The result, and the gradients of tokens, weights and both matrices."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, weights)]
    matrices = [p.detach().clone().requires_grad_() for p in experts.parameters()]
    if function is by_loop:
        out = by_loop(*leaves, chosen, *matrices)
    else:
        experts.w_gate_up, experts.w_down = map(torch.nn.Parameter, matrices)
        matrices = list(experts.parameters())
        out = function(experts, *leaves, chosen)
    (out * normal(*out.shape, dtype=out.dtype, seed=9)).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in [*leaves, *matrices])]


@pytest.fixture
def products(monkeypatch):
    """How often torch's grouped product ran."""
    calls, real = [], F.grouped_mm
    monkeypatch.setattr(
        F, "grouped_mm", lambda *a, **k: calls.append(a) or real(*a, **k)
    )
    return calls


@pytest.mark.parametrize(
    ("dtype", "path"),
    [
        (torch.float64, "slices"),
        (torch.float32, "slices"),
        (torch.float32, "grouped"),
        (torch.float64, "one by one"),
        (torch.float32, "one by one"),
    ],
)
@pytest.mark.parametrize("case", CHOICES)
def test_experts_equal_a_loop(case, dtype, path, monkeypatch, products):
    """Results and all gradients, of every form."""
    experts, chosen = random_experts(dtype), some_choices(case)
    x = normal(len(chosen), 8, dtype=dtype, seed=6)
    weights = normal(*chosen.shape, dtype=dtype, seed=7)
    if path == "slices":
        monkeypatch.setattr(moe, "has_grouped_mm", lambda *_: False)
    one_by_one = path == "one by one"
    form = moe.Experts.one_by_one if one_by_one else moe.Experts.forward
    expected = run(by_loop, experts, x, weights, chosen)
    found = run(form, experts, x, weights, chosen)
    assert len(products) == (2 if path == "grouped" else 0)
    for ours, loop in zip(found, expected, strict=True):
        assert ours is not None and ours.dtype == dtype and loop.abs().max() > 0.1
        near(ours, loop, 1e-12 if dtype == torch.float64 else 1e-5)
    without = [i for i in range(6) if i not in chosen]
    assert len(without) == {"any": 0, "some without": 3}.get(
        case, 6 - chosen.unique().numel()
    )
    for gradient in found[3:]:
        assert not gradient[without].any() and gradient[chosen.unique()].any()


def test_without_the_grouped_product_nothing_is_missing(monkeypatch):
    """Older versions of torch have none."""
    experts, chosen = random_experts(torch.float32), some_choices("any")
    x = normal(len(chosen), 8, dtype=torch.float32)
    weights = normal(*chosen.shape, dtype=torch.float32)
    expected = experts(x, weights, chosen)
    monkeypatch.delattr(F, "grouped_mm")
    near(experts(x, weights, chosen), expected, 1e-6)


@pytest.mark.parametrize("case", CHOICES)
def test_no_token_is_dropped(case, monkeypatch):
    """As many rows are multiplied as tokens have experts; none has a capacity."""
    rows, real = [], moe.grouped_linear

    def note(x, weight, count):
        rows.append((len(x), count.tolist()))
        return real(x, weight, count)

    monkeypatch.setattr(moe, "grouped_linear", note)
    experts, chosen = random_experts(torch.float32), some_choices(case)
    experts(torch.ones(len(chosen), 8), torch.ones(chosen.shape), chosen)
    tally = Counter(chosen.flatten().tolist())
    assert rows == [(chosen.numel(), [tally[i] for i in range(6)])] * 2


@pytest.mark.parametrize(
    ("dtype", "changes", "grouped"),
    [
        (torch.float32, {"expert_ffn_dim": 5}, 0),
        (torch.float32, {"dim": 10}, 0),
        (torch.float32, {"expert_ffn_dim": 6}, 1),
        (torch.float32, {}, 2),
        (torch.bfloat16, {"expert_ffn_dim": 10}, 0),
        (torch.bfloat16, {"dim": 24, "expert_ffn_dim": 16}, 2),
        (torch.float16, {"dim": 24, "expert_ffn_dim": 16}, 2),
        (torch.float64, {}, 0),
    ],
)
def test_where_the_grouped_product_would_refuse_it_is_not_asked(
    dtype, changes, grouped, products
):
    """Its rows must be multiples of 16 bytes; what it takes, it gets."""
    experts, chosen = random_experts(dtype, **changes), some_choices("any")
    x = normal(len(chosen), experts.w_down.shape[1], dtype=dtype)
    weights = normal(*chosen.shape, dtype=torch.promote_types(dtype, torch.float32))
    out = experts(x, weights, chosen)
    assert out.dtype == dtype and len(products) == grouped
    exact = random_experts(torch.float64, **changes)
    if dtype != torch.float64:
        exact.load_state_dict(experts.state_dict())
    expected = exact.one_by_one(x.double(), weights.double(), chosen)
    low = dtype in (torch.bfloat16, torch.float16)
    near(out.double(), expected, 3e-2 if low else 1e-5)
    if dtype == torch.float32 and not grouped:
        ends = torch.tensor([2, 4, 6, 8, 10, 11], dtype=torch.int32)
        with pytest.raises(RuntimeError, match="16 bytes"):
            F.grouped_mm(x, experts.w_gate_up.flatten(1, 2).mT, offs=ends)
            hidden = torch.ones(11, experts.w_down.shape[2])
            F.grouped_mm(hidden, experts.w_down.mT, offs=ends)


def test_a_layer_is_its_segments_all_active():
    """arXiv:2401.06066 §3.1: cut into m experts, a layer of which all are chosen."""
    m, width = 5, 7
    c = small(n_experts=m, n_active=m, n_groups=1, n_active_groups=1)
    whole = moe.FeedForward(c, m * width).double()
    experts = moe.Experts(replace(c, expert_ffn_dim=width)).double()
    with torch.no_grad():
        for i, parameter in enumerate(whole.parameters()):
            parameter.copy_(0.3 * normal(*parameter.shape, seed=i))
        for i in range(m):
            cut = slice(i * width, (i + 1) * width)
            experts.w_gate_up[i, 0] = whole.w_gate.weight[cut]
            experts.w_gate_up[i, 1] = whole.w_up.weight[cut]
            experts.w_down[i] = whole.w_down.weight[:, cut]
    x, weights = normal(13, D), torch.ones(13, m, dtype=torch.float64)
    chosen = torch.stack([torch.randperm(m) for _ in range(13)])
    expected = whole(x)
    assert expected.abs().max() > 1
    equal(experts(x, weights, chosen), expected, 1e-12)
    weights[:, 0] = 0  # an expert less is another function
    assert (experts(x, weights, chosen) - expected).abs().max() > 0.1


def random_mixture(kind: str, **changes):
    """The feed-forward of a block behind the dense ones, float64."""
    return ours_random(small(kind, **changes)).blocks[-1].ffn


@pytest.mark.parametrize("kind", KINDS)
def test_shared_experts_are_added_as_they_are(kind):
    """Each sees every token; their sum has no weight, and is no mean."""
    mixture, x = random_mixture(kind, routed_scale=3.3), normal(2, 11, D)
    assert mixture.shared.w_gate.weight.shape == (S_ * F_, D)
    weights, routing = mixture.router(x)
    shares = (part.flatten(0, 1) for part in (x, weights, routing.chosen))
    expected = mixture.experts.one_by_one(*shares).view_as(x)
    for cut in (slice(0, F_), slice(F_, 2 * F_)):
        gate, up = mixture.shared.w_gate.weight[cut], mixture.shared.w_up.weight[cut]
        down = mixture.shared.w_down.weight[:, cut]
        expected = expected + silu(x @ gate.T) * (x @ up.T) @ down.T
    equal(mixture(x), expected, 1e-12)
    alone = random_mixture(kind, n_shared=0)
    assert alone.shared is None and not any("shared" in n for n in alone.state_dict())
    weights, routing = alone.router(x)
    shares = (part.flatten(0, 1) for part in (x, weights, routing.chosen))
    equal(alone(x), alone.experts.one_by_one(*shares).view_as(x), 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixture_is_hugging_faces(hf, kind):
    from transformers.models.deepseek_v2 import modeling_deepseek_v2 as second
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as third

    mixture = random_mixture(kind, routed_scale=1.7).float()
    config = hf.AutoConfig.for_model(**mixture.router.config.to_hf())
    is_v3 = kind == "deepseek_v3"
    theirs = third.DeepseekV3MoE(config) if is_v3 else second.DeepseekV2Moe(config)
    ours = {
        "gate.weight": mixture.router.weight,
        "experts.gate_up_proj": mixture.experts.w_gate_up.flatten(1, 2),
        "experts.down_proj": mixture.experts.w_down,
        "shared_experts.gate_proj.weight": mixture.shared.w_gate.weight,
        "shared_experts.up_proj.weight": mixture.shared.w_up.weight,
        "shared_experts.down_proj.weight": mixture.shared.w_down.weight,
    }
    if is_v3:
        ours["gate.e_score_correction_bias"] = mixture.router.bias
    theirs.load_state_dict(ours)
    x = normal(2, 19, D, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(x)
        assert expected.abs().max() > 0.2
        near(mixture(x), expected)


# --- balance of the loads -------------------------------------------------------------


def watch_routers(model) -> list[list]:
    """What each router decides from now on: per router, a list of (scores, chosen)."""
    noted = [[] for _ in model.routers()]
    for router, own in zip(model.routers(), noted, strict=True):

        def note(_, __, out, own=own) -> None:
            own.append((out[1].scores.detach().clone(), out[1].chosen.clone()))

        router.register_forward_hook(note)
    return noted


def tally(*chosen) -> list[int]:
    """How often each expert was chosen."""
    counts = Counter(i for some in chosen for i in some.flatten().tolist())
    return [counts[i] for i in range(E)]


def moved(bias, load: list[int], rate: float):
    """b + γ · sign(mean load - load), in float32: arXiv:2408.15664 algorithm 1."""
    mean = sum(load) / len(load)
    sign = [(mean > one) - (mean < one) for one in load]
    return bias + rate * torch.tensor(sign, dtype=torch.float32)


def biases(model) -> list:
    return [router.bias.clone() for router in model.routers()]


def same_bits(ours: list, others: list) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, others, strict=True))


def one_step(model, *batches) -> None:
    """The loss of each batch, then a step of the chapter's optimizer."""
    optimizer = moe.make_optimizer(model.train(), moe.Recipe())
    for batch in batches:
        moe.loss(model, batch).backward()
    optimizer.step()


@pytest.mark.parametrize("rate", [0.001, 0.25, 0.0])
def test_a_step_moves_each_bias_by_the_sign_of_its_load(rate):
    """Counted from what the routers gave; on 8 tokens a row, the mean is whole."""
    model = ours_random(small(balance_rate=rate))
    before, noted = biases(model), watch_routers(model)
    one_step(model, some_tokens(2, 9))
    loads = [tally(*(chosen for _, chosen in own)) for own in noted]
    assert [sum(load) for load in loads] == [48, 48, 42, 36]  # 3 of 2 · (8, 8, 7, 6)
    wanted = [moved(*each, rate) for each in zip(before, loads, strict=True)]
    assert same_bits(biases(model), wanted)
    signs = {float(s) for s in torch.cat(wanted).sub(torch.cat(before)).sign()}
    assert signs == ({-1.0, 0.0, 1.0} if rate else {0.0})
    model.balance()  # nothing was counted since
    assert same_bits(biases(model), wanted)


def test_the_load_counts_from_step_to_step():
    """A step's load is that of its own tokens."""
    model = ours_random(small(balance_rate=0.05))
    noted, optimizer = watch_routers(model), moe.make_optimizer(model, moe.Recipe())
    model.train()
    for step in range(3):
        before = biases(model)
        moe.loss(model, some_tokens(2, 9, seed=step)).backward()
        optimizer.step()
        loads = [tally(own[-1][1]) for own in noted]
        wanted = [moved(*each, 0.05) for each in zip(before, loads, strict=True)]
        assert same_bits(biases(model), wanted)


def test_a_v2_model_has_no_bias_to_move():
    model = ours_random(small("deepseek_v2", balance_rate=0.25))
    assert not any("bias" in name for name in model.state_dict())
    one_step(model, some_tokens(2, 9))
    assert all(isinstance(router.load, int) for router in model.routers())
    assert not any("bias" in name for name in model.state_dict())


def mini_training(tokens_each: int = 12, **changes):
    """A run in float64 over random tokens: the text does not matter."""
    recipe = {"steps": 15, "batch_size": 2, "seq_len": tokens_each, "warmup": 1}
    recipe = moe.Recipe(**(recipe | {"eval_every": 15} | changes))
    tokenizer = moe.byte_tokenizer()
    text = bytes(some_tokens(1, 400, 90)[0].add(32).tolist()).decode()
    texts = [text[:300]], [text[300:]]
    data = [
        moe.Batches(part, tokenizer, tokens_each, recipe.batch_size, recipe.seed)
        for part in texts
    ]
    config = small(vocab_size=tokenizer.vocab_size, balance_rate=0.05)
    model = ours_random(config)
    return moe.Training(model, *data, recipe)


def test_looking_at_held_out_tokens_moves_nothing():
    """Nor does it count: the next step is that of a run that never looked."""
    training, other = mini_training(), mini_training()
    before, model = biases(training.model), training.model
    moe.held_out_loss(training)
    model.eval()
    moe.loss(model, some_tokens(2, 9)).item()
    model.predict_ahead(some_tokens(2, 9))
    moe.generate(model, some_tokens(2, 5), 3)
    moe.speculate(model, some_tokens(1, 5), 3)
    moe.loads(model, some_tokens(2, 9))
    assert all(isinstance(router.load, int) for router in model.routers())
    model.balance()
    assert same_bits(biases(model), before)
    training.take_step()
    other.take_step()
    assert same_bits(biases(model), biases(other.model))
    assert not same_bits(biases(model), before)


def test_micro_batches_are_balanced_as_one_batch():
    """Of two halves the loads are added; the last half alone would say otherwise."""
    halves = mini_training(batch_size=2, accumulate=2)
    whole = mini_training(batch_size=4, accumulate=1)
    batches = [halves.data.batch(i) for i in range(2)]
    assert torch.equal(torch.cat(batches), whole.data.batch(0))
    before, noted = biases(halves.model), watch_routers(halves.model)
    halves.take_step()
    whole.take_step()
    assert same_bits(biases(halves.model), biases(whole.model))
    for part in range(2):
        loads = [tally(own[part][1]) for own in noted]
        alone = [moved(*each, 0.05) for each in zip(before, loads, strict=True)]
        assert not same_bits(biases(halves.model), alone)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_blocks_that_are_recomputed_count_once(use_reentrant):
    """Their forward runs again in the backward pass; load and gradients stay."""
    config = small(balance_rate=0.05, balance_loss=0.0 if use_reentrant else 0.1)
    plain, again = ours_random(config), ours_random(config)
    blocks = [block for block in again.modules() if isinstance(block, moe.Block)]
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=use_reentrant)
    noted = watch_routers(again)
    batch = some_tokens(2, 9)
    for model in (plain, again):
        moe.loss(model.train(), batch).backward()
    assert [len(own) for own in noted] == [2] * (L - 1 + M)
    for ours, others in zip(again.routers(), plain.routers(), strict=True):
        assert torch.equal(ours.load, others.load) and ours.load.sum() > 0
    for ours, others in zip(again.parameters(), plain.parameters(), strict=True):
        near(ours.grad, others.grad, 1e-12)
    again.balance()
    plain.balance()
    assert same_bits(biases(again), biases(plain))


def step_of_a_process(rank: int, folder: str) -> None:
    """One of two, each with its own batch; it leaves its biases behind."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    model = ours_random(small(balance_rate=0.05))
    moe.loss(model.train(), some_tokens(2, 9, seed=20 + rank))
    model.balance()
    torch.save(biases(model), f"{folder}/biases{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="torch was built without gloo",
)
def test_two_processes_balance_by_the_load_of_both(tmp_path):
    torch.multiprocessing.spawn(step_of_a_process, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"biases{rank}.pt") for rank in range(2))
    assert same_bits(first, second)
    model = ours_random(small(balance_rate=0.05))
    before, noted = biases(model), watch_routers(model)
    for rank in range(2):
        moe.loss(model.train(), some_tokens(2, 9, seed=20 + rank))
    loads = [[tally(chosen) for _, chosen in own] for own in noted]
    for i, (bias, (one, other)) in enumerate(zip(before, loads, strict=True)):
        both = [a + b for a, b in zip(one, other, strict=True)]
        assert torch.equal(first[i], moved(bias, both, 0.05))
    alone = [
        moved(bias, one, 0.05) for bias, (one, _) in zip(before, loads, strict=True)
    ]
    assert not same_bits(first, alone)


def balance_by_hand(scores, chosen, c):
    """α Σ f_i P_i of each sequence, or of all tokens: its mean, by loops.

    V3 counts the best by the scores alone, eqs. 17 to 20 of arXiv:2412.19437; V2 the
    choices that were made, eqs. 23 to 25 of arXiv:2405.04434.
    """
    rows = list(zip(scores, chosen.tolist(), strict=True))
    if not c.balance_per_sequence:
        rows = [(scores.flatten(0, 1), chosen.flatten(0, 1).tolist())]
    losses = []
    for s, made in rows:
        T, total = len(s), 0.0
        for i in range(E):
            f, P = 0.0, 0.0
            for t in range(T):
                ranked = sorted(range(E), key=lambda j, t=t: float(s[t, j].detach()))
                best = ranked[-A:] if c.model_type == "deepseek_v3" else made[t]
                f += E / (A * T) * (i in best)
                P = P + s[t, i] / sum(s[t]) / T
            total = total + f * P
        losses.append(c.balance_loss * total)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("per_sequence", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_balance_loss_by_hand(kind, per_sequence):
    """And its gradient, which reaches the router's weight through the scores alone."""
    router = random_router(
        kind, "2 of 4", "random", balance_loss=0.7, balance_per_sequence=per_sequence
    )
    x = normal(3, 7, D, seed=3)
    _, routing = router(x)
    best = routing.scores.topk(A).indices.sort().values
    assert not torch.equal(best, routing.chosen.sort().values)  # bias and groups
    found = router.balance_loss(routing)
    expected = balance_by_hand(*routing, router.config)
    equal(found, expected, 1e-12)
    assert found.shape == () and 0.1 < found < 2
    gradients = [
        torch.autograd.grad(each, router.weight, retain_graph=True)[0]
        for each in (found, expected)
    ]
    assert gradients[1].abs().max() > 1e-3
    equal(*gradients, 1e-12)


def test_both_kinds_of_balance_loss_differ():
    """Over each sequence it is not what it is over the batch."""
    losses = []
    for per_sequence in (True, False):
        router = random_router(
            "deepseek_v3", "one", "none", balance_per_sequence=per_sequence
        )
        losses.append(router.balance_loss(router(normal(3, 7, D, seed=3))[1]).item())
    assert abs(losses[0] / losses[1] - 1) > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_balance_losses_are_in_the_loss_once(kind):
    """One of each mixture, those of the prediction depths too; in eval mode none."""
    config = small(kind, balance_loss=0.7)
    model, without = ours_random(config), ours_random(replace(config, balance_loss=0))
    noted, batch = watch_routers(model), some_tokens(2, 9)
    gap = moe.loss(model.train(), batch) - moe.loss(without.train(), batch)
    expected = [
        balance_by_hand(*own[0], router.config)
        for router, own in zip(model.routers(), noted, strict=True)
    ]
    assert len(expected) == L - 1 + config.n_mtp and min(expected) > 0.5
    equal(gap, sum(expected), 1e-12)
    for router, own in zip(without.routers(), noted, strict=True):
        assert router.balance_loss(moe.Routing(*own[0])) == 0
    same = [moe.loss(each.eval(), batch).item() for each in (model, without)]
    assert same[0] == same[1]


@pytest.mark.parametrize("rate", [0.01, 0.0])
def test_balancing_makes_skewed_loads_even(rate):
    """All tokens lean one way: some experts get a few times their share, some none."""
    router = moe.Router(small(balance_rate=rate))
    with torch.no_grad():
        router.weight.copy_(0.1 * normal(E, D, seed=1))
    lean, generator = (
        2 * normal(D, dtype=torch.float32),
        torch.Generator().manual_seed(2),
    )

    @torch.no_grad()
    def unevenness(n: int, update: bool) -> float:
        """The largest load over the mean, and the smallest, of n batches."""
        load = torch.zeros(E)
        for _ in range(n):
            _, routing = router(torch.randn(4, 32, D, generator=generator) + lean)
            load += routing.chosen.flatten().bincount(minlength=E)
            if update:
                router.count(routing)
                router.update()
        return (load.max() / load.mean()).item(), (load.min() / load.mean()).item()

    most, least = unevenness(5, update=False)
    assert most > 2.5 and least < 0.1
    unevenness(100, update=True)
    most, least = unevenness(20, update=False)
    if rate:
        assert most < 1.5 and least > 0.6
    else:
        assert most > 2.5 and least < 0.1


# --- looking ahead --------------------------------------------------------------------


@torch.no_grad()
def their_ahead(main, modules, tokens) -> list:
    """Hugging Face's logits of each depth, from its MtpModel's own layers."""
    hidden = main.model(tokens).last_hidden_state  # after the final norm
    logits, T = [], tokens.shape[1]
    for k in range(len(modules.layers)):
        hidden = modules.forward_layer(
            k,
            hidden[:, : T - 1 - k],
            torch.arange(k + 1, T)[None],
            None,
            input_ids=tokens[:, k + 1 :],
        )
        logits.append(modules._project_to_logits(hidden))
    return logits


def knowing_its_layers(main):
    """Hugging Face looks for MTP modules behind layer 60, as DeepSeek-V3 has them."""
    layers = "|".join(str(L + k) for k in range(M))
    main._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.({layers})\."]
    return main


def test_depths_of_a_saved_model_equal_hugging_faces(hf, tmp_path):
    from transformers.modeling_layers import MtpModel

    ours = ours_random(small(), torch.float32)
    ours.save_pretrained(tmp_path)
    main = hf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    modules = MtpModel.from_pretrained(knowing_its_layers(main)).eval()
    tokens = some_tokens(2, 70)
    expected = their_ahead(main, modules, tokens)
    found = ours.predict_ahead(tokens)
    assert [part.shape for part in found] == [(2, 69, V), (2, 68, V)]
    for mine, theirs in zip(found, expected, strict=True):
        assert theirs.abs().max() > 1
        near(mine, theirs)
    again = moe.reference_ahead(main, tokens, moe.mtp_tensors(ours))
    for mine, theirs in zip(again, expected, strict=True):
        near(mine, theirs)


def published(modules) -> dict:
    """The weights of Hugging Face's MtpModel as DeepSeek's files have them."""
    found = {}
    for name, tensor in modules.state_dict().items():
        if not name.startswith("layers."):
            continue
        _, k, rest = name.split(".", 2)
        rest = rest.removeprefix("mtp_block.").replace("post_norm", "shared_head.norm")
        rest, where = rest.replace("mlp.experts.", ""), f"model.layers.{L + int(k)}."
        for e in range(E) if rest in ("gate_up_proj", "down_proj") else ():
            parts = {"down_proj": tensor[e]}
            if rest == "gate_up_proj":
                parts = {"gate_proj": tensor[e, :F_], "up_proj": tensor[e, F_:]}
            for leaf, part in parts.items():
                found[f"{where}mlp.experts.{e}.{leaf}.weight"] = part.clone()
        if tensor.dim() < 3:
            found[where + rest] = tensor
        found[where + "embed_tokens.weight"] = modules.embed_tokens.weight.clone()
        found[where + "shared_head.head.weight"] = modules.shared_head.weight.clone()
    return found


def test_hugging_faces_depths_are_read_from_a_published_file(hf, tmp_path):
    """Its random weights, beside those of its main model, with the usual copies."""
    from safetensors.torch import load_file, save_file
    from transformers.modeling_layers import MtpModel

    config = hf.AutoConfig.for_model(**small().to_hf())
    main = hf.AutoModelForCausalLM.from_config(config).eval()
    modules = MtpModel(main, M).eval()
    seeds = itertools.count()
    with torch.no_grad():
        for model in (main, modules):
            for name, parameter in model.named_parameters():
                if model is modules and not name.startswith("layers."):
                    continue  # the main model's own
                noise = normal(*parameter.shape, seed=next(seeds))
                parameter.copy_(0.1 * noise + ("norm" in name))
            for name, buffer in model.named_buffers():
                if name.endswith("e_score_correction_bias"):
                    buffer.copy_(0.1 * normal(E, seed=next(seeds)))
    main.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors") | published(modules)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    ours = moe.Transformer.from_pretrained(tmp_path)
    assert ours.config.n_mtp == M
    tokens = some_tokens(2, 70)
    expected = their_ahead(main, modules, tokens)
    for mine, theirs in zip(ours.predict_ahead(tokens), expected, strict=True):
        assert theirs.abs().max() > 1
        near(mine, theirs)


@pytest.mark.parametrize("how", ["order", "norms", "norm", "layer"])
@torch.no_grad()
def test_the_comparison_of_depths_is_not_blind_to(how):
    """The halves of the input exchanged, or their norms; a norm; another's block."""
    model, tokens = ours_random(small()), some_tokens(2, 20)
    before = model.predict_ahead(tokens)
    for module in model.mtp:
        if how == "order":
            module.proj.weight.copy_(module.proj.weight.roll(D, dims=1))
        elif how == "norms":
            module.embed_norm, module.hidden_norm = (
                module.hidden_norm,
                module.embed_norm,
            )
        elif how == "norm":
            module.norm = model.norm
        else:
            module.block = model.blocks[1]
    for a, b in zip(model.predict_ahead(tokens), before, strict=True):
        assert (a - b).abs().max() > 0.1


@torch.no_grad()
def test_the_depths_by_their_equations():
    """arXiv:2412.19437 eqs. 21 to 23; the embedding first, as it was published."""
    model, tokens = shared_model(), some_tokens(2, 17)

    def normed(x, norm):
        return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight

    h = model.hidden(tokens)
    for k, (module, found) in enumerate(
        zip(model.mtp, model.predict_ahead(tokens), strict=True)
    ):
        T = 17 - 1 - k
        known, new = h[:, :T], model.embed.weight[tokens[:, k + 1 :]]
        joined = [normed(new, module.embed_norm), normed(known, module.hidden_norm)]
        x = torch.cat(joined, dim=2) @ module.proj.weight.T
        rope = moe.rope_table(torch.arange(5, 5 + T), model.config)  # wherever it is
        h = normed(module.block(x, rope), module.norm)
        near(found, h @ model.head.weight.T, 1e-6)  # the tables are of float32


@torch.no_grad()
def test_depth_k_sees_one_token_more_and_none_behind_it():
    """Row t of depth k hangs on tokens up to t + 1 + k: change each, and look."""
    model, T = shared_model(), 9
    tokens = some_tokens(1, T)
    before = model.predict_ahead(tokens)
    assert [part.shape for part in before] == [(1, T - 1 - k, V) for k in range(M)]
    for j in range(T):
        other = tokens.clone()
        other[0, j] = (other[0, j] + 1) % V
        for k, (a, b) in enumerate(
            zip(model.predict_ahead(other), before, strict=True)
        ):
            gap = (a - b).abs().amax(dim=(0, 2))
            first = max(0, j - 1 - k)
            assert gap[:first].max().item() < 1e-12 if first else True
            assert (gap[first:] > 1e-6).all()


@pytest.mark.parametrize("T", [0, 1, 2])
def test_too_few_tokens_to_look_ahead(T):
    """For training too, where a mean over none would be no number."""
    for act in (
        shared_model().predict_ahead,
        lambda tokens: moe.loss(ours_random(small()).train(), F.pad(tokens, (0, 1))),
    ):
        with pytest.raises(ValueError, match=f"{T} tokens are too few to predict 3"):
            act(some_tokens(1, T))
    assert [
        part.shape[1] for part in shared_model().predict_ahead(some_tokens(1, 3))
    ] == [2, 1]


def surprise(logits, target: int):
    """-ln of the probability of `target`."""
    return math.log(sum(math.exp(z) for z in logits.tolist())) - logits[target].item()


def loss_by_hand(logits, ahead, batch, weight: float) -> float:
    """Eqs. 24 and 25: every depth's sum over T, however many terms it has."""
    tokens, T = batch.tolist(), batch.shape[1] - 1
    total = 0.0
    for b, row in enumerate(tokens):
        total += sum(surprise(logits[b, t], row[t + 1]) for t in range(T)) / T
        for k, depth in enumerate(ahead):
            terms = [surprise(depth[b, t], row[t + 2 + k]) for t in range(T - 1 - k)]
            total += weight / len(ahead) * sum(terms) / T
    return total / len(tokens)


@pytest.mark.parametrize("weight", [0.3, 0.0, 2.0])
def test_the_loss_by_hand(weight):
    model = ours_random(small(balance_loss=0.0, mtp_weight=weight))
    batch = some_tokens(3, 8)
    with torch.no_grad():
        logits = model(batch[:, :-1])
        ahead = model.predict_ahead(batch[:, :-1])
    found = moe.loss(model.train(), batch).item()
    assert math.isclose(found, loss_by_hand(logits, ahead, batch, weight), rel_tol=1e-7)
    main = moe.loss(model.eval(), batch).item()
    assert math.isclose(main, loss_by_hand(logits, [], batch, 0), rel_tol=1e-12)


def test_no_target_leaks():
    """The last token is a target alone: in another, the last terms change, no more."""
    model = ours_random(small(balance_loss=0.0))
    batch = some_tokens(2, 8)
    other = batch.clone()
    other[:, -1] = (other[:, -1] + 1) % V
    with torch.no_grad():
        rows = [model(batch[:, :-1]), *model.predict_ahead(batch[:, :-1])]
    gap = 0.0
    for k, logits in enumerate(rows):
        share = 1 if k == 0 else model.config.mtp_weight / M
        for b in range(2):
            terms = [surprise(logits[b, -1], each[b, -1]) for each in (other, batch)]
            gap += share * (terms[0] - terms[1]) / 7 / 2
    losses = [moe.loss(model.train(), each).item() for each in (other, batch)]
    assert abs(gap) > 0.01 and math.isclose(losses[0] - losses[1], gap, abs_tol=1e-7)


@pytest.mark.parametrize("k", range(M))
def test_every_parameter_of_a_depth_learns_from_its_own_logits(k):
    """And so do the embedding, the head and the model below, which it shares."""
    model = ours_random(small())
    noted = watch_routers(model)
    model.predict_ahead(some_tokens(3, 40))[k].square().sum().backward()
    assert all(min(tally(own[0][1])) > 0 for own in noted), "an expert saw no token"
    for depth, module in enumerate(model.mtp):
        for name, parameter in module.named_parameters():
            reached = parameter.grad is not None and parameter.grad.abs().max() > 1e-6
            assert reached == (depth <= k), (depth, name)
    for name, parameter in model.named_parameters():
        if not name.startswith("mtp."):
            assert parameter.grad.abs().max() > 1e-6, name
    assert not any(V in p.shape for p in model.mtp.parameters())


@pytest.mark.parametrize("k", range(M))
def test_the_embedding_learns_from_what_a_depth_is_told(k):
    """The last token is the newest that depth k is told, and the model is not."""
    model = ours_random(small())
    tokens = some_tokens(2, 9).remainder(V - 1)
    tokens[:, -1] = V - 1  # which stands nowhere else
    model.predict_ahead(tokens)[k].square().sum().backward()
    assert model.embed.weight.grad[V - 1].abs().max() > 1e-6


def test_what_a_training_pass_calls():
    """Attention L + M times, each depth all its positions at once; the head 1 + M."""
    model, calls = ours_random(small()).train(), []

    def note(module, args) -> None:
        calls.append((type(module).__name__, args[0].shape[1]))

    for module in model.modules():
        if isinstance(module, moe.Attention) or module is model.head:
            module.register_forward_pre_hook(note)
    moe.loss(model, some_tokens(2, 9)).backward()
    lengths = [8] * L + [7, 6]
    assert [T for name, T in calls if name == "Attention"] == lengths
    assert [T for name, T in calls if name == "Linear"] == [8, 7, 6]


def test_the_weight_of_the_depths_is_lowered_late(monkeypatch, tmp_path):
    """λ is 0.3 for 10 of 14.8 parts, then a third, also in a resumed run."""
    used, real = [], moe.loss

    def note(model, batch):
        used.append(round(model.mtp_weight.item(), 6))
        return real(model, batch)

    monkeypatch.setattr(moe, "loss", note)
    training = mini_training()
    assert moe.MTP_EARLY * 15 > 10
    for step in range(15):
        training.take_step()
        if step in (9, 12):
            training.log[-1]["held_out"] = 0.0
            training.save(tmp_path / str(step), moe.byte_tokenizer())
    assert used == [0.3] * 11 + [0.1] * 4
    for step, rest in ((9, [0.3] + [0.1] * 4), (12, [0.1] * 2)):
        again = mini_training()
        again.restore(moe.read_torch(tmp_path / str(step) / "checkpoint.pt"))
        used.clear()
        while again.step < 15:
            again.take_step()
        assert used == rest
        for a, b in zip(again.log, training.log, strict=True):
            assert a["loss"] == b["loss"]
        assert same_bits(biases(again.model), biases(training.model))


# --- what is drawn --------------------------------------------------------------------


def drawn(p, n: int, draw) -> float:
    """Total variation between p (V,) and the shares of n draws."""
    counts = torch.bincount(torch.as_tensor(draw(n)), minlength=len(p))
    return 0.5 * (counts / n - p).abs().sum().item()


SETTINGS = {
    "plain": {},
    "cold": {"temperature": 0.5},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.7, "temperature": 1.5},
    "both": {"top_k": 4, "top_p": 0.8},
    "greedy": {"temperature": 0.0},
}


def chances_by_hand(z: list[float], temperature=1.0, top_k=None, top_p=None) -> list:
    """A sorted list, cut after k, then where p is reached; the rest sums to 1."""
    order = sorted(range(len(z)), key=lambda i: z[i], reverse=True)
    if temperature == 0:
        return [float(i == order[0]) for i in range(len(z))]
    order = order[: top_k or len(z)]
    weight = {i: math.exp((z[i] - max(z)) / temperature) for i in order}
    whole, mass, kept = sum(weight.values()), 0.0, {}
    for i in order:
        if top_p is not None and mass >= top_p:
            break
        kept[i] = weight[i]
        mass += weight[i] / whole
    return [kept.get(i, 0.0) / sum(kept.values()) for i in range(len(z))]


@pytest.mark.parametrize("case", SETTINGS)
def test_the_distribution_by_hand_and_by_drawing(case):
    asked, logits = SETTINGS[case], 1.3 * normal(2, 7, dtype=torch.float32, seed=3)
    p = moe.distribution(logits, **asked)
    assert p.shape == (2, 7) and p.dtype == torch.float32
    equal(p.sum(dim=1), torch.ones(2), 1e-6)
    for row, z in zip(p, logits.tolist(), strict=True):
        equal(row, torch.tensor(chances_by_hand(z, **asked)), 1e-6)
    generator = torch.Generator().manual_seed(5)
    for row, z in zip(p, logits, strict=True):
        many = z.expand(20_000, -1)
        draw = partial(moe.sample, many, **asked, generator=generator)
        assert drawn(row, 20_000, lambda _, draw=draw: draw()) < 0.015


def test_ties_do_not_widen_the_choice():
    """Exactly k are kept; what reaches p is the fewest."""
    p = moe.distribution(torch.zeros(3, 7), top_k=4)
    assert (p > 0).sum(dim=1).tolist() == [4] * 3
    equal(p.sum(dim=1), torch.ones(3), 1e-6)
    assert (moe.distribution(torch.zeros(3, 8), top_p=0.5) > 0).sum(dim=1).tolist() == [
        4
    ] * 3
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for top_p, kept in ((0.49, 1), (0.51, 2), (0.79, 2), (0.81, 3), (1.0, 4)):
        assert (moe.distribution(logits, top_p=top_p) > 0).sum() == kept
    many = moe.sample(torch.zeros(500, 7), top_k=4)
    assert len(set(many.tolist())) == 4


def test_the_likeliest_is_taken_before_anything_is_rounded():
    logits = torch.tensor([[1.0, 1.0 + 1e-12, 0.0]], dtype=torch.float64)
    assert moe.distribution(logits, 0.0).tolist() == [[0.0, 1.0, 0.0]]
    assert moe.sample(logits, 0.0).tolist() == [1]
    huge = torch.tensor([[3e4, 1e4, -3e4]])
    assert moe.distribution(huge, 1e-6).tolist() == [[1.0, 0.0, 0.0]]


# --- speculation ----------------------------------------------------------------------


def draws_of_accept(p, q, n: int) -> list[list[int]]:
    """n times: drafts drawn from q, and what `accept` makes of them."""
    generator = torch.Generator().manual_seed(7)
    drafts = [torch.multinomial(one, n, True, generator=generator)[0] for one in q]
    return [
        moe.accept(p, q, row, generator)
        for row in (torch.stack(drafts, 1) if q else torch.empty(n, 0).long())
    ]


P = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.1, 0.2, 0.3, 0.4], [0.25, 0.05, 0.6, 0.1]])
GUESSES = {
    "far": [[0.1, 0.2, 0.3, 0.4], [0.6, 0.2, 0.1, 0.1]],
    "near": [[0.45, 0.35, 0.2, 0.0], [0.1, 0.25, 0.3, 0.35]],
    "certain": [[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]],
    "elsewhere": [[0.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]],
}


@pytest.mark.parametrize("guess", GUESSES)
def test_whatever_is_drafted_tokens_have_the_models_distribution(guess):
    """20,000 rounds: each token that comes out, and how many are kept, as computed."""
    q, n = [torch.tensor([row]) for row in GUESSES[guess]], 20_000
    rounds = draws_of_accept(P, q, n)
    keep = [torch.minimum(P[i], q[i][0]).sum().item() for i in range(2)]
    lengths = torch.tensor([len(new) for new in rounds]) - 1
    assert lengths.min() >= 0 and lengths.max() <= 2
    chances = torch.tensor([1 - keep[0], keep[0] * (1 - keep[1]), keep[0] * keep[1]])
    assert drawn(chances, n, lambda _: lengths) < 0.01
    for place in range(3):
        there = [new[place] for new in rounds if len(new) > place]
        if len(there) > 1000:  # a share of a few is far off by chance
            assert drawn(P[place], len(there), lambda _, t=there: t) < 0.03
    assert all(new[0] != 3 for new in rounds)  # the model's chance of it is 0


def test_a_draft_of_the_models_own_distribution_is_kept():
    q = [P[i : i + 1] for i in range(2)]
    assert {len(new) for new in draws_of_accept(P, q, 500)} == {3}
    alone = [new[0] for new in draws_of_accept(P[:1], [], 20_000)]
    assert drawn(P[0], 20_000, lambda _: alone) < 0.01


def test_the_edges_of_chance(monkeypatch):
    """A draw of exactly 0 keeps nothing impossible; rounding leaves no row empty."""
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.zeros(()))
    q = torch.tensor([[0.0, 0.0, 0.0, 1.0]])
    assert moe.accept(P[:2], [q], torch.tensor([3]))[0] != 3
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor(1 - 2**-24))
    p = torch.tensor([[0.5, 0.5 - 2**-22], [1.0, 0.0]])
    assert len(moe.accept(p, [torch.tensor([[0.5, 0.5]])], torch.tensor([1]))) == 1


PROMPTS = [1, 2, 3, 7]


@pytest.mark.parametrize("n_mtp", [1, 2, 3])
@pytest.mark.parametrize("T", PROMPTS)
def test_greedy_speculation_is_greedy_generation(n_mtp, T):
    """Random modules guess badly; tokens are the model's, whatever they guess."""
    model = shared_model(n_mtp)
    for seed, n in enumerate((0, 1, 2, 3, 17)):
        tokens = some_tokens(1, T, seed=seed)
        expected = moe.generate(model, tokens, n)
        found, stats = moe.speculate(model, tokens, n)
        assert torch.equal(found, expected) and found.shape == (1, T + n)
        assert stats.accepted + stats.passes == n
    stops = expected[0, T + 9 : T + 11].tolist()
    expected = moe.generate(model, tokens, n, stop=stops)
    assert expected.shape[1] <= T + 10
    assert torch.equal(moe.speculate(model, tokens, n, stop=stops)[0], expected)


# A model that learns a text that goes round; its depths are then disturbed a little.
LEARNER = moe.Config(
    vocab_size=11,
    max_seq_len=64,
    dim=24,
    n_layers=2,
    n_heads=3,
    q_latent_dim=14,
    latent_dim=12,
    head_dim=7,
    rope_dim=4,
    value_dim=9,
    ffn_dim=40,
    n_dense_layers=1,
    n_experts=6,
    n_active=2,
    expert_ffn_dim=16,
    n_groups=1,
    n_active_groups=1,
    routed_scale=1.0,
    n_mtp=3,
    rope_theta=100.0,
)


@remember
def learner(dtype: torch.dtype = torch.float64):
    """Its drafts are good, and not always: a step of accepting all, some or none."""
    if dtype != torch.float64:
        return copy.deepcopy(learner()).to(dtype)
    torch.manual_seed(0)
    model = moe.Transformer(LEARNER).double().train()
    optimizer = moe.make_optimizer(model, moe.Recipe(lr=1e-2, steps=40))
    for step in range(40):
        optimizer.zero_grad()
        starts = some_tokens(8, 1, 11, seed=step)
        moe.loss(model, (starts + torch.arange(20)) % 11).backward()
        optimizer.step()
    with torch.no_grad():
        for i, parameter in enumerate(model.mtp.parameters()):
            parameter += 0.2 * normal(*parameter.shape, seed=i)
    return model.eval()


@pytest.fixture
def rounds(monkeypatch):
    """How many drafts each round of a speculation had, and how many were kept."""
    noted, real = [], moe.accept

    def note(p, q, drafts, generator=None):
        new = real(p, q, drafts, generator)
        noted.append((len(q), len(new) - 1))
        assert len(p) == len(q) + 1 and drafts.shape == (len(q),)
        return new

    monkeypatch.setattr(moe, "accept", note)
    return noted


def test_good_drafts_change_nothing_but_the_passes(rounds):
    """Rounds that accept all, some and none, from prompts of every length."""
    for seed, T in enumerate(PROMPTS * 2):
        tokens = some_tokens(1, T, 11, seed=seed)
        for n in (0, 1, 2, 3, 4, 5, 30):
            expected = moe.generate(learner(), tokens, n)
            found, stats = moe.speculate(learner(), tokens, n)
            assert torch.equal(found, expected)
        assert stats.passes < 16 < stats.accepted
    kept = Counter(rounds)
    assert all(kept[3, n] > 5 for n in range(4)), kept


def test_greedy_speculation_stops_where_generation_does(rounds):
    """At the first of several stops, be it drafted, or the token after the drafts."""
    tokens, cut = torch.tensor([[3, 4]]), set()
    pairs = [[i, (i + 1) % 11] for i in range(11)]  # both in one round, some of them
    for stops in [*([i] for i in range(11)), *pairs, [2, 9], [9, 2], range(11)]:
        for n in (0, 1, 2, 6, 25):
            rounds.clear()
            expected = moe.generate(learner(), tokens, n, stop=stops)
            found, _ = moe.speculate(learner(), tokens, n, stop=stops)
            assert torch.equal(found, expected)
            if n == 25:
                assert found[0, -1] in stops and found.shape[1] < 27
                through = 2 + sum(1 + kept for _, kept in rounds)
                cut.add(through - found.shape[1])
    assert {0, 1, 2} <= cut  # of what the last round gave


def same_unless_close(model, tokens, n: int) -> bool:
    """Whether both give the same tokens; if not, the first two logits lay together.

    A pass over several tokens sums in another order than one over a single token, so
    in float32 a choice between two logits within 1e-4 may fall otherwise.
    """
    expected = moe.generate(model, tokens, n)
    found, _ = moe.speculate(model, tokens, n)
    if torch.equal(found, expected):
        return True
    first = int((found != expected)[0].nonzero()[0])
    best = model(expected[:, :first])[0, -1].topk(2).values
    assert best[0] - best[1] < 1e-4, (first, best)
    return False


@torch.no_grad()
def test_greedy_speculation_in_float32():
    """Equal, but where the two best logits lie within 1e-4 of each other."""
    models = [learner(torch.float32), ours_random(small(), torch.float32)]
    same = [
        same_unless_close(model, some_tokens(1, T, 11, seed=seed), 30)
        for model in models
        for seed, T in enumerate(PROMPTS * 2)
    ]
    assert sum(same) >= len(same) - 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("T", [1, 2, 3, 5])
def test_what_the_depths_remember_is_what_a_fresh_pass_gives(
    monkeypatch, rounds, T, temperature
):
    """Each draft's logits are those of a pass over all tokens, without a cache.

    Drafts that were not accepted, and what was made of them, leave no trace.
    """
    model, compared, real = learner(), [], moe.Drafter.draft

    def check(self, known, hidden, most, chances, generator):
        logits = []

        def note(some):
            logits.append(some)
            return chances(some)

        drafts, q = real(self, known, hidden, most, note, generator)
        n = known.shape[1] - 1
        assert len(logits) == len(q) == drafts.shape[1] == max(0, min(3, most))
        filler = known.new_zeros(1, 3)  # behind what the last draft hangs on
        ahead = model.predict_ahead(torch.cat([known, drafts, filler], dim=1))
        for k, mine in enumerate(logits):
            equal(mine, ahead[k][:, n - 1], 1e-9)
            compared.append(k)
        for k, cache in enumerate(self.caches[: len(q)]):
            assert cache.length == max(0, n - k)
        return drafts, q

    monkeypatch.setattr(moe.Drafter, "draft", check)
    generator = torch.Generator().manual_seed(3)
    tokens = some_tokens(1, T, 11, seed=T)
    moe.speculate(model, tokens, 30, temperature=temperature, generator=generator)
    assert Counter(compared)[2] > 5 and min(kept for _, kept in rounds[1:-2]) < 3


def chi_square(counts: dict, chances: dict, n: int) -> float:
    """How far the counts are off, in standard deviations of what is to be expected."""
    assert not set(counts) - {cell for cell, p in chances.items() if p > 0}
    likely = {cell: p for cell, p in chances.items() if n * p >= 5}
    rest = 1 - sum(likely.values())
    total = sum((counts[cell] - n * p) ** 2 / (n * p) for cell, p in likely.items())
    if n * rest >= 1:
        others = n - sum(counts[cell] for cell in likely)
        total += (others - n * rest) ** 2 / (n * rest)
    degrees = len(likely) - (n * rest < 1)
    return (total - degrees) / math.sqrt(2 * degrees)


@remember
def five_words():
    """A model of five tokens, whose depths guess otherwise than it goes on."""
    config = replace(LEARNER, vocab_size=5, n_layers=1, n_experts=0, n_mtp=2)
    model = ours_random(config, torch.float32)
    with torch.no_grad():
        model.head.weight.mul_(2.5)
    return model


@pytest.mark.parametrize(
    "asked",
    [{"temperature": 1.0}, {"temperature": 1.3, "top_k": 4, "top_p": 0.85}],
    ids=["plain", "cut off"],
)
def test_sampled_speculation_has_the_models_distribution(asked):
    """The first two new tokens, and the next two: drafts, or what came instead."""
    model, tokens, n = five_words(), torch.tensor([[3, 1]]), 700
    chances = {(): 1.0}
    for length in range(3):
        for prefix in [some for some in chances if len(some) == length]:
            row = torch.cat([tokens, torch.tensor([prefix]).long()], dim=1)
            p = moe.distribution(model(row)[:, -1], **asked)[0].tolist()
            chances |= {(*prefix, i): chances[prefix] * p[i] for i in range(5)}
    whole = {new: chance for new, chance in chances.items() if len(new) == 3}
    assert math.isclose(sum(whole.values()), 1, rel_tol=1e-5)
    generator, drafted, accepted, seen = torch.Generator().manual_seed(8), 0, 0, []
    for _ in range(n):
        found, stats = moe.speculate(model, tokens, 4, **asked, generator=generator)
        seen.append(tuple(found[0, 2:5].tolist()))
        drafted, accepted = drafted + stats.drafted, accepted + stats.accepted
    assert 0.2 < accepted / drafted < 0.8
    for part in (slice(0, 2), slice(1, 3)):
        expected = Counter()
        for new, chance in whole.items():
            expected[new[part]] += chance
        assert chi_square(Counter(new[part] for new in seen), expected, n) < 4


def test_only_what_is_left_of_the_distribution_is_drawn():
    """Of drafts too: each new token is among the model's first two at its place."""
    generator = torch.Generator().manual_seed(2)
    asked, total = {"temperature": 1.5, "top_k": 2, "generator": generator}, 0
    for model, vocab in ((shared_model(), V), (learner(), 11)):
        tokens = some_tokens(1, 4, vocab)
        for _ in range(5):
            found, stats = moe.speculate(model, tokens, 20, **asked)
            found = found.clone()  # what inference mode returns cannot be trained on
            best = model(found[:, :-1])[0, 3:].topk(2).indices
            assert (best == found[0, 4:, None]).any(dim=1).all()
            total += stats.accepted
    assert total > 20


def test_the_same_seed_gives_the_same_tokens():
    found = [
        moe.speculate(
            learner(),
            some_tokens(1, 4, 11),
            25,
            temperature=2.0,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (1, 1, 2)
    ]
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]
    assert not torch.equal(found[0][0], found[2][0])


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 20])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_speculation_counts(n, temperature, rounds, monkeypatch):
    """Passes of the model, drafts, and those kept: a token a pass, and one a draft."""
    model, lengths, real = copy.deepcopy(learner()), [], moe.Transformer.hidden

    def note(self, tokens, *rest):
        lengths.append(tokens.shape[1])
        return real(self, tokens, *rest)

    monkeypatch.setattr(moe.Transformer, "hidden", note)
    tokens = some_tokens(1, 4, 11)
    found, stats = moe.speculate(model, tokens, n, temperature=temperature)
    assert found.shape == (1, 4 + n) and torch.equal(found[:, :4], tokens)
    assert stats.passes == len(lengths) == len(rounds)
    assert lengths[:1] == [4][:n] and lengths[1:] == [1 + q for q, _ in rounds[1:]]
    assert stats.drafted == sum(q for q, _ in rounds)
    assert stats.accepted == sum(kept for _, kept in rounds)
    assert n == stats.passes + stats.accepted
    done = 0
    for drafted, kept in rounds:
        if done:  # no more than there is room for, the token after them included
            assert drafted == min(3, n - done - 1)
        done += kept + 1
    assert stats.rate == (stats.accepted / stats.drafted if stats.drafted else 0)
    assert moe.Speculation().rate == 0 and moe.Speculation(8, 6, 3).rate == 0.75


@pytest.mark.parametrize(
    ("rows", "T", "n", "n_mtp", "named"),
    [
        (2, 4, 3, 1, "2 rows"),
        (1, 4, 3, 0, "0 MTP modules"),
        (1, 0, 3, 1, "prompt is empty"),
        (1, 4, 77, 1, "77 new ones do not fit the context of 80"),
        (1, 81, 0, 1, "a prompt of 81 tokens"),
        (1, 4, -1, 1, "max_new_tokens is -1"),
    ],
)
def test_what_cannot_be_speculated_on_is_refused(rows, T, n, n_mtp, named):
    with pytest.raises(ValueError, match=named):
        moe.speculate(shared_model(n_mtp), some_tokens(rows, T), n)


@pytest.mark.parametrize("asked", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}])
def test_an_impossible_distribution_is_refused(asked):
    for draw in (moe.generate, moe.speculate):
        with pytest.raises(ValueError, match=next(iter(asked))):
            draw(shared_model(1), some_tokens(1, 4), 3, **{"temperature": 1.0, **asked})


# --- how many numbers -----------------------------------------------------------------


def on_meta(config):
    with torch.device("meta"):
        return moe.Transformer(config)


PRESETS = {
    "V2-Lite": (moe.DEEPSEEK_V2_LITE, 15_706_484_224, 0),
    "V2": (moe.DEEPSEEK_V2, 235_741_434_880, 0),
    "V3": (moe.DEEPSEEK_V3, 671_026_404_352, 11_610_067_968),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_these_parameters(hf, name):
    """Of Hugging Face's class too; MTP modules are counted apart."""
    config, total, ahead = PRESETS[name]
    counts = moe.parameter_counts(on_meta(config))
    assert (counts["total"], counts["mtp"]) == (total, ahead)
    theirs = hf.AutoConfig.for_model(**config.to_hf())
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(theirs)
    assert sum(p.numel() for p in model.parameters()) == total
    if ahead:
        from transformers.modeling_layers import MtpModel

        with torch.device("meta"):
            layers = MtpModel(model, 1).layers
        assert sum(p.numel() for p in layers.parameters()) == ahead


def active_by_hand(c) -> int:
    """The parameters that one token meets, summed from the sizes."""
    wide, H, K, R = c.dim, c.n_heads, c.head_dim, c.rope_dim
    queries = wide * H * (K + R)
    if (Q := c.q_latent_dim) is not None:
        queries = wide * Q + Q + Q * H * (K + R)
    C, P = c.latent_dim, c.value_dim
    keys = wide * (C + R) + C + C * H * (K + P)
    attention = queries + keys + H * P * wide + 2 * wide  # and the block's norms
    seen = c.n_active + c.n_shared
    mixture = wide * c.n_experts + seen * 3 * wide * c.expert_ffn_dim
    dense, n = 3 * wide * c.ffn_dim, c.n_dense_layers
    layers = c.n_layers * attention + n * dense + (c.n_layers - n) * mixture
    return layers + 2 * c.vocab_size * wide + wide


def test_the_parameters_that_a_token_meets():
    for config in (moe.DEEPSEEK_V2_LITE, moe.DEEPSEEK_V2, moe.DEEPSEEK_V3):
        assert moe.parameter_counts(on_meta(config))["active"] == active_by_hand(config)
    assert active_by_hand(moe.DEEPSEEK_V3) == 37_552_282_624
    dense = moe.parameter_counts(on_meta(small(n_experts=0, n_mtp=0)))
    assert dense["active"] == dense["total"] and dense["mtp"] == 0


def test_the_published_names_of_deepseek_v3():
    names = moe.hf_names(on_meta(replace(moe.DEEPSEEK_V3, n_mtp=0)))
    kinds = Counter(name.rpartition(".")[2] for name in names)
    assert len(names) == 45_395 and set(kinds) == {"weight", "e_score_correction_bias"}
    assert kinds["e_score_correction_bias"] == 58
    experts = {name for name in names if ".mlp.experts." in name}
    assert len(experts) == 58 * 256 * 3
    assert experts == {
        f"model.layers.{i}.mlp.experts.{e}.{kind}_proj.weight"
        for i, e, kind in itertools.product(
            range(3, 61), range(256), ("gate", "up", "down")
        )
    }


@torch.no_grad()
def test_loads_are_the_shares_of_the_choices():
    model, tokens = ours_random(small()), some_tokens(2, 9)
    noted = watch_routers(model)
    shares = moe.loads(model, tokens)
    assert shares.shape == (L - 1 + M, E)
    for share, own in zip(shares, noted, strict=True):
        load = torch.tensor(tally(own[0][1]))
        equal(share, load / load.sum(), 1e-6)
