"""The answer stage: FastChat's format and temperatures, exact seeded sampling, and no error taken for an answer."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import fastchat.llm_judge.common as fastchat
import pytest
import torch
from peft import LoraConfig, get_peft_model

from mtbench_data import CATEGORIES, ROOT, make_questions, write_params, write_questions
from prefscan.common.config import Answer
from prefscan.common.errors import UserError
from prefscan.common.io import write_json
from prefscan.generation import answers as answer
from prefscan.generation.answers import answer_questions, answer_record
from prefscan.generation.sampling import Sampling, SeededSampling, end_tokens, even_groups
from prefscan.judging.fastchat import select_questions
from prefscan.models.loading import load_cell, load_model, load_tokenizer, manifest
from prefscan.stages import answer as stage

GREEDY = ("extraction", "math", "coding", "reasoning")


def settings(**changes: Any) -> Answer:
    engine = {"engine": "transformers", "server": None}
    sizes = {"questions": 8, "max_new_tokens": 12, "batch_size": 4, "dtype": "fp32"}
    return Answer.model_validate(engine | sizes | changes)


@pytest.mark.parametrize(
    ("count", "most", "sizes"), [(80, 32, [26, 27, 27]), (8, 8, [8]), (9, 8, [4, 5]), (3, 8, [3]), (0, 8, [])]
)
def test_groups_are_few_and_even(count: int, most: int, sizes: list[int]) -> None:
    groups = even_groups([*range(count)], most)
    assert [len(group) for group in groups] == sizes
    assert [item for group in groups for item in group] == [*range(count)]


def answers(
    model: Any, tokenizer: Any, questions: list[Any], seed: int = 0, batch_size: int = 4, max_new_tokens: int = 12
) -> dict[int, Any]:
    """Of each question: its two replies, and each one's length and whether the limit cut it."""
    rows = answer_questions(model, tokenizer, questions, Sampling("answer", max_new_tokens, batch_size), seed)
    return {
        question["question_id"]: (
            [reply.text for reply in both],
            [(len(reply.tokens), reply.truncated) for reply in both],
        )
        for question, both in rows
    }


def test_temperatures_are_fastchats() -> None:
    assert {category: fastchat.temperature_config[category] for category in CATEGORIES} == answer.TEMPERATURES


def one_at_a_time(model: Any, tokenizer: Any, question: dict[str, Any], limit: int) -> list[str]:
    """Both replies by plain greedy decoding, without padding or a processor of ours."""
    messages, replies = [], []
    for turn in question["turns"]:
        messages.append({"role": "user", "content": turn})
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs, max_new_tokens=limit, do_sample=False)
        reply = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        messages.append({"role": "assistant", "content": reply})
        replies.append(reply)
    return replies


def test_temperature_0_is_plain_greedy_decoding_in_both_turns(model: Any, tokenizer: Any) -> None:
    """Beside sampled rows and with padding; the second reply shows that its context holds the first."""
    questions = make_questions(1)
    replies = answers(model, tokenizer, questions, batch_size=8)
    for question in questions:
        plain = one_at_a_time(model, tokenizer, question, 12)
        assert (replies[question["question_id"]][0] == plain) == (question["category"] in GREEDY)


CURT = "{% for m in messages %}<|im_start|>{{ m.role[0] }}: {{ m.content }}<|im_end|>{% endfor %}<|im_start|>"


