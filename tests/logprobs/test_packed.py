"""The packed layout against plain forwards through transformers, one response at a time."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.attention import flex_attention
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from prefscan.common.errors import UserError
from prefscan.logprobs import packed
from prefscan.logprobs.layouts import load_layout
from tiny import plain_logps, random_adapter, random_pairs

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},  # as SmolLM2's
    "mistral": {"sliding_window": None},
    "qwen2": {},
}
# Prompt, chosen, rejected: one token a response, long and short side by side, a prompt of one token.
LENGTHS = [(5, 1, 1), (3, 9, 2), (40, 2, 60), (1, 4, 3), (12, 30, 1), (7, 6, 6), (2, 1, 8), (25, 17, 33)]


def tiny_lm(architecture: str, **overrides: Any) -> Any:
    """A model of 2 layers, with weights large enough that a misplaced token shows."""
    options = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        architecture.split("-")[0], **options | ARCHITECTURES.get(architecture, {}) | overrides
    )
    return AutoModelForCausalLM.from_config(config).requires_grad_(False)


def mixed_pairs() -> list[dict[str, Any]]:
    pairs = random_pairs(LENGTHS)
    pairs[5]["rejected_ids"] = list(pairs[5]["chosen_ids"])
    return pairs


def packed_logps(model: Any, pairs: list[dict[str, Any]]) -> torch.Tensor:
    """Shape `[2, pairs]`: chosen, rejected."""
    return torch.stack(packed.pair_logps(model, packed.collate(pairs, 0)))


def separate_logps(model: Any, pairs: list[dict[str, Any]]) -> torch.Tensor:
    return torch.stack([torch.stack(plain_logps(model, pair)) for pair in pairs], dim=1)


def assert_same_gradients(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 0, name
        assert (ours[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


def gradients(policy: Any, logps: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a sum over the responses in which each has a weight, and a sign, of its own."""
    weights = torch.linspace(-1, 1.3, logps.numel()).reshape(logps.shape)
    policy.zero_grad()
    (weights * logps).sum().backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.requires_grad}


@pytest.fixture(params=ARCHITECTURES)
def policy(request: pytest.FixtureRequest) -> Any:
    return random_adapter(tiny_lm(request.param))


def test_is_loaded_by_name() -> None:
    assert load_layout("packed") is packed


@pytest.mark.parametrize("size", [1, 3, 8])
def test_log_probabilities_equal_plain_forwards(policy: Any, size: int) -> None:
    pairs = mixed_pairs()
    with torch.no_grad():
        expected = separate_logps(policy, pairs)
        ours = torch.cat([packed_logps(policy, pairs[i : i + size]) for i in range(0, len(pairs), size)], dim=1)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
    assert expected.std() > 1  # or the comparison would say little


def test_identical_responses_are_equally_likely(policy: Any) -> None:
    chosen, rejected = packed_logps(policy, mixed_pairs())[:, 5].tolist()
    assert chosen == pytest.approx(rejected, abs=1e-4)


def test_order_of_pairs_changes_nothing(policy: Any) -> None:
    pairs = mixed_pairs()
    forwards, backwards = packed_logps(policy, pairs), packed_logps(policy, pairs[::-1])
    torch.testing.assert_close(backwards.flip(1), forwards, atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [1, 8])
def test_gradients_equal_those_through_full_logits(policy: Any, size: int) -> None:
    pairs = mixed_pairs()[:size]
    expected = gradients(policy, separate_logps(policy, pairs))
    assert_same_gradients(gradients(policy, packed_logps(policy, pairs)), expected)


@pytest.mark.parametrize("changed", ["chosen_ids", "rejected_ids"])
def test_neither_response_sees_the_other_nor_another_pair(policy: Any, changed: str) -> None:
    pairs = mixed_pairs()
    other = [dict(pair) for pair in pairs]
    other[3][changed] = [token ^ 1 for token in pairs[3][changed]]
    before, after = packed_logps(policy, pairs), packed_logps(policy, other)
    place = (["chosen_ids", "rejected_ids"].index(changed), 3)
    assert abs(before[place] - after[place]) > 0.1
    before[place] = after[place] = 0
    # Bit for bit: tokens of one's own length move nothing, so any difference would be a leak.
    assert torch.equal(before, after)


def test_a_longer_response_moves_nothing_else(policy: Any) -> None:
    pairs = mixed_pairs()
    longer = [pair | {"chosen_ids": pair["chosen_ids"] * 3} if i == 1 else pair for i, pair in enumerate(pairs)]
    before, after = packed_logps(policy, pairs), packed_logps(policy, longer)
    assert abs(before[0, 1] - after[0, 1]) > 1
    before[0, 1] = after[0, 1] = 0
    torch.testing.assert_close(after, before, atol=1e-4, rtol=0)


