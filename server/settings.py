"""Everything that can be set, in one place: flags and `LATENTD_*` variables come from here."""

import math
import os
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import platformdirs
from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from model import PRETRAINED, WeightDtype

PREFIX = "LATENTD_"


class SettingsError(ValueError):
    """A setting is unknown or has a wrong value; the message names it and the value."""


class Group(StrEnum):
    """What a setting belongs to, in the order of `latentd serve --help`."""

    MODEL = "Model"
    ENGINE = "Engine"
    SESSIONS = "Sessions"
    HTTP = "HTTP"
    KEYS = "Keys and limits"
    STORAGE = "Storage"
    LOGS = "Logs and metrics"


class Settings(BaseSettings):
    """Settings of `latentd serve`; a flag wins over its environment variable."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, extra="forbid", protected_namespaces=()
    )

    checkpoint: Annotated[Path, Group.MODEL] = Field(
        PRETRAINED,
        description="Folder of the model to serve; if not given, the one in this package.",
    )
    model_name: Annotated[str, Group.MODEL] = Field(
        "", description="Name that clients use for the model; the checkpoint folder's if empty."
    )
    host: Annotated[str, Group.HTTP] = Field("127.0.0.1", description="Address to listen on.")
    port: Annotated[int, Group.HTTP] = Field(
        8000, ge=0, le=65535, description="Port to listen on; 0: any free one."
    )
    api_workers: Annotated[int, Group.HTTP] = Field(
        1,
        ge=1,
        description="Processes that own the clients' connections. With 1 the engine's process does "
        "that too; more are for thousands of tokens a second (see docs/serving.md).",
    )
    data_dir: Annotated[Path, Group.STORAGE] = Field(
        platformdirs.user_data_path("latentd"), description="Folder of the session store."
    )
    device: Annotated[Literal["auto", "cpu", "cuda"], Group.MODEL] = Field(
        "auto", description="Where the model runs."
    )
    dtype: Annotated[WeightDtype | None, Group.MODEL] = Field(
        None,
        description="Weights of matrix products; fewer bits are faster and a little less exact. If "
        "not given, float32 on a CPU and bfloat16 on a GPU. "
        "States are float32 in all cases, and a session may go on with another dtype.",
    )
    threads: Annotated[int | None, Group.MODEL] = Field(
        None,
        ge=1,
        description="CPU threads that a step uses at most; if not given, one for each core, less "
        "one for the clients where there are more than two. Steps with little to compute use one.",
    )
    max_running: Annotated[int, Group.ENGINE] = Field(
        32, ge=1, description="Sequences that run together."
    )
    warm_sessions: Annotated[int, Group.SESSIONS] = Field(
        32, ge=0, description="Sessions that keep their state on the device between turns."
    )
    max_waiting: Annotated[int, Group.ENGINE] = Field(
        256, ge=1, description="Sequences that may wait; more are refused."
    )
    max_waiting_tokens: Annotated[int, Group.ENGINE] = Field(
        1 << 20,
        ge=1,
        description="Prompt tokens of sequences that wait; requests with more are refused.",
    )
    prefill_chunk_tokens: Annotated[int, Group.ENGINE] = Field(
        512,
        ge=1,
        description="Prompt tokens that a step reads at most. Of longer prompts at most 3/4 of "
        "--max-running are read together, so that shorter ones get through.",
    )
    inter_token_latency_ms: Annotated[float, Group.ENGINE] = Field(
        100.0,
        gt=0,
        allow_inf_nan=False,
        description="Milliseconds between the tokens of a stream that may pass while prompts are "
        "read beside it: more reads prompts faster. Prompts are read in pieces that keep to it, of "
        "at least 8 tokens (64 where the model is not compiled).",
    )
    prefix_cache_bytes: Annotated[int, Group.ENGINE] = Field(
        64 << 20,
        ge=0,
        description="Device memory for states after beginnings that prompts have in common, which "
        "are then read once; 0: none.",
    )
    request_timeout_s: Annotated[float | None, Group.KEYS] = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Seconds until a request must have ended: the most that its timeout may be, "
        "and what it gets without one; no limit if not given.",
    )
    max_told_logprobs: Annotated[int, Group.KEYS] = Field(
        1 << 18,
        ge=0,
        description="Most log-probabilities that an answer may have: one for each token told, and "
        "those beside it.",
    )
    max_prompt_tokens: Annotated[int, Group.KEYS] = Field(
        131_072, ge=1, description="Longest prompt of one request."
    )
    max_tokens_limit: Annotated[int, Group.KEYS] = Field(
        65_536, ge=1, description="Largest max_tokens of a request."
    )
    default_max_tokens: Annotated[int, Group.KEYS] = Field(
        16, ge=0, description="max_tokens of a completion without it."
    )
    default_chat_max_tokens: Annotated[int, Group.KEYS] = Field(
        1024, ge=0, description="max_completion_tokens of a chat without it."
    )
    max_logprobs: Annotated[int, Group.KEYS] = Field(
        20, ge=0, description="Most probable tokens that can be asked for beside each token."
    )
    max_n: Annotated[int, Group.KEYS] = Field(16, ge=1, description="Most choices per prompt.")
    max_stop: Annotated[int, Group.KEYS] = Field(
        16, ge=1, description="Most stop strings of a request."
    )
    max_logit_bias: Annotated[int, Group.KEYS] = Field(
        300, ge=0, description="Most tokens of a request's logit_bias."
    )
    max_body_bytes: Annotated[int, Group.HTTP] = Field(
        4 << 20, ge=1024, description="Largest request body."
    )
    max_header_bytes: Annotated[int, Group.HTTP] = Field(
        32 << 10, ge=1024, description="Bytes of a request's path, headers and trailers."
    )
    max_headers: Annotated[int, Group.HTTP] = Field(
        100, ge=1, description="Headers and trailers of a request."
    )
    stall_timeout_s: Annotated[float, Group.HTTP] = Field(
        60.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds in which a client whose buffers are full must read on; otherwise it "
        "counts as gone, and its turn is rolled back.",
    )
    header_timeout_s: Annotated[float, Group.HTTP] = Field(
        30.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds in which a client must have told a request's headers.",
    )
    body_timeout_s: Annotated[float, Group.HTTP] = Field(
        60.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds in which a request's body must have arrived.",
    )
    keep_alive_timeout_s: Annotated[int, Group.HTTP] = Field(
        75,
        ge=1,
        description="Seconds that a connection may stay without a request; longer than clients and "
        "proxies keep theirs, or their next request is lost.",
    )
    host_cache_bytes: Annotated[int, Group.SESSIONS] = Field(
        256 << 20, ge=0, description="Host memory for parked states; 0: none."
    )
    durability: Annotated[Literal["sync", "async"], Group.STORAGE] = Field(
        "sync",
        description="sync: a turn is on the disk before its last event. async: it survives the end "
        "of the process, but the last turns may be lost when the machine loses its power.",
    )
    keep_turns: Annotated[int, Group.SESSIONS] = Field(
        8, ge=1, description="Turns of a session whose states are kept, to fork or rewind to."
    )
    session_ttl_s: Annotated[float | None, Group.SESSIONS] = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Seconds without use after which a session is erased: the most that its ttl "
        "may be, and what it gets without one; never if not given.",
    )
    response_ttl_s: Annotated[float | None, Group.SESSIONS] = Field(
        30 * 86400.0,
        gt=0,
        description="Seconds after which a stored response is erased: the most that its ttl may "
        "be, and what it gets without one; inf: never.",
    )
    sweep_interval_s: Annotated[float, Group.STORAGE] = Field(
        30.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds between looks for expired sessions and responses to erase, which "
        "clients do not see meanwhile.",
    )
    busy_wait_s: Annotated[float, Group.SESSIONS] = Field(
        1.5,
        ge=0,
        allow_inf_nan=False,
        description="Seconds that a turn waits for the one before it, which may just be rolled "
        "back because its client has gone; then it is refused.",
    )
    max_sessions: Annotated[int | None, Group.STORAGE] = Field(
        None, ge=0, description="Most sessions in all."
    )
    max_store_bytes: Annotated[int | None, Group.STORAGE] = Field(
        None, ge=0, description="Most bytes in the store: states, kept answers and responses."
    )
    max_sessions_per_key: Annotated[int | None, Group.KEYS] = Field(
        None, ge=0, description="Most sessions of a key."
    )
    max_responses_per_key: Annotated[int | None, Group.KEYS] = Field(
        None, ge=0, description="Most stored responses of a key."
    )
    max_bytes_per_key: Annotated[int | None, Group.KEYS] = Field(
        None, ge=0, description="Most bytes of a key's states, kept answers and responses."
    )
    api_key: Annotated[tuple[str, ...], NoDecode, Group.KEYS] = Field(
        (),
        description="Keys that clients must show, in the variable with commas between them; each "
        "sees its own sessions only. Without any key, everybody may do everything.",
    )
    key_file: Annotated[Path | None, Group.KEYS] = Field(
        None,
        description="File of further keys, which latentd keys makes and revokes while the server "
        "runs (see docs/keys.md).",
    )
    guard_metrics: Annotated[bool, Group.LOGS] = Field(
        True, description="Whether /metrics needs a key, where anything does."
    )
    key_requests_per_minute: Annotated[int | None, Group.KEYS] = Field(
        None,
        ge=1,
        description="Requests that read or write text which a key may make in a minute, if its "
        "entry in the key file says nothing else; no limit if not given. Without keys, all clients "
        "together count as one key.",
    )
    key_tokens_per_minute: Annotated[int | None, Group.KEYS] = Field(
        None,
        ge=1,
        description="Tokens that a key may have read and generated in a minute, likewise.",
    )
    key_concurrent_requests: Annotated[int | None, Group.KEYS] = Field(
        None, ge=1, description="Requests of a key that may wait or run together, likewise."
    )
    requests_per_minute: Annotated[int | None, Group.KEYS] = Field(
        None, ge=1, description="Requests in a minute of all keys together; no limit if not given."
    )
    tokens_per_minute: Annotated[int | None, Group.KEYS] = Field(
        None, ge=1, description="Tokens in a minute of all keys together; no limit if not given."
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode, Group.HTTP] = Field(
        (),
        description="Origins of web pages that may use the server, such as https://example.com, in "
        "the variable with commas between them; *: any.",
    )
    unknown_parameters: Annotated[Literal["refuse", "ignore"], Group.HTTP] = Field(
        "refuse",
        description="What becomes of parameters of a request that nobody knows; one that is "
        "ignored is logged once.",
    )
    keepalive_s: Annotated[float, Group.HTTP] = Field(
        15.0,
        gt=0,
        allow_inf_nan=False,
        description="Silence on a stream after which a comment is sent.",
    )
    grammar_timeout_s: Annotated[float, Group.KEYS] = Field(
        5.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds to compile a schema, regular expression or grammar of a request.",
    )
    max_resumable_streams: Annotated[int, Group.HTTP] = Field(
        64, ge=0, description="Streams that can be resumed; the oldest ended ones make room."
    )
    stream_buffer_bytes: Annotated[int, Group.HTTP] = Field(
        4 << 20, ge=1024, description="Most bytes kept of a resumable stream; its oldest events go."
    )
    stream_ttl_s: Annotated[float, Group.HTTP] = Field(
        300.0,
        ge=0,
        allow_inf_nan=False,
        description="Seconds that a resumable stream can be read after its end.",
    )
    drain_timeout_s: Annotated[float, Group.HTTP] = Field(
        30.0,
        ge=0,
        allow_inf_nan=False,
        description="Time for running turns to finish when the server stops; what is left is "
        "rolled back.",
    )
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Group.LOGS] = Field(
        "info", description="Least severe messages to log."
    )

    @field_validator("response_ttl_s")
    @classmethod
    def _never(cls, ttl_s: float | None) -> float | None:
        return None if ttl_s == math.inf else ttl_s

    @field_validator("api_key", "cors_origins", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(part for part in value.split(",") if part) if isinstance(value, str) else value

    @field_validator("api_key")
    @classmethod
    def _check_keys(cls, keys: tuple[str, ...]) -> tuple[str, ...]:
        for key in keys:
            if not key.isascii() or not key.isprintable() or " " in key or not key:
                raise ValueError("a key is made of printable ASCII characters without spaces")
        return keys

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            parts = urlsplit(origin)
            has_both = bool(parts.scheme and parts.netloc)
            if origin != "*" and not (has_both and origin == f"{parts.scheme}://{parts.netloc}"):
                raise ValueError("an origin is a scheme and a host, without a path, or *")
        return origins

    @property
    def served_name(self) -> str:
        """What clients call the model."""
        if self.model_name:
            return self.model_name
        return "latentd" if self.checkpoint == PRETRAINED else self.checkpoint.resolve().name


def read_settings(flags: Mapping[str, Any]) -> Settings:
    """Settings from flags by field name and from the environment. Raises SettingsError."""
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    for name in os.environ:
        if name.upper().startswith(PREFIX) and name.upper() not in known:
            raise SettingsError(f"{name}: there is no such setting")
    try:
        return Settings(**flags)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        field = str(problem["loc"][0]) if problem["loc"] else "settings"
        source = f"--{field.replace('_', '-')}" if field in flags else PREFIX + field.upper()
        raise SettingsError(f"{source}: {problem['input']!r}: {problem['msg']}") from error
