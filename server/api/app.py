"""The FastAPI application; its lifespan builds the service and shuts it down."""

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute

from model.checkpoint import Checkpoint, read_initial_state
from model.decoding.grammar import GrammarCompiler
from model.state import StateSpec
from server import __version__
from server.api import (
    chat,
    completions,
    health,
    models,
    openapi,
    problems,
    responses,
    resumption,
    sessions,
    tokens,
    usage,
)
from server.api.auth import AuthMiddleware, KeyRing
from server.api.conversation import Conversation
from server.api.generation.deliver import TIMING_HEADERS
from server.api.generation.router import Router
from server.api.held import HeldBytes
from server.api.hosts import HostMiddleware
from server.api.limits import KINDS, Limiter
from server.api.middleware import REQUEST_ID, RequestMiddleware, Trace
from server.api.pages import PageMiddleware
from server.api.schemas.unknown import UnknownParameters
from server.api.service import Service
from server.api.streams import StreamLimits, Streams
from server.engine.engine import Engine, EngineLimits
from server.engine.messages import Event, RowReleased, StoredState
from server.engine.sizes import Sizes, choose, free_memory
from server.errors import ShuttingDown, StorageFailed, Unauthorized
from server.metrics import GatewayMetrics, Metrics
from server.sessions.cache import HostCache
from server.sessions.codec import Codec
from server.sessions.ledger import Ledger
from server.sessions.models import SHORT, count_models, describe_counts
from server.sessions.quota import Quota, Quotas
from server.sessions.store import Store
from server.sessions.tiers import Tiers
from server.settings import Settings

NO_TELEMETRY: Any = {
    **dict.fromkeys(("tracing", "metrics", "logs", "operation_spans"), False),
    "auto_configure": False,
}
"""The framework's own telemetry, which is slow and records content; ours is server.telemetry."""

LAG_INTERVAL_S = 0.1
"""Interval of the event loop lag probe."""

HEALTH_INTERVAL_S = 1.0
"""Interval of health checks, if no request to /metrics triggers them."""

KEY_FILE_INTERVAL_S = 1.0
"""Polling interval of the key file: one stat while nothing changes."""

EXPOSED_HEADERS = (
    *(REQUEST_ID, "X-Session-ID", "X-Session-Turn", "X-Stream-ID", "Idempotent-Replayed"),
    *TIMING_HEADERS,
    *("Retry-After", "x-should-retry", "Content-Disposition", "Allow", "Accept-Encoding"),
    *(f"x-ratelimit-{what}-{kind}" for kind in KINDS for what in ("limit", "remaining", "reset")),
)
log = logging.getLogger(__name__)


