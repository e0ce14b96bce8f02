import json
import shutil
import weakref
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import scipy.stats
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefscan.common import paths
from prefscan.common.config import Merge, Train, load
from prefscan.common.errors import UserError
from prefscan.common.io import sha256
from prefscan.logprobs.layouts import load_layout
from prefscan.logprobs.reference import reference_rows, with_reference, with_rows
from prefscan.merging import merge as merge_module
from prefscan.merging.merge import merge_cell
from prefscan.models.loading import DTYPES, load_cell, load_model, set_evaluation
from prefscan.stages import merge as merge_stage
from tiny import plain_logps, random_adapter, write_rows
from train_data import QUIET, changed

ROOT = Path(__file__).parents[2]
KEY = "sigmoid-0.1-8"
ADAPTER = paths.ADAPTERS / KEY
POLICY = paths.HELDOUT_POLICY / f"{KEY}.jsonl"
MERGED = paths.MERGED / KEY
IDS = torch.tensor([[5, 60, 7, 120, 33, 90]])
TUNED = ("self_attn", "mlp")  # the adapter's weights; embeddings, head and norms stay


def section(dtype: str = "fp32", format: str = "model") -> Merge:
    return Merge(dtype=dtype, format=format, check_pairs=8)


def training(**update: Any) -> Train:
    section = load(ROOT / "params.yaml").train
    return changed(section, QUIET, **{"layout": "packed", "bnb_4bit_quant_type": "none"} | update)[0]


def referenced(pairs: list[Any], train: Train) -> list[dict[str, Any]]:
    """The pairs as the reference stage leaves them, computed one by one as the merge does."""
    model = load_model(paths.BASE, train.dtype, train.bnb_4bit_quant_type).requires_grad_(False)
    return with_reference(pairs, list(reference_rows(model, load_layout(train.layout), pairs, 1, pad_token_id=2)))


def trained(pairs: list[Any], train: Train) -> list[dict[str, Any]]:
    """A row a pair as the train stage leaves it, of the adapter that is there on the base in fp32."""
    model = PeftModel.from_pretrained(load_model(paths.BASE, "fp32"), ADAPTER)
    rows = reference_rows(model, load_layout(train.layout), pairs, 1, pad_token_id=2)
    names = {"id": "id", "ref_chosen_logps": "policy_chosen_logps", "ref_rejected_logps": "policy_rejected_logps"}
    return [{name: row[key] for key, name in names.items()} for row in rows]


def merged_cell(pairs: list[Any], merge: Merge, train: Train) -> tuple[Any, dict[str, Any]]:
    rows = with_rows(referenced(pairs, train), trained(pairs, train), POLICY)
    return merge_cell(paths.BASE, ADAPTER, rows, merge, train)


@pytest.fixture
def policy(in_tmp: Path, tiny_model: Path, pairs: list[dict[str, Any]], params: Any) -> Any:
    """The working directory as dvc has it before a merge, and base + adapter as trained."""
    shutil.copytree(tiny_model, paths.BASE)
    write_rows(paths.HELDOUT_PAIRS, pairs[:12])
    write_rows(paths.HELDOUT_REFERENCE, referenced(pairs[:12], training()))
    set_merge(params, section())
    policy = save_adapter(scale=0.1)
    write_rows(POLICY, trained(pairs[:12], training()))
    return policy


def save_adapter(scale: float) -> Any:
    shutil.rmtree(ADAPTER, ignore_errors=True)
    policy = random_adapter(load_model(paths.BASE, "fp32"), scale).eval()
    policy.save_pretrained(ADAPTER)
    return policy


def set_merge(params: Any, merge: Merge, answer_dtype: str = "fp32") -> None:
    grid = params.grid.model_copy(update={"loss": ["sigmoid"], "beta": [0.1], "steps": [8]})
    answer = params.answer.model_copy(update={"dtype": answer_dtype})
    recipe = {"loss": "sigmoid", "beta": 0.1, "steps": 8}
    written = params.model_copy(update={"grid": grid, "merge": merge, "answer": answer, **recipe}).model_dump()
    Path("params.yaml").write_text(yaml.safe_dump(written))


def run_main(key: str = KEY) -> dict[str, Any]:
    merge_stage.main(key)
    metrics: dict[str, Any] = json.loads((paths.MERGE_METRICS / f"{key}.json").read_text())
    return metrics


def bytes_of(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in sorted(folder.iterdir())}


