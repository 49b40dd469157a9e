"""`splice run`: the same text as `generate` gives for each adapter alone, from one batch where that can be."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

import splice
from splice.checkpoint.types import PeftType
from splice.cli.adapters import adapter_from, base_of, named
from splice.cli.known import known
from splice.cli.run_output import notes_on
from splice.cli.running.answers import Answers
from splice.cli.running.chat import Chat
from splice.cli.running.draws import Draws
from splice.cli.running.session import Session, open_session
from splice.cli.running.texts import Texts, Turn
from splice.cli.settings import Manner, Wanted
from tests import bases
from tests.bases import Base
from tests.broken import parts
from tests.cli import BASE, EXAMPLE, ROOT, run
from tests.samples import network_cases, plain_cases

SORT, UPPER = EXAMPLE.parent / "sort", EXAMPLE.parent / "upper"
LETTERS = "_.abcdefghijklmnopqrstuvwxyz0123456789 -"
# Stands on adapters of another method, which have to be there.
_NEEDS_OTHERS = {PeftType.XLORA}
_PLAIN = Manner()


def tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """One that takes each of 40 characters as a token, as large as the vocabularies of `tests.bases`."""
    made = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(LETTERS)}, unk_token="_"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="_", **options)


def with_tokenizer(base: Base, folder: Path, **options: Any) -> Path:
    """A base as its users have it: config, weights and tokenizer in a folder."""
    base.build().save_pretrained(folder)
    tokenizer(**options).save_pretrained(folder)
    return folder


def opened(base: Path, adapters: Sequence[str] = (), manner: Manner = _PLAIN) -> Session:
    found = [adapter_from(text, None, None, manner.task) for text in adapters]
    wanted = Wanted(str(base), device="cpu")
    return open_session(wanted, found, {}, False, None, manner)


def answers(session: Session, prompts: Sequence[str], rows: int = 32) -> Answers:
    ids = [session.texts.encode([Turn("user", text)]) for text in prompts]
    return session.teller.all_answers(ids, rows, lambda _: None)


def texts(told: Answers) -> dict[tuple[int, str | None], str]:
    return {(answer.prompt, answer.adapter): answer.text for answer in told.answers}


def complaint(ran: Any) -> str:
    """What the program itself said; other libraries may have warned too."""
    (line,) = [line for line in ran.err.splitlines() if line.startswith("splice: ")]
    return str(line)


# -- the program


def test_json_of_several_prompts_and_lines_of_the_input() -> None:
    command = ["run", "--base", BASE, "--adapter", EXAMPLE, "--adapter", f"up={UPPER}", "--prompt", "-", "--json"]
    ran = run(*command, "--prompt", "banana", input="hello\n\nzebra\n", new_process=True)
    assert ran.code == 0, ran.err
    told = json.loads(ran.out)
    assert told["prompts"] == ["hello", "zebra", "banana"]
    found = {(told["prompts"][answer["prompt"]], answer["adapter"]): answer["text"] for answer in told["answers"]}
    assert found == {
        ("hello", None): "hello", ("hello", "reverse"): "olleh", ("hello", "up"): "HELLO",
        ("zebra", None): "zebra", ("zebra", "reverse"): "arbez", ("zebra", "up"): "ZEBRA",
        ("banana", None): "banana", ("banana", "reverse"): "ananab", ("banana", "up"): "BANANA",
    }  # fmt: skip
    assert told["chat_template"] is True and told["seed"] is None and told["notes"] == []
    assert all(answer["ended"] and answer["tokens"] == len(answer["text"]) for answer in told["answers"])
    # One batch for each length of a prompt, with all adapters and the base in it.
    assert [batch["adapters"] for batch in told["batches"]] == [[None, "reverse", "up"] * 2, [None, "reverse", "up"]]
    assert all(0 < batch["first"] <= batch["seconds"] for batch in told["batches"])
    assert told["base"]["class"] == "LlamaForCausalLM" and told["base"]["dtype"] == "float32"
    assert [(a["name"], a["method"], a["tensors"], a["layers"]) for a in told["adapters"]] == [
        ("reverse", "LORA", 56, 28),
        ("up", "LORA", 56, 28),
    ]
    assert all(adapter["seconds"] > 0 for adapter in told["adapters"])


def test_an_interactive_session() -> None:
    lines = [
        "hello",
        "/adapter sort",
        "hello",
        "/base",
        "hello",
        "/adapter missing",
        "/nonsense",
        "/adapter",
        f"/load up={UPPER}",
        "hello",
        "/load up=no/such/folder",
        "/adapters",
        "/new",
        "a" * 70,
        "hello",
        "/quit",
        "never",
    ]
    ran = run("run", "--adapter", EXAMPLE, "--adapter", SORT, "-i", input="\n".join(lines))
    assert ran.code == 0, ran.err
    said = ran.out.partition("/quit")[2].partition("\n")[2].splitlines()
    assert said[:4] == ["reverse> olleh", "reverse> sort> ehllo", "sort> base> hello", "base> there is no adapter "
        "'missing'; there are reverse, sort"]  # fmt: skip
    assert said[4:6] == ["base> /nonsense is no command; /help lists them", "base> it is called as /adapter NAME"]
    assert said[6].startswith("base> up: 56 of 56 tensors on 28 layers") and said[7] == "up> HELLO"
    assert "no/such/folder" in said[8]
    assert said[9].startswith("up>   reverse  LORA  ") and said[11].startswith("* up  LORA  ")
    assert said[13] == (
        "up> up> a prompt of 71 tokens is too long: the base takes 64 in all; /new begins a new conversation"
    )
    assert said[14:] == ["up> HELLO", "up> "]


def test_what_does_not_fit_is_told_in_one_sentence_before_anything_is_asked(tmp_path: Path) -> None:
    wrong = shutil.copytree(EXAMPLE, tmp_path / "wrong")
    config = json.loads((wrong / "adapter_config.json").read_text())
    (wrong / "adapter_config.json").write_text(json.dumps({**config, "r": 8}))
    ran = run("run", "--base", BASE, "--adapter", f"good={EXAMPLE}", "--adapter", wrong, "--prompt", "hello")
    assert (ran.code, ran.out) == (1, "")
    said = complaint(ran)
    assert said.startswith(f"splice: adapter 'wrong' cannot be put on LlamaForCausalLM ({BASE}): ")
    assert "does not fit this model" in said and said.endswith(f"`splice verify {wrong} --base {BASE}`")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "Say whom to ask: --base, --adapter, or both."),
        (["--base", str(BASE)], "Say what to ask: --prompt TEXT, --prompt - for lines of the input, or --interactive."),
        (["--base", str(BASE), "-i", "--prompt", "x"], "leave out --prompt"),
        (["--base", str(BASE), "-i", "--json"], "leave out --json"),
        (["--base", str(BASE), "--prompt", "x", "--max-new-tokens", "0"], "'--max-new-tokens'"),
        (["--base", str(BASE), "--prompt", "x", "--temperature", "-1"], "'--temperature'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_called_wrongly(arguments: list[str], said: str) -> None:
    ran = run("run", *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert said in ran.err


def test_what_is_wrong_with_adapters_is_told_without_torch() -> None:
    """That is, at once: torch cannot be imported here."""
    code = "import sys; sys.modules['torch'] = None; from splice.cli.main import main; main()"

    def said(*adapters: str) -> str:
        options = [part for adapter in adapters for part in ("--adapter", adapter)]
        command = [sys.executable, "-c", code, "run", "--prompt", "x", *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        assert done.returncode == 1, done.stderr
        return done.stderr

    assert (
        said("no/such/folder")
        == "splice: Can't find 'adapter_config.json' at 'no/such/folder'. There is no such folder.\n"
    )
    assert said(str(EXAMPLE), f"reverse={SORT}") == (
        "splice: two adapters are called 'reverse': give each a name of its own, NAME=ADAPTER\n"
    )


def test_without_transformers_it_says_what_to_install() -> None:
    code = "import importlib.util as u; f = u.find_spec\n"
    code += "u.find_spec = lambda n, *a: None if n == 'transformers' else f(n, *a)\n"
    code += "from splice.cli.main import main; main()"
    command = [sys.executable, "-c", code, "run", "--base", str(BASE), "--prompt", "x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 1
    assert "splice: the base is loaded by transformers: pip install 'splice[transformers]'\n" in done.stderr


# -- adapters of every method


CASES = [
    case for case in (*plain_cases(bases.LLAMA), *network_cases(bases.LLAMA)) if case.method.name not in _NEEDS_OTHERS
]


def alone(folder: Path, prompt: str, tokens: int, **call: Any) -> str:
    """What `generate` of one adapter on a base of its own gives."""
    network = bases.LLAMA.build()
    network.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=1)
    model = splice.PeftModel.from_pretrained(network, folder)
    ids = torch.tensor([[LETTERS.index(letter) for letter in prompt]])
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, **call
        )
    return "".join(LETTERS[token] for token in output[0, ids.shape[1] :].tolist()).partition(".")[0].replace("_", "")


def test_all_methods_side_by_side_answer_as_each_does_alone(
    shared_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = with_tokenizer(bases.LLAMA, tmp_path / "base", eos_token=".", pad_token="_")
    folders = {case.method.name.value: shared_checkpoint(case.base, case.config()) for case in CASES}
    session = opened(base, [f"{name}={folder}" for name, folder in folders.items()], Manner(max_new_tokens=5, task=1))
    told = answers(session, ["hello"])
    found = texts(told)
    calls = {case.method.name.value: {key: torch.tensor([1]) for key in case.sample.call} for case in CASES}
    for name, folder in folders.items():
        assert found[0, name] == alone(folder, "hello", 5, **calls[name]), name
    assert len(set(found.values())) > len(folders) / 2
    # All that are on layers share a batch, with the base in it; each of the others has a group of its method.
    groups = {frozenset(batch.adapters) for batch in told.batches}
    layers = frozenset(name for name in folders if not known(name).whole_call)  # type: ignore[union-attr]
    assert any(layers | {None} >= group >= layers for group in groups), groups
    assert set().union(*groups) == {None, *folders}


def test_adapters_that_cannot_share_a_batch_are_asked_one_after_another(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = with_tokenizer(bases.T5, tmp_path / "base", pad_token="_", eos_token=".")
    config = {"peft_type": "PROMPT_TUNING", "task_type": "SEQ_2_SEQ_LM"}
    short = checkpoint(bases.T5, {**config, "num_virtual_tokens": 2}, name="short")
    long = checkpoint(bases.T5, {**config, "num_virtual_tokens": 5}, name="long", seed=1)
    together = answers(opened(base, [str(short), str(long)], Manner(8)), ["abc", "de"])
    assert [batch.adapters for batch in together.batches] == [(None,), ("short",), ("long",)] * 2
    (note,) = together.notes
    assert note.startswith("the base, short, long cannot share a batch, and had one each: ")
    for name, folder in (("short", short), ("long", long)):
        each = texts(answers(opened(base, [str(folder)], Manner(8)), ["abc", "de"]))
        assert each == {key: text for key, text in texts(together).items() if key[1] in (None, name)}


def test_adapters_that_cannot_stand_together_take_turns(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Only one adapter of a model can train biases of the base."""
    base = with_tokenizer(bases.GPT2, tmp_path / "base", pad_token="_", eos_token=".")
    config = {"peft_type": "LORA", "target_modules": ["c_attn"], "bias": "all", "task_type": "CAUSAL_LM"}
    folders = [checkpoint(bases.GPT2, config, name=name, seed=seed) for seed, name in enumerate(("one", "two"))]
    session = opened(base, list(map(str, folders)), Manner(8))
    assert session.stage.groups == [["one"], ["two"]]
    told = answers(session, ["abc"])
    assert [batch.adapters for batch in told.batches] == [(None, "two"), ("one",)]
    for folder in folders:
        each = texts(answers(opened(base, [str(folder)], Manner(8)), ["abc"]))
        assert each == {key: text for key, text in texts(told).items() if key[1] in (None, folder.name)}


