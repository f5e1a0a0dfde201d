"""Mixtral: who chooses which expert, the loss that balances them, its windows, and its forms on disk."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from tools.reference import FAMILIES, check_fp32, check_logits, draw_fields, gradients, pair
from zoo.core.contracts.batch import IGNORE, PADDING
from zoo.core.model.inventory import rule_book, rules_for
from zoo.core.model.load import ModuleSource, load_into
from zoo.models.common.moe import route
from zoo.models.mixtral.model import SPEC

TIE = 1e-5
"""As a share of the largest logit, a few times what fp32 is off by: 2e-6 here. The nearest choice is 6e-5 apart."""


def spied(model, name):
    """What each router of a model returns, call by call."""
    found = []
    for path, module in model.named_modules():
        if path.endswith(name):
            module.register_forward_hook(lambda _module, _args, out: found.append(out))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(20))
def test_choices_and_weights_of_a_router_are_transformers_bit_for_bit(seed, dtype):
    fields = draw_fields(seed, "mixtral")
    theirs, ours = pair(fields, seed)
    tokens = torch.randn(2, 100, fields["hidden_size"]).to(dtype)
    for (_, block), layer in zip(ours.model.layers.items(), theirs.model.layers, strict=True):
        router, gate = layer.mlp.gate.to(dtype), block.block_sparse_moe.gate.to(dtype)
        logits, weights, ids = router(tokens)
        routing, stats = route(gate(tokens.flatten(0, 1)), fields["num_experts_per_tok"])
        assert torch.equal(routing.ids, ids)
        assert torch.equal(routing.weights, weights)
        assert torch.equal(routing.counts, ids.flatten().bincount(minlength=fields["num_local_experts"]))
        assert torch.equal(stats.assignments, routing.counts)
        torch.testing.assert_close(stats.probabilities, logits.float().softmax(-1).sum(0))


@pytest.mark.parametrize("seed", range(20))
def test_every_token_of_a_whole_model_chooses_as_in_transformers(seed):
    """None of these tokens has a choice that fp32 cannot tell apart, which the rounding of a machine would make."""
    fields = draw_fields(seed, "mixtral")
    theirs, ours = pair(fields, seed)
    expected, found = spied(theirs, "mlp.gate"), spied(ours, "block_sparse_moe.gate")
    tokens = torch.randint(0, fields["vocab_size"], (2, 100))
    with torch.no_grad():
        theirs(tokens), ours(tokens), ours.double()(tokens)
    layers, top_k = len(expected), fields["num_experts_per_tok"]
    for logits, (_, weights, ids), exact in zip(found[:layers], expected, found[layers:], strict=True):
        routing, _ = route(logits, top_k)
        assert told_apart(exact, top_k).all()
        assert torch.equal(routing.ids, ids)
        torch.testing.assert_close(routing.weights, weights, rtol=0, atol=TIE)


def told_apart(logits, top_k):
    """Tokens whose chosen experts, in their order, lie apart from each other and from the next."""
    nearest = logits.sort(-1, descending=True).values[:, : top_k + 1].diff(dim=-1).abs().amin(-1)
    return nearest > TIE * logits.abs().amax(-1).clamp(min=1)


@pytest.mark.parametrize("seed", range(20))
def test_the_balancing_loss_and_its_gradient_are_transformers(seed):
    """A batch of one row: transformers takes the tokens of all rows for one set, zoo each row apart."""
    fields = draw_fields(seed, "mixtral") | {"output_router_logits": True, "router_aux_loss_coef": 0.5}
    theirs, ours = pair(fields, seed)
    tokens = torch.randint(0, fields["vocab_size"], (1, 100))
    labels = torch.cat([tokens[:, 1:], torch.full((1, 1), IGNORE)], 1)
    out, losses = theirs(tokens), ours(tokens, labels=labels)
    # A probability errs as a share of itself by what its logit errs, and the loss is a sum of shares of them.
    assert losses.report["aux_loss"].item() == pytest.approx(out.aux_loss.item(), rel=TIE)
    assert losses.rows.item() == pytest.approx(0.5 * out.aux_loss.item(), rel=TIE)
    expected = functional.cross_entropy(out.logits.flatten(0, 1), labels.flatten(), reduction="sum")
    # Of little weight among a hundred token losses, it is summed with few of them.
    (expected / 100 + 0.5 * out.aux_loss).backward()
    reference, found = FAMILIES["mixtral"].in_our_names(gradients(theirs)), balanced(ours, tokens, labels)
    assert found.keys() == reference.keys()
    check_fp32(lambda: balanced(ours.double(), tokens, labels), found, reference)


def balanced(ours, tokens, labels, positions=None):
    """Gradients of the balancing loss and of a hundredth of the token losses."""
    ours.zero_grad()
    losses = ours(tokens, positions, labels=labels)
    (losses.tokens / 100 + losses.rows).backward()
    return {name: gradient.clone() for name, gradient in gradients(ours).items()}


@pytest.mark.parametrize("fill", [0.2, 0.5, 0.67, 0.99])
def test_padding_counts_in_no_number_as_with_transformers_mask(fill):
    """A row of one document and padding, beside transformers with its attention mask over the same row."""
    fields = draw_fields(1, "mixtral") | {"output_router_logits": True, "router_aux_loss_coef": 0.5}
    theirs, ours = pair(fields)
    real = int(100 * fill)
    tokens = torch.randint(0, fields["vocab_size"], (1, 100))
    labels = torch.full((1, 100), IGNORE)
    labels[:, : real - 1] = tokens[:, 1:real]
    positions = torch.cat([torch.arange(real), torch.full((100 - real,), PADDING)])[None]
    mask = (positions != PADDING).long()
    spies = spied(theirs, "mlp.gate")
    out = theirs(tokens, attention_mask=mask)
    losses = ours(tokens, positions, labels=labels)
    assert losses.report["aux_loss"].item() == pytest.approx(out.aux_loss.item(), rel=TIE)
    chosen = torch.cat([ids[:real].flatten() for _, _, ids in spies])
    counts = chosen.bincount(minlength=fields["num_local_experts"])
    torch.testing.assert_close(losses.token_report["expert_load"], counts.double() / len(chosen))
    expected = functional.cross_entropy(out.logits.flatten(0, 1), labels.flatten(), reduction="sum")
    (expected / 100 + 0.5 * out.aux_loss).backward()
    reference = FAMILIES["mixtral"].in_our_names(gradients(theirs))
    found = balanced(ours, tokens, labels, positions)
    check_fp32(lambda: balanced(ours.double(), tokens, labels, positions), found, reference)


@pytest.mark.parametrize(
    ("more", "coefficient"),
    [({}, None), ({"output_router_logits": True}, 0.001), ({"router_aux_loss_coef": 0.5}, None)]
    + [({"output_router_logits": True, "router_aux_loss_coef": 0.0}, None)],
    ids=str,
)
def test_the_balancing_loss_is_off_unless_the_config_asks_for_it(more, coefficient):
    config = SPEC.parse(draw_fields(0, "mixtral") | more)
    assert config.balance_coefficient == coefficient
    tokens = torch.randint(0, 97, (1, 30))
    losses = SPEC.build(config)(tokens, labels=tokens)
    assert ("aux_loss" in losses.report) == (coefficient is not None)
    assert (torch.as_tensor(losses.rows).item() > 0) == (coefficient is not None)
    assert losses.token_report["expert_load"].sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize("window", [1, 2, 29, 30, 31, None])
@pytest.mark.parametrize("choices", [1, 2])
def test_logits_are_transformers_at_every_window_and_with_a_single_choice(window, choices):
    fields = draw_fields(3, "mixtral") | {"sliding_window": window, "num_experts_per_tok": choices}
    theirs, ours = pair(fields)
    tokens = torch.randint(0, fields["vocab_size"], (2, 30))
    with torch.no_grad():
        check_logits(ours, theirs(tokens).logits, tokens)


def test_one_expert_is_a_dense_model():
    fields = draw_fields(1, "mixtral") | {"num_local_experts": 1, "num_experts_per_tok": 1}
    theirs, ours = pair(fields)
    tokens = torch.randint(0, fields["vocab_size"], (2, 30))
    with torch.no_grad():
        check_logits(ours, theirs(tokens).logits, tokens)


class Files:
    """The tensors of a file as a source in hub names."""

    def __init__(self, path):
        self.tensors = load_file(path)

    def names(self):
        return self.tensors.keys()

    def shape(self, name):
        return tuple(self.tensors[name].shape)

    def dtype(self, name):
        return str(self.tensors[name].dtype).removeprefix("torch.")

    def read(self, name, index, buffer=None):
        return self.tensors[name][index]


@pytest.mark.parametrize("original", [True, False], ids=["per-expert", "fused"])
@pytest.mark.parametrize("seed", [0, 1])
def test_both_forms_that_transformers_writes_are_read_and_written_bit_for_bit(original, seed, tmp_path):
    fields = draw_fields(seed, "mixtral")
    theirs, ours = pair(fields, seed)
    theirs.save_pretrained(tmp_path, save_original_format=original)
    source, config = Files(tmp_path / "model.safetensors"), SPEC.parse(fields)
    assert any("gate_up_proj" in name for name in source.names()) != original
    book = rule_book(SPEC, config, source)
    assert book.hub_shapes == {name: source.shape(name) for name in source.names()}
    read = SPEC.build(config)
    load_into(read, source, rules_for(SPEC, config, source))
    for (name, found), expected in zip(read.named_parameters(), ours.parameters(), strict=True):
        assert torch.equal(found, expected), name
    written = book.to_hub(ModuleSource(read))
    for name in source.names():
        assert torch.equal(written.read(name, tuple(slice(0, n) for n in source.shape(name))), source.tensors[name])
