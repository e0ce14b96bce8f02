import hashlib
import json
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from transformers.training_args import OptimizerNames

from prefscan.common.config import Accelerate, Cell, Optimizer, Params, load
from prefscan.common.errors import UserError
from prefscan.training.losses import LOSSES, check_losses
from prefscan.training.trainer import CellSettings

REPOSITORY = Path(__file__).parents[2]
CONF = REPOSITORY / "conf"
FILES = sorted(CONF.rglob("*.yaml"))
GROUPS = {
    group: sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    for group in ("model", "data", "train", "losses", "runtime", "sweep", "answer", "judge", "launch")
}
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


SERVER = {
    "kind": "vllm",
    "base_url": None,
    "key_variable": None,
    "headers": {},
    "query": {},
    "extra_body": {},
    "thinking": "keep",
    "concurrency": 8,
    "requests_per_minute": None,
    "tokens_per_minute": None,
    "timeout": 60.0,
    "attempts": 4,
}

DDP = {"distributed_type": "MULTI_GPU", "num_processes": 2, "num_machines": 1}


@cache
def composed(*overrides: str) -> str:
    """params.yaml as `dvc exp run -S …` writes it."""
    import tempfile

    from dvc.utils.hydra import compose_and_dump

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "params.yaml")
        compose_and_dump(path, str(CONF), None, "config", folder, list(overrides))
        return path.read_text(encoding="utf-8")


@pytest.fixture
def compose(tmp_path: Path) -> Any:
    """Parameters that overrides compose, as a stage reads them."""

    def compose(*overrides: str) -> Params:
        path = tmp_path / "params.yaml"
        path.write_text(composed(*overrides), encoding="utf-8")
        return load(path)

    return compose


def keys(params: Params) -> list[str]:
    return [cell.key for cell in params.grid.cells]


# The configuration --------------------------------------------------------------------------------


def test_the_committed_parameters_are_what_conf_composes() -> None:
    """But for recipe, seed and sweep, which a pull request may change in params.yaml alone."""
    text = (REPOSITORY / "params.yaml").read_text(encoding="utf-8")
    params = yaml.safe_load(text)
    recipe = [f"{key}={params[key]}" for key in ("loss", "beta", "steps", "seed")]
    sweep = [f'sweep.{key}="{value}"' for key, value in params["sweep"].items()]
    assert composed(*recipe, *sweep) == text


@pytest.mark.parametrize(("group", "option"), [(group, option) for group in GROUPS for option in GROUPS[group]])
def test_a_group_sets_its_own_section_alone(group: str, option: str) -> None:
    """So that every combination of groups is the combination of their sections."""
    default, changed = yaml.safe_load(composed()), yaml.safe_load(composed(f"{group}={option}"))
    if group == "sweep":  # the losses whose cells are evaluated are the grid's
        assert changed["stages"].pop("evaluate") == changed["grid"]["loss"]
        assert default["stages"].pop("evaluate") == default["grid"]["loss"]
    assert {key for key in default | changed if default.get(key) != changed.get(key)} <= {
        group,
        *(["grid"] if group == "sweep" else []),
    }


def test_every_combination_of_groups_is_valid() -> None:
    sections = {
        (group, option): yaml.safe_load(composed(f"{group}={option}")) for group in GROUPS for option in GROUPS[group]
    }
    combinations = list(product(*GROUPS.values()))
    assert len(combinations) >= 3 * 3 * 2 * 5 * 2 * 2
    default = yaml.safe_load(composed())
    for options in combinations:
        params = default.copy()
        for group, option in zip(GROUPS, options, strict=True):
            params[group] = sections[group, option][group]
        params["grid"] = sections["sweep", options[list(GROUPS).index("sweep")]]["grid"]
        valid = Params.model_validate(params)
        assert valid.recipe.key in keys(valid)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("more", [(), ("sweep=none", "merge.dtype=fp16", "judge=local")])