def test_an_encoder_decoder(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    base = with_tokenizer(bases.T5, tmp_path / "base", pad_token="_", eos_token=".")
    config = {"peft_type": "LORA", "target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM"}
    told = answers(opened(base, [str(checkpoint(bases.T5, config))], Manner(9)), ["abc"])
    network = bases.T5.build()
    ids = torch.tensor([[LETTERS.index(letter) for letter in "abc"]])
    output = network.generate(input_ids=ids, max_new_tokens=9, do_sample=False, eos_token_id=1)
    expected = "".join(LETTERS[token] for token in output[0, 1:].tolist()).partition(".")[0].replace("_", "")
    assert texts(told)[0, None] == expected
    assert texts(told)[0, "adapter"] != expected


# -- what else may be wrong


def test_a_base_without_a_tokenizer(tmp_path: Path) -> None:
    bases.LLAMA.build().save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError) as caught:
        opened(tmp_path / "base")
    assert str(caught.value) == (
        f"there is no tokenizer in {tmp_path / 'base'}: name another folder, or an id of the Hub, with --tokenizer"
    )
    (tmp_path / "base" / "tokenizer.json").write_text("{")
    with pytest.raises(
        ValueError, match="has no tokenizer that transformers can load: .*; name another one with --token"
    ):
        opened(tmp_path / "base")
    tokenizer(eos_token=".").save_pretrained(tmp_path / "beside")
    wanted = Wanted(str(tmp_path / "base"), tokenizer=str(tmp_path / "beside"))
    session = open_session(wanted, [], {}, False, None, Manner(max_new_tokens=2))
    assert len(answers(session, ["abc"]).answers) == 1


