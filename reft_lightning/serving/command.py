"""``reft-serve FOLDER [FOLDER ...]``: load a base model once with all adapters, and answer requests."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

from transformers import PreTrainedModel

from ..adapters.reft.adapter_set import DEFAULT
from ..adapters.reft.config import CONFIG_FILE
from ..adapters.reft.model import ReftModel
from ..base_models.fingerprint import fingerprint_of
from ..base_models.vision import image_tokens
from ..config import compose
from ..config.schema import Config
from ..runs.arguments import hf_config_of, model_source
from ..runs.build import load_to_write
from ..runs.kinds import KINDS, Kind
from ..runs.prompting import PromptFormat
from ..runs.run_folder import at_commit, load_run_config, warn_of_other_base
from ..suggest import needs_extra
from .engine import Engine, change_for_all

log = logging.getLogger(__name__)

BASE = "base"  # the frozen model's name in requests
LOOPBACK = ("127.0.0.1", "localhost", "::1")
TOKEN = "REFT_SERVE_TOKEN"  # the environment variable
# s: clients drop idle connections after 5 to 60; if the server did so first, a client might be writing
KEEP_ALIVE = 75


def main(
    folders: Mapping[str, Path],
    model: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    max_batch: int = 16,
) -> None:
    """Serve adapters until interrupted, and the base model unless its only adapter changes it.

    ``folders`` maps names in requests to runs or adapters. The base model is ``model``, a file in ``conf/model``, or
    that of the first run. An address reachable from other machines needs a token; up to ``max_batch`` rows are
    generated together.

    Raises:
        ValueError, OSError: before weights are loaded, for folders or addresses that cannot be used.
    """
    token = os.environ.get(TOKEN) or None
    if host not in LOOPBACK and token is None:
        raise ValueError(
            f"host={host} can be reached from other machines, so anybody could use this model: set the environment "
            f"variable {TOKEN} to a secret, such as {secrets.token_urlsafe(16)}, which clients send as their API "
            "key; or leave out host, to listen on this machine only"
        )
    with needs_extra("serve", "reft-serve needs FastAPI and uvicorn"):
        import uvicorn

        from .app import Served, Server, build_app
    runs = {
        name: at_commit(load_run_config(folder), folder)
        for name, folder in folders.items()
        if (folder / "config.yaml").is_file()
    }
    formats = {name: PromptFormat.of(config, folders[name]) for name, config in runs.items()}
    adapters = {name: folder / "adapter" if name in runs else folder for name, folder in folders.items()}
    for name, adapter in adapters.items():
        if not (adapter / CONFIG_FILE).is_file():
            raise ValueError(
                f"{folders[name]} must be a run that trained interventions, or their adapter: there is no "
                f"{adapter / CONFIG_FILE}"
            )
    if model is None and not runs:
        raise ValueError(
            "none of the folders is a run, whose config.yaml would name the base model: add model=NAME, a file in "
            "conf/model, such as model=smollm2_135m"
        )
    config = compose.compose([f"model={model}"]) if model else next(iter(runs.values()))
    base, reader, _ = load_to_write(config, _kind(config, formats.values()))
    for name in runs:
        warn_of_other_base(folders[name], fingerprint_of(base))
    reft, names = load_adapters(base, adapters)
    for name, inner in names.items():
        trained_on = reft.adapters[inner].config.base_model
        if trained_on and Path(trained_on).name != Path(config.model.name).name:
            log.warning("%s was trained on %s; it is served on %s", name, trained_on, config.model.name)
    served = {name: Served(inner, formats.get(name)) for name, inner in names.items()}
    engine = Engine(reft, reader, max_batch)
    if not engine.alone:
        served = {BASE: Served(None), **served}
    app = build_app(engine, served, token)
    log.info("models: %s", ", ".join(served))
    whom = ", for clients with the token" if token else ""
    log.info("serving an OpenAI-compatible API at http://%s:%d/v1%s", host, port, whom)
    settings = uvicorn.Config(app, host=host, port=port, log_level="warning", timeout_keep_alive=KEEP_ALIVE)
    with suppress(KeyboardInterrupt):  # uvicorn raises it after the server has shut down
        Server(settings, engine).run()


def _kind(config: Config, formats: Collection[PromptFormat]) -> Kind:
    """Return the kind of the model's rows: with pictures if a run had them or, without runs, if it can read them."""
    sees = any(prompts.kind.sees for prompts in formats)
    if not formats:
        sees = bool(image_tokens(hf_config_of(model_source(config))))
    return KINDS["vision" if sees else "generation"]


def load_adapters(base: PreTrainedModel, folders: Mapping[str, Path]) -> tuple[ReftModel, dict[str, str]]:
    """Load adapters onto one base model; return it, and its internal name for each of them.

    Raises:
        ValueError: naming the folder whose adapter cannot be served.
    """
    reft: ReftModel | None = None
    names: dict[str, str] = {}
    for number, (name, folder) in enumerate(folders.items()):
        names[name] = f"{DEFAULT}-{number}" if number else DEFAULT  # names in requests may be any text
        try:
            if reft is None:
                reft = ReftModel.from_pretrained(base, folder)
            else:
                reft.load_adapter(folder, names[name])
            adapter = reft.adapters[names[name]]
            if len(folders) > 1 and (change := change_for_all(adapter)):
                raise ValueError(f"it {change}, which would apply to all requests: serve it on its own")
            if any(positions.needs_mask for positions, _ in adapter.positions.values()):
                raise ValueError(
                    "its positions 'given' need an edit_mask in each call, which a request cannot send: serve an "
                    "adapter with other positions, such as prompt"
                )
            if adapter.takes_source:
                raise ValueError(
                    "it needs hidden states of another text in each call, which a request cannot send"
                )
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error
    assert reft is not None
    return reft, names
