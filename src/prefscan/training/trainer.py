"""Tune a LoRA adapter with one loss, at one β, for a number of steps.

    prefscan train ipo-0.5-16

The trainer is TRL's DPOTrainer: optimizer, schedule, accumulation and logging are its own. The loss comes from
losses.py, the layout of a micro-batch from logprobs/, the reference's log-probabilities from the reference stage. With
`train.accelerate`, several processes train the cell: multi_gpu.py.
"""

import os
import resource
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from accelerate.utils import FullyShardedDataParallelPlugin, gather_object
from datasets import Dataset
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader, RandomSampler
from transformers import PreTrainedTokenizerBase, TrainerCallback
from trl import DPOConfig, DPOTrainer
from trl.models.utils import _ForwardRedirection

from prefscan.common.config import Cell, Params, Runtime, Section, Train
from prefscan.common.errors import UserError
from prefscan.common.intervals import mean_interval, share_interval
from prefscan.common.paths import (
    RUNS,
)
from prefscan.logprobs.layouts import Layout, load_layout
from prefscan.logprobs.reference import COLUMNS, micro_batches
from prefscan.models.loading import set_evaluation
from prefscan.models.memory import activation_bytes, free_bytes, kept_tokens
from prefscan.training.checkpoints import Saving, last_checkpoint
from prefscan.training.kto import MISMATCHED, mismatched, with_mismatched
from prefscan.training.lora import beside_text, lora_config, refuse_targets, refuse_unmergeable
from prefscan.training.losses import LOSSES, PairLogps
from prefscan.training.multi_gpu import WholeRounds, from_main, world


class Sides(NamedTuple):
    """The pairs of a sweep with the reference's columns: those that are trained on, and those held out."""

    train: list[dict[str, Any]]
    heldout: list[dict[str, Any]]


CURVE_COLUMNS = {
    "step": "step",
    "loss": "loss",
    "rewards/margins": "reward_margin",
    "rewards/accuracies": "reward_accuracy",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
}