@pytest.mark.parametrize("template", [None, CURT])
def test_prompts_come_from_the_tokenizers_own_template(model: Any, tokenizer: Any, template: str | None) -> None:
    tokenizer.chat_template = template or tokenizer.chat_template
    (question,) = make_questions(1, ["math"])
    ((_, both),) = answer_questions(model, tokenizer, [question], Sampling("answer", 12, 4), seed=0)
    turns, prompts = [reply.text for reply in both], [reply.prompt for reply in both]
    ask, again = question["turns"]
    if template:
        first = f"<|im_start|>u: {ask}<|im_end|><|im_start|>"
        second = f"<|im_start|>u: {ask}<|im_end|><|im_start|>a: {turns[0]}<|im_end|><|im_start|>u: {again}<|im_end|>"
        expected = [first, second + "<|im_start|>"]
    else:
        first = f"<|im_start|>user\n{ask}<|im_end|>\n<|im_start|>assistant\n"
        expected = [first, f"{first}{turns[0]}<|im_end|>\n<|im_start|>user\n{again}<|im_end|>\n<|im_start|>assistant\n"]
    assert [tokenizer.decode(ids) for ids in prompts] == expected


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_an_answer_does_not_depend_on_the_questions_beside_it(model: Any, tokenizer: Any, padding_side: str) -> None:
    tokenizer.padding_side = padding_side  # a tokenizer whose folder does not say pads on the right
    questions = make_questions(1)
    together = answers(model, tokenizer, questions, batch_size=4)
    assert answers(model, tokenizer, questions, batch_size=1) == together
    assert answers(model, tokenizer, questions[::-1], batch_size=3) == together
    some = questions[1::3]
    assert answers(model, tokenizer, some) == {q["question_id"]: together[q["question_id"]] for q in some}


def test_sampled_answers_change_with_the_seed_and_greedy_ones_do_not(model: Any, tokenizer: Any) -> None:
    questions = make_questions(1)
    first, again, other = (answers(model, tokenizer, questions, seed=seed) for seed in (0, 0, 1))
    assert first == again
    same = {q["category"] for q in questions if first[q["question_id"]] == other[q["question_id"]]}
    assert same == set(GREEDY)


def with_constant_logits(model: Any, tokenizer: Any, logits: dict[str, float]) -> Any:
    """The model, but with these logits at every position and −30 for every other token."""
    head = torch.nn.Linear(32, model.config.vocab_size)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.fill_(-30)
        for token, logit in logits.items():
            head.bias[tokenizer.convert_tokens_to_ids(token)] = logit
    model.set_output_embeddings(head)
    return model


@pytest.mark.parametrize(
    ("logits", "limit", "expected"),
    [
        ({"a": 1, "<|im_end|>": 0}, 5, ("aaaaa", 5, True)),
        ({"a": 0, "<|im_end|>": 1}, 5, ("", 1, False)),
        ({"a": 0, "<|im_end|>": 1}, 1, ("", 1, False)),
        ({"a": 1, "<|im_end|>": 0}, 1, ("a", 1, True)),
    ],
    ids=["truncated", "ends at once", "ends at the limit", "cut at once"],
)
def test_lengths_and_cuts_of_greedy_answers(
    model: Any, tokenizer: Any, logits: dict[str, float], limit: int, expected: tuple[str, int, bool]
) -> None:
    text, length, cut = expected
    with_constant_logits(model, tokenizer, logits)
    ((turns, sizes),) = answers(model, tokenizer, make_questions(1, ["math"]), max_new_tokens=limit).values()
    assert turns == [text, text]
    assert sizes == [(length, cut)] * 2


def test_lengths_and_cuts_of_rows_that_end_at_different_places(model: Any, tokenizer: Any) -> None:
    """Expected from the noise itself, one row at a time."""
    logits = {"a": 1.0, "b": 1.0, "<|im_end|>": 0.3}
    with_constant_logits(model, tokenizer, logits)
    scores = model.get_output_embeddings().bias.detach()[None]
    questions = make_questions(8, ["writing"])
    measured = answers(model, tokenizer, questions, max_new_tokens=6, batch_size=8)
    outcomes = set()
    for question in questions:
        for turn in range(2):
            sampling = SeededSampling([f"0/{question['question_id']}/{turn}"], [0.7])
            tokens = [sampling.draw(scores)[0].item() for _ in range(6)]
            ended = tokenizer.eos_token_id in tokens
            length = tokens.index(tokenizer.eos_token_id) + 1 if ended else 6
            texts, sizes = measured[question["question_id"]]
            assert texts[turn] == tokenizer.decode(tokens[: length - ended])
            assert sizes[turn] == (length, not ended)
            outcomes.add((length, ended))
    assert len(outcomes) > 3  # among them cut ones and ended ones
    assert {ended for _, ended in outcomes} == {True, False}


