"""The environment of every test, their order, and the fixtures that they share."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    # One core for each worker and the processes that it starts: more threads wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import transformers
from huggingface_hub import constants
from tiny_models import MODEL_TYPES

from hf_stable.architectures import registry


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start what may take longest first: at the end one process would wait for another's."""

    def allowed(item: pytest.Item) -> float:
        return max((mark.args[0] for mark in item.iter_markers("timeout")), default=0)

    items.sort(key=allowed, reverse=True)


def pytest_collection_finish() -> None:
    """Leave what is imported out of garbage collection: `Trainer.train` asks for a full one."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Let what was left out be freed as ever at the end."""
    gc.unfreeze()


@pytest.fixture(params=MODEL_TYPES)
def model_type(request) -> str:
    return request.param


@pytest.fixture
def own_registry(monkeypatch):
    """Registrations that end with the test."""
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub on loopback, and huggingface_hub's own client turned to it."""
    from hub_stand_in import TOKEN, StandIn

    stand_in = StandIn()
    template = stand_in.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", stand_in.endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    # transformers keeps one client, which has the endpoint of the time it was made.
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    yield stand_in
    stand_in.close()
