"""Options shared by several commands, and the load they describe."""

from pathlib import Path
from typing import Annotated

import typer

from loadtest.measures import Objective
from loadtest.workload import Endpoint, Lengths, Workload, read_requests

Url = Annotated[str, typer.Argument(help="URL of the server, such as http://127.0.0.1:8000.")]
Objectives = Annotated[
    list[str] | None,
    typer.Option(
        "--slo", help="Objectives of ttft, itl, tpot or e2e: --slo ttft=500ms --slo itl=50ms."
    ),
]
Out = Annotated[
    Path | None, typer.Option(file_okay=False, help="Folder for result.json and the charts.")
]
Svg = Annotated[bool, typer.Option("--svg", help="Write SVG instead of PNG.")]
Seed = Annotated[int, typer.Option(help="Seed of all random numbers.")]
Prompt = Annotated[
    str,
    typer.Option(
        help="Words per prompt: N, uniform:LOW:HIGH, normal:MEAN:SD, lognormal:MEDIAN:SIGMA."
    ),
]
Output = Annotated[str, typer.Option(help="Maximum tokens per answer, likewise.")]
File = Annotated[
    Path | None,
    typer.Option(
        "--file",
        exists=True,
        dir_okay=False,
        help="JSONL: `prompt` or `messages`, and `output_tokens`.",
    ),
]
NumSessions = Annotated[
    int, typer.Option("--sessions", min=0, help="Sessions to create on a latentd server.")
]
Resumed = Annotated[
    float,
    typer.Option("--resume", min=0, max=1, help="Share of the requests that resume a session."),
]
Zipf = Annotated[
    float, typer.Option(min=0, help="Session r is resumed in proportion to r ** -zipf.")
]
AnyEndpoint = Annotated[Endpoint, typer.Option(help="Endpoint to call.")]
Model = Annotated[
    str | None, typer.Option(help="Name of the model; default: the first of /v1/models.")
]
Key = Annotated[str | None, typer.Option(envvar="LOADTEST_KEY", help="The server's API key.")]
IgnoreEos = Annotated[
    bool, typer.Option(help="Request all tokens of an answer; not supported by all servers.")
]
Timeout = Annotated[
    float, typer.Option(min=1, help="Time limit in seconds without data from the server.")
]
Below = Annotated[
    int | None,
    typer.Option(
        "--token-ids-below",
        min=2,
        help="Prompts are random token ids below this number; their lengths are in tokens.",
    ),
]
Temperature = Annotated[
    float | None, typer.Option(min=0, help="Sampling temperature; the server's default if none.")
]
Checkpoint = Annotated[Path, typer.Option(help="Folder of the model to serve.")]

PROMPT, OUTPUT = "lognormal:60:0.6", "lognormal:60:0.5"
"""A short conversation."""


def objectives(given: list[str] | None) -> list[Objective]:
    """Raises typer.BadParameter."""
    try:
        return [Objective.parse(text) for text in given or ()]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--slo") from None


def workload(
    prompt: str,
    output: str,
    file: Path | None,
    sessions: int,
    resume: float,
    zipf: float,
    below: int | None = None,
) -> Workload:
    """Raises typer.BadParameter."""
    if resume and not sessions:
        raise typer.BadParameter("needs --sessions to resume", param_hint="--resume")
    try:
        lengths = Lengths.parse(output)
        given = () if file is None else read_requests(file, lengths)
        return Workload(Lengths.parse(prompt), lengths, given, sessions, resume, zipf, below)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
