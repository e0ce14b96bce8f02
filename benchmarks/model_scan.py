"""Which causal language models of the installed transformers each layout computes; writes the table of docs/models.md.

    PYTHONPATH=src python benchmarks/model_scan.py              # all, some minutes; writes docs/models.md
    PYTHONPATH=src python benchmarks/model_scan.py llama gemma2  # prints these

Each model type is built with random weights from a tiny configuration, and takes the checks of the reference stage: the
layout against plain forward passes, and the save of a merged model.
"""

import argparse
import re
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from textwrap import wrap
from types import FrameType
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from prefscan.common.errors import UserError
from prefscan.logprobs.layouts import load_layout
from prefscan.logprobs.packed import own_attention
from prefscan.logprobs.plain import LAYOUTS, deviation, plain_values, probes, refuse_deviation
from prefscan.models.saving import refuse_unsavable

RIGHT = 1e-4  # nats, over the root of a response's tokens
SECONDS = 60  # a model type
LARGEST = 20_000_000  # weights; a configuration that stays larger has sizes under names of its own
PAGE = Path("docs/models.md")
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "embedding_size": 32,
    "intermediate_size": 64, "ffn_dim": 64, "n_inner": 64, "d_ff": 64, "ffn_hidden_size": 64,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "decoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "rotary_dim": 4,
    "max_position_embeddings": 256, "n_positions": 256, "max_seq_len": 256,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_topk": 2, "n_shared_experts": 1,
    "n_group": 1, "topk_group": 1,
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8,
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "state_size": 8, "lru_width": 32,
    "initializer_range": 0.2, "init_std": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """What a scan found of one model type: per layout `right`, or why it is refused; and of the save."""

    kind: str
    layouts: dict[str, str]
    save: str = ""  # `yes`, or why a merged model could not be saved
    error: str = ""  # why it could not be built

    @property
    def faults(self) -> list[str]:
        """The layouts that are neither right nor refused."""
        return [name for name, found in self.layouts.items() if not found.startswith(("right", "refused"))]


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def configurations(kind: str) -> Iterator[Any]:
    """Tiny ones, until one fits the type: sizes that contradict another in some types are changed in turn."""
    kinds: Any = CONFIG_MAPPING
    default = kinds[kind]()
    as_heads = {"num_key_value_heads": 4}  # of latent attention
    for other in ({}, as_heads, {"head_dim": None}, as_heads | {"head_dim": None}):
        sizes = {name: value for name, value in (SIZES | other).items() if value is not None}
        known = {name: value for name, value in sizes.items() if hasattr(default, name)}
        yield partial(kinds[kind], **known)
    alike = {name: value for name, value in known.items() if type(getattr(default, name)) is type(value)}
    yield partial(kinds[kind], **alike)


def tiny(kind: str) -> Any:
    """A model of that type with random weights; raises whatever its configuration or its code does, of the first."""
    faults: list[Exception] = []
    for configuration in configurations(kind):
        try:
            config = configuration()
            with torch.device("meta"):
                size = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
            if size > LARGEST:
                raise ValueError(f"a tiny configuration still has {size / 1e6:.0f} million weights")
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)
            ids = torch.tensor([[3, 4, 5], [6, 7, 0]])
            model(input_ids=ids[:1], use_cache=False)
            model(input_ids=ids, attention_mask=ids.sign(), use_cache=False)
        except TimeoutError:
            raise
        except Exception as fault:
            faults.append(fault)
        else:
            return model
    raise faults[0]


def random_pairs() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    sizes = {"prompt_ids": (6, 7, 20), "chosen_ids": (8, 6, 30), "rejected_ids": (7, 9, 12)}
    return [
        {"id": f"pair-{i}"}
        | {name: torch.randint(3, 64, (counts[i],), generator=generator).tolist() for name, counts in sizes.items()}
        for i in range(3)
    ]