def test_every_experiment_composes_alone_and_with_more_overrides(
    experiment: str, more: tuple[str, ...], compose: Any
) -> None:
    params = compose(f"+experiment={experiment}", *more)
    assert params.recipe.key in keys(params)
    assert (len(keys(params)) == 1) == bool(more)
    assert params.judge.kind == ("local" if more or experiment == "demo_pairs" else "openai")


def test_openhermes_is_the_study_as_drafted(compose: Any) -> None:
    params = compose("+experiment=openhermes")
    betas = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    cells = {f"{loss}-{beta}-{n}" for loss, beta, n in product(("sigmoid", "ipo", "kto_pair"), betas, (200, 800))}
    assert len(cells) == 54
    assert len(keys(params)) == 54
    assert set(keys(params)) == cells
    assert params.train.model_dump() == {
        "accelerate": None,
        "layout": "packed",
        "lora": {
            "r": 16,
            "lora_alpha": 16,
            "lora_dropout": 0.05,
            "target_modules": ["k_proj", "gate_proj", "v_proj", "up_proj", "q_proj", "o_proj", "down_proj"],
        },
        "disable_dropout": True,
        "learning_rate": 5e-6,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 100,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "optim": "paged_adamw_32bit",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "dtype": "bf16",
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": False,
    }
    assert params.losses.model_dump() == {
        **{loss: {} for loss in LOSSES},
        "exo_pair": {"label_smoothing": 1e-3},
        "robust": {"label_smoothing": 0.1},
        "discopop": {"tau": 0.05},
        "simpo": {"gamma": 0.5},
        "cpo": {"alpha": 1.0},
        "kto": {"desirable_weight": 1.0, "undesirable_weight": 1.0},
    }
    assert params.runtime.model_dump() == {"gradient_checkpointing": "auto", "report_to": "wandb"}
    assert (params.data.max_prompt_length, params.data.max_length) == (1024, 1536)
    assert (params.model.source.repo, params.data.source.repo) == (
        "teknium/OpenHermes-2.5-Mistral-7B",
        "Intel/orca_dpo_pairs",
    )
    assert (params.model.pad_token, params.model.padding_side) == ("<|im_end|>", "left")
    assert (params.answer.questions, params.answer.max_new_tokens) == (80, 1024)
    assert (params.judge.kind, params.judge.name) == ("openai", "gpt-4")