@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_the_head_in_chunks_equals_the_head_at_once(monkeypatch: pytest.MonkeyPatch, policy: Any, chunk: int) -> None:
    pairs = mixed_pairs()
    expected = separate_logps(policy, pairs)
    expected_gradients = gradients(policy, expected)
    monkeypatch.setattr(packed, "HEAD_CHUNK", chunk)
    ours = packed_logps(policy, pairs)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
    assert_same_gradients(gradients(policy, ours), expected_gradients)


def test_the_packed_row_holds_each_token_once() -> None:
    batch = packed.collate([{"prompt_ids": [3, 4], "chosen_ids": [5, 6, 7], "rejected_ids": [8, 9]}], 0)
    assert batch.input_ids.tolist() == [[3, 4, 5, 6, 7, 8, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 3]]
    assert batch.targets.tolist() == [5, 6, 7, 8, 9]
    assert batch.predictors.tolist() == [1, 2, 3, 1, 5]
    assert batch.segments.tolist() == [0, 0, 0, 1, 1]


def test_bf16_stays_near_fp32() -> None:
    model = tiny_lm("llama")
    pairs = mixed_pairs()
    expected = separate_logps(model, pairs)
    ours = packed_logps(model.to(torch.bfloat16), pairs)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, rtol=0.02, atol=0.5)


@pytest.mark.parametrize("margin", [3, 8, 12, 14])
def test_in_bf16_the_head_keeps_the_gradient_of_tokens_that_are_nearly_certain(margin: float) -> None:
    """At a margin of 14 the targets' probability is up to 0.9998, which bf16 rounds to 1."""
    torch.manual_seed(0)
    head, targets = torch.randn(64, 32).bfloat16(), torch.arange(40)
    directions = head[targets].float()
    hidden = (margin * directions / directions.square().sum(1, keepdim=True)).bfloat16()

    exact = hidden.double().requires_grad_()
    (exact @ head.double().T).log_softmax(-1)[targets, targets].sum().backward()
    ours = hidden.clone().requires_grad_()
    packed._TokenLogps.apply(ours, head, targets).sum().backward()
    assert exact.grad is not None
    assert ours.grad is not None
    error = (ours.grad.double() - exact.grad).norm(dim=1) / exact.grad.norm(dim=1)
    assert error.max() < 0.05


def test_the_head_takes_logits_whose_exponential_overflows() -> None:
    torch.manual_seed(0)
    hidden, head, targets = 100 * torch.randn(20, 32), torch.randn(64, 32), torch.arange(20)
    exact = hidden.double().requires_grad_()
    expected = (exact @ head.double().T).log_softmax(-1)[targets, targets]
    ours = hidden.clone().requires_grad_()
    logps = packed._TokenLogps.apply(ours, head, targets)
    torch.testing.assert_close(logps.double(), expected, atol=1e-3, rtol=1e-6)
    weights = torch.linspace(-1, 1.3, 20)
    (weights * logps).sum().backward()
    (weights * expected).sum().backward()
    assert exact.grad is not None
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad.double(), exact.grad, atol=1e-3, rtol=0)


def test_a_trainable_head_is_refused() -> None:
    model = tiny_lm("llama")
    model.get_output_embeddings().requires_grad_(True)
    with pytest.raises(UserError, match="frozen, plain LM head, and LlamaForCausalLM has another"):
        packed_logps(model, mixed_pairs())