def create_app(
    settings: Settings, checkpoint: Checkpoint, store: Store, trace: Trace | None = None
) -> FastAPI:
    """An app that serves one checkpoint; it closes the store on shutdown. `trace` receives the
    records of its requests.

    Raises InvalidTemplate for an invalid chat template, KeyFileError, SizeError if the states do
    not fit in memory, and CheckpointError for an initial state of another model.
    """
    metrics, keys, limiter = Metrics(), KeyRing(settings), Limiter(settings)
    network = checkpoint.network
    codec = Codec(
        checkpoint.fingerprint,
        network.state_spec.tensors,
        network.vocab_size,
        network.arithmetic,
    )
    conversation = _conversation(checkpoint)
    initial = _initial_states(settings, network.state_spec)
    sizes = choose(settings, codec.state_bytes, free_memory(network.device))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service = _build(
            settings, sizes, checkpoint, store, codec, conversation, metrics, limiter, initial
        )
        await _recover(service.ledger)
        service.engine.start()
        app.state.service, app.state.loop = service, asyncio.get_running_loop()
        sweeping = _sweep(service, settings.sweep_interval_s)
        chores = [asyncio.create_task(sweeping), asyncio.create_task(_measure_lag(metrics))]
        chores.append(asyncio.create_task(_report_models(store, codec, settings.data_dir)))
        if settings.metrics_address is not None:
            chores.append(asyncio.create_task(_watch_health(service)))
        if settings.key_file is not None:
            chores.append(asyncio.create_task(_watch(keys, service)))
        try:
            yield
        finally:
            for chore in chores:
                chore.cancel()
            await asyncio.wait(chores)
            await service.streams.close()
            await asyncio.to_thread(service.texts.close)
            await asyncio.to_thread(service.grammars.close)
            await asyncio.to_thread(service.ledger.close)
            await asyncio.to_thread(service.engine.stop)
            await store.close()

    app = FastAPI(
        title="latentd",
        description=openapi.DESCRIPTION,
        openapi_tags=openapi.TAGS,
        version=__version__,
        lifespan=lifespan,
        redirect_slashes=False,
        telemetry=NO_TELEMETRY,
    )
    parts = (completions, chat, responses, sessions, resumption, tokens, usage, models, health)
    routers = [part.router for part in parts]
    if settings.metrics_address is None:
        routers.append(health.metrics_router)
    for router in routers:
        app.include_router(router)
    routes = (route for router in routers for route in router.routes)
    metrics.add_endpoints({route.path for route in routes if isinstance(route, APIRoute)})
    if settings.metrics_names == "vllm":
        GatewayMetrics(metrics, settings.served_name, sizes.max_running)
    problems.install(app, metrics)
    openapi.complete(app, settings, requires_keys=keys.requires_keys)
    app.add_middleware(
        AuthMiddleware,
        keys=keys,
        protect_metrics=settings.protect_metrics,
        most=settings.max_connections,
        held=HeldBytes(max(settings.max_held_bytes, settings.max_body_bytes, codec.max_blob_bytes)),
    )
    if settings.known_hosts:
        app.add_middleware(HostMiddleware, hosts=settings.known_hosts)
    app.add_middleware(
        RequestMiddleware,
        metrics=metrics,
        limiter=limiter,
        unknown=UnknownParameters(settings.unknown_parameters),
        body_timeout_s=settings.body_timeout_s,
        max_body_bytes=settings.max_body_bytes,
        max_bytes_by_path={sessions.PREFIX + sessions.IMPORT: codec.max_blob_bytes},
        root_path=settings.root_path,
        trace=trace,
    )
    app.state.metrics, app.state.sizes = metrics, sizes
    if settings.cors_origins:  # outermost, so that web pages can read errors, too
        app.add_middleware(PageMiddleware, origins=settings.cors_origins, exposed=EXPOSED_HEADERS)
    return app


async def drain(app: FastAPI) -> None:
    """Let running turns finish or roll them back. May be called before startup."""
    service = getattr(app.state, "service", None)
    if isinstance(service, Service):
        await service.drain()


def erase_owner(app: FastAPI, owner: str) -> str:
    """End an owner's requests and erase all its data. Returns a description of what was erased.

    Called from a thread other than the event loop's. Raises LatentdError.
    """
    service = getattr(app.state, "service", None)
    if not isinstance(service, Service):
        raise ShuttingDown("the server has not started yet")
    erasing = asyncio.run_coroutine_threadsafe(service.erase(owner), app.state.loop)
    return describe_counts(erasing.result()) or "nothing"


def engine_limits(settings: Settings, sizes: Sizes) -> EngineLimits:
    """The engine's part of the settings."""
    return EngineLimits(
        max_running=sizes.max_running,
        warm_sessions=sizes.warm_sessions,
        max_waiting=settings.max_waiting,
        max_waiting_tokens=settings.max_waiting_tokens,
        prefill_chunk_tokens=settings.prefill_chunk_tokens,
        inter_token_latency_s=settings.inter_token_latency_ms / 1000,
        prefix_cache_bytes=sizes.prefix_cache_bytes,
        max_waiting_bytes=sizes.waiting_bytes,
    )


def _quotas(settings: Settings) -> Quotas:
    return Quotas(
        sessions_per_owner=settings.max_sessions_per_key,
        responses_per_owner=settings.max_responses_per_key,
        bytes_per_owner=settings.max_bytes_per_key,
        sessions=settings.max_sessions,
        bytes=settings.max_store_bytes,
    )


def _initial_states(settings: Settings, spec: StateSpec) -> dict[str, StoredState]:
    """Raises CheckpointError."""
    found = dict[str, StoredState]()
    for given in settings.initial_state:
        name, _, file = given.partition("=")
        data = read_initial_state(settings.checkpoint, Path(file), spec)
        found[name] = StoredState(f"initial {hashlib.sha256(data).hexdigest()}", data, True)
    return found


def _conversation(checkpoint: Checkpoint) -> Conversation | None:
    """Raises InvalidTemplate."""
    if checkpoint.chat_template is None:
        return None
    network = checkpoint.network
    ends = network.eos
    return Conversation(
        checkpoint.chat_template,
        checkpoint.tokenizer,
        network.bos,
        ends[0] if ends else None,
    )


