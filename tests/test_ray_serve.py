"""`examples/ray_serve`: two replicas on this machine, asked by OpenAI's own client, answer as splice does in this process."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from examples.ray_serve.answering import Answer, Until
from examples.ray_serve.messages import Piece
from examples.ray_serve.told import Told, unknown_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import splice

ROOT = Path(__file__).parent.parent
LETTERS = "_.abcdefghijklmnopqrstuvwxyz0123456789: "
# A token that the tokenizer has and the base has not: what asks for it fails in the middle of the base.
BEYOND = "@"
TEMPLATE = "{% for message in messages %}{{ message['role'] }}:{{ message['content'] }} {% endfor %}"
# Those that fit onto the replicas at once, and one that does not fit beside them.
PLACED, ALL = ("a", "b", "c", "team/d"), ("a", "b", "c", "team/d", "scales")
TOKENS = 24


# -- answers, without Ray


def text_of(answer_to: str, stop: Sequence[str] = (), ends: str = ".") -> tuple[list[str], Answer]:
    """What is told of an answer whose tokens are the bytes of a text."""
    said: list[str] = []
    codes = [*answer_to.encode()]
    answer = Answer(lambda ids: bytes(ids).decode(errors="replace"), {ord(end) for end in ends}, stop, said.append)
    answer.put(torch.tensor([[1, 2, 3]]))
    for code in codes:
        answer.put(torch.tensor([code]))
    answer.end()
    return said, answer


def test_text_is_told_as_it_comes_and_characters_when_they_are_whole() -> None:
    said, answer = text_of("añ€")
    assert said == ["a", "ñ", "€"]
    assert (answer.finish, answer.tokens) == ("length", 6)


def test_a_character_that_never_comes_whole_is_told_at_the_end() -> None:
    said: list[str] = []
    answer = Answer(lambda ids: bytes(ids).decode(errors="replace"), (), (), said.append)
    for code in (0, ord("a"), 0xE2):
        answer.put(torch.tensor([code]))
    assert said == ["a"]
    answer.end()
    assert said == ["a", "\ufffd"]


def test_a_token_that_ends_the_answer_is_counted_and_not_told() -> None:
    said, answer = text_of("ab.cd")
    assert ("".join(said), answer.finish, answer.tokens) == ("ab", "stop", 3)


@pytest.mark.parametrize("stop", ["xyz", "x"])
def test_a_stop_ends_the_answer_and_no_part_of_it_is_told(stop: str) -> None:
    said, answer = text_of("abxyzcd", [stop, "nowhere"])
    assert ("".join(said), answer.finish) == ("ab", "stop")


def test_what_only_begins_like_a_stop_is_told_once_that_is_clear() -> None:
    said, answer = text_of("abxyd", ["xyz"])
    assert said == ["a", "b", "xyd"]
    assert answer.finish == "length"
    said, answer = text_of("abxy.", ["xyz"])
    assert ("".join(said), answer.finish) == ("abxy", "stop")


def test_the_earliest_of_several_stops_counts() -> None:
    assert "".join(text_of("abcdef", ["d", "bcd", "cde"])[0]) == "a"


def test_an_answer_that_nobody_waits_for_ends_at_its_next_token() -> None:
    said: list[str] = []
    answer = Answer(lambda ids: "".join(LETTERS[i] for i in ids), (), (), said.append)
    until = Until(answer)
    answer.put(torch.tensor([[1, 2]]))
    answer.put(torch.tensor([5]))
    assert not until(torch.ones(1, 3), torch.ones(1, 9)).any()
    answer.leave()
    assert until(torch.ones(1, 3), torch.ones(1, 9)).all()
    answer.put(torch.tensor([6]))
    assert (said, answer.tokens) == (["d"], 1)


# -- the protocol, without Ray


def test_an_unknown_model_is_told_which_there_are() -> None:
    error = unknown_model("sorting", "tiny", ["reverse", "sort"])
    assert (error.status, error.code) == (404, "model_not_found")
    assert error.message == "there is no model 'sorting': the base is 'tiny', and its adapters are 'sort', 'reverse'"
    many = unknown_model("a77", "tiny", [f"a{number}" for number in range(1000)])
    assert "its adapters are 'a77', " in many.message and many.message.endswith(" and 990 more")


def test_the_same_answer_whole_and_in_pieces() -> None:
    pieces = [Piece("he", 3, 2, "", "r"), Piece("llo", 3, 5, "", "r"), Piece("", 3, 6, "stop", "r")]
    whole = Told("x", is_chat=True).whole(pieces)
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": "hello"}
    assert whole["usage"] == {"prompt_tokens": 3, "completion_tokens": 6, "total_tokens": 9}
    assert whole["choices"][0]["finish_reason"] == "stop"
    told = Told("x", is_chat=False)
    assert all(told.chunk(piece).startswith('data: {"id": "cmpl-') for piece in pieces)
    assert '"finish_reason": null' in told.chunk(pieces[0]) and '"finish_reason": "stop"' in told.chunk(pieces[-1])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"tools": []}, "tools"),
        ({"n": 2}, "n"),
        ({"stop": ""}, "stop"),
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_request_asks_for_is_understood_or_refused(more: dict[str, Any], said: str) -> None:
    pydantic = pytest.importorskip("pydantic")
    from examples.ray_serve.asked import ChatRequest

    body: dict[str, Any] = {
        "model": "x",
        "messages": [{"role": "user", "content": "hi"}],
        "stop": None,
        "temperature": 0,
    }
    asked = ChatRequest(**body).asked()
    assert (asked.prompt, asked.turns, asked.temperature, asked.stop) == (None, (("user", "hi"),), 0, ())
    with pytest.raises(pydantic.ValidationError) as caught:
        ChatRequest(**{**body, **more})
    assert {problem["loc"][0] for problem in caught.value.errors()} == {said}


# -- with Ray


def make_base(folder: Path, hidden: int = 64) -> Path:
    """A base of random weights and a tokenizer of characters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(LETTERS),
        hidden_size=hidden,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=100_000,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    # The token that ends an answer is never the most probable one: what nobody ends goes on.
    model.lm_head.weight.data[1] = 0
    model.save_pretrained(folder)
    made = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(LETTERS + BEYOND)}, unk_token="_"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="_", eos_token=".", chat_template=TEMPLATE)
    tokenizer.save_pretrained(folder)
    return folder