def test_a_base_that_gives_no_text(tmp_path: Path) -> None:
    from transformers import ViTConfig

    base = with_tokenizer(bases.LLAMA, tmp_path / "base")
    ViTConfig().save_pretrained(base)
    with pytest.raises(ValueError, match=r"is a base of 'vit', and transformers has no AutoModelForCausalLM of these"):
        opened(base)
    with pytest.raises(ValueError, match="there is no base at 'no/such/folder': it is a folder or an id of the Hub"):
        opened(Path("no/such/folder"))


def test_a_device_or_a_class_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--device nonsense: "):
        open_session(Wanted(str(BASE), device="nonsense"), [], {}, False, None, Manner())
    with pytest.raises(ValueError, match="transformers has no class 'NoSuchModel'"):
        open_session(Wanted(str(BASE), class_name="NoSuchModel"), [], {}, False, None, Manner())


def test_which_adapters_and_which_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert named("math=user/adapter") == ("math", "user/adapter")
    assert named("user/adapter") == ("adapter", "user/adapter")
    folder = shutil.copytree(EXAMPLE, tmp_path / "r=4")
    assert named(str(folder)) == ("r=4", str(folder)), "a folder that is there is no name"
    assert named("r=4") == ("r=4", "r=4")
    with pytest.raises(ValueError, match="'=user/adapter' is no NAME=ADAPTER"):
        named("=user/adapter")
    one = adapter_from(f"one={EXAMPLE}", None, None)
    assert adapter_from(f"one={EXAMPLE / 'adapter_model.safetensors'}", None, None) == one, "the file of the weights"
    assert base_of([one, one]) == "examples/skills/base"
    with pytest.raises(ValueError, match="--base says which base it is, and no adapter names one"):
        base_of([one._replace(base=None)])
    with pytest.raises(ValueError, match="--base says which base it is, and the adapters name 2: a, b"):
        base_of([one._replace(base="b"), one._replace(base="a")])


