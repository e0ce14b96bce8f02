"""What only a GPU shows: FlexAttention's kernels, 4-bit bases in CUDA, bf16, the paged optimizer. `make test-gpu`.

The differences are printed beside the bounds that they must keep; pytest's `-rP` shows them.
"""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from bitsandbytes.optim import AdamW as PagedAdamW
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend

from configuration import group
from mtbench_data import local_judge
from prefscan.common import paths
from prefscan.common.config import Cell, LocalJudge, Merge, Train
from prefscan.common.io import read_jsonl
from prefscan.generation.sampling import SeededSampling, generate, prompt_ids
from prefscan.judging.judge import Prompt, load_judge
from prefscan.logprobs import packed
from prefscan.logprobs.layouts import load_layout
from prefscan.logprobs.reference import reference_rows, with_reference, with_rows
from prefscan.merging.merge import merge_cell
from prefscan.models.loading import load_model, load_tokenizer
from prefscan.models.memory import activation_bytes
from prefscan.training import checkpoints
from prefscan.training import trainer as trainer_module
from prefscan.training.trainer import PairTrainer, Sides, train_cell
from tiny import heads_of_64, random_adapter, random_pairs
from train_data import QUIET, Killed, changed, run_train, settings_of, with_recipe, write_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and `make test-gpu`, which shows it"),
]
SRC = Path(__file__).parents[1] / "src"
CPU = torch.device("cpu")
LAYOUTS = ["packed", "padded"]
# Pairs shorter than a block of FlexAttention's 128 tokens, longer ones, and boundaries at its edges.
LENGTHS = [(140, 60, 200), (3, 5, 2), (300, 1, 129), (64, 64, 128), (17, 230, 41), (128, 128, 1)]
TRAINING = 16
RECOMPUTED = QUIET.model_copy(update={"gradient_checkpointing": True})


@pytest.fixture(scope="module")
def study() -> Train:
    """The study's training, in updates that move a tiny model."""
    train = Train.model_validate(group("train", "study"))
    changes = {"learning_rate": 1e-3, "warmup_steps": 2, "gradient_accumulation_steps": 2}
    return train.model_copy(update=changes)


def relative(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The norm of the difference of all tensors, as a share of the norm of the expected ones."""
    assert ours.keys() == expected.keys()
    both = [torch.cat([t.detach().double().cpu().flatten() for t in each.values()]) for each in (ours, expected)]
    return ((both[0] - both[1]).norm() / both[1].norm()).item()


def test_torchs_compiler_stays_on_where_there_is_a_gpu() -> None:
    """`import prefscan` turns it off where it finds no GPU's device file; FlexAttention would compute every score."""
    environment = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    environment["PYTHONPATH"] = str(SRC)
    code = "import prefscan, torch; assert torch.compile(torch.sin) is not torch.sin"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=300)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_not_left_to_cudnn(masked: bool) -> None:
    """Its gradient is NaN where a masked row's scores are all low, in rows 64 tokens longer than a multiple of 128."""
    query, key, value = torch.randn(3, 2, 4, 192, 64, device="cuda", dtype=torch.bfloat16).mul(0.1).unbind()
    query[..., 0], key[..., 0] = 1, -1000  # scores of about -125, and e^-125 is 0 in fp32
    mask = torch.ones(192, 192, dtype=torch.bool, device="cuda").tril() if masked else None
    leaves = [each.requires_grad_() for each in (query, key, value)]
    assert SDPBackend(torch._fused_sdp_choice(*leaves, mask)) != SDPBackend.CUDNN_ATTENTION
    torch.nn.functional.scaled_dot_product_attention(*leaves, mask).sum().backward()
    assert all(each.grad is not None and each.grad.isfinite().all() for each in leaves)


# The packed layout's attention.