def make_adapter(base: Path, folder: Path, seed: int, config: Any) -> None:
    """An adapter of random weights."""
    model = splice.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    source = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=source) / 3
    model.save_pretrained(str(folder))


def make_all(root: Path) -> tuple[Path, Path]:
    """A base and its adapters: some LoRA, one of another method, one for a larger base, and one that is no adapter."""
    base, adapters = make_base(root / "tiny"), root / "adapters"
    for seed, name in enumerate(PLACED):
        config = splice.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
        make_adapter(base, adapters / name, seed, config)
    make_adapter(base, adapters / "scales", 9, splice.IA3Config(task_type="CAUSAL_LM"))
    wide = make_base(root / "wide", hidden=128)
    make_adapter(wide, adapters / "wide", 0, splice.LoraConfig(r=4, task_type="CAUSAL_LM"))
    (adapters / "broken").mkdir()
    (adapters / "broken" / "adapter_config.json").write_text("{")
    return base, adapters


def alone(base: Path, adapters: Path, name: str, prompt: str) -> str:
    """The greedy answer of the base with one adapter, in this process."""
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    if name != "tiny":
        model = splice.PeftModel.from_pretrained(model, adapters / name)
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    with torch.inference_mode():
        out = model.eval().generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False
        )
    return str(tokenizer.decode(out[0, ids.shape[1] :].tolist(), skip_special_tokens=True))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def wait_for(what: Callable[[], Any], seconds: float = 60.0) -> Any:
    """Ask until the answer is true."""
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "that did not come about"
        time.sleep(0.2)
    return found