@torch.no_grad()
def mean_margin(policy: Any, base: Any, pairs: list[Any]) -> float:
    """Against the base, by plain forwards."""
    margins = []
    for pair in pairs:
        (chosen, rejected), (ref_chosen, ref_rejected) = plain_logps(policy, pair), plain_logps(base, pair)
        margins.append((chosen - ref_chosen - rejected + ref_rejected).item())
    return sum(margins) / len(margins)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_fp32_keeps_the_margin_and_changes_the_tuned_weights_alone(policy: Any, pairs: list[Any], layout: str) -> None:
    merged, metrics = merged_cell(pairs[:8], section(), training(layout=layout))
    expected = mean_margin(policy, load_model(paths.BASE, "fp32"), pairs[:8])
    assert abs(expected) > 0.1
    assert metrics["margin_adapter"] == pytest.approx(expected, abs=1e-4)
    assert metrics["margin_merged"] == pytest.approx(expected, abs=1e-4)
    assert metrics["margin_kept"] == pytest.approx(1, abs=1e-3)
    sizes = {name: weight.numel() for name, weight in merged.named_parameters()}
    tuned = sum(size for name, size in sizes.items() if any(part in name for part in TUNED))
    assert metrics["weights_changed"] == pytest.approx(tuned / sum(sizes.values()), rel=1e-2)
    assert metrics | {"dtype": "fp32", "format": "model", "pairs": 8} == metrics


def test_rounding_away_a_small_adapter_is_detected(policy: Any, pairs: list[Any]) -> None:
    # A base whose weights are fp16 numbers, as published models' are, so that fp16 rounds the adapter alone.
    file = paths.BASE / "model.safetensors"
    save_file({name: w.half().float() for name, w in load_file(file).items()}, file, metadata={"format": "pt"})
    kept, changed = {}, {}
    for scale in (1.0, 1e-4):
        save_adapter(scale)
        for dtype in ("fp32", "fp16"):
            _, metrics = merged_cell(pairs[:8], section(dtype), training())
            assert metrics["margin_adapter"] != 0
            kept[scale, dtype], changed[scale, dtype] = metrics["margin_kept"], metrics["weights_changed"]
    assert kept[1.0, "fp32"] == pytest.approx(1, abs=1e-3)
    assert kept[1.0, "fp16"] == pytest.approx(1, abs=0.02)
    assert kept[1e-4, "fp32"] == pytest.approx(1, abs=0.1)
    assert abs(kept[1e-4, "fp16"]) < 0.5
    assert changed[1e-4, "fp16"] < 0.1 * changed[1e-4, "fp32"]
    assert changed[1e-4, "fp16"] < 0.1 * changed[1.0, "fp16"]


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_zero_adapter_has_no_margin_to_keep_and_changes_no_weight(policy: Any, pairs: list[Any], dtype: str) -> None:
    """The tiny base's weights are no fp16 numbers: rounding the base is not the adapter's doing."""
    save_adapter(scale=0.0)
    _, metrics = merged_cell(pairs[:8], section(dtype), training())
    assert metrics["margin_adapter"] == 0
    assert metrics["margin_kept"] is None
    assert metrics["weights_changed"] == 0


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("targets", [["up_proj"], ["up_proj", "q_proj"], ["up_proj", "lm_head"]])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_weights_are_merged_and_counted_as_with_a_second_base(
    policy: Any, pairs: list[Any], dtype: str, tied: bool, targets: list[str]
) -> None:
    """Tied embeddings and head are one parameter, counted once among all."""
    base = load_model(paths.BASE, "fp32")
    base.config.tie_word_embeddings = tied
    base.tie_weights()
    base.save_pretrained(paths.BASE)
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    get_peft_model(load_model(paths.BASE, "fp32"), config).save_pretrained(ADAPTER)
    merged, metrics = merged_cell(pairs[:2], section(dtype), training(layout="padded"))
    assert merged.config.tie_word_embeddings == tied
    expected: Any = PeftModel.from_pretrained(load_model(paths.BASE, "fp32"), ADAPTER).merge_and_unload()
    after, before = (
        {name: weight.to(DTYPES[dtype]).float() for name, weight in model.named_parameters()}
        for model in (expected, load_model(paths.BASE, "fp32"))
    )
    weights = dict(merged.named_parameters())
    assert weights.keys() == after.keys()
    assert all(torch.equal(weight, after[name]) for name, weight in weights.items())
    changed = sum(int((after[name] != weight).sum()) for name, weight in before.items())
    assert 0 < metrics["weights_changed"] == changed / sum(weight.numel() for weight in before.values())


