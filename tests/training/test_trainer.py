"""Training against stock TRL, between layouts, between processes; and what the stage writes."""

import csv
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import fmean
from tempfile import mkdtemp
from threading import Thread
from typing import Any

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from bitsandbytes.nn import Linear4bit
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from scipy import stats
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaMLP
from trl import DPOConfig, DPOTrainer

from prefscan.common import paths
from prefscan.common.config import Accelerate, Cell, Lora, Runtime, Train
from prefscan.common.errors import UserError
from prefscan.logprobs import packed
from prefscan.logprobs.layouts import load_layout
from prefscan.logprobs.reference import COLUMNS, reference_rows, with_reference
from prefscan.models.loading import clean_adapter_config, load_model, load_tokenizer
from prefscan.models.memory import activation_bytes
from prefscan.stages import train as train_stage
from prefscan.training import trainer as trainer_module
from prefscan.training.kto import mismatched, with_mismatched
from prefscan.training.lora import FusedLora, beside_text, lora_config, refuse_targets
from prefscan.training.losses import LOSSES, PairLogps
from prefscan.training.trainer import (
    CellSettings,
    PairTrainer,
    Sides,
    accuracy,
    curve_csv,
    train_cell,
    training_arguments,
)
from tiny import plain_logps, sharegpt_rows
from train_data import QUIET, changed, settings_of, write_inputs

SRC = Path(__file__).parents[2] / "src"
TRAINING = 16  # of the 24 pairs; the others are held out
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def train(params: Any) -> Train:
    lora = Lora(r=4, lora_alpha=8, lora_dropout=0.05, target_modules=TARGETS)
    return params.train.model_copy(
        update={
            "layout": "packed",
            "lora": lora,
            "disable_dropout": True,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 2,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "optim": "adamw_torch",
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "dtype": "fp32",
            "bnb_4bit_quant_type": "none",
        }
    )


@pytest.fixture(scope="module")
def heldout(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The held-out pairs, every third the wrong way round, so that no accuracy is 1."""
    swapped = {"chosen_ids": "rejected_ids", "rejected_ids": "chosen_ids"}
    return [
        pair | {key: pair[other] for key, other in swapped.items()} if i % 3 == 0 else pair
        for i, pair in enumerate(pairs[TRAINING:])
    ]


Fit = Callable[..., tuple[PairTrainer, dict[str, Any], dict[str, float]]]


@pytest.fixture(scope="module")
def fit_anywhere(
    tiny_model: Path,
    params: Any,
    train: Train,
    pairs: list[dict[str, Any]],
    heldout: list[dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Fit:
    """Train a cell on the tiny model; keywords override the sections `train` and `runtime`, whose logs go nowhere."""

    def run(
        loss: str, steps: int | str = 5, beta: float = 0.1, seed: int = 0, count: int = TRAINING, **changes: Any
    ) -> Any:
        section, runtime = changed(train, QUIET, **changes)
        model = load_model(tiny_model, section.dtype).requires_grad_(False)
        tokenizer = load_tokenizer(tiny_model)
        rows = reference_rows(
            model,
            load_layout(section.layout),
            pairs[:TRAINING] + heldout,
            section.per_device_train_batch_size,
            tokenizer.pad_token_id,
        )
        reference = list(rows)
        model.set_attn_implementation("sdpa")
        return train_cell(
            settings_of(Cell(loss=loss, beta=beta, steps=steps), params.losses, section, runtime, seed),
            Sides(with_reference(pairs[:count], reference), with_reference(heldout, reference)),
            model,
            tokenizer,
            tmp_path_factory.mktemp("checkpoints"),
        )

    return run


@pytest.fixture
def fit(in_tmp: Path, fit_anywhere: Fit) -> Fit:
    """The same in an empty working directory, for logs."""
    return fit_anywhere


def adapter(trainer: DPOTrainer) -> dict[str, torch.Tensor]:
    """What the adapter adds to each weight matrix: B·A, scaled."""
    layers = {name: module for name, module in trainer.model.named_modules() if isinstance(module, LoraLayer)}
    return {name: layer.get_delta_weight("default").detach() for name, layer in layers.items()}


def difference(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of a matrix."""
    assert ours.keys() == expected.keys()
    return max(((ours[name] - matrix).norm() / matrix.norm()).item() for name, matrix in expected.items())


def history(trainer: DPOTrainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if "loss" in entry]


# Against stock TRL.


def stock_trainer(
    tiny_model: Path, loss: str, beta: float, steps: int, seed: int, batch: int, accumulation: int
) -> Any:
    """trl.DPOTrainer as its users run it: text in, a reference pass every step."""
    rows = [
        {
            "prompt": [{"role": "user", "content": row["conversations"][0]["value"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]["value"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]["value"]}],
        }
        for row in sharegpt_rows()
    ]
    held = [
        row | {"chosen": row["rejected"], "rejected": row["chosen"]} if i % 3 == 0 else row
        for i, row in enumerate(rows[TRAINING:])
    ]
    arguments = DPOConfig(
        output_dir="stock",
        loss_type=[loss],
        beta=beta,
        max_steps=steps,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        optim="adamw_torch",
        bf16=False,
        gradient_checkpointing=False,
        seed=seed,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
    )
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_model),
        args=arguments,
        train_dataset=Dataset.from_list(rows[:TRAINING]),
        eval_dataset=Dataset.from_list(held),
        processing_class=AutoTokenizer.from_pretrained(tiny_model),
        peft_config=LoraConfig(r=4, lora_alpha=8, lora_dropout=0.05, target_modules=TARGETS, task_type="CAUSAL_LM"),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("loss", "beta", "seed", "batch", "accumulation"),
    [
        ("sigmoid", 0.1, 0, 4, 1),
        ("ipo", 0.3, 0, 4, 1),
        ("sigmoid", 0.5, 7, 2, 2),
        ("ipo", 0.1, 1, 3, 1),
        ("hinge", 0.2, 2, 4, 1),
        ("apo_zero", 0.3, 0, 3, 2),
        ("nca_pair", 0.1, 5, 4, 1),
    ],
)
def test_training_equals_stock_trl(
    fit: Fit, tiny_model: Path, loss: str, beta: float, seed: int, batch: int, accumulation: int
) -> None:
    """kto_pair is none of TRL 1's losses; its formula is tested in test_losses.py."""
    stock = stock_trainer(tiny_model, loss, beta, 10, seed, batch, accumulation)
    stock_accuracy = stock.evaluate()["eval_rewards/accuracies"]
    for layout in ("packed", "padded"):
        ours, metrics, _ = fit(
            loss,
            10,
            beta,
            seed,
            layout=layout,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
        )
        # The same loss at every step: the same pairs in the same order.
        # ipo's begins above 20, where fp32's neighbours are 2e-6 apart.
        assert history(ours, "loss") == pytest.approx(history(stock, "loss"), rel=1e-6, abs=1e-5)
        assert history(ours, "grad_norm") == pytest.approx(history(stock, "grad_norm"), rel=1e-4)
        assert history(ours, "learning_rate") == history(stock, "learning_rate")
        assert history(ours, "rewards/margins") == pytest.approx(history(stock, "rewards/margins"), abs=1e-5)
        assert difference(adapter(ours), adapter(stock)) < 1e-4
        assert metrics["heldout"]["accuracy"] == pytest.approx(stock_accuracy)