def test_zephyr_is_the_published_second_half(compose: Any) -> None:
    params = compose("+experiment=zephyr")
    betas = (0.01, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    cells = {f"{loss}-{beta}-epoch" for loss, beta in product(("sigmoid", "ipo", "kto_pair"), betas)}
    assert len(cells) == 30
    assert len(keys(params)) == 30
    assert set(keys(params)) == cells
    assert params.model.source.repo == "alignment-handbook/zephyr-7b-sft-full"
    assert params.data.source.repo == "HuggingFaceH4/ultrafeedback_binarized"
    assert params.data.source.heldout == "data/test_prefs-*.parquet"


def test_a_cell_in_several_processes_is_another_configuration_of_the_same_training(compose: Any) -> None:
    alone, together = (compose("+experiment=openhermes", f"train/accelerate={name}") for name in ("none", "ddp"))
    assert alone == compose("+experiment=openhermes")
    assert together.train.accelerate.model_dump() == DDP | {"main_process_port": 0}
    assert together.train.model_copy(update={"accelerate": None}) == alone.train


def test_settings_of_deepspeed_stand_in_the_parameters() -> None:
    deepspeed = DDP | {"distributed_type": "DEEPSPEED"}
    inline = Accelerate.model_validate(deepspeed | {"deepspeed_config": {"zero_stage": 2}})
    assert inline.model_dump()["deepspeed_config"] == {"zero_stage": 2}
    with pytest.raises(ValueError, match=r"deepspeed_config_file: a change within ds\.json would train no cell anew"):
        Accelerate.model_validate(deepspeed | {"deepspeed_config": {"deepspeed_config_file": "ds.json"}})


def test_fsdp_shards_no_4_bit_base(compose: Any) -> None:
    with pytest.raises(UserError, match="FSDP shards no base of bnb_4bit_quant_type fp4; set it to none, or accele"):
        compose("train=study", "train/accelerate=fsdp")
    unquantised = compose("train=study", "train/accelerate=fsdp", "train.bnb_4bit_quant_type=none")
    assert unquantised.train.accelerate.distributed_type == "FSDP"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "train.dtype=fp16",
            "dtype fp16 cannot train the bf16 adapter of a base of bnb_4bit_quant_type fp4; choose",
        ),
        (
            "train.optim=adafactor",
            "optim adafactor on a base of bnb_4bit_quant_type fp4 does not go on from a checkpo",
        ),
    ],
)
def test_what_cannot_train_an_adapter_in_bf16_is_refused_on_a_4_bit_base(
    compose: Any, override: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        compose("train=study", override)
    compose("train=study", override, "train.bnb_4bit_quant_type=none")


def test_a_sweep_takes_every_loss_at_the_recipes_beta_and_steps(compose: Any) -> None:
    assert keys(compose("sweep=losses", "beta=0.3", "steps=4")) == [f"{loss}-0.3-4" for loss in LOSSES]


def test_the_laptops_sweep_is_fifteen_cells(compose: Any) -> None:
    assert keys(compose("steps=8")) == [
        f"{loss}-{beta}-8" for loss, beta in product(("sigmoid", "ipo", "kto_pair"), ("0.1", "0.2", "0.5", "1", "2"))
    ]


def test_the_sweep_of_given_pairs_is_six_cells(compose: Any) -> None:
    params = compose("+experiment=demo_pairs", "steps=8")
    assert keys(params) == [
        f"{loss}-{beta}-8" for loss, beta in product(("sigmoid", "ipo", "kto_pair"), ("0.1", "0.5"))
    ]
    assert (params.reward, params.sample, params.evaluate) == (None, None, None)
    assert params.stages.mtbench == params.grid


@pytest.mark.parametrize(
    ("override", "key", "more"),
    [
        ("beta=0.7", "sigmoid-0.7-8", {f"{loss}-0.7-8" for loss in ("sigmoid", "ipo", "kto_pair")}),
        ("beta=3", "sigmoid-3-8", {f"{loss}-3-8" for loss in ("sigmoid", "ipo", "kto_pair")}),
        ("beta=1e-5", "sigmoid-1e-05-8", {f"{loss}-1e-05-8" for loss in ("sigmoid", "ipo", "kto_pair")}),
        ("loss=ipo_sum", "ipo_sum-0.1-8", {f"ipo_sum-{beta}-8" for beta in (0.1, 0.2, 0.5, 1, 2)}),
        ("beta=0.5", "sigmoid-0.5-8", set()),
        ("beta=1.0", "sigmoid-1-8", set()),
    ],
)
def test_a_new_recipe_adds_its_cells_and_loses_none(override: str, key: str, more: set[str], compose: Any) -> None:
    before, after = keys(compose("steps=8")), compose("steps=8", override)
    assert after.recipe.key == key
    assert set(keys(after)) == {*before, *more}
    assert len(keys(after)) == len(before) + len(more)


def test_every_optimizer_is_one_of_transformers() -> None:
    assert set(get_args(Optimizer)) <= {name.value for name in OptimizerNames}


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("train.optim=adamw", r"train\.optim: .*'adamw_torch'"),
        ("seed=4294967296", r"seed: .*4294967296"),
    ],
)
def test_what_training_would_refuse_is_refused_at_once(override: str, complaint: str, compose: Any) -> None:
    with pytest.raises(UserError, match=complaint):
        compose(override)
    assert compose("seed=4294967295").seed == 2**32 - 1


@pytest.mark.parametrize("steps", ["8", "epoch"])
def test_without_a_sweep_the_recipe_is_the_one_cell(steps: str, compose: Any) -> None:
    params = compose("sweep=none", "loss=ipo", "beta=0.3", f"steps={steps}")
    assert keys(params) == [params.recipe.key] == [f"ipo-0.3-{steps}"]