def test_an_adapter_that_gives_no_text(tmp_path: Path) -> None:
    folder = parts(task_type="SEQ_CLS").write(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"adapter 'adapter' at .* is for SEQ_CLS, which gives no text"):
        adapter_from(str(folder), None, None)


def test_a_prompt_that_is_too_long_or_nothing(tmp_path: Path) -> None:
    base = with_tokenizer(bases.GPT2, tmp_path / "base")
    session = opened(base, (), Manner(max_new_tokens=100))
    (answer,) = answers(session, ["a" * 60]).answers
    assert answer.tokens == 4 and not answer.ended, "the base has 64 positions"
    with pytest.raises(ValueError, match="a prompt of 64 tokens is too long: the base takes 64 in all"):
        answers(session, ["a" * 64])
    with pytest.raises(ValueError, match="the prompt '' is no token to this tokenizer"):
        answers(session, [""])


def test_virtual_tokens_take_positions_too(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    base = with_tokenizer(bases.GPT2, tmp_path / "base")
    config = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 6}
    session = opened(base, [str(checkpoint(bases.GPT2, config))], Manner(max_new_tokens=100))
    assert [answer.tokens for answer in answers(session, ["a" * 50]).answers] == [8, 8]


def test_which_task_of_several(checkpoint: Callable[..., Path]) -> None:
    config = {"peft_type": "POLY", "target_modules": ["q_proj"], "n_tasks": 3, "task_type": "CAUSAL_LM"}
    folder = str(checkpoint(bases.LLAMA, config))
    assert adapter_from(folder, None, None, 2).tasks == 3
    for task, said in ((None, "and none was said"), (3, "and 3 is none of them")):
        with pytest.raises(ValueError) as caught:
            adapter_from(folder, None, None, task)
        assert str(caught.value) == (
            f"adapter 'adapter' knows the tasks 0 to 2, {said}: --task-id says which one is asked for"
        )


