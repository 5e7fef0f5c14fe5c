"""The command line. Commands import what they need when they run, so that help is fast."""

import inspect
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from model import PRETRAINED, WeightDtype
from server import __version__
from server.cli import keys, session
from server.cli.failure import fail
from server.settings import Group, Settings, SettingsError, read_settings

if TYPE_CHECKING:
    from server.sessions.sqlite.backup import Contents

app = typer.Typer(
    help="An inference server for language models with constant memory per session.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(session.app, name="session")
app.add_typer(keys.app, name="keys")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"latentd {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    del version


DataDir = Annotated[
    Path,
    typer.Option(
        envvar="LATENTD_DATA_DIR", help="Folder of the session store, as for latentd serve."
    ),
]
DATA_DIR = Settings.model_fields["data_dir"].default
Folder = Annotated[
    Path, typer.Option(help="Folder of the model.", show_default="the one in this package")
]


def main() -> None:
    """Entry point of `latentd`. Files are created for the user alone: states, answers and keys."""
    os.umask(0o077)
    app()


def _parameters_from_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give the command an option per field of Settings, and the model as its argument.

    All default to None, so that environment variables apply. Defaults are shown in the help text.
    """
    groups = list(Group)
    parameters = []
    for name, field in Settings.model_fields.items():
        [group] = (each for each in field.metadata if isinstance(each, Group))
        kind: Any = field.annotation
        kind = list[str] if kind == tuple[str, ...] else kind
        choices = [each for each in (kind, *get_args(kind)) if get_origin(each) is Literal]
        facts = [" | ".join(get_args(each)) for each in choices]
        if field.default not in (None, "", (), PRETRAINED):
            facts.append(f"default: {field.default}")
        text = escape(field.description or "")
        if facts:
            text += f" [dim]{escape('[' + '; '.join(facts) + ']')}[/dim]"
        info: Any
        if name == "checkpoint":
            info = typer.Argument(metavar="MODEL", help=text, show_default=False)
        else:
            info = typer.Option(help=text, show_default=False, metavar="", rich_help_panel=group)
        parameter = inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[kind | None, info],
        )
        parameters.append((groups.index(group), parameter))
    parameters.sort(key=lambda pair: pair[0])
    command.__dict__["__signature__"] = inspect.Signature([each for _, each in parameters])
    return command


@app.command()
@_parameters_from_settings
def serve(**given: Any) -> None:
    """Serve a model over HTTP until SIGTERM or Ctrl-C.

    Options can also be set by environment variables: LATENTD_DATA_DIR for --data-dir, and so on;
    LATENTD_CHECKPOINT for MODEL.
    """
    started = time.monotonic()
    try:
        settings = read_settings({k: v for k, v in given.items() if v is not None})
    except SettingsError as error:
        raise fail(error) from error
    from model.checkpoint import CheckpointError
    from server.engine.device import DeviceError
    from server.keys import KeyFileError
    from server.listeners import ListenError
    from server.serve import ServeError
    from server.serve import serve as run
    from server.sessions.store import StoreError

    failures = CheckpointError, DeviceError, KeyFileError, ListenError, ServeError, StoreError
    try:
        run(settings, started)
    except failures as error:
        raise fail(error) from error


@app.command()
def chat(
    session_id: Annotated[
        str | None, typer.Option("--session", metavar="ID", help="Continue this session.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message of a new session.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Maximum tokens per answer.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, max=10, help="Sampling temperature; 0: greedy.")
    ] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="Nucleus sampling.")] = None,
    top_k: Annotated[
        int | None, typer.Option(min=0, help="Sample from the k most probable tokens; 0: all.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Send plain text, for models without a chat template.")
    ] = False,
    url: session.UrlOption = session.LOCAL,
    key: session.KeyOption = "",
) -> None:
    """Chat with a running server, in a session.

    Lines can also come from a pipe; the first that fails ends the chat with exit status 1.
    """
    if raw and system is not None:
        raise fail("--system needs a chat template and cannot be used with --raw")
    from server.cli.chat import Options
    from server.cli.chat import chat as run

    given = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
    }
    sampling = {name: value for name, value in given.items() if value is not None}
    raise typer.Exit(run(Options(url, key, session_id, system, raw, sampling)))


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    checkpoint: Folder = PRETRAINED,
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens to generate.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0, max=10, help="Sampling temperature; 0: greedy.")
    ] = (0.7),
    top_k: Annotated[
        int, typer.Option(min=0, help="Sample from the k most probable tokens; 0: all.")
    ] = 0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Nucleus sampling.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="Device to run on.")
    ] = "auto",
    dtype: Annotated[
        WeightDtype | None,
        typer.Option(help="Dtype of the matrix weights; default: the best for model and device."),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
) -> None:
    """Continue a text in the terminal, without a server."""
    from model.checkpoint import CheckpointError
    from model.decoding.sampling import SamplingParams
    from server.engine.device import DeviceError
    from server.generate import GenerateError
    from server.generate import generate as run

    sampling = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=secrets.randbits(64) if seed is None else seed,
    )
    try:
        run(checkpoint, prompt, max_tokens, sampling, device, dtype, threads)
    except (CheckpointError, DeviceError, GenerateError) as error:
        raise fail(error) from error


@app.command()
def verify(
    files: Annotated[list[Path], typer.Argument(help="Files of reference outputs.")],
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Model to compare, for files without weights."),
    ] = None,
) -> None:
    """Compare this implementation with outputs of the reference implementation.

    Exit status 1 if an error is above its tolerance.
    """
    if checkpoint is not None:
        _compare(files, checkpoint)
    from model.verify import LOGITS_TOLERANCE, STATE_TOLERANCE, VerifyError, verify_file

    table = Table("file", "mode", "logits", "state", "greedy ids", "")
    ok = True
    try:
        for file in files:
            for report in verify_file(file):
                ok = ok and report.ok
                table.add_row(
                    file.name,
                    report.mode,
                    f"{report.logits_error:.1e}",
                    f"{report.state_error:.1e}",
                    "agree" if report.greedy_agrees else "differ",
                    "ok" if report.ok else "FAILED",
                )
    except VerifyError as error:
        raise fail(error) from error
    console = Console()
    console.print(table)
    console.print(
        f"worst errors; tolerance {LOGITS_TOLERANCE:g} for logits, {STATE_TOLERANCE:g} relative "
        "for the state"
    )
    raise typer.Exit(0 if ok else 1)


def _compare(files: list[Path], model: Path) -> None:
    from model.checkpoint import CheckpointError
    from model.expected import LOGITS_TOLERANCE, STATE_TOLERANCE, compare
    from model.verify import VerifyError

    table = Table("file", "backend", "read", "logits", "state", "greedy ids", "")
    faults = []
    try:
        for file in files:
            for found in compare(file, model):
                errors = (f"{found.logits_error:.1e}", f"{found.state_error:.1e}")
                agrees = "agree" if found.greedy_agrees else "differ"
                result = "ok" if found.ok else "FAILED"
                table.add_row(file.name, found.backend, found.pieces, *errors, agrees, result)
                where = f"{file.name}, {found.backend}, {found.pieces}"
                faults += [f"{where}: {fault}" for fault in found.faults]
    except (VerifyError, CheckpointError) as error:
        raise fail(error) from error
    console = Console()
    console.print(table)
    for fault in faults:
        print(fault)
    console.print(
        f"worst errors; tolerance {LOGITS_TOLERANCE:g} for logits, {STATE_TOLERANCE:g} relative "
        "for the state"
    )
    raise typer.Exit(1 if faults else 0)


@app.command("inspect")
def inspect_state(
    file: Annotated[Path, typer.Argument(help="Exported state of a session, or a model.")],
    checkpoint: Folder = PRETRAINED,
) -> None:
    """Show an exported state, and whether a server of the model would import it.

    Exit status 1 if it would not. For a model, show its sizes and those of its state, without
    reading weights.
    """
    from model.checkpoint import CheckpointError
    from server.cli.inspect import inspect as run

    try:
        ok = run(file, checkpoint)
    except CheckpointError as error:
        raise fail(error) from error
    except OSError as error:
        raise fail(f"{file}: {error.strerror}") from error
    raise typer.Exit(0 if ok else 1)


@app.command("backup")
def back_up(
    destination: Annotated[Path, typer.Argument(metavar="DIR", help="An empty or new folder.")],
    data_dir: DataDir = DATA_DIR,
) -> None:
    """Back up all sessions and stored responses, with or without a running server.

    The backup has every turn acknowledged before it started; later ones are complete or absent.
    Keys are not included: copy the key file.
    """
    from server.sessions.sqlite.backup import BackupError, backup

    try:
        _print_contents("backed up", backup(data_dir, destination))
    except BackupError as error:
        raise fail(error) from error


@app.command()
def restore(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="A backup.")],
    data_dir: DataDir = DATA_DIR,
) -> None:
    """Restore a backup into a data folder without a session store or a server.

    Checksums and database are verified first.
    """
    from server.sessions.sqlite.backup import BackupError
    from server.sessions.sqlite.backup import restore as run

    try:
        _print_contents("restored", run(source, data_dir))
    except BackupError as error:
        raise fail(error) from error


@app.command()
def erase_model(
    fingerprint: Annotated[
        str, typer.Argument(help="The model's fingerprint, or its first twelve digits.")
    ],
    data_dir: DataDir = DATA_DIR,
) -> None:
    """Erase all sessions and stored responses of one model, while no server runs.

    At startup, a server of another model logs the fingerprints that it finds.
    """
    import asyncio

    from server.errors import StorageFailed
    from server.sessions.models import ModelError, describe_counts
    from server.sessions.models import erase_model as run
    from server.sessions.sqlite.store import STORE_FILE, SQLiteStore
    from server.sessions.store import StoreError

    async def erase() -> str:
        if not (data_dir / STORE_FILE).exists():
            raise StoreError(f"{data_dir / STORE_FILE}: no session store")
        store = SQLiteStore(data_dir / STORE_FILE)
        try:
            return describe_counts(await run(store, fingerprint))
        finally:
            await store.close()

    try:
        print(f"erased {asyncio.run(erase())}")
    except (ModelError, StorageFailed, StoreError) as error:
        raise fail(error) from error


def _print_contents(done: str, contents: "Contents") -> None:
    print(
        f"{done} {contents.num_sessions:,} sessions and {contents.num_responses:,} responses with "
        f"{contents.num_states:,} states, {contents.num_bytes:,} bytes"
    )
    if contents.num_missing:
        print(f"{contents.num_missing:,} states are lost: their files were missing from the store")


@app.command()
def import_checkpoint(
    file: Annotated[Path, typer.Argument(help="State dict: .pt, .pth or .safetensors.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    tokenizer: Annotated[Path, typer.Option(help="tokenizer.json of the model.")],
    chat_template: Annotated[Path | None, typer.Option(help="Jinja file.")] = None,
    vocab_sz: Annotated[int, typer.Option(min=1)] = 50304,
    d_emb: Annotated[int, typer.Option(min=1)] = 768,
    n_layers: Annotated[int, typer.Option(min=1)] = 24,
    n_heads: Annotated[int, typer.Option(min=1)] = 24,
    d_key: Annotated[int, typer.Option(min=1)] = 32,
    d_val: Annotated[int, typer.Option(min=1)] = 32,
    values: Annotated[
        Literal["log", "linear"], typer.Option(help="Whether the network computes log v or v.")
    ] = "log",
    bos_token_id: Annotated[int | None, typer.Option(help="Token before a new text.")] = None,
    eos_token_id: Annotated[list[int] | None, typer.Option(help="Token that ends a text.")] = None,
) -> None:
    """Create a checkpoint from a state dict of the reference implementation.

    The options are the arguments of its ModelConfig; the defaults are the paper's model.
    """
    from model.checkpoint import CheckpointError, import_state_dict

    config = {
        "vocab_sz": vocab_sz,
        "d_emb": d_emb,
        "n_layers": n_layers,
        "n_heads": n_heads,
        "d_key": d_key,
        "d_val": d_val,
        "values": values,
        "bos_token_id": bos_token_id,
        "eos_token_ids": tuple(eos_token_id or ()),
    }
    try:
        import_state_dict(file, out, config, tokenizer, chat_template)
    except CheckpointError as error:
        raise fail(error) from error
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