def leaves(node: yaml.Node, path: str = "") -> list[tuple[str, yaml.Node]]:
    """Every key whose value is no mapping, or one on a single line, with the value's node; no defaults lists."""
    if not isinstance(node, yaml.MappingNode) or (node.flow_style and node.value):
        return [(path.lstrip("."), node)]
    return [
        leaf for key, value in node.value if key.value != "defaults" for leaf in leaves(value, f"{path}.{key.value}")
    ]


def uncommented(text: str) -> list[str]:
    lines = text.splitlines()
    ends = [(key, node.end_mark) for key, node in leaves(yaml.compose(text))]
    return [key for key, end in ends if not lines[end.line][end.column :].strip().startswith("# ")]


@pytest.mark.parametrize("path", FILES, ids=[path.relative_to(CONF).as_posix() for path in FILES])
def test_every_key_of_conf_has_a_comment_on_its_line(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert leaves(yaml.compose(text))
    assert uncommented(text) == []


def test_a_key_without_a_comment_is_found() -> None:
    text = 'defaults:\n  - a: b\na: 1  # one\nb: "# two"\nc:\n  d: [3]\n  e: "# x"  # four\n  f: null  #\n'
    assert uncommented(text) == ["b", "c.d", "c.f"]


# Cells --------------------------------------------------------------------------------------------

BETAS = ["0.1", "0.01", "1", "10", "1.0e-05", "1.0e+22", "0.30000000000000004", "123456789"]


def test_a_cells_key_is_the_one_that_dvc_gives_its_stage(tmp_path: Path) -> None:
    from dvc.repo import Repo

    params = yaml.safe_load(composed())
    params["grid"] = {"loss": ["sigmoid", "ipo_sum"], "beta": "BETAS", "steps": [8, 800, "epoch"]}
    params |= {"loss": "sigmoid", "beta": 0.1, "steps": 8}
    text = yaml.safe_dump(params).replace("BETAS", f"[{', '.join(BETAS)}]")
    (tmp_path / "params.yaml").write_text(text)
    matrix = yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())["stages"]["train"]["matrix"]
    stage = {"matrix": matrix, "cmd": "true ${key}", "outs": ["out/${key}"]}
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"train": stage}}, sort_keys=False))
    with Repo.init(str(tmp_path), no_scm=True) as repo:
        stages = sorted(stage.name for stage in repo.index.stages)
    cells = load(tmp_path / "params.yaml").grid.cells
    assert stages == sorted(f"train@{cell.key}" for cell in cells)
    assert len(stages) == 2 * 8 * 3


def test_a_cell_is_found_by_its_key(compose: Any) -> None:
    assert compose("steps=8").cell("kto_pair-0.5-8") == Cell(loss="kto_pair", beta=0.5, steps=8)


@pytest.mark.parametrize("key", ["kto_pair-0.50-8", "kto_pair-0.7-8", "base", ""])
def test_an_unknown_cell_is_refused_with_the_known_ones(key: str, compose: Any) -> None:
    with pytest.raises(UserError) as caught:
        compose("+experiment=demo_pairs", "steps=8").cell(key)
    known = "sigmoid-0.1-8, sigmoid-0.5-8, ipo-0.1-8, ipo-0.5-8, kto_pair-0.1-8, kto_pair-0.5-8"
    assert str(caught.value) == f"cell {key!r} is not in the grid; its cells are {known}"


# Seeds --------------------------------------------------------------------------------------------


def test_nested_seeds_are_one_for_all_losses_at_one_beta_and_steps(compose: Any) -> None:
    params = compose("+experiment=demo_pairs", "sweep.steps='8, 16, epoch'")
    assert params.seeding == "nested"
    seeds: dict[Any, set[int]] = {}
    for cell in params.grid.cells:
        seeds.setdefault((cell.beta, cell.steps), set()).add(params.training_seed(cell))
    assert len(seeds) == 2 * 3
    assert all(len(of_losses) == 1 for of_losses in seeds.values())
    assert len(set.union(*seeds.values())) == 2 * 3  # and each (β, steps) has another
    assert all(0 <= seed < 2**32 for seed in set.union(*seeds.values()))