def logps_and_gradients(
    folder: Path, pairs: list[Any], dtype: str, place: torch.device | None, recompute: bool
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probabilities, shape `[2, pairs]`, and the adapter's gradients of a sum of them with unequal weights."""
    model = random_adapter(load_model(folder, "fp32", place=CPU), scale=0.3)
    model = model.to(device=place or "cuda", dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    logps = torch.stack(packed.pair_logps(model, packed.collate(pairs, 0)))
    weights = torch.linspace(-1, 1, logps.numel(), device=logps.device).view_as(logps)
    (logps * weights).sum().backward()
    return logps.detach().cpu(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("recompute", [False, True])
def test_flex_attention_gives_the_cpus_log_probabilities_and_gradients(wide_model: Path, recompute: bool) -> None:
    pairs = random_pairs(LENGTHS, vocabulary=250)
    expected, slopes = logps_and_gradients(wide_model, pairs, "fp32", CPU, recompute=False)
    found, gradients = logps_and_gradients(wide_model, pairs, "fp32", None, recompute)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)
    assert relative(gradients, slopes) < 1e-4


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_rows_shorter_than_a_block_of_flex_attention(wide_model: Path, dtype: str) -> None:
    """As single short pairs are, of which merge measures the margin: first in a process, and after long ones."""
    pairs = random_pairs([(30, 20, 25), (5, 1, 1), (60, 40, 27), (60, 40, 28), (300, 20, 30), (9, 9, 9)], 250)
    model, on_cpu = (load_model(wide_model, dtype, place=place).requires_grad_(False) for place in (None, CPU))
    torch._dynamo.reset()
    for pair in pairs:
        with torch.no_grad():
            found, expected = (
                torch.stack(packed.pair_logps(each, packed.collate([pair], 0))).cpu() for each in (model, on_cpu)
            )
        torch.testing.assert_close(found, expected, rtol=1e-5 if dtype == "fp32" else 1e-2, atol=1e-3)


def test_flex_attention_in_bf16_is_as_far_from_fp32_as_the_cpu_in_bf16(wide_model: Path) -> None:
    pairs = random_pairs(LENGTHS, vocabulary=250)
    expected, slopes = logps_and_gradients(wide_model, pairs, "fp32", CPU, recompute=False)
    cpu, cpu_gradients = logps_and_gradients(wide_model, pairs, "bf16", CPU, recompute=False)
    found, gradients = logps_and_gradients(wide_model, pairs, "bf16", None, recompute=False)
    assert (found - expected).abs().mean() < 2 * (cpu - expected).abs().mean()
    assert relative(gradients, slopes) < 2 * relative(cpu_gradients, slopes)


def test_micro_batches_of_any_lengths_share_their_kernels(wide_model: Path) -> None:
    """A graph a micro-batch would take seconds each, and past torch's limit every masked score would be computed."""
    torch._dynamo.reset()
    counters.clear()
    model = random_adapter(load_model(wide_model, "bf16")).train()
    graphs = []
    for start in range(12):
        pairs = random_pairs([(7 * start + p, 11 * start + c, r + start) for p, c, r in LENGTHS[: 1 + start % 5]], 250)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                sum(packed.pair_logps(model, packed.collate(pairs, 0))).sum()
        graphs.append(counters["stats"]["unique_graphs"])
    print("graphs", graphs)
    assert graphs[-1] == graphs[5]
    assert graphs[-1] <= 6


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_estimate_of_activations_is_about_what_a_gpu_keeps_or_up_to_twice_as_much(layout: str, dtype: str) -> None:
    pairs = random_pairs([(160, 140, 140)] * 3)
    measured = []
    for layers in (1, 3):
        model = heads_of_64(layers, heads=16, key_heads=4, dtype=dtype).to("cuda")
        batch = load_layout(layout).collate(pairs, 0)
        for _ in range(2):  # compiled at first
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated()
            logps = load_layout(layout).pair_logps(model, batch)
            kept = torch.cuda.memory_allocated() - before
            sum(logps).sum().backward()
            model.zero_grad()
            del logps
        measured.append(kept)
    two_layers = measured[1] - measured[0]
    model.config.num_hidden_layers = 2
    estimate = activation_bytes(model.config, load_layout(layout).most_positions(pairs, 3), dtype)
    print("kept", layout, dtype, estimate / two_layers)
    assert 0.9 * two_layers <= estimate <= 2 * two_layers


# Training.


Fit = Callable[..., tuple[PairTrainer, dict[str, Any]]]


@pytest.fixture
def fit(in_tmp: Path, wide_model: Path, params: Any, study: Train, pairs: list[Any]) -> Fit:
    """Train a cell in an empty working directory; keywords override the study's sections `train` and `runtime`."""

    def run(loss: str = "sigmoid", steps: int = 10, **changes: Any) -> tuple[PairTrainer, dict[str, Any]]:
        train, runtime = changed(study, RECOMPUTED, **changes)
        loading = wide_model, train.dtype, train.bnb_4bit_quant_type, train.bnb_4bit_use_double_quant
        model = load_model(*loading).requires_grad_(False)
        tokenizer = load_tokenizer(wide_model)
        rows = reference_rows(
            model, load_layout(train.layout), pairs, train.per_device_train_batch_size, tokenizer.pad_token_id
        )
        reference = list(rows)
        sides = Sides(*(with_reference(side, reference) for side in (pairs[:TRAINING], pairs[TRAINING:])))
        model.set_attn_implementation("sdpa")
        cell = Cell(loss=loss, beta=0.1, steps=steps)
        settings = settings_of(cell, params.losses, train, runtime)
        trainer, metrics, _ = train_cell(settings, sides, model, tokenizer, Path(mkdtemp(dir=".")))
        return trainer, metrics

    return run


def adapter(trainer: PairTrainer) -> dict[str, torch.Tensor]:
    return {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}


FULL_PRECISION = {"dtype": "fp32", "bnb_4bit_quant_type": "none", "optim": "adamw_torch"}


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "kto", "simpo", "aot"])
def test_both_layouts_end_with_one_adapter_in_fp32(fit: Fit, loss: str) -> None:
    """Not kto_pair: its gradient jumps at a KL of 0, where training begins, so rounding decides the first update."""
    (fast, metrics), (stock, expected) = (fit(loss, layout=layout, **FULL_PRECISION) for layout in LAYOUTS)
    difference = relative(adapter(fast), adapter(stock))
    print("layouts", loss, difference)
    assert difference < 1e-4
    assert metrics["heldout"] == pytest.approx(expected["heldout"], rel=1e-3, abs=1e-4)
    assert metrics["heldout"]["margin"] > 0.1