def test_a_head_with_an_adapter_is_refused() -> None:
    policy = get_peft_model(tiny_lm("llama"), LoraConfig(target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"))
    with pytest.raises(UserError, match="frozen, plain LM head, and LlamaForCausalLM has another"):
        packed_logps(policy, mixed_pairs())


def test_a_head_with_a_bias_is_refused() -> None:
    with pytest.raises(UserError, match="frozen, plain LM head, and PhiForCausalLM has another"):
        packed_logps(tiny_lm("phi"), mixed_pairs())


def test_a_head_that_no_process_has_whole_is_refused() -> None:
    """As DeepSpeed's ZeRO stage 3 leaves it, which is not installed: its weight is elsewhere."""
    model = tiny_lm("llama")
    model.get_output_embeddings().weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)
    with pytest.raises(UserError, match=r"^train\.accelerate: DeepSpeed's ZeRO stage 3 .*; set its stage to 2, or"):
        packed_logps(model, mixed_pairs())


@pytest.mark.parametrize("key", packed.LOGIT_SCALES)
def test_scaled_logits_are_refused(key: str) -> None:
    model = tiny_lm("llama")
    setattr(model.config, key, 0.5)
    with pytest.raises(UserError, match=f"LlamaForCausalLM has {key}$"):
        packed_logps(model, mixed_pairs())


@pytest.mark.parametrize(
    ("architecture", "overrides", "reason"),
    [
        ("gemma2", {"final_logit_softcapping": None}, "not compute the softcap of Gemma2Attention"),
        (
            "gpt_oss",
            {"num_local_experts": 2, "num_experts_per_tok": 1},
            "does not compute the s_aux of GptOssAttention",
        ),
        ("doge", {}, "does not compute the attention_mask of DogeAttention"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "attention throughout.* Lfm2ForCausalLM is not"),
        ("mamba", {}, "attention throughout.* MambaForCausalLM is not"),
        ("bloom", {}, "attention throughout.* BloomForCausalLM is not"),  # ALiBi, outside AttentionInterface
        ("stablelm", {}, "attention throughout.* StableLmForCausalLM is not"),
    ],
)
def test_models_the_layout_cannot_express_are_refused(
    architecture: str, overrides: dict[str, Any], reason: str
) -> None:
    """Each of these would otherwise give other log-probabilities than its own forward, and no error."""
    with pytest.raises(UserError, match=reason):
        packed_logps(tiny_lm(architecture, **overrides), mixed_pairs())


@pytest.mark.parametrize(("head", "memory", "fits"), [(128, 0, True), (256, 101_376, False), (256, 166_912, True)])
def test_large_heads_need_a_gpu_with_enough_shared_memory(
    monkeypatch: pytest.MonkeyPatch, head: int, memory: int, fits: bool
) -> None:
    """No GPU here: an A100's properties and an RTX 4090's, as torch names them."""
    found = SimpleNamespace(shared_memory_per_block_optin=memory)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    assert packed.flex_fits(tiny_lm("llama", head_dim=head)) == fits


QWEN2_MOE = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32}


@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        ("mistral", {}),
        # Its window is in the masks of every second layer, and its attention is told of none.
        ("qwen2_moe", QWEN2_MOE | {"use_sliding_window": True, "max_window_layers": 2}),
    ],
)
def test_a_pair_as_long_as_the_sliding_window_is_right_and_a_longer_one_refused(
    architecture: str, overrides: dict[str, Any]
) -> None:
    model = tiny_lm(architecture, sliding_window=8, **overrides)
    fitting = random_pairs([(3, 5, 2), (4, 1, 4)])
    torch.testing.assert_close(packed_logps(model, fitting), separate_logps(model, fitting), atol=1e-4, rtol=0)
    for lengths in ((3, 6, 2), (4, 1, 5)):
        with pytest.raises(UserError, match=r"a pair has 9 tokens, more .* window of 8; lower data\.max_length, or"):
            packed_logps(model, [*fitting, *random_pairs([lengths])])


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_reaches_the_attention(dropout: float) -> None:
    module: Any = torch.nn.Module()
    query, key, value = (torch.randn(1, heads, sum(LENGTHS[1]), 8) for heads in (4, 2, 2))
    outputs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        options: dict[str, Any] = {"dropout": dropout, "pair_lengths": LENGTHS[1:2]}
        outputs.append(packed.packed_attention(module, query, key, value, None, **options)[0])
    assert torch.equal(*outputs) == (dropout == 0)


def test_flex_attention_equals_the_attention_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA path with its mask, and through torch.compile but for the kernels, under activation checkpointing."""
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)  # prefscan sets it where there is no GPU
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)  # it refuses gradients on a CPU
    compiled = torch.compile(flex_attention.flex_attention, dynamic=True, backend="aot_eager")
    kernels = []

    def attend_compiled(*states: torch.Tensor, **options: Any) -> Any:
        kernels.append(options["kernel_options"])
        return compiled(*states, **options)

    monkeypatch.setattr(packed, "flex_attention", lambda: attend_compiled)
    module: Any = torch.nn.Module()
    torch.manual_seed(0)
    for lengths in (LENGTHS, LENGTHS[::-2]):
        tokens = sum(map(sum, lengths))
        query, upstream = torch.randn(1, 4, tokens, 8, requires_grad=True), torch.randn(1, tokens, 4, 8)
        key, value = (torch.randn(1, 2, tokens, 8, requires_grad=True) for _ in range(2))
        found = []
        for mask in (None, packed.block_mask(lengths, torch.device("cpu"))):

            def attend(*states: torch.Tensor, mask: Any = mask, lengths: Any = lengths) -> torch.Tensor:
                options = {"pair_lengths": lengths, "pair_mask": mask}
                return packed.packed_attention(module, *states, None, 0.3, **options)[0]

            out: Any = checkpoint(attend, query, key, value, use_reentrant=False)
            found.append((out, *torch.autograd.grad(out, (query, key, value), upstream)))
        cpu, flex = found
        assert cpu[0].shape == (1, tokens, 4, 8)
        torch.testing.assert_close(flex, cpu, rtol=1e-4, atol=1e-5)
    assert kernels == [{"BACKEND": "TRITON"}] * 4  # a forward pass and its recomputation, of both rows