def test_nested_seeds_depend_on_nothing_but_seed_beta_and_steps(compose: Any) -> None:
    params = compose("sweep=none", "beta=1")
    cell = params.recipe
    seed = params.training_seed(cell)
    assert seed == int.from_bytes(hashlib.sha256(b"0/1.0/32").digest()[:4], "big")
    # Equal numbers are one cell and one seed, and a larger grid moves none.
    assert compose("sweep=none", "beta=1.0").training_seed(Cell(loss="ipo", beta=1.0, steps=32)) == seed
    assert compose("sweep=laptop", "beta=1").training_seed(cell) == seed
    assert compose("sweep=none", "beta=1", "seed=1").training_seed(cell) != seed


def test_shared_seeding_is_the_seed_for_every_cell(compose: Any) -> None:
    params = compose("seeding=shared", "seed=7")
    assert {params.training_seed(cell) for cell in params.grid.cells} == {7}
    assert {CellSettings.of(params, cell.key).seed for cell in params.grid.cells} == {7}
    nested = compose("seed=7")
    settings = [CellSettings.of(nested, cell.key) for cell in nested.grid.cells]
    assert [each.seed for each in settings] == [nested.training_seed(each.cell) for each in settings]
    assert len({each.seed for each in settings}) == 5


# The known reward ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        (["reward"], "sample and evaluate without reward"),
        (["sample"], "reward and evaluate without sample"),
        (["evaluate"], "reward and sample without evaluate"),
        (["reward", "sample"], "evaluate without reward, sample"),
        (["sample", "evaluate"], "reward without sample, evaluate"),
    ],
)
def test_a_known_reward_is_whole(missing: list[str], words: str, tmp_path: Path) -> None:
    raw = yaml.safe_load(composed()) | dict.fromkeys(missing)
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(UserError) as caught:
        load(path)
    assert str(caught.value) == f"{path}: {words}; choose sample and reward, or none of both"


def test_sampled_pairs_need_the_stage_that_samples_them(tmp_path: Path) -> None:
    raw = yaml.safe_load(composed())
    raw["stages"]["sample"] = ["eval"]
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(UserError, match=r"data\.source\.kind: sampled, but stages\.sample has no train; choose sample"):
        load(path)


def test_a_sweep_without_a_known_reward_says_so(compose: Any) -> None:
    with pytest.raises(UserError, match=r"^sample and reward: null, so this sweep samples nothing; choose sample=rev"):
        _ = compose("+experiment=demo_pairs").known_reward
    params = compose()
    assert params.known_reward == (params.sample, params.reward)


def test_an_opponent_answers_mt_bench(compose: Any) -> None:
    assert compose("judge.against=sigmoid-0.1-32").judge.against == "sigmoid-0.1-32"
    with pytest.raises(UserError, match=r"judge\.against: 'ipo-0\.1-32' is neither base nor a cell of stages\.mtbench"):
        compose("judge.against=ipo-0.1-32")
    assert compose("mtbench=all", "judge.against=ipo-0.1-32").judge.against == "ipo-0.1-32"


# Bad input ----------------------------------------------------------------------------------------

