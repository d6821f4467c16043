"""``bon serve``."""

from __future__ import annotations

import logging
import os
from typing import Annotated

import typer

from bon.cli.options import Choice, Number, Policy, Setup, configured, grouped, option, threads_for
from bon.errors import InputError, MissingExtraError

log = logging.getLogger("bon.serve")

_SERVER, _LIMITS = "Server", "Limits"


@grouped
def serve(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]", help="What writes candidates: model, folder or URL; the embedded model by default."
        ),
    ] = None,
    *,
    setup: Setup,
    policy: Policy = None,
    number: Number,
    choice: Choice,
    host: Annotated[
        str, option(_SERVER, "--host", metavar="ADDRESS", help="0.0.0.0 to be reached by others.")
    ] = "127.0.0.1",
    port: Annotated[int, option(_SERVER, "--port", metavar="PORT", help="0 takes any free one.")] = 8000,
    served_model_name: Annotated[
        list[str] | None,
        option(
            _SERVER,
            "--served-model-name",
            metavar="NAME",
            help="Name that clients may ask for, in place of the policy's own; repeatable.",
        ),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        option(
            _SERVER, "--api-key", metavar="KEY", help="Key that clients must send; repeatable. Or BON_API_KEY=KEY,KEY."
        ),
    ] = None,
    also: Annotated[
        list[str] | None,
        option(
            _SERVER,
            "--also",
            metavar="[NAME=]SCORER",
            help="A further scorer that requests may name, as --scorer takes it; repeatable.",
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None, option(_SERVER, "--cors-origin", metavar="ORIGIN", help="Whose pages may call; repeatable.")
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        option(_SERVER, "--allowed-host", metavar="NAME", help="Host header to answer to; repeatable."),
    ] = None,
    playground: Annotated[
        bool | None, option(_SERVER, "--playground/--no-playground", help="The page at /; on loopback by default.")
    ] = None,
    log_prompts: Annotated[
        bool, option(_SERVER, "--log-prompts", help="Write prompts and answers to the log.")
    ] = False,
    max_n: Annotated[int, option(_LIMITS, "--max-n", metavar="N", help="Candidates that a request may ask for.")] = 64,
    max_running: Annotated[
        int | None,
        option(_LIMITS, "--max-running", metavar="R", help="Requests at the same time; 64, 8 or 1 by engine."),
    ] = None,
    max_waiting: Annotated[
        int, option(_LIMITS, "--max-waiting", metavar="W", help="Requests in the queue; the next one gets 429.")
    ] = 256,
    max_connections: Annotated[
        int | None,
        option(_LIMITS, "--max-connections", metavar="C", help="Connections; half of the open files by default."),
    ] = None,
    deadline: Annotated[
        float, option(_LIMITS, "--deadline", metavar="S", help="Seconds a request may take, waiting included.")
    ] = 600.0,
    drain: Annotated[
        float, option(_LIMITS, "--drain", metavar="S", help="Seconds to finish what runs after SIGTERM.")
    ] = 30.0,
) -> int:
    """Answer OpenAI's API with the best of N.

    Clients change their base URL to http://127.0.0.1:8000/v1. The log goes to standard error, one JSON object a line.
    """
    if model is not None and policy is not None:
        raise InputError(f"the policy is given twice, as {model!r} and as --policy {policy!r}.")
    try:
        from bon.serve.logs import log_json
        from bon.serve.process import bind, serve
        from bon.serve.settings import Settings
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"the server needs the package {error.name!r}, which", "pip install 'bon[serve]'"
        ) from error
    log_json()  # first, so that whatever is said of settings and models is a line of the log
    config = configured(setup, number, choice, policy=model if policy is None else policy)
    keys = [key.strip() for key in os.environ.get("BON_API_KEY", "").split(",") if key.strip()]
    if not 0 <= port < 65536:
        raise InputError(f"--port must be from 0 to 65535, got {port}.")
    settings = Settings(
        host=host,
        port=port,
        model_names=tuple(served_model_name or ()),
        scorers=tuple(also or ()),
        api_keys=(*keys, *(api_key or ())),
        max_n=max_n,
        max_running=max_running,
        max_waiting=max_waiting,
        max_connections=max_connections,
        deadline_s=deadline,
        drain_s=drain,
        cors_origins=tuple(cors_origin or ()),
        allowed_hosts=tuple(allowed_host) if allowed_host else None,
        playground=playground,
        log_prompts=log_prompts,
    )
    # The address first, as models take minutes to load.
    with bind(settings.host, settings.port) as listening:
        log.info("loading %s", " and ".join(filter(None, [config.policy or "the embedded model", config.scorer])))
        with config.changed(threads=threads_for(config)).build() as bon:
            serve(bon, settings, listening)
    return 0