class TokenisedTrainer(DPOTrainer):
    """DPOTrainer on pairs that prepare has tokenised."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
        return dataset


class PairTrainer(TokenisedTrainer):
    """DPOTrainer on tokenised pairs that carry the reference's log-probabilities."""

    def __init__(
        self, *, cell: Cell, options: Section, layout: Layout, pad_token_id: int, kept_tokens: int, **kwargs: Any
    ) -> None:
        self.cell = cell
        self.options = options
        self.layout = layout
        self.pad_token_id = pad_token_id
        self.kept_tokens = kept_tokens
        self.held_out_rows: list[dict[str, Any]] = []
        self.redirect = _ForwardRedirection()
        super().__init__(data_collator=self.collate, **kwargs)
        if self.args.disable_dropout:
            disable_functional_dropout(self.model)
        self.precompute_ref_logps = True
        self.model.get_base_model().prefscan_fused_head = True  # DPOTrainer has just added it
        if self.is_fsdp_enabled:
            keep_whole_nats(self.accelerator.state.fsdp_plugin)

    def get_train_dataloader(self) -> DataLoader[Any]:
        batches = WholeRounds(RandomSampler(self.train_dataset), self.args.per_device_train_batch_size)
        return self.accelerator.prepare(
            DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=self.data_collator)
        )

    def get_batch_samples(self, *args: Any) -> tuple[list[dict[str, Any]], Any]:
        """This process's micro-batches of an update, weighted so that an update's empty ones change no mean."""
        batches, items = super().get_batch_samples(*args)
        here = torch.tensor(sum(batch["weight"] for batch in batches), device=self.args.device)
        filled = self.accelerator.reduce(here, "sum").item()
        for batch in batches:
            batch["weight"] *= len(batches) * self.accelerator.num_processes / filled
        return batches, items

    def collate(self, pairs: list[dict[str, Any]]) -> dict[str, Any]:
        """A micro-batch; an empty one, at the end of an epoch, is computed like others, with one pair and weight 0."""
        weight = 1.0 if pairs else 0.0
        pairs = pairs or [self.train_dataset[0]]
        batch: dict[str, Any] = {"weight": weight}
        batch |= {key: torch.tensor([float(pair[key]) for pair in pairs]) for key in COLUMNS}
        batch["pairs"] = self.layout.collate(pairs, self.pad_token_id)
        if LOSSES[self.cell.loss].mismatched:
            batch["mismatched"] = self.layout.collate([mismatched(pair) for pair in pairs], self.pad_token_id)
        return batch

    def pair_logps(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """The layout's, within the forward pass of what wraps the model: there DDP's and FSDP's hooks act."""
        policy = self.accelerator.unwrap_model(model)
        return self.redirect(model, policy, lambda batch: self.layout.pair_logps(policy, batch), batch)

    @torch.no_grad()
    def kl_logratio(self, model: nn.Module, batch: Any) -> Tensor:
        """Mean log-ratio of the policy against the base over the two mismatched responses of each prompt; `[B]`."""
        policy = torch.stack(self.pair_logps(model, batch))
        with self.model.disable_adapter():
            base = torch.stack(self.pair_logps(model, batch))
        return (policy - base).mean(0)

    def logps(self, model: nn.Module, inputs: dict[str, Any]) -> PairLogps:
        chosen, rejected = self.pair_logps(model, inputs["pairs"])
        reference = {key: inputs[key].to(chosen.device) for key in COLUMNS}
        return PairLogps(
            chosen=chosen,
            rejected=rejected,
            ref_chosen=reference["ref_chosen_logps"],
            ref_rejected=reference["ref_rejected_logps"],
            chosen_tokens=reference["chosen_tokens"],
            rejected_tokens=reference["rejected_tokens"],
            kl_logratio=self.kl_logratio(model, inputs["mismatched"]) if "mismatched" in inputs else None,
        )

    def refuse_divergence(self, values: Tensor) -> None:
        """Raises UserError for a loss or log-ratio that is not finite: whatever follows would be NaN."""
        if not values.isfinite().all():
            raise UserError(
                f"{self.cell.key}: a loss is not finite, after {self.state.global_step} updates; lower "
                f"train.learning_rate {self.args.learning_rate:g}, or set train.dtype to bf16 or fp32"
            )

    def recompute(self, wanted: bool) -> None:
        """Have the layers recompute the activations of the next forward pass in its backward pass, or keep them."""
        for module in self.model.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = wanted

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Tensor:
        if self.args.gradient_checkpointing:
            self.recompute(self.layout.positions(inputs["pairs"]) > self.kept_tokens)
        logps = self.logps(model, inputs)
        loss = inputs["weight"] * LOSSES[self.cell.loss](logps, self.cell.beta, self.options).mean()
        self.refuse_divergence(loss.detach())
        with torch.no_grad():
            chosen, rejected = self.cell.beta * logps.chosen_logratio, self.cell.beta * logps.rejected_logratio
            logged = {
                "rewards/chosen": chosen.mean(),
                "rewards/rejected": rejected.mean(),
                "rewards/margins": (chosen - rejected).mean(),
                "rewards/accuracies": accuracy(logps).mean(),
            }
        for name, value in logged.items():
            weighted = self.accelerator.gather(inputs["weight"] * value.double())
            self._metrics["train"][name].append(weighted.mean().item())
        return loss

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        # Not PEFT's load_adapter, which would turn the bf16 adapter of a 4-bit base into fp32.
        set_peft_model_state_dict(self.model, load_file(Path(resume_from_checkpoint) / "adapter_model.safetensors"))

    @torch.no_grad()
    def held_out(self, pairs: list[dict[str, Any]], batch_size: int) -> dict[str, Any]:
        """Loss, reward accuracy and log-probability shifts over held-out pairs, each against the base.

        Leaves a row a pair in `held_out_rows`: `id`, `policy_chosen_logps` and `policy_rejected_logps`, in nats, summed
        over the response.
        `loss_change` is the cell's own loss less what that loss gives the base on the same pairs: the margin sums over
        tokens for every loss, and what a loss such as IPO averages over them may rise while the margin does.
        The micro-batches are dealt to the processes round robin, and every process returns the whole.
        """
        set_evaluation(self.model)
        batches = list(micro_batches(pairs, batch_size))
        parts: list[Tensor] = []
        while len(parts) < len(batches):
            mine = min(len(parts) + world().process_index, len(batches) - 1)  # FSDP needs every process in each round
            with self.compute_loss_context_manager():
                logps = self.logps(self.model, self.collate(batches[mine]))
            loss, base_loss = (
                LOSSES[self.cell.loss](values, self.cell.beta, self.options) for values in (logps, logps.of_reference())
            )
            ratios = logps.chosen_logratio, logps.rejected_logratio
            part = torch.stack([loss, base_loss, *ratios, accuracy(logps), logps.chosen, logps.rejected])
            parts += gather_object([part.cpu()])
        found = torch.cat(parts[: len(batches)], dim=1)
        self.held_out_rows = [
            {"id": pair["id"], "policy_chosen_logps": chosen, "policy_rejected_logps": rejected}
            for pair, chosen, rejected in zip(pairs, *found[5:].tolist(), strict=True)
        ]
        losses, base_losses, chosen, rejected, accuracies = found[:5].double()
        self.refuse_divergence(torch.cat([losses, chosen, rejected]))
        margin, low, high = mean_interval((chosen - rejected).tolist())
        change, change_low, change_high = mean_interval((losses - base_losses).tolist())
        share, share_low, share_high = share_interval(accuracies.sum().item(), len(pairs))
        return {
            "pairs": len(pairs),
            "loss": sum(losses.tolist()) / len(losses),
            "loss_change": change,
            "loss_change_low": change_low,
            "loss_change_high": change_high,
            "accuracy": share,
            "accuracy_low": share_low,
            "accuracy_high": share_high,
            **beside_length(pairs, accuracies.tolist(), chosen.tolist(), rejected.tolist()),
            "margin": margin,
            "margin_low": low,
            "margin_high": high,
            "reward_margin": self.cell.beta * margin,
            "chosen_shift": chosen.mean().item(),
            "rejected_shift": rejected.mean().item(),
        }


def beside_length(
    pairs: list[dict[str, Any]], right: list[float], chosen: list[float], rejected: list[float]
) -> dict[str, float | None]:
    """What length alone explains: lists `[pairs]` of right (a tie counts ½) and of the log-ratios, in nats.

    `shorter_accuracy` is that of the rule "the shorter response is the chosen one"; `balanced_accuracy` the mean of the
    accuracies on pairs with the longer and with the shorter response chosen, None where one kind is missing;
    `margin_per_token` divides each log-ratio by its own response's tokens.
    """
    longer = [len(pair["chosen_ids"]) - len(pair["rejected_ids"]) for pair in pairs]
    kinds = [[r for r, more in zip(right, longer, strict=True) if more * sign > 0] for sign in (1, -1)]
    per_token = [
        c / len(pair["chosen_ids"]) - r / len(pair["rejected_ids"])
        for pair, c, r in zip(pairs, chosen, rejected, strict=True)
    ]
    return {
        "shorter_accuracy": fmean(0.5 if not more else float(more < 0) for more in longer),
        "balanced_accuracy": fmean(map(fmean, kinds)) if all(kinds) else None,
        "margin_per_token": fmean(per_token),
    }


def disable_functional_dropout(model: nn.Module) -> None:
    """Set the rates of the dropouts that are functions within a layer, as of attention, to 0; TRL sets its modules'."""
    for module in model.modules():
        for name, value in vars(module).items():
            if name.endswith("dropout") and isinstance(value, float):
                setattr(module, name, 0.0)


def keep_whole_nats(plugin: FullyShardedDataParallelPlugin) -> None:
    """Have FSDP2 compute in `train.dtype` without rounding to it what the model returns, and what processes add up.

    accelerate's policy rounds both. Here the model returns sums of log-probabilities, of hundreds of nats: bf16 leaves
    them no fraction, and the reference has one.
    """
    if isinstance(policy := plugin.mixed_precision_policy, MixedPrecisionPolicy):
        plugin.mixed_precision_policy = replace(policy, output_dtype=None, reduce_dtype=torch.float32)


def accuracy(logps: PairLogps) -> Tensor:
    """1 where the chosen response gained more log-probability than the rejected, ½ for a tie; shape `[B]`."""
    return (torch.sign(logps.chosen_logratio - logps.rejected_logratio) + 1) / 2


@dataclass(frozen=True)
class CellSettings:
    """The parameters of one cell's training; `options` are its loss's hyperparameters."""

    cell: Cell
    train: Train
    options: Section
    runtime: Runtime
    seed: int

    @classmethod
    def of(cls, params: Params, key: str) -> "CellSettings":
        """Raises UserError for a key that is no cell of the grid."""
        cell = params.cell(key)
        options = LOSSES[cell.loss].read_options(getattr(params.losses, cell.loss).model_dump())
        return cls(cell, params.train, options, params.runtime, params.training_seed(cell))


def training_arguments(settings: CellSettings, updates: int, recompute: bool, checkpoints: Path) -> DPOConfig:
    """TRL's arguments for a cell. Its own `loss_type` is not used: PairTrainer computes the loss."""
    cell, train, runtime = settings.cell, settings.train, settings.runtime
    on_gpu = torch.cuda.is_available()
    arguments = DPOConfig(
        output_dir=str(checkpoints),
        beta=cell.beta,
        max_steps=updates,
        per_device_train_batch_size=train.per_device_train_batch_size,
        gradient_accumulation_steps=train.gradient_accumulation_steps // world().num_processes,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.lr_scheduler_type,
        warmup_steps=train.warmup_steps,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        optim=train.optim,
        bf16=on_gpu and train.dtype == "bf16",
        fp16=on_gpu and train.dtype == "fp16",
        gradient_checkpointing=recompute,
        disable_dropout=train.disable_dropout,
        max_length=None,  # prepare has dropped what does not fit
        remove_unused_columns=False,
        seed=settings.seed,
        logging_steps=1,
        logging_first_step=True,
        save_strategy="no",  # checkpoints.Saving asks for it
        ddp_find_unused_parameters=False,  # every pair passes through every adapter
        report_to=[] if runtime.report_to in ("none", "dvclive") else [runtime.report_to],
        run_name=cell.key,
        use_cpu=not on_gpu,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # of several that it sees, else nn.DataParallel, which TRL refuses
    return arguments


def live_logging(runtime: Runtime, cell: Cell) -> list[TrainerCallback]:
    """DVCLive into runs/dvclive/CELL, the files of other back ends into runs/ as well; they need no callback of ours.

    The log of a cell that goes on from a checkpoint starts there; its curve in metrics/curves is whole.
    """
    if runtime.report_to == "tensorboard":  # which would write beside the checkpoints, and go with them
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(RUNS / "tensorboard" / cell.key))
    if (
        runtime.report_to == "wandb"
    ):  # which would write an offline run into a launch's clone, and it would go with that
        RUNS.mkdir(exist_ok=True)  # W&B takes a temporary folder in place of one that is not there
        os.environ.setdefault("WANDB_DIR", str(RUNS.absolute()))
    if runtime.report_to != "dvclive" or not world().is_main_process:
        return []
    from dvclive import Live
    from transformers.integrations import DVCLiveCallback

    live = Live(dir=str(RUNS / "dvclive" / cell.key), save_dvc_exp=False, dvcyaml=None, report=None)
    return [DVCLiveCallback(live=live, log_model=False)]


def curve_csv(history: list[dict[str, Any]]) -> str:
    lines = [",".join(CURVE_COLUMNS.values())]
    lines += [",".join(f"{entry[key]:.9g}" for key in CURVE_COLUMNS) for entry in history if "loss" in entry]
    return "\n".join(lines) + "\n"


def peak_memory_gib() -> float:
    """Of the GPU where there is one, else of the process's resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def terminated(cell: Cell, update: int, updates: int, checkpoints: Path) -> BaseException:
    """What ends a process after SIGTERM: the main one with a sentence, the others without."""
    if not world().is_main_process:
        return SystemExit(1)
    kept, _ = last_checkpoint(checkpoints)
    then = "its checkpoint is kept, and `dvc repro` goes on from it" if kept else "`dvc repro` begins it again"
    return UserError(f"{cell.key}: terminated at update {update} of {updates}; {then}")


def with_mismatched_columns(settings: CellSettings, model: Any, sides: Sides) -> tuple[Sides, list[str]]:
    """The pairs with what the loss reads beside its own responses, and the columns that training needs.

    Raises UserError for what `kto` cannot compute.
    """
    columns = ["prompt_ids", "chosen_ids", "rejected_ids", *COLUMNS]
    if not LOSSES[settings.cell.loss].mismatched:
        return sides, columns
    sides = Sides(*map(with_mismatched, sides))
    load_layout(settings.train.layout).refuse_long(
        model,
        [mismatched(pair) for side in sides for pair in side],
        what="kto: a prompt with another pair's response",
        lower="data.max_prompt_length and data.max_length to that in sum",
    )
    return sides, [*columns, *MISMATCHED.values()]


def training_cost(train: Train, pairs: list[dict[str, Any]], updates: int, seconds: float) -> dict[str, float]:
    """metrics/cost/train/CELL.json: tokens a second of all processes together, memory of the largest."""
    tokens = sum(2 * len(p["prompt_ids"]) + len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in pairs) / len(pairs)
    epochs, rest = divmod(updates, train.updates("epoch", len(pairs)))
    # An epoch's last update may be short.
    trained = epochs * len(pairs) + rest * train.per_device_train_batch_size * train.gradient_accumulation_steps
    return {
        "seconds": round(seconds, 1),
        # Tokens of prompt + chosen and of prompt + rejected, whatever a layout shares: comparable between layouts.
        "tokens_per_second": round(tokens * trained / seconds, 1),
        "peak_memory_gib": round(max(gather_object([peak_memory_gib()])), 2),
        "processes": world().num_processes,
    }


def refuse_long_warmup(cell: Cell, train: Train, updates: int) -> None:
    """Raises UserError for a warm-up longer than the run: no update would have the learning rate that is set."""
    if train.warmup_steps > updates:
        raise UserError(
            f"train.warmup_steps: {train.warmup_steps}, but {cell.key} has {updates} updates and would never reach "
            f"train.learning_rate {train.learning_rate:g}; set it to less than {updates}"
        )


def train_cell(
    settings: CellSettings, sides: Sides, model: Any, tokenizer: PreTrainedTokenizerBase, checkpoints: Path
) -> tuple[PairTrainer, dict[str, Any], dict[str, float]]:
    """Train one cell, from its last checkpoint if there is one.

    Returns the trainer and the contents of metrics/train/CELL.json and metrics/cost/train/CELL.json. The cost's seconds
    include those that went into the checkpoint; the work that a kill lost is not in them. Raises UserError after
    SIGTERM, with a checkpoint saved, for a training that diverges, for a LoRA target that the model lacks, and for what
    `kto` could not compute.
    """
    cell, train = settings.cell, settings.train
    refuse_targets(model, train.lora.target_modules)
    (pairs, heldout), columns = with_mismatched_columns(settings, model, sides)
    updates = train.updates(cell.steps, len(pairs))
    refuse_long_warmup(cell, train, updates)
    layout = load_layout(train.layout)
    longest = layout.most_positions(pairs, train.per_device_train_batch_size)
    activations = activation_bytes(model.config, longest, train.dtype)
    kept = from_main(lambda: kept_tokens(train, settings.runtime, longest, activations, free_bytes()))
    checkpoint, seconds = from_main(lambda: last_checkpoint(checkpoints))
    if checkpoint and world().is_main_process:
        print(f"{cell.key}: going on from {checkpoint}", flush=True)
    saving = Saving(seconds)
    trainer = PairTrainer(
        cell=cell,
        options=settings.options,
        layout=layout,
        pad_token_id=tokenizer.pad_token_id,
        kept_tokens=kept,
        model=model,
        args=training_arguments(settings, updates, kept < longest, checkpoints),
        train_dataset=Dataset.from_list([{key: pair[key] for key in columns} for pair in pairs]),
        processing_class=tokenizer,
        peft_config=lora_config(train, beside_text(model, train.lora.target_modules)),
        callbacks=[*live_logging(settings.runtime, cell), saving],
    )
    if not trainer.is_fsdp_enabled and not trainer.is_deepspeed_enabled:  # there a process has parts of weights
        refuse_unmergeable(trainer.model)
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds += time.perf_counter() - started
    if saving.terminated:
        raise terminated(cell, trainer.state.global_step, updates, checkpoints)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    metrics = {
        "loss": sum(losses) / len(losses),
        "last_loss": losses[-1],
        "updates": updates,
        "heldout": trainer.held_out(heldout, train.per_device_train_batch_size),
    }
    return trainer, metrics, training_cost(train, pairs, updates, seconds)