REMOVE = object()
HUB = {"kind": "hub", "repo": "someone/chat", "revision": "0" * 40}


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("beta", 0, "beta: 0 is refused: input should be greater than 0"),
        ("beta", -1, "beta: -1 is refused: input should be greater than 0"),
        ("beta", "0.1", "beta: '0.1' is refused: input should be a valid number"),
        ("beta", float("nan"), "beta: nan is refused: input should be a finite number"),
        ("beta", float("inf"), "beta: inf is refused: input should be a finite number"),
        ("beta", True, "beta: True is refused: input should be a valid number"),
        ("beta", REMOVE, "beta: missing; conf/ shows its meaning, `dvc exp run` composes it"),
        ("steps", 0, "steps: 0 is refused: input should be greater than or equal to 1, or input should be 'epoch'"),
        ("steps", 1.5, "steps: 1.5 is refused: input should be a valid integer, or input should be 'epoch'"),
        ("loss", "../x", r"loss: '../x' is refused: string should match pattern '^\w+$'"),
        ("seed", -1, "seed: -1 is refused: input should be greater than or equal to 0"),
        ("grid.beta.1", "0.1", "grid.beta.1: '0.1' is refused: input should be a valid number"),
        (
            "grid.steps.0",
            "8",
            "grid.steps.0: '8' is refused: input should be a valid integer, or input should be 'epoch'",
        ),
        ("grid.loss", [], "grid.loss: [] is refused: list should have at least 1 item after validation, not 0"),
        ("colour", "red", "colour: unknown key (value 'red'); remove it or correct its spelling"),
        ("train.learning_rates", 1, "train.learning_rates: unknown key (value 1); remove it or correct its spelling"),
        ("train.learning_rate", 0, "train.learning_rate: 0 is refused: input should be greater than 0"),
        ("train.max_grad_norm", 0, "train.max_grad_norm: 0 is refused: input should be greater than 0"),
        ("train.lora.lora_dropout", 1, "train.lora.lora_dropout: 1 is refused: input should be less than 1"),
        ("train.lora.lora_alpha", 0, "train.lora.lora_alpha: 0 is refused: input should be greater than or equal to 1"),
        ("data.heldout_share", 1, "data.heldout_share: 1 is refused: input should be less than 1"),
        ("data.heldout_share", -0.1, "data.heldout_share: -0.1 is refused: input should be greater than or equal to 0"),
        ("train.lora.r", REMOVE, "train.lora.r: missing; conf/ shows its meaning, `dvc exp run` composes it"),
        ("train.learning_rate", float("inf"), "train.learning_rate: inf is refused: input should be a finite number"),
        (
            "train.accelerate",
            DDP,
            "train: gradient_accumulation_steps 1 cannot be shared by accelerate.num_processes 2; set it to a multiple "
            "of 2; with a smaller per_device_train_batch_size an update keeps its pairs",
        ),
        (
            "train.accelerate",
            DDP | {"num_processes": 1},
            "train.accelerate.num_processes: 1 is refused: input should be greater than or equal to 2",
        ),
        (
            "train.accelerate",
            DDP | {"num_machines": 2},
            "train.accelerate.num_machines: 2 is refused: input should be 1",
        ),
        (
            "train.accelerate",
            DDP | {"distributed_type": "MULTI_CPU"},
            "train.accelerate.distributed_type: 'MULTI_CPU' is refused: input should be 'MULTI_GPU', 'FSDP' or "
            "'DEEPSPEED'",
        ),
        (
            "merge.dtype",
            "bf16",
            "merge.dtype: 'bf16' is refused: bf16 has 8 bits of precision and rounds small adapters away (16 % of the "
            "margin kept); set fp32",
        ),
        ("merge.dtype", "int8", "merge.dtype: 'int8' is refused: input should be 'fp32' or 'fp16'"),
        (
            "model.source",
            HUB | {"revision": "main"},
            "model.source.revision: 'main' is refused: string should match pattern '^[0-9a-f]{40}$'",
        ),
        (
            "model.source",
            HUB | {"repo": "someone/../chat"},
            r"model.source.repo: 'someone/../chat' is refused: string should match pattern '^[\w.-]+/[\w.-]+$'",
        ),
        (
            "model.source",
            {"kind": "hub", "repo": "someone/chat"},
            "model.source.revision: missing; conf/ shows its meaning, `dvc exp run` composes it",
        ),
        (
            "model.source.kind",
            "ftp",
            "model.source: input tag 'ftp' found using 'kind' does not match any of the expected tags: 'package', "
            "'hub'",
        ),
        (
            "model.source.sha256",
            "abc",
            "model.source.sha256: 'abc' is refused: string should match pattern '^[0-9a-f]{64}$'",
        ),
        (
            "data.heldout_share",
            0,
            "data: heldout_share is 0 and source.heldout names no file, so nothing is held out; set either",
        ),
        (
            "answer.engine",
            "openai",
            "answer: engine openai asks a server; set server, as conf/answer/vllm.yaml does",
        ),
        (
            "answer.server",
            SERVER,
            "answer: engine transformers asks no server; set server: null, or engine: openai",
        ),
        (
            "answer.server",
            SERVER | {"kind": "other"},
            "answer.server: a server of kind other is not started here; set base_url to where it runs",
        ),
        (
            "answer.server",
            SERVER | {"kind": "transformers"},
            "answer.server: transformers serve has one seed for all requests; set concurrency: 1, or answers change",
        ),
        ("judge.name", "a/b", r"judge.name: 'a/b' is refused: string should match pattern '^[\w.-]+$'"),
        ("judge.name", "a\\b", r"judge.name: 'a\\b' is refused: string should match pattern '^[\w.-]+$'"),
        ("judge.name", "a\0", r"judge.name: 'a\x00' is refused: string should match pattern '^[\w.-]+$'"),
        ("judge.against", "../base", "judge.against: '../base' is neither base nor a cell of stages.mtbench"),
        ("grid.loss.0", "../x", r"grid.loss.0: '../x' is refused: string should match pattern '^\w+$'"),
        (
            "grid.steps.0",
            "../8",
            "grid.steps.0: '../8' is refused: input should be a valid integer, or input should be 'epoch'",
        ),
        (
            "model.source.requirement",
            "../x==1.0",
            r"model.source.requirement: '../x==1.0' is refused: string should match pattern "
            r"'^[A-Za-z0-9._-]+==[A-Za-z0-9.!+_-]+$'",
        ),
    ],
)
def test_a_bad_value_ends_with_one_sentence(key: str, value: Any, sentence: str, tmp_path: Path) -> None:
    raw = yaml.safe_load(composed())
    *parents, last = (int(part) if part.isdigit() else part for part in key.split("."))
    section = raw
    for part in parents:
        section = section[part]
    section[last] = value
    if value is REMOVE:
        del section[last]
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(UserError) as caught:
        load(path)
    assert str(caught.value) == f"{path}: {sentence}"


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("robust.label_smoothing", 0.5, "0.5 is refused: input should be less than 0.5"),
        ("robust.label_smoothing", -0.1, "-0.1 is refused: input should be greater than or equal to 0"),
        ("exo_pair.label_smoothing", 0, "0.0 is refused: input should be greater than 0"),
        ("exo_pair.label_smoothing", 0.5, "0.5 is refused: input should be less than 0.5"),
        ("discopop.tau", 0, "0.0 is refused: input should be greater than 0"),
        ("discopop.tau", 1.1, "1.1 is refused: input should be less than or equal to 1"),
        ("kto.desirable_weight", 0, "0.0 is refused: input should be greater than 0"),
        ("kto.undesirable_weight", 0, "0.0 is refused: input should be greater than 0"),
        ("simpo.gamma", -1, "-1.0 is refused: input should be greater than or equal to 0"),
        ("cpo.alpha", -1, "-1.0 is refused: input should be greater than or equal to 0"),
        ("sigmoid.gamma", 0.5, "unknown key (value 0.5); none are known"),
        ("cpo.gamma", 0.5, "unknown key (value 0.5); alpha are known"),
    ],
)
def test_a_bad_hyperparameter_ends_with_one_sentence(key: str, value: Any, sentence: str, tmp_path: Path) -> None:
    """Of every loss, whether or not the grid has it."""
    raw = yaml.safe_load(composed())
    loss, name = key.split(".")
    raw["losses"][loss][name] = value
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    params = load(tmp_path / "params.yaml")
    with pytest.raises(UserError) as caught:
        check_losses(params)
    assert str(caught.value).removeprefix("params.yaml: ") == f"losses.{key}: {sentence}"