# KTO's KL.


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_the_kl_of_kto_is_that_of_the_next_pairs_responses(fit: Fit, layout: str) -> None:
    trainer, _, _ = fit("kto", 3, layout=layout)
    rows = list(trainer.train_dataset)
    following = [*rows[1:], *rows[:1]]
    expected = []
    with torch.no_grad():
        for row, other in zip(rows[:5], following, strict=False):
            pair = other | {"prompt_ids": row["prompt_ids"]}
            policy = torch.stack(plain_logps(trainer.model, pair))
            with trainer.model.disable_adapter():
                expected.append((policy - torch.stack(plain_logps(trainer.model, pair))).mean())
    logps = trainer.logps(trainer.model, trainer.collate(rows[:5]))
    assert logps.kl_logratio is not None
    assert not logps.kl_logratio.requires_grad
    torch.testing.assert_close(logps.kl_logratio, torch.stack(expected), rtol=0, atol=1e-4)
    assert logps.kl_logratio.abs().max() > 1e-2


@pytest.mark.parametrize(("prompts", "others"), [("abc", "120"), ("aabb", "2200"), ("abba", "1331"), ("aab", "220")])
def test_mismatched_responses_are_of_another_prompt(prompts: str, others: str) -> None:
    """Of the next pair that has one: prepare puts the pairs of a prompt side by side."""
    pairs = [
        {"prompt_ids": [ord(prompt)], "chosen_ids": [i], "rejected_ids": [i, i]} for i, prompt in enumerate(prompts)
    ]
    found = with_mismatched(pairs)
    assert [pair["chosen_ids"] for pair in found] == [[i] for i in range(len(pairs))]
    assert [pair["other_chosen_ids"] for pair in found] == [[int(other)] for other in others]
    assert [pair["other_rejected_ids"] for pair in found] == [[int(other)] * 2 for other in others]


def test_kto_of_a_single_prompt_is_refused(fit: Fit) -> None:
    with pytest.raises(UserError, match="kto estimates its KL from the responses of another prompt, and the 1 pairs"):
        fit("kto", 1, count=1)