class Served:
    """A running server."""

    def __init__(self, process: subprocess.Popen[str], port: int, metrics_port: int) -> None:
        import openai

        self.process, self.url, self._metrics = process, f"http://127.0.0.1:{port}", metrics_port
        # Without retries: a second request would hide that the first one failed.
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def ask(self, name: str, prompt: str, **options: Any) -> Any:
        manner = {"temperature": 0, "max_tokens": TOKENS, **options}
        return self.client.completions.create(model=name, prompt=prompt, **manner)

    def stream(self, name: str, prompt: str) -> str:
        """A streamed answer, which has to come token by token."""
        *chunks, last = [chunk.choices[0] for chunk in self.ask(name, prompt, stream=True)]
        assert all(len(chunk.text) == 1 and chunk.finish_reason is None for chunk in chunks)
        assert last.text == "" and last.finish_reason == "length"
        return "".join(chunk.text for chunk in chunks)

    def metric(self, name: str, **labels: str) -> dict[str, float]:
        """Values of a metric now, by replica; only lines with these labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self._metrics}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        found: dict[str, float] = {}
        for line in re.findall(rf"^ray_{name}{{.*$", text, re.M):
            if all(f'{label}="{value}"' in line for label, value in labels.items()):
                replica = re.findall(r'replica="(\w+)"', line)[0]
                found[replica] = found.get(replica, 0.0) + float(line.rpartition(" ")[2])
        return found

    def of_both(self, name: str) -> dict[str, float]:
        """A metric now, if it is told of both replicas; Ray has gaps in what is told every second."""
        found = self.metric(name)
        return found if len(found) == 2 else {}

    def total(self, name: str, **labels: str) -> float:
        """The sum of a metric over all replicas."""
        return sum(self.metric(name, **labels).values())


@contextmanager
def served(base: Path, adapters: Path, *options: str) -> Iterator[Served]:
    """The example in a process of its own, as a user starts it."""
    port, metrics_port = free_port(), free_port()
    # Ray's sockets stand below this folder, and the path of a socket must not be long.
    scratch = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT / "src"), "HOME": scratch, "RAY_TMPDIR": scratch, "OMP_NUM_THREADS": "1",
        "RAY_metrics_report_interval_ms": "1000",
    }  # fmt: skip
    command = [
        sys.executable, "-m", "examples.ray_serve", "--base", str(base), "--adapters", str(adapters),
        "--port", str(port), "--metrics-port", str(metrics_port), *options,
    ]  # fmt: skip
    log = Path(scratch) / "log"
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out, text=True)
    try:
        wait_for(lambda: "metrics for Prometheus" in log.read_text() or process.poll() is not None, 180)
        assert process.poll() is None, log.read_text()[-3000:]
        yield Served(process, port, metrics_port)
    except BaseException:
        print(log.read_text()[-6000:])
        raise
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(60)
        shutil.rmtree(scratch, ignore_errors=True)


needs_ray = pytest.mark.skipif(
    find_spec("ray") is None or find_spec("openai") is None,
    reason="the example needs the extra `serve`: pip install 'splice[serve,transformers]'",
)


@needs_ray
@pytest.mark.slow
def test_what_cannot_be_served_is_refused_before_ray_starts(tmp_path: Path) -> None:
    from examples.ray_serve.app import build
    from examples.ray_serve.options import Options

    base, adapters, none = str(make_base(tmp_path / "tiny")), tmp_path / "adapters", str(tmp_path / "none")
    make_adapter(Path(base), adapters / "a", 0, splice.LoraConfig(r=2, task_type="CAUSAL_LM"))
    build(Options(base=base, adapters=str(adapters)))
    with pytest.raises(ValueError, match=f"there is no base at '{none}'"):
        build(Options(base=none, adapters=str(adapters)))
    with pytest.raises(ValueError, match="an adapter has the base's own name, 'a': choose another `base_name`"):
        build(Options(base=base, adapters={"a": str(adapters / "a")}, base_name="a"))
    with pytest.raises(ValueError, match="replicas\n  Input should be greater than 0"):
        Options(base=base, adapters=str(adapters), replicas=0)
    ran = subprocess.run(
        [sys.executable, "-m", "examples.ray_serve", "--base", base, "--adapters", none],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 1 and f"error: there is no folder '{none}'" in ran.stderr
    assert "Started a local Ray instance" not in ran.stderr


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_replicas_serve_adapters_to_the_client_of_openai(tmp_path: Path) -> None:
    import psutil

    base, adapters = make_all(tmp_path)
    wanted = {name: alone(base, adapters, name, "hello 1") for name in ("tiny", *ALL)}
    assert len(set(wanted.values())) == len(wanted), "each adapter says something of its own"
    with served(base, adapters, "--replicas", "2", "--adapters-per-replica", "2", "--slot-rank", "4") as server:
        started = psutil.Process(server.process.pid).children(recursive=True)
        check_models(server)
        check_affinity(server, wanted)
        check_concurrent(server, base, adapters)
        check_chat(server, base, adapters)
        check_sampling(server)
        check_refusals(server)
        check_leaving(server)
        check_metrics(server)

        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        _, still_there = psutil.wait_procs(started, timeout=20)
        assert still_there == []


def check_models(server: Served) -> None:
    listed = {model.id: model.parent for model in server.client.models.list()}
    # Also the one that will not fit: that is seen when it is loaded. Not the one that could not be read.
    assert listed == {"tiny": None, **dict.fromkeys([*ALL, "wide"], "tiny")}
    assert server.client.models.retrieve("team/d").id == "team/d"
    with urllib.request.urlopen(f"{server.url}/health", timeout=10) as answer:
        assert (answer.status, answer.read()) == (200, b'{"replicas":{"RUNNING":2}}')


def check_affinity(server: Served, wanted: dict[str, str]) -> None:
    """Four adapters on two replicas of two places each: each comes to be on one, and its requests go there."""
    asked = 0

    def rounds() -> dict[str, set[str]]:
        """The replicas that answered for each adapter, asked five times in turn."""
        nonlocal asked
        replicas: dict[str, set[str]] = {name: set() for name in PLACED}
        for name in PLACED * 5:
            answer = server.ask(name, "hello 1")
            assert answer.choices[0].text == wanted[name]
            replicas[name].add(answer.system_fingerprint)
            asked += 1
        return replicas

    def one_each(replicas: dict[str, set[str]]) -> dict[str, set[str]]:
        return replicas if all(len(found) == 1 for found in replicas.values()) else {}

    for name in PLACED:
        server.ask(name, "hello 1")
        asked += 1
        time.sleep(1.0)  # until Ray's router knows which replica has it
    # On a busy machine a replica may be slow to tell Ray that it is free, and another one answers for it.
    replicas = wait_for(lambda: one_each(rounds()))
    of_each = [sum(replica in found for found in replicas.values()) for replica in set.union(*replicas.values())]
    assert of_each == [2, 2]
    # Each answer found its adapter on the model, and only few had to wait for a load.
    wait_for(lambda: server.total("splice_requests_total") == server.total("splice_store_hits_total") == asked)
    misses = server.total("splice_store_misses_total")
    assert misses == server.total("splice_store_loads_total") and len(PLACED) <= misses < asked / 2


def check_concurrent(server: Served, base: Path, adapters: Path) -> None:
    """Streams of all adapters and the base at once, more of them than there are places: each is what it is alone."""
    prompts = ["hello 1", "the quick brown fox", "x", "12 34"]
    asked = [(name, prompt) for prompt in prompts for name in ("tiny", *ALL)]
    wanted = {pair: alone(base, adapters, *pair) for pair in asked}
    with ThreadPoolExecutor(12) as threads:
        told = list(threads.map(lambda pair: server.stream(*pair), asked))
    assert dict(zip(asked, told)) == wanted
    wait_for(lambda: server.total("splice_store_evictions_total") > 0)


def check_chat(server: Served, base: Path, adapters: Path) -> None:
    turns = [("system", "be brief"), ("user", "hello 1"), ("assistant", "yes"), ("user", "and 2")]
    messages: Any = [{"role": role, "content": content} for role, content in turns]
    prompt = "".join(f"{role}:{content} " for role, content in turns)
    wanted = alone(base, adapters, "b", prompt)
    manner: Any = {"model": "b", "messages": messages, "temperature": 0, "max_completion_tokens": TOKENS}
    whole = server.client.chat.completions.create(**manner)
    assert (whole.choices[0].message.role, whole.choices[0].message.content) == ("assistant", wanted)
    assert whole.usage.prompt_tokens == len(prompt)
    chunks = list(server.client.chat.completions.create(**manner, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == wanted
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def check_sampling(server: Served) -> None:
    drawn = [server.ask("a", "hello", temperature=1, seed=seed).choices[0].text for seed in (7, 7, 8)]
    assert drawn[0] == drawn[1] != drawn[2]
    text = server.ask("a", "hello").choices[0].text
    stop = text[6:8]
    ended = server.ask("a", "hello", stop=stop)
    assert (ended.choices[0].text, ended.choices[0].finish_reason) == (text[: text.index(stop)], "stop")
    short = server.ask("a", "hello", max_tokens=3)
    assert (short.choices[0].finish_reason, short.usage.completion_tokens) == ("length", 3)


def check_refusals(server: Served) -> None:
    import openai

    with pytest.raises(openai.NotFoundError) as missing:
        server.ask("team/e", "hello")
    assert missing.value.code == "model_not_found"
    assert "there is no model 'team/e': the base is 'tiny', and its adapters are 'team/d', " in str(missing.value)
    with pytest.raises(openai.NotFoundError, match="there is no model 'broken'"):
        server.ask("broken", "hello")
    with pytest.raises(openai.BadRequestError, match="best_of: not understood here"):
        server.ask("a", "hello", best_of=2)
    with pytest.raises(openai.BadRequestError, match="the prompt '' is no token to this tokenizer"):
        server.ask("a", "")
    with pytest.raises(
        openai.BadRequestError, match="leaves no room for an answer of 100,000: the base takes 100,000 in all"
    ):
        server.ask("a", "hello", max_tokens=100_000)
    with pytest.raises(openai.InternalServerError, match="adapter 'wide' cannot be loaded: "):
        server.ask("wide", "hello")
    with pytest.raises(openai.InternalServerError, match="the replica failed; its log says why"):
        server.ask("a", f"hello {BEYOND}")
    request = urllib.request.Request(f"{server.url}/v1/completions", b"{", {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=10)
    assert caught.value.code == 400 and b"the body is no JSON" in caught.value.read()
    # It goes on after all of this.
    assert server.ask("a", "hello").choices[0].text


def check_leaving(server: Served) -> None:
    """Answers of which nobody waits for the end: they would take minutes."""
    import openai

    def generating() -> list[float]:
        return sorted(server.metric("splice_generating").values())

    begun = time.monotonic()
    stream = server.ask("a", "hello", stream=True, max_tokens=90_000)
    for _, _chunk in zip(range(5), stream):
        pass
    wait_for(lambda: generating() == [0, 1])
    stream.close()
    wait_for(lambda: generating() == [0, 0], 30)
    with pytest.raises(openai.APITimeoutError):
        server.ask("a", "hello", max_tokens=90_000, timeout=3)
    wait_for(lambda: server.total("splice_requests_total", end="left") == 2, 30)
    wait_for(lambda: generating() == [0, 0], 30)
    assert time.monotonic() - begun < 90


def check_metrics(server: Served) -> None:
    """What Prometheus scrapes: for each replica."""
    for name in ("splice_store_hits_total", "splice_store_misses_total", "splice_store_evictions_total"):
        assert len(server.metric(name)) == 2 and min(server.metric(name).values()) > 0, name
    half = wait_for(lambda: server.of_both("splice_store_load_p50_seconds"))
    most = wait_for(lambda: server.of_both("splice_store_load_p99_seconds"))
    assert all(0 < half[replica] <= most[replica] < 60 for replica in half)
    assert {*wait_for(lambda: server.of_both("splice_store_registered")).values()} == {len(ALL) + 1}
    assert max(wait_for(lambda: server.of_both("splice_store_on_device")).values()) == 2
    # Below 90,000: what was left ended early.
    assert 0 < server.total("splice_answer_tokens_total") < 80_000
    assert server.total("splice_requests_total", end="failed") == 1
    assert server.total("splice_requests_total", end="refused") == 3