@pytest.mark.parametrize(("quantization", "double"), [("fp4", False), ("nf4", True)])
def test_both_layouts_train_a_4_bit_base_alike(fit: Fit, quantization: str, double: bool) -> None:
    options = {"bnb_4bit_quant_type": quantization, "bnb_4bit_use_double_quant": double}
    (fast, metrics), (stock, expected) = (fit(layout=layout, **options) for layout in LAYOUTS)
    layers = [module for module in fast.model.modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 14  # seven of each of the two layers; the head is not quantised
    for layer in layers:
        state = layer.weight.quant_state
        assert (state.quant_type, state.nested, layer.compute_dtype) == (quantization, double, torch.bfloat16)
        assert layer.weight.device.type == "cuda"
    assert {p.dtype for p in adapter(fast).values()} == {torch.bfloat16}
    optimizer = fast.optimizer.optimizer
    assert isinstance(optimizer, PagedAdamW)
    assert (optimizer.is_paged, optimizer.args.optim_bits) == (True, 32)
    difference = relative(adapter(fast), adapter(stock))
    print("4 bit", quantization, difference, metrics["heldout"], expected["heldout"])
    assert difference < 0.02
    assert metrics["heldout"]["margin"] == pytest.approx(expected["heldout"]["margin"], rel=0.05)
    assert metrics["heldout"]["margin"] > 0.1


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_base_in_half_precision_trains_about_as_in_fp32(fit: Fit, layout: str, dtype: str) -> None:
    (half, metrics), (_, expected) = (
        fit(layout=layout, **FULL_PRECISION | {"dtype": each}) for each in (dtype, "fp32")
    )
    assert {p.dtype for p in adapter(half).values()} == {torch.float32}
    print("half", layout, dtype, metrics["heldout"]["margin"], expected["heldout"]["margin"])
    assert metrics["heldout"]["margin"] == pytest.approx(expected["heldout"]["margin"], rel=0.02)


@pytest.mark.parametrize("some", [False, True])
def test_checkpointing_of_activations_changes_no_result(
    fit: Fit, pairs: list[Any], wide_model: Path, monkeypatch: pytest.MonkeyPatch, some: bool
) -> None:
    """Of all micro-batches, and of those longer than the mean."""
    without, _ = fit(layout="packed", gradient_checkpointing=False, **FULL_PRECISION)
    mean = 4 * sum(len(pair[key]) for pair in pairs for key in ("prompt_ids", "chosen_ids", "rejected_ids"))
    fits = 2 * activation_bytes(load_model(wide_model, "fp32").config, mean // len(pairs), "fp32")
    monkeypatch.setattr(trainer_module, "free_bytes", lambda: fits)
    choices = []
    recompute = PairTrainer.recompute
    monkeypatch.setattr(PairTrainer, "recompute", lambda self, it: (choices.append(it), recompute(self, it))[1])
    with_it, _ = fit(layout="packed", gradient_checkpointing="auto" if some else True, **FULL_PRECISION)
    assert set(choices) == ({True, False} if some else {True})
    difference = relative(adapter(with_it), adapter(without))
    print("checkpointing", difference)
    assert difference < 1e-5


def test_an_evaluation_forward_leaves_a_4_bit_bases_gradients_alone(wide_model: Path, pairs: list[Any]) -> None:
    """As on a CPU, where bitsandbytes' layer would repack its weights: tests/training/test_trainer.py."""
    gradients = []
    for evaluate in (True, False):
        model = random_adapter(load_model(wide_model, "fp32", "nf4"), scale=0.3)
        batch = packed.collate(pairs[:4], 0)
        if evaluate:
            model.eval()
            with torch.no_grad():
                packed.pair_logps(model, batch)
        model.train()
        chosen, rejected = packed.pair_logps(model, batch)
        (chosen - rejected).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert relative(*gradients) < 1e-6


# The stages.


CELL = "sigmoid-0.1-9"


@pytest.fixture
def lay_out(in_tmp: Path, wide_model: Path, pairs: list[Any], params: Any, study: Train) -> Callable[..., None]:
    def write(**changes: Any) -> None:
        train, runtime = changed(study, RECOMPUTED, **changes)
        recipe = with_recipe(params, train, seed=5, runtime=runtime, loss="sigmoid", beta=0.1, steps=9)
        write_inputs(in_tmp, wide_model, pairs[:TRAINING], pairs[TRAINING:], recipe)

    return write


def test_a_gpu_trains_the_adapter_that_a_cpu_trains(lay_out: Callable[..., None]) -> None:
    lay_out(layout="packed", **FULL_PRECISION)
    ends, margins = [], []
    for devices in ({}, {"CUDA_VISIBLE_DEVICES": ""}):
        environment = os.environ | {"PYTHONPATH": str(SRC)} | devices
        subprocess.run([sys.executable, "-m", "prefscan", "train", CELL], env=environment, check=True, timeout=300)
        ends.append(load_file(paths.ADAPTERS / CELL / "adapter_model.safetensors"))
        margins.append(json.loads((paths.TRAIN_METRICS / f"{CELL}.json").read_text())["heldout"]["margin"])
    difference = relative(*ends)
    print("cpu", difference, margins)
    assert difference < 1e-3
    assert margins[0] == pytest.approx(margins[1], rel=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("recipe", ["study", "fp32"])
def test_a_killed_cell_goes_on_with_its_optimizer(
    lay_out: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    layout: str,
    recipe: str,
) -> None:
    monkeypatch.setattr(checkpoints, "FIRST", 0)
    monkeypatch.setattr(checkpoints, "WAIT", 0)
    lay_out(layout=layout, **(FULL_PRECISION if recipe == "fp32" else {}))
    ends = []
    for interrupted in (False, False, True):
        if interrupted:
            with pytest.raises(Killed):
                run_train(CELL, kill_at=5)
        run_train(CELL)
        ends.append(load_file(paths.ADAPTERS / CELL / "adapter_model.safetensors"))
        with (paths.CURVES / f"{CELL}.csv").open() as file:
            assert [int(row["step"]) for row in csv.DictReader(file)] == list(range(1, 10))
    assert "going on from" in capsys.readouterr().out
    again, resumed = relative(ends[1], ends[0]), relative(ends[2], ends[0])
    print("resumed", layout, recipe, again, resumed)
    assert resumed <= 1e-6 + 2 * again


def test_a_merge_on_the_gpu_is_the_one_on_the_cpu(
    lay_out: Callable[..., None], pairs: list[Any], study: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay_out()
    run_train(CELL)
    merge = Merge(dtype="fp16", format="model", check_pairs=8)
    heldout = with_reference(*map(read_jsonl, paths.SPLITS["heldout"]))
    heldout = with_rows(heldout, read_jsonl(paths.HELDOUT_POLICY / f"{CELL}.jsonl"), paths.HELDOUT_POLICY)
    options = paths.BASE, paths.ADAPTERS / CELL, heldout, merge, study
    merged, metrics = merge_cell(*options)
    assert {weight.device.type for weight in merged.parameters()} == {"cuda"}
    with monkeypatch.context() as patch:
        patch.setattr("prefscan.merging.merge.ROOM", 2**60)  # more than any GPU has
        on_cpu, expected = merge_cell(*options)
    assert {weight.device.type for weight in on_cpu.parameters()} == {"cpu"}
    print("merge", metrics, expected)
    ours, theirs = merged.state_dict(), on_cpu.state_dict()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name].cpu(), weight, rtol=2**-9, atol=1e-6)  # a step of fp16
    assert metrics["margin_merged"] == pytest.approx(expected["margin_merged"], abs=0.02)
    assert metrics["margin_adapter"] == pytest.approx(expected["margin_adapter"], abs=0.02)
    assert metrics["weights_changed"] == pytest.approx(expected["weights_changed"], rel=1e-2)
    assert 0.5 < metrics["margin_kept"] < 1.5


# Answers and judging.


QUESTIONS = ["Who?", "What is seven plus four, and why would one ask?", "Name a river, then another river."]
AGAIN = ["And then?", "Say that in one word.", "Which of both is longer? Give its length in miles, too."]


@pytest.mark.parametrize("temperatures", [[0.0, 0.0, 0.0], [0.7, 1.5, 0.0]], ids=["greedy", "sampled"])
def test_a_gpu_says_what_the_cpu_says(wide_model: Path, temperatures: list[float]) -> None:
    """Both turns, the second from the first one's cache; the draws are made on the CPU on both."""
    tokenizer = load_tokenizer(wide_model)
    said = []
    for place in (CPU, None):
        model = load_model(wide_model, "fp32", place=place)
        talks: list[list[dict[str, str]]] = [[] for _ in QUESTIONS]
        context, replies = None, []
        for turn, questions in enumerate((QUESTIONS, AGAIN)):
            for talk, question in zip(talks, questions, strict=True):
                talk.append({"role": "user", "content": question})
            prompts = [prompt_ids(tokenizer, talk) for talk in talks]
            sampling = SeededSampling([f"{turn}/{i}" for i in range(3)], temperatures)
            turn_replies, context = generate(model, tokenizer, prompts, sampling, 40, context)
            for talk, reply in zip(talks, turn_replies, strict=True):
                talk.append({"role": "assistant", "content": reply.text})
            replies += turn_replies
        said.append(replies)
    cpu, gpu = said
    assert [reply.tokens for reply in gpu] == [reply.tokens for reply in cpu]
    for ours, theirs in zip(gpu, cpu, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-3)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_local_judges_verdicts_are_the_cpus(
    wide_model: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    prompts = [Prompt("You judge.", f"[Question]\n{question}\n[Answer]\nFour β.") for question in QUESTIONS]
    section = LocalJudge.model_validate(local_judge(wide_model, batch_size))
    verdicts = []
    for available in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda found=available: found)
            judge: Any = load_judge(section)
        assert judge.model.device.type == ("cuda" if available else "cpu")
        verdicts.append([verdict for _, verdict in sorted(judge.verdicts(prompts), key=lambda item: item[0])])
    assert [v.score for v in verdicts[0]] == pytest.approx([v.score for v in verdicts[1]], abs=1e-3)