def test_the_token_that_ends_a_text_by_the_tokenizer_ends_an_answer_too(tmp_path: Path) -> None:
    base = with_tokenizer(bases.LLAMA, tmp_path / "base", eos_token=".")
    (whole,) = answers(opened(base, (), Manner(6)), ["hello"]).answers
    assert len(whole.text) == 6 and not whole.ended
    tokenizer(eos_token=whole.text[2]).save_pretrained(base)
    (answer,) = answers(opened(base, (), Manner(6)), ["hello"]).answers
    end = whole.text.index(whole.text[2])
    assert (answer.text, answer.tokens, answer.ended) == (whole.text[:end], end, True)


# -- chat templates


def test_a_conversation_is_put_into_the_template() -> None:
    template = "{% for m in messages %}{{ m['role'][0] }} {{ m['content'] }}-{% endfor %}a "
    talk = tokenizer(chat_template=template)
    turns = [Turn("user", "abc"), Turn("assistant", "de"), Turn("user", "f")]
    said = "u abc-a de-u f-a "
    texts = Texts(talk)
    assert texts.in_template and texts.decode(texts.encode(turns)) == said
    assert texts.decode(Texts(talk, system="xyz").encode(turns)) == f"s xyz-{said}"
    raw = Texts(talk, raw=True)
    assert not raw.in_template and raw.decode(raw.encode(turns)) == "f"
    assert not Texts(tokenizer()).in_template
    with pytest.raises(ValueError, match="--system needs a chat template, which is left out by --raw"):
        Texts(talk, raw=True, system="xyz")
    with pytest.raises(ValueError, match="--system needs a chat template, which this tokenizer does not have"):
        Texts(tokenizer(), system="xyz")
    strict = tokenizer(chat_template="{{ raise_exception('only one turn') }}")
    with pytest.raises(ValueError, match="chat template refuses this: only one turn; --raw leaves it out"):
        Texts(strict).encode(turns)


# -- sampling


def test_draws_are_of_the_distribution() -> None:
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    draws = Draws(temperature=2.0, top_p=1.0, seed=0, prompts=[0])
    drawn = torch.cat([draws(torch.empty(0), scores).argmax(-1) for _ in range(4000)])
    found = drawn.bincount(minlength=4) / 4000
    torch.testing.assert_close(found, (scores[0] / 2).softmax(-1), atol=0.03, rtol=0)
    # The first two have 0.73 of the probability together, the first alone 0.64.
    some = Draws(temperature=1.0, top_p=0.7, seed=0, prompts=[0])
    assert {int(some(torch.empty(0), scores).argmax()) for _ in range(200)} == {0, 1}
    few = Draws(temperature=1.0, top_p=0.5, seed=0, prompts=[0])
    assert {int(few(torch.empty(0), scores).argmax()) for _ in range(50)} == {0}


