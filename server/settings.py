"""All settings, in one place: command-line flags and `LATENTD_*` variables."""

import math
import os
import resource
from collections.abc import Mapping
from enum import StrEnum
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import platformdirs
from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from model import PRETRAINED, WeightDtype

PREFIX = "LATENTD_"
SPARE_FILES = 64
"""Open files that are not connections."""

SECRETS = {"api_key"}
"""Settings whose values never appear in messages."""

DOTLESS = "<local>"
"""Pseudo host name that matches every name without a dot."""

LOOPBACK_NAMES = (DOTLESS, "*.localhost", "127.0.0.1", "::1")
"""Host names accepted by a server on the loopback: only local pages can have them."""


class SettingsError(ValueError):
    """A setting is unknown or invalid; the message names it and its value."""


class Group(StrEnum):
    """Groups of settings, in the order of `latentd serve --help`."""

    MODEL = "Model"
    ENGINE = "Engine"
    SESSIONS = "Sessions"
    HTTP = "HTTP"
    KEYS = "Keys and limits"
    STORAGE = "Storage"
    LOGS = "Logs and metrics"


class Settings(BaseSettings):
    """Settings of `latentd serve`; flags override environment variables."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, extra="forbid", protected_namespaces=()
    )

    checkpoint: Annotated[Path, Group.MODEL] = Field(
        PRETRAINED,
        description="Folder of the model to serve; default: the one in this package.",
    )
    initial_state: Annotated[tuple[str, ...], NoDecode, Group.MODEL] = Field(
        (),
        description="NAME=FILE: a tuned initial state, in the format of the model's family, that "
        "requests and sessions select by name; repeatable (comma-separated in the variable).",
    )
    model_name: Annotated[str, Group.MODEL] = Field(
        "", description="Name of the model in the API; default: the name of the checkpoint folder."
    )
    host: Annotated[str, Group.HTTP] = Field("127.0.0.1", description="Address to listen on.")
    port: Annotated[int, Group.HTTP] = Field(
        8000, ge=0, le=65535, description="Port to listen on; 0: any free port."
    )
    unix_socket: Annotated[Path | None, Group.HTTP] = Field(
        None, description="Unix socket to listen on, instead of --host and --port."
    )
    tls_certificate: Annotated[Path | None, Group.HTTP] = Field(
        None,
        description="PEM file with the certificate chain; enables HTTPS.",
    )
    tls_key: Annotated[Path | None, Group.HTTP] = Field(
        None, description="PEM file with the private key, if not in --tls-certificate."
    )
    root_path: Annotated[str, Group.HTTP] = Field(
        "",
        pattern="^(/[^/?#]+)*$",
        description="Path under which a proxy exposes the server, such as /llm, whether the proxy "
        "strips it or not.",
    )
    trusted_proxies: Annotated[tuple[str, ...], NoDecode, Group.HTTP] = Field(
        ("127.0.0.1", "::1"),
        description="Addresses and networks of proxies whose X-Forwarded-For and "
        "X-Forwarded-Proto are trusted (comma-separated in the variable); *: all. Requests over "
        "a Unix socket are always trusted.",
    )
    allowed_hosts: Annotated[tuple[str, ...], NoDecode, Group.HTTP] = Field(
        (),
        description="Names accepted in the Host header, without port, such as llm.example.com or "
        "*.example.com (comma-separated in the variable); *: any. Default: if --host is a "
        "loopback address, that address and names without a dot, which prevents DNS rebinding; "
        "otherwise any.",
    )
    api_workers: Annotated[int, Group.HTTP] = Field(
        1,
        ge=1,
        description="Processes that handle HTTP. With 1 the engine's process does that too; use "
        "more for thousands of tokens per second (see docs/serving.md).",
    )
    data_dir: Annotated[Path, Group.STORAGE] = Field(
        platformdirs.user_data_path("latentd"), description="Folder of the session store."
    )
    device: Annotated[Literal["auto", "cpu", "cuda"], Group.MODEL] = Field(
        "auto", description="Device of the model."
    )
    dtype: Annotated[WeightDtype | None, Group.MODEL] = Field(
        None,
        description="Dtype of the matrix weights; fewer bits are faster and slightly less "
        "accurate. Default: the file's for a published model; for a model trained with latentd, "
        "float32 on a CPU and bfloat16 on a GPU. "
        "States are always float32, and a session can continue under another dtype.",
    )
    threads: Annotated[int | None, Group.MODEL] = Field(
        None,
        ge=1,
        description="Maximum CPU threads of a step; default: one per core, minus one for "
        "serving clients if there are more than two. Small steps use one thread.",
    )
    max_running: Annotated[int | None, Group.ENGINE] = Field(
        None,
        ge=1,
        description="Maximum sequences that run concurrently; default: 32, or as many as memory "
        "permits.",
    )
    warm_sessions: Annotated[int | None, Group.SESSIONS] = Field(
        None,
        ge=0,
        description="Sessions whose state stays on the device between turns; default: 32, "
        "or as many as memory permits.",
    )
    max_waiting: Annotated[int, Group.ENGINE] = Field(
        256, ge=1, description="Maximum number of waiting sequences; more are rejected."
    )
    max_waiting_tokens: Annotated[int, Group.ENGINE] = Field(
        1 << 20,
        ge=1,
        description="Maximum prompt tokens of waiting sequences; more are rejected.",
    )
    prefill_chunk_tokens: Annotated[int, Group.ENGINE] = Field(
        512,
        ge=1,
        description="Maximum prompt tokens per step. At most 3/4 of "
        "--max-running may be longer prompts, so that shorter ones get through.",
    )
    inter_token_latency_ms: Annotated[float, Group.ENGINE] = Field(
        100.0,
        gt=0,
        allow_inf_nan=False,
        description="Target latency in milliseconds between tokens of a stream while prompts are "
        "prefilled; higher values speed up prefill. Prompts are read in pieces of "
        "at least 8 tokens (64 if the model is not compiled).",
    )
    prefix_cache_bytes: Annotated[int | None, Group.ENGINE] = Field(
        None,
        ge=0,
        description="Device memory for the prefix cache: states after shared prompt prefixes, "
        "which are then read once; 0: none. Default: 64 MiB or 16 states, whichever is more, "
        "as far as memory permits.",
    )
    step_hang_timeout_s: Annotated[float, Group.ENGINE] = Field(
        300.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds after which an engine step counts as hung: /health/live then fails, "
        "so that the process is restarted.",
    )
    request_timeout_s: Annotated[float | None, Group.KEYS] = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Maximum and default of a request's timeout, in seconds; default: no limit.",
    )
    max_response_logprobs: Annotated[int, Group.KEYS] = Field(
        1 << 18,
        ge=0,
        description="Maximum number of log-probabilities in an answer, alternatives included.",
    )
    max_prompt_tokens: Annotated[int, Group.KEYS] = Field(
        131_072, ge=1, description="Maximum prompt tokens per request."
    )
    max_tokens_limit: Annotated[int, Group.KEYS] = Field(
        65_536, ge=1, description="Maximum of a request's max_tokens."
    )
    default_max_tokens: Annotated[int, Group.KEYS] = Field(
        16, ge=0, description="Default max_tokens of a completion."
    )
    default_chat_max_tokens: Annotated[int, Group.KEYS] = Field(
        1024, ge=0, description="Default max_completion_tokens of a chat."
    )
    max_logprobs: Annotated[int, Group.KEYS] = Field(
        20, ge=0, description="Maximum number of alternatives with log-probabilities per position."
    )
    max_n: Annotated[int, Group.KEYS] = Field(16, ge=1, description="Maximum choices per prompt.")
    max_stop: Annotated[int, Group.KEYS] = Field(
        16, ge=1, description="Maximum stop strings per request."
    )
    max_logit_bias: Annotated[int, Group.KEYS] = Field(
        300, ge=0, description="Maximum tokens in a request's logit_bias."
    )
    max_body_bytes: Annotated[int, Group.HTTP] = Field(
        4 << 20, ge=1024, description="Maximum bytes of a request body."
    )
    max_held_bytes: Annotated[int, Group.HTTP] = Field(
        256 << 20,
        ge=1 << 20,
        description="Maximum bytes of the bodies of all requests that are being received, are "
        "prepared or wait for their turn; in any case one body of each kind.",
    )
    max_connections: Annotated[int, Group.HTTP] = Field(
        4096,
        ge=1,
        description="Maximum client connections, also per front process; fewer if the limit of "
        "open files is lower. For a new connection, the one idle for longest is closed, "
        "or the new one if none is idle.",
    )
    max_header_bytes: Annotated[int, Group.HTTP] = Field(
        32 << 10, ge=1024, description="Maximum bytes of a request's path, headers and trailers."
    )
    max_headers: Annotated[int, Group.HTTP] = Field(
        100, ge=1, description="Maximum number of headers and trailers per request."
    )
    stall_timeout_s: Annotated[float, Group.HTTP] = Field(
        60.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds after which a client that reads nothing while its buffers are full "
        "counts as disconnected, and its turn is rolled back.",
    )
    header_timeout_s: Annotated[float, Group.HTTP] = Field(
        30.0,
        gt=0,
        allow_inf_nan=False,
        description="Time limit for receiving a request's headers, in seconds.",
    )
    body_timeout_s: Annotated[float, Group.HTTP] = Field(
        60.0,
        gt=0,
        allow_inf_nan=False,
        description="Time limit for receiving a request's body, in seconds.",
    )
    keep_alive_timeout_s: Annotated[int, Group.HTTP] = Field(
        75,
        ge=1,
        description="Seconds that an idle connection stays open; set it above the value of clients "
        "and proxies, or they may lose a request.",
    )
    host_cache_bytes: Annotated[int | None, Group.SESSIONS] = Field(
        None,
        ge=0,
        description="Host memory for parked states; 0: none. Default: 256 MiB or 32 states, "
        "whichever is more, as far as memory permits.",
    )
    durability: Annotated[Literal["sync", "async"], Group.STORAGE] = Field(
        "sync",
        description="sync: a turn is on disk before its last event. async: it survives a crash of "
        "the process, but the last turns may be lost in a power failure.",
    )
    min_free_bytes: Annotated[int, Group.STORAGE] = Field(
        64 << 20,
        ge=0,
        description="Free bytes on the store's disk below which the server is not ready, though it "
        "continues; at most a twentieth of the disk, at least two states.",
    )
    keep_turns: Annotated[int | None, Group.SESSIONS] = Field(
        None,
        ge=1,
        description="Checkpoints per session: last turns that can be forked or rewound to; "
        "default: 8, or 2 to 7 if their states would exceed 64 MiB.",
    )
    session_ttl_s: Annotated[float | None, Group.SESSIONS] = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Maximum and default of a session's ttl: seconds without use after which it "
        "expires; default: never.",
    )
    response_ttl_s: Annotated[float | None, Group.SESSIONS] = Field(
        30 * 86400.0,
        gt=0,
        description="Maximum and default of a stored response's ttl: seconds after which it "
        "expires; inf: never.",
    )
    sweep_interval_s: Annotated[float, Group.STORAGE] = Field(
        30.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds between sweeps that erase expired sessions and responses, which are "
        "already invisible.",
    )
    session_wait_s: Annotated[float, Group.SESSIONS] = Field(
        1.5,
        ge=0,
        allow_inf_nan=False,
        description="Seconds that a turn waits for a busy session, whose turn may be rolling back "
        "after a disconnect, before it is rejected.",
    )
    max_sessions: Annotated[int | None, Group.STORAGE] = Field(
        None, ge=0, description="Maximum number of sessions."
    )
    max_store_bytes: Annotated[int | None, Group.STORAGE] = Field(
        None, ge=0, description="Maximum bytes in the store: states, answers and responses."
    )
    max_sessions_per_key: Annotated[int | None, Group.KEYS] = Field(
        None, ge=0, description="Maximum sessions per key."
    )
    max_responses_per_key: Annotated[int | None, Group.KEYS] = Field(
        None, ge=0, description="Maximum stored responses per key."
    )
    max_bytes_per_key: Annotated[int | None, Group.KEYS] = Field(
        None, ge=0, description="Maximum bytes per key: states, answers and responses."
    )
    api_key: Annotated[tuple[str, ...], NoDecode, Group.KEYS] = Field(
        (),
        description="API keys (comma-separated in the variable); each sees only its own sessions. "
        "Without keys, anyone has full access.",
    )
    key_file: Annotated[Path | None, Group.KEYS] = Field(
        None,
        description="File with further keys, managed by latentd keys while the server runs (see "
        "docs/keys.md).",
    )
    protect_metrics: Annotated[bool, Group.LOGS] = Field(
        True, description="Whether /metrics needs a key, if keys are required."
    )
    key_requests_per_minute: Annotated[int | None, Group.KEYS] = Field(
        None,
        ge=1,
        description="Requests that read, generate or copy states, per minute and key, unless the "
        "key file says otherwise; default: no limit. Without keys, all clients together count as "
        "one key.",
    )
    key_tokens_per_minute: Annotated[int | None, Group.KEYS] = Field(
        None,
        ge=1,
        description="Prompt and generated tokens per minute and key, likewise.",
    )
    key_concurrent_requests: Annotated[int | None, Group.KEYS] = Field(
        None, ge=1, description="Waiting and running requests per key, likewise."
    )
    key_concurrent_sequences: Annotated[int | None, Group.KEYS] = Field(
        None,
        ge=1,
        description="Waiting and running sequences per key, likewise: a request has n "
        "for each of its prompts.",
    )
    requests_per_minute: Annotated[int | None, Group.KEYS] = Field(
        None, ge=1, description="Requests per minute of all keys together; default: no limit."
    )
    tokens_per_minute: Annotated[int | None, Group.KEYS] = Field(
        None, ge=1, description="Tokens per minute of all keys together; default: no limit."
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode, Group.HTTP] = Field(
        (),
        description="Web origins that may use the server, such as https://example.com "
        "(comma-separated in the variable); *: any.",
    )
    unknown_parameters: Annotated[Literal["refuse", "ignore"], Group.HTTP] = Field(
        "refuse",
        description="Handling of unknown request parameters; ignored names are logged once.",
    )
    stream_keepalive_s: Annotated[float, Group.HTTP] = Field(
        15.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds of silence after which a stream sends a keep-alive comment.",
    )
    grammar_timeout_s: Annotated[float, Group.KEYS] = Field(
        5.0,
        gt=0,
        allow_inf_nan=False,
        description="Time limit for compiling a schema, regular expression or grammar, in seconds.",
    )
    max_resumable_streams: Annotated[int, Group.HTTP] = Field(
        64,
        ge=0,
        description="Maximum resumable streams; the oldest finished ones are dropped first.",
    )
    stream_buffer_bytes: Annotated[int, Group.HTTP] = Field(
        4 << 20,
        ge=1024,
        description="Maximum stored bytes per resumable stream; the oldest events are dropped.",
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
        description="Seconds for running turns to finish on shutdown; the rest are rolled back.",
    )
    metrics_address: Annotated[str | None, Group.LOGS] = Field(
        None,
        pattern=r"^(\[[0-9A-Fa-f:.]+\]|[^:\[\]]+):[0-9]{1,5}$",
        description="Address and port, such as 127.0.0.1:9090, to serve /metrics on instead of "
        "with the API, without a key.",
    )
    metrics_names: Annotated[Literal["latentd", "vllm"], Group.LOGS] = Field(
        "latentd",
        description="vllm: also export the vLLM metrics that gateways use.",
    )
    otel: Annotated[bool, Group.LOGS] = Field(
        False,
        description="Export traces and metrics by OTLP over HTTP, configured by OpenTelemetry's "
        "OTEL_* variables; needs latentd[otel].",
    )
    log_format: Annotated[Literal["json", "console"] | None, Group.LOGS] = Field(
        None,
        description="Format of the log on stderr; default: console on a terminal, otherwise json.",
    )
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Group.LOGS] = Field(
        "info", description="Minimum level of log messages."
    )

    @field_validator("response_ttl_s")
    @classmethod
    def _never(cls, ttl_s: float | None) -> float | None:
        return None if ttl_s == math.inf else ttl_s

    @field_validator(
        *("api_key", "cors_origins", "trusted_proxies", "allowed_hosts", "initial_state"),
        mode="before",
    )
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(part for part in value.split(",") if part) if isinstance(value, str) else value

    @field_validator("api_key", mode="before")
    @classmethod
    def _refuse_unset_secret(cls, value: Any) -> Any:
        """Reject an empty variable: it may be a missing secret, and must not disable
        authentication."""
        if isinstance(value, str) and not value.strip(", "):
            raise ValueError("it is empty: leave it unset to serve without keys")
        return value

    @field_validator("api_key")
    @classmethod
    def _check_keys(cls, keys: tuple[str, ...]) -> tuple[str, ...]:
        for key in keys:
            if not key.isascii() or not key.isprintable() or " " in key or not key:
                raise ValueError("a key must consist of printable ASCII characters without spaces")
        return keys

    @field_validator("initial_state")
    @classmethod
    def _check_states(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        names = [each.partition("=")[0] for each in given]
        if any(
            not each.partition("=")[2] or not name for each, name in zip(given, names, strict=True)
        ):
            raise ValueError("an initial state is given as NAME=FILE")
        if len(set(names)) < len(names):
            raise ValueError("two initial states have the same name")
        return given

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            parts = urlsplit(origin)
            has_both = bool(parts.scheme and parts.netloc)
            if origin != "*" and not (has_both and origin == f"{parts.scheme}://{parts.netloc}"):
                raise ValueError("an origin is a scheme and a host, without a path, or *")
        return origins

    @field_validator("trusted_proxies")
    @classmethod
    def _check_proxies(cls, proxies: tuple[str, ...]) -> tuple[str, ...]:
        for proxy in proxies:
            if proxy != "*":
                ip_network(proxy)  # its error names the address
        return proxies

    @field_validator("tls_certificate")
    @classmethod
    def _check_certificate(cls, file: Path | None, info: ValidationInfo) -> Path | None:
        if file is not None and info.data.get("unix_socket") is not None:
            raise ValueError("TLS is not supported on a Unix socket: set only one of them")
        return file

    @field_validator("tls_key")
    @classmethod
    def _check_key(cls, key: Path | None, info: ValidationInfo) -> Path | None:
        if key is not None and info.data.get("tls_certificate") is None:
            raise ValueError("a key needs --tls-certificate")
        return key

    @property
    def known_hosts(self) -> tuple[str, ...]:
        """Accepted host names; empty: any."""
        if self.allowed_hosts:
            return () if "*" in self.allowed_hosts else self.allowed_hosts
        if self.unix_socket is not None or not _is_loopback(self.host):
            return ()
        return (*LOOPBACK_NAMES, self.host)

    @property
    def connection_limit(self) -> int:
        """`max_connections`, limited by the process's open files."""
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if files == resource.RLIM_INFINITY:
            return self.max_connections
        return max(1, min(self.max_connections, files - SPARE_FILES))

    @property
    def has_keys(self) -> bool:
        """Whether keys are required: also with an empty key file, whose last key may have been
        revoked."""
        return bool(self.api_key) or self.key_file is not None

    @property
    def served_name(self) -> str:
        """The model's name in the API."""
        if self.model_name:
            return self.model_name
        return "latentd" if self.checkpoint == PRETRAINED else self.checkpoint.resolve().name


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:  # another name
        return False


def read_settings(flags: Mapping[str, Any]) -> Settings:
    """Read settings from flags (by field name) and the environment. Raises SettingsError."""
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    given = {k: v for k, v in os.environ.items() if k.upper().startswith(PREFIX)}
    for name, value in given.items():
        if value.startswith(("tcp://", "udp://", "sctp://")) or name.endswith("_SERVICE_HOST"):
            raise SettingsError(
                f"{name}: {value!r}: this is a Kubernetes service link, of a service whose name "
                "begins with latentd, not a setting: set enableServiceLinks: false in the pod spec"
            )
    for name in given:
        if name.upper() not in known:
            raise SettingsError(f"{name}: unknown setting")
    try:
        return Settings(**flags)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        field = str(problem["loc"][0]) if problem["loc"] else "settings"
        source = f"--{field.replace('_', '-')}" if field in flags else PREFIX + field.upper()
        value = "" if field in SECRETS else f"{problem['input']!r}: "
        raise SettingsError(f"{source}: {value}{problem['msg']}") from error