def scan(kind: str) -> Finding:
    try:
        with limited(SECONDS):
            model = tiny(kind)
            pairs = random_pairs()
            batches = probes(pairs, 2)
            plain = plain_values(model, batches)
            if not all(torch.tensor(list(sides.values())).isfinite().all() for sides in plain.values()):
                raise ValueError("a plain forward pass is not finite")
    except (Exception, SystemExit) as error:
        return Finding(kind, {}, error=f"{type(error).__name__}: {' '.join(str(error).split())[:100]}")
    found = {}
    for name in LAYOUTS:
        try:
            with limited(SECONDS):
                own_attention(model)
                try:
                    share, _ = deviation(model, load_layout(name), batches, plain, 0)
                except Exception:
                    share = float("inf")
                if share <= RIGHT:
                    found[name] = "right"
                    continue
                off = refuse_deviation(model, name, pairs, 2, 0, "fp32")
                found[name] = f"off by {off:.1e}"
        except UserError as error:
            found[name] = f"refused: {error}"
        except Exception as error:
            found[name] = f"fails ({type(error).__name__}: {' '.join(str(error).split())[:100]})"
    own_attention(model)
    try:
        refuse_unsavable(model, NoTokenizer())  # type: ignore[arg-type]
        save = "yes"
    except UserError as error:
        save = f"refused: {error}"
    return Finding(kind, found, save)


class NoTokenizer:
    def save_pretrained(self, folder: str) -> None:
        """Nothing: the model is what is looked at."""


def page(findings: list[Finding]) -> str:
    def cell(text: str) -> str:
        if not text.startswith("refused"):
            return text
        if found := re.search(r"plain LM head, and \w+ has ([^;]*)", text):
            return f"refused: its head has {'more than a matrix' if found[1] == 'another' else found[1]}"
        if found := re.search(r"does not compute the ([\w ]*) of", text):
            return f"refused: {found[1]}"
        if "attention throughout" in text:
            return "refused: its attention is not transformers' interface throughout"
        reason = re.search(r"(is wrong) on|fails on .* \((\w+):|could not be saved \((\w+):", text)
        if reason and reason[1]:
            return "refused: differs"
        return f"refused: {next(filter(None, reason.groups()))}" if reason else text.partition("; ")[0]

    built = [finding for finding in findings if finding.layouts]
    counts = {name: sum(finding.layouts[name] == "right" for finding in built) for name in LAYOUTS}
    summary = (
        f"Of the {len(findings)} causal language models of transformers {transformers.__version__}, {len(built)} can "
        f"be built from a tiny configuration. Layout `packed` computes {counts['packed']} of them and `padded` "
        f"{counts['padded']}, to {RIGHT:g} nats a token's root against plain forward passes. The reference stage "
        "refuses the others before anything is trained, and says what to set. `differs`: from a plain forward pass, so "
        "that the log-probabilities would be wrong."
    )
    unbuilt = ", ".join(finding.kind for finding in findings if not finding.layouts)
    lines = [
        "# Models that each layout computes",
        "",
        *wrap(summary, 120),
        "",
        "`PYTHONPATH=src python benchmarks/model_scan.py` writes this page.",
        "",
        "| model type | packed | padded | can be saved after a merge |",
        "|---|---|---|---|",
        *(f"| {f.kind} | {cell(f.layouts['packed'])} | {cell(f.layouts['padded'])} | {cell(f.save)} |" for f in built),
        "",
        *wrap(f"Not built, so not known here; the reference stage checks them as any other: {unbuilt}.", 120),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help="model types; default: all, which writes docs/models.md")
    chosen = parser.parse_args().kinds
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    findings = []
    for kind in chosen or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        findings.append(scan(kind))
        print(kind, findings[-1].error or findings[-1].layouts, flush=True)
    if not chosen:
        PAGE.write_text(page(findings), encoding="utf-8")
    if faults := [finding.kind for finding in findings if finding.faults]:
        raise SystemExit(f"neither right nor refused: {', '.join(faults)}")


if __name__ == "__main__":
    main()