def test_what_is_drawn_depends_on_the_prompt_and_the_seed_alone(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = with_tokenizer(bases.LLAMA, tmp_path / "base", eos_token=".")
    config = {"peft_type": "LORA", "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    folder = str(checkpoint(bases.LLAMA, config))
    prompts, manner = ["abc", "abc", "xyz"], Manner(12, temperature=1.0, top_p=0.95, seed=7)
    found = texts(answers(opened(base, [folder], manner), prompts))
    assert found[0, None] != found[1, None], "two draws"
    assert texts(answers(opened(base, [folder], manner), prompts, rows=1)) == found
    assert texts(answers(opened(base, [], manner), prompts)) == {key: t for key, t in found.items() if key[1] is None}
    assert texts(answers(opened(base, [folder], manner._replace(seed=8)), prompts)) != found


def test_the_same_adapter_as_the_base_draws_the_same(tmp_path: Path) -> None:
    """What differs between two answers is the adapters' doing. An adapter that does nothing is told."""
    base = with_tokenizer(bases.LLAMA, tmp_path / "base", eos_token=".")
    idle = parts(network=bases.LLAMA.build(), target_modules=["q_proj"])
    for tensor in idle.tensors.values():
        tensor.zero_()
    folder = idle.write(tmp_path / "idle")
    told = answers(opened(base, [str(folder)], Manner(5, temperature=1.5, seed=3)), ["abc", "xy"])
    found = texts(told)
    assert all(found[n, "idle"] == found[n, None] for n in (0, 1))
    assert notes_on([None, "idle"], 2, told) == [
        "'idle' answers every prompt as the base does",
        "4 answers cut off; --max-new-tokens allows more",
    ]


# -- conversations


class Talked:
    """What a conversation in this process wrote, line by line."""

    def __init__(self, session: Session, lines: Sequence[str], monkeypatch: Any, capsys: Any) -> None:
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
        chat = Chat(session.teller, session.texts, session.stage, lambda text: adapter_from(text, None, None))
        chat.run()
        self.lines = capsys.readouterr().out.partition("/quit")[2].splitlines()[1:]


def test_earlier_turns_are_part_of_the_prompt(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    template = "{% for m in messages %}{{ m['content'] }}-{% endfor %}"
    base = with_tokenizer(bases.LLAMA, tmp_path / "base", eos_token=".", chat_template=template)
    session = opened(base, (), Manner(max_new_tokens=4))
    talked = Talked(session, ["abc", "de", "/new", "abc"], monkeypatch, capsys)
    (first,) = answers(session, ["abc"]).answers
    turns = [Turn("user", "abc"), Turn("assistant", first.text), Turn("user", "de")]
    (second,) = session.teller.all_answers([session.texts.encode(turns)], 1, lambda _: None).answers
    (other,) = answers(session, ["de"]).answers
    assert talked.lines == [f"base> {first.text}", f"base> {second.text}", f"base> base> {first.text}", "base> "]
    assert second.text != other.text


def test_an_answer_can_be_stopped(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """By Ctrl-C, which here comes as the third token is written."""
    session = opened(BASE, [f"up={UPPER}"])
    whole, count = Texts.decode, iter(range(100))

    def decode(self: Texts, ids: Any) -> str:
        if next(count) == 2:
            raise KeyboardInterrupt
        return whole(self, ids)

    monkeypatch.setattr(Texts, "decode", decode)
    assert Talked(session, ["hello", "hello"], monkeypatch, capsys).lines == ["up> HEL (stopped)", "up> HELLO", "up> "]


def test_the_tokenizer_of_the_example_is_that_of_its_training() -> None:
    from examples.skills.skills import END_ID, NEUTRAL_TAG, PADDING_ID, decode, encode
    from transformers import AutoTokenizer

    stored = AutoTokenizer.from_pretrained(BASE)
    texts = Texts(stored)
    assert texts.encode([Turn("user", "hello")]) == encode("hello" + NEUTRAL_TAG)
    assert texts.decode([*encode("olleh"), END_ID]) == decode([*encode("olleh"), END_ID]) == "olleh"
    assert (stored.eos_token_id, stored.pad_token_id) == (END_ID, PADDING_ID)