@pytest.mark.parametrize("fits", [True, False])
def test_one_fp32_model_is_loaded_and_on_a_gpu_only_where_it_fits(
    policy: Any, pairs: list[Any], monkeypatch: pytest.MonkeyPatch, fits: bool
) -> None:
    """A GPU that is none: what would be loaded there goes to the CPU as well."""
    expected = merged_cell(pairs[:2], section(), training())[1]
    loaded = []

    def load_there(*arguments: Any, place: torch.device) -> Any:
        loaded.append(place.type)
        return load_model(*arguments)

    monkeypatch.setattr(merge_module, "load_model", load_there)
    monkeypatch.setattr(merge_module, "device", lambda: torch.device("cuda"))
    size = sum(4 * weight.numel() for weight in load_file(paths.BASE / "model.safetensors").values())
    monkeypatch.setattr(merge_module, "free_bytes", lambda: size + merge_module.ROOM - (not fits))
    assert merged_cell(pairs[:2], section(), training())[1] == expected
    assert loaded == ["cuda" if fits else "cpu"]


@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_the_margin_to_keep_is_that_of_the_4_bit_base_the_adapter_was_trained_on(
    in_tmp: Path, wide_model: Path, pairs: list[Any], quantization: str
) -> None:
    shutil.copytree(wide_model, paths.BASE)
    base = load_model(paths.BASE, "fp32", quantization)
    policy = random_adapter(load_model(paths.BASE, "fp32", quantization), scale=0.1)
    set_evaluation(policy)
    policy.save_pretrained(ADAPTER)
    section_4_bit = training(bnb_4bit_quant_type=quantization, dtype="fp32")
    merged, metrics = merged_cell(pairs[:8], section(), section_4_bit)
    trained = mean_margin(policy, base, pairs[:8])
    assert metrics["margin_adapter"] == pytest.approx(trained, abs=1e-4)
    _, unquantized = merged_cell(pairs[:8], section(), training())
    assert abs(unquantized["margin_adapter"] - trained) > 0.01
    assert metrics["margin_merged"] == unquantized["margin_merged"]  # of the base as published, in both
    assert metrics["margin_kept"] == metrics["margin_merged"] / metrics["margin_adapter"]
    assert metrics["weights_changed"] == unquantized["weights_changed"]
    assert not getattr(merged, "is_loaded_in_4bit", False)


def test_the_4_bit_base_is_freed_before_the_fp32_one_is_loaded(
    in_tmp: Path, wide_model: Path, pairs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(wide_model, paths.BASE)
    save_adapter(scale=0.1)
    alive: list[weakref.ref[Any]] = []
    loads = []

    def load_and_watch(folder: Path, dtype: str, *others: Any, **place: Any) -> Any:
        loads.append((dtype, *others, [ref() is not None for ref in alive]))
        model = load_model(folder, dtype, *others, **place)
        alive.extend(weakref.ref(layer) for layer in (model, model.model.layers[0].mlp.up_proj))
        return model

    monkeypatch.setattr(merge_module, "load_model", load_and_watch)
    merged_cell(pairs[:2], section(), training(bnb_4bit_quant_type="nf4", dtype="bf16"))
    assert loads == [("bf16", "nf4", False, []), ("fp32", [False, False])]


@pytest.mark.parametrize(
    ("dtype", "torch_dtype", "tolerance"), [("fp32", torch.float32, 1e-4), ("fp16", torch.float16, 0.02)]
)
def test_the_merged_folder_loads_in_transformers_as_it_is(
    policy: Any, params: Any, dtype: str, torch_dtype: torch.dtype, tolerance: float
) -> None:
    set_merge(params, section(dtype))
    metrics = run_main()
    assert metrics["dtype"] == dtype
    assert metrics["pairs"] == 8  # of 12 held out
    config = (MERGED / "config.json").read_text()
    assert "prefscan" not in config
    assert str(Path.cwd()) not in config
    model = AutoModelForCausalLM.from_pretrained(MERGED)
    tokenizer = AutoTokenizer.from_pretrained(MERGED)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.dtype == torch_dtype
    with torch.no_grad():
        expected = policy(IDS).logits
        torch.testing.assert_close(model.float()(IDS).logits, expected, atol=tolerance, rtol=0)
        with policy.disable_adapter():
            assert (policy(IDS).logits - expected).abs().max() > 5 * tolerance
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(paths.BASE).chat_template
    assert tokenizer("2 plus 2")["input_ids"] == AutoTokenizer.from_pretrained(paths.BASE)("2 plus 2")["input_ids"]


def test_the_format_adapter_writes_a_manifest_alone(policy: Any, params: Any) -> None:
    set_merge(params, section(format="adapter"))
    metrics = run_main()
    assert metrics["format"] == "adapter"
    assert metrics["margin_kept"] == pytest.approx(1, abs=1e-3)
    assert [path.name for path in MERGED.iterdir()] == ["manifest.json"]
    with torch.no_grad():
        torch.testing.assert_close(load_cell(MERGED, "fp32")(IDS).logits, policy(IDS).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("dtype", "format"), [("fp32", "model"), ("fp32", "adapter"), ("bf16", "model"), ("bf16", "adapter")]
)
def test_the_margin_is_measured_of_the_model_that_answers(
    policy: Any, pairs: list[Any], params: Any, dtype: str, format: str
) -> None:
    """As transformers and PEFT load base and cell in the dtype of the answers."""
    set_merge(params, section(format=format), dtype)
    metrics = run_main()
    if dtype == "fp32" and format == "model":  # it is the merged model, measured as such
        assert not [name for name in metrics if "answer" in name]
        return
    base, cell = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]).requires_grad_(False)
        for folder in (paths.BASE, MERGED if format == "model" else paths.BASE)
    )
    if format == "adapter":
        cell = PeftModel.from_pretrained(cell, ADAPTER).eval()
    layout = load_layout("packed")
    changes = []
    for pair in pairs[:12]:
        with torch.no_grad():
            of_cell, of_base = (torch.stack(layout.pair_logps(m, layout.collate([pair], 0))) for m in (cell, base))
        chosen, rejected = (of_cell - of_base).double()
        changes.append((chosen - rejected).item())
    low, high = scipy.stats.t.interval(0.95, 11, fmean(changes), scipy.stats.sem(changes))
    assert metrics["answer_dtype"] == dtype
    assert metrics["answering_pairs"] == 12  # all; the merge is checked on 8
    found = [metrics[f"margin_answering{end}"] for end in ("", "_low", "_high")]
    assert found == pytest.approx([fmean(changes), low, high], abs=1e-5)
    trained = mean_margin(policy, load_model(paths.BASE, "fp32"), pairs[:12])
    assert (found[0] == pytest.approx(trained, abs=1e-4)) == (dtype == "fp32")  # in bf16, rounding shows