def test_log_probabilities_are_the_policys_at_temperature_1(model: Any, tokenizer: Any) -> None:
    """Of sampled and greedy rows, with padding: as a forward pass over prompt and reply gives them."""
    replies = [
        reply
        for _, both in answer_questions(model, tokenizer, make_questions(1), Sampling("answer", 12, 8), seed=0)
        for reply in both
    ]
    for reply in replies:
        logits = model(torch.tensor([reply.prompt + reply.tokens])).logits[0, len(reply.prompt) - 1 : -1]
        expected = logits.log_softmax(-1)[range(len(reply.tokens)), reply.tokens]
        assert torch.allclose(torch.tensor(reply.logprobs), expected, atol=1e-5)
    assert len({len(reply.prompt) for reply in replies}) > 2


@pytest.mark.parametrize("own", ["b", ["b", "c"], ["<|im_end|>"], None])
def test_a_turn_ends_with_the_models_tokens_and_the_tokenizers(model: Any, tokenizer: Any, own: Any) -> None:
    ids = tokenizer.convert_tokens_to_ids(own) if own else None
    model.generation_config.eos_token_id = ids
    expected = {tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [ids] if ids else [])}
    assert set(end_tokens(model.generation_config, tokenizer)) == expected
    for token in tokenizer.convert_ids_to_tokens(sorted(expected)):
        with_constant_logits(model, tokenizer, {token: 1})
        ((_, sizes),) = answers(model, tokenizer, make_questions(1, ["math"])).values()
        assert sizes == [(1, False)] * 2


def prepare(root: Path, tiny_model: Path) -> None:
    write_params(root, answer={"questions": 8, "max_new_tokens": 6, "batch_size": 4})
    write_questions(root, make_questions(2))
    (root / "models").mkdir()
    (root / "models/base").symlink_to(tiny_model)
    for name in ("dvc.yaml", "src"):
        (root / name).symlink_to(ROOT / name)


@pytest.mark.parametrize(
    ("error", "shown", "message"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried"),
            UserError,
            r"^answer\.batch_size: 4 .* \(CUDA out of memory\. Tried\); set answer\.batch_size lower$",
        ),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
            UserError,
            r"^answer\.batch_size: 4 .* can't allocate memory\); set answer\.batch_size lower$",
        ),
        (RuntimeError("a bug"), RuntimeError, "^a bug$"),
    ],
)
def test_out_of_memory_is_an_error_and_no_answer(
    in_tmp: Path,
    tiny_model: Path,
    model: Any,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    shown: type[Exception],
    message: str,
) -> None:
    """In the second batch, when there are answers that could be written."""
    prepare(in_tmp, tiny_model)
    forward, prompts = model.forward, []

    def full(*args: Any, **kwargs: Any) -> Any:
        if kwargs["input_ids"].shape[1] > 1:
            prompts.append(kwargs["input_ids"].shape)
        if len(prompts) > 2 * 4:  # both turns of the first batch are read
            raise error
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", full)
    monkeypatch.setattr(answer, "load_model", lambda *_: model)
    with pytest.raises(shown, match=message):
        stage.main("base")
    assert len(prompts) == 9
    assert not list(in_tmp.rglob("base.json*"))
    (left,) = Path(".prefscan/answers/base").iterdir()
    assert len(left.read_text().splitlines()) == 4  # the first batch, for the next run


def results() -> tuple[bytes, dict[str, Any]]:
    metrics = json.loads(Path("metrics/answer/base.json").read_text())
    return Path("data/mt_bench/model_answer/base.jsonl").read_bytes(), metrics