def _grammars(checkpoint: Checkpoint) -> GrammarCompiler:
    network = checkpoint.network
    return GrammarCompiler(checkpoint.tokenizer, network.vocab_size, network.eos)


async def _measure_lag(metrics: Metrics) -> None:
    """Measure the event loop's lag, forever."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + LAG_INTERVAL_S
        await asyncio.sleep(LAG_INTERVAL_S)
        metrics.event_loop_lag_seconds.observe(max(0.0, loop.time() - due))


async def _watch_health(service: Service) -> None:
    """Keep the health metrics fresh if no request to /metrics does, forever."""
    while True:
        await health.check_readiness(service)
        await asyncio.sleep(HEALTH_INTERVAL_S)


async def _watch(keys: KeyRing, service: Service) -> None:
    """Apply changes of the key file, forever; requests of revoked keys are aborted."""
    while True:
        await asyncio.sleep(KEY_FILE_INTERVAL_S)
        for owner in await asyncio.to_thread(keys.refresh):
            service.end_turns(owner, Unauthorized("this API key was revoked"))


async def _recover(ledger: Ledger) -> None:
    """Mark responses that the last process left unfinished as failed."""
    try:
        interrupted = await ledger.recover()
    except StorageFailed as error:
        log.warning("interrupted responses cannot be marked as failed yet: %s", error)
    else:
        if interrupted:
            log.warning("%d background responses were interrupted", interrupted)


async def _report_models(store: Store, codec: Codec, data_dir: Path) -> None:
    """Log which stored sessions and responses belong to other models."""
    try:
        counts = await count_models(store)
    except StorageFailed as error:
        log.warning("cannot determine the models of the stored states: %s", error)
        return
    for fingerprint, count in counts.items():
        if fingerprint and fingerprint != codec.fingerprint:
            log.warning(
                "the store has %s of the model with fingerprint %s, which this model (fingerprint "
                "%s) cannot continue; serve that model again, or stop the server and erase them "
                "with `latentd erase-model %s --data-dir %s`",
                *(describe_counts(count), fingerprint[:SHORT], codec.fingerprint[:SHORT]),
                *(fingerprint[:SHORT], data_dir),
            )


async def _sweep(service: Service, every_s: float) -> None:
    """Erase expired sessions, responses and streams, forever."""
    while True:
        service.streams.forget_expired()
        try:
            swept = await service.ledger.sweep()
        except StorageFailed as error:
            log.warning("expired sessions and responses cannot be erased yet: %s", error)
            swept = 0
        if not swept:
            await asyncio.sleep(every_s)


def _build(
    settings: Settings,
    sizes: Sizes,
    checkpoint: Checkpoint,
    store: Store,
    codec: Codec,
    conversation: Conversation | None,
    metrics: Metrics,
    limiter: Limiter,
    initial_states: Mapping[str, StoredState],
) -> Service:
    loop = asyncio.get_running_loop()

    def deliver(events: list[Event | RowReleased]) -> None:
        loop.call_soon_threadsafe(router.dispatch, events)

    engine = Engine(checkpoint, engine_limits(settings, sizes), deliver, metrics)
    tiers = Tiers(
        HostCache(sizes.host_cache_bytes), store, codec.state_bytes, metrics, engine.release
    )
    quota = Quota(store, _quotas(settings))
    router = Router(tiers)
    metrics.model_info.labels(
        model=settings.served_name,
        fingerprint=checkpoint.fingerprint[:12],
        device=str(checkpoint.network.device),
    ).set(1)
    return Service(
        settings=settings,
        checkpoint=checkpoint,
        model_name=settings.served_name,
        created=int(checkpoint.modified_at),
        metrics=metrics,
        ledger=Ledger(
            store,
            tiers,
            quota,
            codec,
            metrics,
            keep_turns=sizes.keep_turns,
            session_wait_s=settings.session_wait_s,
            max_response_ttl_s=settings.response_ttl_s,
        ),
        engine=engine,
        router=router,
        conversation=conversation,
        grammars=_grammars(checkpoint),
        streams=Streams(
            StreamLimits(
                settings.max_resumable_streams,
                settings.stream_buffer_bytes,
                settings.stream_ttl_s,
            ),
            store.now,
        ),
        limiter=limiter,
        initial_states=initial_states,
    )
