"""Third-party clients, against a real server of the default model.

    pip install '.[dev,external,loadtest]' && pytest -m external

They need many packages, so they are not part of the usual tests.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from model import PRETRAINED
from tests.patience import PATIENCE_S, PROGRAM_S
from tests.server.live import LiveServer, live_server, tiny_settings

pytestmark = pytest.mark.external

DOCUMENTS = [
    {"start": "Once upon a time there was a little", "choices": [" girl.", " xqzt of"], "gold": 0},
    {"start": "The cat sat on the", "choices": [" of of of", " mat."], "gold": 1},
    {"start": "He was very happy and", "choices": [" went to play.", " zzz 42 %"], "gold": 0},
]
TASK = """\
task: endings
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{start}}}}"
doc_to_choice: "{{{{choices}}}}"
target_delimiter: ""
doc_to_target: gold
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    changes = {"model_name": "latentd", "default_chat_max_tokens": 65_536}  # answers come to an end
    settings = tiny_settings(PRETRAINED, tmp_path_factory.mktemp("data"), **changes)
    with live_server(settings) as running:
        yield running


def run(*command: str) -> str:
    """The command's output."""
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=PROGRAM_S, env=offline)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def program(name: str) -> str:
    """A program of this environment."""
    found = shutil.which(name, path=str(Path(sys.executable).parent))
    assert found is not None, f"{name} is missing: pip install '.[external]'"
    return found


@pytest.mark.parametrize("batch", [1, 4])
def test_lm_eval_scores_the_model(server: LiveServer, tmp_path: Path, batch: int) -> None:
    """Log-likelihoods by echo and logprobs, with the tokenizer from the server."""
    documents = tmp_path / "documents.jsonl"
    documents.write_text("\n".join(map(json.dumps, DOCUMENTS * 5)))
    (tmp_path / "endings.yaml").write_text(TASK.format(file=documents))
    where = f"base_url={server.url}/v1/completions,model=latentd,tokenizer_backend=remote"
    run(
        *(program("lm_eval"), "--model", "local-completions", "--tasks", "endings"),
        *("--include_path", str(tmp_path), "--batch_size", str(batch)),
        *("--model_args", f"{where},num_concurrent=2", "--output_path", str(tmp_path / "out")),
    )
    [results] = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(results.read_text())["results"]["endings"]["acc,none"] == 1.0


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
def test_guidellm_completes_a_run(server: LiveServer, tmp_path: Path, path: str) -> None:
    words = tmp_path / "words"
    words.mkdir()
    shutil.copy(PRETRAINED / "tokenizer.json", words)
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (words / "tokenizer_config.json").write_text(json.dumps(kind))
    report = tmp_path / "report.json"
    backend = f"kind=openai_http,target={server.url},model=latentd,request_format={path}"
    run(
        *(program("guidellm"), "run", "--disable-progress", "--backend", backend),
        *("--profile", "kind=concurrent,streams=4"),
        *("--constraint", "kind=max_requests,count=40"),
        *("--tokenizer", f"kind=hf_auto,model={words}"),
        *("--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=24"),
        *("--output", f"kind=json,path={report}"),
    )
    [benchmark] = json.loads(report.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert totals == {"successful": 40, "errored": 0, "incomplete": 0, "total": 40}


LANGCHAIN = """
import sys
from langchain_openai import ChatOpenAI

for responses in (False, True):
    chat = ChatOpenAI(
        base_url=sys.argv[1] + "/v1",
        api_key="none",
        model="latentd",
        max_tokens=24,
        stream_usage=True,
        use_responses_api=responses,
    )
    messages = [("system", "Tell a story."), ("human", "Once there was a fox.")]
    chunks = list(chat.stream(messages))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert whole.text, whole
    assert whole.usage_metadata["output_tokens"] > 5, whole
    assert chat.invoke(messages).text
"""


def test_langchain_streams_a_chat(server: LiveServer) -> None:
    run(sys.executable, "-c", LANGCHAIN, server.url)


COMPLIANT = {
    "open-responses": (
        *("basic-response", "system-prompt", "multi-turn", "assistant-phase"),
        *("streaming-response", "streaming-usage", "response-output-phase-schema"),
    ),
    "openai-chat": (
        *("chat-basic-response", "chat-system-prompt", "chat-multi-turn"),
        *("chat-streaming-response", "chat-streaming-usage"),
    ),
}
"""All tests but those of tools, images, reasoning, compaction, and of an error for a missing model
name, which is optional here."""


@pytest.mark.parametrize("format", COMPLIANT)
def test_answers_have_the_shapes_of_the_specification(server: LiveServer, format: str) -> None:
    reported = run(
        *(program("llm-comply"), "--base-url", f"{server.url}/v1", "--model", "latentd"),
        *("--api-key", "none", "--format", format, "--filter", ",".join(COMPLIANT[format])),
        *("--timeout", str(PATIENCE_S), "--json"),
    )
    outcomes = {
        test["id"]: (test["status"], test.get("errors"), test.get("warnings"))
        for test in json.loads(reported)["results"]
    }
    assert outcomes == dict.fromkeys(COMPLIANT[format], ("passed", None, None))