def test_one_model_is_in_memory_at_a_time(policy: Any, monkeypatch: pytest.MonkeyPatch, params: Any) -> None:
    alive: list[weakref.ref[Any]] = []
    loads = []

    def watched(load: Any) -> Any:
        def load_and_watch(folder: Path, dtype: str, *others: Any, **place: Any) -> Any:
            loads.append((str(folder), dtype, sum(ref() is not None for ref in alive)))
            model = load(folder, dtype, *others, **place)
            alive.append(weakref.ref(next(module for module in model.modules() if isinstance(module, torch.nn.Linear))))
            return model

        return load_and_watch

    monkeypatch.setattr(merge_module, "load_model", watched(merge_module.load_model))
    monkeypatch.setattr(merge_module, "load_cell", watched(merge_module.load_cell))
    set_merge(params, section(format="adapter"), "bf16")
    run_main()
    base = str(paths.BASE)
    assert loads == [(base, "fp32", 0), (base, "bf16", 0), (str(MERGED), "bf16", 0)]


@pytest.mark.parametrize(("dtype", "format"), [("fp32", "model"), ("fp16", "model"), ("fp32", "adapter")])
def test_merging_twice_gives_the_same_bytes(policy: Any, params: Any, dtype: str, format: str) -> None:
    set_merge(params, section(dtype, format))
    first_metrics, first = run_main(), bytes_of(MERGED)
    (MERGED / "stale.txt").write_text("of an earlier run")
    assert run_main() == first_metrics
    assert bytes_of(MERGED) == first


def test_a_cell_outside_the_grid_is_refused(policy: Any) -> None:
    with pytest.raises(UserError, match=r"^cell 'ipo-9\.0-1' is not in the grid; its cells are sigmoid-0\.1-8$"):
        run_main("ipo-9.0-1")
    assert not MERGED.exists()


def test_what_training_recorded_is_taken_in_fp32_and_measured_anew_otherwise(policy: Any, pairs: list[Any]) -> None:
    """A cell that lost half of what it was trained to shows; in bf16 the micro-batch had rounded the record."""
    for train, kept in ((training(), 0.5), (training(dtype="bf16"), 1.0)):
        rows = with_rows(referenced(pairs[:8], training()), trained(pairs[:8], training()), POLICY)
        for row in rows:
            for response in ("chosen", "rejected"):
                row[f"policy_{response}_logps"] += row[f"policy_{response}_logps"] - row[f"ref_{response}_logps"]
        _, metrics = merge_cell(paths.BASE, ADAPTER, rows, section(), train)
        assert metrics["margin_kept"] == pytest.approx(kept, abs=1e-3)


def test_a_pair_that_training_has_not_recorded_is_refused(policy: Any) -> None:
    POLICY.write_text("".join(POLICY.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match=rf"^{POLICY} lacks 1 pairs, the first [0-9a-f]{{16}}; run `dvc repro` again$"):
        run_main()
    assert not MERGED.exists()