def test_a_hyperparameter_is_a_number(tmp_path: Path) -> None:
    raw = yaml.safe_load(composed())
    raw["losses"]["cpo"]["alpha"] = "0.5"
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(UserError, match=r"losses\.cpo\.alpha: '0\.5' is refused: input should be a valid number"):
        load(path)


def test_a_loss_of_the_grid_has_a_section(tmp_path: Path) -> None:
    raw = yaml.safe_load(composed())
    del raw["losses"]["ipo"]
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(UserError, match=r"^params\.yaml: losses\.ipo: missing; `prefscan docs` writes it to conf/"):
        check_losses(load(tmp_path / "params.yaml"))


def test_a_budget_needs_prices(tmp_path: Path) -> None:
    raw = yaml.safe_load(composed("judge=gpt4"))
    raw["judge"] |= {"budget": 5.0, "prices": None}
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(raw))
    sentence = "judge: budget cannot be kept without prices; set prices, in USD for a million tokens"
    with pytest.raises(UserError) as caught:
        load(path)
    assert str(caught.value) == f"{path}: {sentence}"


def test_agreement_is_of_single_answers(tmp_path: Path) -> None:
    raw = yaml.safe_load(composed("judge=local"))
    raw["judge"]["mode"] = "pair"
    raw["agreement"] = {"judgements": "judged.jsonl", "answers": "answers"}
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(UserError, match=r"agreement compares scores of single answers; set judge\.mode: single or"):
        load(path)