def test_a_killed_stage_goes_on_and_ends_with_the_same_bytes(
    in_tmp: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 in the second of two batches, with a line cut short; the first batch is not answered again."""
    prepare(in_tmp, tiny_model)
    stage.main("base")
    whole = results()
    assert not list(Path(".prefscan/answers/base").iterdir())

    script = (
        "import os, signal\n"
        "from prefscan.generation import answers as answer\n"
        "from prefscan.stages.answer import main\n"
        "generate, calls = answer.generate, []\n"
        "def killed(*args):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 4: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return generate(*args)\n"
        "answer.generate = killed\n"
        "main('base')\n"
    )
    threads = str(torch.get_num_threads())  # a part of the key
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": threads}
    done = subprocess.run([sys.executable, "-c", script], env=environment, timeout=300)
    assert done.returncode == -signal.SIGKILL
    (left,) = Path(".prefscan/answers/base").iterdir()
    assert len(left.read_text().splitlines()) == 4
    with left.open("a") as file:
        file.write('{"record": {"question_id')

    generate, calls = answer.generate, []
    monkeypatch.setattr(answer, "generate", lambda *args: calls.append(1) or generate(*args))
    stage.main("base")
    assert len(calls) == 2  # both turns of the second batch
    assert results() == whole


@pytest.mark.parametrize("sign", ["\u2028", "\u2029", "\x85"], ids=ascii)
def test_kept_answers_may_hold_every_sign(tmp_path: Path, sign: str) -> None:
    """Signs that str.splitlines takes for a line's end, and JSON does not."""
    rows = [{"record": {"question_id": number, "text": f"one{sign}two"}} for number in (81, 82)]
    path = tmp_path / "kept.jsonl"
    whole = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(whole + '{"record": {"ques', encoding="utf-8")
    assert list(answer.read_finished(path).values()) == rows
    assert path.read_text(encoding="utf-8") == whole
    assert list(answer.read_finished(path).values()) == rows


@pytest.mark.parametrize("change", ["seed", "answer", "questions", "weights"])
def test_answers_of_another_result_are_not_used(in_tmp: Path, tiny_model: Path, change: str) -> None:
    prepare(in_tmp, tiny_model)
    Path("models/base").unlink()
    shutil.copytree(tiny_model, "models/base")
    before = answer.answers_file("base")
    assert answer.answers_file("base") == before
    before.write_text("x")
    if change == "answer":
        write_params(in_tmp, answer={"questions": 8, "max_new_tokens": 13, "batch_size": 4})
    elif change == "seed":
        write_params(in_tmp, answer={"questions": 8, "max_new_tokens": 6, "batch_size": 4}, seed=1)
    elif change == "questions":
        write_questions(in_tmp, make_questions(3))
    elif change == "weights":
        Path("models/base/model.safetensors").write_bytes(b"other")
    assert answer.answers_file("base") != before
    assert not before.exists()


def test_a_stage_goes_on_with_the_batches_it_began_with(
    in_tmp: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where less memory is free than when it was killed: other batches could end in other bits."""
    prepare(in_tmp, tiny_model)
    write_params(in_tmp, answer={"questions": 16, "max_new_tokens": 6, "batch_size": "auto"})
    monkeypatch.setattr(answer, "MOST_ROWS", 6)
    stage.main("base")
    whole = results()
    settled, sizes = answer.settled_batch_size, []
    generate, batches = answer.generate, []

    def stop(*args: Any) -> Any:
        batches.append(len(args[2]))
        if len(batches) == 3:
            raise KeyboardInterrupt
        return generate(*args)

    monkeypatch.setattr(answer, "generate", stop)
    with pytest.raises(KeyboardInterrupt):
        stage.main("base")
    monkeypatch.setattr(answer, "settled_batch_size", lambda *args: sizes.append(1) or settled(*args))
    monkeypatch.setattr(answer, "MOST_ROWS", 2)
    monkeypatch.setattr(answer, "generate", lambda *args: batches.append(len(args[2])) or generate(*args))
    stage.main("base")
    assert batches == [5, 5, 5, 5, 5, 6, 6]
    assert not sizes
    assert results() == whole
    assert json.loads(Path("metrics/cost/answer/base.json").read_text())["at_once"] == 6


def test_a_cell_outside_the_grid_is_refused(in_tmp: Path, tiny_model: Path) -> None:
    prepare(in_tmp, tiny_model)
    with pytest.raises(UserError, match=r"cell 'ipo-9\.0-1' is not in the grid; its cells are "):
        stage.main("ipo-9.0-1")


def save_adapter(tiny_model: Path, folder: Path) -> None:
    """An adapter whose second factor is not zero, as training leaves it."""
    torch.manual_seed(1)
    adapted = get_peft_model(load_model(tiny_model, "fp32"), LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    adapted.save_pretrained(folder)


def test_the_stage_writes_fastchats_format(in_tmp: Path, tiny_model: Path) -> None:
    """The base, and a cell of which merge has written a manifest; each as `dvc repro` runs it."""
    prepare(in_tmp, tiny_model)
    cell = "sigmoid-0.1-16"  # the recipe of the committed params.yaml
    save_adapter(tiny_model, in_tmp / "models/adapters" / cell)
    write_json(
        Path("models/merged", cell, "manifest.json"), manifest(Path("models/base"), Path("models/adapters", cell))
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    for key in ("base", cell):
        command = [sys.executable, "-m", "prefscan", "answer", key]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr

    written = fastchat.load_model_answers("data/mt_bench/model_answer")
    assert set(written) == {"base", cell}
    tokenizer = load_tokenizer(tiny_model)
    questions = select_questions(make_questions(2), 8)
    models = {"base": load_model(tiny_model, "fp32"), cell: load_cell(Path("models/merged", cell), "fp32")}
    for key, loaded in models.items():
        assert list(written[key]) == [q["question_id"] for q in questions]
        for record in written[key].values():
            assert list(record) == ["question_id", "answer_id", "model_id", "choices", "tstamp"]
            assert record["model_id"] == key
            assert [list(choice) for choice in record["choices"]] == [["index", "turns", "tokens", "truncated"]]
            assert len(record["choices"][0]["turns"]) == 2
        fastchat.check_data(questions, written, {}, [key], {"default": fastchat.Judge("gpt-4", {})})
        rows = list(answer_questions(loaded.eval(), tokenizer, questions, Sampling("answer", 6, 4), seed=0))
        records = [answer_record(key, question, both) for question, both in rows]
        assert list(written[key].values()) == sorted(records, key=lambda r: r["question_id"])
        replies = [reply for _, both in rows for reply in both]
        metrics = json.loads(Path(f"metrics/answer/{key}.json").read_text())
        assert metrics["questions"] == 8
        assert metrics["mean_tokens"] == sum(len(reply.tokens) for reply in replies) / 16
        assert metrics["share_truncated"] == sum(reply.truncated for reply in replies) / 16
        assert metrics["repetition"] == pytest.approx(sum(reply.repetition for reply in replies) / 16)
        cost = json.loads(Path(f"metrics/cost/answer/{key}.json").read_text())
        assert cost["at_once"] == 4
        assert list(cost["replies"]) == [str(q["question_id"]) for q in questions]
        spent = [seconds for both in cost["replies"].values() for seconds in both]
        assert len(spent) == 16
        assert all(seconds > 0 for seconds in spent)
        assert sum(spent) - 0.1 <= cost["seconds"] <= sum(spent) + 5  # with what lies between the batches
        tokens = sum(len(reply.tokens) for reply in replies)
        assert tokens / cost["tokens_per_second"] == pytest.approx(cost["seconds"], abs=0.1)
        assert set(metrics) == {"questions", "mean_tokens", "share_truncated", "repetition"}
    identities = [record["answer_id"] for records in written.values() for record in records.values()]
    assert len(set(identities)) == 16
    base, tuned = ([record["choices"] for record in records.values()] for records in written.values())
    assert base != tuned