def beyond(window: int) -> Callable[..., None]:
    """The packed layout's `refuse_long`, for a model of this sliding window."""
    refuse_long = packed.refuse_long

    def refuse(*arguments: Any, **named: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(packed, "sliding_window", lambda model: window)
            refuse_long(*arguments, **named)

    return refuse


def test_kto_whose_mismatched_responses_exceed_the_window_is_refused_before_the_first_update(
    fit: Fit, pairs: list[dict[str, Any]], heldout: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pairs themselves may fit, so the reference stage and the other losses have nothing to refuse."""
    rows = [mismatched(pair) for side in (pairs[:TRAINING], heldout) for pair in with_mismatched(side)]
    longest = max(len(p["prompt_ids"]) + max(len(p["chosen_ids"]), len(p["rejected_ids"])) for p in rows)
    with monkeypatch.context() as patch:
        patch.setattr(packed, "refuse_long", beyond(longest - 1))
        patch.setattr(PairTrainer, "train", lambda *_, **__: pytest.fail("it was to be refused before"))
        message = rf"^kto: a prompt with another pair's response has {longest} tokens, .* window of {longest - 1}; "
        with pytest.raises(UserError, match=message):
            fit("kto", 1)
    monkeypatch.setattr(packed, "refuse_long", beyond(longest))
    fit("kto", 1)


@pytest.mark.parametrize("steps", [1, 6])
def test_a_training_that_diverges_ends_with_a_sentence(fit: Fit, steps: int) -> None:
    """In the held-out pairs after the last update, or in the next; transformers would log 0 for it, and go on."""
    with pytest.raises(UserError) as error:
        fit("sigmoid", steps, learning_rate=1e30, warmup_steps=0)
    assert str(error.value) == (
        f"sigmoid-0.1-{steps}: a loss is not finite, after 1 updates; lower train.learning_rate 1e+30, or set "
        "train.dtype to bf16 or fp32"
    )


@pytest.mark.parametrize("target", ["w_proj", "lm_head"])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_lora_target_that_the_model_lacks_or_that_is_its_head_is_refused(
    fit: Fit, train: Train, layout: str, target: str
) -> None:
    """PEFT trains the others without a word, and an adapter of the head has no effect on TRL's loss."""
    lora = train.lora.model_copy(update={"target_modules": ["q_proj", target]})
    found = rf"train\.lora\.target_modules: the model has no {target} to tune; it has down_proj, .*, v_proj$"
    with pytest.raises(UserError, match=found):
        fit("sigmoid", 1, lora=lora, layout=layout)


@pytest.mark.parametrize("target", ["embed_tokens", "model.embed_tokens"])
def test_embeddings_that_share_the_heads_weight_are_no_lora_target(tiny_model: Path, target: str) -> None:
    model = load_model(tiny_model, "fp32")
    refuse_targets(model, ["q_proj", target])
    model.config.tie_word_embeddings = True
    model.tie_weights()
    with pytest.raises(UserError, match=f"the model has no {target} to tune; it has down_proj,"):
        refuse_targets(model, ["q_proj", target])


@pytest.mark.parametrize("attention", ["", "self_attn."])
def test_a_vision_tower_gets_no_adapter(train: Train, tmp_path: Path, attention: str) -> None:
    """No pair passes through it: DDP would wait for its gradient."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    text = {"vocab_size": 64, "num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 8}
    vision = {"num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
    config = AutoConfig.for_model("gemma3", text_config=sizes | text, vision_config=sizes | vision)
    model = AutoModelForCausalLM.from_config(config)
    targets = [f"{attention}q_proj", f"{attention}k_proj", f"{attention}v_proj", *TARGETS[3:]]
    train = train.model_copy(update={"lora": train.lora.model_copy(update={"target_modules": targets})})
    left_out = beside_text(model, targets)
    assert [name.split(".")[1] for name in left_out] == ["vision_tower"] * 3
    policy = get_peft_model(model, lora_config(train, left_out))
    trained = [name for name, weight in policy.named_parameters() if weight.requires_grad]
    assert len(trained) == 2 * 7 * 2  # two matrices of an adapter, seven adapters of a layer
    assert all(".language_model." in name for name in trained)
    policy.save_pretrained(tmp_path)
    clean_adapter_config(tmp_path)
    written = (tmp_path / "adapter_config.json").read_text()
    assert json.loads(written)["exclude_modules"] == sorted(left_out)


# Between layouts.


@dataclass(frozen=True)
class Trained:
    trainer: PairTrainer
    heldout: dict[str, Any]
    adapter: dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=LOSSES)
def layouts(request: pytest.FixtureRequest, fit_anywhere: Fit) -> tuple[str, Trained, Trained]:
    """A loss, and 10 updates with it by layout `packed` and by `padded`; a test may change the trainers' models."""
    fits = [fit_anywhere(request.param, 10, layout=layout) for layout in ("packed", "padded")]
    packed, padded = (Trained(trainer, metrics["heldout"], adapter(trainer)) for trainer, metrics, _ in fits)
    return request.param, packed, padded


def test_layouts_train_the_same_adapter(layouts: tuple[str, Trained, Trained]) -> None:
    loss, packed, padded = layouts
    losses = history(padded.trainer, "loss")
    # ipo_sum falls from 25 towards 0, where only the absolute error says something.
    assert history(packed.trainer, "loss") == pytest.approx(losses, rel=1e-5, abs=1e-5 * losses[0])
    # discopop's passes its local minimum, where the gradient all but vanishes and rounding is what is left of it.
    norms = history(padded.trainer, "grad_norm")
    assert history(packed.trainer, "grad_norm") == pytest.approx(norms, rel=1e-4, abs=1e-5 * max(norms))
    assert difference(packed.adapter, padded.adapter) < 1e-4
    assert packed.heldout == pytest.approx(padded.heldout, rel=1e-4, abs=1e-4)
    assert packed.heldout["accuracy"] == padded.heldout["accuracy"]
    first, *_, last = history(packed.trainer, "rewards/margins")
    assert first == pytest.approx(0, abs=1e-5)
    if loss == "discopop":  # from a margin of 0 its slope leads to its local minimum at a negative one
        assert last < -0.05
    else:
        assert last > 0.05
        assert 0.5 < packed.heldout["accuracy"] < 1


def test_layouts_give_the_same_loss_and_gradients(layouts: tuple[str, Trained, Trained]) -> None:
    results = []
    for trainer in (trained.trainer for trained in layouts[1:]):
        torch.manual_seed(0)
        weights = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
        for parameter in weights.values():
            parameter.data.normal_(std=0.1)
        trainer.model.zero_grad()
        value = trainer.compute_loss(trainer.model, trainer.collate(list(trainer.train_dataset)[:6]))
        value.backward()
        results.append((value.item(), {name: parameter.grad for name, parameter in weights.items()}))
    (ours, our_gradients), (theirs, their_gradients) = results
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert difference(our_gradients, their_gradients) < 1e-4


@pytest.mark.parametrize(("layout", "own"), [("packed", 14), ("padded", 0)])
def test_layout_packed_alone_trains_with_its_own_lora_layer(fit: Fit, layout: str, own: int) -> None:
    trainer, _, _ = fit("sigmoid", steps=1, layout=layout)
    layers = [module for module in trainer.model.modules() if isinstance(module, LoraLayer)]
    assert len(layers) == 14  # seven matrices of two decoder layers
    assert sum(isinstance(layer, FusedLora) for layer in layers) == own


def test_weights_that_are_packed_or_parted_keep_pefts_layer(train: Train) -> None:
    accelerate = Accelerate(distributed_type="FSDP", num_processes=2, num_machines=1)
    assert lora_config(train)._custom_modules
    for change in ({"bnb_4bit_quant_type": "nf4"}, {"accelerate": accelerate}):
        assert not lora_config(train.model_copy(update=change))._custom_modules


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_gradient_checkpointing_of_all_or_some_micro_batches_changes_no_bit(
    fit: Fit, train: Train, tiny_model: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forwards = []
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda *arguments: (forwards.append(1), forward(*arguments))[1])
    half = train.lora.model_copy(update={"lora_dropout": 0.5})
    sizes: list[int] = []
    module = load_layout(layout)
    positions = module.positions
    monkeypatch.setattr(module, "positions", lambda batch: (sizes.append(positions(batch)), sizes[-1])[1])
    # For `auto`: so much that the shortest micro-batch keeps its activations.
    config = load_model(tiny_model, "fp32").config
    monkeypatch.setattr(
        trainer_module, "free_bytes", lambda: 2 * activation_bytes(config, min(sizes, default=1), "fp32")
    )
    results, counts = [], []
    for checkpointing in (False, True, "auto"):
        forwards.clear()
        trainer, metrics, _ = fit(
            "sigmoid", 4, layout=layout, gradient_checkpointing=checkpointing, lora=half, disable_dropout=False
        )
        weights = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
        results.append((weights, metrics["heldout"], history(trainer, "loss"), history(trainer, "grad_norm")))
        counts.append(len(forwards))
    (plain, *logged), *others = results
    for checkpointed, *logged_again in others:
        assert all(torch.equal(checkpointed[name], weight) for name, weight in plain.items())
        assert logged == logged_again
    assert sizes[4:] == sizes[:4]
    longer = sum(size > min(sizes) for size in sizes[4:])
    assert 0 < longer < 4
    # Each update of a recomputed micro-batch ran each of the two layers once more.
    assert [count - counts[0] for count in counts[1:]] == [4 * 2, longer * 2]


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_bf16_trains_nearly_as_fp32(fit: Fit, layout: str) -> None:
    exact, _, _ = fit("sigmoid", 8, layout=layout)
    rounded, metrics, _ = fit("sigmoid", 8, layout=layout, dtype="bf16")
    assert rounded.model.get_base_model().lm_head.weight.dtype == torch.bfloat16
    assert history(rounded, "loss")[-1] == pytest.approx(history(exact, "loss")[-1], abs=0.03)
    assert metrics["heldout"]["margin"] > 0


# Seeds and dropout.


def test_a_run_repeats_bit_by_bit_and_another_seed_differs(fit: Fit) -> None:
    first, again, other = (adapter(fit("sigmoid", seed=seed)[0]) for seed in (3, 3, 4))
    assert all(torch.equal(again[name], matrix) for name, matrix in first.items())
    assert difference(other, first) > 0.1


def test_lora_dropout_acts_only_where_it_is_not_disabled(fit: Fit, train: Train) -> None:
    half = train.lora.model_copy(update={"lora_dropout": 0.5})
    none = train.lora.model_copy(update={"lora_dropout": 0.0})
    without = adapter(fit("sigmoid", lora=none)[0])
    disabled = adapter(fit("sigmoid", lora=half, disable_dropout=True)[0])
    active = adapter(fit("sigmoid", lora=half, disable_dropout=False)[0])
    assert all(torch.equal(disabled[name], matrix) for name, matrix in without.items())
    assert difference(active, without) > 0.05


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_dropout_within_a_layer_acts_only_where_it_is_not_disabled(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    """TRL disables the modules of class Dropout; attention has a rate of its own, for a function."""
    without = adapter(fit("sigmoid", layout=layout)[0])

    load = load_model

    def with_dropout(folder: Path, dtype: str) -> Any:
        model = load(folder, dtype)
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.5
        return model

    monkeypatch.setattr(sys.modules[__name__], "load_model", with_dropout)
    disabled = adapter(fit("sigmoid", layout=layout, disable_dropout=True)[0])
    active = adapter(fit("sigmoid", layout=layout, disable_dropout=False)[0])
    assert all(torch.equal(disabled[name], matrix) for name, matrix in without.items())
    assert difference(active, without) > 0.05


# Held-out metrics.


@pytest.mark.parametrize(
    ("loss", "changes"),
    [
        ("sigmoid", {}),
        ("ipo", {"layout": "padded"}),
        ("kto_pair", {"per_device_train_batch_size": 3}),
        (
            "sigmoid",
            {"disable_dropout": False, "lora": Lora(r=4, lora_alpha=8, lora_dropout=0.5, target_modules=TARGETS)},
        ),
    ],
    ids=["sigmoid", "ipo-padded", "kto_pair-uneven", "dropout"],
)
def test_held_out_metrics_equal_an_independent_computation(
    fit: Fit, tiny_model: Path, params: Any, heldout: list[dict[str, Any]], loss: str, changes: dict[str, Any]
) -> None:
    trainer, metrics, _ = fit(loss, 6, beta=0.2, **changes)
    policy, base = trainer.model.eval(), load_model(tiny_model, "fp32")
    with torch.no_grad():
        policy_logps = torch.tensor([plain_logps(policy, pair) for pair in heldout], dtype=torch.float64)
        base_logps = torch.tensor([plain_logps(base, pair) for pair in heldout], dtype=torch.float64)
    tokens = torch.tensor([[len(pair["chosen_ids"]), len(pair["rejected_ids"])] for pair in heldout])
    columns = [*policy_logps.T, *base_logps.T, *tokens.T]
    size = changes.get("per_device_train_batch_size", 4)
    losses, base_losses = (
        [
            value
            for start in range(0, len(heldout), size)
            for value in LOSSES[loss](
                PairLogps(*(column[start : start + size] for column in found)), 0.2, LOSSES[loss].read_options({})
            ).tolist()
        ]
        for found in (columns, [*base_logps.T, *base_logps.T, *tokens.T])
    )
    changes_of_loss = [after - before for after, before in zip(losses, base_losses, strict=True)]
    change_interval = stats.t.interval(
        0.95, len(heldout) - 1, loc=fmean(changes_of_loss), scale=stats.sem(changes_of_loss)
    )
    chosen, rejected = (policy_logps - base_logps).T.tolist()
    margins = [c - r for c, r in zip(chosen, rejected, strict=True)]
    t_interval = stats.t.interval(0.95, len(margins) - 1, loc=fmean(margins), scale=stats.sem(margins))
    won = sum(margin > 0 for margin in margins)
    wilson = stats.binomtest(won, len(margins)).proportion_ci(method="wilson")
    expected = {
        "pairs": len(heldout),
        "loss": fmean(losses),
        "loss_change": fmean(losses) - fmean(base_losses),
        "loss_change_low": change_interval[0],
        "loss_change_high": change_interval[1],
        "accuracy": won / len(heldout),
        "accuracy_low": wilson.low,
        "accuracy_high": wilson.high,
        "base_accuracy": 0.5,
        "margin": fmean(margins),
        "margin_low": t_interval[0],
        "margin_high": t_interval[1],
        "reward_margin": 0.2 * fmean(margins),
        "chosen_shift": fmean(chosen),
        "rejected_shift": fmean(rejected),
    }
    assert metrics["heldout"] == pytest.approx(expected, abs=2e-4, rel=1e-4)
    assert [row["id"] for row in trainer.held_out_rows] == [pair["id"] for pair in heldout]
    rows = [[row["policy_chosen_logps"], row["policy_rejected_logps"]] for row in trainer.held_out_rows]
    torch.testing.assert_close(torch.tensor(rows, dtype=torch.float64), policy_logps, atol=2e-4, rtol=1e-5)
    assert min(abs(margin) for margin in margins) > 2e-4  # no margin whose sign rounding could turn


def test_a_tie_counts_one_half(fit: Fit) -> None:
    logps = PairLogps(
        *(torch.tensor(column) for column in ([-3.0, -4.0, -5.0], [-3.0] * 3, [-4.0] * 3, [-4.0] * 3, [], []))
    )
    assert accuracy(logps).tolist() == [0.5, 0, 0]
    swapped = PairLogps(*(torch.tensor(c) for c in ([3.0, 4.0, 5.0], [3.0] * 3, [4.0] * 3, [4.0] * 3, [], [])))
    assert accuracy(swapped).tolist() == [0.5, 1, 1]
    # The warm-up's first learning rate is 0, so after one update policy and reference still tie.
    _, metrics, _ = fit("sigmoid", 1)
    held = metrics["heldout"]
    assert (held["accuracy"], held["base_accuracy"]) == (0.5, 0.5)
    assert (held["margin"], held["chosen_shift"], held["loss"]) == pytest.approx((0, 0, math.log(2)), abs=1e-5)


# A 4-bit base on a CPU, whose layers an evaluation forward would repack for good.


def four_bit_training(
    model: torch.nn.Module, tokenizer: Any, train: Train, pairs: list[Any], heldout: list[Any], evaluate: bool
) -> tuple[PairTrainer, dict[str, torch.Tensor]]:
    """A trained cell and its gradients then; `evaluate` puts a reference pass before and a held-out pass after it."""
    layout = load_layout(train.layout)
    if evaluate:
        list(reference_rows(model, layout, pairs, train.per_device_train_batch_size, tokenizer.pad_token_id))
    reference = {"ref_chosen_logps": -60.0, "ref_rejected_logps": -50.0, "chosen_tokens": 20, "rejected_tokens": 12}
    rows, held = ([pair | reference for pair in some] for some in (pairs, heldout))
    cell = Cell(loss="sigmoid", beta=0.1, steps=3)
    with pytest.MonkeyPatch.context() as patch:
        if not evaluate:
            patch.setattr(PairTrainer, "held_out", lambda *_: {})
        settings = CellSettings(cell, train, LOSSES[cell.loss].read_options({}), QUIET, seed=0)
        trainer, _, _ = train_cell(settings, Sides(rows, held), model, tokenizer, Path(mkdtemp(dir=".")))
    trainer.model.train()
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, trainer.collate(rows[:4])).backward()
    return trainer, {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.fixture
def four_bit(train: Train) -> Train:
    lora = Lora(r=4, lora_alpha=8, lora_dropout=0.5, target_modules=TARGETS)
    return train.model_copy(update={"bnb_4bit_quant_type": "nf4", "disable_dropout": False, "lora": lora})


COMPILER = """
import os, sys
device, exists = sys.argv[1], os.path.exists
os.path.exists = lambda path: path == device or (exists(path) and not str(path).startswith("/dev/"))
import prefscan
if device != "none":
    sys.exit("TORCHDYNAMO_DISABLE" in os.environ)
import peft
sys.exit("torch._inductor.compile_fx" in sys.modules)
"""


@pytest.mark.parametrize("device", ["none", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd"])
def test_only_without_a_gpu_is_torchs_compiler_left_out(device: str) -> None:
    """bitsandbytes, which PEFT imports, has functions compiled: two seconds of each train and merge stage."""
    environment = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    environment["PYTHONPATH"] = str(SRC)
    subprocess.run([sys.executable, "-c", COMPILER, device], env=environment, check=True, timeout=120)


PING = """
import prefscan
from huggingface_hub.utils import _telemetry
_telemetry.send_telemetry("trl/other")  # as TRL's trainers do
_telemetry._TELEMETRY_QUEUE.join()
"""


@pytest.mark.parametrize(
    ("setting", "pings"), [({}, []), ({"HF_HUB_DISABLE_TELEMETRY": "0"}, ["/api/telemetry/trl/other"])]
)
def test_the_hub_is_told_of_no_training(setting: dict[str, str], pings: list[str]) -> None:
    """Unless the user's own environment says otherwise."""
    seen: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            seen.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as hub:
        Thread(target=hub.serve_forever, daemon=True).start()
        unset = {"HF_HUB_DISABLE_TELEMETRY", "HF_HUB_OFFLINE", "DISABLE_TELEMETRY", "DO_NOT_TRACK"}
        environment = {name: value for name, value in os.environ.items() if name not in unset}
        environment |= {
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
            "PYTHONPATH": str(Path(__file__).parents[2] / "src"),
            **setting,
        }
        subprocess.run([sys.executable, "-c", PING], env=environment, check=True, timeout=60)
        hub.shutdown()
    assert seen == pings


@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_evaluation_leaves_a_4_bit_bases_gradients_alone(
    in_tmp: Path, wide_model: Path, four_bit: Train, pairs: list[Any], heldout: list[Any], quantization: str
) -> None:
    tokenizer = load_tokenizer(wide_model)
    section = four_bit.model_copy(update={"disable_dropout": True})
    runs: list[Any] = []
    training = (
        set()
    )  # whether a layer was in training mode when it computed: bitsandbytes repacks on some machines only
    for evaluate in (True, False):
        model = load_model(wide_model, "fp32", quantization).requires_grad_(False)
        assert model.is_loaded_in_4bit
        for layer in (module for module in model.modules() if isinstance(module, Linear4bit)):
            layer.register_forward_pre_hook(lambda module, _: training.add(module.training))
        runs.append(four_bit_training(model, tokenizer, section, pairs[:TRAINING], heldout, evaluate))
    (evaluated, gradients), (alone, expected) = runs
    assert history(evaluated, "loss") == history(alone, "loss")
    assert all(torch.equal(gradients[name], gradient) for name, gradient in expected.items())
    assert all(gradient.norm() > 0 for gradient in expected.values())
    assert training == {True}


@pytest.mark.skipif(torch.cuda.is_available() or not has_avx512bf16(), reason="bitsandbytes repacks nothing here")
def test_an_evaluation_forward_of_a_4_bit_base_would_spoil_the_gradients(
    in_tmp: Path, wide_model: Path, four_bit: Train, pairs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the test above would see: with it gone, that one shows nothing on this machine."""
    tokenizer = load_tokenizer(wide_model)
    section = four_bit.model_copy(update={"disable_dropout": True})
    gradients = []
    for mode in (torch.nn.Module.train, torch.nn.Module.eval):
        model = load_model(wide_model, "fp32", "nf4").requires_grad_(False)
        mode(model)
        gradients.append(four_bit_training(model, tokenizer, section, pairs[:4], pairs[:4], evaluate=True)[1])
    flat = [torch.cat([gradient.flatten() for gradient in each.values()]).float() for each in gradients]
    assert torch.cosine_similarity(*flat, dim=0) < 0.9


def test_dropout_is_off_in_a_4_bit_bases_evaluation(
    in_tmp: Path, wide_model: Path, four_bit: Train, pairs: list[Any]
) -> None:
    model = load_model(wide_model, "fp32", "nf4").requires_grad_(False)
    trainer, _ = four_bit_training(model, load_tokenizer(wide_model), four_bit, pairs[:8], [], evaluate=False)
    rows = [pair | dict.fromkeys(COLUMNS, 1.0) for pair in pairs[:8]]
    assert trainer.held_out(rows, 4) == trainer.held_out(rows, 4)
    batch = trainer.collate(rows)
    trainer.model.train()
    assert not torch.equal(trainer.logps(trainer.model, batch).chosen, trainer.logps(trainer.model, batch).chosen)


# Steps, curves, logs.


@pytest.mark.parametrize(
    ("steps", "pairs", "batch_size", "accumulation", "updates"),
    [
        (200, 16, 4, 1, 200),
        ("epoch", 16, 4, 1, 4),
        ("epoch", 17, 4, 1, 5),
        ("epoch", 17, 4, 2, 3),
        ("epoch", 2, 4, 1, 1),
    ],
)
def test_update_count(
    train: Train, steps: int | str, pairs: int, batch_size: int, accumulation: int, updates: int
) -> None:
    sizes = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    section = train.model_copy(update=sizes)
    assert section.updates(steps, pairs) == updates


@pytest.mark.parametrize(("batch_size", "accumulation", "updates"), [(4, 1, 4), (5, 1, 4), (3, 2, 3)])
def test_an_epoch_sees_every_pair_once(fit: Fit, batch_size: int, accumulation: int, updates: int) -> None:
    trainer, metrics, _ = fit(
        "sigmoid", "epoch", per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation
    )
    assert metrics["updates"] == len(history(trainer, "loss")) == updates
    assert history(trainer, "epoch")[-1] == 1


def test_fewer_pairs_than_a_batch_train(fit: Fit) -> None:
    trainer, metrics, _ = fit("kto_pair", 4, count=3)
    assert metrics["updates"] == len(history(trainer, "loss")) == 4
    assert history(trainer, "rewards/margins")[-1] > 0


def test_the_speed_counts_the_pairs_that_were_trained(fit: Fit, pairs: list[Any]) -> None:
    """Ten passes over 5 pairs, in updates of 4 and of 1."""
    _, metrics, cost = fit("sigmoid", 20, count=5, per_device_train_batch_size=4, gradient_accumulation_steps=1)
    assert metrics["updates"] == 20
    once = sum(2 * len(p["prompt_ids"]) + len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in pairs[:5])
    # The product of two rounded numbers; by updates of 4 alone it would be 1.6 times as much.
    assert cost["tokens_per_second"] * cost["seconds"] == pytest.approx(10 * once, rel=0.25)


def test_the_curve_has_a_row_a_step(fit: Fit) -> None:
    trainer, metrics, _ = fit("sigmoid", 6)
    rows = list(csv.DictReader(curve_csv(trainer.state.log_history).splitlines()))
    assert list(rows[0]) == ["step", "loss", "reward_margin", "reward_accuracy", "grad_norm", "learning_rate"]
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [float(row["loss"]) for row in rows] == pytest.approx(history(trainer, "loss"), rel=1e-8)
    assert [float(row["learning_rate"]) for row in rows] == pytest.approx(history(trainer, "learning_rate"), rel=1e-8)
    assert float(rows[0]["reward_accuracy"]) == 0.5
    assert metrics["loss"] == pytest.approx(fmean(history(trainer, "loss")))
    assert metrics["last_loss"] == history(trainer, "loss")[-1]


def test_dvclive_logs_every_step_and_none_logs_nothing(fit: Fit) -> None:
    trainer, _, _ = fit("sigmoid", 3, report_to="none")
    assert not (paths.RUNS / "dvclive").exists()
    for _ in range(2):  # a repeated run starts its log anew
        trainer, _, _ = fit("sigmoid", 3, report_to="dvclive")
    folder = paths.RUNS / "dvclive" / "sigmoid-0.1-3"
    with (folder / "plots/metrics/loss.tsv").open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert [float(row["loss"]) for row in rows] == pytest.approx(history(trainer, "loss"))


@pytest.mark.parametrize(
    ("report_to", "integrations"),
    [("none", []), ("dvclive", []), ("wandb", ["wandb"]), ("tensorboard", ["tensorboard"])],
)
def test_the_log_goes_where_report_to_says(
    train: Train, report_to: str, integrations: list[str], in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {})
    runtime = QUIET.model_copy(update={"report_to": report_to})
    cell = Cell(loss="ipo", beta=0.3, steps=4)
    settings = CellSettings(cell, train, LOSSES[cell.loss].read_options({}), runtime, seed=5)
    arguments = training_arguments(settings, 4, recompute=False, checkpoints=Path("checkpoints"))
    assert (arguments.report_to, arguments.run_name) == (integrations, "ipo-0.3-4")
    if report_to != "dvclive":
        assert trainer_module.live_logging(runtime, cell) == []
    places = {
        "tensorboard": {"TENSORBOARD_LOGGING_DIR": "runs/tensorboard/ipo-0.3-4"},
        "wandb": {"WANDB_DIR": str(in_tmp / "runs")},
    }
    assert os.environ == places.get(report_to, {})
    assert Path("runs").exists() == (report_to == "wandb")


# The stage.


def lay_out(
    folder: Path,
    tiny_model: Path,
    pairs: list[Any],
    heldout: list[Any],
    params: Any,
    train: Train,
    runtime: Runtime = QUIET,
) -> None:
    """What dvc has put in place before `prefscan train` runs."""
    grid = params.grid.model_copy(update={"loss": ["ipo"], "beta": [0.3], "steps": [3, 4]})
    recipe = {"loss": "ipo", "beta": 0.3, "steps": 3}
    written = params.model_copy(update={"grid": grid, "train": train, "runtime": runtime, "seed": 11, **recipe})
    write_inputs(folder, tiny_model, pairs, heldout, written)


def run_stage(folder: Path, key: str, hash_seed: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "prefscan", "train", key],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": str(hash_seed)},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def two_runs(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Path,
    pairs: list[dict[str, Any]],
    heldout: list[dict[str, Any]],
    params: Any,
    train: Train,
) -> list[tuple[Path, subprocess.CompletedProcess[str]]]:
    """The same cell trained by two processes, which order their sets differently, in two folders."""
    folders = [tmp_path_factory.mktemp(name) for name in ("here", "elsewhere")]
    for folder in folders:
        runtime = QUIET.model_copy(update={"report_to": "dvclive"})
        lay_out(folder, tiny_model, pairs[:TRAINING], heldout, params, train, runtime)
    return [(folder, run_stage(folder, "ipo-0.3-4", seed)) for seed, folder in enumerate(folders, start=1)]


def test_the_stage_writes_an_adapter_without_traces_of_the_machine(two_runs: list[Any]) -> None:
    folder, result = two_runs[0]
    assert result.returncode == 0, result.stderr
    written = folder / paths.ADAPTERS / "ipo-0.3-4"
    assert sorted(path.name for path in written.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = (written / "adapter_config.json").read_text()
    assert json.loads(config)["base_model_name_or_path"] == "models/base"
    assert str(folder) not in config
    assert str(Path.home()) not in config
    assert not (folder / paths.CHECKPOINTS / "ipo-0.3-4").exists()


def test_the_stage_reports_what_it_measured(two_runs: list[Any]) -> None:
    folder, result = two_runs[0]
    metrics = json.loads((folder / paths.TRAIN_METRICS / "ipo-0.3-4.json").read_text())
    assert set(metrics) == {"loss", "last_loss", "updates", "heldout"}
    estimates = {f"{name}{end}" for name in ("accuracy", "margin", "loss_change") for end in ("", "_low", "_high")}
    assert set(metrics["heldout"]) == estimates | {
        *("pairs", "loss", "base_accuracy", "reward_margin", "chosen_shift", "rejected_shift")
    }
    cost = json.loads((folder / paths.TRAIN_COST / "ipo-0.3-4.json").read_text())
    assert set(cost) == {"seconds", "tokens_per_second", "peak_memory_gib", "processes"}
    assert all(value > 0 for value in cost.values())
    assert (metrics["updates"], metrics["heldout"]["pairs"]) == (4, 8)
    curve = (folder / paths.CURVES / "ipo-0.3-4.csv").read_text().splitlines()
    assert len(curve) == 1 + 4
    assert "train ipo-0.3-4: cell 2 of 2" in result.stdout
    held = metrics["heldout"]
    assert f"held-out accuracy {held['accuracy']:.2f}, margin {held['margin']:.2f} nats" in result.stdout


def test_two_processes_train_the_same_bytes(two_runs: list[Any]) -> None:
    (here, first), (elsewhere, second) = two_runs
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    for file in (
        paths.ADAPTERS / "ipo-0.3-4" / "adapter_model.safetensors",
        paths.ADAPTERS / "ipo-0.3-4" / "adapter_config.json",
        paths.CURVES / "ipo-0.3-4.csv",
        paths.TRAIN_METRICS / "ipo-0.3-4.json",
        paths.HELDOUT_POLICY / "ipo-0.3-4.jsonl",
    ):
        assert (here / file).read_bytes() == (elsewhere / file).read_bytes(), file


@pytest.mark.parametrize(
    ("key", "lost", "message"),
    [
        ("ipo-0.3-4", 2, r"^data/reference lacks 2 pairs, the first [0-9a-f]{16}; run `dvc repro` again$"),
        ("ipo-0.3-5", 0, r"^cell 'ipo-0\.3-5' is not in the grid; its cells are ipo-0\.3-3, ipo-0\.3-4$"),
    ],
)
def test_a_missing_reference_row_and_an_unknown_cell_are_refused(
    in_tmp: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_model: Path,
    pairs: list[dict[str, Any]],
    heldout: list[dict[str, Any]],
    params: Any,
    train: Train,
    key: str,
    lost: int,
    message: str,
) -> None:
    lay_out(in_tmp, tiny_model, pairs[:4], heldout, params, train)
    rows = paths.TRAIN_REFERENCE.read_text().splitlines(keepends=True)
    paths.TRAIN_REFERENCE.write_text("".join(rows[lost:]))
    with pytest.raises(UserError, match=message):
        train_stage.main(key)
    assert not paths.ADAPTERS.exists()