def test_each_bad_value_gets_its_own_sentence(tmp_path: Path) -> None:
    raw = yaml.safe_load(composed()) | {"beta": 0, "steps": 0}
    (tmp_path / "params.yaml").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"params.yaml: beta: 0 is refused: .*; steps: 0 is refused: .*"):
        load(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"beta: [0.1", " is not YAML: while parsing a flow sequence .* line 1, column 7 "),
        (b"beta: *b", " is not YAML: found undefined alias .* line 1, column 7"),
        (b"beta: \x01", " is not YAML: unacceptable character #x0001"),
        (b"beta: !!python/object/apply:os.system [exit]", " is not YAML: could not determine a constructor"),
        ("name: caf\u00e9".encode("latin-1"), " is not UTF-8: byte 0xe9 at offset 9; convert it first"),
        (b"", ": expected keys and values, found None; `dvc exp run` composes it"),
        (b"- beta", r": expected keys and values, found \['beta'\]; `dvc exp run` composes it"),
        (None, " is missing; `git checkout .*params.yaml` restores it, `dvc exp run check` composes it anew"),
    ],
)
def test_a_file_that_is_no_parameters_ends_with_one_sentence(
    content: bytes | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "params.yaml").write_bytes(content)
    with pytest.raises(UserError, match=f"params.yaml{message}") as caught:
        load(tmp_path / "params.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("gpus", [0, 0.5, 1, 2, 1.5])
def test_rays_gpus_are_whole_above_one(gpus: float, tmp_path: Path) -> None:
    params = yaml.safe_load(composed())
    params["launch"]["num_gpus"] = gpus
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    if gpus == 1.5:
        with pytest.raises(UserError, match=r"launch\.num_gpus: 1\.5 is refused: above 1, Ray takes whole GPUs alone"):
            load(tmp_path / "params.yaml")
    else:
        assert load(tmp_path / "params.yaml").launch.num_gpus == gpus


def test_a_recipe_outside_the_grid_is_refused(tmp_path: Path) -> None:
    params = yaml.safe_load(composed()) | {"beta": 0.7}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    with pytest.raises(UserError, match=r"the recipe sigmoid-0\.7-\d+ .* is not in the grid; .* `dvc exp run -S`"):
        load(tmp_path / "params.yaml")
